//! Memory of a GPU: buffers that are given back when dropped, and the blocks of the KV cache.

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::hopper::BlockRange;
use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver, PinnedAddress, Queue};
use tidemill_kernels::kv::KvBlockShape;
use tidemill_kvtransfer::device::DeviceBlocks;
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockRef, Epoch};

use super::asked::Asked;
use super::shared_pool::{LonelyPool, SharedPool};
use super::slices::HeadSlices;

/// A piece of a device's memory.
#[derive(Debug)]
pub struct DeviceBuffer {
    driver: Arc<dyn Driver>,
    address: DeviceAddress,
    bytes: usize,
}

/// A piece of memory of the host that a device copies from and to by itself.
#[derive(Debug)]
pub struct PinnedBuffer {
    driver: Arc<dyn Driver>,
    address: PinnedAddress,
    bytes: usize,
}

/// The blocks of a KV cache in a device's memory, one behind the other, at places that never change.
#[derive(Debug)]
pub struct DevicePool {
    memory: Arc<DeviceBuffer>,
    /// Why no peer can be given the memory, if that is so.
    not_shareable: Option<String>,
    block_bytes: usize,
    blocks: BlockCount,
    /// Where what goes to peers comes down.
    landing: PinnedBuffer,
    /// In which generation a block's twin in the arena was last made the same, all of it.
    same: Vec<Option<Epoch>>,
    /// Where ranks share the blocks.
    sharing: Option<Sharing>,
}

/// A rank, and which heads of all blocks it keeps.
#[derive(Clone, Debug)]
pub struct RankHeads {
    /// Its device.
    pub driver: Arc<dyn Driver>,
    /// Its blocks: those of its heads alone.
    pub shape: KvBlockShape,
    /// The number of its first head in whole blocks.
    pub first: usize,
    /// Whether its heads come from here when blocks go to the host: of ranks with the same head one is enough.
    pub is_read: bool,
}

/// Blocks of several ranks, each with some heads: the pool itself is the first one's.
#[derive(Debug)]
struct Sharing {
    /// What each rank has, the first one's included.
    slices: Vec<HeadSlices>,
    is_read: Vec<bool>,
    /// The others' blocks and where they come down.
    others: Vec<(DeviceBuffer, PinnedBuffer)>,
    asked: Arc<Asked>,
}

/// Who has blocks, or some heads of them, in a device's memory.
#[derive(Debug)]
pub(crate) struct Holder<'a> {
    memory: &'a DeviceBuffer,
    block_bytes: usize,
    /// Where what goes to peers comes down.
    pub(crate) landing: &'a PinnedBuffer,
    /// What of a whole block it has; `None`: all.
    pub(crate) slices: Option<&'a HeadSlices>,
    /// Whether it is read when blocks go to the host.
    pub(crate) is_read: bool,
}

impl<'a> Holder<'a> {
    /// Where a block is.
    pub(crate) const fn address(&self, block: BlockId) -> DeviceAddress {
        self.memory.address.offset(block.0 as usize * self.block_bytes)
    }

    /// Size of a block.
    pub(crate) const fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Its device.
    pub(crate) const fn driver(&self) -> &'a Arc<dyn Driver> {
        &self.memory.driver
    }
}

impl DeviceBuffer {
    /// Takes memory with undefined contents.
    ///
    /// # Errors
    ///
    /// The device has less.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, CudaError> {
        let bytes = bytes.max(1);
        let address = driver.allocate(bytes)?;
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    /// The same of memory that other processes can be given.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); and the device has none of that kind.
    pub fn shareable(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, CudaError> {
        let bytes = bytes.max(1);
        let address = driver.allocate_shareable(bytes)?;
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    /// The same of zeros.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn zeroed(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, CudaError> {
        let buffer = Self::new(driver, bytes)?;
        driver.fill(buffer.address, buffer.bytes, 0)?;
        Ok(buffer)
    }

    /// With these contents.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn holding(driver: &Arc<dyn Driver>, contents: &[u8]) -> Result<Self, CudaError> {
        let buffer = Self::new(driver, contents.len())?;
        driver.upload(buffer.address, contents)?;
        Ok(buffer)
    }

