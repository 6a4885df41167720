//! Every order in which the pool's owner and its workers can meet at the gate, by loom.

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

#[path = "../src/cpu/gate.rs"]
mod gate;

use gate::{Gate, Round};
use loom::{cell::UnsafeCell, sync::Arc, thread};

struct Shared {
    gate: Gate,
    job: UnsafeCell<usize>,
    results: [UnsafeCell<usize>; 2],
}

// SAFETY: `job` and `results` are passed through the gate; loom reports every access that is not ordered by it.
unsafe impl Sync for Shared {}
// SAFETY: plain numbers.
unsafe impl Send for Shared {}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self { gate: Gate::new(), job: UnsafeCell::new(0), results: Default::default() })
    }

    /// The owner's side: loom fails here when a worker may still be inside.
    fn set_job(&self, job: usize) {
        // SAFETY: closed and quiet: no worker is inside.
        self.job.with_mut(|cell| unsafe { *cell = job });
        for result in &self.results {
            // SAFETY: as above.
            result.with_mut(|result| unsafe { *result = 0 });
        }
    }

    /// The worker's side: takes part in as many as `jobs` jobs, or comes too late.
    fn work(&self, worker: usize, jobs: usize) {
        let mut seen = Round::NONE;
        for _ in 0..jobs {
            if let Some(round) = self.gate.enter(seen) {
                assert_ne!(round, seen, "no job twice");
                seen = round;
                // SAFETY: inside the gate the owner does not write.
                let job = self.job.with(|job| unsafe { *job });
                // SAFETY: each worker has its own result, which the owner touches only when the gate is quiet.
                self.results[worker].with_mut(|result| unsafe { *result = job });
                self.gate.leave();
            }
        }
    }
}

#[test]
fn two_workers_and_one_job() {
    let mut model = loom::model::Builder::new();
    // Without a bound this takes minutes; two forced switches are known to show nearly all such mistakes.
    model.preemption_bound = Some(2);
    model.check(|| {
        let shared = Shared::new();
        let workers = [0, 1].map(|worker| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.work(worker, 1))
        });
        shared.set_job(1);
        shared.gate.open();
        shared.gate.close();
        if shared.gate.is_quiet() {
            shared.set_job(2);
        }
        for worker in workers {
            worker.join().unwrap();
        }
    });
}

#[test]
fn one_worker_and_two_jobs() {
    loom::model(|| {
        let shared = Shared::new();
        let worker = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.work(0, 2))
        };
        for job in [1, 2] {
            shared.set_job(job);
            shared.gate.open();
            shared.gate.close();
            while !shared.gate.is_quiet() {
                thread::yield_now();
            }
        }
        shared.set_job(3);
        worker.join().unwrap();
    });
}
