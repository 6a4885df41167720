//! Forward passes of several ranks (`docs/decisions/0020`): each runs the same skeleton over its part of the weights and of the
//! heads, in the same blocks, with threads of its own.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tidemill_kernels::cpu::{Cpu, Ranks};
use tidemill_kernels::kv::KvBlockShape;

use super::logits::LogitsBuffer;
use super::{Batch, Logits, Runner, RunnerLimits};
use crate::models::{Model, ModelSpec};
use crate::weights::Shard;

/// Runs a model on several ranks.
#[derive(Debug)]
pub struct RankedRunner {
    spec: ModelSpec,
    models: Vec<Arc<Model>>,
    ranks: Ranks,
    /// One per rank. A lock is taken by its rank's thread for a step, and by nobody meanwhile.
    runners: Vec<Mutex<Runner>>,
    logits: LogitsBuffer,
}

/// What a CPU computes with: all of it, or as ranks.
#[derive(Debug)]
pub enum HostRunner {
    /// One pool of threads.
    One(Runner),
    /// Several.
    Ranks(RankedRunner),
}

/// The ranks' parts of the head, after a step.
#[derive(Debug)]
pub(super) struct Heads<'a> {
    ranks: &'a mut Ranks,
    runners: &'a [Mutex<Runner>],
    vocab_size: usize,
}

impl RankedRunner {
    /// Makes every buffer that a step within `limits` needs. `spec` is the whole model's, `shape` that of the blocks with all
    /// heads; `models` are the parts, one per rank.
    ///
    /// # Panics
    ///
    /// When `shape` is not that of this model's blocks, there are not as many parts as ranks, or a limit is zero.
    pub fn new(
        spec: ModelSpec,
        models: Vec<Arc<Model>>,
        ranks: Ranks,
        shape: KvBlockShape,
        limits: RunnerLimits,
    ) -> Self {
        limits.assert_possible(&spec, &shape);
        assert_eq!(models.len(), ranks.cpus().len(), "a part of the model for each rank");
        ranks.reserve(limits.max_tokens * spec.hidden_size);
        let runners = Shard::all(models.len()).zip(&models).zip(ranks.cpus());
        let runners = runners.map(|((shard, model), cpu)| {
            let heads = shard.kv_heads(&spec);
            let shape = shape.of_heads(heads.start, heads.len());
            let runner = Runner::new(Arc::clone(model), Arc::clone(cpu), shape, limits);
            Mutex::new(Runner { stores_kv: shard.stores_kv(&spec), ..runner })
        });
        Self {
            runners: runners.collect(),
            logits: LogitsBuffer::new(spec.vocab_size, limits.max_tokens),
            spec,
            models,
            ranks,
        }
    }

    /// The whole model's shape.
    pub const fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The ranks.
    pub const fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// As [`Runner::step`]: the calling thread is the first rank's, and the only one that is told of layers.
    ///
    /// # Panics
    ///
    /// As there, and when a rank has panicked before.
    pub fn step(&mut self, batch: &Batch<'_>, after_layers: &mut dyn FnMut(Range<usize>)) -> Logits<'_> {
        let Self { spec, models, ranks, runners, logits } = self;
        let embed = |token: u32, state: &mut [f32]| embed(spec, models, token, state);
        ranks.run(
            |rank| lock(&runners[0]).compute(batch, Some(rank), &embed, after_layers),
            |rank| lock(&runners[rank.index()]).compute(batch, Some(rank), &embed, &mut |_| ()),
        );
        batch.fill_wanted(&mut logits.wanted);
        Logits::of_ranks(Heads { ranks, runners, vocab_size: spec.vocab_size }, logits)
    }
}

impl HostRunner {
    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        match self {
            Self::One(runner) => &runner.model().spec,
            Self::Ranks(runner) => runner.spec(),
        }
    }

    /// As [`Runner::step`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn step(&mut self, batch: &Batch<'_>, after_layers: &mut dyn FnMut(Range<usize>)) -> Logits<'_> {
        match self {
            Self::One(runner) => runner.step(batch, after_layers),
            Self::Ranks(runner) => runner.step(batch, after_layers),
        }
    }
}

impl Heads<'_> {
    /// Has every rank compute its tokens' logits of some of the wanted rows, and puts them side by side.
    pub(super) fn compute(&mut self, rows: Range<usize>, logits: &mut [f32]) {
        let Self { ranks, runners, vocab_size } = self;
        ranks.run(
            |_| lock(&runners[0]).logits_of(rows.clone()),
            |rank| lock(&runners[rank.index()]).logits_of(rows.clone()),
        );
        let mut first = 0;
        for runner in *runners {
            let runner = lock(runner);
            let tokens = runner.model.weights.head.outputs();
            let parts = runner.logits.logits.chunks_exact(tokens);
            for (row, part) in logits.chunks_exact_mut(*vocab_size).zip(parts) {
                row[first..first + tokens].copy_from_slice(part);
            }
            first += tokens;
        }
    }
}

impl Runner {
    /// Computes logits of some of the wanted rows, into its own buffer.
    fn logits_of(&mut self, rows: Range<usize>) {
        let Self { model, cpu, rows: buffers, logits, .. } = self;
        let (head, hidden) = (&model.weights.head, model.spec.hidden_size);
        let states = &buffers.normed[rows.start * hidden..rows.end * hidden];
        let cpu: &Cpu = cpu;
        cpu.matmul(&mut logits.logits[..rows.len() * head.outputs()], states, head, None);
    }
}

/// The state that a token begins with: in the first rank's table or, where the head is the table, with the rank that has the
/// token.
fn embed(spec: &ModelSpec, models: &[Arc<Model>], token: u32, state: &mut [f32]) {
    if models[0].weights.embedding.is_some() {
        return models[0].weights.embed(token, state);
    }
    let has = |shard: &Shard| shard.vocabulary(spec).contains(&(token as usize));
    let shard = Shard::all(models.len()).find(has).expect("tokens of a batch are in the vocabulary");
    let first = shard.vocabulary(spec).start;
    models[shard.rank].weights.head.row(token as usize - first, state);
}

fn lock(runner: &Mutex<Runner>) -> MutexGuard<'_, Runner> {
    // Ranks meet no more once one has panicked.
    runner.lock().unwrap_or_else(PoisonError::into_inner)
}
