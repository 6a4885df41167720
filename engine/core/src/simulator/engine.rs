//! What a worker's engine thread does: receive, plan, compute, apply, reply. News that come while a step computes wait
//! for its end, but for a peer's reservation, since from then on finished layers can leave.

use tidemill_kvtransfer_proto::endpoint_core::EndpointEvent;
use tidemill_kvtransfer_proto::layout::Bridge;
use tidemill_kvtransfer_proto::units::{BlockId, HandoffId, TokenCount};

use super::Fault;
use super::endpoint::Order;
use super::front::ToFront;
use super::model::{LAYERS, Memory, Shape, content, next_token};
use super::world::{Event, Node, Process, ToWorker, World};
use crate::events::{EngineEvent, Recovery};
use crate::handoff::Cancelled;
use crate::plan::{StepPlan, Work};
use crate::pushes::Pushes;
use crate::request::{Part, Request, RequestId, TokenId};
use crate::scheduler::{Outcome, SubmitError};

/// What the engine thread receives.
#[derive(Debug)]
pub(super) enum EngineInput {
    Generate { request: Box<Request>, peer: Option<Process>, job: usize },
    Cancel(RequestId),
    Handoff(EndpointEvent),
}

/// What it keeps of a request beside the scheduler.
#[derive(Clone, Copy, Debug)]
pub(super) struct ActiveRequest {
    pub(super) part: Part,
    pub(super) job: usize,
}

/// A handoff that it computes a prompt for.
#[derive(Debug)]
pub(super) struct OutgoingHandoff {
    pub(super) request: RequestId,
    pub(super) peer: u64,
    pub(super) target: Target,
    pub(super) first_token: Option<TokenId>,
    /// The last word to the endpoint has been said.
    pub(super) ended: bool,
}

#[derive(Debug)]
pub(super) enum Target {
    Unknown,
    InPlace {
        blocks: Vec<BlockId>,
        memory: Memory,
        owner: u64,
    },
    /// In blocks of that shape, which are written to, or read for.
    Pushed {
        pushes: Pushes,
        bridge: Bridge,
        shape: Shape,
        is_read: bool,
    },
}

/// A step while the device computes it.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) plan: StepPlan,
    pub(super) captures: Vec<Capture>,
}

/// A work as the device has got it.
#[derive(Clone, Debug)]
pub(super) struct Capture {
    pub(super) work: Work,
    pub(super) job: usize,
    pub(super) table: Vec<BlockId>,
    pub(super) memory: Memory,
    /// The handoff, and the peer whose memory it computes in.
    pub(super) in_place: Option<(HandoffId, u64)>,
}

