//! The nodes, the events that are to come, and the clock that jumps from one to the next.

use std::collections::BTreeMap;

use tidemill_kvtransfer_proto::endpoint_core::{DigestOrder, LinkId, QuietProof};
use tidemill_kvtransfer_proto::message::Message;
use tidemill_kvtransfer_proto::simulated_wire::Chance;
use tidemill_kvtransfer_proto::transport::{Completion, WriteId};
use tidemill_kvtransfer_proto::units::{BlockCount, TokenCount};

use super::chaos::Chaos;

use super::front::{Front, ToFront};
use super::model::Shape;
use super::process::Life;
use super::wire::{Conn, ConnId};
use super::{Fault, Mischief, Options, Summary, Trace};
use crate::request::{Request, RequestId};
use crate::routing::Role;
use crate::scheduler::{Counts, Limits};

/// The router is one node, each worker another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    Front,
    Worker(usize),
}

/// A process of a worker, which is not the one that runs in its place after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Process {
    pub(super) place: usize,
    pub(super) instance: u64,
}

/// What the router sends to a worker.
#[derive(Debug)]
pub(super) enum ToWorker {
    Generate { request: Box<Request>, peer: Option<Process>, job: usize },
    Cancel(RequestId),
    Meet(Vec<Process>),
}

/// What is to come.
#[derive(Debug)]
pub(super) enum Event {
    Arrive(usize),
    HangUp(usize),
    ToFront { from: Process, message: ToFront },
    FrontTimer,
    ToWorker { to: Process, message: ToWorker },
    Status(Process),
    EngineTurn(Process),
    Layer { process: Process, layer: usize },
    EndpointTurn(Process),
    Digest { process: Process, order: DigestOrder },
    Control { conn: ConnId, to: usize, message: Message },
    Closed { conn: ConnId, to: usize },
    Lands { conn: ConnId, from: usize, id: WriteId },
    Echo { conn: ConnId, from: usize, id: WriteId },
    Looks { conn: ConnId, reader: usize, id: WriteId },
    Brings { conn: ConnId, reader: usize, id: WriteId },
    Completed { process: Process, completion: Completion },
    AccessEnded { process: Process, conn: ConnId, side: usize, peer: u64, link: LinkId },
    ProcessGone { process: Process, peer: u64 },
    Chaos(Chaos),
}

/// A worker's place: one process after the other.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) role: Role,
    pub(super) limits: Limits,
    pub(super) shape: Shape,
    /// Whether no device of a peer may write to its memory.
    pub(super) pulls: bool,
    /// Bytes in which it converts for peers that read.
    pub(super) staging: usize,
    pub(super) blocks: BlockCount,
    pub(super) life: Option<Life>,
    /// Nothing runs there until then.
    pub(super) stands_until: u64,
    /// Per mille of the true speed of time.
    pub(super) clock_rate: u64,
    pub(super) clock_offset: u64,
    /// Steps take so many times as long.
    pub(super) slowness: u64,
    /// It reads nothing until then.
    pub(super) leaves_offers_until: u64,
}

/// Everything there is.
pub(super) struct World<'a> {
    pub(super) options: Options,
    pub(super) chance: Chance,
    pub(super) now: u64,
    pub(super) trace: &'a mut Trace,
    pub(super) summary: Summary,
    events: BTreeMap<(u64, u64), Event>,
    next_event: u64,
    next_number: u64,
    pub(super) workers: Vec<Worker>,
    pub(super) conns: BTreeMap<ConnId, Conn>,
    pub(super) next_conn: u64,
    pub(super) front: Front,
    /// Pairs of nodes that do not hear each other, and until when.
    pub(super) cuts: BTreeMap<(Node, Node), u64>,
    /// Last arrival between two nodes outside of connections: those messages come in order too.
    pub(super) last_arrival: BTreeMap<(Node, Node), u64>,
    /// From then on nothing goes wrong any more.
    pub(super) calm_from: u64,
    /// Writes that may be under way on one connection.
    pub(super) queue_depth: usize,
    pub(super) in_place: bool,
    /// Bytes that may be on their way to a worker.
    pub(super) credit: u64,
    pub(super) proofs: BTreeMap<(usize, usize), QuietProof>,
}

