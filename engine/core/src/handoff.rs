//! What handoffs mean for sequences and blocks, on both sides.
//!
//! One rule: a block that a peer or a sender may still touch is nobody else's until the driver says that it is
//! quiet. Reservations that fail are therefore quarantined, with the cached blocks in front of them that a peer in
//! the same machine may be reading; prefills that end, in whatever way, keep their blocks until they are pushed.

use std::time::Duration;

use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId, TokenCount};

use crate::request::{Part, RequestId, TokenId};
use crate::scheduler::{Outcome, Scheduler};
use crate::sequence::{Place, Sequence, Stage};

/// Blocks that wait for a peer's KV cache, to be announced to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Which request.
    pub request: RequestId,
    /// Which handoff.
    pub handoff: HandoffId,
    /// Blocks that hold the first tokens already. They stay unchanged until the handoff has ended.
    pub cached: Vec<BlockRef>,
    /// Blocks to be filled, in order of position behind `cached`.
    pub targets: Vec<BlockRef>,
    /// Tokens whose keys and values are wanted, counted from the first one of `cached`.
    pub tokens: TokenCount,
}

/// What is left to do for a request that was cancelled or whose handoff failed.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// There is no such request.
    Unknown,
    /// Nothing: it is gone.
    Done,
    /// Its blocks were announced to a peer: prove that no write can land, then call [`Scheduler::quiet`].
    Quarantined(HandoffId),
    /// Its blocks, here or at the peer, are in a sender's hands: stop that, then call [`Scheduler::pushed`].
    Pushing(HandoffId),
}

impl Reservation {
    /// How soon its KV cache is wanted, for the order among handoffs whose bytes come at the same time. A short prompt is
    /// computed sooner, and is to be answered sooner, than a long one that came a little earlier; but no stream of
    /// short ones overtakes a long one for ever.
    pub fn within(&self) -> Duration {
        TIME_PER_TOKEN * self.tokens.0
    }
}

impl Scheduler {
    /// Ends a request at any stage. Comes the call while a step computes, the step's result for it is ignored.
    pub fn cancel(&mut self, id: RequestId) -> Cancelled {
        let Some(sequence) = self.roster.get(id) else { return Cancelled::Unknown };
        match (sequence.stage, sequence.request.part) {
            (Stage::Reserved, _) => self.end_reservation(id),
            (Stage::Running | Stage::Pushing, Part::PrefillFor(handoff)) => {
                self.roster.move_to(id, Stage::Pushing);
                Cancelled::Pushing(handoff)
            }
            _ => {
                self.let_go(id);
                Cancelled::Done
            }
        }
    }

    /// The reservations made since the last call. From now on a peer may know their blocks.
    pub fn take_reservations(&mut self) -> Vec<Reservation> {
        let ids = std::mem::take(&mut self.unannounced);
        ids.into_iter()
            .map(|id| {
                let sequence = self.roster.get(id).expect("an unannounced reservation has its sequence");
                let (cached, targets) = sequence.blocks.split_at(sequence.pinned);
                Reservation {
                    request: id,
                    handoff: decode_from(sequence),
                    cached: cached.to_vec(),
                    targets: targets.to_vec(),
                    tokens: sequence.known(),
                }
            })
            .collect()
    }

    /// The peer's KV cache is complete and verified: the request runs here from now on, like any other. The outcome
    /// carries the first token, which the peer has sampled and reported. `None` when the request has no reservation
    /// any more.
    pub fn adopt(&mut self, id: RequestId, first_token: TokenId) -> Option<Outcome> {
        let sequence = self.roster.get_mut(id).filter(|sequence| sequence.stage == Stage::Reserved)?;
        self.pool.adopt(&sequence.blocks[sequence.pinned..]);
        sequence.computed = sequence.known();
        sequence.request.part = Part::Whole;
        self.unannounced.retain(|other| *other != id);
        self.roster.move_to(id, Stage::Running);
        self.index_full_blocks(id, TokenCount(0));
        Some(self.append(id, first_token))
    }

    /// The handoff will not complete. The request is gone; its blocks too, unless they were announced.
    pub fn reservation_failed(&mut self, id: RequestId) -> Cancelled {
        match self.roster.get(id).map(Sequence::stage) {
            Some(Stage::Reserved) => self.end_reservation(id),
            _ => Cancelled::Unknown,
        }
    }

