//! The boundary between "which bytes go where" and "how bytes move".
//!
//! Everything above [`Transport`] is a plain state machine and runs under a virtual clock. Everything below is a
//! driver: shared memory, TCP, verbs, or the [simulated wire](crate::simulated_wire). A new transport is one
//! file that passes [`conformance`]; nothing above it changes.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::units::{BlockId, BlockRef, HandoffId};

/// Names one posted write; the caller chooses it and gets it back in the [`Completion`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WriteId(pub u64);

/// A range of the peer's block arena, in the generation in which the peer announced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// The handoff that the bytes belong to.
    pub handoff: HandoffId,
    /// Offset of the first byte in the peer's arena.
    pub offset: u64,
    /// Length in bytes. Never zero.
    pub len: u32,
    /// [`stamp`] of the blocks that the range touches.
    pub stamp: u64,
}

/// Sums up a run of blocks and their epochs in one number, so that a write over many blocks names the epoch of
/// each without a list of them.
pub fn stamp(blocks: &[BlockRef]) -> u64 {
    let bytes = |it: &BlockRef| {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&it.block.0.to_le_bytes());
        bytes[4..].copy_from_slice(&it.epoch.0.to_le_bytes());
        bytes
    };
    match blocks {
        // One block, or a part of it, is the common case, and a hasher that waits for more bytes is large.
        [block] => xxh3_64(&bytes(block)),
        _ => {
            let mut hasher = Xxh3::new();
            blocks.iter().for_each(|block| hasher.update(&bytes(block)));
            hasher.digest()
        }
    }
}

impl RemoteRange {
    /// The blocks that the range touches, in order; `None` when it is empty or reaches beyond what a block
    /// number can name.
    pub fn blocks(&self, block_bytes: usize) -> Option<impl Iterator<Item = BlockId> + use<>> {
        let block_bytes = block_bytes as u64;
        let last_byte = self.offset.checked_add(u64::from(self.len).checked_sub(1)?)?;
        let first = u32::try_from(self.offset / block_bytes).ok()?;
        let last = u32::try_from(last_byte / block_bytes).ok()?;
        Some((first..=last).map(BlockId))
    }
}

/// Why a write did not land.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteFault {
    /// The receiver waits for no byte of that handoff: it never did, or has what it needs, or gave up.
    #[error("no byte of that handoff is expected")]
    NotExpected,
    /// The range is not made of targets of that handoff.
    #[error("the range is not made of targets of that handoff")]
    Outside,
    /// The range was announced in another generation of its blocks.
    #[error("the range was announced in another generation of its blocks")]
    Stale,
    /// The way to the peer is gone; whether the bytes landed is unknown.
    #[error("the way to the peer is gone")]
    Severed,
}

/// The end of one write, good or bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The write that ended.
    pub id: WriteId,
    /// `Ok` once the bytes are visible to the peer.
    pub outcome: Result<(), WriteFault>,
}

/// What became of a write that was handed to a transport.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Post {
    /// A [`Completion`] will follow.
    Accepted,
    /// Nothing was queued; poll, then post again.
    QueueFull,
}

/// Moves bytes into a peer's memory.
///
/// # Contract
///
/// 1. `post_write` never blocks. A full queue is [`Post::QueueFull`], which is flow control and not an error;
///    an idle transport always accepts a write.
/// 2. Every accepted write completes exactly once, through [`poll`](Self::poll), in any order; also when the
///    peer is gone.
/// 3. `Ok` means that the peer can see all bytes. A write that the receiver turned down changed none.
/// 4. The transport keeps `source` until that completion and no longer. Callers therefore cannot free memory
///    that a device is still reading, and no method here needs `unsafe`.
/// 5. `poll` appends to `done`, does a bounded amount of work and returns; the driver decides when to sleep.
pub trait Transport {
    /// Bytes to be sent; cloning shares them.
    type Source: Clone;

    /// Queues one write of the whole of `source`, whose length is `target.len`.
    fn post_write(&mut self, id: WriteId, source: Self::Source, target: RemoteRange) -> Post;

    /// Moves on, and collects completions that are ready.
    fn poll(&mut self, done: &mut Vec<Completion>);
}

/// What [`conformance`] needs to know of a transport under test: a connected pair whose receiving end expects
/// one handoff with every block of a target arena.
pub trait ConformanceRig {
    /// The transport.
    type Transport: Transport;

    /// The sending end.
    fn transport(&mut self) -> &mut Self::Transport;
    /// Makes a source of these bytes.
    fn source(&mut self, bytes: &[u8]) -> <Self::Transport as Transport>::Source;
    /// How many sources made by [`source`](Self::source) are still held by anybody but the rig.
    fn sources_held(&self) -> usize;
    /// Bytes of the target arena.
    fn arena_len(&self) -> usize;
    /// Names a range of the target arena, in the right generation.
    fn range(&self, offset: usize, len: usize) -> RemoteRange;
    /// What the target arena holds.
    fn read(&self, offset: usize, len: usize) -> Vec<u8>;
    /// Whether the receiver looks at each write before it lands.
    fn admits(&self) -> bool;
    /// Lets the other end work, and bounds the wait: false when the patience is over. It is an argument because
    /// this crate reads no clock.
    fn keep_waiting(&mut self) -> bool;
    /// Takes the receiving end away.
    fn sever(&mut self);
}

/// The contract of [`Transport`] as code: each transport's tests call this.
pub fn conformance(mut rig: impl ConformanceRig) {
    everything_arrives(&mut rig);
    a_full_queue_is_no_error(&mut rig);
    if rig.admits() {
        stale_writes_change_nothing(&mut rig);
    }
    severed_writes_complete(&mut rig);
}

