//! The times of one sequence, from arrival to its end.

use std::sync::Arc;
use std::time::Instant;

use super::Metrics;

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// By a stop token or stop string.
    Stop,
    /// By its length.
    Length,
    /// By the client, which went away.
    Abort,
    /// By a failure.
    Error,
}

impl Outcome {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// Follows one sequence; dropped before [`finished`](Self::finished), it counts as aborted.
#[derive(Debug)]
pub(crate) struct RequestRecord {
    metrics: Arc<Metrics>,
    arrived: Instant,
    begun: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    prompt_tokens: u32,
    generated: u32,
    ended: bool,
}

impl Metrics {
    /// Starts to follow a sequence that arrived at `arrived`, and that a worker began to compute at `begun`.
    pub(crate) fn follow(
        self: &Arc<Self>,
        arrived: Instant,
        begun: Option<Instant>,
        prompt_tokens: u32,
        max_tokens: u32,
    ) -> RequestRecord {
        let now = Instant::now();
        // A worker of another version may not say it.
        let begun = begun.unwrap_or(arrived);
        self.requests.queue_time.record(begun - arrived);
        self.requests.params_max_tokens.record(f64::from(max_tokens));
        self.observed(2);
        RequestRecord {
            metrics: Arc::clone(self),
            arrived,
            begun,
            first_token: None,
            last_token: now,
            prompt_tokens,
            generated: 0,
            ended: false,
        }
    }

    /// Records how many answers a request asked for.
    pub(crate) fn record_choices(&self, n: u32) {
        self.requests.params_n.record(f64::from(n));
        self.observed(1);
    }
}

impl RequestRecord {
    /// A token arrived.
    pub(crate) fn token(&mut self) {
        let now = Instant::now();
        let requests = &self.metrics.requests;
        if self.first_token.is_none() {
            self.first_token = Some(now);
            requests.time_to_first_token.record(now - self.arrived);
            requests.prefill_time.record(now - self.begun);
            requests.prompt_tokens.increment(u64::from(self.prompt_tokens));
        } else {
            requests.inter_token_latency.record(now - self.last_token);
        }
        requests.generation_tokens.increment(1);
        self.last_token = now;
        self.generated += 1;
        self.metrics.observed(2);
    }

    /// The sequence ended. Only the first call counts.
    pub(crate) fn finished(&mut self, outcome: Outcome) {
        if self.ended {
            return;
        }
        self.ended = true;
        let requests = &self.metrics.requests;
        for (candidate, counter) in &requests.success {
            if *candidate == outcome {
                counter.increment(1);
            }
        }
        if matches!(outcome, Outcome::Stop | Outcome::Length) {
            requests.request_prompt_tokens.record(f64::from(self.prompt_tokens));
            requests.request_generation_tokens.record(f64::from(self.generated));
            requests.e2e_latency.record(self.last_token - self.arrived);
            requests.inference_time.record(self.last_token - self.begun);
            requests.decode_time.record(self.last_token - self.first_token.unwrap_or(self.last_token));
            self.metrics.observed(5);
        }
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        self.finished(Outcome::Abort);
    }
}
