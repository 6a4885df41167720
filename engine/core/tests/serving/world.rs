//! A prefill worker, a decode worker, and what lies between them.
//!
//! Stands in for the driver and the network: it obeys the schedulers, moves contents between memories, and lets
//! things happen in any order that the driver allows itself, also while a step computes.

mod links;

use std::collections::{BTreeMap, BTreeSet};

use proptest::sample::Index;
use tidemill_engine_core::handoff::Cancelled;
use tidemill_engine_core::plan::{StepPlan, Work};
use tidemill_engine_core::request::{
    FinishReason, Part, Request, RequestId, SamplingParams, StopConditions, TokenId,
};
use tidemill_engine_core::scheduler::{Counts, Limits, Outcome, Scheduler};
use tidemill_engine_core::sequence::{Place, Stage};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, HandoffId, TokenCount};

use crate::model::{Memory, answer, stop_after};
use links::{Link, names};

const PREFILL: usize = 0;
const DECODE: usize = 1;

/// Something that happens. What is not possible now does not.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Whole {
        worker: usize,
        prompt: Vec<TokenId>,
        max: u32,
    },
    Split {
        prompt: Vec<TokenId>,
        max: u32,
        in_place: bool,
    },
    Begin(usize),
    Finish(usize),
    /// D tells P its new reservations.
    Announce,
    /// P decides where an announced handoff is computed.
    Place {
        link: Index,
        own: bool,
    },
    /// P writes what it has to D.
    Push(Index),
    /// P has written everything and says so.
    Commit(Index),
    /// D gives a handoff up; P does not know yet.
    FailAtDecode(Index),
    /// P gives a handoff up; D does not know yet.
    FailAtPrefill(Index),
    /// Something old lands in quarantined blocks.
    LateWrite(Index),
    /// Both know that a failed handoff is over.
    Settle(Index),
    Cancel(Index),
    Grow {
        worker: usize,
        count: u32,
    },
    Shrink {
        worker: usize,
        count: u32,
    },
}

#[derive(Debug)]
pub(crate) struct World {
    workers: [Worker; 2],
    jobs: Vec<Job>,
    /// Which job an attempt works for; attempts given up are not here.
    owners: BTreeMap<RequestId, usize>,
    links: BTreeMap<RequestId, Link>,
    attempts: u64,
}

#[derive(Debug)]
struct Worker {
    scheduler: Scheduler,
    memory: Memory,
    step: Option<(StepPlan, Vec<Capture>)>,
    /// What a router knows of the prefix cache.
    heard: BTreeSet<u64>,
    withdrawn: u32,
}

/// A work as the device got it when the step began.
#[derive(Debug)]
struct Capture {
    work: Work,
    tokens: Vec<TokenId>,
    table: Vec<BlockId>,
    /// Whose memory it computes in.
    memory: usize,
}

#[derive(Debug)]
struct Job {
    prompt: Vec<TokenId>,
    stop: StopConditions,
    output: Vec<TokenId>,
    expected: Vec<TokenId>,
    state: JobState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JobState {
    Live,
    Done,
    /// Cancelled, or refused because a pool has become too small.
    GivenUp,
}

impl World {
    pub(crate) fn new(limits: Limits, blocks: [u32; 2]) -> Self {
        let worker = |count| Worker {
            scheduler: Scheduler::new(limits, BlockCount(count)),
            memory: Memory::default(),
            step: None,
            heard: BTreeSet::new(),
            withdrawn: 0,
        };
        Self {
            workers: blocks.map(worker),
            jobs: Vec::new(),
            owners: BTreeMap::new(),
            links: BTreeMap::new(),
            attempts: 0,
        }
    }

    pub(crate) fn act(&mut self, op: Op) {
        match op {
            Op::Whole { worker, prompt, max } => {
                let job = self.new_job(prompt, max);
                self.submit_whole(job, worker);
            }
            Op::Split { prompt, max, in_place } => {
                let job = self.new_job(prompt, max);
                self.submit_split(job, in_place);
            }
            Op::Begin(worker) => self.begin(worker),
            Op::Finish(worker) => self.finish(worker),
            Op::Announce => self.announce(),
            Op::Place { link, own } => self.with_link(link, |world, id| world.place(id, own)),
            Op::Push(link) => self.with_link(link, Self::push),
            Op::Commit(link) => self.with_link(link, Self::commit),
            Op::FailAtDecode(link) => self.with_link(link, |world, id| world.fail_at_decode(id, true)),
            Op::FailAtPrefill(link) => self.with_link(link, Self::fail_at_prefill),
            Op::LateWrite(link) => self.with_link(link, Self::late_write),
            Op::Settle(link) => self.with_link(link, Self::settle),
            Op::Cancel(which) => self.cancel(which),
            Op::Grow { worker, count } => {
                self.workers[worker].scheduler.add_blocks(BlockCount(count));
            }
            Op::Shrink { worker, count } => {
                let worker = &mut self.workers[worker];
                if worker.step.is_none() {
                    let blocks = worker.scheduler.withdraw_blocks(BlockCount(count));
                    worker.withdrawn += u32::try_from(blocks.len()).unwrap();
                }
            }
        }
    }

