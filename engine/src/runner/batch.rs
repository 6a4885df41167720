//! What one step computes.

use tidemill_kernels::kv::{BlockAddress, KvBlockShape};
use tidemill_kernels::step::SequenceRows;

use super::RunnerLimits;
use super::logits::WantedRow;

/// The sequences of a step. Their rows are computed together; a sequence appears once. Blocks are named as the device names
/// places in its memory: `A`.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a, A = BlockAddress> {
    /// Each with its new tokens.
    pub sequences: &'a [BatchSequence<'a, A>],
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct BatchSequence<'a, A = BlockAddress> {
    /// The tokens to compute: at least one, at consecutive positions.
    pub tokens: &'a [u32],
    /// Position of the first of them: how many tokens of the sequence are in the blocks already.
    pub first_position: u32,
    /// All blocks of the sequence from position 0 on, in this worker's memory or a peer's; those that get new tokens
    /// belong to this sequence alone.
    pub blocks: &'a [A],
    /// Which of the tokens' logits to compute.
    pub logits: LogitsWanted,
}

/// Which rows of a sequence get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: more of the prompt is to come.
    None,
    /// The last: the next token will be chosen from it.
    Last,
    /// The last so many, of which there are as many tokens at least: guessed tokens are verified by them.
    Tail(usize),
    /// All: for log-probabilities of the prompt.
    All,
}

impl<A> Batch<'_, A> {
    /// Rows of the step.
    pub(super) fn rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.tokens.len()).sum()
    }

    /// Position of each row.
    pub(super) fn positions(&self) -> impl Iterator<Item = u32> {
        self.sequences.iter().flat_map(|sequence| {
            (0..sequence.tokens.len() as u32).map(move |offset| sequence.first_position + offset)
        })
    }

    pub(super) fn fill_wanted(&self, wanted: &mut Vec<WantedRow>) {
        wanted.clear();
        let mut first_row = 0;
        for (index, sequence) in self.sequences.iter().enumerate() {
            let tokens = sequence.tokens.len();
            let offsets = tokens - sequence.wanted_rows()..tokens;
            wanted.extend(offsets.map(|offset| WantedRow {
                row: first_row + offset,
                sequence: index,
                position: sequence.first_position + offset as u32,
            }));
            first_row += tokens;
        }
    }

    pub(super) fn assert_within(&self, limits: &RunnerLimits, shape: &KvBlockShape, vocab_size: usize) {
        let (sequences, rows) = (self.sequences.len(), self.rows());
        assert!(0 < sequences, "a step has a sequence");
        assert!(sequences <= limits.max_seqs, "{sequences} sequences in a step of {}", limits.max_seqs);
        assert!(rows <= limits.max_tokens, "{rows} tokens in a step of {}", limits.max_tokens);
        for sequence in self.sequences {
            assert!(!sequence.tokens.is_empty(), "a sequence in a step has a token to compute");
            let end = sequence.first_position as usize + sequence.tokens.len();
            assert!(end <= limits.max_model_len, "{end} tokens in a sequence of {}", limits.max_model_len);
            let reach = sequence.blocks.len() * shape.block_len;
            assert!(end <= reach, "blocks for {reach} tokens hold {end}");
            for &token in sequence.tokens {
                assert!((token as usize) < vocab_size, "token {token} in a vocabulary of {vocab_size}");
            }
        }
    }
}

impl<'a> Batch<'a> {
    /// The last rows of every sequence, as many as `count` says, one after another. Sequences of none are left out.
    pub(super) fn fill_rows(
        &self,
        rows: &mut Vec<SequenceRows<'a>>,
        count: impl Fn(&BatchSequence<'a>) -> usize,
    ) {
        rows.clear();
        let mut first_row = 0;
        for sequence in self.sequences {
            let count = count(sequence);
            if count == 0 {
                continue;
            }
            rows.push(SequenceRows {
                first_row,
                rows: count,
                first_position: sequence.first_position as usize + sequence.tokens.len() - count,
                blocks: sequence.blocks,
            });
            first_row += count;
        }
    }
}

impl<A> BatchSequence<'_, A> {
    /// Rows with logits: the last ones.
    pub(super) fn wanted_rows(&self) -> usize {
        match self.logits {
            LogitsWanted::None => 0,
            LogitsWanted::Last => 1,
            LogitsWanted::Tail(count) => count,
            LogitsWanted::All => self.tokens.len(),
        }
    }
}

/// An empty vector with the memory of another, whose elements had another lifetime: the standard library collects a
/// vector's iterator into the memory that it came from.
pub(super) fn recycled<'a>(mut rows: Vec<SequenceRows<'_>>) -> Vec<SequenceRows<'a>> {
    rows.clear();
    rows.into_iter()
        .map(|SequenceRows { first_row, rows, first_position, .. }| SequenceRows {
            first_row,
            rows,
            first_position,
            blocks: &[],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recycling_keeps_the_memory() {
        let before: Vec<SequenceRows<'_>> = Vec::with_capacity(7);
        let address = before.as_ptr();
        let after = recycled(before);
        assert!(after.is_empty());
        assert_eq!((after.as_ptr(), after.capacity()), (address, 7));
    }
}
