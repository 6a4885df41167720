//! How far the ranks of a model have been asked to compute, each by a thread of its own.
//!
//! A copy out of a rank's blocks begins after what its device was asked for before. So whoever asks for a copy of a layer, which is the
//! first rank's thread, waits until the others have asked for that layer too: not until it is computed.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Layers that ranks were asked for in the step that is asked for now, or was last.
#[derive(Debug)]
pub struct Asked {
    layers: Mutex<Layers>,
    changed: Condvar,
}

#[derive(Debug)]
struct Layers {
    first: usize,
    others: Vec<usize>,
    /// Whether a rank has failed, which is not to be waited for.
    is_over: bool,
}

impl Asked {
    /// Of a first rank and so many others.
    pub fn new(others: usize) -> Self {
        let layers = Layers { first: 0, others: vec![0; others], is_over: false };
        Self { layers: Mutex::new(layers), changed: Condvar::new() }
    }

    /// A step begins.
    pub(crate) fn begin(&self) {
        let mut layers = self.lock();
        layers.first = 0;
        layers.others.fill(0);
    }

    /// The first rank was asked for so many layers.
    pub(crate) fn first(&self, layers: usize) {
        self.lock().first = layers;
    }

    /// Another one was: the first of the others is 0.
    pub(crate) fn other(&self, index: usize, layers: usize) {
        self.lock().others[index] = layers;
        self.changed.notify_all();
    }

    /// Nobody waits any more.
    pub(crate) fn give_up(&self) {
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Waits until the others were asked for what the first was asked for.
    pub(crate) fn wait(&self) {
        let behind = |it: &mut Layers| !it.is_over && it.others.iter().any(|layers| *layers < it.first);
        drop(self.changed.wait_while(self.lock(), behind).unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, Layers> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn who_copies_waits_until_the_others_were_asked_for_as_much() {
        let asked = Asked::new(2);
        asked.wait();
        for step in 0..3 {
            asked.begin();
            asked.first(2);
            asked.other(1, 5);
            thread::scope(|scope| {
                let waits = scope.spawn(|| asked.wait());
                asked.other(0, 1);
                assert!(!waits.is_finished(), "step {step}: one layer is missing");
                asked.other(0, 2);
            });
        }
        asked.begin();
        asked.first(1);
        thread::scope(|scope| {
            scope.spawn(|| asked.wait());
            asked.give_up();
        });
    }
}
