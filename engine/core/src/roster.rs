//! All sequences, by name and, within each stage, in order of arrival.
//!
//! Policy speaks of "the oldest that waits" and "the latest that runs"; here these are the ends of a map, and
//! [`Roster::move_to`] is the only way from one stage to another.

use std::collections::BTreeMap;

use crate::request::RequestId;
use crate::sequence::{Sequence, Stage};

/// All sequences of a scheduler.
#[derive(Clone, Debug, Default)]
pub(crate) struct Roster {
    sequences: BTreeMap<RequestId, Sequence>,
    stages: BTreeMap<Stage, BTreeMap<u64, RequestId>>,
    arrivals: u64,
}

impl Roster {
    /// Takes a new sequence in as the latest arrival.
    pub(crate) fn insert(&mut self, mut sequence: Sequence) {
        self.arrivals += 1;
        sequence.arrival = self.arrivals;
        self.stages.entry(sequence.stage).or_default().insert(sequence.arrival, sequence.id());
        let before = self.sequences.insert(sequence.id(), sequence);
        assert!(before.is_none(), "a name is used by one sequence at a time");
    }

    pub(crate) fn get(&self, id: RequestId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: RequestId) -> Option<&mut Sequence> {
        self.sequences.get_mut(&id)
    }

    pub(crate) fn remove(&mut self, id: RequestId) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        self.stages.entry(sequence.stage).or_default().remove(&sequence.arrival);
        Some(sequence)
    }

    /// # Panics
    ///
    /// When there is no such sequence.
    pub(crate) fn move_to(&mut self, id: RequestId, stage: Stage) {
        let sequence = self.sequences.get_mut(&id).expect("only a known sequence changes its stage");
        let from = std::mem::replace(&mut sequence.stage, stage);
        self.stages.entry(from).or_default().remove(&sequence.arrival);
        self.stages.entry(stage).or_default().insert(sequence.arrival, id);
    }

    /// The sequences of one stage, oldest first.
    pub(crate) fn in_stage(&self, stage: Stage) -> impl DoubleEndedIterator<Item = &Sequence> {
        self.stages.get(&stage).into_iter().flatten().map(|(_, id)| &self.sequences[id])
    }

    pub(crate) fn count(&self, stage: Stage) -> u32 {
        let count = self.stages.get(&stage).map_or(0, BTreeMap::len);
        u32::try_from(count).expect("fewer than 2^32 sequences")
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values()
    }

    /// # Panics
    ///
    /// When an invariant does not hold: a bug in this crate.
    pub(crate) fn check(&self) {
        let mut listed = 0;
        for (stage, order) in &self.stages {
            for (arrival, id) in order {
                let sequence = self.sequences.get(id).expect("a listed sequence exists");
                assert_eq!(
                    (sequence.stage, sequence.arrival),
                    (*stage, *arrival),
                    "{id:?} is listed wrongly"
                );
                listed += 1;
            }
        }
        assert_eq!(listed, self.sequences.len(), "each sequence is listed once");
    }
}
