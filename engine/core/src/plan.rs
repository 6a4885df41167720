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
//!    A queue in order of arrival is what fair means here: a request waits for those that came before it and for no
//!    other, be it long or short. `long_prefill_threshold` lets short prompts pass the rest of a long one.
//! 6. Drafts, which are guesses at the next tokens, get what is left when all of the above is planned: nobody waits, is
//!    cut or loses a block for a guess. Without its drafts a plan is the one that would be made if there were none.

use std::collections::{BTreeMap, BTreeSet};

use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockRef, TokenCount};

use crate::request::{RequestId, TokenId};
use crate::scheduler::Scheduler;
use crate::sequence::{Place, Sequence, Stage, count_blocks, count_tokens};

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
    /// The guesses at the tokens that follow; each is verified by the step.
    pub drafts: Drafts,
}

/// Guesses at the next tokens of sequences that decode.
pub type Drafts = BTreeMap<RequestId, Vec<TokenId>>;

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
    /// How many guessed tokens are computed behind these. A token is then sampled behind each of them too, and counts
    /// as long as all guesses before it were right.
    pub drafted: TokenCount,
    /// Whether a token is sampled behind the last one.
    pub samples: bool,
}

impl Work {
    /// Tokens to compute, guesses included.
    pub const fn rows(&self) -> TokenCount {
        TokenCount(self.count.0 + self.drafted.0)
    }

    /// Whether it goes on with an answer rather than computing a prompt.
    pub const fn decodes(&self) -> bool {
        self.samples && self.count.0 == 1
    }
}

impl StepPlan {
    /// Whether nothing happens.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Tokens of the forward pass, guesses included.
    pub fn tokens(&self) -> TokenCount {
        TokenCount(self.work.iter().map(|work| work.rows().0).sum())
    }

    /// Fills in the guesses that a draft model was to make, now that it has made them.
    ///
    /// # Panics
    ///
    /// When the plan has no draft of that length for the request.
    pub fn write_draft(&mut self, request: RequestId, guesses: Vec<TokenId>) {
        let draft = self.drafts.get_mut(&request).expect("the plan says who gets guesses");
        assert_eq!(draft.len(), guesses.len(), "the plan says how many");
        *draft = guesses;
    }

    /// The guesses at the tokens that follow those of a work.
    pub fn draft(&self, work: &Work) -> &[TokenId] {
        self.drafts.get(&work.request).map_or(&[], Vec::as_slice)
    }
}

impl Scheduler {
    /// Decides the next step, without drafts. Changes nothing.
    pub fn plan(&self) -> StepPlan {
        self.plan_with_drafts(|_, _| Drafts::new())
    }

    /// Decides the next step. Changes nothing.
    ///
    /// `guess` is asked once everything else is planned, and told how many more tokens the step may have. What it
    /// gives is cut to what the limits and the blocks leave, and ignored for sequences that do not
    /// [decode](Sequence::decodes) in this step.
    pub fn plan_with_drafts(&self, guess: impl FnOnce(&StepPlan, TokenCount) -> Drafts) -> StepPlan {
        let mut planner = Planner::new(self);
        planner.decode();
        planner.prefill();
        if planner.plan.preemptions.is_empty() {
            planner.admit();
            let drafts = guess(&planner.plan, TokenCount(planner.tokens_left));
            planner.add_drafts(drafts);
        }
        planner.plan
    }
}

/// A plan while it is made, with what is left of each resource.
pub(crate) struct Planner<'a> {
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

impl<'a> Planner<'a> {
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
            let ends = sequence.ends_with_awaited(self.scheduler.limits.max_model_len);
            if sequence.remaining() != TokenCount(1) || ends || self.is_preempted(sequence) {
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
        let remaining = sequence.expected().0 - first.0;
        let threshold = self.scheduler.limits.long_prefill_threshold.map_or(u32::MAX, |tokens| tokens.0);
        let count = remaining.min(self.tokens_left).min(threshold);
        assert!(0 < count, "work is planned while there is room for it");
        self.tokens_left -= count;
        self.plan.work.push(Work {
            request: sequence.id(),
            first,
            count: TokenCount(count),
            drafted: TokenCount(0),
            samples: count == remaining,
        });
    }

    /// Adds guesses, oldest sequence first, as far as tokens and blocks are left over.
    fn add_drafts(&mut self, mut drafts: Drafts) {
        let block_len = self.scheduler.limits.block_len;
        for work in &mut self.plan.work {
            let Some(mut draft) = drafts.remove(&work.request) else { continue };
            let sequence = self.scheduler.roster.get(work.request).expect("planned from this state");
            if !sequence.decodes() {
                continue;
            }
            let grown = sequence.blocks_to_grow(work.count, block_len).0;
            // It needs no more blocks than it has tokens.
            let spare = self.blocks_left.min(count_tokens(draft.len()).0);
            let reach = BlockCount(count_blocks(sequence.blocks.len()).0 + grown + spare).tokens(block_len);
            let room = reach.0 - sequence.known().0;
            let useful = sequence.useful_drafts(self.scheduler.limits.max_model_len).0;
            draft.truncate(useful.min(room).min(self.tokens_left) as usize);
            if draft.is_empty() {
                continue;
            }
            work.drafted = count_tokens(draft.len());
            self.tokens_left -= work.drafted.0;
            self.blocks_left -= sequence.blocks_to_grow(work.rows(), block_len).0 - grown;
            self.plan.drafts.insert(work.request, draft);
        }
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
