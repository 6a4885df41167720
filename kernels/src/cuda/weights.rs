//! Weights in fewer bits as the kernels of a GPU take them: row by row.

use std::thread;

use half::bf16;

use crate::cpu::{encode_e4m3, encode_int8};
use crate::matrix::{Quantization, RowSteps, RowValues, quantize_int4};

/// A matrix of `[outputs][inputs]`, which becomes the same numbers as a [`PackedMatrix`](crate::matrix::PackedMatrix) has.
#[derive(Debug)]
pub struct QuantizedRows {
    /// Int8: one step per byte, `[outputs][padded]`. Fp8: one code, likewise. Int4: two, `[outputs][padded / 2]`: of each 32 inputs in 16 bytes, byte `i` has the
    /// inputs `i` and `i + 16` in its low and its high half.
    pub steps: Vec<u8>,
    /// Int8 and fp8: f32, `[outputs]`. Int4: bf16, `[padded / group][scale_stride]`.
    pub scales: Vec<u8>,
}

/// Steps of a row of so many inputs, with the zeros that fill up what the kernels take at a time.
pub const fn padded(inputs: usize) -> usize {
    inputs.next_multiple_of(128)
}

/// Scales of int4 from one group to the next: as many as there are outputs, in whole copies of 16 bytes.
pub const fn scale_stride(outputs: usize) -> usize {
    outputs.next_multiple_of(8)
}

impl QuantizedRows {
    /// Quantises rows that `values` makes, on so many threads, in any order.
    ///
    /// # Panics
    ///
    /// When there are no inputs, or int4 groups are not of 32, 64 or 128 inputs.
    pub fn quantize(
        threads: usize,
        outputs: usize,
        inputs: usize,
        quantization: Quantization,
        values: &RowValues<'_>,
    ) -> Self {
        Self::of_steps(threads, outputs, inputs, quantization, &|row, steps, scales| {
            let mut row_values = vec![0.0; inputs];
            values(row, &mut row_values);
            match quantization {
                Quantization::Int8 => scales[0] = encode_int8(&row_values, bytemuck::cast_slice_mut(steps)),
                Quantization::Fp8 => scales[0] = encode_e4m3(&row_values, bytemuck::cast_slice_mut(steps)),
                Quantization::Int4 { group } => {
                    let groups = row_values.chunks(group).zip(steps.chunks_mut(group));
                    for ((values, steps), scale) in groups.zip(scales) {
                        *scale = quantize_int4(values, steps).to_f32();
                    }
                }
            }
        })
    }

    /// Takes rows that are quantised already: `steps` makes each row's steps (any of int8; codes of fp8; from -8 to 7 of int4) and the
    /// scale of each of its groups, of which int8 and fp8 have one. Scales of int4 are rounded to bf16.
    ///
    /// # Panics
    ///
    /// As [`quantize`](Self::quantize), and when a step of int4 is none.
    pub fn of_steps(
        threads: usize,
        outputs: usize,
        inputs: usize,
        quantization: Quantization,
        steps: &RowSteps<'_>,
    ) -> Self {
        assert!(0 < inputs, "a matrix has inputs");
        let groups = quantization.groups(inputs);
        let row_bytes = match quantization {
            Quantization::Int8 | Quantization::Fp8 => padded(inputs),
            Quantization::Int4 { group } => {
                assert!(matches!(group, 32 | 64 | 128), "int4 in groups of {group}");
                padded(inputs) / 2
            }
        };
        let mut bytes = vec![0; outputs * row_bytes];
        // Row by row, as threads make them.
        let mut scales = vec![0.0; outputs * groups];
        let share = outputs.div_ceil(threads.max(1)).max(1);
        thread::scope(|scope| {
            let shares = bytes.chunks_mut(share * row_bytes).zip(scales.chunks_mut(share * groups));
            for (index, (bytes, scales)) in shares.enumerate() {
                let work = move || {
                    let mut row_steps = vec![0; inputs];
                    let rows = bytes.chunks_exact_mut(row_bytes).zip(scales.chunks_exact_mut(groups));
                    for (row, (bytes, scales)) in rows.enumerate() {
                        steps(index * share + row, &mut row_steps, scales);
                        write_steps(bytes, &row_steps, quantization);
                    }
                };
                scope.spawn(work);
            }
        });
        let scales = match quantization {
            Quantization::Int8 | Quantization::Fp8 => bytemuck::cast_slice(&scales).to_vec(),
            Quantization::Int4 { group } => int4_scales(&scales, groups, padded(inputs) / group),
        };
        Self { steps: bytes, scales }
    }
}

