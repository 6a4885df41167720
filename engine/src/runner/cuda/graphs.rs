//! Decode steps as graphs: recorded once for a number of rows, asked for in one call from then on.
//!
//! A batch is filled up to the next number of rows that there is a graph for, by sequences of one token in blocks that
//! nobody else has. What differs from step to step lies at places that never change: it goes up before the graph, and what was chosen
//! comes down after it.

use std::collections::BTreeMap;
use std::sync::Arc;

use tidemill_kernels::cuda::{Attention, CudaError, DeviceAddress, Driver, Graph, LogprobsRow};
use tidemill_kernels::kv::KvBlockShape;

use super::buffers::Results;
use super::{Batch, CudaRunner, RunnerLimits};
use crate::memory::DeviceBuffer;
use crate::runner::{BatchSequence, LogitsWanted};

/// The graphs so far, and what they take.
#[derive(Debug)]
pub(super) struct Graphs {
    driver: Arc<dyn Driver>,
    /// Numbers of rows, rising.
    sizes: Vec<usize>,
    recorded: BTreeMap<Key, State>,
    /// Blocks of the sequences that fill up a batch.
    spare: Vec<DeviceAddress>,
    _memory: Option<DeviceBuffer>,
}

/// What a graph is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) rows: usize,
    /// Into how many parts the keys of the longest sequence are cut: a power of two, or the most there are.
    pub(super) splits: u32,
    /// Whether somebody wants log-probabilities.
    pub(super) logprobs: bool,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Asked for once, launch by launch: every kernel is loaded by now.
    Tried,
    Recorded(Graph),
}

impl Graphs {
    /// `sizes` are numbers of rows; those that no step can have are left out.
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        shape: &KvBlockShape,
        limits: RunnerLimits,
        sizes: &[usize],
    ) -> Result<Self, CudaError> {
        let most = limits.max_seqs.min(limits.max_tokens);
        let mut sizes: Vec<usize> = sizes.iter().copied().filter(|size| (1..=most).contains(size)).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let gap = |(index, size): (usize, &usize)| {
            size - index.checked_sub(1).map_or(0, |before| sizes[before]) - 1
        };
        let spare = sizes.iter().enumerate().map(gap).max().unwrap_or(0);
        let memory = match spare {
            0 => None,
            _ => Some(DeviceBuffer::zeroed(driver, spare * shape.block_bytes())?),
        };
        let first = memory.as_ref().map_or(DeviceAddress::NULL, DeviceBuffer::address);
        Ok(Self {
            driver: Arc::clone(driver),
            sizes,
            recorded: BTreeMap::new(),
            spare: (0..spare).map(|block| first.offset(block * shape.block_bytes())).collect(),
            _memory: memory,
        })
    }

    /// Sequences that fill up a batch.
    pub(super) fn padding(&self, count: usize) -> impl Iterator<Item = BatchSequence<'_, DeviceAddress>> {
        self.spare[..count].iter().map(|block| BatchSequence {
            tokens: &[0],
            first_position: 0,
            blocks: std::slice::from_ref(block),
            logits: LogitsWanted::Last,
        })
    }
}

impl CudaRunner {
    /// The graph for a batch: each sequence computes one token, and wants to know what comes behind it.
    pub(super) fn graph_key(&self, batch: &Batch<'_, DeviceAddress>) -> Option<Key> {
        let count = batch.sequences.len();
        let rows = self.graphs.sizes.iter().copied().find(|size| count <= *size)?;
        let is_decode =
            |it: &BatchSequence<'_, DeviceAddress>| it.tokens.len() == 1 && it.logits != LogitsWanted::None;
        let longest = batch.sequences.iter().map(|it| it.first_position + 1).max()?;
        let most = Attention::splits(u32::try_from(self.limits.max_model_len).ok()?);
        let splits = Attention::splits(longest).next_power_of_two().min(most);
        let has_room = splits == 1 || rows <= self.buffers.rows_with_partials(&self.model.spec, splits);
        let logprobs = self.slots[self.slot].wants_logprobs();
        (has_room && batch.sequences.iter().all(is_decode)).then_some(Key { rows, splits, logprobs })
    }

    /// Asks for a step whose numbers and tables are in place.
    pub(super) fn replay(&mut self, key: Key) -> Result<(), CudaError> {
        match self.graphs.recorded.get(&key) {
            Some(State::Recorded(graph)) => self.driver.replay(*graph),
            Some(State::Tried) => {
                let graph = self.record(key)?;
                self.driver.replay(graph)
            }
            None => {
                self.graphs.recorded.insert(key, State::Tried);
                self.ask_for_decode(key)
            }
        }
    }

    fn record(&mut self, key: Key) -> Result<Graph, CudaError> {
        self.driver.begin_capture()?;
        let asked = self.ask_for_decode(key);
        let graph = self.driver.end_capture();
        asked?;
        let graph = graph?;
        self.graphs.recorded.insert(key, State::Recorded(graph));
        let Key { rows, splits, logprobs } = key;
        let all = self.graphs.bytes();
        tracing::info!(
            rows,
            splits,
            logprobs,
            launches = graph.launches,
            bytes = graph.bytes,
            all,
            "a graph is recorded"
        );
        Ok(graph)
    }

    /// Everything that is computed in a decode step, which is the same each time.
    fn ask_for_decode(&self, key: Key) -> Result<(), CudaError> {
        self.compute_layers(key.rows, key.splits, &mut |_| {})?;
        self.normalise_wanted(key.rows, key.rows)?;
        self.make_all(key.results())
    }
}

impl Key {
    /// What comes of the step.
    pub(super) fn results(self) -> Results {
        Results { rows: self.rows, places: self.logprobs.then_some(LogprobsRow::MOST as usize) }
    }
}

impl Graphs {
    /// Memory of the device that graphs take.
    fn bytes(&self) -> usize {
        let bytes = |state: &State| if let State::Recorded(graph) = state { graph.bytes } else { 0 };
        self.recorded.values().map(bytes).sum()
    }
}

impl Drop for Graphs {
    fn drop(&mut self) {
        for state in self.recorded.values() {
            if let State::Recorded(graph) = state
                && let Err(error) = self.driver.synchronize().and_then(|()| self.driver.free_graph(*graph))
            {
                tracing::warn!(%error, "a graph is not given back");
            }
        }
    }
}