impl<'a> World<'a> {
    pub(super) fn new(seed: u64, options: Options, trace: &'a mut Trace) -> Self {
        let mut chance = Chance::new(seed ^ 0x71de_3111_5eed_0001);
        let short_queues = options.faults.contains(Fault::FullQueue) && chance.happens(400);
        let roles = roles(&mut chance);
        let shapes = shapes(&mut chance, roles.len());
        // Drawn aside, so that schedules from before there were reads stay as they were.
        let mut aside = Chance::new(seed ^ 0x71de_3111_9011_0001);
        let mut room = Chance::new(seed ^ 0x71de_3111_57a9_0001);
        let mut lazy = Chance::new(seed ^ 0x71de_3111_1a2e_0001);
        let workers: Vec<Worker> = roles
            .into_iter()
            .zip(shapes)
            .map(|(role, shape)| {
                let tokens = TokenCount(MAX_MODEL_LEN.0 + 4 * below(&mut chance, 15));
                let pulls = aside.happens(500);
                let is_lazy = options.faults.contains(Fault::Hoard) && lazy.happens(250) && pulls;
                Worker {
                    role,
                    limits: limits(&mut chance, shape, short_queues),
                    shape,
                    pulls,
                    staging: STAGING[room.below(STAGING.len())],
                    blocks: tokens.blocks_to_hold(shape.block_len),
                    life: None,
                    stands_until: 0,
                    clock_rate: 1000,
                    clock_offset: u64::from(below(&mut chance, 1_000_000)),
                    slowness: 1,
                    leaves_offers_until: if is_lazy { LAZY_UNTIL } else { 0 },
                }
            })
            .collect();
        let mut proofs = BTreeMap::new();
        let all = [QuietProof::Admission, QuietProof::Process, QuietProof::AccessEnded];
        for a in 0..workers.len() {
            for b in a + 1..workers.len() {
                proofs.insert((a, b), all[chance.below(3)]);
            }
        }
        let calm_from = u64::from(200_000 + below(&mut chance, 1_500_000));
        let queue_depth = if short_queues { 1 + chance.below(2) } else { 64 };
        let in_place = chance.happens(700);
        let credit = [1, 3 * workers[0].shape.block_bytes() as u64, u64::MAX][chance.below(3)];
        let mut world = Self {
            options,
            chance,
            now: 0,
            trace,
            summary: Summary { schedules: 1, ..Summary::default() },
            events: BTreeMap::new(),
            next_event: 0,
            next_number: 1,
            front: Front::new(workers.len()),
            workers,
            conns: BTreeMap::new(),
            next_conn: 0,
            cuts: BTreeMap::new(),
            last_arrival: BTreeMap::new(),
            calm_from,
            queue_depth,
            in_place,
            credit,
            proofs,
        };
        for place in 0..world.workers.len() {
            world.start_worker(place);
        }
        world.plan_jobs();
        world.plan_chaos();
        world
    }

    /// Runs to the end.
    pub(super) fn run(mut self) -> Summary {
        while let Some(((at, _), event)) = self.events.pop_first() {
            assert!(self.now <= at, "time goes on");
            self.now = at;
            self.summary.steps += 1;
            assert!(self.summary.steps < MAX_STEPS, "a schedule that does not end: {}", self.describe());
            self.dispatch(event);
            if self.summary.steps.is_multiple_of(8) && self.is_over() {
                break;
            }
            assert!(self.now < self.calm_from + PATIENCE, "something waits for ever: {}", self.describe());
        }
        self.check_the_end();
        self.summary.microseconds = self.now;
        self.summary
    }

