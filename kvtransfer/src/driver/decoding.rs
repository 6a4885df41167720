//! This side as decode side: reservations, and the proof that what came is what was sent.

use tidemill_kvtransfer_proto::error::{CommitFault, TransferError};
use tidemill_kvtransfer_proto::message::{self, Message, TransportKind};
use tidemill_kvtransfer_proto::reservation::{
    Reservation, ReservationAction, ReservationEvent, ReservationState,
};
use tidemill_kvtransfer_proto::units::HandoffId;

use super::Driver;
use crate::event::{HandoffEvent, Reserve};
use crate::verification::DigestJob;

/// A handoff with this side as decode side.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) peer: u64,
    pub(super) reservation: Reservation,
    /// What is to be said to the peer as soon as it is connected.
    announcement: Option<message::Reserve>,
    /// The way by which writes come.
    via: Option<TransportKind>,
    /// Digests in the making, and what they should be.
    verification: Option<(DigestJob, Vec<u64>)>,
}

impl Incoming {
    /// Whether a connection to the peer would help it on.
    pub(super) fn wants_link(&self) -> bool {
        matches!(self.reservation.state(), ReservationState::Reserved | ReservationState::Quarantined)
    }
}

impl Driver {
    /// The engine sets blocks aside.
    pub(super) fn reserve(&mut self, reserve: Reserve) {
        let (handoff, instance) = (reserve.handoff, reserve.peer_instance);
        if self.incoming.contains_key(&handoff) {
            return tracing::error!(%handoff, "reserved twice");
        }
        let reservation = match self.check_own_reserve(&reserve) {
            Ok(reservation) => reservation,
            Err(error) => {
                self.tell(HandoffEvent::ReserveFailed { handoff, error });
                return self.tell(HandoffEvent::Released { handoff });
            }
        };
        let announcement = message::Reserve {
            handoff,
            tokens: reserve.tokens,
            first_block: reserve.first_block,
            cached: reserve.cached,
            targets: reserve.targets,
            coverage: self.config.coverage,
        };
        let announcement = Some(announcement);
        let incoming = Incoming { peer: instance, reservation, announcement, via: None, verification: None };
        self.incoming.insert(handoff, incoming);
        self.announce(handoff);
    }

    fn check_own_reserve(&self, reserve: &Reserve) -> Result<Reservation, TransferError> {
        if !self.peers.contains_key(&reserve.peer_instance) {
            return Err(TransferError::PeerUnknown { instance: reserve.peer_instance });
        }
        let blocks = (self.config.region.len() / self.shape.block) as u64;
        let mut named = reserve.targets.iter().chain(&reserve.cached);
        if named.any(|it| blocks <= u64::from(it.block.0)) {
            return Err(TransferError::Invalid { what: "a block is outside the region" });
        }
        check_shape(reserve.first_block, reserve.targets.len(), reserve.cached.len())?;
        let needed = reserve.tokens.blocks_to_hold(self.config.layout.block_len).0;
        if u64::from(needed) != u64::from(reserve.first_block) + reserve.targets.len() as u64 {
            return Err(TransferError::Invalid { what: "the blocks are not those that hold the tokens" });
        }
        Reservation::new(reserve.handoff, reserve.tokens, reserve.targets.clone())
    }

    /// Says it to the peer, if that is connected; otherwise it is wanted now, and will be dialled.
    fn announce(&mut self, handoff: HandoffId) {
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let instance = incoming.peer;
        let Some(link) = self.peers.get_mut(&instance).and_then(|peer| peer.link.as_mut()) else { return };
        let Some(announcement) = incoming.announcement.take() else { return };
        incoming.via = Some(link.path.kind());
        self.send(instance, &Message::Reserve(announcement));
        self.apply_to_reservation(handoff, ReservationEvent::Announced);
    }

    /// Announces what had to wait for this peer.
    pub(super) fn announce_waiting(&mut self, instance: u64) {
        for handoff in self.incoming_of(instance) {
            self.announce(handoff);
        }
    }

    /// The peer cannot be reached: what it was never told of is over.
    pub(super) fn fail_unannounced(&mut self, instance: u64, error: &TransferError) {
        let TransferError::PeerLost { peer, reason } = error else { return };
        for handoff in self.incoming_of(instance) {
            if self.incoming[&handoff].reservation.state() == ReservationState::Reserved {
                let (peer, reason) = (peer.clone(), reason.clone());
                self.apply_to_reservation(handoff, ReservationEvent::PeerLost { peer, reason });
            }
        }
    }

    /// The engine took the blocks over.
    pub(super) fn adopt(&mut self, handoff: HandoffId) {
        self.apply_to_reservation(handoff, ReservationEvent::Adopt);
    }

