//! Matrices whose rows are made one by one, for checkpoints that hold them in a form of their own.
//!
//! Sixteen rows exist unpacked at a time and thread, so that a matrix of few bits never lies in memory in many.

use super::pack::{pack, pack_steps};
use super::{INT4_GROUPS, PANEL, PackedMatrix, Quantization, WeightDtype, WeightFormat};

/// Writes the weights of the row of that number.
pub type RowValues<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// Writes the steps of the row of that number, of fp8 its codes, and the scale of each of its groups.
pub type RowSteps<'a> = dyn Fn(usize, &mut [i8], &mut [f32]) + Sync + 'a;

impl PackedMatrix {
    /// As [`quantize_on`](Self::quantize_on), of rows that `values` makes, on as many threads, in any order.
    ///
    /// # Panics
    ///
    /// When there are no inputs, or int4 groups are not of 32, 64 or 128 inputs.
    pub fn quantize_rows_on(
        threads: usize,
        outputs: usize,
        inputs: usize,
        quantization: Quantization,
        values: &RowValues<'_>,
    ) -> Self {
        let format = checked(inputs, quantization);
        let mut matrix = Self::empty(format, outputs, inputs);
        matrix.fill_on(threads, &|first, panels| {
            let mut rows = vec![0.0; PANEL * inputs];
            for (index, panel) in panels.split(1, format.panel_sizes(inputs)).enumerate() {
                let row = (first + index) * PANEL;
                let rows = &mut rows[..PANEL.min(outputs - row) * inputs];
                for (index, out) in rows.chunks_exact_mut(inputs).enumerate() {
                    values(row + index, out);
                }
                pack(panel, bytemuck::cast_slice(rows), inputs, WeightDtype::F32, format);
            }
        });
        matrix
    }

    /// Packs weights that are quantised already, as they are: `steps` makes each row's steps (any of int8; codes of fp8;
    /// from -8 to 7 of int4) and the scale of each of its groups, of which int8 and fp8 have one. Scales of int4 are rounded to bf16: by one
    /// part in 256 at most.
    ///
    /// # Panics
    ///
    /// As [`quantize_rows_on`](Self::quantize_rows_on), and when a step of int4 is none.
    pub fn of_steps_on(
        threads: usize,
        outputs: usize,
        inputs: usize,
        quantization: Quantization,
        steps: &RowSteps<'_>,
    ) -> Self {
        let format = checked(inputs, quantization);
        let groups = quantization.groups(inputs);
        let mut matrix = Self::empty(format, outputs, inputs);
        matrix.fill_on(threads, &|first, panels| {
            let (mut rows, mut scales) = (vec![0; PANEL * inputs], vec![0.0; PANEL * groups]);
            for (index, panel) in panels.split(1, format.panel_sizes(inputs)).enumerate() {
                let row = (first + index) * PANEL;
                let count = PANEL.min(outputs - row);
                let (rows, scales) = (&mut rows[..count * inputs], &mut scales[..count * groups]);
                let each = rows.chunks_exact_mut(inputs).zip(scales.chunks_exact_mut(groups));
                for (index, (row_steps, row_scales)) in each.enumerate() {
                    steps(row + index, row_steps, row_scales);
                }
                pack_steps(panel, rows, scales, inputs, quantization);
            }
        });
        matrix
    }
}

fn checked(inputs: usize, quantization: Quantization) -> WeightFormat {
    assert!(0 < inputs, "a matrix has inputs");
    if let Quantization::Int4 { group } = quantization {
        assert!(INT4_GROUPS.contains(&group), "int4 in groups of {group}");
    }
    WeightFormat::Quantized(quantization)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::MatrixSource;

    const OUTPUTS: usize = 37;
    const INPUTS: usize = 200;
    const KINDS: [Quantization; 4] = [
        Quantization::Int8,
        Quantization::Fp8,
        Quantization::Int4 { group: 32 },
        Quantization::Int4 { group: 128 },
    ];

    fn weight(row: usize, input: usize) -> f32 {
        ((row * 7919 + input * 104_729) % 1009) as f32 / 500.0 - 1.0
    }

    fn row_of(matrix: &PackedMatrix, row: usize) -> Vec<f32> {
        let mut out = vec![0.0; matrix.inputs()];
        matrix.row(row, &mut out);
        out
    }

    #[test]
    fn rows_made_one_by_one_are_packed_as_a_whole_matrix_is() {
        let all: Vec<f32> =
            (0..OUTPUTS * INPUTS).map(|index| weight(index / INPUTS, index % INPUTS)).collect();
        let source = MatrixSource { bytes: bytemuck::cast_slice(&all), dtype: WeightDtype::F32 };
        for kind in KINDS {
            let whole = PackedMatrix::quantize_on(1, OUTPUTS, INPUTS, source, kind);
            for threads in [1, 3] {
                let made = PackedMatrix::quantize_rows_on(threads, OUTPUTS, INPUTS, kind, &|row, out| {
                    out.copy_from_slice(&all[row * INPUTS..(row + 1) * INPUTS]);
                });
                assert_eq!(made.panels.as_slice::<u8>(), whole.panels.as_slice::<u8>(), "{kind}");
                assert_eq!(made.scales.as_slice::<u8>(), whole.scales.as_slice::<u8>(), "{kind}");
                assert_eq!(made.corrections.as_slice::<u8>(), whole.corrections.as_slice::<u8>(), "{kind}");
            }
        }
    }

    /// What a step stands for.
    fn number(kind: Quantization, step: i8) -> f32 {
        match kind {
            Quantization::Fp8 => crate::reference::e4m3_to_f32(step.cast_unsigned()),
            _ => f32::from(step),
        }
    }

    #[test]
    fn steps_come_back_as_they_were_given() {
        for kind in KINDS {
            let (group, least) = match kind {
                Quantization::Int8 | Quantization::Fp8 => (INPUTS, -128),
                Quantization::Int4 { group } => (group, -8),
            };
            let step =
                |row: usize, input: usize| (least + ((row * 31 + input * 17) as i32 % (-2 * least))) as i8;
            // Powers of two, which bf16 keeps; some of them negative.
            let scale = |row: usize, group: usize| (-2.0f32).powi((row % 5) as i32 - 4 + group as i32);
            for threads in [1, 4] {
                let matrix =
                    PackedMatrix::of_steps_on(threads, OUTPUTS, INPUTS, kind, &|row, steps, scales| {
                        steps.iter_mut().enumerate().for_each(|(input, out)| *out = step(row, input));
                        scales.iter_mut().enumerate().for_each(|(group, out)| *out = scale(row, group));
                    });
                for row in 0..OUTPUTS {
                    let expected: Vec<f32> = (0..INPUTS)
                        .map(|input| number(kind, step(row, input)) * scale(row, input / group))
                        .collect();
                    let found = row_of(&matrix, row);
                    let is_same = |(a, b): (&f32, &f32)| a == b || a.is_nan() && b.is_nan();
                    assert!(found.iter().zip(&expected).all(is_same), "{kind}: row {row}: {found:?}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "steps of int4 are from -8 to 7")]
    fn a_step_beyond_four_bits_is_refused() {
        let kind = Quantization::Int4 { group: 32 };
        PackedMatrix::of_steps_on(1, 1, 32, kind, &|_, steps, _| steps.fill(8));
    }
}
