//! GPTQ: words along the inputs, scales and zero points per group, groups perhaps in an order of their own.

use super::{Groups, PackedParts, QuantizedMatrix, Steps, centred, field};
use crate::models::{ModelError, Share};
use crate::weights::tensor::exact_format;

/// What the configuration says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    pub(super) bits: u32,
    pub(super) share: Share,
    pub(super) less_one: bool,
}

/// `value = (step - zero) * scale[group][output]`.
pub(super) fn open<'a>(
    parts: &PackedParts<'_, 'a>,
    [outputs, inputs]: [usize; 2],
    weights: Weights,
) -> Result<QuantizedMatrix<'a>, ModelError> {
    let Weights { bits, share, less_one } = weights;
    let per_word = (32 / bits) as usize;
    let count = share.count(inputs);
    let steps = parts.words(STEPS, [inputs.div_ceil(per_word), outputs])?;
    let zeros = parts.words(ZEROS, [count, outputs.div_ceil(per_word)])?;
    let scales = parts.numbers(SCALES, [count, outputs])?;
    let groups = parts.groups(GROUPS, share, inputs)?;
    let middle = 1 << (bits - 1);
    let zero = move |group: usize, output: usize| {
        let stored = field(zeros.at(group, output / per_word), bits, output % per_word);
        // Zero less one is stored as the greatest number.
        if less_one { (stored + 1) & ((1 << bits) - 1) } else { stored }
    };
    let symmetric = (0..count).all(|group| (0..outputs).all(|output| zero(group, output) == middle));
    let exact = match groups {
        Groups::Of(size) if symmetric => exact_format(bits, size, inputs),
        _ => None,
    };
    Ok(QuantizedMatrix {
        kind: format!("GPTQ of {bits} bits"),
        inputs,
        groups,
        steps: Steps::Whole,
        exact,
        unpack: Box::new(move |output, row| {
            for (input, step) in row.steps.iter_mut().enumerate() {
                *step = centred(field(steps.at(input / per_word, output), bits, input % per_word), bits);
            }
            for (group, (scale, offset)) in row.scales.iter_mut().zip(&mut row.offsets).enumerate() {
                *scale = scales.at(group, output);
                *offset = (middle - zero(group, output)) as f32 * *scale;
            }
        }),
        parts: parts.contents(weights),
    })
}

pub(super) const STEPS: &str = "qweight";
const ZEROS: &str = "qzeros";
const SCALES: &str = "scales";
const GROUPS: &str = "g_idx";
pub(super) const PARTS: &[&str] = &[STEPS, ZEROS, SCALES, GROUPS];
