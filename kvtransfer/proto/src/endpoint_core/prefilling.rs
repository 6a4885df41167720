//! This side as prefill side: from a peer's reservation to its word that it took over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::backlog::Backlog;
use super::fetching::Offers;
use super::links::LinkState;
use super::naming::Naming;
use super::writing::WriteSource;
use super::{Delivery, EndpointCore, EndpointEvent, HandoffStats, ReservedHandoff, check_shape};
use crate::credit::CreditLine;
use crate::digest::{BlockShape, Coverage};
use crate::error::TransferError;
use crate::layout::Bridge;
use crate::message::{self, Message};
use crate::sender::{Sender, SenderAction, SenderEvent};
use crate::units::{BlockId, BlockLen, BlockRef, HandoffId, Moment, TokenCount};

/// A handoff with this side as prefill side.
#[derive(Clone, Debug)]
pub(super) struct Outgoing<S> {
    pub(super) peer: u64,
    pub(super) sender: Sender,
    pub(super) tokens: TokenCount,
    /// Tokens that lie in blocks before the targets.
    pub(super) before: TokenCount,
    pub(super) block_len: BlockLen,
    pub(super) targets: Vec<BlockRef>,
    /// Where among the targets a block of the peer is.
    pub(super) positions: BTreeMap<BlockId, usize>,
    pub(super) coverage: Coverage,
    /// Of the peer's blocks.
    pub(super) shape: BlockShape,
    /// Whether the engine may compute in the peer's memory.
    in_place: bool,
    /// Writes that are not posted.
    pub(super) pending: Backlog<S>,
    /// Whether the link knows that there are some.
    pub(super) is_posting: bool,
    /// Leave to post them, where that is needed.
    pub(super) credit: Option<CreditLine>,
    /// What the peer may read, where it reads.
    pub(super) offers: Option<Offers<S>>,
    /// Of what was posted so far, one for each target.
    pub(super) digests: Vec<u64>,
    /// Where a device writes: the block of this side's that each target comes from, as far as they are pushed.
    pub(super) device_sources: Option<Vec<Option<BlockRef>>>,
    pub(super) stats: HandoffStats,
    /// When the engine said that the whole prompt is computed.
    pub(super) computed: Option<Moment>,
    finished: Option<Moment>,
    /// What the peer was told of blocks that are computed in place.
    pub(super) naming: Naming,
}

/// A handoff of which only one half is known.
#[derive(Clone, Debug)]
pub(super) enum Waiting {
    /// The engine expects it; the peer has not reserved.
    Expected { peer: u64, until: Moment },
    /// The peer has reserved; the engine has not asked for it.
    Early { peer: u64, reserve: message::Reserve, until: Moment },
    /// Over before it began: whatever comes of it now is too late.
    Over { until: Moment },
}

impl Waiting {
    pub(super) fn until(&self) -> Moment {
        match self {
            Self::Expected { until, .. } | Self::Early { until, .. } | Self::Over { until } => *until,
        }
    }
}

impl<S> Outgoing<S> {
    /// Whether the engine may be storing into the peer's memory by itself.
    pub(super) fn computes_in_place(&self) -> bool {
        self.in_place && self.stats.writes == 0
    }
}

impl<S: WriteSource> EndpointCore<S> {
    /// The engine is going to compute the prompt of this handoff.
    pub fn expect(&mut self, handoff: HandoffId, peer: u64, patience: Duration, now: Moment) {
        if self.outgoing.contains_key(&handoff) {
            return self.log(0, handoff, "it was expected twice");
        }
        match self.waiting.remove(&handoff) {
            Some(Waiting::Early { peer: from, reserve, .. }) if from == peer => self.begin(peer, reserve),
            Some(Waiting::Over { .. }) => {
                self.tell(EndpointEvent::SendFailed { handoff, error: TransferError::Cancelled });
            }
            other => {
                if let Some(Waiting::Early { peer: from, .. }) = other {
                    self.decline(from, handoff, "another worker was expected");
                }
                self.waiting.insert(handoff, Waiting::Expected { peer, until: now.plus(patience) });
            }
        }
    }

    /// A peer has blocks to be filled.
    pub(super) fn hear_reserve(&mut self, peer: u64, reserve: message::Reserve, now: Moment) {
        let handoff = reserve.handoff;
        let is_late = self.link(peer).is_none_or(|link| link.ended.contains(handoff));
        if is_late || self.outgoing.contains_key(&handoff) {
            return self.log(peer, handoff, "it reserved what is under way or over");
        }
        match self.waiting.get(&handoff) {
            Some(Waiting::Expected { peer: expected, .. }) if *expected == peer => {
                self.waiting.remove(&handoff);
                self.begin(peer, reserve);
            }
            // Nothing went wrong: the request ended before the reservation came.
            Some(Waiting::Over { .. }) => self.say_quiet(peer, handoff, "it is over"),
            Some(_) => self.decline(peer, handoff, "another worker is expected"),
            None if MAX_WAITING <= self.waiting.len() => {
                self.decline(peer, handoff, "too many reservations wait");
            }
            None => {
                let until = now.plus(self.rules.patience);
                self.waiting.insert(handoff, Waiting::Early { peer, reserve, until });
            }
        }
    }

