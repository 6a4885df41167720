//! A language model of one line, and the memory that its keys and values are in.
//!
//! A key is two numbers that `bf16` and `f32` both hold exactly, so that a cache that was converted on its way is
//! still known bit for bit.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::extents::Extents;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout, LAYER_ALIGNMENT};
use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, HandoffId, TokenCount};

use crate::request::{FinishReason, StopConditions, TokenId};

/// Layers of the model.
pub(super) const LAYERS: usize = 2;
/// Bits of a key that `bf16` has too, but for one of the exponent: no infinity and no NaN.
const USED: u64 = 0xbfff_0000_bfff_0000;

/// How a worker lays out its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) block_len: BlockLen,
    pub(super) dtype: KvDtype,
}

impl Shape {
    /// All that there are: blocks of three lengths, numbers of two kinds.
    pub(super) fn all() -> Vec<Self> {
        let lens = [4, 8, 16].map(|tokens| BlockLen::new(tokens).expect("a power of two"));
        let shapes =
            lens.map(|block_len| [KvDtype::F32, KvDtype::Bf16].map(|dtype| Self { block_len, dtype }));
        shapes.concat()
    }

    pub(super) fn of(layout: &KvLayout) -> Self {
        Self { block_len: layout.block_len, dtype: layout.dtype }
    }

    pub(super) fn layout(self) -> KvLayout {
        KvLayout {
            model: "one line".to_owned(),
            layers: LAYERS as u16,
            kv_heads: 1,
            heads: HeadRange { first: 0, count: 1 },
            head_size: 2,
            dtype: self.dtype,
            block_len: self.block_len,
            order: AxisOrder::TokenHead,
        }
    }

    pub(super) fn tokens(self) -> usize {
        self.block_len.tokens() as usize
    }

    fn slot_bytes(self) -> usize {
        2 * self.dtype.bytes()
    }

    /// Bytes of a layer of a block, padding included.
    pub(super) fn layer_bytes(self) -> usize {
        (2 * self.tokens() * self.slot_bytes()).next_multiple_of(LAYER_ALIGNMENT)
    }

    pub(super) fn block_bytes(self) -> usize {
        LAYERS * self.layer_bytes()
    }
}

/// The content of a layer at a position, from the content before it and the token.
pub(super) fn content(layer: usize, before: Option<u64>, token: TokenId) -> u64 {
    let before = before.unwrap_or(0x51ed_270b_7a5f_1c03 ^ layer as u64);
    let mixed = (before ^ (u64::from(token) + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)) & USED
}

/// The token that follows; 7 ends the text.
pub(super) fn next_token(last: u64) -> TokenId {
    u32::try_from((last >> 20) % 8).expect("less than eight")
}

/// What all layers contain at each position of these tokens.
pub(super) fn contents(tokens: &[TokenId]) -> Vec<[u64; LAYERS]> {
    let mut before: Option<[u64; LAYERS]> = None;
    let mut all = Vec::with_capacity(tokens.len());
    for token in tokens {
        let here = std::array::from_fn(|layer| content(layer, before.map(|it| it[layer]), *token));
        all.push(here);
        before = Some(here);
    }
    all
}

/// Prompt and answer of a request that is alone in the world, and why it ends.
pub(super) fn answer(
    prompt: &[TokenId],
    stop: &StopConditions,
    longest: TokenCount,
) -> (Vec<TokenId>, FinishReason) {
    let mut tokens = prompt.to_vec();
    let mut last = contents(&tokens).last().expect("a prompt has a token")[LAYERS - 1];
    loop {
        let token = next_token(last);
        let index = u32::try_from(tokens.len() - prompt.len()).expect("short");
        tokens.push(token);
        last = content(LAYERS - 1, Some(last), token);
        let full = (longest.0 as usize <= tokens.len()).then_some(FinishReason::Length);
        if let Some(reason) = stop.reason(token, index).or(full) {
            return (tokens, reason);
        }
    }
}

/// The memory of a worker's process: its blocks, and behind them room for what is converted for peers that read. Clones are
/// mappings of the same memory, which outlives its owner.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    shape: Shape,
    bytes: Rc<RefCell<Vec<u8>>>,
    /// Where the blocks end, and what of the room behind them is in use.
    blocks_end: usize,
    staging: Rc<RefCell<Staging>>,
}

/// Parts of the room behind the blocks.
#[derive(Debug)]
struct Staging {
    extents: Extents,
    /// By where they begin in the memory, how long they are, for which handoff and since when.
    taken: BTreeMap<usize, (usize, HandoffId, u64)>,
}

