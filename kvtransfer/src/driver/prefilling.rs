//! This side as prefill side: from a peer's reservation to its word that it took over.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::error::TransferError;
use tidemill_kvtransfer_proto::layout::Bridge;
use tidemill_kvtransfer_proto::message::{self, Commit, Message};
use tidemill_kvtransfer_proto::sender::{Sender, SenderAction, SenderEvent};
use tidemill_kvtransfer_proto::transport::RemoteRange;
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, HandoffId, TokenCount};

use super::Driver;
use super::decoding::check_shape;
use super::peers::{DataPath, Link};
use crate::event::{HandoffEvent, HandoffStats, Path, Reserved};
use crate::shm::Region;
use crate::source::SourceRange;
use crate::verification::{BlockShape, DigestJob};

/// A handoff with this side as prefill side.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) peer: u64,
    pub(super) sender: Sender,
    pub(super) tokens: TokenCount,
    pub(super) targets: Vec<BlockRef>,
    /// Where among the targets a block of the peer is.
    pub(super) positions: BTreeMap<BlockId, usize>,
    pub(super) coverage: Coverage,
    /// Of the peer's blocks.
    pub(super) shape: BlockShape,
    /// The peer's arena, where the engine may compute in it.
    arena: Option<Arc<Region>>,
    /// Writes that are not posted.
    pub(super) pending: VecDeque<(SourceRange, RemoteRange)>,
    /// Of what was posted so far, one for each target.
    pub(super) digests: Vec<u64>,
    pub(super) stats: HandoffStats,
    finished: Option<Instant>,
    /// Digests of what was computed in place, in the making, and the payload that goes along.
    hashing: Option<(DigestJob, Vec<u8>)>,
}

/// A handoff of which only one half is known.
#[derive(Debug)]
pub(super) enum Waiting {
    /// The engine expects it; the peer has not reserved.
    Expected { peer: u64, until: Instant },
    /// The peer has reserved; the engine has not asked for it.
    Early { peer: u64, reserve: message::Reserve, until: Instant },
    /// Over before it began: whatever comes of it now is too late.
    Over { until: Instant },
}

impl Waiting {
    pub(super) fn until(&self) -> Instant {
        match self {
            Self::Expected { until, .. } | Self::Early { until, .. } | Self::Over { until } => *until,
        }
    }
}

impl Outgoing {
    /// Whether the engine may be storing into the peer's memory by itself.
    pub(super) fn computes_in_place(&self) -> bool {
        self.arena.is_some() && self.stats.writes == 0
    }
}

impl Driver {
    /// The engine is going to compute the prompt of this handoff.
    pub(super) fn expect(&mut self, handoff: HandoffId, peer: u64, patience: Duration) {
        if self.outgoing.contains_key(&handoff) {
            return tracing::error!(%handoff, "expected twice");
        }
        match self.waiting.remove(&handoff) {
            Some(Waiting::Early { peer: from, reserve, .. }) if from == peer => self.begin(peer, reserve),
            Some(Waiting::Over { .. }) => {
                self.tell(HandoffEvent::SendFailed { handoff, error: TransferError::Cancelled });
            }
            other => {
                if let Some(Waiting::Early { peer: from, .. }) = other {
                    self.decline(from, handoff, "another worker was expected");
                }
                let until = self.now + patience;
                self.waiting.insert(handoff, Waiting::Expected { peer, until });
            }
        }
    }

