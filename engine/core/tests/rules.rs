//! One row per rule of the scheduler. A row is a short script that leads to a state, and the plan made there.
//!
//! Blocks have four tokens; there are eight blocks, 32 tokens and four sequences to a step. Words of a script:
//!
//! ```text
//! w1:8      request 1, whole, of eight tokens       w2:8~1   … the tokens of request 1, as far as they go
//! p1:8      prefill in own blocks for handoff 1     i1:8     prefill that awaits its peer's blocks
//! d1:8      decode from handoff 1                   …/3      at most three output tokens; 50 unless said
//! step      one step; each request samples 100 times its number plus the index of the token
//! take      reservations are announced              adopt1 fail1 quiet1 pushed1 cancel1 own1
//! at1:4     compute in the peer's blocks, four tokens are there    shrink3 grow3  blocks of the pool
//! ```
//!
//! A plan reads `x5 !3 +1 +2c1 r4 1@8+1* 2@4+4`: refuse 5, preempt 3, admit 1, admit 2 with one cached block,
//! reserve for 4, compute one token of 1 from position 8 on and sample, compute four of 2.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use tidemill_engine_core::blocks::Ledger;
use tidemill_engine_core::handoff::Cancelled;
use tidemill_engine_core::plan::{Purpose, StepPlan};
use tidemill_engine_core::request::{FinishReason, Part, Request, RequestId, SamplingParams, StopConditions};
use tidemill_engine_core::scheduler::{Counts, Limits, Outcome, Scheduler, SubmitError};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, HandoffId, TokenCount};

#[test]
fn who_computes() {
    #[rustfmt::skip]
    let rows = [
        ("idle does nothing",                          "",                                ""),
        ("a prompt that fits is prefilled",            "w1:8",                            "+1 1@0+8*"),
        ("decode follows",                             "w1:8 step",                       "1@8+1*"),
        ("one that ended leaves its blocks",           "w1:32/1 step w2:32/1",            "+2 2@0+32*"),
        ("a cancelled one leaves its blocks",          "w1:32/1 step cancel1 w2:32/1",    "+2 2@0+32*"),
        ("a full batch admits nobody",                 "w1:1 w2:1 w3:1 w4:1 step w5:1",   "1@1+1* 2@1+1* 3@1+1* 4@1+1*"),
    ];
    check(limits(), &rows);

    let small_steps = Limits { max_num_batched_tokens: TokenCount(8), ..limits() };
    #[rustfmt::skip]
    let rows = [
        ("the last prompt is cut",                     "w1:6 w2:6",                       "+1 +2 1@0+6* 2@0+2"),
        ("a cut prompt goes on, after decode",         "w1:6 w2:6 step",                  "1@6+1* 2@2+4*"),
        ("prompts go by arrival",                      "w1:12 w2:4 step",                 "+2 1@8+4* 2@0+4*"),
        ("no budget, no admission",                    "w1:8 w2:4",                       "+1 1@0+8*"),
    ];
    check(small_steps, &rows);

    let short_chunks = Limits { long_prefill_threshold: Some(TokenCount(3)), ..limits() };
    #[rustfmt::skip]
    let rows = [
        ("a long prompt leaves room for the next",     "w1:20 w2:2",                      "+1 +2 1@0+3 2@0+2*"),
        ("decode comes before an older prompt",        "w1:8 w2:2 step",                  "2@2+1* 1@3+3"),
    ];
    check(short_chunks, &rows);

    let one_token = Limits { max_num_batched_tokens: TokenCount(1), ..limits() };
    #[rustfmt::skip]
    let rows = [
        ("no more run than the budget can advance",    "w1:1 step w2:1",                  "1@1+1*"),
    ];
    check(one_token, &rows);
}

