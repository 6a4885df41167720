//! Forward passes to be timed: the engine's runner on made-up prompts, without scheduler or network.

use std::time::{Duration, Instant};

use tidemill_engine::models::ModelSpec;
use tidemill_engine::runner::{LogitsWanted, RunnerLimits};
use tidemill_kernels::cpu::Arithmetic;
use tidemill_kernels::matrix::WeightFormat;
use tidemill_kvtransfer_proto::layout::KvDtype;
use tidemill_kvtransfer_proto::units::{BlockLen, TokenCount};

use super::engine::{Engine, Matrices, Part, Subject};

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
    subject: Subject,
    engine: Engine,
    layers: Matrices,
    head: Matrices,
    chunk: u32,
    context: u32,
    asking: Duration,
}

impl Passes {
    /// Makes room for `passes` in steps of at most `chunk` tokens; decode finds `context` tokens before it.
    ///
    /// # Errors
    ///
    /// When there is no memory for the KV cache, or the model is not made for such lengths.
    pub(super) fn new(subject: Subject, passes: &[Pass], chunk: u32, context: u32) -> anyhow::Result<Self> {
        let decode_len = context + STEPS + 1;
        let prefills =
            passes.iter().filter_map(|pass| if let Pass::Prefill(len) = pass { Some(*len) } else { None });
        let batches =
            passes.iter().filter_map(|pass| if let Pass::Decode(batch) = pass { Some(*batch) } else { None });
        let (longest, batch) = (prefills.max().unwrap_or(1), batches.max().unwrap_or(1));
        let max_model_len = longest.max(decode_len);
        anyhow::ensure!(
            max_model_len <= subject.spec().max_positions,
            "the model is made for {} tokens, {max_model_len} are asked for",
            subject.spec().max_positions
        );
        let block_len = BlockLen::new(BLOCK_LEN).expect("a power of two");
        let blocks = |tokens: u32| TokenCount(tokens).blocks_to_hold(block_len).0;
        let count = blocks(longest).max(blocks(decode_len) * batch);
        let limits = RunnerLimits {
            max_tokens: chunk.max(batch) as usize,
            max_seqs: batch as usize,
            max_model_len: max_model_len as usize,
        };
        let (layers, head) = subject.matrices();
        let engine = subject.clone().open(block_len, count, limits)?;
        Ok(Self { subject, engine, layers, head, chunk, context, asking: Duration::ZERO })
    }

    /// How the weights of layers are held.
    pub(super) fn format(&self) -> WeightFormat {
        self.subject.format()
    }

    /// What a processor could multiply them with at best.
    pub(super) fn arithmetic(&self) -> Option<Arithmetic> {
        self.subject.arithmetic()
    }

    /// How long a step of the pass before took to ask for, before anybody waited: of a processor, all of it.
    pub(super) fn asking(&self) -> Duration {
        self.asking
    }

    /// Runs a pass and returns how long it took: for decode, a step of several on average.
    ///
    /// # Errors
    ///
    /// What the GPU says.
    pub(super) fn time(&mut self, pass: Pass) -> anyhow::Result<Duration> {
        match pass {
            Pass::Prefill(tokens) => self.prefill(tokens),
            Pass::Decode(batch) => self.decode(batch, STEPS),
        }
    }

    /// Runs the pass, so that memory is there, caches are as they will be, and what a GPU records is recorded.
    ///
    /// # Errors
    ///
    /// What the GPU says.
    pub(super) fn warm_up(&mut self, pass: Pass) -> anyhow::Result<()> {
        match (pass, &self.engine) {
            (Pass::Prefill(tokens), Engine::Cpu { .. }) => self.prefill(tokens.min(self.chunk)).map(drop),
            (Pass::Prefill(tokens), Engine::Gpu { .. }) => self.prefill(tokens).map(drop),
            (Pass::Decode(batch), Engine::Cpu { .. }) => self.decode(batch, 1).map(drop),
            // The first step of a kind loads kernels, the second records them.
            (Pass::Decode(batch), Engine::Gpu { .. }) => {
                (0..2).try_for_each(|_| self.decode(batch, STEPS).map(drop))
            }
        }
    }

    /// What the pass must at least do.
    pub(super) fn work(&self, pass: Pass) -> Work {
        let (spec, layers, head) = (self.subject.spec(), self.layers, self.head);
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
                let kv = batch * seen * kv_token_bytes(spec, self.subject.kv_dtype());
                Work {
                    tokens: batch,
                    bytes: layers.bytes + head.bytes + kv,
                    flop: batch * (2.0 * (layers.count + head.count) + pair_flop(spec) * seen),
                }
            }
        }
    }

    fn prefill(&mut self, tokens: u32) -> anyhow::Result<Duration> {
        let vocabulary = self.subject.spec().vocab_size as u32;
        let prompt: Vec<u32> =
            (0..tokens).map(|index| index.wrapping_mul(2_654_435_761) % vocabulary).collect();
        let blocks = blocks(0, tokens);
        let start = Instant::now();
        for (index, chunk) in prompt.chunks(self.chunk as usize).enumerate() {
            let first_position = index as u32 * self.chunk;
            let is_last = first_position as usize + chunk.len() == prompt.len();
            let logits = if is_last { LogitsWanted::Last } else { LogitsWanted::None };
            self.asking =
                self.engine.step(&[Part { tokens: chunk, first_position, blocks, logits }], &mut [0])?;
        }
        Ok(start.elapsed())
    }

    /// Steps in which each sequence's likeliest token is its next.
    fn decode(&mut self, batch: u32, steps: u32) -> anyhow::Result<Duration> {
        let length = self.context + STEPS + 1;
        let vocabulary = self.subject.spec().vocab_size as u32;
        let mut tokens: Vec<u32> = (0..batch).map(|index| index % vocabulary).collect();
        let mut asking = Duration::ZERO;
        let start = Instant::now();
        for step in 0..steps {
            let part = |(index, token)| Part {
                tokens: std::slice::from_ref(token),
                first_position: self.context + step,
                blocks: blocks(index as u32, length),
                logits: LogitsWanted::Last,
            };
            let parts: Vec<Part<'_>> = tokens.iter().enumerate().map(part).collect();
            let mut next = vec![0; batch as usize];
            asking += self.engine.step(&parts, &mut next)?;
            // Weights of a seed may say nothing at all.
            next.iter_mut().for_each(|token| *token = (*token).min(vocabulary - 1));
            tokens = next;
        }
        self.asking = asking / steps;
        Ok(start.elapsed() / steps)
    }
}

/// The blocks of the `index`-th sequence of `tokens` tokens: the first, and how many.
fn blocks(index: u32, tokens: u32) -> (usize, usize) {
    let each = tokens.div_ceil(BLOCK_LEN) as usize;
    (index as usize * each, each)
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
