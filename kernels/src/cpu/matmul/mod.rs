//! Matrix products: a tile of rows times panels of outputs in registers, over all inputs.
//!
//! Limits on a machine that reads B bytes and does F multiply-adds per second: one row (decode) takes
//! `outputs * inputs * bytes per weight / B`, since every weight is read once and used once; many rows (prefill) take
//! `rows * outputs * inputs / F`. The turning point is some tens of rows.
//!
//! Every output is one chain of multiply-adds over its inputs in order, whatever tile or chunk it falls into; of
//! quantised weights it is a sum of whole numbers, which has no order. That is what makes a row's bits independent of the
//! other rows; it also means that inputs are not split, neither over threads nor into partial sums.

#[cfg(target_arch = "x86_64")]
mod bf16_x86;
mod e4m3;
mod integer;
#[cfg(target_arch = "x86_64")]
mod integer_x86;
mod interleave;
mod lines;
mod operand;
#[cfg(test)]
mod tests;
mod tiles;
mod wide;

use self::{
    e4m3::{E4m3, WideE4m3},
    integer::{Int4, Int8, PortableInt4, PortableInt8},
    lines::{Ahead, Dots, Rows},
    operand::{Form, Operand},
    wide::Wide,
};
use super::{
    level::Level,
    pool::Pool,
    shared_out::SharedOut,
    simd::{Kernel, Simd, padded},
};
use crate::matrix::{PANEL, PackedMatrix, Quantization, WeightDtype, WeightFormat};
pub(crate) use operand::Memory;
use std::ops::Range;

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    /// `out = product`
    Replace,
    /// `out += product`
    Add,
}

/// One `out (+)= x * w + bias` of those that share an `x`.
pub(crate) struct Product<'a> {
    pub(crate) w: &'a PackedMatrix,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) store: Store,
    pub(crate) out: SharedOut<'a>,
}

/// Computes products of one `x` on all threads, as one job where the weights want `x` in the same form.
pub(crate) fn multiply(
    x: &[f32],
    products: &[Product<'_>],
    level: Level,
    pool: &mut Pool,
    memory: &mut Memory,
) {
    for product in products {
        product.assert_fits(x);
    }
    let alike =
        |a: &Product<'_>, b: &Product<'_>| a.w.format() == b.w.format() && a.w.inputs() == b.w.inputs();
    for products in products.chunk_by(alike) {
        let w = products[0].w;
        let rows = x.len() / w.inputs();
        if rows == 0 {
            continue;
        }
        let threads = pool.threads();
        let operand = memory.arrange(x, w, Form::of(w.format(), level), pool, level);
        let plans: [Plan; MOST_PRODUCTS] = std::array::from_fn(|index| {
            products.get(index).map_or(Plan::NONE, |product| Plan::new(product.w, &operand, threads))
        });
        assert!(products.len() <= MOST_PRODUCTS, "matmul: at most {MOST_PRODUCTS} products at a time");
        let chunks = plans.iter().map(|plan| plan.chunks()).sum();
        pool.for_each(chunks, |_, chunk| {
            let mut chunk = chunk;
            for (product, plan) in products.iter().zip(&plans) {
                if chunk < plan.chunks() {
                    let (panels, tiles) = plan.chunk(chunk, operand.tiling.count);
                    return Chunk { product, operand: &operand, panels, tiles }.run_on(level);
                }
                chunk -= plan.chunks();
            }
        });
    }
}

impl Product<'_> {
    fn assert_fits(&self, x: &[f32]) {
        let (inputs, outputs) = (self.w.inputs(), self.w.outputs());
        assert!(inputs > 0 && x.len().is_multiple_of(inputs), "matmul: x is [rows][{inputs}]");
        assert_eq!(self.out.len(), x.len() / inputs * outputs, "matmul: out is [rows][{outputs}]");
        assert!(self.bias.is_none_or(|bias| bias.len() == outputs), "matmul: bias has {outputs} elements");
        let is_quantized = matches!(self.w.format(), WeightFormat::Quantized(_));
        assert!(!is_quantized || inputs <= MOST_QUANTIZED, "matmul: sums of {inputs} int8 products overflow");
    }
}

/// How the panels and tiles of one product are shared out.
#[derive(Clone, Copy)]
struct Plan {
    panels: usize,
    /// Panels of a chunk.
    group: usize,
    groups: usize,
    /// Chunks of tiles for each group.
    blocks: usize,
}

impl Plan {
    const NONE: Self = Self { panels: 0, group: 0, groups: 0, blocks: 0 };

