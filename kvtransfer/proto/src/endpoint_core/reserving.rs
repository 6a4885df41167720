//! This side as decode side: reservations, from the engine's order to adoption or release.

use std::time::Duration;

use super::fetching::Pull;
use super::writing::WriteSource;
use super::{
    DigestOrder, DigestTicket, EndpointCore, EndpointEvent, LinkId, QuietProof, ReserveOrder, check_shape,
};
use crate::digest::Coverage;
use crate::error::{CommitFault, TransferError};
use crate::layout::Bridge;
use crate::message::{self, Message};
use crate::reservation::{Reservation, ReservationAction, ReservationEvent, ReservationState};
use crate::transport::{RemoteRange, WriteFault};
use crate::units::{HandoffId, Moment};

/// A handoff with this side as decode side.
#[derive(Clone, Debug)]
pub(super) struct Incoming {
    pub(super) peer: u64,
    pub(super) reservation: Reservation,
    /// What is to be said to the peer as soon as it is connected.
    announcement: Option<message::Reserve>,
    /// The link over which it was said and writes come.
    via: Option<(LinkId, QuietProof)>,
    /// What this side reads, where it reads.
    pub(super) pull: Option<Pull>,
    /// Digests in the making.
    verifications: Vec<Verification>,
    /// Whether the peer says that it computed in the blocks, and can have done so.
    in_place: bool,
    /// Whether the peer's device writes into blocks of this side's.
    on_device: bool,
    /// When it is wanted.
    pub(super) deadline: Moment,
}

/// Digests in the making, and what they should be.
#[derive(Clone, Debug)]
struct Verification {
    ticket: DigestTicket,
    /// Position of the first block among the targets.
    first: usize,
    expected: Vec<u64>,
}

impl Incoming {
    /// Whether a connection to the peer would help it on.
    pub(super) fn wants_link(&self) -> bool {
        match self.reservation.state() {
            ReservationState::Reserved => true,
            ReservationState::Quarantined => self.proof() != Some(QuietProof::AccessEnded),
            ReservationState::Filling | ReservationState::Committed | ReservationState::Released => false,
        }
    }

    pub(super) fn verifies(&self, ticket: DigestTicket) -> bool {
        self.verifications.iter().any(|it| it.ticket == ticket)
    }

    /// Bytes that the peer has to write.
    pub(super) fn targets(&self) -> usize {
        self.reservation.targets().len()
    }

    /// Whether the peer may still write.
    pub(super) fn is_filling(&self) -> bool {
        self.reservation.state() == ReservationState::Filling
    }

    pub(super) fn link(&self) -> Option<LinkId> {
        self.via.map(|(link, _)| link)
    }

    pub(super) fn proof(&self) -> Option<QuietProof> {
        self.via.map(|(_, proof)| proof)
    }
}

impl<S: WriteSource> EndpointCore<S> {
    /// The engine sets blocks aside.
    pub fn reserve(&mut self, order: ReserveOrder, now: Moment) {
        let ReserveOrder { handoff, peer, .. } = order;
        if self.incoming.contains_key(&handoff) {
            return self.log(0, handoff, "it was reserved twice");
        }
        let reservation = match self.check_own_reserve(&order) {
            Ok(reservation) => reservation,
            Err(error) => {
                self.tell(EndpointEvent::ReserveFailed { handoff, error });
                return self.tell(EndpointEvent::Released { handoff });
            }
        };
        let announcement = Some(message::Reserve {
            handoff,
            tokens: order.tokens,
            first_block: order.first_block,
            cached: order.cached,
            targets: order.targets,
            coverage: self.rules.coverage,
        });
        let incoming = Incoming {
            peer,
            reservation,
            announcement,
            via: None,
            pull: None,
            verifications: Vec::new(),
            in_place: false,
            on_device: false,
            deadline: now.plus(order.within.min(LATEST)),
        };
        self.incoming.insert(handoff, incoming);
        self.announce(handoff);
    }

    fn check_own_reserve(&self, order: &ReserveOrder) -> Result<Reservation, TransferError> {
        if !self.knows(order.peer) {
            return Err(TransferError::PeerUnknown { instance: order.peer });
        }
        let ReserveOrder { tokens, first_block, cached, targets, .. } = order;
        check_shape(&self.rules.layout, self.rules.blocks, *tokens, *first_block, cached, targets)?;
        Reservation::new(order.handoff, *tokens, targets.clone())
    }

