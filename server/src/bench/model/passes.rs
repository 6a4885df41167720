//! Forward passes to be timed: the engine's runner on made-up prompts, without scheduler or network.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tidemill_engine::memory::Arena;
use tidemill_engine::models::{Model, ModelSpec};
use tidemill_engine::runner::{Batch, BatchSequence, LogitsWanted, Runner, RunnerLimits};
use tidemill_engine::weights::Weights;
use tidemill_kernels::cpu::{Arithmetic, Cpu};
use tidemill_kernels::kv::BlockAddress;
use tidemill_kernels::matrix::WeightFormat;
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen, TokenCount};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// A prompt of so many tokens, in chunks.
    Prefill(u32),
    /// A token for each of so many sequences.
    Decode(u32),
}

/// What a pass must at least do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Work {
    /// Tokens that come out of it: of the prompt, or new ones.
    pub(super) tokens: f64,
    /// Bytes of weights, and of keys and values in decode, that are read.
    pub(super) bytes: f64,
    /// Multiplications and additions, two for each weight and token.
    pub(super) flop: f64,
}

/// A model in memory, and room for the sequences of every pass.
#[derive(Debug)]
pub(super) struct Passes {
    model: Arc<Model>,
    runner: Runner,
    arena: Arena,
    chunk: u32,
    context: u32,
}

impl Passes {
    /// Makes room for `passes` in steps of at most `chunk` tokens; decode finds `context` tokens before it.
    ///
    /// # Errors
    ///
    /// When there is no memory for the KV cache, or the model is not made for such lengths.
    pub(super) fn new(
        model: Arc<Model>,
        cpu: Arc<Cpu>,
        passes: &[Pass],
        chunk: u32,
        context: u32,
    ) -> anyhow::Result<Self> {
        let decode_len = context + STEPS + 1;
        let prefills =
            passes.iter().filter_map(|pass| if let Pass::Prefill(len) = pass { Some(*len) } else { None });
        let batches =
            passes.iter().filter_map(|pass| if let Pass::Decode(batch) = pass { Some(*batch) } else { None });
        let (longest, batch) = (prefills.max().unwrap_or(1), batches.max().unwrap_or(1));
        let max_model_len = longest.max(decode_len);
        anyhow::ensure!(
            max_model_len <= model.spec.max_positions,
            "the model is made for {} tokens, {max_model_len} are asked for",
            model.spec.max_positions
        );
        let block_len = BlockLen::new(BLOCK_LEN).expect("a power of two");
        let layout = model.kv_layout(model.kv_dtype(), block_len, AxisOrder::TokenHead);
        let blocks = |tokens: u32| TokenCount(tokens).blocks_to_hold(block_len).0;
        let count = blocks(longest).max(blocks(decode_len) * batch);
        let arena = Arena::new(layout, BlockCount(count)).context("memory for the KV cache")?;
        let limits = RunnerLimits {
            max_tokens: chunk.max(batch) as usize,
            max_seqs: batch as usize,
            max_model_len: max_model_len as usize,
        };
        let runner = Runner::new(Arc::clone(&model), cpu, *arena.shape(), limits);
        Ok(Self { model, runner, arena, chunk, context })
    }

    /// How the weights of layers are held.
    pub(super) fn format(&self) -> WeightFormat {
        self.model.weights.layers[0].query.matrix.format()
    }

    /// What the machine could multiply them with at best.
    pub(super) fn arithmetic(&self) -> Arithmetic {
        self.runner.cpu().arithmetic(self.format())
    }

    /// Runs a pass and returns how long it took: for decode, a step of several on average.
    pub(super) fn time(&mut self, pass: Pass) -> Duration {
        match pass {
            Pass::Prefill(tokens) => self.prefill(tokens),
            Pass::Decode(batch) => self.decode(batch, STEPS),
        }
    }

    /// Runs the pass once, so that memory is there and caches are as they will be.
    pub(super) fn warm_up(&mut self, pass: Pass) {
        match pass {
            Pass::Prefill(tokens) => drop(self.prefill(tokens.min(self.chunk))),
            Pass::Decode(batch) => drop(self.decode(batch, 1)),
        }
    }

