//! What tests that drive whole endpoints share.

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;

/// A range of memory whose bytes do not matter: all are zero.
#[derive(Clone, Debug)]
pub(crate) struct Zeros {
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

impl WriteSource for Zeros {
    fn memory(&self) -> usize {
        0
    }
    fn offset(&self) -> usize {
        self.offset
    }
    fn len(&self) -> usize {
        self.len
    }
    fn range(&self, offset: usize, len: usize) -> Option<Self> {
        Some(Self { offset, len })
    }
    fn in_region(&self) -> Option<u64> {
        Some(self.offset as u64)
    }
    fn read(&self, _: usize, buffer: &mut [u8]) {
        buffer.fill(0);
    }
}
