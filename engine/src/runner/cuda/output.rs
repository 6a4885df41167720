//! The outcome of a step: what the device made of rows, or logits where somebody wants them on the host.
//!
//! Logits are computed for some rows at a time, in one place, as on a CPU. Where the device makes everything of them that is wanted, all
//! of it is asked for at once, and the host waits once, for some numbers of each row.

use std::ops::Range;

use tidemill_kernels::cuda::{
    CudaError, DeviceAddress, LikelyToken, LogprobsOfRows, LogprobsRow, LogprobsSum, Queue, Sample,
    SampleRow, Ticket, launches,
};

use super::buffers::{self, Results};
use super::layers::narrow;
use super::products::Rows;
use super::slots::Slot;
use super::{CudaRunner, Flight, LogitsRow, WantedRow};

/// What a step came to, ready to be taken.
#[derive(Debug)]
pub struct Outcome<'a> {
    pub(super) runner: &'a mut CudaRunner,
    pub(super) flight: Flight,
}

/// What a step came to for one row.
#[derive(Clone, Copy, Debug)]
pub enum OutcomeRow<'a> {
    /// Its logits, for the host to choose by.
    Logits(LogitsRow<'a>),
    /// What the device made of them.
    Made {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Position of the token whose row this is.
        position: u32,
        /// The next token, or [`Sample::NOT_FINITE`] or [`Sample::NOTHING_LEFT`]; of use where one was to be chosen.
        token: u32,
        /// What log-probabilities are made of, where they are wanted.
        logprobs: Option<RowLogprobs<'a>>,
    },
}

/// What log-probabilities of a row are made of.
#[derive(Clone, Copy, Debug)]
pub struct RowLogprobs<'a> {
    /// The sum, and the token's own logit.
    pub sum: LogprobsSum,
    /// The most likely tokens, as many as were wanted, or as there are.
    pub likely: &'a [LikelyToken],
}

impl Outcome<'_> {
    /// How many rows there are.
    pub const fn len(&self) -> usize {
        self.runner.slots[self.flight.slot].wanted.len()
    }

    /// Whether no row was asked for.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes all rows, in the order of the batch and of positions, once the device is done.
    ///
    /// # Errors
    ///
    /// What the device says; it is of no use any more.
    pub fn for_each(self, take: impl FnMut(OutcomeRow<'_>)) -> Result<(), CudaError> {
        self.runner.receive(self.flight, take)
    }
}

