//! What it costs to prove that a handoff's bytes are the right ones, beside the time that prefill takes.
//!
//! TTFT is that of the demo model at 2047 tokens on one core, measured here, in-process, without a front end. For a
//! model of a billion parameters it is computed from the arithmetic rate that the demo model reached on that core:
//! `2 * parameters * tokens / rate`; nothing is claimed about a GPU, on which digests are another kernel.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidemill_engine::handle::{LoadFormat, ModelSource};
use tidemill_engine::memory::Arena;
use tidemill_engine::models::Model;
use tidemill_engine::runner::{Batch, BatchSequence, LogitsWanted, Runner, RunnerLimits};
use tidemill_kernels::cpu::{Cpu, CpuOptions};
use tidemill_kvtransfer::Region;
use tidemill_kvtransfer_proto::digest::{BlockShape, Coverage, granule_digest};
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen, HandoffId};

use crate::report::{Row, Target};
use crate::timing::{cpu_time, median};
use crate::workers::billion;

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let demo = Demo::load()?;
    let prefill = demo.prefill_times((rounds / 8).max(3));
    let ttft = median(&prefill);
    let rate = 2.0 * demo.parameters * TOKENS as f64 / ttft.as_secs_f64();
    let billion_ttft = Duration::from_secs_f64(2.0 * BILLION * TOKENS as f64 / rate);
    let mut rows = Vec::new();
    for (model, layout, ttft) in
        [("demo model", demo.layout(), ttft), ("1.24 G parameters", billion(16, KvDtype::Bf16), billion_ttft)]
    {
        for (name, coverage, at_most) in
            [("sampled", Coverage::Sampled, 0.005), ("full", Coverage::Full, 0.02)]
        {
            let times = digest_times(&layout, coverage, rounds)?;
            let both = 2 * median(&times);
            rows.push(Row {
                measure: format!("digest, {name}, {TOKENS} tokens, {model}, CPU of both sides"),
                value: both.as_secs_f64() * 1e3,
                unit: "ms",
                limit: Some((ttft.as_secs_f64() * 1e3, "TTFT on one core")),
                target: Some(Target::Share { measured: both.as_secs_f64() / ttft.as_secs_f64(), at_most }),
                note: format!(
                    "{:.1} MiB of KV; TTFT {} {:.0} GFLOP/s",
                    bytes(&layout) as f64 / f64::from(1 << 20),
                    if model.starts_with("demo") { "measured, at" } else { "computed from" },
                    rate / 1e9
                ),
            });
        }
    }
    Ok(rows)
}

/// The demo model on one core.
struct Demo {
    model: Arc<Model>,
    parameters: f64,
}

impl Demo {
    fn load() -> anyhow::Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/weights");
        let source = ModelSource::Folder(folder.clone());
        let model = Arc::new(Model::load(&source, LoadFormat::Safetensors, &mut |_| {})?);
        // Two bytes each; embeddings are looked up and not multiplied, but tied to the head, which is.
        let size = std::fs::metadata(folder.join("model.safetensors"))?.len();
        Ok(Self { model, parameters: size as f64 / 2.0 })
    }

    fn layout(&self) -> KvLayout {
        let block_len = BlockLen::new(16).expect("a power of two");
        self.model.kv_layout(KvDtype::Bf16, block_len, AxisOrder::TokenHead)
    }

    fn prefill_times(&self, rounds: usize) -> Vec<Duration> {
        let arena = Arena::new(self.layout(), BlockCount(BLOCKS)).expect("some megabytes");
        let cpu = CpuOptions { threads: Some(1), ..CpuOptions::default() };
        let cpu = Arc::new(Cpu::new(cpu).expect("a CPU"));
        let limits = RunnerLimits { max_tokens: 512, max_seqs: 1, max_model_len: 2048 };
        let mut runner = Runner::new(Arc::clone(&self.model), cpu, *arena.shape(), limits);
        let blocks: Vec<_> = (0..BLOCKS).map(|block| arena.address(BlockId(block))).collect();
        let tokens: Vec<u32> = (0..TOKENS).map(|index| 3 + index * 7 % 200).collect();
        let mut prefill = || {
            let mut first_position = 0;
            for chunk in tokens.chunks(512) {
                let sequence = BatchSequence {
                    tokens: chunk,
                    first_position,
                    blocks: &blocks,
                    logits: LogitsWanted::Last,
                };
                let _ = runner.step(&Batch { sequences: &[sequence] }, &mut |_| {});
                first_position += chunk.len() as u32;
            }
        };
        prefill();
        // One thread computes, so its CPU time is the wall time of an idle machine.
        (0..rounds).map(|_| cpu_time(&mut prefill)).collect()
    }
}

/// What one side spends on one handoff.
fn digest_times(layout: &KvLayout, coverage: Coverage, rounds: usize) -> anyhow::Result<Vec<Duration>> {
    let region = Region::new("digests", bytes(layout))?;
    let noise: Vec<u8> = (0..4096u32).map(|index| (index * 31) as u8).collect();
    for offset in (0..region.len()).step_by(noise.len()) {
        region.write(offset, &noise[..noise.len().min(region.len() - offset)]);
    }
    let shape = BlockShape::of(layout);
    let digest_all = |handoff: u64| {
        let mut sum = 0u64;
        for target in 0..BLOCKS as usize {
            for index in 0..shape.block / shape.granule {
                let start = target * shape.block + index * shape.granule;
                let granule = shape.granule_of(HandoffId(handoff), target, index);
                let digest = granule_digest(coverage, granule, shape.granule, |offset, buffer| {
                    region.read(start + offset, buffer);
                });
                sum = sum.wrapping_add(digest);
            }
        }
        std::hint::black_box(sum);
    };
    digest_all(0);
    Ok((1..=rounds as u64).map(|handoff| cpu_time(|| digest_all(handoff))).collect())
}

fn bytes(layout: &KvLayout) -> usize {
    BLOCKS as usize * layout.block_bytes()
}

/// The demo model's context without its last place.
const TOKENS: u32 = 2047;
const BLOCKS: u32 = 128;
/// Parameters of Llama 3.2 1B.
const BILLION: f64 = 1.24e9;
