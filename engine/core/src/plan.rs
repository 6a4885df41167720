//! Chooses what the next forward pass computes.
//!
//! [`Scheduler::plan`] reads the state and says what should happen; `begin` and `finish` make it so. Policy:
//!
//! 1. Decode first, because a running request has a user watching it. Then prompts in order of arrival with the
//!    tokens that are left, cutting the last one into a chunk (Sarathi-Serve, OSDI 2024).
//! 2. Whoever is admitted gets the blocks of all its tokens at once, so that a prompt never stops halfway.
//! 3. A sequence that needs a block when there is none takes them from the latest-arrived sequence that decodes
//!    here, if that arrived later than itself; that one starts over, much of it from the prefix cache. If there is
//!    none, it pauses and keeps what it has. The oldest is thus never stopped by others that run, and ends.
//! 4. A step that preempts admits nobody: blocks taken from one for the sake of another must not go to a third.
//! 5. The batch is the oldest sequences that run, as many as a step takes. There can be more after adoptions; the
//!    latest of them wait for a place, so that a prompt in the batch is not crowded out by a stream of adoptions.

use std::collections::{BTreeMap, BTreeSet};

use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockRef, TokenCount};

use crate::request::RequestId;
use crate::scheduler::Scheduler;
use crate::sequence::{Place, Sequence, Stage};

/// One step. A value: print it, compare it, store it next to a trace. One without work must be begun and finished as
/// well when it is not [empty](Self::is_empty).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Requests that no longer fit the pool even alone, and end.
    pub refusals: Vec<RequestId>,
    /// Sequences that lose their blocks and go back to the queue.
    pub preemptions: Vec<RequestId>,
    /// Sequences that leave the queue.
    pub admissions: Vec<Admission>,
    /// What is computed, decoding sequences first.
    pub work: Vec<Work>,
}

/// A sequence leaves the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Which request.
    pub request: RequestId,
    /// Whether it computes or waits for a peer's KV cache.
    pub purpose: Purpose,
    /// Blocks of the prefix cache that hold its first tokens.
    pub cached: Vec<BlockRef>,
    /// Blocks it gets besides.
    pub fresh: BlockCount,
}

/// What an admitted sequence's blocks are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It computes its tokens.
    Compute,
    /// A peer computes them.
    Reserve,
}

/// A sequence's share of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Which request.
    pub request: RequestId,
    /// Position of the first token to compute.
    pub first: TokenCount,
    /// How many tokens. At least one.
    pub count: TokenCount,
    /// Whether a token is sampled behind the last one.
    pub samples: bool,
}

impl StepPlan {
    /// Whether nothing happens.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Tokens of the forward pass.
    pub fn tokens(&self) -> TokenCount {
        TokenCount(self.work.iter().map(|work| work.count.0).sum())
    }
}

impl Scheduler {
    /// Decides the next step. Changes nothing.
    pub fn plan(&self) -> StepPlan {
        let mut draft = Draft::new(self);
        draft.decode();
        draft.prefill();
        if draft.plan.preemptions.is_empty() {
            draft.admit();
        }
        draft.plan
    }
}

/// A plan while it is made, with what is left of each resource.
pub(crate) struct Draft<'a> {
    pub(crate) scheduler: &'a Scheduler,
    pub(crate) plan: StepPlan,
    pub(crate) tokens_left: u32,
    /// Blocks that are free, can be evicted, or are taken from the preempted.
    pub(crate) blocks_left: u32,
    /// Unused cached blocks that admissions of this plan have found: no longer to be evicted.
    pub(crate) pinned: BTreeSet<BlockId>,
    /// Sequences that decode here and so will want more blocks, with those admitted in this plan.
    pub(crate) growing: u32,
    /// Users that blocks lose by preemption.
    lost_users: BTreeMap<BlockId, u32>,
}

impl<'a> Draft<'a> {
    fn new(scheduler: &'a Scheduler) -> Self {
        let running = scheduler.roster.in_stage(Stage::Running);
        let growing = running.filter(|sequence| sequence.grows()).count();
        Self {
            scheduler,
            plan: StepPlan::default(),
            tokens_left: scheduler.limits.max_num_batched_tokens.0,
            blocks_left: scheduler.pool.available().0,
            pinned: BTreeSet::new(),
            growing: u32::try_from(growing).expect("fewer than 2^32 sequences"),
            lost_users: BTreeMap::new(),
        }
    }

    fn decode(&mut self) {
        let block_len = self.scheduler.limits.block_len;
        let total = self.scheduler.pool.ledger().total;
        for sequence in self.batch() {
            if sequence.remaining() != TokenCount(1) || self.is_preempted(sequence) {
                continue;
            }
            if sequence.place == Place::OwnBlocks && total < sequence.blocks_to_hold(block_len) {
                self.plan.refusals.push(sequence.id());
                continue;
            }
            let more = sequence.blocks_to_grow(TokenCount(1), block_len).0;
            if self.find_blocks(more, sequence) {
                self.blocks_left -= more;
                self.work_on(sequence, sequence.computed);
            }
        }
    }

    fn prefill(&mut self) {
        for sequence in self.batch() {
            if sequence.remaining() == TokenCount(1) || self.is_preempted(sequence) {
                continue;
            }
            if !self.has_room_for_work() {
                break;
            }
            self.work_on(sequence, sequence.computed);
        }
    }

    /// The running sequences that this step may advance, oldest first.
    fn batch(&self) -> impl Iterator<Item = &'a Sequence> + use<'a> {
        self.scheduler.roster.in_stage(Stage::Running).take(self.scheduler.places() as usize)
    }

    /// Plans as many tokens of the sequence from `first` on as the limits leave.
    pub(crate) fn work_on(&mut self, sequence: &Sequence, first: TokenCount) {
        let remaining = sequence.known().0 - first.0;
        let threshold = self.scheduler.limits.long_prefill_threshold.map_or(u32::MAX, |tokens| tokens.0);
        let count = remaining.min(self.tokens_left).min(threshold);
        assert!(0 < count, "work is planned while there is room for it");
        self.tokens_left -= count;
        self.plan.work.push(Work {
            request: sequence.id(),
            first,
            count: TokenCount(count),
            samples: count == remaining,
        });
    }

    /// Whether the step can take another sequence.
    pub(crate) fn has_room_for_work(&self) -> bool {
        0 < self.tokens_left && self.plan.work.len() < self.scheduler.limits.max_num_seqs as usize
    }

    /// Whether `count` blocks can be had for `sequence`, if need be by preemption.
    fn find_blocks(&mut self, count: u32, sequence: &Sequence) -> bool {
        while self.blocks_left < count {
            let running = self.scheduler.roster.in_stage(Stage::Running).rev();
            let mut later = running.take_while(|other| sequence.arrival < other.arrival);
            // Later sequences have no work in this plan yet, since decoding goes by arrival and prefill comes after.
            let Some(victim) = later.find(|other| other.grows() && !self.is_preempted(other)) else {
                return false;
            };
            self.plan.preemptions.push(victim.id());
            self.take_blocks_of(victim);
        }
        true
    }

    fn is_preempted(&self, sequence: &Sequence) -> bool {
        self.plan.preemptions.contains(&sequence.id())
    }

    /// Counts the blocks that become available when the sequence lets go of its own.
    fn take_blocks_of(&mut self, sequence: &Sequence) {
        self.growing -= u32::from(sequence.grows());
        for reference in &sequence.blocks {
            let lost = self.lost_users.entry(reference.block).or_default();
            *lost += 1;
            self.blocks_left += u32::from(*lost == self.scheduler.pool.holders(reference.block));
        }
    }
}
