//! Blocks of one layout into a block of another.
//!
//! What a handoff between unequal workers costs is bytes through memory, so that is all that happens here: each byte
//! is read once and written once, neighbours are copied in one piece, and nothing is zeroed that will be written.

use super::{
    kv_codec::{bf16_row_to_int8, decode_row, encode_row},
    simd::{Kernel, Simd},
};
use crate::{
    kv::{BlockAddress, KvBlockShape, KvDtype},
    kv_rows::{self, Part, RowIndex},
    step::{HeadSpan, TokenSpan},
};
use std::ops::Range;

/// Some heads of one block of another layout, filled from the tokens of a span. The caller has checked that they fit.
pub(crate) struct ConvertHeads<'a> {
    pub(crate) image: &'a mut [u8],
    pub(crate) to: &'a KvBlockShape,
    pub(crate) layers: Range<usize>,
    pub(crate) from: TokenSpan<'a>,
    pub(crate) heads: HeadSpan,
}

/// Consecutive tokens of one source block and of the target, all heads of the span, K or V of one layer.
#[derive(Clone, Copy)]
struct Piece {
    block: BlockAddress,
    source: RowIndex,
    target: RowIndex,
    tokens: usize,
}

/// Distances in bytes from one token, and from one head, to the next.
#[derive(Clone, Copy)]
struct Strides {
    token: usize,
    head: usize,
}

/// A rectangle of equal runs of bytes: offsets and strides on both sides.
struct Rectangle {
    source: usize,
    target: usize,
    outer: Axis,
    inner: Axis,
    len: usize,
}

#[derive(Clone, Copy)]
struct Axis {
    count: usize,
    source: usize,
    target: usize,
}

impl Kernel for ConvertHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let TokenSpan { shape, blocks, first, count } = self.from;
        assert!(shape.head_size <= WIDEST_HEAD, "convert: heads of {}", shape.head_size);
        let mut values = [0.0; WIDEST_HEAD];
        for layer in self.layers.clone() {
            let mut position = first;
            while position < first + count {
                let token = position % shape.block_len;
                let tokens = (shape.block_len - token).min(first + count - position);
                let block = blocks[position / shape.block_len];
                for part in [Part::Key, Part::Value] {
                    let source = RowIndex { part, layer, token, head: self.heads.from };
                    let target = RowIndex {
                        part,
                        layer: layer - self.layers.start,
                        token: position % self.to.block_len,
                        head: self.heads.to,
                    };
                    self.convert(simd, Piece { block, source, target, tokens }, &mut values);
                }
                position += tokens;
            }
        }
    }
}

