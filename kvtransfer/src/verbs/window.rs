//! How many bytes may be under way on one path.
//!
//! One-sided writes are not slowed down by the receiver's software, so the sender has to find out how fast the path
//! takes them: from the rate at which writes complete and the least time that one took. Twice their product keeps a
//! fast path busy, and leaves little standing in front of a receiver to which many send at once.

use std::collections::VecDeque;
use std::time::Duration;

/// Flow control of one path. Time is whatever the caller counts from any fixed moment.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    bounds: Bounds,
    limit: u64,
    in_flight: u64,
    delivered: u64,
    /// Rates in bytes per second, the latest last.
    rates: VecDeque<f64>,
    /// Least completion time, and when it was seen.
    fastest: Option<(Duration, Duration)>,
    /// While the least time is measured anew.
    remeasuring: Option<Remeasuring>,
}

/// The least completion time only shows when nothing else stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remeasuring {
    /// Until little is under way.
    Draining,
    /// What is posted from then on counts.
    Since(Duration),
}

/// Least and most bytes of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// What is always allowed, so that rates can be seen at all.
    pub(crate) least: u64,
    /// What is never exceeded.
    pub(crate) most: u64,
}

/// A write under way, as the window remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    len: u64,
    posted: Duration,
    /// Bytes that had been delivered by then.
    delivered: u64,
}

impl Window {
    pub(crate) fn new(bounds: Bounds) -> Self {
        let limit = bounds.most;
        Self {
            bounds,
            limit,
            in_flight: 0,
            delivered: 0,
            rates: VecDeque::new(),
            fastest: None,
            remeasuring: None,
        }
    }

    /// Whether that many bytes may be posted now. An idle path takes a write of any length.
    pub(crate) fn admits(&self, len: u64) -> bool {
        self.in_flight == 0 || self.in_flight + len <= self.limit
    }

    /// Bytes under way.
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Bytes that may be under way.
    #[cfg(test)]
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes per second of late, once something has completed.
    pub(crate) fn rate(&self) -> Option<f64> {
        self.rates.iter().copied().reduce(f64::max)
    }

    /// A write was posted.
    pub(crate) fn post(&mut self, len: u64, now: Duration) -> Ticket {
        self.in_flight += len;
        Ticket { len, posted: now, delivered: self.delivered }
    }

    /// It has completed.
    pub(crate) fn complete(&mut self, ticket: Ticket, now: Duration) {
        self.in_flight -= ticket.len;
        self.delivered += ticket.len;
        let took = now.saturating_sub(ticket.posted).max(Duration::from_nanos(1));
        let rate = (self.delivered - ticket.delivered) as f64 / took.as_secs_f64();
        if self.rates.len() == RATES {
            self.rates.pop_front();
        }
        self.rates.push_back(rate);
        self.measure(ticket, took, now);
        self.adjust();
    }

    fn measure(&mut self, ticket: Ticket, took: Duration, now: Duration) {
        if self.fastest.is_none_or(|(least, _)| took <= least) {
            self.fastest = Some((took, now));
            self.remeasuring = None;
        }
        match self.remeasuring {
            Some(Remeasuring::Since(since)) if since <= ticket.posted => {
                self.fastest = Some((took, now));
                self.remeasuring = None;
            }
            Some(Remeasuring::Draining) if self.in_flight <= self.bounds.least => {
                self.remeasuring = Some(Remeasuring::Since(now));
            }
            None if self.fastest.is_some_and(|(_, seen)| FORGET_FASTEST < now.saturating_sub(seen)) => {
                self.remeasuring = Some(Remeasuring::Draining);
            }
            _ => {}
        }
    }

    /// It will never complete: its path is dead.
    pub(crate) fn forget(&mut self, ticket: Ticket) {
        self.in_flight -= ticket.len;
    }

