//! What the operations of a step take beside plain slices.
//!
//! The rows of a step are the tokens of all its sequences one after another; [`SequenceRows`] says which rows are
//! whose. Prefill, a chunk of it and decode differ only in how many rows a sequence has.

use crate::kv::{BlockAddress, KvBlockShape};

/// The rows of one sequence in a step, and where its K and V are.
#[derive(Clone, Copy, Debug)]
pub struct SequenceRows<'a> {
    /// Index of its first row in the step.
    pub first_row: usize,
    /// How many rows it has: consecutive tokens.
    pub rows: usize,
    /// Position in the sequence of the token of `first_row`.
    pub first_position: usize,
    /// All blocks of the sequence from position 0 on: position `p` is in `blocks[p / block_len]`.
    pub blocks: &'a [BlockAddress],
}

/// The parts of attention that are the model's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Heads of the query: a multiple of the KV heads; query head `h` reads KV head `h / (query_heads / kv_heads)`.
    pub query_heads: usize,
    /// Factor of `q · k`, mostly `1 / sqrt(head_size)`.
    pub scale: f32,
    /// A query attends to at most this many keys, its own included. Never zero.
    pub sliding_window: Option<usize>,
}

/// Cosines and sines of the rotary embedding, `[position][half]` each.
#[derive(Clone, Copy, Debug)]
pub struct RopeTable<'a> {
    /// Cosines, the attention factor of the scaling already multiplied in.
    pub cos: &'a [f32],
    /// Sines, likewise.
    pub sin: &'a [f32],
    /// Half the rotated elements of a head: element `i` is paired with `i + half` (the NeoX order).
    pub half: usize,
}

/// Consecutive tokens of a sequence in blocks of one shape.
#[derive(Clone, Copy, Debug)]
pub struct TokenSpan<'a> {
    /// Shape of the blocks.
    pub shape: &'a KvBlockShape,
    /// All blocks of the sequence from position 0 on.
    pub blocks: &'a [BlockAddress],
    /// Position of the first token.
    pub first: usize,
    /// Number of tokens.
    pub count: usize,
}

/// Which KV heads of one shape are which of another: tensor-parallel workers hold different ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadSpan {
    /// The first head in the source.
    pub from: usize,
    /// Where it goes in the target.
    pub to: usize,
    /// How many heads.
    pub count: usize,
}

impl AttentionParams {
    /// First key position that a query at `position` attends to; the last is `position` itself.
    pub const fn first_key(&self, position: usize) -> usize {
        match self.sliding_window {
            Some(window) => (position + 1).saturating_sub(window),
            None => 0,
        }
    }
}

impl RopeTable<'_> {
    /// Cosines and sines of one position.
    ///
    /// # Panics
    ///
    /// When the table ends before `position`.
    pub fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let first = position as usize * self.half;
        (&self.cos[first..first + self.half], &self.sin[first..first + self.half])
    }
}

impl SequenceRows<'_> {
    /// Checks that the block table reaches to the last row's position.
    pub(crate) fn assert_fits(&self, shape: &KvBlockShape) {
        assert!(
            self.first_position + self.rows <= self.blocks.len() * shape.block_len,
            "{} blocks of {} tokens do not reach position {}",
            self.blocks.len(),
            shape.block_len,
            self.first_position + self.rows
        );
    }
}