    /// The engine cannot use them.
    pub(super) fn refuse(&mut self, handoff: HandoffId, reason: String) {
        self.apply_to_reservation(handoff, ReservationEvent::Refuse { reason });
    }

    /// The engine does not want them.
    pub(super) fn cancel(&mut self, handoff: HandoffId) {
        self.apply_to_reservation(handoff, ReservationEvent::Cancel);
    }

    /// A message about a reservation; only its own peer may speak of it.
    pub(super) fn hear_of_reservation(&mut self, instance: u64, handoff: HandoffId, event: ReservationEvent) {
        match self.incoming.get(&handoff) {
            Some(incoming) if incoming.peer == instance => self.apply_to_reservation(handoff, event),
            Some(_) => tracing::warn!(%handoff, instance, "a peer spoke of somebody else's reservation"),
            None => tracing::debug!(%handoff, "a message about a reservation that is over"),
        }
    }

    pub(super) fn lose_reservations(&mut self, instance: u64, name: &str, reason: &str) {
        for handoff in self.incoming_of(instance) {
            let (peer, reason) = (name.to_owned(), reason.to_owned());
            self.apply_to_reservation(handoff, ReservationEvent::PeerLost { peer, reason });
        }
    }

    /// The peer is known to touch nothing but the blocks of `busy`.
    pub(super) fn prove_quiet(&mut self, instance: u64, busy: &[HandoffId]) {
        for handoff in self.incoming_of(instance) {
            if !busy.contains(&handoff) {
                self.apply_to_reservation(handoff, ReservationEvent::QuietProven);
            }
        }
    }

    fn incoming_of(&self, instance: u64) -> Vec<HandoffId> {
        self.incoming.iter().filter(|(_, it)| it.peer == instance).map(|(&handoff, _)| handoff).collect()
    }

    fn apply_to_reservation(&mut self, handoff: HandoffId, event: ReservationEvent) {
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let instance = incoming.peer;
        let mut actions = incoming.reservation.apply(event);
        // Over TCP each byte passes the admission of its reservation, in this thread: from the moment that it is
        // not `Filling` nothing can land.
        let is_admitted = incoming.via == Some(TransportKind::Tcp);
        if is_admitted && incoming.reservation.state() == ReservationState::Quarantined {
            actions.extend(incoming.reservation.apply(ReservationEvent::QuietProven));
        }
        for action in actions {
            match action {
                ReservationAction::Send(message) => self.send(instance, &message),
                ReservationAction::Verify(digests) => self.begin_verification(handoff, digests),
                ReservationAction::TellCommitted(payload) => {
                    let tokens = self.incoming[&handoff].reservation.tokens();
                    self.tell(HandoffEvent::Committed { handoff, tokens, payload });
                }
                ReservationAction::TellFailed(error) => {
                    tracing::warn!(%handoff, %error, "handoff failed");
                    self.tell(HandoffEvent::ReserveFailed { handoff, error });
                }
                ReservationAction::TellReleased => {
                    self.incoming.remove(&handoff);
                    self.tell(HandoffEvent::Released { handoff });
                }
                ReservationAction::Forget => {
                    self.incoming.remove(&handoff);
                }
            }
        }
    }

    fn begin_verification(&mut self, handoff: HandoffId, expected: Vec<u64>) {
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let targets = incoming.reservation.targets().to_vec();
        let region = self.config.region.clone();
        let job = DigestJob::new(handoff, self.config.coverage, self.shape, region, targets);
        incoming.verification = Some((job, expected));
        self.verifying.push_back(handoff);
    }

    /// Goes on comparing digests, for one reservation at a time and not for long.
    pub(super) fn compare_digests(&mut self) {
        let Some(handoff) = self.verifying.pop_front() else { return };
        // Given up meanwhile, or a later handoff that already took its name: then there is no job.
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let Some((mut job, expected)) = incoming.verification.take() else { return };
        let Some(digests) = job.advance() else {
            incoming.verification = Some((job, expected));
            return self.verifying.push_back(handoff);
        };
        let differs = digests.iter().zip(&expected).position(|(ours, theirs)| ours != theirs);
        let outcome = match differs {
            None => Ok(()),
            Some(index) => Err(CommitFault::Digest { index }),
        };
        self.apply_to_reservation(handoff, ReservationEvent::Verified { outcome });
    }
}

/// What must hold of a reservation whatever the layout, on either side.
pub(super) fn check_shape(first_block: u32, targets: usize, cached: usize) -> Result<(), TransferError> {
    if targets == 0 {
        return Err(TransferError::Invalid { what: "no block is to be filled" });
    }
    if first_block < u32::try_from(cached).unwrap_or(u32::MAX) {
        return Err(TransferError::Invalid {
            what: "more blocks are cached than come before the first target",
        });
    }
    Ok(())
}
