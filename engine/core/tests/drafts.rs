//! Guesses at next tokens in the scheduler: who gets them, what becomes of them, and that they leave no trace.
//!
//! Blocks have four tokens. Request `n` samples 100 times its number plus the index of the token.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use tidemill_engine_core::plan::{Drafts, StepPlan};
use tidemill_engine_core::request::{
    FinishReason, Part, Request, RequestId, SamplingParams, StopConditions, TokenId,
};
use tidemill_engine_core::scheduler::{Limits, Outcome, Scheduler};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, TokenCount};

#[test]
fn drafts_get_what_is_left() {
    /// Prompts of requests 1, 2, … that have one output token, and those that wait; blocks, tokens of a step, guesses for each.
    type Row<'a> = (&'a str, &'a [u32], &'a [u32], u32, u32, u32, &'a [u32]);
    #[rustfmt::skip]
    let rows: [Row<'_>; 10] = [
        // name                                          run       wait   blocks budget guesses drafted
        ("a guess for one that decodes",                 &[5],     &[],   8,     32,    3,      &[3]),
        ("each gets its own",                            &[5, 6],  &[],   8,     32,    3,      &[3, 3]),
        ("no guesses, no draft",                         &[5],     &[],   8,     32,    0,      &[0]),
        ("the budget cuts, the oldest comes first",      &[3, 3],  &[],   8,     6,     3,      &[3, 1]),
        ("prompts come before guesses",                  &[5],     &[8],  8,     9,     3,      &[0]),
        ("and take what they need of the budget",        &[5],     &[6],  8,     9,     3,      &[2]),
        ("guesses use the rest of a block",              &[5],     &[],   2,     32,    9,      &[2]),
        ("and blocks that nobody has",                   &[5],     &[],   3,     32,    9,      &[6]),
        ("never the block that another needs now",       &[5, 8],  &[],   5,     32,    3,      &[2, 3]),
        ("nor one that a prompt gets",                   &[5],     &[4],  4,     32,    9,      &[6]),
    ];
    for (row, run, wait, blocks, budget, guesses, expected) in rows {
        let mut scheduler = Scheduler::new(limits(budget), BlockCount(blocks));
        let mut id = 0;
        for prompt in run {
            id += 1;
            scheduler.submit(request(id, *prompt, 50)).unwrap();
        }
        let first = scheduler.plan();
        step(&mut scheduler, &first);
        for prompt in wait {
            id += 1;
            scheduler.submit(request(id, *prompt, 50)).unwrap();
        }
        let plan = scheduler.plan_with_drafts(|plan, _| guess_all(plan, guesses));
        let drafted: Vec<u32> = plan
            .work
            .iter()
            .filter(|work| work.request.0 as usize <= run.len())
            .map(|work| work.drafted.0)
            .collect();
        assert_eq!(drafted, expected, "{row}: {plan:?}");
        let mut without = plan.clone();
        without.drafts.clear();
        without.work.iter_mut().for_each(|work| work.drafted = TokenCount(0));
        assert_eq!(without, scheduler.plan(), "{row}: nobody else notices");
        scheduler.begin(&plan);
        scheduler.check();
    }
}

#[test]
fn a_step_that_preempts_guesses_nothing() {
    let mut scheduler = Scheduler::new(limits(32), BlockCount(8));
    for (id, prompt) in [(1, 16), (2, 12)] {
        scheduler.submit(request(id, prompt, 50)).unwrap();
    }
    let first = scheduler.plan();
    step(&mut scheduler, &first);
    scheduler.withdraw_blocks(BlockCount(1));
    let plan = scheduler.plan_with_drafts(|plan, _| guess_all(plan, 3));
    assert_eq!(plan.preemptions, [RequestId(2)]);
    assert!(plan.drafts.is_empty(), "blocks taken from one for another are not for guesses");
}

#[test]
fn a_draft_is_no_longer_than_it_can_be_of_use() {
    #[rustfmt::skip]
    let rows = [
        // name                                               prompt, max tokens, longest, drafted
        ("it may be as long as one likes",                    4,      50,         64,      9),
        ("the last token of a request is not guessed behind", 4,      6,          64,      4),
        ("one token is left: it is sampled anyway",           4,      2,          64,      0),
        ("the model's length is the end as well",             4,      50,         10,      4),
    ];
    for (row, prompt, max_tokens, longest, expected) in rows {
        let limits = Limits { max_model_len: TokenCount(longest), ..limits(32) };
        let mut scheduler = Scheduler::new(limits, BlockCount(16));
        scheduler.submit(request(1, prompt, max_tokens)).unwrap();
        let first = scheduler.plan_with_drafts(|plan, _| guess_all(plan, 9));
        assert_eq!(first.work[0].drafted, TokenCount(0), "{row}: a prompt is not guessed behind");
        step(&mut scheduler, &first);
        let plan = scheduler.plan_with_drafts(|plan, _| guess_all(plan, 9));
        assert_eq!(plan.work[0].drafted, TokenCount(expected), "{row}");
    }
}

