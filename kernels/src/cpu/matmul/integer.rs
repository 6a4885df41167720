//! Quantised weights times int8: sums of whole numbers, exact in whatever order the instructions take them.
//!
//! Scales are applied in the order and rounding of [`reference::matmul_quantized`](crate::reference::matmul_quantized),
//! so that all instruction sets give its bits.

use super::{
    lines::{Ahead, Dots, Line, Rows, ScaledLine, add_lines, all_scaled, ask_after, panels, scaled},
    operand::ROOMY_ROWS,
};
use crate::{
    cpu::{portable::Portable, simd::Simd},
    matrix::{PANEL, PackedMatrix},
};

/// A [`Line`] of int8 or int4 weights.
pub(super) trait IntegerLine: ScaledLine<Sum = i32> {
    /// See [`Dots::Simd`].
    type Simd: Simd;
    /// See [`Dots::MAX_ROWS`].
    const MAX_ROWS: usize;
    /// Whether it takes the units of `x` as steps plus 128. Its sums then need the weights' corrections.
    const UNSIGNED_X: bool;

    /// See [`Dots::simd`].
    fn simd(self) -> Self::Simd;
    /// `value` for each output.
    fn splat(self, value: i32) -> Self::Sums;
    /// A value for each output.
    fn load(self, values: &[i32; PANEL]) -> Self::Sums;
}

/// An [`IntegerLine`] of groups that have scales of their own.
pub(super) trait GroupedLine: IntegerLine {
    /// Scales of a panel's outputs, and sums of what is scaled: in registers where there are enough.
    type Values: Copy;

    /// Zeros.
    fn zeros(self) -> Self::Values;
    /// Scales from bits of bf16.
    fn scales(self, bits: &[u16; PANEL]) -> Self::Values;
    /// `values + sums * scales`, each rounded by itself.
    fn add_scaled(self, values: Self::Values, sums: Self::Sums, scales: Self::Values) -> Self::Values;
    /// Values times `x_scale` in the order of outputs.
    fn finished(self, values: Self::Values, x_scale: f32) -> [f32; PANEL];
}

/// Products with int8 weights.
#[derive(Clone, Copy)]
pub(super) struct Int8<L>(pub(super) L);

/// Products with int4 weights.
#[derive(Clone, Copy)]
pub(super) struct Int4<L> {
    pub(super) line: L,
    /// Inputs per scale.
    pub(super) group: usize,
}

/// As f32; a loop and no `map`, as in [`panels`].
#[inline(always)]
pub(super) fn in_f32(sums: [i32; PANEL]) -> [f32; PANEL] {
    let mut values = [0.0; PANEL];
    for (value, sum) in values.iter_mut().zip(sums) {
        *value = sum as f32;
    }
    values
}

impl<L: IntegerLine> Dots for Int8<L> {
    type Simd = L::Simd;
    const MAX_ROWS: usize = L::MAX_ROWS;
    const HAS_ALL_HEIGHTS: bool = true;

    #[inline(always)]
    fn simd(self) -> L::Simd {
        self.0.simd()
    }

    #[inline(always)]
    fn tile<const ROWS: usize, const PANELS: usize>(
        self,
        x: Rows<'_, ROWS>,
        w: &PackedMatrix,
        first_panel: usize,
        ahead: Ahead,
    ) -> [[[f32; PANEL]; PANELS]; ROWS] {
        let mut starts = [self.0.splat(0); PANELS];
        for (panel, start) in starts.iter_mut().enumerate() {
            ask_after(w.output_scales(first_panel + panel), PANELS);
            if L::UNSIGNED_X {
                let corrections = w.int8_corrections(first_panel + panel);
                ask_after(corrections, PANELS);
                *start = self.0.load(corrections);
            }
        }
        let sums = add_lines(self.0, [starts; ROWS], x.units, panels(w, first_panel), ahead.lines);
        all_scaled(self.0, sums, w, first_panel, x.scales)
    }
}

impl<L: GroupedLine> Dots for Int4<L> {
    type Simd = L::Simd;
    const MAX_ROWS: usize = L::MAX_ROWS;
    const HAS_ALL_HEIGHTS: bool = true;
    const SIDE_BY_SIDE: bool = L::MAX_ROWS != ROOMY_ROWS;

    #[inline(always)]
    fn simd(self) -> L::Simd {
        self.line.simd()
    }

    #[inline(always)]
    fn tile<const ROWS: usize, const PANELS: usize>(
        self,
        x: Rows<'_, ROWS>,
        w: &PackedMatrix,
        first_panel: usize,
        ahead: Ahead,
    ) -> [[[f32; PANEL]; PANELS]; ROWS] {
        let line = self.line;
        let panels: [&[L::Stored]; PANELS] = panels(w, first_panel);
        let mut scales: [&[[u16; PANEL]]; PANELS] = [&[]; PANELS];
        for (index, scales) in scales.iter_mut().enumerate() {
            *scales = w.int4_scales(first_panel + index, self.group);
        }
        let lines = self.group / (INPUTS_PER_UNIT * L::UNITS);
        let mut values = [[line.zeros(); PANELS]; ROWS];
        let groups = x.units.chunks_exact(self.group / INPUTS_PER_UNIT).zip(x.group_sums);
        for (group, (units, group_sums)) in groups.enumerate() {
            if ROWS >= L::ASKS_FROM {
                ahead.scales.ask::<PANELS>(group);
            }
            // Loops and no `map`: its closure is a function without the instructions, and not always inlined.
            let mut sums = [[line.splat(0); PANELS]; ROWS];
            for (sums, &sum) in sums.iter_mut().zip(group_sums) {
                // Halves of bytes count from 0 to 15: eight too many.
                *sums = [line.splat(sum); PANELS];
            }
            // Parts of constant length, so that the smallest group needs no loop.
            for (part, units) in units.as_chunks::<UNITS_OF_SMALLEST_GROUP>().0.iter().enumerate() {
                let first = group * lines + part * (UNITS_OF_SMALLEST_GROUP / L::UNITS);
                let mut rest = panels;
                for panel in &mut rest {
                    *panel = &panel[first..];
                }
                sums = add_lines(line, sums, units, rest, ahead.lines.from(first));
            }
            for (panel, scales) in scales.iter().enumerate() {
                let scales = line.scales(&scales[group]);
                for (values, sums) in values.iter_mut().zip(&sums) {
                    values[panel] = line.add_scaled(values[panel], sums[panel], scales);
                }
            }
        }
        let mut products = [[[0.0; PANEL]; PANELS]; ROWS];
        for ((products, values), x_scale) in products.iter_mut().zip(values).zip(x.scales) {
            for (product, values) in products.iter_mut().zip(values) {
                *product = line.finished(values, *x_scale);
            }
        }
        products
    }
}

