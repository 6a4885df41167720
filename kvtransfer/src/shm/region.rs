//! Host memory that can be shared with another process: the block arena of a worker.
//!
//! A region is a memfd sealed against resizing, so that a peer that maps it can never be hit by SIGBUS because
//! its owner truncated it, and no path in a file system has to be chosen or cleaned up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::mapping::Mapping;
use super::streaming::{self, Next};

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads only.
    Read,
    /// Loads and stores.
    ReadWrite,
}

/// What a region is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Pages as the kernel gives them.
    #[default]
    Normal,
    /// Huge ones of the kernel's pool (`vm.nr_hugepages`), set aside at once: fewer of them to walk when a device is
    /// given the memory, fewer entries in its tables and in those of the processor. A rest of the last one stays unused.
    Huge,
}

/// Memory that other processes may map too. Page aligned; lives as long as the last `Arc` or mapping of it.
///
/// The bytes can change at any time by the hand of a peer that was given the region, so they are never lent out
/// as a slice: [`read`](Self::read) and [`write`](Self::write) copy, and [`as_ptr`](Self::as_ptr) is for kernels
/// that answer for their own ranges. Which of them may be touched when is what the handoff protocol decides.
#[derive(Debug)]
pub struct Region {
    mapping: Mapping,
    fd: OwnedFd,
}

/// Copies into a region. Whoever hears of it after this value is gone sees the bytes; before, they may be on their way.
#[derive(Debug)]
pub(crate) struct RegionWriter<'a> {
    region: &'a Region,
}

impl Region {
    /// Makes a region of `len` zeroed bytes; `name` shows up in `/proc/<pid>/maps`. Memory is taken from the
    /// system page by page as it is first touched: huge pages where the system has them for shared memory.
    ///
    /// # Errors
    ///
    /// `len` is zero, or the system is out of descriptors or address space.
    pub fn new(name: &str, len: usize) -> io::Result<Arc<Self>> {
        Self::with_pages(name, len, Pages::Normal)
    }

