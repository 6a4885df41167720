//! compressed-tensors: int8 as bytes, or words along the inputs; zero points as bytes, or words along the outputs.
//!
//! Scales of activations that such a checkpoint may have are not used: each token gets a scale of its own.

use safetensors::Dtype;

use super::{Groups, PackedParts, QuantizedMatrix, Steps, centred, field};
use crate::models::{ModelError, Share};
use crate::weights::tensor::{UnpackedRow, exact_format};

/// What the configuration says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    pub(super) bits: u32,
    pub(super) share: Share,
    pub(super) symmetric: bool,
}

/// Unpacks the steps of an output.
type RowSteps<'a> = Box<dyn Fn(usize, &mut [i8]) + Sync + 'a>;
/// The zero point of a group of an output.
type Zeros<'a> = Box<dyn Fn(usize, usize) -> i8 + Sync + 'a>;

/// `value = (step - zero) * scale[output][group]`.
pub(super) fn open<'a>(
    parts: &PackedParts<'_, 'a>,
    shape: [usize; 2],
    weights: Weights,
) -> Result<QuantizedMatrix<'a>, ModelError> {
    let ([outputs, inputs], Weights { bits, share, symmetric }) = (shape, weights);
    let count = share.count(inputs);
    let steps = steps(parts, shape, bits)?;
    let zeros = if symmetric { None } else { Some(zeros(parts, [outputs, count], bits)?) };
    let scales = parts.numbers(SCALES, [outputs, count])?;
    let groups = parts.groups(GROUPS, share, inputs)?;
    let exact = match groups {
        Groups::Of(size) if symmetric => exact_format(bits, size, inputs),
        _ => None,
    };
    Ok(QuantizedMatrix {
        kind: format!("compressed-tensors of {bits} bits"),
        inputs,
        groups,
        steps: Steps::Whole,
        exact,
        unpack: Box::new(move |output, row| {
            let UnpackedRow { steps: row, scales: row_scales, offsets } = row;
            steps(output, row);
            for (group, (scale, offset)) in row_scales.iter_mut().zip(offsets).enumerate() {
                *scale = scales.at(output, group);
                *offset = zeros.as_ref().map_or(0.0, |zero| -f32::from(zero(output, group)) * *scale);
            }
        }),
        parts: parts.contents(weights),
    })
}

fn steps<'a>(
    parts: &PackedParts<'_, 'a>,
    [outputs, inputs]: [usize; 2],
    bits: u32,
) -> Result<RowSteps<'a>, ModelError> {
    if parts.get(PACKED).is_none() {
        let bytes = parts.expect(WHOLE, &[Dtype::I8], [outputs, inputs])?.data();
        return Ok(Box::new(move |output, row| {
            row.copy_from_slice(bytemuck::cast_slice(&bytes[output * inputs..(output + 1) * inputs]));
        }));
    }
    let per_word = (32 / bits) as usize;
    let words = parts.words(PACKED, [outputs, inputs.div_ceil(per_word)])?;
    Ok(Box::new(move |output, row| {
        for (input, step) in row.iter_mut().enumerate() {
            *step = centred(field(words.at(output, input / per_word), bits, input % per_word), bits);
        }
    }))
}

fn zeros<'a>(
    parts: &PackedParts<'_, 'a>,
    [outputs, count]: [usize; 2],
    bits: u32,
) -> Result<Zeros<'a>, ModelError> {
    if parts.get(ZEROS).is_some_and(|view| view.dtype() == Dtype::I8) {
        let bytes = parts.expect(ZEROS, &[Dtype::I8], [outputs, count])?.data();
        return Ok(Box::new(move |output, group| bytes[output * count + group].cast_signed()));
    }
    let per_word = (32 / bits) as usize;
    let words = parts.words(ZEROS, [outputs.div_ceil(per_word), count])?;
    Ok(Box::new(move |output, group| {
        centred(field(words.at(output / per_word, group), bits, output % per_word), bits)
    }))
}

pub(super) const PACKED: &str = "weight_packed";
pub(super) const WHOLE: &str = "weight";
const SCALES: &str = "weight_scale";
const ZEROS: &str = "weight_zero_point";
const GROUPS: &str = "weight_g_idx";
pub(super) const PARTS: &[&str] =
    &[PACKED, WHOLE, SCALES, ZEROS, GROUPS, "weight_shape", "input_scale", "input_zero_point"];
