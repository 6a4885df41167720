//! What a step tells the device: tokens, positions, where blocks are, and how tokens are chosen.
//!
//! Numbers of rows go up in one copy. The table of blocks stays on the device, and of a sequence only what differs from
//! the step before goes up: a sequence that decodes gets a block now and then. All of it goes from pinned memory, of which there
//! is one for each step that can be under way, so that nobody waits.

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::{
    CudaError, DeviceAddress, Driver, Embed, LogprobsRow, PromptTile, Queue, SampleRow,
};
use tidemill_kernels::kv::KvBlockShape;

use super::layers::narrow;
use super::{Batch, Carried, RowTask, RunnerLimits, WantedRow};
use crate::memory::{DeviceBuffer, PinnedBuffer};

#[derive(Debug)]
pub(super) struct Inputs {
    numbers: DeviceBuffer,
    /// As it goes up: [`SampleRow`] and [`LogprobsRow`] of wanted rows; [`PromptTile`]s; token, position and sequence of each row;
    /// numbers of wanted rows.
    bytes: Vec<u8>,
    rows: usize,
    wanted: usize,
    /// `[sequences][blocks_per_sequence]`
    tables: DeviceBuffer,
    /// What is in `tables` once everything that was asked for is done.
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

/// Where inputs of a step wait until the device has taken them.
#[derive(Debug)]
pub(super) struct Outbox {
    numbers: PinnedBuffer,
    /// What differs from the step before, at the places that it has on the device.
    tables: PinnedBuffer,
}

impl Inputs {
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        shape: &KvBlockShape,
        limits: RunnerLimits,
        takes_tiles: bool,
    ) -> Result<Self, CudaError> {
        let bytes = number_bytes(limits);
        let blocks_per_sequence = limits.max_model_len.div_ceil(shape.block_len);
        let blocks = limits.max_seqs * blocks_per_sequence;
        Ok(Self {
            numbers: DeviceBuffer::new(driver, bytes)?,
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

    /// Memory of the host for a step.
    pub(super) fn outbox(&self, driver: &Arc<dyn Driver>, limits: RunnerLimits) -> Result<Outbox, CudaError> {
        Ok(Outbox {
            numbers: PinnedBuffer::new(driver, number_bytes(limits))?,
            tables: PinnedBuffer::new(driver, self.tables.bytes())?,
        })
    }

    /// Sends what a step takes, from memory that nothing reads any more. `carried` says for which sequences the only token is the one in
    /// which place of those that the step before chose.
    pub(super) fn send(
        &mut self,
        driver: &Arc<dyn Driver>,
        outbox: &Outbox,
        batch: &Batch<'_, DeviceAddress>,
        carried: &Carried<'_>,
        wanted: &[WantedRow],
        tasks: &[Option<RowTask>],
    ) -> Result<(), CudaError> {
        self.rows = batch.rows();
        self.wanted = wanted.len();
        self.bytes.clear();
        for task in tasks {
            // A row whose logits are wanted gets a token too, which nobody looks at.
            let sample = task.and_then(|task| task.sample).unwrap_or_default();
            self.bytes.extend(bytemuck::bytes_of(&sample));
        }
        for task in tasks {
            let logprobs = task.and_then(|task| task.logprobs).unwrap_or(LogprobsRow::LEFT_OUT);
            self.bytes.extend(bytemuck::bytes_of(&logprobs));
        }
        self.share_out(batch);
        self.bytes.extend_from_slice(bytemuck::cast_slice(&self.tiles));
        let words = |bytes: &mut Vec<u8>, words: &mut dyn Iterator<Item = u32>| {
            bytes.extend(words.flat_map(u32::to_le_bytes));
        };
        let sequences = || batch.sequences.iter().enumerate();
        let mut tokens = sequences().flat_map(|(index, it)| {
            let place = carried(index).map(|place| Embed::OF_CHOSEN | narrow(place));
            assert!(place.is_none() || it.tokens.len() == 1, "one token of a sequence is chosen at a time");
            it.tokens.iter().map(move |token| place.unwrap_or(*token))
        });
        words(&mut self.bytes, &mut tokens);
        words(&mut self.bytes, &mut batch.positions());
        let mut sequence_of_rows =
            sequences().flat_map(|(index, it)| std::iter::repeat_n(index as u32, it.tokens.len()));
        words(&mut self.bytes, &mut sequence_of_rows);
        words(&mut self.bytes, &mut wanted.iter().map(|it| it.row as u32));
        driver.write_pinned(outbox.numbers.address(), &self.bytes);
        let (to, from) = (self.numbers.address(), outbox.numbers.address());
        driver.start_upload(Queue::Compute, to, from, self.bytes.len())?;
        for (index, sequence) in batch.sequences.iter().enumerate() {
            self.update_table(driver, outbox, index, sequence.blocks)?;
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

    /// [`SampleRow`], `[wanted]`
    pub(super) const fn choices(&self) -> DeviceAddress {
        self.numbers.address()
    }

    /// [`LogprobsRow`], `[wanted]`
    pub(super) const fn logprobs(&self) -> DeviceAddress {
        self.choices().offset(self.wanted * size_of::<SampleRow>())
    }

    /// [`PromptTile`], `[tiles]`
    pub(super) const fn tiles(&self) -> DeviceAddress {
        self.logprobs().offset(self.wanted * size_of::<LogprobsRow>())
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

    fn update_table(
        &mut self,
        driver: &Arc<dyn Driver>,
        outbox: &Outbox,
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
        let place = (first + from) * size_of::<DeviceAddress>();
        let (to, pinned) = (self.tables.address().offset(place), outbox.tables.address().offset(place));
        let bytes: &[u8] = bytemuck::cast_slice(&blocks[from..]);
        driver.write_pinned(pinned, bytes);
        driver.start_upload(Queue::Compute, to, pinned, bytes.len())
    }
}

fn number_bytes(limits: RunnerLimits) -> usize {
    // A tile has a row at least.
    let row =
        size_of::<SampleRow>() + size_of::<LogprobsRow>() + size_of::<PromptTile>() + 4 * size_of::<u32>();
    limits.max_tokens * row
}
