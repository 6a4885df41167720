//! E4M3 to f32 and back without branches, so that loops over it become lanes: the same results as `reference`.

/// The number that a code stands for.
#[inline(always)]
pub(crate) fn widen(code: u8) -> f32 {
    let magnitude = u32::from(code & !SIGN);
    // The exponent's bias is 7 there and 127 here. Subnormal numbers are counted: as bits they would be subnormal here, too, and
    // those are slow to multiply.
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    let counted = magnitude as f32 * LEAST;
    let value = if magnitude < 8 { counted } else { normal };
    let value = if magnitude == u32::from(NAN) { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & SIGN) << 24)
}

/// The nearest code, of two the even one.
#[inline(always)]
pub(crate) fn narrow(value: f32) -> u8 {
    let bits = value.to_bits();
    let magnitude = bits & !SIGN_F32;
    let is_none = INFINITE < magnitude;
    let magnitude = if GREATEST < magnitude { GREATEST } else { magnitude };
    // Half a unit of what stays, less one if what stays is even: a tie then carries only into an odd number.
    let normal = ((magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20).wrapping_sub(120 << 3);
    // The sum has its last bit where the last bit of a subnormal number is.
    let counted = (f32::from_bits(magnitude) + COUNTER).to_bits() - COUNTER.to_bits();
    let code = if magnitude < LEAST_NORMAL { counted } else { normal };
    let code = code | bits >> 24 & u32::from(SIGN);
    (if is_none { u32::from(NAN) } else { code }) as u8
}

/// The scale of a row with this greatest magnitude, given in bits, and its inverse: powers of two.
#[inline(always)]
pub(crate) fn scale(greatest: u32) -> (f32, f32) {
    // 464 is 1.8125 * 2^8: a greater fraction takes the next power.
    let power = ((greatest + 0x17_ffff) >> 23).saturating_sub(8).max(LEAST_BIASED);
    (f32::from_bits(power << 23), f32::from_bits((254 - power) << 23))
}

/// Values to codes of a scale, which is returned.
#[inline(always)]
pub(crate) fn encode(values: &[f32], codes: &mut [u8]) -> f32 {
    let (scale, inverse) = scale_of(values);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = narrow(value * inverse);
    }
    scale
}

/// The same as bits of bf16, which has the numbers of all codes.
#[inline(always)]
pub(crate) fn encode_in_bf16(values: &[f32], codes: &mut [u16]) -> f32 {
    let (scale, inverse) = scale_of(values);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = (widen(narrow(value * inverse)).to_bits() >> 16) as u16;
    }
    scale
}

#[inline(always)]
fn scale_of(values: &[f32]) -> (f32, f32) {
    // As integers the bits of positive numbers have their order. What is no number counts for nothing.
    let greatest = values.iter().fold(0, |max: u32, value| {
        let magnitude = value.to_bits() & !SIGN_F32;
        max.max(if INFINITE < magnitude { 0 } else { magnitude })
    });
    scale(greatest)
}

/// The sign of a code.
pub(crate) const SIGN: u8 = 0x80;
/// The code of what is no number.
pub(crate) const NAN: u8 = 0x7f;
/// The least number, which subnormal ones are multiples of.
const LEAST: f32 = 1.0 / 512.0;
/// Between it and its double neighbouring numbers are [`LEAST`] apart.
const COUNTER: f32 = 16384.0;
const SIGN_F32: u32 = 1 << 31;
const INFINITE: u32 = f32::INFINITY.to_bits();
const GREATEST: u32 = 448f32.to_bits();
/// 2^-6.
const LEAST_NORMAL: u32 = (127 - 6) << 23;
/// The exponent of 2^-117.
const LEAST_BIASED: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn all_codes_are_the_numbers_of_the_reference() {
        for code in 0..=u8::MAX {
            let (value, expected) = (widen(code), reference::e4m3_to_f32(code));
            assert_eq!(value.is_nan(), code & 0x7f == NAN, "{code:#x}");
            assert!(
                value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan(),
                "{code:#x}"
            );
            assert_eq!(narrow(value), if value.is_nan() { NAN } else { code }, "{code:#x} there and back");
        }
    }

    /// Every sign and exponent, and of each mantissas near all places where the result changes, and some between.
    #[test]
    fn numbers_are_rounded_as_the_reference_rounds_them() {
        let odd =
            [0, 1, f32::INFINITY.to_bits(), f32::NAN.to_bits(), f32::NAN.to_bits() | 1, f32::MAX.to_bits()];
        let edges = (0..=u32::MAX >> 19).flat_map(|top| {
            let edge = top << 18;
            [edge.wrapping_sub(1), edge, edge + 1, edge + 0x1_2345]
        });
        for bits in edges.chain(odd) {
            for bits in [bits & !SIGN_F32, bits | SIGN_F32] {
                let value = f32::from_bits(bits);
                assert_eq!(narrow(value), reference::f32_to_e4m3(value), "{value:e}, {bits:#x}");
            }
        }
    }

    #[test]
    fn the_nearest_of_all_codes_is_taken() {
        // The definition once more: no code is nearer, and of two that are as near the taken one is even.
        for step in 0..200_000_u32 {
            let value = f32::from_bits(step * 5_419) % 450.0;
            let taken = narrow(value);
            let distance = |code: u8| (f64::from(widen(code)) - f64::from(value)).abs();
            for other in (0..NAN).flat_map(|code| [code, code | SIGN]) {
                let nearer = distance(other) < distance(taken);
                let as_near_and_even = distance(other) == distance(taken) && other & 1 < taken & 1;
                assert!(!nearer && !as_near_and_even, "{value}: {other:#x}, not {taken:#x}");
            }
        }
    }

    #[test]
    fn scales_are_those_of_the_reference() {
        let edges = (0..255_u32)
            .flat_map(|power| [0, 1, 0x67_ffff, 0x68_0000, 0x68_0001, 0x7f_ffff].map(|it| power << 23 | it));
        for bits in edges.chain([INFINITE]) {
            let (found, inverse) = scale(bits);
            let greatest = f32::from_bits(bits);
            assert_eq!(found.to_bits(), reference::e4m3_scale(greatest).to_bits(), "{greatest:e}");
            assert_eq!(found * inverse, 1.0, "{greatest:e}");
        }
    }
}
