//! What a machine can do at most: reading memory, and multiplying and adding numbers that are in registers.
//!
//! Not used by any model; whoever measures kernels takes these beside them, in the same run and on the same threads.

#[cfg(all(test, target_arch = "x86_64"))]
use super::amx::ModelTiles;
use super::{
    Cpu,
    level::Level,
    pool::lock,
    simd::{Kernel, LANES, Simd},
};
#[cfg(target_arch = "x86_64")]
use super::{
    Isa,
    amx::{TILE_ROWS, TILE_UNITS, Tile, Tiles},
};
use crate::{
    aligned::AlignedBuffer,
    matrix::{PANEL, Quantization, WeightDtype, WeightFormat},
};
use std::{
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
};

/// Kinds of multiply-adds that machines have instructions for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Single precision.
    F32,
    /// Products of bf16, sums of f32.
    Bf16,
    /// Products of int8, sums of int32.
    Int8,
}

impl Arithmetic {
    /// What it is called in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

/// Numbers in memory of the kind that weights lie in: what is read of them per second is the limit of reading weights.
#[derive(Debug)]
pub struct Numbers(AlignedBuffer);

impl Numbers {
    /// `count` ones.
    pub fn ones(count: usize) -> Self {
        let mut numbers = AlignedBuffer::zeroed_beside_others(count * size_of::<f32>());
        // Written, or the system would back them all with one page of zeros, which fits into every cache.
        numbers.as_mut_slice::<f32>().fill(1.0);
        Self(numbers)
    }

    /// All of them.
    pub fn as_slice(&self) -> &[f32] {
        self.0.as_slice()
    }
}

impl Cpu {
    /// The fastest arithmetic that these instructions have for weights of `format`, whether or not a kernel uses it.
    pub fn arithmetic(&self, format: WeightFormat) -> Arithmetic {
        match (format, self.level) {
            (WeightFormat::Quantized(Quantization::Int8 | Quantization::Int4 { .. }), level)
                if has_int8(level) =>
            {
                Arithmetic::Int8
            }
            (WeightFormat::Stored(WeightDtype::Bf16) | WeightFormat::Quantized(Quantization::Fp8), level)
                if has_bf16(level) =>
            {
                Arithmetic::Bf16
            }
            _ => Arithmetic::F32,
        }
    }

    /// Reads `memory` once, shared out among all threads, and returns a sum of it that depends on every number.
    pub fn sum(&self, memory: &[f32]) -> f32 {
        let step = &mut *lock(&self.step);
        let total = AtomicU64::new(0);
        step.pool.for_each(memory.len().div_ceil(READ_CHUNK), |_, chunk| {
            let first = chunk * READ_CHUNK;
            let part = &memory[first..memory.len().min(first + READ_CHUNK)];
            let sum = self.level.run(Sum(part));
            // Bits and not values, since atomics know no floats: it only has to depend on all of them.
            total.fetch_add(u64::from(sum.to_bits()), Ordering::Relaxed);
        });
        f32::from_bits(total.into_inner() as u32)
    }