    /// What the pass must at least do.
    pub(super) fn work(&self, pass: Pass) -> Work {
        let Model { spec, weights, .. } = &*self.model;
        let (layers, head) = (layer_weights(weights), head_weights(weights));
        match pass {
            Pass::Prefill(tokens) => {
                let chunks = f64::from(tokens.div_ceil(self.chunk));
                let tokens = f64::from(tokens);
                let attention = pair_flop(spec) * tokens * (tokens + 1.0) / 2.0;
                Work {
                    tokens,
                    bytes: layers.bytes * chunks + head.bytes,
                    flop: 2.0 * (layers.count * tokens + head.count) + attention,
                }
            }
            Pass::Decode(batch) => {
                // Keys and values as they are halfway through the steps.
                let seen = f64::from(self.context) + f64::from(STEPS + 1) / 2.0;
                let batch = f64::from(batch);
                let kv = batch * seen * kv_token_bytes(spec, self.arena.layout().dtype);
                Work {
                    tokens: batch,
                    bytes: layers.bytes + head.bytes + kv,
                    flop: batch * (2.0 * (layers.count + head.count) + pair_flop(spec) * seen),
                }
            }
        }
    }

    fn prefill(&mut self, tokens: u32) -> Duration {
        let vocabulary = self.model.spec.vocab_size as u32;
        let prompt: Vec<u32> =
            (0..tokens).map(|index| index.wrapping_mul(2_654_435_761) % vocabulary).collect();
        let blocks = self.blocks(0, tokens);
        let start = Instant::now();
        for (index, chunk) in prompt.chunks(self.chunk as usize).enumerate() {
            let first_position = index as u32 * self.chunk;
            let is_last = first_position as usize + chunk.len() == prompt.len();
            let logits = if is_last { LogitsWanted::Last } else { LogitsWanted::None };
            let sequence = BatchSequence { tokens: chunk, first_position, blocks: &blocks, logits };
            self.runner.step(&Batch { sequences: &[sequence] }, &mut |_| {}).for_each(|_| {});
        }
        start.elapsed()
    }

    /// Steps in which each sequence's likeliest token is its next.
    fn decode(&mut self, batch: u32, steps: u32) -> Duration {
        let length = self.context + STEPS + 1;
        let blocks: Vec<Vec<BlockAddress>> = (0..batch).map(|index| self.blocks(index, length)).collect();
        let mut tokens: Vec<u32> =
            (0..batch).map(|index| index % self.model.spec.vocab_size as u32).collect();
        let start = Instant::now();
        for step in 0..steps {
            let sequences: Vec<BatchSequence<'_>> = tokens
                .iter()
                .zip(&blocks)
                .map(|(token, blocks)| BatchSequence {
                    tokens: std::slice::from_ref(token),
                    first_position: self.context + step,
                    blocks,
                    logits: LogitsWanted::Last,
                })
                .collect();
            let mut next = vec![0; batch as usize];
            let logits = self.runner.step(&Batch { sequences: &sequences }, &mut |_| {});
            logits.for_each(|row| next[row.sequence] = likeliest(row.logits));
            tokens = next;
        }
        start.elapsed() / steps
    }

    /// The blocks of the `index`-th sequence of `tokens` tokens.
    fn blocks(&self, index: u32, tokens: u32) -> Vec<BlockAddress> {
        let each = tokens.div_ceil(BLOCK_LEN);
        (index * each..(index + 1) * each).map(|block| self.arena.address(BlockId(block))).collect()
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(index, _)| index as u32)
}

/// Some matrices: how many weights, in how many bytes.
#[derive(Clone, Copy)]
struct Matrices {
    count: f64,
    bytes: f64,
}

/// Those that every token goes through.
fn layer_weights(weights: &Weights) -> Matrices {
    let matrices = weights.layers.iter().flat_map(|layer| {
        [&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down]
    });
    let sizes = matrices.map(|linear| {
        let matrix = &linear.matrix;
        ((matrix.outputs() * matrix.inputs()) as f64, matrix.bytes() as f64)
    });
    let (count, bytes) = sizes.fold((0.0, 0.0), |sum, size| (sum.0 + size.0, sum.1 + size.1));
    Matrices { count, bytes }
}

/// The one that only tokens with logits go through.
fn head_weights(weights: &Weights) -> Matrices {
    let head = &weights.head;
    Matrices { count: (head.outputs() * head.inputs()) as f64, bytes: head.bytes() as f64 }
}

/// Operations of attention for a query and a key, in all layers and heads: `q · k` and `p · v`.
fn pair_flop(spec: &ModelSpec) -> f64 {
    4.0 * (spec.layers * spec.query_size()) as f64
}

/// Bytes of a token's keys and values in all layers.
fn kv_token_bytes(spec: &ModelSpec, dtype: KvDtype) -> f64 {
    (2 * spec.layers * spec.kv_size() * dtype.bytes()) as f64
}

/// Steps of decode that are timed together.
const STEPS: u32 = 8;
/// Tokens per block of the KV cache: the default of `serve`.
const BLOCK_LEN: u32 = 16;
