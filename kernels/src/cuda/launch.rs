//! One run of a kernel as a value.

use super::TensorMap;
use bytemuck::NoUninit;
use std::fmt;

/// A kernel, its grid and its parameters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// File in `kernels/cu` that has the kernel, without `.cu`.
    pub module: &'static str,
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z: whole warps.
    pub block: [u32; 3],
    /// Bytes of shared memory beyond what the kernel declares.
    pub shared_bytes: u32,
    parameters: [u64; PARAMETER_WORDS],
    parameter_bytes: usize,
    tensor_maps: usize,
}

/// The structure that a kernel takes, as C lays it out.
pub trait Parameters: NoUninit {
    /// It begins with so many [`TensorMap`]s, which a driver encodes as its device takes them.
    const TENSOR_MAPS: usize = 0;
}

impl Launch {
    /// A run of blocks of one dimension without dynamic shared memory.
    ///
    /// # Panics
    ///
    /// When the grid or the block is empty, or the block is not whole warps.
    pub fn new(
        module: &'static str,
        kernel: &'static str,
        grid: [u32; 3],
        threads: u32,
        parameters: &impl Parameters,
    ) -> Self {
        assert!(!grid.contains(&0) && 0 < threads, "{kernel}: {grid:?} blocks of {threads} threads");
        assert!(threads.is_multiple_of(WARP), "{kernel}: {threads} threads are not whole warps");
        let bytes = bytemuck::bytes_of(parameters);
        let mut words = [0u64; PARAMETER_WORDS];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        let block = [threads, 1, 1];
        let parameter_bytes = bytes.len();
        let tensor_maps = tensor_maps_of(parameters);
        Self { module, kernel, grid, block, shared_bytes: 0, parameters: words, parameter_bytes, tensor_maps }
    }

    /// With so much shared memory beyond what the kernel declares.
    #[must_use]
    pub const fn with_shared_bytes(mut self, bytes: u32) -> Self {
        self.shared_bytes = bytes;
        self
    }

    /// How many [`TensorMap`]s the parameters begin with.
    pub const fn tensor_maps(&self) -> usize {
        self.tensor_maps
    }

    /// The parameters in whole words, with each tensor map replaced by what `encode` makes of it.
    pub(super) fn encoded<E>(
        &self,
        encode: impl Fn(&TensorMap) -> Result<[u64; TENSOR_MAP_WORDS], E>,
    ) -> Result<[u64; PARAMETER_WORDS], E> {
        let mut words = self.parameters;
        for map in words.chunks_exact_mut(TENSOR_MAP_WORDS).take(self.tensor_maps) {
            let encoded = encode(&bytemuck::pod_read_unaligned(bytemuck::cast_slice(map)))?;
            map.copy_from_slice(&encoded);
        }
        Ok(words)
    }

    /// The parameters' bytes.
    pub fn parameters(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.parameters)[..self.parameter_bytes]
    }
}

impl fmt::Debug for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}<<<{:?}, {:?}, {}>>>", self.kernel, self.grid, self.block, self.shared_bytes)
    }
}

const fn tensor_maps_of<P: Parameters>(_: &P) -> usize {
    assert!(P::TENSOR_MAPS * size_of::<TensorMap>() <= size_of::<P>(), "they are a part of it");
    P::TENSOR_MAPS
}

/// Threads of a warp.
pub(super) const WARP: u32 = 32;
/// A tensor map in whole words.
pub(super) const TENSOR_MAP_WORDS: usize = size_of::<TensorMap>() / size_of::<u64>();
/// Room for the parameters of any of our kernels.
const PARAMETER_WORDS: usize = 64;
