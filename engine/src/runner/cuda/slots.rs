//! What belongs to a step from when it is asked for until its outcome is taken.

use std::sync::Arc;

use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver, Ticket};

use super::buffers::Results;
use super::inputs::{Inputs, Outbox};
use super::{Batch, RowTask, RunnerLimits, Tasks, WantedRow};
use crate::memory::PinnedBuffer;

/// A step that was asked for.
#[derive(Debug)]
#[must_use = "its outcome is to be received"]
pub struct Flight {
    pub(super) slot: usize,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) outbox: Outbox,
    /// Where results come down.
    pub(super) inbox: PinnedBuffer,
    pub(super) results: Results,
    /// Which rows somebody wants to know of.
    pub(super) wanted: Vec<WantedRow>,
    /// What is made of them; `None` where logits are wanted instead.
    pub(super) tasks: Vec<Option<RowTask>>,
    /// Whether results were asked for with the layers.
    pub(super) is_chosen: bool,
    /// The end of everything that was asked for, until somebody has waited for it.
    pub(super) done: Option<Ticket>,
}

impl Slot {
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        inputs: &Inputs,
        limits: RunnerLimits,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            outbox: inputs.outbox(driver, limits)?,
            inbox: PinnedBuffer::new(driver, Results::most_bytes(limits.max_tokens))?,
            results: Results::default(),
            wanted: Vec::with_capacity(limits.max_tokens),
            tasks: Vec::with_capacity(limits.max_tokens),
            is_chosen: false,
            done: None,
        })
    }

    /// Whose step it is now.
    pub(super) fn begin(
        &mut self,
        driver: &Arc<dyn Driver>,
        batch: &Batch<'_, DeviceAddress>,
        tasks: &Tasks<'_>,
    ) -> Result<(), CudaError> {
        // A step whose outcome nobody took may still read its inputs.
        if let Some(ticket) = self.done.take() {
            driver.wait(ticket)?;
        }
        batch.fill_wanted(&mut self.wanted);
        self.tasks.clear();
        self.tasks.extend(self.wanted.iter().map(|row| tasks(row.sequence, row.position)));
        Ok(())
    }

    /// Whether nobody has waited for its step.
    pub(super) const fn is_under_way(&self) -> bool {
        self.done.is_some()
    }

    /// Whether no logits are wanted on the host.
    pub(super) fn is_all_on_device(&self) -> bool {
        self.tasks.iter().all(Option::is_some)
    }

    pub(super) fn wants_logprobs(&self) -> bool {
        self.places().is_some()
    }

    /// The most likely tokens of any row that are wanted; `None` where no log-probabilities are.
    pub(super) fn places(&self) -> Option<usize> {
        self.tasks.iter().flatten().filter_map(|task| task.logprobs).map(|it| it.count as usize).max()
    }
}
