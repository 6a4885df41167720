//! Scores to weights, and sums that go on from tile to tile and from segment to segment.
//!
//! Weights are powers of two, `2^(score * log2 e - greatest)`, and `greatest` is rounded up to a whole number. A state
//! that moves to a greater one is then multiplied by a power of two, which rounds nothing.

use super::{
    dots::{Dots, Line},
    workspace::Parts,
};
use crate::{
    cpu::simd::{LEAST_POWER, Simd},
    matrix::PANEL,
};
use std::ops::Range;

impl Parts<'_> {
    /// Turns the scores of the keys that a query sees into factors, and adds them to the total in the state of a
    /// slot. `is_scaled`: values are to be multiplied by their scales.
    #[inline(always)]
    pub(super) fn weigh<D: Dots>(
        &mut self,
        dots: D,
        query: usize,
        slot: usize,
        keys: Range<usize>,
        is_scaled: bool,
    ) {
        let simd = dots.simd();
        let panels = keys.start / PANEL..keys.end.div_ceil(PANEL);
        let scores = &mut self.scores[query];
        // Of the panels at both ends, what is not visible weighs nothing.
        scores.as_flattened_mut()[panels.start * PANEL..keys.start].fill(f32::NEG_INFINITY);
        scores.as_flattened_mut()[keys.end..panels.end * PANEL].fill(f32::NEG_INFINITY);

        let mut greatest = simd.panel_splat(f32::NEG_INFINITY);
        for scores in &scores[panels.clone()] {
            greatest = simd.panel_max(simd.panel_f32(scores), greatest);
        }
        let [.., total, highest] = self.states.of(slot) else { unreachable!("a state has both") };
        let before = highest[0];
        let greatest = before.max(simd.panel_greatest(greatest).ceil());
        *highest = [greatest; PANEL];
        let factor = power_of_two(before - greatest);
        self.rescale[query] = factor;

        let offset = simd.panel_splat(-greatest);
        let mut sum = simd.panel_mul(simd.panel_f32(total), simd.panel_splat(factor));
        for panel in panels {
            let weights = simd.panel_exp2(simd.panel_add(simd.panel_f32(&scores[panel]), offset));
            sum = simd.panel_add(sum, weights);
            let weights = match is_scaled {
                true => simd.panel_mul(weights, simd.panel_f32(&self.value_scales[panel])),
                false => weights,
            };
            dots.factors(weights, bytemuck::cast_slice_mut(&mut scores[panel]));
        }
        simd.panel_store(sum, total);
    }
}

/// Adds the state of a later segment to that of all before it.
#[inline(always)]
pub(super) fn add_state<S: Simd>(simd: S, whole: &mut [Line], state: &[Line]) {
    let greatest = whole[whole.len() - 1][0].max(state[state.len() - 1][0]);
    let factor = |of: &[Line]| simd.panel_splat(power_of_two(of[of.len() - 1][0] - greatest));
    let (before, now) = (factor(whole), factor(state));
    let sums = whole.len() - 1;
    for (whole, state) in whole[..sums].iter_mut().zip(state) {
        let scaled = simd.panel_mul(simd.panel_f32(whole), before);
        simd.panel_store(simd.panel_fma(simd.panel_f32(state), now, scaled), whole);
    }
    whole[sums] = [greatest; PANEL];
}

/// Sums of values over the total of weights.
#[inline(always)]
pub(super) fn finish<S: Simd>(simd: S, state: &[Line], out: &mut [f32]) {
    let [sums @ .., total, _] = state else { unreachable!("a state has both") };
    let total = simd.panel_sum(simd.panel_f32(total));
    for (out, sum) in out.iter_mut().zip(sums.as_flattened()) {
        *out = sum / total;
    }
}

/// `2^n` of a whole number up to zero; zero where that is no normal number.
#[inline(always)]
fn power_of_two(n: f32) -> f32 {
    // What is no number comes of infinite scores, and their weights are none either: any factor will do.
    if n < LEAST_POWER { 0.0 } else { f32::from_bits(((n as i32 + 127) as u32) << 23) }
}