/// bf16 from their bits.
#[inline(always)]
pub(super) fn widened(bits: &[u16; PANEL]) -> [f32; PANEL] {
    bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
}

/// `values + sums * scales`, each rounded by itself.
#[inline(always)]
pub(super) fn add_scaled(mut values: [f32; PANEL], sums: [i32; PANEL], scales: [f32; PANEL]) -> [f32; PANEL] {
    for ((value, sum), scale) in values.iter_mut().zip(sums).zip(scales) {
        *value += sum as f32 * scale;
    }
    values
}

/// Int8 in plain loops.
#[derive(Clone, Copy)]
pub(super) struct PortableInt8;

/// Int4 in plain loops.
#[derive(Clone, Copy)]
pub(super) struct PortableInt4;

impl Line for PortableInt8 {
    type Stored = [u32; PANEL];
    type Weights = [u32; PANEL];
    type Sums = [i32; PANEL];
    type Sum = i32;
    const UNITS: usize = 1;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> [u32; PANEL] {
        *line
    }

    #[inline(always)]
    fn add(self, mut sums: [i32; PANEL], x: u32, weights: &[u32; PANEL], _unit: usize) -> [i32; PANEL] {
        let x = x.to_le_bytes();
        for (sum, weights) in sums.iter_mut().zip(weights) {
            for (x, w) in x.into_iter().zip(weights.to_le_bytes()) {
                *sum += i32::from(x.cast_signed()) * i32::from(w.cast_signed());
            }
        }
        sums
    }

    #[inline(always)]
    fn values(self, sums: [i32; PANEL]) -> [i32; PANEL] {
        sums
    }
}

impl Line for PortableInt4 {
    type Stored = [u32; PANEL];
    type Weights = [u32; PANEL];
    type Sums = [i32; PANEL];
    type Sum = i32;
    const UNITS: usize = 2;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> [u32; PANEL] {
        *line
    }

    #[inline(always)]
    fn add(self, mut sums: [i32; PANEL], x: u32, weights: &[u32; PANEL], unit: usize) -> [i32; PANEL] {
        let x = x.to_le_bytes();
        for (sum, weights) in sums.iter_mut().zip(weights) {
            let halves = weights >> (4 * unit) & LOW_HALVES;
            for (x, w) in x.into_iter().zip(halves.to_le_bytes()) {
                *sum += i32::from(x.cast_signed()) * i32::from(w);
            }
        }
        sums
    }

    #[inline(always)]
    fn values(self, sums: [i32; PANEL]) -> [i32; PANEL] {
        sums
    }
}

macro_rules! portable_integer_line {
    ($line:ty) => {
        impl IntegerLine for $line {
            type Simd = Portable;
            const MAX_ROWS: usize = PORTABLE_ROWS;
            const UNSIGNED_X: bool = false;

            #[inline(always)]
            fn simd(self) -> Portable {
                Portable
            }

            #[inline(always)]
            fn splat(self, value: i32) -> [i32; PANEL] {
                [value; PANEL]
            }

            #[inline(always)]
            fn load(self, values: &[i32; PANEL]) -> [i32; PANEL] {
                *values
            }
        }

        impl ScaledLine for $line {
            #[inline(always)]
            fn scaled(self, sums: [i32; PANEL], scales: &[f32; PANEL], x_scale: f32) -> [f32; PANEL] {
                scaled(in_f32(sums), scales, x_scale)
            }
        }
    };
}

portable_integer_line!(PortableInt8);
portable_integer_line!(PortableInt4);

impl GroupedLine for PortableInt4 {
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
    fn add_scaled(self, values: [f32; PANEL], sums: [i32; PANEL], scales: [f32; PANEL]) -> [f32; PANEL] {
        add_scaled(values, sums, scales)
    }

    #[inline(always)]
    fn finished(self, values: [f32; PANEL], x_scale: f32) -> [f32; PANEL] {
        values.map(|value| value * x_scale)
    }
}

/// Int8 of a unit.
pub(super) const INPUTS_PER_UNIT: usize = 4;

/// Units of 32 inputs: groups of 64 and 128 are two and four of these.
const UNITS_OF_SMALLEST_GROUP: usize = 32 / INPUTS_PER_UNIT;

/// The lower half of each byte.
pub(super) const LOW_HALVES: u32 = 0x0f0f_0f0f;

/// Rows of a tile in plain loops, and with AVX2, where weights take four registers and constants one.
pub(super) const PORTABLE_ROWS: usize = 4;
