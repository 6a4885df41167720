//! Carries out what a [`Journey`] decides: opens streams to workers, waits, and tells the client.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt};
use tidemill_engine::handle::EngineEvent;
use tidemill_engine_core::journey::{Action, Happening, Instance, Journey, Route, Side};
use tidemill_engine_core::request::{Part, Request, RequestId};
use tidemill_engine_core::routing::{self, AloneReason, NoRoute, RouteRequest};
use tidemill_kvtransfer_proto::units::{HandoffId, TokenCount};
use tokio::sync::mpsc::Sender;
use tokio::time::{Instant, sleep_until, timeout};

use super::Router;
use super::cluster::Reach;
use crate::convert::Assignment;
use crate::generation::{Generation, GenerationEvent};
use crate::openai::Serving;
use crate::worker::is_last;
use crate::worker_link::LinkError;

type Events = Pin<Box<dyn Stream<Item = Result<EngineEvent, LinkError>> + Send>>;

/// The driver of one request.
struct Drive {
    router: Arc<Router>,
    generation: Generation,
    journey: Journey,
    client: Sender<GenerationEvent>,
    streams: Vec<(Side, Events)>,
    /// One per attempt.
    handoff: HandoffId,
    /// Why the attempt under way is not split.
    fallback: &'static str,
    adoption: Option<Instant>,
    /// When a worker began.
    begun: Arc<OnceLock<std::time::Instant>>,
    /// Since when something is wrong with the attempt under way.
    trouble: Option<Instant>,
}

/// Runs one request to its end, or until the client is gone.
pub(super) async fn drive(
    router: Arc<Router>,
    generation: Generation,
    client: Sender<GenerationEvent>,
    begun: Arc<OnceLock<std::time::Instant>>,
) {
    let room = match router.cluster.health().serving {
        Serving::Yes { max_model_len } => max_model_len.saturating_sub(length(&generation)),
        Serving::No { .. } => u32::MAX,
    };
    let _in_flight = router.cluster.in_flight();
    let journey = Journey::new(generation.stop.clone(), room);
    let handoff = HandoffId(router.number());
    let streams = Vec::new();
    let hung_up = client.clone();
    let drive = Drive {
        router,
        generation,
        journey,
        client,
        streams,
        handoff,
        fallback: "",
        adoption: None,
        begun,
        trouble: None,
    };
    tokio::select! {
        () = drive.run() => {}
        // Dropping the driver drops its streams, which cancels the request on both sides.
        () = hung_up.closed() => {}
    }
}

impl Drive {
    async fn run(mut self) {
        let mut actions = self.journey.begin();
        loop {
            let mut happenings = Vec::new();
            for action in actions {
                happenings.extend(self.act(action).await);
            }
            if self.journey.is_over() {
                return;
            }
            if happenings.is_empty() {
                happenings.push(self.next().await);
            }
            happenings.iter().for_each(|happening| self.follow_trouble(happening));
            actions = happenings.into_iter().flat_map(|happening| self.journey.on(happening)).collect();
        }
    }

    /// Measures how long trouble keeps a request from being where it can go on.
    fn follow_trouble(&mut self, happening: &Happening) {
        match happening {
            Happening::Lost(..) | Happening::From(_, EngineEvent::Failed { .. }) => {
                self.trouble.get_or_insert_with(Instant::now);
            }
            Happening::Routed(_) => {
                if let Some(since) = self.trouble.take() {
                    let waited = since.elapsed();
                    tracing::info!(waited_ms = waited.as_millis(), "request goes on elsewhere");
                    self.router.metrics.record_recovery(waited);
                }
            }
            // It goes on where it is: decode had everything when prefill was lost.
            Happening::From(Side::Decode | Side::Alone, EngineEvent::Token { .. }) => self.trouble = None,
            _ => {}
        }
    }

    /// Does one thing. What comes of it at once is returned.
    async fn act(&mut self, action: Action) -> Option<Happening> {
        match action {
            Action::FindRoute { excluded, wait } => return Some(self.find_route(&excluded, wait).await),
            Action::Start { side, worker, peer } => return self.start(side, worker, peer),
            Action::Stop(side) => self.streams.retain(|(other, _)| *other != side),
            Action::Release(side) => self.release(side),
            Action::AwaitAdoption => self.adoption = Some(Instant::now() + ADOPTION_LIMIT),
            Action::Emit(event) => {
                // Fails when the client is gone, and then this task is about to be dropped.
                let _ = self.client.send(event).await;
            }
            Action::Fallback { reason, detail } => {
                tracing::warn!(reason, detail, "fallback");
                self.router.metrics.record_fallback(reason);
                self.fallback = reason;
            }
        }
        None
    }

    /// Asks the pure router until it has an answer, or waiting is over.
    async fn find_route(&mut self, excluded: &[Instance], wait: bool) -> Happening {
        self.handoff = HandoffId(self.router.number());
        self.fallback = "";
        self.adoption = None;
        let tokens = self.tokens();
        let excluded: Vec<u64> = excluded.iter().map(|instance| instance.0).collect();
        let turn = self.router.turn.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        let deadline = started + if wait { ROUTE_LIMIT } else { Duration::ZERO };
        loop {
            let change = self.router.cluster.change();
            let view = self.router.cluster.view();
            // A worker that failed once may still be the only one there is.
            let forgiven = wait && FORGIVE_AFTER <= started.elapsed();
            let excluded = if forgiven { &[] } else { excluded.as_slice() };
            let request = RouteRequest { tokens: &tokens, excluded, turn };
            let instance = |index: routing::WorkerIndex| Instance(view.workers[index.0].instance);
            let why = match routing::route(&view, self.router.policy, request) {
                routing::Route::Split { prefill, decode } => {
                    let (prefill, decode) = (instance(prefill), instance(decode));
                    return Happening::Routed(Route::Split { prefill, decode });
                }
                routing::Route::Alone { worker, reason } => {
                    let fallback = match reason {
                        AloneReason::Hybrid | AloneReason::Cheaper => None,
                        AloneReason::PrefillUnavailable
                        | AloneReason::DecodeUnavailable
                        | AloneReason::Unlinked => Some(reason.as_str()),
                    };
                    return Happening::Routed(Route::Whole { worker: instance(worker), fallback });
                }
                routing::Route::None(why) => why,
            };
            drop(view); // While it is held, a status that comes copies what it shares.
            let left = deadline.saturating_duration_since(Instant::now());
            if why == NoRoute::NeverFits || left.is_zero() {
                return Happening::Unroutable(words(why).to_owned());
            }
            let patience = if forgiven { left } else { left.min(FORGIVE_AFTER) };
            let _ = timeout(patience, change).await;
        }
    }

