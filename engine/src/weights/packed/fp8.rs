//! Codes of E4M3 with a scale for the whole matrix, for each output, or for each block of outputs and inputs: compressed-tensors
//! (`float-quantized`), and `quant_method: fp8` as vLLM, llm-compressor and DeepSeek write it.
//!
//! Scales of activations, and of keys and values, are not used: each token gets one of its own.

use safetensors::Dtype;

use super::{Groups, Numbers, PackedParts, QuantizedMatrix, Steps, dtype_of};
use crate::handle::Quantization;
use crate::models::ModelError;

/// `value = code * scale`, one scale for `block` outputs and inputs if it has some.
pub(super) fn open<'a>(
    parts: &PackedParts<'_, 'a>,
    [outputs, inputs]: [usize; 2],
    block: Option<[usize; 2]>,
) -> Result<QuantizedMatrix<'a>, ModelError> {
    let codes = parts.expect(CODES, &[Dtype::F8_E4M3], [outputs, inputs])?.data();
    let (scales, rows, columns) = match block {
        Some([rows, columns]) => {
            let shape = [outputs.div_ceil(rows), inputs.div_ceil(columns)];
            (parts.numbers(BLOCK_SCALES, shape)?, rows, columns)
        }
        None => match parts.get(SCALES) {
            // One for all outputs.
            Some(view) if view.shape().iter().product::<usize>() == 1 && outputs != 1 => {
                let dtype = dtype_of(view).ok_or_else(|| {
                    parts.error(
                        SCALES,
                        format!("it is stored as {:?} instead of F32, F16, BF16", view.dtype()),
                    )
                })?;
                (Numbers { bytes: view.data(), dtype, columns: 1 }, outputs, inputs)
            }
            _ => (parts.numbers(SCALES, [outputs, 1])?, 1, inputs),
        },
    };
    Ok(QuantizedMatrix {
        kind: if block.is_some() { "fp8 in blocks".into() } else { "fp8".into() },
        inputs,
        groups: Groups::Of(columns),
        steps: Steps::E4m3,
        exact: block.is_none().then_some(Quantization::Fp8),
        unpack: Box::new(move |output, row| {
            let codes = &codes[output * inputs..(output + 1) * inputs];
            row.steps.iter_mut().zip(codes).for_each(|(step, code)| *step = code.cast_signed());
            for (group, scale) in row.scales.iter_mut().enumerate() {
                *scale = scales.at(output / rows, group);
            }
        }),
        parts: parts.contents(block),
    })
}

pub(super) const CODES: &str = "weight";
const SCALES: &str = "weight_scale";
const BLOCK_SCALES: &str = "weight_scale_inv";
pub(super) const PARTS: &[&str] =
    &[CODES, SCALES, BLOCK_SCALES, "input_scale", "output_scale", "k_scale", "v_scale"];
