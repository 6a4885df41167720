//! Writes, from the engine's order to their completion.

use std::collections::{BTreeMap, BTreeSet};

use super::fetching::Fetched;
use super::prefilling::Outgoing;
use super::{Direction, EndpointCore, PostedWrite};
use crate::coalesce::{Runs, Span};
use crate::digest::{BlockDigests, BlockShape};
use crate::sender::SenderEvent;
use crate::transport::{Completion, Post, RemoteRange, WriteFault, WriteId, stamp};
use crate::units::{BlockId, BlockRef, Epoch, HandoffId, Moment};

/// A range of some memory that a write reads. Cloning shares the memory.
pub trait WriteSource: Clone {
    /// Equal for ranges of one memory, whose offsets can continue each other.
    fn memory(&self) -> usize;
    /// Offset of the first byte in that memory.
    fn offset(&self) -> usize;
    /// Length in bytes.
    fn len(&self) -> usize;
    /// Whether it has no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Another range of the same memory; `None` when it is not inside.
    fn range(&self, offset: usize, len: usize) -> Option<Self>;
    /// Offset of the first byte in this side's region, which peers can read; `None` when it is other memory.
    fn in_region(&self) -> Option<u64>;
    /// Whether it is memory of this side's device, block `b` at `b * block_bytes`, where only that device reads.
    fn is_on_device(&self) -> bool {
        false
    }
    /// Copies bytes out, starting `at` bytes into the range. Not of a device's memory.
    fn read(&self, at: usize, buffer: &mut [u8]);
}

/// One write into a block that the peer reserved. Offset and length are multiples of one layer of the peer's
/// layout.
#[derive(Clone, Debug)]
pub struct TargetWrite<S> {
    /// Position of the block among the targets.
    pub target_index: u32,
    /// Offset in that block.
    pub offset: usize,
    /// The bytes; `None` when they are not inside their memory, which is the engine's mistake.
    pub source: Option<S>,
}

