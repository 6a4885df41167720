//! Guesses by prompt lookup, for all sequences of a worker.

use std::collections::BTreeMap;

use super::acceptance::Acceptance;
use super::lookup::Lookup;
use super::{MEMORY_OF_ALL, MEMORY_OF_ONE, WEIGHT_OF_ALL, WEIGHT_OF_PRIOR};
use crate::request::{RequestId, TokenId};
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;

/// Who copies what followed the last tokens where they occurred before.
#[derive(Clone, Debug)]
pub(super) struct PromptLookup {
    shortest_match: u32,
    longest_match: u32,
    followed: BTreeMap<RequestId, Followed>,
    /// Of all requests: what a new one begins with.
    acceptance: Acceptance,
}

/// A sequence for which guesses are made.
#[derive(Clone, Debug)]
struct Followed {
    lookup: Lookup,
    acceptance: Acceptance,
}

impl PromptLookup {
    pub(super) fn new(shortest_match: u32, longest_match: u32) -> Self {
        assert!(0 < shortest_match && shortest_match <= longest_match, "a match has a token");
        Self {
            shortest_match,
            longest_match,
            followed: BTreeMap::new(),
            acceptance: Acceptance::new(MEMORY_OF_ALL),
        }
    }

    /// Forgets sequences that are gone.
    pub(super) fn forget(&mut self, scheduler: &Scheduler) {
        self.followed.retain(|id, _| scheduler.sequence(*id).is_some());
    }

    /// Brings the lookup of a sequence up to date; returns the chances of at most `limit` guesses.
    pub(super) fn chances(&mut self, sequence: &Sequence, limit: u32) -> Vec<f32> {
        let Self { shortest_match, longest_match, followed, acceptance: everyone } = self;
        let Followed { lookup, acceptance } = followed.entry(sequence.id()).or_insert_with(|| Followed {
            lookup: Lookup::new(*shortest_match, *longest_match),
            acceptance: Acceptance::new(MEMORY_OF_ONE),
        });
        lookup.follow(sequence.tokens(), sequence.request().prompt_len.0 as usize, |evidence, right| {
            acceptance.record(evidence, right);
            everyone.record(evidence, right);
        });
        let Some(found) = lookup.found() else { return Vec::new() };
        // A right guess makes the match longer by itself.
        (found.length..found.length + limit as usize)
            .scan(1.0, |all_before, evidence| {
                let prior = 1.0 - 1.0 / (evidence + 1) as f32;
                let of_all = everyone.chance(evidence, prior, WEIGHT_OF_PRIOR);
                *all_before *= acceptance.chance(evidence, of_all, WEIGHT_OF_ALL);
                Some(*all_before)
            })
            .collect()
    }

    /// So many guesses for a sequence whose chances were asked for.
    pub(super) fn draft(&self, sequence: &Sequence, count: usize) -> Vec<TokenId> {
        self.followed[&sequence.id()].lookup.draft(sequence.tokens(), count)
    }
}