impl ConvertHeads<'_> {
    #[inline(always)]
    fn convert<S: Simd>(&mut self, simd: S, piece: Piece, values: &mut Values) {
        let (from, to) = (self.from.shape, self.to);
        if from.dtype != to.dtype {
            return self.convert_rows(simd, piece, values);
        }
        let offsets = (from.row_offset(piece.source), to.row_offset(piece.target));
        self.copy(piece, offsets, (data_strides(from), data_strides(to)), to.row_bytes());
        let scales = (from.scale_offset(piece.source), to.scale_offset(piece.target));
        if let (Some(source), Some(target)) = scales {
            let strides = (scale_strides(from), scale_strides(to));
            self.copy(piece, (source, target), strides, size_of::<f32>());
        }
    }

    /// Copies rows of `len` bytes, as many at a time as lie side by side here and there.
    #[inline(always)]
    fn copy(
        &mut self,
        piece: Piece,
        (source, target): (usize, usize),
        (from, to): (Strides, Strides),
        len: usize,
    ) {
        let tokens = Axis { count: piece.tokens, source: from.token, target: to.token };
        let heads = Axis { count: self.heads.count, source: from.head, target: to.head };
        let (outer, inner) = if to.token < to.head { (heads, tokens) } else { (tokens, heads) };
        let Rectangle { source, target, outer, inner, len } =
            Rectangle { source, target, outer, inner, len }.joined();
        for row in 0..outer.count {
            let (source, target) = (source + row * outer.source, target + row * outer.target);
            for run in 0..inner.count {
                let (source, target) = (source + run * inner.source, target + run * inner.target);
                let stored = kv_rows::run(self.from.shape, piece.block, source, len);
                self.image[target..target + len].copy_from_slice(stored);
            }
        }
    }

    /// Converts row by row, in the order of the target.
    #[inline(always)]
    fn convert_rows<S: Simd>(&mut self, simd: S, piece: Piece, values: &mut Values) {
        let (tokens, heads) = (piece.tokens, self.heads.count);
        if self.to.token_stride < self.to.head_stride {
            for head in 0..heads {
                for token in 0..tokens {
                    self.convert_row(simd, piece, (token, head), values);
                }
            }
        } else {
            for token in 0..tokens {
                for head in 0..heads {
                    self.convert_row(simd, piece, (token, head), values);
                }
            }
        }
    }

    #[inline(always)]
    fn convert_row<S: Simd>(
        &mut self,
        simd: S,
        piece: Piece,
        (token, head): (usize, usize),
        values: &mut Values,
    ) {
        let (from, to) = (self.from.shape, self.to);
        let at = |row: RowIndex| RowIndex { token: row.token + token, head: row.head + head, ..row };
        let (source, target) = (at(piece.source), at(piece.target));
        let stored = kv_rows::row(from, piece.block, source);
        let image = &mut self.image[to.row_offset(target)..][..to.row_bytes()];
        let direct = match (from.dtype, to.dtype) {
            (KvDtype::Bf16, KvDtype::Int8) => bf16_row_to_int8(simd, stored, image),
            _ => None,
        };
        let scale = direct.unwrap_or_else(|| {
            let scale = kv_rows::scale(from, piece.block, source);
            let values = &mut values[..from.head_size];
            decode_row(simd, from.dtype, stored, scale, values);
            encode_row(simd, to.dtype, values, image)
        });
        if let Some(offset) = to.scale_offset(target) {
            self.image[offset..offset + size_of::<f32>()].copy_from_slice(&scale.to_ne_bytes());
        }
    }
}

impl Rectangle {
    /// The same bytes in longer runs, where runs continue one another on both sides.
    #[inline(always)]
    fn joined(mut self) -> Self {
        for axis in [&mut self.inner, &mut self.outer] {
            if axis.source != self.len || axis.target != self.len {
                break;
            }
            self.len *= axis.count;
            axis.count = 1;
        }
        self
    }
}

/// Zeroes what of an image no token of `from` will be written to: slots before and behind them, and the padding.
pub(crate) fn clear_uncovered(image: &mut [u8], to: &KvBlockShape, layers: usize, from: TokenSpan<'_>) {
    let scale = if to.dtype == KvDtype::Int8 { size_of::<f32>() } else { 0 };
    let data = to.block_len * to.kv_heads * to.row_bytes();
    let scales = to.block_len * to.kv_heads * scale;
    let is_dense = to.value_offset == data
        && (scale == 0 || (to.key_scale_offset == 2 * data && to.value_scale_offset == 2 * data + scales));
    if from.count < to.block_len || !is_dense {
        return image.fill(0);
    }
    for layer in image.chunks_exact_mut(to.layer_stride).take(layers) {
        layer[2 * (data + scales)..].fill(0);
    }
}

fn data_strides(shape: &KvBlockShape) -> Strides {
    Strides { token: shape.token_stride, head: shape.head_stride }
}

fn scale_strides(shape: &KvBlockShape) -> Strides {
    Strides { token: shape.scale_token_stride, head: shape.scale_head_stride }
}

/// A row on its way from one type to another.
type Values = [f32; WIDEST_HEAD];

/// Elements of the widest head that a conversion has room for: no model has more than 576 (the latent of DeepSeek).
const WIDEST_HEAD: usize = 1024;
