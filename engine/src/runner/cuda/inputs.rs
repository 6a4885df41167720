//! What a step tells the device: tokens, positions, where blocks are, and how tokens are chosen.
//!
//! Numbers of rows go up in one copy. The table of blocks stays on the device, and of a sequence only what differs from
//! the step before goes up: a sequence that decodes gets a block now and then.

use std::sync::Arc;

use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver, Queue, SampleRow, Ticket};
use tidemill_kernels::kv::KvBlockShape;

use super::{Batch, RunnerLimits, WantedRow};
use crate::memory::{DeviceBuffer, PinnedBuffer};

#[derive(Debug)]
pub(super) struct Inputs {
    numbers: DeviceBuffer,
    /// Where they come from.
    pinned: PinnedBuffer,
    /// When they were read there.
    sent: Option<Ticket>,
    /// As it goes up: [`SampleRow`] of wanted rows; token, position and sequence of each row; numbers of wanted rows.
    bytes: Vec<u8>,
    rows: usize,
    wanted: usize,
    /// `[sequences][blocks_per_sequence]`
    tables: DeviceBuffer,
    /// What is in `tables`.
    known: Vec<DeviceAddress>,
    blocks_per_sequence: usize,
    /// Tokens of the step's longest sequence.
    longest: u32,
}

impl Inputs {
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        shape: &KvBlockShape,
        limits: RunnerLimits,
    ) -> Result<Self, CudaError> {
        let bytes = limits.max_tokens * (size_of::<SampleRow>() + 4 * size_of::<u32>());
        let blocks_per_sequence = limits.max_model_len.div_ceil(shape.block_len);
        let blocks = limits.max_seqs * blocks_per_sequence;
        Ok(Self {
            numbers: DeviceBuffer::new(driver, bytes)?,
            pinned: PinnedBuffer::new(driver, bytes)?,
            sent: None,
            bytes: Vec::with_capacity(bytes),
            rows: 0,
            wanted: 0,
            tables: DeviceBuffer::new(driver, blocks * size_of::<DeviceAddress>())?,
            known: vec![DeviceAddress::NULL; blocks],
            blocks_per_sequence,
            longest: 0,
        })
    }

    /// Prepares a step: its tables of blocks are on the device, its numbers wait to be sent.
    pub(super) fn fill(
        &mut self,
        driver: &Arc<dyn Driver>,
        batch: &Batch<'_, DeviceAddress>,
        wanted: &[WantedRow],
        choices: &[Option<SampleRow>],
    ) -> Result<(), CudaError> {
        self.rows = batch.rows();
        self.wanted = wanted.len();
        self.bytes.clear();
        for choice in choices {
            // A row whose logits are wanted gets a token too, which nobody looks at.
            self.bytes.extend(bytemuck::bytes_of(&choice.unwrap_or_default()));
        }
        let words = |bytes: &mut Vec<u8>, words: &mut dyn Iterator<Item = u32>| {
            bytes.extend(words.flat_map(u32::to_le_bytes));
        };
        words(&mut self.bytes, &mut batch.sequences.iter().flat_map(|it| it.tokens).copied());
        words(&mut self.bytes, &mut batch.positions());
        let sequences = batch.sequences.iter().enumerate();
        let mut sequence_of_rows =
            sequences.flat_map(|(index, it)| std::iter::repeat_n(index as u32, it.tokens.len()));
        words(&mut self.bytes, &mut sequence_of_rows);
        words(&mut self.bytes, &mut wanted.iter().map(|it| it.row as u32));
        self.write_numbers(driver)?;
        self.longest = 0;
        for (index, sequence) in batch.sequences.iter().enumerate() {
            self.update_table(driver, index, sequence.blocks)?;
            self.longest = self.longest.max(sequence.first_position + sequence.tokens.len() as u32);
        }
        Ok(())
    }

    /// Sends the numbers of rows, from a place that they may not leave before the device has come to it.
    pub(super) fn send(&self, driver: &Arc<dyn Driver>) -> Result<(), CudaError> {
        driver.start_upload(Queue::Compute, self.numbers.address(), self.pinned.address(), self.bytes.len())
    }

    /// They were sent by what was asked for last.
    pub(super) fn are_sent(&mut self, driver: &Arc<dyn Driver>) -> Result<(), CudaError> {
        self.sent = Some(driver.ticket(Queue::Compute)?);
        Ok(())
    }

    /// The host has waited for something that was asked for after them.
    pub(super) const fn have_arrived(&mut self) {
        self.sent = None;
    }

    /// [`SampleRow`], `[wanted]`
    pub(super) const fn choices(&self) -> DeviceAddress {
        self.numbers.address()
    }

    /// u32, `[rows]`
    pub(super) const fn tokens(&self) -> DeviceAddress {
        self.choices().offset(self.wanted * size_of::<SampleRow>())
    }

    /// u32, `[rows]`
    pub(super) const fn positions(&self) -> DeviceAddress {
        self.tokens().offset(self.rows * size_of::<u32>())
    }

    /// u32, `[rows]`
    pub(super) const fn sequences(&self) -> DeviceAddress {
        self.positions().offset(self.rows * size_of::<u32>())
    }

    /// u32, `[wanted]`: numbers of rows.
    pub(super) const fn wanted(&self) -> DeviceAddress {
        self.sequences().offset(self.rows * size_of::<u32>())
    }

    /// Addresses of blocks, `[sequences][blocks_per_sequence]`.
    pub(super) const fn tables(&self) -> DeviceAddress {
        self.tables.address()
    }

    pub(super) const fn blocks_per_sequence(&self) -> u32 {
        self.blocks_per_sequence as u32
    }

    /// Tokens of the step's longest sequence.
    pub(super) const fn longest(&self) -> u32 {
        self.longest
    }

    fn write_numbers(&mut self, driver: &Arc<dyn Driver>) -> Result<(), CudaError> {
        // A step whose outcome nobody has waited for may still read them.
        if let Some(ticket) = self.sent.take() {
            driver.wait(ticket)?;
        }
        driver.write_pinned(self.pinned.address(), &self.bytes);
        Ok(())
    }

    fn update_table(
        &mut self,
        driver: &Arc<dyn Driver>,
        sequence: usize,
        blocks: &[DeviceAddress],
    ) -> Result<(), CudaError> {
        // A sequence may hold blocks beyond the longest that is computed, for tokens that come.
        let blocks = &blocks[..blocks.len().min(self.blocks_per_sequence)];
        let first = sequence * self.blocks_per_sequence;
        let known = &mut self.known[first..first + blocks.len()];
        let differs = |(a, b): (&DeviceAddress, &DeviceAddress)| a != b;
        let Some(from) = known.iter().zip(blocks).position(differs) else { return Ok(()) };
        known[from..].copy_from_slice(&blocks[from..]);
        let address = self.tables.address().offset((first + from) * size_of::<DeviceAddress>());
        driver.upload(address, bytemuck::cast_slice(&blocks[from..]))
    }
}