    fn dispatch(&mut self, event: Event) {
        if let Some(until) = self.stands_still(&event) {
            return self.at(until, event);
        }
        match event {
            Event::Arrive(job) => self.arrive(job),
            Event::HangUp(job) => self.hang_up(job),
            Event::ToFront { from, message } => match self.cut(Node::Worker(from.place), Node::Front) {
                Some(until) => self.at(until, Event::ToFront { from, message }),
                None => self.front_hears(from, message),
            },
            Event::FrontTimer => self.front_turn(),
            Event::ToWorker { to, message } => match self.cut(Node::Worker(to.place), Node::Front) {
                Some(until) => self.at(until, Event::ToWorker { to, message }),
                None => self.worker_hears(to, message),
            },
            Event::Status(process) => self.send_status(process),
            Event::EngineTurn(process) => self.engine_turn(process),
            Event::Layer { process, layer } => self.compute_layer(process, layer),
            Event::EndpointTurn(process) => self.endpoint_turn(process),
            Event::Digest { process, order } => self.digest(process, &order),
            Event::Control { conn, to, message } => self.control_arrives(conn, to, message),
            Event::Closed { conn, to } => self.closed(conn, to),
            Event::Lands { conn, from, id } => self.lands(conn, from, id),
            Event::Echo { conn, from, id } => self.echo(conn, from, id),
            Event::Looks { conn, reader, id } => self.looks(conn, reader, id),
            Event::Brings { conn, reader, id } => self.brings(conn, reader, id),
            Event::Completed { process, completion } => self.completed(process, completion),
            Event::AccessEnded { process, conn, side, peer, link } => {
                self.access_ended(process, conn, side, peer, link);
            }
            Event::ProcessGone { process, peer } => self.process_gone(process, peer),
            Event::Chaos(chaos) => self.wreak(chaos),
        }
    }

    /// Until when the process that the event is for stands still, if it does.
    fn stands_still(&self, event: &Event) -> Option<u64> {
        let place = match event {
            Event::ToWorker { to, .. } => to.place,
            Event::Status(process)
            | Event::EngineTurn(process)
            | Event::EndpointTurn(process)
            | Event::Layer { process, .. }
            | Event::Digest { process, .. }
            | Event::Completed { process, .. }
            | Event::AccessEnded { process, .. }
            | Event::ProcessGone { process, .. } => process.place,
            Event::Control { conn, to, .. } | Event::Closed { conn, to } => {
                self.conns.get(conn)?.ends[*to].process.place
            }
            Event::Lands { conn, from, .. } => {
                let conn = self.conns.get(conn)?;
                match conn.proof {
                    QuietProof::Admission => conn.ends[1 - from].process.place,
                    QuietProof::Process => conn.ends[*from].process.place,
                    // A device needs nobody.
                    QuietProof::AccessEnded => return None,
                }
            }
            Event::Arrive(_)
            | Event::HangUp(_)
            | Event::ToFront { .. }
            | Event::FrontTimer
            | Event::Echo { .. }
            // Devices need nobody.
            | Event::Looks { .. }
            | Event::Brings { .. }
            | Event::Chaos(_) => return None,
        };
        let until = self.workers[place].stands_until;
        (self.now < until).then_some(until)
    }

    pub(super) fn at(&mut self, at: u64, event: Event) {
        self.next_event += 1;
        self.events.insert((at, self.next_event), event);
    }

    pub(super) fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        self.trace.note(self.now, line);
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// A random number of microseconds.
    pub(super) fn micros(&mut self, from: u64, below: u64) -> u64 {
        from + self.chance.number() % (below - from)
    }

    pub(super) fn is_calm(&self) -> bool {
        self.calm_from <= self.now
    }

    /// Whether a fault happens here.
    pub(super) fn strikes(&mut self, fault: Fault, per_mille: u32) -> bool {
        let happens =
            self.options.faults.contains(fault) && !self.is_calm() && self.chance.happens(per_mille);
        if happens {
            self.count(fault);
        }
        happens
    }

    pub(super) fn count(&mut self, fault: Fault) {
        self.summary.injected[fault as usize] += 1;
    }

    pub(super) fn plants(&self, mischief: Mischief) -> bool {
        self.options.mischief == Some(mischief)
    }

    /// When two nodes hear each other again, if they do not now.
    pub(super) fn cut(&mut self, a: Node, b: Node) -> Option<u64> {
        let pair = (a.min(b), a.max(b));
        let until = *self.cuts.get(&pair)?;
        if until <= self.now {
            self.cuts.remove(&pair);
            return None;
        }
        Some(until)
    }

    /// When something sent now from one node to another arrives, behind what was sent before.
    pub(super) fn arrival(&mut self, from: Node, to: Node) -> u64 {
        let latency = self.latency();
        let start = self.cut(from, to).unwrap_or(self.now);
        let last = self.last_arrival.entry((from, to)).or_default();
        *last = (start + latency).max(*last + 1);
        *last
    }

    pub(super) fn latency(&mut self) -> u64 {
        let latency = self.micros(20, 200);
        if self.strikes(Fault::Delay, 5) { latency * 100 } else { latency }
    }

