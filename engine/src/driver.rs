//! The engine thread: receive, plan, run, apply, reply.
//!
//! It owns the device and everything that changes. On a GPU the next step is planned and asked for before the outcome of one is waited
//! for (`overlap.rs`). Decisions are the scheduler's; this file carries them out and turns
//! what comes back into events. News that arrive while a step computes wait for its end, with one exception: a peer's
//! reservation, since from then on finished layers can leave while later ones are still computed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tidemill_engine_core::handoff::Cancelled;
use tidemill_engine_core::plan::StepPlan;
use tidemill_engine_core::request::{Logprobs, Part, Request, RequestId, TokenId};
use tidemill_engine_core::scheduler::{Outcome, Scheduler};
use tidemill_engine_core::speculation::Speculation;
use tidemill_kernels::cpu::Cpu;
use tidemill_kernels::cuda::CudaError;
use tidemill_kvtransfer::{Endpoint, HandoffEvent, Watch};
use tidemill_kvtransfer_proto::units::HandoffId;

use crate::device::Device;
use crate::draft_model::DraftModel;
use crate::engine::{Command, Shared};
use crate::handle::{Counters, EngineEvent, EngineStatus, EventSink, Fault, Recovery};
use crate::memory::{Arena, DevicePool};
use crate::overlap::UnderWay;
use crate::roles::FirstToken;
use crate::roles::decode::Incoming;
use crate::roles::prefill::Outgoings;
use crate::sampler::{Sampled, Sampler};
use crate::verification::StepResult;

/// The state of the engine thread.
pub(crate) struct Driver {
    pub(crate) scheduler: Scheduler,
    /// Guesses at the next tokens, where they are wanted.
    pub(crate) speculation: Option<Speculation>,
    /// Who makes them, where a smaller model does.
    pub(crate) draft_model: Option<DraftModel>,
    pub(crate) device: Device,
    /// Whether steps are planned and asked for while the ones before compute.
    pub(crate) overlaps: bool,
    /// The step that computes, where nobody waits for it.
    pub(crate) under_way: Option<UnderWay>,
    /// Converts what goes to peers, whatever the device.
    pub(crate) cpu: Arc<Cpu>,
    pub(crate) sampler: Sampler,
    /// The blocks that peers know of.
    pub(crate) arena: Arena,
    /// The blocks that a device with memory of its own computes in.
    pub(crate) pool: Option<DevicePool>,
    /// What the device said when it failed, after which it is of no use.
    pub(crate) failure: Option<CudaError>,
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) in_place: bool,
    pub(crate) fault: Option<Fault>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) inbox: Inbox,
    pub(crate) requests: BTreeMap<RequestId, Active>,
    pub(crate) outgoing: Outgoings,
    /// Requests that wait for, or got, their KV cache from a peer.
    pub(crate) incoming: BTreeMap<HandoffId, Incoming>,
    /// Requests whose first token their routers are to be told again.
    pub(crate) repeats: Vec<RequestId>,
    /// Whether to stay awake for a peer's commit.
    pub(crate) watch: Watch,
    /// Whether the ledger was checked since something last happened.
    pub(crate) is_checked: bool,
    /// What the last step took that was waited for.
    pub(crate) last_step: Duration,
    pub(crate) counters: Counters,
    pub(crate) draining: bool,
    /// Since when nothing can go on for want of blocks that are held for peers.
    pub(crate) stuck_since: Option<Instant>,
}

/// What the driver keeps of a request beside the scheduler.
pub(crate) struct Active {
    pub(crate) request: RequestParts,
    pub(crate) events: EventSink,
    /// Log-probabilities of the prompt so far, when asked for.
    pub(crate) prompt_logprobs: Vec<Logprobs>,
    /// Whether its router was told that it computes, or need not be: decode begins where prefill has begun.
    pub(crate) has_begun: bool,
    /// The first token, which came with the KV cache, until the router is told it again.
    repeated: Option<(Outcome, Option<Logprobs>)>,
}

