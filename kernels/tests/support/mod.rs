//! What the tests of the kernels share: numbers, blocks in memory and comparisons.

#![allow(dead_code, unreachable_pub)]

#[cfg(not(no_cpp_compiler))]
pub mod cuda;

use std::{iter, slice};
use tidemill_kernels::{
    cpu::{Cpu, CpuOptions, Isa},
    kv::{BlockAddress, KvBlockShape, KvDtype},
    matrix::{MatrixSource, PackedMatrix, Quantization, WeightDtype, WeightFormat},
};

/// Numbers that look random and are the same in each run.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Between -1 and 1.
    pub fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    pub fn vector(&mut self, len: usize) -> Vec<f32> {
        iter::repeat_with(|| self.number()).take(len).collect()
    }
}

pub const ISAS: [Isa; 6] = Isa::ALL;
pub const KV_DTYPES: [KvDtype; 5] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8];
pub const QUANTIZATIONS: [Quantization; 5] = [
    Quantization::Int8,
    Quantization::Fp8,
    Quantization::Int4 { group: 32 },
    Quantization::Int4 { group: 64 },
    Quantization::Int4 { group: 128 },
];
pub const WEIGHT_DTYPES: [WeightDtype; 3] = [WeightDtype::F32, WeightDtype::F16, WeightDtype::Bf16];

/// `None` when this machine does not have the instructions, which the rows of the other sets then stand for.
pub fn cpu(isa: Isa, threads: usize) -> Option<Cpu> {
    let cores = vec![];
    let cpu = Cpu::new(CpuOptions { cores, isa: Some(isa), threads: Some(threads) });
    isa.is_available().then(|| cpu.expect("the instructions are there and no core is asked for"))
}

pub fn cpus(threads: usize) -> impl Iterator<Item = Cpu> {
    ISAS.into_iter().filter_map(move |isa| cpu(isa, threads))
}

/// Weights in a stored type, as a file holds them.
pub fn stored(values: &[f32], dtype: WeightDtype) -> Vec<u8> {
    values
        .iter()
        .flat_map(|&value| match dtype {
            WeightDtype::F32 => value.to_le_bytes().to_vec(),
            WeightDtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            WeightDtype::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        })
        .collect()
}

pub fn source(bytes: &[u8], dtype: WeightDtype) -> MatrixSource<'_> {
    MatrixSource { bytes, dtype }
}

/// Every way to hold a matrix.
pub fn formats() -> impl Iterator<Item = WeightFormat> {
    let stored = WEIGHT_DTYPES.into_iter().map(WeightFormat::Stored);
    stored.chain(QUANTIZATIONS.into_iter().map(WeightFormat::Quantized))
}

/// A matrix in a format; quantised ones are made of bf16.
pub fn packed(
    threads: usize,
    outputs: usize,
    inputs: usize,
    values: &[f32],
    format: WeightFormat,
) -> PackedMatrix {
    match format {
        WeightFormat::Stored(dtype) => {
            PackedMatrix::pack_on(threads, outputs, inputs, source(&stored(values, dtype), dtype))
        }
        WeightFormat::Quantized(quantization) => {
            let bytes = stored(values, WeightDtype::Bf16);
            let source = source(&bytes, WeightDtype::Bf16);
            PackedMatrix::quantize_on(threads, outputs, inputs, source, quantization)
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    TokenHead,
    HeadToken,
}

/// The shape of a block as the layout of the handoff has it.
pub fn shape(
    dtype: KvDtype,
    layers: usize,
    block_len: usize,
    kv_heads: usize,
    head_size: usize,
    order: Order,
) -> KvBlockShape {
    let row = head_size * dtype.bytes();
    let scale = if dtype.has_scales() { size_of::<f32>() } else { 0 };
    let (token, head) = match order {
        Order::TokenHead => (kv_heads, 1),
        Order::HeadToken => (1, block_len),
    };
    let (data, scales) = (block_len * kv_heads * row, block_len * kv_heads * scale);
    KvBlockShape {
        dtype,
        layers,
        block_len,
        kv_heads,
        head_size,
        layer_stride: (2 * data + 2 * scales).next_multiple_of(64),
        key_offset: 0,
        value_offset: data,
        key_scale_offset: 2 * data,
        value_scale_offset: 2 * data + scales,
        token_stride: token * row,
        head_stride: head * row,
        scale_token_stride: token * scale,
        scale_head_stride: head * scale,
    }
}

/// Blocks in memory, in an order that is not that of their addresses, full of what was there before.
pub struct Blocks {
    memory: Vec<[u64; 8]>,
    shape: KvBlockShape,
    pub addresses: Vec<BlockAddress>,
}

/// As f32, f16, bf16 and e4m3 a NaN: whatever reads a slot that was not written is found out.
pub const STALE: u64 = u64::MAX;

impl Blocks {
    pub fn new(shape: KvBlockShape, tokens: usize) -> Self {
        let count = tokens.div_ceil(shape.block_len);
        let mut memory = vec![[STALE; 8]; (count * shape.block_bytes()).div_ceil(64) + 1];
        let unaligned: *mut u8 = memory.as_mut_ptr().cast();
        let skip = unaligned.align_offset(64);
        let addresses = (0..count)
            .rev()
            .map(|block| {
                // SAFETY: the memory has room for all blocks and 64 bytes more, which the alignment takes from.
                let first_byte = unsafe { unaligned.add(skip + block * shape.block_bytes()) };
                // SAFETY: good for one block, aligned to 64 bytes since block sizes are multiples of it, and alive as
                // long as `self`; each test gives a block to one operation at a time.
                unsafe { BlockAddress::new(first_byte) }
            })
            .collect();
        Self { memory, shape, addresses }
    }

    pub fn bytes(&self, block: usize) -> &[u8] {
        // SAFETY: one whole block, initialised, that nobody writes while the test looks at it.
        unsafe { slice::from_raw_parts(self.addresses[block].as_ptr(), self.shape.block_bytes()) }
    }
}

/// Panics when an element differs by more than `tolerance` times the greatest expected element.
pub fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32, name: &str) {
    assert_eq!(actual.len(), expected.len(), "{name}");
    let greatest = expected.iter().fold(1e-30f32, |max, x| max.max(x.abs()));
    for (index, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let difference = (actual - expected).abs();
        assert!(
            difference <= tolerance * greatest,
            "{name}: element {index} is {actual}, not {expected}: off by {} of {greatest}",
            difference / greatest
        );
    }
}

/// Panics when an element differs in a bit.
pub fn assert_same_bits(actual: &[f32], expected: &[f32], name: &str) {
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (index, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert_eq!(actual.to_bits(), expected.to_bits(), "{name}: element {index}: {actual} and {expected}");
    }
}
