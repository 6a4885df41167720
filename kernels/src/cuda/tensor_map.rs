//! Where a tensor lies in a device's memory, and how tiles of it are copied to shared memory, by GPUs that do that themselves.

use super::DeviceAddress;
use bytemuck::{AnyBitPattern, NoUninit};

/// A tensor of elements of 16 bits, and the size of its tiles. What a kernel takes is as long as this and made of it: by the
/// driver for a GPU, and as it is for the emulator (`TileMap` in `cu/emulator/hopper.h`).
///
/// In a tile the rows of the innermost dimension lie one behind the other, 128 bytes each; within eight rows, chunks of 16 bytes
/// change places, so that eight rows of a column are in different banks: swizzle of 128 bytes, as products in shared memory take
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AnyBitPattern, NoUninit)]
#[repr(C, align(128))]
pub struct TensorMap {
    first: DeviceAddress,
    strides: [u64; 4],
    sizes: [u32; 5],
    tile: [u32; 5],
    rank: u32,
    swizzle: u32,
    reserved: [u32; 10],
}

impl TensorMap {
    /// Elements of a tile's row.
    pub const ROW: u32 = 64;

    /// A tensor that begins at `first`. `dimensions` has the innermost first, whose elements lie together; for each: its size in
    /// elements, from one of its elements to the next in bytes (2 for the innermost), and how many a tile has of it
    /// ([`ROW`](Self::ROW) of the innermost). `None` where GPUs do not take that.
    pub fn new(first: DeviceAddress, dimensions: &[(u32, u64, u32)]) -> Option<Self> {
        let (&(_, innermost, row), others) = dimensions.split_first()?;
        let takes = |&(_, stride, tile): &(u32, u64, u32)| {
            stride.is_multiple_of(ALIGNMENT) && stride < MOST_STRIDE && (1..=MOST_IN_TILE).contains(&tile)
        };
        let fits = others.len() <= 4
            && innermost == ELEMENT
            && row == Self::ROW
            && first.0.is_multiple_of(ALIGNMENT)
            && others.iter().all(takes)
            && dimensions.iter().all(|&(size, ..)| 0 < size);
        if !fits {
            return None;
        }
        let of_all = |pick: fn(&(u32, u64, u32)) -> u32| {
            let mut all = [1; 5];
            all.iter_mut().zip(dimensions).for_each(|(to, it)| *to = pick(it));
            all
        };
        let mut strides = [0; 4];
        strides.iter_mut().zip(others).for_each(|(to, &(_, stride, _))| *to = stride);
        Some(Self {
            first,
            strides,
            sizes: of_all(|it| it.0),
            tile: of_all(|it| it.2),
            rank: dimensions.len() as u32,
            swizzle: 128,
            reserved: [0; 10],
        })
    }

    /// The same with rows as they come: for tests, since no product takes such tiles.
    #[must_use]
    pub const fn without_swizzle(mut self) -> Self {
        self.swizzle = 0;
        self
    }

    /// Where it begins.
    pub(super) const fn first(&self) -> DeviceAddress {
        self.first
    }

    /// Its sizes in elements, those of a tile, and from one element to the next in bytes, of all dimensions but the innermost.
    pub(super) fn dimensions(&self) -> (&[u32], &[u32], &[u64]) {
        let rank = self.rank as usize;
        (&self.sizes[..rank], &self.tile[..rank], &self.strides[..rank - 1])
    }

    /// Whether chunks change places.
    pub(super) const fn is_swizzled(&self) -> bool {
        self.swizzle != 0
    }
}

/// Bytes of an element.
const ELEMENT: u64 = 2;
/// Of addresses and strides.
const ALIGNMENT: u64 = 16;
const MOST_STRIDE: u64 = 1 << 40;
const MOST_IN_TILE: u32 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gpus_take() {
        type Dimensions = &'static [(u32, u64, u32)];
        #[rustfmt::skip]
        let rows: [(&str, u64, Dimensions, bool); 9] = [
            ("a matrix",                       256, &[(72, 2, 64), (5, 144, 128)], true),
            ("five dimensions",                256, &[(64, 2, 64), (16, 128, 16), (2, 2048, 1), (3, 4096, 1), (9, 16384, 1)], true),
            ("an address between packs",       264, &[(72, 2, 64), (5, 144, 128)], false),
            ("rows that are no whole packs",   256, &[(68, 2, 64), (5, 136, 128)], false),
            ("a tile of narrow rows",          256, &[(72, 2, 32), (5, 144, 128)], false),
            ("elements that lie apart",        256, &[(72, 4, 64), (5, 288, 128)], false),
            ("a tile of too many rows",        256, &[(72, 2, 64), (5, 144, 257)], false),
            ("no rows",                        256, &[(72, 2, 64), (0, 144, 128)], false),
            ("no dimensions",                  256, &[],                           false),
        ];
        for (row, first, dimensions, expected) in rows {
            assert_eq!(TensorMap::new(DeviceAddress(first), dimensions).is_some(), expected, "{row}");
        }
    }
}
