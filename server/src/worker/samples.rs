//! Single steps and handoffs, measured from the sums that the engine publishes after each turn of its loop.
//!
//! A turn makes at most one step, so the differences between two turns are the sizes of single steps; what several
//! handoffs of one turn took is shared out evenly among them.

use std::sync::{Mutex, PoisonError};

use tidemill_engine::handle::Counters;

use crate::convert::Sample;

/// Collects samples until somebody takes them.
#[derive(Debug, Default)]
pub(super) struct Samples(Mutex<Collected>);

#[derive(Debug, Default)]
struct Collected {
    before: Counters,
    samples: Vec<Sample>,
}

impl Samples {
    /// Takes in the sums after a turn. Called on the engine thread: quick, and bounded when nobody takes.
    pub(super) fn add(&self, now: &Counters) {
        let mut collected = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut collected.before, *now);
        let tokens =
            now.prompt_tokens + now.generation_tokens - before.prompt_tokens - before.generation_tokens;
        if before.steps < now.steps && 0 < tokens {
            collected.push("iteration_tokens", tokens as f64);
        }
        let handoffs = now.handoffs - before.handoffs;
        for _ in 0..handoffs {
            let seconds = (now.handoff_seconds - before.handoff_seconds) / handoffs as f64;
            collected.push("handoff_seconds", seconds);
            let seconds =
                (now.handoff_head_start_seconds - before.handoff_head_start_seconds) / handoffs as f64;
            collected.push("handoff_head_start_seconds", seconds);
        }
    }

    /// What has been collected since the last call.
    pub(super) fn take(&self) -> Vec<Sample> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner).samples)
    }
}

impl Collected {
    fn push(&mut self, name: &str, value: f64) {
        if self.samples.len() < MOST {
            self.samples.push(Sample { name: name.to_owned(), value });
        }
    }
}

/// Samples between two statuses: far more than an engine makes in that time.
const MOST: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_and_each_handoff_is_a_sample() {
        let samples = Samples::default();
        let sums = |steps, prompt_tokens, generation_tokens, handoffs, handoff_seconds| Counters {
            steps,
            prompt_tokens,
            generation_tokens,
            handoffs,
            handoff_seconds,
            handoff_head_start_seconds: handoff_seconds / 2.0,
            ..Counters::default()
        };
        samples.add(&sums(1, 64, 0, 0, 0.0));
        samples.add(&sums(2, 70, 3, 0, 0.0));
        samples.add(&sums(2, 70, 3, 0, 0.0));
        samples.add(&sums(2, 70, 3, 2, 0.5));
        let taken: Vec<(String, f64)> = samples.take().into_iter().map(|it| (it.name, it.value)).collect();
        let expected = [
            ("iteration_tokens", 64.0),
            ("iteration_tokens", 9.0),
            ("handoff_seconds", 0.25),
            ("handoff_head_start_seconds", 0.125),
            ("handoff_seconds", 0.25),
            ("handoff_head_start_seconds", 0.125),
        ];
        assert_eq!(taken, expected.map(|(name, value)| (name.to_owned(), value)));
        assert!(samples.take().is_empty(), "each is taken once");
    }
}
