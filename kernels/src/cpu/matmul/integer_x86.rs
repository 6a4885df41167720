//! Quantised weights times int8 on AVX2 and AVX-512 VNNI.
//!
//! AVX2 adds products of unsigned and signed bytes in pairs, and the sum of two saturates at 16 bits: 255 * 127 * 2 would.
//! Here neither factor is beyond 127: int8 weights give their sign to `x`, and int4 are at most 15.

use super::{
    Chunk, Multiply,
    integer::{GroupedLine, Int4, Int8, IntegerLine, LOW_HALVES, PORTABLE_ROWS, add_scaled, in_f32, widened},
    lines::{Line, ScaledLine, scaled},
    operand::ROOMY_ROWS,
};
use crate::{
    cpu::{
        avx2::Avx2,
        avx512::{Avx512, Avx512Vnni},
        level::Level,
    },
    matrix::{PANEL, Quantization},
};
use std::arch::x86_64::*;

/// Runs a chunk of quantised weights.
pub(super) fn run(chunk: Chunk<'_>, quantization: Quantization, level: Level) {
    match level {
        #[cfg(target_os = "linux")]
        Level::Amx(set) => on_vnni(chunk, quantization, set.avx512().vnni()),
        #[cfg(test)]
        Level::AmxModel => unreachable!("has tiles, and lines of its own"),
        Level::Avx512Bf16(set) => on_vnni(chunk, quantization, set.vnni()),
        Level::Avx512Vnni(set) => on_vnni(chunk, quantization, set),
        Level::Avx512(set) => on_avx2(chunk, quantization, set.avx2()),
        Level::Avx2(set) => on_avx2(chunk, quantization, set),
        Level::Portable => unreachable!("has lines of its own"),
    }
}

fn on_vnni(chunk: Chunk<'_>, quantization: Quantization, set: Avx512Vnni) {
    match quantization {
        Quantization::Int8 => set.dispatch(Multiply { chunk, dots: Int8(VnniInt8(set)) }),
        Quantization::Fp8 => unreachable!("is multiplied in floating point"),
        Quantization::Int4 { group } => {
            set.dispatch(Multiply { chunk, dots: Int4 { line: VnniInt4(set), group } });
        }
    }
}

fn on_avx2(chunk: Chunk<'_>, quantization: Quantization, set: Avx2) {
    match quantization {
        Quantization::Int8 => set.dispatch(Multiply { chunk, dots: Int8(Avx2Int8(set)) }),
        Quantization::Fp8 => unreachable!("is multiplied in floating point"),
        Quantization::Int4 { group } => {
            set.dispatch(Multiply { chunk, dots: Int4 { line: Avx2Int4(set), group } });
        }
    }
}

/// Int8 by `vpdpbusd`. The field is the proof that the machine has it.
#[derive(Clone, Copy)]
struct VnniInt8(Avx512Vnni);

/// Int4 by `vpdpbusd`. The field is the proof that the machine has it.
#[derive(Clone, Copy)]
struct VnniInt4(Avx512Vnni);

/// Int8 by `vpmaddubsw`. The field is the proof that the machine has it.
#[derive(Clone, Copy)]
struct Avx2Int8(Avx2);

/// Int4 by `vpmaddubsw`. The field is the proof that the machine has it.
#[derive(Clone, Copy)]
struct Avx2Int4(Avx2);

impl Line for VnniInt8 {
    type Stored = [u32; PANEL];
    type Weights = __m512i;
    type Sums = __m512i;
    type Sum = i32;
    const UNITS: usize = 1;
    const WEIGHTS_STAY: bool = true;
    const ASKS_FROM: usize = 5;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> __m512i {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { load_line(line) }
    }

    #[inline(always)]
    fn add(self, sums: __m512i, x: u32, weights: &__m512i, _unit: usize) -> __m512i {
        // SAFETY: as in `weights`.
        unsafe { add_signed_512(sums, x.cast_signed(), *weights) }
    }

