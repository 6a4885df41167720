//! The memory of KV blocks: a region cut into blocks of one layout.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::kv::{self, BlockAddress, KvBlockShape};
use tidemill_kvtransfer::{Pages, Region, Tail, TailPiece};
use tidemill_kvtransfer_proto::layout::{KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId};

/// A region cut into KV blocks: this worker's own, or one that a peer shares.
///
/// # Invariants
///
/// - `blocks * block_bytes <= region.len()`.
/// - The region's first byte and `block_bytes` are multiples of 64.
#[derive(Clone, Debug)]
pub struct Arena {
    region: Arc<Region>,
    layout: KvLayout,
    shape: KvBlockShape,
    blocks: BlockCount,
    /// What is behind the blocks of a region that was made here. It is the only one of that region.
    tail: Arc<Tail>,
}

impl Arena {
    /// Reserves memory for `blocks` blocks. The system gives it page by page as blocks are first used.
    ///
    /// # Errors
    ///
    /// The system is out of descriptors or address space, or the size is zero or beyond the address space.
    pub fn new(layout: KvLayout, blocks: BlockCount) -> io::Result<Self> {
        Self::with_pages(layout, blocks, Pages::Normal)
    }

    /// The same, of pages of that kind.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); and there are no or not enough huge pages.
    pub fn with_pages(layout: KvLayout, blocks: BlockCount, pages: Pages) -> io::Result<Self> {
        Self::with_tail(layout, blocks, 0, pages)
    }

    /// The same, with `tail` bytes behind the blocks, in which blocks are converted for peers that read.
    ///
    /// # Errors
    ///
    /// As for [`with_pages`](Self::with_pages).
    pub fn with_tail(layout: KvLayout, blocks: BlockCount, tail: usize, pages: Pages) -> io::Result<Self> {
        let bytes = (blocks.0 as usize)
            .checked_mul(layout.block_bytes())
            .filter(|&bytes| 0 < bytes)
            .and_then(|bytes| bytes.checked_add(tail))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let region = Region::with_pages(REGION_NAME, bytes, pages)?;
        let tail = Tail::new(Arc::clone(&region), bytes - tail);
        Ok(Self { blocks, tail, ..Self::over(region, layout) })
    }

    /// The blocks of a region that exists: a peer's, mapped here for reading and writing. A rest at the end that is
    /// smaller than a block stays unused.
    ///
    /// # Panics
    ///
    /// When the region does not start on a cache line, which every mapping does.
    pub fn over(region: Arc<Region>, layout: KvLayout) -> Self {
        let shape = block_shape(&layout);
        assert!(region.as_ptr().addr().is_multiple_of(ALIGNMENT), "a region starts on a page");
        assert!(shape.block_bytes().is_multiple_of(ALIGNMENT), "layouts pad layers to whole cache lines");
        let blocks = u32::try_from(region.len() / shape.block_bytes()).unwrap_or(u32::MAX);
        let tail = Tail::new(Arc::clone(&region), region.len() / ALIGNMENT * ALIGNMENT);
        Self { region, layout, shape, blocks: BlockCount(blocks), tail }
    }

    /// Where a block is in this process.
    ///
    /// The address may be given to kernels while this arena, or a clone of it, lives; and only by whom the block
    /// manager, or the peer's commit, made the owner of the block's unwritten tokens.
    ///
    /// # Panics
    ///
    /// When there is no such block: a bug, since the block manager never invents ids.
    pub fn address(&self, block: BlockId) -> BlockAddress {
        let offset = self.offset(block);
        // SAFETY: `offset + block_bytes <= region.len()` by the first invariant and the assertion in `offset`, so the
        // result stays inside the mapping behind `as_ptr`.
        let first_byte = unsafe { self.region.as_ptr().add(offset) };
        // SAFETY: good for one block of `self.shape`: in bounds as above, aligned by the second invariant, mapped for
        // reads and writes as `new` does and `over` asks, and alive because the engine keeps its arenas for as long as
        // its runner. That nobody else touches what a kernel writes is kept by the block manager, which gives a block's
        // unwritten tokens to one sequence, and by the handoff's epochs, which keep peers out of all others.
        unsafe { BlockAddress::new(first_byte) }
    }

