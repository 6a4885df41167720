//! Handoffs that the decode side reads, where no device of a peer may write into its memory.
//!
//! ```text
//! prefill side                                   decode side
//!   pushed: offers finished pieces ── Offer ───►   admits them as if they were writes, and reads them, by deadline,
//!                                                  into blocks that nobody else touches
//!   counts them as settled         ◄─ Fetched ──   when none is being read any more, or ever will be
//!   everything is settled          ── Commit ──►   compares digests
//! ```
//!
//! What was offered may be read at any moment. So the prefill side counts it as unsettled, and keeps its blocks, until
//! the decode side says that it has done, or until that is proven: the queue pairs of the connection are gone and the
//! peer's key with them. The decode side knows by itself when its reads have ended.
//!
//! Where layouts differ, what is offered are copies, converted into the end of the prefill side's region. The sources that
//! are held here keep their places from being used for others; the engine hears when some have become free.

use std::collections::VecDeque;
use std::time::Duration;

use super::writing::WriteSource;
use super::{Direction, EndpointCore, EndpointEvent, LinkId, PostedWrite};
use crate::credit::CreditLine;
use crate::message::{Message, Offered, Piece};
use crate::reservation::ReservationEvent;
use crate::sender::SenderEvent;
use crate::transport::{Post, RemoteRange, WriteFault, WriteId};
use crate::units::{HandoffId, Moment};

/// Prefill side: what the peer may read of one handoff.
#[derive(Clone, Debug)]
pub(super) struct Offers<S> {
    /// The link over which it reads.
    link: LinkId,
    offered: u64,
    /// The last of them, which it may be reading, and since when.
    open: VecDeque<(S, Moment)>,
    /// Whether they are copies that were made for it.
    is_staged: bool,
}

/// Decode side: what this side reads of one handoff.
#[derive(Clone, Debug, Default)]
pub(super) struct Pull {
    /// Admitted, not posted.
    pending: VecDeque<Piece>,
    /// Leave to post them.
    credit: CreditLine,
    /// Whether the link knows that some can be posted.
    is_posting: bool,
    /// Pieces that were offered.
    offered: u64,
    /// How many of them the peer knows to be done with.
    told: u64,
}

/// Reads of one handoff that have ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fetched {
    pieces: u64,
    bytes: u64,
}

impl<S: WriteSource> Offers<S> {
    pub(super) fn over(link: LinkId, is_staged: bool) -> Self {
        Self { link, offered: 0, open: VecDeque::new(), is_staged }
    }

    /// How many it reads no more.
    fn ended(&self) -> u64 {
        self.offered - self.open.len() as u64
    }

    /// It reads only those behind the first `pieces` ones. Lets go of the others, and returns how many there are.
    fn end(&mut self, pieces: u64) -> u32 {
        let ended = usize::try_from(pieces - self.ended()).expect("of those that are open");
        self.open.drain(..ended);
        u32::try_from(ended).expect("pushed writes are counted in u32")
    }

    /// Offers ranges of the peer's memory with what is to be read for each; `None` when a source is not in the region.
    pub(super) fn take(
        &mut self,
        handoff: HandoffId,
        ranges: &[(S, RemoteRange)],
        now: Moment,
    ) -> Option<Offered> {
        let piece = |(source, range): &(S, RemoteRange)| {
            let RemoteRange { offset: target, len, stamp, .. } = *range;
            Some(Piece { source: source.in_region()?, target, len, stamp })
        };
        let pieces: Vec<Piece> = ranges.iter().map(piece).collect::<Option<_>>()?;
        let before = self.offered;
        self.offered += pieces.len() as u64;
        self.open.extend(ranges.iter().map(|(source, _)| (source.clone(), now)));
        Some(Offered { handoff, before, pieces })
    }
}

impl Pull {
    fn may_post(&self) -> bool {
        self.pending.front().is_some_and(|piece| self.credit.covers(piece.len.into()))
    }

    /// Nothing more is read; how many pieces were not posted.
    pub(super) fn drop_pending(&mut self) -> u64 {
        std::mem::take(&mut self.pending).len() as u64
    }
}

impl Fetched {
    pub(super) fn add(&mut self, bytes: u64) {
        self.pieces += 1;
        self.bytes += bytes;
    }
}

/// Prefill side.
impl<S: WriteSource> EndpointCore<S> {
    /// Whether that peer has left something that it was offered for longer than it may.
    pub(super) fn leaves_offers(&self, peer: u64, now: Moment) -> bool {
        let Some(link) = self.link(peer).filter(|link| link.is_read_by_peer) else { return false };
        let offers = self.outgoing.values().filter(|it| it.peer == peer).filter_map(|it| it.offers.as_ref());
        let oldest = offers.filter(|it| it.link == link.id).filter_map(|it| it.open.front());
        oldest.into_iter().any(|(_, since)| self.rules.offers < now.since(*since))
    }

