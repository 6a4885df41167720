//! The way of one request through the cluster, as a state machine: events in, actions out.
//!
//! The router's driver owns the streams, timers and the cluster view; everything that must be right when
//! a worker dies is decided here, without clock or socket, and tested row by row. What a client sees depends on
//! `emitted` alone: tokens leave in order, once, and a replay starts from exactly what has left. That is sound
//! because a token is a function of the tokens before it and the seed, wherever it is computed.

use std::collections::BTreeMap;

use crate::events::{EngineEvent, GenerationError, GenerationEvent, Recovery};
use crate::request::{FinishReason, Logprobs, StopConditions, TokenId};

/// Names one start of a worker: a restarted worker is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance(pub u64);

/// Who does a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Two workers, linked by a handoff.
    Split {
        /// Computes the prompt.
        prefill: Instance,
        /// Continues with the second token.
        decode: Instance,
    },
    /// One worker does everything.
    Whole {
        /// The worker.
        worker: Instance,
        /// Why a request of a split deployment is not split, when it is a fallback.
        fallback: Option<&'static str>,
    },
}

/// Which of a request's streams something belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The prefill worker of a split.
    Prefill,
    /// The decode worker of a split.
    Decode,
    /// The only worker.
    Alone,
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Happening {
    /// An answer to [`Action::FindRoute`].
    Routed(Route),
    /// No worker could be found within the time allowed.
    Unroutable(String),
    /// A worker said something.
    From(Side, EngineEvent),
    /// A stream broke off, or its worker stopped answering.
    Lost(Side, String),
    /// The time that [`Action::AwaitAdoption`] allowed is over.
    AdoptionOverdue,
    /// All streams have ended, and yet the request has not: a worker left something out.
    Exhausted,
}

/// What the driver must do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Choose workers, none of them `excluded`; `wait` says whether it is worth waiting for one.
    FindRoute {
        /// Workers that have failed this request.
        excluded: Vec<Instance>,
        /// Whether to wait for a worker when there is none.
        wait: bool,
    },
    /// Open a stream; those of a split share one fresh handoff id per attempt.
    Start {
        /// Which stream.
        side: Side,
        /// Where.
        worker: Instance,
        /// The other side of the split.
        peer: Option<Instance>,
    },
    /// Drop a stream, which cancels what it stands for.
    Stop(Side),
    /// Let a stream end by itself; it has nothing more to say.
    Release(Side),
    /// Report [`Happening::AdoptionOverdue`] after a while.
    AwaitAdoption,
    /// Tell the client. After `Finished` or `Failed` the journey is over.
    Emit(GenerationEvent),
    /// Log and count that something was done in a worse way than intended.
    Fallback {
        /// Name in `tidemill_fallbacks_total`, one of [`FALLBACKS`].
        reason: &'static str,
        /// What happened, for the log.
        detail: String,
    },
}

/// One request's state.
#[derive(Debug)]
pub struct Journey {
    stop: StopConditions,
    /// Output tokens that fit the model's length.
    room: u32,
    emitted: Vec<TokenId>,
    /// Tokens that came before their turn: the decode worker may be quicker than the prefill worker's stream.
    ahead: BTreeMap<u32, (TokenId, Option<Logprobs>)>,
    prompt_logprobs_sent: bool,
    attempts: u32,
    excluded: Vec<Instance>,
    /// A worker was full, so that failing to find another one means "busy".
    was_full: bool,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Routing,
    Split(Split),
    Alone(Instance),
    Over,
}

#[derive(Debug)]
struct Split {
    prefill: Instance,
    decode: Instance,
    prefill_leg: Leg,
    /// Whether the decode worker has shown that it has the KV cache.
    adopted: bool,
    /// Output tokens before this attempt; the prefill worker's token has this index.
    base: usize,
    /// How decode ended, while the first token is still missing.
    ending: Option<(FinishReason, u32)>,
    /// Why decode cannot go on, while prefill has not said its last word: it may have ended the request.
    decode_failure: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leg {
    Open,
    /// It broke off after the first token; decode decides.
    Lost,
    Done,
}

impl Journey {
    /// A request that ends by `stop`, or after `room` output tokens when the model is full. Begin with
    /// [`begin`](Self::begin).
    pub fn new(stop: StopConditions, room: u32) -> Self {
        Self {
            stop,
            room,
            emitted: Vec::new(),
            ahead: BTreeMap::new(),
            prompt_logprobs_sent: false,
            attempts: 0,
            excluded: Vec::new(),
            was_full: false,
            stage: Stage::Routing,
        }
    }

