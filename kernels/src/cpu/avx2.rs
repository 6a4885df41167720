//! Eight lanes in a 256-bit register of x86-64.
//!
//! The functions at the bottom carry the instructions and may be called where the features are on; the methods on top
//! may be called by anyone who has an [`Avx2`].

use super::simd::{BF16_RUN, LANES, LEAST_POWER, SIGN_BF16, Simd};
use super::{Isa, simd::Kernel};
use crate::matrix::PANEL;
use std::arch::x86_64::*;

/// Proof that this machine has AVX2, FMA and F16C.
///
/// # Invariant
///
/// Made only by [`new`](Self::new), which asked the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// `None` when the machine does not have them.
    pub(crate) fn new() -> Option<Self> {
        Isa::Avx2.is_available().then_some(Self(()))
    }

    /// Runs a kernel compiled with these instructions.
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { run(self, kernel) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
    kernel.run(simd)
}

impl Simd for Avx2 {
    type Vector = __m256;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m256 {
        // SAFETY: eight elements are good for reads through the reference; the features as above.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, vector: __m256, to: &mut [f32; LANES]) {
        // SAFETY: eight elements are good for writes through the reference; the features as above.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), vector) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn prefetch_far(self, at: *const u8) {
        // SAFETY: a hint, which reads nothing and is ignored where there is nothing; as in `add`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    fn power_of_two(self, a: __m256) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { power_of_two(a) }
    }

    #[inline(always)]
    fn sums(self, vectors: [__m256; 4]) -> [f32; 4] {
        // SAFETY: as in `add`.
        unsafe { sums(vectors) }
    }