/// The fields of a request that the scheduler does not hand back.
pub(crate) struct RequestParts {
    pub(crate) part: Part,
    pub(crate) prompt_len: usize,
    pub(crate) sampling: tidemill_engine_core::request::SamplingParams,
    pub(crate) stop: tidemill_engine_core::request::StopConditions,
}

/// Commands in order of arrival; some are looked at while a step computes and stay for afterwards.
pub(crate) struct Inbox {
    pub(crate) commands: Receiver<Command>,
    pub(crate) seen: VecDeque<Command>,
}

impl Driver {
    /// Serves until told to end.
    pub(crate) fn run(mut self) {
        self.serve();
        if self.pool.is_some() {
            for id in self.requests.keys().copied().collect::<Vec<_>>() {
                self.cancel(id);
            }
            // What follows gives the device's memory back.
            self.endpoint.let_go_of_device();
        }
    }

    fn serve(&mut self) {
        loop {
            while let Some(command) = self.inbox.next() {
                if matches!(command, Command::Shutdown) {
                    return;
                }
                self.is_checked = false;
                self.obey(command);
            }
            if let Some(error) = &self.failure {
                tracing::error!(%error, "the device failed: this worker ends");
                return self.fail_all(&format!("the device failed: {error}"));
            }
            if let Some(step) = self.under_way.take() {
                let went_on = self.go_on(step);
                self.failure = self.failure.take().or(went_on.err());
                self.publish();
                continue;
            }
            let plan = self.plan();
            if !plan.is_empty() {
                self.is_checked = false;
                let turned = self.turn(plan);
                self.failure = self.failure.take().or(turned.err());
                self.publish();
                continue;
            }
            self.repeat_first_tokens();
            self.publish();
            let patience = self.untangle();
            if self.stay_awake() {
                continue;
            }
            // To look at every block takes longer than all that a handoff asks of this thread: not while news are about to come.
            let rest = if self.is_checked { patience } else { Some(CHECK_AFTER) };
            if !self.inbox.wait(rest) {
                return;
            }
            if !self.is_checked && self.inbox.seen.is_empty() {
                self.scheduler.check();
                self.is_checked = true;
            }
        }
    }

    /// Nothing can go on here.
    fn fail_all(&mut self, message: &str) {
        let ids: Vec<RequestId> = self.requests.keys().copied().collect();
        for id in ids {
            self.fail(id, Recovery::Reroute, message.to_owned());
        }
        self.publish();
    }

