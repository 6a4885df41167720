//! Matrix products with quantised weights and activations.

use super::{
    e4m3::{e4m3_scale, e4m3_to_f32, f32_to_e4m3},
    kv::quantize,
};
use crate::matrix::Quantization;
use half::bf16;

/// As [`matmul`](super::matmul), in fewer bits: each row of `x` becomes int8 with a scale of its own (per token, from the
/// row alone), the weights int8 or int4, and sums of products of steps are whole numbers without rounding:
///
/// `out = (Σ_group scale[output][group] * Σ_input x_steps * w_steps) * x_scale + bias`
///
/// Groups are summed in their order; int8 weights are one group. With fp8 both are [codes](quantize_e4m3), and products of what these stand for
/// are summed left to right in f32.
pub fn matmul_quantized(
    out: &mut [f32],
    x: &[f32],
    w: &[f32],
    inputs: usize,
    quantization: Quantization,
    bias: Option<&[f32]>,
) {
    assert!(inputs > 0 && w.len().is_multiple_of(inputs), "matmul: w is [outputs][{inputs}]");
    let outputs = w.len() / inputs;
    assert_eq!(x.len() / inputs * outputs, out.len(), "matmul: out is [rows][{outputs}]");
    let group = match quantization {
        Quantization::Fp8 => return matmul_e4m3(out, x, w, inputs, bias),
        Quantization::Int8 => inputs,
        Quantization::Int4 { group } => group,
    };
    for (out, x) in out.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
        let mut x_steps = vec![0; inputs];
        let x_scale = quantize_int8(x, &mut x_steps);
        for (output, (out, w)) in out.iter_mut().zip(w.chunks_exact(inputs)).enumerate() {
            let mut sum = 0.0;
            for (w, x_steps) in w.chunks(group).zip(x_steps.chunks(group)) {
                let mut w_steps = vec![0; w.len()];
                let w_scale = match quantization {
                    Quantization::Int8 => quantize_int8(w, &mut w_steps),
                    _ => quantize_int4(w, &mut w_steps).to_f32(),
                };
                let products = x_steps.iter().zip(&w_steps).map(|(&x, &w)| i32::from(x) * i32::from(w));
                sum += products.sum::<i32>() as f32 * w_scale;
            }
            *out = sum * x_scale + bias.map_or(0.0, |bias| bias[output]);
        }
    }
}

fn matmul_e4m3(out: &mut [f32], x: &[f32], w: &[f32], inputs: usize, bias: Option<&[f32]>) {
    let coded = |values: &[f32]| {
        let mut codes = vec![0; inputs];
        let scale = quantize_e4m3(values, &mut codes);
        (codes.into_iter().map(e4m3_to_f32).collect::<Vec<f32>>(), scale)
    };
    let w: Vec<_> = w.chunks_exact(inputs).map(coded).collect();
    for (out, x) in out.chunks_exact_mut(w.len()).zip(x.chunks_exact(inputs)) {
        let (x, x_scale) = coded(x);
        for (output, (out, (w, w_scale))) in out.iter_mut().zip(&w).enumerate() {
            let sum = x.iter().zip(w).fold(0.0, |sum, (x, w)| sum + x * w);
            *out = sum * w_scale * x_scale + bias.map_or(0.0, |bias| bias[output]);
        }
    }
}

/// Values to codes of E4M3 in units of [`e4m3_scale`], which is returned.
pub fn quantize_e4m3(values: &[f32], codes: &mut [u8]) -> f32 {
    let scale = e4m3_scale(values.iter().fold(0.0f32, |max, value| max.max(value.abs())));
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = f32_to_e4m3(value / scale);
    }
    scale
}

/// Values to steps from -127 to 127 of the scale `max|values| / 127`, which is returned: `value * (1 / scale)` to the
/// nearest, ties to even.
pub fn quantize_int8(values: &[f32], steps: &mut [i8]) -> f32 {
    let scale = values.iter().fold(0.0f32, |max, value| max.max(value.abs())) / 127.0;
    for (step, &value) in steps.iter_mut().zip(values) {
        *step = quantize(value, scale);
    }
    scale
}

/// Values to steps from -8 to 7, where the value of the greatest magnitude (the first of equals) becomes -8: the scale is
/// that value over -8, may be negative, and is rounded to bf16 before steps are counted in it.
pub fn quantize_int4(values: &[f32], steps: &mut [i8]) -> bf16 {
    let mut greatest = 0.0f32;
    for &value in values {
        if greatest.abs() < value.abs() {
            greatest = value;
        }
    }
    let scale = bf16::from_f32(greatest / -8.0);
    if scale.to_f32().abs() < f32::MIN_POSITIVE {
        steps.fill(0);
        return bf16::ZERO;
    }
    for (step, &value) in steps.iter_mut().zip(values) {
        *step = (value * (1.0 / scale.to_f32())).round_ties_even().clamp(-8.0, 7.0) as i8;
    }
    scale
}
