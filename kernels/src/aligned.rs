//! Memory of plain numbers that starts on a cache line.
//!
//! Large buffers ask for huge pages: a matrix-vector product touches every page of the weights once, and with 4 KiB
//! pages address translation takes a visible part of its time.

use bytemuck::{AnyBitPattern, NoUninit, Pod};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ptr::NonNull,
    slice,
};

/// Owned zeroed bytes, aligned to [`ALIGNMENT`] or, when large, to [`HUGE_PAGE`].
///
/// # Invariants
///
/// - `base` points at `layout.size()` initialised bytes that this value owns and nothing else refers to, or dangles
///   when the size is zero.
pub(crate) struct AlignedBuffer {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its bytes as a `Vec<u8>` would; there is no thread-bound state.
unsafe impl Send for AlignedBuffer {}
// SAFETY: `&AlignedBuffer` gives only shared slices.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Allocates `len` zeroed bytes.
    pub(crate) fn zeroed(len: usize) -> Self {
        let alignment = if len < HUGE_PAGE { ALIGNMENT } else { HUGE_PAGE };
        let layout = Layout::from_size_align(len, alignment).expect("a buffer fits the address space");
        if len == 0 {
            return Self { base: NonNull::<CacheLine>::dangling().cast(), layout };
        }
        // SAFETY: `layout` has non-zero size, which is all `alloc_zeroed` asks of us.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        advise_huge_pages(base, len);
        Self { base, layout }
    }

    /// The contents as numbers.
    pub(crate) fn as_slice<T: AnyBitPattern>(&self) -> &[T] {
        // SAFETY: `base` is good for reads of `layout.size()` initialised bytes that live as long as `self`.
        let bytes = unsafe { slice::from_raw_parts(self.base.as_ptr(), self.layout.size()) };
        bytemuck::cast_slice(bytes)
    }

    /// The contents as numbers, to write.
    pub(crate) fn as_mut_slice<T: AnyBitPattern + NoUninit>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; the result borrows `self` mutably, so it is the only view.
        let bytes = unsafe { slice::from_raw_parts_mut(self.base.as_ptr(), self.layout.size()) };
        bytemuck::cast_slice_mut(bytes)
    }

    /// The first `count` numbers, after growing the buffer when it is too small. Contents are not kept.
    pub(crate) fn grown<T: Pod>(&mut self, count: usize) -> &mut [T] {
        if self.layout.size() < count * size_of::<T>() {
            *self = Self::zeroed((count * size_of::<T>()).next_multiple_of(ALIGNMENT));
        }
        &mut self.as_mut_slice::<T>()[..count]
    }

    /// Size in bytes.
    pub(crate) const fn len(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: `base` came from `alloc_zeroed(self.layout)` and is freed only here.
            unsafe { dealloc(self.base.as_ptr(), self.layout) };
        }
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "AlignedBuffer({} bytes)", self.len())
    }
}

#[cfg(target_os = "linux")]
fn advise_huge_pages(base: NonNull<u8>, len: usize) {
    let whole_pages = len / HUGE_PAGE * HUGE_PAGE;
    if whole_pages > 0 {
        // SAFETY: the range is whole pages inside memory that the caller owns; the advice changes no contents.
        // It is only advice: a kernel without huge pages refuses it, and all works as before.
        let _ = unsafe {
            rustix::mm::madvise(base.as_ptr().cast(), whole_pages, rustix::mm::Advice::LinuxHugepage)
        };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_base: NonNull<u8>, _len: usize) {}

#[repr(align(64))]
struct CacheLine;

/// Bytes of a cache line, and of the widest vector register.
pub(crate) const ALIGNMENT: usize = 64;

/// Bytes of a huge page on the machines that matter.
const HUGE_PAGE: usize = 2 << 20;

const _: () = assert!(align_of::<CacheLine>() == ALIGNMENT);
