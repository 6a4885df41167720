//! Asking memory for K and V before they are read.
//!
//! A tile computes longer than it reads, so requests are spread over the whole of its work: bursts at its beginning would
//! leave memory idle for the rest. They are made in the order of addresses where heads lie side by side, so that the machine
//! sees it and reads ahead by itself: it can wait for more lines than a program can ask for.

use super::{Attention, KEY_TILE, workspace::Dimensions};
use crate::{
    cpu::simd::Simd,
    kv_rows::{self, Part, RowIndex},
    step::SequenceRows,
};
use std::ops::Range;

/// The keys and values of one sequence.
#[derive(Clone, Copy)]
pub(super) struct StoredSequence<'a> {
    pub(super) of: &'a Attention<'a>,
    pub(super) sequence: &'a SequenceRows<'a>,
}

impl<'a> StoredSequence<'a> {
    /// The stored row of a head and position.
    #[inline(always)]
    pub(super) fn row(self, part: Part, head: usize, position: usize) -> &'a [u8] {
        let shape = self.of.shape;
        let (block, row) = self.place(part, head, position);
        kv_rows::run(shape, self.sequence.blocks[block], shape.row_offset(row), shape.row_bytes())
    }

    /// Its scale; 1 for types without scales.
    #[inline(always)]
    pub(super) fn scale(self, part: Part, head: usize, position: usize) -> f32 {
        let shape = self.of.shape;
        let (block, row) = self.place(part, head, position);
        let block = self.sequence.blocks[block];
        shape.scale_offset(row).map_or(1.0, |offset| kv_rows::stored_scale(shape, block, offset))
    }

    #[inline(always)]
    fn place(self, part: Part, head: usize, position: usize) -> (usize, RowIndex) {
        // A power of two: a division would take longer than all else here.
        let block_len = self.of.shape.block_len;
        let (block, token) = (position >> block_len.trailing_zeros(), position & (block_len - 1));
        (block, RowIndex { part, layer: self.of.layer, token, head })
    }
}

/// What to ask for next.
pub(super) struct Ahead<'a> {
    stored: StoredSequence<'a>,
    heads: Range<usize>,
    /// The row that has not been asked for.
    position: usize,
    head: usize,
    /// Where the sequence ends, and where to stop for now.
    end: usize,
    limit: usize,
    /// Steps between rows, and until the next one.
    pace: usize,
    wait: usize,
}

impl<'a> Ahead<'a> {
    /// Will ask for the rows of some heads and positions, one in each `pace` steps.
    pub(super) fn new(
        stored: StoredSequence<'a>,
        heads: Range<usize>,
        positions: Range<usize>,
        pace: usize,
    ) -> Self {
        let Range { start, end } = positions;
        Self { stored, head: heads.start, heads, position: start, end, limit: start, pace, wait: 0 }
    }

    /// Positions before this one are read already, or are about to be.
    pub(super) fn reach(&mut self, position: usize) {
        if self.position < position {
            (self.position, self.head) = (position, self.heads.start);
        }
        self.limit = self.end.min(position + FARTHEST);
    }

    /// Says that a little work is being done.
    #[inline(always)]
    pub(super) fn step<S: Simd>(&mut self, simd: S) {
        if self.wait == 0 {
            self.ask(simd);
        } else {
            self.wait -= 1;
        }
    }

    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S) {
        self.wait = self.pace - 1;
        let (position, head) = (self.position, self.head);
        if self.limit <= position {
            return;
        }
        self.head += 1;
        if self.head == self.heads.end {
            (self.position, self.head) = (position + 1, self.heads.start);
        }
        for part in [Part::Key, Part::Value] {
            for line in self.stored.row(part, head, position).chunks(CACHE_LINE) {
                simd.prefetch_far(line.as_ptr());
            }
        }
    }
}

/// Steps of the work on one tile and head, of `queries` queries, for each of its positions.
pub(super) fn steps_per_row(dimensions: Dimensions, queries: usize) -> usize {
    // Products take some queries and four panels at a time; each position is loaded twice.
    let of_query = dimensions.units() + dimensions.lines_of_panel() * dimensions.panels().div_ceil(4);
    let products = queries.div_ceil(QUERIES_AT_ONCE) * of_query / UNITS_PER_STEP;
    2 + products / KEY_TILE
}

/// Positions that are asked for before they are read, at most.
const FARTHEST: usize = KEY_TILE + KEY_TILE / 2;

/// Units of a product that are one step: the count of steps is in memory, and to go there takes longer than to multiply a
/// unit by a few queries.
pub(super) const UNITS_PER_STEP: usize = 4;

/// Queries of a product, more or less.
const QUERIES_AT_ONCE: usize = 5;

const CACHE_LINE: usize = 64;