    /// The first actions.
    pub fn begin(&mut self) -> Vec<Action> {
        vec![self.find_route()]
    }

    /// Output tokens that the client has; a replay continues after them.
    pub fn emitted(&self) -> &[TokenId] {
        &self.emitted
    }

    /// Whether the prompt's log-probabilities are still owed.
    pub fn owes_prompt_logprobs(&self) -> bool {
        !self.prompt_logprobs_sent
    }

    /// Whether everything is said and done.
    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    /// Takes in what happened and says what to do. Happenings of streams that were stopped, or have said their last
    /// word, must not be passed on.
    pub fn on(&mut self, happening: Happening) -> Vec<Action> {
        let mut actions = Vec::new();
        match happening {
            _ if self.is_over() => {}
            Happening::Routed(route) => self.routed(&route, &mut actions),
            Happening::Unroutable(why) => self.unroutable(why, &mut actions),
            Happening::From(side, event) => self.said(side, event, &mut actions),
            Happening::Lost(side, why) => self.lost(side, &why, &mut actions),
            Happening::AdoptionOverdue => self.adoption_overdue(&mut actions),
            Happening::Exhausted => self.exhausted(&mut actions),
        }
        actions
    }

    fn routed(&mut self, route: &Route, actions: &mut Vec<Action>) {
        self.attempts += 1;
        match *route {
            Route::Split { prefill, decode } => {
                // Decode first: its reservation should be there when prefill looks for it.
                actions.push(Action::Start { side: Side::Decode, worker: decode, peer: Some(prefill) });
                actions.push(Action::Start { side: Side::Prefill, worker: prefill, peer: Some(decode) });
                self.stage = Stage::Split(Split {
                    prefill,
                    decode,
                    prefill_leg: Leg::Open,
                    adopted: false,
                    base: self.emitted.len(),
                    ending: None,
                    decode_failure: None,
                });
            }
            Route::Whole { worker, fallback } => {
                if let Some(reason) = fallback {
                    debug_assert!(FALLBACKS.contains(&reason), "{reason} is not listed");
                    actions.push(Action::Fallback { reason, detail: "one worker does it all".into() });
                }
                actions.push(Action::Start { side: Side::Alone, worker, peer: None });
                self.stage = Stage::Alone(worker);
            }
        }
    }

    fn unroutable(&mut self, why: String, actions: &mut Vec<Action>) {
        let error = if self.was_full {
            GenerationError::Busy { retry_after_s: RETRY_AFTER_S }
        } else {
            GenerationError::Unavailable(why)
        };
        self.end(GenerationEvent::Failed(error), actions);
    }

    fn said(&mut self, side: Side, event: EngineEvent, actions: &mut Vec<Action>) {
        match event {
            EngineEvent::PromptLogprobs(logprobs) => {
                if !self.prompt_logprobs_sent {
                    self.prompt_logprobs_sent = true;
                    actions.push(Action::Emit(GenerationEvent::PromptLogprobs(logprobs)));
                }
            }
            EngineEvent::Token { id, index, logprobs } => {
                if let (Stage::Split(split), Side::Decode) = (&mut self.stage, side) {
                    split.adopted = true;
                }
                self.token(id, index, logprobs, actions);
                self.settle(actions);
            }
            // The driver's to tell.
            EngineEvent::Begun => {}
            EngineEvent::HandedOver => {
                if let Stage::Split(split) = &mut self.stage {
                    split.prefill_leg = Leg::Done;
                    split.adopted = true;
                }
                self.prefill_has_spoken(actions);
            }
            EngineEvent::Finished { reason, cached_tokens } => match &mut self.stage {
                // The first token may be missing still.
                Stage::Split(split) if side == Side::Decode => {
                    split.ending = Some((reason, cached_tokens));
                    self.settle(actions);
                }
                _ => self.finish(side, reason, cached_tokens, actions),
            },
            EngineEvent::Failed { recovery, message } => self.failed(side, recovery, &message, actions),
        }
    }

    /// Emits the token and those that waited for it.
    fn token(&mut self, id: TokenId, index: u32, logprobs: Option<Logprobs>, actions: &mut Vec<Action>) {
        if (index as usize) < self.emitted.len() {
            return;
        }
        self.ahead.insert(index, (id, logprobs));
        while let Some(entry) = self.ahead.first_entry() {
            if *entry.key() as usize != self.emitted.len() {
                break;
            }
            let (id, logprobs) = entry.remove();
            self.emitted.push(id);
            actions.push(Action::Emit(GenerationEvent::Token { id, logprobs }));
        }
    }

