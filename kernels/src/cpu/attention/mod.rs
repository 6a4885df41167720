//! Causal attention over the paged KV cache, without ever holding a row of scores.
//!
//! A thread takes some rows of one sequence and some KV heads, with all query heads that read them, and walks over the
//! keys in tiles of [`KEY_TILE`]: K and V of a head are turned into lines for the product instructions once per tile, then scores,
//! exponentials and weighted values are added to running sums that are rescaled when the greatest score grows (online
//! softmax: Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022).
//!
//! Tiles begin at multiples of [`KEY_TILE`] of the *position in the sequence*, and each row takes part in a tile with
//! exactly the keys that it may see. Sums begin anew in each [`SEGMENT`] of positions, and those of segments are added in
//! order, whether one thread computed them or several. What a row computes is therefore the same sequence of operations
//! however the prompt was cut, in whatever blocks its keys lie, on however many threads, and whoever else is in the step.
//!
//! Limit of decode: the bytes of K and V of the context are read once, `2 * context * kv_heads * head_size * bytes`.
//! Limit of prefill: `4 * query_heads * head_size` operations for each pair of a row and a key that it sees.

mod ahead;
#[cfg(target_arch = "x86_64")]
mod bf16_x86;
mod dots;
mod plan;
mod score;
mod softmax;
mod tile;
mod workspace;

use self::{
    dots::Wide,
    plan::{Chunk, Join, STATES_PER_THREAD},
    tile::Tile,
    workspace::{Dimensions, States},
};
use super::{
    Level,
    pool::{Pool, lock},
    shared_out::SharedOut,
    simd::{Kernel, Simd},
};
use crate::{
    aligned::AlignedBuffer,
    kv::{KvBlockShape, KvDtype},
    matrix::PANEL,
    step::{AttentionParams, SequenceRows},
};
use dots::Line;
pub(crate) use plan::Plan;
use std::{ops::Range, sync::Mutex};
pub(crate) use workspace::Workspace;

/// What one attention operation computes.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) shape: &'a KvBlockShape,
    pub(crate) layer: usize,
    pub(crate) sequences: &'a [SequenceRows<'a>],
    pub(crate) params: AttentionParams,
}

/// What is kept from one operation to the next.
#[derive(Debug)]
pub(crate) struct Memory {
    plan: Plan,
    /// States of segments that are chunks of their own.
    states: AlignedBuffer,
}

impl Memory {
    /// Empty: grows when it is reserved or first used.
    pub(crate) fn new() -> Self {
        Self { plan: Plan::default(), states: AlignedBuffer::zeroed(0) }
    }

    /// Makes room for steps of `sequences` sequences with heads of `head_size` elements on `threads` threads.
    pub(crate) fn reserve(&mut self, sequences: usize, head_size: usize, threads: usize) {
        self.plan.reserve(sequences);
        if 1 < threads {
            self.states.grown::<Line>(threads * STATES_PER_THREAD * widest_state(head_size));
        }
    }
}

/// Lines of the state of a query, in whatever units the instructions take it.
fn widest_state(head_size: usize) -> usize {
    Dimensions::new(0, head_size, 2).state_lines()
}

