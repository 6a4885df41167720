//! When requests arrive: drawn before the run, so that no answer can change it.

use std::time::Duration;

use super::draws::Draws;
use super::flags::Rate;

/// The times, from the start of the run, of `count` arrivals: at `rate` per second on average, the pauses gamma
/// distributed with shape `burstiness`. The first arrives at once.
pub(super) fn arrivals(count: usize, rate: Rate, burstiness: Rate, seed: u64) -> Vec<Duration> {
    let mut draws = Draws::new(seed, PURPOSE);
    let mut now = 0.0;
    let mut pause = || match (rate.0, burstiness.0) {
        (f64::INFINITY, _) => 0.0,
        (rate, f64::INFINITY) => 1.0 / rate,
        (rate, shape) => draws.gamma(shape) / rate,
    };
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        times.push(Duration::try_from_secs_f64(now).unwrap_or(Duration::MAX));
        now += pause();
    }
    times
}

/// How that is said.
pub(super) fn describe(rate: Rate, burstiness: Rate) -> String {
    match (rate.0, burstiness.0) {
        (f64::INFINITY, _) => "all at once".to_owned(),
        (rate, f64::INFINITY) => format!("{rate} per second, evenly"),
        (rate, 1.0) => format!("{rate} per second, Poisson"),
        (rate, shape) => format!("{rate} per second, gamma of shape {shape}"),
    }
}

/// Keeps arrivals apart from other uses of a seed.
const PURPOSE: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn pauses(rate: f64, burstiness: f64) -> Vec<f64> {
        let times = arrivals(50_001, Rate(rate), Rate(burstiness), 7);
        times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect()
    }

    #[test]
    fn pauses_have_the_rate_and_the_spread_that_was_asked_for() {
        #[rustfmt::skip]
        let rows = [
            // name            rate   shape           spread ÷ mean
            ("clockwork",      4.0,   f64::INFINITY,  0.0),
            ("Poisson",        4.0,   1.0,            1.0),
            ("bursts",         4.0,   0.25,           2.0),
            ("nearly even",    100.0, 100.0,          0.1),
        ];
        for (name, rate, shape, spread) in rows {
            let pauses = pauses(rate, shape);
            let mean = pauses.iter().sum::<f64>() / pauses.len() as f64;
            let variance = pauses.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / pauses.len() as f64;
            assert!((mean * rate - 1.0).abs() < 0.03, "{name}: mean {mean}");
            assert!((variance.sqrt() / mean - spread).abs() < 0.05, "{name}: {}", variance.sqrt() / mean);
        }
    }

    #[test]
    fn a_poisson_process_has_exponential_pauses() {
        // The largest distance between the two distributions, by Kolmogorov and Smirnov.
        let mut pauses = pauses(10.0, 1.0);
        pauses.sort_by(f64::total_cmp);
        let count = pauses.len() as f64;
        let distance =
            |(index, pause): (usize, &f64)| ((index as f64 / count) - (1.0 - (-10.0 * pause).exp())).abs();
        let worst = pauses.iter().enumerate().map(distance).fold(0.0, f64::max);
        assert!(worst < 1.36 / count.sqrt(), "distance {worst}");
    }

    #[test]
    fn seeds_repeat_and_differ_and_infinity_is_now() {
        let made = |seed| arrivals(20, Rate(3.0), Rate(1.0), seed);
        assert_eq!(made(1), made(1));
        assert_ne!(made(1), made(2));
        assert_eq!(made(1)[0], Duration::ZERO);
        assert!(made(1).is_sorted());
        assert_eq!(arrivals(5, Rate(f64::INFINITY), Rate(1.0), 0), [Duration::ZERO; 5]);
    }
}
