//! Staying awake for what is about to come.
//!
//! To be woken takes a thread 10 µs and more, on a virtual machine that was idle much more: as long as all the rest of a
//! handoff that moves no byte. An engine says when a prompt is computed, and the first token is known soon after: for a
//! small model within microseconds, for a large one in milliseconds, and each time in about the same. So it is learned how
//! long that takes, and the thread is awake around the moment when the order should come ([`Vigil`]). It tells the peer then, whose
//! thread is awake for the commit ([`Watch`]). Neither is awake for long, and both give the processor to
//! whoever else wants it. Who has to wait long to get it back is better off asleep: one who is woken gets it before one who
//! was only looking. So where that happens they sleep the next few times.

use std::time::{Duration, Instant};

use tidemill_kvtransfer_proto::units::HandoffId;

/// Whether to stay awake for an order of the engine, and when.
#[derive(Debug, Default)]
pub(super) struct Vigil {
    /// What is awaited, and since when.
    awaited: Option<(HandoffId, Instant)>,
    /// How long the last one took to come.
    last: Duration,
    /// Whether the peer has to be told when it opens.
    is_to_be_told: bool,
    manners: Manners,
}

/// Whether to stay awake for a peer's commit: on the endpoint's thread, and on the engine's.
#[derive(Debug, Default)]
pub struct Watch {
    until: Option<Instant>,
    manners: Manners,
}

/// What is known of others that want the processor.
#[derive(Debug, Default)]
struct Manners {
    /// How often to sleep before it is tried again to be awake.
    naps: u32,
}

impl Vigil {
    /// The order to finish that handoff is about to come.
    pub(super) fn begin(&mut self, handoff: HandoffId, now: Instant) {
        self.awaited = Some((handoff, now));
        // It has just heard of the last blocks, and sleeps again by then.
        self.is_to_be_told = EARLY < self.last;
        self.manners.nap();
    }

    /// It has come.
    pub(super) fn end(&mut self, now: Instant) {
        if let Some((_, since)) = self.awaited.take() {
            self.last = now.saturating_duration_since(since);
        }
    }

    /// When to be awake for an order that is about to come, if that is later than `now`: a thread may sleep until then.
    pub(super) fn opens(&self, now: Instant) -> Option<Instant> {
        self.opening().filter(|&opening| now < opening)
    }

    /// The handoff that is awaited, once, if that began to be so while this thread slept.
    pub(super) fn opened(&mut self, now: Instant) -> Option<HandoffId> {
        let (handoff, _) = self.awaited?;
        let is_open = self.opening().is_some_and(|opening| opening <= now);
        let is_told = is_open && std::mem::take(&mut self.is_to_be_told);
        is_told.then_some(handoff)
    }

    /// Looks for an order again and again while it should come. Returns the one that came.
    pub(super) fn keep<T>(
        &mut self,
        now: impl Fn() -> Instant,
        look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let opening = self.opening()?;
        if now() < opening {
            return None;
        }
        self.manners.look_until(opening + LONGEST, now, look)
    }

    fn opening(&self) -> Option<Instant> {
        self.awaited.map(|(_, since)| since + self.last.saturating_sub(EARLY))
    }
}

impl Watch {
    /// A peer gave a sign that its commit is about to come.
    pub fn begin(&mut self, now: Instant) {
        self.until = Some(now + LONGEST);
        self.manners.nap();
    }

    /// It has come.
    pub fn end(&mut self) {
        self.until = None;
    }

    /// Looks again and again whether something has come, if the commit of a peer should. Whether it has.
    pub fn keep(&mut self, now: impl Fn() -> Instant, mut look: impl FnMut() -> bool) -> bool {
        let Some(until) = self.until else { return false };
        let has_come = self.manners.look_until(until, now, || look().then_some(())).is_some();
        self.until.take_if(|_| !has_come);
        has_come
    }
}

impl Manners {
    /// Something is about to be awaited.
    fn nap(&mut self) {
        self.naps = self.naps.saturating_sub(1);
    }

    /// Looks at least once, and then until `until` if nobody else wants the processor.
    fn look_until<T>(
        &mut self,
        until: Instant,
        now: impl Fn() -> Instant,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let mut before = now();
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if until <= before || 0 < self.naps {
                return None;
            }
            std::thread::yield_now();
            let after = now();
            if CROWDED < after.saturating_duration_since(before) {
                self.naps = NAPS;
            }
            before = after;
        }
    }
}

