//! Forward passes: the rows of a batch go through all layers, their K and V into the blocks.
//!
//! The rows of all sequences lie one after another in one set of buffers, made once for the largest step; prefill, a
//! chunk of it and decode differ only in how many rows a sequence has. A row's result does not depend on the others: no
//! operation mixes rows except attention, which reads the row's own sequence.

mod batch;
mod cuda;
mod logits;
mod ranks;
mod rotation;

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cpu::{Cpu, Projection, Rank, StepLimits};
use tidemill_kernels::kv::KvBlockShape;
use tidemill_kernels::step::{AttentionParams, SequenceRows};

use crate::models::{Model, ModelSpec};
use crate::weights::{LayerWeights, Linear};
use batch::recycled;
pub use batch::{Batch, BatchSequence, LogitsWanted};
pub use cuda::{
    Carried, CudaRank, CudaRanks, CudaRunner, Flight, Outcome, OutcomeRow, RowLogprobs, RowTask, Tasks,
};
pub use logits::{Logits, LogitsRow};
use logits::{LogitsBuffer, WantedRow};
pub use ranks::{HostRunner, RankedRunner};
use rotation::Rotation;

/// The most that a step will be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerLimits {
    /// Rows, which are tokens, of a step.
    pub max_tokens: usize,
    /// Sequences of a step.
    pub max_seqs: usize,
    /// Tokens of a sequence.
    pub max_model_len: usize,
}

impl RunnerLimits {
    /// Checks what a runner is made for: blocks of the model's shape, and steps of something.
    fn assert_possible(self, spec: &ModelSpec, shape: &KvBlockShape) {
        assert_eq!(
            (shape.layers, shape.kv_heads, shape.head_size),
            (spec.layers, spec.kv_heads, spec.head_size),
            "blocks have the model's layers, KV heads and head size"
        );
        let Self { max_tokens, max_seqs, max_model_len } = self;
        assert!(0 < max_tokens && 0 < max_seqs && 0 < max_model_len, "{self:?} allow something");
    }
}

/// Runs a model on a CPU, or a rank's part of one.
#[derive(Debug)]
pub struct Runner {
    model: Arc<Model>,
    cpu: Arc<Cpu>,
    shape: KvBlockShape,
    /// Whether it stores keys and values: another rank may store them for it.
    stores_kv: bool,
    limits: RunnerLimits,
    rows: RowBuffers,
    rotation: Rotation,
    logits: LogitsBuffer,
    /// Kept for its memory alone.
    sequences: Vec<SequenceRows<'static>>,
}

/// One buffer per intermediate result, `[rows][elements]` each.
#[derive(Debug)]
struct RowBuffers {
    /// What passes from layer to layer.
    state: Vec<f32>,
    /// The state after a norm.
    normed: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    gated: Vec<f32>,
}

impl Runner {
    /// Makes every buffer that a step within `limits` needs.
    ///
    /// # Panics
    ///
    /// When `shape` is not that of this model's blocks, or a limit is zero.
    pub fn new(
        model: Arc<Model>,
        cpu: impl Into<Arc<Cpu>>,
        shape: KvBlockShape,
        limits: RunnerLimits,
    ) -> Self {
        let cpu = cpu.into();
        let spec = &model.spec;
        limits.assert_possible(spec, &shape);
        let RunnerLimits { max_tokens, max_seqs, .. } = limits;
        let inputs = spec.hidden_size.max(spec.query_size()).max(spec.intermediate_size);
        cpu.reserve(StepLimits { rows: max_tokens, inputs, head_size: spec.head_size });
        Self {
            rows: RowBuffers::new(spec, max_tokens),
            rotation: Rotation::new(&spec.rope, spec.head_size, max_tokens),
            logits: LogitsBuffer::new(model.weights.head.outputs(), max_tokens),
            sequences: Vec::with_capacity(max_seqs),
            model,
            cpu,
            shape,
            stores_kv: true,
            limits,
        }
    }

    /// The model that runs.
    pub const fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Shape of the blocks.
    pub const fn shape(&self) -> &KvBlockShape {
        &self.shape
    }

    /// What a step may ask for.
    pub const fn limits(&self) -> RunnerLimits {
        self.limits
    }

