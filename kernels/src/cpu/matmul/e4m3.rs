//! Weights of E4M3 times rows of E4M3: numbers of bf16, whose products f32 has without rounding.
//!
//! So only sums are rounded, each in the order of its inputs. Scales come after them, as in
//! [`reference::matmul_quantized`](crate::reference::matmul_quantized).

use super::{
    lines::{Ahead, Dots, Line, Rows, ScaledLine, add_lines, all_scaled, panels, scaled},
    operand::{NARROW_ROWS, ROOMY_ROWS},
};
use crate::{
    cpu::{e4m3::widen, simd::Simd},
    matrix::{PANEL, PackedMatrix},
};

/// A [`Line`] of four codes of each output.
pub(super) trait E4m3Line: Line<Stored = [u32; PANEL], Sum = f32> {
    /// See [`Dots::Simd`].
    type Simd: Simd;
    /// See [`Dots::MAX_ROWS`].
    const MAX_ROWS: usize;

    /// See [`Dots::simd`].
    fn simd(self) -> Self::Simd;

    /// Zeros.
    fn zeros(self) -> Self::Sums;
}

/// Products with fp8 weights.
#[derive(Clone, Copy)]
pub(super) struct E4m3<L>(pub(super) L);

/// Codes widened to f32.
#[derive(Clone, Copy)]
pub(super) struct WideE4m3<S>(pub(super) S);

impl<L: E4m3Line> Dots for E4m3<L> {
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
        let zeros = [[self.0.zeros(); PANELS]; ROWS];
        let sums = add_lines(self.0, zeros, x.units, panels(w, first_panel), ahead.lines);
        all_scaled(self.0, sums, w, first_panel, x.scales)
    }
}

impl<L: E4m3Line> ScaledLine for L {
    #[inline(always)]
    fn scaled(self, sums: L::Sums, scales: &[f32; PANEL], x_scale: f32) -> [f32; PANEL] {
        scaled(self.values(sums), scales, x_scale)
    }
}

impl<S: Simd> E4m3Line for WideE4m3<S> {
    type Simd = S;
    const MAX_ROWS: usize = if S::IS_ROOMY { ROOMY_ROWS } else { NARROW_ROWS };

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }

    #[inline(always)]
    fn zeros(self) -> S::Panel {
        self.0.panel_zero()
    }
}

impl<S: Simd> Line for WideE4m3<S> {
    type Stored = [u32; PANEL];
    type Weights = [S::Panel; 4];
    type Sums = S::Panel;
    type Sum = f32;
    const UNITS: usize = 2;

    #[inline(always)]
    fn weights(self, line: &[u32; PANEL]) -> [S::Panel; 4] {
        let mut weights = [self.0.panel_zero(); 4];
        for (input, weights) in weights.iter_mut().enumerate() {
            *weights = self.0.panel_f32(&line.map(|codes| widen((codes >> (8 * input)) as u8)));
        }
        weights
    }

    #[inline(always)]
    fn add(self, sums: S::Panel, x: u32, weights: &[S::Panel; 4], unit: usize) -> S::Panel {
        let sums = self.0.panel_mul_add(f32::from_bits(x << 16), weights[2 * unit], sums);
        self.0.panel_mul_add(f32::from_bits(x & UPPER_HALF), weights[2 * unit + 1], sums)
    }

    #[inline(always)]
    fn values(self, sums: S::Panel) -> [f32; PANEL] {
        self.0.panel_values(sums)
    }
}

/// The second bf16 of two.
const UPPER_HALF: u32 = 0xffff_0000;