    #[inline(always)]
    fn values(self, sums: __m512i) -> [i32; PANEL] {
        // SAFETY: as in `weights`.
        unsafe { values_512(sums) }
    }
}

impl Line for VnniInt4 {
    type Stored = [u32; PANEL];
    type Weights = [__m512i; 2];
    type Sums = __m512i;
    type Sum = i32;
    const UNITS: usize = 2;
    const ASKS_FROM: usize = 3;
    const ASKS_ALONE: bool = true;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> [__m512i; 2] {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { halves_512(line) }
    }

    #[inline(always)]
    fn add(self, sums: __m512i, x: u32, weights: &[__m512i; 2], unit: usize) -> __m512i {
        // SAFETY: as in `weights`.
        unsafe { add_unsigned_512(sums, x.cast_signed(), weights[unit]) }
    }

    #[inline(always)]
    fn values(self, sums: __m512i) -> [i32; PANEL] {
        // SAFETY: as in `weights`.
        unsafe { values_512(sums) }
    }
}

macro_rules! vnni_integer_line {
    ($line:ty, unsigned x: $unsigned:literal) => {
        impl IntegerLine for $line {
            type Simd = Avx512;
            const MAX_ROWS: usize = ROOMY_ROWS;
            const UNSIGNED_X: bool = $unsigned;

            #[inline(always)]
            fn simd(self) -> Avx512 {
                self.0.avx512()
            }

            #[inline(always)]
            fn splat(self, value: i32) -> __m512i {
                // SAFETY: the machine has the features: `self` exists.
                unsafe { splat_512(value) }
            }

            #[inline(always)]
            fn load(self, values: &[i32; PANEL]) -> __m512i {
                // SAFETY: as in `splat`.
                unsafe { load_512(values) }
            }
        }

        impl ScaledLine for $line {
            #[inline(always)]
            fn scaled(self, sums: __m512i, scales: &[f32; PANEL], x_scale: f32) -> [f32; PANEL] {
                // SAFETY: as in `splat`.
                unsafe { scaled_512(sums, scales, x_scale) }
            }
        }
    };
}

vnni_integer_line!(VnniInt8, unsigned x: true);
vnni_integer_line!(VnniInt4, unsigned x: false);

impl GroupedLine for VnniInt4 {
    type Values = __m512;

    #[inline(always)]
    fn zeros(self) -> __m512 {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { zeros_512() }
    }

    #[inline(always)]
    fn scales(self, bits: &[u16; PANEL]) -> __m512 {
        // SAFETY: as in `zeros`.
        unsafe { scales_512(bits) }
    }

    #[inline(always)]
    fn add_scaled(self, values: __m512, sums: __m512i, scales: __m512) -> __m512 {
        // SAFETY: as in `zeros`.
        unsafe { add_scaled_512(values, sums, scales) }
    }

    #[inline(always)]
    fn finished(self, values: __m512, x_scale: f32) -> [f32; PANEL] {
        // SAFETY: as in `zeros`.
        unsafe { finished_512(values, x_scale) }
    }
}

impl Line for Avx2Int8 {
    type Stored = [u32; PANEL];
    /// The weights and their magnitudes.
    type Weights = [[__m256i; 2]; 2];
    type Sums = [__m256i; 2];
    type Sum = i32;
    const UNITS: usize = 1;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> [[__m256i; 2]; 2] {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { signed_256(line) }
    }

    #[inline(always)]
    fn add(self, sums: [__m256i; 2], x: u32, weights: &[[__m256i; 2]; 2], _unit: usize) -> [__m256i; 2] {
        // SAFETY: as in `weights`.
        unsafe { add_signed(sums, x.cast_signed(), weights) }
    }

    #[inline(always)]
    fn values(self, sums: [__m256i; 2]) -> [i32; PANEL] {
        // SAFETY: as in `weights`.
        unsafe { values_256(sums) }
    }
}

impl Line for Avx2Int4 {
    type Stored = [u32; PANEL];
    type Weights = [[__m256i; 2]; 2];
    type Sums = [__m256i; 2];
    type Sum = i32;
    const UNITS: usize = 2;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> [[__m256i; 2]; 2] {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { halves_256(line) }
    }