    /// Ends a split whose decode worker has finished, once no token is missing; replays it once one is lost.
    fn settle(&mut self, actions: &mut Vec<Action>) {
        let Stage::Split(split) = &self.stage else { return };
        let Some((reason, cached_tokens)) = split.ending else { return };
        if split.base < self.emitted.len() && self.ahead.is_empty() {
            self.finish(Side::Decode, reason, cached_tokens, actions);
        }
    }

    fn finish(&mut self, side: Side, reason: FinishReason, cached_tokens: u32, actions: &mut Vec<Action>) {
        let stage = std::mem::replace(&mut self.stage, Stage::Over);
        actions.push(Action::Emit(GenerationEvent::Finished { reason, cached_tokens }));
        if let Stage::Split(split) = stage {
            match side {
                // Decode comes to the same end, or is told that it is not needed; a cancel would only look like a failure.
                Side::Prefill if split.decode_failure.is_none() => {
                    actions.push(Action::Release(Side::Decode))
                }
                Side::Prefill => {}
                _ if split.prefill_leg == Leg::Open => actions.push(Action::Release(Side::Prefill)),
                _ => {}
            }
        }
    }

    fn failed(&mut self, side: Side, recovery: Recovery, message: &str, actions: &mut Vec<Action>) {
        if recovery == Recovery::GiveUp {
            return self.end(GenerationEvent::Failed(GenerationError::Internal(message.to_owned())), actions);
        }
        let full = recovery == Recovery::Later;
        match (&mut self.stage, side) {
            (Stage::Split(split), Side::Prefill) if split.adopted => split.prefill_leg = Leg::Done,
            (Stage::Split(split), Side::Prefill) => {
                split.prefill_leg = Leg::Done;
                let (prefill, reason) = (split.prefill, if full { "prefill-full" } else { "prefill-failed" });
                self.retry(prefill, full, reason, message, actions);
            }
            (Stage::Split(split), Side::Decode) => {
                let (decode, prefill) = (split.decode, split.prefill);
                if full {
                    return self.retry(decode, true, "decode-full", message, actions);
                }
                if split.prefill_leg == Leg::Open {
                    // Its last word may be that the request has ended, and decode was just quicker to notice.
                    split.decode_failure = Some(message.to_owned());
                    return actions.push(Action::AwaitAdoption);
                }
                // Decode is well enough to say so: what failed is the handoff, or the worker behind it.
                let reason = if split.prefill_leg == Leg::Lost { "prefill-lost" } else { "handoff-failed" };
                self.retry(prefill, false, reason, message, actions);
            }
            (Stage::Alone(worker), Side::Alone) => {
                let (worker, reason) = (*worker, if full { "worker-full" } else { "worker-failed" });
                self.retry(worker, full, reason, message, actions);
            }
            (Stage::Alone(_), _) | (Stage::Split(_), Side::Alone) | (Stage::Routing | Stage::Over, _) => {}
        }
    }

    fn lost(&mut self, side: Side, why: &str, actions: &mut Vec<Action>) {
        match (&mut self.stage, side) {
            (Stage::Split(split), Side::Prefill)
                if split.base < self.emitted.len() && split.decode_failure.is_none() =>
            {
                // The first token is out, so decode may have everything; if not, it will say so soon.
                split.prefill_leg = Leg::Lost;
                if !split.adopted {
                    actions.push(Action::AwaitAdoption);
                }
            }
            (Stage::Split(split), Side::Prefill) => {
                split.prefill_leg = Leg::Done;
                let prefill = split.prefill;
                self.retry(prefill, false, "prefill-lost", why, actions);
            }
            (Stage::Split(split), Side::Decode) => {
                let decode = split.decode;
                self.retry(decode, false, "decode-lost", why, actions);
            }
            (Stage::Alone(worker), Side::Alone) => {
                let worker = *worker;
                self.retry(worker, false, "worker-lost", why, actions);
            }
            (Stage::Alone(_), _) | (Stage::Split(_), Side::Alone) | (Stage::Routing | Stage::Over, _) => {}
        }
    }

    fn adoption_overdue(&mut self, actions: &mut Vec<Action>) {
        let Stage::Split(split) = &mut self.stage else { return };
        let prefill = split.prefill;
        if let Some(failure) = split.decode_failure.take() {
            self.retry(prefill, false, "handoff-failed", &failure, actions);
        } else if split.prefill_leg == Leg::Lost && !split.adopted {
            self.retry(prefill, false, "prefill-lost", "decode did not take over in time", actions);
        }
    }

