//! Planning a step while the one before computes.
//!
//! What a step chooses is known only when it is over, but nearly always a sequence goes on: so the next step is planned as if each had got
//! a token, whose value the device alone knows by then. [`Scheduler::assume`] takes a step that has begun for granted,
//! [`Scheduler::plan_ahead`] plans on that state, and [`Scheduler::finish`] brings the truth. A sequence that ends with
//! its token has a row in the next step that nobody looks at; its blocks come back when that step is over too.
//!
//! Only plans without surprises are made ahead: nobody loses blocks or is refused for a guess, and no peer is told of blocks.

use std::collections::BTreeSet;

use tidemill_kvtransfer_proto::units::TokenCount;

use crate::plan::{Admission, Purpose, StepPlan, Work};
use crate::request::RequestId;
use crate::scheduler::Scheduler;
use crate::sequence::{Sequence, Stage, count_tokens};

/// A step that has begun and not finished.
#[derive(Clone, Debug)]
pub(crate) struct Flight {
    /// Arrivals of the sequences that it computes: a name may be another sequence's by the time it is over.
    pub(crate) members: BTreeSet<u64>,
    pub(crate) is_assumed: bool,
}

impl Scheduler {
    /// Whether the next step may be planned before this one is over: all of its sequences compute here alone, and none has guesses.
    pub fn may_be_assumed(&self, plan: &StepPlan) -> bool {
        let runs_whole = |work: &Work| self.roster.get(work.request).is_some_and(Sequence::grows);
        let computes = |admission: &Admission| admission.purpose == Purpose::Compute;
        plan.refusals.is_empty()
            && plan.drafts.is_empty()
            && !plan.work.is_empty()
            && plan.work.iter().all(runs_whole)
            && plan.admissions.iter().all(computes)
    }

    /// Takes the only step that computes for granted: what it computes is there, and who samples has a token behind those that are
    /// known.
    ///
    /// # Panics
    ///
    /// When not exactly one step computes, or it was taken for granted before, or it [may not be](Self::may_be_assumed).
    pub fn assume(&mut self, plan: &StepPlan) {
        let [flight] = self.flights.make_contiguous() else { panic!("one step computes") };
        assert!(!std::mem::replace(&mut flight.is_assumed, true), "a step is taken for granted once");
        assert!(plan.drafts.is_empty() && plan.refusals.is_empty(), "a step without surprises");
        for work in &plan.work {
            let Some(sequence) = self.roster.get_mut(work.request) else { continue };
            if sequence.stage != Stage::Running || !flight.members.contains(&sequence.arrival) {
                continue;
            }
            assert!(sequence.grows(), "{:?} goes on here", work.request);
            sequence.computed = TokenCount(work.first.0 + work.count.0);
            sequence.awaits_token = work.samples;
        }
    }

    /// The step behind one that was [taken for granted](Self::assume), without drafts; `None` where that one's end has to come first.
    /// Changes nothing.
    pub fn plan_ahead(&self) -> Option<StepPlan> {
        let plan = self.plan();
        (plan.preemptions.is_empty() && self.may_be_assumed(&plan)).then_some(plan)
    }

    /// Whether the last token of a work is one that the step before chooses.
    pub fn awaits_token(&self, work: &Work) -> bool {
        let end = work.first.0 + work.count.0;
        self.roster.get(work.request).is_some_and(|it| it.awaits_token && it.known().0 < end)
    }

    /// Whether the step that finishes next computes the sequence that has this name now.
    pub fn is_computed(&self, request: RequestId) -> bool {
        let arrival = self.roster.get(request).map(|sequence| sequence.arrival);
        self.flights.front().zip(arrival).is_some_and(|(flight, arrival)| flight.members.contains(&arrival))
    }

    /// Whether a step that computes has work of this sequence.
    pub(crate) fn is_in_flight(&self, sequence: &Sequence) -> bool {
        self.flights.iter().any(|flight| flight.members.contains(&sequence.arrival))
    }

    /// Gives back the blocks of sequences that left and that no step computes any more.
    pub(crate) fn retire_left(&mut self) {
        let leaving = std::mem::take(&mut self.leaving);
        let (staying, left) = leaving.into_iter().partition(|sequence| self.is_in_flight(sequence));
        self.leaving = staying;
        let left: Vec<Sequence> = left;
        for sequence in left {
            self.pool.retire(sequence.chain(self.limits.block_len));
        }
    }
}

impl Sequence {
    /// How many tokens there are, with one that the step before chooses.
    pub(crate) fn expected(&self) -> TokenCount {
        TokenCount(self.known().0 + u32::from(self.awaits_token))
    }

    /// Whether the token that the step before chooses is its last, whatever it is.
    pub(crate) fn ends_with_awaited(&self, max_model_len: TokenCount) -> bool {
        let output = count_tokens(self.output().len()).0 + 1;
        self.awaits_token && (self.request.stop.max_tokens <= output || max_model_len <= self.expected())
    }
}
