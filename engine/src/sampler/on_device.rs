//! What a device that has the logits does with them: the choice of tokens and log-probabilities, of the rows that it can do, and what it
//! answers.

use tidemill_engine_core::request::{SamplingParams, StopConditions, TokenId};
use tidemill_kernels::cuda::{LogprobsRow, Sample, SampleRow};

use super::{SampleError, adjust};
use crate::runner::RowTask;

/// How a GPU chooses output token number `position` of a request and finds its log-probabilities, as
/// [`Sampler`](super::Sampler) would; `None` where the host has to look at the logits: for masked stop tokens, bias and penalties, or more
/// log-probabilities than anybody asks for.
pub fn on_device(params: &SamplingParams, stop: &StopConditions, position: u32) -> Option<RowTask> {
    if adjust::is_needed(params, stop, position) {
        return None;
    }
    let logprobs = match params.logprobs {
        None => None,
        Some(count) => Some(logprobs_on_device(LogprobsRow::CHOSEN, count)?),
    };
    let sample = SampleRow {
        seed: params.seed,
        position,
        temperature: params.temperature,
        top_k: params.top_k.unwrap_or(0),
        top_p: params.top_p,
        min_p: params.min_p.min(1.0),
        reserved: 0,
    };
    Some(RowTask { sample: Some(sample), logprobs })
}

/// Log-probabilities of a token and of the `count` most likely ones; `None` where those are more than a GPU finds.
pub const fn logprobs_on_device(token: TokenId, count: u32) -> Option<LogprobsRow> {
    if count <= LogprobsRow::MOST { Some(LogprobsRow { token, count }) } else { None }
}

/// The token that a GPU has chosen.
///
/// # Errors
///
/// [`SampleError`] when there was none to choose.
pub const fn chosen(token: u32) -> Result<TokenId, SampleError> {
    match token {
        Sample::NOT_FINITE => Err(SampleError::NotFinite),
        Sample::NOTHING_LEFT => Err(SampleError::NothingLeft),
        token => Ok(token),
    }
}
