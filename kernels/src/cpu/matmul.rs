//! Matrix products: a tile of rows times a panel of outputs in registers, over all inputs.
//!
//! Limits on a machine that reads B bytes and does F multiply-adds per second: one row (decode) takes
//! `outputs * inputs * bytes per weight / B`, since every weight is read once and used once; many rows (prefill) take
//! `rows * outputs * inputs / F`. The turning point is some tens of rows.
//!
//! Every output is one chain of multiply-adds over its inputs in order, whatever tile or chunk it falls into. That is
//! what makes a row's bits independent of the other rows; it also means that inputs are not split, neither over
//! threads nor into partial sums.

use super::{
    Level,
    pool::Pool,
    shared_out::SharedOut,
    simd::{Kernel, LANES, Simd},
};
use crate::{
    aligned::AlignedBuffer,
    matrix::{PANEL, PackedMatrix, WeightDtype},
};
use std::ops::Range;

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    /// `out = product`
    Replace,
    /// `out += product`
    Add,
}

/// `out (+)= x * w + bias`.
pub(crate) struct Product<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) w: &'a PackedMatrix,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) store: Store,
}

impl Product<'_> {
    /// Computes it on all threads; `tiles` is working memory for `x`.
    pub(crate) fn compute(&self, out: &mut [f32], level: Level, pool: &mut Pool, tiles: &mut AlignedBuffer) {
        let (inputs, outputs) = (self.w.inputs(), self.w.outputs());
        assert!(inputs > 0 && self.x.len().is_multiple_of(inputs), "matmul: x is [rows][{inputs}]");
        let rows = self.x.len() / inputs;
        assert_eq!(out.len(), rows * outputs, "matmul: out is [rows][{outputs}]");
        assert!(self.bias.is_none_or(|bias| bias.len() == outputs), "matmul: bias has {outputs} elements");
        if rows == 0 || outputs == 0 {
            return;
        }
        let tiling = Tiling::new(rows);
        let x = if rows == 1 {
            self.x
        } else {
            let tiles = tiles.grown(self.x.len());
            interleave(self.x, tiles, inputs, tiling, pool);
            tiles
        };

        let step = tiling.panels_at_once();
        let panels = outputs.div_ceil(PANEL);
        // One row is worth its bytes; of many rows, about four cost as much as reading the weights once.
        let uses = rows.min(TILES_PER_BLOCK * MAX_TILE_ROWS).div_ceil(4);
        let group = MIN_CHUNK_WEIGHTS.div_ceil(inputs * PANEL * uses).next_multiple_of(step);
        let groups = panels.div_ceil(group);
        let blocks = tiling.count.div_ceil(TILES_PER_BLOCK);
        let out = SharedOut::new(out);
        pool.for_each(groups * blocks, |_, chunk| {
            // The blocks of a group come one after another, so that its weights are read from memory once.
            let (first_panel, first_tile) = (chunk / blocks * group, chunk % blocks * TILES_PER_BLOCK);
            level.run(Chunk {
                product: self,
                x,
                tiling,
                panels: first_panel..(first_panel + group).min(panels),
                tiles: first_tile..(first_tile + TILES_PER_BLOCK).min(tiling.count),
                out: &out,
            });
        });
    }
}

/// How rows are cut into tiles of nearly equal height.
#[derive(Clone, Copy)]
struct Tiling {
    rows: usize,
    count: usize,
}

impl Tiling {
    const fn new(rows: usize) -> Self {
        Self { rows, count: rows.div_ceil(MAX_TILE_ROWS) }
    }

    const fn first_row(self, tile: usize) -> usize {
        tile * self.rows / self.count
    }

    const fn height(self, tile: usize) -> usize {
        self.first_row(tile + 1) - self.first_row(tile)
    }

    /// Low tiles take several panels at once: a multiply-add takes four cycles and two begin in each, so that fewer
    /// than eight registers of sums leave the units idle.
    const fn panels_at_once(self) -> usize {
        match self.rows {
            1 => 4,
            2 | 3 => 2,
            _ => 1,
        }
    }
}

/// Rearranges `x` from `[row][input]` to `[tile][input][row of the tile]`.
fn interleave(x: &[f32], tiles: &mut [f32], inputs: usize, tiling: Tiling, pool: &mut Pool) {
    let tiles = SharedOut::new(tiles);
    let group = MIN_CHUNK_WEIGHTS.div_ceil(inputs * MAX_TILE_ROWS);
    pool.for_each(tiling.count.div_ceil(group), |_, chunk| {
        for tile in chunk * group..((chunk + 1) * group).min(tiling.count) {
            let (first, height) = (tiling.first_row(tile), tiling.height(tile));
            let range = first * inputs..(first + height) * inputs;
            let source = &x[range.clone()];
            // SAFETY: tiles are disjoint ranges of rows, and each tile is in one chunk.
            let target = unsafe { tiles.part(range) };
            match height {
                1 => target.copy_from_slice(source),
                2 => interleave_tile::<2>(source, target, inputs),
                3 => interleave_tile::<3>(source, target, inputs),
                4 => interleave_tile::<4>(source, target, inputs),
                5 => interleave_tile::<5>(source, target, inputs),
                _ => interleave_tile::<6>(source, target, inputs),
            }
        }
    });
}

fn interleave_tile<const ROWS: usize>(source: &[f32], target: &mut [f32], inputs: usize) {
    let target = target.as_chunks_mut::<ROWS>().0;
    for (row, source) in source.chunks_exact(inputs).enumerate() {
        for (target, &element) in target.iter_mut().zip(source) {
            target[row] = element;
        }
    }
}

