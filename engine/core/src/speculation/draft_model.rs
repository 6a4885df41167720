//! When a smaller model guesses, and what it must have computed before it can.
//!
//! Which tokens it guesses is the device's business; here is decided how many, and which known tokens the draft model
//! computes to catch up with the model that is served.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, BlockRef, TokenCount};

use super::acceptance::Acceptance;
use super::draft_cache::DraftCache;
use super::purse::Purse;
use super::{MEMORY_OF_ALL, MEMORY_OF_ONE, WEIGHT_OF_ALL, WEIGHT_OF_PRIOR};
use crate::plan::{StepPlan, Work};
use crate::request::RequestId;
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;

/// Known tokens that the draft model computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatchUp {
    /// Whose.
    pub request: RequestId,
    /// Position of the first one.
    pub first: TokenCount,
    /// How many.
    pub count: TokenCount,
}

/// What guesses of a step are worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Worth {
    /// Seconds that a step takes without them.
    pub(super) plain: f32,
    /// Whether those for a sequence like all others promise a gain.
    pub(super) is_promising: bool,
}

/// What is known of a draft model's work.
#[derive(Clone, Debug)]
pub(super) struct DraftModel {
    /// Tokens of the longest sequence that it can take.
    longest: TokenCount,
    cache: DraftCache,
    followed: BTreeMap<RequestId, Followed>,
    /// Of all requests, by place in the draft.
    acceptance: Acceptance,
    purse: Purse,
    /// Seconds that a known token takes; `None` while none was computed.
    per_token: Option<f32>,
    /// Drafts that were verified.
    drafts: u64,
    /// Steps since the last draft.
    idle: u32,
}

/// A sequence for which guesses are made.
#[derive(Clone, Debug)]
struct Followed {
    acceptance: Acceptance,
    drafts: u32,
}

/// Blocks that are written in one pass of the draft model. Two sequences may share a block that it has still to fill;
/// only one of them fills it.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims(BTreeSet<BlockId>);

impl DraftModel {
    pub(super) fn new() -> Self {
        Self {
            longest: TokenCount(u32::MAX),
            cache: DraftCache::default(),
            followed: BTreeMap::new(),
            acceptance: Acceptance::new(MEMORY_OF_ALL),
            purse: Purse::default(),
            per_token: None,
            drafts: 0,
            idle: TRIED_EVERY,
        }
    }

    /// Takes no sequence of more tokens than so many.
    pub(super) const fn bound(&mut self, longest: TokenCount) {
        self.longest = longest;
    }

    /// Forgets sequences that are gone.
    pub(super) fn forget(&mut self, scheduler: &Scheduler) {
        self.followed.retain(|id, _| scheduler.sequence(*id).is_some());
    }

    /// Leading tokens of a sequence that it need not compute.
    pub(super) fn computed(&self, sequence: &Sequence, block_len: BlockLen) -> TokenCount {
        self.cache.computed(&sequence.blocks, block_len)
    }

    /// Chances of at most `limit` guesses; none while it has much to catch up with.
    pub(super) fn chances(
        &mut self,
        sequence: &Sequence,
        limit: u32,
        block_len: BlockLen,
        claims: &mut Claims,
    ) -> Vec<f32> {
        let computed = self.computed(sequence, block_len);
        // It does not compute its last guess.
        let limit = limit.min(self.longest.0.saturating_sub(sequence.known().0));
        if limit == 0 || MOST_BEHIND < sequence.known().0 - computed.0 {
            return Vec::new();
        }
        if !claims.take(&sequence.blocks, computed, block_len) {
            return Vec::new();
        }
        let Self { followed, acceptance: everyone, .. } = self;
        let Followed { acceptance, .. } = followed.entry(sequence.id()).or_insert_with(Followed::new);
        (0..limit as usize)
            .scan(1.0, |all_before, place| {
                let of_all = everyone.chance(place, PRIOR, WEIGHT_OF_PRIOR);
                *all_before *= acceptance.chance(place, of_all, WEIGHT_OF_ALL);
                Some(*all_before)
            })
            .collect()
    }

