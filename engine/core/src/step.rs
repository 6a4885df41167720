//! Carries plans out: the only place where blocks are given out and sequences advance.

use std::collections::BTreeMap;

use tidemill_kvtransfer_proto::units::TokenCount;

use crate::ahead::Flight;
use crate::blocks::Chain;
use crate::plan::{Admission, Purpose, StepPlan, Work};
use crate::request::{FinishReason, Part, RequestId, TokenId};
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Place, Stage, count_blocks};

/// What happened to a request in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has one more output token.
    Token {
        /// Which request.
        request: RequestId,
        /// The token.
        token: TokenId,
        /// Its number among the output tokens, from 0.
        index: u32,
        /// Whether and why it is the last. The sequence is gone then, unless it is a prefill for another worker: that
        /// one always ends with [`Scheduler::pushed`].
        finish: Option<FinishReason>,
        /// Tokens found in the prefix cache when it was admitted first.
        cached: TokenCount,
    },
    /// The request no longer fits the pool even alone, since the pool shrank or the output grew. It is gone.
    NoRoom {
        /// Which request.
        request: RequestId,
    },
}

impl Scheduler {
    /// Carries out the decisions of a plan and gives out its blocks; [`block_table`](Self::block_table) is then right
    /// for the step.
    ///
    /// # Panics
    ///
    /// When the plan was not made for exactly this state, or the step before has neither finished nor been
    /// [taken for granted](Self::assume).
    pub fn begin(&mut self, plan: &StepPlan) {
        match self.flights.make_contiguous() {
            [] => {}
            [before] => {
                assert!(before.is_assumed, "a step finishes before the next begins");
                assert!(plan.preemptions.is_empty(), "nobody loses blocks while they are computed");
            }
            _ => panic!("at most one step is planned ahead"),
        }
        for id in &plan.preemptions {
            self.preempt(*id);
        }
        // Hits are taken before anything is given out, since giving out may evict.
        for admission in &plan.admissions {
            self.pool.share(&admission.cached);
        }
        for admission in &plan.admissions {
            self.admit(admission);
        }
        for work in &plan.work {
            let sequence = self.roster.get_mut(work.request).expect("planned from this state");
            assert_eq!(sequence.computed, work.first, "the plan was made for this state");
            let more = sequence.blocks_to_grow(work.rows(), self.limits.block_len);
            sequence.blocks.extend(self.pool.hold(more));
        }
        let arrival = |work: &Work| self.roster.get(work.request).expect("planned from this state").arrival;
        let members = plan.work.iter().map(arrival).collect();
        self.flights.push_back(Flight { members, is_assumed: false });
    }

    /// Takes the result of the step: `sampled` has the token of each work that samples, and after it, in order, one more
    /// for each leading guess of its draft that was right. A request that was cancelled since `begin` needs none, and
    /// those given for it are ignored, as are tokens behind one that ends a request. Refused requests end here.
    ///
    /// # Panics
    ///
    /// When the step has not begun, a token is missing, or one follows a wrong guess.
    pub fn finish(&mut self, plan: &StepPlan, sampled: &[(RequestId, TokenId)]) -> Vec<Outcome> {
        let Flight { members, is_assumed } =
            self.flights.pop_front().expect("a step begins before it finishes");
        let mut by_request: BTreeMap<RequestId, Vec<TokenId>> = BTreeMap::new();
        for (request, token) in sampled {
            by_request.entry(*request).or_default().push(*token);
        }
        let mut outcomes = Vec::new();
        for request in &plan.refusals {
            if self.roster.get(*request).is_some() {
                self.let_go(*request);
                outcomes.push(Outcome::NoRoom { request: *request });
            }
        }
        for work in &plan.work {
            let Some(sequence) = self.roster.get_mut(work.request) else { continue };
            if sequence.stage != Stage::Running || !members.contains(&sequence.arrival) {
                continue;
            }
            let computed = TokenCount(work.first.0 + work.count.0);
            assert!(!is_assumed || sequence.computed == computed, "as it was taken for granted");
            sequence.computed = computed;
            self.index_full_blocks(work.request, work.count);
            if work.samples {
                let tokens = by_request.get(&work.request).expect("each work that samples has a token");
                self.append_verified(work.request, tokens, plan.draft(work), &mut outcomes);
            }
        }
        self.retire_left();
        outcomes
    }