    #[inline(always)]
    fn add(self, sums: [__m256i; 2], x: u32, weights: &[[__m256i; 2]; 2], unit: usize) -> [__m256i; 2] {
        // SAFETY: as in `weights`.
        unsafe { add_unsigned(sums, x.cast_signed(), weights[unit]) }
    }

    #[inline(always)]
    fn values(self, sums: [__m256i; 2]) -> [i32; PANEL] {
        // SAFETY: as in `weights`.
        unsafe { values_256(sums) }
    }
}

macro_rules! avx2_integer_line {
    ($line:ty) => {
        impl IntegerLine for $line {
            type Simd = Avx2;
            const MAX_ROWS: usize = PORTABLE_ROWS;
            const UNSIGNED_X: bool = false;

            #[inline(always)]
            fn simd(self) -> Avx2 {
                self.0
            }

            #[inline(always)]
            fn splat(self, value: i32) -> [__m256i; 2] {
                // SAFETY: the machine has the features: `self` exists.
                [unsafe { splat_256(value) }; 2]
            }

            #[inline(always)]
            fn load(self, values: &[i32; PANEL]) -> [__m256i; 2] {
                // SAFETY: as in `splat`.
                unsafe { load_256(values) }
            }
        }

        impl ScaledLine for $line {
            #[inline(always)]
            fn scaled(self, sums: [__m256i; 2], scales: &[f32; PANEL], x_scale: f32) -> [f32; PANEL] {
                scaled(in_f32(self.values(sums)), scales, x_scale)
            }
        }
    };
}

avx2_integer_line!(Avx2Int8);
avx2_integer_line!(Avx2Int4);

impl GroupedLine for Avx2Int4 {
    type Values = [f32; PANEL];

    #[inline(always)]
    fn zeros(self) -> [f32; PANEL] {
        [0.0; PANEL]
    }

    #[inline(always)]
    fn scales(self, bits: &[u16; PANEL]) -> [f32; PANEL] {
        widened(bits)
    }

    #[inline(always)]
    fn add_scaled(self, values: [f32; PANEL], sums: [__m256i; 2], scales: [f32; PANEL]) -> [f32; PANEL] {
        add_scaled(values, self.values(sums), scales)
    }