    /// Where no guess promises a gain: which sequence gets some all the same, since only guesses show whether guesses are
    /// right.
    pub(super) fn trial(&self, candidates: impl Iterator<Item = RequestId>, plain: f32) -> Option<usize> {
        if !self.purse.has(plain) {
            return None;
        }
        let mut candidates = candidates.map(|id| self.followed.get(&id).map_or(0, |it| it.drafts));
        let is_new = |drafts: u32| drafts < TRIALS || self.drafts < TRIALS_OF_ALL;
        candidates.position(|drafts| is_new(drafts) || TRIED_EVERY <= self.idle)
    }

    /// A step is done: what became of its guesses. `tokens` is how many each work gave.
    pub(super) fn learn(&mut self, scheduler: &Scheduler, plan: &StepPlan, tokens: impl Fn(&Work) -> usize) {
        let block_len = scheduler.limits().block_len;
        self.idle = if plan.drafts.is_empty() { self.idle.saturating_add(1) } else { 0 };
        for work in plan.work.iter().filter(|work| 0 < work.drafted.0) {
            let accepted = tokens(work).saturating_sub(1);
            let sequence = scheduler.sequence(work.request);
            let followed = self.followed.entry(work.request).or_insert_with(Followed::new);
            followed.drafts += 1;
            self.drafts += 1;
            // Behind the end of a request nothing was right or wrong.
            let judged = if sequence.is_some() { accepted + 1 } else { accepted };
            for place in 0..judged.min(work.drafted.0 as usize) {
                followed.acceptance.record(place, place < accepted);
                self.acceptance.record(place, place < accepted);
            }
            if let Some(sequence) = sequence {
                let accepted = u32::try_from(accepted).expect("a draft is short");
                let right = accepted.min(work.drafted.0 - 1);
                let computed = TokenCount(work.first.0 + work.count.0 + right);
                self.cache.fill(&sequence.blocks, computed, block_len);
            }
        }
    }

    /// What a step gained, in steps without guesses, of which one takes `plain` seconds.
    pub(super) fn earn(&mut self, plain: f32, gained: f32) {
        self.purse.earn(plain, gained);
    }

    /// Chances of guesses for a sequence like all others; none while hardly any guesses were seen.
    pub(super) fn chances_of_all(&self, most: u32) -> Vec<f32> {
        let most = if self.drafts < TRIALS_OF_ALL { 0 } else { most };
        let mut before = PRIOR;
        (0..most as usize)
            .scan(1.0, |all_before, place| {
                // Where none was seen for want of right ones before it, as good as those.
                before = self.acceptance.chance(place, before, WEIGHT_OF_PRIOR);
                *all_before *= before;
                Some(*all_before)
            })
            .collect()
    }

    /// The known tokens that it should compute after a step, at most `most`: of one sequence after another, and only as far as
    /// `worth` says; `None` computes all.
    pub(super) fn catch_up(
        &self,
        scheduler: &Scheduler,
        plan: &StepPlan,
        most: u32,
        worth: Option<Worth>,
    ) -> Vec<CatchUp> {
        let limits = scheduler.limits();
        let mut left = most.min(worth.map_or(u32::MAX, |it| self.chunk(it.plain)));
        if worth.is_some_and(|it| !it.is_promising && self.idle < TRIED_EVERY) {
            return Vec::new();
        }
        let mut claims = Claims::default();
        let mut chosen = Vec::new();
        for work in &plan.work {
            let sequence = scheduler.sequence(work.request).filter(|sequence| sequence.decodes());
            let Some(sequence) = sequence else { continue };
            let first = self.computed(sequence, limits.block_len);
            let behind = sequence.computed().0.min(self.longest.0).saturating_sub(first.0);
            // A few are computed when it guesses.
            if behind < MOST_BEHIND || left == 0 {
                continue;
            }
            let useful = sequence.useful_drafts(limits.max_model_len).0;
            if !worth.is_none_or(|it| self.is_worth(behind, useful, plan.work.len(), it.plain)) {
                continue;
            }
            let count = behind.min(left);
            if claims.take(&sequence.blocks, first, limits.block_len) {
                left -= count;
                chosen.push(CatchUp { request: work.request, first, count: TokenCount(count) });
            }
            if worth.is_some_and(|it| !it.is_promising) {
                break; // One is enough to see whether it still is as it was.
            }
        }
        chosen
    }

