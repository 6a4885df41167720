//! Memory with keys: what a device may read, and what a peer may reach.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::checked::{Domain, Gather, Registration};
use super::error::VerbsError;
use super::raw;
use crate::shm::{Region, Slab};

/// Registered memory, of one of three kinds: an arena (anonymous memfd pages, of any size, that other processes may
/// map too), staging memory of this process alone, or memory of another device.
///
/// When a drop of it returns, no device reaches the memory through it any more: the peers' access ends there.
pub(crate) struct MemoryRegion {
    registration: Registration,
    address: u64,
    len: usize,
    /// What keeps the mapping, where something has to.
    _owner: Option<Arc<Region>>,
}

/// Memory that reads bring bytes to. It belongs to the read alone while that is under way.
pub(super) struct Landing {
    /// Goes first when dropped.
    memory: MemoryRegion,
    slab: Slab,
}

/// Who may do what with registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// This side's writes take bytes from it.
    Source,
    /// A peer that is told the key may write and read it.
    Peer,
    /// A peer that is told the key may read it.
    Reader,
}

impl MemoryRegion {
    /// Registers an arena, which is kept alive.
    pub(super) fn of_region(
        domain: &Arc<Domain>,
        region: &Arc<Region>,
        reach: Reach,
    ) -> Result<Self, VerbsError> {
        let (start, len) = (region.as_ptr(), region.len());
        // SAFETY: the region is a mapping of its own that the result keeps; its bytes may change at any time, and
        // are never lent out as a slice.
        let registration = unsafe { Registration::host(domain, start, len, reach.flags()) }?;
        let _owner = Some(Arc::clone(region));
        Ok(Self { registration, address: start.addr() as u64, len, _owner })
    }

    /// Registers staging memory for reading. It is not kept alive, so that its owner can see when nobody needs it;
    /// the pages stay pinned meanwhile.
    pub(super) fn of_slab(domain: &Arc<Domain>, slab: &Arc<Slab>) -> Result<Self, VerbsError> {
        let bytes = slab.as_slice();
        let (start, len) = (bytes.as_ptr().cast_mut(), bytes.len());
        // SAFETY: a slab is a mapping of its own, which ends by unmapping; the device only reads it.
        let registration = unsafe { Registration::host(domain, start, len, Reach::Source.flags()) }?;
        Ok(Self { registration, address: start.addr() as u64, len, _owner: None })
    }

    /// Registers memory of another device, exported as a dma-buf: `len` bytes from `offset` on. It is named by
    /// addresses from zero on.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "arenas in device memory come with the devices that have them")
    )]
    pub(super) fn of_dma_buf(
        domain: &Arc<Domain>,
        buffer: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        reach: Reach,
    ) -> Result<Self, VerbsError> {
        let registration = Registration::dma_buf(domain, buffer, offset, len, 0, reach.flags())?;
        Ok(Self { registration, address: 0, len, _owner: None })
    }

    /// Address by which requests name its first byte.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn local_key(&self) -> u32 {
        self.registration.local_key()
    }

    pub(super) fn remote_key(&self) -> u32 {
        self.registration.remote_key()
    }
}

impl Landing {
    /// Makes room for `len` bytes.
    pub(super) fn new(domain: &Arc<Domain>, len: usize) -> Result<Self, VerbsError> {
        let operation = "get memory to read into";
        let mut slab = Slab::new(len).map_err(|source| VerbsError::Call { operation, source })?;
        let bytes = slab.as_mut_slice();
        let (start, len) = (bytes.as_mut_ptr(), bytes.len());
        // SAFETY: a slab is a mapping of its own; this one belongs to the result, which lets nobody see the bytes
        // before the queue pair that it was posted on gives it back.
        let registration = unsafe { Registration::host(domain, start, len, raw::ACCESS_LOCAL_WRITE) }?;
        let memory = MemoryRegion { registration, address: start.addr() as u64, len, _owner: None };
        Ok(Self { memory, slab })
    }

    pub(super) fn gather(&self) -> Gather {
        let len = u32::try_from(self.memory.len).expect("a read is short");
        Gather { address: self.memory.address, len, key: self.memory.local_key() }
    }

    /// What was read.
    pub(super) fn bytes(&self) -> &[u8] {
        self.slab.as_slice()
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryRegion({} bytes at {:#x})", self.len, self.address)
    }
}

impl Reach {
    fn flags(self) -> i32 {
        match self {
            // Without it some kernels pin a page that is replaced when it is first stored to.
            Self::Source => raw::ACCESS_LOCAL_WRITE,
            Self::Reader => raw::ACCESS_LOCAL_WRITE | raw::ACCESS_REMOTE_READ,
            Self::Peer => raw::ACCESS_LOCAL_WRITE | raw::ACCESS_REMOTE_WRITE | raw::ACCESS_REMOTE_READ,
        }
    }
}
