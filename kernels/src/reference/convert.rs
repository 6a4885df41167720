//! From blocks of one layout to a block of another: the sender's side of a handoff between unequal workers.

use super::kv::{decode_row, encode_row};
use crate::{
    kv::{BlockAddress, KvBlockShape},
    kv_rows,
    step::TokenSpan,
};
use std::ops::Range;

/// Writes the tokens of `from` into `image`, the bytes of `layers` of one block of shape `to`.
///
/// Token `p` goes to slot `p % to.block_len`; all else in the image becomes zero. Equal types copy bits (and scales).
pub fn convert_block(image: &mut [u8], to: &KvBlockShape, layers: Range<usize>, from: TokenSpan<'_>) {
    from.assert_converts(to, &layers, image);
    image.fill(0);
    let shape = from.shape;
    for position in from.first..from.first + from.count {
        let block = from.blocks[position / shape.block_len];
        for layer in layers.clone() {
            let targets = to.rows_of_token(layer - layers.start, position % to.block_len);
            for (source, target) in shape.rows_of_token(layer, position % shape.block_len).zip(targets) {
                let stored = kv_rows::row(shape, block, source);
                let mut scale = kv_rows::scale(shape, block, source);
                let bytes = &mut image[to.row_offset(target)..][..to.row_bytes()];
                if shape.dtype == to.dtype {
                    bytes.copy_from_slice(stored);
                } else {
                    let values: Vec<f32> = decode_row(shape.dtype, stored, scale).collect();
                    scale = encode_row(to.dtype, &values, bytes);
                }
                if let Some(offset) = to.scale_offset(target) {
                    image[offset..offset + size_of::<f32>()].copy_from_slice(&scale.to_ne_bytes());
                }
            }
        }
    }
}

/// Zeroes the token slots of a block from `from_token` on: K, V and scales of all layers.
pub fn zero_tail(shape: &KvBlockShape, block: BlockAddress, from_token: usize) {
    for layer in 0..shape.layers {
        for token in from_token..shape.block_len {
            for row in shape.rows_of_token(layer, token) {
                kv_rows::write_row(shape, block, row, |stored| {
                    stored.fill(0);
                    0.0
                });
            }
        }
    }
}

impl TokenSpan<'_> {
    pub(crate) fn assert_converts(&self, to: &KvBlockShape, layers: &Range<usize>, image: &[u8]) {
        let from = self.shape;
        assert_eq!((from.kv_heads, from.head_size), (to.kv_heads, to.head_size), "convert: equal heads");
        assert!(layers.end <= from.layers.min(to.layers), "convert: layers {layers:?} of {}", from.layers);
        assert_eq!(image.len(), layers.len() * to.layer_stride, "convert: an image of {layers:?}");
        assert!(
            self.first % to.block_len + self.count <= to.block_len,
            "convert: tokens {}..{} lie in one block of {}",
            self.first,
            self.first + self.count,
            to.block_len
        );
        assert!(
            self.first + self.count <= self.blocks.len() * from.block_len,
            "convert: the source blocks reach token {}",
            self.first + self.count
        );
    }
}