    /// This side did not run for that long, and could not hear that something was read.
    pub(super) fn offers_stood_still(&mut self, lateness: Duration, now: Moment) {
        let offers = self.outgoing.values_mut().filter_map(|it| it.offers.as_mut());
        for (_, since) in offers.flat_map(|it| it.open.iter_mut()) {
            *since = since.plus(lateness).min(now);
        }
    }

    /// Says it, in frames of bounded length.
    pub(super) fn send_offer(&mut self, handoff: HandoffId, offer: &Offered) {
        let Some(peer) = self.outgoing.get(&handoff).map(|it| it.peer) else { return };
        let mut before = offer.before;
        for pieces in offer.pieces.chunks(LONGEST_OFFER) {
            let message = Message::Offer(Offered { handoff, before, pieces: pieces.to_vec() });
            before += pieces.len() as u64;
            self.send(peer, message);
        }
    }

    /// The peer has done with so many pieces.
    pub(super) fn hear_fetched(&mut self, peer: u64, handoff: HandoffId, pieces: u64, now: Moment) {
        let link = self.link(peer).map(|link| link.id);
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return }; // It is over.
        let is_its_own = outgoing.peer == peer;
        let is_sound = |it: &&mut Offers<S>| {
            is_its_own && Some(it.link) == link && it.ended() <= pieces && pieces <= it.offered
        };
        let Some(offers) = outgoing.offers.as_mut().filter(is_sound) else {
            return self.log(peer, handoff, "it fetched what was not offered");
        };
        let (writes, is_staged) = (offers.end(pieces), offers.is_staged);
        self.offers_ended(handoff, writes, is_staged, now);
    }

    fn offers_ended(&mut self, handoff: HandoffId, writes: u32, is_staged: bool, now: Moment) {
        if is_staged && 0 < writes {
            self.tell(EndpointEvent::Fetched { handoff });
        }
        self.apply_to_sender(handoff, SenderEvent::Settled { writes }, now);
    }

    /// Nothing that was offered over that link can be read any more.
    pub(super) fn end_offers(&mut self, peer: u64, link: LinkId, now: Moment) {
        let mut settled = Vec::new();
        for (&handoff, outgoing) in self.outgoing.iter_mut().filter(|(_, it)| it.peer == peer) {
            if let Some(offers) = outgoing.offers.as_mut().filter(|it| it.link == link) {
                settled.push((handoff, offers.end(offers.offered), offers.is_staged));
            }
        }
        for (handoff, writes, is_staged) in settled {
            self.offers_ended(handoff, writes, is_staged, now);
        }
    }
}

/// Decode side.
impl<S: WriteSource> EndpointCore<S> {
    /// The peer has bytes that can be read.
    pub(super) fn hear_offer(&mut self, peer: u64, offered: Offered, now: Moment) {
        let Offered { handoff, before, pieces } = offered;
        let Some(link) = self.link(peer) else { return };
        let (link, their_bytes) = (link.id, link.region_bytes);
        let offered = before.saturating_add(pieces.len() as u64);
        let block = self.shape.block;
        let Some(incoming) = self.incoming.get_mut(&handoff) else {
            // It is over, and nothing of it will be read.
            return self.send(peer, Message::Fetched { handoff, pieces: offered });
        };
        if incoming.peer != peer {
            return self.log(peer, handoff, "it offered for somebody else's reservation");
        }
        let is_here = incoming.link() == Some(link);
        let Some(pull) = incoming.pull.as_mut().filter(|it| is_here && it.offered == before) else {
            return self.break_off(peer, "it offered what nobody reads, or out of order", now);
        };
        let reservation = &incoming.reservation;
        let fault = pieces.iter().find_map(|piece| {
            let Piece { source, target: offset, len, stamp } = *piece;
            let is_theirs = source.checked_add(len.into()).is_some_and(|end| end <= their_bytes);
            let admitted = reservation.admit(&RemoteRange { handoff, offset, len, stamp }, block);
            admitted.err().or((!is_theirs).then_some(WriteFault::Outside))
        });
        match fault {
            None => {
                pull.offered = offered;
                pull.credit.push(pieces.iter().map(|piece| piece.len.into()));
                let count = pieces.len() as u64;
                pull.pending.extend(pieces);
                self.apply_to_reservation(handoff, ReservationEvent::Reading { pieces: count });
                self.ask_for_own_credit(handoff, now);
            }
            // It was given up, and the peer has yet to hear of that.
            Some(WriteFault::NotExpected) => {
                pull.offered = offered;
                self.say_fetched(handoff);
            }
            Some(fault) => self.break_off(peer, &format!("an offer is not acceptable: {fault}"), now),
        }
    }