impl World<'_> {
    pub(super) fn worker_hears(&mut self, to: Process, message: ToWorker) {
        match message {
            ToWorker::Generate { request, peer, job } => {
                self.tell_engine(to, EngineInput::Generate { request, peer, job });
            }
            ToWorker::Cancel(request) => self.tell_engine(to, EngineInput::Cancel(request)),
            ToWorker::Meet(peers) => peers.into_iter().for_each(|peer| self.meet(to, peer)),
        }
    }

    pub(super) fn tell_engine(&mut self, process: Process, input: EngineInput) {
        let Some(life) = self.life(process) else { return };
        life.inbox.push_back(input);
        self.wake_engine(process, 40);
    }

    pub(super) fn wake_engine(&mut self, process: Process, within: u64) {
        let delay = self.micros(1, within);
        let Some(life) = self.life(process) else { return };
        if !std::mem::replace(&mut life.engine_turn_is_due, true) {
            self.after(delay, Event::EngineTurn(process));
        }
    }

    /// One round of the engine's loop, unless the device is busy.
    pub(super) fn engine_turn(&mut self, process: Process) {
        let Some(life) = self.life(process) else { return };
        life.engine_turn_is_due = false;
        if life.step.is_some() {
            return;
        }
        while let Some(input) = self.life(process).and_then(|life| life.inbox.pop_front()) {
            self.obey(process, input);
        }
        let life = self.life(process).expect("it runs");
        life.scheduler.check();
        let plan = life.scheduler.plan();
        if plan.is_empty() {
            self.untangle(process);
        } else {
            life.stuck_since = None;
            self.begin_step(process, plan);
        }
        self.tell_status_soon(process);
    }

    pub(super) fn obey(&mut self, process: Process, input: EngineInput) {
        match input {
            EngineInput::Generate { request, peer, job } => self.generate(process, *request, peer, job),
            EngineInput::Cancel(id) => {
                let life = self.life(process).expect("it runs");
                if let Some(active) = life.requests.remove(&id) {
                    self.stop(process, id, active.part);
                }
            }
            EngineInput::Handoff(event) => self.handoff(process, event),
        }
    }

    pub(super) fn generate(&mut self, process: Process, request: Request, peer: Option<Process>, job: usize) {
        let (id, part) = (request.id, request.part);
        let expected = &self.front.job(job).tokens;
        assert_eq!(request.tokens, expected[..request.tokens.len()], "a replay starts from what has left");
        let life = self.life(process).expect("it runs");
        let submitted = match (part, peer) {
            (Part::PrefillFor(handoff), Some(peer)) => {
                let in_place = life.core.reaches_in_place(peer.instance);
                let scheduler = &mut life.scheduler;
                let submitted =
                    if in_place { scheduler.submit_in_place(request) } else { scheduler.submit(request) };
                if submitted.is_ok() {
                    let (peer, target) = (peer.instance, Target::Unknown);
                    let outgoing =
                        OutgoingHandoff { request: id, peer, target, first_token: None, ended: false };
                    life.outgoing.insert(handoff, outgoing);
                    self.order(process, Order::Expect(handoff, peer));
                }
                submitted
            }
            (Part::DecodeFrom(handoff), Some(peer)) => {
                let submitted = life.scheduler.submit(request);
                if submitted.is_ok() {
                    life.incoming.insert(handoff, (id, peer.instance));
                }
                submitted
            }
            (Part::Whole, _) => life.scheduler.submit(request),
            (_, None) => panic!("a handoff has a peer"),
        };
        match submitted {
            Ok(()) => {
                self.life(process).expect("it runs").requests.insert(id, ActiveRequest { part, job });
            }
            Err(error) => {
                let recovery = match error {
                    SubmitError::QueueFull { .. } => Recovery::Later,
                    _ => Recovery::GiveUp,
                };
                if recovery == Recovery::Later && self.options.faults.contains(Fault::FullQueue) {
                    self.count(Fault::FullQueue);
                }
                self.reply(process, id, EngineEvent::Failed { recovery, message: error.to_string() });
            }
        }
    }

    /// Ends a request here; what a peer has to do with it ends in its own time.
    pub(super) fn stop(&mut self, process: Process, id: RequestId, part: Part) {
        let life = self.life(process).expect("it runs");
        if let Cancelled::Quarantined(handoff) = life.scheduler.cancel(id) {
            self.summary.quarantines += 1;
            self.order(process, Order::Cancel(handoff));
        }
        match part {
            Part::PrefillFor(handoff) if self.give_up(process, handoff) => {
                self.order(process, Order::Abandon(handoff));
            }
            Part::DecodeFrom(handoff) => {
                self.life(process).expect("it runs").incoming.remove(&handoff);
            }
            Part::PrefillFor(_) | Part::Whole => {}
        }
    }

    pub(super) fn fail(&mut self, process: Process, id: RequestId, recovery: Recovery, message: &str) {
        let Some(active) = self.life(process).expect("it runs").requests.remove(&id) else { return };
        self.reply(process, id, EngineEvent::Failed { recovery, message: message.to_owned() });
        self.stop(process, id, active.part);
    }

    /// Two workers that took two requests in opposite order can wait for each other's blocks for ever.
    pub(super) fn untangle(&mut self, process: Process) {
        let now = self.now;
        let life = self.life(process).expect("it runs");
        let stuck = life.scheduler.blocked_by_handoffs();
        if stuck.is_empty() {
            life.stuck_since = None;
            return;
        }
        let since = *life.stuck_since.get_or_insert(now);
        if STUCK_LIMIT <= now - since {
            life.stuck_since = None;
            let victim = stuck.into_iter().find(|id| {
                let part = life.requests.get(id).map(|active| active.part);
                matches!(part, Some(Part::PrefillFor(handoff)) if life.awaits_reservation(handoff))
            });
            if let Some(id) = victim {
                self.note(|| format!("worker {} gives up a handoff: its blocks are needed", process.place));
                self.fail(process, id, Recovery::Reroute, "the workers waited for each other's blocks");
            }
        }
        self.after(STUCK_LIMIT, Event::EngineTurn(process));
    }

    pub(super) fn begin_step(&mut self, process: Process, plan: StepPlan) {
        let life = self.life(process).expect("it runs");
        life.scheduler.begin(&plan);
        self.announce_reservations(process);
        let captures: Vec<Capture> = plan.work.iter().map(|work| self.capture(process, *work)).collect();
        if captures.is_empty() {
            self.finish_step(process, &plan, &[]);
            return self.wake_engine(process, 5);
        }
        self.name_early(process, &plan);
        let slowness = self.workers[process.place].slowness;
        let tokens = u64::from(plan.tokens().0);
        let layer_time = slowness * (self.micros(50, 400) + tokens * 20);
        for layer in 0..LAYERS {
            self.after(layer_time * (layer as u64 + 1), Event::Layer { process, layer });
        }
        self.life(process).expect("it runs").step = Some(Step { plan, captures });
    }

    /// What a step reads is what the request's own tokens make.
    pub(super) fn capture(&mut self, process: Process, work: Work) -> Capture {
        let life = self.life(process).expect("it runs");
        let active = life.requests.get(&work.request).copied();
        let table: Vec<BlockId> =
            life.scheduler.block_table(work.request).iter().map(|it| it.block).collect();
        let known = life.scheduler.tokens(work.request).to_vec();
        let mut capture =
            Capture { work, job: usize::MAX, table, memory: life.memory.clone(), in_place: None };
        let Some(ActiveRequest { part, job }) = active else { panic!("work for a request that is gone") };
        capture.job = job;
        if let Part::PrefillFor(handoff) = part
            && let Some(Target::InPlace { blocks, memory, owner }) =
                life.outgoing.get(&handoff).map(|it| &it.target)
        {
            capture.table.clone_from(blocks);
            capture.memory = memory.clone();
            capture.in_place = Some((handoff, *owner));
        }
        let job = self.front.job(job);
        assert_eq!(known, job.tokens[..known.len()], "the tokens are the request's");
        capture.expect(0..work.first.0 as usize, &job.contents, "a step");
        capture
    }

    /// The device has computed a layer.
    pub(super) fn compute_layer(&mut self, process: Process, layer: usize) {
        let Some(life) = self.life(process) else { return };
        let captures = life.step.as_ref().expect("a step computes").captures.clone();
        for capture in &captures {
            let tokens = &self.front.job(capture.job).tokens;
            capture.compute(layer, tokens);
            if let Some((handoff, owner)) = capture.in_place {
                self.check_in_place(capture, handoff, owner);
                self.store_again(capture, layer);
            }
        }
        self.meet_reservations(process);
        for capture in &captures {
            let request = capture.work.request;
            let part = self.life(process).and_then(|life| life.requests.get(&request)).map(|it| it.part);
            if let Some(Part::PrefillFor(handoff)) = part {
                let computed = TokenCount(capture.work.first.0 + capture.work.count.0);
                self.push_layers(process, handoff, layer..layer + 1, computed);
            }
        }
        if layer + 1 < LAYERS {
            return;
        }
        let Step { plan, .. } = self.life(process).expect("it runs").step.take().expect("a step computes");
        self.push_computed(process, &plan);
        self.tell_computed(process, &plan);
        let mut sampled = Vec::new();
        for Capture { work, table, memory, .. } in captures.iter().filter(|it| it.work.samples) {
            let end = (work.first.0 + work.count.0) as usize;
            let last = memory.read(table, LAYERS - 1, end - 1);
            sampled.push((work.request, next_token(last.unwrap_or(0))));
        }
        self.finish_step(process, &plan, &sampled);
        self.wake_engine(process, 10);
    }

    /// The device stores into a peer's memory: only into what is lent to that handoff.
    pub(super) fn check_in_place(&mut self, capture: &Capture, handoff: HandoffId, owner: u64) {
        let Some(place) =
            self.workers.iter().position(|it| it.life.as_ref().is_some_and(|life| life.instance == owner))
        else {
            return;
        };
        let block_len = capture.memory.shape().tokens();
        let (first, end) =
            (capture.work.first.0 as usize, (capture.work.first.0 + capture.work.count.0) as usize);
        for block in &capture.table[first / block_len..end.div_ceil(block_len)] {
            self.check_lent(Process { place, instance: owner }, *block, handoff);
        }
    }

    pub(super) fn meet_reservations(&mut self, process: Process) {
        let life = self.life(process).expect("it runs");
        let step = life.step.as_ref().expect("a step computes");
        let is_computed_now = |handoff: HandoffId| {
            let request = life.outgoing.get(&handoff).map(|it| it.request);
            step.captures.iter().any(|it| Some(it.work.request) == request)
        };
        let mut met = Vec::new();
        let (taken, kept) = std::mem::take(&mut life.inbox).into_iter().partition(|input| match input {
            EngineInput::Handoff(EndpointEvent::Reserved(reserved)) => is_computed_now(reserved.handoff),
            _ => false,
        });
        let taken: Vec<EngineInput> = taken;
        life.inbox = Vec::into(kept);
        for input in taken {
            if let EngineInput::Handoff(EndpointEvent::Reserved(reserved)) = input {
                met.push(reserved);
            }
        }
        for reserved in met {
            self.announce(process, &reserved, false);
        }
    }

    pub(super) fn finish_step(
        &mut self,
        process: Process,
        plan: &StepPlan,
        sampled: &[(RequestId, TokenId)],
    ) {
        let life = self.life(process).expect("it runs");
        for outcome in life.scheduler.finish(plan, sampled) {
            match outcome {
                Outcome::Token { .. } => self.deliver(process, outcome),
                Outcome::NoRoom { request } => {
                    self.fail(process, request, Recovery::GiveUp, "the KV cache is too small");
                }
            }
        }
    }

    pub(super) fn deliver(&mut self, process: Process, outcome: Outcome) {
        let Outcome::Token { request, token, index, finish, cached } = outcome else { return };
        let Some(active) = self.life(process).expect("it runs").requests.get(&request).copied() else {
            return;
        };
        self.reply(process, request, EngineEvent::Token { id: token, index, logprobs: None });
        if let Some(reason) = finish {
            self.reply(process, request, EngineEvent::Finished { reason, cached_tokens: cached.0 });
            self.life(process).expect("it runs").requests.remove(&request);
        }
        let Part::PrefillFor(handoff) = active.part else { return };
        let life = self.life(process).expect("it runs");
        if finish.is_some() && life.awaits_reservation(handoff) {
            self.give_up(process, handoff);
            self.order(process, Order::Abandon(handoff));
        } else {
            if let Some(outgoing) = life.outgoing.get_mut(&handoff) {
                outgoing.first_token = Some(token);
            }
            self.commit_if_complete(process, handoff);
        }
    }

    pub(super) fn reply(&mut self, process: Process, request: RequestId, event: EngineEvent) {
        let arrival = self.arrival(Node::Worker(process.place), Node::Front);
        let message = ToFront::Said { request, event };
        self.at(arrival, Event::ToFront { from: process, message });
    }
}

