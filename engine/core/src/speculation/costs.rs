//! What a step costs with so many drafted tokens, as measured.
//!
//! A step that only decodes reads all weights once, however few rows it has; more rows are nearly free until computing
//! takes longer than reading, and where that is depends on model, kernels, cores and on who else uses the machine. So it
//! is measured: medians of the last few steps, for each number of sequences. What was measured long ago is forgotten and
//! taken for free until it is measured again, which makes the rare probes that notice a change.

use std::collections::BTreeMap;
use std::time::Duration;

/// Times of steps that only decode.
#[derive(Clone, Debug, Default)]
pub(super) struct StepCosts {
    /// By sequences, then by drafted tokens of all of them.
    measured: BTreeMap<u32, BTreeMap<u32, Recent>>,
    /// Steps so far.
    step: u64,
}

/// Costs of a step with a certain number of sequences, relative to one without drafts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CostCurve {
    /// Drafted tokens, and the cost: rising, from (0, 1).
    points: Vec<(u32, f32)>,
}

/// The last few measurements of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Recent {
    seconds: [f32; KEPT],
    count: usize,
    /// Step of the last one.
    at: u64,
}

impl StepCosts {
    /// A step with so many sequences that each decode, and so many drafted tokens, took so long.
    pub(super) fn record(&mut self, sequences: u32, drafted: u32, took: Duration) {
        self.step += 1;
        let step = self.step;
        if step.is_multiple_of(FORGOTTEN_AFTER) {
            for curve in self.measured.values_mut() {
                curve.retain(|_, recent| recent.is_fresh(step));
            }
            self.measured.retain(|_, curve| !curve.is_empty());
        }
        let recent = self.measured.entry(sequences).or_default().entry(drafted).or_default();
        if !recent.is_fresh(step) {
            *recent = Recent::default();
        }
        recent.seconds[recent.count % KEPT] = took.as_secs_f32();
        recent.count += 1;
        recent.at = step;
    }

    /// What steps with so many sequences cost; `None` while it is not known what they cost without drafts.
    pub(super) fn curve(&self, sequences: u32) -> Option<CostCurve> {
        let plain = self.plain(sequences)?;
        let measured = self.measured.get(&sequences)?;
        let points = measured.iter().filter(|(_, recent)| recent.is_fresh(self.step));
        Some(CostCurve { points: points.map(|(drafted, it)| (*drafted, it.median() / plain)).collect() })
    }

    /// Seconds that a step with so many sequences takes without drafts, if that is known.
    pub(super) fn plain(&self, sequences: u32) -> Option<f32> {
        let recent = self.measured.get(&sequences)?.get(&0)?;
        (recent.is_fresh(self.step) && PLAIN_NEEDED <= recent.count).then(|| recent.median())
    }
}

impl CostCurve {
    /// The curve of a step that also computes prompts: it is bound by computing, so all of its `rows` cost the same.
    pub(super) fn proportional(rows: u32, drafted: u32) -> Self {
        let most = (rows + drafted) as f32 / rows as f32;
        Self { points: vec![(0, 1.0), (drafted, most)] }
    }

    /// The cost of a step with so many drafted tokens: between two measured numbers in proportion. Beyond the last it is
    /// hoped to be no more than there, and so it is right between two neighbours, since kernels take rows by fours or
    /// eights and one more can cost nothing.
    pub(super) fn at(&self, drafted: u32) -> f32 {
        let above = self.points.partition_point(|(number, _)| *number < drafted);
        let below = self.points[above.saturating_sub(1)];
        match self.points.get(above) {
            Some(&(number, _)) if drafted < number && number - below.0 == 2 => below.1,
            Some(&(number, cost)) if below.0 < number => {
                let share = drafted.saturating_sub(below.0) as f32 / (number - below.0) as f32;
                below.1 + (cost - below.1) * share
            }
            Some(&(_, cost)) => cost,
            None => below.1,
        }
    }

    /// The most drafted tokens to try: not far beyond what was measured.
    pub(super) fn reach(&self) -> u32 {
        let last = self.points.last().expect("a curve begins without drafts").0;
        last.saturating_mul(2).max(FIRST_REACH)
    }
}

impl Recent {
    const fn is_fresh(&self, step: u64) -> bool {
        self.count == 0 || step - self.at < FORGOTTEN_AFTER
    }

    fn median(&self) -> f32 {
        let mut seconds = self.seconds;
        let known = &mut seconds[..self.count.min(KEPT)];
        known.sort_unstable_by(f32::total_cmp);
        known[(known.len() - 1) / 2]
    }
}

/// Measurements kept of each kind; the median of so many survives two that were disturbed.
const KEPT: usize = 5;

/// Measurements without drafts before there is a curve: everything is compared with them.
const PLAIN_NEEDED: usize = 3;

/// Steps after which a measurement is forgotten.
const FORGOTTEN_AFTER: u64 = 512;

/// Drafted tokens to try while nothing with drafts was measured.
const FIRST_REACH: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn curves() {
        let mut costs = StepCosts::default();
        assert_eq!(costs.curve(1), None, "nothing is known");
        costs.record(1, 0, ms(10));
        costs.record(1, 0, ms(10));
        assert_eq!(costs.curve(1), None, "two plain steps are not enough");
        costs.record(1, 0, ms(90));
        let curve = costs.curve(1).unwrap();
        assert_eq!((curve.at(5), curve.reach()), (1.0, 2), "what is not known is hoped to be free");
        costs.record(1, 4, ms(20));
        costs.record(1, 8, ms(40));
        let curve = costs.curve(1).unwrap();
        let found: Vec<f32> = [0, 1, 2, 4, 6, 8, 100].into_iter().map(|drafted| curve.at(drafted)).collect();
        assert_eq!(found, [1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 4.0]);
        assert_eq!(curve.reach(), 16);
        costs.record(1, 6, ms(40));
        let curve = costs.curve(1).unwrap();
        assert_eq!((curve.at(5), curve.at(7)), (2.0, 4.0), "right between two it is hoped to be as below");
        assert_eq!(costs.curve(2), None, "another number of sequences is another matter");
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let mut costs = StepCosts::default();
        costs.record(1, 4, ms(99));
        (0..FORGOTTEN_AFTER - 1).for_each(|_| costs.record(1, 0, ms(10)));
        assert!(1.0 < costs.curve(1).unwrap().at(4));
        costs.record(1, 0, ms(10));
        assert_eq!(costs.curve(1).unwrap().at(4), 1.0, "it will be probed again");
        (0..FORGOTTEN_AFTER).for_each(|_| costs.record(1, 4, ms(10)));
        assert_eq!(costs.curve(1), None, "a plain step is due");
        (0..2 * FORGOTTEN_AFTER).for_each(|_| costs.record(7, 0, ms(10)));
        assert_eq!(costs.measured.len(), 1, "what nobody asks for takes no memory");
    }

    #[test]
    fn a_disturbed_step_does_not_count() {
        let mut costs = StepCosts::default();
        (0..5).for_each(|_| costs.record(1, 0, ms(10)));
        for took in [20, 500, 20, 20, 900] {
            costs.record(1, 3, ms(took));
        }
        assert_eq!(costs.curve(1).unwrap().at(3), 2.0);
    }

    #[test]
    fn beside_a_prompt_each_row_costs_the_same() {
        let curve = CostCurve::proportional(100, 10);
        assert!((curve.at(5) - 1.05).abs() < 1e-6);
        assert_eq!(curve.reach(), 20);
    }
}