    /// Opens a stream; a worker that is gone by now counts as lost.
    fn start(&mut self, side: Side, worker: Instance, peer: Option<Instance>) -> Option<Happening> {
        let lost = |what: &str| Some(Happening::Lost(side, format!("the {what} is gone")));
        let Some(Reach { link, lost: gone, .. }) = self.router.cluster.reach(worker) else {
            return lost("worker");
        };
        let peer = match peer {
            None => None,
            Some(peer) => match self.router.cluster.reach(peer) {
                Some(reach) => Some(reach.peer),
                None => return lost("peer"),
            },
        };
        let part = match side {
            Side::Prefill => Part::PrefillFor(self.handoff),
            Side::Decode => Part::DecodeFrom(self.handoff),
            Side::Alone => Part::Whole,
        };
        let assignment = Assignment { request: self.request(part), peer, reason: self.fallback.to_owned() };
        let events = futures::stream::once(async move { link.generate(&assignment).await }).try_flatten();
        let events = events.take_until(gone.cancelled_owned());
        self.streams.push((side, Box::pin(events)));
        None
    }

    fn release(&mut self, side: Side) {
        if let Some(place) = self.streams.iter().position(|(other, _)| *other == side) {
            let (_, mut events) = self.streams.swap_remove(place);
            tokio::spawn(timeout(RELEASE_LIMIT, async move { while events.next().await.is_some() {} }));
        }
    }

    /// The next thing that a worker says, or fails to say.
    async fn next(&mut self) -> Happening {
        let overdue = self.adoption;
        if self.streams.is_empty() && overdue.is_none() {
            return Happening::Exhausted;
        }
        let alarm = async {
            match overdue {
                Some(moment) => sleep_until(moment).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(alarm);
        loop {
            tokio::select! {
                (side, event) = next_event(&mut self.streams) => match event {
                    Some(Ok(EngineEvent::Begun)) => drop(self.begun.set(std::time::Instant::now())),
                    Some(Ok(event)) => {
                        if let EngineEvent::Token { .. } = event {
                            // A short prompt's token can come by way of decode before prefill's word that it begins.
                            self.begun.get_or_init(std::time::Instant::now);
                        }
                        return Happening::From(side, event);
                    }
                    Some(Err(error)) => return Happening::Lost(side, error.to_string()),
                    None => return Happening::Lost(side, "the worker is gone".into()),
                },
                () = &mut alarm => {
                    self.adoption = None;
                    return Happening::AdoptionOverdue;
                }
            }
        }
    }

    fn tokens(&self) -> Vec<u32> {
        self.generation.prompt.iter().chain(self.journey.emitted()).copied().collect()
    }

    fn request(&self, part: Part) -> Request {
        let mut sampling = self.generation.sampling.clone();
        sampling.prompt_logprobs = sampling.prompt_logprobs.filter(|_| self.journey.owes_prompt_logprobs());
        Request {
            id: RequestId(self.router.number()),
            tokens: self.tokens(),
            prompt_len: TokenCount(length(&self.generation)),
            sampling,
            stop: self.generation.stop.clone(),
            part,
        }
    }
}

/// The next event of any stream. A stream that has said its last word, ends, or fails, is removed: what the end of the
/// connection looks like after that is of no interest to this attempt or the next one.
async fn next_event(streams: &mut Vec<(Side, Events)>) -> (Side, Option<Result<EngineEvent, LinkError>>) {
    std::future::poll_fn(|context| {
        for index in 0..streams.len() {
            let (side, events) = &mut streams[index];
            let side = *side;
            if let Poll::Ready(event) = events.poll_next_unpin(context) {
                let goes_on = matches!(&event, Some(Ok(event)) if !is_last(event));
                if !goes_on {
                    drop(streams.remove(index));
                }
                return Poll::Ready((side, event));
            }
        }
        Poll::Pending
    })
    .await
}

fn length(generation: &Generation) -> u32 {
    u32::try_from(generation.prompt.len()).expect("the front end bounds prompts by the model's length")
}

const fn words(why: NoRoute) -> &'static str {
    match why {
        NoRoute::AllDown => "no worker answers",
        NoRoute::AllDraining => "all workers are shutting down",
        NoRoute::AllExcluded => "every worker has failed this request",
        NoRoute::NeverFits => "no worker has a KV cache for so many tokens",
    }
}

/// How long a request waits for a worker to come back. `serve` restarts one within a second or two.
const ROUTE_LIMIT: Duration = Duration::from_secs(10);
/// How long a worker that failed a request is not given it again although there is no other.
const FORGIVE_AFTER: Duration = Duration::from_millis(300);
/// How long a stream that has nothing more to say may take to end.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);
/// How long decode may take to show that it has the KV cache after the prefill worker's stream broke.
const ADOPTION_LIMIT: Duration = Duration::from_millis(500);
