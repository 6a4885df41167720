//! What workers tell the router of themselves.

use std::collections::BTreeSet;

use tidemill_kvtransfer_proto::units::BlockCount;

use super::front::ToFront;
use super::world::{Event, Node, Process, World};

/// How a worker is.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) running: u32,
    pub(super) waiting: u32,
    pub(super) queued_tokens: u64,
    pub(super) free: BlockCount,
    pub(super) cached: BTreeSet<u64>,
    /// Peers that it has a connection to.
    pub(super) links: BTreeSet<u64>,
}

impl World<'_> {
    /// A worker's periodic word to the router.
    pub(super) fn send_status(&mut self, process: Process) {
        if self.life(process).is_none() {
            return;
        }
        self.say_status(process);
        let period = self.micros(STATUS_PERIOD - 10_000, STATUS_PERIOD);
        self.after(period, Event::Status(process));
    }

    /// Something changed.
    pub(super) fn tell_status_soon(&mut self, process: Process) {
        if self.chance.happens(300) {
            self.say_status(process);
        }
    }

    pub(super) fn say_status(&mut self, process: Process) {
        let life = self.life(process).expect("it runs");
        let (counts, ledger) = (life.scheduler.counts(), life.scheduler.ledger());
        let status = Box::new(Status {
            running: counts.running + counts.pushing,
            waiting: counts.waiting + counts.reserved,
            queued_tokens: life.scheduler.queued_tokens(),
            free: BlockCount(ledger.free.0 + ledger.cached.0),
            cached: life.scheduler.cached_hashes().collect(),
            links: life.up.keys().copied().collect(),
        });
        let arrival = self.arrival(Node::Worker(process.place), Node::Front);
        self.at(arrival, Event::ToFront { from: process, message: ToFront::Status(status) });
    }
}

/// As in production, in microseconds.
const STATUS_PERIOD: u64 = 250_000;
