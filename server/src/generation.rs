//! What the OpenAI front end asks of the router, and what it gets back: token ids, never text.

pub(crate) use tidemill_engine_core::events::{GenerationError, GenerationEvent};
use tidemill_engine_core::request::{SamplingParams, StopConditions, TokenId};

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
