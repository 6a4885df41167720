//! The state of the engine's decisions: which requests there are, and which blocks they have.
//!
//! A step goes `plan` (pure, in [`crate::plan`]) → [`begin`](Scheduler::begin), which hands out the blocks → the
//! device computes → [`finish`](Scheduler::finish), which takes the sampled tokens. Only these three change what
//! runs; everything else (submissions, cancellations, news of handoffs in [`crate::handoff`]) may come at any time,
//! also while the device computes, since blocks are given out in `begin` alone.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};

use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen, BlockRef, HandoffId, TokenCount};

use crate::ahead::Flight;
use crate::blocks::{BlockPool, Census, Ledger};
use crate::plan::{StepPlan, Work};
use crate::prefix_tree::CacheChanges;
use crate::request::{Part, Request, RequestId, TokenId};
use crate::roster::Roster;
use crate::sequence::{Place, Sequence, Stage};

pub use crate::step::Outcome;

/// What bounds a scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens per block.
    pub block_len: BlockLen,
    /// Prompt and output together, at most.
    pub max_model_len: TokenCount,
    /// Sequences in one step at most. As many again may be reserved, or adopted and waiting for a place.
    pub max_num_seqs: u32,
    /// Tokens in one step at most.
    pub max_num_batched_tokens: TokenCount,
    /// Requests that may wait.
    pub max_waiting: u32,
    /// Whether full blocks are kept for later prompts.
    pub prefix_cache: bool,
    /// Tokens of one prompt in one step at most, so that several prompts advance together; `None` sets no bound.
    pub long_prefill_threshold: Option<TokenCount>,
}

/// Why a request was refused at the door.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// Too many wait: later, or elsewhere.
    #[error("{limit} requests wait already")]
    QueueFull {
        /// How many may wait.
        limit: u32,
    },
    /// No room for even one output token within the model's length.
    #[error("{} tokens leave no room for output within a limit of {}", tokens.0, limit.0)]
    TooLong {
        /// Tokens of the request.
        tokens: TokenCount,
        /// The longest sequence.
        limit: TokenCount,
    },
    /// The tokens do not fit the KV cache even if nothing else were in it.
    #[error("{} blocks are needed, but the KV cache has {}", needed.0, total.0)]
    NeverFits {
        /// Blocks to hold the tokens.
        needed: BlockCount,
        /// Blocks there are.
        total: BlockCount,
    },
    /// A request of this name is here already.
    #[error("request {} is here already", .0.0)]
    Duplicate(RequestId),
    /// Nothing to compute.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt would end behind the last token.
    #[error("a prompt of {} tokens is announced, but {} tokens are given", prompt.0, tokens.0)]
    ShortPrompt {
        /// Announced length of the prompt.
        prompt: TokenCount,
        /// Tokens given.
        tokens: TokenCount,
    },
}

/// How many sequences are in which stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// They compute.
    pub running: u32,
    /// They wait for a place, or for a peer's blocks to compute in.
    pub waiting: u32,
    /// They wait for a peer's KV cache.
    pub reserved: u32,
    /// Their blocks are in a sender's hands.
    pub pushing: u32,
}

/// Sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tokens looked up in the prefix cache, once per request.
    pub prefix_queries: u64,
    /// Tokens found there.
    pub prefix_hits: u64,
    /// Sequences that lost their blocks and are computed again.
    pub preemptions: u64,
}

/// Requests and blocks of one worker.
#[derive(Clone, Debug)]
pub struct Scheduler {
    pub(crate) limits: Limits,
    pub(crate) pool: BlockPool,
    pub(crate) roster: Roster,
    /// Reservations that the driver has not taken yet: no peer knows their blocks.
    pub(crate) unannounced: Vec<RequestId>,
    pub(crate) quarantines: BTreeMap<HandoffId, Quarantine>,
    pub(crate) counters: Counters,
    /// Steps that compute, in their order: one, and one more that was planned ahead.
    pub(crate) flights: VecDeque<Flight>,
    /// Sequences that ended or were cancelled while a step computes them.
    pub(crate) leaving: Vec<Sequence>,
}

/// Blocks of a handoff that failed, until its peer is quiet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quarantine {
    /// The peer may still write to them.
    pub(crate) targets: Vec<BlockRef>,
    /// The peer may still read them.
    pub(crate) pinned: Vec<BlockRef>,
}

