//! A language model of one line, and its cache.

use std::collections::BTreeMap;

use tidemill_engine_core::request::{FinishReason, StopConditions, TokenId};
use tidemill_kvtransfer_proto::units::{BlockId, TokenCount};

/// Stands for the keys and values at a position: depends on its token and all before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint(u64);

/// What no model ever computed.
pub(crate) const GARBAGE: Fingerprint = Fingerprint(u64::MAX);

impl Fingerprint {
    const NOTHING: Self = Self(0);

    fn then(self, token: TokenId) -> Self {
        let mixed = (self.0 ^ (u64::from(token) + 1)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self(mixed ^ (mixed >> 29))
    }

    /// The token that follows. Token 7 ends the text.
    pub(crate) fn next_token(self) -> TokenId {
        u32::try_from((self.0 >> 20) % 8).unwrap()
    }
}

/// The fingerprint of each position.
pub(crate) fn fingerprints(tokens: &[TokenId]) -> Vec<Fingerprint> {
    tokens
        .iter()
        .scan(Fingerprint::NOTHING, |state, token| {
            *state = state.then(*token);
            Some(*state)
        })
        .collect()
}

pub(crate) fn stop_after(max_tokens: u32) -> StopConditions {
    StopConditions { eos_token_ids: vec![7], ignore_eos: false, ..StopConditions::after(max_tokens) }
}

/// What a request answers when it is alone in the world.
pub(crate) fn answer(prompt: &[TokenId], stop: &StopConditions, longest: TokenCount) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    loop {
        let token = fingerprints(&tokens).last().unwrap().next_token();
        let index = u32::try_from(tokens.len() - prompt.len()).unwrap();
        tokens.push(token);
        let full = (longest.0 as usize <= tokens.len()).then_some(FinishReason::Length);
        if stop.reason(token, index).or(full).is_some() {
            return tokens.split_off(prompt.len());
        }
    }
}

/// What the slots of a worker's blocks contain.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    slots: BTreeMap<(BlockId, usize), Fingerprint>,
}

impl Memory {
    /// The content of a position of a sequence whose blocks are `table`.
    pub(crate) fn read(&self, table: &[BlockId], position: usize, block_len: usize) -> Fingerprint {
        let slot = (table[position / block_len], position % block_len);
        self.slots.get(&slot).copied().unwrap_or(GARBAGE)
    }

    pub(crate) fn write(&mut self, table: &[BlockId], position: usize, block_len: usize, it: Fingerprint) {
        self.slots.insert((table[position / block_len], position % block_len), it);
    }

    /// Computes the positions from `first` on, each from what is read at the one before.
    pub(crate) fn compute(&mut self, table: &[BlockId], tokens: &[TokenId], first: usize, block_len: usize) {
        for (position, token) in tokens.iter().enumerate().skip(first) {
            let before = position.checked_sub(1).map(|before| self.read(table, before, block_len));
            let it = before.unwrap_or(Fingerprint::NOTHING).then(*token);
            self.write(table, position, block_len, it);
        }
    }

    /// Asserts that the blocks hold exactly these tokens.
    pub(crate) fn expect(&self, table: &[BlockId], tokens: &[TokenId], block_len: usize) {
        for (position, expected) in fingerprints(tokens).into_iter().enumerate() {
            let found = self.read(table, position, block_len);
            assert_eq!(found, expected, "position {position} of {tokens:?} in {table:?} has foreign content");
        }
    }
}
