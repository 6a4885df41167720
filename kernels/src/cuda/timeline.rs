//! What comes before what on a device with several queues, and which memory is in use meanwhile.
//!
//! A moment counts, for each queue, the operations that are over by then. Whether an operation comes before another is read off the
//! numbers, whatever the device really does.

use super::Queue;
use std::ops::Range;

/// How many operations of each queue are over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment([u64; Queue::COUNT]);

/// What an operation does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// Who is about to access memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Accessor {
    Host,
    Queue(Queue),
}

/// The order of everything that was asked of a device.
#[derive(Debug, Default)]
pub(super) struct Timeline {
    /// What comes before the next operation of a queue.
    queues: [Moment; Queue::COUNT],
    /// What the host knows to be over.
    host: Moment,
    uses: Vec<Use>,
}

/// Memory that an operation uses.
#[derive(Debug)]
struct Use {
    memory: Range<u64>,
    access: Access,
    queue: Queue,
    number: u64,
}

impl Timeline {
    /// The number of a queue's next operation, which now was asked for.
    pub(super) fn begin(&mut self, queue: Queue) -> u64 {
        if queue == Queue::Transfer {
            let computed = self.queues[Queue::Compute as usize];
            self.queues[queue as usize].join(computed);
        }
        let number = &mut self.queues[queue as usize].0[queue as usize];
        *number += 1;
        *number
    }

    /// Notes what an operation uses until the host knows that it is over.
    pub(super) fn uses(&mut self, queue: Queue, number: u64, memory: Range<u64>, access: Access) {
        self.uses.push(Use { memory, access, queue, number });
    }

    /// The end of everything that was asked of a queue so far.
    pub(super) fn moment(&self, queue: Queue) -> Moment {
        self.queues[queue as usize]
    }

    /// How many operations were asked of a queue behind a moment.
    #[cfg(all(feature = "emulator", not(no_cpp_compiler)))]
    pub(super) fn beyond(&self, queue: Queue, moment: Moment) -> u64 {
        self.queues[queue as usize].0[queue as usize] - moment.0[queue as usize]
    }

    /// What is asked of the handoff's queue comes after what the computation was asked for so far.
    pub(super) fn handoff_after_compute(&mut self) {
        let computed = self.queues[Queue::Compute as usize];
        self.queues[Queue::Handoff as usize].join(computed);
    }

    /// The computation goes on after a moment.
    pub(super) fn compute_after(&mut self, moment: Moment) {
        self.queues[Queue::Compute as usize].join(moment);
    }

    /// The host knows that a moment has come.
    pub(super) fn host_saw(&mut self, moment: Moment) {
        self.host.join(moment);
        let host = self.host;
        self.uses.retain(|it| !host.has(it.queue, it.number));
    }

    /// Whether the host knows that a moment has come.
    pub(super) fn is_over(&self, moment: Moment) -> bool {
        let mut both = self.host;
        both.join(moment);
        both == self.host
    }

    /// Whether an operation is over before whatever `accessor` does next.
    pub(super) fn has(&self, accessor: Accessor, queue: Queue, number: u64) -> bool {
        let moment = match accessor {
            Accessor::Host => self.host,
            Accessor::Queue(of) => self.queues[of as usize],
        };
        moment.has(queue, number)
    }

    /// # Panics
    ///
    /// When an operation that may not be over yet stands against an access.
    pub(super) fn check(&self, accessor: Accessor, memory: &Range<u64>, access: Access, what: &str) {
        let against = self.uses.iter().find(|it| {
            let overlap = it.memory.start < memory.end && memory.start < it.memory.end;
            let both_read = it.access == Access::Read && access == Access::Read;
            overlap && !both_read && !self.has(accessor, it.queue, it.number)
        });
        if let Some(Use { access, queue, .. }) = against {
            let does = if *access == Access::Read { "reads" } else { "writes" };
            let bytes = memory.end - memory.start;
            panic!(
                "{what} of {bytes} bytes at {:#x}: a copy in the queue {queue:?} that {does} them may be under way",
                memory.start
            );
        }
    }
}

