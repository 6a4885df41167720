//! Steps planned while the one before computes: the same answers, and no block is another's before its step is over.
//!
//! Blocks have four tokens. What a sequence says next is a hash of all that it says before; some of it ends the request.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;

use tidemill_engine_core::handoff::Cancelled;
use tidemill_engine_core::plan::{StepPlan, Work};
use tidemill_engine_core::request::{
    FinishReason, Part, Request, RequestId, SamplingParams, StopConditions, TokenId,
};
use tidemill_engine_core::scheduler::{Limits, Outcome, Scheduler};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen, BlockRef, HandoffId, TokenCount};

const END: TokenId = 0;

/// A step that was begun: each work's token, of the work itself or of the step before.
struct Flight {
    plan: StepPlan,
    chosen: Vec<(RequestId, TokenId)>,
    /// Whose blocks it uses.
    blocks: BTreeMap<BlockId, RequestId>,
}

/// A scheduler, its device, and what came out.
struct Engine {
    scheduler: Scheduler,
    flight: Option<Flight>,
    ahead: bool,
    overlapped: u32,
    outputs: BTreeMap<RequestId, (Vec<TokenId>, Option<FinishReason>)>,
}

impl Engine {
    fn new(blocks: u32, ahead: bool) -> Self {
        let limits = Limits {
            block_len: BlockLen::new(4).unwrap(),
            max_model_len: TokenCount(40),
            max_num_seqs: 4,
            max_num_batched_tokens: TokenCount(12),
            max_waiting: 100,
            prefix_cache: true,
            long_prefill_threshold: None,
        };
        let scheduler = Scheduler::new(limits, BlockCount(blocks));
        Self { scheduler, flight: None, ahead, overlapped: 0, outputs: BTreeMap::new() }
    }

    /// What the device computes: it knows all tokens, those too that it chose in the step before. No block that it writes is one that another
    /// sequence has in the step before, whether that one is still here or not.
    fn compute(&self, plan: StepPlan) -> Flight {
        let token = |work: &Work| {
            let mut tokens = self.scheduler.tokens(work.request).to_vec();
            if self.scheduler.awaits_token(work) {
                let before = &self.flight.as_ref().unwrap().chosen;
                tokens.push(before.iter().find(|(id, _)| *id == work.request).unwrap().1);
            }
            assert_eq!(tokens.len(), (work.first.0 + work.count.0) as usize);
            (work.request, next(&tokens))
        };
        let chosen = plan.work.iter().filter(|work| work.samples).map(token).collect();
        let mut blocks = BTreeMap::new();
        for work in &plan.work {
            let table = self.scheduler.block_table(work.request);
            for (index, BlockRef { block, .. }) in table.iter().enumerate() {
                let is_written = work.first.0 as usize / 4 <= index;
                let before = self.flight.as_ref().and_then(|it| it.blocks.get(block));
                let is_anothers = before.is_some_and(|owner| *owner != work.request);
                assert!(
                    !(is_written && is_anothers),
                    "{block:?} of {before:?} is given to {:?}",
                    work.request
                );
                blocks.insert(*block, work.request);
            }
        }
        Flight { plan, chosen, blocks }
    }

    /// One turn of an engine's loop.
    fn turn(&mut self) {
        let before = self.flight.take();
        if let Some(before) = before {
            self.scheduler.assume(&before.plan);
            self.scheduler.check();
            let next = self.scheduler.plan_ahead();
            self.flight = Some(before);
            let next = next.map(|plan| {
                self.scheduler.begin(&plan);
                self.overlapped += 1;
                self.compute(plan)
            });
            self.scheduler.check();
            let before = std::mem::replace(&mut self.flight, next).unwrap();
            self.finish(before);
            return;
        }
        let plan = self.scheduler.plan();
        if plan.is_empty() {
            return;
        }
        self.scheduler.begin(&plan);
        let may_be_assumed = self.scheduler.may_be_assumed(&plan);
        let flight = self.compute(plan);
        if self.ahead && may_be_assumed {
            self.flight = Some(flight);
        } else {
            self.finish(flight);
        }
    }

    fn finish(&mut self, Flight { plan, chosen, .. }: Flight) {
        for outcome in self.scheduler.finish(&plan, &chosen) {
            match outcome {
                Outcome::Token { request, token, finish, index, .. } => {
                    let (output, reason) = self.outputs.entry(request).or_default();
                    assert_eq!((output.len(), *reason), (index as usize, None), "{request:?}");
                    output.push(token);
                    *reason = finish;
                }
                Outcome::NoRoom { request } => panic!("{request:?} fits"),
            }
        }
        self.scheduler.check();
    }

    fn submit(&mut self, id: u64, prompt: u32, output: u32) {
        let stop = StopConditions { stop_token_ids: vec![END], ..StopConditions::after(output) };
        self.submit_until(id, prompt, stop);
    }

    fn submit_until(&mut self, id: u64, prompt: u32, stop: StopConditions) {
        let tokens: Vec<TokenId> = (0..prompt).map(|index| 1 + (id as u32 % 3) * 10 + index % 7).collect();
        let request = Request {
            id: RequestId(id),
            tokens,
            prompt_len: TokenCount(prompt),
            part: Part::Whole,
            sampling: SamplingParams::default(),
            stop,
        };
        self.scheduler.submit(request).unwrap();
    }

    fn is_idle(&self) -> bool {
        self.flight.is_none() && self.scheduler.plan().is_empty()
    }
}