    /// A peer has blocks to be filled.
    pub(super) fn hear_reserve(&mut self, instance: u64, reserve: message::Reserve) {
        let handoff = reserve.handoff;
        let is_late = self.link_mut(instance).is_none_or(|link| link.ended.contains(handoff));
        if is_late || self.outgoing.contains_key(&handoff) {
            return tracing::debug!(%handoff, "reserved twice");
        }
        match self.waiting.get(&handoff) {
            Some(Waiting::Expected { peer, .. }) if *peer == instance => {
                self.waiting.remove(&handoff);
                self.begin(instance, reserve);
            }
            Some(Waiting::Over { .. }) => self.decline(instance, handoff, "it is over"),
            Some(_) => self.decline(instance, handoff, "another worker is expected"),
            None if MAX_WAITING <= self.waiting.len() => {
                self.decline(instance, handoff, "too many reservations wait");
            }
            None => {
                let until = self.now + self.config.timing.patience;
                self.waiting.insert(handoff, Waiting::Early { peer: instance, reserve, until });
            }
        }
    }

    fn decline(&mut self, instance: u64, handoff: HandoffId, reason: &str) {
        tracing::warn!(%handoff, reason, "reservation declined");
        self.send(instance, &Message::Decline { handoff, reason: reason.to_owned() });
        if let Some(link) = self.link_mut(instance) {
            link.ended.insert(handoff);
        }
    }

    /// Both halves are there.
    fn begin(&mut self, instance: u64, reserve: message::Reserve) {
        let handoff = reserve.handoff;
        let in_place = self.config.in_place;
        let checked = match self.link_mut(instance) {
            Some(link) => check_reserve(link, &reserve),
            None => Err(TransferError::PeerUnknown { instance }),
        };
        let bridge = match checked {
            Ok(bridge) => bridge,
            Err(error) => {
                self.decline(instance, handoff, &error.to_string());
                return self.tell(HandoffEvent::SendFailed { handoff, error });
            }
        };
        let Some(link) = self.link_mut(instance) else { return };
        let arena = match &link.path {
            DataPath::SharedMemory(transport) if in_place && bridge == Bridge::Identical => {
                Some(Arc::clone(transport.arena()))
            }
            _ => None,
        };
        let (layout, shape) = (Arc::clone(&link.layout), link.shape);
        let path = arena.clone().map_or(Path::Write, Path::InPlace);
        let outgoing = Outgoing {
            peer: instance,
            sender: Sender::new(handoff),
            tokens: reserve.tokens,
            targets: reserve.targets.clone(),
            positions: reserve.targets.iter().map(|it| it.block).zip(0..).collect(),
            coverage: reserve.coverage,
            shape,
            arena,
            pending: VecDeque::new(),
            digests: vec![0; reserve.targets.len()],
            stats: HandoffStats::default(),
            finished: None,
            hashing: None,
        };
        self.outgoing.insert(handoff, outgoing);
        let message::Reserve { tokens, first_block, cached, targets, .. } = reserve;
        let reserved = Reserved {
            handoff,
            peer_instance: instance,
            layout,
            bridge,
            tokens,
            first_block,
            cached,
            targets,
            path,
        };
        self.tell(HandoffEvent::Reserved(reserved));
    }

    /// The peer does not want it any more.
    pub(super) fn hear_cancel(&mut self, instance: u64, handoff: HandoffId) {
        match self.outgoing.get(&handoff) {
            Some(outgoing) if outgoing.peer == instance => {
                return self.apply_to_sender(handoff, SenderEvent::Cancelled);
            }
            Some(_) => return tracing::warn!(%handoff, instance, "a peer cancelled somebody else's handoff"),
            None => {}
        }
        if let Some(Waiting::Early { peer, .. } | Waiting::Expected { peer, .. }) = self.waiting.get(&handoff)
            && *peer == instance
        {
            self.end_before_it_began(handoff, TransferError::Cancelled);
        }
        if let Some(link) = self.link_mut(instance) {
            link.ended.insert(handoff);
        }
        // What was never begun, or has ended, touches nothing.
        self.send(instance, &Message::Quiet { handoff, reason: "nothing is known of it".to_owned() });
    }

