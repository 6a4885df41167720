//! Which full blocks can be found again, by the tokens they hold and everything before them.
//!
//! A block's name is a hash chained through its ancestors, so that a prompt is looked up block by block and a
//! router can keep the same names without the tokens. A hash alone proves nothing: each node also keeps its
//! tokens and its parent, both are compared on the way down, and a node outlives its children. A hit is therefore
//! exact by induction, and two contents with one hash merely mean that the second is not cached.

use std::collections::{BTreeMap, BTreeSet};

use tidemill_kvtransfer_proto::units::{BlockId, BlockLen};
use xxhash_rust::xxh3::xxh3_64;

use crate::request::TokenId;

/// The chained hashes of the full blocks of `tokens`, first block first. Two workers with the same block length
/// name the same content alike.
pub fn chain_hashes(tokens: &[TokenId], block_len: BlockLen) -> Vec<u64> {
    let mut hashes = Vec::new();
    extend_chain(&mut hashes, tokens, block_len);
    hashes
}

/// Appends the hashes of those full blocks of `tokens` that `hashes` does not have yet.
pub(crate) fn extend_chain(hashes: &mut Vec<u64>, tokens: &[TokenId], block_len: BlockLen) {
    let block_len = block_len.tokens() as usize;
    let mut bytes = Vec::with_capacity(8 + 4 * block_len);
    for block in tokens.chunks_exact(block_len).skip(hashes.len()) {
        bytes.clear();
        bytes.extend_from_slice(&hashes.last().copied().unwrap_or(ROOT).to_le_bytes());
        for token in block {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        hashes.push(xxh3_64(&bytes));
    }
}

/// Changes of a prefix cache since they were last taken, as chained block hashes. What was added and removed in
/// between is in neither list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheChanges {
    /// Blocks that can now be found.
    pub added: Vec<u64>,
    /// Blocks that can no longer be found.
    pub removed: Vec<u64>,
}

/// An index of full blocks by content. It knows blocks only by name; who uses them is the pool's business, which
/// says through [`park`](Self::park) and [`unpark`](Self::unpark) when a block has no user.
#[derive(Clone, Debug, Default)]
pub struct PrefixTree {
    nodes: BTreeMap<u64, Node>,
    /// Parked nodes without children, least recently parked first.
    leaves: BTreeSet<(u64, u64)>,
    /// Counts parkings: the only notion of time here.
    clock: u64,
    added: BTreeSet<u64>,
    removed: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
struct Node {
    parent: Option<u64>,
    tokens: Box<[TokenId]>,
    block: BlockId,
    children: u32,
    /// When the block lost its last user; `None` while it has one.
    parked: Option<u64>,
}

/// What [`PrefixTree::insert`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insertion {
    /// The block can now be found.
    Done,
    /// This content is there already, in another block.
    Present,
    /// Other content has the same hash, or the parent is not there: the block stays out.
    Refused,
}

impl PrefixTree {
    /// The block that holds `tokens` below `parent`, whose chained hash is `hash`.
    pub fn find(&self, parent: Option<u64>, hash: u64, tokens: &[TokenId]) -> Option<BlockId> {
        let node = self.nodes.get(&hash)?;
        (node.parent == parent && *node.tokens == *tokens).then_some(node.block)
    }

    /// Makes `block` findable as `tokens` below `parent`. The block counts as used until it is parked.
    pub fn insert(
        &mut self,
        parent: Option<u64>,
        hash: u64,
        tokens: &[TokenId],
        block: BlockId,
    ) -> Insertion {
        if self.nodes.contains_key(&hash) {
            let present = self.find(parent, hash, tokens).is_some();
            return if present { Insertion::Present } else { Insertion::Refused };
        }
        if let Some(parent) = parent {
            let Some(above) = self.nodes.get_mut(&parent) else { return Insertion::Refused };
            above.children += 1;
            if let Some(parked) = above.parked {
                self.leaves.remove(&(parked, parent));
            }
        }
        self.nodes.insert(hash, Node { parent, tokens: tokens.into(), block, children: 0, parked: None });
        if !self.removed.remove(&hash) {
            self.added.insert(hash);
        }
        Insertion::Done
    }

