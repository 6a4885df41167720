//! From blocks of one layout to a block of another: the sender's side of a handoff between unequal workers.

use super::kv::{decode_row, encode_row};
use crate::{
    kv::{BlockAddress, KvBlockShape},
    kv_rows::{self, RowIndex},
    step::{HeadSpan, TokenSpan},
};
use std::ops::Range;

/// Writes the tokens of `from` into `image`, the bytes of `layers` of one block of shape `to`, whose heads are those of
/// the source from `first_head` on.
///
/// Token `p` goes to slot `p % to.block_len`; all else in the image becomes zero. Equal types copy bits (and scales).
pub fn convert_block(
    image: &mut [u8],
    to: &KvBlockShape,
    layers: Range<usize>,
    from: TokenSpan<'_>,
    first_head: usize,
) {
    image.fill(0);
    convert_heads(image, to, layers, from, HeadSpan { from: first_head, to: 0, count: to.kv_heads });
}

/// The same for some heads; everything else in the image stays as it is.
pub fn convert_heads(
    image: &mut [u8],
    to: &KvBlockShape,
    layers: Range<usize>,
    from: TokenSpan<'_>,
    heads: HeadSpan,
) {
    from.assert_converts(to, &layers, image);
    heads.assert_fits(from.shape, to);
    let shape = from.shape;
    for position in from.first..from.first + from.count {
        let block = from.blocks[position / shape.block_len];
        for layer in layers.clone() {
            let rows = shape.rows_of_token(layer, position % shape.block_len);
            for source in rows.filter(|row| heads.holds(row.head)) {
                let target = RowIndex {
                    layer: layer - layers.start,
                    token: position % to.block_len,
                    head: source.head - heads.from + heads.to,
                    ..source
                };
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

impl HeadSpan {
    pub(crate) fn assert_fits(self, from: &KvBlockShape, to: &KvBlockShape) {
        let (source, target) = (self.from + self.count, self.to + self.count);
        assert!(source <= from.kv_heads, "convert: heads up to {source} of {}", from.kv_heads);
        assert!(target <= to.kv_heads, "convert: heads up to {target} of {}", to.kv_heads);
    }

    fn holds(self, source: usize) -> bool {
        (self.from..self.from + self.count).contains(&source)
    }
}

impl TokenSpan<'_> {
    pub(crate) fn assert_converts(&self, to: &KvBlockShape, layers: &Range<usize>, image: &[u8]) {
        let from = self.shape;
        assert_eq!(from.head_size, to.head_size, "convert: heads of equal size");
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