/// How long one is awake at most.
const LONGEST: Duration = Duration::from_micros(400);
/// How long before the moment when the order should come: a timer may ring 50 µs late, then a processor wakes here, and then one
/// where the peer is; and an order may come earlier than the last one.
const EARLY: Duration = Duration::from_micros(250);
/// Whoever gets the processor back after so long was not alone on it.
const CROWDED: Duration = Duration::from_micros(500);
/// How often to sleep then.
const NAPS: u32 = 16;

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const HANDOFF: HandoffId = HandoffId(7);

    #[test]
    fn it_is_awake_when_the_order_should_come() {
        let begun = Instant::now();
        let micros = |count| begun + Duration::from_micros(count);
        // (what the last one took, when it is looked for, how often then, until when a thread may sleep, whether the peer is
        // told), all in µs
        #[rustfmt::skip]
        let rows = [
            ("nothing is known yet",            0,     0, 2, None, false),
            ("nothing is known, too late",      0,   400, 1, None, false),
            ("a quick one is awaited at once", 90,     0, 2, None, false),
            ("too early for a long one",     3250,     0, 0, Some(3000), false),
            ("still too early",              3250,  2999, 0, Some(3000), false),
            ("it should come now",           3250,  3000, 2, None, true),
            ("it is a little late",          3250,  3399, 2, None, true),
            ("nobody waits for long",        3250,  3400, 1, None, true),
        ];
        for (name, last, at, looks, alarm, told) in rows {
            let mut vigil = Vigil::default();
            vigil.begin(HANDOFF, begun);
            vigil.end(micros(last));
            let mut count = 0;
            let mut look = || {
                count += 1;
                (count == 2).then_some(())
            };
            assert_eq!(vigil.keep(|| micros(at), &mut look), None, "{name}: nothing is about to come");
            assert_eq!(vigil.opened(micros(at)), None, "{name}: nor is anybody told");
            vigil.begin(HANDOFF, begun);
            let found = vigil.keep(|| micros(at), &mut look);
            assert_eq!((count, found.is_some()), (looks, looks == 2), "{name}");
            assert_eq!(vigil.opens(micros(at)), alarm.map(micros), "{name}");
            assert_eq!(vigil.opened(micros(at)), told.then_some(HANDOFF), "{name}");
            assert_eq!(vigil.opened(micros(at)), None, "{name}: once");
        }
    }

    #[test]
    fn a_commit_is_looked_for_after_a_sign_and_not_for_long() {
        let begun = Instant::now();
        let time = Cell::new(begun);
        let mut looks = 0;
        let mut watch = Watch::default();
        let mut keep = |watch: &mut Watch, comes_at: Option<u64>| {
            looks = 0;
            let has_come = watch.keep(
                || time.replace(time.get() + Duration::from_micros(10)),
                || {
                    looks += 1;
                    comes_at == Some(looks)
                },
            );
            (looks, has_come)
        };
        assert_eq!(keep(&mut watch, Some(1)), (0, false), "nothing is awaited");
        watch.begin(begun);
        assert_eq!(keep(&mut watch, Some(3)), (3, true));
        let (looks, has_come) = keep(&mut watch, None);
        assert!((20..=40).contains(&looks) && !has_come, "what came was something else: {looks} looks");
        assert_eq!(keep(&mut watch, Some(1)), (0, false), "it is over");
    }

    #[test]
    fn who_is_not_alone_sleeps_for_a_while() {
        let time = Cell::new(Instant::now());
        // Each look at the clock is so much later than the one before.
        let is_awake = |watch: &mut Watch, step: Duration| {
            watch.begin(time.get());
            let mut looks = 0;
            watch.keep(
                || time.replace(time.get() + step),
                || {
                    looks += 1;
                    looks == 3
                },
            )
        };
        let (quick, slow) = (Duration::from_micros(10), CROWDED * 2);
        let mut watch = Watch::default();
        assert!(is_awake(&mut watch, quick));
        assert!(!is_awake(&mut watch, slow), "somebody else had the processor");
        for nap in 1..NAPS {
            assert!(!is_awake(&mut watch, quick), "nap {nap}");
        }
        assert!(is_awake(&mut watch, quick), "it is tried again");
    }
}
