//! A step allocates nothing once its memory is reserved.

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};
use support::{Blocks, Numbers, Order, cpus, formats, packed, shape};
use tidemill_kernels::{
    cpu::StepLimits,
    kv::KvDtype,
    matrix::PackedMatrix,
    reference,
    step::{AttentionParams, RopeTable, SequenceRows},
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system's allocator; counting changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is the callee's condition.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the callee's condition.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// The only test of this file: others would allocate beside it.
#[test]
fn no_operation_allocates_after_reserve() {
    let (rows, heads, head_size, inputs) = (40, 4, 32, 128);
    let mut numbers = Numbers::new(1);
    let values = numbers.vector(300 * inputs);
    let matrices: Vec<PackedMatrix> =
        formats().map(|format| packed(1, 300, inputs, &values, format)).collect();
    let shape = shape(KvDtype::Bf16, 1, 16, heads, head_size, Order::TokenHead);
    let blocks = Blocks::new(shape, 64);
    // One row of a sequence that is long enough to be split over threads.
    let long = Blocks::new(shape, 2048);
    let decode = [SequenceRows { first_row: 0, rows: 1, first_position: 2000, blocks: &long.addresses }];
    let sequences = [SequenceRows { first_row: 0, rows, first_position: 3, blocks: &blocks.addresses }];
    let params = AttentionParams { query_heads: heads, scale: 0.2, sliding_window: None };
    let (cos, sin) = reference::rope_table(&[1.0; 16], rows, 1.0);
    let table = RopeTable { cos: &cos, sin: &sin, half: 16 };
    let positions: Vec<u32> = (0..40).collect();
    let weight = numbers.vector(inputs);
    let (x, mut y, mut out) =
        (numbers.vector(rows * inputs), numbers.vector(rows * inputs), vec![0.0; rows * 300]);
    let mut image = vec![0; shape.block_bytes()];
    for cpu in cpus(3) {
        cpu.reserve(StepLimits { rows, inputs, head_size });
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..3 {
            for w in &matrices {
                cpu.matmul(&mut out, &x, w, None);
                cpu.matmul_add(&mut out, &x, w, None);
            }
            cpu.rms_norm(&mut y, &x, &weight, 1e-5);
            cpu.rms_norm_in_place(&mut y, &weight, 1e-5);
            cpu.rope(&mut y, &positions, table, head_size);
            cpu.write_kv(&shape, 0, &x, &y, &sequences);
            cpu.attention(&mut y, &x, &shape, 0, &sequences, params);
            cpu.attention(&mut y, &x, &shape, 0, &decode, params);
            cpu.silu_mul(&mut y, &x, &x);
            cpu.add(&mut y, &x);
            cpu.log_softmax(&mut out[..300]);
            let span = tidemill_kernels::step::TokenSpan {
                shape: &shape,
                blocks: &blocks.addresses,
                first: 3,
                count: 9,
            };
            cpu.convert_block(&mut image, &shape, 0..1, span, 0);
            cpu.zero_tail(&shape, blocks.addresses[3], 10);
        }
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "on {}", cpu.describe());
    }
}