#[test]
fn who_gets_blocks() {
    #[rustfmt::skip]
    let rows = [
        ("no overtaking when blocks are out",          "w1:20 step w2:16 w3:4",           "1@20+1*"),
        ("nothing is kept when nothing runs",          "w1:32/1",                         "+1 1@0+32*"),
        ("those that run keep a block each to grow", "w1:20 step w2:8", "1@20+1*"),
        ("one that leaves them that much is admitted", "w1:20 step w2:4", "+2 1@20+1* 2@0+4*"),
        ("a part-filled block needs no other", "w1:15 w2:9 step shrink1",         "1@15+1* 2@9+1*"),
        ("a full block takes from the latest",         "w1:16 w2:12 step shrink1",        "!2 1@16+1*"),
        ("a step that preempts admits nobody",         "w1:16 w2:12 step shrink1 w3:1",   "!2 1@16+1*"),
        ("the latest pauses instead of an older one",  "w1:13 w2:12 step shrink1 w3:4",   "1@13+1*"),
        ("the preempted is computed from the cache",   "w1:16/2 w2:12 step shrink1 step", "+2c2 2@8+5*"),
        ("the preempted comes before later arrivals",
            "w1:16/2 w2:12 step shrink1 w3:4 w4:4 step",                                  "+2c2 +3 2@8+5* 3@0+4*"),
        ("a prefill for a peer is never preempted",    "w1:16 p2:12 step shrink1",        ""),
        ("one that cannot fit any more is refused",    "w1:28 step cancel1 w2:32/1 shrink1", "x2"),
        ("and stops nobody",                           "w1:28/1 step w2:32/1 w3:4 shrink1",  "x2 +3 3@0+4*"),
        ("one that outgrew the pool is refused",       "w1:16 step shrink4",              "x1"),
        ("a pool that grows again has room",           "w1:16 step shrink4 grow1",        "1@16+1*"),
    ];
    check(limits(), &rows);
}

#[test]
fn what_is_found_in_the_prefix_cache() {
    #[rustfmt::skip]
    let rows = [
        ("full blocks of one that runs",               "w1:9 step w2:9~1",                "+2c2 1@9+1* 2@8+1*"),
        ("full blocks of one that ended",              "w1:9/1 step w2:9~1",              "+2c2 2@8+1*"),
        ("never the last token's",                     "w1:8/1 step w2:8~1",              "+2c1 2@4+4*"),
        ("not what is computed in the same step",      "w1:8 w2:8~1",                     "+1 +2 1@0+8* 2@0+8*"),
        ("not what was evicted: its end goes first",   "w1:16/1 step w2:20/1 step w3:16~1", "+3c3 3@12+4*"),
        ("what a preempted one computed",              "w1:16 w2:9 step shrink1 step cancel1", "+2c2 2@8+2*"),
    ];
    check(limits(), &rows);

    let uncached = Limits { prefix_cache: false, ..limits() };
    check(uncached, &[("nothing when it is off", "w1:9/1 step w2:9~1", "+2 2@0+9*")]);
}