    /// The first byte.
    pub const fn address(&self) -> DeviceAddress {
        self.address
    }

    /// Size in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device that has it.
    pub const fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }
}

impl PinnedBuffer {
    /// Takes memory with undefined contents.
    ///
    /// # Errors
    ///
    /// The host has less of that kind.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, CudaError> {
        let bytes = bytes.max(1);
        let address = driver.allocate_pinned(bytes)?;
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    /// The first byte.
    pub const fn address(&self) -> PinnedAddress {
        self.address
    }

    /// Size in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        give_back(&*self.driver, self.bytes, || self.driver.free_pinned(self.address));
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        give_back(&*self.driver, self.bytes, || self.driver.free(self.address));
    }
}

/// Gives memory back that nothing uses any more. A device that has failed keeps it: who could say what still uses it?
fn give_back(driver: &dyn Driver, bytes: usize, free: impl FnOnce() -> Result<(), CudaError>) {
    if let Err(error) = driver.synchronize().and_then(|()| free()) {
        tracing::warn!(%error, bytes, "memory that the device uses is not given back");
    }
}

impl DevicePool {
    /// Takes memory for `blocks` blocks, of zeros: the end of a block that is not full goes to peers too, where it is zeroed
    /// again.
    ///
    /// # Errors
    ///
    /// The device has less.
    pub fn new(driver: &Arc<dyn Driver>, block_bytes: usize, blocks: BlockCount) -> Result<Self, CudaError> {
        let bytes = (blocks.0 as usize).saturating_mul(block_bytes);
        let (memory, not_shareable) = match DeviceBuffer::shareable(driver, bytes) {
            Ok(memory) => (memory, None),
            Err(error @ CudaError::NotShareable { .. }) => {
                (DeviceBuffer::new(driver, bytes)?, Some(error.to_string()))
            }
            Err(error) => return Err(error),
        };
        driver.fill(memory.address, memory.bytes, 0)?;
        Ok(Self {
            memory: Arc::new(memory),
            not_shareable,
            landing: PinnedBuffer::new(driver, bytes.min(LANDING_BYTES))?,
            same: vec![None; blocks.0 as usize],
            sharing: None,
            block_bytes,
            blocks,
        })
    }

    /// The same of several ranks, whose heads together are those of `whole` blocks. Addresses are the first one's, and blocks of the others
    /// lie as far from their first as those of the first do.
    ///
    /// # Errors
    ///
    /// A device has less.
    ///
    /// # Panics
    ///
    /// Without ranks, or when their blocks differ in size.
    pub fn of_ranks(
        whole: &KvBlockShape,
        ranks: &[RankHeads],
        blocks: BlockCount,
        asked: &Arc<Asked>,
    ) -> Result<Self, CudaError> {
        let block_bytes = ranks[0].shape.block_bytes();
        let all_alike = ranks.iter().all(|rank| rank.shape.block_bytes() == block_bytes);
        assert!(all_alike, "ranks have equally many heads");
        let first = Self::new(&ranks[0].driver, block_bytes, blocks)?;
        let bytes = first.bytes();
        let memory = |rank: &RankHeads| {
            let landing = PinnedBuffer::new(&rank.driver, bytes.min(LANDING_BYTES))?;
            Ok((DeviceBuffer::zeroed(&rank.driver, bytes)?, landing))
        };
        let slices = ranks.iter().map(|rank| HeadSlices::new(whole, &rank.shape, rank.first));
        let sharing = Sharing {
            slices: slices.collect(),
            is_read: ranks.iter().map(|rank| rank.is_read).collect(),
            others: ranks[1..].iter().map(memory).collect::<Result<_, CudaError>>()?,
            asked: Arc::clone(asked),
        };
        Ok(Self { sharing: Some(sharing), ..first })
    }

