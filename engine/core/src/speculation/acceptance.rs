//! How often guesses were right, by how much spoke for them.
//!
//! What spoke for a guess is a small number: for prompt lookup, how many tokens before it match. Old observations fade,
//! since a text goes from quoting to telling and back.

/// Observed rates, one for each strength of evidence.
#[derive(Clone, Debug)]
pub(super) struct Acceptance {
    counts: [Count; CLASSES],
    /// What is left of an observation after the next one.
    keep: f32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    right: f32,
    all: f32,
}

impl Acceptance {
    /// Nothing observed. `memory` is how many observations count, about.
    pub(super) fn new(memory: f32) -> Self {
        Self { counts: [Count::default(); CLASSES], keep: 1.0 - 1.0 / memory }
    }

    /// A guess with this much evidence was right or wrong.
    pub(super) fn record(&mut self, evidence: usize, right: bool) {
        let count = &mut self.counts[class(evidence)];
        count.right = count.right * self.keep + f32::from(u8::from(right));
        count.all = count.all * self.keep + 1.0;
    }

    /// The chance that a guess with this much evidence is right, where `prior` is the chance before anything was
    /// observed and is worth `weight` observations.
    pub(super) fn chance(&self, evidence: usize, prior: f32, weight: f32) -> f32 {
        let count = self.counts[class(evidence)];
        (count.right + prior * weight) / (count.all + weight)
    }
}

fn class(evidence: usize) -> usize {
    evidence.min(CLASSES - 1)
}

/// Longer matches are as good as sure, or as hopeless, as those of this length.
const CLASSES: usize = 17;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances() {
        type Row<'a> = (&'a str, &'a [(usize, bool)], usize, f32);
        #[rustfmt::skip]
        let rows: [Row<'_>; 6] = [
            ("nothing observed: the prior",          &[],                            2, 0.5),
            ("right ones raise it",                  &[(2, true), (2, true)],        2, 0.75),
            ("wrong ones lower it",                  &[(2, false), (2, false)],      2, 0.25),
            ("other evidence says nothing",          &[(3, false), (1, false)],      2, 0.5),
            ("beyond the last class all are alike",  &[(40, true), (400, true)],     90, 0.75),
            ("both kinds are weighed",               &[(2, true), (2, false)],       2, 0.5),
        ];
        for (row, observed, evidence, expected) in rows {
            let mut acceptance = Acceptance::new(1000.0);
            observed.iter().for_each(|(evidence, right)| acceptance.record(*evidence, *right));
            let found = acceptance.chance(evidence, 0.5, 2.0);
            assert!((found - expected).abs() < 0.01, "{row}: {found}");
        }
    }

    #[test]
    fn old_observations_fade() {
        let mut acceptance = Acceptance::new(10.0);
        (0..1000).for_each(|_| acceptance.record(5, true));
        (0..30).for_each(|_| acceptance.record(5, false));
        assert!(acceptance.chance(5, 0.5, 1.0) < 0.1);
    }
}
