//! The end of a worker's region, behind its blocks: room in which blocks are converted for peers that read.
//!
//! It lies in the region because that is what the key of such a peer opens. A piece of it belongs to whoever holds it: the
//! engine while it fills it, then each write that is read from it, until the endpoint knows that the peer reads it no more.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tidemill_kvtransfer_proto::extents::Extents;
use tidemill_kvtransfer_proto::layout::LAYER_ALIGNMENT;

use crate::shm::Region;

/// All of that room.
pub struct Tail {
    region: Arc<Region>,
    /// Where it begins in the region.
    start: usize,
    extents: Mutex<Extents>,
}

/// Some of it, which nobody else has.
#[derive(Debug)]
pub struct TailPiece {
    tail: Arc<Tail>,
    /// In the region.
    offset: usize,
    len: usize,
}

impl Tail {
    /// What of `region` is behind its first `start` bytes.
    ///
    /// # Panics
    ///
    /// When the region is shorter, or `start` is not where a layer may be: a bug.
    pub fn new(region: Arc<Region>, start: usize) -> Arc<Self> {
        let len = region.len().checked_sub(start).expect("it begins in the region");
        assert!(start.is_multiple_of(LAYER_ALIGNMENT), "blocks have whole cache lines");
        let extents = Mutex::new(Extents::new(len / LAYER_ALIGNMENT * LAYER_ALIGNMENT));
        Arc::new(Self { region, start, extents })
    }

    /// `len` bytes of it, where there are as many side by side. They hold whatever they held.
    ///
    /// # Panics
    ///
    /// When `len` is zero.
    pub fn take(self: &Arc<Self>, len: usize) -> Option<TailPiece> {
        let len = len.next_multiple_of(LAYER_ALIGNMENT);
        let start = self.extents().take(len)?;
        Some(TailPiece { tail: Arc::clone(self), offset: self.start + start, len })
    }

    /// Size in bytes, used or not.
    #[allow(clippy::len_without_is_empty, reason = "what matters is how much of it is free")]
    pub fn len(&self) -> usize {
        self.region.len() - self.start
    }

    /// How many bytes can be had at once.
    pub fn longest(&self) -> usize {
        self.extents().longest()
    }

    /// Whether nobody has any of it.
    pub fn is_unused(&self) -> bool {
        self.extents().is_whole()
    }

    /// Extents are changed by one call that checks first, so those that a panic left behind are sound.
    fn extents(&self) -> std::sync::MutexGuard<'_, Extents> {
        self.extents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TailPiece {
    /// What it is a piece of.
    pub fn tail(&self) -> &Arc<Tail> {
        &self.tail
    }

    /// The region that it lies in.
    pub fn region(&self) -> &Arc<Region> {
        &self.tail.region
    }

    /// Where in the region it begins.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Size in bytes. Never zero.
    #[allow(clippy::len_without_is_empty, reason = "a piece has at least one byte")]
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for TailPiece {
    fn drop(&mut self) {
        self.tail.extents().give_back(self.offset - self.tail.start, self.len);
    }
}

impl fmt::Debug for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tail({:?} from {} on)", self.region, self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_given_out_again_when_the_last_who_has_it_lets_go() {
        let region = Region::new("tail", 1000).unwrap();
        let tail = Tail::new(Arc::clone(&region), 320);
        assert_eq!(tail.longest(), 640, "whole cache lines of 680 bytes");
        let first = Arc::new(tail.take(100).unwrap());
        assert_eq!((first.offset(), first.len()), (320, 128));
        let reader = Arc::clone(&first);
        drop(first);
        let second = tail.take(512).unwrap();
        assert_eq!(second.offset(), 448);
        assert!(tail.take(1).is_none(), "somebody reads the first one");
        drop(reader);
        assert_eq!(tail.take(1).unwrap().offset(), 320);
        assert!(!tail.is_unused());
        drop(second);
        assert!(tail.is_unused());
    }

    #[test]
    fn where_there_is_none_none_is_given_out() {
        let tail = Tail::new(Region::new("tail", 640).unwrap(), 640);
        assert_eq!((tail.longest(), tail.take(1).is_none()), (0, true));
    }
}
