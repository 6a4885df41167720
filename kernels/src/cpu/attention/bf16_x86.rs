//! Products of bf16: two elements at a time.
//!
//! K and V in bf16 are multiplied as they are stored, and int8 and e4m3 are turned into bf16 without loss. Queries and weights are
//! split into two bf16 each, which together have all but the last six or seven bits of an f32: both are multiplied, and
//! sums are f32 (`docs/decisions/0011`). `vdpbf16ps` adds the product of the second element, then that of the first, each
//! with one rounding (Intel SDM, volume 2).

use super::dots::{Dots, Line, Panels, StoredRows, piece};
use crate::{
    cpu::{
        avx512::{Avx512, Avx512Bf16, e4m3_to_bf16},
        simd::Simd,
    },
    kv::KvDtype,
    matrix::PANEL,
};
use std::arch::x86_64::*;

/// The instructions. The field is the proof that the machine has them.
#[derive(Clone, Copy)]
pub(super) struct Bf16Pairs(pub(super) Avx512Bf16);

impl Dots for Bf16Pairs {
    type Simd = Avx512;
    type Held = __m512bh;
    /// Two neighbours in bf16, and what rounding them left.
    type Factor = [u32; 2];
    const UNIT: usize = 2;
    const TURNS_KEYS: bool = true;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0.avx512()
    }

    #[inline(always)]
    fn hold(self, line: &Line) -> __m512bh {
        // SAFETY: the machine has the features: `self` exists.
        unsafe { hold(line) }
    }

    #[inline(always)]
    fn add(self, sums: __m512, [nearest, rest]: [u32; 2], line: __m512bh) -> __m512 {
        // SAFETY: as in `hold`.
        let sums = unsafe { add(sums, nearest, line) };
        // SAFETY: as in `hold`.
        unsafe { add(sums, rest, line) }
    }

    #[inline(always)]
    fn factors(self, numbers: __m512, factors: &mut [[u32; 2]]) {
        let factors = factors.as_flattened_mut().try_into().expect("half a factor per number");
        // SAFETY: as in `hold`.
        unsafe { store_split(numbers, factors) }
    }

    #[inline(always)]
    fn keys(self, dtype: KvDtype, rows: &StoredRows<'_>, lines: &mut [Line]) {
        let simd = self.simd();
        for (index, lines) in lines.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let mut pairs = [simd.panel_zero(); PANEL];
            for (pairs, row) in pairs.iter_mut().zip(rows) {
                *pairs = self.elements(dtype, row, index);
            }
            for (line, column) in lines.iter_mut().zip(simd.transpose(pairs)) {
                simd.panel_store(column, line);
            }
        }
    }

    #[inline(always)]
    fn values(self, dtype: KvDtype, rows: &StoredRows<'_>, lines: &mut [Line], panels: Panels) {
        let simd = self.simd();
        for (unit, [first, second]) in rows.as_chunks().0.iter().enumerate() {
            for index in 0..panels.count / 2 {
                let first = self.elements(dtype, first, index);
                let second = self.elements(dtype, second, index);
                let line = 2 * index * panels.lines + panels.first + unit;
                // SAFETY: as in `hold`.
                simd.panel_store(unsafe { interleave(first, second, &FIRST_HALF) }, &mut lines[line]);
                // SAFETY: as in `hold`.
                let second_half = unsafe { interleave(first, second, &SECOND_HALF) };
                simd.panel_store(second_half, &mut lines[line + panels.lines]);
            }
        }
    }
}

impl Bf16Pairs {
    /// Elements `32 * index..` of a stored row as bf16, zeros from its end on.
    #[inline(always)]
    fn elements(self, dtype: KvDtype, row: &[u8], index: usize) -> __m512 {
        match dtype {
            KvDtype::Int8 => {
                let mut padding = [0; 2 * PANEL];
                // SAFETY: as in `hold`.
                unsafe { int8_to_bf16(piece(row, index, &mut padding)) }
            }
            KvDtype::Fp8 => {
                let mut padding = [0; 2 * PANEL];
                // SAFETY: as in `hold`.
                let pairs = unsafe { e4m3_to_bf16(piece(row, index, &mut padding)) };
                // SAFETY: as in `hold`.
                unsafe { _mm512_castsi512_ps(pairs) }
            }
            _ => {
                let mut padding = [0; 4 * PANEL];
                // SAFETY: as in `hold`.
                unsafe { load(piece(row, index, &mut padding)) }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(pairs: &[u8; 4 * PANEL]) -> __m512 {
    // SAFETY: sixty-four bytes are good for reads through the reference.
    unsafe { _mm512_loadu_ps(pairs.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn hold(line: &Line) -> __m512bh {
    // SAFETY: sixty-four bytes are good for reads through the reference.
    let pairs = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
    as_pairs(pairs)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add(sums: __m512, unit: u32, line: __m512bh) -> __m512 {
    _mm512_dpbf16_ps(sums, as_pairs(_mm512_set1_epi32(unit.cast_signed())), line)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn as_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which all patterns are valid.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

/// Element `i` of both beside each other, for half of the elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(first: __m512, second: __m512, half: &[u16; 2 * PANEL]) -> __m512 {
    let (first, second) = (_mm512_castps_si512(first), _mm512_castps_si512(second));
    // SAFETY: sixty-four bytes are good for reads through the reference.
    let order = unsafe { _mm512_loadu_si512(half.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, order, second))
}

/// Without loss: bf16 has all whole numbers up to 256.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn int8_to_bf16(steps: &[u8; 2 * PANEL]) -> __m512 {
    // SAFETY: thirty-two bytes are good for reads through the reference.
    let bytes = unsafe { _mm256_loadu_si256(steps.as_ptr().cast()) };
    let low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256::<1>(bytes)));
    let pairs = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: both are 512 bits of which all patterns are valid.
    unsafe { std::mem::transmute::<__m512bh, __m512>(pairs) }
}

/// Stores pairs of bf16, and pairs of what rounding them left, in turns.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn store_split(numbers: __m512, to: &mut [u32; PANEL]) {
    let nearest = rounded(numbers);
    let widened = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(nearest)));
    let rest = rounded(_mm512_sub_ps(numbers, widened));
    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(nearest), rest);
    // SAFETY: sixty-four bytes are good for reads through the reference.
    let order = unsafe { _mm512_loadu_si512(IN_TURNS.as_ptr().cast()) };
    let in_turns = _mm512_permutexvar_epi32(order, both);
    // SAFETY: sixty-four bytes are good for writes through the reference.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), in_turns) };
}

/// Sixteen numbers as the nearest bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(numbers: __m512) -> __m256i {
    let rounded = _mm512_cvtneps_pbh(numbers);
    // SAFETY: both are 256 bits of which all patterns are valid.
    unsafe { std::mem::transmute::<__m256bh, __m256i>(rounded) }
}

/// Of two halves of eight pairs: which go where.
const IN_TURNS: [u32; PANEL] = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15];

/// Of two registers of thirty-two numbers: which go where.
const FIRST_HALF: [u16; 2 * PANEL] = interleaved(0);
const SECOND_HALF: [u16; 2 * PANEL] = interleaved(PANEL as u16);

const fn interleaved(first: u16) -> [u16; 2 * PANEL] {
    let mut order = [0; 2 * PANEL];
    let mut place = 0;
    while place < order.len() {
        let of_second = place as u16 % 2;
        order[place] = first + place as u16 / 2 + of_second * 2 * PANEL as u16;
        place += 1;
    }
    order
}
