//! Memory of plain numbers that starts on a cache line, in huge pages where it is large.
//!
//! A step reads every page of the weights once, and with 4 KiB pages address translation takes a visible part of its
//! time. Linux gives huge pages to memory that asks for them *before* it is touched. Most matrices are not whole huge
//! pages, so those of a model lie side by side in few large mappings.

use bytemuck::{AnyBitPattern, NoUninit, Pod};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ptr::NonNull,
    slice,
};
#[cfg(target_os = "linux")]
use std::{
    ptr,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Owned zeroed bytes, aligned to [`ALIGNMENT`].
///
/// # Invariants
///
/// - `base` points at `len` initialised bytes inside `home` that this value owns and nothing else refers to, or dangles
///   when `len` is zero.
pub(crate) struct AlignedBuffer {
    base: NonNull<u8>,
    len: usize,
    home: Home,
}

/// Where the bytes of a buffer are.
enum Home {
    Nowhere,
    Heap(Layout),
    #[cfg(target_os = "linux")]
    Pages {
        _mapping: Arc<Mapping>,
    },
}

// SAFETY: the buffer owns its bytes as a `Vec<u8>` would; there is no thread-bound state.
unsafe impl Send for AlignedBuffer {}
// SAFETY: `&AlignedBuffer` gives only shared slices.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Allocates `len` zeroed bytes.
    pub(crate) fn zeroed(len: usize) -> Self {
        #[cfg(target_os = "linux")]
        if HUGE_PAGE <= len {
            return Mapping::new(len).part(0, len);
        }
        Self::on_heap(len)
    }

    /// The same for weights, which are made when a model is loaded and go when it goes: side by side with others that are
    /// made before and after, whose memory comes back when the last of them is dropped.
    pub(crate) fn zeroed_beside_others(len: usize) -> Self {
        #[cfg(target_os = "linux")]
        if (SMALLEST_SHARED..=LARGEST_SHARED).contains(&len) {
            return SHELF.lock().unwrap_or_else(PoisonError::into_inner).place(len);
        }
        Self::zeroed(len)
    }

    fn on_heap(len: usize) -> Self {
        if len == 0 {
            return Self { base: NonNull::<CacheLine>::dangling().cast(), len, home: Home::Nowhere };
        }
        let layout = Layout::from_size_align(len, ALIGNMENT).expect("a buffer fits the address space");
        // SAFETY: `layout` has non-zero size, which is all `alloc_zeroed` asks of us.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(layout));
        Self { base, len, home: Home::Heap(layout) }
    }

    /// The contents as numbers.
    pub(crate) fn as_slice<T: AnyBitPattern>(&self) -> &[T] {
        // SAFETY: `base` is good for reads of `len` initialised bytes that live as long as `self`.
        let bytes = unsafe { slice::from_raw_parts(self.base.as_ptr(), self.len) };
        bytemuck::cast_slice(bytes)
    }

    /// The contents as numbers, to write.
    pub(crate) fn as_mut_slice<T: AnyBitPattern + NoUninit>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; the result borrows `self` mutably, so it is the only view.
        let bytes = unsafe { slice::from_raw_parts_mut(self.base.as_ptr(), self.len) };
        bytemuck::cast_slice_mut(bytes)
    }

    /// The first `count` numbers, after growing the buffer when it is too small. Contents are not kept.
    pub(crate) fn grown<T: Pod>(&mut self, count: usize) -> &mut [T] {
        if self.len < count * size_of::<T>() {
            *self = Self::zeroed((count * size_of::<T>()).next_multiple_of(ALIGNMENT));
        }
        &mut self.as_mut_slice::<T>()[..count]
    }

    /// Size in bytes.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // A mapping goes with the last of its buffers.
        if let Home::Heap(layout) = self.home {
            // SAFETY: `base` came from `alloc_zeroed(layout)` and is freed only here.
            unsafe { dealloc(self.base.as_ptr(), layout) };
        }
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "AlignedBuffer({} bytes)", self.len())
    }
}

/// Whether the system gives huge pages to weights. Without them reading weights takes about a quarter longer.
pub fn has_huge_pages() -> bool {
    std::fs::read_to_string(HUGE_PAGE_SETTING).is_ok_and(|setting| allows_huge_pages(&setting))
}

/// Reads `always [madvise] never`: what is in brackets holds.
fn allows_huge_pages(setting: &str) -> bool {
    ["[always]", "[madvise]"].iter().any(|allowed| setting.contains(allowed))
}

/// Zeroed pages, huge ones where the system has them.
///
/// # Invariant
///
/// `base` and `len` are a mapping of anonymous memory that this value made and nobody else unmaps.
#[cfg(target_os = "linux")]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length, of which the value makes no use but to unmap them in the end.
#[cfg(target_os = "linux")]
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives addresses, and whoever uses them has to say why.
#[cfg(target_os = "linux")]
unsafe impl Sync for Mapping {}

