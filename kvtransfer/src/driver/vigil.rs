//! Staying awake for an order that is about to come.
//!
//! To be woken takes a thread 10 µs and more, on a virtual machine that was idle much more: as long as all the rest of a
//! handoff that moves no byte. An engine says when a prompt is computed, and the first token is known soon after: for a
//! small model within microseconds, for a large one in milliseconds, and each time in about the same. So it is learned how
//! long that takes, and the thread is awake around the moment when the order should come: not longer than a wake-up is
//! worth, and it gives the processor to whoever else wants it.

use std::time::{Duration, Instant};

/// Whether to stay awake, and when.
#[derive(Debug, Default)]
pub(super) struct Vigil {
    /// Since when the order is awaited.
    since: Option<Instant>,
    /// How long the last one took to come.
    last: Duration,
}

impl Vigil {
    /// An order is about to come.
    pub(super) fn begin(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// It has come.
    pub(super) fn end(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.last = now.saturating_duration_since(since);
        }
    }

    /// When to be awake for an order that is about to come, if that is later than `now`: a thread may sleep until then.
    pub(super) fn opens(&self, now: Instant) -> Option<Instant> {
        self.opening().filter(|&opening| now < opening)
    }

    /// Looks for an order again and again while it should come. Returns the one that came.
    pub(super) fn keep<T>(
        &self,
        now: impl Fn() -> Instant,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let opening = self.opening()?;
        if now() < opening {
            return None;
        }
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if opening + LONGEST <= now() {
                return None;
            }
            std::thread::yield_now();
        }
    }

    fn opening(&self) -> Option<Instant> {
        self.since.map(|since| since + self.last.saturating_sub(EARLY))
    }
}

/// How long one is awake at most: what a wake-up is worth.
const LONGEST: Duration = Duration::from_micros(200);
/// How long before the moment when the order should come: what a wake-up takes, and half of what is left.
const EARLY: Duration = Duration::from_micros(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_awake_when_the_order_should_come() {
        let begun = Instant::now();
        let micros = |count| begun + Duration::from_micros(count);
        // (what the last one took, when it is looked for, how often then, and until when a thread may sleep), all in µs
        #[rustfmt::skip]
        let rows = [
            ("nothing is known yet",            0,     0, 2, None),
            ("nothing is known, too late",      0,   200, 1, None),
            ("a quick one is awaited at once", 90,     0, 2, None),
            ("too early for a long one",     3120,     0, 0, Some(3000)),
            ("still too early",              3120,  2999, 0, Some(3000)),
            ("it should come now",           3120,  3000, 2, None),
            ("it is a little late",          3120,  3199, 2, None),
            ("nobody waits for long",        3120,  3200, 1, None),
        ];
        for (name, last, at, looks, alarm) in rows {
            let mut vigil = Vigil::default();
            vigil.begin(begun);
            vigil.end(micros(last));
            let mut count = 0;
            let mut look = || {
                count += 1;
                (count == 2).then_some(())
            };
            assert_eq!(vigil.keep(|| micros(at), &mut look), None, "{name}: nothing is about to come");
            vigil.begin(begun);
            let found = vigil.keep(|| micros(at), &mut look);
            assert_eq!((count, found.is_some()), (looks, looks == 2), "{name}");
            assert_eq!(vigil.opens(micros(at)), alarm.map(micros), "{name}");
        }
    }
}