    fn adjust(&mut self) {
        let (Some(rate), Some((fastest, _))) = (self.rate(), self.fastest) else { return };
        let product = GAIN * rate * fastest.as_secs_f64();
        self.limit = match self.remeasuring {
            Some(_) => self.bounds.least,
            None => (product as u64).clamp(self.bounds.least, self.bounds.most),
        };
    }
}

/// Completions over which the best rate is taken: long enough to see past a hiccup.
const RATES: usize = 32;
/// Room for the time between a completion and the next post.
const GAIN: f64 = 2.0;
/// A path may have become longer for good. The look costs one time around with little under way.
const FORGET_FASTEST: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 1 << 20;
    const BOUNDS: Bounds = Bounds { least: 2 * CHUNK, most: 64 * CHUNK };

    /// A path that takes `rate` bytes per second, one write after another, each `delay` longer on its way.
    struct Path {
        rate: f64,
        delay: Duration,
        free_at: Duration,
        under_way: VecDeque<(Duration, Ticket)>,
    }

    impl Path {
        /// Keeps the window full for that long; returns bytes per second and the most that stood in the queue.
        fn run(&mut self, window: &mut Window, from: Duration, span: Duration) -> (f64, u64) {
            let (mut now, mut moved, mut most) = (from, 0, 0);
            while now < from + span {
                while window.admits(CHUNK) {
                    let start = self.free_at.max(now);
                    self.free_at = start + Duration::from_secs_f64(CHUNK as f64 / self.rate);
                    self.under_way.push_back((self.free_at + self.delay, window.post(CHUNK, now)));
                }
                most = most.max(window.in_flight());
                let (done, ticket) = self.under_way.pop_front().expect("the window was filled");
                now = done;
                window.complete(ticket, now);
                moved += CHUNK;
            }
            (moved as f64 / span.as_secs_f64(), most)
        }
    }

    #[test]
    fn a_window_fills_the_path_and_not_much_more() {
        #[rustfmt::skip]
        let rows = [
            // name                                rate    delay             at least  at most in flight
            ("a fast path in one rack",            12.5e9, 10,               0.95,     4 * CHUNK),
            ("a fast path between buildings",      12.5e9, 1_000,            0.90,     40 * CHUNK),
            ("a slow path",                        0.1e9,  50,               0.95,     4 * CHUNK),
        ];
        for (name, rate, delay, at_least, at_most) in rows {
            let delay = Duration::from_micros(delay);
            let mut path = Path { rate, delay, free_at: Duration::ZERO, under_way: VecDeque::new() };
            let mut window = Window::new(BOUNDS);
            let second = Duration::from_secs(1);
            path.run(&mut window, Duration::ZERO, 11 * second); // What stood in the queue at first is forgotten.
            let (moved, most) = path.run(&mut window, 11 * second, second);
            assert!(at_least * rate <= moved, "{name}: {moved} of {rate} bytes per second");
            assert!(most <= at_most, "{name}: {most} bytes in flight");
        }
    }

    #[test]
    fn a_receiver_that_slows_down_gets_less_at_a_time() {
        let delay = Duration::from_millis(1);
        let mut path = Path { rate: 10e9, delay, free_at: Duration::ZERO, under_way: VecDeque::new() };
        let mut window = Window::new(BOUNDS);
        let second = Duration::from_secs(1);
        path.run(&mut window, Duration::ZERO, second);
        let before = window.limit();
        path.rate = 1e9;
        path.run(&mut window, second, second);
        assert!(window.limit() * 4 < before, "{} of {before}", window.limit());
    }

    #[test]
    fn what_never_completes_is_given_back() {
        let mut window = Window::new(Bounds { least: 10, most: 10 });
        assert!(window.admits(1000), "an idle path takes a write of any length");
        let ticket = window.post(1000, Duration::ZERO);
        assert!(!window.admits(1));
        window.forget(ticket);
        assert!(window.admits(10) && window.in_flight() == 0);
    }
}