    fn new(w: &PackedMatrix, operand: &Operand<'_>, threads: usize) -> Self {
        let tiling = operand.tiling;
        let panels = w.outputs().div_ceil(PANEL);
        // One row is worth its bytes; of many rows, about four cost as much as reading the weights once.
        let uses = tiling.rows.min(ROWS_PER_BLOCK).div_ceil(4);
        let weights = w.inputs() * PANEL * uses;
        let least = MIN_CHUNK_WEIGHTS.div_ceil(weights).next_multiple_of(tiling.panels_at_once());
        let blocks = tiling.count.div_ceil(tiling.tiles_per_block());
        // Each block of rows comes from far away for each group of panels, as long as there is work for all threads.
        let many = (GROUP_BYTES / w.all_panels().1).min(panels * blocks / (threads * CHUNKS_PER_THREAD));
        let many = many / tiling.panels_at_once() * tiling.panels_at_once();
        let group = if blocks > 1 { least.max(many) } else { least };
        Self { panels, group, groups: panels.div_ceil(group), blocks }
    }

    const fn chunks(&self) -> usize {
        self.groups * self.blocks
    }

    /// Panels and tiles of a chunk. The blocks of a group come one after another, so that its weights are read from memory
    /// once.
    fn chunk(&self, index: usize, tiles: usize) -> (Range<usize>, Range<usize>) {
        let first_panel = index / self.blocks * self.group;
        let per_block = tiles.div_ceil(self.blocks);
        let first_tile = index % self.blocks * per_block;
        (
            first_panel..(first_panel + self.group).min(self.panels),
            first_tile..(first_tile + per_block).min(tiles),
        )
    }
}

/// A block of tiles times a group of panels: what one thread does at a time.
struct Chunk<'a> {
    product: &'a Product<'a>,
    operand: &'a Operand<'a>,
    panels: Range<usize>,
    tiles: Range<usize>,
}

/// A tile of a chunk times some panels, from `panel` on.
#[derive(Clone, Copy)]
struct Part {
    tile: usize,
    panel: usize,
    ahead: Ahead,
}

/// A chunk and the instructions for its weights.
struct Multiply<'a, D> {
    chunk: Chunk<'a>,
    dots: D,
}