    pub(crate) fn check(&mut self) {
        for worker in &mut self.workers {
            worker.scheduler.check();
            let changes = worker.scheduler.take_cache_changes();
            for hash in changes.removed {
                assert!(worker.heard.remove(&hash), "what is removed was there");
            }
            for hash in changes.added {
                assert!(worker.heard.insert(hash), "what is added was not there");
            }
            let cached: BTreeSet<u64> = worker.scheduler.cached_hashes().collect();
            assert_eq!(worker.heard, cached, "the changes tell all there is");
        }
    }

    /// Lets everything come to its end, without new requests: nothing may be stuck, lost or wrong.
    pub(crate) fn drain(&mut self) {
        for worker in &mut self.workers {
            worker.scheduler.add_blocks(BlockCount(worker.withdrawn));
        }
        let mut rounds = 0;
        while self.jobs.iter().any(|job| job.state == JobState::Live)
            || !self.links.is_empty()
            || self.is_busy()
        {
            rounds += 1;
            assert!(rounds < 2_000, "something is stuck: {}", self.describe());
            for worker in [PREFILL, DECODE] {
                self.begin(worker);
                self.finish(worker);
            }
            if rounds % 40 == 0 {
                self.break_a_deadlock();
            }
            self.announce();
            for id in self.links.keys().copied().collect::<Vec<_>>() {
                self.place(id, rounds % 2 == 0);
                self.commit(id);
                self.give_up_on_a_lost_peer(id);
                self.settle(id);
            }
            self.check();
        }
        for worker in &self.workers {
            let ledger = worker.scheduler.ledger();
            assert_eq!(worker.scheduler.counts(), Counts::default(), "nobody is left");
            assert_eq!(ledger.free.0 + ledger.cached.0, ledger.total.0, "no block is leaked: {ledger:?}");
        }
        for job in &self.jobs {
            let length = job.output.len();
            assert_eq!(
                job.output,
                job.expected[..length],
                "the answer is the one that the request has alone"
            );
            assert!(job.state == JobState::GivenUp || length == job.expected.len(), "the answer is complete");
        }
    }

    fn describe(&self) -> String {
        let schedulers = self.workers.each_ref().map(|it| &it.scheduler);
        let state = schedulers.map(|it| format!("{:?} {:?}\n{:?}", it.counts(), it.ledger(), it.plan()));
        let sequences = (1..=self.attempts).flat_map(|id| schedulers.map(|it| it.sequence(RequestId(id))));
        let sequences: Vec<_> = sequences
            .flatten()
            .map(|it| (it.request().part, it.stage(), it.place(), it.computed(), it.known()))
            .collect();
        format!("{}\n{}\n{sequences:#?}\n{:#?}", state[PREFILL], state[DECODE], self.links)
    }

    fn is_busy(&self) -> bool {
        self.workers
            .iter()
            .any(|worker| worker.step.is_some() || worker.scheduler.counts() != Counts::default())
    }

    fn new_job(&mut self, prompt: Vec<TokenId>, max: u32) -> usize {
        let stop = stop_after(max);
        let longest = self.workers[DECODE].scheduler.limits().max_model_len;
        let expected = answer(&prompt, &stop, longest);
        self.jobs.push(Job { prompt, stop, output: Vec::new(), expected, state: JobState::Live });
        self.jobs.len() - 1
    }

    fn next_request(&mut self, job: usize, part: impl Fn(HandoffId) -> Part) -> Request {
        self.attempts += 1;
        let it = &self.jobs[job];
        Request {
            id: RequestId(self.attempts),
            tokens: [&it.prompt[..], &it.output[..]].concat(),
            prompt_len: TokenCount(u32::try_from(it.prompt.len()).unwrap()),
            sampling: SamplingParams::default(),
            stop: it.stop.clone(),
            part: part(HandoffId(self.attempts)),
        }
    }