    /// The device.
    pub const fn cpu(&self) -> &Arc<Cpu> {
        &self.cpu
    }

    /// Computes all rows of `batch` and writes their K and V.
    ///
    /// `after_layers` is told of layers whose K and V are written for all rows, first to last and each once, while the
    /// rest is still to be computed: then a handoff can already send them.
    ///
    /// # Panics
    ///
    /// When the batch is beyond the limits, its blocks do not reach its last token, or a token is not in the vocabulary:
    /// the engine refuses such requests before they get here.
    pub fn step(&mut self, batch: &Batch<'_>, after_layers: &mut dyn FnMut(Range<usize>)) -> Logits<'_> {
        let model = Arc::clone(&self.model);
        self.compute(batch, None, &|token, state| model.weights.embed(token, state), after_layers);
        let normed = &self.rows.normed[..self.logits.wanted.len() * self.model.spec.hidden_size];
        Logits::new(&self.cpu, &self.model.weights.head, normed, &mut self.logits)
    }

    /// Computes all rows up to the norm before the head: of a rank, its part, with the others beside it.
    fn compute(
        &mut self,
        batch: &Batch<'_>,
        rank: Option<Rank<'_>>,
        embed: &dyn Fn(u32, &mut [f32]),
        after_layers: &mut dyn FnMut(Range<usize>),
    ) {
        batch.assert_within(&self.limits, &self.shape, self.model.spec.vocab_size);
        let mut sequences = recycled(std::mem::take(&mut self.sequences));
        batch.fill_rows(&mut sequences, |sequence| sequence.tokens.len());
        batch.fill_wanted(&mut self.logits.wanted);
        let mut rows = batch.rows();
        self.rotation.fill(batch);
        let tokens = batch.sequences.iter().flat_map(|sequence| sequence.tokens);
        for (&token, state) in tokens.zip(self.rows.state.chunks_exact_mut(self.model.spec.hidden_size)) {
            embed(token, state);
        }
        let model = Arc::clone(&self.model);
        for (layer, weights) in model.weights.layers.iter().enumerate() {
            self.keys_and_values(layer, weights, rows, &sequences);
            if let Some(rank) = rank {
                // Then all heads are stored: peers may have them, and who shares a head with another rank may read it.
                rank.meet();
            }
            after_layers(layer..layer + 1);
            if layer + 1 == model.weights.layers.len() {
                // What comes after the last K and V only matters to rows with logits.
                rows = self.keep_wanted();
                batch.fill_rows(&mut sequences, BatchSequence::wanted_rows);
            }
            if rows == 0 {
                break;
            }
            self.attend(layer, weights, rows, &sequences, rank);
            self.feed_forward(weights, rows, rank);
        }
        self.sequences = recycled(sequences);
        self.norm_wanted();
    }

    /// Normalises the state, projects it to query, key and value, turns query and key, and stores key and value.
    fn keys_and_values(
        &mut self,
        layer: usize,
        weights: &LayerWeights,
        rows: usize,
        sequences: &[SequenceRows<'_>],
    ) {
        let spec = &self.model.spec;
        let (hidden, query_len, kv_len) =
            (rows * spec.hidden_size, rows * spec.query_size(), rows * spec.kv_size());
        let RowBuffers { state, normed, query, key, value, .. } = &mut self.rows;
        let normed = &mut normed[..hidden];
        let (query, key) = (&mut query[..query_len], &mut key[..kv_len]);
        let value = &mut value[..kv_len];
        self.cpu.rms_norm(normed, &state[..hidden], &weights.input_norm, spec.norm_eps);
        let projections = [
            projection(query, &weights.query),
            projection(key, &weights.key),
            projection(value, &weights.value),
        ];
        self.cpu.matmul_each(normed, projections);
        if let Some(norms) = &weights.head_norms {
            self.cpu.rms_norm_in_place(query, &norms.query, spec.norm_eps);
            self.cpu.rms_norm_in_place(key, &norms.key, spec.norm_eps);
        }
        self.rotation.apply(&self.cpu, query, rows, spec.head_size);
        self.rotation.apply(&self.cpu, key, rows, spec.head_size);
        if self.stores_kv {
            self.cpu.write_kv(&self.shape, layer, key, value, sequences);
        }
    }

    /// Moves the state and the query of rows whose logits are wanted together, and returns how many there are.
    fn keep_wanted(&mut self) -> usize {
        let RowBuffers { state, query, .. } = &mut self.rows;
        let wanted = &self.logits.wanted;
        for (rows, elements) in [(state, self.model.spec.hidden_size), (query, self.model.spec.query_size())]
        {
            for (place, &WantedRow { row, .. }) in wanted.iter().enumerate() {
                // Never overwrites a row that is still to be moved: wanted rows are in rising order.
                rows.copy_within(row * elements..(row + 1) * elements, place * elements);
            }
        }
        wanted.len()
    }

    /// Adds attention's output to the state.
    fn attend(
        &mut self,
        layer: usize,
        weights: &LayerWeights,
        rows: usize,
        sequences: &[SequenceRows<'_>],
        rank: Option<Rank<'_>>,
    ) {
        let spec = &self.model.spec;
        let params = AttentionParams {
            query_heads: spec.heads,
            scale: 1.0 / (spec.head_size as f32).sqrt(),
            sliding_window: spec.windows[layer].map(|window| window as usize),
        };
        let RowBuffers { state, query, attended, .. } = &mut self.rows;
        let elements = rows * spec.query_size();
        let attended = &mut attended[..elements];
        self.cpu.attention(attended, &query[..elements], &self.shape, layer, sequences, params);
        add_projected(&self.cpu, rank, &mut state[..rows * spec.hidden_size], attended, &weights.output);
    }

    /// Adds the feed-forward part's output to the state.
    fn feed_forward(&mut self, weights: &LayerWeights, rows: usize, rank: Option<Rank<'_>>) {
        let spec = &self.model.spec;
        let (hidden, inner) = (rows * spec.hidden_size, rows * spec.intermediate_size);
        let RowBuffers { state, normed, gate, up, gated, .. } = &mut self.rows;
        let (state, normed) = (&mut state[..hidden], &mut normed[..hidden]);
        let (gate, up, gated) = (&mut gate[..inner], &mut up[..inner], &mut gated[..inner]);
        self.cpu.rms_norm(normed, state, &weights.mlp_norm, spec.norm_eps);
        self.cpu.matmul_each(normed, [projection(gate, &weights.gate), projection(up, &weights.up)]);
        self.cpu.silu_mul(gated, gate, up);
        add_projected(&self.cpu, rank, state, gated, &weights.down);
    }

    /// Normalises the rows whose logits are wanted, which the last layer left alone.
    fn norm_wanted(&mut self) {
        let spec = &self.model.spec;
        let RowBuffers { state, normed, .. } = &mut self.rows;
        let wanted = self.logits.wanted.len() * spec.hidden_size;
        let final_norm = &self.model.weights.final_norm;
        self.cpu.rms_norm(&mut normed[..wanted], &state[..wanted], final_norm, spec.norm_eps);
    }
}

impl RowBuffers {
    fn new(spec: &ModelSpec, rows: usize) -> Self {
        let buffer = |elements: usize| vec![0.0; rows * elements];
        Self {
            state: buffer(spec.hidden_size),
            normed: buffer(spec.hidden_size),
            query: buffer(spec.query_size()),
            key: buffer(spec.kv_size()),
            value: buffer(spec.kv_size()),
            attended: buffer(spec.query_size()),
            gate: buffer(spec.intermediate_size),
            up: buffer(spec.intermediate_size),
            gated: buffer(spec.intermediate_size),
        }
    }
}

fn projection<'a>(out: &'a mut [f32], linear: &'a Linear) -> Projection<'a> {
    Projection { out, w: &linear.matrix, bias: linear.bias.as_deref() }
}

/// Adds a projection of `x`, of which each rank has some inputs.
fn add_projected(cpu: &Cpu, rank: Option<Rank<'_>>, out: &mut [f32], x: &[f32], linear: &Linear) {
    let (matrix, bias) = (&linear.matrix, linear.bias.as_deref());
    match rank {
        None => cpu.matmul_add(out, x, matrix, bias),
        Some(rank) => rank.add_sum(cpu, out, |partial| cpu.matmul(partial, x, matrix, bias)),
    }
}