impl Attention<'_> {
    /// Computes it on all threads, each with its own workspace.
    pub(crate) fn compute(
        self,
        out: &mut [f32],
        level: Level,
        pool: &mut Pool,
        memory: &mut Memory,
        workspaces: &[Mutex<Workspace>],
    ) {
        self.assert_fits(out);
        let Memory { plan, states } = memory;
        plan.make(&self, pool.threads());
        let states = match plan.joins() {
            0 => &mut [],
            _ => {
                states.grown::<Line>(pool.threads() * STATES_PER_THREAD * widest_state(self.shape.head_size))
            }
        };
        let (plan, out, states) = (&*plan, SharedOut::new(out), SharedOut::new(states));
        pool.for_each(plan.chunks(), |thread, index| {
            // The last rows of a prompt see the most keys: they go first, so that no thread starts one at the end.
            let chunk = plan.chunk(&self, plan.chunks() - 1 - index);
            let workspace = &mut lock(&workspaces[thread]);
            Work { of: self, chunk, out: &out, states: &states, workspace }.run_on(level);
        });
        pool.for_each(plan.joins(), |_, index| {
            level.run(Joining { of: self, join: plan.join(&self, index), out: &out, states: &states, level });
        });
    }

    fn assert_fits(&self, out: &[f32]) {
        let (shape, heads) = (self.shape, self.params.query_heads);
        assert_eq!(out.len(), self.q.len(), "attention: out is as long as q");
        assert!(
            self.q.len().is_multiple_of(heads * shape.head_size),
            "attention: q is [rows][{heads}][head_size]"
        );
        assert!(heads.is_multiple_of(shape.kv_heads), "attention: whole groups of query heads");
        assert!(self.layer < shape.layers, "attention: layer {} of {}", self.layer, shape.layers);
        assert!(self.params.sliding_window != Some(0), "attention: a query sees at least its own key");
        assert!(shape.block_len.is_power_of_two(), "attention: blocks of {} tokens", shape.block_len);
        let rows = self.q.len() / (heads * shape.head_size);
        assert!(
            rows_are_apart(self.sequences, rows),
            "attention: the rows of sequences ascend and do not overlap"
        );
    }

    /// Query heads of a KV head.
    const fn group(&self) -> usize {
        self.params.query_heads / self.shape.kv_heads
    }

    /// Where in `q` and `out` the query heads of a KV head are, for a row of a sequence: they lie side by side.
    const fn elements(&self, sequence: &SequenceRows<'_>, head: usize, row: usize) -> Range<usize> {
        let first = (sequence.first_row + row) * self.params.query_heads + head * self.group();
        first * self.shape.head_size..(first + self.group()) * self.shape.head_size
    }

    /// Segments of positions that a query at `position` sees.
    const fn segments(&self, position: usize) -> Range<usize> {
        self.params.first_key(position) / SEGMENT..position / SEGMENT + 1
    }

    /// Elements of a unit of the products on `level`.
    fn unit(&self, level: Level) -> usize {
        match level {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Level::Amx(_) if self.is_exact_in_bf16() => 2,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16(_) if self.is_exact_in_bf16() => 2,
            _ => 1,
        }
    }

    /// Whether K and V may be turned into bf16 without loss.
    const fn is_exact_in_bf16(&self) -> bool {
        matches!(self.shape.dtype, KvDtype::Bf16 | KvDtype::Int8 | KvDtype::Fp8)
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

/// Rows of a tile whose KV head has `group` query heads.
fn rows_per_tile(group: usize) -> usize {
    (QUERY_TILE / group).max(1)
}

/// A chunk and where its result goes.
struct Work<'a> {
    of: Attention<'a>,
    chunk: Chunk,
    out: &'a SharedOut<'a>,
    states: &'a SharedOut<'a, Line>,
    workspace: &'a mut Workspace,
}

impl Work<'_> {
    fn run_on(self, level: Level) {
        match (self.of.unit(level), level) {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            (2, Level::Amx(set)) => set.avx512().dispatch(Products { work: self, set: set.avx512() }),
            #[cfg(target_arch = "x86_64")]
            (2, Level::Avx512Bf16(set)) => set.dispatch(Products { work: self, set }),
            _ => level.run(self),
        }
    }
}

impl Kernel for Work<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        Tile::attend(self, Wide(simd));
    }
}

/// Work with products of bf16.
#[cfg(target_arch = "x86_64")]
struct Products<'a> {
    work: Work<'a>,
    set: super::avx512::Avx512Bf16,
}

#[cfg(target_arch = "x86_64")]
impl Kernel for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        Tile::attend(self.work, bf16_x86::Bf16Pairs(self.set));
    }
}

/// Puts the segments of a tile together.
struct Joining<'a> {
    of: Attention<'a>,
    join: Join,
    out: &'a SharedOut<'a>,
    states: &'a SharedOut<'a, Line>,
    level: Level,
}

impl Kernel for Joining<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { of, join, out, states, level } = self;
        let sequence = &of.sequences[join.sequence];
        let panels = Dimensions::new(0, of.shape.head_size, of.unit(level)).panels();
        let lines = States::lines(panels);
        let (group, head_size) = (of.group(), of.shape.head_size);
        for (index, row) in join.rows.clone().enumerate() {
            let seen = of.segments(sequence.first_position + row);
            for (nth, head) in join.heads.clone().enumerate() {
                // SAFETY: a tile writes the query heads of its KV heads in its own rows; no other tile has both.
                let out = unsafe { out.part(of.elements(sequence, head, row)) };
                for (query, out) in out.chunks_exact_mut(head_size).enumerate() {
                    let slot = (nth * join.rows.len() + index) * group + query;
                    let state = |segment: usize| {
                        let before = (segment - join.segments.start) * join.states_apart;
                        let first = (join.first_state + before + slot) * lines;
                        // SAFETY: the segments of a tile have states of their own, which this tile alone puts together;
                        // the first one and a later one are not the same.
                        unsafe { states.part(first..first + lines) }
                    };
                    let whole = state(seen.start);
                    for segment in seen.start + 1..seen.end {
                        softmax::add_state(simd, whole, state(segment));
                    }
                    softmax::finish(simd, whole, out);
                }
            }
        }
    }
}

/// Keys of a tile: with heads of 128 elements, K and V of a tile are 64 KiB in f32, an eighth of a small second-level cache.
const KEY_TILE: usize = 64;

/// Lines of one unit of a tile's keys.
const KEY_PANELS: usize = KEY_TILE / PANEL;

/// Queries of a tile, unless one KV head alone has more.
const QUERY_TILE: usize = 96;

/// Positions whose sums are formed by themselves: some 0.2 MiB of K and V, ten microseconds of reading.
const SEGMENT: usize = 512;

const _: () = assert!(SEGMENT.is_multiple_of(KEY_TILE));
