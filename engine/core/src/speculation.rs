//! Guesses at the next tokens, to be verified by the step that computes them anyway: several tokens for one reading of the
//! weights.
//!
//! What a request answers does not depend on them: the token at a position is sampled with that position's own draw from
//! that position's own logits, which no other row of a step changes, and a guess counts only when it is that token
//! (`docs/decisions/0012`). What depends on them is speed, so two things are measured all the time: how often guesses of
//! each kind are right, also while none is made, and what steps cost with so many of them. Guesses are made as far as
//! both together promise a gain.

mod acceptance;
mod choice;
mod costs;
mod lookup;

use std::collections::BTreeMap;
use std::time::Duration;

use tidemill_kvtransfer_proto::units::TokenCount;

use crate::plan::{Drafts, StepPlan, Work};
use crate::request::RequestId;
use crate::scheduler::{Outcome, Scheduler};
use crate::sequence::Sequence;

use acceptance::Acceptance;
use costs::{CostCurve, StepCosts};
use lookup::Lookup;

/// How guesses are made: by prompt lookup, which copies what followed the last tokens where they occurred before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpeculationSettings {
    /// Guesses for one sequence in one step at most; from 1 to [`MOST_DRAFTED`].
    pub most: u32,
    /// Tokens that must match at least. At least one.
    pub shortest_match: u32,
    /// A match of so many tokens is good enough: none longer is searched for.
    pub longest_match: u32,
    /// Whether guesses are made only as far as they pay. Otherwise there are always as many as can be, which is for tests
    /// and measurements.
    pub adaptive: bool,
}

/// Sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculationSums {
    /// Drafts verified: at most one for each sequence in each step.
    pub drafts: u64,
    /// Tokens of these.
    pub drafted: u64,
    /// Those of them that were right and became output.
    pub accepted: u64,
    /// The same by their place in the draft.
    pub accepted_at: [u64; MOST_DRAFTED as usize],
    /// Drafts that could have been made, but would not have paid.
    pub held_back: u64,
}

/// Guesses for all sequences of a worker.
#[derive(Clone, Debug)]
pub struct Speculation {
    settings: SpeculationSettings,
    followed: BTreeMap<RequestId, Followed>,
    /// Of all requests: what a new one begins with.
    acceptance: Acceptance,
    costs: StepCosts,
    sums: SpeculationSums,
}

/// A sequence for which guesses are made.
#[derive(Clone, Debug)]
struct Followed {
    lookup: Lookup,
    acceptance: Acceptance,
}

/// A sequence that could have guesses in a step.
struct Candidate<'a> {
    sequence: &'a Sequence,
    /// For each guess, the chance that it and all before it are right.
    chances: Vec<f32>,
}

impl Speculation {
    /// # Panics
    ///
    /// When the settings are out of their bounds.
    pub fn new(settings: SpeculationSettings) -> Self {
        let SpeculationSettings { most, shortest_match, longest_match, adaptive: _ } = settings;
        assert!((1..=MOST_DRAFTED).contains(&most), "from 1 to {MOST_DRAFTED} guesses, not {most}");
        assert!(0 < shortest_match && shortest_match <= longest_match, "a match has a token");
        Self {
            settings,
            followed: BTreeMap::new(),
            acceptance: Acceptance::new(MEMORY_OF_ALL),
            costs: StepCosts::default(),
            sums: SpeculationSums::default(),
        }
    }

    /// The drafts that a step should have, for [`Scheduler::plan_with_drafts`]. `room` is how many more tokens it may.
    pub fn propose(&mut self, scheduler: &Scheduler, plan: &StepPlan, room: TokenCount) -> Drafts {
        self.followed.retain(|id, _| scheduler.sequence(*id).is_some());
        let mut candidates = Vec::new();
        for work in &plan.work {
            let sequence = scheduler.sequence(work.request).filter(|sequence| sequence.decodes());
            let Some(sequence) = sequence else { continue };
            let useful = sequence.useful_drafts(scheduler.limits().max_model_len);
            let chances = self.follow(sequence, useful.min(room));
            if !chances.is_empty() {
                candidates.push(Candidate { sequence, chances });
            }
        }
        if candidates.is_empty() {
            return Drafts::new();
        }
        let drafts = self.draft(&candidates, &self.choose(plan, &candidates));
        self.sums.held_back += (candidates.len() - drafts.len()) as u64;
        drafts
    }

