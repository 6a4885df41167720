//! What a step tells the device: tokens, positions, where blocks are, and how tokens are chosen.
//!
//! Numbers of rows go up in one copy. The table of blocks stays on the device, and of a sequence only what differs from
//! the step before goes up: a sequence that decodes gets a block now and then.

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver, PromptTile, Queue, SampleRow, Ticket};
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
    /// As it goes up: [`SampleRow`] of wanted rows; [`PromptTile`]s; token, position and sequence of each row; numbers of wanted rows.
    bytes: Vec<u8>,
    rows: usize,
    wanted: usize,
    /// `[sequences][blocks_per_sequence]`
    tables: DeviceBuffer,
    /// What is in `tables`.
    known: Vec<DeviceAddress>,
    blocks_per_sequence: usize,
    /// Whether rows of one sequence are attended to together.
    takes_tiles: bool,
    tiles: Vec<PromptTile>,
    /// Rows that are attended to one by one.
    singles: Vec<Range<usize>>,
    /// Tokens of the longest sequence that has such rows.
    longest: u32,
}

impl Inputs {
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        shape: &KvBlockShape,
        limits: RunnerLimits,
        takes_tiles: bool,
    ) -> Result<Self, CudaError> {
        // A tile has a row at least.
        let row_bytes = size_of::<SampleRow>() + size_of::<PromptTile>() + 4 * size_of::<u32>();
        let bytes = limits.max_tokens * row_bytes;
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
            takes_tiles,
            tiles: Vec::new(),
            singles: Vec::new(),
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
        self.share_out(batch);
        self.bytes.extend_from_slice(bytemuck::cast_slice(&self.tiles));
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
        for (index, sequence) in batch.sequences.iter().enumerate() {
            self.update_table(driver, index, sequence.blocks)?;
        }
        Ok(())
    }

    /// Several rows of a sequence are attended to together, where the kernels can: keys that are read serve all of them.
    fn share_out(&mut self, batch: &Batch<'_, DeviceAddress>) {
        self.tiles.clear();
        self.singles.clear();
        self.longest = 0;
        let mut first = 0;
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let (rows, position) = (sequence.tokens.len(), sequence.first_position);
            if self.takes_tiles && 1 < rows {
                self.tiles.extend(PromptTile::cut(first as u32, rows as u32, position, index as u32));
            } else {
                match self.singles.last_mut() {
                    Some(run) if run.end == first => run.end += rows,
                    _ => self.singles.push(first..first + rows),
                }
                self.longest = self.longest.max(position + rows as u32);
            }
            first += rows;
        }
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

    /// [`PromptTile`], `[tiles]`
    pub(super) const fn tiles(&self) -> DeviceAddress {
        self.choices().offset(self.wanted * size_of::<SampleRow>())
    }

    pub(super) const fn tile_count(&self) -> usize {
        self.tiles.len()
    }

    /// Rows that are attended to one by one.
    pub(super) fn singles(&self) -> &[Range<usize>] {
        &self.singles
    }

    /// u32, `[rows]`
    pub(super) const fn tokens(&self) -> DeviceAddress {
        self.tiles().offset(self.tile_count() * size_of::<PromptTile>())
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

    /// Tokens of the longest sequence with rows that are attended to one by one.
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
