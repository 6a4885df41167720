//! A draft model under a made-up clock: what it gains where its guesses are right and it is cheap, and that it costs next to
//! nothing where they are not or it is not, prompts that it has to compute included.
//!
//! A step without guesses takes ten milliseconds. Times are sums of what the rules say, so a row is right or wrong on every
//! machine.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::time::Duration;

use tidemill_engine_core::plan::StepPlan;
use tidemill_engine_core::request::{Part, Request, RequestId, SamplingParams, StopConditions, TokenId};
use tidemill_engine_core::scheduler::{Limits, Outcome, Scheduler};
use tidemill_engine_core::speculation::{
    GuessMethod, MOST_BEHIND, Speculation, SpeculationSettings, SpeculationSums,
};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, TokenCount};

/// What the draft model is like.
#[derive(Clone, Copy)]
struct Draft {
    /// Of a hundred guesses so many are right; by number of the request.
    right: fn(u64) -> u64,
    /// Milliseconds of one guess for all sequences.
    pass: f64,
    /// Milliseconds of a token of a prompt.
    token: f64,
    /// Milliseconds that a further row lengthens the model's own step by.
    row: f64,
}

#[derive(Clone, Copy)]
struct Shape {
    requests: u64,
    prompt: u32,
    output: u32,
    at_once: bool,
}

const ONE_LONG: Shape = Shape { requests: 1, prompt: 200, output: 3_000, at_once: true };
const MANY_SHORT: Shape = Shape { requests: 60, prompt: 60, output: 60, at_once: false };
const LONG_PROMPTS: Shape = Shape { requests: 30, prompt: 2_000, output: 200, at_once: false };
const EIGHT: Shape = Shape { requests: 8, prompt: 200, output: 600, at_once: true };

