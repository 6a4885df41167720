//! From logits to probabilities.

use super::simd::{Kernel, LANES, Simd, padded};

/// Replaces logits by their natural-log probabilities.
pub(crate) struct LogSoftmax<'a> {
    pub(crate) logits: &'a mut [f32],
}

impl Kernel for LogSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let max = self.logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut totals = [0.0f64; LANES];
        let (vectors, tail) = self.logits.as_chunks::<LANES>();
        for vector in vectors {
            add_exp(simd, vector, max, &mut totals);
        }
        let mut last = [0.0f64; LANES];
        add_exp(simd, &padded(tail), max, &mut last);
        for (total, last) in totals.iter_mut().zip(&last[..tail.len()]) {
            *total += last;
        }
        let total = totals.iter().sum::<f64>().ln();
        for logit in self.logits {
            *logit = (f64::from(*logit - max) - total) as f32;
        }
    }
}

#[inline(always)]
fn add_exp<S: Simd>(simd: S, logits: &[f32; LANES], max: f32, totals: &mut [f64; LANES]) {
    let mut lanes = [0.0; LANES];
    simd.store(simd.exp(simd.sub(simd.load(logits), simd.splat(max))), &mut lanes);
    for (total, exp) in totals.iter_mut().zip(lanes) {
        *total += f64::from(exp);
    }
}
