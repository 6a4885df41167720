//! Log-probabilities as vLLM's `raw_logprobs` mode reports them: of the model's own logits, before anything that the
//! request does to them.

use tidemill_engine_core::request::{Logprobs, TokenId};
use tidemill_kernels::cuda::{LikelyToken, LogprobsSum};

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
    // Equal ones count, so that of two most likely tokens neither has rank 1; as in vLLM.
    let rank = logits.iter().filter(|logit| chosen <= **logit).count() as u32;
    finish(total(logits, greatest), greatest, chosen, rank, most_likely(logits, count as usize))
}

/// Log-probabilities of a row that a device has looked through.
///
/// # Errors
///
/// A logit is no number or infinite.
pub fn logprobs_of(sum: &LogprobsSum, likely: &[LikelyToken]) -> Result<Logprobs, SampleError> {
    let LogprobsSum { total, greatest, chosen, rank, .. } = *sum;
    finish(total, greatest, chosen, rank, likely.iter().map(|it| (it.token, it.logit)))
}

fn finish(
    total: f64,
    greatest: f32,
    chosen: f32,
    rank: u32,
    top: impl Iterator<Item = (TokenId, f32)>,
) -> Result<Logprobs, SampleError> {
    if !total.is_finite() {
        return Err(SampleError::NotFinite);
    }
    let logarithm = total.ln();
    let of = |logit: f32| (f64::from(logit - greatest) - logarithm) as f32;
    Ok(Logprobs { chosen: of(chosen), rank, top: top.map(|(token, logit)| (token, of(logit))).collect() })
}

/// The sum of likelihoods relative to the greatest, in the order of `logprobs` in `kernels/cu/sampling.cu`: by lanes, and then by halves.
fn total(logits: &[f32], greatest: f32) -> f64 {
    let mut lanes = [0.0; LANES];
    for piece in logits.chunks(LANES) {
        for (lane, &logit) in lanes.iter_mut().zip(piece) {
            *lane += f64::from(logit - greatest).exp();
        }
    }
    let mut half = LANES / 2;
    while 0 < half {
        let (sums, others) = lanes.split_at_mut(half);
        sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += *other);
        half /= 2;
    }
    lanes[0]
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

/// Threads of the kernel.
const LANES: usize = 512;
