//! Stored rows of K and V to f32 and back, in lanes: the same results as `reference`, bit for bit.

use super::{
    e4m3,
    simd::{BF16_RUN, INFINITE_BF16, LANES, Simd, int8_step, padded},
};
use crate::kv::KvDtype;

/// Stored bytes, of any alignment, to values.
#[inline(always)]
pub(crate) fn decode_row<S: Simd>(simd: S, dtype: KvDtype, stored: &[u8], scale: f32, values: &mut [f32]) {
    assert_eq!(stored.len(), values.len() * dtype.bytes(), "a row of {} elements", values.len());
    match dtype {
        KvDtype::F32 => {
            for (value, bytes) in values.iter_mut().zip(stored.as_chunks().0) {
                *value = f32::from_ne_bytes(*bytes);
            }
        }
        KvDtype::F16 => decode_f16(simd, stored, values),
        KvDtype::Bf16 => {
            for (value, bytes) in values.iter_mut().zip(stored.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_ne_bytes(*bytes)) << 16);
            }
        }
        KvDtype::Int8 => {
            for (value, &stored) in values.iter_mut().zip(stored) {
                *value = scale * f32::from(stored.cast_signed());
            }
        }
        KvDtype::Fp8 => {
            for (value, &stored) in values.iter_mut().zip(stored) {
                *value = scale * e4m3::widen(stored);
            }
        }
    }
}

/// Values to stored bytes, of any alignment; returns the scale, which is 1 for types without scales.
#[inline(always)]
pub(crate) fn encode_row<S: Simd>(simd: S, dtype: KvDtype, values: &[f32], stored: &mut [u8]) -> f32 {
    assert_eq!(stored.len(), values.len() * dtype.bytes(), "a row of {} elements", values.len());
    match dtype {
        KvDtype::F32 => {
            for (bytes, value) in stored.as_chunks_mut().0.iter_mut().zip(values) {
                *bytes = value.to_ne_bytes();
            }
        }
        KvDtype::F16 => encode_f16(simd, values, stored),
        KvDtype::Bf16 => {
            for (bytes, &value) in stored.as_chunks_mut().0.iter_mut().zip(values) {
                *bytes = to_bf16(value).to_ne_bytes();
            }
        }
        KvDtype::Int8 => return encode_int8(values, stored),
        KvDtype::Fp8 => return e4m3::encode(values, stored),
    }
    1.0
}

/// A row of bf16 to int8 without a stop at f32; `None`, with nothing done, for rows that need more care or have another
/// length than whole runs.
#[inline(always)]
pub(crate) fn bf16_row_to_int8<S: Simd>(simd: S, stored: &[u8], steps: &mut [u8]) -> Option<f32> {
    let (runs, rest) = stored.as_chunks::<BF16_RUN>();
    if !rest.is_empty() {
        return None;
    }
    let ([scale], [inverse]) = int8_scales([simd.greatest_bf16(runs)])?;
    for (run, steps) in runs.iter().zip(steps.as_chunks_mut().0) {
        simd.bf16_to_int8(run, inverse, steps);
    }
    Some(scale)
}

/// The scales of rows of bf16, of which the greatest magnitudes are known, and their inverses; `None` when one of the rows
/// needs more care.
#[inline(always)]
pub(crate) fn int8_scales<const ROWS: usize>(greatest: [u16; ROWS]) -> Option<([f32; ROWS], [f32; ROWS])> {
    let scales = greatest.map(|greatest| f32::from_bits(u32::from(greatest) << 16) / 127.0);
    let is_odd = |row: usize| scales[row] < f32::MIN_POSITIVE || INFINITE_BF16 <= greatest[row];
    // All are looked at, without a branch for each.
    let odd = (0..ROWS).fold(false, |odd, row| odd | is_odd(row));
    (!odd).then(|| (scales, scales.map(|scale| 1.0 / scale)))
}

#[inline(always)]
fn decode_f16<S: Simd>(simd: S, stored: &[u8], values: &mut [f32]) {
    let (vectors, tail) = stored.as_chunks::<F16_VECTOR>();
    let (values, value_tail) = values.as_chunks_mut::<LANES>();
    for (value, stored) in values.iter_mut().zip(vectors) {
        simd.store(simd.widen_f16(&bytemuck::cast(*stored)), value);
    }
    let mut bytes = [0; F16_VECTOR];
    bytes[..tail.len()].copy_from_slice(tail);
    let mut lanes = [0.0; LANES];
    simd.store(simd.widen_f16(&bytemuck::cast(bytes)), &mut lanes);
    value_tail.copy_from_slice(&lanes[..value_tail.len()]);
}

#[inline(always)]
fn encode_f16<S: Simd>(simd: S, values: &[f32], stored: &mut [u8]) {
    let (values, value_tail) = values.as_chunks::<LANES>();
    let (stored, stored_tail) = stored.as_chunks_mut::<F16_VECTOR>();
    for (stored, value) in stored.iter_mut().zip(values) {
        *stored = bytemuck::cast(simd.narrow_f16(value));
    }
    let bytes: [u8; F16_VECTOR] = bytemuck::cast(simd.narrow_f16(&padded(value_tail)));
    stored_tail.copy_from_slice(&bytes[..stored_tail.len()]);
}

/// Nearest, ties to even; written without branches so that it becomes lanes.
#[inline(always)]
pub(crate) fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    // Half a unit of what stays, less one if what stays is even: a tie then carries only into an odd number.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let kept = if value.is_nan() { bits | QUIET_NAN } else { rounded };
    (kept >> 16) as u16
}

/// Values to int8 in units of `max|values| / 127`, which it returns.
#[inline(always)]
pub(crate) fn encode_int8(values: &[f32], stored: &mut [u8]) -> f32 {
    // As integers the bits of positive numbers have their order, and the greatest of integers becomes lanes, which the
    // greatest of floats does not.
    let greatest = values.iter().fold(0, |max: u32, value| max.max(value.to_bits() & !SIGN));
    let scale = f32::from_bits(greatest) / 127.0;
    if scale < f32::MIN_POSITIVE || INFINITE <= greatest {
        return encode_odd_int8(values, stored);
    }
    let inverse = 1.0 / scale;
    for (stored, value) in stored.iter_mut().zip(values) {
        *stored = int8_step(*value, inverse);
    }
    scale
}

/// Rows with numbers that are hardly any, or none.
#[cold]
fn encode_odd_int8(values: &[f32], stored: &mut [u8]) -> f32 {
    let scale = values.iter().fold(0.0f32, |max, value| max.max(value.abs())) / 127.0;
    for (stored, value) in stored.iter_mut().zip(values) {
        let steps = if scale < f32::MIN_POSITIVE { value / scale } else { value * (1.0 / scale) };
        let steps = if scale == 0.0 { 0.0 } else { steps };
        // `as` saturates and turns NaN into zero.
        *stored = (steps.round_ties_even().clamp(-127.0, 127.0) as i8).cast_unsigned();
    }
    scale
}

/// The sign of an f32.
const SIGN: u32 = 1 << 31;
/// The bits of infinity; those of NaN are greater.
const INFINITE: u32 = f32::INFINITY.to_bits();

/// The bit that keeps a NaN a NaN when its low half is cut off.
const QUIET_NAN: u32 = 1 << 22;

/// Bytes of a vector's lanes in half precision.
const F16_VECTOR: usize = 2 * LANES;
