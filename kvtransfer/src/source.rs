//! Bytes to be sent, kept alive by whoever still has to read them.

use std::sync::Arc;

use crate::shm::{Region, Slab};

/// Memory that writes read from.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
    /// The block arena of this worker; its owner keeps the blocks until the handoff ends.
    Arena(Arc<Region>),
    /// Staging memory.
    Staged(Arc<Slab>),
}

/// A range of a [`Memory`].
#[derive(Clone, Debug)]
pub(crate) struct SourceRange {
    memory: Memory,
    offset: usize,
    len: usize,
}

impl SourceRange {
    /// `None` when the range is not inside the memory.
    pub(crate) fn new(memory: Memory, offset: usize, len: usize) -> Option<Self> {
        let inside = match &memory {
            Memory::Arena(region) => region.contains(offset, len),
            Memory::Staged(slab) => offset.checked_add(len).is_some_and(|end| end <= slab.as_slice().len()),
        };
        inside.then_some(Self { memory, offset, len })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Copies bytes out, starting `at` bytes into the range.
    pub(crate) fn read(&self, at: usize, target: &mut [u8]) {
        assert!(at + target.len() <= self.len, "a read stays inside its source");
        match &self.memory {
            Memory::Arena(region) => region.read(self.offset + at, target),
            Memory::Staged(slab) => {
                let start = self.offset + at;
                target.copy_from_slice(&slab.as_slice()[start..start + target.len()]);
            }
        }
    }

    /// Copies `len` bytes, starting `at` bytes into the range, to `offset` in `target`.
    pub(crate) fn copy_to(&self, at: usize, target: &Region, offset: usize, len: usize) {
        assert!(at + len <= self.len, "a read stays inside its source");
        match &self.memory {
            Memory::Arena(region) => target.copy_from(offset, region, self.offset + at, len),
            Memory::Staged(slab) => {
                let start = self.offset + at;
                target.write(offset, &slab.as_slice()[start..start + len]);
            }
        }
    }
}
