//! Rows of K and V into blocks, and blocks of one layout into another.

use super::{
    Level,
    kv_codec::{decode_row, encode_row},
    pool::Pool,
    row_tiles::{RowTile, RowTiles},
    simd::{Kernel, Simd},
};
use crate::{
    kv::KvBlockShape,
    kv_rows::{self, Part},
    step::{SequenceRows, TokenSpan},
};
use std::ops::Range;

/// K and V rows on their way into blocks.
#[derive(Clone, Copy)]
pub(crate) struct KvRows<'a> {
    pub(crate) shape: &'a KvBlockShape,
    pub(crate) layer: usize,
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) sequences: &'a [SequenceRows<'a>],
}

impl KvRows<'_> {
    /// Writes them on all threads.
    pub(crate) fn write(self, level: Level, pool: &mut Pool, tiles: &mut RowTiles) {
        assert_eq!(self.k.len(), self.v.len(), "write_kv: as many keys as values");
        assert!(self.layer < self.shape.layers, "write_kv: layer {} of {}", self.layer, self.shape.layers);
        tiles.plan(self.sequences, self.shape, ROWS_PER_CHUNK, 1);
        let tiles = &*tiles;
        pool.for_each(tiles.count(), |_, chunk| {
            level.run(WriteTile { rows: self, tile: tiles.tile(self.sequences, chunk) });
        });
    }
}

struct WriteTile<'a> {
    rows: KvRows<'a>,
    tile: RowTile,
}

impl Kernel for WriteTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let KvRows { shape, layer, k, v, sequences } = self.rows;
        let sequence = &sequences[self.tile.sequence];
        for row in self.tile.rows {
            let position = sequence.first_position + row;
            let block = sequence.blocks[position / shape.block_len];
            for index in shape.rows_of_token(layer, position % shape.block_len) {
                let source = match index.part {
                    Part::Key => k,
                    Part::Value => v,
                };
                let first = ((sequence.first_row + row) * shape.kv_heads + index.head) * shape.head_size;
                let values = &source[first..first + shape.head_size];
                kv_rows::write_row(shape, block, index, |stored| {
                    encode_row(simd, shape.dtype, values, stored)
                });
            }
        }
    }
}

/// One block of another layout, filled from the tokens of a span.
pub(crate) struct ConvertBlock<'a> {
    pub(crate) image: &'a mut [u8],
    pub(crate) to: &'a KvBlockShape,
    pub(crate) layers: Range<usize>,
    pub(crate) from: TokenSpan<'a>,
}

impl Kernel for ConvertBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { image, to, layers, from } = self;
        from.assert_converts(to, &layers, image);
        image.fill(0);
        let shape = from.shape;
        let mut buffer = [0.0; WIDEST_HEAD];
        assert!(shape.head_size <= WIDEST_HEAD, "convert: heads of {}", shape.head_size);
        let values = &mut buffer[..shape.head_size];
        for position in from.first..from.first + from.count {
            let block = from.blocks[position / shape.block_len];
            for layer in layers.clone() {
                let targets = to.rows_of_token(layer - layers.start, position % to.block_len);
                for (source, target) in shape.rows_of_token(layer, position % shape.block_len).zip(targets) {
                    let stored = kv_rows::row(shape, block, source);
                    let mut scale = kv_rows::scale(shape, block, source);
                    let bytes = &mut image[to.row_offset(target)..][..to.row_bytes()];
                    if shape.dtype == to.dtype {
                        bytes.copy_from_slice(stored);
                    } else {
                        decode_row(simd, shape.dtype, stored, scale, values);
                        scale = encode_row(simd, to.dtype, values, bytes);
                    }
                    if let Some(offset) = to.scale_offset(target) {
                        image[offset..offset + size_of::<f32>()].copy_from_slice(&scale.to_ne_bytes());
                    }
                }
            }
        }
    }
}

/// Rows per chunk of `write_kv`.
const ROWS_PER_CHUNK: usize = 16;

/// Elements of the widest head that a conversion has room for: no model has more than 576 (the latent of DeepSeek).
const WIDEST_HEAD: usize = 1024;
