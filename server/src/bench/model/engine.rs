//! What passes run on: the runner of the processor or that of a GPU, with a KV cache of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tidemill_engine::memory::{Arena, DevicePool, block_shape};
use tidemill_engine::models::{Model, ModelSpec};
use tidemill_engine::runner::{
    Batch, BatchSequence, CudaRunner, LogitsWanted, OutcomeRow, RowTask, Runner, RunnerLimits,
};
use tidemill_engine::weights::{DeviceWeights, Weights};
use tidemill_kernels::cpu::{Arithmetic, Cpu};
use tidemill_kernels::cuda::{DeviceAddress, Driver, SampleRow};
use tidemill_kernels::kv::BlockAddress;
use tidemill_kernels::matrix::WeightFormat;
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen};

/// A model where it computes.
#[derive(Clone, Debug)]
pub(super) enum Subject {
    /// On the processor.
    Cpu(Arc<Model>, Arc<Cpu>),
    /// On a GPU, whose decode steps are graphs if so desired.
    Gpu { model: Arc<Model<DeviceWeights>>, driver: Arc<dyn Driver>, graphs: bool },
}

/// A subject, and room for its sequences.
#[derive(Debug)]
pub(super) enum Engine {
    Cpu { runner: Box<Runner>, blocks: Vec<BlockAddress>, _arena: Arena },
    Gpu { runner: Box<CudaRunner>, blocks: Vec<DeviceAddress>, _pool: DevicePool },
}

/// One sequence's part of a step: its blocks are so many, from one on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    pub(super) tokens: &'a [u32],
    pub(super) first_position: u32,
    pub(super) blocks: (usize, usize),
    pub(super) logits: LogitsWanted,
}

/// Some matrices: how many weights, in how many bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrices {
    pub(super) count: f64,
    pub(super) bytes: f64,
}

impl Subject {
    pub(super) fn spec(&self) -> &ModelSpec {
        match self {
            Self::Cpu(model, _) => &model.spec,
            Self::Gpu { model, .. } => &model.spec,
        }
    }

    /// What it is called.
    pub(super) fn device(&self) -> String {
        match self {
            Self::Cpu(_, cpu) => cpu.describe(),
            Self::Gpu { driver, graphs, .. } => {
                format!(
                    "{}, {}",
                    driver.properties().name,
                    if *graphs { "graphs" } else { "launch by launch" }
                )
            }
        }
    }

    /// How the weights of layers are held.
    pub(super) fn format(&self) -> WeightFormat {
        match self {
            Self::Cpu(model, _) => model.weights.layers[0].query.matrix.format(),
            Self::Gpu { model, .. } => {
                let quantization = model.weights.layers[0].query.matrix.quantization();
                quantization.map_or(WeightFormat::Stored(model.dtype), WeightFormat::Quantized)
            }
        }
    }

    /// What a processor could multiply them with at best.
    pub(super) fn arithmetic(&self) -> Option<Arithmetic> {
        match self {
            Self::Cpu(_, cpu) => Some(cpu.arithmetic(self.format())),
            Self::Gpu { .. } => None,
        }
    }

    pub(super) fn kv_dtype(&self) -> KvDtype {
        match self {
            Self::Cpu(model, _) => model.kv_dtype(),
            Self::Gpu { model, .. } => model.kv_dtype(),
        }
    }

    /// The matrices that every token goes through, and the one for tokens with logits.
    pub(super) fn matrices(&self) -> (Matrices, Matrices) {
        let spec = self.spec();
        let hidden = spec.hidden_size;
        let each = 2 * hidden * (spec.query_size() + spec.kv_size()) + 3 * hidden * spec.intermediate_size;
        let (layers, head) = match self {
            Self::Cpu(model, _) => bytes(&model.weights, |matrix| matrix.bytes()),
            Self::Gpu { model, .. } => bytes(&model.weights, |matrix| matrix.bytes()),
        };
        let of = |count: usize, bytes: usize| Matrices { count: count as f64, bytes: bytes as f64 };
        (of(spec.layers * each, layers), of(spec.vocab_size * hidden, head))
    }

