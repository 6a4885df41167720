//! Weights as they are stored, widened to f32 in registers, times f32.

use super::{
    lines::{Ahead, Dots, Line, Rows, add_lines, all_values, panels},
    operand::{NARROW_ROWS, ROOMY_ROWS},
};
use crate::{
    cpu::simd::Simd,
    matrix::{PANEL, PackedMatrix},
};
use std::marker::PhantomData;

/// Lines of the stored type `W` on the instructions `S`.
pub(super) struct Wide<S, W> {
    simd: S,
    weight: PhantomData<W>,
}

/// One input of each output.
pub(super) struct F32;
/// One input of each output.
pub(super) struct F16;
/// Two inputs of each output.
pub(super) struct Bf16;

impl<S: Simd, W> Wide<S, W> {
    #[inline(always)]
    pub(super) const fn new(simd: S) -> Self {
        Self { simd, weight: PhantomData }
    }
}

impl<S: Copy, W> Clone for Wide<S, W> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Copy, W> Copy for Wide<S, W> {}

impl<S: Simd, W> Dots for Wide<S, W>
where
    Self: Line<Sums = S::Panel, Sum = f32>,
{
    type Simd = S;
    const MAX_ROWS: usize = if S::IS_ROOMY { ROOMY_ROWS } else { NARROW_ROWS };

    #[inline(always)]
    fn simd(self) -> S {
        self.simd
    }

    #[inline(always)]
    fn tile<const ROWS: usize, const PANELS: usize>(
        self,
        x: Rows<'_, ROWS>,
        w: &PackedMatrix,
        first_panel: usize,
        ahead: Ahead,
    ) -> [[[f32; PANEL]; PANELS]; ROWS] {
        let zeros = [[self.simd.panel_zero(); PANELS]; ROWS];
        let sums = add_lines(self, zeros, x.units, panels(w, first_panel), ahead.lines);
        all_values(self, &sums)
    }
}

impl<S: Simd> Line for Wide<S, F32> {
    type Stored = [f32; PANEL];
    type Weights = S::Panel;
    type Sums = S::Panel;
    type Sum = f32;
    const UNITS: usize = 1;
    const WEIGHTS_STAY: bool = S::IS_ROOMY;

    #[inline(always)]
    fn weights(self, line: &[f32; PANEL]) -> S::Panel {
        self.simd.panel_f32(line)
    }

    #[inline(always)]
    fn add(self, sums: S::Panel, x: u32, weights: &S::Panel, _unit: usize) -> S::Panel {
        self.simd.panel_mul_add(f32::from_bits(x), *weights, sums)
    }

    #[inline(always)]
    fn values(self, sums: S::Panel) -> [f32; PANEL] {
        self.simd.panel_values(sums)
    }
}

impl<S: Simd> Line for Wide<S, F16> {
    type Stored = [u16; PANEL];
    type Weights = S::Panel;
    type Sums = S::Panel;
    type Sum = f32;
    const UNITS: usize = 1;
    const WEIGHTS_STAY: bool = S::IS_ROOMY;

    #[inline(always)]
    fn weights(self, line: &[u16; PANEL]) -> S::Panel {
        self.simd.panel_f16(line)
    }

    #[inline(always)]
    fn add(self, sums: S::Panel, x: u32, weights: &S::Panel, _unit: usize) -> S::Panel {
        self.simd.panel_mul_add(f32::from_bits(x), *weights, sums)
    }

    #[inline(always)]
    fn values(self, sums: S::Panel) -> [f32; PANEL] {
        self.simd.panel_values(sums)
    }
}

impl<S: Simd> Line for Wide<S, Bf16> {
    type Stored = [u32; PANEL];
    type Weights = [S::Panel; 2];
    type Sums = S::Panel;
    type Sum = f32;
    const UNITS: usize = 2;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> [S::Panel; 2] {
        self.simd.panel_bf16(line)
    }

    #[inline(always)]
    fn add(self, sums: S::Panel, x: u32, weights: &[S::Panel; 2], unit: usize) -> S::Panel {
        self.simd.panel_mul_add(f32::from_bits(x), weights[unit], sums)
    }

    #[inline(always)]
    fn values(self, sums: S::Panel) -> [f32; PANEL] {
        self.simd.panel_values(sums)
    }
}
