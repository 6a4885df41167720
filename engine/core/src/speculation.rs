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
mod draft_cache;
mod draft_model;
mod lookup;
mod prompt_lookup;
mod purse;

use std::time::Duration;

use tidemill_kvtransfer_proto::units::TokenCount;

use crate::plan::{Drafts, StepPlan, Work};
use crate::request::{RequestId, TokenId};
use crate::scheduler::{Outcome, Scheduler};
use crate::sequence::Sequence;

use costs::{CostCurve, StepCosts};
use draft_model::{Claims, DraftModel, Worth};
use prompt_lookup::PromptLookup;

pub use draft_model::{CatchUp, MOST_BEHIND};

/// How guesses are made, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpeculationSettings {
    /// Who guesses.
    pub method: GuessMethod,
    /// Guesses for one sequence in one step at most; from 1 to [`MOST_DRAFTED`].
    pub most: u32,
    /// Whether guesses are made only as far as they pay. Otherwise there are always as many as can be, which is for tests
    /// and measurements.
    pub adaptive: bool,
}

/// Who guesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuessMethod {
    /// Prompt lookup, which copies what followed the last tokens where they occurred before.
    PromptLookup {
        /// Tokens that must match at least. At least one.
        shortest_match: u32,
        /// A match of so many tokens is good enough: none longer is searched for.
        longest_match: u32,
    },
    /// A smaller model of the same vocabulary. What is proposed here for it are numbers of guesses: the device has them
    /// guessed between the plan and the step (`docs/decisions/0015`).
    DraftModel,
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
    guesser: Guesser,
    costs: StepCosts,
    sums: SpeculationSums,
}