    /// Says it to the peer, if that is connected; otherwise a link is wanted now.
    fn announce(&mut self, handoff: HandoffId) {
        let Some(peer) = self.incoming.get(&handoff).map(|it| it.peer) else { return };
        let Some(link) = self.link(peer) else { return };
        let (via, on_device) = (Some((link.id, link.proof)), link.by_device.from_peer);
        let pulls = self.rules.pulls && link.proof == QuietProof::AccessEnded;
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let Some(announcement) = incoming.announcement.take() else { return };
        incoming.via = via;
        incoming.on_device = on_device;
        incoming.pull = pulls.then(Pull::default);
        self.open_credit(handoff);
        self.send(peer, Message::Reserve(announcement));
        let event = if pulls { ReservationEvent::AnnouncedToRead } else { ReservationEvent::Announced };
        self.apply_to_reservation(handoff, event);
    }

    /// Announces what had to wait for this peer.
    pub(super) fn announce_waiting(&mut self, peer: u64) {
        for handoff in self.incoming_of(peer) {
            self.announce(handoff);
        }
    }

    pub(super) fn lose_unannounced(&mut self, peer: u64, name: &str, reason: &str) {
        for handoff in self.incoming_of(peer) {
            if self.incoming[&handoff].reservation.state() == ReservationState::Reserved {
                let (peer, reason) = (name.to_owned(), reason.to_owned());
                self.apply_to_reservation(handoff, ReservationEvent::PeerLost { peer, reason });
            }
        }
    }

    /// The engine took the blocks over.
    pub fn adopt(&mut self, handoff: HandoffId) {
        self.apply_to_reservation(handoff, ReservationEvent::Adopt);
    }

    /// The engine cannot use them.
    pub fn refuse(&mut self, handoff: HandoffId, reason: String) {
        self.apply_to_reservation(handoff, ReservationEvent::Refuse { reason });
    }

    /// The engine does not want them.
    pub fn cancel(&mut self, handoff: HandoffId) {
        self.apply_to_reservation(handoff, ReservationEvent::Cancel);
    }

    /// Whether a write of the peer may land.
    ///
    /// # Errors
    ///
    /// Names the rule that the write breaks. No byte of it may be stored.
    pub fn admit(&self, peer: u64, range: &RemoteRange) -> Result<(), WriteFault> {
        let incoming = self.incoming.get(&range.handoff).filter(|it| it.peer == peer);
        incoming.ok_or(WriteFault::NotExpected)?.reservation.admit(range, self.shape.block)
    }

    /// Where a reservation stands; `None` when it is over.
    pub fn reservation_state(&self, handoff: HandoffId) -> Option<ReservationState> {
        self.incoming.get(&handoff).map(|it| it.reservation.state())
    }

    /// A message about a reservation; only its own peer may speak of it.
    pub(super) fn hear_of_reservation(&mut self, peer: u64, handoff: HandoffId, event: ReservationEvent) {
        let Some(incoming) = self.incoming.get(&handoff) else { return };
        if incoming.peer != peer {
            return self.log(peer, handoff, "it spoke of somebody else's reservation");
        }
        let speaks_of_quiet =
            matches!(event, ReservationEvent::Quiet { .. } | ReservationEvent::Declined { .. });
        if speaks_of_quiet && !self.may_vouch(incoming) {
            return;
        }
        self.apply_to_reservation(handoff, event);
    }

    /// Blocks are final, ahead of the commit. Only blocks that the peer computes in can be: what is written comes by ways
    /// that do not end before the commit.
    pub(super) fn hear_filled(&mut self, peer: u64, filled: message::Filled) {
        let handoff = filled.handoff;
        if !self.can_compute_here(peer) {
            return self.log(peer, handoff, "it named blocks ahead that it cannot have computed in");
        }
        if let Some(incoming) = self.incoming.get_mut(&handoff).filter(|it| it.peer == peer) {
            incoming.in_place = true;
        }
        self.hear_of_reservation(peer, handoff, ReservationEvent::Filled(filled));
    }

    /// Notes whether a commit is about blocks that were computed in.
    pub(super) fn note_in_place(&mut self, peer: u64, commit: &message::Commit) {
        let is_possible = self.can_compute_here(peer);
        if let Some(incoming) = self.incoming.get_mut(&commit.handoff).filter(|it| it.peer == peer) {
            incoming.in_place = commit.in_place && is_possible;
        }
    }

    /// Whether the peer can compute in this side's blocks: it has them mapped, and has an equal layout.
    fn can_compute_here(&self, peer: u64) -> bool {
        let link = self.link(peer);
        link.is_some_and(|it| it.proof == QuietProof::Process && it.bridge == Ok(Bridge::Identical))
    }

    /// Whether the peer can know that nothing of it will land any more.
    fn may_vouch(&self, incoming: &Incoming) -> bool {
        incoming.proof() != Some(QuietProof::AccessEnded)
            || self.link(incoming.peer).map(|link| link.id) == incoming.link()
    }

    pub(super) fn lose_reservations(&mut self, peer: u64, name: &str, reason: &str) {
        // First, so that what one of them gives back is not given to the next.
        for handoff in self.incoming_of(peer) {
            self.credit.stop(handoff);
        }
        for handoff in self.incoming_of(peer) {
            let (peer, reason) = (name.to_owned(), reason.to_owned());
            self.apply_to_reservation(handoff, ReservationEvent::PeerLost { peer, reason });
        }
    }