    /// Two workers that took two requests in opposite order can wait for each other's blocks for ever. If nothing can go
    /// on here for want of blocks that are held for peers, and that lasts, one handoff is given up. Returns how long to
    /// wait before looking again; `None` when nothing is stuck.
    fn untangle(&mut self) -> Option<Duration> {
        let stuck = self.scheduler.blocked_by_handoffs();
        if stuck.is_empty() {
            self.stuck_since = None;
            return None;
        }
        let waited = self.stuck_since.get_or_insert_with(Instant::now).elapsed();
        if waited < STUCK_LIMIT {
            return Some(STUCK_LIMIT - waited);
        }
        self.stuck_since = None;
        let victim = stuck.into_iter().find(|id| {
            let part = self.requests.get(id).map(|active| active.request.part);
            matches!(part, Some(Part::PrefillFor(handoff)) if self.outgoing.awaits_reservation(handoff))
        });
        if let Some(id) = victim {
            tracing::warn!(
                request = id.0,
                "a handoff is given up: its blocks are needed, and its peer has none"
            );
            self.fail(id, Recovery::Reroute, "the two workers waited for each other's blocks".into());
        }
        Some(STUCK_LIMIT)
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate { request, peer, events } => self.generate(*request, peer, events),
            Command::Cancel(id) => self.cancel(id),
            Command::Handoff(event) => self.handoff(event),
            Command::Drain => self.draining = true,
            Command::Shutdown => unreachable!("the loop ends before it obeys"),
        }
    }

    fn generate(&mut self, request: Request, peer: Option<crate::handle::Peer>, mut events: EventSink) {
        let id = request.id;
        let refuse = |recovery, message: String| EngineEvent::Failed { recovery, message };
        if self.draining {
            return events(refuse(Recovery::Later, "this worker is draining".into()));
        }
        let vocab_size = self.device.spec().vocab_size;
        if let Some(token) = request.tokens.iter().find(|token| vocab_size <= **token as usize) {
            let message = format!("token {token} is outside the vocabulary of {vocab_size}");
            return events(refuse(Recovery::GiveUp, message));
        }
        let parts = RequestParts {
            part: request.part,
            prompt_len: request.prompt_len.0 as usize,
            sampling: request.sampling.clone(),
            stop: request.stop.clone(),
        };
        let submitted = match (request.part, peer) {
            (Part::Whole, _) => self.scheduler.submit(request),
            (_, None) => return events(refuse(Recovery::GiveUp, "a handoff needs a peer".into())),
            (Part::PrefillFor(handoff), Some(peer)) => self.begin_prefill(handoff, &peer, request),
            (Part::DecodeFrom(handoff), Some(peer)) => self.begin_decode(handoff, &peer, request),
        };
        if let Err(error) = submitted {
            return events(refuse(recovery_of(&error), error.to_string()));
        }
        let has_begun = matches!(parts.part, Part::DecodeFrom(_));
        self.requests.insert(id, Active::new(parts, events, has_begun));
    }

    fn cancel(&mut self, id: RequestId) {
        let Some(active) = self.requests.remove(&id) else { return };
        self.stop(id, active.request.part);
    }

    /// Ends a request here; what a peer has to do with it ends in its own time.
    pub(crate) fn stop(&mut self, id: RequestId, part: Part) {
        match self.scheduler.cancel(id) {
            Cancelled::Quarantined(handoff) => self.endpoint.cancel(handoff),
            Cancelled::Pushing(_) | Cancelled::Done | Cancelled::Unknown => {}
        }
        match part {
            Part::PrefillFor(handoff) if self.outgoing.give_up(handoff) => {
                self.endpoint.abandon(handoff, "cancelled".into());
            }
            Part::DecodeFrom(handoff) => drop(self.incoming.remove(&handoff)),
            Part::PrefillFor(_) | Part::Whole => {}
        }
    }

    fn plan(&mut self) -> StepPlan {
        let scheduler = &self.scheduler;
        match &mut self.speculation {
            Some(speculation) => {
                scheduler.plan_with_drafts(|plan, room| speculation.propose(scheduler, plan, room))
            }
            None => scheduler.plan(),
        }
    }

    /// One forward pass with all that belongs to it, or its beginning, where the host need not wait for its end.
    fn turn(&mut self, mut plan: StepPlan) -> Result<(), CudaError> {
        self.scheduler.begin(&plan);
        self.announce_reservations();
        self.tell_begun(&plan);
        if self.goes_ahead(&plan) {
            self.under_way = Some(self.start(plan, None)?);
            self.repeat_first_tokens();
            return Ok(());
        }
        if LONG_STEP < self.last_step || plan.work.iter().any(|work| !work.decodes()) {
            self.repeat_first_tokens();
        }
        let began = Instant::now();
        self.guess(&mut plan);
        let results = if plan.work.is_empty() { Vec::new() } else { self.compute(&plan)? };
        let took = began.elapsed();
        self.last_step = took;
        self.repeat_first_tokens();
        self.push_computed(&plan);
        self.apply(&plan, results, Some(took));
        self.catch_up(&plan);
        Ok(())
    }

    /// Tells routers of requests that compute for the first time.
    pub(crate) fn tell_begun(&mut self, plan: &StepPlan) {
        for work in &plan.work {
            if let Some(active) = self.requests.get_mut(&work.request)
                && !std::mem::replace(&mut active.has_begun, true)
            {
                (active.events)(EngineEvent::Begun);
            }
        }
    }

    /// Takes what a step came to. Who learns how long steps take is told, of those that were waited for.
    pub(crate) fn apply(&mut self, plan: &StepPlan, results: Vec<StepResult>, took: Option<Duration>) {
        let mut sampled: BTreeMap<RequestId, VecDeque<Sampled>> = BTreeMap::new();
        for result in results {
            if !self.scheduler.is_computed(result.request) {
                continue;
            }
            let Some(active) = self.requests.get_mut(&result.request) else { continue };
            active.prompt_logprobs.extend(result.prompt_logprobs);
            match result.failure {
                None => drop(sampled.insert(result.request, result.sampled.into())),
                Some(message) => self.fail(result.request, Recovery::GiveUp, message),
            }
        }
        let tokens = sampled.iter().flat_map(|(id, list)| list.iter().map(|it| (*id, it.token)));
        let tokens: Vec<(RequestId, TokenId)> = tokens.collect();
        let outcomes = self.scheduler.finish(plan, &tokens);
        if let Some((speculation, took)) = self.speculation.as_mut().zip(took) {
            speculation.learn(&self.scheduler, plan, &outcomes, took);
        }
        for outcome in outcomes {
            match outcome {
                Outcome::Token { request, .. } => {
                    let next = sampled.get_mut(&request).and_then(VecDeque::pop_front);
                    self.deliver(outcome, next.and_then(|it| it.logprobs));
                }
                Outcome::NoRoom { request } => {
                    self.fail(request, Recovery::GiveUp, "the KV cache is too small for this request".into());
                }
            }
        }
    }

    /// Has the router told again of a first token that came with its KV cache, but not before the step that goes on with it: to
    /// wake those who carry a token can cost this thread its processor, and the router has mostly heard of this one.
    pub(crate) fn repeat_later(&mut self, outcome: Outcome, logprobs: Option<Logprobs>) {
        match outcome {
            Outcome::Token { request, finish: None, .. } => {
                if let Some(active) = self.requests.get_mut(&request) {
                    active.repeated = Some((outcome, logprobs));
                    self.repeats.push(request);
                }
            }
            // No step comes that goes on with it.
            Outcome::Token { .. } | Outcome::NoRoom { .. } => self.deliver(outcome, logprobs),
        }
    }

    /// Tells routers what [`repeat_later`](Self::repeat_later) left.
    pub(crate) fn repeat_first_tokens(&mut self) {
        for request in std::mem::take(&mut self.repeats) {
            let repeated = self.requests.get_mut(&request).and_then(|active| active.repeated.take());
            if let Some((outcome, logprobs)) = repeated {
                self.deliver(outcome, logprobs);
            }
        }
    }

    /// Stays awake for a peer's commit, if that should come now. Whether something has come.
    fn stay_awake(&mut self) -> bool {
        let Self { watch, inbox, .. } = self;
        watch.keep(Instant::now, || inbox.look())
    }

    /// Reports a token and, when it is the last, the end.
    pub(crate) fn deliver(&mut self, outcome: Outcome, logprobs: Option<Logprobs>) {
        let Outcome::Token { request, token, index, finish, cached } = outcome else { return };
        let Some(active) = self.requests.get_mut(&request) else { return };
        self.counters.generation_tokens += 1;
        let prompt_logprobs = std::mem::take(&mut active.prompt_logprobs);
        if let Part::PrefillFor(handoff) = active.request.part {
            // Before the token goes to the router: to wake those who carry it there can cost this thread its processor for
            // longer than all the rest of a handoff takes, while an order to the endpoint takes a microsecond.
            if finish.is_some() && self.outgoing.awaits_reservation(handoff) {
                // Decode has not asked for it yet, and has no reason to any more.
                self.outgoing.give_up(handoff);
                self.endpoint.abandon(handoff, "the request ended with its first token".into());
            } else {
                let (logprobs, prompt_logprobs) = (logprobs.clone(), prompt_logprobs.clone());
                let cached_tokens = cached.0;
                let first_token = FirstToken { id: token, logprobs, prompt_logprobs, cached_tokens };
                self.prefill_computed(handoff, first_token);
            }
        }
        let active = self.requests.get_mut(&request).expect("orders to the endpoint end no request");
        if !prompt_logprobs.is_empty() {
            (active.events)(EngineEvent::PromptLogprobs(prompt_logprobs));
        }
        (active.events)(EngineEvent::Token { id: token, index, logprobs });
        if let Some(reason) = finish {
            (active.events)(EngineEvent::Finished { reason, cached_tokens: cached.0 });
            self.requests.remove(&request);
        }
    }

    /// Ends a request with a failure that its router hears of.
    pub(crate) fn fail(&mut self, id: RequestId, recovery: Recovery, message: String) {
        let Some(mut active) = self.requests.remove(&id) else { return };
        (active.events)(EngineEvent::Failed { recovery, message });
        self.stop(id, active.request.part);
    }

    /// Publishes where things stand.
    pub(crate) fn publish(&mut self) {
        let counts = self.scheduler.counts();
        let core = self.scheduler.counters();
        self.counters.prefix_queries = core.prefix_queries;
        self.counters.prefix_hits = core.prefix_hits;
        self.counters.preemptions = core.preemptions;
        if let Some(speculation) = &self.speculation {
            self.counters.speculation = *speculation.sums();
        }
        let status = EngineStatus {
            draining: self.draining,
            running: counts.running + counts.pushing,
            waiting: counts.waiting + counts.reserved,
            queued_tokens: self.scheduler.queued_tokens(),
            ledger: self.scheduler.ledger(),
            counters: self.counters,
            credit: self.endpoint.credit_load(),
        };
        self.shared.publish(status, self.scheduler.take_cache_changes());
    }
}

