//! How the rows of a step's sequences are cut into tiles that threads can take one by one.

use crate::{kv::KvBlockShape, step::SequenceRows};
use std::ops::Range;

/// The tiles of a step. Kept from step to step for its memory.
#[derive(Debug, Default)]
pub(crate) struct RowTiles {
    /// Per sequence, the number of tiles up to and including its own.
    ends: Vec<usize>,
    rows_per_tile: usize,
    lanes: usize,
}

/// Some rows of one sequence, on one of several lanes (attention: KV heads).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowTile {
    pub(crate) sequence: usize,
    pub(crate) lane: usize,
    /// Counted from the sequence's first row in the step.
    pub(crate) rows: Range<usize>,
}

impl RowTiles {
    /// Makes room for a step of `sequences` sequences.
    pub(crate) fn reserve(&mut self, sequences: usize) {
        self.ends.clear();
        self.ends.reserve(sequences);
    }

    /// Cuts the rows of each sequence into tiles of `rows_per_tile`, each `lanes` times.
    pub(crate) fn plan(
        &mut self,
        sequences: &[SequenceRows<'_>],
        shape: &KvBlockShape,
        rows_per_tile: usize,
        lanes: usize,
    ) {
        (self.rows_per_tile, self.lanes) = (rows_per_tile, lanes);
        self.ends.clear();
        let mut end = 0;
        for sequence in sequences {
            sequence.assert_fits(shape);
            end += sequence.rows.div_ceil(rows_per_tile) * lanes;
            self.ends.push(end);
        }
    }

    /// Number of tiles.
    pub(crate) fn count(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The tile of an index below [`count`](Self::count), of the sequences that were planned.
    pub(crate) fn tile(&self, sequences: &[SequenceRows<'_>], index: usize) -> RowTile {
        let sequence = self.ends.partition_point(|&end| end <= index);
        let first = if sequence == 0 { 0 } else { self.ends[sequence - 1] };
        let (tile, lane) = ((index - first) / self.lanes, (index - first) % self.lanes);
        let start = tile * self.rows_per_tile;
        let end = (start + self.rows_per_tile).min(sequences[sequence].rows);
        RowTile { sequence, lane, rows: start..end }
    }
}
