//! Rotary position embedding in the NeoX order: element `i` is rotated with element `i + half`.

use crate::step::RopeTable;

/// Rotates every head of every token of `x`, `[tokens][heads][head_size]`, in place; elements from `2 * half` on stay.
pub fn rope(x: &mut [f32], positions: &[u32], table: RopeTable<'_>, head_size: usize) {
    if positions.is_empty() {
        return;
    }
    assert!(2 * table.half <= head_size, "rope: {} pairs in a head of {head_size}", table.half);
    assert!(x.len().is_multiple_of(positions.len() * head_size), "rope: x is [tokens][heads][{head_size}]");
    let row = x.len() / positions.len();
    for (x, &position) in x.chunks_exact_mut(row).zip(positions) {
        let (cos, sin) = table.at(position);
        for head in x.chunks_exact_mut(head_size) {
            for pair in 0..table.half {
                let (low, high) = (head[pair], head[pair + table.half]);
                head[pair] = low * cos[pair] - high * sin[pair];
                head[pair + table.half] = high * cos[pair] + low * sin[pair];
            }
        }
    }
}

/// Cosines and sines of positions `0..positions`, as transformers computes them: the angle and its cosine in f32, then
/// times `factor` (the attention factor of YaRN; otherwise 1). Both are `[position][inverse_frequencies.len()]`.
pub fn rope_table(inverse_frequencies: &[f32], positions: usize, factor: f32) -> (Vec<f32>, Vec<f32>) {
    let angles = (0..positions)
        .flat_map(|position| inverse_frequencies.iter().map(move |frequency| position as f32 * frequency));
    angles.map(|angle| (angle.cos() * factor, angle.sin() * factor)).unzip()
}
