//! Eight f32 lanes, and how a kernel written for them meets the instructions of the machine.
//!
//! A kernel is one generic body, inlined into one function per instruction set. Every operation here rounds as IEEE
//! 754 says and acts on each lane alone, so lanes and scalar code give equal bits; only `mul_add` differs between the
//! sets (one rounding or two).

use super::e4m3;
use crate::matrix::PANEL;

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;

/// Instructions on vectors of [`LANES`] f32. The value is the proof that the machine has them.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Eight f32.
    type Vector: Copy;

    /// `value` in each lane.
    fn splat(self, value: f32) -> Self::Vector;
    /// Reads eight elements.
    fn load(self, from: &[f32; LANES]) -> Self::Vector;
    /// Writes eight elements.
    fn store(self, vector: Self::Vector, to: &mut [f32; LANES]);

    /// `a + b`
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a - b`
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b`
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a / b`
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, in one rounding where the machine can.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The greater one; `b` when they cannot be compared.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The lesser one; `b` when they cannot be compared.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The nearest integer, of two the even one.
    fn round(self, a: Self::Vector) -> Self::Vector;
    /// Asks for the line at an address that may be nothing to read, and that is needed once only.
    #[inline(always)]
    fn prefetch_far(self, _at: *const u8) {}
    /// The sum of each vector's lanes: `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))`.
    fn sums(self, vectors: [Self::Vector; 4]) -> [f32; 4];
    /// `2^a` for integers `a` from -126 to 127.
    fn power_of_two(self, a: Self::Vector) -> Self::Vector;

    /// Eight IEEE half precision numbers.
    fn widen_f16(self, from: &[u16; LANES]) -> Self::Vector;
    /// To IEEE half precision, nearest, ties to even.
    fn narrow_f16(self, from: &[f32; LANES]) -> [u16; LANES];

    /// Sixteen f32: the outputs of a panel.
    type Panel: Copy;
    /// Whether there are thirty-two registers that hold a panel's outputs each.
    const IS_ROOMY: bool = false;

    /// Zeros.
    fn panel_zero(self) -> Self::Panel;
    /// `x * weights + sums`, in one rounding where the machine can.
    fn panel_mul_add(self, x: f32, weights: Self::Panel, sums: Self::Panel) -> Self::Panel;
    /// In the order of outputs.
    fn panel_values(self, panel: Self::Panel) -> [f32; PANEL];
    /// A line of f32.
    fn panel_f32(self, line: &[f32; PANEL]) -> Self::Panel;
    /// A line of IEEE half precision numbers.
    fn panel_f16(self, line: &[u16; PANEL]) -> Self::Panel;
    /// A line of signed bytes.
    fn panel_i8(self, line: &[u8; PANEL]) -> Self::Panel;
    /// A line of [`e4m3`] codes.
    #[inline(always)]
    fn panel_e4m3(self, line: &[u8; PANEL]) -> Self::Panel {
        self.panel_f32(&line.map(e4m3::widen))
    }
    /// A line of two bf16 of each output: the first of each, then the second.
    fn panel_bf16(self, line: &[u32; PANEL]) -> [Self::Panel; 2];
    /// `value` in each lane.
    fn panel_splat(self, value: f32) -> Self::Panel;
    /// Writes sixteen elements.
    fn panel_store(self, panel: Self::Panel, to: &mut [f32; PANEL]);
    /// `a + b`
    fn panel_add(self, a: Self::Panel, b: Self::Panel) -> Self::Panel;
    /// `a * b`
    fn panel_mul(self, a: Self::Panel, b: Self::Panel) -> Self::Panel;
    /// `a * b + c`, in one rounding where the machine can.
    fn panel_fma(self, a: Self::Panel, b: Self::Panel, c: Self::Panel) -> Self::Panel;
    /// The greater one; `b` when they cannot be compared.
    fn panel_max(self, a: Self::Panel, b: Self::Panel) -> Self::Panel;
    /// The lesser one; `b` when they cannot be compared.
    fn panel_min(self, a: Self::Panel, b: Self::Panel) -> Self::Panel;
    /// `a / b`
    fn panel_div(self, a: Self::Panel, b: Self::Panel) -> Self::Panel;
    /// The nearest integer, of two the even one.
    fn panel_round(self, a: Self::Panel) -> Self::Panel;
    /// `a * 2^n` for integers `n` up to 127; zero where `n < -126`.
    fn panel_times_power(self, a: Self::Panel, n: Self::Panel) -> Self::Panel;
    /// Rows to columns: lane `j` of panel `i` becomes lane `i` of panel `j`.
    fn transpose(self, rows: [Self::Panel; PANEL]) -> [Self::Panel; PANEL];

    /// The greatest lane; NaN is never it.
    #[inline(always)]
    fn panel_greatest(self, panel: Self::Panel) -> f32 {
        let mut lanes = self.panel_values(panel);
        let mut half = PANEL / 2;
        while 0 < half {
            for lane in 0..half {
                lanes[lane] = lanes[lane].max(lanes[lane + half]);
            }
            half /= 2;
        }
        lanes[0]
    }

    /// The sum of the lanes: each with that half a panel away, and so on.
    #[inline(always)]
    fn panel_sum(self, panel: Self::Panel) -> f32 {
        let mut lanes = self.panel_values(panel);
        let mut half = PANEL / 2;
        while 0 < half {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    /// [`exp`](Self::exp) of a panel.
    #[inline(always)]
    fn panel_exp(self, a: Self::Panel) -> Self::Panel {
        let a = self.panel_max(self.panel_splat(EXP_LOWEST), a);
        let a = self.panel_min(self.panel_splat(EXP_HIGHEST), a);
        let n = self.panel_round(self.panel_mul(a, self.panel_splat(std::f32::consts::LOG2_E)));
        let r = self.panel_fma(n, self.panel_splat(-LN_2_HIGH), a);
        let r = self.panel_fma(n, self.panel_splat(-LN_2_LOW), r);
        let mut sum = self.panel_splat(EXP_SERIES[0]);
        for coefficient in &EXP_SERIES[1..] {
            sum = self.panel_fma(sum, r, self.panel_splat(*coefficient));
        }
        let half = self.panel_round(self.panel_mul(n, self.panel_splat(0.5)));
        let rest = self.panel_fma(half, self.panel_splat(-1.0), n);
        self.panel_times_power(self.panel_times_power(sum, half), rest)
    }

    /// `2^a` for `a` up to zero, within two units in the last place; zero below -126.5, NaN of NaN.
    ///
    /// `a = n + r` with `|r| <= 1/2`; of all polynomials of its degree that are 1 at zero, this one's greatest relative
    /// error is the least: 1.6e-8 (found by Remez's exchange).
    #[inline(always)]
    fn panel_exp2(self, a: Self::Panel) -> Self::Panel {
        let n = self.panel_round(a);
        let r = self.panel_fma(n, self.panel_splat(-1.0), a);
        let mut sum = self.panel_splat(EXP2_SERIES[0]);
        for coefficient in &EXP2_SERIES[1..] {
            sum = self.panel_fma(sum, r, self.panel_splat(*coefficient));
        }
        self.panel_times_power(sum, n)
    }

    /// The bits of the greatest magnitude among bf16 numbers; more than [`INFINITE_BF16`] when one is none.
    #[inline(always)]
    fn greatest_bf16(self, stored: &[[u8; BF16_RUN]]) -> u16 {
        let numbers = stored.iter().flat_map(|run| run.as_chunks().0);
        numbers.fold(0, |max, bytes| max.max(u16::from_ne_bytes(*bytes) & !SIGN_BF16))
    }

    /// bf16 numbers times `inverse`, each to the nearest integer, of two the even one. None is beyond 127.
    #[inline(always)]
    fn bf16_to_int8(self, stored: &[u8; BF16_RUN], inverse: f32, steps: &mut [u8; BF16_RUN / 2]) {
        for (step, bytes) in steps.iter_mut().zip(stored.as_chunks().0) {
            let value = f32::from_bits(u32::from(u16::from_ne_bytes(*bytes)) << 16);
            *step = int8_step(value, inverse);
        }
    }

    /// `e^a`, within two units in the last place; zero below -104, NaN of NaN.
    ///
    /// `a = n ln 2 + r` with `|r| <= ln 2 / 2`; the series of `e^r` to `r^7` leaves a relative error of 5e-9.
    #[inline(always)]
    fn exp(self, a: Self::Vector) -> Self::Vector {
        // The constants first: a NaN in `a` comes through.
        let a = self.min(self.splat(EXP_HIGHEST), self.max(self.splat(EXP_LOWEST), a));
        let n = self.round(self.mul(a, self.splat(std::f32::consts::LOG2_E)));
        let r = self.mul_add(n, self.splat(-LN_2_HIGH), a);
        let r = self.mul_add(n, self.splat(-LN_2_LOW), r);
        let mut sum = self.splat(EXP_SERIES[0]);
        for coefficient in &EXP_SERIES[1..] {
            sum = self.mul_add(sum, r, self.splat(*coefficient));
        }
        // In two factors, since `2^n` itself may be out of range while the product is not.
        let half = self.round(self.mul(n, self.splat(0.5)));
        let rest = self.sub(n, half);
        self.mul(self.mul(sum, self.power_of_two(half)), self.power_of_two(rest))
    }
}

/// Work that is compiled once per instruction set. Implementations of `run` are `#[inline(always)]`.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// As many elements as lanes or fewer, the rest zero.
#[inline(always)]
pub(crate) fn padded<const COUNT: usize>(tail: &[f32]) -> [f32; COUNT] {
    let mut lanes = [0.0; COUNT];
    lanes[..tail.len()].copy_from_slice(tail);
    lanes
}

