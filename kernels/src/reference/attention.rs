//! Causal attention over the paged KV cache.

use super::kv::read_kv;
use crate::{
    kv::KvBlockShape,
    step::{AttentionParams, SequenceRows},
};

/// `out[row][head] = Σ_key softmax(scale * q · k)[key] * v[key]` over the keys that the row may see.
///
/// `q` and `out` are `[rows][query_heads][head_size]`. The K and V of the step's own rows are already in the blocks.
pub fn attention(
    out: &mut [f32],
    q: &[f32],
    shape: &KvBlockShape,
    layer: usize,
    sequences: &[SequenceRows<'_>],
    params: AttentionParams,
) {
    assert_eq!(out.len(), q.len(), "attention: out is as long as q");
    assert!(params.query_heads.is_multiple_of(shape.kv_heads), "attention: whole groups of query heads");
    let group = params.query_heads / shape.kv_heads;
    for sequence in sequences {
        sequence.assert_fits(shape);
        for row in 0..sequence.rows {
            let position = sequence.first_position + row;
            for head in 0..params.query_heads {
                let first = ((sequence.first_row + row) * params.query_heads + head) * shape.head_size;
                let elements = first..first + shape.head_size;
                let keys = (params.first_key(position)..=position).map(|key| {
                    let block = sequence.blocks[key / shape.block_len];
                    read_kv(shape, block, layer, key % shape.block_len, head / group)
                });
                attend(&mut out[elements.clone()], &q[elements], keys, params.scale);
            }
        }
    }
}

fn attend(out: &mut [f32], q: &[f32], keys: impl Iterator<Item = (Vec<f32>, Vec<f32>)>, scale: f32) {
    let (scores, values): (Vec<f32>, Vec<Vec<f32>>) =
        keys.map(|(k, v)| (scale * q.iter().zip(&k).map(|(q, k)| q * k).sum::<f32>(), v)).unzip();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let total: f32 = weights.iter().sum();
    for (element, out) in out.iter_mut().enumerate() {
        *out = weights.iter().zip(&values).map(|(weight, v)| weight * v[element]).sum::<f32>() / total;
    }
}
