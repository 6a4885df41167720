//! Buffers on a device, and elements of some type in them.

use super::{Blocks, STALE, stored};
use bytemuck::{AnyBitPattern, NoUninit};
use tidemill_kernels::{
    cuda::{DeviceAddress, Driver, PinnedAddress, hopper::BlockRange},
    kv::KvBlockShape,
    matrix::WeightDtype,
    reference,
};

/// Memory of a device, given back when dropped.
pub struct Buffer<'a> {
    driver: &'a dyn Driver,
    address: DeviceAddress,
    bytes: usize,
}

impl<'a> Buffer<'a> {
    /// With these contents.
    pub fn new<T: NoUninit>(driver: &'a dyn Driver, contents: &[T]) -> Self {
        let bytes: &[u8] = bytemuck::cast_slice(contents);
        let buffer = Self::empty(driver, bytes.len());
        driver.upload(buffer.address, bytes).expect("the device has it");
        buffer
    }

    /// With contents that nobody may read.
    pub fn empty(driver: &'a dyn Driver, bytes: usize) -> Self {
        Self { driver, address: driver.allocate(bytes).expect("the device has it"), bytes }
    }

    pub fn address(&self) -> DeviceAddress {
        self.address
    }

    pub fn read<T: AnyBitPattern>(&self) -> Vec<T> {
        let mut bytes = vec![0; self.bytes];
        self.driver.download(&mut bytes, self.address).expect("the device has it");
        bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // A test that looks for a panic has found one.
        if !std::thread::panicking() {
            self.driver.free(self.address).expect("nothing uses it");
        }
    }
}

/// Memory of the host that a device copies from and to, given back when dropped.
pub struct Pinned<'a> {
    driver: &'a dyn Driver,
    address: PinnedAddress,
    bytes: usize,
}

impl<'a> Pinned<'a> {
    /// With these contents.
    pub fn new<T: NoUninit>(driver: &'a dyn Driver, contents: &[T]) -> Self {
        let bytes: &[u8] = bytemuck::cast_slice(contents);
        let address = driver.allocate_pinned(bytes.len()).expect("the host has it");
        driver.write_pinned(address, bytes);
        Self { driver, address, bytes: bytes.len() }
    }

    pub fn address(&self) -> PinnedAddress {
        self.address
    }

    pub fn read<T: AnyBitPattern>(&self) -> Vec<T> {
        let mut bytes = vec![0; self.bytes];
        self.driver.read_pinned(&mut bytes, self.address);
        bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        // A test that looks for a panic has found one.
        if !std::thread::panicking() {
            self.driver.free_pinned(self.address).expect("nothing uses it");
        }
    }
}

/// Numbers in a type on the device.
pub fn elements<'a>(driver: &'a dyn Driver, values: &[f32], dtype: WeightDtype) -> Buffer<'a> {
    Buffer::new(driver, &stored(values, dtype))
}

/// Numbers of a type, back as f32.
pub fn floats(buffer: &Buffer<'_>, dtype: WeightDtype) -> Vec<f32> {
    widened(&buffer.read(), dtype)
}

/// What a number becomes when it is stored in a type.
pub fn rounded(values: &[f32], dtype: WeightDtype) -> Vec<f32> {
    widened(&stored(values, dtype), dtype)
}

fn widened(bytes: &[u8], dtype: WeightDtype) -> Vec<f32> {
    reference::widen_matrix(super::source(bytes, dtype))
}

/// How far a result in a type may be off, as a share of the greatest: of half a step of the type, and of sums in f32.
pub fn tolerance(dtype: WeightDtype) -> f32 {
    match dtype {
        WeightDtype::F32 => 2e-6,
        WeightDtype::F16 => 1.0 / 2048.0,
        WeightDtype::Bf16 => 1.0 / 256.0,
    }
}

/// Blocks of a KV cache on a device, in one allocation, full of what was there before; and the table of their addresses.
pub struct DeviceBlocks<'a> {
    memory: Buffer<'a>,
    table: Buffer<'a>,
    shape: KvBlockShape,
}

/// The blocks of some sequences as kernels look them up, `[sequence][block]`, null behind a sequence's last.
pub fn block_table(sequences: &[DeviceBlocks<'_>], blocks_per_sequence: usize) -> Vec<DeviceAddress> {
    let row = |blocks: &DeviceBlocks<'_>| {
        let mut row = blocks.addresses();
        row.resize(blocks_per_sequence, DeviceAddress::NULL);
        row
    };
    sequences.iter().flat_map(row).collect()
}

impl<'a> DeviceBlocks<'a> {
    pub fn new(driver: &'a dyn Driver, shape: KvBlockShape, count: usize) -> Self {
        let memory = Buffer::new(driver, &vec![STALE; count * shape.block_bytes() / size_of::<u64>()]);
        // Not in the order of their addresses.
        let addresses: Vec<DeviceAddress> =
            (0..count).rev().map(|block| memory.address.offset(block * shape.block_bytes())).collect();
        Self { memory, table: Buffer::new(driver, &addresses), shape }
    }

    /// With the contents of blocks on the host.
    pub fn copy_of(driver: &'a dyn Driver, shape: KvBlockShape, blocks: &Blocks) -> Self {
        let count = blocks.addresses.len();
        let copy = Self::new(driver, shape, count);
        for block in 0..count {
            driver.upload(copy.block(block), blocks.bytes(block)).expect("the device has it");
        }
        copy
    }

    /// Sets every byte of all blocks.
    pub fn fill(&self, value: u8) {
        self.memory.driver.fill(self.memory.address, self.memory.bytes, value).expect("the device has it");
    }

    /// All of them, as they lie one behind the other.
    pub fn range(&self) -> BlockRange {
        let count = self.memory.bytes / self.shape.block_bytes();
        BlockRange { first: self.memory.address, count: count as u32, shape: self.shape }
    }

    pub fn addresses(&self) -> Vec<DeviceAddress> {
        self.table.read::<u64>().into_iter().map(DeviceAddress).collect()
    }

    /// Address of the table.
    pub fn table(&self) -> DeviceAddress {
        self.table.address
    }

    pub fn bytes(&self, block: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.shape.block_bytes()];
        self.memory.driver.download(&mut bytes, self.block(block)).expect("the device has it");
        bytes
    }

    fn block(&self, block: usize) -> DeviceAddress {
        let count = self.memory.bytes / self.shape.block_bytes();
        self.memory.address.offset((count - 1 - block) * self.shape.block_bytes())
    }
}