/// A block of tiles times a group of panels: what one thread does at a time.
struct Chunk<'a> {
    product: &'a Product<'a>,
    /// Interleaved.
    x: &'a [f32],
    tiling: Tiling,
    panels: Range<usize>,
    tiles: Range<usize>,
    out: &'a SharedOut<'a>,
}

impl Kernel for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.product.w.dtype() {
            WeightDtype::F32 => self.multiply::<S, F32>(simd),
            WeightDtype::F16 => self.multiply::<S, F16>(simd),
            WeightDtype::Bf16 => self.multiply::<S, Bf16>(simd),
        }
    }
}

impl Chunk<'_> {
    #[inline(always)]
    fn multiply<S: Simd, W: Weight>(&self, simd: S) {
        let step = self.tiling.panels_at_once();
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let whole = panel + step <= self.panels.end;
            for tile in self.tiles.clone() {
                match (self.tiling.height(tile), if whole { step } else { 1 }) {
                    (1, 4) => self.tile::<S, W, 1, 4>(simd, tile, panel),
                    (1, _) => self.tile::<S, W, 1, 1>(simd, tile, panel),
                    (2, 2) => self.tile::<S, W, 2, 2>(simd, tile, panel),
                    (2, _) => self.tile::<S, W, 2, 1>(simd, tile, panel),
                    (3, 2) => self.tile::<S, W, 3, 2>(simd, tile, panel),
                    (3, _) => self.tile::<S, W, 3, 1>(simd, tile, panel),
                    (4, _) => self.tile::<S, W, 4, 1>(simd, tile, panel),
                    (5, _) => self.tile::<S, W, 5, 1>(simd, tile, panel),
                    _ => self.tile::<S, W, 6, 1>(simd, tile, panel),
                }
            }
            panel += if whole { step } else { 1 };
        }
    }

    /// `ROWS` rows times `PANELS` panels.
    #[inline(always)]
    fn tile<S: Simd, W: Weight, const ROWS: usize, const PANELS: usize>(
        &self,
        simd: S,
        tile: usize,
        first_panel: usize,
    ) {
        let inputs = self.product.w.inputs();
        let first_row = self.tiling.first_row(tile);
        let x = self.x[first_row * inputs..(first_row + ROWS) * inputs].as_chunks::<ROWS>().0;
        let panels: [&[[W::Bits; PANEL]]; PANELS] =
            std::array::from_fn(|panel| &self.product.w.panel(first_panel + panel)[..x.len()]);
        let mut sums = [[[simd.splat(0.0); 2]; PANELS]; ROWS];
        for (input, x) in x.iter().enumerate() {
            for (panel, weights) in panels.iter().enumerate() {
                let weights = W::widen(simd, &weights[input]);
                for (sums, &x) in sums.iter_mut().zip(x) {
                    let x = simd.splat(x);
                    sums[panel][0] = simd.mul_add(x, weights[0], sums[panel][0]);
                    sums[panel][1] = simd.mul_add(x, weights[1], sums[panel][1]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (panel, sums) in sums.iter().enumerate() {
                let mut outputs = [[0.0; LANES]; 2];
                simd.store(sums[0], &mut outputs[0]);
                simd.store(sums[1], &mut outputs[1]);
                self.store(first_row + row, first_panel + panel, outputs.as_flattened());
            }
        }
    }

    /// Adds the bias and writes the outputs of one row and panel.
    #[inline(always)]
    fn store(&self, row: usize, panel: usize, sums: &[f32]) {
        let outputs = self.product.w.outputs();
        let columns = panel * PANEL..((panel + 1) * PANEL).min(outputs);
        // SAFETY: a chunk writes the outputs of its panels in the rows of its tiles; no two chunks share both.
        let out = unsafe { self.out.part(row * outputs + columns.start..row * outputs + columns.end) };
        let bias = self.product.bias.map_or(&[0.0; PANEL][..columns.len()], |bias| &bias[columns]);
        match self.product.store {
            Store::Replace => {
                for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                    *out = sum + bias;
                }
            }
            Store::Add => {
                for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                    *out += sum + bias;
                }
            }
        }
    }
}

/// A stored type of weights and how a panel row of it becomes two vectors.
trait Weight {
    type Bits: bytemuck::AnyBitPattern;

    fn widen<S: Simd>(simd: S, row: &[Self::Bits; PANEL]) -> [S::Vector; 2];
}

struct F32;
struct F16;
struct Bf16;

impl Weight for F32 {
    type Bits = f32;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, row: &[f32; PANEL]) -> [S::Vector; 2] {
        let [low, high] = halves(row);
        [simd.load(low), simd.load(high)]
    }
}

impl Weight for F16 {
    type Bits = u16;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, row: &[u16; PANEL]) -> [S::Vector; 2] {
        let [low, high] = halves(row);
        [simd.widen_f16(low), simd.widen_f16(high)]
    }
}

impl Weight for Bf16 {
    type Bits = u16;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, row: &[u16; PANEL]) -> [S::Vector; 2] {
        simd.widen_bf16_pairs(row)
    }
}

#[inline(always)]
fn halves<T>(row: &[T; PANEL]) -> [&[T; LANES]; 2] {
    let (halves, _) = row.as_chunks::<LANES>();
    [&halves[0], &halves[1]]
}

/// Rows of the highest tile: six rows of sums, a panel row and an input fill the sixteen registers of AVX2.
const MAX_TILE_ROWS: usize = 6;

/// Tiles per chunk: 96 rows.
const TILES_PER_BLOCK: usize = 16;

/// Weights per chunk, and elements of `x` to rearrange: some microseconds, so that waking a thread is worth it.
const MIN_CHUNK_WEIGHTS: usize = 1 << 16;

const _: () = assert!(PANEL == 2 * LANES);