    fn submit_whole(&mut self, job: usize, worker: usize) {
        let request = self.next_request(job, |_| Part::Whole);
        let id = request.id;
        match self.workers[worker].scheduler.submit(request) {
            Ok(()) => drop(self.owners.insert(id, job)),
            Err(_) => self.jobs[job].state = JobState::GivenUp,
        }
    }

    fn submit_split(&mut self, job: usize, in_place: bool) {
        let decode = self.next_request(job, Part::DecodeFrom);
        let (id, tokens) = (decode.id, decode.tokens.clone());
        let Part::DecodeFrom(handoff) = decode.part else { unreachable!("just made") };
        let prefill = Request { part: Part::PrefillFor(handoff), ..decode.clone() };
        let [p, d] = &mut self.workers;
        let at_p = if in_place { p.scheduler.submit_in_place(prefill) } else { p.scheduler.submit(prefill) };
        let at_d = at_p.and_then(|()| d.scheduler.submit(decode));
        if at_d.is_err() {
            let _ = p.scheduler.cancel(id);
            self.jobs[job].state = JobState::GivenUp;
            return;
        }
        self.owners.insert(id, job);
        let link = Link {
            tokens,
            reservation: None,
            first_token: None,
            in_place: false,
            abandoned: false,
            failed: false,
            quarantined: false,
        };
        self.links.insert(id, link);
    }

    fn begin(&mut self, worker: usize) {
        if self.workers[worker].step.is_some() {
            return;
        }
        let scheduler = &mut self.workers[worker].scheduler;
        let (jobs, owners) = (&self.jobs, &self.owners);
        let guess = |plan: &StepPlan, _| {
            let guess =
                |work: &Work| (work.request, guess(owners.get(&work.request).map(|job| &jobs[*job]), work));
            plan.work.iter().map(guess).collect()
        };
        let plan = scheduler.plan_with_drafts(guess);
        assert_eq!(plan, scheduler.plan_with_drafts(guess), "planning changes nothing");
        let mut without = plan.clone();
        without.drafts.clear();
        without.work.iter_mut().for_each(|work| work.drafted = TokenCount(0));
        assert_eq!(without, scheduler.plan(), "nobody notices that others have drafts");
        assert!(plan.work.len() <= scheduler.limits().max_num_seqs as usize, "a step is within its limits");
        assert!(plan.tokens() <= scheduler.limits().max_num_batched_tokens, "a step is within its limits");
        for id in &plan.refusals {
            let needed =
                scheduler.sequence(*id).unwrap().known().blocks_to_hold(scheduler.limits().block_len);
            assert!(scheduler.ledger().total < needed, "only what cannot fit is refused");
        }
        scheduler.begin(&plan);
        let captures: Vec<Capture> =
            plan.work.iter().map(|work| self.capture(worker, &plan, *work)).collect();
        let mut written = BTreeSet::new();
        for Capture { work, table, memory, .. } in &captures {
            let (first, end) = (work.first.0 as usize, (work.first.0 + work.rows().0) as usize);
            for block in &table[first / self.block_len()..end.div_ceil(self.block_len())] {
                assert!(written.insert((*memory, *block)), "{block:?} is written by two in one step");
                assert!(self.users(*memory, *block) <= 1, "{block:?} is written while others read it");
            }
        }
        self.workers[worker].step = Some((plan, captures));
    }

    fn capture(&self, worker: usize, plan: &StepPlan, work: Work) -> Capture {
        let scheduler = &self.workers[worker].scheduler;
        let end = (work.first.0 + work.count.0) as usize;
        let tokens = [&scheduler.tokens(work.request)[..end], plan.draft(&work)].concat();
        assert_eq!(*scheduler.work_tokens(plan, &work), tokens[work.first.0 as usize..]);
        let sequence = scheduler.sequence(work.request).unwrap();
        assert_eq!(work.samples, end == sequence.tokens().len(), "a token follows the last one");
        let (table, memory) = match sequence.place() {
            Place::OwnBlocks => (names(scheduler.block_table(work.request)), worker),
            Place::Targets => {
                assert!(scheduler.block_table(work.request).is_empty(), "it needs no own blocks");
                (self.links[&work.request].table(), DECODE)
            }
        };
        Capture { work, tokens, table, memory }
    }

