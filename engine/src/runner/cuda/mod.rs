//! Forward passes on a GPU.
//!
//! The same decoder as on a CPU, by kernels that compute in the type of the weights with sums in f32; by weights in fewer bits as
//! the CPU does. Every buffer is made
//! once, for the largest step, and stays where it is. A step is launches alone, or a graph of them: the host waits at its end, where
//! tokens are chosen on the device and only their ids come back, or where somebody asked for logits.

mod buffers;
mod graphs;
mod inputs;
mod layers;
mod output;
mod products;

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::hopper::BlockRange;
use tidemill_kernels::cuda::{Attention, CudaError, DeviceAddress, Driver, KvShape, Launch, SampleRow};
use tidemill_kernels::kv::KvBlockShape;
use tidemill_kernels::matrix::WeightDtype;

use super::batch::Batch;
use super::logits::WantedRow;
use super::{LogitsRow, RunnerLimits};
use crate::memory::PinnedBuffer;
use crate::models::{Model, ModelSpec};
use crate::weights::DeviceWeights;
use buffers::Buffers;
use graphs::{Graphs, Key};
use inputs::Inputs;
pub use output::{Outcome, OutcomeRow};

/// Runs a model on a GPU.
#[derive(Debug)]
pub struct CudaRunner {
    model: Arc<Model<DeviceWeights>>,
    driver: Arc<dyn Driver>,
    shape: KvBlockShape,
    kv_shape: KvShape,
    limits: RunnerLimits,
    /// Products of more rows are the library's, or a kernel's for many rows.
    library_rows: Option<usize>,
    /// Where all blocks are, if they lie together.
    blocks: Option<BlockRange>,
    buffers: Buffers,
    inputs: Inputs,
    graphs: Graphs,
    /// Chosen tokens come down here.
    ids: PinnedBuffer,
    /// Which rows somebody wants to know of.
    wanted: Vec<WantedRow>,
    /// How tokens are chosen behind them; `None` where logits are wanted instead.
    choices: Vec<Option<SampleRow>>,
    /// Logits and tokens as they come to the host.
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

/// How the token behind a row is chosen on the device, by the row's sequence and position; `None` where logits are wanted
/// on the host.
pub type Choices<'a> = dyn Fn(usize, u32) -> Option<SampleRow> + 'a;

impl CudaRunner {
    /// Makes every buffer that a step within `limits` needs. Steps in which each sequence computes one token are graphs, for so many
    /// rows as `graph_sizes` says.
    ///
    /// # Errors
    ///
    /// The device has less memory.
    ///
    /// # Panics
    ///
    /// When `shape` is not that of this model's blocks, a limit is zero, or the kernels do not take the model
    /// ([`refusal`](Self::refusal)).
    pub fn new(
        model: Arc<Model<DeviceWeights>>,
        driver: Arc<dyn Driver>,
        shape: KvBlockShape,
        limits: RunnerLimits,
        graph_sizes: &[usize],
    ) -> Result<Self, CudaError> {
        let spec = &model.spec;
        limits.assert_possible(spec, &shape);
        let max_tokens = limits.max_tokens;
        assert_eq!(Self::refusal(spec, limits), None, "asked before");
        Ok(Self {
            buffers: Buffers::new(&driver, &model, limits)?,
            inputs: Inputs::new(&driver, &shape, limits, model.dtype != WeightDtype::F32)?,
            graphs: Graphs::new(&driver, &shape, limits, graph_sizes)?,
            ids: PinnedBuffer::new(&driver, max_tokens * size_of::<u32>())?,
            kv_shape: KvShape::new(&shape),
            wanted: Vec::with_capacity(max_tokens),
            choices: Vec::with_capacity(max_tokens),
            logits: vec![0.0; buffers::logits_rows(limits) * spec.vocab_size],
            tokens: Vec::with_capacity(max_tokens),
            model,
            driver,
            shape,
            limits,
            library_rows: Some(products::FEW_ROWS),
            blocks: None,
        })
    }