    /// Takes in how a step went. `took` is what computing and sampling took.
    pub fn learn(&mut self, plan: &StepPlan, outcomes: &[Outcome], took: Duration) {
        if only_decodes(plan) {
            let drafted = plan.work.iter().map(|work| work.drafted.0).sum();
            self.costs.record(count(plan.work.len()), drafted, took);
        }
        for work in plan.work.iter().filter(|work| 0 < work.drafted.0) {
            let tokens = outcomes.iter().filter(|outcome| is_token_of(outcome, work)).count();
            let accepted = tokens.saturating_sub(1);
            self.sums.drafts += 1;
            self.sums.drafted += u64::from(work.drafted.0);
            self.sums.accepted += accepted as u64;
            self.sums.accepted_at[..accepted].iter_mut().for_each(|sum| *sum += 1);
        }
    }

    /// Sums since the start.
    pub const fn sums(&self) -> &SpeculationSums {
        &self.sums
    }

    /// Brings the lookup of a sequence up to date; returns the chances of at most `limit` guesses.
    fn follow(&mut self, sequence: &Sequence, limit: TokenCount) -> Vec<f32> {
        let SpeculationSettings { most, shortest_match, longest_match, adaptive: _ } = self.settings;
        let Followed { lookup, acceptance } =
            self.followed.entry(sequence.id()).or_insert_with(|| Followed {
                lookup: Lookup::new(shortest_match, longest_match),
                acceptance: Acceptance::new(MEMORY_OF_ONE),
            });
        let everyone = &mut self.acceptance;
        lookup.follow(sequence.tokens(), sequence.request().prompt_len.0 as usize, |evidence, right| {
            acceptance.record(evidence, right);
            everyone.record(evidence, right);
        });
        let Some(found) = lookup.found() else { return Vec::new() };
        // A right guess makes the match longer by itself.
        (found.length..found.length + most.min(limit.0) as usize)
            .scan(1.0, |all_before, evidence| {
                let prior = 1.0 - 1.0 / (evidence + 1) as f32;
                let of_all = everyone.chance(evidence, prior, WEIGHT_OF_PRIOR);
                *all_before *= acceptance.chance(evidence, of_all, WEIGHT_OF_ALL);
                Some(*all_before)
            })
            .collect()
    }

    /// How many guesses each of the candidates gets.
    fn choose(&self, plan: &StepPlan, candidates: &[Candidate<'_>]) -> Vec<usize> {
        let chances: Vec<&[f32]> = candidates.iter().map(|it| it.chances.as_slice()).collect();
        let all: Vec<usize> = chances.iter().map(|it| it.len()).collect();
        if !self.settings.adaptive {
            return all;
        }
        let costs = if only_decodes(plan) {
            self.costs.curve(count(plan.work.len()))
        } else {
            Some(CostCurve::proportional(plan.tokens().0, count(all.iter().sum())))
        };
        let others = plan.work.len() - candidates.len();
        costs.map_or_else(|| vec![0; all.len()], |costs| choice::choose(&chances, others, &costs))
    }

    fn draft(&self, candidates: &[Candidate<'_>], chosen: &[usize]) -> Drafts {
        let drafted = candidates.iter().zip(chosen).filter(|(_, count)| 0 < **count);
        drafted
            .map(|(Candidate { sequence, .. }, count)| {
                let lookup = &self.followed[&sequence.id()].lookup;
                (sequence.id(), lookup.draft(sequence.tokens(), *count))
            })
            .collect()
    }
}

/// Whether every sequence of the step computes one token and its guesses: such steps can be compared.
fn only_decodes(plan: &StepPlan) -> bool {
    !plan.work.is_empty() && plan.work.iter().all(|work| work.samples && work.count == TokenCount(1))
}

fn is_token_of(outcome: &Outcome, work: &Work) -> bool {
    matches!(outcome, Outcome::Token { request, .. } if *request == work.request)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).expect("a step is bounded far below 2^32 tokens")
}

/// Guesses for one sequence in one step at most.
pub const MOST_DRAFTED: u32 = 32;

/// Observations that count for what all requests have in common.
const MEMORY_OF_ALL: f32 = 256.0;

/// Observations that count for a single request.
const MEMORY_OF_ONE: f32 = 32.0;

/// Observations that the chance before all observations is worth.
const WEIGHT_OF_PRIOR: f32 = 2.0;

/// Observations of a request that those of all requests are worth.
const WEIGHT_OF_ALL: f32 = 4.0;