    /// Takes a waiting handoff off the list, tells the engine if that knows of it, and remembers that it is over.
    fn end_before_it_began(&mut self, handoff: HandoffId, error: TransferError) {
        let ended = self.waiting.remove(&handoff);
        let until = self.now + self.config.timing.patience;
        self.waiting.insert(handoff, Waiting::Over { until });
        if let Some(Waiting::Expected { .. }) = ended {
            self.tell(HandoffEvent::SendFailed { handoff, error });
        }
    }

    /// Ends what has waited for too long.
    pub(super) fn end_waiting(&mut self) {
        let now = self.now;
        let over: Vec<HandoffId> =
            self.waiting.iter().filter(|(_, it)| it.until() <= now).map(|(&handoff, _)| handoff).collect();
        for handoff in over {
            match self.waiting.get(&handoff) {
                Some(Waiting::Early { peer, .. }) => {
                    let peer = *peer;
                    self.decline(peer, handoff, "nobody here expects it");
                    self.end_before_it_began(handoff, TransferError::Expired);
                }
                Some(Waiting::Expected { .. }) => self.end_before_it_began(handoff, TransferError::Expired),
                Some(Waiting::Over { .. }) | None => {
                    self.waiting.remove(&handoff);
                }
            }
        }
    }

    /// The engine is done, and has pushed everything.
    pub(super) fn finish(&mut self, handoff: HandoffId, payload: Vec<u8>) {
        if let Some(outgoing) = self.outgoing.get_mut(&handoff) {
            outgoing.finished.get_or_insert_with(Instant::now);
        }
        self.apply_to_sender(handoff, SenderEvent::Finish { payload });
    }

    /// The engine has given up.
    pub(super) fn abandon(&mut self, handoff: HandoffId, reason: String) {
        if let Some(Waiting::Expected { .. }) = self.waiting.get(&handoff) {
            return self.end_before_it_began(handoff, TransferError::Abandoned { reason });
        }
        self.apply_to_sender(handoff, SenderEvent::Abandon { reason });
    }

    /// A message about a handoff of this side; only its own peer may speak of it.
    pub(super) fn hear_of_sender(&mut self, instance: u64, handoff: HandoffId, event: SenderEvent) {
        match self.outgoing.get(&handoff) {
            Some(outgoing) if outgoing.peer == instance => self.apply_to_sender(handoff, event),
            Some(_) => tracing::warn!(%handoff, instance, "a peer spoke of somebody else's handoff"),
            None => tracing::debug!(%handoff, "a message about a handoff that is over"),
        }
    }

    pub(super) fn lose_senders(&mut self, instance: u64, name: &str, reason: &str) {
        let lost = || TransferError::PeerLost { peer: name.to_owned(), reason: reason.to_owned() };
        let of_peer = |it: &Waiting| match it {
            Waiting::Expected { peer, .. } | Waiting::Early { peer, .. } => *peer == instance,
            Waiting::Over { .. } => false,
        };
        let waiting: Vec<HandoffId> =
            self.waiting.iter().filter(|(_, it)| of_peer(it)).map(|(&handoff, _)| handoff).collect();
        for handoff in waiting {
            self.end_before_it_began(handoff, lost());
        }
        let outgoing: Vec<HandoffId> =
            self.outgoing.iter().filter(|(_, it)| it.peer == instance).map(|(&it, _)| it).collect();
        for handoff in outgoing {
            let (peer, reason) = (name.to_owned(), reason.to_owned());
            self.apply_to_sender(handoff, SenderEvent::PeerLost { peer, reason });
        }
    }

