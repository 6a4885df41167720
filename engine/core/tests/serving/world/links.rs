//! What happens to handoffs between the two workers.

use proptest::sample::Index;
use tidemill_engine_core::handoff::{Cancelled, Reservation};
use tidemill_engine_core::plan::StepPlan;
use tidemill_engine_core::request::{RequestId, TokenId};
use tidemill_engine_core::sequence::Stage;
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, HandoffId, TokenCount};

use super::{Capture, DECODE, PREFILL, World};
use crate::model::GARBAGE;

/// A handoff on its way.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) tokens: Vec<TokenId>,
    pub(super) reservation: Option<Reservation>,
    pub(super) first_token: Option<TokenId>,
    /// P computes in D's memory.
    pub(super) in_place: bool,
    /// P has given up.
    pub(super) abandoned: bool,
    /// D has given up.
    pub(super) failed: bool,
    /// P may still write to blocks of D.
    pub(super) quarantined: bool,
}

impl World {
    pub(super) fn announce(&mut self) {
        for reservation in self.workers[DECODE].scheduler.take_reservations() {
            let link = self.links.get_mut(&reservation.request).expect("a reservation has a link");
            assert_eq!(reservation.tokens.0 as usize, link.tokens.len(), "all known tokens are wanted");
            link.reservation = Some(reservation);
        }
    }

    pub(super) fn place(&mut self, id: RequestId, own: bool) {
        let scheduler = &mut self.workers[PREFILL].scheduler;
        let link = self.links.get_mut(&id).unwrap();
        if own {
            scheduler.use_own_blocks(id);
        } else if let Some(reservation) = &link.reservation {
            let cached = TokenCount(cached_tokens(reservation, scheduler.limits().block_len.tokens()));
            link.in_place |= scheduler.use_targets(id, cached);
        }
    }

    pub(super) fn push(&mut self, id: RequestId) {
        let link = &self.links[&id];
        let (Some(reservation), false, false) = (&link.reservation, link.failed, link.in_place) else {
            return;
        };
        let block_len = self.block_len();
        let cached = cached_tokens(reservation, u32::try_from(block_len).unwrap()) as usize;
        let [p, d] = &mut self.workers;
        let Some(sequence) = p.scheduler.sequence(id) else { return };
        let computed = sequence.computed().0 as usize;
        let (from, to) = (names(p.scheduler.block_table(id)), link.table());
        p.memory.expect(&from, &link.tokens[..computed], block_len);
        for position in cached..computed {
            let it = p.memory.read(&from, position, block_len);
            d.memory.write(&to, position, block_len, it);
        }
    }

    pub(super) fn commit(&mut self, id: RequestId) {
        let link = &self.links[&id];
        let (Some(first_token), Some(_), false, false) =
            (link.first_token, &link.reservation, link.failed, link.abandoned)
        else {
            return;
        };
        self.push(id);
        let link = self.links.remove(&id).unwrap();
        let block_len = self.block_len();
        let [p, d] = &mut self.workers;
        d.memory.expect(&link.table(), &link.tokens, block_len);
        assert_eq!(link.table(), names(d.scheduler.block_table(id)), "a reservation stays as announced");
        assert!(p.scheduler.pushed(id), "the prefill waits for this");
        let outcome = d.scheduler.adopt(id, first_token).expect("the reservation is there");
        self.heed(DECODE, outcome);
    }

    pub(super) fn fail_at_decode(&mut self, id: RequestId, replay: bool) {
        let Some(link) = self.links.get_mut(&id).filter(|link| !link.failed) else { return };
        link.failed = true;
        let scheduler = &mut self.workers[DECODE].scheduler;
        let reserved = scheduler.sequence(id).is_some_and(|it| it.stage() == Stage::Reserved);
        let left = if reserved { scheduler.reservation_failed(id) } else { scheduler.cancel(id) };
        link.quarantined = left == Cancelled::Quarantined(HandoffId(id.0));
        assert_eq!(link.quarantined, link.reservation.is_some(), "what was announced is quarantined");
        if let Some(job) = self.owners.remove(&id)
            && replay
        {
            self.submit_whole(job, usize::try_from(id.0 % 2).unwrap());
        }
    }

    pub(super) fn fail_at_prefill(&mut self, id: RequestId) {
        self.links.get_mut(&id).unwrap().abandoned = true;
        let left = self.workers[PREFILL].scheduler.cancel(id);
        assert!(!matches!(left, Cancelled::Quarantined(_)), "a prefill has reserved nothing");
    }

    /// What a lease does: D notices that P has abandoned the handoff.
    pub(super) fn give_up_on_a_lost_peer(&mut self, id: RequestId) {
        if self.links.get(&id).is_some_and(|link| link.abandoned) {
            self.fail_at_decode(id, true);
        }
    }

    /// What the driver does when P has been stuck for a while.
    pub(super) fn break_a_deadlock(&mut self) {
        let blocked = self.workers[PREFILL].scheduler.blocked_by_handoffs();
        if let Some(id) = blocked.into_iter().find(|id| self.links[id].reservation.is_none()) {
            self.fail_at_prefill(id);
        }
    }

    pub(super) fn late_write(&mut self, id: RequestId) {
        let link = &self.links[&id];
        let (Some(reservation), true, false) = (&link.reservation, link.quarantined, link.in_place) else {
            return;
        };
        let (targets, block_len) = (names(&reservation.targets), self.block_len());
        for position in 0..targets.len() * block_len {
            self.workers[DECODE].memory.write(&targets, position, block_len, GARBAGE);
        }
    }

    pub(super) fn settle(&mut self, id: RequestId) {
        let Some(link) = self.links.get(&id).filter(|link| link.failed) else { return };
        let [p, d] = &mut self.workers;
        let computes =
            |(_, captures): &(StepPlan, Vec<Capture>)| captures.iter().any(|it| it.work.request == id);
        if p.step.as_ref().is_some_and(computes) {
            return; // The device still writes.
        }
        if let Cancelled::Pushing(_) = p.scheduler.cancel(id) {
            assert!(p.scheduler.pushed(id));
        }
        if link.quarantined {
            let block_len = d.scheduler.limits().block_len.tokens();
            let cached = link.reservation.as_ref().map_or(0, |it| cached_tokens(it, block_len)) as usize;
            d.memory.expect(&link.table(), &link.tokens[..cached], block_len as usize);
            d.scheduler.quiet(HandoffId(id.0));
        }
        self.links.remove(&id);
    }

    pub(super) fn with_link(&mut self, which: Index, act: impl FnOnce(&mut Self, RequestId)) {
        let ids: Vec<RequestId> = self.links.keys().copied().collect();
        if !ids.is_empty() {
            act(self, *which.get(&ids));
        }
    }
}

impl Link {
    /// D's blocks, as far as they were announced.
    pub(super) fn table(&self) -> Vec<BlockId> {
        let reservation = self.reservation.as_ref();
        reservation.map_or(Vec::new(), |it| names(&[&it.cached[..], &it.targets[..]].concat()))
    }
}

fn cached_tokens(reservation: &Reservation, block_len: u32) -> u32 {
    u32::try_from(reservation.cached.len()).unwrap() * block_len
}

pub(super) fn names(table: &[BlockRef]) -> Vec<BlockId> {
    table.iter().map(|reference| reference.block).collect()
}
