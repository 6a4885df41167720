//! Blocks of GGUF's quantised types, unpacked.
//!
//! Layouts after the structures in <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>. All numbers are
//! little-endian; `d` is the block's scale in half precision, and comes first but in `Q6_K`.

use half::f16;

use super::tensor::UnpackedRow;
use crate::gguf::TensorType;

/// Elements that share a scale; `None` for types that are not in blocks of few bits.
pub(super) const fn group_of(kind: TensorType) -> Option<usize> {
    match kind {
        TensorType::Q4_0
        | TensorType::Q4_1
        | TensorType::Q5_0
        | TensorType::Q5_1
        | TensorType::Q8_0
        | TensorType::Q4_K
        | TensorType::Q5_K => Some(32),
        TensorType::Q6_K => Some(16),
        _ => None,
    }
}

/// Unpacks the blocks of a row.
pub(super) fn unpack(kind: TensorType, row: &[u8], out: &mut UnpackedRow) {
    let (elements, bytes) = kind.block().expect("only types with blocks are unpacked");
    let groups = elements / group_of(kind).expect("only quantised types are unpacked");
    let UnpackedRow { steps, scales, offsets } = out;
    let pieces = steps.chunks_exact_mut(elements).zip(scales.chunks_exact_mut(groups));
    let pieces = pieces.zip(offsets.chunks_exact_mut(groups));
    for (block, ((steps, scales), offsets)) in row.chunks_exact(bytes).zip(pieces) {
        match kind {
            TensorType::Q4_0 => {
                scales[0] = half(&block[0..]);
                halves(&block[2..18], steps);
                steps.iter_mut().for_each(|step| *step -= 8);
            }
            TensorType::Q4_1 => {
                (scales[0], offsets[0]) = (half(&block[0..]), half(&block[2..]));
                halves(&block[4..20], steps);
            }
            TensorType::Q5_0 => {
                scales[0] = half(&block[0..]);
                halves(&block[6..22], steps);
                fifth_bits(&block[2..6], steps);
                steps.iter_mut().for_each(|step| *step -= 16);
            }
            TensorType::Q5_1 => {
                (scales[0], offsets[0]) = (half(&block[0..]), half(&block[2..]));
                halves(&block[8..24], steps);
                fifth_bits(&block[4..8], steps);
            }
            TensorType::Q8_0 => {
                scales[0] = half(&block[0..]);
                steps.copy_from_slice(bytemuck::cast_slice(&block[2..34]));
            }
            TensorType::Q4_K => {
                scales_and_least(block, scales, offsets);
                block[16..144]
                    .chunks_exact(32)
                    .zip(steps.chunks_exact_mut(64))
                    .for_each(|(q, steps)| halves(q, steps));
            }
            TensorType::Q5_K => {
                scales_and_least(block, scales, offsets);
                block[48..176]
                    .chunks_exact(32)
                    .zip(steps.chunks_exact_mut(64))
                    .for_each(|(q, steps)| halves(q, steps));
                for (group, steps) in steps.chunks_exact_mut(32).enumerate() {
                    for (step, bits) in steps.iter_mut().zip(&block[16..48]) {
                        *step += ((bits >> group & 1) << 4).cast_signed();
                    }
                }
            }
            TensorType::Q6_K => six_bits(block, steps, scales),
            _ => unreachable!("`group_of` knows no others"),
        }
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// The low halves of all bytes, then their high halves.
fn halves(bytes: &[u8], steps: &mut [i8]) {
    let (low, high) = steps.split_at_mut(bytes.len());
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = (byte & 15).cast_signed();
        *high = (byte >> 4).cast_signed();
    }
}

/// Adds the fifth bit of each of 32 elements, which lie in a number of 32 bits.
fn fifth_bits(bits: &[u8], steps: &mut [i8]) {
    for (index, step) in steps.iter_mut().enumerate() {
        *step += ((bits[index / 8] >> (index % 8) & 1) << 4).cast_signed();
    }
}

/// The eight scales and least values of a block of `Q4_K` or `Q5_K`: 6 bits each in 12 bytes, those of the last four
/// with their low four bits in the last four bytes and their high two beside those of the first four.
fn scales_and_least(block: &[u8], scales: &mut [f32], offsets: &mut [f32]) {
    let (scale, least) = (half(&block[0..]), half(&block[2..]));
    let packed = &block[4..16];
    for (group, (out, offset)) in scales.iter_mut().zip(offsets).enumerate() {
        let (steps, below) = if group < 4 {
            (packed[group] & 63, packed[group + 4] & 63)
        } else {
            let (low, first, second) = (packed[group + 4], packed[group - 4], packed[group]);
            (low & 15 | first >> 6 << 4, low >> 4 | second >> 6 << 4)
        };
        *out = scale * f32::from(steps);
        *offset = -least * f32::from(below);
    }
}

/// A block of `Q6_K`: per half of it 64 bytes of low four bits and 32 bytes of high two, of four elements each.
fn six_bits(block: &[u8], steps: &mut [i8], scales: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (group_scales, scale) = rest.split_at(16);
    let scale = half(scale);
    for (out, steps) in scales.iter_mut().zip(group_scales) {
        *out = scale * f32::from(steps.cast_signed());
    }
    let parts = steps.chunks_exact_mut(128).zip(low.chunks_exact(64)).zip(high.chunks_exact(32));
    for ((steps, low), high) in parts {
        for (index, step) in steps.iter_mut().enumerate() {
            let (quarter, place) = (index / 32, index % 32);
            let four = low[place + quarter % 2 * 32] >> (quarter / 2 * 4) & 15;
            let two = high[place] >> (quarter * 2) & 3;
            *step = (four | two << 4).cast_signed() - 32;
        }
    }
}
