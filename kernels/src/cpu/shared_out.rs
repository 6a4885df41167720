//! An output that the chunks of one operation write side by side.

use std::{marker::PhantomData, ops::Range, slice};

/// A mutable slice of which several threads hold parts.
///
/// # Invariant
///
/// `start` points at `len` elements that nobody else refers to during `'a`.
pub(crate) struct SharedOut<'a, T = f32> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: sharing it gives access only through `part`, whose contract keeps the parts apart; each is a `&mut [T]`, which
// may go to another thread as `T: Send`.
unsafe impl<T: Send> Sync for SharedOut<'_, T> {}

impl<'a, T> SharedOut<'a, T> {
    /// Borrows the whole of `out`.
    pub(crate) fn new(out: &'a mut [T]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len(), borrow: PhantomData }
    }

    /// Number of elements.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// One part of it.
    ///
    /// # Safety
    ///
    /// No two parts that live at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {}", self.len);
        // SAFETY: inside the slice, as just asserted.
        let start = unsafe { self.start.add(range.start) };
        // SAFETY: in bounds and initialised: part of the borrowed slice. Unaliased: nobody else refers to the slice,
        // and other parts do not overlap by this function's contract.
        unsafe { slice::from_raw_parts_mut(start, range.len()) }
    }
}