    /// Has somebody write a part of a block.
    ///
    /// Under the same terms as [`address`](Self::address): by the owner of the block's unwritten tokens.
    ///
    /// # Panics
    ///
    /// When there is no such block, or it ends before the part does.
    pub fn write<T>(&self, block: BlockId, part: Range<usize>, write: impl FnOnce(&mut [u8]) -> T) -> T {
        assert!(part.end <= self.shape.block_bytes(), "{part:?} of a block");
        let offset = self.offset(block) + part.start;
        // SAFETY: the part ends within the block, which lies within the region by the first invariant.
        let first = unsafe { self.region.as_ptr().add(offset) };
        // SAFETY: in bounds as above, and mapped for reads and writes, of zeros where nobody has written. That nobody else
        // touches these bytes meanwhile is kept by the block manager and by epochs, as `address` says.
        write(unsafe { std::slice::from_raw_parts_mut(first, part.len()) })
    }

    /// Has somebody read a block, whose last writer is done.
    ///
    /// # Panics
    ///
    /// When there is no such block.
    pub fn read<T>(&self, block: BlockId, read: impl FnOnce(&[u8]) -> T) -> T {
        // SAFETY: the block lies within the region by the first invariant.
        let first = unsafe { self.region.as_ptr().add(self.offset(block)) };
        // SAFETY: in bounds and mapped for reads. A block is read by who holds it, once a commit has said that its peer
        // writes no more.
        read(unsafe { std::slice::from_raw_parts(first, self.shape.block_bytes()) })
    }

    /// What is behind the blocks of an arena that was made here; nothing, of one that a peer shares.
    pub const fn tail(&self) -> &Arc<Tail> {
        &self.tail
    }

    /// How many bytes are behind the blocks.
    pub fn tail_bytes(&self) -> usize {
        self.tail.len()
    }

    /// Has somebody write a piece of what is behind the blocks.
    ///
    /// # Panics
    ///
    /// When the piece is not of this arena: a bug.
    pub fn fill<T>(&self, piece: &mut TailPiece, write: impl FnOnce(&mut [u8]) -> T) -> T {
        let (start, end) = (piece.offset(), piece.offset() + piece.len());
        assert!(Arc::ptr_eq(piece.tail(), &self.tail), "a piece of what is behind these blocks");
        assert!(end <= self.region.len(), "it lies in the region");
        // SAFETY: the piece lies within the region, as asserted.
        let first = unsafe { self.region.as_ptr().add(start) };
        // SAFETY: in bounds as above, and mapped for reads and writes, since only `with_tail` makes a tail with bytes. No
        // kernel is given an address behind the blocks, and no other piece has these bytes, for the region has no other tail;
        // this one is borrowed mutably. Peers are told of it when it is pushed, which is later, and to read it.
        write(unsafe { std::slice::from_raw_parts_mut(first, end - start) })
    }

    /// Offset of a block from the region's first byte.
    ///
    /// # Panics
    ///
    /// When there is no such block.
    pub fn offset(&self, block: BlockId) -> usize {
        assert!(block.0 < self.blocks.0, "{block:?} is outside an arena of {:?}", self.blocks);
        block.0 as usize * self.shape.block_bytes()
    }

    /// Shape of the blocks, for the kernels.
    pub const fn shape(&self) -> &KvBlockShape {
        &self.shape
    }

    /// Layout of the blocks, for peers.
    pub const fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// How many blocks there are.
    pub const fn blocks(&self) -> BlockCount {
        self.blocks
    }

    /// The memory itself, for transports.
    pub const fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

/// The strides of a layout as the kernels take them.
pub fn block_shape(layout: &KvLayout) -> KvBlockShape {
    let strides = layout.strides();
    KvBlockShape {
        dtype: match layout.dtype {
            KvDtype::F32 => kv::KvDtype::F32,
            KvDtype::F16 => kv::KvDtype::F16,
            KvDtype::Bf16 => kv::KvDtype::Bf16,
            KvDtype::Int8 => kv::KvDtype::Int8,
            KvDtype::Fp8 => kv::KvDtype::Fp8,
        },
        layers: usize::from(layout.layers),
        block_len: layout.block_len.tokens() as usize,
        kv_heads: usize::from(layout.heads.count),
        head_size: usize::from(layout.head_size),
        layer_stride: strides.layer,
        key_offset: 0,
        value_offset: strides.value_offset,
        key_scale_offset: strides.key_scale_offset,
        value_scale_offset: strides.value_scale_offset,
        token_stride: strides.token,
        head_stride: strides.head,
        scale_token_stride: strides.scale_token,
        scale_head_stride: strides.scale_head,
    }
}

/// Shows up in `/proc/<pid>/maps`.
const REGION_NAME: &str = "tidemill-kv";

/// What [`BlockAddress`] asks of every block.
const ALIGNMENT: usize = 64;
