//! What a request asks to be done to the logits before a token is chosen, in vLLM's order: stop tokens masked, bias
//! added, penalties.

use tidemill_engine_core::request::{SamplingParams, StopConditions, TokenId};

use super::{History, SampleError};

/// Memory for counting tokens; zero wherever nobody looks.
#[derive(Debug)]
pub(super) struct TokenCounts {
    /// Occurrences in the output, per token of the vocabulary.
    output: Vec<u32>,
    /// Whether the token was met, in prompt or output.
    met: Vec<bool>,
    /// The tokens that were met, once each.
    tokens: Vec<TokenId>,
}

/// Whether logits stay as they are.
pub(super) fn is_needed(params: &SamplingParams, stop: &StopConditions, position: u32) -> bool {
    position < stop.min_tokens || !params.logit_bias.is_empty() || has_penalties(params)
}

/// Changes `logits` as the request asks, for its output token number `position`.
pub(super) fn adjust(
    logits: &mut [f32],
    counts: &mut TokenCounts,
    history: History<'_>,
    params: &SamplingParams,
    stop: &StopConditions,
    position: u32,
) -> Result<(), SampleError> {
    if position < stop.min_tokens {
        let eos: &[TokenId] = if stop.ignore_eos { &[] } else { &stop.eos_token_ids };
        for &token in eos.iter().chain(&stop.stop_token_ids) {
            // A stop token outside of the vocabulary can never be chosen anyway.
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    let vocab_size = logits.len();
    for &(token, bias) in &params.logit_bias {
        *logits.get_mut(token as usize).ok_or(SampleError::UnknownToken { token, vocab_size })? += bias;
    }
    if has_penalties(params) {
        counts.count(history);
        penalise(logits, counts, params);
        counts.clear();
    }
    Ok(())
}

fn has_penalties(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
}

fn penalise(logits: &mut [f32], counts: &TokenCounts, params: &SamplingParams) {
    for &token in &counts.tokens {
        let logit = &mut logits[token as usize];
        if 0.0 < *logit {
            *logit /= params.repetition_penalty;
        } else {
            *logit *= params.repetition_penalty;
        }
        let occurrences = counts.output[token as usize];
        *logit -= params.frequency_penalty * occurrences as f32;
        if 0 < occurrences {
            *logit -= params.presence_penalty;
        }
    }
}

impl TokenCounts {
    pub(super) fn new(vocab_size: usize) -> Self {
        Self { output: vec![0; vocab_size], met: vec![false; vocab_size], tokens: Vec::new() }
    }

    fn count(&mut self, history: History<'_>) {
        for &token in history.output {
            self.output[token as usize] += 1;
        }
        for &token in history.prompt.iter().chain(history.output) {
            if !std::mem::replace(&mut self.met[token as usize], true) {
                self.tokens.push(token);
            }
        }
    }

    fn clear(&mut self) {
        for token in self.tokens.drain(..) {
            self.output[token as usize] = 0;
            self.met[token as usize] = false;
        }
    }
}
