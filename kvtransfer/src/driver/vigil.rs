//! Staying awake for an order that is about to come.
//!
//! To be woken takes a thread 10 µs and more, on a virtual machine that was idle much more: as long as all the rest of a
//! handoff that moves no byte. An engine says when a prompt is computed, and the first token is known soon after: for a
//! small model within microseconds, for a large one in milliseconds. So it is learned how long that takes, and the thread
//! stays awake only where it is not longer than a wake-up is worth; it gives the processor to whoever else wants it.

use std::time::{Duration, Instant};

/// Whether to stay awake, and for how long.
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

    /// Looks for an order again and again while one is about to come, unless the last one took too long. Returns the one
    /// that came.
    pub(super) fn keep<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let until = self.since.filter(|_| self.last <= LONGEST)? + LONGEST;
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if until <= Instant::now() {
                return None;
            }
            std::thread::yield_now();
        }
    }
}

/// What a wake-up is worth.
const LONGEST: Duration = Duration::from_micros(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_awake_only_for_what_comes_soon() {
        let mut vigil = Vigil::default();
        let looks = |vigil: &mut Vigil| {
            let mut looks = 0;
            let found = vigil.keep(|| {
                looks += 1;
                (looks == 2).then_some(())
            });
            (looks, found.is_some())
        };
        assert_eq!(looks(&mut vigil), (0, false), "nothing is about to come");
        let later = Instant::now() + Duration::from_secs(60);
        vigil.begin(later);
        assert_eq!(looks(&mut vigil), (2, true), "it is awake until it comes");
        vigil.end(later + 2 * LONGEST);
        assert_eq!(looks(&mut vigil), (0, false), "it has come");
        vigil.begin(later);
        assert_eq!(looks(&mut vigil), (0, false), "the last one took too long");
        vigil.end(later + LONGEST);
        vigil.begin(later);
        assert_eq!(looks(&mut vigil), (2, true), "the last one was quick again");
    }
}
