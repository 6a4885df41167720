//! Digests of whole reservations, a bounded piece at a time: hashing gigabytes must not keep heartbeats waiting.

use std::sync::Arc;

use tidemill_kvtransfer_proto::digest::{Coverage, Granule, granule_digest};
use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId};

use crate::shm::Region;

/// The digests of some blocks in the making.
#[derive(Debug)]
pub(crate) struct DigestJob {
    handoff: HandoffId,
    coverage: Coverage,
    shape: BlockShape,
    memory: Arc<Region>,
    targets: Vec<BlockRef>,
    /// Target and granule that come next.
    next: (usize, usize),
    digests: Vec<u64>,
}

/// How a block is cut into granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockShape {
    /// Bytes of a block.
    pub(crate) block: usize,
    /// Bytes of a granule; divides `block`.
    pub(crate) granule: usize,
}

impl DigestJob {
    /// Starts on `targets`, blocks of `memory`.
    pub(crate) fn new(
        handoff: HandoffId,
        coverage: Coverage,
        shape: BlockShape,
        memory: Arc<Region>,
        targets: Vec<BlockRef>,
    ) -> Self {
        let digests = vec![0; targets.len()];
        Self { handoff, coverage, shape, memory, targets, next: (0, 0), digests }
    }

    /// Goes on for a while; the digests, one for each target, when done.
    pub(crate) fn advance(&mut self) -> Option<Vec<u64>> {
        let cost = match self.coverage {
            Coverage::Sampled => SAMPLE_COST,
            Coverage::Full => self.shape.granule,
        };
        let mut budget = BYTES_PER_TURN;
        while let Some(target) = self.targets.get(self.next.0) {
            if budget < cost && budget < BYTES_PER_TURN {
                return None;
            }
            budget = budget.saturating_sub(cost);
            let (position, index) = self.next;
            let start = target.block.0 as usize * self.shape.block + index * self.shape.granule;
            let granule = granule(self.handoff, position, index);
            let digest = granule_digest(self.coverage, granule, self.shape.granule, |offset, buffer| {
                self.memory.read(start + offset, buffer);
            });
            self.digests[position] = self.digests[position].wrapping_add(digest);
            self.next = match index + 1 {
                next if next * self.shape.granule < self.shape.block => (position, next),
                _ => (position + 1, 0),
            };
        }
        Some(std::mem::take(&mut self.digests))
    }
}

/// Names a granule by where it is.
pub(crate) fn granule(handoff: HandoffId, target: usize, index: usize) -> Granule {
    let number = |it: usize| u32::try_from(it).expect("targets and granules are numbered in u32");
    Granule { handoff, target: number(target), index: number(index) }
}

/// Bytes hashed before it is somebody else's turn: about a millisecond.
const BYTES_PER_TURN: usize = 8 << 20;
/// What looking at one granule costs, in bytes hashed: a few cache misses.
const SAMPLE_COST: usize = 2048;