impl super::process::Life {
    pub(super) fn awaits_reservation(&self, handoff: HandoffId) -> bool {
        self.outgoing.get(&handoff).is_some_and(|it| matches!(it.target, Target::Unknown))
    }
}

impl Capture {
    pub(super) fn compute(&self, layer: usize, tokens: &[TokenId]) {
        let (first, end) = (self.work.first.0 as usize, (self.work.first.0 + self.work.count.0) as usize);
        for (position, token) in tokens.iter().enumerate().take(end).skip(first) {
            let before = position.checked_sub(1).map(|it| self.memory.read(&self.table, layer, it));
            // Garbage begets garbage, which the next read of it reports.
            let content = content(layer, before.map(|it| it.unwrap_or(0)), *token);
            self.memory.write(&self.table, layer, position, content);
        }
    }

    pub(super) fn expect(&self, positions: std::ops::Range<usize>, contents: &[[u64; LAYERS]], who: &str) {
        expect(&self.memory, &self.table, positions, contents, who);
    }
}

pub(super) fn expect(
    memory: &Memory,
    table: &[BlockId],
    positions: std::ops::Range<usize>,
    contents: &[[u64; LAYERS]],
    who: &str,
) {
    for position in positions {
        for (layer, expected) in contents[position].iter().enumerate() {
            let found = memory.read(table, layer, position);
            assert_eq!(
                found,
                Some(*expected),
                "{who} finds a foreign byte at {position}, layer {layer}, {table:?}"
            );
        }
    }
}

/// Long enough for mere back pressure to pass.
const STUCK_LIMIT: u64 = 1_000_000;
