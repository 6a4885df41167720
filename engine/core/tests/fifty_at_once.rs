//! Many prompts at one moment, and long ones among a stream of short ones: what each step is made of, and after how many
//! steps each first token is there.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use tidemill_engine_core::request::{Part, Request, RequestId, SamplingParams, StopConditions};
use tidemill_engine_core::scheduler::{Limits, Outcome, Scheduler};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, TokenCount};

/// One request is in the middle of its answer when fifty long prompts come at once. It gets a token in every step; no
/// step is longer than its budget; and the first token of each prompt comes as soon as the prompts before it and its
/// own are computed, in the order of arrival.
#[test]
fn fifty_prompts_at_once_stop_no_answer_and_wait_for_what_came_before_them_alone() {
    let mut scheduler = Scheduler::new(limits(), BlockCount(BURST * (PROMPT + ANSWER).div_ceil(16) + 40));
    scheduler.submit(request(0, 16, 400)).unwrap();
    step(&mut scheduler);
    for number in 1..=BURST {
        scheduler.submit(request(number, PROMPT, ANSWER)).unwrap();
    }
    // In a step at most one token goes to each answer, so that the rest is for prompts.
    let for_prompts = BUDGET - (BURST + 1);
    let mut arrived = Vec::new();
    for steps in 1.. {
        let (tokens, told) = step(&mut scheduler);
        assert!(tokens.0 <= BUDGET, "step {steps} has {} tokens", tokens.0);
        assert!(told.iter().any(|(request, _)| *request == 0), "step {steps} leaves the answer out");
        for (request, index) in told {
            if index == 0 {
                arrived.push(request);
                let before = request * u64::from(PROMPT);
                let bound = before.div_ceil(u64::from(for_prompts)) + 1;
                assert!(
                    steps <= bound,
                    "request {request} has its first token after {steps} steps of {bound}"
                );
            }
        }
        if arrived.len() == BURST as usize {
            break;
        }
    }
    assert_eq!(arrived, (1..=u64::from(BURST)).collect::<Vec<_>>(), "in the order of arrival");
}

/// Short prompts come faster than they can be computed, without an end. A long one waits for those that came before it
/// and for no other: what comes later is behind it, however short it is.
#[test]
fn a_long_prompt_is_not_starved_by_a_stream_of_short_ones() {
    let mut scheduler = Scheduler::new(limits(), BlockCount(1000));
    let mut next = 1;
    let mut submit_shorts = |scheduler: &mut Scheduler| {
        for _ in 0..BUDGET / SHORT + 2 {
            // A full queue refuses, as it would with clients.
            next += u32::from(scheduler.submit(request(next, SHORT, 1)).is_ok());
        }
        next - 1
    };
    submit_shorts(&mut scheduler);
    step(&mut scheduler);
    let shorts = submit_shorts(&mut scheduler);
    scheduler.submit(request(LONG_ONE, LONG, 1)).unwrap();
    let bound = (shorts * SHORT + LONG).div_ceil(BUDGET) + 1;
    let mut steps = 1;
    while !step(&mut scheduler).1.iter().any(|(request, _)| *request == u64::from(LONG_ONE)) {
        submit_shorts(&mut scheduler);
        steps += 1;
        assert!(steps <= bound, "the long prompt has no token after {bound} steps");
    }
}

/// While a long prompt is computed in chunks of a quarter of a step, a short one that comes has its first token in the
/// very next step. The long one does not wait for them either: it gets its chunk in every step.
#[test]
fn short_prompts_are_not_starved_by_a_long_one() {
    let chunk = BUDGET / 4;
    let limits = Limits { long_prefill_threshold: Some(TokenCount(chunk)), ..limits() };
    let mut scheduler = Scheduler::new(limits, BlockCount(1000));
    scheduler.submit(request(LONG_ONE, LONG, 1)).unwrap();
    let chunks = LONG.div_ceil(chunk);
    for number in 1..=chunks {
        scheduler.submit(request(number, SHORT, 1)).unwrap();
        let told: Vec<u64> = step(&mut scheduler).1.into_iter().map(|(request, _)| request).collect();
        assert!(told.contains(&u64::from(number)), "the short prompt {number} waits for the long one");
        assert_eq!(told.contains(&u64::from(LONG_ONE)), number == chunks, "step {number} of the long prompt");
    }
}

/// One step: how many tokens it computes, and who is told which token of its answer.
fn step(scheduler: &mut Scheduler) -> (TokenCount, Vec<(u64, u32)>) {
    let plan = scheduler.plan();
    scheduler.begin(&plan);
    let sampled: Vec<_> =
        plan.work.iter().filter(|work| work.samples).map(|work| (work.request, 1)).collect();
    let told = scheduler.finish(&plan, &sampled).into_iter().map(|outcome| match outcome {
        Outcome::Token { request, index, .. } => (request.0, index),
        Outcome::NoRoom { request } => panic!("there is room for {request:?}"),
    });
    let told = told.collect();
    scheduler.check();
    (plan.tokens(), told)
}

fn limits() -> Limits {
    Limits {
        block_len: BlockLen::new(16).unwrap(),
        max_model_len: TokenCount(2048),
        max_num_seqs: 64,
        max_num_batched_tokens: TokenCount(BUDGET),
        max_waiting: 64,
        prefix_cache: true,
        long_prefill_threshold: None,
    }
}

fn request(number: u32, len: u32, answer: u32) -> Request {
    Request {
        id: RequestId(u64::from(number)),
        tokens: (0..len).map(|position| 10_000 * number + position).collect(),
        prompt_len: TokenCount(len),
        sampling: SamplingParams::default(),
        stop: StopConditions::after(answer),
        part: Part::Whole,
    }
}

const BURST: u32 = 50;
const SHORT: u32 = 64;
const LONG: u32 = 2000;
const LONG_ONE: u32 = 100_000;
const PROMPT: u32 = 1000;
const ANSWER: u32 = 200;
const BUDGET: u32 = 512;
