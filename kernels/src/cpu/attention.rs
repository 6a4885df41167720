//! Causal attention over the paged KV cache, without ever holding a row of scores.
//!
//! A thread takes some rows of one sequence and one KV head, with all query heads that read it, and walks over the
//! keys in tiles of [`KEY_TILE`]: K and V are widened to f32 once per tile, then scores, exponentials and weighted
//! values are added to running sums that are rescaled when the greatest score grows (online softmax: Milakov and
//! Gimelshein 2018; FlashAttention, Dao et al. 2022).
//!
//! Tiles begin at multiples of [`KEY_TILE`] of the *position in the sequence*, and each row takes part in a tile with
//! exactly the keys that it may see. What a row computes is therefore the same sequence of operations however the
//! prompt was cut, in whatever blocks its keys lie, and whoever else is in the step.
//!
//! Limit of decode: the bytes of K and V of the context are read once, `2 * context * kv_heads * head_size * bytes`.

use super::{
    Level,
    kv_codec::decode_row,
    pool::{Pool, lock},
    row_tiles::{RowTile, RowTiles},
    shared_out::SharedOut,
    simd::{Kernel, LANES, Simd},
};
use crate::{
    aligned::AlignedBuffer,
    kv::{BlockAddress, KvBlockShape},
    kv_rows::{self, Part, RowIndex},
    step::{AttentionParams, SequenceRows},
};
use std::{ops::Range, sync::Mutex};

/// What one attention operation computes.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) shape: &'a KvBlockShape,
    pub(crate) layer: usize,
    pub(crate) sequences: &'a [SequenceRows<'a>],
    pub(crate) params: AttentionParams,
}

/// Working memory of one thread.
#[derive(Debug)]
pub(crate) struct Workspace(AlignedBuffer);

impl Workspace {
    /// Empty: grows when it is reserved or first used.
    pub(crate) fn new() -> Self {
        Self(AlignedBuffer::zeroed(0))
    }

    /// Makes room for heads of `head_size` elements. (One KV head with more query heads than [`QUERY_TILE`] takes more.)
    pub(crate) fn reserve(&mut self, head_size: usize) {
        self.parts(head_size.div_ceil(LANES), QUERY_TILE);
    }

    fn parts(&mut self, vectors: usize, queries: usize) -> Parts<'_> {
        let row = vectors * LANES;
        let total = 2 * KEY_TILE * row + queries * (2 * row + KEY_TILE + 2);
        let memory = self.0.grown::<f32>(total.next_multiple_of(LANES));
        let (keys, memory) = memory.split_at_mut(KEY_TILE * row);
        let (values, memory) = memory.split_at_mut(KEY_TILE * row);
        let (q, memory) = memory.split_at_mut(queries * row);
        let (sums, memory) = memory.split_at_mut(queries * row);
        let (scores, memory) = memory.split_at_mut(queries * KEY_TILE);
        let (greatest, memory) = memory.split_at_mut(queries);
        Parts {
            keys: keys.as_chunks_mut().0,
            values: values.as_chunks_mut().0,
            q: q.as_chunks_mut().0,
            sums: sums.as_chunks_mut().0,
            scores: scores.as_chunks_mut().0,
            greatest,
            totals: &mut memory[..queries],
            vectors,
        }
    }
}

impl Attention<'_> {
    /// Computes it on all threads, each with its own workspace.
    pub(crate) fn compute(
        self,
        out: &mut [f32],
        level: Level,
        pool: &mut Pool,
        tiles: &mut RowTiles,
        workspaces: &[Mutex<Workspace>],
    ) {
        let (shape, heads) = (self.shape, self.params.query_heads);
        assert_eq!(out.len(), self.q.len(), "attention: out is as long as q");
        assert!(
            self.q.len().is_multiple_of(heads * shape.head_size),
            "attention: q is [rows][{heads}][head_size]"
        );
        assert!(heads.is_multiple_of(shape.kv_heads), "attention: whole groups of query heads");
        assert!(self.layer < shape.layers, "attention: layer {} of {}", self.layer, shape.layers);
        assert!(self.params.sliding_window != Some(0), "attention: a query sees at least its own key");
        let rows = self.q.len() / (heads * shape.head_size);
        assert!(
            rows_are_apart(self.sequences, rows),
            "attention: the rows of sequences ascend and do not overlap"
        );

        let group = heads / shape.kv_heads;
        tiles.plan(self.sequences, shape, queries_per_tile(group) / group, shape.kv_heads);
        let tiles = &*tiles;
        let out = SharedOut::new(out);
        pool.for_each(tiles.count(), |thread, chunk| {
            // The last rows of a prompt see the most keys: they go first, so that no thread starts one at the end.
            let tile = tiles.tile(self.sequences, tiles.count() - 1 - chunk);
            level.run(AttendTile { of: self, tile, out: &out, workspace: &mut lock(&workspaces[thread]) });
        });
    }
}

