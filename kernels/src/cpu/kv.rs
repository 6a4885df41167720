//! Rows of K and V into blocks.

use super::{
    Level,
    kv_codec::encode_row,
    pool::Pool,
    row_tiles::{RowTile, RowTiles},
    simd::{Kernel, Simd},
};
use crate::{
    kv::KvBlockShape,
    kv_rows::{self, Part},
    step::SequenceRows,
};

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

/// Rows per chunk of `write_kv`.
const ROWS_PER_CHUNK: usize = 16;
