//! The loop that every product is: lines of weights times units of `x`.

use crate::{
    cpu::simd::Simd,
    matrix::{PANEL, PackedMatrix},
};
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
    /// The other instructions that the code is compiled with.
    type Simd: Simd;
    /// The highest tile whose sums fit the registers.
    const MAX_ROWS: usize;
    /// Whether there is code for every height of a tile, and not only for some.
    const HAS_ALL_HEIGHTS: bool = false;
    /// Whether that code is also for several panels at once.
    const SIDE_BY_SIDE: bool = true;

    /// The other instructions.
    fn simd(self) -> Self::Simd;

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
    /// Whether the weights of all panels stay in registers while rows take turns, and not the rows while panels do: sums of
    /// eight rows of three panels leave eight registers, which is enough for three lines and a unit of one row at a time.
    const WEIGHTS_STAY: bool = false;
    /// Rows from which on a tile asks memory for what comes next.
    const ASKS_FROM: usize = usize::MAX;
    /// Whether a row alone asks for its own panel's lines ahead of their use, into the first-level cache.
    const ASKS_ALONE: bool = false;

    /// Reads a line.
    fn weights(self, line: &Self::Stored) -> Self::Weights;
    /// Adds the products of one row's unit with the line's weights for it.
    fn add(self, sums: Self::Sums, x: u32, weights: &Self::Weights, unit: usize) -> Self::Sums;
    /// The sums in the order of outputs.
    fn values(self, sums: Self::Sums) -> [Self::Sum; PANEL];
}

/// A [`Line`] whose outputs have scales, and rows of `x` too.
pub(super) trait ScaledLine: Line {
    /// Sums as the numbers that they stand for, in the order of outputs: as [`scaled`] says.
    fn scaled(self, sums: Self::Sums, scales: &[f32; PANEL], x_scale: f32) -> [f32; PANEL];
}

/// The panels to ask memory for while others are multiplied.
///
/// A processor that multiplies for some rows looks only a few lines ahead, so that it computes and waits for memory in
/// turns. Each tile therefore asks for its part of the panels that come next, evenly, into the second-level cache. Few
/// rows do better without: memory's own guesses at one stream of lines are then as early as any.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    pub(super) lines: Stream,
    /// Scales of int4 groups.
    pub(super) scales: Stream,
}

/// Addresses at even distances.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream {
    at: *const u8,
    step: usize,
}

impl Ahead {
    /// For the `turn`th of `turns` tiles, each times `at_once` panels from `panel` on.
    #[inline(always)]
    pub(super) fn new(w: &PackedMatrix, panel: usize, at_once: usize, turn: usize, turns: usize) -> Self {
        let stream = |all: &[u8], of_panel: usize, piece: usize| {
            let bytes = at_once * of_panel;
            let step = if bytes <= MOST_AHEAD { at_once * piece / turns } else { 0 };
            // Perhaps beyond the matrix: asking reads nothing.
            let at = all.as_ptr().wrapping_add(panel * of_panel + bytes + bytes / turns * turn);
            Stream { at, step }
        };
        let (panels, of_panel) = w.all_panels();
        let (scales, scales_of_panel) = w.all_scales();
        Self {
            lines: stream(panels, of_panel, CACHE_LINE),
            scales: stream(scales, scales_of_panel, PANEL * size_of::<u16>()),
        }
    }
}

impl Stream {
    /// The same, beginning with the `index`th address.
    #[inline(always)]
    pub(super) fn from(self, index: usize) -> Self {
        Self { at: self.at.wrapping_add(index * self.step), ..self }
    }

