//! Bytes to be sent, kept alive by whoever still has to read them.

use std::sync::Arc;

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;

use crate::shm::{Next, Region, RegionWriter, Slab};
use crate::tail::TailPiece;

/// Memory that writes read from.
#[derive(Clone, Debug)]
pub(crate) enum Memory {
    /// The block arena of this worker; its owner keeps the blocks until the handoff ends.
    Arena(Arc<Region>),
    /// A piece of what is behind the blocks there.
    Tail(Arc<TailPiece>),
    /// Staging memory.
    Staged(Arc<Slab>),
    /// Blocks in this side's device, of so many bytes; their owner keeps them until the handoff ends.
    Device(usize),
}

/// A range of a [`Memory`].
#[derive(Clone, Debug)]
pub(crate) struct SourceRange {
    memory: Memory,
    /// In the region, or in the slab.
    offset: usize,
    len: usize,
}

/// How a memory is read.
enum Bytes<'a> {
    Region(&'a Region),
    Slab(&'a Slab),
}

impl Memory {
    fn bytes(&self) -> Bytes<'_> {
        match self {
            Self::Arena(region) => Bytes::Region(region),
            Self::Tail(piece) => Bytes::Region(piece.region()),
            Self::Staged(slab) => Bytes::Slab(slab),
            Self::Device(_) => unreachable!("what is in a device goes by device alone"),
        }
    }
}

impl SourceRange {
    /// `None` when the range is not inside the memory.
    pub(crate) fn new(memory: Memory, offset: usize, len: usize) -> Option<Self> {
        let inside = match &memory {
            Memory::Arena(region) => region.contains(offset, len),
            Memory::Tail(piece) => {
                let end = piece.offset() + piece.len();
                piece.offset() <= offset && offset.checked_add(len).is_some_and(|it| it <= end)
            }
            Memory::Staged(slab) => offset.checked_add(len).is_some_and(|end| end <= slab.as_slice().len()),
            Memory::Device(bytes) => offset.checked_add(len).is_some_and(|end| end <= *bytes),
        };
        inside.then_some(Self { memory, offset, len })
    }

    /// What holds the bytes.
    pub(crate) fn holder(&self) -> &Memory {
        &self.memory
    }

    /// `len` bytes of it, starting `at` bytes into it.
    pub(crate) fn part(&self, at: usize, len: usize) -> Self {
        assert!(at + len <= self.len, "a part lies inside its whole");
        Self { memory: self.memory.clone(), offset: self.offset + at, len }
    }

    /// The first byte. Readable for as many as the range has while it lives.
    pub(crate) fn as_ptr(&self) -> *const u8 {
        match self.memory.bytes() {
            Bytes::Region(region) => region.as_ptr().wrapping_add(self.offset).cast_const(),
            Bytes::Slab(slab) => slab.as_slice()[self.offset..].as_ptr(),
        }
    }

    /// The bytes from `at` on, for a system call that sends them.
    pub(crate) fn to_send(&self, at: usize) -> &[u8] {
        match self.memory.bytes() {
            Bytes::Region(region) => region.to_send(self.offset + at, self.len - at),
            Bytes::Slab(slab) => &slab.as_slice()[self.offset + at..self.offset + self.len],
        }
    }

    /// Copies `len` bytes, starting `at` bytes into the range, to `offset` in a region.
    pub(crate) fn copy_to(
        &self,
        at: usize,
        target: &RegionWriter<'_>,
        offset: usize,
        len: usize,
        next: Next,
    ) {
        assert!(at + len <= self.len, "a read stays inside its source");
        match self.memory.bytes() {
            Bytes::Region(region) => target.copy_from(offset, region, self.offset + at, len, next),
            Bytes::Slab(slab) => {
                let start = self.offset + at;
                target.write(offset, &slab.as_slice()[start..start + len], next);
            }
        }
    }
}

impl WriteSource for SourceRange {
    fn memory(&self) -> usize {
        match &self.memory {
            Memory::Arena(_) => 0,  // There is but one.
            Memory::Device(_) => 1, // Likewise.
            // Pieces that touch are let go of one by one.
            Memory::Tail(piece) => Arc::as_ptr(piece).addr(),
            Memory::Staged(slab) => Arc::as_ptr(slab).addr(),
        }
    }

    fn offset(&self) -> usize {
        self.offset
    }

    fn len(&self) -> usize {
        self.len
    }

    fn range(&self, offset: usize, len: usize) -> Option<Self> {
        Self::new(self.memory.clone(), offset, len)
    }

    fn in_region(&self) -> Option<u64> {
        match &self.memory {
            Memory::Arena(_) | Memory::Tail(_) => Some(self.offset as u64),
            Memory::Staged(_) | Memory::Device(_) => None,
        }
    }

    fn is_on_device(&self) -> bool {
        matches!(self.memory, Memory::Device(_))
    }

    fn read(&self, at: usize, buffer: &mut [u8]) {
        assert!(at + buffer.len() <= self.len, "a read stays inside its source");
        match self.memory.bytes() {
            Bytes::Region(region) => region.read(self.offset + at, buffer),
            Bytes::Slab(slab) => {
                let start = self.offset + at;
                buffer.copy_from_slice(&slab.as_slice()[start..start + buffer.len()]);
            }
        }
    }
}