    /// Makes room for so many blocks.
    ///
    /// # Errors
    ///
    /// There is no memory.
    pub(super) fn open(
        self,
        block_len: BlockLen,
        count: u32,
        limits: RunnerLimits,
    ) -> anyhow::Result<Engine> {
        let (dtype, order) = (self.kv_dtype(), AxisOrder::TokenHead);
        match self {
            Self::Cpu(model, cpu) => {
                let layout = model.kv_layout(dtype, block_len, order);
                let arena = Arena::new(layout, BlockCount(count)).context("memory for the KV cache")?;
                let blocks = (0..count).map(|block| arena.address(BlockId(block))).collect();
                let runner = Box::new(Runner::new(model, cpu, *arena.shape(), limits));
                Ok(Engine::Cpu { runner, blocks, _arena: arena })
            }
            Self::Gpu { model, driver, graphs } => {
                let layout: KvLayout = model.kv_layout(dtype, block_len, order);
                let shape = block_shape(&layout);
                let pool = DevicePool::new(&driver, shape.block_bytes(), BlockCount(count))
                    .context("memory for the KV cache")?;
                let blocks = (0..count).map(|block| pool.address(BlockId(block))).collect();
                // One graph for the most sequences of a step, and for those below it that are asked for: the runner takes the next.
                let sizes: Vec<usize> = if graphs { (1..=limits.max_seqs).collect() } else { Vec::new() };
                let mut runner =
                    CudaRunner::new(model, driver, shape, limits, &sizes).context("memory of a step")?;
                runner.set_blocks(pool.range(&shape));
                Ok(Engine::Gpu { runner: Box::new(runner), blocks, _pool: pool })
            }
        }
    }
}

impl Engine {
    /// One step; the likeliest token behind the last row of each sequence that wants logits goes to `next`. What was asked for is done
    /// when this returns, and how long the asking took: of a processor, all of it.
    ///
    /// # Errors
    ///
    /// What the GPU says.
    pub(super) fn step(&mut self, parts: &[Part<'_>], next: &mut [u32]) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let asking = match self {
            Self::Cpu { runner, blocks, .. } => {
                let sequences = sequences(parts, blocks);
                let logits = runner.step(&Batch { sequences: &sequences }, &mut |_| {});
                logits.for_each(|row| next[row.sequence] = likeliest(row.logits));
                start.elapsed()
            }
            Self::Gpu { runner, blocks, .. } => {
                let sequences = sequences(parts, blocks);
                let batch = Batch { sequences: &sequences };
                let greedy = |_, _| Some(RowTask { sample: Some(SampleRow::default()), logprobs: None });
                let outcome = runner.step(&batch, &greedy, &mut |_| {})?;
                let asking = start.elapsed();
                outcome.for_each(|row| {
                    if let OutcomeRow::Made { sequence, token, .. } = row {
                        next[sequence] = token;
                    }
                })?;
                asking
            }
        };
        Ok(asking)
    }
}

fn sequences<'a, A>(parts: &[Part<'a>], blocks: &'a [A]) -> Vec<BatchSequence<'a, A>> {
    let one = |part: &Part<'a>| {
        let (first, count) = part.blocks;
        let Part { tokens, first_position, logits, .. } = *part;
        BatchSequence { tokens, first_position, blocks: &blocks[first..first + count], logits }
    };
    parts.iter().map(one).collect()
}

/// Bytes of the matrices of all layers, and of the head.
fn bytes<M, V, E>(weights: &Weights<M, V, E>, bytes: impl Fn(&M) -> usize) -> (usize, usize) {
    let layers = weights.layers.iter().flat_map(|layer| {
        [&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down]
    });
    (layers.map(|linear| bytes(&linear.matrix)).sum(), bytes(&weights.head))
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(index, _)| index as u32)
}