    /// Multiplies and adds `rounds` times on every thread, in as many registers as keep the units busy, and returns the
    /// number of operations of all threads: two for each product. Zero where there are no such instructions.
    pub fn multiply_add(&self, arithmetic: Arithmetic, rounds: usize) -> u64 {
        let step = &mut *lock(&self.step);
        let done = AtomicU64::new(0);
        step.pool.for_each(self.threads * CHUNKS_PER_THREAD, |_, _| {
            let operations = multiply_add(self.level, arithmetic, rounds / CHUNKS_PER_THREAD);
            done.fetch_add(operations, Ordering::Relaxed);
        });
        done.into_inner()
    }
}

#[cfg(target_arch = "x86_64")]
const fn has_int8(level: Level) -> bool {
    !matches!(level, Level::Portable)
}

#[cfg(target_arch = "x86_64")]
fn has_bf16(level: Level) -> bool {
    matches!(level.isa(), Isa::Avx512Bf16 | Isa::Amx)
}

#[cfg(not(target_arch = "x86_64"))]
const fn has_int8(_: Level) -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_bf16(_: Level) -> bool {
    false
}

/// One thread's part; returns its operations.
#[cfg(target_arch = "x86_64")]
fn multiply_add(level: Level, arithmetic: Arithmetic, rounds: usize) -> u64 {
    match (arithmetic, level) {
        (Arithmetic::F32, _) => level.run(MultiplyAdd(rounds)),
        #[cfg(target_os = "linux")]
        (_, Level::Amx(set)) => multiply_tiles(&mut set.tiles(), arithmetic, rounds),
        #[cfg(test)]
        (_, Level::AmxModel) => multiply_tiles(&mut ModelTiles::new(), arithmetic, rounds),
        (Arithmetic::Bf16, Level::Avx512Bf16(_)) => {
            // SAFETY: the machine has the features: the level holds the proof.
            unsafe { x86::bf16_512(rounds) }
        }
        (Arithmetic::Int8, Level::Avx512Bf16(_) | Level::Avx512Vnni(_)) => {
            // SAFETY: as above.
            unsafe { x86::int8_512(rounds) }
        }
        (Arithmetic::Int8, Level::Avx512(_) | Level::Avx2(_)) => {
            // SAFETY: as above.
            unsafe { x86::int8_256(rounds) }
        }
        (Arithmetic::Bf16, _) | (Arithmetic::Int8, Level::Portable) => 0,
    }
}

/// The four products of two tiles and two others, again and again; a sixteenth of the rounds, since each does so much.
#[cfg(target_arch = "x86_64")]
fn multiply_tiles<T: Tiles>(tiles: &mut T, arithmetic: Arithmetic, rounds: usize) -> u64 {
    let mut tile: Tile = [[0; TILE_UNITS]; TILE_ROWS];
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
    tiles.load::<4>(&tile);
    tiles.load::<5>(&tile);
    tiles.load::<6>(&tile);
    tiles.load::<7>(&tile);
    let rounds = rounds.div_ceil(16);
    for _ in 0..rounds {
        if arithmetic == Arithmetic::Int8 {
            tiles.add_int8::<0, 4, 6>();
            tiles.add_int8::<1, 4, 7>();
            tiles.add_int8::<2, 5, 6>();
            tiles.add_int8::<3, 5, 7>();
        } else {
            tiles.add_bf16::<0, 4, 6>();
            tiles.add_bf16::<1, 4, 7>();
            tiles.add_bf16::<2, 5, 6>();
            tiles.add_bf16::<3, 5, 7>();
        }
    }
    tiles.store::<0>(&mut tile);
    black_box(tile);
    let inputs_of_unit = if arithmetic == Arithmetic::Int8 { 4 } else { 2 };
    (rounds * 4 * TILE_ROWS * TILE_UNITS * TILE_UNITS * inputs_of_unit * 2) as u64
}

/// One thread's part; returns its operations.
#[cfg(not(target_arch = "x86_64"))]
fn multiply_add(level: Level, arithmetic: Arithmetic, rounds: usize) -> u64 {
    if arithmetic == Arithmetic::F32 { level.run(MultiplyAdd(rounds)) } else { 0 }
}

/// Sums numbers in an order of its own.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let (vectors, rest) = self.0.as_chunks::<LANES>();
        let mut sums = [simd.splat(0.0); STREAMS];
        let groups = vectors.chunks_exact(STREAMS);
        let left = groups.remainder();
        for group in groups {
            for (sum, vector) in sums.iter_mut().zip(group) {
                *sum = simd.add(*sum, simd.load(vector));
            }
        }
        for vector in left {
            sums[0] = simd.add(sums[0], simd.load(vector));
        }
        let mut lanes = [0.0; LANES];
        let all = sums.into_iter().fold(simd.splat(0.0), |all, sum| simd.add(all, sum));
        simd.store(all, &mut lanes);
        lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
    }
}

/// Multiply-adds of f32 in the registers that matrix products use.
struct MultiplyAdd(usize);

impl Kernel for MultiplyAdd {
    type Output = u64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u64 {
        // A wide panel is one register where there are 32 of them, otherwise two or more of 16.
        if S::IS_ROOMY { chains::<S, 12>(simd, self.0) } else { chains::<S, 5>(simd, self.0) }
    }
}