impl Scheduler {
    /// A scheduler without requests, with `blocks` free blocks.
    ///
    /// # Panics
    ///
    /// When a limit is zero that leaves nothing to do: `max_num_seqs` or `max_num_batched_tokens`.
    pub fn new(limits: Limits, blocks: BlockCount) -> Self {
        assert!(0 < limits.max_num_seqs, "a step has room for a sequence");
        assert!(0 < limits.max_num_batched_tokens.0, "a step has room for a token");
        assert_ne!(limits.long_prefill_threshold, Some(TokenCount(0)), "a long prompt advances in each step");
        Self {
            limits,
            pool: BlockPool::new(blocks, limits.block_len, limits.prefix_cache),
            roster: Roster::default(),
            unannounced: Vec::new(),
            quarantines: BTreeMap::new(),
            counters: Counters::default(),
            flights: VecDeque::new(),
            leaving: Vec::new(),
        }
    }

    /// The limits it was made with.
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes a request in. A prefill for another worker computes in own blocks and starts at once; its KV cache is
    /// sent when the peer's blocks are known.
    ///
    /// # Errors
    ///
    /// [`SubmitError`], and then nothing has changed.
    pub fn submit(&mut self, request: Request) -> Result<(), SubmitError> {
        self.refuse_at_the_door(&request)?;
        let block_len = self.limits.block_len;
        let sequence = Sequence::new(request, Place::OwnBlocks, Stage::Waiting, block_len);
        let (needed, total) = (sequence.blocks_to_hold(block_len), self.pool.ledger().total);
        if total < needed {
            return Err(SubmitError::NeverFits { needed, total });
        }
        self.roster.insert(sequence);
        Ok(())
    }

    /// Takes in a prefill whose peer's memory can be computed in directly. It waits, and stops nobody, until the
    /// driver says where: [`use_targets`](Self::use_targets) or [`use_own_blocks`](Self::use_own_blocks).
    ///
    /// # Errors
    ///
    /// [`SubmitError`], and then nothing has changed.
    ///
    /// # Panics
    ///
    /// When the request is not [`Part::PrefillFor`] another worker.
    pub fn submit_in_place(&mut self, request: Request) -> Result<(), SubmitError> {
        assert!(matches!(request.part, Part::PrefillFor(_)), "only a prefill computes in a peer's memory");
        self.refuse_at_the_door(&request)?;
        let block_len = self.limits.block_len;
        self.roster.insert(Sequence::new(request, Place::Targets, Stage::AwaitingTargets, block_len));
        Ok(())
    }

    /// A sequence that is here.
    pub fn sequence(&self, id: RequestId) -> Option<&Sequence> {
        self.roster.get(id)
    }

    /// The prompt and all output so far; empty when the request is not here.
    pub fn tokens(&self, id: RequestId) -> &[TokenId] {
        self.roster.get(id).map_or(&[], Sequence::tokens)
    }

