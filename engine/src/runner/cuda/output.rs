//! The outcome of a step: chosen tokens, or logits where somebody wants them on the host.
//!
//! Logits are computed for some rows at a time, in one place, as on a CPU. Where every token is chosen on the device all
//! of it is asked for at once, and the host waits once, for the ids.

use std::ops::Range;

use tidemill_kernels::cuda::{CudaError, Queue, Sample, SampleRow, launches};

use super::layers::narrow;
use super::products::Rows;
use super::{CudaRunner, LogitsRow, WantedRow, buffers};

/// What a step came to, ready to be taken.
#[derive(Debug)]
pub struct Outcome<'a> {
    pub(super) runner: &'a mut CudaRunner,
    /// Whether logits and tokens were asked for with the layers.
    pub(super) is_chosen: bool,
}

/// What a step came to for one row.
#[derive(Clone, Copy, Debug)]
pub enum OutcomeRow<'a> {
    /// Its logits, for the host to choose by.
    Logits(LogitsRow<'a>),
    /// The token that was chosen on the device.
    Token {
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Position of the token whose row this is.
        position: u32,
        /// The next token, or [`Sample::NOT_FINITE`] or [`Sample::NOTHING_LEFT`].
        token: u32,
    },
}

impl Outcome<'_> {
    /// How many rows there are.
    pub const fn len(&self) -> usize {
        self.runner.wanted.len()
    }

    /// Whether no row was asked for.
    pub const fn is_empty(&self) -> bool {
        self.runner.wanted.is_empty()
    }

    /// Takes all rows, in the order of the batch and of positions, once the device is done.
    ///
    /// # Errors
    ///
    /// What the device says; it is of no use any more.
    pub fn for_each(self, mut take: impl FnMut(OutcomeRow<'_>)) -> Result<(), CudaError> {
        let Self { runner, is_chosen } = self;
        let wanted = runner.wanted.len();
        if wanted == 0 {
            // K and V are there when the step is said to be over.
            runner.inputs.have_arrived();
            return runner.driver.synchronize();
        }
        if runner.choices.iter().all(Option::is_some) {
            runner.receive_tokens(wanted)?;
            runner.take(0..wanted, &mut take);
            return Ok(());
        }
        let at_once = buffers::logits_rows(runner.limits);
        for first in (0..wanted).step_by(at_once) {
            let rows = at_once.min(wanted - first);
            let has_tokens = runner.choices[first..first + rows].iter().any(Option::is_some);
            if !is_chosen {
                runner.compute_logits(first, rows)?;
                if has_tokens {
                    runner.choose(first, rows)?;
                    runner.start_download_of_tokens(first, rows)?;
                }
            }
            if has_tokens {
                runner.receive_tokens(rows)?;
            }
            runner.download_logits(first, rows)?;
            runner.take(first..first + rows, &mut take);
        }
        Ok(())
    }
}

impl CudaRunner {
    /// Normalises the rows that are wanted, and no others.
    pub(super) fn normalise_wanted(&self, wanted: usize) -> Result<(), CudaError> {
        if wanted == 0 {
            return Ok(());
        }
        let (normed, hidden) = (self.buffers.normed.address(), self.model.spec.hidden_size);
        self.take_rows(normed, self.buffers.state.address(), self.inputs.wanted(), wanted)?;
        self.norm(normed, normed, &self.model.weights.final_norm, hidden, wanted)
    }

    /// Chooses tokens behind the first so many wanted rows.
    pub(super) fn choose_all(&self, wanted: usize) -> Result<(), CudaError> {
        let at_once = buffers::logits_rows(self.limits);
        for first in (0..wanted).step_by(at_once) {
            let rows = at_once.min(wanted - first);
            self.compute_logits(first, rows)?;
            self.choose(first, rows)?;
        }
        Ok(())
    }

    /// Computes logits of some wanted rows, in the place of others.
    fn compute_logits(&self, first: usize, rows: usize) -> Result<(), CudaError> {
        let inputs = self.model.spec.hidden_size;
        let x = self.buffers.normed.address().offset(first * inputs * self.model.dtype.bytes());
        self.multiply_by_head(Rows { x, rows, inputs }, self.buffers.logits.address())
    }

    /// Chooses tokens by logits.
    fn choose(&self, first: usize, rows: usize) -> Result<(), CudaError> {
        let sample = Sample {
            tokens: self.buffers.tokens.address().offset(first * size_of::<u32>()),
            logits: self.buffers.logits.address(),
            weights: self.buffers.weights.address(),
            rows: self.inputs.choices().offset(first * size_of::<SampleRow>()),
            vocabulary: narrow(self.model.spec.vocab_size),
            reserved: 0,
        };
        self.launch(launches::sample(narrow(rows), &sample))
    }

    pub(super) fn start_download_of_tokens(&self, first: usize, rows: usize) -> Result<(), CudaError> {
        let from = self.buffers.tokens.address().offset(first * size_of::<u32>());
        self.driver.start_download(Queue::Compute, self.ids.address(), from, rows * size_of::<u32>())
    }

    /// Waits for tokens that come down.
    fn receive_tokens(&mut self, rows: usize) -> Result<(), CudaError> {
        self.driver.wait(self.driver.ticket(Queue::Compute)?)?;
        self.inputs.have_arrived();
        self.tokens.resize(rows, 0);
        self.driver.read_pinned(bytemuck::cast_slice_mut(&mut self.tokens), self.ids.address());
        Ok(())
    }

    /// Takes those rows of logits to the host that are wanted there.
    fn download_logits(&mut self, first: usize, rows: usize) -> Result<(), CudaError> {
        let vocab_size = self.model.spec.vocab_size;
        for row in (0..rows).filter(|row| self.choices[first + row].is_none()) {
            let logits = &mut self.logits[row * vocab_size..(row + 1) * vocab_size];
            let address = self.buffers.logits.address().offset(row * vocab_size * size_of::<f32>());
            self.driver.download(bytemuck::cast_slice_mut(logits), address)?;
        }
        Ok(())
    }

    /// Tells of wanted rows whose tokens, or logits, are the first on the host.
    fn take(&self, rows: Range<usize>, take: &mut dyn FnMut(OutcomeRow<'_>)) {
        let vocab_size = self.model.spec.vocab_size;
        for (place, index) in rows.enumerate() {
            let WantedRow { sequence, position, .. } = self.wanted[index];
            take(match self.choices[index] {
                Some(_) => OutcomeRow::Token { sequence, position, token: self.tokens[place] },
                None => {
                    let logits = &self.logits[place * vocab_size..(place + 1) * vocab_size];
                    OutcomeRow::Logits(LogitsRow { sequence, position, logits })
                }
            });
        }
    }
}
