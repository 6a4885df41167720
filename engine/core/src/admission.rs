//! Who leaves the queue.
//!
//! In order of arrival. The first that cannot have its blocks stops everyone behind it that needs blocks as well, so
//! that a long prompt is not overtaken for ever by short ones. Three may pass it, none of which can starve it:
//!
//! - a prefill in its peer's memory passes one that lacks blocks: it needs none;
//! - a reservation passes one that merely lacks room in this step's batch: it computes nothing;
//! - everyone passes a reservation that is held back by the bound on reservations: that bound is loosened by
//!   handoffs that end, which those who pass do not delay.
//!
//! A running sequence comes before all of them: an admission leaves one block for each sequence that decodes, and
//! reservations, which cannot be preempted, get at most half of the pool (or one of them, however long) and as many
//! sequences as a step takes.

use tidemill_kvtransfer_proto::units::BlockCount;

use crate::plan::{Admission, Planner, Purpose};
use crate::request::Part;
use crate::sequence::{Place, Sequence, Stage, count_blocks};

/// Who may still be admitted in this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gates {
    /// Those that need blocks.
    blocks: bool,
    /// Those that wait for a peer's KV cache.
    reservations: bool,
    /// Reservations there are.
    reserved: u32,
    /// Blocks that peers may write to.
    reserved_blocks: u32,
    /// Sequences that run.
    running: u32,
}

impl Planner<'_> {
    /// Plans admissions, and the first work of those that compute.
    pub(crate) fn admit(&mut self) {
        let ledger = self.scheduler.pool.ledger();
        let mut gates = Gates {
            blocks: true,
            reservations: true,
            reserved: self.scheduler.roster.count(Stage::Reserved),
            reserved_blocks: ledger.reserved.0 + ledger.quarantined.0,
            running: self.scheduler.roster.count(Stage::Running),
        };
        for sequence in self.scheduler.roster.in_stage(Stage::Waiting) {
            if !gates.blocks && !self.has_room_for_work() {
                return;
            }
            let own = sequence.place == Place::OwnBlocks;
            if own && ledger.total < sequence.blocks_to_hold(self.scheduler.limits.block_len) {
                self.plan.refusals.push(sequence.id());
                continue;
            }
            match sequence.request.part {
                Part::DecodeFrom(_) => self.reserve(sequence, &mut gates),
                Part::Whole | Part::PrefillFor(_) => {
                    if self.scheduler.places() <= gates.running {
                        // Not even a reservation passes: adopted, it would take the place that becomes free.
                        return;
                    }
                    self.start(sequence, &mut gates);
                }
            }
        }
    }

    /// Admits a sequence that computes, if it can be.
    fn start(&mut self, sequence: &Sequence, gates: &mut Gates) {
        if !self.has_room_for_work() {
            return;
        }
        if sequence.place == Place::Targets {
            self.plan.admissions.push(Admission {
                request: sequence.id(),
                purpose: Purpose::Compute,
                cached: Vec::new(),
                fresh: BlockCount(0),
            });
            gates.running += 1;
            self.work_on(sequence, sequence.computed);
            return;
        }
        if !gates.blocks {
            return;
        }
        let Some(admission) = self.find_room(sequence, Purpose::Compute) else {
            gates.blocks = false;
            return;
        };
        let first = count_blocks(admission.cached.len()).tokens(self.scheduler.limits.block_len);
        self.take_room(admission);
        gates.running += 1;
        self.growing += u32::from(sequence.grows());
        self.work_on(sequence, first);
    }

    /// Admits a sequence whose KV cache comes from a peer, if it can be.
    fn reserve(&mut self, sequence: &Sequence, gates: &mut Gates) {
        if !gates.blocks || !gates.reservations {
            return;
        }
        let Some(admission) = self.find_room(sequence, Purpose::Reserve) else {
            gates.blocks = false;
            return;
        };
        let half = self.scheduler.pool.ledger().total.0 / 2;
        let within_half = gates.reserved_blocks + admission.fresh.0 <= half || gates.reserved_blocks == 0;
        let places = self.scheduler.places();
        let within_places =
            gates.reserved < places && gates.running + gates.reserved < places.saturating_mul(2);
        if !within_half || !within_places {
            gates.reservations = false;
            return;
        }
        gates.reserved += 1;
        gates.reserved_blocks += admission.fresh.0;
        self.take_room(admission);
    }

    /// What the sequence would get, if there are blocks for it.
    fn find_room(&self, sequence: &Sequence, purpose: Purpose) -> Option<Admission> {
        let (pool, block_len) = (&self.scheduler.pool, self.scheduler.limits.block_len);
        let at_most = sequence.blocks_to_look_up(block_len);
        let cached = pool.lookup(sequence.tokens(), &sequence.hashes, at_most);
        let fresh = BlockCount(sequence.blocks_to_hold(block_len).0 - count_blocks(cached.len()).0);
        let admission = Admission { request: sequence.id(), purpose, cached, fresh };
        let wanted = self.newly_pinned(&admission) + fresh.0 + self.growing;
        (wanted <= self.blocks_left).then_some(admission)
    }

    fn take_room(&mut self, admission: Admission) {
        self.blocks_left -= self.newly_pinned(&admission) + admission.fresh.0;
        self.pinned.extend(admission.cached.iter().map(|reference| reference.block));
        self.plan.admissions.push(admission);
    }

    /// Unused cached blocks that the admission takes from those that can be evicted.
    fn newly_pinned(&self, admission: &Admission) -> u32 {
        let blocks = admission.cached.iter().map(|reference| reference.block);
        let pool = &self.scheduler.pool;
        let new = blocks.filter(|block| pool.is_cached(*block) && !self.pinned.contains(block));
        u32::try_from(new.count()).expect("fewer hits than blocks")
    }
}
