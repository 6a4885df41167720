//! Forward passes on a GPU.
//!
//! The same decoder as on a CPU, by kernels that compute in the type of the weights with sums in f32; by weights in fewer bits as
//! the CPU does. Every buffer is made
//! once, for the largest step, and stays where it is. A step is launches alone, or a graph of them: the host waits at its end, where
//! tokens are chosen on the device and only their ids and log-probabilities come back, or where somebody asked for logits.
//!
//! With several GPUs this is one rank's part of it; the first rank's runner has the others do the same (`ranks`).
//!
//! Two steps can be under way, one behind the other: the second takes tokens that the first chose, on the device, before the host
//! knows them.

mod buffers;
mod graphs;
mod group;
mod inputs;
mod layers;
mod output;
mod products;
mod ranks;
mod slots;

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::hopper::BlockRange;
use tidemill_kernels::cuda::{
    Attention, CudaError, DeviceAddress, Driver, KvShape, Launch, LogprobsRow, Queue, SampleRow,
};
use tidemill_kernels::kv::KvBlockShape;
use tidemill_kernels::matrix::WeightDtype;

use super::batch::Batch;
use super::logits::WantedRow;
use super::{LogitsRow, RunnerLimits};
use crate::models::{Model, ModelSpec};
use crate::weights::DeviceWeights;
use buffers::{Buffers, Results};
use graphs::{Graphs, Key};
use group::Seat;
use inputs::Inputs;
pub use output::{Outcome, OutcomeRow, RowLogprobs};
pub use ranks::{CudaRank, CudaRanks};
use ranks::{Others, Step, Threads};
pub use slots::Flight;
use slots::Slot;

/// Runs a model on a GPU, or a rank's part of one.
///
/// Fields are dropped in their order: the others are told to end, then this rank gives back what it has, and waits for them last.
#[derive(Debug)]
pub struct CudaRunner {
    /// Of the first of several ranks.
    others: Option<Others>,
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
    /// Among several ranks. After the graphs.
    seat: Option<Seat>,
    /// What belongs to a step until its outcome is taken: two of them, in turn.
    slots: [Slot; 2],
    /// Whose turn it is.
    slot: usize,
    /// Logits and results as they come to the host.
    logits: Vec<f32>,
    /// In words, so that numbers are where they may be.
    results: Vec<u64>,
    threads: Threads,
}

/// What a device makes of a row.
#[derive(Clone, Copy, Debug, Default)]
pub struct RowTask {
    /// How the token behind it is chosen; `None` where nobody wants to know.
    pub sample: Option<SampleRow>,
    /// Which log-probabilities are wanted.
    pub logprobs: Option<LogprobsRow>,
}

/// What the device makes of a row, by its sequence and position; `None` where logits are wanted on the host.
pub type Tasks<'a> = dyn Fn(usize, u32) -> Option<RowTask> + 'a;

/// Of which sequences the only token is one that the step before has chosen, and which of its rows that was: a number among those
/// that were wanted.
pub type Carried<'a> = dyn Fn(usize) -> Option<usize> + 'a;

