//! Root mean square normalisation.

/// `out[row] = x[row] / sqrt(mean(x[row]²) + eps) * weight`, for rows of the length of `weight`.
///
/// With rows of one head's elements this is the q/k norm of Qwen3.
pub fn rms_norm(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    assert_eq!(out.len(), x.len(), "rms_norm: out is as long as x");
    assert!(width > 0 && x.len().is_multiple_of(width), "rms_norm: x is whole rows of {width}");
    for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let mean = x.iter().map(|x| x * x).sum::<f32>() / width as f32;
        let factor = 1.0 / (mean + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    }
}
