//! Which blocks of the peer are due to be written, layer by layer.
//!
//! A block of the peer is due for a layer once all its tokens are computed in that layer; the last one, partly filled,
//! once the whole prompt is. Blocks are counted from the first one that the peer is missing. Pure bookkeeping: the
//! layers of one step finish in order, but a step may be long past when the peer's reservation arrives.

use std::ops::Range;

use tidemill_kvtransfer_proto::units::{BlockLen, TokenCount};

/// What has been written to a peer's reservation, and what is due.
#[derive(Debug)]
pub struct Pushes {
    /// Tokens per block at the peer.
    block_len: BlockLen,
    /// Index, in the sequence, of the peer's first missing block.
    first_block: u32,
    /// Blocks that the peer is missing.
    targets: u32,
    /// Tokens of the prompt.
    tokens: TokenCount,
    /// Per layer, how many of the missing blocks have been written.
    written: Vec<u32>,
}

/// A rectangle of layers and missing blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// Layers, by number.
    pub layers: Range<usize>,
    /// Missing blocks, counted from the first.
    pub targets: Range<u32>,
}

impl Pushes {
    /// Nothing is written yet of a prompt of `tokens`.
    pub fn new(
        block_len: BlockLen,
        first_block: u32,
        targets: u32,
        tokens: TokenCount,
        layers: usize,
    ) -> Self {
        Self { block_len, first_block, targets, tokens, written: vec![0; layers] }
    }

    /// Takes what is due of `layers`, now that `computed` tokens are in the cache in these layers. Neighbouring layers
    /// that are at the same block come as one rectangle.
    pub fn take_due(&mut self, layers: Range<usize>, computed: TokenCount) -> Vec<Due> {
        let ready = if computed < self.tokens {
            computed.blocks_filled(self.block_len).0
        } else {
            self.tokens.blocks_to_hold(self.block_len).0
        };
        let ready = ready.saturating_sub(self.first_block).min(self.targets);
        let mut due: Vec<Due> = Vec::new();
        for layer in layers {
            let targets = self.written[layer]..ready;
            if targets.is_empty() {
                continue;
            }
            self.written[layer] = ready;
            match due.last_mut() {
                Some(last) if last.layers.end == layer && last.targets == targets => last.layers.end += 1,
                _ => due.push(Due { layers: layer..layer + 1, targets }),
            }
        }
        due
    }

    /// Whether every missing block has been taken in every layer.
    pub fn is_complete(&self) -> bool {
        self.written.iter().all(|&written| written == self.targets)
    }

    /// The tokens of the prompt that missing block `target` holds.
    pub fn tokens_of(&self, target: u32) -> Range<u32> {
        let first = (self.first_block + target) * self.block_len.tokens();
        first..(first + self.block_len.tokens()).min(self.tokens.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prompt of 70 tokens, two layers, blocks of 16 at the peer, of which it has the first: it misses four, the last
    /// of which holds six tokens.
    #[test]
    fn blocks_become_due() {
        type Calls = &'static [(Range<usize>, u32)];
        #[rustfmt::skip]
        let rows: [(&str, Calls, &str); 8] = [
            // name                                        calls: layers, computed             due after the last call
            ("nothing computed, nothing due",              &[(0..2, 0)],                        ""),
            ("what the peer has is not due",               &[(0..2, 20)],                       ""),
            ("a filled block is due",                      &[(0..2, 32)],                       "0..2:0..1"),
            ("a partly filled one is not",                 &[(0..2, 47)],                       "0..2:0..1"),
            ("the last one is due with the prompt's end",  &[(0..2, 70)],                       "0..2:0..4"),
            ("a layer is due alone",                       &[(0..1, 40)],                       "0..1:0..1"),
            ("and the next layer after it",                &[(0..1, 70), (1..2, 70)],           "1..2:0..4"),
            ("layers that differ come apart",              &[(0..1, 40), (0..2, 70)],           "0..1:1..4 1..2:0..4"),
        ];
        for (row, calls, expected) in rows {
            let block_len = BlockLen::new(16).expect("a power of two");
            let mut pushes = Pushes::new(block_len, 1, 4, TokenCount(70), 2);
            let mut due = Vec::new();
            for (layers, computed) in calls {
                due = pushes.take_due(layers.clone(), TokenCount(*computed));
            }
            let text: Vec<String> = due
                .iter()
                .map(|Due { layers, targets }| {
                    format!("{}..{}:{}..{}", layers.start, layers.end, targets.start, targets.end)
                })
                .collect();
            assert_eq!(text.join(" "), expected, "{row}");
            let end = calls.iter().all(|(_, computed)| *computed < 70);
            assert!(end || pushes.take_due(0..2, TokenCount(70)).is_empty() == pushes.is_complete(), "{row}");
        }
    }

    #[test]
    fn a_block_knows_its_tokens() {
        let block_len = BlockLen::new(16).expect("a power of two");
        let pushes = Pushes::new(block_len, 1, 4, TokenCount(70), 2);
        assert_eq!((pushes.tokens_of(0), pushes.tokens_of(3)), (16..32, 64..70));
    }
}
