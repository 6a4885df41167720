//! Writes, from the engine's order to their completion.

use std::collections::BTreeMap;
use std::sync::Arc;

use tidemill_kvtransfer_proto::coalesce::{Span, coalesce};
use tidemill_kvtransfer_proto::digest::granule_digest;
use tidemill_kvtransfer_proto::sender::SenderEvent;
use tidemill_kvtransfer_proto::transport::{Post, RemoteRange, WriteFault, WriteId, stamp};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, HandoffId};

use super::Driver;
use super::prefilling::Outgoing;
use crate::event::{PushWrite, Source};
use crate::shm::Region;
use crate::source::{Memory, SourceRange};
use crate::tcp::Loss;
use crate::verification::granule;

impl Driver {
    /// The engine has bytes for the peer.
    pub(super) fn take_writes(&mut self, handoff: HandoffId, writes: Vec<PushWrite>) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        if !outgoing.sender.accepts_writes() || writes.is_empty() {
            return;
        }
        let Some(ranges) = outgoing.ranges(handoff, writes, &self.config.region) else {
            tracing::error!(%handoff, "a push outside the targets, their layers or its source");
            let reason = "this side pushed what it must not".to_owned();
            return self.apply_to_sender(handoff, SenderEvent::WriteFailed { reason });
        };
        let count = u32::try_from(ranges.len()).expect("a reservation is bounded by its frame");
        outgoing.stats.writes += u64::from(count);
        outgoing.stats.bytes += ranges.iter().map(|(_, range)| u64::from(range.len)).sum::<u64>();
        let instance = outgoing.peer;
        let is_first = outgoing.pending.is_empty();
        outgoing.pending.extend(ranges);
        self.apply_to_sender(handoff, SenderEvent::Pushed { writes: count });
        if is_first && let Some(link) = self.link_mut(instance) {
            link.posting.push_back(handoff);
        }
    }

    /// Posts what the transports take and hears what has completed.
    pub(super) fn push(&mut self) {
        let instances: Vec<u64> = self.peers.keys().copied().collect();
        for instance in instances {
            self.post(instance);
            self.settle(instance);
        }
    }

    fn post(&mut self, instance: u64) {
        let Self { peers, outgoing, next_write, .. } = self;
        let Some(link) = peers.get_mut(&instance).and_then(|peer| peer.link.as_mut()) else { return };
        while let Some(&handoff) = link.posting.front() {
            let Some(outgoing) = outgoing.get_mut(&handoff) else {
                link.posting.pop_front();
                continue;
            };
            while let Some((source, range)) = outgoing.pending.pop_front() {
                let id = WriteId(*next_write);
                match link.path.transport().post_write(id, source.clone(), range) {
                    Post::Accepted => {
                        *next_write += 1;
                        link.writes.insert(id, handoff);
                        outgoing.add_digests(handoff, &source, &range);
                    }
                    Post::QueueFull => {
                        outgoing.pending.push_front((source, range));
                        return;
                    }
                }
            }
            link.posting.pop_front();
        }
    }

    fn settle(&mut self, instance: u64) {
        let Some(link) = self.link_mut(instance) else { return };
        let mut done = Vec::new();
        link.path.transport().poll(&mut done);
        let settled: Vec<(HandoffId, Result<(), WriteFault>)> = done
            .into_iter()
            .filter_map(|completion| Some((link.writes.remove(&completion.id)?, completion.outcome)))
            .collect();
        if settled.iter().any(|(_, outcome)| *outcome == Err(WriteFault::Severed)) {
            // First, so that the handoffs learn of the loss and not of a write that failed.
            self.lose(instance, &Loss::Closed);
        }
        for (handoff, outcome) in settled {
            match outcome {
                Ok(()) | Err(WriteFault::Severed) => {}
                // The peer's news of the cancel is on its way, on another socket.
                Err(WriteFault::NotExpected) => self.apply_to_sender(handoff, SenderEvent::Cancelled),
                Err(fault @ (WriteFault::Outside | WriteFault::Stale)) => {
                    self.apply_to_sender(handoff, SenderEvent::WriteFailed { reason: fault.to_string() });
                }
            }
            self.apply_to_sender(handoff, SenderEvent::Settled { writes: 1 });
        }
    }
}

impl Outgoing {
    /// Checks writes and joins neighbours; `None` when one of them is not what it may be.
    fn ranges(
        &self,
        handoff: HandoffId,
        writes: Vec<PushWrite>,
        region: &Arc<Region>,
    ) -> Option<Vec<(SourceRange, RemoteRange)>> {
        // Offsets continue each other only within one memory.
        let mut by_memory: BTreeMap<usize, (Memory, Vec<Span>)> = BTreeMap::new();
        for PushWrite { target_index, offset, len, source } in writes {
            let target = self.targets.get(target_index as usize)?;
            let is_aligned =
                offset.is_multiple_of(self.shape.granule) && len.is_multiple_of(self.shape.granule);
            let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.shape.block);
            if len == 0 || !is_aligned || !is_inside {
                return None;
            }
            let (key, memory, from) = match source {
                Source::Region { offset } => (0, Memory::Arena(Arc::clone(region)), offset),
                Source::Slab(slab, offset) => (Arc::as_ptr(&slab).addr(), Memory::Staged(slab), offset),
            };
            SourceRange::new(memory.clone(), from, len)?;
            let start = target.block.0 as usize * self.shape.block + offset;
            let span = Span { source: from as u64, target: start as u64, len: len as u64 };
            by_memory.entry(key).or_insert_with(|| (memory, Vec::new())).1.push(span);
        }
        let mut ranges = Vec::new();
        for (memory, mut spans) in by_memory.into_values() {
            coalesce(&mut spans, LONGEST_WRITE);
            for Span { source, target, len } in spans {
                let source = SourceRange::new(memory.clone(), source as usize, len as usize)?;
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

    /// Adds up the digests of the granules of one write.
    fn add_digests(&mut self, handoff: HandoffId, source: &SourceRange, range: &RemoteRange) {
        let start = usize::try_from(range.offset).expect("inside the peer's arena");
        for done in (0..source.len()).step_by(self.shape.granule) {
            let (block, within) = ((start + done) / self.shape.block, (start + done) % self.shape.block);
            let block = BlockId(u32::try_from(block).expect("a target"));
            let position = self.positions[&block];
            let granule = granule(handoff, position, within / self.shape.granule);
            let digest = granule_digest(self.coverage, granule, self.shape.granule, |offset, buffer| {
                source.read(done + offset, buffer);
            });
            self.digests[position] = self.digests[position].wrapping_add(digest);
        }
    }
}

/// Long enough to make the cost of posting vanish, short enough not to hold up another peer.
const LONGEST_WRITE: u64 = 1 << 20;