/// Some of that room, for as long as somebody keeps it.
#[derive(Debug)]
struct Staged {
    staging: Rc<RefCell<Staging>>,
    blocks_end: usize,
    offset: usize,
}

impl Drop for Staged {
    fn drop(&mut self) {
        let mut staging = self.staging.borrow_mut();
        let (len, _, _) = staging.taken.remove(&self.offset).expect("it was taken");
        staging.extents.give_back(self.offset - self.blocks_end, len);
    }
}

/// A range of an arena, as a write reads it.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    memory: Memory,
    offset: usize,
    len: usize,
    /// Whether it is memory of the worker that peers can reach.
    is_in_region: bool,
    /// What keeps it for what it was made for, where it is not a block.
    staged: Option<Rc<Staged>>,
}

impl Memory {
    pub(super) fn new(shape: Shape, blocks: u32, staging: usize) -> Self {
        let blocks_end = blocks as usize * shape.block_bytes();
        Self::of(shape, vec![0xee; blocks_end + staging], blocks_end)
    }

    fn of(shape: Shape, bytes: Vec<u8>, blocks_end: usize) -> Self {
        let staging = Staging { extents: Extents::new(bytes.len() - blocks_end), taken: BTreeMap::new() };
        let (bytes, staging) = (Rc::new(RefCell::new(bytes)), Rc::new(RefCell::new(staging)));
        Self { shape, bytes, blocks_end, staging }
    }

    /// How many bytes behind the blocks can be had at once.
    pub(super) fn room(&self) -> usize {
        self.staging.borrow().extents.longest()
    }

    /// Whether nobody has any of them.
    pub(super) fn has_nothing_staged(&self) -> bool {
        self.staging.borrow().extents.is_whole()
    }

    /// The handoff for which some of them are held longest, and since when.
    pub(super) fn longest_staged(&self) -> Option<(HandoffId, u64)> {
        let staging = self.staging.borrow();
        let held = staging.taken.values().map(|(_, handoff, since)| (*handoff, *since));
        held.min_by_key(|(_, since)| *since)
    }

    /// Whether that range lies behind the blocks; if so, which handoff has all of it.
    pub(super) fn staged_for(&self, offset: usize, len: usize) -> Option<Option<HandoffId>> {
        let is_behind = self.blocks_end <= offset;
        is_behind.then(|| {
            let staging = self.staging.borrow();
            let (&start, &(taken, handoff, _)) = staging.taken.range(..=offset).next_back()?;
            (offset + len <= start + taken).then_some(handoff)
        })
    }

    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    /// What is there at a position of a sequence; `None` when key and value are not of one computation.
    pub(super) fn read(&self, table: &[BlockId], layer: usize, position: usize) -> Option<u64> {
        let (key, value) = self.numbers(table, layer, position);
        (key == value ^ USED).then_some(key)
    }

    pub(super) fn write(&self, table: &[BlockId], layer: usize, position: usize, content: u64) {
        let at = self.shape.offset(table, layer, position);
        self.store(at, content, content ^ USED);
    }

    pub(super) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        self.bytes.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn copy_out(&self, offset: usize, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.bytes.borrow()[offset..offset + buffer.len()]);
    }

    /// Some layers of one block.
    pub(super) fn piece(&self, block: BlockId, layers: Range<usize>) -> Piece {
        let layer_bytes = self.shape.layer_bytes();
        let offset = block.0 as usize * self.shape.block_bytes() + layers.start * layer_bytes;
        let len = layers.len() * layer_bytes;
        Piece { memory: self.clone(), offset, len, is_in_region: true, staged: None }
    }

    /// Some layers of one block of another shape, made of what is here at those positions, in memory of their own.
    pub(super) fn converted(
        &self,
        to: Shape,
        table: &[BlockId],
        layers: Range<usize>,
        positions: Range<u32>,
    ) -> Piece {
        let len = layers.len() * to.layer_bytes();
        let memory = Self::of(to, vec![0; len], len);
        for (index, layer) in layers.enumerate() {
            for (slot, position) in positions.clone().enumerate() {
                let (key, value) = self.numbers(table, layer, position as usize);
                memory.store(index * to.layer_bytes() + slot * to.slot_bytes(), key, value);
            }
        }
        Piece { memory, offset: 0, len, is_in_region: false, staged: None }
    }

    /// The same in the room behind the blocks, for a peer that reads it there.
    pub(super) fn staged(&self, piece: &Piece, handoff: HandoffId, now: u64) -> Piece {
        let len = piece.len;
        let mut staging = self.staging.borrow_mut();
        let offset = self.blocks_end + staging.extents.take(len).expect("there was room for it");
        staging.taken.insert(offset, (len, handoff, now));
        drop(staging);
        let mut bytes = vec![0; len];
        piece.read(0, &mut bytes);
        self.copy_in(offset, &bytes);
        let (staging, blocks_end) = (Rc::clone(&self.staging), self.blocks_end);
        let staged = Some(Rc::new(Staged { staging, blocks_end, offset }));
        Piece { memory: self.clone(), offset, len, is_in_region: true, staged }
    }

    fn numbers(&self, table: &[BlockId], layer: usize, position: usize) -> (u64, u64) {
        let at = self.shape.offset(table, layer, position);
        (self.number(at), self.number(at + self.shape.tokens() * self.shape.slot_bytes()))
    }

    /// The two numbers of a slot, as `f32` has them.
    fn number(&self, at: usize) -> u64 {
        let bytes = &self.bytes.borrow()[at..at + self.shape.slot_bytes()];
        let half = |at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        match self.shape.dtype {
            KvDtype::Bf16 => half(0) << 16 | half(2) << 48,
            _ => u64::from_le_bytes(bytes.try_into().expect("two numbers of four bytes")),
        }
    }

    fn store(&self, at: usize, key: u64, value: u64) {
        let mut bytes = self.bytes.borrow_mut();
        let slot_bytes = self.shape.slot_bytes();
        for (at, number) in [(at, key), (at + self.shape.tokens() * slot_bytes, value)] {
            let all = number.to_le_bytes();
            let halves = [all[2], all[3], all[6], all[7]];
            let stored: &[u8] = if self.shape.dtype == KvDtype::Bf16 { &halves } else { &all };
            bytes[at..at + slot_bytes].copy_from_slice(stored);
        }
    }
}

