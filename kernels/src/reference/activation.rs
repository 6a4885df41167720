//! Element by element operations.

/// `out = silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`.
pub fn silu_mul(out: &mut [f32], gate: &[f32], up: &[f32]) {
    assert_eq!(out.len(), gate.len(), "silu_mul: gate is as long as out");
    assert_eq!(out.len(), up.len(), "silu_mul: up is as long as out");
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + (-gate).exp()) * up;
    }
}

/// `out += x`.
pub fn add(out: &mut [f32], x: &[f32]) {
    assert_eq!(out.len(), x.len(), "add: both sides are equally long");
    for (out, &x) in out.iter_mut().zip(x) {
        *out += x;
    }
}
