//! The choice of tokens by a device that has the logits: which rows it can do, and what it answers.

use tidemill_engine_core::request::{SamplingParams, StopConditions, TokenId};
use tidemill_kernels::cuda::{Sample, SampleRow};

use super::{SampleError, adjust};

/// How a GPU chooses output token number `position` of a request, as [`Sampler`](super::Sampler) would; `None` where
/// the host has to look at the logits: for log-probabilities, masked stop tokens, bias and penalties.
pub fn on_device(params: &SamplingParams, stop: &StopConditions, position: u32) -> Option<SampleRow> {
    if params.logprobs.is_some() || adjust::is_needed(params, stop, position) {
        return None;
    }
    Some(SampleRow {
        seed: params.seed,
        position,
        temperature: params.temperature,
        top_k: params.top_k.unwrap_or(0),
        top_p: params.top_p,
        min_p: params.min_p.min(1.0),
        reserved: 0,
    })
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
