//! The emulator finds the mistakes that it is there for, and nothing in kernels without them; so does the fake device.

#![cfg(not(no_cpp_compiler))]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use support::cuda::{Buffer, floats};
use tidemill_kernels::cuda::{
    DeviceAddress, Driver, Launch, Parameters, RmsNorm, TensorMap,
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

/// `PlantedTiles` in `cu/emulator/planted_hopper.h`.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct PlantedTiles {
    map: TensorMap,
    without_swizzle: TensorMap,
    out: DeviceAddress,
    input: DeviceAddress,
    wrong: u32,
    reserved: [u32; 27],
}

impl Parameters for PlantedTiles {
    const TENSOR_MAPS: usize = 2;
}

/// What the kernel does, or what is said about it.
fn run(kernel: &'static str, order: Order, wrong: bool) -> Result<(), String> {
    if HOPPER.iter().any(|(name, _)| *name == kernel) {
        return run_on_tiles(kernel, order, wrong);
    }
    let fake = Fake::new(order).with_kernels(Kernels::Planted);
    let input: Vec<u32> = (0..128).collect();
    let (out, input) = (Buffer::new(&fake, &[0u32; 128]), Buffer::new(&fake, &input));
    let parameters =
        Planted { out: out.address(), input: input.address(), wrong: u32::from(wrong), reserved: 0 };
    let blocks = if kernel == "sum_of_blocks" { 2 } else { 1 };
    let launch = Launch::new("", kernel, [blocks, 1, 1], 128, &parameters);
    outcome(|| fake.launch(&launch).expect("a fake launches or panics"))
}

/// The same of kernels that copy tiles.
fn run_on_tiles(kernel: &'static str, order: Order, wrong: bool) -> Result<(), String> {
    let fake = Fake::new(order).with_kernels(Kernels::Planted);
    // Small numbers, as bf16.
    let input: Vec<u16> = (0..64 * 64).map(|i| 0x3f80 + i % 7 * 16).collect();
    let (out, input) = (Buffer::new(&fake, &[0u32; 128]), Buffer::new(&fake, &input));
    let map = TensorMap::new(input.address(), &[(64, 2, 64), (64, 128, 64)]).expect("a right map");
    let parameters = PlantedTiles {
        map,
        without_swizzle: map.without_swizzle(),
        out: out.address(),
        input: input.address(),
        wrong: u32::from(wrong),
        reserved: [0; 27],
    };
    let threads = if kernel == "release_of_a_stage" { 160 } else { 128 };
    let launch = Launch::new("", kernel, [1, 1, 1], threads, &parameters).with_shared_bytes(TILES_BYTES);
    outcome(|| fake.launch(&launch).expect("a fake launches or panics"))
}

/// `Tiles` in `cu/emulator/planted_hopper.h`.
const TILES_BYTES: u32 = 2 * 64 * 128 + 1024;

fn outcome(call: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => (*panic.downcast::<&str>().expect("a panic says something")).to_owned(),
    })
}

/// Mistakes in what Hopper has.
#[rustfmt::skip]
const HOPPER: &[(&str, &str)] = &[
    ("wait_for_a_tile",                    "shared memory"),
    ("phase_of_a_barrier",                 "a copy is in flight"),
    ("more_bytes_than_come",               "128 for a phase in shared memory"),
    ("fewer_bytes_than_come",              "a barrier gets 128 bytes more than it expects"),
    ("barriers_are_known_to_copies",       "a barrier that was not made known"),
    ("barriers_are_made_before_use",       "uses a barrier that"),
    ("arrival_after_a_write",              "race with another thread's write"),
    ("meeting_of_some_warps",              "of shared memory"),
    ("meeting_of_all_that_are_expected",   "64 threads wait at a barrier"),
    ("wait_for_a_product",                 "uses a sum while its product is in flight"),
    ("fence_before_a_product",             "no fence comes before the product"),
    ("fence_before_the_first_product",     "a product with no fence before it"),
    ("left_side_of_a_product",             "writes the left side of a product in flight"),
    ("swizzle_of_a_tile",                  "the copy has left them in rows of 0"),
    ("fence_between_threads_and_products", "wrote with no fence between"),
    ("fence_between_threads_and_copies",   "a copy writes what a thread wrote with no fence between"),
    ("release_of_a_stage",                 "of shared memory that a product"),
    ("a_product_of_a_whole_warpgroup",     "in their warpgroups"),
    ("the_end_of_a_copy",                  "ends with copies of tiles in flight"),
];

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
    for (kernel, expected) in rows.iter().chain(HOPPER).copied() {
        for order in Order::SOME {
            let message = run(kernel, order, true).expect_err(kernel);
            assert!(message.starts_with(kernel), "{message}");
            assert!(message.contains(expected), "{order:?}: {message}");
        }
    }
    let tried = |name: &String| rows.iter().chain(HOPPER).any(|(kernel, _)| kernel == name);
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
