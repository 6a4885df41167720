//! AVX-512: eight lanes as in [`super::avx2`] and sixteen for the panels of matrix products.
//!
//! Kernels of eight lanes are the same code compiled with more instructions. All of it gives the same bits as AVX2.

use super::{
    Isa,
    avx2::{self, Avx2},
    e4m3,
    simd::{BF16_RUN, Kernel, LANES, LEAST_POWER, SIGN_BF16, Simd},
};
use crate::matrix::PANEL;
use std::arch::x86_64::*;

/// Proof that this machine has AVX-512 F, BW, VL and DQ, and what [`Avx2`] proves.
///
/// # Invariant
///
/// Made only by [`new`](Self::new), which asked the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(Avx2);

/// Proof of the products of int8 beside [`Avx512`].
///
/// # Invariant
///
/// Made only by [`new`](Self::new), which asked the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Vnni(Avx512);

/// Proof of the products of bf16 beside [`Avx512Vnni`].
///
/// # Invariant
///
/// Made only by [`new`](Self::new), which asked the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Bf16(Avx512Vnni);

impl Avx512 {
    /// `None` when the machine does not have them.
    pub(crate) fn new() -> Option<Self> {
        Avx2::new().filter(|_| Isa::Avx512.is_available()).map(Self)
    }

    /// What it includes.
    pub(crate) const fn avx2(self) -> Avx2 {
        self.0
    }

    /// Runs a kernel compiled with these instructions.
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { run(self, kernel) }
    }
}

impl Avx512Vnni {
    /// `None` when the machine does not have them.
    pub(crate) fn new() -> Option<Self> {
        Avx512::new().filter(|_| Isa::Avx512Vnni.is_available()).map(Self)
    }

    /// What it includes.
    pub(crate) const fn avx512(self) -> Avx512 {
        self.0
    }

    /// Runs a kernel compiled with these instructions.
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { run_vnni(self, kernel) }
    }
}

impl Avx512Bf16 {
    /// `None` when the machine does not have them.
    pub(crate) fn new() -> Option<Self> {
        Avx512Vnni::new().filter(|_| Isa::Avx512Bf16.is_available()).map(Self)
    }

    /// What it includes.
    pub(crate) const fn avx512(self) -> Avx512 {
        self.0.avx512()
    }

