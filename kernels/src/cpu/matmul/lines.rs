//! The loop that every product is: lines of weights times units of `x`.

use crate::matrix::{PANEL, PackedMatrix};
use bytemuck::AnyBitPattern;

/// The rows of one tile, side by side: each unit of the inputs for all rows.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, const ROWS: usize> {
    /// 32 bits of each row: an f32, two bf16 or four int8.
    pub(super) units: &'a [[u32; ROWS]],
    /// What the int8 of each row are to be multiplied with.
    pub(super) scales: &'a [f32],
    /// Of each int4 group, `-8 * Σ x` of each row.
    pub(super) group_sums: &'a [[i32; ROWS]],
}

/// Products for one format of weights on one instruction set.
pub(super) trait Dots: Copy {
    /// The highest tile whose sums fit the registers.
    const MAX_ROWS: usize;

    /// The products of all rows of a tile with some neighbouring panels. Inlined into code for the instructions.
    fn tile<const ROWS: usize, const PANELS: usize>(
        self,
        x: Rows<'_, ROWS>,
        w: &PackedMatrix,
        first_panel: usize,
    ) -> [[[f32; PANEL]; PANELS]; ROWS];
}

/// What the instructions do with one line: the stored units of a panel's outputs.
pub(super) trait Line: Copy {
    /// A line in memory.
    type Stored: AnyBitPattern;
    /// A line in registers.
    type Weights: Copy;
    /// Sums of a panel's outputs in registers.
    type Sums: Copy;
    /// Type of one sum.
    type Sum: Copy;
    /// Units of `x` for one line.
    const UNITS: usize;

    /// Reads a line.
    fn weights(self, line: &Self::Stored) -> Self::Weights;
    /// Adds the products of one row's unit with the line's weights for it.
    fn add(self, sums: Self::Sums, x: u32, weights: &Self::Weights, unit: usize) -> Self::Sums;
    /// The sums in the order of outputs.
    fn values(self, sums: Self::Sums) -> [Self::Sum; PANEL];
}

/// Adds `ROWS` rows times `PANELS` panels to `sums`, line by line in order.
#[inline(always)]
pub(super) fn add_lines<L: Line, const ROWS: usize, const PANELS: usize>(
    line: L,
    mut sums: [[L::Sums; PANELS]; ROWS],
    x: &[[u32; ROWS]],
    panels: [&[L::Stored]; PANELS],
) -> [[L::Sums; PANELS]; ROWS] {
    let lines = x.len() / L::UNITS;
    let panels = panels.map(|panel| &panel[..lines]);
    for (index, x) in x.chunks_exact(L::UNITS).enumerate() {
        for (panel, lines) in panels.iter().enumerate() {
            let weights = line.weights(&lines[index]);
            for (unit, x) in x.iter().enumerate() {
                for (sums, &x) in sums.iter_mut().zip(x) {
                    sums[panel] = line.add(sums[panel], x, &weights, unit);
                }
            }
        }
    }
    sums
}