    /// Who has the blocks: one device, or each rank its heads.
    pub(crate) fn holders(&self) -> impl Iterator<Item = Holder<'_>> {
        let first = std::iter::once((&*self.memory, &self.landing));
        let others =
            self.sharing.iter().flat_map(|it| it.others.iter().map(|(memory, landing)| (memory, landing)));
        first.chain(others).enumerate().map(|(rank, (memory, landing))| Holder {
            memory,
            landing,
            block_bytes: self.block_bytes,
            slices: self.sharing.as_ref().map(|it| &it.slices[rank]),
            is_read: self.sharing.as_ref().is_none_or(|it| it.is_read[rank]),
        })
    }

    /// Whether ranks share the blocks: then nothing may be waited for while a step is asked for, since one rank waits for what another is
    /// asked for.
    pub(crate) const fn is_shared(&self) -> bool {
        self.sharing.is_some()
    }

    /// Waits until what was asked of the first rank was asked of the others.
    pub(crate) fn await_ranks(&self) {
        if let Some(sharing) = &self.sharing {
            sharing.asked.wait();
        }
    }

    /// Where each rank's blocks begin.
    pub fn firsts(&self) -> Vec<DeviceAddress> {
        self.holders().map(|holder| holder.address(BlockId(0))).collect()
    }

    /// Where a block is.
    ///
    /// # Panics
    ///
    /// When there is no such block: a bug, since the block manager never invents ids.
    pub fn address(&self, block: BlockId) -> DeviceAddress {
        assert!(block.0 < self.blocks.0, "{block:?} is outside a pool of {:?}", self.blocks);
        self.memory.address.offset(block.0 as usize * self.block_bytes)
    }

    /// The blocks, of layers of so many bytes, as peers on this host reach them and are reached from them. Where none can be, that says why.
    ///
    /// # Errors
    ///
    /// The device has no memory for what digests take.
    pub fn for_peers(&self, layer_bytes: usize) -> Result<Arc<dyn DeviceBlocks>, CudaError> {
        let ranks = self.sharing.as_ref().map(|sharing| sharing.slices.len());
        let why_not = ranks
            .map(|ranks| format!("{ranks} GPUs share the blocks, each with some heads of all"))
            .or_else(|| self.not_shareable.clone())
            .or_else(|| SharedPool::refusal(layer_bytes));
        Ok(match why_not {
            Some(reason) => Arc::new(LonelyPool(reason)),
            None => Arc::new(SharedPool::new(Arc::clone(&self.memory))?),
        })
    }

    /// What the device was asked to compute before comes before what peers are handed from here on.
    pub(crate) fn push_after_compute(&self) -> Result<(), CudaError> {
        self.driver().handoff_after_compute()
    }

    /// Waits until nothing that was asked for computes in any block: one that is free may be written by a peer then. Ranks' blocks never are.
    pub(crate) fn quiet(&self) -> Result<(), CudaError> {
        if self.is_shared() {
            return Ok(());
        }
        let ticket = self.driver().ticket(Queue::Compute)?;
        self.driver().wait(ticket)
    }

    /// Zeroes what is behind the first tokens of a block of this shape, in some of its layers.
    pub(crate) fn zero_tail(
        &self,
        block: BlockId,
        shape: &KvBlockShape,
        layers: Range<usize>,
        tokens: usize,
    ) -> Result<(), CudaError> {
        for layer in layers {
            for part in tail(shape, layer, tokens) {
                self.driver().fill(self.address(block).offset(part.start), part.len(), 0)?;
            }
        }
        Ok(())
    }

    /// All of them, which have this shape.
    ///
    /// # Panics
    ///
    /// When they are of another size.
    pub fn range(&self, shape: &KvBlockShape) -> BlockRange {
        assert_eq!(shape.block_bytes(), self.block_bytes, "the shape of the pool's blocks");
        BlockRange { first: self.memory.address, count: self.blocks.0, shape: *shape }
    }

    /// Whether a block's twin in the arena is the same. Only of blocks that are full: nobody writes them any more.
    pub(crate) fn is_same(&self, reference: BlockRef) -> bool {
        self.same[reference.block.0 as usize] == Some(reference.epoch)
    }

    /// A full block's twin in the arena is the same from now on.
    pub(crate) fn set_same(&mut self, reference: BlockRef) {
        self.same[reference.block.0 as usize] = Some(reference.epoch);
    }

    /// How many there are.
    pub const fn blocks(&self) -> BlockCount {
        self.blocks
    }

    /// Size in bytes, in each device that has some heads.
    pub fn bytes(&self) -> usize {
        self.memory.bytes
    }

    /// Memory of the host in which what goes to peers comes down.
    pub const fn landing(&self) -> &PinnedBuffer {
        &self.landing
    }

    /// The device that has it.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.memory.driver
    }
}