#[test]
fn what_handoffs_do() {
    #[rustfmt::skip]
    let rows = [
        ("a reservation computes nothing",             "d1:8",                            "r1"),
        ("the first token comes from the peer",        "d1:8 step take adopt1",           "1@8+1*"),
        ("a reservation uses the prefix cache",        "w1:8/1 step d2:8~1",              "r2c1"),
        ("an adopted prompt is found",                 "d1:8 step take adopt1 w2:9~1",    "+2c2 1@8+1* 2@8+1*"),
        ("an adopted one is preempted like any other", "w1:16 d2:12 step take adopt2 shrink1", "!2 1@16+1*"),
        ("and is computed here then",                  "w1:16/2 d2:12 step take adopt2 shrink1 step", "+2c2 2@8+5*"),
        ("reserved blocks are not taken for growth",   "w1:16 d2:12 step take shrink1",   ""),
        ("a failed reservation stays in quarantine",   "d1:32 step take fail1 w2:4",      ""),
        ("until its peer is quiet",                    "d1:32 step take fail1 w2:4 quiet1", "+2 2@0+4*"),
        ("one not announced is given back at once",    "d1:32 step cancel1 w2:4",         "+2 2@0+4*"),
        ("reservations take half of the pool",         "d1:8 d2:12 step",                 ""),
        ("what they hold back stops nobody",           "d1:8 d2:12 w3:4",                 "r1 +3 3@0+4*"),
        ("one may be longer than half",                "d1:28",                           "r1"),
        ("one that lacks blocks stops those behind",   "w1:20 step d2:12 w3:1",           "1@20+1*"),
        ("a reservation passes one without a budget",  "w1:1 step w2:32/1 d3:4",          "1@1+1*"),
        ("a prefill keeps its blocks until pushed",    "p1:32 step w2:4",                 ""),
        ("then they are in the prefix cache",          "p1:8 step pushed1 w2:9~1",        "+2c2 2@8+1*"),
        ("one for a peer's memory waits",              "i1:8 w2:4",                       "+2 2@0+4*"),
        ("computes behind what the peer has",          "i1:8 at1:4",                      "+1 1@4+4*"),
        ("needs no blocks and passes those that do",   "w1:28 step w2:8 i3:8 at3:0",      "+3 1@28+1* 3@0+8*"),
        ("or computes in own blocks",                  "i1:8 own1",                       "+1 1@0+8*"),
        ("is not computed once it was cancelled",      "i1:8 at1:4 cancel1",              ""),
    ];
    check(limits(), &rows);

    let two_places = Limits { max_num_seqs: 2, ..limits() };
    #[rustfmt::skip]
    let rows = [
        ("no more are reserved than a step takes",     "d1:1 d2:1 d3:1",                  "r1 r2"),
        ("reservations are made while the batch is full", "w1:1 w2:1 step d3:1",          "r3 1@1+1* 2@1+1*"),
        ("but not past one who waits for a place",     "w1:1 w2:1 step w3:1 d4:1",        "1@1+1* 2@1+1*"),
        ("the latest adopted wait for a place",
            "w1:1/3 w2:1 step d3:1 d4:1 step take adopt3 adopt4 step",                    "2@3+1* 3@1+1*"),
        ("and nobody is reserved behind as many",
            "grow8 w1:1 w2:1 step d3:1 d4:1 step take adopt3 adopt4 d5:1",                "1@2+1* 2@2+1*"),
    ];
    check(two_places, &rows);
}

fn limits() -> Limits {
    Limits {
        block_len: BlockLen::new(4).unwrap(),
        max_model_len: TokenCount(64),
        max_num_seqs: 4,
        max_num_batched_tokens: TokenCount(32),
        max_waiting: 8,
        prefix_cache: true,
        long_prefill_threshold: None,
    }
}