    fn decline(&mut self, peer: u64, handoff: HandoffId, reason: &str) {
        self.send(peer, Message::Decline { handoff, reason: reason.to_owned() });
        if let Some(link) = self.link_mut(peer) {
            link.ended.insert(handoff);
        }
    }

    /// Both halves are there.
    fn begin(&mut self, peer: u64, reserve: message::Reserve) {
        let handoff = reserve.handoff;
        let checked = match self.link(peer) {
            Some(link) => {
                check_reserve(link, &reserve).map(|bridge| (bridge, Arc::clone(&link.layout), link.shape))
            }
            None => Err(TransferError::PeerUnknown { instance: peer }),
        };
        let (bridge, layout, shape) = match checked {
            Ok(checked) => checked,
            Err(error) => {
                self.decline(peer, handoff, &error.to_string());
                return self.tell(EndpointEvent::SendFailed { handoff, error });
            }
        };
        let in_place = self.reaches_in_place(peer);
        let link = self.link(peer);
        let is_staged = bridge != Bridge::Identical;
        let offers = link.filter(|link| link.is_read_by_peer).map(|link| Offers::over(link.id, is_staged));
        let takes_credit = offers.is_none() && link.is_some_and(|link| link.proof.takes_credit());
        // A device writes blocks as they are.
        let by_device =
            !in_place && !is_staged && offers.is_none() && link.is_some_and(|link| link.by_device.to_peer);
        let delivery = match (in_place, &offers) {
            (true, _) => Delivery::InPlace,
            (false, None) if by_device => Delivery::ByDevice,
            (false, None) => Delivery::Written,
            (false, Some(_)) => Delivery::Read,
        };
        let message::Reserve { tokens, first_block, cached, targets, coverage, .. } = reserve;
        let outgoing = Outgoing {
            peer,
            sender: Sender::new(handoff),
            tokens,
            before: TokenCount(first_block.saturating_mul(layout.block_len.tokens())),
            block_len: layout.block_len,
            targets: targets.clone(),
            positions: targets.iter().map(|it| it.block).zip(0..).collect(),
            coverage,
            shape,
            in_place,
            pending: Backlog::default(),
            is_posting: false,
            credit: takes_credit.then(CreditLine::default),
            offers,
            digests: vec![0; targets.len()],
            device_sources: by_device.then(|| vec![None; targets.len()]),
            stats: HandoffStats::default(),
            computed: None,
            finished: None,
            naming: Naming::new(handoff),
        };
        self.outgoing.insert(handoff, outgoing);
        self.tell(EndpointEvent::Reserved(ReservedHandoff {
            handoff,
            peer,
            layout,
            bridge,
            tokens,
            first_block,
            cached,
            targets,
            delivery,
        }));
    }

    /// The peer does not want it any more.
    pub(super) fn hear_cancel(&mut self, peer: u64, handoff: HandoffId, now: Moment) {
        match self.outgoing.get(&handoff) {
            Some(outgoing) if outgoing.peer == peer => {
                return self.apply_to_sender(handoff, SenderEvent::Cancelled, now);
            }
            Some(_) => return self.log(peer, handoff, "it cancelled somebody else's handoff"),
            None => {}
        }
        if self.waits_for(handoff, peer) {
            self.end_before_it_began(handoff, TransferError::Cancelled, now);
        }
        // What was never begun, or has ended, touches nothing.
        self.say_quiet(peer, handoff, "nothing is known of it");
    }

    pub(super) fn say_quiet(&mut self, peer: u64, handoff: HandoffId, reason: &str) {
        if let Some(link) = self.link_mut(peer) {
            link.ended.insert(handoff);
        }
        self.send(peer, Message::Quiet { handoff, reason: reason.to_owned() });
    }

    fn waits_for(&self, handoff: HandoffId, peer: u64) -> bool {
        match self.waiting.get(&handoff) {
            Some(Waiting::Early { peer: of, .. } | Waiting::Expected { peer: of, .. }) => *of == peer,
            Some(Waiting::Over { .. }) | None => false,
        }
    }

    /// Takes a waiting handoff off the list, tells the engine if that knows of it, and remembers that it is over.
    fn end_before_it_began(&mut self, handoff: HandoffId, error: TransferError, now: Moment) {
        let until = now.plus(self.rules.patience);
        let ended = self.waiting.insert(handoff, Waiting::Over { until });
        if let Some(Waiting::Expected { .. }) = ended {
            self.tell(EndpointEvent::SendFailed { handoff, error });
        }
    }

