//! The paged KV cache as kernels see it: block addresses and strides, nothing more.
//!
//! Kernels do not decide where K and V lie; the caller passes the distances. The promise that an address is good
//! for its block is made once, where the address is made ([`BlockAddress::new`]), so that the kernels that use it
//! can be safe functions.

use half::{bf16, f16};

/// The type of one stored element of K or V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed 8-bit, one f32 scale per token and head: `value = scale * stored`, `scale = max|row| / 127`.
    Int8,
    /// E4M3 floating point, one f32 scale per token and head: `value = scale * stored`, `scale` the least power of two
    /// in whose units `max|row|` rounds to 448 or less.
    Fp8,
}

/// Shape of one block and the distances in bytes inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBlockShape {
    /// Stored type.
    pub dtype: KvDtype,
    /// Decoder layers in a block.
    pub layers: usize,
    /// Tokens per block; a power of two.
    pub block_len: usize,
    /// KV heads in the block.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_size: usize,
    /// From one layer to the next.
    pub layer_stride: usize,
    /// From a layer's start to its K data: zero, unless this is a part of a block's heads.
    pub key_offset: usize,
    /// From a layer's start to its V data.
    pub value_offset: usize,
    /// From a layer's start to its K scales (types with scales only).
    pub key_scale_offset: usize,
    /// From a layer's start to its V scales (types with scales only).
    pub value_scale_offset: usize,
    /// From one token to the next in K or V data.
    pub token_stride: usize,
    /// From one head to the next in K or V data.
    pub head_stride: usize,
    /// From one token to the next in scales.
    pub scale_token_stride: usize,
    /// From one head to the next in scales.
    pub scale_head_stride: usize,
}

/// Address of one block of the KV cache in this process.
///
/// # Invariant
///
/// As promised by the caller of [`new`](Self::new): good for reads and writes of one block of the shape that it is
/// used with, aligned to 64 bytes, for as long as any copy of the address is given to a kernel; and while a kernel
/// writes a (block, layer, token) nothing else reads or writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockAddress(*mut u8);

// SAFETY: an address is a number; what may be done through it, from any thread, is the promise made in `new`.
unsafe impl Send for BlockAddress {}
// SAFETY: as for `Send`: sharing the number gives no access beyond the promise made in `new`.
unsafe impl Sync for BlockAddress {}

impl BlockAddress {
    /// Names a block by its first byte.
    ///
    /// # Safety
    ///
    /// The caller keeps the type's invariant for every kernel call that the address is passed to.
    pub const unsafe fn new(first_byte: *mut u8) -> Self {
        Self(first_byte)
    }

    /// The first byte of the block.
    pub const fn as_ptr(self) -> *mut u8 {
        self.0
    }
}

impl KvBlockShape {
    /// Bytes of one block: all layers.
    pub const fn block_bytes(&self) -> usize {
        self.layer_stride * self.layers
    }

    /// The same blocks as those see them that know of some heads alone: `count` of them from `first` on.
    ///
    /// # Panics
    ///
    /// When there are not so many.
    pub const fn of_heads(&self, first: usize, count: usize) -> Self {
        assert!(0 < count && first + count <= self.kv_heads, "heads that are in the block");
        let (data, scales) = (first * self.head_stride, first * self.scale_head_stride);
        Self {
            kv_heads: count,
            key_offset: self.key_offset + data,
            value_offset: self.value_offset + data,
            key_scale_offset: self.key_scale_offset + scales,
            value_scale_offset: self.value_scale_offset + scales,
            ..*self
        }
    }

    /// Offset of the K row of (`layer`, `token`, `head`) from the block's first byte.
    pub const fn key_offset(&self, layer: usize, token: usize, head: usize) -> usize {
        layer * self.layer_stride + self.key_offset + token * self.token_stride + head * self.head_stride
    }

    /// Offset of the V row of (`layer`, `token`, `head`) from the block's first byte.
    pub const fn value_offset(&self, layer: usize, token: usize, head: usize) -> usize {
        self.key_offset(layer, token, head) - self.key_offset + self.value_offset
    }

    /// Offset of the K scale of (`layer`, `token`, `head`).
    pub const fn key_scale_offset(&self, layer: usize, token: usize, head: usize) -> usize {
        layer * self.layer_stride
            + self.key_scale_offset
            + token * self.scale_token_stride
            + head * self.scale_head_stride
    }

    /// Offset of the V scale of (`layer`, `token`, `head`).
    pub const fn value_scale_offset(&self, layer: usize, token: usize, head: usize) -> usize {
        self.key_scale_offset(layer, token, head) - self.key_scale_offset + self.value_scale_offset
    }
}

impl KvDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::F16 => size_of::<f16>(),
            Self::Bf16 => size_of::<bf16>(),
            Self::Int8 | Self::Fp8 => size_of::<u8>(),
        }
    }

    /// Whether rows carry a scale.
    pub const fn has_scales(self) -> bool {
        matches!(self, Self::Int8 | Self::Fp8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_heads_lie_where_the_block_has_them() {
        let (tokens, heads, row) = (4, 6, 16);
        for (token, head) in [(heads, 1), (1, tokens)] {
            let (data, scales) = (tokens * heads * row, tokens * heads * 4);
            let whole = KvBlockShape {
                dtype: KvDtype::Int8,
                layers: 2,
                block_len: tokens,
                kv_heads: heads,
                head_size: row,
                layer_stride: 2 * (data + scales),
                key_offset: 0,
                value_offset: data,
                key_scale_offset: 2 * data,
                value_scale_offset: 2 * data + scales,
                token_stride: token * row,
                head_stride: head * row,
                scale_token_stride: token * 4,
                scale_head_stride: head * 4,
            };
            // Some heads of some heads, too.
            for (part, first) in [(whole.of_heads(2, 3), 2), (whole.of_heads(1, 5).of_heads(3, 2), 4)] {
                assert_eq!(part.block_bytes(), whole.block_bytes());
                let offsets = |shape: &KvBlockShape, layer, token, head| {
                    [
                        shape.key_offset(layer, token, head),
                        shape.value_offset(layer, token, head),
                        shape.key_scale_offset(layer, token, head),
                        shape.value_scale_offset(layer, token, head),
                    ]
                };
                for (layer, token, head) in [(0, 0, 0), (1, 3, part.kv_heads - 1), (0, 2, 1)] {
                    let expected = offsets(&whole, layer, token, first + head);
                    assert_eq!(offsets(&part, layer, token, head), expected);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "heads that are in the block")]
    fn heads_beyond_the_block_are_refused() {
        let shape = KvBlockShape {
            dtype: KvDtype::F32,
            layers: 1,
            block_len: 1,
            kv_heads: 2,
            head_size: 16,
            layer_stride: 256,
            key_offset: 0,
            value_offset: 128,
            key_scale_offset: 256,
            value_scale_offset: 256,
            token_stride: 128,
            head_stride: 64,
            scale_token_stride: 0,
            scale_head_stride: 0,
        };
        let _ = shape.of_heads(1, 2);
    }
}
