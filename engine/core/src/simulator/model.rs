//! A language model of one line, and the memory that its keys and values are in.

use std::cell::RefCell;
use std::rc::Rc;

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, TokenCount};

use crate::request::{FinishReason, StopConditions, TokenId};

/// Layers of the model.
pub(super) const LAYERS: usize = 2;
/// Tokens of a block.
pub(super) const BLOCK_LEN: BlockLen = match BlockLen::new(4) {
    Some(block_len) => block_len,
    None => panic!("4 is a power of two"),
};
/// Bytes of a layer of a block: for each token 8 bytes of key and 8 of value.
pub(super) const LAYER_BYTES: usize = 64;
/// Bytes of a block.
pub(super) const BLOCK_BYTES: usize = LAYERS * LAYER_BYTES;
const SLOT_BYTES: usize = 8;
const SLOTS: usize = BLOCK_LEN.tokens() as usize;

pub(super) fn layout() -> KvLayout {
    let layout = KvLayout {
        model: "one line".to_owned(),
        layers: LAYERS as u16,
        kv_heads: 1,
        heads: HeadRange { first: 0, count: 1 },
        head_size: 2,
        dtype: KvDtype::F32,
        block_len: BLOCK_LEN,
        order: AxisOrder::TokenHead,
    };
    assert_eq!((layout.strides().layer, layout.block_bytes()), (LAYER_BYTES, BLOCK_BYTES));
    layout
}

/// The content of a layer at a position, from the content before it and the token.
pub(super) fn content(layer: usize, before: Option<u64>, token: TokenId) -> u64 {
    let before = before.unwrap_or(0x51ed_270b_7a5f_1c03 ^ layer as u64);
    let mixed = (before ^ (u64::from(token) + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
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

/// The block arena of a worker's process. Clones are mappings of the same memory, which outlives its owner.
#[derive(Clone, Debug)]
pub(super) struct Memory(Rc<RefCell<Vec<u8>>>);

/// A range of an arena, as a write reads it.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    memory: Memory,
    offset: usize,
    len: usize,
}

impl Memory {
    pub(super) fn new(blocks: u32) -> Self {
        Self(Rc::new(RefCell::new(vec![0xee; blocks as usize * BLOCK_BYTES])))
    }

    /// What is there at a position of a sequence; `None` when key and value are not of one computation.
    pub(super) fn read(&self, table: &[BlockId], layer: usize, position: usize) -> Option<u64> {
        let at = offset(table, layer, position);
        let bytes = self.0.borrow();
        let number =
            |at: usize| u64::from_le_bytes(bytes[at..at + SLOT_BYTES].try_into().expect("eight bytes"));
        let (key, value) = (number(at), number(at + SLOTS * SLOT_BYTES));
        (key == !value).then_some(key)
    }

    pub(super) fn write(&self, table: &[BlockId], layer: usize, position: usize, content: u64) {
        let at = offset(table, layer, position);
        let mut bytes = self.0.borrow_mut();
        bytes[at..at + SLOT_BYTES].copy_from_slice(&content.to_le_bytes());
        let at = at + SLOTS * SLOT_BYTES;
        bytes[at..at + SLOT_BYTES].copy_from_slice(&(!content).to_le_bytes());
    }

    pub(super) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        self.0.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn copy_out(&self, offset: usize, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0.borrow()[offset..offset + buffer.len()]);
    }

    /// One layer of one block.
    pub(super) fn piece(&self, block: BlockId, layer: usize, layers: usize) -> Piece {
        let offset = block.0 as usize * BLOCK_BYTES + layer * LAYER_BYTES;
        Piece { memory: self.clone(), offset, len: layers * LAYER_BYTES }
    }
}

fn offset(table: &[BlockId], layer: usize, position: usize) -> usize {
    let (block, slot) = (table[position / SLOTS], position % SLOTS);
    block.0 as usize * BLOCK_BYTES + layer * LAYER_BYTES + slot * SLOT_BYTES
}

impl WriteSource for Piece {
    fn memory(&self) -> usize {
        0 // Each worker reads from its own arena alone.
    }

    fn offset(&self) -> usize {
        self.offset
    }

    fn len(&self) -> usize {
        self.len
    }

    fn range(&self, offset: usize, len: usize) -> Option<Self> {
        let inside = offset + len <= self.memory.0.borrow().len();
        inside.then(|| Self { memory: self.memory.clone(), offset, len })
    }

    fn read(&self, at: usize, buffer: &mut [u8]) {
        self.memory.copy_out(self.offset + at, buffer);
    }
}
