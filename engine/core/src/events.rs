//! What is told of a request: by a worker to the router, and by the router to the front end.

use crate::request::{FinishReason, Logprobs, TokenId};

/// What happens to a request, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum EngineEvent {
    /// The request has left the queue and computes. Comes at most once, and not from a decode worker that waits for a
    /// handoff.
    Begun,
    /// Log-probabilities of the prompt's tokens but the first, when asked for.
    PromptLogprobs(Vec<Logprobs>),
    /// One output token.
    Token {
        /// The token.
        id: TokenId,
        /// Its number among the output tokens, from 0.
        index: u32,
        /// Its log-probabilities, when asked for.
        logprobs: Option<Logprobs>,
    },
    /// A prefill worker's part is over: the decode worker adopted the KV cache. Last event there.
    HandedOver,
    /// The request ended well. Last event.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Prompt tokens that were found in the prefix cache.
        cached_tokens: u32,
    },
    /// The request ended here, but perhaps not everywhere. Last event.
    Failed {
        /// What the router should do with it.
        recovery: Recovery,
        /// What happened.
        message: String,
    },
}

/// What the router should do with a request that failed on a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Nothing helps: tell the client.
    GiveUp,
    /// Replay it from its tokens so far, elsewhere or here alone.
    Reroute,
    /// This worker is full or draining.
    Later,
}

/// What becomes of it, in order; the last is `Finished` or `Failed`. Dropping the stream cancels it everywhere.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerationEvent {
    /// Log-probabilities of the prompt's tokens but the first.
    PromptLogprobs(Vec<Logprobs>),
    /// The next output token; the router has removed gaps and repetitions.
    Token {
        /// The token.
        id: TokenId,
        /// Its log-probabilities, when asked for.
        logprobs: Option<Logprobs>,
    },
    /// It ended well.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Prompt tokens that came from a prefix cache.
        cached_tokens: u32,
    },
    /// It ended badly, after every way of rescue.
    Failed(GenerationError),
}

/// Why a generation could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GenerationError {
    /// All queues are full: 429 with `Retry-After`.
    #[error("all workers are busy, try again in {retry_after_s} s")]
    Busy {
        /// Seconds until it is worth trying again.
        retry_after_s: u32,
    },
    /// No worker can serve now: 503.
    #[error("no worker is ready: {0}")]
    Unavailable(String),
    /// Something broke for good: 500.
    #[error("{0}")]
    Internal(String),
}
