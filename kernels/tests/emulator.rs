//! The emulator finds the mistakes that it is there for, and nothing in kernels without them; so does the fake device.

#![cfg(not(no_cpp_compiler))]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use support::cuda::{Buffer, floats};
use tidemill_kernels::cuda::{
    DeviceAddress, Driver, Launch, Parameters, RmsNorm,
    emulator::{Kernels, Order, names},
    fake::Fake,
    launches,
};
use tidemill_kernels::matrix::WeightDtype;

/// `Planted` in `cu/emulator/planted.cpp`.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Planted {
    out: DeviceAddress,
    input: DeviceAddress,
    wrong: u32,
    reserved: u32,
}

impl Parameters for Planted {}

/// What the kernel does, or what is said about it.
fn run(kernel: &'static str, order: Order, wrong: bool) -> Result<(), String> {
    let fake = Fake::new(order).with_kernels(Kernels::Planted);
    let input: Vec<u32> = (0..128).collect();
    let (out, input) = (Buffer::new(&fake, &[0u32; 128]), Buffer::new(&fake, &input));
    let parameters =
        Planted { out: out.address(), input: input.address(), wrong: u32::from(wrong), reserved: 0 };
    let blocks = if kernel == "sum_of_blocks" { 2 } else { 1 };
    let launch = Launch::new("", kernel, [blocks, 1, 1], 128, &parameters);
    outcome(|| fake.launch(&launch).expect("a fake launches or panics"))
}

fn outcome(call: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => (*panic.downcast::<&str>().expect("a panic says something")).to_owned(),
    })
}

#[test]
fn planted_mistakes_are_found() {
    #[rustfmt::skip]
    let rows = [
        ("barrier_between_write_and_read", "of shared memory"),
        ("barrier_between_read_and_write", "race with another thread's"),
        ("warp_barrier",                   "race with another thread's write"),
        ("sum_of_blocks",                  "race with another thread's"),
        ("bounds_of_an_allocation",        "outside of every allocation"),
        ("bounds_of_shared_memory",        "outside of every allocation"),
        ("written_before_it_is_read",      "reads what nobody wrote"),
        ("barrier_for_all_threads",        "waits at the barrier of line"),
        ("shuffle_for_all_lanes",          "for others that never come"),
        ("alignment",                      "misaligned"),
        ("wait_for_a_copy",                "a copy is in flight"),
        ("barrier_after_a_copy",           "of shared memory"),
        ("source_of_a_copy",               "race with another thread's"),
        ("barrier_before_matrices",        "of shared memory"),
        ("rows_of_matrices_are_aligned",   "misaligned"),
        ("a_product_of_all_lanes",         "for others that never come"),
    ];
    for (kernel, expected) in rows {
        for order in Order::SOME {
            let message = run(kernel, order, true).expect_err(kernel);
            assert!(message.starts_with(kernel), "{message}");
            assert!(message.contains(expected), "{order:?}: {message}");
        }
    }
    let tried = |name: &String| rows.iter().any(|(kernel, _)| kernel == name);
    assert!(names(Kernels::Planted).iter().all(tried), "each mistake has a row");
}

#[test]
fn right_kernels_pass_in_every_order() {
    for kernel in names(Kernels::Planted) {
        for order in Order::SOME {
            let kernel: &'static str = kernel.clone().leak();
            assert_eq!(run(kernel, order, false), Ok(()), "{order:?}");
        }
    }
}

#[test]
fn launches_that_cannot_be_are_refused() {
    let fake = Fake::new(Order::Forwards).with_kernels(Kernels::Planted);
    let null = DeviceAddress::NULL;
    let short = RmsNorm { out: null, state: null, delta: null, weight: null, width: 1, eps: 0.0 };
    let right = Planted { out: null, input: null, wrong: 0, reserved: 0 };
    let rows = [
        ("no kernel nowhere", Launch::new("", "nowhere", [1, 1, 1], 32, &right)),
        ("takes 24 bytes of parameters, not 40", Launch::new("", "alignment", [1, 1, 1], 32, &short)),
        ("at most 128", Launch::new("", "alignment", [1, 1, 1], 256, &right)),
    ];
    for (expected, launch) in rows {
        let message = outcome(|| fake.launch(&launch).unwrap()).expect_err(expected);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_kernel_on_memory_that_was_given_back_is_found() {
    let fake = &Fake::new(Order::Forwards);
    let (x, weight) = (Buffer::new(fake, &[1.0f32; 64]), Buffer::new(fake, &[1.0f32; 64]));
    let parameters = RmsNorm {
        out: x.address(),
        state: x.address(),
        delta: DeviceAddress::NULL,
        weight: weight.address(),
        width: 64,
        eps: 0.0,
    };
    let launch = launches::rms_norm(WeightDtype::F32, 1, &parameters);
    fake.launch(&launch).unwrap();
    assert_eq!(floats(&x, WeightDtype::F32), [1.0; 64]);
    assert_eq!(fake.launches(), [launch]);
    drop(weight);
    let message = outcome(|| fake.launch(&launch).unwrap()).expect_err("the weight is gone");
    assert!(message.contains("outside of every allocation"), "{message}");
}
