//! Clients: what they ask, what they get, and when they lose their patience.

use tidemill_kvtransfer_proto::units::HandoffId;

use super::Fault;
use super::model::{LAYERS, answer, contents};
use super::world::{Event, MAX_MODEL_LEN, Process, ToWorker, World};
use crate::events::{GenerationError, GenerationEvent};
use crate::journey::{Journey, Side};
use crate::request::{FinishReason, RequestId, StopConditions, TokenId};

/// One request of a client.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) prompt_len: usize,
    /// Prompt and right answer.
    pub(super) tokens: Vec<TokenId>,
    /// What the cache contains at each position.
    pub(super) contents: Vec<[u64; LAYERS]>,
    pub(super) stop: StopConditions,
    pub(super) reason: FinishReason,
    pub(super) journey: Journey,
    pub(super) streams: Vec<Stream>,
    pub(super) handoff: HandoffId,
    pub(super) adoption: Option<u64>,
    pub(super) routing: Option<Routing>,
    pub(super) state: JobState,
    pub(super) emitted: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Stream {
    pub(super) side: Side,
    pub(super) request: RequestId,
    pub(super) process: Process,
}

#[derive(Debug)]
pub(super) struct Routing {
    pub(super) excluded: Vec<u64>,
    pub(super) wait: bool,
    pub(super) since: u64,
    pub(super) turn: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobState {
    ToCome,
    Open,
    Answered,
    Failed,
    HungUp,
}

impl World<'_> {
    pub(super) fn plan_jobs(&mut self) {
        let count = 2 + self.chance.below(5);
        // From one by one to all at once.
        let window = self.calm_from.min([8_000, 30_000, 300_000][self.chance.below(3)]);
        let templates: Vec<Vec<TokenId>> =
            (0..2).map(|_| (0..24).map(|_| self.chance.below(7) as TokenId).collect()).collect();
        for number in 0..count {
            let shared = 1 + self.chance.below(20);
            let mut prompt = templates[self.chance.below(2)][..shared].to_vec();
            prompt.extend((0..self.chance.below(5)).map(|_| self.chance.below(7) as TokenId));
            let max_tokens = 1 + u32::try_from(self.chance.below(8)).expect("few");
            let stop = StopConditions {
                eos_token_ids: vec![7],
                ignore_eos: false,
                ..StopConditions::after(max_tokens)
            };
            let (tokens, reason) = answer(&prompt, &stop, MAX_MODEL_LEN);
            let room = MAX_MODEL_LEN.0 - u32::try_from(prompt.len()).expect("short");
            self.front.jobs.push(Job {
                prompt_len: prompt.len(),
                contents: contents(&tokens),
                tokens,
                journey: Journey::new(stop.clone(), room),
                stop,
                reason,
                streams: Vec::new(),
                handoff: HandoffId(0),
                adoption: None,
                routing: None,
                state: JobState::ToCome,
                emitted: 0,
            });
            let at = self.micros(5_000, window);
            self.front.arrivals.push(at);
            self.at(at, Event::Arrive(number));
            if self.options.faults.contains(Fault::Cancel) && self.chance.happens(200) {
                let latest = [2_000, 10_000, 600_000][self.chance.below(3)];
                let after = self.micros(1, latest);
                self.at(at + after, Event::HangUp(number));
            }
        }
    }

    pub(super) fn arrive(&mut self, number: usize) {
        self.summary.requests += 1;
        let job = &mut self.front.jobs[number];
        job.state = JobState::Open;
        let actions = job.journey.begin();
        let (prompt, answer) = (job.prompt_len, job.tokens.len() - job.prompt_len);
        self.note(|| format!("client asks request {number}: {prompt} tokens, {answer} to come"));
        self.follow(number, actions);
        self.front_turn();
    }

    /// The client is gone: its streams are dropped.
    pub(super) fn hang_up(&mut self, number: usize) {
        let job = &mut self.front.jobs[number];
        if job.state != JobState::Open {
            return;
        }
        job.state = JobState::HungUp;
        job.routing = None;
        job.adoption = None;
        self.summary.cancelled += 1;
        self.count(Fault::Cancel);
        self.note(|| format!("client hangs up on request {number}"));
        let streams = std::mem::take(&mut self.front.jobs[number].streams);
        for Stream { process, request, .. } in streams {
            self.send_to(process, ToWorker::Cancel(request));
        }
    }

    pub(super) fn emit(&mut self, number: usize, event: GenerationEvent) {
        let job = &mut self.front.jobs[number];
        assert_eq!(job.state, JobState::Open, "nothing is said of request {number} after its end: {event:?}");
        match event {
            GenerationEvent::PromptLogprobs(_) => panic!("nobody asked for log-probabilities"),
            GenerationEvent::Token { id, .. } => {
                let expected = job.tokens.get(job.prompt_len + job.emitted).copied();
                assert_eq!(Some(id), expected, "token {} of request {number} is the right one", job.emitted);
                if job.emitted == 0 {
                    let waited = self.now - self.front.arrivals[number];
                    self.summary.first_token = self.summary.first_token.max(waited);
                }
                job.emitted += 1;
            }
            GenerationEvent::Finished { reason, .. } => {
                assert_eq!(
                    (job.emitted, reason),
                    (job.tokens.len() - job.prompt_len, job.reason),
                    "request {number} ends with its last token, for the right reason"
                );
                job.state = JobState::Answered;
                self.summary.answered += 1;
                self.note(|| format!("request {number} is answered"));
            }
            GenerationEvent::Failed(error) => {
                let is_busy = matches!(error, GenerationError::Busy { .. });
                assert!(
                    self.options.faults != super::Faults::none() || is_busy,
                    "request {number} fails although nothing went wrong: {error}"
                );
                job.state = JobState::Failed;
                self.summary.failed += 1;
                self.note(|| format!("request {number} fails: {error}"));
            }
        }
    }
}