    pub(super) fn apply_to_sender(&mut self, handoff: HandoffId, event: SenderEvent) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        let instance = outgoing.peer;
        for action in outgoing.sender.apply(event) {
            match action {
                SenderAction::Send(message) => self.send(instance, &message),
                SenderAction::Commit { payload } => self.commit(handoff, payload),
                SenderAction::DropUnposted => {
                    let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
                    let dropped = std::mem::take(&mut outgoing.pending).len();
                    let writes = u32::try_from(dropped).expect("pushed writes are counted in u32");
                    self.apply_to_sender(handoff, SenderEvent::Settled { writes });
                }
                SenderAction::TellStop => self.tell(HandoffEvent::CancelWanted { handoff }),
                SenderAction::TellDelivered => {
                    let stats = self.forget_sender(instance, handoff);
                    self.tell(HandoffEvent::Delivered { handoff, stats });
                }
                SenderAction::TellFailed(error) => {
                    tracing::warn!(%handoff, %error, "handoff failed");
                    self.forget_sender(instance, handoff);
                    self.tell(HandoffEvent::SendFailed { handoff, error });
                }
            }
        }
    }

    fn forget_sender(&mut self, instance: u64, handoff: HandoffId) -> HandoffStats {
        if let Some(link) = self.link_mut(instance) {
            link.ended.insert(handoff);
        }
        let Some(mut outgoing) = self.outgoing.remove(&handoff) else { return HandoffStats::default() };
        outgoing.stats.took = outgoing.finished.map(|since| since.elapsed()).unwrap_or_default();
        outgoing.stats
    }

    /// Every byte is there: says so, once the digests are.
    fn commit(&mut self, handoff: HandoffId, payload: Vec<u8>) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        match &outgoing.arena {
            Some(arena) if outgoing.computes_in_place() => {
                let (arena, targets) = (Arc::clone(arena), outgoing.targets.clone());
                let job = DigestJob::new(handoff, outgoing.coverage, outgoing.shape, arena, targets);
                outgoing.hashing = Some((job, payload));
                self.hashing.push_back(handoff);
            }
            _ => {
                let digests = std::mem::take(&mut outgoing.digests);
                self.send_commit(handoff, digests, payload);
            }
        }
    }

    /// Goes on taking digests of what was computed in place, for one handoff at a time and not for long.
    pub(super) fn take_digests(&mut self) {
        let Some(handoff) = self.hashing.pop_front() else { return };
        // A handoff that failed meanwhile has no job any more.
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        let Some((mut job, payload)) = outgoing.hashing.take() else { return };
        match job.advance() {
            Some(digests) => self.send_commit(handoff, digests, payload),
            None => {
                outgoing.hashing = Some((job, payload));
                self.hashing.push_back(handoff);
            }
        }
    }

    fn send_commit(&mut self, handoff: HandoffId, digests: Vec<u64>, payload: Vec<u8>) {
        let Some(outgoing) = self.outgoing.get(&handoff) else { return };
        let (instance, tokens, targets) = (outgoing.peer, outgoing.tokens, outgoing.targets.clone());
        self.send(instance, &Message::Commit(Commit { handoff, tokens, targets, digests, payload }));
    }
}

/// Whether a peer's reservation is one that can be filled, and how.
fn check_reserve(link: &Link, reserve: &message::Reserve) -> Result<Bridge, TransferError> {
    let bridge = link.bridge.clone()?;
    let mut named = reserve.targets.iter().chain(&reserve.cached);
    if named.any(|it| link.blocks <= u64::from(it.block.0)) {
        return Err(TransferError::Invalid { what: "a block is outside the region" });
    }
    check_shape(reserve.first_block, reserve.targets.len(), reserve.cached.len())?;
    let needed = reserve.tokens.blocks_to_hold(link.layout.block_len).0;
    if u64::from(needed) != u64::from(reserve.first_block) + reserve.targets.len() as u64 {
        return Err(TransferError::Invalid { what: "the blocks are not those that hold the tokens" });
    }
    let mut blocks: Vec<BlockId> = reserve.targets.iter().map(|it| it.block).collect();
    blocks.sort_unstable();
    if blocks.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(TransferError::Invalid { what: "a block is named twice" });
    }
    Ok(bridge)
}

/// Handoffs of which one half may be waiting for the other.
const MAX_WAITING: usize = 8192;
