//! Memory of a GPU: buffers that are given back when dropped, and the blocks of the KV cache.

use std::sync::Arc;

use tidemill_kernels::cuda::hopper::BlockRange;
use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver, PinnedAddress};
use tidemill_kernels::kv::KvBlockShape;
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockRef, Epoch};

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
    memory: DeviceBuffer,
    block_bytes: usize,
    blocks: BlockCount,
    /// Where what goes to peers comes down.
    landing: PinnedBuffer,
    /// In which generation a block's twin in the arena was last made the same, all of it.
    same: Vec<Option<Epoch>>,
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
        Ok(Self {
            memory: DeviceBuffer::zeroed(driver, bytes)?,
            landing: PinnedBuffer::new(driver, bytes.min(LANDING_BYTES))?,
            same: vec![None; blocks.0 as usize],
            block_bytes,
            blocks,
        })
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

    /// Size in bytes.
    pub const fn bytes(&self) -> usize {
        self.memory.bytes
    }

    /// Memory of the host in which what goes to peers comes down.
    pub const fn landing(&self) -> &PinnedBuffer {
        &self.landing
    }

    /// The device that has it.
    pub const fn driver(&self) -> &Arc<dyn Driver> {
        &self.memory.driver
    }
}

/// Some layers of a long prompt: more comes down while earlier ones are on their way.
const LANDING_BYTES: usize = 64 << 20;