#[test]
fn what_a_draft_model_gains_and_costs() {
    let good = Draft { right: |_| 90, pass: 1.0, token: 0.1, row: 0.2 };
    let bad = Draft { right: |_| 3, ..good };
    let dear = Draft { pass: 12.0, ..good };
    let large = Draft { pass: 9.0, token: 2.0, ..bad };
    let turns = Draft { right: |request| if request.is_multiple_of(2) { 95 } else { 2 }, ..good };
    #[rustfmt::skip]
    let rows: [(&str, Draft, Shape, f64); 11] = [
        // name                                             draft    requests       at least
        ("right guesses",                                   good,    ONE_LONG,      2.3),
        ("right guesses, short answers",                    good,    MANY_SHORT,    1.4),
        ("right guesses behind long prompts",               good,    LONG_PROMPTS,  1.1),
        ("right guesses for eight",                         good,    EIGHT,         1.6),
        ("wrong guesses",                                   bad,     ONE_LONG,      0.97),
        ("wrong guesses, short answers",                    bad,     MANY_SHORT,    0.97),
        ("wrong guesses behind long prompts",               bad,     LONG_PROMPTS,  0.97),
        ("wrong guesses for eight",                         bad,     EIGHT,         0.97),
        ("a draft model slower than the model",             dear,    ONE_LONG,      0.97),
        ("a large one with wrong guesses and long prompts", large,   LONG_PROMPTS,  0.97),
        ("right for every second request",                  turns,   MANY_SHORT,    1.1),
    ];
    let mut wrong = Vec::new();
    for (row, draft, shape, at_least) in rows {
        let (plain, _) = run(draft, shape, None);
        let (guessing, sums) = run(draft, shape, Some(true));
        let ratio = plain / guessing;
        if ratio < at_least {
            wrong.push(format!("{row}: {ratio:.3} instead of {at_least}, {sums:?}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn a_prompt_is_caught_up_with_in_chunks_and_never_twice() {
    let shape = Shape { requests: 1, prompt: 100, output: 40, at_once: true };
    let mut scheduler = Scheduler::new(limits(), BlockCount(100));
    let mut speculation = Speculation::new(settings(false));
    let mut computed = Vec::new();
    for id in 1..=2 {
        scheduler.submit(request(id, shape)).unwrap();
        loop {
            let mut plan =
                scheduler.plan_with_drafts(|plan, room| speculation.propose(&scheduler, plan, room));
            if plan.is_empty() {
                break;
            }
            for work in plan.work.clone().iter().filter(|work| 0 < work.drafted.0) {
                let behind = work.first.0 + 1 - speculation.draft_computed(&scheduler, work.request).0;
                assert!(behind <= MOST_BEHIND, "{behind} tokens are computed with the first guess");
                plan.write_draft(work.request, vec![7; work.drafted.0 as usize]);
            }
            scheduler.begin(&plan);
            let sampled: Vec<_> =
                plan.work.iter().filter(|it| it.samples).map(|it| (it.request, 9)).collect();
            let outcomes = scheduler.finish(&plan, &sampled);
            speculation.learn(&scheduler, &plan, &outcomes, Duration::from_millis(10));
            let chunks = speculation.catch_up(&scheduler, &plan, 32);
            computed.extend(chunks.iter().map(|it| (it.request.0, it.first.0, it.count.0)));
            speculation.caught_up(&scheduler, &chunks, Duration::from_millis(1));
        }
    }
    // The second finds the full blocks of the first in the prefix cache, and what the draft model has in them.
    assert_eq!(computed, [(1, 0, 32), (1, 32, 32), (1, 64, 32)]);
}

/// Milliseconds that all of it takes.
fn run(draft: Draft, shape: Shape, adaptive: Option<bool>) -> (f64, SpeculationSums) {
    let mut scheduler = Scheduler::new(limits(), BlockCount(4_000));
    let mut speculation = adaptive.map(|adaptive| Speculation::new(settings(adaptive)));
    let mut waiting = (1..=shape.requests).map(|id| request(id, shape));
    let mut elapsed = 0.0;
    loop {
        if shape.at_once {
            waiting.by_ref().for_each(|request| scheduler.submit(request).unwrap());
        } else if scheduler.counts().running == 0 {
            waiting.by_ref().take(1).for_each(|request| scheduler.submit(request).unwrap());
        }
        let plan = match &mut speculation {
            Some(it) => scheduler.plan_with_drafts(|plan, room| it.propose(&scheduler, plan, room)),
            None => scheduler.plan(),
        };
        if plan.is_empty() {
            break;
        }
        let rows: u32 = plan.work.iter().map(|work| work.drafted.0).sum();
        let passes = plan.work.iter().map(|work| work.drafted.0).max().unwrap();
        let took = 10.0 + draft.row * f64::from(rows) + draft.pass * f64::from(passes);
        scheduler.begin(&plan);
        let sampled = sample(&scheduler, &plan, draft);
        let outcomes = scheduler.finish(&plan, &sampled);
        elapsed += took;
        let Some(it) = &mut speculation else { continue };
        it.learn(&scheduler, &plan, &outcomes, Duration::from_secs_f64(took / 1e3));
        let chunks = it.catch_up(&scheduler, &plan, 512);
        let tokens: u32 = chunks.iter().map(|it| it.count.0).sum();
        let took = draft.token * f64::from(tokens);
        elapsed += took;
        it.caught_up(&scheduler, &chunks, Duration::from_secs_f64(took / 1e3));
        assert!(outcomes.iter().all(|it| matches!(it, Outcome::Token { .. })), "all are served");
    }
    (elapsed, speculation.map_or_else(SpeculationSums::default, |it| *it.sums()))
}

/// The guesses in the plan stand for any; whether one is right is drawn.
fn sample(scheduler: &Scheduler, plan: &StepPlan, draft: Draft) -> Vec<(RequestId, TokenId)> {
    let mut sampled = Vec::new();
    for work in plan.work.iter().filter(|work| work.samples) {
        let next = scheduler.sequence(work.request).unwrap().output().len() as u64;
        for (place, guess) in plan.draft(work).iter().enumerate() {
            if mix(work.request.0 * 1_000_003 + next + place as u64) % 100 < (draft.right)(work.request.0) {
                sampled.push((work.request, *guess));
            } else {
                break;
            }
        }
        sampled.push((work.request, 9));
    }
    sampled
}

fn settings(adaptive: bool) -> SpeculationSettings {
    SpeculationSettings { method: GuessMethod::DraftModel, most: 6, adaptive }
}

fn limits() -> Limits {
    Limits {
        block_len: BlockLen::new(16).unwrap(),
        max_model_len: TokenCount(4_000),
        max_num_seqs: 16,
        max_num_batched_tokens: TokenCount(512),
        max_waiting: 64,
        prefix_cache: true,
        long_prefill_threshold: None,
    }
}

fn request(id: u64, shape: Shape) -> Request {
    // A single shape of request has one prompt; of many, each has its own.
    let number = if shape.requests == 1 { 0 } else { id };
    let token = |place| u32::try_from(mix(number * 7_919 + u64::from(place)) % 1_000).unwrap();
    Request {
        id: RequestId(id),
        tokens: (0..shape.prompt).map(token).collect(),
        prompt_len: TokenCount(shape.prompt),
        sampling: SamplingParams::default(),
        stop: StopConditions::after(shape.output),
        part: Part::Whole,
    }
}

fn mix(number: u64) -> u64 {
    let mixed = (number ^ (number >> 31)).wrapping_add(0x51).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 24
}
