//! One `mmap`, undone when it is dropped.

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::{fmt, io};

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::Access;

/// A mapping of `len` bytes.
///
/// # Invariants
///
/// - `base..base + mapped` is one mapping that this value made and that nothing else unmaps; `len <= mapped`.
/// - Its pages can always be touched as far as `access` allows: they are anonymous, or belong to a memfd that
///   is sealed against shrinking.
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// Bytes of the mapping: `len`, up to the end of its last page.
    mapped: usize,
    access: Access,
}

// SAFETY: a mapping belongs to the process, not to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives out a pointer and two numbers that never change; what is done through the pointer is
// answered for where it is done.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Fresh zeroed memory that no other process sees.
    pub(super) fn private(len: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint lets the kernel choose an address that is not in use.
        let base =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE) }?;
        Ok(Self::own(base.cast(), len, len, Access::ReadWrite))
    }

    /// The first `len` bytes of `fd`, shared with whoever else maps it. The caller has made sure that `fd` is
    /// at least that long and cannot shrink.
    pub(super) fn shared(fd: BorrowedFd<'_>, len: usize, access: Access) -> io::Result<Self> {
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // Huge pages are only unmapped whole.
        let page = usize::try_from(rustix::fs::fstat(fd)?.st_blksize).unwrap_or(1).max(1);
        let mapped = len.checked_next_multiple_of(page).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a null hint lets the kernel choose an address that is not in use.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), mapped, protection, MapFlags::SHARED, fd, 0) }?;
        Ok(Self::own(base.cast(), len, mapped, access))
    }

    fn own(base: *mut u8, len: usize, mapped: usize, access: Access) -> Self {
        let start = NonNull::new(base).expect("mmap never returns address zero");
        let mapping = Self { base: start, len, mapped, access };
        // Blocks lie scattered over gigabytes: with pages of 4 KiB nearly each line that is looked at costs a walk
        // through the page tables, and each page of a peer's memory a fault. A system without huge pages says no.
        // SAFETY: the mapping that was just made; the advice changes no byte of it.
        let advised = unsafe { rustix::mm::madvise(base.cast(), len, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages");
        }
        mapping
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    /// The address `offset` bytes into the mapping, from where `len` bytes can be touched.
    ///
    /// # Panics
    ///
    /// When the range does not lie in the mapping: a bug in the caller, who checks what peers say.
    pub(super) fn range(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len).expect("a range ends within the address space");
        assert!(end <= self.len, "range {offset}..{end} is outside a mapping of {} bytes", self.len);
        // SAFETY: `offset <= end <= self.len`, asserted above, so the result stays in (or one past) the one
        // mapping behind `base`, by the first invariant.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: by the first invariant this is exactly one mapping of ours; pointers that were handed out
        // are valid only while the owner lives, which their methods say.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "munmap fails only for ranges that are no mapping");
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:p}, {:?}", self.len, self.base, self.access)
    }
}