    #[inline(always)]
    fn widen_f16(self, from: &[u16; LANES]) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { widen_f16(from) }
    }

    #[inline(always)]
    fn narrow_f16(self, from: &[f32; LANES]) -> [u16; LANES] {
        // SAFETY: as in `add`.
        unsafe { narrow_f16(from) }
    }

    type Panel = [__m256; 2];

    #[inline(always)]
    fn panel_zero(self) -> [__m256; 2] {
        [self.splat(0.0); 2]
    }

    #[inline(always)]
    fn panel_mul_add(self, x: f32, weights: [__m256; 2], sums: [__m256; 2]) -> [__m256; 2] {
        let x = self.splat(x);
        [self.mul_add(x, weights[0], sums[0]), self.mul_add(x, weights[1], sums[1])]
    }

    #[inline(always)]
    fn panel_values(self, panel: [__m256; 2]) -> [f32; PANEL] {
        let mut values = [0.0; PANEL];
        for (half, vector) in values.as_chunks_mut().0.iter_mut().zip(panel) {
            self.store(vector, half);
        }
        values
    }

    #[inline(always)]
    fn panel_f32(self, line: &[f32; PANEL]) -> [__m256; 2] {
        let (halves, _) = line.as_chunks();
        [self.load(&halves[0]), self.load(&halves[1])]
    }

    #[inline(always)]
    fn panel_f16(self, line: &[u16; PANEL]) -> [__m256; 2] {
        let (halves, _) = line.as_chunks();
        [self.widen_f16(&halves[0]), self.widen_f16(&halves[1])]
    }

    #[inline(always)]
    fn panel_bf16(self, line: &[u32; PANEL]) -> [[__m256; 2]; 2] {
        let (halves, _) = line.as_chunks();
        // SAFETY: as in `add`.
        let [first, second] = [&halves[0], &halves[1]].map(|half| unsafe { widen_bf16_pairs(half) });
        [[first[0], second[0]], [first[1], second[1]]]
    }

    #[inline(always)]
    fn panel_i8(self, line: &[u8; PANEL]) -> [__m256; 2] {
        let [first, second] = line.as_chunks().0 else { unreachable!("two halves") };
        // SAFETY: as in `add`.
        let first = unsafe { widen_i8(first) };
        // SAFETY: as in `add`.
        let second = unsafe { widen_i8(second) };
        [first, second]
    }

    #[inline(always)]
    fn panel_splat(self, value: f32) -> [__m256; 2] {
        [self.splat(value); 2]
    }

    #[inline(always)]
    fn panel_store(self, panel: [__m256; 2], to: &mut [f32; PANEL]) {
        for (half, vector) in to.as_chunks_mut().0.iter_mut().zip(panel) {
            self.store(vector, half);
        }
    }

    #[inline(always)]
    fn panel_add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.add(a[0], b[0]), self.add(a[1], b[1])]
    }

    #[inline(always)]
    fn panel_mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.mul(a[0], b[0]), self.mul(a[1], b[1])]
    }

    #[inline(always)]
    fn panel_fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        [self.mul_add(a[0], b[0], c[0]), self.mul_add(a[1], b[1], c[1])]
    }

    #[inline(always)]
    fn panel_max(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.max(a[0], b[0]), self.max(a[1], b[1])]
    }

    #[inline(always)]
    fn panel_min(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.min(a[0], b[0]), self.min(a[1], b[1])]
    }

    #[inline(always)]
    fn panel_div(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.div(a[0], b[0]), self.div(a[1], b[1])]
    }

    #[inline(always)]
    fn panel_round(self, a: [__m256; 2]) -> [__m256; 2] {
        [self.round(a[0]), self.round(a[1])]
    }

    #[inline(always)]
    fn panel_times_power(self, a: [__m256; 2], n: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: as in `add`.
        let first = unsafe { times_power(a[0], n[0]) };
        // SAFETY: as in `add`.
        let second = unsafe { times_power(a[1], n[1]) };
        [first, second]
    }

    #[inline(always)]
    fn transpose(self, rows: [[__m256; 2]; PANEL]) -> [[__m256; 2]; PANEL] {
        // SAFETY: as in `add`.
        unsafe { transpose(rows) }
    }

    #[inline(always)]
    fn greatest_bf16(self, stored: &[[u8; BF16_RUN]]) -> u16 {
        // SAFETY: as in `add`.
        unsafe { greatest_bf16(stored) }
    }

    #[inline(always)]
    fn bf16_to_int8(self, stored: &[u8; BF16_RUN], inverse: f32, steps: &mut [u8; BF16_RUN / 2]) {
        // SAFETY: as in `add`.
        unsafe { bf16_to_int8(stored, inverse, steps) }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn power_of_two(a: __m256) -> __m256 {
    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
    // Each `hadd` adds neighbours inside the two 128-bit halves; the halves meet last.
    let quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    let halves = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps::<1>(quarters));
    let mut sums = [0.0; 4];
    // SAFETY: four elements are good for writes.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), halves) };
    sums
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn times_power(a: __m256, n: __m256) -> __m256 {
    let is_normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(n, _mm256_set1_ps(LEAST_POWER));
    _mm256_and_ps(_mm256_mul_ps(a, power_of_two(n)), is_normal)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(rows: [[__m256; 2]; PANEL]) -> [[__m256; 2]; PANEL] {
    let mut columns = rows;
    for square in 0..4 {
        let (half, first) = (square % 2, square / 2 * LANES);
        let mut eight = [rows[0][0]; LANES];
        for (vector, row) in eight.iter_mut().zip(&rows[first..]) {
            *vector = row[half];
        }
        let first_column = half * LANES;
        for (column, vector) in columns[first_column..].iter_mut().zip(transpose_eight(eight)) {
            column[first / LANES] = vector;
        }
    }
    columns
}

/// Rows to columns: neighbours first, then twos, then the two halves of the registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose_eight(rows: [__m256; LANES]) -> [__m256; LANES] {
    let mut fours = rows;
    for half in [0, 4] {
        let [a, b, c, d] = [rows[half], rows[half + 1], rows[half + 2], rows[half + 3]];
        let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (next_low, next_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        fours[half] = _mm256_shuffle_ps::<0x44>(low, next_low);
        fours[half + 1] = _mm256_shuffle_ps::<0xee>(low, next_low);
        fours[half + 2] = _mm256_shuffle_ps::<0x44>(high, next_high);
        fours[half + 3] = _mm256_shuffle_ps::<0xee>(high, next_high);
    }
    let mut columns = fours;
    for column in 0..4 {
        columns[column] = _mm256_permute2f128_ps::<0x20>(fours[column], fours[column + 4]);
        columns[column + 4] = _mm256_permute2f128_ps::<0x31>(fours[column], fours[column + 4]);
    }
    columns
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_i8(from: &[u8; LANES]) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_set_epi64x(0, i64::from_ne_bytes(*from))))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_f16(from: &[u16; LANES]) -> __m256 {
    // SAFETY: sixteen bytes are good for reads through the reference.
    let bits = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
    _mm256_cvtph_ps(bits)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn narrow_f16(from: &[f32; LANES]) -> [u16; LANES] {
    // SAFETY: eight elements are good for reads through the reference.
    let values = unsafe { _mm256_loadu_ps(from.as_ptr()) };
    let bits = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(values);
    let mut narrow = [0; LANES];
    // SAFETY: sixteen bytes are good for writes.
    unsafe { _mm_storeu_si128(narrow.as_mut_ptr().cast(), bits) };
    narrow
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_bf16_pairs(from: &[u32; LANES]) -> [__m256; 2] {
    // SAFETY: thirty-two bytes are good for reads through the reference.
    let pairs = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
    let low = _mm256_slli_epi32::<16>(pairs);
    let high = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000u32.cast_signed()));
    [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn greatest_bf16(stored: &[[u8; BF16_RUN]]) -> u16 {
    let magnitude = _mm256_set1_epi16((!SIGN_BF16).cast_signed());
    let mut greatest = _mm256_setzero_si256();
    for half in stored.as_flattened().as_chunks::<32>().0 {
        // SAFETY: thirty-two bytes are good for reads through the reference.
        let numbers = unsafe { _mm256_loadu_si256(half.as_ptr().cast()) };
        greatest = _mm256_max_epu16(greatest, _mm256_and_si256(numbers, magnitude));
    }
    greatest_of(greatest)
}

/// The greatest of sixteen numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn greatest_of(sixteen: __m256i) -> u16 {
    let eight = _mm_max_epu16(_mm256_castsi256_si128(sixteen), _mm256_extracti128_si256::<1>(sixteen));
    // The instruction finds the least of eight: of the complements, that of the greatest.
    let ones = _mm_set1_epi16(-1);
    !(_mm_extract_epi16::<0>(_mm_minpos_epu16(_mm_xor_si128(eight, ones))) as u16)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bf16_to_int8(stored: &[u8; BF16_RUN], inverse: f32, steps: &mut [u8; BF16_RUN / 2]) {
    let inverse = _mm256_set1_ps(inverse);
    let mut quarters = [_mm256_setzero_si256(); 4];
    for (quarter, bytes) in quarters.iter_mut().zip(stored.as_chunks::<16>().0) {
        // SAFETY: sixteen bytes are good for reads through the reference.
        let numbers = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        let values = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(numbers)));
        *quarter = _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse));
    }
    let [a, b, c, d] = quarters;
    // Packing works inside the two halves of a register; what is four steps long comes back into order at the end.
    let packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    let ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    // SAFETY: thirty-two bytes are good for writes through the reference.
    unsafe { _mm256_storeu_si256(steps.as_mut_ptr().cast(), ordered) };
}
