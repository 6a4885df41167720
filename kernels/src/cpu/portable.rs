//! Eight lanes as an array: the compiler finds the instructions.

use super::simd::{LANES, LEAST_POWER, Simd};
use crate::matrix::PANEL;
use half::f16;
use std::array;

/// Any machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Simd for Portable {
    type Vector = [f32; LANES];

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::Vector {
        *from
    }

    #[inline(always)]
    fn store(self, vector: Self::Vector, to: &mut [f32; LANES]) {
        *to = vector;
    }

    #[inline(always)]
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        array::from_fn(|lane| a[lane] - b[lane])
    }

    #[inline(always)]
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        array::from_fn(|lane| a[lane] / b[lane])
    }

    // Not `f32::mul_add`: without an instruction for it that is a call per lane.
    #[inline(always)]
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        array::from_fn(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector {
        array::from_fn(|lane| if a[lane] < b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn round(self, a: Self::Vector) -> Self::Vector {
        // Adding and taking away 1.5 * 2^23 rounds to the units place; exact for |a| < 2^22, more than `exp` needs.
        array::from_fn(|lane| (a[lane] + ROUNDER) - ROUNDER)
    }

    #[inline(always)]
    fn power_of_two(self, a: Self::Vector) -> Self::Vector {
        array::from_fn(|lane| f32::from_bits(((a[lane] as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn sums(self, vectors: [Self::Vector; 4]) -> [f32; 4] {
        vectors.map(|v| ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])))
    }

    #[inline(always)]
    fn widen_f16(self, from: &[u16; LANES]) -> Self::Vector {
        from.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn narrow_f16(self, from: &[f32; LANES]) -> [u16; LANES] {
        from.map(|value| f16::from_f32(value).to_bits())
    }

    type Panel = [f32; PANEL];

    #[inline(always)]
    fn panel_zero(self) -> Self::Panel {
        [0.0; PANEL]
    }

    #[inline(always)]
    fn panel_mul_add(self, x: f32, weights: Self::Panel, sums: Self::Panel) -> Self::Panel {
        array::from_fn(|output| x * weights[output] + sums[output])
    }

    #[inline(always)]
    fn panel_values(self, panel: Self::Panel) -> [f32; PANEL] {
        panel
    }

    #[inline(always)]
    fn panel_f32(self, line: &[f32; PANEL]) -> Self::Panel {
        *line
    }

    #[inline(always)]
    fn panel_f16(self, line: &[u16; PANEL]) -> Self::Panel {
        line.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn panel_bf16(self, line: &[u32; PANEL]) -> [Self::Panel; 2] {
        [line.map(|pair| f32::from_bits(pair << 16)), line.map(|pair| f32::from_bits(pair & UPPER_HALF))]
    }

    #[inline(always)]
    fn panel_i8(self, line: &[u8; PANEL]) -> Self::Panel {
        line.map(|step| f32::from(step.cast_signed()))
    }

    #[inline(always)]
    fn panel_splat(self, value: f32) -> Self::Panel {
        [value; PANEL]
    }

    #[inline(always)]
    fn panel_store(self, panel: Self::Panel, to: &mut [f32; PANEL]) {
        *to = panel;
    }

    #[inline(always)]
    fn panel_add(self, a: Self::Panel, b: Self::Panel) -> Self::Panel {
        array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn panel_mul(self, a: Self::Panel, b: Self::Panel) -> Self::Panel {
        array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn panel_fma(self, a: Self::Panel, b: Self::Panel, c: Self::Panel) -> Self::Panel {
        array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    fn panel_max(self, a: Self::Panel, b: Self::Panel) -> Self::Panel {
        array::from_fn(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn panel_min(self, a: Self::Panel, b: Self::Panel) -> Self::Panel {
        array::from_fn(|lane| if a[lane] < b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn panel_div(self, a: Self::Panel, b: Self::Panel) -> Self::Panel {
        array::from_fn(|lane| a[lane] / b[lane])
    }

    #[inline(always)]
    fn panel_round(self, a: Self::Panel) -> Self::Panel {
        array::from_fn(|lane| (a[lane] + ROUNDER) - ROUNDER)
    }

    #[inline(always)]
    fn panel_times_power(self, a: Self::Panel, n: Self::Panel) -> Self::Panel {
        array::from_fn(|lane| {
            let power = f32::from_bits(((n[lane] as i32).wrapping_add(127) as u32) << 23);
            if n[lane] < LEAST_POWER { 0.0 } else { a[lane] * power }
        })
    }

    #[inline(always)]
    fn transpose(self, rows: [Self::Panel; PANEL]) -> [Self::Panel; PANEL] {
        array::from_fn(|column| array::from_fn(|row| rows[row][column]))
    }
}

/// The second bf16 of two.
const UPPER_HALF: u32 = 0xffff_0000;

const ROUNDER: f32 = 12_582_912.0;
