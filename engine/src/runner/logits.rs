//! The outcome of a step: scores of all tokens of the vocabulary, for the rows that asked for them.
//!
//! Logits are computed a few rows at a time while they are taken, since those of a whole step (a long prompt's
//! log-probabilities, a vocabulary of 150 thousand) would fill gigabytes.

use std::ops::Range;

use tidemill_kernels::cpu::Cpu;
use tidemill_kernels::matrix::PackedMatrix;

use super::ranks::Heads;

/// Logits of a step, ready to be taken.
#[derive(Debug)]
pub struct Logits<'a> {
    source: Source<'a>,
    buffer: &'a mut LogitsBuffer,
}

/// Who computes logits.
#[derive(Debug)]
pub(super) enum Source<'a> {
    /// One CPU.
    One {
        cpu: &'a Cpu,
        head: &'a PackedMatrix,
        /// The wanted rows' last state: `[wanted][hidden]`.
        states: &'a [f32],
    },
    /// Several ranks, each for some tokens of the vocabulary.
    Ranks(Heads<'a>),
}

/// Logits of one row.
#[derive(Clone, Copy, Debug)]
pub struct LogitsRow<'a> {
    /// Index of the sequence in the batch.
    pub sequence: usize,
    /// Position of the token whose row this is: the logits are for the token after it.
    pub position: u32,
    /// One per token of the vocabulary.
    pub logits: &'a [f32],
}

/// Which rows are wanted, and memory for some of them.
#[derive(Debug)]
pub(super) struct LogitsBuffer {
    /// Or so much of it as a rank has.
    vocab_size: usize,
    pub(super) wanted: Vec<WantedRow>,
    /// `[ROWS_AT_ONCE][vocabulary]`, or fewer rows where a step cannot have so many.
    pub(super) logits: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct WantedRow {
    pub(super) row: usize,
    pub(super) sequence: usize,
    pub(super) position: u32,
}

impl<'a> Logits<'a> {
    pub(super) const fn new(
        cpu: &'a Cpu,
        head: &'a PackedMatrix,
        states: &'a [f32],
        buffer: &'a mut LogitsBuffer,
    ) -> Self {
        Self { source: Source::One { cpu, head, states }, buffer }
    }

    pub(super) const fn of_ranks(heads: Heads<'a>, buffer: &'a mut LogitsBuffer) -> Self {
        Self { source: Source::Ranks(heads), buffer }
    }

    /// How many rows there are.
    pub const fn len(&self) -> usize {
        self.buffer.wanted.len()
    }

    /// Whether no row asked for logits.
    pub const fn is_empty(&self) -> bool {
        self.buffer.wanted.is_empty()
    }

    /// Takes all rows, in the order of the batch and of positions.
    pub fn for_each(mut self, mut take: impl FnMut(LogitsRow<'_>)) {
        let LogitsBuffer { vocab_size, wanted, logits } = self.buffer;
        let vocab_size = *vocab_size;
        for (index, wanted) in wanted.chunks(ROWS_AT_ONCE).enumerate() {
            let first = index * ROWS_AT_ONCE;
            let logits = &mut logits[..wanted.len() * vocab_size];
            self.source.compute(first..first + wanted.len(), logits);
            for (&WantedRow { sequence, position, .. }, logits) in
                wanted.iter().zip(logits.chunks(vocab_size))
            {
                take(LogitsRow { sequence, position, logits });
            }
        }
    }
}

impl Source<'_> {
    /// Writes the logits of some of the wanted rows.
    fn compute(&mut self, rows: Range<usize>, logits: &mut [f32]) {
        match self {
            Self::One { cpu, head, states } => {
                let hidden = head.inputs();
                cpu.matmul(logits, &states[rows.start * hidden..rows.end * hidden], head, None);
            }
            Self::Ranks(heads) => heads.compute(rows, logits),
        }
    }
}

impl LogitsBuffer {
    pub(super) fn new(vocab_size: usize, max_tokens: usize) -> Self {
        Self {
            vocab_size,
            wanted: Vec::with_capacity(max_tokens),
            logits: vec![0.0; max_tokens.min(ROWS_AT_ONCE) * vocab_size],
        }
    }
}

/// Enough that reading the head's weights is not what takes the time.
const ROWS_AT_ONCE: usize = 32;