    /// Runs a kernel compiled with these instructions.
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { run_bf16(self, kernel) }
    }

    /// What it includes.
    pub(crate) const fn vnni(self) -> Avx512Vnni {
        self.0
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn run<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn run_vnni<K: Kernel>(set: Avx512Vnni, kernel: K) -> K::Output {
    kernel.run(set.avx512())
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
fn run_bf16<K: Kernel>(set: Avx512Bf16, kernel: K) -> K::Output {
    kernel.run(set.avx512())
}

impl Simd for Avx512 {
    type Vector = __m256;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        self.0.splat(value)
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m256 {
        self.0.load(from)
    }

    #[inline(always)]
    fn store(self, vector: __m256, to: &mut [f32; LANES]) {
        self.0.store(vector, to)
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        self.0.add(a, b)
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        self.0.sub(a, b)
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        self.0.mul(a, b)
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        self.0.div(a, b)
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        self.0.mul_add(a, b, c)
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        self.0.max(a, b)
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        self.0.min(a, b)
    }

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        self.0.round(a)
    }

    #[inline(always)]
    fn prefetch_far(self, at: *const u8) {
        self.0.prefetch_far(at)
    }

    #[inline(always)]
    fn power_of_two(self, a: __m256) -> __m256 {
        self.0.power_of_two(a)
    }

    #[inline(always)]
    fn sums(self, vectors: [__m256; 4]) -> [f32; 4] {
        self.0.sums(vectors)
    }

    #[inline(always)]
    fn widen_f16(self, from: &[u16; LANES]) -> __m256 {
        self.0.widen_f16(from)
    }

    #[inline(always)]
    fn narrow_f16(self, from: &[f32; LANES]) -> [u16; LANES] {
        self.0.narrow_f16(from)
    }

    #[inline(always)]
    fn greatest_bf16(self, stored: &[[u8; BF16_RUN]]) -> u16 {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { greatest_bf16(stored) }
    }

    #[inline(always)]
    fn bf16_to_int8(self, stored: &[u8; BF16_RUN], inverse: f32, steps: &mut [u8; BF16_RUN / 2]) {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { bf16_to_int8(stored, inverse, steps) }
    }

    type Panel = __m512;
    const IS_ROOMY: bool = true;

    #[inline(always)]
    fn panel_zero(self) -> __m512 {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn panel_mul_add(self, x: f32, weights: __m512, sums: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { panel_mul_add(x, weights, sums) }
    }

    #[inline(always)]
    fn panel_values(self, panel: __m512) -> [f32; PANEL] {
        // SAFETY: as in `panel_zero`.
        unsafe { panel_values(panel) }
    }

    #[inline(always)]
    fn panel_f32(self, line: &[f32; PANEL]) -> __m512 {
        // SAFETY: sixteen elements are good for reads through the reference; the features as in `panel_zero`.
        unsafe { _mm512_loadu_ps(line.as_ptr()) }
    }

    #[inline(always)]
    fn panel_f16(self, line: &[u16; PANEL]) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { panel_f16(line) }
    }

    #[inline(always)]
    fn panel_bf16(self, line: &[u32; PANEL]) -> [__m512; 2] {
        // SAFETY: as in `panel_zero`.
        unsafe { panel_bf16(line) }
    }

    #[inline(always)]
    fn panel_i8(self, line: &[u8; PANEL]) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { panel_i8(line) }
    }

    #[inline(always)]
    fn panel_e4m3(self, line: &[u8; PANEL]) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { panel_e4m3(line) }
    }

    #[inline(always)]
    fn panel_splat(self, value: f32) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn panel_store(self, panel: __m512, to: &mut [f32; PANEL]) {
        // SAFETY: sixteen elements are good for writes through the reference; the features as in `panel_zero`.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), panel) }
    }

    #[inline(always)]
    fn panel_add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn panel_mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn panel_fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn panel_max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn panel_min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn panel_div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn panel_round(self, a: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn panel_times_power(self, a: __m512, n: __m512) -> __m512 {
        // SAFETY: as in `panel_zero`.
        unsafe { times_power(a, n) }
    }

    #[inline(always)]
    fn transpose(self, rows: [__m512; PANEL]) -> [__m512; PANEL] {
        // SAFETY: as in `panel_zero`.
        unsafe { transpose(rows) }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn panel_mul_add(x: f32, weights: __m512, sums: __m512) -> __m512 {
    _mm512_fmadd_ps(_mm512_set1_ps(x), weights, sums)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn times_power(a: __m512, n: __m512) -> __m512 {
    let is_normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(n, _mm512_set1_ps(LEAST_POWER));
    _mm512_maskz_scalef_ps(is_normal, a, n)
}

/// Rows to columns: neighbours first, then twos, then the quarters of the registers.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn transpose(rows: [__m512; PANEL]) -> [__m512; PANEL] {
    let mut fours = rows;
    for row in (0..PANEL).step_by(4) {
        let [a, b, c, d] = [rows[row], rows[row + 1], rows[row + 2], rows[row + 3]];
        let low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
        let high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
        let next_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
        let next_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
        fours[row] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, next_low));
        fours[row + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, next_low));
        fours[row + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, next_high));
        fours[row + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, next_high));
    }
    // Quarter `q` of `fours[4 * g + c]` is column `4 * q + c` of rows `4 * g..4 * g + 4`.
    let mut columns = fours;
    for column in 0..4 {
        let [a, b, c, d] = [fours[column], fours[4 + column], fours[8 + column], fours[12 + column]];
        let (low, next_low) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0x44>(c, d));
        let (high, next_high) = (_mm512_shuffle_f32x4::<0xee>(a, b), _mm512_shuffle_f32x4::<0xee>(c, d));
        columns[column] = _mm512_shuffle_f32x4::<0x88>(low, next_low);
        columns[4 + column] = _mm512_shuffle_f32x4::<0xdd>(low, next_low);
        columns[8 + column] = _mm512_shuffle_f32x4::<0x88>(high, next_high);
        columns[12 + column] = _mm512_shuffle_f32x4::<0xdd>(high, next_high);
    }
    columns
}

#[inline]
#[target_feature(enable = "avx512f")]
fn panel_i8(line: &[u8; PANEL]) -> __m512 {
    // SAFETY: sixteen bytes are good for reads through the reference.
    let steps = unsafe { _mm_loadu_si128(line.as_ptr().cast()) };
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(steps))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2")]
fn panel_e4m3(line: &[u8; PANEL]) -> __m512 {
    // SAFETY: sixteen bytes are good for reads through the reference.
    let codes = unsafe { _mm_loadu_si128(line.as_ptr().cast()) };
    // To the uppermost bytes: what is below the upper word stays zero.
    let words = e4m3_words(_mm512_slli_epi32::<24>(_mm512_cvtepu8_epi32(codes)));
    _mm512_castsi512_ps(words)
}