impl<S: WriteSource> EndpointCore<S> {
    /// The engine has bytes for the peer. Those for a handoff that has failed meanwhile are dropped.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "pieces of memory that are held until here and no longer"
    )]
    pub fn push(&mut self, handoff: HandoffId, writes: Vec<TargetWrite<S>>, now: Moment) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        if !outgoing.sender.accepts_writes() || writes.is_empty() {
            return;
        }
        let is_fit = !outgoing.naming.has_begun() && outgoing.note_device_sources(&writes);
        let ranges = outgoing.ranges(handoff, &writes).filter(|_| is_fit);
        let Some(ranges) = ranges else {
            self.log(
                0,
                handoff,
                "it pushed outside the targets, their layers or its source, or into what it had computed",
            );
            let reason = "this side pushed what it must not".to_owned();
            return self.apply_to_sender(handoff, SenderEvent::WriteFailed { reason }, now);
        };
        let offer = match &mut outgoing.offers {
            None => None,
            Some(offers) => match offers.take(handoff, &ranges, now) {
                Some(offer) => Some(offer),
                None => {
                    self.log(0, handoff, "it offered what the peer cannot read");
                    let reason = "this side offered what is not in its region".to_owned();
                    return self.apply_to_sender(handoff, SenderEvent::WriteFailed { reason }, now);
                }
            },
        };
        outgoing.stats.bytes += ranges.iter().map(|(_, range)| u64::from(range.len)).sum::<u64>();
        if let Some(offer) = offer {
            let count = u32::try_from(ranges.len()).expect("a reservation is bounded by its frame");
            outgoing.stats.writes += u64::from(count);
            outgoing.add_digests(handoff, &ranges);
            self.apply_to_sender(handoff, SenderEvent::Pushed { writes: count }, now);
            return self.send_offer(handoff, &offer);
        }
        let count = outgoing.add_pending(ranges);
        outgoing.stats.writes += u64::from(count);
        self.apply_to_sender(handoff, SenderEvent::Pushed { writes: count }, now);
        self.queue_writes(handoff);
        self.ask_for_credit(handoff);
    }

    /// Has the link post what can be posted of a handoff.
    pub(super) fn queue_writes(&mut self, handoff: HandoffId) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        if outgoing.is_posting || !outgoing.may_post() {
            return;
        }
        let peer = outgoing.peer;
        if let Some(link) = self.peers.get_mut(&peer).and_then(|it| it.link.as_mut()) {
            outgoing.is_posting = true;
            link.posting.push_back(handoff);
        }
    }

    /// Whether writes wait to be posted to that peer that may be.
    pub fn has_writes_for(&self, peer: u64) -> bool {
        self.link(peer).is_some_and(|link| !link.posting.is_empty())
    }

    /// Hands the writes for a peer to its transport, oldest handoff first, until that is full.
    pub fn post(&mut self, peer: u64, mut post: impl FnMut(WriteId, &S, RemoteRange) -> Post, now: Moment) {
        let Self { peers, outgoing, writes, next_write, .. } = self;
        let Some(link) = peers.get_mut(&peer).and_then(|it| it.link.as_mut()) else { return };
        while let Some(&handoff) = link.posting.front() {
            let Some(outgoing) = outgoing.get_mut(&handoff) else {
                link.posting.pop_front();
                continue;
            };
            let mut accepted = Vec::with_capacity(outgoing.pending.len().min(USUAL_POST));
            while outgoing.may_post()
                && let Some((source, range)) = outgoing.pending.pop_front()
            {
                let id = WriteId(*next_write);
                match post(id, &source, range) {
                    Post::Accepted => {
                        *next_write += 1;
                        if link.under_way == 0 {
                            link.progress = now;
                        }
                        link.under_way += 1;
                        let len = u64::from(range.len);
                        let direction = Direction::Write;
                        writes.insert(id, PostedWrite { peer, link: link.id, handoff, len, direction });
                        if let Some(credit) = &mut outgoing.credit {
                            credit.post(len);
                        }
                        accepted.push((source, range));
                    }
                    Post::QueueFull => {
                        outgoing.pending.push_front((source, range));
                        break;
                    }
                }
            }
            if outgoing.device_sources.is_none() {
                outgoing.add_digests(handoff, &accepted);
            }
            if outgoing.may_post() {
                return;
            }
            outgoing.is_posting = false;
            link.posting.pop_front();
        }
    }

    /// Posted writes and reads have ended, on a link that is up or one that was severed.
    pub fn completed(&mut self, done: &[Completion], now: Moment) {
        let mut settled: Vec<Settled> = Vec::new();
        let mut read: BTreeMap<HandoffId, Fetched> = BTreeMap::new();
        for completion in done {
            let Some(write) = self.writes.remove(&completion.id) else { continue };
            if let Some(link) = self.link_mut(write.peer).filter(|link| link.id == write.link) {
                link.under_way -= 1;
                link.progress = now;
                // First, so that the handoffs learn of the loss and not of a transfer that failed.
                match completion.outcome {
                    Err(WriteFault::Severed) => self.link_lost(write.peer, "the connection was closed", now),
                    Err(fault) if write.direction == Direction::Read => {
                        self.link_lost(write.peer, &format!("a read was turned down: {fault}"), now);
                    }
                    Ok(()) | Err(_) => {}
                }
            }
            if write.direction == Direction::Read {
                read.entry(write.handoff).or_default().add(write.len);
                continue;
            }
            let (handoff, outcome) = (write.handoff, completion.outcome);
            match settled.last_mut() {
                // Most writes end well, many at a time.
                Some(last) if last.handoff == handoff && last.outcome == outcome => {
                    last.writes += 1;
                    last.bytes += write.len;
                }
                _ => settled.push(Settled { handoff, outcome, writes: 1, bytes: write.len }),
            }
        }
        for (handoff, fetched) in read {
            self.fetched(handoff, fetched, now);
        }
        let mut ended = BTreeSet::new();
        for Settled { handoff, outcome, writes, bytes } in settled {
            if let Some(credit) = self.outgoing.get_mut(&handoff).and_then(|it| it.credit.as_mut()) {
                credit.end(bytes);
                ended.insert(handoff);
            }
            match outcome {
                Ok(()) | Err(WriteFault::Severed) => {}
                // The peer's news of the cancel is on its way, on another socket.
                Err(WriteFault::NotExpected) => self.apply_to_sender(handoff, SenderEvent::Cancelled, now),
                Err(fault @ (WriteFault::Outside | WriteFault::Stale)) => {
                    let reason = fault.to_string();
                    self.apply_to_sender(handoff, SenderEvent::WriteFailed { reason }, now);
                }
            }
            self.apply_to_sender(handoff, SenderEvent::Settled { writes }, now);
        }
        for handoff in ended {
            self.ask_for_credit(handoff);
        }
    }
}

/// Writes of one handoff that ended alike, one after the other.
struct Settled {
    handoff: HandoffId,
    outcome: Result<(), WriteFault>,
    writes: u32,
    bytes: u64,
}

impl<S: WriteSource> Outgoing<S> {
    /// Whether there is a write that needs nobody's leave, or has it.
    fn may_post(&self) -> bool {
        let Some((_, range)) = self.pending.front() else { return false };
        self.credit.as_ref().is_none_or(|credit| credit.covers(range.len.into()))
    }

    /// Has writes wait to be posted. Returns by how many more wait.
    fn add_pending(&mut self, ranges: Vec<(S, RemoteRange)>) -> u32 {
        match &mut self.credit {
            // Leave is asked for and given by whole writes.
            Some(credit) => {
                let count = u32::try_from(ranges.len()).expect("a reservation is bounded by its frame");
                credit.push(ranges.iter().map(|(_, range)| range.len.into()));
                self.pending.extend(ranges);
                count
            }
            None => self.pending.join(ranges, self.shape.block as u64, LONGEST_WRITE),
        }
    }

