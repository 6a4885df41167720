//! What is written into blocks: one number for each block.

use tidemill_kvtransfer_proto::digest::granule_digest;
use tidemill_kvtransfer_proto::endpoint_core::{DigestOrder, WriteSource};

use crate::world::{BLOCK, World};

/// A block full of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Content(pub(crate) u64);

impl WriteSource for Content {
    fn memory(&self) -> usize {
        self.0 as usize // No two of them are neighbours, so that each is a write of its own.
    }

    fn offset(&self) -> usize {
        0
    }

    fn len(&self) -> usize {
        BLOCK
    }

    fn range(&self, _: usize, _: usize) -> Option<Self> {
        Some(*self)
    }

    fn in_region(&self) -> Option<u64> {
        Some(self.0 * BLOCK as u64)
    }

    fn read(&self, at: usize, buffer: &mut [u8]) {
        fill(self.0, at, buffer);
    }
}

impl World {
    /// Digests of the decode worker's blocks, as they are now.
    pub(crate) fn digests(&self, order: &DigestOrder) -> Vec<u64> {
        let digest = |(position, target): (usize, &tidemill_kvtransfer_proto::units::BlockRef)| {
            let granule = order.shape.granule_of(order.handoff, order.first + position, 0);
            let number = self.memory[target.block.0 as usize];
            granule_digest(order.coverage, granule, BLOCK, |at, buffer| fill(number, at, buffer))
        };
        order.targets.iter().enumerate().map(digest).collect()
    }
}

fn fill(number: u64, at: usize, buffer: &mut [u8]) {
    for (index, byte) in buffer.iter_mut().enumerate() {
        *byte = number.to_le_bytes()[(at + index) % 8];
    }
}