impl Chunk<'_> {
    fn run_on(self, level: Level) {
        match (self.product.w.format(), level) {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            (TILED_BF16 | TILED_INT8, Level::Amx(set)) => {
                set.avx512().dispatch(MultiplyTiles { chunk: self, set })
            }
            #[cfg(test)]
            (TILED_BF16 | TILED_INT8, Level::AmxModel) => {
                self.multiply_tiles(super::portable::Portable, &mut super::amx::ModelTiles::new())
            }
            #[cfg(test)]
            (WeightFormat::Quantized(Quantization::Int4 { group }), Level::AmxModel) => {
                self.multiply(Int4 { line: PortableInt4, group });
            }
            #[cfg(target_arch = "x86_64")]
            (WeightFormat::Stored(WeightDtype::Bf16), Level::Avx512Bf16(set)) => {
                set.dispatch(Multiply { chunk: self, dots: bf16_x86::Bf16Pairs(set) });
            }
            #[cfg(target_arch = "x86_64")]
            (FP8, Level::Avx512Bf16(set)) => {
                set.dispatch(Multiply { chunk: self, dots: E4m3(bf16_x86::E4m3Pairs(set)) });
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            (FP8, Level::Amx(set)) => {
                let set = set.avx512();
                set.dispatch(Multiply { chunk: self, dots: E4m3(bf16_x86::E4m3Pairs(set)) });
            }
            (WeightFormat::Stored(_) | FP8, _) => level.run(self),
            (WeightFormat::Quantized(Quantization::Int8), Level::Portable) => {
                self.multiply(Int8(PortableInt8))
            }
            (WeightFormat::Quantized(Quantization::Int4 { group }), Level::Portable) => {
                self.multiply(Int4 { line: PortableInt4, group });
            }
            #[cfg(target_arch = "x86_64")]
            (WeightFormat::Quantized(quantization), _) => integer_x86::run(self, quantization, level),
        }
    }

    #[inline(always)]
    fn multiply<D: Dots>(self, dots: D) {
        let step = self.operand.tiling.panels_at_once();
        let turns = self.tiles.len();
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let at_once = match self.panels.end - panel {
                left if step <= left => step,
                2 if step == 3 => 2,
                _ => 1,
            };
            for (turn, tile) in self.tiles.clone().enumerate() {
                let ahead = Ahead::new(self.product.w, panel, at_once, turn, turns);
                self.tile_of_height(dots, Part { tile, panel, ahead }, at_once);
            }
            panel += at_once;
        }
    }

    /// Every height of a tile and number of panels that [`Tiling`](operand::Tiling) gives out, as code of its own.
    #[inline(always)]
    fn tile_of_height<D: Dots>(&self, dots: D, part: Part, at_once: usize) {
        let slots = self.operand.tiling.slots;
        if D::MAX_ROWS == operand::ROOMY_ROWS && D::HAS_ALL_HEIGHTS {
            match (slots, at_once) {
                (1, _) => self.tile::<D, 1, 1>(dots, part),
                (2, 4) if D::SIDE_BY_SIDE => self.tile::<D, 2, 4>(dots, part),
                (2, _) => self.tile::<D, 2, 1>(dots, part),
                (3, 4) if D::SIDE_BY_SIDE => self.tile::<D, 3, 4>(dots, part),
                (3, _) => self.tile::<D, 3, 1>(dots, part),
                (4, 4) if D::SIDE_BY_SIDE => self.tile::<D, 4, 4>(dots, part),
                (4, _) => self.tile::<D, 4, 1>(dots, part),
                (5, 4) if D::SIDE_BY_SIDE => self.tile::<D, 5, 4>(dots, part),
                (5, _) => self.tile::<D, 5, 1>(dots, part),
                (6, 4) if D::SIDE_BY_SIDE => self.tile::<D, 6, 4>(dots, part),
                (6, _) => self.tile::<D, 6, 1>(dots, part),
                (7, 3) if D::SIDE_BY_SIDE => self.tile::<D, 7, 3>(dots, part),
                (7, 2) if D::SIDE_BY_SIDE => self.tile::<D, 7, 2>(dots, part),
                (7, _) => self.tile::<D, 7, 1>(dots, part),
                (8, 3) if D::SIDE_BY_SIDE => self.tile::<D, 8, 3>(dots, part),
                (8, 2) if D::SIDE_BY_SIDE => self.tile::<D, 8, 2>(dots, part),
                (8, _) => self.tile::<D, 8, 1>(dots, part),
                (9, 2) if D::SIDE_BY_SIDE => self.tile::<D, 9, 2>(dots, part),
                (9, _) => self.tile::<D, 9, 1>(dots, part),
                (10, 2) if D::SIDE_BY_SIDE => self.tile::<D, 10, 2>(dots, part),
                (10, _) => self.tile::<D, 10, 1>(dots, part),
                (11, 2) if D::SIDE_BY_SIDE => self.tile::<D, 11, 2>(dots, part),
                (11, _) => self.tile::<D, 11, 1>(dots, part),
                (_, 2) if D::SIDE_BY_SIDE => self.tile::<D, 12, 2>(dots, part),
                (_, _) => self.tile::<D, 12, 1>(dots, part),
            }
        } else if D::MAX_ROWS == operand::ROOMY_ROWS {
            match (slots, at_once) {
                (1, 4) => self.tile::<D, 1, 4>(dots, part),
                (1, _) => self.tile::<D, 1, 1>(dots, part),
                (2, 4) => self.tile::<D, 2, 4>(dots, part),
                (2, _) => self.tile::<D, 2, 1>(dots, part),
                (4, 4) => self.tile::<D, 4, 4>(dots, part),
                (4, _) => self.tile::<D, 4, 1>(dots, part),
                (6, 4) => self.tile::<D, 6, 4>(dots, part),
                (6, _) => self.tile::<D, 6, 1>(dots, part),
                (8, 2) => self.tile::<D, 8, 2>(dots, part),
                (8, _) => self.tile::<D, 8, 1>(dots, part),
                (_, 2) => self.tile::<D, 12, 2>(dots, part),
                (_, _) => self.tile::<D, 12, 1>(dots, part),
            }
        } else {
            match (slots, at_once) {
                (1, 4) => self.tile::<D, 1, 4>(dots, part),
                (1, _) => self.tile::<D, 1, 1>(dots, part),
                (2, 2) => self.tile::<D, 2, 2>(dots, part),
                (2, _) => self.tile::<D, 2, 1>(dots, part),
                (3, 2) => self.tile::<D, 3, 2>(dots, part),
                (3, _) => self.tile::<D, 3, 1>(dots, part),
                (4, _) => self.tile::<D, 4, 1>(dots, part),
                (5, _) if D::MAX_ROWS > 4 => self.tile::<D, 5, 1>(dots, part),
                (_, _) if D::MAX_ROWS > 4 => self.tile::<D, 6, 1>(dots, part),
                (slots, _) => unreachable!("tiles of {slots} rows"),
            }
        }
    }

    /// `ROWS` rows times `PANELS` panels.
    #[inline(always)]
    fn tile<D: Dots, const ROWS: usize, const PANELS: usize>(&self, dots: D, part: Part) {
        let Part { tile, panel, ahead } = part;
        let x: Rows<'_, ROWS> = self.operand.rows(tile);
        let values = dots.tile::<ROWS, PANELS>(x, self.product.w, panel, ahead);
        let rows = self.operand.tiling.rows_of(tile);
        for (row, values) in rows.zip(&values) {
            for (index, values) in values.iter().enumerate() {
                self.store(dots.simd(), row, panel + index, values);
            }
        }
    }

    /// Adds the bias and writes the outputs of one row and panel.
    #[inline(always)]
    fn store<S: Simd>(&self, simd: S, row: usize, panel: usize, sums: &[f32; PANEL]) {
        let Product { w, bias, store, out } = self.product;
        let outputs = w.outputs();
        let columns = panel * PANEL..((panel + 1) * PANEL).min(outputs);
        // SAFETY: a chunk writes the outputs of its panels in the rows of its tiles; no two chunks share both.
        let out = unsafe { out.part(row * outputs + columns.start..row * outputs + columns.end) };
        let bias = bias.map(|bias| &bias[columns]);
        match out.as_mut_array() {
            Some(out) => store_panel(simd, *store, out, sums, bias.and_then(|bias| bias.as_array())),
            None => {
                let mut last = padded(out);
                store_panel(simd, *store, &mut last, sums, bias.map(padded).as_ref());
                out.copy_from_slice(&last[..out.len()]);
            }
        }
    }
}

