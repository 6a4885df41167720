//! What the OpenAI front end asks of the router, and what it gets back: token ids, never text.

use tidemill_engine_core::request::{FinishReason, Logprobs, SamplingParams, StopConditions, TokenId};

/// One sequence to generate.
#[derive(Clone, Debug)]
pub(crate) struct Generation {
    /// The prompt.
    pub(crate) prompt: Vec<TokenId>,
    /// How tokens are chosen.
    pub(crate) sampling: SamplingParams,
    /// When it ends.
    pub(crate) stop: StopConditions,
}

/// What becomes of it, in order; the last is `Finished` or `Failed`. Dropping the stream cancels it everywhere.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum GenerationEvent {
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
pub(crate) enum GenerationError {
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
