//! Who uses each block of the KV cache.
//!
//! A block is in exactly one of five states, and one function moves it between them, so that the [`Ledger`] cannot
//! drift. Full blocks that are indexed by content stay behind when their users go: they are *cached*, which is as
//! good as free, since every cached block can be evicted. That last property is why a block is only indexed below
//! blocks of the same user (see [`BlockPool::index`]): a cached block never has a used one below it.

use std::collections::BTreeSet;

use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen, BlockRef, Epoch};

use crate::prefix_tree::{CacheChanges, Insertion, PrefixTree};
use crate::request::TokenId;

/// Where the blocks are. `free + cached + held + reserved + quarantined == total`, always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Blocks of the pool.
    pub total: BlockCount,
    /// Nobody's.
    pub free: BlockCount,
    /// In the prefix cache and used by nobody.
    pub cached: BlockCount,
    /// Used by sequences, or pinned for a peer that reads them.
    pub held: BlockCount,
    /// Waiting for a peer's KV cache.
    pub reserved: BlockCount,
    /// Given to a peer that may still write to them.
    pub quarantined: BlockCount,
}

/// The full tokens of a sequence and the blocks that hold them, as the prefix cache sees them.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    /// The sequence's tokens, as many as there are or more than are computed.
    pub tokens: &'a [TokenId],
    /// Chained hashes of the full blocks of `tokens`.
    pub hashes: &'a [u64],
    /// The sequence's blocks.
    pub blocks: &'a [BlockRef],
    /// How many leading blocks are indexed as the sequence's own.
    pub indexed: usize,
    /// How many leading blocks are full and computed.
    pub full: usize,
}

/// A set of blocks that may grow and shrink while it serves.
#[derive(Clone, Debug)]
pub struct BlockPool {
    block_len: BlockLen,
    caching: bool,
    blocks: Vec<Block>,
    free: BTreeSet<BlockId>,
    /// Withdrawn blocks, whose epochs must be remembered for when they come back.
    absent: BTreeSet<BlockId>,
    ledger: Ledger,
    tree: PrefixTree,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    epoch: Epoch,
    state: State,
    /// The name under which the content can be found.
    hash: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Absent,
    Free,
    Cached,
    Held { holders: u32 },
    Reserved,
    Quarantined,
}

impl BlockPool {
    /// A pool of `count` free blocks of `block_len` tokens; with `caching`, full blocks are kept for later prompts.
    pub fn new(count: BlockCount, block_len: BlockLen, caching: bool) -> Self {
        let mut pool = Self {
            block_len,
            caching,
            blocks: Vec::new(),
            free: BTreeSet::new(),
            absent: BTreeSet::new(),
            ledger: Ledger::default(),
            tree: PrefixTree::default(),
        };
        pool.add(count);
        pool
    }

    /// Tokens per block.
    pub const fn block_len(&self) -> BlockLen {
        self.block_len
    }

    /// Where the blocks are.
    pub const fn ledger(&self) -> Ledger {
        self.ledger
    }

    /// Blocks that can be given out now: the free ones and, by eviction, the cached ones.
    pub const fn available(&self) -> BlockCount {
        BlockCount(self.ledger.free.0 + self.ledger.cached.0)
    }

    /// Adds `count` blocks and names them: numbers withdrawn before come back first, lowest first.
    pub fn add(&mut self, count: BlockCount) -> Vec<BlockId> {
        (0..count.0)
            .map(|_| {
                let block = self.absent.first().copied().unwrap_or_else(|| {
                    let next = u32::try_from(self.blocks.len()).expect("a pool has fewer than 2^32 blocks");
                    self.blocks.push(Block { epoch: Epoch(0), state: State::Absent, hash: None });
                    self.absent.insert(BlockId(next));
                    BlockId(next)
                });
                self.set(block, State::Free);
                block
            })
            .collect()
    }

    /// Takes up to `count` unused blocks out of the pool and names them: free ones first, highest number first, then
    /// the least recently used cached ones.
    pub fn withdraw(&mut self, count: BlockCount) -> Vec<BlockId> {
        (0..count.0)
            .map_while(|_| {
                let block = self.free.last().copied().or_else(|| self.evict())?;
                self.set(block, State::Absent);
                Some(block)
            })
            .collect()
    }

