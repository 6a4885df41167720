//! Taking times in turns, and what to make of them.

use std::time::{Duration, Instant};

/// The middle one.
pub(crate) fn median(times: &[Duration]) -> Duration {
    quantile(times, 0.5)
}

/// The one that a share `q` of all is not above.
///
/// # Panics
///
/// Without any.
pub(crate) fn quantile(times: &[Duration], q: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// How long it takes.
pub(crate) fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// CPU time of the calling thread so far: what others do beside it does not count.
pub(crate) fn thread_cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

/// CPU time that some work of this thread takes.
pub(crate) fn cpu_time(work: impl FnOnce()) -> Duration {
    let start = thread_cpu();
    work();
    thread_cpu().saturating_sub(start)
}

/// Times of two kinds of work, in turns, after one of each that does not count.
pub(crate) fn in_turns(
    rounds: usize,
    mut first: impl FnMut() -> Duration,
    mut second: impl FnMut() -> Duration,
) -> (Vec<Duration>, Vec<Duration>) {
    first();
    second();
    (0..rounds).map(|_| (first(), second())).unzip()
}

/// The median of second ÷ first, pair by pair: what disturbs both disturbs the ratio least.
pub(crate) fn ratio(first: &[Duration], second: &[Duration]) -> f64 {
    let mut ratios: Vec<f64> =
        first.iter().zip(second).map(|(first, second)| second.as_secs_f64() / first.as_secs_f64()).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

/// Bytes per second in gigabytes.
pub(crate) fn gigabytes_per_second(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}
