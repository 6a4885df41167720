//! Guesses under a made-up clock: what they gain where text repeats itself, and that they cost next to nothing where it does
//! not, whatever steps cost.
//!
//! The model is a rule that says which token comes at which place of an answer; the device is a rule that says how long a step
//! takes. Times are sums of what the device says, with guesses and without, so a row is right or wrong on every machine.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::time::Duration;

use tidemill_engine_core::plan::StepPlan;
use tidemill_engine_core::request::{Part, Request, RequestId, SamplingParams, StopConditions, TokenId};
use tidemill_engine_core::scheduler::{Limits, Outcome, Scheduler};
use tidemill_engine_core::speculation::{GuessMethod, Speculation, SpeculationSettings, SpeculationSums};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, TokenCount};

/// The token at a place of a request's answer.
type Text = fn(u64, u32) -> TokenId;
/// Milliseconds of a step with so many rows; the number of the step so that times can change.
type Device = fn(u32, u64) -> f64;

#[test]
fn what_guesses_gain_and_cost() {
    let free: Device = |_, _| 10.0;
    let cheap: Device = |rows, _| 9.0 + f64::from(rows);
    let dear: Device = |rows, _| 5.0 + 5.0 * f64::from(rows);
    let bound: Device = |rows, _| 10.0 * f64::from(rows);
    let stairs: Device = |rows, _| 10.0 * f64::from(rows.div_ceil(4));
    let grows_dear: Device =
        |rows, step| if step < 100 { 9.0 + f64::from(rows) } else { 10.0 * f64::from(rows) };
    let grows_cheap: Device =
        |rows, step| if step < 500 { 10.0 * f64::from(rows) } else { 9.0 + f64::from(rows) };
    let uneven: Device = |rows, step| {
        let luck = mix(step) % 100;
        (6.0 + 4.0 * f64::from(rows)) * if luck == 0 { 8.0 } else { 0.9 + 0.002 * luck as f64 }
    };
    #[rustfmt::skip]
    let rows: [(&str, Text, Device, Shape, f64); 20] = [
        // name                                                 text     device       requests        at least
        ("a copy, where rows are free",                         copy,    free,        ONE_LONG,       6.0),
        ("a copy, where rows are cheap",                        copy,    cheap,       ONE_LONG,       3.5),
        ("a copy, where rows are dear",                         copy,    dear,        ONE_LONG,       1.3),
        ("a copy, where rows cost as much as steps",            copy,    bound,       ONE_LONG,       0.98),
        ("a copy, where rows come by fours",                    copy,    stairs,      ONE_LONG,       3.7),
        ("a copy, on an uneven machine",                        copy,    uneven,      ONE_LONG,       1.5),
        ("a copy, and steps become dear",                       copy,    grows_dear,  ONE_LONG,       0.98),
        ("a copy, and steps become cheap",                      copy,    grows_cheap, ONE_LONG,       1.2),
        ("copies with changes, where rows are cheap",           edited,  cheap,       ONE_LONG,       2.0),
        ("copies with changes, where rows are dear",            edited,  dear,        ONE_LONG,       1.0),
        ("short copies, one after another",                     copy,    cheap,       MANY_SHORT,     1.8),
        ("noise, where rows are free",                          noise,   free,        ONE_LONG,       0.99),
        ("noise, where rows are dear",                          noise,   dear,        ONE_LONG,       0.98),
        ("noise, where rows cost as much as steps",             noise,   bound,       ONE_LONG,       0.98),
        ("noise, on an uneven machine",                         noise,   uneven,      ONE_LONG,       0.98),
        ("short noise, one after another, rows dear",           noise,   dear,        MANY_SHORT,     0.98),
        ("a text that turns from noise to copy and back",       turning, dear,        ONE_LONG,       1.05),
        ("eight at once, all copying",                          copy,    cheap,       EIGHT,          1.3),
        ("eight at once, half copying, rows cost as steps",     halves,  bound,       EIGHT,          0.97),
        ("eight at once, noise",                                noise,   dear,        EIGHT,          0.98),
    ];
    let mut wrong = Vec::new();
    for (row, text, device, shape, at_least) in rows {
        let (plain, _) = run(text, device, shape, None);
        let (guessing, sums) = run(text, device, shape, Some(true));
        let ratio = plain / guessing;
        if ratio < at_least {
            wrong.push(format!("{row}: {ratio:.3} instead of {at_least}, {sums:?}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn without_measure_guesses_can_cost() {
    let bound: Device = |rows, _| 10.0 * f64::from(rows);
    let (plain, _) = run(edited, bound, ONE_LONG, None);
    let (guessing, sums) = run(edited, bound, ONE_LONG, Some(false));
    assert!(plain / guessing < 0.9, "which is why they are measured: {sums:?}");
}

/// How many requests, how long, and whether they come at once.
#[derive(Clone, Copy)]
struct Shape {
    requests: u64,
    prompt: u32,
    output: u32,
    at_once: bool,
}

const ONE_LONG: Shape = Shape { requests: 1, prompt: 200, output: 3_000, at_once: true };
const MANY_SHORT: Shape = Shape { requests: 40, prompt: 60, output: 40, at_once: false };
const EIGHT: Shape = Shape { requests: 8, prompt: 200, output: 400, at_once: true };

/// The prompt begins over and over.
fn copy(request: u64, place: u32) -> TokenId {
    prompt_token(request, place % 60)
}

/// The same with every fifteenth token changed.
fn edited(request: u64, place: u32) -> TokenId {
    if place % 15 == 7 { noise(request, place) } else { copy(request, place) }
}

fn noise(request: u64, place: u32) -> TokenId {
    // Few different tokens, so that matches by accident are frequent.
    u32::try_from(mix(request * 1_000_003 + u64::from(place)) % 40).unwrap()
}

fn turning(request: u64, place: u32) -> TokenId {
    if (place / 100).is_multiple_of(2) { noise(request, place) } else { copy(request, place) }
}

fn halves(request: u64, place: u32) -> TokenId {
    if request.is_multiple_of(2) { noise(request, place) } else { copy(request, place) }
}

fn prompt_token(request: u64, place: u32) -> TokenId {
    u32::try_from(mix(request * 7_919 + u64::from(place)) % 1_000).unwrap()
}

/// Milliseconds that all of it takes, with guesses that are adaptive or not, or without any.
fn run(text: Text, device: Device, shape: Shape, adaptive: Option<bool>) -> (f64, SpeculationSums) {
    let mut scheduler = Scheduler::new(limits(), BlockCount(4_000));
    let mut speculation =
        adaptive.map(|adaptive| Speculation::new(SpeculationSettings { method: LOOKUP, most: 8, adaptive }));
    let mut waiting = (1..=shape.requests).map(|id| request(id, shape));
    let mut answers: BTreeMap<RequestId, u32> = BTreeMap::new();
    let (mut elapsed, mut steps) = (0.0, 0);
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
        scheduler.begin(&plan);
        let sampled = sample(&scheduler, &plan, text);
        let outcomes = scheduler.finish(&plan, &sampled);
        // A step of the same text takes as long with guesses as without, but for its rows.
        let took = device(plan.tokens().0, steps);
        steps += 1;
        elapsed += took;
        if let Some(it) = &mut speculation {
            it.learn(&scheduler, &plan, &outcomes, Duration::from_secs_f64(took / 1e3));
        }
        for outcome in outcomes {
            let Outcome::Token { request, token, index, .. } = outcome else { panic!("{outcome:?}") };
            assert_eq!(token, text(request.0, index), "the answer is the model's");
            *answers.entry(request).or_default() += 1;
        }
    }
    assert!(answers.values().all(|tokens| *tokens == shape.output), "all answers are whole");
    assert_eq!(answers.len() as u64, shape.requests);
    (elapsed, speculation.map_or_else(SpeculationSums::default, |it| *it.sums()))
}

fn sample(scheduler: &Scheduler, plan: &StepPlan, text: Text) -> Vec<(RequestId, TokenId)> {
    let mut sampled = Vec::new();
    for work in plan.work.iter().filter(|work| work.samples) {
        let next = u32::try_from(scheduler.sequence(work.request).unwrap().output().len()).unwrap();
        let draft = plan.draft(work);
        for guesses in 0..=draft.len() {
            let token = text(work.request.0, next + u32::try_from(guesses).unwrap());
            sampled.push((work.request, token));
            if draft.get(guesses) != Some(&token) {
                break;
            }
        }
    }
    sampled
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
    Request {
        id: RequestId(id),
        tokens: (0..shape.prompt).map(|place| prompt_token(id, place)).collect(),
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

const LOOKUP: GuessMethod = GuessMethod::PromptLookup { shortest_match: 2, longest_match: 5 };