/// E4M3 codes to bf16, which has all of their numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn e4m3_to_bf16(codes: &[u8; 2 * PANEL]) -> __m512i {
    // SAFETY: thirty-two bytes are good for reads through the reference.
    let codes = unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) };
    e4m3_words(_mm512_slli_epi16::<8>(_mm512_cvtepu8_epi16(codes)))
}

/// The same of codes in the upper bytes of words, whose lower ones are zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn e4m3_words(codes: __m512i) -> __m512i {
    let magnitude = _mm512_srli_epi16::<8>(_mm512_and_si512(codes, _mm512_set1_epi16(0x7f00)));
    // The exponent's bias is 7 there and 127 here.
    let normal = _mm512_add_epi16(_mm512_slli_epi16::<4>(magnitude), _mm512_set1_epi16(120 << 7));
    // SAFETY: sixty-four bytes are good for reads through the reference.
    let table = unsafe { _mm512_loadu_si512(SUBNORMAL_E4M3.as_ptr().cast()) };
    let is_subnormal = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
    let numbers = _mm512_mask_permutexvar_epi16(normal, is_subnormal, magnitude, table);
    let is_none = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(i16::from(e4m3::NAN)));
    let numbers = _mm512_mask_mov_epi16(numbers, is_none, _mm512_set1_epi16(NAN_BF16));
    let sign = _mm512_set1_epi16(SIGN_BF16.cast_signed());
    _mm512_ternarylogic_epi32::<PICK>(sign, codes, numbers)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn panel_values(panel: __m512) -> [f32; PANEL] {
    let mut values = [0.0; PANEL];
    // SAFETY: sixteen elements are good for writes.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), panel) };
    values
}

#[inline]
#[target_feature(enable = "avx512f")]
fn panel_f16(line: &[u16; PANEL]) -> __m512 {
    // SAFETY: thirty-two bytes are good for reads through the reference.
    let bits = unsafe { _mm256_loadu_si256(line.as_ptr().cast()) };
    _mm512_cvtph_ps(bits)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn panel_bf16(line: &[u32; PANEL]) -> [__m512; 2] {
    // SAFETY: sixty-four bytes are good for reads through the reference.
    let pairs = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
    let upper = _mm512_set1_epi32(0xffff_0000u32.cast_signed());
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(_mm512_and_si512(pairs, upper))]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn greatest_bf16(stored: &[[u8; BF16_RUN]]) -> u16 {
    let magnitude = _mm512_set1_epi16((!SIGN_BF16).cast_signed());
    let mut greatest = _mm512_setzero_si512();
    for run in stored {
        // SAFETY: sixty-four bytes are good for reads through the reference.
        let numbers = unsafe { _mm512_loadu_si512(run.as_ptr().cast()) };
        greatest = _mm512_max_epu16(greatest, _mm512_and_si512(numbers, magnitude));
    }
    let (low, high) = (_mm512_castsi512_si256(greatest), _mm512_extracti64x4_epi64::<1>(greatest));
    avx2::greatest_of(_mm256_max_epu16(low, high))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn bf16_to_int8(stored: &[u8; BF16_RUN], inverse: f32, steps: &mut [u8; BF16_RUN / 2]) {
    let inverse = _mm512_set1_ps(inverse);
    // SAFETY: sixty-four bytes are good for reads through the reference.
    let pairs = unsafe { _mm512_loadu_si512(stored.as_ptr().cast()) };
    // Every second number, and those between.
    let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
    let high_half = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    let odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, high_half));
    let even = _mm512_cvtps_epi32(_mm512_mul_ps(even, inverse));
    let odd = _mm512_cvtps_epi32(_mm512_mul_ps(odd, inverse));
    // A step is the last byte of its lane: that of an even number, then that of the odd one behind it.
    let last_byte = _mm512_set1_epi32(0xff);
    let both = _mm512_ternarylogic_epi32::<PICK>(last_byte, even, _mm512_slli_epi32::<8>(odd));
    let bytes = _mm512_cvtepi32_epi16(both);
    // SAFETY: thirty-two bytes are good for writes through the reference.
    unsafe { _mm256_storeu_si256(steps.as_mut_ptr().cast(), bytes) };
}

/// Multiples of 2^-9 in bf16: the numbers of the first eight E4M3 codes. As many as a register holds.
static SUBNORMAL_E4M3: [u16; 2 * PANEL] = [
    0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0,
];
/// A bf16 that is no number.
const NAN_BF16: i16 = 0x7fc0;
/// Where the first of three bits is set the second, elsewhere the third.
const PICK: i32 = 0b1100_1010;
