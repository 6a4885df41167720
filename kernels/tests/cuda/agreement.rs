//! Each kernel beside its reference.

use super::support;
use std::sync::OnceLock;
use tidemill_kernels::cuda::{
    Driver, emulator::Order, fake::Fake, gpu::Gpu, hopper::CAPABILITY, images::Images,
};

#[path = "attention.rs"]
mod attention;
#[path = "convert.rs"]
mod convert;
#[path = "digest.rs"]
mod digest;
#[path = "exchange.rs"]
mod exchange;
#[path = "hopper.rs"]
mod hopper;
#[path = "matrix_product.rs"]
mod matrix_product;
#[path = "product.rs"]
mod product;
#[path = "prompt_attention.rs"]
mod prompt_attention;
#[path = "quantized_product.rs"]
mod quantized_product;
#[path = "rotary.rs"]
mod rotary;
#[path = "rows.rs"]
mod rows;
#[path = "sampling.rs"]
mod sampling;

/// Runs the same on a device for each order of threads, or on the GPU whose number is asked for.
fn on_devices(run: impl Fn(&dyn Driver)) {
    on_each(&Order::SOME, run);
}

/// The same in one order.
fn on_device(run: impl Fn(&dyn Driver)) {
    on_each(&[Order::Forwards], run);
}

/// The same on devices that have what Hopper has; a GPU without it has nothing to show.
fn on_hoppers(run: impl Fn(&dyn Driver)) {
    on_each_made(
        &Order::SOME,
        |order| Fake::new(order).with_compute_capability(CAPABILITY),
        |device| {
            if device.properties().compute_capability == CAPABILITY {
                run(device);
            }
        },
    );
}

fn on_each(orders: &[Order], run: impl Fn(&dyn Driver)) {
    on_each_made(orders, Fake::new, run);
}

fn on_each_made(orders: &[Order], make: impl Fn(Order) -> Fake, run: impl Fn(&dyn Driver)) {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    if let Some(number) = std::env::var_os(ASKED_FOR) {
        let number = number.to_str().and_then(|it| it.parse().ok()).expect("the number of a GPU");
        let open = || Gpu::open(number, Images::usual_folder()).expect("a GPU is there that was asked for");
        return run(GPU.get_or_init(open));
    }
    for order in orders {
        let device = make(*order);
        run(&device);
        device.assert_nothing_left();
    }
}

/// Names a GPU to run these tests on, in place of the fake device.
const ASKED_FOR: &str = "TIDEMILL_TEST_GPU";
