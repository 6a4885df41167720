//! Memory in which blocks are converted for a peer that is written to, used again and again. (A peer that reads finds them in the
//! arena's tail.)
//!
//! Fresh memory comes from the system zeroed, page by page as it is first touched, which takes longer than to convert
//! what is put there.

use std::sync::Arc;

use tidemill_kvtransfer::Slab;

/// Slabs that were pushed: each can be filled again when its last write has completed.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    /// The one used last at the end.
    slabs: Vec<Arc<Slab>>,
}

impl Staging {
    /// A slab of at least `len` bytes that nobody reads. It holds whatever it held.
    pub(crate) fn take(&mut self, len: usize) -> Arc<Slab> {
        let mut best: Option<(usize, usize)> = None;
        for (index, slab) in self.slabs.iter_mut().enumerate() {
            let size = slab.as_slice().len();
            if len <= size && best.is_none_or(|(_, least)| size < least) && Arc::get_mut(slab).is_some() {
                best = Some((index, size));
            }
        }
        if let Some((index, _)) = best {
            return self.slabs.remove(index);
        }
        // Requests are of many lengths: a little more serves the next one too.
        let len = len.max(1).next_multiple_of(STEP);
        Arc::new(Slab::new(len).expect("address space for a copy of some of our blocks"))
    }

    /// Takes a slab back that others may still read. Forgets the oldest ones beyond what is worth keeping, and one that
    /// is too long; they go to the system with their last reader.
    pub(crate) fn keep(&mut self, slab: Arc<Slab>) {
        if MOST_BYTES < slab.as_slice().len() {
            return;
        }
        self.slabs.push(slab);
        while MOST_SLABS < self.slabs.len() || MOST_BYTES < self.bytes() {
            self.slabs.remove(0);
        }
    }

    fn bytes(&self) -> usize {
        self.slabs.iter().map(|slab| slab.as_slice().len()).sum()
    }
}

/// Slabs have multiples of this many bytes: a huge page.
const STEP: usize = 2 << 20;
/// One is filled, one is written; a few more for slow peers.
const MOST_SLABS: usize = 8;
/// What an idle worker holds at most.
const MOST_BYTES: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_is_used_again_when_nobody_reads_it() {
        let mut staging = Staging::default();
        let slab = staging.take(100);
        let first = Arc::as_ptr(&slab);
        let reader = Arc::clone(&slab);
        staging.keep(slab);
        let other = staging.take(100);
        assert_ne!(Arc::as_ptr(&other), first, "somebody reads it");
        drop(reader);
        assert_ne!(Arc::as_ptr(&staging.take(STEP + 1)), first, "it is too short");
        let mut again = staging.take(STEP);
        assert_eq!(Arc::as_ptr(&again), first);
        assert!(Arc::get_mut(&mut again).is_some(), "it can be filled");
    }

    #[test]
    fn the_shortest_that_is_long_enough_is_taken() {
        let mut staging = Staging::default();
        for steps in [3, 1, 2] {
            staging.keep(Arc::new(Slab::new(steps * STEP).unwrap()));
        }
        let mut next = |len| staging.take(len).as_slice().len() / STEP;
        assert_eq!([next(1), next(STEP), next(1), next(1)], [1, 2, 3, 1]);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut staging = Staging::default();
        for _ in 0..2 * MOST_SLABS {
            staging.keep(Arc::new(Slab::new(STEP).unwrap()));
        }
        assert_eq!(staging.slabs.len(), MOST_SLABS);
        staging.keep(Arc::new(Slab::new(MOST_BYTES - STEP).unwrap()));
        assert_eq!((staging.slabs.len(), staging.bytes()), (2, MOST_BYTES));
        staging.keep(Arc::new(Slab::new(MOST_BYTES + STEP).unwrap()));
        assert_eq!((staging.slabs.len(), staging.bytes()), (2, MOST_BYTES), "no idle worker holds so much");
    }
}
