//! Digests of whole reservations, a bounded piece at a time: hashing gigabytes must not keep heartbeats waiting.

use std::sync::Arc;

use tidemill_kvtransfer_proto::digest::{Coverage, granule_digest};
use tidemill_kvtransfer_proto::endpoint_core::{DigestOrder, DigestTicket};
use tidemill_kvtransfer_proto::units::HandoffId;

use crate::shm::Region;

/// The digests of some blocks in the making.
#[derive(Debug)]
pub(crate) struct DigestJob {
    order: DigestOrder,
    memory: Arc<Region>,
    /// Target and granule that come next.
    next: (usize, usize),
    digests: Vec<u64>,
}

impl DigestJob {
    /// Starts on blocks of `memory`.
    pub(crate) fn new(order: DigestOrder, memory: Arc<Region>) -> Self {
        let digests = vec![0; order.targets.len()];
        Self { order, memory, next: (0, 0), digests }
    }

    /// Who asked for them.
    pub(crate) fn name(&self) -> (HandoffId, DigestTicket) {
        (self.order.handoff, self.order.ticket)
    }

    /// Goes on for a while; the digests, one for each target, when done.
    pub(crate) fn advance(&mut self) -> Option<Vec<u64>> {
        let DigestOrder { handoff, coverage, shape, ref targets, .. } = self.order;
        let cost = match coverage {
            Coverage::Sampled => SAMPLE_COST,
            Coverage::Full => shape.granule,
        };
        let mut budget = BYTES_PER_TURN;
        while let Some(target) = targets.get(self.next.0) {
            if budget < cost && budget < BYTES_PER_TURN {
                return None;
            }
            budget = budget.saturating_sub(cost);
            let (position, index) = self.next;
            let start = target.block.0 as usize * shape.block + index * shape.granule;
            let granule = shape.granule_of(handoff, position, index);
            let digest = granule_digest(coverage, granule, shape.granule, |offset, buffer| {
                self.memory.read(start + offset, buffer);
            });
            self.digests[position] = self.digests[position].wrapping_add(digest);
            self.next = match index + 1 {
                next if next * shape.granule < shape.block => (position, next),
                _ => (position + 1, 0),
            };
        }
        Some(std::mem::take(&mut self.digests))
    }
}

/// Bytes hashed before it is somebody else's turn: about a millisecond.
const BYTES_PER_TURN: usize = 8 << 20;
/// What looking at one granule costs, in bytes hashed: a few cache misses.
const SAMPLE_COST: usize = 2048;