/// `value * inverse`, which is not beyond 127, to the nearest integer, of two the even one.
#[inline(always)]
pub(crate) fn int8_step(value: f32, inverse: f32) -> u8 {
    // The sum has room for no fraction: it rounds, and its last byte is the result.
    (value * inverse + NO_FRACTION).to_bits() as u8
}

/// Bytes of the bf16 numbers that are turned into int8 at a time: a cache line.
pub(crate) const BF16_RUN: usize = 64;
/// The sign of a bf16.
pub(crate) const SIGN_BF16: u16 = 1 << 15;
/// The bits of a bf16 infinity; those of NaN are greater.
pub(crate) const INFINITE_BF16: u16 = 0x7f80;
/// 1.5 * 2^23: between 2^23 and 2^24 neighbouring numbers are one apart.
const NO_FRACTION: f32 = 12_582_912.0;
/// `e^` this is below half of the smallest subnormal number.
const EXP_LOWEST: f32 = -105.0;
/// `e^` this is above the greatest number.
const EXP_HIGHEST: f32 = 89.0;
/// ln 2 in two parts; the first has so few bits that `n * LN_2_HIGH` is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - 355.0 / 512.0) as f32;
/// `1/7!` down to `1/0!`.
const EXP_SERIES: [f32; 8] =
    [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0];
