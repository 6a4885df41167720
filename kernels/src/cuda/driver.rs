//! What is asked of a device: memory, copies, launches.

use super::Launch;
use bytemuck::NoUninit;
use std::fmt::Debug;

/// A place in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, NoUninit)]
#[repr(transparent)]
pub struct DeviceAddress(pub u64);

impl DeviceAddress {
    /// No place: a parameter that may be left out.
    pub const NULL: Self = Self(0);

    /// A place some bytes further.
    #[must_use]
    pub const fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Why a device did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// Less memory is free than was asked for.
    #[error("the GPU has no {bytes} bytes of free memory")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
}

/// Every call to a device goes through here, so that whatever runs on a GPU runs on the [`fake`](super::fake) as well.
///
/// Operations are carried out in the order of the calls. An upload has read its source when it returns, a download has filled its
/// target; a launch or a fill may still be under way, until [`synchronize`](Self::synchronize).
///
/// Memory is given back by [`free`](Self::free) alone, once nothing that was asked for uses it. A wrong address or length is a bug
/// of the caller: the fake panics with what is wrong, a GPU may compute nonsense.
pub trait Driver: Debug + Send + Sync {
    /// Name of the device, for people.
    fn describe(&self) -> String;

    /// Takes memory, aligned to 256 bytes, with undefined contents. Never of no bytes.
    ///
    /// # Errors
    ///
    /// [`CudaError::OutOfMemory`].
    fn allocate(&self, bytes: usize) -> Result<DeviceAddress, CudaError>;

    /// Gives memory back: an address that [`allocate`](Self::allocate) returned, once.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn free(&self, address: DeviceAddress) -> Result<(), CudaError>;

    /// Copies from the host.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn upload(&self, to: DeviceAddress, from: &[u8]) -> Result<(), CudaError>;

    /// Copies to the host, after everything that was asked for before.
    ///
    /// # Errors
    ///
    /// What the device says, also about what was asked for before.
    fn download(&self, to: &mut [u8], from: DeviceAddress) -> Result<(), CudaError>;

    /// Sets bytes to one value.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn fill(&self, address: DeviceAddress, bytes: usize, value: u8) -> Result<(), CudaError>;

    /// Runs a kernel.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn launch(&self, launch: &Launch) -> Result<(), CudaError>;

    /// Waits for everything that was asked for.
    ///
    /// # Errors
    ///
    /// What the device says about it.
    fn synchronize(&self) -> Result<(), CudaError>;
}