impl Moment {
    fn join(&mut self, other: Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine = theirs.max(*mine);
        }
    }

    /// Whether an operation is over by then.
    pub(super) fn has(self, queue: Queue, number: u64) -> bool {
        number <= self.0[queue as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Accessor::Host;
    use Queue::{Compute, Transfer};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    const COMPUTE: Accessor = Accessor::Queue(Compute);

    fn conflicts(timeline: &Timeline, accessor: Accessor, access: Access) -> bool {
        catch_unwind(AssertUnwindSafe(|| timeline.check(accessor, &(8..16), access, "access"))).is_err()
    }

    #[test]
    fn a_transfer_comes_after_the_computation_and_not_the_other_way_round() {
        let mut timeline = Timeline::default();
        let computed = timeline.begin(Compute);
        let copied = timeline.begin(Transfer);
        assert!(timeline.has(Accessor::Queue(Transfer), Compute, computed));
        assert!(!timeline.has(COMPUTE, Transfer, copied));
        timeline.compute_after(timeline.moment(Transfer));
        assert!(timeline.has(COMPUTE, Transfer, copied));
        assert!(!timeline.has(Host, Compute, computed));
        // Whoever waits for the copy waited for what it came after.
        timeline.host_saw(timeline.moment(Transfer));
        assert!(timeline.has(Host, Compute, computed) && timeline.has(Host, Transfer, copied));
    }

    #[test]
    fn a_handoff_comes_after_what_it_was_told_to_and_nothing_else() {
        let mut timeline = Timeline::default();
        let computed = timeline.begin(Compute);
        timeline.handoff_after_compute();
        let (later, transferred) = (timeline.begin(Compute), timeline.begin(Transfer));
        let copied = timeline.begin(Queue::Handoff);
        let handoff = Accessor::Queue(Queue::Handoff);
        assert!(timeline.has(handoff, Compute, computed));
        assert!(!timeline.has(handoff, Compute, later) && !timeline.has(handoff, Transfer, transferred));
        assert!(!timeline.has(COMPUTE, Queue::Handoff, copied));
        timeline.host_saw(timeline.moment(Queue::Handoff));
        assert!(timeline.has(Host, Compute, computed) && !timeline.has(Host, Compute, later));
    }

    #[test]
    fn memory_in_use_is_left_alone_until_it_is_waited_for() {
        for (access, other, stands_against) in [
            (Access::Read, Access::Read, false),
            (Access::Read, Access::Write, true),
            (Access::Write, Access::Read, true),
            (Access::Write, Access::Write, true),
        ] {
            let mut timeline = Timeline::default();
            let number = timeline.begin(Transfer);
            timeline.uses(Transfer, number, 12..20, access);
            assert_eq!(conflicts(&timeline, Host, other), stands_against);
            assert_eq!(conflicts(&timeline, COMPUTE, other), stands_against);
            assert!(!conflicts(&timeline, Accessor::Queue(Transfer), other), "a queue keeps its order");
            let moment = timeline.moment(Transfer);
            assert!(!timeline.is_over(moment));
            timeline.host_saw(moment);
            assert!(timeline.is_over(moment));
            assert!(!conflicts(&timeline, Host, other) && timeline.uses.is_empty());
        }
    }

    #[test]
    fn memory_beside_it_is_free() {
        let mut timeline = Timeline::default();
        let number = timeline.begin(Compute);
        timeline.uses(Compute, number, 0..8, Access::Write);
        timeline.uses(Compute, number, 16..24, Access::Write);
        assert!(!conflicts(&timeline, Host, Access::Write));
    }

    #[test]
    fn a_ticket_from_before_says_nothing_of_what_came_later() {
        let mut timeline = Timeline::default();
        timeline.begin(Compute);
        let before = timeline.moment(Compute);
        let number = timeline.begin(Compute);
        timeline.uses(Compute, number, 8..16, Access::Write);
        timeline.host_saw(before);
        assert!(conflicts(&timeline, Host, Access::Read));
    }
}
