//! How the prefill side says what its peer's blocks hold.
//!
//! Where the prompt is computed in them, nothing else is left to do for a handoff, so whatever is said of each block is said
//! as soon as that block is final, while the rest of the prompt is being computed. The commit is short then, whatever the
//! length of the prompt: it names what is left, and stands for the rest by its seal.

use super::prefilling::Outgoing;
use super::writing::WriteSource;
use super::{DigestOrder, DigestTicket, EndpointCore};
use crate::digest::{Coverage, Seal};
use crate::message::{Commit, Filled, Message};
use crate::sender::SenderState;
use crate::units::{BlockRef, HandoffId, Moment, TokenCount};

/// What the peer was told of blocks that are computed in place.
#[derive(Clone, Debug)]
pub(super) struct Naming {
    /// Leading targets that the engine will not touch again.
    filled: usize,
    /// Of those, the ones that the peer knows of.
    named: usize,
    /// Digests being taken, of what was not named up to the target at this position.
    hashing: Option<(DigestTicket, usize)>,
    /// Of what was named.
    seal: Seal,
    /// What goes along with the commit, while that waits for digests.
    payload: Option<Vec<u8>>,
}

impl Naming {
    pub(super) fn new(handoff: HandoffId) -> Self {
        Self { filled: 0, named: 0, hashing: None, seal: Seal::new(handoff), payload: None }
    }

    /// Whether the engine has said of some block that it will not touch it again.
    pub(super) fn has_begun(&self) -> bool {
        0 < self.filled
    }
}

impl<S> Outgoing<S> {
    pub(super) fn hashes(&self, ticket: DigestTicket) -> bool {
        self.naming.hashing.is_some_and(|(ours, _)| ours == ticket)
    }

    /// Leading targets that are final when the cache holds so many tokens: none of their places is free, or none of the
    /// prompt's tokens is left.
    fn filled_by(&self, tokens: TokenCount) -> usize {
        if self.tokens <= tokens {
            return self.targets.len();
        }
        let filled = TokenCount(tokens.0.saturating_sub(self.before.0)).blocks_filled(self.block_len);
        (filled.0 as usize).min(self.targets.len())
    }
}