    /// The tokens that a work of `plan` computes, guesses included; zero for one that it [awaits](Self::awaits_token).
    pub fn work_tokens(&self, plan: &StepPlan, work: &Work) -> Cow<'_, [TokenId]> {
        let first = work.first.0 as usize;
        if self.awaits_token(work) {
            return Cow::Owned([&self.tokens(work.request)[first..], &[0]].concat());
        }
        let known = &self.tokens(work.request)[first..first + work.count.0 as usize];
        match plan.draft(work) {
            [] => Cow::Borrowed(known),
            draft => Cow::Owned([known, draft].concat()),
        }
    }

    /// The blocks of a sequence in order of position; empty when it computes in its peer's memory.
    pub fn block_table(&self, id: RequestId) -> &[BlockRef] {
        self.roster.get(id).map_or(&[], |sequence| &sequence.blocks)
    }

    /// Where the blocks are.
    pub const fn ledger(&self) -> Ledger {
        self.pool.ledger()
    }

    /// How many sequences are in which stage.
    pub fn counts(&self) -> Counts {
        Counts {
            running: self.roster.count(Stage::Running),
            waiting: self.roster.count(Stage::Waiting) + self.roster.count(Stage::AwaitingTargets),
            reserved: self.roster.count(Stage::Reserved),
            pushing: self.roster.count(Stage::Pushing),
        }
    }

    /// Sums since the start.
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Prompt tokens that wait to be computed here: what a new prompt would queue behind.
    pub fn queued_tokens(&self) -> u64 {
        let waiting =
            self.roster.in_stage(Stage::Waiting).chain(self.roster.in_stage(Stage::AwaitingTargets));
        let computes = |sequence: &&Sequence| !matches!(sequence.request.part, Part::DecodeFrom(_));
        let prefills = |sequence: &&Sequence| 1 < sequence.remaining().0;
        waiting
            .filter(computes)
            .chain(self.roster.in_stage(Stage::Running).filter(prefills))
            .map(|sequence| u64::from(sequence.remaining().0))
            .sum()
    }

    /// Changes of the prefix cache since the last call.
    pub fn take_cache_changes(&mut self) -> CacheChanges {
        self.pool.take_cache_changes()
    }

    /// Every chained hash that the prefix cache has now, for a listener that starts anew.
    pub fn cached_hashes(&self) -> impl Iterator<Item = u64> + '_ {
        self.pool.cached_hashes()
    }

    /// Adds blocks and names them. Numbers withdrawn before come back first.
    pub fn add_blocks(&mut self, count: BlockCount) -> Vec<BlockId> {
        self.pool.add(count)
    }

    /// Takes up to `count` unused blocks away and names them.
    ///
    /// # Panics
    ///
    /// While a step computes: it may still write to the blocks of a request that was cancelled meanwhile.
    pub fn withdraw_blocks(&mut self, count: BlockCount) -> Vec<BlockId> {
        assert!(self.flights.is_empty(), "blocks are withdrawn between steps");
        self.pool.withdraw(count)
    }

    /// Asserts what must always hold: the ledger adds up, and each block has exactly the users that know it.
    ///
    /// # Panics
    ///
    /// When it does not: a bug in this crate.
    pub fn check(&self) {
        self.pool.check();
        self.roster.check();
        let mut held: BTreeMap<BlockRef, u32> = BTreeMap::new();
        let mut exclusive: BTreeMap<BlockRef, Census> = BTreeMap::new();
        self.roster.all().for_each(|sequence| sequence_checks(sequence, &self.limits));
        for sequence in self.roster.all().chain(&self.leaving) {
            let shared =
                if sequence.stage == Stage::Reserved { sequence.pinned } else { sequence.blocks.len() };
            for block in &sequence.blocks[..shared] {
                *held.entry(*block).or_default() += 1;
            }
            for block in &sequence.blocks[shared..] {
                assert_eq!(exclusive.insert(*block, Census::Reserved), None, "{block:?} is reserved twice");
            }
        }
        for quarantine in self.quarantines.values() {
            for block in &quarantine.pinned {
                *held.entry(*block).or_default() += 1;
            }
            for block in &quarantine.targets {
                assert_eq!(exclusive.insert(*block, Census::Quarantined), None, "{block:?} has two owners");
            }
        }
        for (block, census) in self.pool.census() {
            let users = held.remove(&block).map(Census::Held);
            let owner = exclusive.remove(&block);
            assert!(users.is_none() || owner.is_none(), "{block:?} is used while a peer may write to it");
            let expected = users.or(owner).unwrap_or(Census::Unused);
            assert_eq!(census, expected, "{block:?} is used otherwise than its users know");
        }
        assert!(
            held.is_empty() && exclusive.is_empty(),
            "blocks are used that are not in the pool: {held:?}"
        );
        for id in &self.unannounced {
            let sequence = self.roster.get(*id).expect("an unannounced reservation has its sequence");
            assert_eq!(sequence.stage, Stage::Reserved, "{id:?} is to be announced");
        }
    }

    fn refuse_at_the_door(&self, request: &Request) -> Result<(), SubmitError> {
        let tokens = TokenCount(u32::try_from(request.tokens.len()).unwrap_or(u32::MAX));
        let (prompt, limit) = (request.prompt_len, self.limits.max_model_len);
        if prompt == TokenCount(0) || tokens == TokenCount(0) {
            return Err(SubmitError::EmptyPrompt);
        }
        if tokens < prompt {
            return Err(SubmitError::ShortPrompt { prompt, tokens });
        }
        if limit <= tokens {
            return Err(SubmitError::TooLong { tokens, limit });
        }
        if self.roster.get(request.id).is_some() {
            return Err(SubmitError::Duplicate(request.id));
        }
        if self.limits.max_waiting <= self.counts().waiting {
            return Err(SubmitError::QueueFull { limit: self.limits.max_waiting });
        }
        Ok(())
    }

    /// Sequences that can all advance in one step: each needs a token of the budget.
    pub(crate) fn places(&self) -> u32 {
        self.limits.max_num_seqs.min(self.limits.max_num_batched_tokens.0)
    }
}

/// What must hold of a single sequence.
fn sequence_checks(sequence: &Sequence, limits: &Limits) {
    let id = sequence.id();
    assert!(sequence.computed < sequence.expected(), "{id:?} has something to compute");
    assert!(sequence.known() <= limits.max_model_len, "{id:?} outgrew the model");
    let full = sequence.known().blocks_filled(limits.block_len).0 as usize;
    assert_eq!(sequence.hashes.len(), full, "{id:?} has a hash for each full block");
    match (sequence.stage, sequence.place) {
        (Stage::Waiting | Stage::AwaitingTargets, _) | (_, Place::Targets) => {
            assert!(sequence.blocks.is_empty(), "{id:?} has no blocks here");
        }
        (Stage::Running, _) => {
            let held = crate::sequence::count_blocks(sequence.blocks.len());
            assert!(sequence.computed.0 <= held.tokens(limits.block_len).0, "{id:?} holds what it computed");
        }
        (Stage::Reserved | Stage::Pushing, _) => {}
    }
}
