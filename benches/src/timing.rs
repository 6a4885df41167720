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
    middle(
        first.iter().zip(second).map(|(first, second)| second.as_secs_f64() / first.as_secs_f64()).collect(),
    )
}

/// The middle one of numbers.
///
/// # Panics
///
/// Without any.
pub(crate) fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Numbers that look random and are the same in each run (xorshift64*).
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) const fn new() -> Self {
        Self(1)
    }

    /// Between -1 and 1.
    pub(crate) fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.bits() >> 33) as usize % bound
    }

    const fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// Bytes per second in gigabytes.
pub(crate) fn gigabytes_per_second(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}