    fn break_off(&mut self, peer: u64, why: &str, now: Moment) {
        self.link_lost(peer, &format!("the peer broke the protocol: {why}"), now);
    }

    /// Tells the pool what a handoff would like to read, and what it has read.
    fn ask_for_own_credit(&mut self, handoff: HandoffId, now: Moment) {
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let (peer, Some(pull)) = (incoming.peer, &mut incoming.pull) else { return };
        if let Some(ask) = pull.credit.take_ask()
            && let Err(fault) = self.credit.ask(handoff, ask)
        {
            return self.break_off(peer, &format!("it offered more than was reserved: {fault}"), now);
        }
        self.grant();
    }

    /// Whether leave is for a read of this side, which can be posted now.
    pub(super) fn takes_grant(&mut self, handoff: HandoffId, bytes: u64) -> bool {
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return false };
        let (peer, via, Some(pull)) = (incoming.peer, incoming.link(), &mut incoming.pull) else {
            return false;
        };
        let is_new = pull.credit.grant(bytes);
        debug_assert!(is_new, "the pool grants what was asked for");
        let link = self.peers.get_mut(&peer).and_then(|it| it.link.as_mut());
        if let Some(link) = link.filter(|it| Some(it.id) == via && !pull.is_posting && pull.may_post()) {
            pull.is_posting = true;
            link.fetching.push_back(handoff);
        }
        true
    }

    /// Whether reads from that peer wait to be posted that may be.
    pub fn has_reads_from(&self, peer: u64) -> bool {
        self.link(peer).is_some_and(|link| !link.fetching.is_empty())
    }

    /// Hands the reads from a peer to its transport until that is full: what is to be read there, and at which offset
    /// it belongs here.
    pub fn fetch(&mut self, peer: u64, mut post: impl FnMut(WriteId, RemoteRange, u64) -> Post, now: Moment) {
        let Self { peers, incoming, writes, next_write, .. } = self;
        let Some(link) = peers.get_mut(&peer).and_then(|it| it.link.as_mut()) else { return };
        let mut asking = Vec::new();
        while let Some(&handoff) = link.fetching.front() {
            let Some(pull) = incoming.get_mut(&handoff).and_then(|it| it.pull.as_mut()) else {
                link.fetching.pop_front();
                continue;
            };
            let mut is_full = false;
            while pull.may_post()
                && let Some(piece) = pull.pending.pop_front()
            {
                let Piece { source: offset, target, len, stamp } = piece;
                let id = WriteId(*next_write);
                is_full = post(id, RemoteRange { handoff, offset, len, stamp }, target) == Post::QueueFull;
                if is_full {
                    pull.pending.push_front(piece);
                    break;
                }
                *next_write += 1;
                if link.under_way == 0 {
                    link.progress = now;
                }
                link.under_way += 1;
                let (len, direction) = (u64::from(len), Direction::Read);
                writes.insert(id, PostedWrite { peer, link: link.id, handoff, len, direction });
                pull.credit.post(len);
            }
            if is_full {
                break;
            }
            pull.is_posting = false;
            link.fetching.pop_front();
            asking.push(handoff);
        }
        // The next wish, while this one is fulfilled.
        for handoff in asking {
            self.ask_for_own_credit(handoff, now);
        }
    }

    /// Reads of a handoff have ended, in whatever way.
    pub(super) fn fetched(&mut self, handoff: HandoffId, fetched: Fetched, now: Moment) {
        let Some(pull) = self.incoming.get_mut(&handoff).and_then(|it| it.pull.as_mut()) else { return };
        pull.credit.end(fetched.bytes);
        self.apply_to_reservation(handoff, ReservationEvent::Read { pieces: fetched.pieces });
        self.say_fetched(handoff);
        self.ask_for_own_credit(handoff, now);
    }

    /// Says that nothing of what was offered is being read, once that is so.
    pub(super) fn say_fetched(&mut self, handoff: HandoffId) {
        let Some(incoming) = self.incoming.get_mut(&handoff) else { return };
        let (peer, via, reads) = (incoming.peer, incoming.link(), incoming.reservation.reads());
        let Some(pull) = incoming.pull.as_mut().filter(|it| reads == 0 && it.told < it.offered) else {
            return;
        };
        pull.told = pull.offered;
        let pieces = pull.offered;
        if self.link(peer).map(|link| link.id) == via {
            self.send(peer, Message::Fetched { handoff, pieces });
        }
    }
}

#[cfg(test)]
mod tests;

/// Pieces in one message, which then has less than two megabytes.
const LONGEST_OFFER: usize = 1 << 16;