#[inline(always)]
fn chains<S: Simd, const CHAINS: usize>(simd: S, rounds: usize) -> u64 {
    // Neither overflows nor vanishes: every number stays near one.
    let factor = black_box(0.5);
    let weights = simd.panel_mul_add(1.0, simd.panel_zero(), simd.panel_zero());
    let mut sums = [weights; CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = simd.panel_mul_add(factor, weights, *sum);
        }
    }
    for sum in sums {
        black_box(simd.panel_values(sum));
    }
    (rounds * CHAINS * PANEL * 2) as u64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    /// Chains that do not wait for each other: enough for two units of five cycles.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16_512(rounds: usize) -> u64 {
        let factor = black_box(_mm512_set1_ps(1.0));
        // SAFETY: both types are 64 bytes that may have any value.
        let factor: __m512bh = unsafe { std::mem::transmute(factor) };
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        (rounds * CHAINS * 32 * 2) as u64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8_512(rounds: usize) -> u64 {
        let factor = black_box(_mm512_set1_epi8(1));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        black_box(sums);
        (rounds * CHAINS * 64 * 2) as u64
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn int8_256(rounds: usize) -> u64 {
        let (ones, mut factor) = (_mm256_set1_epi16(1), _mm256_set1_epi8(1));
        let weights = black_box([factor; CHAINS]);
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            // Otherwise the products, which are always the same, would be computed once.
            factor = black_box(factor);
            for (sum, weights) in sums.iter_mut().zip(&weights) {
                let pairs = _mm256_maddubs_epi16(factor, *weights);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        black_box(sums);
        (rounds * CHAINS * 32 * 2) as u64
    }
}

/// Numbers that are read at a time.
const READ_CHUNK: usize = 1 << 18;
/// Vectors that are read side by side.
const STREAMS: usize = 8;
/// A thread that loses its core for a while leaves its part to the others.
const CHUNKS_PER_THREAD: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{CpuOptions, Isa};

    fn cpus() -> impl Iterator<Item = Cpu> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(|isa| {
            let options = CpuOptions { isa: Some(isa), threads: Some(2), ..CpuOptions::default() };
            Cpu::new(options).expect("the instructions are there")
        })
    }

    #[test]
    fn all_of_the_memory_is_read() {
        // Small whole numbers are summed without rounding, in whatever order.
        for cpu in cpus() {
            for len in [0, 1, 7, 8, 63, 64, 65, 1000] {
                let memory: Vec<f32> = (0..len).map(|index| index as f32).collect();
                assert_eq!(cpu.sum(&memory), memory.iter().sum::<f32>(), "{len} numbers on {}", cpu.isa());
            }
            let mut long = vec![0.0; 2 * READ_CHUNK + 3];
            let before = cpu.sum(&long).to_bits();
            *long.last_mut().expect("it is long") = 1.0;
            assert_ne!(cpu.sum(&long).to_bits(), before, "the last number counts on {}", cpu.isa());
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_round_of_tiles_is_four_products_of_two_tiles() {
        for (arithmetic, inputs) in [(Arithmetic::Bf16, 32), (Arithmetic::Int8, 64)] {
            assert_eq!(
                multiply_add(Level::AmxModel, arithmetic, 48),
                3 * 4 * 2 * 16 * 16 * inputs,
                "{arithmetic:?}"
            );
        }
    }

    #[test]
    fn operations_are_those_of_all_threads_and_rounds() {
        for cpu in cpus() {
            for format in [
                WeightFormat::Stored(WeightDtype::F32),
                WeightFormat::Stored(WeightDtype::Bf16),
                WeightFormat::Quantized(Quantization::Int8),
                WeightFormat::Quantized(Quantization::Fp8),
                WeightFormat::Quantized(Quantization::Int4 { group: 32 }),
            ] {
                let arithmetic = cpu.arithmetic(format);
                let once = cpu.multiply_add(arithmetic, 16 * CHUNKS_PER_THREAD);
                assert!(0 < once, "{arithmetic:?} on {}", cpu.isa());
                assert_eq!(cpu.multiply_add(arithmetic, 48 * CHUNKS_PER_THREAD), 3 * once);
                assert_eq!(once % (2 * 2 * CHUNKS_PER_THREAD as u64), 0, "multiply and add, on two threads");
            }
        }
    }
}