    fn finish(&mut self, worker: usize) {
        let Some((plan, captures)) = self.workers[worker].step.take() else { return };
        let block_len = self.block_len();
        let mut sampled = Vec::new();
        for Capture { work, tokens, table, memory } in captures {
            let sequence = self.workers[worker].scheduler.sequence(work.request);
            let wanted = sequence.is_some_and(|it| it.stage() == Stage::Running);
            let memory = &mut self.workers[memory].memory;
            memory.compute(&table, &tokens, work.first.0 as usize, block_len);
            if wanted {
                memory.expect(&table, &tokens, block_len);
            }
            if work.samples {
                let known = tokens.len() - work.drafted.0 as usize;
                for end in known..=tokens.len() {
                    let token = memory.read(&table, end - 1, block_len).next_token();
                    sampled.push((work.request, token));
                    if tokens.get(end) != Some(&token) {
                        break;
                    }
                }
            }
        }
        for outcome in self.workers[worker].scheduler.finish(&plan, &sampled) {
            self.heed(worker, outcome);
        }
    }

    fn heed(&mut self, worker: usize, outcome: Outcome) {
        match outcome {
            Outcome::Token { request, token, index, finish, .. } => {
                self.heed_token(worker, request, token, index, finish)
            }
            Outcome::NoRoom { request } => {
                if worker == PREFILL
                    && let Some(link) = self.links.get_mut(&request)
                {
                    link.abandoned = true;
                    return;
                }
                if let Some(link) = self.links.get_mut(&request) {
                    link.failed = true;
                }
                let job =
                    &mut self.jobs[self.owners.remove(&request).expect("only what is wanted is refused")];
                job.state = JobState::GivenUp;
            }
        }
    }

    fn heed_token(
        &mut self,
        worker: usize,
        request: RequestId,
        token: TokenId,
        index: u32,
        finish: Option<FinishReason>,
    ) {
        let Some(job) = self.owners.get(&request).map(|job| &mut self.jobs[*job]) else { return };
        if worker == PREFILL
            && let Some(link) = self.links.get_mut(&request)
        {
            link.first_token = Some(token);
        }
        match job.output.get(index as usize) {
            Some(told) => assert_eq!(*told, token, "both sides tell the same first token"),
            None => {
                assert_eq!(index as usize, job.output.len(), "tokens come in order");
                job.output.push(token);
            }
        }
        assert_eq!(
            job.output.last(),
            job.expected.get(index as usize),
            "the token that the request gets alone"
        );
        assert_eq!(
            finish.is_some(),
            job.output.len() == job.expected.len(),
            "the end is told with the last token"
        );
        if finish.is_some() {
            job.state = JobState::Done;
            self.owners.remove(&request);
            self.fail_at_decode(request, false);
        }
    }

    fn cancel(&mut self, which: Index) {
        let ids: Vec<RequestId> = self.owners.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = *which.get(&ids);
        let job = self.owners.remove(&id).unwrap();
        self.jobs[job].state = JobState::GivenUp;
        if self.links.contains_key(&id) {
            return self.fail_at_decode(id, false);
        }
        let [p, d] = self.workers.each_mut().map(|worker| worker.scheduler.cancel(id));
        assert!(
            [p, d].contains(&Cancelled::Done) && [p, d].contains(&Cancelled::Unknown),
            "one worker has it"
        );
    }

    /// How many sequences of a worker have a block in their tables.
    fn users(&self, worker: usize, block: BlockId) -> usize {
        let scheduler = &self.workers[worker].scheduler;
        let tables = (1..=self.attempts).map(|id| scheduler.block_table(RequestId(id)));
        tables.filter(|table| table.iter().any(|it| it.block == block)).count()
    }

    fn block_len(&self) -> usize {
        self.workers[DECODE].scheduler.limits().block_len.tokens() as usize
    }
}

/// Guesses of which some are right, some are not, and some lead beyond the end.
fn guess(job: Option<&Job>, work: &Work) -> Vec<TokenId> {
    let Some(job) = job else { return vec![0; 3] };
    let luck = (work.request.0 * 7 + u64::from(work.first.0) * 5) as usize;
    let mut guess: Vec<TokenId> = job.expected[job.output.len()..].to_vec();
    guess.resize(luck % 6, 0);
    if let Some(wrong) = guess.get_mut(luck % 11) {
        *wrong += 1;
    }
    guess
}