/// From `[outputs][groups]` to `[all_groups][scale_stride]`, in bf16.
fn int4_scales(scales: &[f32], groups: usize, all_groups: usize) -> Vec<u8> {
    let stride = scale_stride(scales.len() / groups);
    let mut transposed = vec![0u16; all_groups * stride];
    for (output, scales) in scales.chunks_exact(groups).enumerate() {
        for (group, scale) in scales.iter().enumerate() {
            transposed[group * stride + output] = bf16::from_f32(*scale).to_bits();
        }
    }
    bytemuck::cast_slice(&transposed).to_vec()
}

fn write_steps(bytes: &mut [u8], steps: &[i8], quantization: Quantization) {
    match quantization {
        Quantization::Int8 | Quantization::Fp8 => {
            bytes[..steps.len()].copy_from_slice(bytemuck::cast_slice(steps))
        }
        Quantization::Int4 { .. } => {
            assert!(steps.iter().all(|step| (-8..8).contains(step)), "steps of int4 are from -8 to 7");
            for (bytes, steps) in bytes.chunks_exact_mut(16).zip(steps.chunks(32)) {
                for (index, step) in steps.iter().enumerate() {
                    let half = step.cast_unsigned() & 15;
                    bytes[index % 16] |= if index < 16 { half } else { half << 4 };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUTS: usize = 5;
    const INPUTS: usize = 75;

    fn step(row: usize, input: usize, least: i32) -> i8 {
        (least + (row * 31 + input * 17) as i32 % (-2 * least)) as i8
    }

    fn rows(quantization: Quantization, least: i32, threads: usize) -> QuantizedRows {
        QuantizedRows::of_steps(threads, OUTPUTS, INPUTS, quantization, &|row, steps, scales| {
            steps.iter_mut().enumerate().for_each(|(input, out)| *out = step(row, input, least));
            scales.iter_mut().enumerate().for_each(|(group, out)| *out = (row * 4 + group) as f32);
        })
    }

    #[test]
    fn int8_is_row_by_row() {
        for threads in [1, 3] {
            let QuantizedRows { steps, scales } = rows(Quantization::Int8, -128, threads);
            for (row, steps) in steps.chunks(padded(INPUTS)).enumerate() {
                let expected = |input| if input < INPUTS { step(row, input, -128) } else { 0 };
                assert!(steps.iter().enumerate().all(|(input, it)| it.cast_signed() == expected(input)));
            }
            let scales: Vec<f32> = scales.as_chunks().0.iter().map(|it| f32::from_le_bytes(*it)).collect();
            assert_eq!(scales, [0.0, 4.0, 8.0, 12.0, 16.0]);
        }
    }

    #[test]
    fn int4_has_inputs_that_are_sixteen_apart_in_a_byte() {
        for threads in [1, 3] {
            let QuantizedRows { steps, scales } = rows(Quantization::Int4 { group: 32 }, -8, threads);
            assert_eq!(steps.len(), OUTPUTS * padded(INPUTS) / 2);
            for row in 0..OUTPUTS {
                for input in 0..padded(INPUTS) {
                    let byte = steps[(row * padded(INPUTS) + input / 32 * 32) / 2 + input % 16];
                    let half = if input % 32 < 16 { byte << 4 } else { byte & 0xf0 };
                    let expected = if input < INPUTS { step(row, input, -8) } else { 0 };
                    assert_eq!(half.cast_signed() / 16, expected, "{row}, {input}");
                }
            }
            let scales: Vec<u16> = scales.as_chunks().0.iter().map(|it| u16::from_le_bytes(*it)).collect();
            assert_eq!(scales.len(), 4 * 8);
            for (index, scale) in scales.into_iter().enumerate() {
                let (group, output) = (index / 8, index % 8);
                let is_there = output < OUTPUTS && group < 3;
                let expected = if is_there { (output * 4 + group) as f32 } else { 0.0 };
                assert_eq!(bf16::from_bits(scale).to_f32(), expected, "group {group}, output {output}");
            }
        }
    }
}
