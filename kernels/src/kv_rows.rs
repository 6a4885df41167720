//! The one place where the address of a block becomes a slice: one row (the elements of one token and head) at a time.
//!
//! Rows, not blocks, because other rows of the same block may be written at the same moment by somebody else.

use crate::kv::{BlockAddress, KvBlockShape};
use std::slice;

/// K or V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Key,
    Value,
}

/// Names one row of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowIndex {
    pub(crate) part: Part,
    pub(crate) layer: usize,
    pub(crate) token: usize,
    pub(crate) head: usize,
}

impl KvBlockShape {
    /// Bytes of one row.
    pub(crate) const fn row_bytes(&self) -> usize {
        self.head_size * self.dtype.bytes()
    }

    /// Offset of a row from the block's first byte.
    pub(crate) const fn row_offset(&self, row: RowIndex) -> usize {
        match row.part {
            Part::Key => self.key_offset(row.layer, row.token, row.head),
            Part::Value => self.value_offset(row.layer, row.token, row.head),
        }
    }

    /// Offset of a row's scale from the block's first byte; `None` for types without scales.
    pub(crate) const fn scale_offset(&self, row: RowIndex) -> Option<usize> {
        match (self.dtype.has_scales(), row.part) {
            (true, Part::Key) => Some(self.key_scale_offset(row.layer, row.token, row.head)),
            (true, Part::Value) => Some(self.value_scale_offset(row.layer, row.token, row.head)),
            (false, _) => None,
        }
    }

    /// Every row of `layer` for `token`: K and V of each head.
    pub(crate) fn rows_of_token(&self, layer: usize, token: usize) -> impl Iterator<Item = RowIndex> + use<> {
        (0..self.kv_heads).flat_map(move |head| {
            [Part::Key, Part::Value].map(move |part| RowIndex { part, layer, token, head })
        })
    }
}

/// Stored bytes of a row.
pub(crate) fn row<'a>(shape: &KvBlockShape, block: BlockAddress, row: RowIndex) -> &'a [u8] {
    bytes(shape, block, shape.row_offset(row), shape.row_bytes())
}

/// Scale of a row: 1 for types without scales.
pub(crate) fn scale(shape: &KvBlockShape, block: BlockAddress, row: RowIndex) -> f32 {
    shape.scale_offset(row).map_or(1.0, |offset| stored_scale(shape, block, offset))
}

/// The scale at an offset in a block.
#[inline(always)]
pub(crate) fn stored_scale(shape: &KvBlockShape, block: BlockAddress, offset: usize) -> f32 {
    let stored = bytes(shape, block, offset, size_of::<f32>());
    f32::from_ne_bytes(stored.try_into().expect("four bytes were asked for"))
}

/// Lets `write` fill the stored bytes of a row; the scale it returns is stored for types that have one.
pub(crate) fn write_row(
    shape: &KvBlockShape,
    block: BlockAddress,
    row: RowIndex,
    write: impl FnOnce(&mut [u8]) -> f32,
) {
    let scale = write(bytes_mut(shape, block, shape.row_offset(row), shape.row_bytes()));
    if let Some(offset) = shape.scale_offset(row) {
        bytes_mut(shape, block, offset, size_of::<f32>()).copy_from_slice(&scale.to_ne_bytes());
    }
}

/// Stored bytes of neighbouring rows, or of their scales.
#[inline(always)]
pub(crate) fn run<'a>(shape: &KvBlockShape, block: BlockAddress, offset: usize, len: usize) -> &'a [u8] {
    bytes(shape, block, offset, len)
}

#[inline(always)]
fn bytes<'a>(shape: &KvBlockShape, block: BlockAddress, offset: usize, len: usize) -> &'a [u8] {
    // SAFETY: `checked` keeps the range inside the block, which by the invariant of `BlockAddress` is good for reads
    // for as long as the address is given to kernels; nothing writes what a kernel reads, by the same invariant.
    unsafe { slice::from_raw_parts(checked(shape, block, offset, len), len) }
}

// The result is used at once by `write_row` and never outlives it, so that no two of them overlap.
fn bytes_mut<'a>(shape: &KvBlockShape, block: BlockAddress, offset: usize, len: usize) -> &'a mut [u8] {
    // SAFETY: `checked` keeps the range inside the block, which by the invariant of `BlockAddress` is good for writes;
    // while a kernel writes a row nothing else reads or writes it, by the same invariant.
    unsafe { slice::from_raw_parts_mut(checked(shape, block, offset, len), len) }
}

#[inline(always)]
fn checked(shape: &KvBlockShape, block: BlockAddress, offset: usize, len: usize) -> *mut u8 {
    assert!(offset + len <= shape.block_bytes(), "row at {offset} ends after the block");
    // SAFETY: inside the block, as just asserted, and so inside the allocation that the address promises.
    unsafe { block.as_ptr().add(offset) }
}
