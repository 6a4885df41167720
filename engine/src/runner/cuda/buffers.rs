//! One buffer per intermediate result, `[rows][elements]` each, for the largest step.

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::weights::padded;
use tidemill_kernels::cuda::{
    Attention, CudaError, DeviceAddress, Driver, LikelyToken, LogprobsRow, LogprobsSum,
};

use crate::memory::DeviceBuffer;
use crate::models::{Model, ModelSpec};
use crate::runner::RunnerLimits;
use crate::weights::DeviceWeights;

#[derive(Debug)]
pub(super) struct Buffers {
    /// What passes from layer to layer.
    pub(super) state: DeviceBuffer,
    /// The state after a norm.
    pub(super) normed: DeviceBuffer,
    pub(super) query: DeviceBuffer,
    pub(super) key: DeviceBuffer,
    pub(super) value: DeviceBuffer,
    pub(super) attended: DeviceBuffer,
    pub(super) gate: DeviceBuffer,
    pub(super) up: DeviceBuffer,
    pub(super) gated: DeviceBuffer,
    /// Rows of any of these in int8, where weights are in fewer bits; and their scales, f32.
    pub(super) steps: DeviceBuffer,
    pub(super) scales: DeviceBuffer,
    /// What attention to parts of long sequences came to, before it is joined: f32.
    pub(super) partials: DeviceBuffer,
    /// f32, `[logits rows][vocabulary]`
    pub(super) logits: DeviceBuffer,
    /// u64, likewise: memory to choose in.
    pub(super) weights: DeviceBuffer,
    /// What of a step comes down to the host: [`Results`].
    pub(super) results: DeviceBuffer,
    /// f32, `[position][half]` each: all positions of the longest sequence.
    pub(super) cos: DeviceBuffer,
    pub(super) sin: DeviceBuffer,
    pub(super) half: usize,
}

/// How results of a step lie behind each other: u32, `[rows]`, the chosen tokens; then, where log-probabilities are wanted, [`LogprobsSum`],
/// `[rows]`, and [`LikelyToken`], `[rows][places]`. Places are in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Results {
    pub(super) rows: usize,
    /// `None` where no log-probabilities are wanted.
    pub(super) places: Option<usize>,
}

impl Buffers {
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        model: &Model<DeviceWeights>,
        limits: RunnerLimits,
    ) -> Result<Self, CudaError> {
        let spec = &model.spec;
        let bytes = model.dtype.bytes();
        let rows = |elements: usize| DeviceBuffer::new(driver, limits.max_tokens * elements * bytes);
        let widest = spec.hidden_size.max(spec.query_size()).max(spec.intermediate_size);
        let quantized_rows = if model.weights.are_quantized() { limits.max_tokens } else { 0 };
        let logits = logits_rows(limits) * spec.vocab_size;
        let [cos, sin] = rotation(spec, limits.max_model_len);
        let table = |numbers: &[f32]| DeviceBuffer::holding(driver, bytemuck::cast_slice(numbers));
        Ok(Self {
            state: rows(spec.hidden_size)?,
            normed: rows(spec.hidden_size)?,
            query: rows(spec.query_size())?,
            key: rows(spec.kv_size())?,
            value: rows(spec.kv_size())?,
            attended: rows(spec.query_size())?,
            gate: rows(spec.intermediate_size)?,
            up: rows(spec.intermediate_size)?,
            gated: rows(spec.intermediate_size)?,
            steps: DeviceBuffer::new(driver, quantized_rows * padded(widest))?,
            scales: DeviceBuffer::new(driver, quantized_rows * size_of::<f32>())?,
            partials: DeviceBuffer::new(driver, partial_bytes(spec, limits))?,
            logits: DeviceBuffer::new(driver, logits * size_of::<f32>())?,
            weights: DeviceBuffer::new(driver, logits * size_of::<u64>())?,
            // A row that was left out comes down with the others.
            results: DeviceBuffer::zeroed(driver, Results::most_bytes(limits.max_tokens))?,
            half: cos.len() / limits.max_model_len,
            cos: table(&cos)?,
            sin: table(&sin)?,
        })
    }

    /// u32, `[rows]`: what was chosen. It stays until the next step has chosen.
    pub(super) const fn chosen(&self) -> DeviceAddress {
        self.results.address()
    }

    /// Rows whose attention, to sequences cut into so many parts, there is memory for.
    pub(super) fn rows_with_partials(&self, spec: &ModelSpec, splits: u32) -> usize {
        (self.partials.bytes() / row_partial_bytes(spec, splits)).max(1)
    }
}

impl Results {
    /// Bytes of as many rows with as much of each as there can be.
    pub(super) const fn most_bytes(rows: usize) -> usize {
        Self { rows, places: Some(LogprobsRow::MOST as usize) }.bytes()
    }

    /// Bytes of all of it.
    const fn bytes(self) -> usize {
        self.likely(self.rows)
    }

    /// Where results of some rows are: all of them in one piece.
    pub(super) fn parts(self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let tokens = rows.start * size_of::<u32>()..rows.end * size_of::<u32>();
        let parts = match self.places {
            None => [tokens, 0..0, 0..0],
            Some(_) if rows == (0..self.rows) => [0..self.bytes(), 0..0, 0..0],
            Some(_) => {
                let sums = self.sum(rows.start)..self.sum(rows.end);
                [tokens, sums, self.likely(rows.start)..self.likely(rows.end)]
            }
        };
        parts.into_iter().filter(|part| !part.is_empty())
    }

    /// Where a row's sum is.
    pub(super) const fn sum(self, row: usize) -> usize {
        (self.rows * size_of::<u32>()).next_multiple_of(size_of::<u64>()) + row * size_of::<LogprobsSum>()
    }

    /// Where a row's most likely tokens are.
    pub(super) const fn likely(self, row: usize) -> usize {
        let places = if let Some(places) = self.places { places } else { 0 };
        self.sum(self.rows) + row * places * size_of::<LikelyToken>()
    }
}

/// Rows whose logits there is memory for.
pub(super) fn logits_rows(limits: RunnerLimits) -> usize {
    limits.max_tokens.min(LOGITS_ROWS)
}

/// Cosines and sines of all positions, as [`Rotation`](crate::runner::rotation::Rotation) has them.
fn rotation(spec: &ModelSpec, positions: usize) -> [Vec<f32>; 2] {
    let frequencies = spec.rope.inverse_frequencies(spec.head_size);
    let factor = spec.rope.attention_factor();
    let angles = || {
        let frequencies = &frequencies;
        (0..positions).flat_map(move |position| frequencies.iter().map(move |it| position as f32 * it))
    };
    [angles().map(|it| it.cos() * factor).collect(), angles().map(|it| it.sin() * factor).collect()]
}

fn partial_bytes(spec: &ModelSpec, limits: RunnerLimits) -> usize {
    let longest = u32::try_from(limits.max_model_len).expect("a sequence has fewer than 2^32 tokens");
    let row = row_partial_bytes(spec, Attention::splits(longest));
    (limits.max_tokens * row).min(PARTIAL_BYTES).max(row)
}

const fn row_partial_bytes(spec: &ModelSpec, splits: u32) -> usize {
    spec.heads * splits as usize * (spec.head_size + 2) * size_of::<f32>()
}

/// Enough that reading the head's weights is not what takes the time.
const LOGITS_ROWS: usize = 64;
/// Steps of many rows with long sequences are attended to in several launches, each of which fills the device.
const PARTIAL_BYTES: usize = 128 << 20;
