//! What the tests of models share: fixture models, and sequences whose blocks lie scattered in an arena.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;
use tidemill_engine::handle::{LoadFormat, ModelSource, Quantization};
use tidemill_engine::memory::Arena;
use tidemill_engine::models::{LoadOptions, Model};
use tidemill_engine::runner::{
    Batch, BatchSequence, HostRunner, LogitsWanted, RankedRunner, Runner, RunnerLimits,
};
use tidemill_engine::weights::Weights;
use tidemill_kernels::cpu::{Cpu, CpuOptions, Isa, Ranks};
use tidemill_kernels::kv::BlockAddress;
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen};

/// A model folder with goldens of transformers.
pub(crate) fn fixture(name: &str) -> PathBuf {
    // Of this checkout, which need not be where the test was built.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(package).join("../tests/fixtures/models").join(name)
}

/// A fixture model with its weights.
pub(crate) fn model(name: &str) -> Arc<Model> {
    let source = ModelSource::Folder(fixture(name));
    Arc::new(Model::load(&source, LoadFormat::Safetensors, &mut |_| {}).expect("the fixture loads"))
}

/// The same in fewer bits.
pub(crate) fn quantized_model(name: &str, quantization: Quantization) -> Arc<Model> {
    let options =
        LoadOptions { threads: 2, format: LoadFormat::Safetensors, quantization: Some(quantization) };
    let source = ModelSource::Folder(fixture(name));
    Arc::new(Model::load_with(options, &source, &mut |_| {}).expect("the fixture loads"))
}

/// What transformers computed for one prompt.
#[derive(Deserialize)]
pub(crate) struct Golden {
    pub(crate) prompt: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
    /// Natural-log probability of each greedy token.
    pub(crate) logprobs: Vec<f32>,
    /// Logits of the last position, or of every position.
    #[serde(skip)]
    pub(crate) logits: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct GoldenFile {
    prompts: Vec<Golden>,
}

/// The goldens of a fixture model, shortest prompt first.
pub(crate) fn goldens(name: &str) -> Vec<Golden> {
    let read = |file| std::fs::read(fixture(name).join(file)).expect("goldens are committed");
    let tensors = read("goldens.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(&tensors).expect("goldens are whole");
    let file: GoldenFile = serde_json::from_slice(&read("goldens.json")).expect("goldens are JSON");
    let with_logits = |golden: Golden| {
        let logits =
            tensors.tensor(&format!("logits.{}", golden.prompt.len())).expect("logits of each prompt");
        let elements: Vec<f32> =
            logits.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Golden { logits: elements.chunks(logits.shape()[1]).map(<[f32]>::to_vec).collect(), ..golden }
    };
    file.prompts.into_iter().map(with_logits).collect()
}

/// How K and V are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Storage {
    pub(crate) dtype: KvDtype,
    pub(crate) block_len: u32,
    pub(crate) order: AxisOrder,
}

impl Storage {
    /// Unrounded, in blocks of 16.
    pub(crate) const PLAIN: Self = Self { dtype: KvDtype::F32, block_len: 16, order: AxisOrder::TokenHead };

    fn arena<W>(self, model: &Model<W>) -> Arena {
        let block_len = BlockLen::new(self.block_len).expect("a power of two");
        let layout = model.kv_layout(self.dtype, block_len, self.order);
        Arena::new(layout, BlockCount(4096 / self.block_len)).expect("memory for the test")
    }
}

/// A runner and memory for blocks.
pub(crate) struct Bench {
    runner: HostRunner,
    arena: Arena,
    given: u32,
}

/// A sequence's place in the cache.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) blocks: Vec<BlockAddress>,
    /// Tokens computed so far.
    pub(crate) len: usize,
}

/// Tokens to compute for one sequence.
pub(crate) struct Work<'a> {
    pub(crate) place: &'a mut Place,
    pub(crate) tokens: &'a [u32],
}

impl Bench {
    /// On the fastest instructions.
    pub(crate) fn new(model: &Arc<Model>, storage: Storage) -> Self {
        Self::on(Isa::detect(), model, storage)
    }

    /// On the fastest instructions that round nothing beyond f32 (`docs/decisions/0011`).
    pub(crate) fn exact(model: &Arc<Model>, storage: Storage) -> Self {
        Self::on(exact_isa(), model, storage)
    }