    /// The same, of pages of that kind.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); and the kernel knows no huge pages, or has not enough of them.
    pub fn with_pages(name: &str, len: usize, pages: Pages) -> io::Result<Arc<Self>> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a region has at least one byte"));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = match pages {
            Pages::Normal => rustix::fs::memfd_create(name, flags)?,
            Pages::Huge => {
                rustix::fs::memfd_create(name, flags | MemfdFlags::HUGETLB).map_err(no_huge_pages)?
            }
        };
        let page = u64::try_from(rustix::fs::fstat(&fd)?.st_blksize).unwrap_or(1).max(1);
        let size = match pages {
            Pages::Normal => len as u64,
            Pages::Huge => (len as u64).next_multiple_of(page),
        };
        rustix::fs::ftruncate(&fd, size)?;
        rustix::fs::fcntl_add_seals(&fd, FIXED_SIZE | SealFlags::SEAL)?;
        let mapping = Mapping::shared(fd.as_fd(), len, Access::ReadWrite);
        let mapping = mapping.map_err(|error| match pages {
            Pages::Normal => error,
            Pages::Huge => too_few_huge_pages(&error, size, page),
        })?;
        Ok(Arc::new(Self { mapping, fd }))
    }

    /// Maps the region behind a descriptor that a peer sent.
    ///
    /// # Errors
    ///
    /// The descriptor is no memfd of at least `len` bytes whose size is sealed: touching such memory could kill
    /// this process.
    pub fn map(fd: OwnedFd, len: usize, access: Access) -> io::Result<Arc<Self>> {
        let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return invalid("the peer's region can shrink");
        }
        let size = usize::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
        if len == 0 || size < len {
            return invalid("the peer's region is shorter than announced");
        }
        let mapping = Mapping::shared(fd.as_fd(), len, access)?;
        Ok(Arc::new(Self { mapping, fd }))
    }

    /// The first byte. Valid for [`len`](Self::len) bytes while the region lives; unless it was mapped with
    /// [`Access::Read`], also for stores.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Size in bytes. Never zero.
    #[allow(clippy::len_without_is_empty, reason = "a region has at least one byte")]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// The descriptor to hand to a peer.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether `offset..offset + len` lies in the region.
    pub fn contains(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len())
    }

    /// Copies `target.len()` bytes out, starting at `offset`. A peer that writes the range meanwhile makes
    /// the result a mixture; the digest of the commit record exists to notice.
    ///
    /// # Panics
    ///
    /// When the range is outside the region.
    pub fn read(&self, offset: usize, target: &mut [u8]) {
        let source = self.mapping.range(offset, target.len());
        // SAFETY: `range` checked that the source is mapped and readable for this many bytes; `target` is an
        // exclusive slice and thus no part of a region, whose bytes are never lent out. A store by another
        // process during the copy is outside what the language describes; the bytes are plain numbers, so
        // every mixture is a valid value.
        unsafe { std::ptr::copy_nonoverlapping(source.cast_const(), target.as_mut_ptr(), target.len()) };
    }

    /// Copies `source` in, starting at `offset`.
    ///
    /// # Panics
    ///
    /// When the range is outside the region or the region is mapped for reading only.
    pub fn write(&self, offset: usize, source: &[u8]) {
        let next = self.nowhere(source.as_ptr());
        self.writer().write(offset, source, next);
    }

    /// To copy many pieces in.
    ///
    /// # Panics
    ///
    /// When the region is mapped for reading only.
    pub(crate) fn writer(&self) -> RegionWriter<'_> {
        assert_eq!(self.mapping.access(), Access::ReadWrite, "the region is mapped for reading only");
        RegionWriter { region: self }
    }

    /// The bytes of a range, for a system call that sends them.
    ///
    /// # Panics
    ///
    /// When the range is outside the region.
    pub(crate) fn to_send(&self, offset: usize, len: usize) -> &[u8] {
        let source = self.mapping.range(offset, len).cast_const();
        // SAFETY: `range` checked that the source is mapped and readable for this many bytes, for as long as `self`
        // lives. Nothing in this process looks through the slice: it is handed to the kernel, for which memory that
        // a peer changes meanwhile is like any other.
        unsafe { std::slice::from_raw_parts(source, len) }
    }

    /// Receives from `stream`: first into the range, what comes behind it into `behind`. Returns how many bytes came.
    ///
    /// # Errors
    ///
    /// Those of the system; nothing is there to be received.
    ///
    /// # Panics
    ///
    /// When the range is outside the region or the region is mapped for reading only.
    pub(crate) fn receive_from(
        &self,
        offset: usize,
        len: usize,
        stream: BorrowedFd<'_>,
        behind: &mut [u8],
    ) -> io::Result<usize> {
        assert_eq!(self.mapping.access(), Access::ReadWrite, "the region is mapped for reading only");
        let target = self.mapping.range(offset, len);
        // SAFETY: `range` checked that the target is mapped for this many bytes, and the assertion that it may be
        // stored to; the slice goes to the kernel at once and ends with this call. See `to_send` for peers.
        let target = unsafe { std::slice::from_raw_parts_mut(target, len) };
        let mut parts = [io::IoSliceMut::new(target), io::IoSliceMut::new(behind)];
        Ok(rustix::io::readv(stream, &mut parts)?)
    }

    /// Copies `len` bytes from `source` at `source_offset` to `offset`. The two may be the same region.
    ///
    /// # Panics
    ///
    /// When a range is outside its region or this region is mapped for reading only.
    pub fn copy_from(&self, offset: usize, source: &Self, source_offset: usize, len: usize) {
        let next = self.nowhere(source.as_ptr());
        self.writer().copy_from(offset, source, source_offset, len, next);
    }

    /// After a copy that is alone.
    fn nowhere(&self, source: *const u8) -> Next {
        Next { source, target: self.as_ptr() }
    }
}