    /// The blocks, at most `at_most`, that hold a leading part of `tokens`. `hashes` names the full blocks.
    pub fn lookup(&self, tokens: &[TokenId], hashes: &[u64], at_most: BlockCount) -> Vec<BlockRef> {
        if !self.caching {
            return Vec::new();
        }
        let mut parent = None;
        let full = tokens.chunks_exact(self.block_len.tokens() as usize);
        full.zip(hashes)
            .take(at_most.0 as usize)
            .map_while(|(tokens, hash)| {
                let block = self.tree.find(parent, *hash, tokens)?;
                parent = Some(*hash);
                Some(self.reference(block))
            })
            .collect()
    }

    /// Whether the block is in the prefix cache and used by nobody.
    pub fn is_cached(&self, block: BlockId) -> bool {
        self.block(block).state == State::Cached
    }

    /// How many users a block has.
    pub fn holders(&self, block: BlockId) -> u32 {
        match self.block(block).state {
            State::Held { holders } => holders,
            _ => 0,
        }
    }

    /// Gives out `count` blocks to one user.
    ///
    /// # Panics
    ///
    /// When fewer are [`available`](Self::available).
    pub fn hold(&mut self, count: BlockCount) -> Vec<BlockRef> {
        (0..count.0).map(|_| self.give_out(State::Held { holders: 1 })).collect()
    }

    /// Gives out `count` blocks for a peer's KV cache.
    ///
    /// # Panics
    ///
    /// When fewer are [`available`](Self::available).
    pub fn reserve(&mut self, count: BlockCount) -> Vec<BlockRef> {
        (0..count.0).map(|_| self.give_out(State::Reserved)).collect()
    }

    /// Adds a user to blocks that [`lookup`](Self::lookup) found.
    pub fn share(&mut self, found: &[BlockRef]) {
        for reference in found {
            match self.current(*reference).state {
                State::Cached => {
                    let hash = self.block(reference.block).hash.expect("a cached block is indexed");
                    self.tree.unpark(hash);
                    self.set(reference.block, State::Held { holders: 1 });
                }
                State::Held { holders } => self.set(reference.block, State::Held { holders: holders + 1 }),
                other => panic!("{reference:?} cannot be shared: it is {other:?}"),
            }
        }
    }

    /// Makes the newly full blocks of a running sequence findable and returns how many leading blocks are indexed
    /// as its own. Stops at the first block whose content is already found elsewhere: what a sequence adds below
    /// another's block would keep that one from being evicted. [`retire`](Self::retire) adds the rest.
    pub fn index(&mut self, chain: Chain<'_>) -> usize {
        self.insert_while(chain, |insertion| insertion == Insertion::Done)
    }

    /// Takes the user away from its blocks. Its full blocks stay findable; where another block holds the same
    /// content, that one stays.
    pub fn retire(&mut self, chain: Chain<'_>) {
        self.insert_while(chain, |insertion| insertion != Insertion::Refused);
        self.release(chain.blocks);
    }

    /// Takes one user away from each block.
    pub fn release(&mut self, blocks: &[BlockRef]) {
        // Last block first: a prefix is evicted from its end.
        for reference in blocks.iter().rev() {
            let Block { state, hash, .. } = self.current(*reference);
            let State::Held { holders } = state else { panic!("{reference:?} is released while {state:?}") };
            match (holders, hash) {
                (1, Some(hash)) => {
                    self.tree.park(hash);
                    self.set(reference.block, State::Cached);
                }
                (1, None) => self.set(reference.block, State::Free),
                _ => self.set(reference.block, State::Held { holders: holders - 1 }),
            }
        }
    }

    /// The peer's KV cache has arrived in these reserved blocks: they are now used by one sequence.
    pub fn adopt(&mut self, targets: &[BlockRef]) {
        self.transfer(targets, State::Reserved, State::Held { holders: 1 });
    }

    /// Gives back reserved blocks that no peer has been told of.
    pub fn unreserve(&mut self, targets: &[BlockRef]) {
        self.transfer(targets, State::Reserved, State::Free);
    }

    /// The handoff failed, but the peer may still write to these reserved blocks.
    pub fn quarantine(&mut self, targets: &[BlockRef]) {
        self.transfer(targets, State::Reserved, State::Quarantined);
    }

    /// No write can land in these quarantined blocks any more.
    pub fn settle(&mut self, targets: &[BlockRef]) {
        self.transfer(targets, State::Quarantined, State::Free);
    }