fn everything_arrives<R: ConformanceRig>(rig: &mut R) {
    let mut expected = rig.read(0, rig.arena_len());
    let mut outcomes = Vec::new();
    let mut next = 0;
    let (mut offset, mut round) = (0, 0usize);
    while offset < rig.arena_len() {
        // Lengths from one byte to far more than a socket buffer holds.
        let len = [1, 7, 64, 4096, 70_000, 900_001][round % 6].min(rig.arena_len() - offset);
        round += 1;
        let bytes: Vec<u8> = (0..len).map(|index| (index.wrapping_mul(31) ^ round) as u8).collect();
        expected[offset..offset + len].copy_from_slice(&bytes);
        let (source, range) = (rig.source(&bytes), rig.range(offset, len));
        post_and_wait_for_room(rig, WriteId(next), &source, range, &mut outcomes);
        drop(source);
        next += 1;
        offset += len;
    }
    wait_for(rig, next, &mut outcomes);
    assert_all_complete_once(&outcomes, next);
    assert!(outcomes.iter().all(|completion| completion.outcome.is_ok()), "each write lands: {outcomes:?}");
    assert!(rig.read(0, rig.arena_len()) == expected, "a completed write is visible, and nothing else is");
    assert_eq!(rig.sources_held(), 0, "a completed write holds no source");
}

fn a_full_queue_is_no_error<R: ConformanceRig>(rig: &mut R) {
    let len = 4096.min(rig.arena_len());
    let (source, range) = (rig.source(&vec![5; len]), rig.range(0, len));
    let mut accepted = 0;
    while accepted < 100_000 {
        match rig.transport().post_write(WriteId(accepted), source.clone(), range) {
            Post::Accepted => accepted += 1,
            Post::QueueFull => break,
        }
    }
    assert!(0 < accepted, "an idle transport accepts a write");
    drop(source);
    let mut outcomes = Vec::new();
    wait_for(rig, accepted, &mut outcomes);
    assert_all_complete_once(&outcomes, accepted);
    assert_eq!(rig.sources_held(), 0, "a completed write holds no source");
}

fn stale_writes_change_nothing<R: ConformanceRig>(rig: &mut R) {
    let before = rig.read(0, rig.arena_len());
    let good = rig.range(0, 100);
    #[rustfmt::skip]
    let stale = [
        (RemoteRange { stamp: good.stamp ^ 1, ..good },                         WriteFault::Stale),
        (RemoteRange { offset: rig.arena_len() as u64, ..good },                WriteFault::Outside),
        (RemoteRange { offset: u64::MAX - 10, ..good },                         WriteFault::Outside),
        (RemoteRange { handoff: HandoffId(good.handoff.0 ^ 1), ..good },        WriteFault::NotExpected),
    ];
    for (range, expected) in stale {
        let source = rig.source(&[0xee; 100]);
        let mut outcomes = Vec::new();
        post_and_wait_for_room(rig, WriteId(1), &source, range, &mut outcomes);
        wait_for(rig, 1, &mut outcomes);
        assert_eq!(outcomes, [Completion { id: WriteId(1), outcome: Err(expected) }]);
    }
    assert!(rig.read(0, rig.arena_len()) == before, "a write that was turned down changes nothing");
}

fn severed_writes_complete<R: ConformanceRig>(rig: &mut R) {
    let len = rig.arena_len();
    let (source, range) = (rig.source(&vec![1; len]), rig.range(0, len));
    let mut outcomes = Vec::new();
    let mut accepted = 0;
    for _ in 0..3 {
        if rig.transport().post_write(WriteId(accepted), source.clone(), range) == Post::Accepted {
            accepted += 1;
        }
    }
    rig.sever();
    drop(source);
    wait_for(rig, accepted, &mut outcomes);
    assert_all_complete_once(&outcomes, accepted);
    assert_eq!(rig.sources_held(), 0, "a severed transport holds no source");
}

fn post_and_wait_for_room<R: ConformanceRig>(
    rig: &mut R,
    id: WriteId,
    source: &<R::Transport as Transport>::Source,
    range: RemoteRange,
    outcomes: &mut Vec<Completion>,
) {
    while rig.transport().post_write(id, source.clone(), range) == Post::QueueFull {
        assert!(rig.keep_waiting(), "a full queue drains");
        rig.transport().poll(outcomes);
    }
}

fn wait_for<R: ConformanceRig>(rig: &mut R, count: u64, outcomes: &mut Vec<Completion>) {
    while (outcomes.len() as u64) < count {
        rig.transport().poll(outcomes);
        assert!(rig.keep_waiting(), "{} of {count} writes completed", outcomes.len());
    }
    rig.transport().poll(outcomes); // A write that completes twice shows up here.
}

fn assert_all_complete_once(outcomes: &[Completion], count: u64) {
    let mut ids: Vec<u64> = outcomes.iter().map(|completion| completion.id.0).collect();
    ids.sort_unstable();
    assert!(ids.iter().copied().eq(0..count), "each accepted write completes exactly once");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Epoch;

    #[test]
    fn a_stamp_is_the_hash_of_block_numbers_and_epochs() {
        let blocks: Vec<BlockRef> =
            (0..40).map(|index| BlockRef { block: BlockId(7 * index), epoch: Epoch(index.into()) }).collect();
        for count in [0, 1, 2, 40] {
            let bytes = |it: &BlockRef| [&it.block.0.to_le_bytes()[..], &it.epoch.0.to_le_bytes()].concat();
            let bytes: Vec<u8> = blocks[..count].iter().flat_map(bytes).collect();
            assert_eq!(stamp(&blocks[..count]), xxh3_64(&bytes), "{count} blocks");
        }
    }
}