fn check(limits: Limits, rows: &[(&str, &str, &str)]) {
    let mut wrong = Vec::new();
    for (name, script, expected) in rows {
        let mut world = World::new(limits);
        world.run(name, script);
        let plan = render(&world.scheduler.plan());
        if plan != *expected {
            wrong.push(format!("{name}: expected [{expected}], planned [{plan}]"));
        }
        world.step(); // Every plan can be carried out in the state it was made from.
        world.scheduler.check();
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// A scheduler with what happened to it.
struct World {
    scheduler: Scheduler,
    outcomes: Vec<Outcome>,
    cancelled: Vec<Cancelled>,
}

impl World {
    fn new(limits: Limits) -> Self {
        let scheduler = Scheduler::new(limits, BlockCount(8));
        Self { scheduler, outcomes: Vec::new(), cancelled: Vec::new() }
    }

    fn after(script: &str) -> Self {
        let mut world = Self::new(limits());
        world.run(script, script);
        world
    }

    fn run(&mut self, name: &str, script: &str) {
        for word in script.split_whitespace() {
            self.act(word).unwrap_or_else(|problem| panic!("{name}: {word}: {problem}"));
            self.scheduler.check();
        }
    }

    fn step(&mut self) {
        let plan = self.scheduler.plan();
        assert_eq!(plan, self.scheduler.plan(), "planning changes nothing");
        self.scheduler.begin(&plan);
        let sampled: Vec<_> = plan
            .work
            .iter()
            .filter(|work| work.samples)
            .map(|work| {
                let sequence = self.scheduler.sequence(work.request).unwrap();
                let index = u32::try_from(sequence.output().len()).unwrap();
                (work.request, 100 * u32::try_from(work.request.0).unwrap() + index)
            })
            .collect();
        self.outcomes.extend(self.scheduler.finish(&plan, &sampled));
    }

    fn act(&mut self, word: &str) -> Result<(), SubmitError> {
        let digits = word.find(|it: char| it.is_ascii_digit()).unwrap_or(word.len());
        let (verb, rest) = word.split_at(digits);
        let (rest, max_tokens) = rest.split_once('/').unwrap_or((rest, "50"));
        let (rest, like) =
            rest.split_once('~').map_or((rest, None), |(rest, like)| (rest, Some(number(like))));
        let (first, second) = rest.split_once(':').unwrap_or((rest, "0"));
        let [first, second] = [first, second].map(|text| if text.is_empty() { 0 } else { number(text) });
        let id = RequestId(u64::from(first));
        let handoff = HandoffId(u64::from(first));
        let request = |part| {
            let mut request = request(first, second, like.unwrap_or(first), part);
            request.stop = StopConditions::after(number(max_tokens));
            request
        };
        match verb {
            "w" => self.scheduler.submit(request(Part::Whole))?,
            "p" => self.scheduler.submit(request(Part::PrefillFor(handoff)))?,
            "i" => self.scheduler.submit_in_place(request(Part::PrefillFor(handoff)))?,
            "d" => self.scheduler.submit(request(Part::DecodeFrom(handoff)))?,
            "step" => self.step(),
            "take" => {
                assert!(!self.scheduler.take_reservations().is_empty(), "there is something to announce")
            }
            "adopt" => self.outcomes.extend(self.scheduler.adopt(id, 100 * first)),
            "fail" => self.cancelled.push(self.scheduler.reservation_failed(id)),
            "cancel" => self.cancelled.push(self.scheduler.cancel(id)),
            "quiet" => self.scheduler.quiet(handoff),
            "pushed" => assert!(self.scheduler.pushed(id), "a prefill is pushed"),
            "own" => assert!(self.scheduler.use_own_blocks(id), "a prefill awaits its targets"),
            "at" => {
                assert!(self.scheduler.use_targets(id, TokenCount(second)), "a prefill awaits its targets")
            }
            "shrink" => assert_eq!(self.scheduler.withdraw_blocks(BlockCount(first)).len(), first as usize),
            "grow" => assert_eq!(self.scheduler.add_blocks(BlockCount(first)).len(), first as usize),
            other => panic!("no such word: {other}"),
        }
        Ok(())
    }
}

fn request(id: u32, len: u32, like: u32, part: Part) -> Request {
    Request {
        id: RequestId(u64::from(id)),
        tokens: (0..len).map(|position| 1000 * like + position).collect(),
        prompt_len: TokenCount(len),
        sampling: SamplingParams::default(),
        stop: StopConditions::after(50),
        part,
    }
}

fn number(text: &str) -> u32 {
    text.parse().expect("a number")
}

fn render(plan: &StepPlan) -> String {
    let refusals = plan.refusals.iter().map(|id| format!("x{}", id.0));
    let preemptions = plan.preemptions.iter().map(|id| format!("!{}", id.0));
    let admissions = plan.admissions.iter().map(|it| {
        let sign = if it.purpose == Purpose::Compute { '+' } else { 'r' };
        let cached = if it.cached.is_empty() { String::new() } else { format!("c{}", it.cached.len()) };
        format!("{sign}{}{cached}", it.request.0)
    });
    let work = plan.work.iter().map(|it| {
        format!("{}@{}+{}{}", it.request.0, it.first.0, it.count.0, if it.samples { "*" } else { "" })
    });
    refusals.chain(preemptions).chain(admissions).chain(work).collect::<Vec<_>>().join(" ")
}

/// `free cached held reserved quarantined`
fn columns(ledger: Ledger) -> [u32; 5] {
    [ledger.free.0, ledger.cached.0, ledger.held.0, ledger.reserved.0, ledger.quarantined.0]
}

#[test]
fn refusals_at_the_door() {
    #[rustfmt::skip]
    let rows = [
        ("an empty prompt",          "",                                  "w1:0",  SubmitError::EmptyPrompt),
        ("no room for output",       "",                                  "w1:64", SubmitError::TooLong { tokens: TokenCount(64), limit: TokenCount(64) }),
        ("more than all blocks",     "",                                  "w1:33", SubmitError::NeverFits { needed: BlockCount(9), total: BlockCount(8) }),
        ("the same name",            "w1:4",                              "w1:4",  SubmitError::Duplicate(RequestId(1))),
        ("the name of one pushing",  "p1:4 step",                         "w1:4",  SubmitError::Duplicate(RequestId(1))),
        ("a full queue",             "w1:1 w2:1 w3:1 w4:1 i5:1 w6:1 d7:1 w8:1", "w9:1", SubmitError::QueueFull { limit: 8 }),
    ];
    for (name, script, word, expected) in rows {
        let mut world = World::after(script);
        let before = world.scheduler.counts();
        assert_eq!(world.act(word), Err(expected), "{name}");
        assert_eq!(world.scheduler.counts(), before, "{name}: nothing has changed");
    }
    let mut short = request(1, 4, 1, Part::Whole);
    short.prompt_len = TokenCount(5);
    let error = SubmitError::ShortPrompt { prompt: TokenCount(5), tokens: TokenCount(4) };
    assert_eq!(World::after("").scheduler.submit(short), Err(error));
    World::after("").act("i1:40").expect("computing in a peer's memory needs no blocks here");
}

#[test]
fn where_blocks_are_after() {
    #[rustfmt::skip]
    let rows = [
        ("nothing",                                    "",                                [8, 0, 0, 0, 0]),
        ("a prefill",                                  "w1:10 step",                      [5, 0, 3, 0, 0]),
        ("its end",                                    "w1:10/1 step",                    [6, 2, 0, 0, 0]),
        ("a cancellation",                             "w1:10 step cancel1",              [6, 2, 0, 0, 0]),
        ("a reservation",                              "d1:10 step",                      [5, 0, 0, 3, 0]),
        ("a reservation behind cached blocks",         "w1:10/1 step d2:10~1 step",       [5, 0, 2, 1, 0]),
        ("its adoption",                               "d1:10 step take adopt1",          [5, 0, 3, 0, 0]),
        ("an adoption that ends it",                   "d1:10/1 step take adopt1",        [6, 2, 0, 0, 0]),
        ("its failure: the cached blocks stay pinned", "w1:10/1 step d2:10~1 step take fail2", [5, 0, 2, 0, 1]),
        ("quiet",                                      "w1:10/1 step d2:10~1 step take fail2 quiet2", [6, 2, 0, 0, 0]),
        ("the end of one never announced",             "w1:10/1 step d2:10~1 step cancel2", [6, 2, 0, 0, 0]),
        ("a prompt for a peer",                        "p1:10 step",                      [5, 0, 3, 0, 0]),
        ("its last token, which ends it",              "p1:10/1 step",                    [5, 0, 3, 0, 0]),
        ("its delivery",                               "p1:10 step pushed1",              [6, 2, 0, 0, 0]),
        ("a prompt in a peer's memory",                "i1:10 at1:4 step",                [8, 0, 0, 0, 0]),
    ];
    for (name, script, expected) in rows {
        assert_eq!(columns(World::after(script).scheduler.ledger()), expected, "{name}");
    }
}

#[test]
fn what_a_cancellation_leaves_to_do() {
    #[rustfmt::skip]
    let rows = [
        ("one that is not here",                       "cancel1",                         Cancelled::Unknown),
        ("one that waits",                             "d1:8 cancel1",                    Cancelled::Done),
        ("one that runs",                              "w1:8 step cancel1",               Cancelled::Done),
        ("one that awaits targets",                    "i1:8 cancel1",                    Cancelled::Done),
        ("a reservation not announced",                "d1:8 step cancel1",               Cancelled::Done),
        ("a reservation announced",                    "d1:8 step take cancel1",          Cancelled::Quarantined(HandoffId(1))),
        ("a failed reservation",                       "d1:8 step take fail1",            Cancelled::Quarantined(HandoffId(1))),
        ("a reservation that failed twice",            "d1:8 step take fail1 fail1",      Cancelled::Unknown),
        ("an adopted one",                             "d1:8 step take adopt1 cancel1",   Cancelled::Done),
        ("a prefill whose blocks are read",            "p1:8 step cancel1", Cancelled::Pushing(HandoffId(1))),
        ("a prefill that waits",                       "p1:8 cancel1",                    Cancelled::Done),
        ("a prefill that writes to its peer",          "i1:8 at1:0 step cancel1",         Cancelled::Pushing(HandoffId(1))),
    ];
    for (name, script, expected) in rows {
        let world = World::after(script);
        assert_eq!(world.cancelled.last(), Some(&expected), "{name}");
    }
}

#[test]
fn outcomes() {
    let token = |request, index, finish, cached| Outcome::Token {
        request: RequestId(request),
        token: 100 * u32::try_from(request).unwrap() + index,
        index,
        finish,
        cached: TokenCount(cached),
    };
    let length = Some(FinishReason::Length);
    #[rustfmt::skip]
    let rows = [
        ("one token per step",                         "w1:8 step step",                  vec![token(1, 0, None, 0), token(1, 1, None, 0)]),
        ("the last one says so",                       "w1:8/1 step step",                vec![token(1, 0, length, 0)]),
        ("the model's length is an end",               "w1:8/1 step w2:31/1 step",        vec![token(1, 0, length, 0), token(2, 0, length, 0)]),
        ("hits are told",                              "w1:8/1 step w2:9~1/1 step",       vec![token(1, 0, length, 0), token(2, 0, length, 8)]),
        ("hits in a peer's memory are told",           "i1:8 at1:4 step",                 vec![token(1, 0, None, 4)]),
        ("the peer's token is told at adoption",       "d1:8 step take adopt1 step",      vec![token(1, 0, None, 0), token(1, 1, None, 0)]),
        ("and may be the last",                        "d1:8/1 step take adopt1 step",    vec![token(1, 0, length, 0)]),
        ("a prefill samples once",                     "p1:8 step step",                  vec![token(1, 0, None, 0)]),
        ("preemption does not change the tokens",      "w1:16/2 w2:12/2 step shrink1 step step",
            vec![token(1, 0, None, 0), token(2, 0, None, 0), token(1, 1, length, 0), token(2, 1, length, 0)]),
        ("a refusal",                                  "w1:16 step shrink4 step",         vec![token(1, 0, None, 0), Outcome::NoRoom { request: RequestId(1) }]),
    ];
    for (name, script, expected) in rows {
        assert_eq!(World::after(script).outcomes, expected, "{name}");
    }
}

#[test]
fn the_models_length_is_an_end() {
    let mut world = World::new(Limits { max_model_len: TokenCount(10), ..limits() });
    world.run("two tokens fit", "w1:8 step step step");
    let ends: Vec<_> =
        world.outcomes.iter().map(|it| matches!(it, Outcome::Token { finish: Some(_), .. })).collect();
    assert_eq!(ends, [false, true]);
}

#[test]
fn a_replay_goes_on_counting() {
    let mut replay = request(1, 12, 1, Part::Whole);
    replay.prompt_len = TokenCount(8);
    replay.stop = StopConditions::after(5);
    let mut world = World::after("");
    world.scheduler.submit(replay).unwrap();
    world.step();
    let Outcome::Token { index, finish, .. } = world.outcomes[0] else { panic!("a token is expected") };
    assert_eq!((index, finish), (4, Some(FinishReason::Length)));
}

#[test]
fn prompt_logprobs_need_the_whole_prompt() {
    for part in [Part::Whole, Part::DecodeFrom(HandoffId(2))] {
        let mut world = World::after("w1:9/1 step");
        let mut request = request(2, 9, 1, part);
        request.sampling.prompt_logprobs = Some(0);
        world.scheduler.submit(request).unwrap();
        assert!(world.scheduler.plan().admissions[0].cached.is_empty(), "{part:?}");
    }
}

#[test]
fn a_result_for_one_cancelled_meanwhile_is_ignored() {
    for (submit, cancelled) in [("w1:8", Cancelled::Done), ("p1:8", Cancelled::Pushing(HandoffId(1)))] {
        let mut world = World::after(submit);
        let plan = world.scheduler.plan();
        world.scheduler.begin(&plan);
        assert_eq!(world.scheduler.cancel(RequestId(1)), cancelled);
        assert_eq!(world.scheduler.finish(&plan, &[(RequestId(1), 5)]), []);
        world.scheduler.check();
        assert!(world.scheduler.cached_hashes().next().is_none(), "what was not finished is not cached");
    }
}

#[test]
fn a_reservation_names_what_is_there_and_what_is_wanted() {
    let mut world = World::after("w1:9/1 step d2:11~1 step");
    let found = world.scheduler.take_reservations();
    let [reservation] = &found[..] else { panic!("one reservation is expected: {found:?}") };
    assert_eq!((reservation.request, reservation.handoff), (RequestId(2), HandoffId(2)));
    assert_eq!(reservation.tokens, TokenCount(11));
    assert_eq!((reservation.cached.len(), reservation.targets.len()), (2, 1));
    let table = world.scheduler.block_table(RequestId(2));
    assert_eq!(table, [&reservation.cached[..], &reservation.targets[..]].concat());
    assert!(world.scheduler.take_reservations().is_empty(), "each is told once");
}

/// The next token of a long prompt that was handed over does not wait until all its blocks can be found.
#[test]
fn what_was_adopted_becomes_findable_step_by_step() {
    let limits = Limits { max_model_len: TokenCount(1000), ..limits() };
    let mut scheduler = Scheduler::new(limits, BlockCount(200));
    let id = RequestId(1);
    let tokens: Vec<u32> = (0..400).collect();
    scheduler
        .submit(Request {
            id,
            prompt_len: TokenCount(400),
            tokens,
            sampling: SamplingParams::default(),
            stop: StopConditions::after(50),
            part: Part::DecodeFrom(HandoffId(1)),
        })
        .unwrap();
    let plan = scheduler.plan();
    scheduler.begin(&plan);
    scheduler.finish(&plan, &[]);
    assert_eq!(scheduler.take_reservations().len(), 1);
    assert!(scheduler.adopt(id, 7).is_some());
    let mut found = vec![scheduler.cached_hashes().count()];
    for token in 0..6 {
        let plan = scheduler.plan();
        scheduler.begin(&plan);
        scheduler.finish(&plan, &[(id, token)]);
        scheduler.check();
        found.push(scheduler.cached_hashes().count());
    }
    assert!(found.windows(2).all(|pair| pair[0] <= pair[1]), "{found:?}");
    assert!(0 < found[0] && found[0] < 50, "a few at once: {found:?}");
    assert!(100 <= *found.last().unwrap(), "in the end all: {found:?}");
}

#[test]
fn counts_and_counters() {
    let world = World::after("w1:8 w2:20/1 step d3:4 p4:4 i5:4 step w6:9~1");
    let expected = Counts { running: 1, waiting: 2, reserved: 1, pushing: 1 };
    assert_eq!(world.scheduler.counts(), expected);
    assert_eq!(world.scheduler.queued_tokens(), 4 + 9);
    let mut world = World::after("w1:9/1 step w2:9~1/1 step");
    let counters = world.scheduler.counters();
    assert_eq!((counters.prefix_queries, counters.prefix_hits, counters.preemptions), (18, 8, 0));
    assert_eq!(world.scheduler.take_cache_changes().added.len(), 2);
    assert_eq!(World::after("w1:16 w2:12 step shrink1 step").scheduler.counters().preemptions, 1);
}

#[test]
fn who_is_blocked_by_handoffs() {
    #[rustfmt::skip]
    let rows: &[(&str, &str, &[u64])] = &[
        ("nobody when nothing waits",                  "p1:16 p2:16 step",                &[]),
        ("the queue, by prefills being sent",          "p1:16 p2:16 step w3:4",           &[2, 1]),
        ("not while something computes",               "p1:16 w2:8 step w3:16",           &[]),
        ("not by those in a peer's memory",            "i1:8 at1:0 d2:32 step w3:4",      &[]),
    ];
    for (name, script, expected) in rows {
        let blocked: Vec<u64> =
            World::after(script).scheduler.blocked_by_handoffs().into_iter().map(|id| id.0).collect();
        assert_eq!(blocked, *expected, "{name}");
    }
}