/// Of `2^n` in the normal range.
pub(crate) const LEAST_POWER: f32 = -126.0;
/// Of `r^6` down to `r^0`.
#[allow(clippy::approx_constant, reason = "the best factors of a polynomial, of which one is near ln 2")]
const EXP2_SERIES: [f32; 7] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 0.055_503_324, 0.240_226_48, 0.693_147_2, 1.0];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Isa, Level};

    struct Exp2<'a>(&'a mut [f32; PANEL]);

    impl Kernel for Exp2<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            simd.panel_store(simd.panel_exp2(simd.panel_f32(self.0)), self.0);
        }
    }

    struct Transpose<'a>(&'a mut [[f32; PANEL]; PANEL]);

    impl Kernel for Transpose<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let rows = self.0.map(|row| simd.panel_f32(&row));
            *self.0 = simd.transpose(rows).map(|column| simd.panel_values(column));
        }
    }

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        for level in Isa::ALL.into_iter().filter_map(Level::new) {
            let exp2 = |x: f32| {
                let mut lanes = [x; PANEL];
                level.run(Exp2(&mut lanes));
                assert!(lanes.iter().all(|lane| lane.to_bits() == lanes[0].to_bits()), "every lane alike");
                lanes[0]
            };
            for step in 0..=100_000 {
                let x = -126.0 * step as f32 / 100_000.0;
                let exact = f64::from(x).exp2();
                let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
                let error = (f64::from(exp2(x)) - exact).abs() / unit;
                assert!(error <= 2.0, "2^{x} is off by {error} units on {level:?}");
            }
            let rows = [(0.0, 1.0), (-0.0, 1.0), (-3.0, 0.125), (-126.0, f32::MIN_POSITIVE), (-127.0, 0.0)];
            for (x, expected) in rows.into_iter().chain([(f32::MIN, 0.0), (f32::NEG_INFINITY, 0.0)]) {
                assert_eq!(exp2(x).to_bits(), f32::to_bits(expected), "2^{x} on {level:?}");
            }
            assert!(exp2(f32::NAN).is_nan(), "NaN comes through on {level:?}");
        }
    }

    #[test]
    fn rows_become_columns() {
        for level in Isa::ALL.into_iter().filter_map(Level::new) {
            let number = |row: usize, column: usize| (100 * row + column) as f32;
            let mut square = std::array::from_fn(|row| std::array::from_fn(|column| number(row, column)));
            level.run(Transpose(&mut square));
            for (row, columns) in square.iter().enumerate() {
                for (column, &found) in columns.iter().enumerate() {
                    assert_eq!(found, number(column, row), "{row}, {column} on {level:?}");
                }
            }
        }
    }

    /// In eight lanes, and the same in sixteen.
    struct Exp<'a>(&'a mut [f32; LANES]);

    impl Kernel for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let panel = [self.0[0]; PANEL];
            simd.store(simd.exp(simd.load(self.0)), self.0);
            let panel = simd.panel_values(simd.panel_exp(simd.panel_f32(&panel)));
            let is_same =
                |lane: &f32| lane.to_bits() == self.0[0].to_bits() || lane.is_nan() && self.0[0].is_nan();
            assert!(panel.iter().all(is_same), "{panel:?} in sixteen lanes");
        }
    }

    fn exp(level: Level, x: f32) -> f32 {
        let mut lanes = [x; LANES];
        level.run(Exp(&mut lanes));
        assert!(lanes.iter().all(|lane| lane.to_bits() == lanes[0].to_bits()), "every lane alike");
        lanes[0]
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for level in Isa::ALL.into_iter().filter_map(Level::new) {
            // Every sign and exponent, some mantissas of each: from zero to 88.7, near the ends of the range.
            for bits in (0..=0x42b1_7000u32).step_by(4099) {
                for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                    let exact = f64::from(x).exp();
                    let unit =
                        f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
                    let error = (f64::from(exp(level, x)) - exact).abs() / unit;
                    assert!(error <= 2.0, "exp({x}) is off by {error} units on {level:?}");
                }
            }
            #[rustfmt::skip]
            let rows = [
                (0.0, 1.0), (-0.0, 1.0), (89.0, f32::INFINITY), (f32::MAX, f32::INFINITY),
                (f32::INFINITY, f32::INFINITY), (-104.5, 0.0), (f32::MIN, 0.0), (f32::NEG_INFINITY, 0.0),
            ];
            for (x, expected) in rows {
                assert_eq!(exp(level, x).to_bits(), f32::to_bits(expected), "exp({x}) on {level:?}");
            }
            assert!(exp(level, f32::NAN).is_nan(), "NaN comes through on {level:?}");
        }
    }
}