    /// Notes which block of a device each target comes from; false when the memory is not the kind that is written from here, or a target
    /// comes from two blocks, or from none that is whole: what a commit says of it could not be found out.
    fn note_device_sources(&mut self, writes: &[TargetWrite<S>]) -> bool {
        let block_bytes = self.shape.block;
        let is_on_device = |write: &TargetWrite<S>| write.source.as_ref().is_some_and(S::is_on_device);
        let Some(sources) = &mut self.device_sources else { return !writes.iter().any(is_on_device) };
        writes.iter().all(|write| {
            let first = write.source.as_ref().and_then(|source| source.offset().checked_sub(write.offset));
            let number = first.filter(|first| first.is_multiple_of(block_bytes)).map(|it| it / block_bytes);
            let (Some(source), Some(number)) = (sources.get_mut(write.target_index as usize), number) else {
                return false;
            };
            let Ok(number) = u32::try_from(number) else { return false };
            let block = BlockRef { block: BlockId(number), epoch: Epoch(0) };
            is_on_device(write) && *source.get_or_insert(block) == block
        })
    }

    /// Checks writes and joins neighbours; `None` when one of them is not what it may be.
    fn ranges(&self, handoff: HandoffId, writes: &[TargetWrite<S>]) -> Option<Vec<(S, RemoteRange)>> {
        let BlockShape { block, granule } = self.shape;
        // Most pieces are one layer long, which spares a division.
        let is_whole = |bytes: usize| bytes == granule || bytes.is_multiple_of(granule);
        // Offsets continue each other only within one memory, of which there are few.
        let mut memories: Vec<(&S, Runs)> = Vec::new();
        let mut last = 0;
        for TargetWrite { target_index, offset, source } in writes {
            let lane = *target_index as usize;
            let (target, source) = (self.targets.get(lane)?, source.as_ref()?);
            let len = source.len();
            let is_inside = offset.checked_add(len).is_some_and(|end| end <= block);
            if len == 0 || !is_inside || !is_whole(len) || !is_whole(*offset) {
                return None;
            }
            let key = source.memory();
            if memories.get(last).is_none_or(|(memory, _)| memory.memory() != key) {
                last = memories.iter().position(|(memory, _)| memory.memory() == key).unwrap_or_else(|| {
                    memories.push((source, Runs::new(self.targets.len(), LONGEST_WRITE)));
                    memories.len() - 1
                });
            }
            let target = (target.block.0 as usize * block + offset) as u64;
            memories[last].1.add(lane, Span { source: source.offset() as u64, target, len: len as u64 });
        }
        let mut ranges = Vec::new();
        for (memory, runs) in memories {
            for Span { source, target, len } in runs.into_spans() {
                let source = memory.range(usize::try_from(source).ok()?, usize::try_from(len).ok()?)?;
                ranges.push((source, self.range(handoff, target, len)?));
            }
        }
        Some(ranges)
    }

    /// Names a range of targets to the peer, with their epochs.
    fn range(&self, handoff: HandoffId, offset: u64, len: u64) -> Option<RemoteRange> {
        let range = RemoteRange { handoff, offset, len: u32::try_from(len).ok()?, stamp: 0 };
        let covered: Option<Vec<BlockRef>> = range
            .blocks(self.shape.block)?
            .map(|block| Some(self.targets[*self.positions.get(&block)?]))
            .collect();
        Some(RemoteRange { stamp: stamp(&covered?), ..range })
    }

    /// Adds up the digests of the granules of some writes.
    fn add_digests(&mut self, handoff: HandoffId, writes: &[(S, RemoteRange)]) {
        let Self { positions, digests, shape, coverage, .. } = self;
        let BlockShape { block, granule } = *shape;
        let read =
            |(source, at): (&S, usize), offset: usize, buffer: &mut [u8]| source.read(at + offset, buffer);
        let mut digests = BlockDigests::new(*coverage, granule, digests, read);
        for (source, range) in writes {
            let start = usize::try_from(range.offset).expect("inside the peer's arena");
            let end = start + source.len();
            let mut at = start;
            // Blocks that lie side by side at the peer need not be neighbours in the sequence.
            while at < end {
                let number = u32::try_from(at / block).expect("a target");
                let (target, first) = (positions[&BlockId(number)], at % block / granule);
                let behind = end.min((number as usize + 1) * block);
                for index in first..first + (behind - at) / granule {
                    digests.add(shape.granule_of(handoff, target, index), (source, at - start));
                    at += granule;
                }
            }
        }
        digests.finish();
    }
}

/// Long enough to make the cost of posting vanish, short enough not to hold up another peer.
const LONGEST_WRITE: u64 = 1 << 20;
/// Writes that are posted together, as a rule.
const USUAL_POST: usize = 256;