    /// Asks for what is at the `index`th address, at most so many cache lines.
    #[inline(always)]
    pub(super) fn ask<const LINES: usize>(self, index: usize) {
        let at = self.at.wrapping_add(index * self.step);
        for line in 0..LINES {
            if line * CACHE_LINE < self.step {
                ask(at.wrapping_add(line * CACHE_LINE));
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

/// Asks for a cache line, into the first-level cache.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ask_first_level(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint, which reads nothing and is ignored where there is nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
}

/// Asks for a cache line: not on this processor.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn ask(_at: *const u8) {}

/// Asks for a cache line: not on this processor.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn ask_first_level(_at: *const u8) {}

/// Some neighbouring panels. A loop and no `from_fn`: its closure would be a function without the instructions.
#[inline(always)]
pub(super) fn panels<T: AnyBitPattern, const PANELS: usize>(
    w: &PackedMatrix,
    first: usize,
) -> [&[T]; PANELS] {
    let mut panels: [&[T]; PANELS] = [&[]; PANELS];
    for (index, panel) in panels.iter_mut().enumerate() {
        *panel = w.panel(first + index);
    }
    panels
}

/// Sums in the order of outputs. Loops and no `map`, as in [`panels`].
#[inline(always)]
pub(super) fn all_values<L: Line, const ROWS: usize, const PANELS: usize>(
    line: L,
    sums: &[[L::Sums; PANELS]; ROWS],
) -> [[[L::Sum; PANEL]; PANELS]; ROWS]
where
    L::Sum: Default,
{
    let mut values = [[[L::Sum::default(); PANEL]; PANELS]; ROWS];
    for (values, sums) in values.iter_mut().zip(sums) {
        for (values, sums) in values.iter_mut().zip(sums) {
            *values = line.values(*sums);
        }
    }
    values
}

/// The same of sums that have scales.
#[inline(always)]
pub(super) fn all_scaled<L: ScaledLine, const ROWS: usize, const PANELS: usize>(
    line: L,
    sums: [[L::Sums; PANELS]; ROWS],
    w: &PackedMatrix,
    first_panel: usize,
    x_scales: &[f32],
) -> [[[f32; PANEL]; PANELS]; ROWS] {
    let mut values = [[[0.0; PANEL]; PANELS]; ROWS];
    for ((values, sums), x_scale) in values.iter_mut().zip(sums).zip(x_scales) {
        for (panel, (values, sums)) in values.iter_mut().zip(sums).enumerate() {
            *values = line.scaled(sums, w.output_scales(first_panel + panel), *x_scale);
        }
    }
    values
}

/// Sums times the scale of each output, then times that of the row: each is rounded by itself.
#[inline(always)]
pub(super) fn scaled(sums: [f32; PANEL], scales: &[f32; PANEL], x_scale: f32) -> [f32; PANEL] {
    let mut values = [0.0; PANEL];
    for ((value, sum), scale) in values.iter_mut().zip(sums).zip(scales) {
        *value = sum * scale * x_scale;
    }
    values
}

/// Adds `ROWS` rows times `PANELS` panels to `sums`, line by line in order.
#[inline(always)]
// Places and no iterators: only of these loops the compiler makes registers.
#[allow(clippy::needless_range_loop)]
pub(super) fn add_lines<L: Line, const ROWS: usize, const PANELS: usize>(
    line: L,
    mut sums: [[L::Sums; PANELS]; ROWS],
    x: &[[u32; ROWS]],
    panels: [&[L::Stored]; PANELS],
    ahead: Stream,
) -> [[L::Sums; PANELS]; ROWS] {
    let lines = x.len() / L::UNITS;
    let mut panels = panels;
    for panel in &mut panels {
        *panel = &panel[..lines];
    }
    for (index, x) in x.chunks_exact(L::UNITS).enumerate() {
        if ROWS >= L::ASKS_FROM {
            ahead.ask::<PANELS>(index);
        }
        if ROWS == 1 && L::ASKS_ALONE {
            for lines in &panels {
                ask_first_level(lines.as_ptr().wrapping_add(index).cast::<u8>().wrapping_add(ALONE_AHEAD));
            }
        }
        if L::WEIGHTS_STAY {
            let mut weights = [line.weights(&panels[0][index]); PANELS];
            for panel in 1..PANELS {
                weights[panel] = line.weights(&panels[panel][index]);
            }
            for unit in 0..L::UNITS {
                for row in 0..ROWS {
                    for panel in 0..PANELS {
                        sums[row][panel] = line.add(sums[row][panel], x[unit][row], &weights[panel], unit);
                    }
                }
            }
            continue;
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

/// Bytes of panels that may wait in the second-level cache beside those that are multiplied.
const MOST_AHEAD: usize = 576 << 10;

/// Bytes between a line that a row alone is multiplied with and the one that it asks for: a page, at whose end memory's
/// own guesses stop.
const ALONE_AHEAD: usize = 4096;

/// Bytes of a cache line.
const CACHE_LINE: usize = 64;
