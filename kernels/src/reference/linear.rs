//! Matrix products.

use crate::matrix::{MatrixSource, WeightDtype};
use half::{bf16, f16};

/// `out[row][output] = Σ_input x[row][input] * w[output][input] + bias[output]`.
///
/// `x` is `[rows][inputs]`, `w` is `[outputs][inputs]`, `out` is `[rows][outputs]`.
pub fn matmul(out: &mut [f32], x: &[f32], w: &[f32], inputs: usize, bias: Option<&[f32]>) {
    assert!(inputs > 0 && w.len().is_multiple_of(inputs), "matmul: w is [outputs][{inputs}]");
    let outputs = w.len() / inputs;
    assert_eq!(x.len() / inputs * outputs, out.len(), "matmul: out is [rows][{outputs}]");
    assert!(bias.is_none_or(|bias| bias.len() == outputs), "matmul: bias has {outputs} elements");
    for (out, x) in out.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
        for (output, (out, w)) in out.iter_mut().zip(w.chunks_exact(inputs)).enumerate() {
            let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            *out = sum + bias.map_or(0.0, |bias| bias[output]);
        }
    }
}

/// The elements of a stored matrix as f32.
pub fn widen_matrix(source: MatrixSource<'_>) -> Vec<f32> {
    let halves = |convert: fn(u16) -> f32| {
        source.bytes.as_chunks().0.iter().map(|&bytes| convert(u16::from_le_bytes(bytes))).collect()
    };
    match source.dtype {
        WeightDtype::F32 => {
            source.bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        }
        WeightDtype::F16 => halves(|bits| f16::from_bits(bits).to_f32()),
        WeightDtype::Bf16 => halves(|bits| bf16::from_bits(bits).to_f32()),
    }
}
