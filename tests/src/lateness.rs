//! How late this machine is with everything, so that a bound in seconds means the program and not its neighbours.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Measures until it is asked.
#[derive(Debug)]
pub struct Lateness {
    ended: Arc<AtomicBool>,
    worst: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Lateness {
    /// Starts to measure: a thread that wants to wake up every few milliseconds notes by how much it is late.
    #[expect(clippy::disallowed_methods, reason = "how late a sleep ends is what is measured")]
    pub fn measure() -> Self {
        let (ended, worst) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (ended, worst) = (Arc::clone(&ended), Arc::clone(&worst));
            move || {
                while !ended.load(Ordering::Relaxed) {
                    let before = Instant::now();
                    thread::sleep(TICK);
                    let late = before.elapsed().saturating_sub(TICK);
                    worst.fetch_max(u64::try_from(late.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
                }
            }
        });
        Self { ended, worst, thread: Some(thread) }
    }

    /// The worst so far.
    pub fn worst(&self) -> Duration {
        Duration::from_micros(self.worst.load(Ordering::Relaxed))
    }
}

impl Drop for Lateness {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // It does nothing that could panic.
        }
    }
}

const TICK: Duration = Duration::from_millis(5);
