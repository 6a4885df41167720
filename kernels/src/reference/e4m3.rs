//! E4M3: eight bits of floating point without infinities. One sign, four bits of exponent with bias 7, three of mantissa.
//!
//! Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1; OCP 8-bit Floating Point Specification 1.0.

/// The number that a code stands for: 0x7f and 0xff are none.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & E4M3_SIGN == 0 { magnitude } else { -magnitude }
}

/// The nearest code, of two the even one. What is beyond the greatest number becomes that, NaN becomes 0x7f.
pub fn f32_to_e4m3(value: f32) -> u8 {
    if value.is_nan() {
        return E4M3_NAN;
    }
    let magnitude = value.abs().min(E4M3_GREATEST);
    // Distances of neighbours are those of the least normal number below it, too.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude / 2f32.powi(exponent - 3)).round_ties_even() as u8;
    // Eight steps are a power of two, and so are sixteen: the next one.
    let code = steps + (exponent + 6) as u8 * 8;
    if value.is_sign_negative() { code | E4M3_SIGN } else { code }
}

/// The scale of a row with this greatest magnitude: the least power of two in whose units that rounds to 448 or less. So what is read of
/// a row is stored as it was. It is at least 2^-117, so that all products of it and codes are normal numbers of f32 and bf16.
pub fn e4m3_scale(greatest: f32) -> f32 {
    let powers = (LEAST_POWER..=GREATEST_POWER).map(|power| 2f32.powi(power));
    powers
        .into_iter()
        .find(|scale| greatest / scale <= ROUNDS_TO_GREATEST)
        .unwrap_or(2f32.powi(GREATEST_POWER))
}

/// The greatest number.
pub const E4M3_GREATEST: f32 = 448.0;
/// Between it and the next number that there would be: a tie, which goes to the even one.
const ROUNDS_TO_GREATEST: f32 = 464.0;
/// The code of what is no number; with a sign it is that, too.
pub const E4M3_NAN: u8 = 0x7f;
const E4M3_SIGN: u8 = 0x80;
const LEAST_POWER: i32 = -117;
/// Enough for the greatest f32, and what infinity gets.
const GREATEST_POWER: i32 = 120;