#[derive(Clone, Debug)]
enum Guesser {
    Lookup(PromptLookup),
    Model(DraftModel),
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
        let SpeculationSettings { method, most, adaptive: _ } = settings;
        assert!((1..=MOST_DRAFTED).contains(&most), "from 1 to {MOST_DRAFTED} guesses, not {most}");
        let guesser = match method {
            GuessMethod::PromptLookup { shortest_match, longest_match } => {
                Guesser::Lookup(PromptLookup::new(shortest_match, longest_match))
            }
            GuessMethod::DraftModel => Guesser::Model(DraftModel::new()),
        };
        Self { settings, guesser, costs: StepCosts::default(), sums: SpeculationSums::default() }
    }

    /// The draft model takes sequences of so many tokens.
    pub fn bound_draft_model(&mut self, longest: TokenCount) {
        if let Guesser::Model(model) = &mut self.guesser {
            model.bound(longest);
        }
    }

    /// The drafts that a step should have, for [`Scheduler::plan_with_drafts`]. `room` is how many more tokens it may.
    /// Those of a draft model have yet to be guessed: [`StepPlan::write_draft`].
    pub fn propose(&mut self, scheduler: &Scheduler, plan: &StepPlan, room: TokenCount) -> Drafts {
        let limits = scheduler.limits();
        match &mut self.guesser {
            Guesser::Lookup(lookup) => lookup.forget(scheduler),
            Guesser::Model(model) => model.forget(scheduler),
        }
        let mut candidates = Vec::new();
        let mut claims = Claims::default();
        for work in &plan.work {
            let sequence = scheduler.sequence(work.request).filter(|sequence| sequence.decodes());
            let Some(sequence) = sequence else { continue };
            let useful = sequence.useful_drafts(limits.max_model_len);
            let limit = useful.min(room).0.min(self.settings.most);
            let chances = match &mut self.guesser {
                Guesser::Lookup(lookup) => lookup.chances(sequence, limit),
                Guesser::Model(model) => model.chances(sequence, limit, limits.block_len, &mut claims),
            };
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

    /// Takes in how a step went. `took` is what guessing, computing and sampling took.
    pub fn learn(&mut self, scheduler: &Scheduler, plan: &StepPlan, outcomes: &[Outcome], took: Duration) {
        let tokens_of = |work: &Work| outcomes.iter().filter(|outcome| is_token_of(outcome, work)).count();
        if only_decodes(plan) {
            self.costs.record(count(plan.work.len()), drafted(plan), took);
        }
        if let Guesser::Model(model) = &mut self.guesser {
            model.learn(scheduler, plan, tokens_of);
            let sequences = count(plan.work.len());
            let plain = self.costs.plain(sequences).filter(|_| only_decodes(plan));
            if let (Some(plain), Some(curve)) = (plain, self.costs.curve(sequences)) {
                let tokens = plan.work.iter().map(tokens_of).sum::<usize>() as f32 / sequences as f32;
                let gained = tokens - curve.at(drafted(plan));
                model.earn(plain, if plan.drafts.is_empty() { 0.0 } else { gained });
            }
        }
        for work in plan.work.iter().filter(|work| 0 < work.drafted.0) {
            let accepted = tokens_of(work).saturating_sub(1);
            self.sums.drafts += 1;
            self.sums.drafted += u64::from(work.drafted.0);
            self.sums.accepted += accepted as u64;
            self.sums.accepted_at[..accepted].iter_mut().for_each(|sum| *sum += 1);
        }
    }

    /// Leading tokens of a sequence that the draft model has computed: it goes on behind them.
    pub fn draft_computed(&self, scheduler: &Scheduler, request: RequestId) -> TokenCount {
        match (&self.guesser, scheduler.sequence(request)) {
            (Guesser::Model(model), Some(sequence)) => model.computed(sequence, scheduler.limits().block_len),
            _ => TokenCount(0),
        }
    }

    /// The known tokens that the draft model should compute after a step, at most `most` of them, so that it can guess.
    pub fn catch_up(&self, scheduler: &Scheduler, plan: &StepPlan, most: u32) -> Vec<CatchUp> {
        let Guesser::Model(model) = &self.guesser else { return Vec::new() };
        if !self.settings.adaptive {
            return model.catch_up(scheduler, plan, most, None);
        }
        let sequences = count(plan.work.len());
        match (self.costs.plain(sequences), self.costs.curve(sequences)) {
            (Some(plain), Some(costs)) if only_decodes(plan) => {
                // As many for each: what was never measured is hoped to cost no more than what was.
                let mut tokens = 1.0;
                let is_promising =
                    model.chances_of_all(self.settings.most).iter().zip(1..).any(|(chance, it)| {
                        tokens += chance;
                        costs.at(it * sequences) < tokens * choice::WORTH_IT
                    });
                model.catch_up(scheduler, plan, most, Some(Worth { plain, is_promising }))
            }
            _ => Vec::new(),
        }
    }

    /// The draft model has computed what [`catch_up`](Self::catch_up) said, which took so long.
    pub fn caught_up(&mut self, scheduler: &Scheduler, done: &[CatchUp], took: Duration) {
        if let Guesser::Model(model) = &mut self.guesser {
            model.caught_up(scheduler, done, took);
        }
    }

    /// Sums since the start.
    pub const fn sums(&self) -> &SpeculationSums {
        &self.sums
    }

    /// How many guesses each of the candidates gets.
    fn choose(&self, plan: &StepPlan, candidates: &[Candidate<'_>]) -> Vec<usize> {
        let chances: Vec<&[f32]> = candidates.iter().map(|it| it.chances.as_slice()).collect();
        let all: Vec<usize> = chances.iter().map(|it| it.len()).collect();
        if !self.settings.adaptive {
            return all;
        }
        let sequences = count(plan.work.len());
        let costs = match &self.guesser {
            _ if only_decodes(plan) => self.costs.curve(sequences),
            Guesser::Lookup(_) => Some(CostCurve::proportional(plan.tokens().0, count(all.iter().sum()))),
            // It computes one row after another, while the others wait: not beside a prompt too.
            Guesser::Model(_) => None,
        };
        let Some(costs) = costs else { return vec![0; all.len()] };
        let others = plan.work.len() - candidates.len();
        let mut chosen = choice::choose(&chances, others, &costs);
        if let Guesser::Model(model) = &self.guesser
            && let Some(plain) = self.costs.plain(sequences)
            && chosen.iter().all(|count| *count == 0)
            && let Some(place) = model.trial(candidates.iter().map(|it| it.sequence.id()), plain)
        {
            chosen[place] = chances[place].len().min(TRIED_AT_ONCE);
        }
        chosen
    }

    fn draft(&self, candidates: &[Candidate<'_>], chosen: &[usize]) -> Drafts {
        let drafted = candidates.iter().zip(chosen).filter(|(_, count)| 0 < **count);
        let draft = |(Candidate { sequence, .. }, count): (&Candidate<'_>, &usize)| match &self.guesser {
            Guesser::Lookup(lookup) => (sequence.id(), lookup.draft(sequence, *count)),
            Guesser::Model(_) => (sequence.id(), vec![UNGUESSED; *count]),
        };
        drafted.map(draft).collect()
    }
}

/// Whether every sequence of the step computes one token and its guesses: such steps can be compared.
fn only_decodes(plan: &StepPlan) -> bool {
    !plan.work.is_empty() && plan.work.iter().all(|work| work.samples && work.count == TokenCount(1))
}

fn drafted(plan: &StepPlan) -> u32 {
    plan.work.iter().map(|work| work.drafted.0).sum()
}

fn is_token_of(outcome: &Outcome, work: &Work) -> bool {
    matches!(outcome, Outcome::Token { request, .. } if *request == work.request)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).expect("a step is bounded far below 2^32 tokens")
}

/// Guesses for one sequence in one step at most.
pub const MOST_DRAFTED: u32 = 32;

/// Stands for a guess that a draft model has yet to make.
const UNGUESSED: TokenId = 0;

/// Guesses of a trial: what a second one costs is not known from one alone.
const TRIED_AT_ONCE: usize = 2;

/// Observations that count for what all requests have in common.
const MEMORY_OF_ALL: f32 = 256.0;

/// Observations that count for a single request.
const MEMORY_OF_ONE: f32 = 32.0;

/// Observations that the chance before all observations is worth.
const WEIGHT_OF_PRIOR: f32 = 2.0;

/// Observations of a request that those of all requests are worth.
const WEIGHT_OF_ALL: f32 = 4.0;
