//! Clients and the router: journeys with their streams, timers, and the view of the cluster.

use std::collections::{BTreeMap, BTreeSet};

use tidemill_kvtransfer_proto::units::{BlockCount, HandoffId, TokenCount};

use super::clients::{Job, JobState, Routing, Stream};
use super::model::Shape;
use super::status::Status;
use super::world::{Event, Node, Process, ToWorker, World};
use crate::events::EngineEvent;
use crate::journey::{Action, Happening, Instance, Route, Side};
use crate::request::{Part, Request, RequestId, SamplingParams};
use crate::routing::{
    self, AloneReason, Availability, ClusterView, NoRoute, Role, RouteRequest, RoutingPolicy, WorkerView,
};
use crate::scheduler::Limits;

/// What a worker sends to the router.
#[derive(Debug)]
pub(super) enum ToFront {
    Said {
        request: RequestId,
        event: EngineEvent,
    },
    Status(Box<Status>),
    /// The connection to the worker is broken.
    Gone,
}

/// The router.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) jobs: Vec<Job>,
    /// When clients ask.
    pub(super) arrivals: Vec<u64>,
    pub(super) slots: Vec<Option<Slot>>,
    pub(super) places: BTreeMap<u64, usize>,
    pub(super) turn: u64,
    /// Streams that may end by themselves, and until when.
    pub(super) released: Vec<(u64, Process, RequestId)>,
    pub(super) timer_at: Option<u64>,
    /// When to look next whether pairs have lost each other.
    pub(super) mend_at: u64,
}

/// A worker, as the router knows it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) process: Process,
    pub(super) heard: u64,
    pub(super) links: BTreeSet<u64>,
    pub(super) view: WorkerView,
}

impl Front {
    pub(super) fn new(workers: usize) -> Self {
        Self {
            jobs: Vec::new(),
            arrivals: Vec::new(),
            slots: (0..workers).map(|_| None).collect(),
            places: BTreeMap::new(),
            turn: 0,
            released: Vec::new(),
            timer_at: None,
            mend_at: MEND_EVERY,
        }
    }

    pub(super) fn job(&self, job: usize) -> &Job {
        &self.jobs[job]
    }

    pub(super) fn place_of(&self, instance: u64) -> Option<usize> {
        self.places.get(&instance).copied()
    }

    pub(super) fn is_over(&self) -> bool {
        self.jobs.iter().all(|job| !matches!(job.state, JobState::ToCome | JobState::Open))
    }

    pub(super) fn check_the_end(&self) {
        for (number, job) in self.jobs.iter().enumerate() {
            assert!(
                !matches!(job.state, JobState::ToCome | JobState::Open),
                "request {number} has not ended: {job:?}"
            );
        }
    }

    pub(super) fn describe(&self) -> String {
        let open = self.jobs.iter().enumerate().filter(|(_, it)| it.state == JobState::Open);
        let open: Vec<String> = open
            .map(|(number, it)| {
                format!("request {number} {:?} {:?} {:?}", it.streams, it.routing, it.journey)
            })
            .collect();
        format!("open: {open:?}")
    }
}

