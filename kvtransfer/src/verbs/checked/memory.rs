//! Memory that a device may touch.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::{Domain, loaded};
use crate::verbs::error::VerbsError;
use crate::verbs::raw;

/// A registered range, pinned until this is dropped. When the drop returns, the device has ended every access to it
/// and takes no other.
pub(in crate::verbs) struct Registration {
    raw: NonNull<raw::Mr>,
    /// Keeps the domain.
    _domain: Arc<Domain>,
}

// SAFETY: the library allows any thread to use and to undo a registration.
unsafe impl Send for Registration {}
// SAFETY: `&Registration` only reads keys, which never change.
unsafe impl Sync for Registration {}

impl Registration {
    /// Registers host memory.
    ///
    /// # Safety
    ///
    /// - `start..start + len` is mapped, and no allocator or other owner gives its pages to somebody else while the
    ///   registration lives, unless by unmapping them: the device goes on to reach the same pages.
    /// - As far as `access` lets the device write, nobody relies on the bytes to keep still.
    pub(in crate::verbs) unsafe fn host(
        domain: &Arc<Domain>,
        start: *mut u8,
        len: usize,
        access: i32,
    ) -> Result<Self, VerbsError> {
        // SAFETY: the domain is kept by the result; the caller answers for the range.
        let raw = unsafe { (loaded().ibv_reg_mr)(domain.as_ptr(), start.cast(), len, access) };
        Self::own(raw, domain, len)
    }

    /// Registers `len` bytes of a dma-buf, the kernel's name for memory of another device, such as a GPU. They are
    /// named by the addresses from `address` on. The registration holds the buffer; the descriptor may be closed.
    pub(in crate::verbs) fn dma_buf(
        domain: &Arc<Domain>,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        address: u64,
        access: i32,
    ) -> Result<Self, VerbsError> {
        let function = "ibv_reg_dmabuf_mr";
        let register = loaded().ibv_reg_dmabuf_mr.ok_or(VerbsError::NoFunction { function })?;
        // SAFETY: the domain is kept by the result; the kernel checks descriptor and range, and no memory of this
        // process is involved.
        let raw = unsafe { register(domain.as_ptr(), offset, len, address, fd.as_raw_fd(), access) };
        Self::own(raw, domain, len).map_err(no_dma_buf)
    }

    fn own(raw: *mut raw::Mr, domain: &Arc<Domain>, len: usize) -> Result<Self, VerbsError> {
        match NonNull::new(raw) {
            Some(raw) => Ok(Self { raw, _domain: Arc::clone(domain) }),
            None => Err(explain(VerbsError::last("register memory"), len)),
        }
    }

    /// Key by which work requests of this side name it.
    pub(in crate::verbs) fn local_key(&self) -> u32 {
        // SAFETY: the structure lives until `drop` and its keys never change.
        unsafe { (*self.raw.as_ptr()).lkey }
    }

    /// Key by which the peer names it.
    pub(in crate::verbs) fn remote_key(&self) -> u32 {
        // SAFETY: as in `local_key`.
        unsafe { (*self.raw.as_ptr()).rkey }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: made by the library and undone once. Work requests that name its keys end in an error.
        let code = unsafe { (loaded().ibv_dereg_mr)(self.raw.as_ptr()) };
        // The proof of quiet rests on it: better no worker than one that may be written to.
        assert_eq!(code, 0, "a registration is undone");
    }
}

/// The library says that a provider has no such call, the kernel that a driver has none.
fn no_dma_buf(error: VerbsError) -> VerbsError {
    let VerbsError::Call { source, .. } = &error else { return error };
    let is_missing = [Errno::NOSYS, Errno::OPNOTSUPP].map(|it| Some(it.raw_os_error()));
    if is_missing.contains(&source.raw_os_error()) { VerbsError::NoDmaBuf } else { error }
}

/// The kernel says "out of memory" when it means the limit on pinned memory.
fn explain(error: VerbsError, bytes: usize) -> VerbsError {
    let VerbsError::Call { source, .. } = &error else { return error };
    if source.raw_os_error() != Some(Errno::NOMEM.raw_os_error()) {
        return error;
    }
    match getrlimit(Resource::Memlock).current {
        Some(limit) => VerbsError::MemoryLock { bytes, limit: format!("{limit} bytes in all") },
        None => error,
    }
}
