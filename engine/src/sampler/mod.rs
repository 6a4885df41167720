//! From logits to a token, as vLLM does it.
//!
//! The order: stop tokens are masked until `min_tokens`, logit bias, repetition, frequency and presence penalty; then the
//! greatest logit at temperature zero, or else temperature, min-p, top-k, top-p and a draw. The draw for output token
//! number `p` is a function of the request's seed and `p` alone. Log-probabilities are those of the untouched logits.

mod adjust;
mod choice;
mod logprobs;
mod on_device;
mod philox;

#[cfg(test)]
mod tests;

use tidemill_engine_core::request::{Logprobs, SamplingParams, StopConditions, TokenId};

use adjust::{TokenCounts, adjust};
use choice::Candidates;
pub use logprobs::{logprobs, logprobs_of};
pub use on_device::{chosen, logprobs_on_device, on_device};

/// Chooses tokens; holds the memory that this takes.
#[derive(Debug)]
pub struct Sampler {
    adjusted: Vec<f32>,
    counts: TokenCounts,
    candidates: Candidates,
}

/// The tokens so far, which penalties look at.
#[derive(Clone, Copy, Debug, Default)]
pub struct History<'a> {
    /// Of the prompt.
    pub prompt: &'a [TokenId],
    /// Of the output.
    pub output: &'a [TokenId],
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its log-probabilities, when the request wants them.
    pub logprobs: Option<Logprobs>,
}

/// Why no token could be chosen. The request fails; others of the same step need not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model or the request made a logit that is no number or infinite.
    #[error("a logit is not a finite number")]
    NotFinite,
    /// Every token is ruled out: by stop tokens before `min_tokens`, or by bias.
    #[error("no token is left to choose from")]
    NothingLeft,
    /// The request names a token that the vocabulary does not have.
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
}

impl Sampler {
    /// Makes the memory for a vocabulary.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            adjusted: Vec::with_capacity(vocab_size),
            counts: TokenCounts::new(vocab_size),
            candidates: Candidates::new(vocab_size),
        }
    }

    /// Chooses output token number `position`, from 0, of a request.
    ///
    /// # Errors
    ///
    /// [`SampleError`] when there is no token to choose.
    pub fn sample(
        &mut self,
        logits: &[f32],
        history: History<'_>,
        params: &SamplingParams,
        stop: &StopConditions,
        position: u32,
    ) -> Result<Sampled, SampleError> {
        let token = self.choose(logits, history, params, stop, position)?;
        let logprobs = params.logprobs.map(|count| logprobs(logits, token, count)).transpose()?;
        Ok(Sampled { token, logprobs })
    }

    /// The same token, without log-probabilities.
    ///
    /// # Errors
    ///
    /// As for [`sample`](Self::sample).
    pub fn choose(
        &mut self,
        logits: &[f32],
        history: History<'_>,
        params: &SamplingParams,
        stop: &StopConditions,
        position: u32,
    ) -> Result<TokenId, SampleError> {
        let mut adjusted = logits;
        if adjust::is_needed(params, stop, position) {
            self.adjusted.clear();
            self.adjusted.extend_from_slice(logits);
            adjust(&mut self.adjusted, &mut self.counts, history, params, stop, position)?;
            adjusted = &self.adjusted;
        }
        refuse_hopeless(adjusted)?;
        Ok(if params.temperature < GREEDY_BELOW {
            choice::greedy(adjusted)
        } else {
            self.candidates.draw(adjusted, params, philox::uniform(params.seed, position))
        })
    }
}

/// Minus infinity is fine: that token is ruled out.
fn refuse_hopeless(logits: &[f32]) -> Result<(), SampleError> {
    // Without a way out of the loop, so that it is one of vector instructions; false for what is no number too.
    let all_below = logits.iter().fold(true, |all, logit| all & (*logit < f32::INFINITY));
    if !all_below {
        return Err(SampleError::NotFinite);
    }
    let some_left = logits.iter().fold(false, |some, logit| some | (f32::NEG_INFINITY < *logit));
    if some_left { Ok(()) } else { Err(SampleError::NothingLeft) }
}

/// vLLM's limit: dividing by less would overflow.
const GREEDY_BELOW: f32 = 1e-5;
