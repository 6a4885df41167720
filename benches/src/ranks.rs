//! What it costs to share a model among ranks: the same threads as two ranks and as one pool, on one memory node.
//!
//! Nothing is won here. Where memory is in two parts, each rank reads its weights from its own; this says what that has to pay for.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tidemill_engine::handle::{LoadFormat, ModelSource};
use tidemill_engine::memory::Arena;
use tidemill_engine::models::{LoadOptions, Model};
use tidemill_engine::runner::{
    Batch, BatchSequence, HostRunner, LogitsWanted, RankedRunner, Runner, RunnerLimits,
};
use tidemill_kernels::cpu::{Cpu, CpuOptions, Rank, Ranks};
use tidemill_kernels::kv::BlockAddress;
use tidemill_kvtransfer_proto::layout::AxisOrder;
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen};

use crate::report::{Row, Target};
use crate::timing::{in_turns, median, ratio, time};

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("config.json"), shape().to_string())?;
    let source = ModelSource::Folder(folder.path().into());
    let options = LoadOptions { threads: THREADS, format: LoadFormat::Dummy { seed: 1 }, quantization: None };
    let mut one = Passes::of_one(Model::load_with(options, &source, &mut |_| {})?)?;
    let mut two = Passes::of_two(Model::load_ranks(options, &[vec![], vec![]], &source, &mut |_| {})?)?;
    let mut rows = vec![sum(rounds)?];
    for (measure, tokens, first) in
        [("decode step, batch 1, context 256", 1, 256), ("prefill of 256 tokens", 256, 0)]
    {
        let (of_one, of_two) =
            in_turns(rounds, || time(|| one.step(tokens, first)), || time(|| two.step(tokens, first)));
        rows.push(Row {
            measure: format!("{measure}, 2 ranks of 1 thread"),
            value: milliseconds(median(&of_two)),
            unit: "ms",
            limit: Some((milliseconds(median(&of_one)), "1 pool of 2 threads")),
            target: Some(Target::Share { measured: ratio(&of_one, &of_two), at_most: 1.1 }),
            note: "0.13 G parameters in bf16, one memory node".into(),
        });
    }
    Ok(rows)
}

/// Some hundred megabytes of weights: more than caches hold.
fn shape() -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 8192,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    })
}

/// A runner and the blocks of a sequence.
struct Passes {
    runner: HostRunner,
    blocks: Vec<BlockAddress>,
    _arena: Arena,
}

impl Passes {
    fn of_one(model: Model) -> anyhow::Result<Self> {
        let arena = arena(&model)?;
        let cpu = Cpu::new(CpuOptions { threads: Some(THREADS), ..CpuOptions::default() })?;
        let runner = Runner::new(Arc::new(model), cpu, *arena.shape(), LIMITS);
        Ok(Self::new(HostRunner::One(runner), arena))
    }

    fn of_two(model: Model<Vec<tidemill_engine::weights::Weights>>) -> anyhow::Result<Self> {
        let arena = arena(&model)?;
        let (whole, shards) = model.into_shards();
        let runner = RankedRunner::new(whole.spec, shards, ranks()?, *arena.shape(), LIMITS);
        Ok(Self::new(HostRunner::Ranks(runner), arena))
    }

    fn new(runner: HostRunner, arena: Arena) -> Self {
        let blocks = (0..BLOCKS).map(|block| arena.address(BlockId(block))).collect();
        Self { runner, blocks, _arena: arena }
    }

    fn step(&mut self, tokens: u32, first_position: u32) {
        let tokens: Vec<u32> = (0..tokens).map(|index| index * 31 % 8192).collect();
        let sequence = BatchSequence {
            tokens: &tokens,
            first_position,
            blocks: &self.blocks,
            logits: LogitsWanted::Last,
        };
        let logits = self.runner.step(&Batch { sequences: &[sequence] }, &mut |_| {});
        logits.for_each(|row| _ = std::hint::black_box(row.logits[0]));
    }
}

fn arena<W>(model: &Model<W>) -> anyhow::Result<Arena> {
    let block_len = BlockLen::new(16).expect("a power of two");
    Ok(Arena::new(model.kv_layout(model.kv_dtype(), block_len, AxisOrder::TokenHead), BlockCount(BLOCKS))?)
}

fn ranks() -> anyhow::Result<Ranks> {
    Ok(Ranks::new(&vec![CpuOptions { threads: Some(1), ..CpuOptions::default() }; THREADS])?)
}

/// One sum of a row, which is two meetings: the mean of many in a step.
fn sum(rounds: usize) -> anyhow::Result<Row> {
    let mut ranks = ranks()?;
    let cpus = ranks.cpus().to_vec();
    let many = |rank: Rank<'_>| {
        let mut out = vec![0.0; 4096];
        for _ in 0..SUMS {
            rank.add_sum(&cpus[rank.index()], &mut out, |partial| partial.fill(1.0));
        }
    };
    let times: Vec<Duration> = (0..rounds).map(|_| time(|| ranks.run(many, many)) / SUMS).collect();
    Ok(Row {
        measure: "sum of 4096 features over 2 ranks".into(),
        value: median(&times).as_secs_f64() * 1e6,
        unit: "µs",
        limit: None,
        target: None,
        note: "two for each layer".into(),
    })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

const THREADS: usize = 2;
const BLOCKS: u32 = 32;
const SUMS: u32 = 1000;
const LIMITS: RunnerLimits = RunnerLimits { max_tokens: 256, max_seqs: 1, max_model_len: 512 };
