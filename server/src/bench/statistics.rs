//! What many numbers come to.

/// Numbers, sorted. All that is said of them is NaN where there are none, and so can be told from zero.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Distribution(Vec<f64>);

impl Distribution {
    pub(super) fn new(numbers: impl IntoIterator<Item = f64>) -> Self {
        let mut numbers: Vec<f64> = numbers.into_iter().collect();
        numbers.sort_by(f64::total_cmp);
        Self(numbers)
    }

    /// The numbers, smallest first.
    pub(super) fn sorted(&self) -> &[f64] {
        &self.0
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// Of these numbers, not an estimate for more of their kind: numpy's `std`, as vLLM uses it.
    pub(super) fn std(&self) -> f64 {
        let mean = self.mean();
        (self.0.iter().map(|number| (number - mean).powi(2)).sum::<f64>() / self.0.len() as f64).sqrt()
    }

    pub(super) fn median(&self) -> f64 {
        self.percentile(50.0)
    }

    /// Between two numbers, in proportion: numpy's `percentile`, as vLLM uses it.
    pub(super) fn percentile(&self, percent: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else { return f64::NAN };
        let place = percent / 100.0 * last as f64;
        let below = (place.floor() as usize).min(last);
        let above = (below + 1).min(last);
        self.0[below] + (self.0[above] - self.0[below]) * (place - below as f64)
    }

    pub(super) fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }
}

/// The most intervals, from begin to end each, that hold one moment in common.
pub(super) fn most_at_once(intervals: impl IntoIterator<Item = (f64, f64)>) -> usize {
    // An interval that ends when another begins does not overlap it: ends come first.
    let mut changes: Vec<(f64, i64)> =
        intervals.into_iter().flat_map(|(begin, end)| [(begin, 1), (end, -1)]).collect();
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut now = 0_i64;
    let most = changes.iter().map(|(_, change)| {
        now += change;
        now
    });
    most.max().unwrap_or(0).try_into().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_numpy() {
        // numpy.mean, std, and percentile with its default method, of the same lists.
        type Row<'a> = (&'a str, &'a [f64], f64, f64, [f64; 4]);
        #[rustfmt::skip]
        let rows: [Row<'_>; 4] = [
            // name          numbers                        mean  std                 p0, p50, p90, p99
            ("one",          &[3.0],                        3.0,  0.0,                [3.0, 3.0, 3.0, 3.0]),
            ("two",          &[4.0, 1.0],                   2.5,  1.5,                [1.0, 2.5, 3.7, 3.97]),
            ("unsorted",     &[5.0, 1.0, 4.0, 2.0, 3.0],    3.0,  std::f64::consts::SQRT_2,  [1.0, 3.0, 4.6, 4.96]),
            ("an outlier",   &[1.0, 1.0, 1.0, 1.0, 101.0],  21.0, 40.0,               [1.0, 1.0, 61.0, 97.0]),
        ];
        for (name, numbers, mean, std, percentiles) in rows {
            let found = Distribution::new(numbers.iter().copied());
            let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
            assert!(close(found.mean(), mean), "{name}: mean {}", found.mean());
            assert!(close(found.std(), std), "{name}: std {}", found.std());
            for (percent, expected) in [0.0, 50.0, 90.0, 99.0].into_iter().zip(percentiles) {
                let found = found.percentile(percent);
                assert!(close(found, expected), "{name}: p{percent} {found}, not {expected}");
            }
            assert!(close(found.percentile(100.0), found.max()), "{name}");
        }
    }

    #[test]
    fn nothing_is_not_zero() {
        let none = Distribution::default();
        for number in [none.mean(), none.std(), none.median(), none.percentile(99.0), none.max()] {
            assert!(number.is_nan());
        }
    }

    #[test]
    fn overlaps_are_counted() {
        type Row<'a> = (&'a str, &'a [(f64, f64)], usize);
        #[rustfmt::skip]
        let rows: [Row<'_>; 5] = [
            ("none",              &[],                                     0),
            ("one",               &[(0.0, 1.0)],                           1),
            ("one after another", &[(0.0, 1.0), (1.0, 2.0)],               1),
            ("nested",            &[(0.0, 9.0), (1.0, 2.0), (1.5, 8.0)],   3),
            ("in two groups",     &[(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)],   2),
        ];
        for (name, intervals, expected) in rows {
            assert_eq!(most_at_once(intervals.iter().copied()), expected, "{name}");
        }
    }
}
