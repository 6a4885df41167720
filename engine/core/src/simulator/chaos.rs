//! What goes wrong on purpose, besides what befalls single messages.

use super::Fault;
use super::world::{Event, Node, World};

/// Something that happens to nodes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Chaos {
    Cut { a: Node, b: Node, duration: u64 },
    Crash { place: usize, down: u64 },
    Restart(usize),
    Slow { place: usize, factor: u64, duration: u64 },
    AtFullSpeed(usize),
    Stand { place: usize, duration: u64 },
}

impl World<'_> {
    /// Decides what will go wrong, all of it over before the calm.
    pub(super) fn plan_chaos(&mut self) {
        let faults = self.options.faults;
        let places = self.workers.len();
        if faults.contains(Fault::Skew) {
            for place in 0..places {
                if self.chance.happens(300) {
                    self.workers[place].clock_rate = 850 + self.micros(0, 301);
                    self.is_skewed();
                }
            }
        }
        let span = self.calm_from.min(500_000);
        if faults.contains(Fault::Partition) && self.chance.happens(350) {
            let duration = self.micros(1_000, 1_500_000);
            let (a, b) = (self.chance.below(places), self.chance.below(places + 1));
            let b = if b == a || b == places { Node::Front } else { Node::Worker(b) };
            self.strike(span, duration, Chaos::Cut { a: Node::Worker(a), b, duration });
        }
        if faults.contains(Fault::Crash) && self.chance.happens(350) {
            let (place, down) = (self.chance.below(places), self.micros(20_000, 900_000));
            self.strike(span, down, Chaos::Crash { place, down });
        }
        if faults.contains(Fault::Slow) && self.chance.happens(250) {
            let (place, factor, duration) =
                (self.chance.below(places), self.micros(5, 60), self.micros(10_000, 500_000));
            self.strike(span, duration, Chaos::Slow { place, factor, duration });
        }
        if faults.contains(Fault::StalePeer) && self.chance.happens(350) {
            let (place, duration) = (self.chance.below(places), self.micros(500_000, 1_600_000));
            self.strike(span, duration, Chaos::Stand { place, duration });
        }
    }

    fn strike(&mut self, span: u64, duration: u64, chaos: Chaos) {
        // Mostly while there is something to disturb.
        let at = if self.chance.happens(700) {
            let arrival = self.front.arrivals[self.chance.below(self.front.arrivals.len())];
            arrival + self.micros(1, 6_000)
        } else {
            self.micros(1_000, span)
        };
        self.calm_from = self.calm_from.max(at + duration);
        self.at(at, Event::Chaos(chaos));
    }

    pub(super) fn wreak(&mut self, chaos: Chaos) {
        self.note(|| format!("{chaos:?}"));
        match chaos {
            Chaos::Cut { a, b, duration } => {
                self.count(Fault::Partition);
                self.cuts.insert((a.min(b), a.max(b)), self.now + duration);
            }
            Chaos::Crash { place, down } => {
                self.count(Fault::Crash);
                self.kill_worker(place);
                self.after(down, Event::Chaos(Chaos::Restart(place)));
            }
            Chaos::Restart(place) => self.start_worker(place),
            Chaos::Slow { place, factor, duration } => {
                self.count(Fault::Slow);
                self.workers[place].slowness = factor;
                self.after(duration, Event::Chaos(Chaos::AtFullSpeed(place)));
            }
            Chaos::AtFullSpeed(place) => self.workers[place].slowness = 1,
            Chaos::Stand { place, duration } => {
                self.count(Fault::StalePeer);
                self.workers[place].stands_until = self.now + duration;
            }
        }
    }
}