impl<S: WriteSource> EndpointCore<S> {
    /// The engine has computed the first `tokens` tokens of the prompt in the peer's blocks, and will not touch those places
    /// again. What can be said about blocks that are final is said at once.
    pub fn filled(&mut self, handoff: HandoffId, tokens: TokenCount) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        if outgoing.sender.accepts_writes() && outgoing.computes_in_place() {
            outgoing.naming.filled = outgoing.naming.filled.max(outgoing.filled_by(tokens));
            self.name_filled(handoff);
        }
    }

    /// The engine has computed the whole prompt, wherever; `finish` follows.
    pub fn computed(&mut self, handoff: HandoffId, now: Moment) {
        if let Some(outgoing) = self.outgoing.get_mut(&handoff) {
            outgoing.computed.get_or_insert(now);
        }
    }

    /// The first token of a prompt that was [`computed`](Self::computed) is about to be known: says something to the peer, which
    /// then listens for the commit ([`awaits_commit`](Self::awaits_commit)).
    pub fn rouse(&mut self, handoff: HandoffId) {
        let is_named = |it: &&Outgoing<S>| it.computes_in_place() && it.naming.named == it.targets.len();
        if let Some(outgoing) = self.outgoing.get(&handoff).filter(is_named) {
            self.beat(outgoing.peer);
        }
    }

    /// Whether all that is left to come of some handoff is its commit: a word of that peer then says that it comes now.
    pub fn awaits_commit(&self, peer: u64) -> bool {
        self.incoming.values().any(|it| it.peer == peer && it.reservation.awaits_commit_alone())
    }

    /// Every byte is there: says so, once the digests are.
    pub(super) fn commit(&mut self, handoff: HandoffId, payload: Vec<u8>) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        let all = outgoing.targets.len();
        if let Some(sources) = &outgoing.device_sources {
            // What was not pushed has no digest that the peer would believe.
            return match sources.iter().copied().collect() {
                Some(targets) => self.hash_sources(handoff, targets, payload),
                None => self.send_commit(handoff, vec![0; all], payload),
            };
        }
        if !outgoing.computes_in_place() {
            let digests = std::mem::take(&mut outgoing.digests);
            return self.send_commit(handoff, digests, payload);
        }
        if outgoing.naming.named == all {
            return self.send_commit(handoff, Vec::new(), payload);
        }
        outgoing.naming.filled = all;
        outgoing.naming.payload = Some(payload);
        self.name_filled(handoff);
    }

    /// Has digests taken of the blocks that a device has written from, which is the device's to do; the commit goes out when they are there.
    fn hash_sources(&mut self, handoff: HandoffId, targets: Vec<BlockRef>, payload: Vec<u8>) {
        let Some(outgoing) = self.outgoing.get(&handoff) else { return };
        let (coverage, shape, all) = (outgoing.coverage, outgoing.shape, targets.len());
        let (owner, on_device, first, spots) = (None, true, 0, false);
        let ticket = self.order_digests(|ticket| DigestOrder {
            ticket,
            handoff,
            owner,
            on_device,
            coverage,
            shape,
            targets,
            first,
            all,
            spots,
        });
        if let Some(outgoing) = self.outgoing.get_mut(&handoff) {
            outgoing.naming.hashing = Some((ticket, all));
            outgoing.naming.payload = Some(payload);
        }
    }

    /// Has digests taken of blocks that are final, one piece of work at a time.
    fn name_filled(&mut self, handoff: HandoffId) {
        let Some(outgoing) = self.outgoing.get(&handoff) else { return };
        let Naming { filled, named: first, hashing, .. } = outgoing.naming;
        if hashing.is_some() || filled == first {
            return;
        }
        let (peer, coverage, shape) = (outgoing.peer, outgoing.coverage, outgoing.shape);
        let (targets, all) = (outgoing.targets[first..filled].to_vec(), outgoing.targets.len());
        let (owner, spots) = (Some(peer), coverage == Coverage::Sampled);
        let ticket = self.order_digests(|ticket| DigestOrder {
            ticket,
            handoff,
            owner,
            on_device: false,
            coverage,
            shape,
            targets,
            first,
            all,
            spots,
        });
        if let Some(outgoing) = self.outgoing.get_mut(&handoff) {
            outgoing.naming.hashing = Some((ticket, filled));
        }
    }

    /// The digests are there: of the last blocks for the commit, if the engine has finished, and otherwise for a message
    /// of their own.
    pub(super) fn hashed(&mut self, handoff: HandoffId, digests: Vec<u64>) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        let Some((_, end)) = outgoing.naming.hashing.take() else { return };
        let is_last = end == outgoing.targets.len();
        if let Some(payload) = outgoing.naming.payload.take_if(|_| is_last) {
            return self.send_commit(handoff, digests, payload);
        }
        // Once it was given up there is nobody to be told.
        if !outgoing.sender.accepts_writes() && outgoing.sender.state() != SenderState::Committing {
            return;
        }
        let (peer, first) = (outgoing.peer, outgoing.naming.named);
        let targets = outgoing.targets[first..end].to_vec();
        outgoing.naming.seal.add(&targets, &digests);
        outgoing.naming.named = end;
        let first = u32::try_from(first).expect("a reservation is bounded by its frame");
        self.send(peer, Message::Filled(Filled { handoff, first, targets, digests }));
        self.name_filled(handoff);
    }

    /// The commit, with digests of what was not named before.
    fn send_commit(&mut self, handoff: HandoffId, digests: Vec<u64>, payload: Vec<u8>) {
        let Some(outgoing) = self.outgoing.get_mut(&handoff) else { return };
        let (peer, tokens, in_place) = (outgoing.peer, outgoing.tokens, outgoing.computes_in_place());
        let named = outgoing.naming.named;
        let targets = outgoing.targets[named..].to_vec();
        outgoing.naming.seal.add(&targets, &digests);
        let (first, seal) =
            (u32::try_from(named).expect("a reservation is bounded by its frame"), outgoing.naming.seal);
        let seal = seal.value();
        self.send(
            peer,
            Message::Commit(Commit { handoff, tokens, first, targets, digests, seal, payload, in_place }),
        );
    }
}