impl CudaRunner {
    /// Takes all rows of a step, in the order of the batch and of positions, once the device is done with it. What was asked for after
    /// it goes on.
    ///
    /// # Errors
    ///
    /// What the device says; it is of no use any more.
    pub fn receive(
        &mut self,
        Flight { slot: index }: Flight,
        mut take: impl FnMut(OutcomeRow<'_>),
    ) -> Result<(), CudaError> {
        let slot = &mut self.slots[index];
        let wanted = slot.wanted.len();
        // K and V are there when the step is said to be over.
        let done = slot.done.take().expect("a step is received once");
        if wanted == 0 || slot.is_all_on_device() {
            self.wait(index, done)?;
            if 0 < wanted {
                self.read_results(index, 0..wanted);
                self.take(index, 0..wanted, &mut take);
            }
            return Ok(());
        }
        let at_once = buffers::logits_rows(self.limits);
        for first in (0..wanted).step_by(at_once) {
            let rows = first..wanted.min(first + at_once);
            if !self.slots[index].is_chosen {
                let own = || {
                    self.make_some(index, rows.clone())?;
                    self.start_download(index, rows.clone())
                };
                match &self.others {
                    None => own()?,
                    Some(others) => others.make(index, rows.clone(), own)?,
                }
            }
            self.wait(index, self.driver.ticket(Queue::Compute)?)?;
            self.read_results(index, rows.clone());
            self.download_logits(index, rows.clone())?;
            self.take(index, rows, &mut take);
        }
        Ok(())
    }

    /// Waits for what was asked of a step.
    fn wait(&self, slot: usize, ticket: Ticket) -> Result<(), CudaError> {
        match &self.others {
            None => self.driver.wait(ticket),
            Some(others) => others.wait(slot, || self.driver.wait(ticket)),
        }
    }

    /// Makes of some wanted rows what is wanted of them.
    pub(super) fn make_some(&self, slot: usize, rows: Range<usize>) -> Result<(), CudaError> {
        self.compute_logits(rows.start, rows.len())?;
        self.make(rows.start, rows.len(), self.slots[slot].results)
    }

    /// Which of the wanted rows is the last of a sequence, if one is.
    pub fn last_row(&self, flight: &Flight, sequence: usize) -> Option<usize> {
        self.slots[flight.slot].wanted.iter().rposition(|row| row.sequence == sequence)
    }

    /// Normalises the rows that are wanted, and no others; of several ranks all, to which their last sum is added on the way, and then
    /// takes those that are wanted.
    pub(super) fn normalise_wanted(&self, rows: usize, wanted: usize) -> Result<(), CudaError> {
        if wanted == 0 {
            return Ok(());
        }
        let (normed, hidden) = (self.buffers.normed.address(), self.model.spec.hidden_size);
        let norm = &self.model.weights.final_norm;
        if self.seat.is_some() {
            self.norm_state(norm, rows)?;
            return self.take_rows(self.rows_for_head(), normed, self.inputs.wanted(), wanted);
        }
        self.take_rows(normed, self.buffers.state.address(), self.inputs.wanted(), wanted)?;
        self.norm(normed, normed, norm, hidden, wanted)
    }

    /// Where wanted rows are, normalised.
    fn rows_for_head(&self) -> DeviceAddress {
        if self.seat.is_some() { self.buffers.state.address() } else { self.buffers.normed.address() }
    }

    /// Makes of all wanted rows what is wanted of them.
    pub(super) fn make_all(&self, results: Results) -> Result<(), CudaError> {
        let at_once = buffers::logits_rows(self.limits);
        for first in (0..results.rows).step_by(at_once) {
            let rows = at_once.min(results.rows - first);
            self.compute_logits(first, rows)?;
            self.make(first, rows, results)?;
        }
        Ok(())
    }

    /// Computes logits of some wanted rows, in the place of others.
    fn compute_logits(&self, first: usize, rows: usize) -> Result<(), CudaError> {
        let inputs = self.model.spec.hidden_size;
        let x = self.rows_for_head().offset(first * inputs * self.model.dtype.bytes());
        self.multiply_by_head(Rows { x, rows, inputs })
    }

    /// Chooses tokens by logits, and finds log-probabilities where they are wanted.
    fn make(&self, first: usize, rows: usize, results: Results) -> Result<(), CudaError> {
        let place = |bytes| self.buffers.results.address().offset(bytes);
        let chosen = place(first * size_of::<u32>());
        let (logits, weights) = (self.buffers.logits.address(), self.buffers.weights.address());
        let vocabulary = narrow(self.model.spec.vocab_size);
        let sample = Sample {
            tokens: chosen,
            logits,
            weights,
            rows: self.inputs.choices().offset(first * size_of::<SampleRow>()),
            vocabulary,
            reserved: 0,
        };
        self.launch(launches::sample(narrow(rows), &sample))?;
        let Some(places) = results.places else { return Ok(()) };
        let logprobs = LogprobsOfRows {
            sums: place(results.sum(first)),
            likely: place(results.likely(first)),
            logits,
            weights,
            rows: self.inputs.logprobs().offset(first * size_of::<LogprobsRow>()),
            chosen,
            vocabulary,
            places: narrow(places),
        };
        self.launch(launches::logprobs(narrow(rows), &logprobs))
    }

    /// Has results of some wanted rows come down: of several ranks those of the first, which the others have too.
    pub(super) fn start_download(&self, slot: usize, rows: Range<usize>) -> Result<(), CudaError> {
        if self.seat.as_ref().is_some_and(|seat| !seat.is_first()) {
            return Ok(());
        }
        let Slot { inbox, results, .. } = &self.slots[slot];
        for part in results.parts(rows) {
            let (to, from) =
                (inbox.address().offset(part.start), self.buffers.results.address().offset(part.start));
            self.driver.start_download(Queue::Compute, to, from, part.len())?;
        }
        Ok(())
    }

    /// Takes results that have come down.
    fn read_results(&mut self, slot: usize, rows: Range<usize>) {
        let Slot { inbox, results, .. } = &self.slots[slot];
        for part in results.parts(rows) {
            let to = &mut bytemuck::cast_slice_mut(&mut self.results)[part.clone()];
            self.driver.read_pinned(to, inbox.address().offset(part.start));
        }
    }

    /// Takes those rows of logits to the host that are wanted there.
    fn download_logits(&mut self, slot: usize, rows: Range<usize>) -> Result<(), CudaError> {
        let vocab_size = self.model.spec.vocab_size;
        let tasks = &self.slots[slot].tasks[rows];
        for (row, _) in tasks.iter().enumerate().filter(|(_, task)| task.is_none()) {
            let logits = &mut self.logits[row * vocab_size..(row + 1) * vocab_size];
            let address = self.buffers.logits.address().offset(row * vocab_size * size_of::<f32>());
            self.driver.download(bytemuck::cast_slice_mut(logits), address)?;
        }
        Ok(())
    }

    /// Tells of wanted rows; those that are logits are on the host, from the first of the rows on.
    fn take(&self, slot: usize, rows: Range<usize>, take: &mut dyn FnMut(OutcomeRow<'_>)) {
        let vocab_size = self.model.spec.vocab_size;
        let Slot { wanted, tasks, results, .. } = &self.slots[slot];
        let bytes: &[u8] = bytemuck::cast_slice(&self.results);
        for (place, index) in rows.enumerate() {
            let WantedRow { sequence, position, .. } = wanted[index];
            let Some(task) = tasks[index] else {
                let logits = &self.logits[place * vocab_size..(place + 1) * vocab_size];
                take(OutcomeRow::Logits(LogitsRow { sequence, position, logits }));
                continue;
            };
            let logprobs = task.logprobs.map(|LogprobsRow { count, .. }| {
                let likely = &bytes[results.likely(index)..]
                    [..vocab_size.min(count as usize) * size_of::<LikelyToken>()];
                let sum = &bytes[results.sum(index)..][..size_of::<LogprobsSum>()];
                RowLogprobs { sum: *bytemuck::from_bytes(sum), likely: bytemuck::cast_slice(likely) }
            });
            let token = bytemuck::cast_slice(bytes)[index];
            take(OutcomeRow::Made { sequence, position, token, logprobs });
        }
    }
}
