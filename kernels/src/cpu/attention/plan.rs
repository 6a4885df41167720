//! How attention is shared out among threads.
//!
//! A chunk of work is some rows of one sequence with some KV heads: the more rows, the fewer heads. Few rows wait for
//! memory, and where heads lie side by side, to read them together is to read in order. Where a chunk alone is much of the
//! whole (one long sequence with few rows), its segments of keys are chunks of their own, and what they summed up is put
//! together afterwards. Segments begin at fixed positions and their sums are added in order in either case, so the result
//! is the same.

use super::{Attention, QUERY_TILE, SEGMENT, rows_per_tile};
use std::ops::Range;

/// The chunks of an operation. Kept from step to step for its memory.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    shares: Vec<Share>,
    rows_per_tile: usize,
}

/// The chunks of one sequence.
#[derive(Clone, Debug)]
struct Share {
    /// Chunks up to and including this sequence's.
    end: usize,
    /// Tiles to put together, up to and including this sequence's.
    joins_end: usize,
    /// Segments that are chunks of their own; empty where tiles are not split.
    segments: Range<usize>,
    /// KV heads of a tile.
    heads: usize,
    /// Queries of a tile.
    queries: usize,
    /// Queries with memory for a segment's state, before this sequence's.
    first_state: usize,
}

/// A chunk of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) sequence: usize,
    pub(super) heads: Range<usize>,
    /// Counted from the sequence's first row in the step.
    pub(super) rows: Range<usize>,
    /// `None`: all that the rows see.
    pub(super) segment: Option<Segment>,
}

/// One segment of a tile that is split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) index: usize,
    /// Where the states of its queries are.
    pub(super) first_state: usize,
}

/// A tile whose segments were chunks of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Join {
    pub(super) sequence: usize,
    pub(super) heads: Range<usize>,
    pub(super) rows: Range<usize>,
    pub(super) segments: Range<usize>,
    /// Where the states of the first segment's queries are, and how far those of the next one.
    pub(super) first_state: usize,
    pub(super) states_apart: usize,
}

impl Plan {
    /// Makes room for a step of `sequences` sequences.
    pub(crate) fn reserve(&mut self, sequences: usize) {
        self.shares.clear();
        self.shares.reserve(sequences);
    }

    /// Shares `of` out among `threads` threads.
    pub(super) fn make(&mut self, of: &Attention<'_>, threads: usize) {
        of.sequences.iter().for_each(|sequence| sequence.assert_fits(of.shape));
        self.rows_per_tile = rows_per_tile(of.group());
        let mut most_heads = of.shape.kv_heads;
        self.share(of, threads, most_heads);
        while 1 < threads && 1 < most_heads && self.chunks() < threads * CHUNKS_PER_THREAD {
            most_heads = most_heads.div_ceil(2);
            self.share(of, threads, most_heads);
        }
    }

    /// The same with at most `most_heads` KV heads to a chunk.
    fn share(&mut self, of: &Attention<'_>, threads: usize, most_heads: usize) {
        let work = |index: usize| of.sequences[index].rows * segments_of(of, index).len() * of.shape.kv_heads;
        let whole: usize = (0..of.sequences.len()).map(work).sum();
        let most = whole / (threads * CHUNKS_PER_THREAD);
        self.shares.clear();
        let (mut end, mut joins_end, mut first_state) = (0, 0, 0);
        for (index, sequence) in of.sequences.iter().enumerate() {
            let segments = segments_of(of, index);
            let rows = sequence.rows.min(self.rows_per_tile);
            let heads = (QUERY_TILE / (rows * of.group()).max(1)).clamp(1, most_heads);
            let queries = heads * rows * of.group();
            let tiles = sequence.rows.div_ceil(self.rows_per_tile) * of.shape.kv_heads.div_ceil(heads);
            let states = tiles * segments.len() * queries;
            let is_split = 1 < threads
                && 1 < segments.len()
                && most < rows * segments.len() * heads
                && first_state + states <= threads * STATES_PER_THREAD;
            let segments = if is_split { segments } else { 0..0 };
            end += tiles * segments.len().max(1);
            joins_end += if is_split { tiles } else { 0 };
            self.shares.push(Share { end, joins_end, segments, heads, queries, first_state });
            first_state += if is_split { states } else { 0 };
        }
    }

    /// Number of chunks.
    pub(super) fn chunks(&self) -> usize {
        self.shares.last().map_or(0, |share| share.end)
    }

    /// Number of tiles to put together.
    pub(super) fn joins(&self) -> usize {
        self.shares.last().map_or(0, |share| share.joins_end)
    }

    /// The chunk of an index below [`chunks`](Self::chunks).
    pub(super) fn chunk(&self, of: &Attention<'_>, index: usize) -> Chunk {
        let sequence = self.shares.partition_point(|share| share.end <= index);
        let share = &self.shares[sequence];
        let index = index - self.before(sequence).map_or(0, |share| share.end);
        let pieces = share.segments.len().max(1);
        let (heads, rows) = self.tile(of, sequence, index / pieces);
        let segment = (!share.segments.is_empty()).then(|| Segment {
            index: share.segments.start + index % pieces,
            first_state: share.first_state + index * share.queries,
        });
        Chunk { sequence, heads, rows, segment }
    }

    /// The tile of an index below [`joins`](Self::joins).
    pub(super) fn join(&self, of: &Attention<'_>, index: usize) -> Join {
        let sequence = self.shares.partition_point(|share| share.joins_end <= index);
        let share = &self.shares[sequence];
        let index = index - self.before(sequence).map_or(0, |share| share.joins_end);
        let (heads, rows) = self.tile(of, sequence, index);
        Join {
            sequence,
            heads,
            rows,
            segments: share.segments.clone(),
            first_state: share.first_state + index * share.segments.len() * share.queries,
            states_apart: share.queries,
        }
    }

    fn before(&self, sequence: usize) -> Option<&Share> {
        sequence.checked_sub(1).map(|before| &self.shares[before])
    }

    /// KV heads and rows of one of a sequence's tiles.
    fn tile(&self, of: &Attention<'_>, sequence: usize, index: usize) -> (Range<usize>, Range<usize>) {
        let (heads, kv_heads) = (self.shares[sequence].heads, of.shape.kv_heads);
        let groups = kv_heads.div_ceil(heads);
        let (first, first_head) = (index / groups * self.rows_per_tile, index % groups * heads);
        let rows = first..(first + self.rows_per_tile).min(of.sequences[sequence].rows);
        (first_head..(first_head + heads).min(kv_heads), rows)
    }
}

/// Segments that any row of a sequence sees.
fn segments_of(of: &Attention<'_>, sequence: usize) -> Range<usize> {
    let sequence = &of.sequences[sequence];
    let first = of.params.first_key(sequence.first_position);
    first / SEGMENT..(sequence.first_position + sequence.rows).div_ceil(SEGMENT)
}

/// Chunks that each thread should find at least: then the last one to finish is not late by much.
const CHUNKS_PER_THREAD: usize = 4;

/// Queries whose states there is memory for: those of sixty-four segments of a group of eight.
pub(super) const STATES_PER_THREAD: usize = 512;