    /// Ends what has waited for too long.
    pub(super) fn end_waiting(&mut self, now: Moment) {
        let over: Vec<HandoffId> =
            self.waiting.iter().filter(|(_, it)| it.until() <= now).map(|(&handoff, _)| handoff).collect();
        for handoff in over {
            match self.waiting.get(&handoff) {
                Some(Waiting::Early { peer, .. }) => {
                    let peer = *peer;
                    self.decline(peer, handoff, "nobody here expects it");
                    self.end_before_it_began(handoff, TransferError::Expired, now);
                }
                Some(Waiting::Expected { .. }) => {
                    self.end_before_it_began(handoff, TransferError::Expired, now);
                }
                Some(Waiting::Over { .. }) | None => {
                    self.waiting.remove(&handoff);
                }
            }
        }
    }

    /// The engine is done, and has pushed everything.
    pub fn finish(&mut self, handoff: HandoffId, payload: Vec<u8>, now: Moment) {
        if let Some(outgoing) = self.outgoing.get_mut(&handoff) {
            outgoing.finished.get_or_insert(now);
            outgoing.stats.head_start = outgoing.computed.map(|since| now.since(since)).unwrap_or_default();
        }
        self.apply_to_sender(handoff, SenderEvent::Finish { payload }, now);
    }

    /// The engine has given up.
    pub fn abandon(&mut self, handoff: HandoffId, reason: String, now: Moment) {
        if let Some(Waiting::Expected { .. }) = self.waiting.get(&handoff) {
            return self.end_before_it_began(handoff, TransferError::Abandoned { reason }, now);
        }
        self.apply_to_sender(handoff, SenderEvent::Abandon { reason }, now);
    }

    /// A message about a handoff of this side; only its own peer may speak of it.
    pub(super) fn hear_of_sender(&mut self, peer: u64, handoff: HandoffId, event: SenderEvent, now: Moment) {
        match self.outgoing.get(&handoff) {
            Some(outgoing) if outgoing.peer == peer => self.apply_to_sender(handoff, event, now),
            Some(_) => self.log(peer, handoff, "it spoke of somebody else's handoff"),
            None => {} // It is over.
        }
    }

    pub(super) fn lose_senders(&mut self, peer: u64, name: &str, reason: &str, now: Moment) {
        let lost = || TransferError::PeerLost { peer: name.to_owned(), reason: reason.to_owned() };
        let waiting: Vec<HandoffId> =
            self.waiting.keys().copied().filter(|&it| self.waits_for(it, peer)).collect();
        for handoff in waiting {
            self.end_before_it_began(handoff, lost(), now);
        }
        let outgoing: Vec<HandoffId> =
            self.outgoing.iter().filter(|(_, it)| it.peer == peer).map(|(&it, _)| it).collect();
        for handoff in outgoing {
            let (peer, reason) = (name.to_owned(), reason.to_owned());
            self.apply_to_sender(handoff, SenderEvent::PeerLost { peer, reason }, now);
        }
    }

    pub(super) fn apply_to_sender(&mut self, handoff: HandoffId, event: SenderEvent, now: Moment) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        let peer = outgoing.peer;
        for action in outgoing.sender.apply(event) {
            match action {
                SenderAction::Send(message) => self.send(peer, message),
                SenderAction::Commit { payload } => self.commit(handoff, payload),
                SenderAction::DropUnposted => {
                    let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
                    let dropped = std::mem::take(&mut outgoing.pending).len();
                    let writes = u32::try_from(dropped).expect("pushed writes are counted in u32");
                    self.apply_to_sender(handoff, SenderEvent::Settled { writes }, now);
                }
                SenderAction::TellStop => self.tell(EndpointEvent::CancelWanted { handoff }),
                SenderAction::TellDelivered => {
                    let stats = self.forget_sender(peer, handoff, now);
                    self.tell(EndpointEvent::Delivered { handoff, stats });
                }
                SenderAction::TellFailed(error) => {
                    self.forget_sender(peer, handoff, now);
                    self.tell(EndpointEvent::SendFailed { handoff, error });
                }
            }
        }
    }

    fn forget_sender(&mut self, peer: u64, handoff: HandoffId, now: Moment) -> HandoffStats {
        if let Some(link) = self.link_mut(peer) {
            link.ended.insert(handoff);
        }
        let Some(mut outgoing) = self.outgoing.remove(&handoff) else { return HandoffStats::default() };
        outgoing.stats.took = outgoing.finished.map(|since| now.since(since)).unwrap_or_default();
        outgoing.stats
    }
}

/// Whether a peer's reservation is one that can be filled, and how.
fn check_reserve(link: &LinkState, reserve: &message::Reserve) -> Result<Bridge, TransferError> {
    let bridge = link.bridge.clone()?;
    let message::Reserve { tokens, first_block, cached, targets, .. } = reserve;
    check_shape(&link.layout, link.blocks, *tokens, *first_block, cached, targets)?;
    let mut blocks: Vec<BlockId> = targets.iter().map(|it| it.block).collect();
    blocks.sort_unstable();
    if blocks.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(TransferError::Invalid { what: "a block is named twice" });
    }
    Ok(bridge)
}

/// Handoffs of which one half may be waiting for the other.
const MAX_WAITING: usize = 8192;
