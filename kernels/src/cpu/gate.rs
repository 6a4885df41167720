//! The word through which the pool's owner hands a job to its workers.
//!
//! A worker takes part only if it arrives while the job is open. The owner therefore waits for those that entered and
//! never for one that the system has not scheduled: a core taken away costs its share of the work and no more.
//!
//! What the owner writes before [`open`](Gate::open) happens before everything a worker does between
//! [`enter`](Gate::enter) and [`leave`](Gate::leave), and that happens before [`is_quiet`](Gate::is_quiet) is true.
//! The loom test in `tests/gate.rs` includes this file with loom's atomics in the place of `sync`.

use super::sync::{AtomicU64, Ordering};

/// `round << 33 | open << 32 | workers inside`.
#[derive(Debug)]
pub(crate) struct Gate(AtomicU64);

/// Which job a worker has seen last; rounds differ between one job and the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Round(u64);

impl Round {
    /// No job seen yet.
    pub(crate) const NONE: Self = Self(0);
}

impl Gate {
    /// A closed gate with nobody inside.
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Owner: starts the next round. Only when the gate is closed and quiet.
    pub(crate) fn open(&self) {
        // Nobody else writes while the gate is closed and quiet, so load and store need not be one operation.
        // Rounds wrap around after 2^31 jobs; a worker that slept through exactly that many misses one job, no more.
        let word = self.0.load(Ordering::Relaxed);
        self.0.store(word.wrapping_add(ROUND) | OPEN, Ordering::Release);
    }

    /// Owner: lets nobody in any more.
    pub(crate) fn close(&self) {
        self.0.fetch_and(!OPEN, Ordering::AcqRel);
    }

    /// Owner, after `close`: whether all that entered have left.
    pub(crate) fn is_quiet(&self) -> bool {
        self.0.load(Ordering::Acquire) & INSIDE == 0
    }

    /// Worker: enters a job that is open and newer than `seen`.
    pub(crate) fn enter(&self, seen: Round) -> Option<Round> {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let round = Round(word / ROUND);
            if word & OPEN == 0 || round == seen {
                return None;
            }
            match self.0.compare_exchange_weak(word, word + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(round),
                Err(current) => word = current,
            }
        }
    }

    /// Worker: leaves; true when the owner may be waiting for exactly this.
    pub(crate) fn leave(&self) -> bool {
        let before = self.0.fetch_sub(1, Ordering::Release);
        before & INSIDE == 1 && before & OPEN == 0
    }
}

const OPEN: u64 = 1 << 32;
const INSIDE: u64 = OPEN - 1;
const ROUND: u64 = 1 << 33;
