//! How far the draft model has computed: its keys and values lie under the same block numbers as the model's own.
//!
//! A block's content is told by its number and its epoch, so nobody has to say when a block changes hands: one that was
//! given out anew has another epoch, and nothing in it counts. One that is found in the prefix cache keeps what it has.

use tidemill_kvtransfer_proto::units::{BlockLen, BlockRef, Epoch, TokenCount};

/// For each block, how many of its leading tokens have the draft model's keys and values.
#[derive(Clone, Debug, Default)]
pub(super) struct DraftCache {
    /// By block number.
    blocks: Vec<Filled>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Filled {
    epoch: Epoch,
    tokens: u32,
}

impl DraftCache {
    /// Leading tokens of a sequence with these blocks that the draft model need not compute.
    pub(super) fn computed(&self, table: &[BlockRef], block_len: BlockLen) -> TokenCount {
        let mut computed = 0;
        for reference in table {
            let filled = self.filled(*reference);
            computed += filled;
            if filled < block_len.tokens() {
                break;
            }
        }
        TokenCount(computed)
    }

    /// The first `computed` tokens of a sequence with these blocks are there now.
    pub(super) fn fill(&mut self, table: &[BlockRef], computed: TokenCount, block_len: BlockLen) {
        let mut left = computed.0;
        for reference in table {
            if left == 0 {
                return;
            }
            let tokens = left.min(block_len.tokens());
            left -= tokens;
            let tokens = tokens.max(self.filled(*reference));
            let place = reference.block.0 as usize;
            if self.blocks.len() <= place {
                self.blocks.resize(place + 1, Filled::default());
            }
            self.blocks[place] = Filled { epoch: reference.epoch, tokens };
        }
    }

    fn filled(&self, reference: BlockRef) -> u32 {
        let block = self.blocks.get(reference.block.0 as usize);
        block.filter(|it| it.epoch == reference.epoch).map_or(0, |it| it.tokens)
    }
}

#[cfg(test)]
mod tests {
    use tidemill_kvtransfer_proto::units::BlockId;

    use super::*;

    /// `block:epoch` for each.
    fn table(text: &str) -> Vec<BlockRef> {
        let reference = |word: &str| {
            let (block, epoch) = word.split_once(':').unwrap();
            BlockRef { block: BlockId(block.parse().unwrap()), epoch: Epoch(epoch.parse().unwrap()) }
        };
        text.split_whitespace().map(reference).collect()
    }

    #[test]
    fn what_is_computed() {
        type Row<'a> = (&'a str, &'a [(&'a str, u32)], &'a str, u32);
        #[rustfmt::skip]
        let rows: [Row<'_>; 9] = [
            // name                                              filled before               asked          computed
            ("nothing at first",                                 &[],                        "0:1 1:1",     0),
            ("what was filled",                                  &[("0:1 1:1", 6)],          "0:1 1:1",     6),
            ("more as it goes on",                               &[("3:1", 2), ("3:1", 3)],  "3:1",         3),
            ("never less",                                       &[("3:1", 3), ("3:1", 2)],  "3:1",         3),
            ("another sequence behind the same prefix",          &[("0:1 1:1", 8)],          "0:1 7:1",     4),
            ("a block given out anew has nothing",               &[("0:1 1:1", 8)],          "0:1 1:2",     4),
            ("nor does what lies behind it count",               &[("0:1 1:1", 8)],          "0:2 1:1",     0),
            ("a gap ends it",                                    &[("0:1", 3), ("1:1", 4)],  "0:1 1:1",     3),
            ("a sequence that has no blocks",                    &[("0:1", 4)],              "",            0),
        ];
        let block_len = BlockLen::new(4).unwrap();
        for (row, filled, asked, expected) in rows {
            let mut cache = DraftCache::default();
            for (blocks, tokens) in filled {
                cache.fill(&table(blocks), TokenCount(*tokens), block_len);
            }
            assert_eq!(cache.computed(&table(asked), block_len), TokenCount(expected), "{row}");
        }
    }
}