    /// Why the kernels do not take a model, if they do not.
    pub fn refusal(spec: &ModelSpec, limits: RunnerLimits) -> Option<String> {
        let ModelSpec { head_size, vocab_size, .. } = *spec;
        if !head_size.is_multiple_of(8) || MOST_HEAD_SIZE < head_size {
            return Some(format!(
                "heads of {head_size} elements: a GPU takes multiples of 8 up to {MOST_HEAD_SIZE}"
            ));
        }
        if MOST_VOCABULARY < vocab_size {
            return Some(format!("a vocabulary of {vocab_size} tokens: a GPU takes up to {MOST_VOCABULARY}"));
        }
        let max_tokens = limits.max_tokens;
        (MOST_ROWS < max_tokens)
            .then(|| format!("steps of up to {max_tokens} tokens: a GPU takes up to {MOST_ROWS}"))
    }

    /// All blocks that steps compute in are these: some GPUs copy whole blocks where they know that.
    ///
    /// # Panics
    ///
    /// When they have another shape.
    pub fn set_blocks(&mut self, blocks: BlockRange) {
        assert_eq!(blocks.shape, self.shape, "blocks are of the runner's shape");
        self.blocks = Some(blocks);
    }

    /// The model that runs.
    pub const fn model(&self) -> &Arc<Model<DeviceWeights>> {
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
    pub const fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Computes all rows of `batch` and writes their K and V.
    ///
    /// `after_layers` is told of layers whose K and V will be written for all rows by what the device was asked for so far,
    /// first to last and each once.
    ///
    /// # Errors
    ///
    /// What the device says; it is of no use any more.
    ///
    /// # Panics
    ///
    /// As [`Runner::step`](super::Runner::step).
    pub fn step(
        &mut self,
        batch: &Batch<'_, DeviceAddress>,
        choices: &Choices<'_>,
        after_layers: &mut dyn FnMut(Range<usize>),
    ) -> Result<Outcome<'_>, CudaError> {
        batch.assert_within(&self.limits, &self.shape, self.model.spec.vocab_size);
        batch.fill_wanted(&mut self.wanted);
        self.choices.clear();
        self.choices.extend(self.wanted.iter().map(|row| choices(row.sequence, row.position)));
        // Logits that the host wants must all be in their place at the end.
        let fits = |key: &Key| {
            key.rows <= buffers::logits_rows(self.limits) || self.choices.iter().all(Option::is_some)
        };
        if let Some(key) = self.graph_key(batch).filter(fits) {
            let count = batch.sequences.len();
            let padding = self.graphs.padding(key.rows - count);
            let sequences: Vec<_> = batch.sequences.iter().copied().chain(padding).collect();
            let padded = Batch { sequences: &sequences };
            padded.fill_wanted(&mut self.wanted);
            // Of several choices behind a sequence there is one, that behind its token.
            self.choices.resize(key.rows, Some(SampleRow::default()));
            self.inputs.fill(&self.driver, &padded, &self.wanted, &self.choices)?;
            self.wanted.truncate(count);
            self.choices.truncate(count);
            self.replay(key)?;
            self.inputs.are_sent(&self.driver)?;
            after_layers(0..self.shape.layers);
            return Ok(Outcome { runner: self, is_chosen: true });
        }
        self.inputs.fill(&self.driver, batch, &self.wanted, &self.choices)?;
        self.inputs.send(&self.driver)?;
        self.inputs.are_sent(&self.driver)?;
        let splits = Attention::splits(self.inputs.longest());
        self.compute_layers(batch.rows(), splits, after_layers)?;
        let wanted = self.wanted.len();
        self.normalise_wanted(wanted)?;
        let is_chosen = 0 < wanted && self.choices.iter().all(Option::is_some);
        if is_chosen {
            self.choose_all(wanted)?;
            self.start_download_of_tokens(0, wanted)?;
        }
        Ok(Outcome { runner: self, is_chosen })
    }

    fn launch(&self, launch: Launch) -> Result<(), CudaError> {
        self.driver.launch(&launch)
    }
}

/// The longest head that attention takes.
const MOST_HEAD_SIZE: usize = 256;
/// The most logits that tokens are chosen from.
const MOST_VOCABULARY: usize = 1 << 19;
/// Blocks of a grid along its second axis.
const MOST_ROWS: usize = 65535;