    /// Changes of the prefix cache since the last call.
    pub fn take_cache_changes(&mut self) -> CacheChanges {
        self.tree.take_changes()
    }

    /// Every chained hash that can be found now.
    pub fn cached_hashes(&self) -> impl Iterator<Item = u64> + '_ {
        self.tree.hashes()
    }

    /// Every block of the pool with its state as (reference, users, reserved or quarantined).
    pub(crate) fn census(&self) -> impl Iterator<Item = (BlockRef, Census)> + '_ {
        self.blocks.iter().zip(0..).filter_map(|(block, number)| {
            let census = match block.state {
                State::Absent => return None,
                State::Free | State::Cached => Census::Unused,
                State::Held { holders } => Census::Held(holders),
                State::Reserved => Census::Reserved,
                State::Quarantined => Census::Quarantined,
            };
            Some((BlockRef { block: BlockId(number), epoch: block.epoch }, census))
        })
    }

    /// Asserts what must always hold.
    ///
    /// # Panics
    ///
    /// When it does not: a bug in this crate.
    pub fn check(&self) {
        let ledger = self.ledger;
        let sum = ledger.free.0 + ledger.cached.0 + ledger.held.0 + ledger.reserved.0 + ledger.quarantined.0;
        assert_eq!(sum, ledger.total.0, "the ledger does not add up: {ledger:?}");
        let mut counted = Ledger::default();
        for (block, number) in self.blocks.iter().zip(0..) {
            let id = BlockId(number);
            if block.state != State::Absent {
                counted.total.0 += 1;
                counted.column(block.state).0 += 1;
            }
            assert_eq!(block.state == State::Free, self.free.contains(&id), "{id:?} is free or not");
            assert_eq!(block.state == State::Absent, self.absent.contains(&id), "{id:?} is absent or not");
            assert_ne!(block.state, State::Held { holders: 0 }, "{id:?} is held by nobody");
            match block.state {
                State::Cached => assert!(block.hash.is_some(), "{id:?} is cached but cannot be found"),
                State::Held { .. } => {}
                other => assert_eq!(block.hash, None, "{id:?} can be found while it is {other:?}"),
            }
        }
        assert_eq!(counted, ledger, "the ledger differs from the blocks");
        self.tree.check();
        let mut indexed = 0;
        for (hash, block, parked) in self.tree.entries() {
            indexed += 1;
            assert_eq!(self.block(block).hash, Some(hash), "{block:?} is indexed under another name");
            assert_eq!(parked, self.is_cached(block), "{block:?} is parked exactly when it is cached");
        }
        let named = self.blocks.iter().filter(|block| block.hash.is_some()).count();
        assert_eq!(indexed, named, "each named block is in the tree");
    }

    fn insert_while(&mut self, chain: Chain<'_>, go_on: impl Fn(Insertion) -> bool) -> usize {
        if !self.caching {
            return chain.indexed;
        }
        let block_len = self.block_len.tokens() as usize;
        for number in chain.indexed..chain.full {
            let parent = number.checked_sub(1).map(|above| chain.hashes[above]);
            let (hash, block) = (chain.hashes[number], chain.blocks[number].block);
            let tokens = &chain.tokens[number * block_len..(number + 1) * block_len];
            let insertion = self.tree.insert(parent, hash, tokens, block);
            if insertion == Insertion::Done {
                assert_eq!(self.holders(block), 1, "a block that is indexed anew has one user");
                self.blocks[block.0 as usize].hash = Some(hash);
            }
            if !go_on(insertion) {
                return number;
            }
        }
        chain.full
    }

    fn give_out(&mut self, state: State) -> BlockRef {
        let block = self.free.first().copied().or_else(|| self.evict()).expect("a block is available");
        self.blocks[block.0 as usize].epoch.0 += 1;
        self.set(block, state);
        self.reference(block)
    }

    /// Makes the least recently used cached block free.
    fn evict(&mut self) -> Option<BlockId> {
        let block = self.tree.evict()?;
        self.blocks[block.0 as usize].hash = None;
        self.set(block, State::Free);
        Some(block)
    }

    fn transfer(&mut self, blocks: &[BlockRef], from: State, to: State) {
        for reference in blocks {
            assert_eq!(self.current(*reference).state, from, "{reference:?} is expected to be {from:?}");
            self.set(reference.block, to);
        }
    }

    fn reference(&self, block: BlockId) -> BlockRef {
        BlockRef { block, epoch: self.block(block).epoch }
    }

    fn block(&self, block: BlockId) -> &Block {
        &self.blocks[block.0 as usize]
    }

    /// The block, provided that the reference is not from before it was last given out.
    fn current(&self, reference: BlockRef) -> Block {
        let block = *self.block(reference.block);
        assert_eq!(block.epoch, reference.epoch, "{reference:?} is a stale reference");
        block
    }

    /// The only place where a block changes its state.
    fn set(&mut self, block: BlockId, to: State) {
        let from = std::mem::replace(&mut self.blocks[block.0 as usize].state, to);
        match from {
            State::Absent => {
                self.absent.remove(&block);
                self.ledger.total.0 += 1;
            }
            other => self.ledger.column(other).0 -= 1,
        }
        match to {
            State::Absent => {
                self.absent.insert(block);
                self.ledger.total.0 -= 1;
            }
            other => self.ledger.column(other).0 += 1,
        }
        if from == State::Free {
            self.free.remove(&block);
        }
        if to == State::Free {
            self.free.insert(block);
        }
    }
}