/// Now and then a request's last token.
fn next(tokens: &[TokenId]) -> TokenId {
    let hash = tokens.iter().fold(7u64, |hash, token| {
        (hash ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    });
    if hash.is_multiple_of(9) { END } else { 1 + (hash % 50) as TokenId }
}

#[test]
fn answers_are_those_of_steps_one_after_the_other() {
    let mut overlapped = 0;
    let mut preempted = 0;
    for seed in 0..400u64 {
        let mut random = Numbers(seed);
        let blocks = [10, 14, 40][random.below(3)];
        let requests: Vec<(u64, u32, u32)> =
            (0..10).map(|id| (id, 1 + random.below(20) as u32, 1 + random.below(18) as u32)).collect();
        let mut outputs = Vec::new();
        for ahead in [false, true] {
            let (mut engine, mut random) = (Engine::new(blocks, ahead), Numbers(seed));
            let mut waiting = requests.iter();
            let mut turns = 0;
            loop {
                if random.below(3) == 0
                    && let Some((id, prompt, output)) = waiting.next()
                {
                    engine.submit(*id, *prompt, *output);
                }
                engine.turn();
                turns += 1;
                assert!(turns < 2000, "seed {seed}: it comes to an end");
                if waiting.len() == 0 && engine.is_idle() {
                    break;
                }
            }
            let ledger = engine.scheduler.ledger();
            assert_eq!(ledger.held, BlockCount(0), "seed {seed}");
            overlapped += engine.overlapped;
            preempted += engine.scheduler.counters().preemptions;
            outputs.push(engine.outputs);
        }
        assert_eq!(outputs[0], outputs[1], "seed {seed}");
        assert!(outputs[0].values().all(|(_, reason)| reason.is_some()), "seed {seed}");
    }
    assert!(10_000 < overlapped && 100 < preempted, "{overlapped} {preempted}");
}

#[test]
fn who_ends_by_surprise_keeps_its_blocks_until_the_step_behind_is_over() {
    let mut engine = Engine::new(20, true);
    engine.submit(1, 4, 30);
    // Until the token that ends it is chosen, and the step behind it is under way.
    while engine.outputs.get(&RequestId(1)).is_none_or(|(_, reason)| reason.is_none()) {
        engine.turn();
    }
    assert_eq!(engine.outputs[&RequestId(1)].1, Some(FinishReason::Stop(Some(END))));
    let flight = engine.flight.as_ref().expect("nobody could know");
    assert_eq!(flight.plan.work.len(), 1);
    let held = engine.scheduler.ledger().held;
    assert!(BlockCount(0) < held, "a step writes there");
    // Another one gets blocks meanwhile, and none of these.
    engine.submit(2, 8, 1);
    engine.turn();
    assert_eq!(
        engine.scheduler.ledger().held,
        BlockCount(2),
        "the step is over: those of the other are left"
    );
}

#[test]
fn who_ends_for_certain_is_not_computed_again() {
    let mut engine = Engine::new(8, true);
    engine.submit(1, 2, 1);
    engine.turn();
    assert!(engine.flight.is_some());
    engine.turn();
    assert_eq!((engine.overlapped, engine.outputs[&RequestId(1)].0.len()), (0, 1));
    assert!(engine.is_idle());
}

#[test]
fn another_request_of_the_same_name_gets_nothing_of_the_one_before() {
    for turns in 1..4 {
        let mut engine = Engine::new(8, true);
        engine.submit_until(1, 5, StopConditions::after(30));
        for _ in 0..turns {
            engine.turn();
        }
        assert_eq!(engine.scheduler.cancel(RequestId(1)), Cancelled::Done);
        engine.scheduler.check();
        assert!(BlockCount(0) < engine.scheduler.ledger().held, "a step computes it");
        engine.outputs.clear();
        engine.submit(1, 9, 3);
        while !engine.is_idle() {
            engine.turn();
        }
        let mut alone = Engine::new(8, false);
        alone.submit(1, 9, 3);
        while !alone.is_idle() {
            alone.turn();
        }
        assert_eq!(engine.outputs, alone.outputs, "cancelled after {turns} turns");
    }
}

#[test]
fn blocks_are_given_out_again_only_when_their_step_is_over() {
    for seed in 0..200u64 {
        let mut random = Numbers(seed);
        let mut engine = Engine::new(9, true);
        let mut id = 0;
        for _ in 0..60 {
            if random.below(2) == 0 {
                id += 1;
                engine.submit(id, 1 + random.below(12) as u32, 1 + random.below(9) as u32);
            }
            if random.below(4) == 0 {
                let id = RequestId(1 + random.below(id as usize + 1) as u64);
                assert!(matches!(engine.scheduler.cancel(id), Cancelled::Done | Cancelled::Unknown));
            }
            engine.turn();
        }
        assert!(0 < engine.overlapped, "seed {seed}");
    }
}

#[test]
fn what_concerns_a_peer_is_not_planned_ahead() {
    for part in [Part::PrefillFor(HandoffId(1)), Part::DecodeFrom(HandoffId(1))] {
        let mut engine = Engine::new(8, true);
        engine.submit(1, 3, 9);
        engine.turn();
        let request = Request {
            id: RequestId(2),
            tokens: vec![5; 6],
            prompt_len: TokenCount(6),
            part,
            sampling: SamplingParams::default(),
            stop: StopConditions::after(4),
        };
        engine.scheduler.submit(request).unwrap();
        engine.scheduler.assume(&engine.flight.as_ref().unwrap().plan);
        assert_eq!(engine.scheduler.plan_ahead(), None, "{part:?}");
        let flight = engine.flight.take().unwrap();
        engine.finish(flight);
        assert!(!engine.scheduler.may_be_assumed(&engine.scheduler.plan()), "{part:?}");
    }
}

/// splitmix64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % bound as u64) as usize
    }
}