fn rows_are_apart(sequences: &[SequenceRows<'_>], rows: usize) -> bool {
    let mut end = 0;
    sequences.iter().all(|sequence| {
        let apart = end <= sequence.first_row;
        end = sequence.first_row + sequence.rows;
        apart && end <= rows
    })
}

/// Queries (rows times the query heads of one KV head) of a tile: a multiple of `group`.
fn queries_per_tile(group: usize) -> usize {
    (QUERY_TILE / group).max(1) * group
}

/// Named parts of a workspace; rows are `vectors` vectors long, their tail zero.
struct Parts<'a> {
    keys: &'a mut [[f32; LANES]],
    values: &'a mut [[f32; LANES]],
    q: &'a mut [[f32; LANES]],
    /// Per query, the weighted sum of values so far.
    sums: &'a mut [[f32; LANES]],
    /// Per query, scores and then weights of the tile's keys.
    scores: &'a mut [[f32; KEY_TILE]],
    greatest: &'a mut [f32],
    /// Per query, the sum of weights so far.
    totals: &'a mut [f32],
    vectors: usize,
}

struct AttendTile<'a> {
    of: Attention<'a>,
    tile: RowTile,
    out: &'a SharedOut<'a>,
    workspace: &'a mut Workspace,
}

impl Kernel for AttendTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { of, tile, out, workspace } = self;
        let (shape, heads) = (of.shape, of.params.query_heads);
        let group = heads / shape.kv_heads;
        let sequence = &of.sequences[tile.sequence];
        let queries = tile.rows.len() * group;
        let mut parts = workspace.parts(shape.head_size.div_ceil(LANES), queries_per_tile(group));
        parts.begin(queries);
        // The query heads of a KV head lie side by side, so the part of a row that belongs here is one slice.
        let elements = |row: usize| {
            let first = (sequence.first_row + row) * heads + tile.lane * group;
            first * shape.head_size..(first + group) * shape.head_size
        };
        for (index, row) in tile.rows.clone().enumerate() {
            for (head, q) in of.q[elements(row)].chunks_exact(shape.head_size).enumerate() {
                parts.set_q(index * group + head, q);
            }
        }

        let head = HeadKeys { blocks: sequence.blocks, head: tile.lane };
        let last = sequence.first_position + tile.rows.end - 1;
        let first = of.params.first_key(sequence.first_position + tile.rows.start);
        for tile_start in (first / KEY_TILE * KEY_TILE..=last).step_by(KEY_TILE) {
            let keys = first.max(tile_start)..(last + 1).min(tile_start + KEY_TILE);
            parts.load_keys(simd, &of, head, tile_start, keys, last + 1);
            let mut query = 0;
            while query < queries {
                let visible = |query: usize| {
                    let position = sequence.first_position + tile.rows.start + query / group;
                    visible_keys(&of.params, position, tile_start)
                };
                let keys = visible(query);
                let run = (query..queries).take_while(|&other| visible(other) == keys).count();
                if !keys.is_empty() {
                    parts.attend(simd, query..query + run, keys, of.params.scale);
                }
                query += run;
            }
        }

        for (index, row) in tile.rows.enumerate() {
            // SAFETY: a tile writes the heads of its lane in its own rows; no other tile has both.
            let out = unsafe { out.part(elements(row)) };
            for (head, out) in out.chunks_exact_mut(shape.head_size).enumerate() {
                parts.finish(index * group + head, out);
            }
        }
    }
}

/// Keys of a tile that a query may see, counted from the tile's start.
#[inline(always)]
fn visible_keys(params: &AttentionParams, position: usize, tile_start: usize) -> Range<usize> {
    let first = params.first_key(position).clamp(tile_start, tile_start + KEY_TILE);
    let end = (position + 1).clamp(tile_start, tile_start + KEY_TILE);
    first - tile_start..end - tile_start
}

/// The keys of one sequence and KV head.
#[derive(Clone, Copy)]
struct HeadKeys<'a> {
    blocks: &'a [BlockAddress],
    head: usize,
}

