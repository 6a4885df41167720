//! Cosines and sines of the rows of one step.
//!
//! Computed for the rows at hand instead of looked up in a table of all positions, which would be hundreds of megabytes
//! for models of long context. The arithmetic is that of [`rope_table`](tidemill_kernels::reference::rope_table).

use tidemill_kernels::cpu::Cpu;
use tidemill_kernels::step::RopeTable;

use super::Batch;
use crate::models::RopeSpec;

#[derive(Debug)]
pub(super) struct Rotation {
    inverse_frequencies: Vec<f32>,
    attention_factor: f32,
    /// `[row][pair]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// 0, 1, 2, …: row `n` of a step is entry `n` of the tables.
    entries: Vec<u32>,
}

impl Rotation {
    pub(super) fn new(rope: &RopeSpec, head_size: usize, max_tokens: usize) -> Self {
        let inverse_frequencies = rope.inverse_frequencies(head_size);
        let table = vec![0.0; max_tokens * inverse_frequencies.len()];
        Self {
            inverse_frequencies,
            attention_factor: rope.attention_factor(),
            cos: table.clone(),
            sin: table,
            entries: (0..max_tokens as u32).collect(),
        }
    }

    /// Prepares the rows of a step.
    pub(super) fn fill(&mut self, batch: &Batch<'_>) {
        let pairs = self.inverse_frequencies.len();
        let rows = self.cos.chunks_exact_mut(pairs).zip(self.sin.chunks_exact_mut(pairs));
        for (position, (cos, sin)) in batch.positions().zip(rows) {
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&self.inverse_frequencies) {
                let angle = position as f32 * frequency;
                *cos = angle.cos() * self.attention_factor;
                *sin = angle.sin() * self.attention_factor;
            }
        }
    }

    /// Turns `[rows][heads][head size]`.
    pub(super) fn apply(&self, cpu: &Cpu, heads: &mut [f32], rows: usize, head_size: usize) {
        let table = RopeTable { cos: &self.cos, sin: &self.sin, half: self.inverse_frequencies.len() };
        cpu.rope(heads, &self.entries[..rows], table, head_size);
    }
}
