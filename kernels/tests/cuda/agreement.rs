//! Each kernel beside its reference.

use super::support;
use tidemill_kernels::cuda::{Driver, emulator::Order, fake::Fake};

#[path = "attention.rs"]
mod attention;
#[path = "convert.rs"]
mod convert;
#[path = "product.rs"]
mod product;
#[path = "rotary.rs"]
mod rotary;
#[path = "rows.rs"]
mod rows;
#[path = "sampling.rs"]
mod sampling;

/// Runs the same on a device for each order of threads.
fn on_devices(run: impl Fn(&dyn Driver)) {
    for order in Order::SOME {
        let device = Fake::new(order);
        run(&device);
        device.assert_nothing_left();
    }
}
