//! Weights of bf16 times `x` rounded to bf16, two inputs at a time: twice as many products per instruction as in f32.
//!
//! `vdpbf16ps` adds the product of the second input, then that of the first, to an f32, each with one rounding; numbers
//! too small for an f32's normal range count as zero (Intel SDM, volume 2, VDPBF16PS). What is lost is the rounding of
//! `x`: 2^-9 of each element, as in every framework that computes in bf16.

use super::{
    e4m3::E4m3Line,
    lines::{Ahead, Dots, Line, Rows, add_lines, all_values, panels},
    operand::ROOMY_ROWS,
};
use crate::{
    cpu::avx512::{Avx512, Avx512Bf16, e4m3_words},
    matrix::{PANEL, PackedMatrix},
};
use std::arch::x86_64::*;

/// The instructions. The field is the proof that the machine has them.
#[derive(Clone, Copy)]
pub(super) struct Bf16Pairs(pub(super) Avx512Bf16);

/// The same of weights that are numbers of E4M3, and of `x` likewise: nothing is lost.
#[derive(Clone, Copy)]
pub(super) struct E4m3Pairs(pub(super) Avx512Bf16);

impl E4m3Line for E4m3Pairs {
    type Simd = Avx512;
    const MAX_ROWS: usize = ROOMY_ROWS;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0.avx512()
    }

    #[inline(always)]
    fn zeros(self) -> __m512 {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { _mm512_setzero_ps() }
    }
}

impl Line for E4m3Pairs {
    type Stored = [u32; PANEL];
    type Weights = [__m512bh; 2];
    type Sums = __m512;
    type Sum = f32;
    const UNITS: usize = 2;
    const ASKS_FROM: usize = 5;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> [__m512bh; 2] {
        // SAFETY: as in `zeros`.
        unsafe { widen_codes(line) }
    }

    #[inline(always)]
    fn add(self, sums: __m512, x: u32, weights: &[__m512bh; 2], unit: usize) -> __m512 {
        // SAFETY: as in `zeros`.
        unsafe { add_pairs(sums, x, weights[unit]) }
    }

    #[inline(always)]
    fn values(self, sums: __m512) -> [f32; PANEL] {
        Bf16Pairs(self.0).values(sums)
    }
}

impl Dots for Bf16Pairs {
    type Simd = Avx512;
    const MAX_ROWS: usize = ROOMY_ROWS;
    const HAS_ALL_HEIGHTS: bool = true;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0.avx512()
    }

    #[inline(always)]
    fn tile<const ROWS: usize, const PANELS: usize>(
        self,
        x: Rows<'_, ROWS>,
        w: &PackedMatrix,
        first_panel: usize,
        ahead: Ahead,
    ) -> [[[f32; PANEL]; PANELS]; ROWS] {
        // SAFETY: the machine has the features: `self` exists.
        let zero = unsafe { _mm512_setzero_ps() };
        let sums = add_lines(self, [[zero; PANELS]; ROWS], x.units, panels(w, first_panel), ahead.lines);
        all_values(self, &sums)
    }
}

impl Line for Bf16Pairs {
    type Stored = [u32; PANEL];
    type Weights = __m512bh;
    type Sums = __m512;
    type Sum = f32;
    const UNITS: usize = 1;
    const WEIGHTS_STAY: bool = true;
    const ASKS_FROM: usize = 5;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> __m512bh {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { load_pairs(line) }
    }

    #[inline(always)]
    fn add(self, sums: __m512, x: u32, weights: &__m512bh, _unit: usize) -> __m512 {
        // SAFETY: as in `weights`.
        unsafe { add_pairs(sums, x, *weights) }
    }

    #[inline(always)]
    fn values(self, sums: __m512) -> [f32; PANEL] {
        let mut values = [0.0; PANEL];
        // SAFETY: sixteen elements are good for writes; the features as in `weights`.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), sums) };
        values
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn load_pairs(line: &[u32; PANEL]) -> __m512bh {
    // SAFETY: sixty-four bytes are good for reads through the reference.
    let pairs = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
    as_pairs(pairs)
}

/// Of each output's four codes the first two, and the other two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn widen_codes(line: &[u32; PANEL]) -> [__m512bh; 2] {
    // SAFETY: sixty-four bytes are good for reads through the reference.
    let codes = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
    // To the upper bytes of words.
    let first =
        _mm512_shuffle_epi8(codes, _mm512_set4_epi32(0x0d80_0c80, 0x0980_0880, 0x0580_0480, 0x0180_0080));
    let second =
        _mm512_shuffle_epi8(codes, _mm512_set4_epi32(0x0f80_0e80, 0x0b80_0a80, 0x0780_0680, 0x0380_0280));
    [as_pairs(e4m3_words(first)), as_pairs(e4m3_words(second))]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_pairs(sums: __m512, x: u32, weights: __m512bh) -> __m512 {
    _mm512_dpbf16_ps(sums, as_pairs(_mm512_set1_epi32(x.cast_signed())), weights)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn as_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which all patterns are valid.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}