    pub(super) fn life(&mut self, process: Process) -> Option<&mut Life> {
        self.workers[process.place].life.as_mut().filter(|it| it.instance == process.instance)
    }

    pub(super) fn process(&self, place: usize) -> Option<Process> {
        self.workers[place].life.as_ref().map(|life| Process { place, instance: life.instance })
    }

    fn is_over(&self) -> bool {
        self.front.is_over() && self.calm_from <= self.now && self.workers.iter().all(Worker::is_idle)
    }

    fn check_the_end(&self) {
        self.front.check_the_end();
        for (place, worker) in self.workers.iter().enumerate() {
            let Some(life) = &worker.life else { panic!("worker {place} is up at the end") };
            life.scheduler.check();
            let ledger = life.scheduler.ledger();
            assert_eq!(life.scheduler.counts(), Counts::default(), "worker {place} has no request left");
            assert_eq!(
                ledger.free.0 + ledger.cached.0,
                ledger.total.0,
                "worker {place} has all its blocks again: {ledger:?}"
            );
            assert!(life.core.is_idle() && life.is_idle(), "worker {place} has no handoff left");
        }
    }

    pub(super) fn describe(&self) -> String {
        let mut text = format!("at {} µs; {}", self.now, self.front.describe());
        for (place, worker) in self.workers.iter().enumerate() {
            let Some(life) = &worker.life else {
                text.push_str(&format!("\nworker {place} is down"));
                continue;
            };
            let (counts, ledger) = (life.scheduler.counts(), life.scheduler.ledger());
            text.push_str(&format!("\nworker {place}: {counts:?} {ledger:?} {}", life.describe()));
        }
        text
    }
}

impl Worker {
    fn is_idle(&self) -> bool {
        self.life.as_ref().is_some_and(|life| {
            life.is_idle() && life.core.is_idle() && life.scheduler.counts() == Counts::default()
        })
    }

    /// The worker's own clock.
    pub(super) fn local(&self, now: u64) -> u64 {
        self.clock_offset + now * self.clock_rate / 1000
    }

    /// True time of a moment of the worker's clock, rounded up.
    pub(super) fn global(&self, local: u64) -> u64 {
        (local.saturating_sub(self.clock_offset) * 1000).div_ceil(self.clock_rate)
    }
}

fn below(chance: &mut Chance, bound: usize) -> u32 {
    u32::try_from(chance.below(bound)).expect("small")
}

fn roles(chance: &mut Chance) -> Vec<Role> {
    let mut roles = vec![Role::Prefill; 1 + chance.below(2)];
    roles.extend(vec![Role::Decode; 1 + chance.below(2)]);
    if chance.happens(100) {
        roles.push(Role::Hybrid);
    }
    roles
}

/// Every worker has its blocks in the same shape, or each in its own.
fn shapes(chance: &mut Chance, workers: usize) -> Vec<Shape> {
    let all = Shape::all();
    if chance.happens(500) {
        return vec![all[chance.below(all.len())]; workers];
    }
    (0..workers).map(|_| all[chance.below(all.len())]).collect()
}

fn limits(chance: &mut Chance, shape: Shape, short_queues: bool) -> Limits {
    let chunk = 2 + below(chance, 8);
    Limits {
        block_len: shape.block_len,
        max_model_len: MAX_MODEL_LEN,
        max_num_seqs: 1 + below(chance, 4),
        max_num_batched_tokens: TokenCount(4 + below(chance, 29)),
        max_waiting: if short_queues { 1 } else { 8 },
        prefix_cache: chance.happens(800),
        long_prefill_threshold: chance.happens(300).then_some(TokenCount(chunk)),
    }
}

/// Room for the largest layer of a block, for some, and for all that there can be.
const STAGING: [usize; 3] = [256, 768, 1 << 20];
/// What each pool has room for at least.
pub(super) const MAX_MODEL_LEN: TokenCount = TokenCount(40);
/// Until when who leaves what it is offered does so: long enough for that to be noticed.
const LAZY_UNTIL: u64 = 14_000_000;
/// How long everything may take once nothing goes wrong any more.
const PATIENCE: u64 = 60_000_000;
/// Far more than the longest schedule needs.
const MAX_STEPS: u64 = 400_000;
