//! A smaller model that guesses what the model will say.
//!
//! Its keys and values lie in an arena of their own, of as many blocks as the model's: a block number stands for the same
//! tokens in both, so whatever becomes of a block (prefix cache, preemption, handoff) needs no second bookkeeping
//! (`docs/decisions/0015`). It is asked with the request's own sampling, seed and position, as the model will be: so what
//! it draws is what the model draws, as often as the two agree. No answer depends on it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use tidemill_engine_core::plan::StepPlan;
use tidemill_engine_core::request::{RequestId, TokenId};
use tidemill_engine_core::scheduler::Scheduler;
use tidemill_engine_core::speculation::{CatchUp, MOST_BEHIND, Speculation};
use tidemill_kernels::cpu::Cpu;
use tidemill_kernels::kv::BlockAddress;
use tidemill_kvtransfer_proto::units::TokenCount;

use crate::driver::{Active, Driver, RequestParts};
use crate::memory::Arena;
use crate::models::Model;
use crate::runner::{Batch, BatchSequence, LogitsWanted, Runner, RunnerLimits};
use crate::sampler::{History, Sampler};

/// The draft model, ready to run.
#[derive(Debug)]
pub(crate) struct DraftModel {
    runner: Runner,
    arena: Arena,
}

/// A sequence while its next tokens are guessed.
struct Guessing<'a> {
    request: RequestId,
    parts: &'a RequestParts,
    /// All tokens, then the guesses.
    text: Vec<TokenId>,
    known: usize,
    /// Tokens whose keys and values are there.
    computed: usize,
    blocks: Vec<BlockAddress>,
    wanted: usize,
}

impl Driver {
    /// Has the draft model make the guesses that the plan has room for.
    pub(crate) fn guess(&mut self, plan: &mut StepPlan) {
        let (Some(model), Some(speculation)) = (&mut self.draft_model, &self.speculation) else { return };
        if !plan.drafts.is_empty() {
            model.guess(plan, speculation, &self.scheduler, &self.requests, &mut self.sampler);
        }
    }

    /// Has the draft model compute known tokens that it lacks, when everybody has been told of the step's.
    pub(crate) fn catch_up(&mut self, plan: &StepPlan) {
        let (Some(model), Some(speculation)) = (&mut self.draft_model, &mut self.speculation) else { return };
        let most = u32::try_from(model.runner.limits().max_tokens).unwrap_or(u32::MAX);
        let chunks = speculation.catch_up(&self.scheduler, plan, most);
        if !chunks.is_empty() {
            let began = Instant::now();
            model.compute(&chunks, &self.scheduler);
            speculation.caught_up(&self.scheduler, &chunks, began.elapsed());
        }
    }
}

impl DraftModel {
    /// Makes its buffers; `limits` are those of the model that it guesses for.
    pub(crate) fn new(model: Arc<Model>, cpu: &Arc<Cpu>, arena: Arena, limits: RunnerLimits) -> Self {
        let limits = RunnerLimits {
            // A few known tokens of each sequence are computed with its first guess.
            max_tokens: limits.max_tokens.max(limits.max_seqs * MOST_BEHIND as usize),
            max_model_len: limits.max_model_len.min(model.spec.max_positions as usize),
            ..limits
        };
        let runner = Runner::new(model, Arc::clone(cpu), *arena.shape(), limits);
        Self { runner, arena }
    }

    /// Tokens of the longest sequence that it can take.
    pub(crate) fn longest(&self) -> TokenCount {
        TokenCount(position(self.runner.limits().max_model_len))
    }

    fn guess(
        &mut self,
        plan: &mut StepPlan,
        speculation: &Speculation,
        scheduler: &Scheduler,
        requests: &BTreeMap<RequestId, Active>,
        sampler: &mut Sampler,
    ) {
        let begin = |(&request, draft): (&RequestId, &Vec<TokenId>)| {
            let text = scheduler.tokens(request).to_vec();
            Some(Guessing {
                request,
                parts: &requests.get(&request)?.request,
                known: text.len(),
                text,
                computed: speculation.draft_computed(scheduler, request).0 as usize,
                blocks: self.blocks(scheduler, request),
                wanted: draft.len(),
            })
        };
        let mut guessing: Vec<Guessing<'_>> = plan.drafts.iter().filter_map(begin).collect();
        // Those with most guesses first: who has enough falls off the end.
        guessing.sort_by_key(|it| std::cmp::Reverse(it.wanted));
        let rounds = guessing.first().map_or(0, |it| it.wanted);
        for round in 0..rounds {
            let places = guessing.partition_point(|it| round < it.wanted);
            self.guess_one_each(&mut guessing[..places], sampler);
        }
        for Guessing { request, mut text, known, .. } in guessing {
            plan.write_draft(request, text.split_off(known));
        }
    }

    /// One more guess for each.
    fn guess_one_each(&mut self, guessing: &mut [Guessing<'_>], sampler: &mut Sampler) {
        let sequences: Vec<BatchSequence<'_>> = guessing
            .iter()
            .map(|it| BatchSequence {
                tokens: &it.text[it.computed..],
                first_position: position(it.computed),
                blocks: &it.blocks,
                logits: LogitsWanted::Last,
            })
            .collect();
        let mut guesses: Vec<TokenId> = Vec::with_capacity(sequences.len());
        self.runner.step(&Batch { sequences: &sequences }, &mut nothing).for_each(|row| {
            let Guessing { parts, text, .. } = &guessing[row.sequence];
            let (prompt, output) = text.split_at(parts.prompt_len);
            let (history, place) = (History { prompt, output }, position(output.len()));
            // Where nothing can be sampled the model will find out.
            let guess = sampler.choose(row.logits, history, &parts.sampling, &parts.stop, place);
            guesses.push(guess.unwrap_or_default());
        });
        for (it, guess) in guessing.iter_mut().zip(guesses) {
            it.computed = it.text.len();
            it.text.push(guess);
        }
    }

    /// Computes known tokens, for their keys and values alone.
    fn compute(&mut self, chunks: &[CatchUp], scheduler: &Scheduler) {
        let tables: Vec<Vec<BlockAddress>> =
            chunks.iter().map(|chunk| self.blocks(scheduler, chunk.request)).collect();
        let sequences: Vec<BatchSequence<'_>> = chunks
            .iter()
            .zip(&tables)
            .map(|(&CatchUp { request, first, count }, blocks)| BatchSequence {
                tokens: &scheduler.tokens(request)[first.0 as usize..(first.0 + count.0) as usize],
                first_position: first.0,
                blocks,
                logits: LogitsWanted::None,
            })
            .collect();
        self.runner.step(&Batch { sequences: &sequences }, &mut nothing);
    }

    fn blocks(&self, scheduler: &Scheduler, request: RequestId) -> Vec<BlockAddress> {
        let table = scheduler.block_table(request);
        table.iter().map(|reference| self.arena.address(reference.block)).collect()
    }
}

fn nothing(_: Range<usize>) {}

fn position(tokens: usize) -> u32 {
    u32::try_from(tokens).expect("max_model_len bounds a sequence below 2^32 tokens")
}