    /// The node's block has no user any more: it may be evicted once it has no children.
    pub fn park(&mut self, hash: u64) {
        self.clock += 1;
        let node = self.nodes.get_mut(&hash).expect("only indexed blocks are parked");
        assert!(node.parked.is_none(), "a block is parked once");
        node.parked = Some(self.clock);
        if node.children == 0 {
            self.leaves.insert((self.clock, hash));
        }
    }

    /// The node's block has a user again.
    pub fn unpark(&mut self, hash: u64) {
        let node = self.nodes.get_mut(&hash).expect("only indexed blocks are unparked");
        let parked = node.parked.take().expect("only parked blocks are unparked");
        self.leaves.remove(&(parked, hash));
    }

    /// Forgets the least recently used block among those that have neither user nor child, and names it.
    pub fn evict(&mut self) -> Option<BlockId> {
        let (_, hash) = self.leaves.pop_first()?;
        let node = self.nodes.remove(&hash).expect("leaves are nodes");
        if let Some(parent) = node.parent {
            let above = self.nodes.get_mut(&parent).expect("a node outlives its children");
            above.children -= 1;
            if let (0, Some(parked)) = (above.children, above.parked) {
                self.leaves.insert((parked, parent));
            }
        }
        if !self.added.remove(&hash) {
            self.removed.insert(hash);
        }
        Some(node.block)
    }

    /// What became findable and what ceased to be since the last call.
    pub fn take_changes(&mut self) -> CacheChanges {
        CacheChanges {
            added: std::mem::take(&mut self.added).into_iter().collect(),
            removed: std::mem::take(&mut self.removed).into_iter().collect(),
        }
    }

    /// Every hash that can be found, for a listener that starts anew.
    pub fn hashes(&self) -> impl Iterator<Item = u64> + '_ {
        self.nodes.keys().copied()
    }

    /// Every node as (hash, block, whether it is parked).
    pub(crate) fn entries(&self) -> impl Iterator<Item = (u64, BlockId, bool)> + '_ {
        self.nodes.iter().map(|(hash, node)| (*hash, node.block, node.parked.is_some()))
    }

    /// Asserts what must always hold.
    ///
    /// # Panics
    ///
    /// When it does not: a bug in this crate.
    pub fn check(&self) {
        let mut children: BTreeMap<u64, u32> = BTreeMap::new();
        let mut blocks = BTreeSet::new();
        for (hash, node) in &self.nodes {
            assert!(blocks.insert(node.block), "{:?} is indexed twice", node.block);
            let Some(parent) = node.parent else { continue };
            *children.entry(parent).or_default() += 1;
            let above = self.nodes.get(&parent).expect("a node's parent is in the tree");
            assert!(
                above.parked.is_none() || node.parked.is_some(),
                "the block of {parent:016x} is unused while its child {hash:016x} is used: it could not be evicted"
            );
        }
        let mut leaves = BTreeSet::new();
        for (hash, node) in &self.nodes {
            let counted = children.get(hash).copied().unwrap_or(0);
            assert_eq!(node.children, counted, "{hash:016x} counts its children wrongly");
            if let (0, Some(parked)) = (node.children, node.parked) {
                leaves.insert((parked, *hash));
            }
        }
        assert_eq!(
            self.leaves, leaves,
            "the unused nodes without children are exactly those that may be evicted"
        );
    }
}