impl RegionWriter<'_> {
    /// Copies `source` in, starting at `offset`.
    ///
    /// # Panics
    ///
    /// When the range is outside the region.
    pub(crate) fn write(&self, offset: usize, source: &[u8], next: Next) {
        let target = self.region.mapping.range(offset, source.len());
        // SAFETY: `range` checked that the target is mapped for this many bytes, and `writer` that it may be stored
        // to; `source` is a slice and thus no part of a region. See `Region::read` for other processes.
        unsafe { streaming::copy(source.as_ptr(), target, source.len(), next) };
    }

    /// Copies `len` bytes from `source` at `source_offset` to `offset`. The two may be the same region.
    ///
    /// # Panics
    ///
    /// When a range is outside its region.
    pub(crate) fn copy_from(
        &self,
        offset: usize,
        source: &Region,
        source_offset: usize,
        len: usize,
        next: Next,
    ) {
        let source = source.mapping.range(source_offset, len).cast_const();
        let target = self.region.mapping.range(offset, len);
        if source.addr().abs_diff(target.addr()) < len {
            // SAFETY: `range` checked both sides for this many bytes; `copy` allows them to overlap. See
            // `Region::read` for other processes.
            return unsafe { std::ptr::copy(source, target, len) };
        }
        // SAFETY: `range` checked both sides for this many bytes, and their addresses are further apart. Two mappings
        // of one memfd may still be the same memory: then bytes that are copied while they change are a mixture, as
        // with a peer that writes. See `Region::read` for other processes.
        unsafe { streaming::copy(source, target, len, next) };
    }
}

impl Drop for RegionWriter<'_> {
    fn drop(&mut self) {
        streaming::settle();
    }
}

fn no_huge_pages(error: Errno) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("the kernel has no huge pages: {error}"))
}

fn too_few_huge_pages(error: &io::Error, size: u64, page: u64) -> io::Error {
    let kind = error.kind();
    let pages = size / page;
    let text = format!(
        "{pages} huge pages of {page} bytes are needed, and fewer are free (vm.nr_hugepages says how many there are): {error}"
    );
    io::Error::new(kind, text)
}

/// What makes the size of a memfd final.
const FIXED_SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_mapping_sees_the_same_bytes() {
        let ours = Region::new("test", 10_000).unwrap();
        let fd = ours.fd().try_clone_to_owned().unwrap();
        let theirs = Region::map(fd, 10_000, Access::ReadWrite).unwrap();
        assert_eq!(ours.as_ptr() as usize % 4096, 0);

        theirs.write(4090, b"hello across a page");
        let mut seen = [0; 19];
        ours.read(4090, &mut seen);
        assert_eq!(&seen, b"hello across a page");

        ours.copy_from(1, &theirs, 4090, 5);
        let mut seen = [9; 7];
        theirs.read(0, &mut seen);
        assert_eq!(&seen, b"\0hello\0");
    }

    #[test]
    fn unsafe_descriptors_are_refused() {
        let region = Region::new("test", 4096).unwrap();
        let clone = || region.fd().try_clone_to_owned().unwrap();
        let unsealed = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, 4096).unwrap();
        let rows = [
            ("a region that could shrink", Region::map(unsealed, 4096, Access::Read).is_err()),
            ("a region shorter than announced", Region::map(clone(), 4097, Access::Read).is_err()),
            ("an empty mapping", Region::map(clone(), 0, Access::Read).is_err()),
            ("an empty region", Region::new("test", 0).is_err()),
            ("shrinking a sealed region", rustix::fs::ftruncate(region.fd(), 1).is_err()),
        ];
        for (name, refused) in rows {
            assert!(refused, "{name} is refused");
        }
    }

    /// Whatever the machine has: what is said is held against what the kernel shows.
    #[test]
    fn huge_pages_are_had_or_the_lack_of_them_is_named() {
        const TOO_MANY: usize = 1 << 44;
        let error = Region::with_pages("huge", TOO_MANY, Pages::Huge).unwrap_err().to_string();
        if std::path::Path::new("/sys/kernel/mm/hugepages").exists() {
            assert!(error.contains("huge pages of") && error.contains("vm.nr_hugepages"), "{error}");
        } else {
            assert!(error.contains("the kernel has no huge pages"), "{error}");
        }
        // Not that of any page: only a whole last one can be unmapped.
        let Ok(ours) = Region::with_pages("huge", 2_500_001, Pages::Huge) else {
            return eprintln!("no free huge pages here: tests/rdma/check has some");
        };
        assert_eq!(ours.len(), 2_500_001);
        let theirs =
            Region::map(ours.fd().try_clone_to_owned().unwrap(), ours.len(), Access::ReadWrite).unwrap();
        theirs.write(2_500_000, &[7]);
        let mut seen = [0];
        ours.read(2_500_000, &mut seen);
        assert_eq!(seen, [7]);
    }

    #[test]
    #[should_panic(expected = "outside a mapping")]
    fn a_range_outside_is_a_bug() {
        Region::new("test", 4096).unwrap().write(4090, b"too long");
    }
}