#[test]
fn what_becomes_of_a_draft() {
    let length = Some(FinishReason::Length);
    /// Output tokens allowed, guesses, how many tokens come back; the indices told, the end, and the blocks that are held.
    type Row<'a> = (&'a str, u32, &'a [TokenId], usize, &'a [u32], Option<FinishReason>, u32);
    #[rustfmt::skip]
    let rows: [Row<'_>; 6] = [
        ("a wrong guess gives the one token",             50, &[999],                1, &[1],             None,   2),
        ("a right one gives two",                         50, &[101],                2, &[1, 2],          None,   2),
        ("right ones before a wrong one count",           50, &[101, 102, 999, 104], 3, &[1, 2, 3],       None,   2),
        ("blocks of right guesses stay",                  50, &[101, 102, 103, 104], 5, &[1, 2, 3, 4, 5], None,   3),
        ("a device may take fewer than are right",        50, &[101, 102],           1, &[1],             None,   2),
        ("the last token ends it, whatever comes behind", 4,  &[101, 102],           3, &[1, 2, 3],       length, 0),
    ];
    for (row, max_tokens, draft, tokens, expected, finish, held) in rows {
        let mut scheduler = Scheduler::new(limits(32), BlockCount(8));
        scheduler.submit(request(1, 5, max_tokens)).unwrap();
        let first = scheduler.plan();
        step(&mut scheduler, &first);
        let plan = scheduler.plan_with_drafts(|_, _| Drafts::from([(RequestId(1), draft.to_vec())]));
        let work = plan.work[0];
        assert_eq!(work.drafted.0 as usize, draft.len(), "{row}");
        assert_eq!(*scheduler.work_tokens(&plan, &work), [&[100], draft].concat(), "{row}");
        scheduler.begin(&plan);
        let sampled: Vec<_> = (101..).take(tokens).map(|token| (RequestId(1), token)).collect();
        let outcomes = scheduler.finish(&plan, &sampled);
        let told: Vec<(TokenId, u32)> = outcomes.iter().map(|it| token(it).0).collect();
        let expected: Vec<(TokenId, u32)> = expected.iter().map(|index| (100 + index, *index)).collect();
        assert_eq!(told, expected, "{row}");
        assert_eq!(token(outcomes.last().unwrap()).1, finish, "{row}");
        scheduler.check();
        assert_eq!(scheduler.ledger().held, BlockCount(held), "{row}: only right guesses keep their blocks");
        let full = (5 + told.len()) / 4;
        let cached: Vec<u64> = scheduler.cached_hashes().collect();
        assert_eq!(cached.len(), full, "{row}: full blocks of right tokens can be found, and no others");
    }
}

#[test]
fn a_stop_token_in_a_draft_is_the_end() {
    let mut scheduler = Scheduler::new(limits(32), BlockCount(8));
    let mut stops = request(1, 5, 50);
    stops.stop.stop_token_ids = vec![102];
    scheduler.submit(stops).unwrap();
    let first = scheduler.plan();
    step(&mut scheduler, &first);
    let plan = scheduler.plan_with_drafts(|_, _| Drafts::from([(RequestId(1), vec![101, 102, 103])]));
    scheduler.begin(&plan);
    let outcomes = scheduler.finish(&plan, &[101, 102, 103, 104].map(|token| (RequestId(1), token)));
    let told: Vec<_> = outcomes.iter().map(token).collect();
    assert_eq!(told, [((101, 1), None), ((102, 2), Some(FinishReason::Stop(Some(102))))]);
    assert_eq!(scheduler.ledger().used(), BlockCount(0));
    scheduler.check();
}

#[test]
fn one_cancelled_while_its_draft_is_computed_leaves_nothing() {
    let mut scheduler = Scheduler::new(limits(32), BlockCount(8));
    scheduler.submit(request(1, 5, 50)).unwrap();
    let first = scheduler.plan();
    step(&mut scheduler, &first);
    let plan = scheduler.plan_with_drafts(|plan, _| guess_all(plan, 9));
    scheduler.begin(&plan);
    assert!(BlockCount(2) < scheduler.ledger().held);
    let _ = scheduler.cancel(RequestId(1));
    assert_eq!(scheduler.finish(&plan, &[(RequestId(1), 101)]), []);
    assert_eq!(scheduler.ledger().used(), BlockCount(0));
    scheduler.check();
}

#[test]
#[should_panic(expected = "a token follows a guess that was right")]
fn a_token_behind_a_wrong_guess_is_a_bug() {
    let mut scheduler = Scheduler::new(limits(32), BlockCount(8));
    scheduler.submit(request(1, 5, 50)).unwrap();
    let first = scheduler.plan();
    step(&mut scheduler, &first);
    let plan = scheduler.plan_with_drafts(|_, _| Drafts::from([(RequestId(1), vec![999])]));
    scheduler.begin(&plan);
    scheduler.finish(&plan, &[(RequestId(1), 101), (RequestId(1), 102)]);
}

fn limits(budget: u32) -> Limits {
    Limits {
        block_len: BlockLen::new(4).unwrap(),
        max_model_len: TokenCount(64),
        max_num_seqs: 4,
        max_num_batched_tokens: TokenCount(budget),
        max_waiting: 8,
        prefix_cache: true,
        long_prefill_threshold: None,
    }
}

fn request(id: u64, len: u32, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        tokens: (0..len).map(|position| 1000 * u32::try_from(id).unwrap() + position).collect(),
        prompt_len: TokenCount(len),
        sampling: SamplingParams::default(),
        stop: StopConditions::after(max_tokens),
        part: Part::Whole,
    }
}

fn guess_all(plan: &StepPlan, guesses: u32) -> Drafts {
    plan.work.iter().map(|work| (work.request, (0..guesses).collect())).collect()
}

fn step(scheduler: &mut Scheduler, plan: &StepPlan) {
    scheduler.begin(plan);
    let next = |id: RequestId| {
        let index = scheduler.sequence(id).unwrap().output().len();
        (id, u32::try_from(100 * id.0 as usize + index).unwrap())
    };
    let sampled: Vec<_> =
        plan.work.iter().filter(|work| work.samples).map(|work| next(work.request)).collect();
    scheduler.finish(plan, &sampled);
}

fn token(outcome: &Outcome) -> ((TokenId, u32), Option<FinishReason>) {
    let Outcome::Token { token, index, finish, .. } = *outcome else { panic!("{outcome:?} is no token") };
    ((token, index), finish)
}