/// Stands for "no block before" in the chain.
const ROOT: u64 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    fn block_len(tokens: u32) -> BlockLen {
        BlockLen::new(tokens).unwrap()
    }

    /// One row per rule of naming: whether the last full blocks of two token lists share a name.
    #[test]
    fn names() {
        #[rustfmt::skip]
        let rows: &[(&str, &[u32], &[u32], bool)] = &[
            ("same content has one name",              &[1, 2, 3, 4], &[1, 2, 3, 4],    true),
            ("a partial block has no name",            &[1, 2, 3, 4], &[1, 2, 3, 4, 5], true),
            ("order matters",                          &[1, 2, 3, 4], &[1, 2, 4, 3],    false),
            ("the same block after another differs",   &[1, 2, 3, 4], &[9, 9, 3, 4],    false),
            ("the same block at another depth differs", &[1, 2, 1, 2], &[1, 2],         false),
        ];
        for (name, left, right, same) in rows {
            let left = chain_hashes(left, block_len(2));
            let right = chain_hashes(right, block_len(2));
            assert_eq!(left.last() == right.last(), *same, "{name}");
        }
        assert!(chain_hashes(&[1], block_len(2)).is_empty(), "less than a block has no name");
    }

    #[test]
    fn a_chain_can_be_extended() {
        let tokens: Vec<u32> = (0..40).collect();
        let mut hashes = chain_hashes(&tokens[..17], block_len(8));
        extend_chain(&mut hashes, &tokens, block_len(8));
        assert_eq!(hashes, chain_hashes(&tokens, block_len(8)));
    }

    #[test]
    fn equal_hashes_never_return_foreign_content() {
        let mut tree = PrefixTree::default();
        assert_eq!(tree.insert(None, 7, &[1, 2], BlockId(0)), Insertion::Done);
        assert_eq!(tree.insert(None, 7, &[3, 4], BlockId(1)), Insertion::Refused, "other tokens");
        assert_eq!(tree.insert(Some(7), 7, &[1, 2], BlockId(1)), Insertion::Refused, "another parent");
        assert_eq!(tree.insert(None, 7, &[1, 2], BlockId(1)), Insertion::Present);
        assert_eq!(tree.insert(Some(8), 9, &[1, 2], BlockId(1)), Insertion::Refused, "no such parent");
        assert_eq!(tree.find(None, 7, &[3, 4]), None);
        assert_eq!(tree.find(Some(7), 7, &[1, 2]), None);
        assert_eq!(tree.find(None, 7, &[1, 2]), Some(BlockId(0)));
        tree.check();
    }

    #[test]
    fn evicts_leaves_first_and_the_least_recent_of_them() {
        // 1 ── 2 ── 3
        //   └─ 4        parked in the order 1, 4, 3, 2.
        let mut tree = PrefixTree::default();
        for (hash, parent) in [(1, None), (2, Some(1)), (3, Some(2)), (4, Some(1))] {
            assert_eq!(tree.insert(parent, hash, &[0], BlockId(hash as u32)), Insertion::Done);
        }
        assert_eq!(tree.evict(), None, "used blocks stay");
        tree.park(3);
        tree.park(2);
        tree.unpark(2);
        tree.unpark(3);
        tree.park(4);
        tree.park(3);
        tree.park(2);
        tree.park(1);
        tree.check();
        let order: Vec<u32> = std::iter::from_fn(|| tree.evict()).map(|block| block.0).collect();
        assert_eq!(order, [4, 3, 2, 1]);
        tree.check();
    }

    #[test]
    fn changes_are_net() {
        let mut tree = PrefixTree::default();
        tree.insert(None, 1, &[1], BlockId(1));
        tree.insert(None, 2, &[2], BlockId(2));
        tree.park(1);
        assert_eq!(tree.evict(), Some(BlockId(1)));
        assert_eq!(tree.take_changes(), CacheChanges { added: vec![2], removed: vec![] });
        tree.park(2);
        tree.evict();
        assert_eq!(tree.take_changes(), CacheChanges { added: vec![], removed: vec![2] });
        assert_eq!(tree.take_changes(), CacheChanges::default());
    }
}