impl World<'_> {
    pub(super) fn front_hears(&mut self, from: Process, message: ToFront) {
        if !matches!(message, ToFront::Gone)
            && let Some(slot) = &mut self.front.slots[from.place]
            && slot.process == from
        {
            slot.heard = self.now;
        }
        match message {
            ToFront::Status(status) => self.take_status(from, *status),
            ToFront::Gone => self.lose_worker(from, "the worker is gone"),
            ToFront::Said { request, event } => {
                let of_request = |it: &Stream| it.request == request && it.process == from;
                let found = self.front.jobs.iter().enumerate().find_map(|(number, job)| {
                    let place = job.streams.iter().position(of_request)?;
                    Some((number, place, job.streams[place].side))
                });
                if let Some((number, place, side)) = found {
                    let is_last =
                        !matches!(event, EngineEvent::PromptLogprobs(_) | EngineEvent::Token { .. });
                    if is_last {
                        self.front.jobs[number].streams.swap_remove(place);
                    }
                    self.note(|| format!("worker {} says of request {number}: {event:?}", from.place));
                    self.happens(number, Happening::From(side, event));
                } else {
                    self.front.released.retain(|(_, process, other)| {
                        let ends = !matches!(event, EngineEvent::Token { .. });
                        !(ends && *process == from && *other == request)
                    });
                }
            }
        }
        self.front_turn();
    }

    pub(super) fn take_status(&mut self, from: Process, status: Status) {
        let worker = &self.workers[from.place];
        let Limits { max_num_seqs, .. } = worker.limits;
        let is_new = self.front.slots[from.place].as_ref().is_none_or(|slot| slot.process != from);
        if !self.front.places.contains_key(&from.instance) {
            // An earlier process of that place is gone for good.
            let earlier = self.front.slots[from.place].as_ref().map(|slot| slot.process);
            if let Some(earlier) = earlier {
                self.lose_worker(earlier, "another process is in its place");
            }
        } else if is_new && self.front.slots[from.place].is_some() {
            return; // Late news of a process that has been replaced.
        }
        let worker = &self.workers[from.place];
        let view = WorkerView {
            instance: from.instance,
            role: worker.role,
            availability: Availability::Serving,
            running: status.running,
            waiting: status.waiting,
            max_num_seqs,
            queued_tokens: status.queued_tokens,
            free: status.free,
            total: worker.blocks,
            block_len: worker.shape.block_len,
            cached: status.cached.into(),
        };
        self.front.places.insert(from.instance, from.place);
        self.front.slots[from.place] =
            Some(Slot { process: from, heard: self.now, links: status.links, view });
        if is_new {
            let peers: Vec<Process> =
                self.front.slots.iter().flatten().map(|it| it.process).filter(|it| *it != from).collect();
            self.send_to(from, ToWorker::Meet(peers));
        }
    }

    pub(super) fn lose_worker(&mut self, process: Process, why: &str) {
        let slot = &mut self.front.slots[process.place];
        if slot.take_if(|it| it.process == process).is_none() {
            return;
        }
        self.note(|| format!("the router loses worker {}: {why}", process.place));
        for number in 0..self.front.jobs.len() {
            while let Some(place) =
                self.front.jobs[number].streams.iter().position(|it| it.process == process)
            {
                let stream = self.front.jobs[number].streams.swap_remove(place);
                // Should it live after all, it finds the stream broken.
                self.send_to(process, ToWorker::Cancel(stream.request));
                self.happens(number, Happening::Lost(stream.side, why.to_owned()));
            }
        }
    }

    /// Timers, routes that wait, and workers that have fallen silent.
    pub(super) fn front_turn(&mut self) {
        if self.front.timer_at.is_some_and(|at| at <= self.now) {
            self.front.timer_at = None;
        }
        if self.front.mend_at <= self.now {
            self.front.mend_at = self.now + MEND_EVERY;
            self.mend_links();
        }
        let silent: Vec<Process> = self
            .front
            .slots
            .iter()
            .flatten()
            .filter(|slot| SILENCE < self.now - slot.heard)
            .map(|slot| slot.process)
            .collect();
        for process in silent {
            self.lose_worker(process, "it is silent");
        }
        for number in 0..self.front.jobs.len() {
            if self.front.jobs[number].state != JobState::Open {
                continue;
            }
            if self.front.jobs[number].adoption.take_if(|at| *at <= self.now).is_some() {
                self.happens(number, Happening::AdoptionOverdue);
            }
            self.try_route(number);
            let job = &self.front.jobs[number];
            if job.state == JobState::Open
                && job.streams.is_empty()
                && job.adoption.is_none()
                && job.routing.is_none()
            {
                self.happens(number, Happening::Exhausted);
                self.try_route(number);
            }
        }
        let now = self.now;
        let (over, left) = std::mem::take(&mut self.front.released).into_iter().partition(|it| it.0 <= now);
        self.front.released = left;
        let over: Vec<(u64, Process, RequestId)> = over;
        for (_, process, request) in over {
            self.send_to(process, ToWorker::Cancel(request));
        }
        self.plan_front_turn();
    }

    /// Introduces workers again that have lost each other.
    pub(super) fn mend_links(&mut self) {
        let known: Vec<(Process, Role, BTreeSet<u64>)> = self
            .front
            .slots
            .iter()
            .flatten()
            .map(|it| (it.process, it.view.role, it.links.clone()))
            .collect();
        for (one, role, links) in &known {
            let is_lost = |other: &&(Process, Role, BTreeSet<u64>)| {
                let make_a_pair = (*role, other.1) == (Role::Prefill, Role::Decode);
                make_a_pair && !links.contains(&other.0.instance) && !other.2.contains(&one.instance)
            };
            if known.iter().any(|other| is_lost(&other)) {
                let peers = known.iter().map(|it| it.0).filter(|it| it != one).collect();
                self.send_to(*one, ToWorker::Meet(peers));
            }
        }
    }

    pub(super) fn plan_front_turn(&mut self) {
        let silences = self.front.slots.iter().flatten().map(|it| it.heard + SILENCE + 1);
        let adoptions = self.front.jobs.iter().filter_map(|it| it.adoption);
        let routes = self
            .front
            .jobs
            .iter()
            .filter_map(|it| it.routing.as_ref())
            .flat_map(|it| [it.since + FORGIVE_AFTER, it.since + ROUTE_LIMIT]);
        let releases = self.front.released.iter().map(|it| it.0);
        let next = silences
            .chain([self.front.mend_at])
            .chain(adoptions)
            .chain(routes)
            .chain(releases)
            .filter(|at| self.now < *at)
            .min();
        if let Some(at) = next
            && self.front.timer_at.is_none_or(|due| at < due)
        {
            self.front.timer_at = Some(at);
            self.at(at, Event::FrontTimer);
        }
    }

    pub(super) fn happens(&mut self, number: usize, happening: Happening) {
        if self.front.jobs[number].state != JobState::Open {
            return;
        }
        let actions = self.front.jobs[number].journey.on(happening);
        self.follow(number, actions);
    }

    pub(super) fn follow(&mut self, number: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::FindRoute { excluded, wait } => {
                    self.front.turn += 1;
                    let handoff = HandoffId(self.number());
                    let turn = self.front.turn;
                    let now = self.now;
                    let job = &mut self.front.jobs[number];
                    job.handoff = handoff;
                    job.adoption = None;
                    let excluded: Vec<u64> = excluded.iter().map(|it| it.0).collect();
                    self.summary.replays += u64::from(!excluded.is_empty());
                    self.front.jobs[number].routing = Some(Routing { excluded, wait, since: now, turn });
                    self.try_route(number);
                }
                Action::Start { side, worker, peer } => self.start(number, side, worker, peer),
                Action::Stop(side) => {
                    let streams = &mut self.front.jobs[number].streams;
                    let (stopped, left) = std::mem::take(streams).into_iter().partition(|it| it.side == side);
                    *streams = left;
                    let stopped: Vec<Stream> = stopped;
                    for stream in stopped {
                        self.send_to(stream.process, ToWorker::Cancel(stream.request));
                    }
                }
                Action::Release(side) => {
                    let streams = &mut self.front.jobs[number].streams;
                    if let Some(place) = streams.iter().position(|it| it.side == side) {
                        let stream = streams.swap_remove(place);
                        self.front.released.push((self.now + RELEASE_LIMIT, stream.process, stream.request));
                    }
                }
                Action::AwaitAdoption => self.front.jobs[number].adoption = Some(self.now + ADOPTION_LIMIT),
                Action::Emit(event) => self.emit(number, event),
                Action::Fallback { reason, detail } => {
                    self.note(|| format!("request {number} falls back: {reason}: {detail}"));
                }
            }
        }
    }

    /// Asks the pure router, as long as it may have an answer.
    pub(super) fn try_route(&mut self, number: usize) {
        let job = &self.front.jobs[number];
        let Some(Routing { excluded, wait, since, turn }) = &job.routing else { return };
        let (since, turn) = (*since, *turn);
        let waited = self.now - since;
        let excluded = if *wait && FORGIVE_AFTER <= waited { Vec::new() } else { excluded.clone() };
        let deadline = if *wait { ROUTE_LIMIT } else { 0 };
        let known = job.prompt_len + job.emitted;
        let view = self.front.view();
        let tokens = &job.tokens[..known];
        let request = RouteRequest { tokens, excluded: &excluded, turn };
        let instance = |index: routing::WorkerIndex| Instance(view.workers[index.0].instance);
        let happening = match routing::route(&view, RoutingPolicy::default(), request) {
            routing::Route::Split { prefill, decode } => {
                Happening::Routed(Route::Split { prefill: instance(prefill), decode: instance(decode) })
            }
            routing::Route::Alone { worker, reason } => {
                let fallback = match reason {
                    AloneReason::Hybrid | AloneReason::Cheaper => None,
                    other => Some(other.as_str()),
                };
                Happening::Routed(Route::Whole { worker: instance(worker), fallback })
            }
            routing::Route::None(why) if why == NoRoute::NeverFits || deadline <= waited => {
                Happening::Unroutable(format!("{why:?}"))
            }
            routing::Route::None(_) => return,
        };
        self.front.jobs[number].routing = None;
        self.happens(number, happening);
    }

    pub(super) fn start(&mut self, number: usize, side: Side, worker: Instance, peer: Option<Instance>) {
        let reach = |front: &Front, instance: Instance| {
            front.slots.iter().flatten().map(|it| it.process).find(|it| it.instance == instance.0)
        };
        let process = reach(&self.front, worker);
        let peer_process = peer.map(|it| reach(&self.front, it));
        let (Some(process), None | Some(Some(_))) = (process, peer_process) else {
            return self.happens(number, Happening::Lost(side, "it is gone".to_owned()));
        };
        let peer = peer_process.flatten();
        let id = RequestId(self.number());
        let job = &mut self.front.jobs[number];
        let part = match side {
            Side::Prefill => Part::PrefillFor(job.handoff),
            Side::Decode => Part::DecodeFrom(job.handoff),
            Side::Alone => Part::Whole,
        };
        let request = Request {
            id,
            tokens: job.tokens[..job.prompt_len + job.journey.emitted().len()].to_vec(),
            prompt_len: TokenCount(u32::try_from(job.prompt_len).expect("short")),
            sampling: SamplingParams::default(),
            stop: job.stop.clone(),
            part,
        };
        job.streams.push(Stream { side, request: id, process });
        let handoff = job.handoff;
        self.note(|| {
            format!("request {number} goes to worker {}: {side:?}, handoff {handoff}", process.place)
        });
        self.send_to(process, ToWorker::Generate { request: Box::new(request), peer, job: number });
    }

    pub(super) fn send_to(&mut self, process: Process, message: ToWorker) {
        let arrival = self.arrival(Node::Front, Node::Worker(process.place));
        self.at(arrival, Event::ToWorker { to: process, message });
    }
}

impl Front {
    pub(super) fn view(&self) -> ClusterView {
        let down = || WorkerView {
            instance: 0,
            role: Role::Hybrid,
            availability: Availability::Down,
            running: 0,
            waiting: 0,
            max_num_seqs: 1,
            queued_tokens: 0,
            free: BlockCount(0),
            total: BlockCount(0),
            block_len: Shape::all()[0].block_len,
            cached: Default::default(),
        };
        let workers =
            self.slots.iter().map(|slot| slot.as_ref().map_or_else(down, |slot| slot.view.clone())).collect();
        let known = self.slots.iter().flatten();
        let links = known.flat_map(|it| it.links.iter().map(|peer| (it.process.instance, *peer)));
        let links = links.flat_map(|(one, other)| [(one, other), (other, one)]).collect();
        ClusterView { workers, links }
    }
}

// As in production, in microseconds.
const MEND_EVERY: u64 = 1_000_000;
const SILENCE: u64 = 1_000_000;
const ADOPTION_LIMIT: u64 = 500_000;
const FORGIVE_AFTER: u64 = 300_000;
const RELEASE_LIMIT: u64 = 2_000_000;
const ROUTE_LIMIT: u64 = 10_000_000;
