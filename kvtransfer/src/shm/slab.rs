//! Staging memory: where a sender converts blocks into the receiver's layout before they are written.

use std::sync::Arc;
use std::{fmt, io};

use super::mapping::Mapping;

/// Zeroed, page-aligned memory with one owner while it is filled and many readers after.
///
/// The owner fills it through [`as_mut_slice`](Self::as_mut_slice), wraps it in an `Arc` and pushes it; whoever
/// still has writes to make from it holds that `Arc`. It can be filled again when `Arc::get_mut` says that
/// nobody does.
pub struct Slab {
    mapping: Mapping,
    /// Others can watch it to see whether the slab still exists, without being taken for readers.
    life: Arc<()>,
}

impl Slab {
    /// Takes `len` zeroed bytes from the system.
    ///
    /// # Errors
    ///
    /// `len` is zero or there is no address space left.
    pub fn new(len: usize) -> io::Result<Self> {
        Ok(Self { mapping: Mapping::private(len)?, life: Arc::new(()) })
    }

    /// Gone when the slab is, and different from that of any other slab.
    pub(crate) fn life(&self) -> &Arc<()> {
        &self.life
    }

    /// All of its bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping is valid and zero-initialised for its length, private to this process, and only
        // written through `as_mut_slice`, which borrows `self` mutably.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr(), self.mapping.len()) }
    }

    /// All of its bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the result borrows `self` mutably, so no other view exists while it lives.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr(), self.mapping.len()) }
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slab({:?})", self.mapping)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_starts_zeroed_and_keeps_what_is_written() {
        let mut slab = Slab::new(5000).unwrap();
        assert!(slab.as_slice().iter().all(|&byte| byte == 0));
        slab.as_mut_slice()[4999] = 7;
        assert_eq!((slab.as_slice().len(), slab.as_slice()[4999]), (5000, 7));
        assert!(Slab::new(0).is_err());
    }
}