impl CudaRunner {
    /// Products of more rows are the library's, if nobody says otherwise.
    pub const LIBRARY_ROWS: usize = products::FEW_ROWS;

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
        assert_eq!(Self::refusal(spec, limits), None, "asked before");
        let inputs = Inputs::new(&driver, &shape, limits, model.dtype != WeightDtype::F32)?;
        let slot = || Slot::new(&driver, &inputs, limits);
        Ok(Self {
            slots: [slot()?, slot()?],
            slot: 0,
            inputs,
            buffers: Buffers::new(&driver, &model, limits)?,
            graphs: Graphs::new(&driver, &shape, limits, graph_sizes)?,
            kv_shape: KvShape::new(&shape),
            logits: vec![0.0; buffers::logits_rows(limits) * spec.vocab_size],
            results: vec![0; Results::most_bytes(limits.max_tokens) / size_of::<u64>()],
            model,
            driver,
            shape,
            limits,
            library_rows: Some(Self::LIBRARY_ROWS),
            blocks: None,
            others: None,
            seat: None,
            threads: Threads::none(),
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
    /// As [`Runner::step`](super::Runner::step), and as [`submit`](Self::submit).
    pub fn step(
        &mut self,
        batch: &Batch<'_, DeviceAddress>,
        tasks: &Tasks<'_>,
        after_layers: &mut dyn FnMut(Range<usize>),
    ) -> Result<Outcome<'_>, CudaError> {
        let flight = self.submit(batch, tasks, &|_| None, after_layers)?;
        Ok(Outcome { runner: self, flight })
    }

    /// Asks for a step, whose outcome is [received](Self::receive) later. One more can be asked for before that, and can
    /// go on with tokens that this one chooses.
    ///
    /// # Errors
    ///
    /// As for [`step`](Self::step).
    ///
    /// # Panics
    ///
    /// As [`step`](Self::step), or when the step before the last was not received, or the one before wants logits on the host and was not
    /// received.
    pub fn submit(
        &mut self,
        batch: &Batch<'_, DeviceAddress>,
        tasks: &Tasks<'_>,
        carried: &Carried<'_>,
        after_layers: &mut dyn FnMut(Range<usize>),
    ) -> Result<Flight, CudaError> {
        batch.assert_within(&self.limits, &self.shape, self.model.spec.vocab_size);
        let Some(others) = self.others.take() else { return self.ask(batch, tasks, carried, after_layers) };
        let first = self.blocks.as_ref().expect("a rank has blocks").first;
        let step = Step::new(batch, first, tasks, carried);
        let own = |after: &mut dyn FnMut(Range<usize>)| self.ask(batch, tasks, carried, after);
        let flight = others.step(step, after_layers, own);
        self.others = Some(others);
        flight
    }

    /// Asks the device for a step.
    fn ask(
        &mut self,
        batch: &Batch<'_, DeviceAddress>,
        tasks: &Tasks<'_>,
        carried: &Carried<'_>,
        after_layers: &mut dyn FnMut(Range<usize>),
    ) -> Result<Flight, CudaError> {
        self.slot = 1 - self.slot;
        let before = &self.slots[1 - self.slot];
        assert!(!before.is_under_way() || before.is_all_on_device(), "logits of the step before are lost");
        let driver = Arc::clone(&self.driver);
        self.slots[self.slot].begin(&driver, batch, tasks)?;
        // Logits that the host wants must all be in their place at the end.
        let on_device = self.slots[self.slot].is_all_on_device();
        let fits = |key: &Key| key.rows <= buffers::logits_rows(self.limits) || on_device;
        let key = self.graph_key(batch).filter(fits);
        let Self { inputs, slots, graphs, .. } = self;
        let slot = &mut slots[self.slot];
        let rows_wanted = slot.wanted.len();
        match key {
            Some(key) => {
                let padding = graphs.padding(key.rows - batch.sequences.len());
                let sequences: Vec<_> = batch.sequences.iter().copied().chain(padding).collect();
                let padded = Batch { sequences: &sequences };
                let count = batch.sequences.len();
                let carried = |index| if index < count { carried(index) } else { None };
                padded.fill_wanted(&mut slot.wanted);
                // Of several choices behind a sequence there is one, that behind its token.
                slot.tasks.resize(key.rows, Some(RowTask::default()));
                inputs.send(&driver, &slot.outbox, &padded, &carried, &slot.wanted, &slot.tasks)?;
                slot.wanted.truncate(rows_wanted);
                slot.tasks.truncate(rows_wanted);
                slot.results = key.results();
                self.replay(key)?;
                after_layers(0..self.shape.layers);
                self.start_download(self.slot, 0..rows_wanted)?;
            }
            None => {
                slot.results = Results { rows: rows_wanted, places: slot.places() };
                let results = slot.results;
                inputs.send(&driver, &slot.outbox, batch, carried, &slot.wanted, &slot.tasks)?;
                let splits = Attention::splits(self.inputs.longest());
                self.compute_layers(batch.rows(), splits, after_layers)?;
                self.normalise_wanted(batch.rows(), rows_wanted)?;
                if on_device && 0 < rows_wanted {
                    self.make_all(results)?;
                    self.start_download(self.slot, 0..rows_wanted)?;
                }
            }
        }
        let slot = &mut self.slots[self.slot];
        slot.is_chosen = key.is_some() || (on_device && 0 < rows_wanted);
        slot.done = Some(driver.ticket(Queue::Compute)?);
        Ok(Flight { slot: self.slot })
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
