//! Credit, on both sides of a handoff: who asks for it and when, and to whom it is given.

use super::writing::WriteSource;
use super::{EndpointCore, QuietProof};
use crate::credit::Ask;
use crate::message::Message;
use crate::sender::SenderState;
use crate::units::{HandoffId, Moment};

impl QuietProof {
    /// Whether bytes that come this way share a port with those of others, so that they need leave. A process of this
    /// host copies by itself, and computes in place: nothing queues up for it.
    pub const fn takes_credit(self) -> bool {
        match self {
            Self::Admission | Self::AccessEnded => true,
            Self::Process => false,
        }
    }
}

/// Decode side.
impl<S: WriteSource> EndpointCore<S> {
    /// The peer is about to hear of a reservation.
    pub(super) fn open_credit(&mut self, handoff: HandoffId) {
        let Some(incoming) = self.incoming.get(&handoff) else { return };
        if incoming.proof().is_some_and(QuietProof::takes_credit) {
            let size = (incoming.targets() * self.shape.block) as u64;
            self.credit.open(handoff, incoming.peer, incoming.deadline, size);
        }
    }

    /// It was given up, but bytes of it may be under way.
    pub(super) fn stop_credit(&mut self, handoff: HandoffId) {
        self.credit.stop(handoff);
        self.grant();
    }

    /// No byte of it is under way any more.
    pub(super) fn close_credit(&mut self, handoff: HandoffId) {
        self.credit.close(handoff);
        self.grant();
    }

    pub(super) fn hear_ask(&mut self, peer: u64, handoff: HandoffId, ask: Ask, now: Moment) {
        if self.incoming.get(&handoff).is_some_and(|it| it.peer != peer) {
            return self.log(peer, handoff, "it asked for somebody else's credit");
        }
        if self.incoming.get(&handoff).is_some_and(|it| it.pull.is_some()) {
            return self.log(peer, handoff, "it asked for leave to write what is read");
        }
        match self.credit.ask(handoff, ask) {
            Ok(()) => self.grant(),
            Err(fault) => self.link_lost(peer, &format!("the peer broke the protocol: {fault}"), now),
        }
    }

    /// Gives leave to those whose turn it is.
    pub(super) fn grant(&mut self) {
        while let Some(grant) = self.credit.next_grant() {
            if self.takes_grant(grant.handoff, grant.bytes) {
                continue; // It is for a read of this side.
            }
            self.send(grant.peer, Message::Grant { handoff: grant.handoff, bytes: grant.bytes });
        }
    }

    /// Whether a peer keeps others waiting for what it does not use. A correct one ends a way that stands still for a
    /// stall by itself.
    pub(super) fn is_hoarding(&mut self, peer: u64, now: Moment) -> bool {
        self.credit.is_standing_still(peer, 2 * self.rules.stall, now)
    }
}

/// Prefill side.
impl<S: WriteSource> EndpointCore<S> {
    /// Says what the receiver should know, if anything.
    pub(super) fn ask_for_credit(&mut self, handoff: HandoffId) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        // Afterwards its commit, or its word that it is quiet, says it all.
        if !matches!(outgoing.sender.state(), SenderState::Computing | SenderState::Pushing) {
            return;
        }
        let peer = outgoing.peer;
        if let Some(ask) = outgoing.credit.as_mut().and_then(|credit| credit.take_ask()) {
            self.send(peer, Message::Ask { handoff, ask });
        }
    }

    pub(super) fn hear_grant(&mut self, peer: u64, handoff: HandoffId, bytes: u64) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return }; // It is over.
        let is_its_own = outgoing.peer == peer;
        if !is_its_own || !outgoing.credit.as_mut().is_some_and(|credit| credit.grant(bytes)) {
            return self.log(peer, handoff, "it granted what was not asked for");
        }
        self.queue_writes(handoff);
        self.ask_for_credit(handoff);
    }
}
