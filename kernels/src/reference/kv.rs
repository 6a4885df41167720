//! Storing K and V rows in blocks and reading them back.

use super::e4m3::{e4m3_scale, e4m3_to_f32, f32_to_e4m3};
use crate::{
    kv::{BlockAddress, KvBlockShape, KvDtype},
    kv_rows::{self, Part, RowIndex},
    step::SequenceRows,
};
use half::{bf16, f16};

/// Writes the K and V rows of a step, `[rows][kv_heads][head_size]` each, into `layer` of the sequences' blocks.
///
/// f16 and bf16 round to nearest, ties to even. Int8 rows get the scale `max|row| / 127` and store `row * (1 / scale)`
/// rounded likewise, which is within half a scale (and a millionth) of the value; a row of zeros has scale zero.
/// Fp8 rows get [`e4m3_scale`] and store `row / scale` in [`e4m3`](f32_to_e4m3): within 2^-4 of the value, or within `scale / 1024`.
pub fn write_kv(shape: &KvBlockShape, layer: usize, k: &[f32], v: &[f32], sequences: &[SequenceRows<'_>]) {
    assert_eq!(k.len(), v.len(), "write_kv: as many keys as values");
    for sequence in sequences {
        sequence.assert_fits(shape);
        for row in 0..sequence.rows {
            let position = sequence.first_position + row;
            let block = sequence.blocks[position / shape.block_len];
            for index in shape.rows_of_token(layer, position % shape.block_len) {
                let source = match index.part {
                    Part::Key => k,
                    Part::Value => v,
                };
                let first = ((sequence.first_row + row) * shape.kv_heads + index.head) * shape.head_size;
                let values = &source[first..first + shape.head_size];
                kv_rows::write_row(shape, block, index, |stored| encode_row(shape.dtype, values, stored));
            }
        }
    }
}

/// The K and the V row of one token and head, as f32.
pub fn read_kv(
    shape: &KvBlockShape,
    block: BlockAddress,
    layer: usize,
    token: usize,
    head: usize,
) -> (Vec<f32>, Vec<f32>) {
    let read = |part| {
        let index = RowIndex { part, layer, token, head };
        decode_row(shape.dtype, kv_rows::row(shape, block, index), kv_rows::scale(shape, block, index))
            .collect()
    };
    (read(Part::Key), read(Part::Value))
}

/// Stored bytes to values.
pub(crate) fn decode_row(dtype: KvDtype, stored: &[u8], scale: f32) -> impl Iterator<Item = f32> {
    stored.chunks_exact(dtype.bytes()).map(move |element| match (dtype, element) {
        (KvDtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (KvDtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        (KvDtype::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        (KvDtype::Int8, &[a]) => scale * f32::from(a.cast_signed()),
        (KvDtype::Fp8, &[a]) => scale * e4m3_to_f32(a),
        _ => unreachable!("chunks are as long as the type"),
    })
}

/// Values to stored bytes; returns the scale, which is 1 for types without scales.
pub(crate) fn encode_row(dtype: KvDtype, values: &[f32], stored: &mut [u8]) -> f32 {
    let greatest = || values.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    let scale = match dtype {
        KvDtype::Int8 => greatest() / 127.0,
        KvDtype::Fp8 => e4m3_scale(greatest()),
        _ => 1.0,
    };
    for (element, &value) in stored.chunks_exact_mut(dtype.bytes()).zip(values) {
        match dtype {
            KvDtype::F32 => element.copy_from_slice(&value.to_le_bytes()),
            KvDtype::F16 => element.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            KvDtype::Bf16 => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            KvDtype::Int8 => element[0] = quantize(value, scale).cast_unsigned(),
            KvDtype::Fp8 => element[0] = f32_to_e4m3(value / scale),
        }
    }
    scale
}

pub(super) fn quantize(value: f32, scale: f32) -> i8 {
    if scale == 0.0 {
        return 0;
    }
    // The inverse of a subnormal number may be infinite.
    let steps = if scale < f32::MIN_POSITIVE { value / scale } else { value * (1.0 / scale) };
    // `as` saturates and turns NaN into zero.
    steps.round_ties_even().clamp(-127.0, 127.0) as i8
}
