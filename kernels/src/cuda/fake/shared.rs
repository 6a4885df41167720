//! Memory of a device that is not there which other processes can have too: a memfd, whose last page says what it is.

use super::state::State;
use crate::cuda::{CudaError, DeviceAddress, DeviceIdentity};
use bytemuck::{AnyBitPattern, NoUninit};
use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{MapFlags, ProtFlags},
};
use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
};

/// One mapping of it, and the descriptor that others can be given.
///
/// # Invariant
///
/// `first` begins a mapping of `mapped` bytes, which this value made, of a file that cannot shrink: good for reads and writes until `drop`.
#[derive(Debug)]
pub(super) struct SharedMemory {
    first: NonNull<u8>,
    mapped: usize,
    file: OwnedFd,
}

/// What the last page begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AnyBitPattern, NoUninit)]
#[repr(C)]
struct Label {
    magic: u64,
    bytes: u64,
    owner: [u8; 16],
}

// SAFETY: a mapping belongs to the process, not to the thread that made it.
unsafe impl Send for SharedMemory {}

impl SharedMemory {
    /// Makes `bytes` bytes of zeros.
    pub(super) fn new(bytes: usize, owner: DeviceIdentity) -> Self {
        let label = Label { magic: MAGIC, bytes: bytes as u64, owner: owner.0 };
        let made = Self::make(bytes.next_multiple_of(PAGE), label);
        made.unwrap_or_else(|error| panic!("the host has no {bytes} bytes for the fake: {error}"))
    }

    fn make(before: usize, label: Label) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("fake device memory", flags)?;
        rustix::fs::ftruncate(&file, (before + PAGE) as u64)?;
        rustix::io::pwrite(&file, bytemuck::bytes_of(&label), before as u64)?;
        rustix::fs::fcntl_add_seals(&file, FIXED_SIZE)?;
        Self::map(file, before + PAGE)
    }

    /// Maps what another device has exported, if it is that.
    ///
    /// # Panics
    ///
    /// When it has another size, or belongs to another device, than is said: both come with the descriptor.
    pub(super) fn open(file: OwnedFd, bytes: usize, owner: DeviceIdentity) -> Result<Self, CudaError> {
        let no_handle = |_| CudaError::Call {
            call: "import",
            code: 1,
            name: "the descriptor is not of a device's memory".to_owned(),
        };
        let label = Self::label(&file).map_err(no_handle)?;
        let said = Label { magic: MAGIC, bytes: bytes as u64, owner: owner.0 };
        assert!(label == said, "import of {bytes} bytes of {owner:?}, where there are {label:?}");
        Self::map(file, bytes.next_multiple_of(PAGE) + PAGE).map_err(no_handle)
    }

    fn label(file: &OwnedFd) -> io::Result<Label> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let seals = rustix::fs::fcntl_get_seals(file)?;
        let size = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
        let at = size.checked_sub(PAGE as u64).filter(|_| seals.contains(FIXED_SIZE)).ok_or_else(invalid)?;
        let mut bytes = [0; size_of::<Label>()];
        let read = rustix::io::pread(file, &mut bytes, at)?;
        let label: Label = bytemuck::pod_read_unaligned(&bytes);
        let is_one = read == bytes.len() && label.magic == MAGIC;
        is_one.then_some(label).ok_or_else(invalid)
    }

    /// The file is at least that long and cannot shrink.
    fn map(file: OwnedFd, mapped: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED;
        // SAFETY: a null hint lets the kernel choose an address that is not in use.
        let first =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), mapped, protection, flags, file.as_fd(), 0) }?;
        let first = NonNull::new(first.cast()).expect("mmap never returns address zero");
        Ok(Self { first, mapped, file })
    }

    pub(super) const fn first(&self) -> *mut u8 {
        self.first.as_ptr()
    }

    /// To be given to another process.
    pub(super) fn descriptor(&self) -> OwnedFd {
        self.file.try_clone().expect("a process of tests has descriptors left")
    }
}

impl State {
    pub(super) fn allocate_shareable(
        &mut self,
        bytes: usize,
        own: DeviceIdentity,
    ) -> Result<DeviceAddress, CudaError> {
        self.check_not_recording("an allocation");
        self.count_down()?;
        if !self.shares {
            return Err(CudaError::NotShareable { reason: "this fake has none".to_owned() });
        }
        self.calls.allocations += 1;
        if self.free() < bytes {
            return Err(CudaError::OutOfMemory { bytes });
        }
        Ok(DeviceAddress(self.device.take_shareable(bytes, own)))
    }

    pub(super) fn export(&mut self, address: DeviceAddress) -> Result<OwnedFd, CudaError> {
        self.count_down()?;
        Ok(self.device.export(address.0))
    }

    pub(super) fn import(
        &mut self,
        memory: OwnedFd,
        bytes: usize,
        of: DeviceIdentity,
    ) -> Result<DeviceAddress, CudaError> {
        self.count_down()?;
        if self.out_of_reach.contains(&of) {
            return Err(CudaError::Unreachable { reason: "this fake was told so".to_owned() });
        }
        self.device.import(memory, bytes, of).map(DeviceAddress)
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: one mapping of this value's by the invariant; whoever has an address of it has given that back.
        let unmapped = unsafe { rustix::mm::munmap(self.first.as_ptr().cast::<c_void>(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "munmap fails only for ranges that are no mapping");
    }
}

const PAGE: usize = 4096;
/// What makes the size of a memfd final.
const FIXED_SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);
/// Nothing else begins its last page with it.
const MAGIC: u64 = 0x6b61_665f_656b_6166;