    /// Prefill has nothing more to say, and it was not the end of the request.
    fn prefill_has_spoken(&mut self, actions: &mut Vec<Action>) {
        if let Stage::Split(split) = &mut self.stage
            && let Some(failure) = split.decode_failure.take()
        {
            let prefill = split.prefill;
            self.retry(prefill, false, "handoff-failed", &failure, actions);
        }
    }

    fn exhausted(&mut self, actions: &mut Vec<Action>) {
        let (Stage::Split(Split { decode: culprit, .. }) | Stage::Alone(culprit)) = self.stage else {
            return;
        };
        let detail = "all streams ended before the request did";
        self.retry(culprit, false, "stream-incomplete", detail, actions);
    }

    /// Gives up this attempt, because of `culprit`, and begins the next one from the tokens that have left.
    fn retry(
        &mut self,
        culprit: Instance,
        full: bool,
        reason: &'static str,
        detail: &str,
        actions: &mut Vec<Action>,
    ) {
        debug_assert!(FALLBACKS.contains(&reason), "{reason} is not listed");
        actions.push(Action::Fallback { reason, detail: detail.to_owned() });
        self.stop_streams(culprit, actions);
        self.ahead.clear();
        if let Some(reason) = self.ended_unsaid() {
            self.stage = Stage::Over;
            return actions.push(Action::Emit(GenerationEvent::Finished { reason, cached_tokens: 0 }));
        }
        self.stage = Stage::Routing;
        if !self.excluded.contains(&culprit) {
            self.excluded.push(culprit);
        }
        // A stream that has begun is worth waiting for; a new request had better go elsewhere.
        self.was_full |= full && self.emitted.is_empty();
        if self.attempts == MAX_ATTEMPTS {
            let error = if full {
                GenerationError::Busy { retry_after_s: RETRY_AFTER_S }
            } else {
                GenerationError::Internal(format!("failed {MAX_ATTEMPTS} times, the last time: {detail}"))
            };
            return self.end(GenerationEvent::Failed(error), actions);
        }
        actions.push(self.find_route());
    }

    /// The reason to end that a lost worker may have failed to tell after its last token.
    fn ended_unsaid(&self) -> Option<FinishReason> {
        let last = *self.emitted.last()?;
        let count = u32::try_from(self.emitted.len()).expect("no model writes four billion tokens");
        let model_is_full = (self.room <= count).then_some(FinishReason::Length);
        self.stop.reason(last, count - 1).or(model_is_full)
    }

    fn find_route(&self) -> Action {
        Action::FindRoute { excluded: self.excluded.clone(), wait: !self.was_full }
    }

    /// Drops the streams that are still open. One that just failed is closed already; stopping it does no harm.
    fn stop_streams(&self, culprit: Instance, actions: &mut Vec<Action>) {
        match &self.stage {
            Stage::Split(split) => {
                if split.prefill_leg == Leg::Open {
                    actions.push(Action::Stop(Side::Prefill));
                }
                if culprit != split.decode {
                    actions.push(Action::Stop(Side::Decode));
                }
            }
            Stage::Alone(_) | Stage::Routing | Stage::Over => {}
        }
    }

    fn end(&mut self, event: GenerationEvent, actions: &mut Vec<Action>) {
        let stage = std::mem::replace(&mut self.stage, Stage::Over);
        actions.push(Action::Emit(event));
        if let Stage::Split(_) = stage {
            actions.extend([Action::Stop(Side::Prefill), Action::Stop(Side::Decode)]);
        }
    }
}

/// Workers, or pairs of them, that one request is tried on. A cluster that fails a request this often is broken in
/// a way that further attempts would only hide.
const MAX_ATTEMPTS: u32 = 6;

/// All reasons of [`Action::Fallback`], for counters that exist before they count.
pub const FALLBACKS: [&str; 13] = [
    "prefill-unavailable",
    "decode-unavailable",
    "unlinked",
    "prefill-full",
    "prefill-failed",
    "prefill-lost",
    "decode-full",
    "decode-lost",
    "handoff-failed",
    "worker-full",
    "worker-failed",
    "worker-lost",
    "stream-incomplete",
];

/// What a client that finds all queues full is told to wait: queues of seconds empty in seconds.
const RETRY_AFTER_S: u32 = 1;

#[cfg(test)]
mod tests;