/// In registers: as a loop over arrays it became sixteen additions, a sixth of all the time of a product.
#[inline(always)]
fn store_panel<S: Simd>(
    simd: S,
    store: Store,
    out: &mut [f32; PANEL],
    sums: &[f32; PANEL],
    bias: Option<&[f32; PANEL]>,
) {
    let mut sums = simd.panel_f32(sums);
    if let Some(bias) = bias {
        sums = simd.panel_add(sums, simd.panel_f32(bias));
    }
    if store == Store::Add {
        sums = simd.panel_add(simd.panel_f32(out), sums);
    }
    simd.panel_store(sums, out);
}

impl Kernel for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.product.w.format() {
            WeightFormat::Stored(WeightDtype::F32) => self.multiply(Wide::<S, wide::F32>::new(simd)),
            WeightFormat::Stored(WeightDtype::F16) => self.multiply(Wide::<S, wide::F16>::new(simd)),
            WeightFormat::Stored(WeightDtype::Bf16) => self.multiply(Wide::<S, wide::Bf16>::new(simd)),
            FP8 => self.multiply(E4m3(WideE4m3(simd))),
            WeightFormat::Quantized(_) => unreachable!("has instructions of its own"),
        }
    }
}

/// A chunk and the proof of its instructions.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
struct MultiplyTiles<'a> {
    chunk: Chunk<'a>,
    set: super::amx::Amx,
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
impl Kernel for MultiplyTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.chunk.multiply_tiles(simd, &mut self.set.tiles());
    }
}

impl<D: Dots> Kernel for Multiply<'_, D> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        self.chunk.multiply(self.dots);
    }
}

/// Formats that tiles are for.
const TILED_BF16: WeightFormat = WeightFormat::Stored(WeightDtype::Bf16);
const TILED_INT8: WeightFormat = WeightFormat::Quantized(Quantization::Int8);

const FP8: WeightFormat = WeightFormat::Quantized(Quantization::Fp8);

/// Products that may share an `x`: query, key and value.
const MOST_PRODUCTS: usize = 3;

/// Inputs up to which sums of int8 products, `127 * 127` each, stay within 32 bits.
pub(crate) const MOST_QUANTIZED: usize = 1 << 17;

/// Rows of a chunk: with 2048 inputs of f32 they fill three quarters of a second-level cache of 1 MiB.
const ROWS_PER_BLOCK: usize = 96;

/// The same where tiles take three panels at once: those read few bytes of rows for each product, so that rows may come
/// from the third-level cache, and panels that stay while many rows pass by are read less often.
const ROWS_PER_TALL_BLOCK: usize = 256;

/// Bytes of panels that a block of rows is multiplied with while it is in the second-level cache.
const GROUP_BYTES: usize = 256 << 10;

/// Chunks that a thread should have at least, so that one that is slowed down leaves work to others.
const CHUNKS_PER_THREAD: usize = 8;

/// Weights per chunk, and elements of `x` to rearrange: some microseconds, so that waking a thread is worth it.
const MIN_CHUNK_WEIGHTS: usize = 1 << 16;