impl HeadKeys<'_> {
    #[inline(always)]
    fn row(self, of: &Attention<'_>, part: Part, position: usize) -> (BlockAddress, RowIndex) {
        let (block, token) = (position / of.shape.block_len, position % of.shape.block_len);
        (self.blocks[block], RowIndex { part, layer: of.layer, token, head: self.head })
    }
}

impl Parts<'_> {
    #[inline(always)]
    fn begin(&mut self, queries: usize) {
        self.sums[..queries * self.vectors].fill([0.0; LANES]);
        self.greatest[..queries].fill(f32::NEG_INFINITY);
        self.totals[..queries].fill(0.0);
    }

    #[inline(always)]
    fn set_q(&mut self, query: usize, q: &[f32]) {
        let row = self.q[query * self.vectors..(query + 1) * self.vectors].as_flattened_mut();
        row[..q.len()].copy_from_slice(q);
        row[q.len()..].fill(0.0);
    }

    /// Widens the K and V of some positions, and asks for those that come some positions later, up to `end`: the rows
    /// of one head may lie so far apart that the machine does not see a pattern in them.
    #[inline(always)]
    fn load_keys<S: Simd>(
        &mut self,
        simd: S,
        of: &Attention<'_>,
        head: HeadKeys<'_>,
        tile_start: usize,
        positions: Range<usize>,
        end: usize,
    ) {
        let shape = of.shape;
        for position in positions {
            if position + PREFETCH_DISTANCE < end {
                for part in [Part::Key, Part::Value] {
                    let (block, index) = head.row(of, part, position + PREFETCH_DISTANCE);
                    for line in kv_rows::row(shape, block, index).chunks(CACHE_LINE) {
                        simd.prefetch(&line[0]);
                    }
                }
            }
            let first = (position - tile_start) * self.vectors;
            for (part, target) in [(Part::Key, &mut *self.keys), (Part::Value, &mut *self.values)] {
                let (block, index) = head.row(of, part, position);
                let row = target[first..first + self.vectors].as_flattened_mut();
                let (row, padding) = row.split_at_mut(shape.head_size);
                let scale = kv_rows::scale(shape, block, index);
                decode_row(simd, shape.dtype, kv_rows::row(shape, block, index), scale, row);
                padding.fill(0.0);
            }
        }
    }

    /// Adds some keys of the tile to the sums of some queries, all of which see just these.
    #[inline(always)]
    fn attend<S: Simd>(&mut self, simd: S, queries: Range<usize>, keys: Range<usize>, scale: f32) {
        let mut query = queries.start;
        while query < queries.end {
            let left = queries.end - query;
            match left {
                1 => self.score::<S, 1, 8>(simd, query, &keys),
                2 => self.score::<S, 2, 4>(simd, query, &keys),
                _ => self.score::<S, 3, 4>(simd, query, &keys),
            }
            let rows = left.min(3);
            for query in query..query + rows {
                self.weigh(simd, query, &keys, scale);
            }
            match rows {
                1 => self.add_values::<S, 1, 8>(simd, query, &keys),
                2 => self.add_values::<S, 2, 4>(simd, query, &keys),
                _ => self.add_values::<S, 3, 4>(simd, query, &keys),
            }
            query += rows;
        }
    }

    /// `q · k` of `ROWS` queries, `KEYS` keys at a time. Begins and ends on whole groups of keys: scores of keys that
    /// are not visible, and may not even be loaded, are computed and never looked at.
    #[inline(always)]
    fn score<S: Simd, const ROWS: usize, const KEYS: usize>(
        &mut self,
        simd: S,
        query: usize,
        keys: &Range<usize>,
    ) {
        let vectors = self.vectors;
        let q: [&[[f32; LANES]]; ROWS] =
            std::array::from_fn(|row| &self.q[(query + row) * vectors..(query + row + 1) * vectors]);
        for first in (keys.start / KEYS * KEYS..keys.end).step_by(KEYS) {
            let k: [&[[f32; LANES]]; KEYS] =
                std::array::from_fn(|key| &self.keys[(first + key) * vectors..(first + key + 1) * vectors]);
            let mut sums = [[simd.splat(0.0); KEYS]; ROWS];
            for vector in 0..vectors {
                for (key, k) in k.iter().enumerate() {
                    let k = simd.load(&k[vector]);
                    for (sums, q) in sums.iter_mut().zip(q) {
                        sums[key] = simd.mul_add(simd.load(&q[vector]), k, sums[key]);
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                for (quad, sums) in sums.as_chunks::<4>().0.iter().enumerate() {
                    let scores = &mut self.scores[query + row][first + 4 * quad..first + 4 * quad + 4];
                    scores.copy_from_slice(&simd.sums(*sums));
                }
            }
        }
    }

    /// Turns scores into weights `e^(scale * score - greatest)` and rescales what the query has summed so far.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, query: usize, keys: &Range<usize>, scale: f32) {
        let scores = &mut self.scores[query];
        let vectors = keys.start / LANES..keys.end.div_ceil(LANES);
        for score in &mut scores[keys.clone()] {
            *score *= scale;
        }
        // Of the vectors at both ends, what is not visible weighs nothing.
        scores[vectors.start * LANES..keys.start].fill(f32::NEG_INFINITY);
        scores[keys.end..vectors.end * LANES].fill(f32::NEG_INFINITY);
        let scores = &mut scores.as_chunks_mut::<LANES>().0[vectors];

        let before = self.greatest[query];
        let mut lanes = [before; LANES];
        let mut greatest = simd.splat(before);
        for scores in &*scores {
            greatest = simd.max(simd.load(scores), greatest);
        }
        simd.store(greatest, &mut lanes);
        let greatest = lanes.iter().fold(before, |max, &lane| if lane > max { lane } else { max });

        let mut total = simd.splat(0.0);
        for weights in scores {
            let weight = simd.exp(simd.sub(simd.load(weights), simd.splat(greatest)));
            total = simd.add(total, weight);
            simd.store(weight, weights);
        }
        simd.store(simd.exp(simd.splat(before - greatest)), &mut lanes);
        let factor = lanes[0];
        self.greatest[query] = greatest;
        self.totals[query] = self.totals[query] * factor + simd.sum(total);
        for sums in &mut self.sums[query * self.vectors..(query + 1) * self.vectors] {
            simd.store(simd.mul(simd.load(sums), simd.splat(factor)), sums);
        }
    }

    /// Adds the weighted values of the keys, in their order, to the sums of `ROWS` queries.
    #[inline(always)]
    fn add_values<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        query: usize,
        keys: &Range<usize>,
    ) {
        let mut vector = 0;
        while vector + VECTORS <= self.vectors {
            self.add_value_vectors::<S, ROWS, VECTORS>(simd, query, keys, vector);
            vector += VECTORS;
        }
        while vector < self.vectors {
            self.add_value_vectors::<S, ROWS, 1>(simd, query, keys, vector);
            vector += 1;
        }
    }

    #[inline(always)]
    fn add_value_vectors<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        query: usize,
        keys: &Range<usize>,
        vector: usize,
    ) {
        let mut sums = [[simd.splat(0.0); VECTORS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            let first = (query + row) * self.vectors + vector;
            for (sum, source) in sums.iter_mut().zip(&self.sums[first..first + VECTORS]) {
                *sum = simd.load(source);
            }
        }
        let weights: [&[f32; KEY_TILE]; ROWS] = std::array::from_fn(|row| &self.scores[query + row]);
        for key in keys.clone() {
            let start = key * self.vectors + vector;
            let values: &[[f32; LANES]; VECTORS] =
                self.values[start..start + VECTORS].try_into().expect("as many as the range is long");
            for (index, value) in values.iter().enumerate() {
                let value = simd.load(value);
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    sums[index] = simd.mul_add(simd.splat(weights[key]), value, sums[index]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let first = (query + row) * self.vectors + vector;
            for (target, sum) in self.sums[first..first + VECTORS].iter_mut().zip(sums) {
                simd.store(*sum, target);
            }
        }
    }

    #[inline(always)]
    fn finish(&self, query: usize, out: &mut [f32]) {
        let sums = self.sums[query * self.vectors..(query + 1) * self.vectors].as_flattened();
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = sum / self.totals[query];
        }
    }
}

/// Keys of a tile: with heads of 128 elements, K and V of a tile are 64 KiB, an eighth of a small second-level cache.
const KEY_TILE: usize = 64;

/// Queries of a tile, unless one KV head alone has more.
const QUERY_TILE: usize = 48;

/// Positions between a request for a row and its use: the time of some hundred multiply-adds each.
const PREFETCH_DISTANCE: usize = 16;

const CACHE_LINE: usize = 64;