impl Shape {
    fn offset(self, table: &[BlockId], layer: usize, position: usize) -> usize {
        let (block, slot) = (table[position / self.tokens()], position % self.tokens());
        block.0 as usize * self.block_bytes() + layer * self.layer_bytes() + slot * self.slot_bytes()
    }
}

impl Piece {
    /// A planted bug: the room that it lies in is given to the next who wants some.
    pub(super) fn forsaken(self) -> Self {
        Self { staged: None, ..self }
    }
}

impl WriteSource for Piece {
    fn memory(&self) -> usize {
        let staged = self.staged.as_ref().map(|staged| Rc::as_ptr(staged).addr());
        staged.unwrap_or_else(|| Rc::as_ptr(&self.memory.bytes).addr())
    }

    fn offset(&self) -> usize {
        self.offset
    }

    fn len(&self) -> usize {
        self.len
    }

    fn range(&self, offset: usize, len: usize) -> Option<Self> {
        let inside = offset + len <= self.memory.bytes.borrow().len();
        inside.then(|| Self { offset, len, ..self.clone() })
    }

    fn in_region(&self) -> Option<u64> {
        self.is_in_region.then_some(self.offset as u64)
    }

    fn read(&self, at: usize, buffer: &mut [u8]) {
        self.memory.copy_out(self.offset + at, buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_as_its_layout_says_and_turns_into_every_other_without_a_bit_lost() {
        let tokens: Vec<TokenId> = (0..37).map(|index| index % 7).collect();
        let contents = contents(&tokens);
        for from in Shape::all() {
            let strides = from.layout().strides();
            let (layer, value) = (strides.layer, strides.value_offset);
            assert_eq!((layer, value), (from.layer_bytes(), from.tokens() * from.slot_bytes()), "{from:?}");
            let table: Vec<BlockId> =
                (0..37u32.div_ceil(from.block_len.tokens())).rev().map(BlockId).collect();
            let memory = Memory::new(from, 10, 0);
            for (position, here) in contents.iter().enumerate() {
                for (layer, content) in here.iter().enumerate() {
                    memory.write(&table, layer, position, *content);
                }
            }
            for to in Shape::all() {
                let copy = Memory::new(to, 10, 0);
                let blocks = 37u32.div_ceil(to.block_len.tokens());
                for block in 0..blocks {
                    let first = block * to.block_len.tokens();
                    let positions = first..(first + to.block_len.tokens()).min(37);
                    let piece = memory.converted(to, &table, 0..LAYERS, positions);
                    let mut bytes = vec![0; piece.len()];
                    piece.read(0, &mut bytes);
                    copy.copy_in(block as usize * to.block_bytes(), &bytes);
                }
                let table: Vec<BlockId> = (0..blocks).map(BlockId).collect();
                for (position, here) in contents.iter().enumerate() {
                    let found: [_; LAYERS] = std::array::from_fn(|layer| copy.read(&table, layer, position));
                    assert_eq!(found, here.map(Some), "{from:?} to {to:?} at {position}");
                }
            }
        }
    }
}