    /// Gives a sequence its next token and those behind right guesses, then takes back the blocks that only wrong
    /// guesses needed: by the next plan there is no trace of them.
    fn append_verified(
        &mut self,
        id: RequestId,
        tokens: &[TokenId],
        draft: &[TokenId],
        outcomes: &mut Vec<Outcome>,
    ) {
        let follow_right_guesses =
            draft.iter().zip(tokens).take(tokens.len() - 1).all(|(it, token)| it == token);
        assert!(
            tokens.len() <= draft.len() + 1 && follow_right_guesses,
            "a token follows a guess that was right"
        );
        for (guesses, token) in tokens.iter().enumerate() {
            if 0 < guesses {
                // The token before was guessed: its keys and values are there.
                let sequence = self.roster.get_mut(id).expect("it has not ended");
                sequence.computed.0 += 1;
                self.index_full_blocks(id, TokenCount(1));
            }
            let outcome = self.append(id, *token);
            outcomes.push(outcome);
            if let Outcome::Token { finish: Some(_), .. } = outcome {
                return;
            }
        }
        if !draft.is_empty() {
            let sequence = self.roster.get_mut(id).expect("it has not ended");
            let needed = sequence.computed.blocks_to_hold(self.limits.block_len).0 as usize;
            let surplus = sequence.blocks.split_off(needed);
            self.pool.release(&surplus);
        }
    }

    fn admit(&mut self, admission: &Admission) {
        let block_len = self.limits.block_len;
        let sequence = self.roster.get_mut(admission.request).expect("planned from this state");
        assert_eq!(sequence.stage, Stage::Waiting, "only a waiting sequence is admitted");
        let fresh = match admission.purpose {
            Purpose::Compute => self.pool.hold(admission.fresh),
            Purpose::Reserve => self.pool.reserve(admission.fresh),
        };
        if sequence.place == Place::OwnBlocks {
            let hits = admission.cached.len();
            sequence.computed = count_blocks(hits).tokens(block_len);
            sequence.indexed = hits;
            sequence.pinned = hits;
            sequence.blocks = admission.cached.iter().copied().chain(fresh).collect();
            if sequence.cached.is_none() {
                sequence.cached = Some(sequence.computed);
                self.counters.prefix_queries += u64::from(sequence.known().0);
                self.counters.prefix_hits += u64::from(sequence.computed.0);
            }
        }
        match admission.purpose {
            Purpose::Compute => self.roster.move_to(admission.request, Stage::Running),
            Purpose::Reserve => {
                self.unannounced.push(admission.request);
                self.roster.move_to(admission.request, Stage::Reserved);
            }
        }
    }

    fn preempt(&mut self, id: RequestId) {
        let sequence = self.roster.get_mut(id).expect("planned from this state");
        assert!(sequence.grows() && !sequence.awaits_token, "only a sequence that decodes here is preempted");
        self.pool.retire(sequence.chain(self.limits.block_len));
        sequence.start_over();
        self.roster.move_to(id, Stage::Waiting);
        self.counters.preemptions += 1;
    }

    /// Makes blocks findable that have become full: those of the `computed` tokens that are new, and a few of those left. An
    /// adoption brings all blocks of a prompt at once; the next token does not wait until all of them can be found.
    pub(crate) fn index_full_blocks(&mut self, id: RequestId, computed: TokenCount) {
        let block_len = self.limits.block_len;
        let sequence = self.roster.get_mut(id).expect("the caller has just seen it");
        let at_most = computed.blocks_to_hold(block_len).0 as usize + INDEXED_BESIDE;
        let chain = sequence.chain(block_len);
        let full = chain.full.min(chain.indexed + at_most);
        sequence.indexed = self.pool.index(Chain { full, ..chain });
    }

    /// Gives a sequence its next token.
    pub(crate) fn append(&mut self, id: RequestId, token: TokenId) -> Outcome {
        let Limits { block_len, max_model_len, .. } = self.limits;
        let sequence = self.roster.get_mut(id).expect("the caller has just seen it");
        let index = sequence.known().0 - sequence.request.prompt_len.0;
        sequence.request.tokens.push(token);
        sequence.awaits_token = false;
        sequence.extend_hashes(block_len);
        let full = (max_model_len <= sequence.known()).then_some(FinishReason::Length);
        let finish = sequence.request.stop.reason(token, index).or(full);
        let cached = sequence.cached_tokens();
        if let Part::PrefillFor(_) = sequence.request.part {
            self.roster.move_to(id, Stage::Pushing);
        } else if finish.is_some() {
            self.let_go(id);
        }
        Outcome::Token { request: id, token, index, finish, cached }
    }

    /// Ends a sequence; its full blocks stay in the prefix cache. A step that computes it keeps them until it is over.
    pub(crate) fn let_go(&mut self, id: RequestId) {
        if let Some(sequence) = self.roster.remove(id) {
            self.leaving.push(sequence);
            self.retire_left();
        }
    }
}

/// Blocks that are made findable beside those that a step has filled: some ten microseconds.
const INDEXED_BESIDE: usize = 32;
