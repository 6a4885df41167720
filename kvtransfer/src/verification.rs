//! Digests of whole reservations, a bounded piece at a time: hashing gigabytes must not keep heartbeats waiting.

use std::sync::Arc;

use tidemill_kvtransfer_proto::digest::{BlockDigests, Coverage, Look, spots};
use tidemill_kvtransfer_proto::endpoint_core::{DigestOrder, DigestTicket};
use tidemill_kvtransfer_proto::units::HandoffId;

use crate::device::{DeviceBlocks, DigestPart, MOST_PARTS, PartBytes};
use crate::shm::Region;

/// The digests of some blocks in the making.
#[derive(Debug)]
pub(crate) struct DigestJob {
    order: DigestOrder,
    memory: Arc<Region>,
    /// Of the granules to look at, those that were.
    done: usize,
    /// Which granules are looked at, when not all are, as (block of the order, index).
    spots: Option<Vec<(usize, usize)>>,
    /// By position among all targets of the handoff; zero before those of the order.
    digests: Vec<u64>,
}

impl DigestJob {
    /// Starts on blocks of `memory`.
    pub(crate) fn new(order: DigestOrder, memory: Arc<Region>) -> Self {
        let digests = vec![0; order.first + order.targets.len()];
        let ours = order.first..order.first + order.targets.len();
        let spots = order.spots.then(|| {
            let all = spots(order.handoff, order.all, order.shape).into_iter();
            let here = all.filter(|(target, _)| ours.contains(target));
            here.map(|(target, index)| (target - order.first, index)).collect()
        });
        Self { order, memory, done: 0, spots, digests }
    }

    /// Who asked for them.
    pub(crate) fn name(&self) -> (HandoffId, DigestTicket) {
        (self.order.handoff, self.order.ticket)
    }

    /// Goes on for a while; the digests, one for each block of the order, when done.
    pub(crate) fn advance(&mut self) -> Option<Vec<u64>> {
        let Self {
            order: DigestOrder { handoff, coverage, shape, targets, first: first_target, .. },
            memory,
            done,
            spots,
            digests,
        } = self;
        let per_block = shape.block / shape.granule;
        let all = spots.as_ref().map_or(targets.len() * per_block, Vec::len);
        let cost = match coverage {
            Coverage::Sampled => SAMPLE_COST,
            Coverage::Full => shape.granule,
        };
        let now = (BYTES_PER_TURN / cost).max(1).min(all - *done);
        let (first, spots) = (*done, &*spots);
        let place = |which: usize| match spots {
            Some(spots) => spots[first + which],
            None => ((first + which) / per_block, (first + which) % per_block),
        };
        let read = |start: usize, offset: usize, buffer: &mut [u8]| memory.read(start + offset, buffer);
        let mut sums = BlockDigests::new(*coverage, shape.granule, digests, read);
        for which in 0..now {
            let (block, index) = place(which);
            let start = targets[block].block.0 as usize * shape.block + index * shape.granule;
            sums.add(shape.granule_of(*handoff, *first_target + block, index), start);
        }
        sums.finish();
        *done += now;
        (*done == all).then(|| digests.split_off(*first_target))
    }
}

/// The same of blocks in a device, which does what it is asked for meanwhile.
#[derive(Debug)]
pub(crate) struct DeviceDigestJob {
    order: DigestOrder,
    blocks: Arc<dyn DeviceBlocks>,
    /// Of all granules, those whose digests are there.
    done: usize,
    /// Those that the device was asked for, and of which block of the order the first is.
    asked: Option<(usize, usize)>,
    /// By block of the order.
    digests: Vec<u64>,
}

impl DeviceDigestJob {
    /// Starts on blocks of this side.
    pub(crate) fn new(order: DigestOrder, blocks: Arc<dyn DeviceBlocks>) -> Self {
        let digests = vec![0; order.targets.len()];
        Self { order, blocks, done: 0, asked: None, digests }
    }

    /// Who asked for them.
    pub(crate) fn name(&self) -> (HandoffId, DigestTicket) {
        (self.order.handoff, self.order.ticket)
    }

    /// Asks for the next, or takes what was asked for; the digests, one for each block of the order, when done.
    pub(crate) fn advance(&mut self) -> Result<Option<Vec<u64>>, String> {
        let per_block = self.order.shape.block / self.order.shape.granule;
        let all = self.order.targets.len() * per_block;
        if let Some((count, first)) = self.asked {
            let Some(sums) = self.blocks.digests()? else { return Ok(None) };
            for (digest, sum) in self.digests[first..].iter_mut().zip(sums) {
                *digest = digest.wrapping_add(sum);
            }
            self.done += count;
            self.asked = None;
        }
        if self.done == all {
            return Ok(Some(std::mem::take(&mut self.digests)));
        }
        let end = all.min(self.done + MOST_PARTS);
        let first = self.done / per_block;
        let parts: Vec<DigestPart> =
            (self.done..end).map(|which| self.part(which / per_block, which % per_block, first)).collect();
        let sums = (end - 1) / per_block + 1 - first;
        self.blocks.begin_digests(&parts, sums)?;
        self.asked = Some((end - self.done, first));
        Ok(None)
    }

    /// A granule of a block of the order, whose sum is counted from that of the block `first`.
    fn part(&self, block: usize, index: usize, first: usize) -> DigestPart {
        let DigestOrder { handoff, coverage, shape, targets, first: first_target, .. } = &self.order;
        let granule = shape.granule_of(*handoff, first_target + block, index);
        let offset = targets[block].block.0 as usize * shape.block + index * shape.granule;
        let bytes = match granule.look(*coverage, shape.granule) {
            Look::All => PartBytes::All { offset, len: shape.granule },
            Look::Lines(lines) => PartBytes::Lines(lines.map(|line| offset + line)),
        };
        let sum = u32::try_from(block - first).expect("fewer than parts");
        DigestPart { bytes, seed: granule.seed(), sum }
    }
}

/// Bytes hashed before it is somebody else's turn: about a millisecond.
const BYTES_PER_TURN: usize = 8 << 20;
/// What looking at one granule costs, in bytes hashed: a few cache misses.
const SAMPLE_COST: usize = 2048;
