//! Log-probabilities as vLLM's `raw_logprobs` mode reports them: of the model's own logits, before anything that the
//! request does to them.

use tidemill_engine_core::request::{Logprobs, TokenId};

use super::SampleError;

/// Log-probabilities of `token` and of the `count` most likely tokens, from logits of one row.
///
/// # Errors
///
/// A logit is no number or infinite, or there is no such token.
pub fn logprobs(logits: &[f32], token: TokenId, count: u32) -> Result<Logprobs, SampleError> {
    let vocab_size = logits.len();
    let chosen = *logits.get(token as usize).ok_or(SampleError::UnknownToken { token, vocab_size })?;
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&logit| f64::from(logit - greatest).exp()).sum();
    if !total.is_finite() {
        return Err(SampleError::NotFinite);
    }
    let of = |logit: f32| (f64::from(logit - greatest) - total.ln()) as f32;
    Ok(Logprobs {
        chosen: of(chosen),
        // Equal ones count, so that of two most likely tokens neither has rank 1; as in vLLM.
        rank: logits.iter().filter(|logit| chosen <= **logit).count() as u32,
        top: most_likely(logits, count as usize).map(|(token, logit)| (token, of(logit))).collect(),
    })
}

/// The `count` greatest logits, greatest first, equal ones by rising id.
fn most_likely(logits: &[f32], count: usize) -> impl Iterator<Item = (TokenId, f32)> {
    let count = count.min(logits.len());
    let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    for (token, &logit) in logits.iter().enumerate() {
        if best.len() == count && best.last().is_none_or(|(_, least)| logit <= *least) {
            continue;
        }
        let place = best.partition_point(|(_, other)| logit <= *other);
        best.insert(place, (token as TokenId, logit));
        best.truncate(count);
    }
    best.into_iter()
}