    #[inline(always)]
    fn finished(self, values: [f32; PANEL], x_scale: f32) -> [f32; PANEL] {
        values.map(|value| value * x_scale)
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn splat_512(value: i32) -> __m512i {
    _mm512_set1_epi32(value)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_512(values: &[i32; PANEL]) -> __m512i {
    // SAFETY: sixteen elements are good for reads through the reference.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_line(line: &[u32; PANEL]) -> __m512i {
    // SAFETY: sixty-four bytes are good for reads through the reference.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn values_512(sums: __m512i) -> [i32; PANEL] {
    let mut values = [0; PANEL];
    // SAFETY: sixteen elements are good for writes.
    unsafe { _mm512_storeu_si512(values.as_mut_ptr().cast(), sums) };
    values
}

#[inline]
#[target_feature(enable = "avx512f")]
fn zeros_512() -> __m512 {
    _mm512_setzero_ps()
}

#[inline]
#[target_feature(enable = "avx512f")]
fn scales_512(bits: &[u16; PANEL]) -> __m512 {
    // SAFETY: thirty-two bytes are good for reads through the reference.
    let bits = unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add_scaled_512(values: __m512, sums: __m512i, scales: __m512) -> __m512 {
    _mm512_add_ps(values, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn finished_512(values: __m512, x_scale: f32) -> [f32; PANEL] {
    let scaled = _mm512_mul_ps(values, _mm512_set1_ps(x_scale));
    let mut products = [0.0; PANEL];
    // SAFETY: sixteen elements are good for writes.
    unsafe { _mm512_storeu_ps(products.as_mut_ptr(), scaled) };
    products
}

#[inline]
#[target_feature(enable = "avx512f")]
fn scaled_512(sums: __m512i, scales: &[f32; PANEL], x_scale: f32) -> [f32; PANEL] {
    // SAFETY: sixteen elements are good for reads through the reference.
    let scales = unsafe { _mm512_loadu_ps(scales.as_ptr()) };
    finished_512(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales), x_scale)
}

/// Adds products of `x` plus 128 with weights.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_signed_512(sums: __m512i, x: i32, weights: __m512i) -> __m512i {
    _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(x), weights)
}

/// Adds products of `x` with weights from 0 on.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_unsigned_512(sums: __m512i, x: i32, weights: __m512i) -> __m512i {
    _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(x))
}

/// The lower and the upper half of each byte.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves_512(line: &[u32; PANEL]) -> [__m512i; 2] {
    let line = load_line(line);
    let low = _mm512_set1_epi32(LOW_HALVES.cast_signed());
    [_mm512_and_si512(line, low), _mm512_and_si512(_mm512_srli_epi32::<4>(line), low)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn splat_256(value: i32) -> __m256i {
    _mm256_set1_epi32(value)
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_256(values: &[i32; PANEL]) -> [__m256i; 2] {
    let (halves, _) = values.as_chunks::<8>();
    [&halves[0], &halves[1]].map(|half| {
        // SAFETY: eight elements are good for reads through the reference.
        unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
    })
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_line_256(line: &[u32; PANEL]) -> [__m256i; 2] {
    let (halves, _) = line.as_chunks::<8>();
    [&halves[0], &halves[1]].map(|half| {
        // SAFETY: thirty-two bytes are good for reads through the reference.
        unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
    })
}

#[inline]
#[target_feature(enable = "avx2")]
fn values_256(sums: [__m256i; 2]) -> [i32; PANEL] {
    let mut values = [0; PANEL];
    for (half, sums) in values.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
        // SAFETY: eight elements are good for writes through the reference.
        unsafe { _mm256_storeu_si256(half.as_mut_ptr().cast(), sums) };
    }
    values
}

#[inline]
#[target_feature(enable = "avx2")]
fn signed_256(line: &[u32; PANEL]) -> [[__m256i; 2]; 2] {
    let weights = load_line_256(line);
    [weights, [_mm256_abs_epi8(weights[0]), _mm256_abs_epi8(weights[1])]]
}

#[inline]
#[target_feature(enable = "avx2")]
fn halves_256(line: &[u32; PANEL]) -> [[__m256i; 2]; 2] {
    let low = _mm256_set1_epi32(LOW_HALVES.cast_signed());
    let [a, b] = load_line_256(line);
    let high = |half| _mm256_and_si256(_mm256_srli_epi32::<4>(half), low);
    [[_mm256_and_si256(a, low), _mm256_and_si256(b, low)], [high(a), high(b)]]
}

/// Adds products of `x` with `[weights, |weights|]`.
#[inline]
#[target_feature(enable = "avx2")]
fn add_signed(sums: [__m256i; 2], x: i32, [signs, magnitudes]: &[[__m256i; 2]; 2]) -> [__m256i; 2] {
    let x = _mm256_set1_epi32(x);
    let products = |magnitudes, signs| pairs(_mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, signs)));
    [
        _mm256_add_epi32(sums[0], products(magnitudes[0], signs[0])),
        _mm256_add_epi32(sums[1], products(magnitudes[1], signs[1])),
    ]
}

/// Adds products of `x` with weights of at most 15.
#[inline]
#[target_feature(enable = "avx2")]
fn add_unsigned(sums: [__m256i; 2], x: i32, weights: [__m256i; 2]) -> [__m256i; 2] {
    let x = _mm256_set1_epi32(x);
    let products = |weights| pairs(_mm256_maddubs_epi16(weights, x));
    [_mm256_add_epi32(sums[0], products(weights[0])), _mm256_add_epi32(sums[1], products(weights[1]))]
}

/// Sums of neighbouring 16-bit numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs(sums: __m256i) -> __m256i {
    _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
}
