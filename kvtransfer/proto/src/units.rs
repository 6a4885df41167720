//! Quantities of the KV cache and of the wire, one type per unit.
//!
//! An index, a count and a size are different things even when all three fit a `u32`. Giving each its own
//! type turns the classic paging bugs (off by one block, bytes for elements) into compile errors, and leaves
//! exactly one place where rounding is decided.

use std::fmt;
use std::time::Duration;

/// Names one block of a paged KV cache; valid only inside the pool that issued it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A number of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockCount(pub u32);

/// A number of tokens; also a position, which is the number of tokens before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenCount(pub u32);

/// How many tokens one block holds. Never zero and always a power of two, so that token positions split into
/// (block, slot) by shift and mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockLen(u32);

/// The generation of a block: rises each time the block is given out, so that a reference made before can be
/// told from one made after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// A block together with the generation in which it was given out: the only way a block is named to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockRef {
    /// Which block of the owner's pool.
    pub block: BlockId,
    /// The generation the reference is good for.
    pub epoch: Epoch,
}

/// Names one handoff, unique among all handoffs of a cluster while any of its messages can still arrive. Chosen
/// by the router, which tells both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandoffId(pub u64);

/// A moment, as time since an origin that the driver chose. Pure code gets it as an argument.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub Duration);

impl BlockLen {
    /// The only way to make a `BlockLen`: everything downstream may rely on the invariant.
    pub const fn new(tokens: u32) -> Option<Self> {
        if tokens.is_power_of_two() { Some(Self(tokens)) } else { None }
    }

    /// Tokens per block.
    pub const fn tokens(self) -> u32 {
        self.0
    }
}

impl TokenCount {
    /// Blocks needed to *hold* these tokens: the last block may be partly empty.
    pub const fn blocks_to_hold(self, block_len: BlockLen) -> BlockCount {
        BlockCount(self.0.div_ceil(block_len.0))
    }

    /// Blocks these tokens *fill*: only full blocks can be shared or sent ahead.
    pub const fn blocks_filled(self, block_len: BlockLen) -> BlockCount {
        BlockCount(self.0 / block_len.0)
    }
}

impl BlockCount {
    /// Tokens that this many full blocks hold.
    pub const fn tokens(self, block_len: BlockLen) -> TokenCount {
        TokenCount(self.0 * block_len.0)
    }
}

impl Moment {
    /// The moment `after` later than this one; saturates at the end of time.
    pub fn plus(self, after: Duration) -> Self {
        Self(self.0.saturating_add(after))
    }

    /// How long after `earlier` this is; zero when it is not later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for HandoffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Add;

    use super::*;

    /// Compiles only as long as a `$right` can neither become, nor be added to, nor be compared with a `$left`: with one
    /// more way to mix them it would not be clear which `mixes` is meant.
    macro_rules! are_apart {
        ($($left:ty, $right:ty;)*) => { $({
            trait Mixes<By> {
                fn mixes() {}
            }
            struct ByConversion;
            struct ByAddition;
            struct ByComparison;
            impl<T> Mixes<()> for T {}
            impl<T: From<$right>> Mixes<ByConversion> for T {}
            impl<T: Add<$right>> Mixes<ByAddition> for T {}
            impl<T: PartialEq<$right>> Mixes<ByComparison> for T {}
            <$left as Mixes<_>>::mixes();
        })* };
    }

    #[test]
    fn units_cannot_be_mixed_up() {
        are_apart! {
            TokenCount, BlockCount; BlockCount, TokenCount; TokenCount, BlockLen; BlockCount, BlockLen;
            BlockId, BlockCount; BlockCount, BlockId; Epoch, HandoffId; HandoffId, Epoch;
            TokenCount, u32; BlockCount, u32; BlockId, u32; BlockLen, u32; Epoch, u64; Moment, Duration;
        }
    }

    #[test]
    fn each_rounding_has_a_name() {
        let block_len = BlockLen::new(16).unwrap();
        #[rustfmt::skip]
        let rows = [
            // tokens   blocks to hold them   blocks that they fill
            (0,         0,                    0),
            (1,         1,                    0),
            (16,        1,                    1),
            (17,        2,                    1),
            (32,        2,                    2),
        ];
        for (tokens, hold, filled) in rows {
            let tokens = TokenCount(tokens);
            let found = (tokens.blocks_to_hold(block_len), tokens.blocks_filled(block_len));
            assert_eq!(found, (BlockCount(hold), BlockCount(filled)), "{tokens:?}");
        }
        assert_eq!(BlockLen::new(24), None, "a position splits by shift and mask");
    }
}
