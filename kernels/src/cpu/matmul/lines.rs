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
    /// Whether there is code for every height of a tile, and not only for some.
    const HAS_ALL_HEIGHTS: bool = false;

    /// The products of all rows of a tile with some neighbouring panels. Inlined into code for the instructions.
    fn tile<const ROWS: usize, const PANELS: usize>(
        self,
        x: Rows<'_, ROWS>,
        w: &PackedMatrix,
        first_panel: usize,
        ahead: Ahead,
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
    /// Whether higher tiles ask memory for what comes next.
    const ASKS: bool = false;

    /// Reads a line.
    fn weights(self, line: &Self::Stored) -> Self::Weights;
    /// Adds the products of one row's unit with the line's weights for it.
    fn add(self, sums: Self::Sums, x: u32, weights: &Self::Weights, unit: usize) -> Self::Sums;
    /// The sums in the order of outputs.
    fn values(self, sums: Self::Sums) -> [Self::Sum; PANEL];
}

/// The panels to ask memory for while others are multiplied.
///
/// A processor that multiplies for some rows looks only a few lines ahead, so that it computes and waits for memory in
/// turns. Each tile therefore asks for its part of the panels that come next, evenly, into the second-level cache. Few
/// rows do better without: memory's own guesses at one stream of lines are then as early as any.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    at: *const u8,
    /// Bytes to ask for beside each line.
    step: usize,
}

impl Ahead {
    /// For the `turn`th of `turns` tiles, each times `at_once` panels from `panel` on.
    #[inline(always)]
    pub(super) fn new(w: &PackedMatrix, panel: usize, at_once: usize, turn: usize, turns: usize) -> Self {
        let (panels, panel_bytes) = w.all_panels();
        let bytes = at_once * panel_bytes;
        let step = if bytes <= MOST_AHEAD { at_once * CACHE_LINE / turns } else { 0 };
        // Perhaps beyond the matrix: asking reads nothing.
        Self { at: panels.as_ptr().wrapping_add(panel * panel_bytes + bytes + bytes / turns * turn), step }
    }

    /// Asks for what goes with a line.
    #[inline(always)]
    fn ask<const PANELS: usize>(self, line: usize) {
        let at = self.at.wrapping_add(line * self.step);
        for index in 0..PANELS {
            if index * CACHE_LINE < self.step {
                ask(at.wrapping_add(index * CACHE_LINE));
            }
        }
    }
}

/// Asks for the same of as many panels further on.
#[inline(always)]
pub(super) fn ask_after<T>(of_panel: &[T; PANEL], panels: usize) {
    ask(of_panel.as_ptr().wrapping_add(panels * PANEL).cast());
}

/// Asks for a cache line, into the second-level cache.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ask(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a hint, which reads nothing and is ignored where there is nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
}

/// Asks for a cache line: not on this processor.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn ask(_at: *const u8) {}

/// Adds `ROWS` rows times `PANELS` panels to `sums`, line by line in order.
#[inline(always)]
pub(super) fn add_lines<L: Line, const ROWS: usize, const PANELS: usize>(
    line: L,
    mut sums: [[L::Sums; PANELS]; ROWS],
    x: &[[u32; ROWS]],
    panels: [&[L::Stored]; PANELS],
    ahead: Ahead,
) -> [[L::Sums; PANELS]; ROWS] {
    let lines = x.len() / L::UNITS;
    let panels = panels.map(|panel| &panel[..lines]);
    for (index, x) in x.chunks_exact(L::UNITS).enumerate() {
        if L::ASKS && PANELS > 1 && ROWS >= ASKING_ROWS {
            ahead.ask::<PANELS>(index);
        }
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

/// Rows of a tile from which on asking pays.
const ASKING_ROWS: usize = 5;

/// Bytes of panels that may wait in the second-level cache beside those that are multiplied.
const MOST_AHEAD: usize = 384 << 10;

/// Bytes of a cache line.
const CACHE_LINE: usize = 64;