    /// Several ranks, each on one thread.
    pub(crate) fn of_ranks(model: Model<Vec<Weights>>, isa: Isa, storage: Storage) -> Self {
        let arena = storage.arena(&model);
        let (whole, shards) = model.into_shards();
        let options = CpuOptions { isa: Some(isa), threads: Some(1), ..CpuOptions::default() };
        let ranks = Ranks::new(&vec![options; shards.len()]).expect("threads");
        let runner = RankedRunner::new(whole.spec, shards, ranks, *arena.shape(), LIMITS);
        Self { runner: HostRunner::Ranks(runner), arena, given: 0 }
    }

    fn on(isa: Isa, model: &Arc<Model>, storage: Storage) -> Self {
        let arena = storage.arena(model);
        let cpu = Arc::new(Cpu::new(CpuOptions { isa: Some(isa), ..CpuOptions::default() }).expect("a CPU"));
        let runner = Runner::new(Arc::clone(model), cpu, *arena.shape(), LIMITS);
        Self { runner: HostRunner::One(runner), arena, given: 0 }
    }

    /// Tokens of the vocabulary.
    pub(crate) fn vocab_size(&self) -> usize {
        self.runner.spec().vocab_size
    }

    /// The bytes of a layer of a block.
    pub(crate) fn layer_of(&self, block: u32, layer: usize) -> Vec<u8> {
        let stride = self.arena.shape().layer_stride;
        self.arena.read(BlockId(block), |bytes| bytes[layer * stride..(layer + 1) * stride].to_vec())
    }

    /// Blocks for a sequence of up to `tokens`, from both ends of the arena in turn so that none is beside the next.
    pub(crate) fn place(&mut self, tokens: usize) -> Place {
        let count = tokens.div_ceil(self.arena.shape().block_len);
        let total = self.arena.blocks().0;
        let blocks = (0..count).map(|_| {
            let nth = self.given;
            self.given += 1;
            let id = if nth.is_multiple_of(2) { nth / 2 } else { total - 1 - nth / 2 };
            self.arena.address(BlockId(id))
        });
        Place { blocks: blocks.collect(), len: 0 }
    }

    /// One step; returns each sequence's wanted logits.
    pub(crate) fn step(&mut self, work: &mut [Work<'_>], wanted: LogitsWanted) -> Vec<Vec<Vec<f32>>> {
        let wanted = vec![wanted; work.len()];
        self.step_each(work, &wanted)
    }

    /// One step whose sequences want different logits.
    pub(crate) fn step_each(&mut self, work: &mut [Work<'_>], wanted: &[LogitsWanted]) -> Vec<Vec<Vec<f32>>> {
        let sequences: Vec<BatchSequence<'_>> = work
            .iter()
            .zip(wanted)
            .map(|(work, &logits)| BatchSequence {
                tokens: work.tokens,
                first_position: work.place.len as u32,
                blocks: &work.place.blocks,
                logits,
            })
            .collect();
        let mut rows = vec![Vec::new(); sequences.len()];
        let mut layers = Vec::new();
        let logits = self.runner.step(&Batch { sequences: &sequences }, &mut |done| layers.extend(done));
        logits.for_each(|row| rows[row.sequence].push(row.logits.to_vec()));
        assert!(layers.iter().copied().eq(0..self.runner.spec().layers), "each layer is told once, in order");
        for work in work {
            work.place.len += work.tokens.len();
        }
        rows
    }

    /// Computes the tokens of one sequence in one step; returns the last one's logits.
    pub(crate) fn extend(&mut self, place: &mut Place, tokens: &[u32]) -> Vec<f32> {
        let mut rows = self.step(&mut [Work { place, tokens }], LogitsWanted::Last);
        rows.remove(0).remove(0)
    }
}

/// The fastest instructions that round nothing beyond f32.
pub(crate) fn exact_isa() -> Isa {
    let exact = |isa: &Isa| !matches!(isa, Isa::Amx | Isa::Avx512Bf16) && isa.is_available();
    Isa::ALL.into_iter().find(exact).expect("portable is always there")
}

const LIMITS: RunnerLimits = RunnerLimits { max_tokens: 512, max_seqs: 8, max_model_len: 512 };

/// Greatest difference, as a share of the greatest expected magnitude.
pub(crate) fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len(), "as many logits as transformers has");
    let greatest = expected.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // `f32::max` would pass over NaN.
    differences.fold(0.0, |worst: f32, x| if x.is_nan() || worst < x { x } else { worst }) / greatest
}