    /// The peer says that it touches nothing but the blocks of `busy`.
    pub(super) fn take_word_of_quiet(&mut self, peer: u64, busy: &[HandoffId]) {
        for handoff in self.incoming_of(peer) {
            if !busy.contains(&handoff) && self.may_vouch(&self.incoming[&handoff]) {
                self.apply_to_reservation(handoff, ReservationEvent::QuietProven);
            }
        }
    }

    /// This side has proof of its own.
    pub(super) fn prove_quiet(&mut self, peer: u64, concerns: impl Fn(&Incoming) -> bool) {
        for handoff in self.incoming_of(peer) {
            if concerns(&self.incoming[&handoff]) {
                self.apply_to_reservation(handoff, ReservationEvent::QuietProven);
            }
        }
    }

    fn incoming_of(&self, peer: u64) -> Vec<HandoffId> {
        self.incoming.iter().filter(|(_, it)| it.peer == peer).map(|(&handoff, _)| handoff).collect()
    }

    pub(super) fn apply_to_reservation(&mut self, handoff: HandoffId, event: ReservationEvent) {
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let peer = incoming.peer;
        // Whoever commits has written everything, or knows that it was read.
        let is_written = matches!(event, ReservationEvent::Commit(_)) && incoming.reservation.reads() == 0;
        let mut actions = incoming.reservation.apply(event);
        // From the moment that it is not `Filling` its admission lets nothing land.
        let is_admitted = incoming.proof() == Some(QuietProof::Admission);
        if is_admitted && incoming.reservation.state() == ReservationState::Quarantined {
            actions.extend(incoming.reservation.apply(ReservationEvent::QuietProven));
        }
        let still_fills = incoming.is_filling() && !is_written;
        if !incoming.is_filling()
            && let Some(dropped) = incoming.pull.as_mut().map(Pull::drop_pending).filter(|it| 0 < *it)
        {
            actions.extend(incoming.reservation.apply(ReservationEvent::Read { pieces: dropped }));
        }
        for action in actions {
            match action {
                ReservationAction::Send(message) => self.send(peer, message),
                ReservationAction::Verify { first, digests } => {
                    self.begin_verification(handoff, first, digests);
                }
                ReservationAction::TellCommitted(payload) => {
                    let incoming = &self.incoming[&handoff];
                    let (tokens, on_device) = (incoming.reservation.tokens(), incoming.on_device);
                    self.tell(EndpointEvent::Committed { handoff, tokens, payload, on_device });
                }
                ReservationAction::TellFailed(error) => {
                    self.tell(EndpointEvent::ReserveFailed { handoff, error });
                }
                ReservationAction::TellReleased => {
                    self.say_fetched(handoff);
                    self.incoming.remove(&handoff);
                    self.tell(EndpointEvent::Released { handoff });
                }
                ReservationAction::Forget => {
                    self.incoming.remove(&handoff);
                }
            }
        }
        if is_written || !self.incoming.contains_key(&handoff) {
            self.close_credit(handoff);
        } else if !still_fills {
            self.stop_credit(handoff);
        }
    }

    fn begin_verification(&mut self, handoff: HandoffId, first: usize, expected: Vec<u64>) {
        let Some(incoming) = self.incoming.get(&handoff) else { return };
        let all = incoming.targets();
        let targets = incoming.reservation.targets()[first..first + expected.len()].to_vec();
        let (coverage, shape) = (self.rules.coverage, self.shape);
        let (spots, on_device) = (incoming.in_place && coverage == Coverage::Sampled, incoming.on_device);
        let ticket = self.order_digests(|ticket| DigestOrder {
            ticket,
            handoff,
            owner: None,
            on_device,
            coverage,
            shape,
            targets,
            first,
            all,
            spots,
        });
        if let Some(incoming) = self.incoming.get_mut(&handoff) {
            incoming.verifications.push(Verification { ticket, first, expected });
        }
    }

    pub(super) fn compare(&mut self, handoff: HandoffId, ticket: DigestTicket, digests: &[u64]) {
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let Some(place) = incoming.verifications.iter().position(|it| it.ticket == ticket) else { return };
        let Verification { first, expected, .. } = incoming.verifications.remove(place);
        let longer = digests.len().max(expected.len());
        let differs = (0..longer).find(|&index| digests.get(index) != expected.get(index));
        let outcome = match differs {
            None => Ok(()),
            Some(index) => Err(CommitFault::Digest { index: first + index }),
        };
        let targets = expected.len();
        self.apply_to_reservation(handoff, ReservationEvent::Verified { targets, outcome });
    }
}

/// What is wanted later than that is wanted at some time.
const LATEST: Duration = Duration::from_secs(3600);