    /// It has computed those tokens, which took so long.
    pub(super) fn caught_up(&mut self, scheduler: &Scheduler, done: &[CatchUp], took: Duration) {
        let tokens: u32 = done.iter().map(|it| it.count.0).sum();
        if tokens == 0 {
            return;
        }
        let took = took.as_secs_f32();
        self.purse.pay(took);
        let per_token = took / tokens as f32;
        let before = self.per_token.unwrap_or(per_token);
        self.per_token = Some(before + (per_token - before) * WEIGHT_OF_LAST);
        for it in done {
            let computed = TokenCount(it.first.0 + it.count.0);
            self.cache.fill(scheduler.block_table(it.request), computed, scheduler.limits().block_len);
        }
    }

    /// Tokens that hold up the next step by a bounded share of its time.
    fn chunk(&self, plain: f32) -> u32 {
        let tokens = self.per_token.map_or(FIRST_CHUNK, |per_token| (HOLD_UP * plain / per_token) as u32);
        tokens.max(LEAST_CHUNK)
    }

    /// Whether to catch up with so many tokens may pay, for a sequence that has `useful` tokens to come in a step of
    /// `sequences`, all of which wait.
    fn is_worth(&self, behind: u32, useful: u32, sequences: usize, plain: f32) -> bool {
        let cost = behind as f32 * self.per_token.unwrap_or(0.0);
        let hoped_for = HOPE * useful as f32 * plain;
        cost * sequences as f32 <= hoped_for && self.purse.has(cost)
    }
}

impl Followed {
    fn new() -> Self {
        Self { acceptance: Acceptance::new(MEMORY_OF_ONE), drafts: 0 }
    }
}

impl Claims {
    /// Whether nobody else fills the blocks from token `first` on; nobody else will, then.
    fn take(&mut self, table: &[BlockRef], first: TokenCount, block_len: BlockLen) -> bool {
        let from = first.blocks_filled(block_len).0 as usize;
        let written = table.get(from..).unwrap_or_default();
        let is_free = written.iter().all(|reference| !self.0.contains(&reference.block));
        if is_free {
            self.0.extend(written.iter().map(|reference| reference.block));
        }
        is_free
    }
}

/// Tokens that it may lack when it guesses: it computes them on the way. More than the steps between two guesses of a
/// sequence that gets some all the time.
pub const MOST_BEHIND: u32 = 8;

/// The chance of a guess of which nothing is known.
const PRIOR: f32 = 0.7;

/// Drafts that a request gets whatever was known before it.
const TRIALS: u32 = 2;

/// Drafts that must have been seen before more than one sequence is caught up with at a time.
const TRIALS_OF_ALL: u64 = 8;

/// Steps without a draft after which there is one, to see whether it is right.
const TRIED_EVERY: u32 = 64;

/// Share of a step's time that catching up may take after it.
const HOLD_UP: f32 = 0.5;

/// Tokens to catch up with at once, while it is not known how long they take, and at least.
const FIRST_CHUNK: u32 = 32;
const LEAST_CHUNK: u32 = 16;

/// Share of the time of the tokens to come that guesses are hoped to save.
const HOPE: f32 = 0.25;

/// Weight of the last measurement of what a token takes.
const WEIGHT_OF_LAST: f32 = 0.25;