#[cfg(target_os = "linux")]
impl Mapping {
    /// Maps at least `len` bytes that begin on a huge page.
    fn new(len: usize) -> Arc<Self> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        let layout = Layout::from_size_align(len, HUGE_PAGE).expect("a buffer fits the address space");
        // Where they begin is for the system to say; what is never touched costs nothing.
        let mapped = layout.pad_to_align().size() + HUGE_PAGE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without a wished address the system takes one that nothing is mapped at.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), mapped, access, MapFlags::PRIVATE) };
        let base = base.ok().and_then(|base| NonNull::new(base.cast()));
        let base = base.unwrap_or_else(|| handle_alloc_error(layout));
        let mapping = Self { base, len: mapped };
        // SAFETY: the range is inside the mapping; the advice changes no contents. It is only advice: a kernel without
        // huge pages refuses it, and all works as before.
        let _ =
            unsafe { madvise(mapping.start().as_ptr().cast(), mapped - HUGE_PAGE, Advice::LinuxHugepage) };
        Arc::new(mapping)
    }

    /// Where its huge pages begin.
    fn start(&self) -> NonNull<u8> {
        let offset = self.base.addr().get().next_multiple_of(HUGE_PAGE) - self.base.addr().get();
        // SAFETY: less than the huge page by which the mapping is longer than what was asked for.
        unsafe { self.base.add(offset) }
    }

    /// `len` of the bytes that were asked for, from `offset` on, of which no buffer was made yet.
    fn part(self: Arc<Self>, offset: usize, len: usize) -> AlignedBuffer {
        assert!(offset + len + HUGE_PAGE <= self.len, "{len} bytes at {offset} of a mapping of {}", self.len);
        // SAFETY: inside the mapping, as just asserted.
        let base = unsafe { self.start().add(offset) };
        AlignedBuffer { base, len, home: Home::Pages { _mapping: self } }
    }
}

#[cfg(target_os = "linux")]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no buffer is left: each holds a reference to it. An error would
        // leave it mapped, which is all that could be done about one.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The mapping that the next buffers go to.
#[cfg(target_os = "linux")]
struct Shelf {
    mapping: Weak<Mapping>,
    used: usize,
}

#[cfg(target_os = "linux")]
impl Shelf {
    fn place(&mut self, len: usize) -> AlignedBuffer {
        let current = self.mapping.upgrade().filter(|_| self.used + len <= SHELF_BYTES);
        let mapping = current.unwrap_or_else(|| {
            let fresh = Mapping::new(SHELF_BYTES);
            *self = Self { mapping: Arc::downgrade(&fresh), used: 0 };
            fresh
        });
        let offset = self.used;
        self.used = (offset + len).next_multiple_of(ALIGNMENT);
        mapping.part(offset, len)
    }
}

#[cfg(target_os = "linux")]
static SHELF: Mutex<Shelf> = Mutex::new(Shelf { mapping: Weak::new(), used: 0 });

/// Bytes of a mapping for several buffers.
#[cfg(target_os = "linux")]
const SHELF_BYTES: usize = 64 << 20;
/// The least that a page is spent on.
#[cfg(target_os = "linux")]
const SMALLEST_SHARED: usize = 4 << 10;
/// What does not fit leaves the rest of a mapping unused: a quarter at most. Larger buffers waste little in one of their own.
#[cfg(target_os = "linux")]
const LARGEST_SHARED: usize = SHELF_BYTES / 4;

#[repr(align(64))]
struct CacheLine;

/// Bytes of a cache line, and of the widest vector register.
pub(crate) const ALIGNMENT: usize = 64;

/// Where Linux says who gets huge pages.
pub const HUGE_PAGE_SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Bytes of a huge page on the machines that matter.
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

const _: () = assert!(align_of::<CacheLine>() == ALIGNMENT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_aligned_and_their_own() {
        let lens = [0, 1, 63, 4096, 4097, 70_000, 3 << 20, 17 << 20];
        let makers: [fn(usize) -> AlignedBuffer; 2] =
            [AlignedBuffer::zeroed, AlignedBuffer::zeroed_beside_others];
        // Twice, so that memory which comes back is used again.
        for _ in 0..2 {
            let mut buffers = Vec::new();
            for (index, (len, make)) in
                lens.iter().flat_map(|len| makers.map(|make| (*len, make))).enumerate()
            {
                let mut buffer = make(len);
                assert_eq!(buffer.len(), len);
                assert_eq!(buffer.as_slice::<u8>().as_ptr().addr() % ALIGNMENT, 0, "{len} bytes are aligned");
                assert!(buffer.as_slice::<u8>().iter().all(|&byte| byte == 0), "{len} bytes are zeros");
                buffer.as_mut_slice::<u8>().fill(index as u8 + 1);
                buffers.push(buffer);
            }
            for (index, buffer) in buffers.iter().enumerate() {
                let bytes = buffer.as_slice::<u8>();
                assert!(bytes.iter().all(|&byte| byte == index as u8 + 1), "{} bytes are kept", bytes.len());
            }
        }
    }

    #[test]
    fn huge_pages_come_unless_the_system_says_never() {
        let rows = [
            ("[always] madvise never\n", true),
            ("always [madvise] never\n", true),
            ("always madvise [never]\n", false),
            ("", false),
        ];
        for (setting, expected) in rows {
            assert_eq!(allows_huge_pages(setting), expected, "{setting:?}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn neighbours_share_a_mapping_which_goes_with_the_last() {
        let mut shelf = Shelf { mapping: Weak::new(), used: 0 };
        let (first, second) = (shelf.place(5000), shelf.place(100_000));
        assert_eq!(second.base.addr().get() - first.base.addr().get(), 5056, "on the next cache line");
        assert_eq!(first.base.addr().get() % HUGE_PAGE, 0);
        let mapping = shelf.mapping.clone();
        drop(first);
        assert_eq!(mapping.strong_count(), 1, "the second still lies there");
        drop(second);
        assert_eq!(mapping.strong_count(), 0);
        let (_large, next) = (shelf.place(SHELF_BYTES - 64), shelf.place(128));
        assert_eq!(next.base.addr().get() % HUGE_PAGE, 0, "what does not fit begins another");
    }
}