/// What a block is used for, for cross-checks with its users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Census {
    Unused,
    Held(u32),
    Reserved,
    Quarantined,
}

impl Ledger {
    /// Blocks that are neither free nor merely cached. Zero on a worker that has nothing to do.
    pub const fn used(&self) -> BlockCount {
        BlockCount(self.held.0 + self.reserved.0 + self.quarantined.0)
    }

    fn column(&mut self, state: State) -> &mut BlockCount {
        match state {
            State::Free => &mut self.free,
            State::Cached => &mut self.cached,
            State::Held { .. } => &mut self.held,
            State::Reserved => &mut self.reserved,
            State::Quarantined => &mut self.quarantined,
            State::Absent => unreachable!("an absent block is in no column"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prefix_tree::chain_hashes;

    fn pool(count: u32) -> BlockPool {
        BlockPool::new(BlockCount(count), BlockLen::new(2).unwrap(), true)
    }

    /// `free cached held reserved quarantined`
    fn columns(pool: &BlockPool) -> [u32; 5] {
        pool.check();
        let it = pool.ledger();
        [it.free.0, it.cached.0, it.held.0, it.reserved.0, it.quarantined.0]
    }

    /// Holds blocks for `tokens`, all computed, and makes them findable.
    fn fill(pool: &mut BlockPool, tokens: &[TokenId]) -> (Vec<BlockRef>, usize) {
        let blocks = pool.hold(BlockCount(tokens.len().div_ceil(2) as u32));
        let hashes = chain_hashes(tokens, pool.block_len());
        let indexed = pool.index(Chain {
            tokens,
            hashes: &hashes,
            blocks: &blocks,
            indexed: 0,
            full: tokens.len() / 2,
        });
        (blocks, indexed)
    }

    fn retire(pool: &mut BlockPool, tokens: &[TokenId], blocks: &[BlockRef], indexed: usize) {
        let hashes = chain_hashes(tokens, pool.block_len());
        pool.retire(Chain { tokens, hashes: &hashes, blocks, indexed, full: tokens.len() / 2 });
    }

    fn find(pool: &BlockPool, tokens: &[TokenId]) -> Vec<BlockRef> {
        pool.lookup(tokens, &chain_hashes(tokens, pool.block_len()), BlockCount(u32::MAX))
    }

    #[test]
    fn blocks_move_between_the_columns() {
        let mut pool = pool(8);
        assert_eq!(columns(&pool), [8, 0, 0, 0, 0]);
        let (blocks, indexed) = fill(&mut pool, &[1, 2, 3, 4, 5]);
        assert_eq!((columns(&pool), indexed), ([5, 0, 3, 0, 0], 2));
        let targets = pool.reserve(BlockCount(3));
        assert_eq!(columns(&pool), [2, 0, 3, 3, 0]);
        pool.adopt(&targets[..1]);
        pool.quarantine(&targets[1..2]);
        pool.unreserve(&targets[2..]);
        assert_eq!(columns(&pool), [3, 0, 4, 0, 1]);
        retire(&mut pool, &[1, 2, 3, 4, 5], &blocks, indexed);
        assert_eq!(columns(&pool), [4, 2, 1, 0, 1], "full blocks stay, the partial one is free");
        pool.settle(&targets[1..2]);
        pool.release(&targets[..1]);
        assert_eq!(columns(&pool), [6, 2, 0, 0, 0]);
    }

    #[test]
    fn a_found_block_is_shared_and_outlives_its_first_user() {
        let mut pool = pool(4);
        let (blocks, indexed) = fill(&mut pool, &[1, 2, 3, 4]);
        let found = find(&pool, &[1, 2, 9, 9]);
        assert_eq!(found, blocks[..1]);
        pool.share(&found);
        assert_eq!(pool.holders(found[0].block), 2);
        retire(&mut pool, &[1, 2, 3, 4], &blocks, indexed);
        assert_eq!(columns(&pool), [2, 1, 1, 0, 0]);
        pool.hold(BlockCount(3));
        assert!(find(&pool, &[1, 2]).len() == 1, "a used block is never evicted");
        assert_eq!(pool.available(), BlockCount(0));
    }

    #[test]
    fn a_duplicate_is_indexed_behind_the_first_copy_only_when_its_user_goes() {
        let mut pool = pool(8);
        let (first, first_indexed) = fill(&mut pool, &[1, 2]);
        let (second, second_indexed) = fill(&mut pool, &[1, 2, 3, 4]);
        assert_eq!((first_indexed, second_indexed), (1, 0));
        assert_eq!(find(&pool, &[1, 2, 3, 4]), first);
        retire(&mut pool, &[1, 2], &first, first_indexed);
        assert_eq!(columns(&pool), [5, 1, 2, 0, 0]);
        retire(&mut pool, &[1, 2, 3, 4], &second, second_indexed);
        assert_eq!(find(&pool, &[1, 2, 3, 4]), [first[0], second[1]]);
        assert_eq!(columns(&pool), [6, 2, 0, 0, 0], "the duplicate is free");
    }

    #[test]
    fn epochs_rise_when_a_block_is_given_out_and_survive_withdrawal() {
        let mut pool = pool(1);
        let first = pool.hold(BlockCount(1));
        pool.release(&first);
        assert_eq!(pool.withdraw(BlockCount(1)), [BlockId(0)]);
        assert_eq!(pool.add(BlockCount(1)), [BlockId(0)]);
        let second = pool.reserve(BlockCount(1));
        assert_eq!((first[0].block, second[0].block), (BlockId(0), BlockId(0)));
        assert!(first[0].epoch < second[0].epoch);
    }

    #[test]
    #[should_panic(expected = "stale reference")]
    fn a_stale_reference_is_caught() {
        let mut pool = pool(1);
        let first = pool.hold(BlockCount(1));
        pool.release(&first);
        pool.hold(BlockCount(1));
        pool.release(&first);
    }

    #[test]
    fn the_pool_grows_and_shrinks() {
        let mut pool = pool(4);
        let (blocks, indexed) = fill(&mut pool, &[1, 2]);
        let (used, _) = fill(&mut pool, &[3, 4]);
        retire(&mut pool, &[1, 2], &blocks, indexed);
        assert_eq!(pool.withdraw(BlockCount(1)), [BlockId(3)], "the highest free one first");
        assert_eq!(
            pool.withdraw(BlockCount(9)),
            [BlockId(2), BlockId(0)],
            "then the cached one, never a used one"
        );
        assert_eq!(columns(&pool), [0, 0, 1, 0, 0]);
        assert!(find(&pool, &[1, 2]).is_empty());
        assert_eq!(pool.add(BlockCount(4)), [BlockId(0), BlockId(2), BlockId(3), BlockId(4)]);
        pool.release(&used);
        assert_eq!(columns(&pool), [4, 1, 0, 0, 0]);
    }

    #[test]
    fn without_caching_nothing_stays() {
        let mut pool = BlockPool::new(BlockCount(2), BlockLen::new(2).unwrap(), false);
        let (blocks, indexed) = fill(&mut pool, &[1, 2, 3, 4]);
        assert_eq!(indexed, 0);
        retire(&mut pool, &[1, 2, 3, 4], &blocks, indexed);
        assert_eq!(columns(&pool), [2, 0, 0, 0, 0]);
        assert_eq!(pool.take_cache_changes(), CacheChanges::default());
    }
}