    /// It is proven that the peer neither reads nor writes blocks of this handoff any more. Does nothing when none
    /// are quarantined.
    pub fn quiet(&mut self, handoff: HandoffId) {
        if let Some(quarantine) = self.quarantines.remove(&handoff) {
            self.pool.settle(&quarantine.targets);
            self.pool.release(&quarantine.pinned);
        }
    }

    /// The peer's blocks cannot be computed in: the prefill computes in own blocks and is sent. False when the
    /// request does not wait for this.
    pub fn use_own_blocks(&mut self, id: RequestId) -> bool {
        let Some(sequence) = self.awaiting_targets(id) else { return false };
        sequence.place = Place::OwnBlocks;
        self.roster.move_to(id, Stage::Waiting);
        true
    }

    /// The peer's blocks are known and can be computed in; the first `cached` tokens are there already. False when
    /// the request does not wait for this.
    ///
    /// # Panics
    ///
    /// When `cached` leaves nothing to compute.
    pub fn use_targets(&mut self, id: RequestId, cached: TokenCount) -> bool {
        let Some(sequence) = self.awaiting_targets(id) else { return false };
        assert!(cached < sequence.known(), "the last token of a prompt is always computed");
        sequence.computed = cached;
        sequence.cached = Some(cached);
        self.roster.move_to(id, Stage::Waiting);
        true
    }

    /// The sender of a prefill is quiet: the KV cache was delivered, or the attempt is over. The blocks go to the
    /// prefix cache and the request is gone. False when there is no such request.
    ///
    /// # Panics
    ///
    /// When the prefill still computes: cancel it first.
    pub fn pushed(&mut self, id: RequestId) -> bool {
        let Some(sequence) = self.roster.get(id) else { return false };
        assert_eq!(sequence.stage, Stage::Pushing, "a prefill ends or is cancelled before it is pushed");
        self.let_go(id);
        true
    }

    /// When nothing can go on here for want of blocks: the prefills that hold them for a sender, latest first.
    ///
    /// That may be mere back pressure. But two workers that take two requests in opposite order can also wait for
    /// each other: this one has computed the second and waits for the peer's blocks, while the peer has reserved them
    /// for the first, which finds no blocks here. If it lasts, the driver should therefore abandon the first of these
    /// whose peer has reserved nothing yet: [`cancel`](Self::cancel), then [`pushed`](Self::pushed), and the router
    /// starts it anew.
    pub fn blocked_by_handoffs(&self) -> Vec<RequestId> {
        let wants_blocks =
            self.roster.in_stage(Stage::Waiting).chain(self.roster.in_stage(Stage::Running)).next();
        if wants_blocks.is_none() || !self.plan().is_empty() {
            return Vec::new();
        }
        let pushing = self.roster.in_stage(Stage::Pushing).rev();
        pushing.filter(|sequence| !sequence.blocks.is_empty()).map(Sequence::id).collect()
    }

    fn awaiting_targets(&mut self, id: RequestId) -> Option<&mut Sequence> {
        self.roster.get_mut(id).filter(|sequence| sequence.stage == Stage::AwaitingTargets)
    }

    fn end_reservation(&mut self, id: RequestId) -> Cancelled {
        let sequence = self.roster.remove(id).expect("the caller has just seen it");
        let handoff = decode_from(&sequence);
        let (pinned, targets) = sequence.blocks.split_at(sequence.pinned);
        if let Some(place) = self.unannounced.iter().position(|other| *other == id) {
            self.unannounced.remove(place);
            self.pool.unreserve(targets);
            self.pool.release(pinned);
            return Cancelled::Done;
        }
        self.pool.quarantine(targets);
        let quarantine = self.quarantines.entry(handoff).or_default();
        quarantine.targets.extend(targets);
        quarantine.pinned.extend(pinned);
        Cancelled::Quarantined(handoff)
    }
}

fn decode_from(sequence: &Sequence) -> HandoffId {
    match sequence.request.part {
        Part::DecodeFrom(handoff) => handoff,
        other => panic!("a reservation decodes from a peer, not {other:?}"),
    }
}

/// About what a prompt's token takes to compute. Only the order that comes of it counts, so it need not be exact.
const TIME_PER_TOKEN: Duration = Duration::from_millis(1);
