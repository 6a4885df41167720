//! From logits to probabilities and choices.

/// Replaces logits by their natural-log probabilities: `x - max - ln Σ e^(x - max)`, the sum in f64.
pub fn log_softmax(logits: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    for logit in logits {
        *logit = (f64::from(*logit - max) - total.ln()) as f32;
    }
}

/// Index of the greatest element; the first of equals, as in PyTorch. NaN is never the greatest.
///
/// `None` when there is no element that can be compared.
pub fn argmax(values: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (index, value) in values.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|best| values[best] < *value) {
            best = Some(index);
        }
    }
    best
}