impl Active {
    fn new(request: RequestParts, events: EventSink, has_begun: bool) -> Self {
        Self { request, events, prompt_logprobs: Vec::new(), has_begun, repeated: None }
    }
}

impl Inbox {
    /// The next command, if there is one.
    fn next(&mut self) -> Option<Command> {
        self.seen.pop_front().or_else(|| self.commands.try_recv().ok())
    }

    /// Whether there is a command.
    fn look(&mut self) -> bool {
        if self.seen.is_empty() {
            self.seen.extend(self.commands.try_recv());
        }
        !self.seen.is_empty()
    }

    /// Waits until there is a command, or for `patience`. False when none can come any more.
    fn wait(&mut self, patience: Option<Duration>) -> bool {
        if !self.seen.is_empty() {
            return true;
        }
        let received = match patience {
            None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(patience) => self.commands.recv_timeout(patience),
        };
        let is_open = !matches!(received, Err(RecvTimeoutError::Disconnected));
        self.seen.extend(received);
        is_open
    }

    /// Looks at what has arrived for reservations; those that `take` takes do not come again.
    pub(crate) fn meet_reservations(&mut self, mut take: impl FnMut(&tidemill_kvtransfer::Reserved) -> bool) {
        self.seen.extend(self.commands.try_iter());
        self.seen.retain(|command| match command {
            Command::Handoff(HandoffEvent::Reserved(reserved)) => !take(reserved),
            _ => true,
        });
    }
}

fn recovery_of(error: &tidemill_engine_core::scheduler::SubmitError) -> Recovery {
    use tidemill_engine_core::scheduler::SubmitError;
    match error {
        SubmitError::QueueFull { .. } => Recovery::Later,
        _ => Recovery::GiveUp,
    }
}

/// After a step that took so long nobody waits for another one to hear a first token again: should the router have lost the prefill
/// worker meanwhile, that is its only sign that the request goes on here.
const LONG_STEP: Duration = Duration::from_millis(20);
/// How long nothing happens before the ledger is checked.
const CHECK_AFTER: Duration = Duration::from_millis(5);
/// Long enough for mere back pressure to pass, short enough for nobody to give up waiting.
const STUCK_LIMIT: Duration = Duration::from_secs(1);