/// The bytes of a layer of a block that hold rows and scales of the tokens from `first` on, in as few pieces as they lie in.
fn tail(shape: &KvBlockShape, layer: usize, first: usize) -> Vec<Range<usize>> {
    let row = shape.head_size * shape.dtype.bytes();
    let mut parts: Vec<Range<usize>> = Vec::new();
    for (token, head) in
        (first..shape.block_len).flat_map(|token| (0..shape.kv_heads).map(move |head| (token, head)))
    {
        let (key, value) = (shape.key_offset(layer, token, head), shape.value_offset(layer, token, head));
        parts.extend([key..key + row, value..value + row]);
        if shape.dtype.has_scales() {
            let key = shape.key_scale_offset(layer, token, head);
            let value = key - shape.key_scale_offset + shape.value_scale_offset;
            parts.extend([key, value].map(|start| start..start + size_of::<f32>()));
        }
    }
    parts.sort_unstable_by_key(|part| part.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for part in parts {
        match joined.last_mut().filter(|last| last.end == part.start) {
            Some(last) => last.end = part.end,
            None => joined.push(part),
        }
    }
    joined
}

/// Some layers of a long prompt: more comes down while earlier ones are on their way.
const LANDING_BYTES: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use tidemill_kernels::kv::KvDtype;

    use super::*;

    /// Name, shape, layer, first token, and the pieces by their first bytes and those behind them.
    type Row<'a> = (&'a str, &'a KvBlockShape, usize, usize, &'a [(usize, usize)]);

    #[test]
    fn the_end_of_a_layer_is_zeroed_in_as_few_pieces_as_it_lies_in() {
        // Two layers, four tokens, two heads of eight numbers of two bytes; then with scales.
        let token_major = KvBlockShape {
            dtype: KvDtype::F16,
            layers: 2,
            block_len: 4,
            kv_heads: 2,
            head_size: 8,
            layer_stride: 256,
            key_offset: 0,
            value_offset: 128,
            key_scale_offset: 0,
            value_scale_offset: 0,
            token_stride: 32,
            head_stride: 16,
            scale_token_stride: 0,
            scale_head_stride: 0,
        };
        let head_major = KvBlockShape { token_stride: 16, head_stride: 64, ..token_major };
        let with_scales = KvBlockShape {
            dtype: KvDtype::Int8,
            value_offset: 64,
            key_scale_offset: 128,
            value_scale_offset: 160,
            token_stride: 16,
            head_stride: 8,
            scale_token_stride: 8,
            scale_head_stride: 4,
            ..token_major
        };
        #[rustfmt::skip]
        let rows: [Row<'_>; 5] = [
            ("tokens one behind the other",  &token_major, 0, 3, &[(96, 128), (224, 256)]),
            ("… in the second layer, joined", &token_major, 1, 0, &[(256, 512)]),
            ("heads one behind the other",   &head_major,  0, 3, &[(48, 64), (112, 128), (176, 192), (240, 256)]),
            ("scales too",                   &with_scales, 0, 3, &[(48, 64), (112, 128), (152, 160), (184, 192)]),
            ("a full block has no end",      &token_major, 0, 4, &[]),
        ];
        for (name, shape, layer, first, expected) in rows {
            let found: Vec<_> = tail(shape, layer, first).into_iter().map(|it| (it.start, it.end)).collect();
            assert_eq!(found, expected, "{name}");
        }
    }
}
