//! AWQ for GEMM: words along the outputs, eight of which lie in an order that suits a GPU's registers.

use super::{Groups, PackedParts, QuantizedMatrix, Steps, centred, field};
use crate::models::{ModelError, Share};
use crate::weights::tensor::exact_format;

/// `value = (step - zero) * scale[group][output]`.
pub(super) fn open<'a>(
    parts: &PackedParts<'_, 'a>,
    [outputs, inputs]: [usize; 2],
    share: Share,
) -> Result<QuantizedMatrix<'a>, ModelError> {
    let (size, count) = (share.size(inputs), share.count(inputs));
    let words = outputs.div_ceil(PER_WORD);
    let steps = parts.words(STEPS, [inputs, words])?;
    let zeros = parts.words(ZEROS, [count, words])?;
    let scales = parts.numbers(SCALES, [count, outputs])?;
    let place = |output: usize| (output / PER_WORD, PLACES[output % PER_WORD]);
    let zero = move |group: usize, output: usize| {
        let (word, place) = place(output);
        field(zeros.at(group, word), BITS, place)
    };
    let symmetric = (0..count).all(|group| (0..outputs).all(|output| zero(group, output) == MIDDLE));
    Ok(QuantizedMatrix {
        kind: "AWQ of 4 bits".into(),
        inputs,
        groups: Groups::Of(size),
        steps: Steps::Whole,
        exact: if symmetric { exact_format(BITS, size, inputs) } else { None },
        unpack: Box::new(move |output, row| {
            let (word, place) = place(output);
            for (input, step) in row.steps.iter_mut().enumerate() {
                *step = centred(field(steps.at(input, word), BITS, place), BITS);
            }
            for (group, (scale, offset)) in row.scales.iter_mut().zip(&mut row.offsets).enumerate() {
                *scale = scales.at(group, output);
                *offset = (MIDDLE - zero(group, output)) as f32 * *scale;
            }
        }),
        parts: parts.contents(share),
    })
}

const BITS: u32 = 4;
const PER_WORD: usize = 8;
const MIDDLE: i32 = 8;
/// Where each of eight outputs lies in its word.
const PLACES: [usize; PER_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

const STEPS: &str = "qweight";
const ZEROS: &str = "qzeros";
const SCALES: &str = "scales";
pub(super) const PARTS: &[&str] = &[STEPS, ZEROS, SCALES];
