//! A request while this worker has it: its tokens, how far they are computed, and the blocks they are in.

use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, BlockRef, TokenCount};

use crate::blocks::Chain;
use crate::prefix_tree::extend_chain;
use crate::request::{Part, Request, RequestId, TokenId};

/// Where a sequence is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// In the queue. It has no blocks.
    Waiting,
    /// A prefill that will write into its peer's blocks, which are not known yet.
    AwaitingTargets,
    /// Computes: a prompt, or token after token.
    Running,
    /// Its blocks wait for a peer's KV cache.
    Reserved,
    /// Its prompt is done, or it was cancelled; its blocks stay until the sender is quiet.
    Pushing,
}

/// Whose blocks a sequence computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Blocks of this worker's pool.
    OwnBlocks,
    /// The blocks that the decode worker reserved: nothing is left to move when the prompt is done.
    Targets,
}

/// A request while this worker has it.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// `request.tokens` grows with the output.
    pub(crate) request: Request,
    /// Rises with each submission; never changes, so that a preempted sequence is as old as before.
    pub(crate) arrival: u64,
    pub(crate) stage: Stage,
    pub(crate) place: Place,
    pub(crate) computed: TokenCount,
    pub(crate) blocks: Vec<BlockRef>,
    /// Leading blocks that the prefix tree knows as this sequence's.
    pub(crate) indexed: usize,
    /// Leading blocks of a reservation that were found in the prefix cache.
    pub(crate) pinned: usize,
    /// Chained hashes of the full blocks of `request.tokens`.
    pub(crate) hashes: Vec<u64>,
    /// Tokens found in the prefix cache at the first admission.
    pub(crate) cached: Option<TokenCount>,
    /// Whether a step computes that chooses the next token behind those that are known, and was
    /// [taken for granted](crate::scheduler::Scheduler::assume).
    pub(crate) awaits_token: bool,
}

impl Sequence {
    pub(crate) fn new(request: Request, place: Place, stage: Stage, block_len: BlockLen) -> Self {
        let mut sequence = Self {
            request,
            arrival: 0,
            stage,
            place,
            computed: TokenCount(0),
            blocks: Vec::new(),
            indexed: 0,
            pinned: 0,
            hashes: Vec::new(),
            cached: None,
            awaits_token: false,
        };
        sequence.extend_hashes(block_len);
        sequence
    }

    /// The request; its tokens are the prompt and all output so far. Its part is `Whole` once it was adopted.
    pub const fn request(&self) -> &Request {
        &self.request
    }

    /// Its name.
    pub const fn id(&self) -> RequestId {
        self.request.id
    }

    /// The prompt and all output so far.
    pub fn tokens(&self) -> &[TokenId] {
        &self.request.tokens
    }

    /// The output so far.
    pub fn output(&self) -> &[TokenId] {
        &self.request.tokens[self.request.prompt_len.0 as usize..]
    }

    /// How many tokens there are.
    pub fn known(&self) -> TokenCount {
        count_tokens(self.request.tokens.len())
    }

    /// How many tokens have their keys and values in the cache.
    pub const fn computed(&self) -> TokenCount {
        self.computed
    }

    /// Tokens that must be computed before the next one can be sampled, with one that the step before chooses. One for a sequence
    /// that decodes.
    pub fn remaining(&self) -> TokenCount {
        TokenCount(self.expected().0 - self.computed.0)
    }

    /// Where it is in its life.
    pub const fn stage(&self) -> Stage {
        self.stage
    }

    /// Whose blocks it computes in.
    pub const fn place(&self) -> Place {
        self.place
    }

    /// Tokens that were found in the prefix cache when it was admitted first.
    pub fn cached_tokens(&self) -> TokenCount {
        self.cached.unwrap_or_default()
    }

    /// Whether it decodes here, and so needs more blocks as it goes. Only such a sequence can be preempted: it can be
    /// computed again at any time, while the blocks of a prefill may be in a sender's hands.
    pub fn grows(&self) -> bool {
        self.request.part == Part::Whole
    }

    /// Whether it is a token behind its output that it lacks: what a draft may guess at.
    pub fn decodes(&self) -> bool {
        self.grows() && self.remaining() == TokenCount(1) && !self.output().is_empty()
    }

    /// How many guesses at its next tokens could be of use: a step gives one more token than guesses were right, and
    /// it may not outgrow the request or the model.
    pub fn useful_drafts(&self, max_model_len: TokenCount) -> TokenCount {
        let wanted = self.request.stop.max_tokens.saturating_sub(count_tokens(self.output().len()).0);
        let fits = max_model_len.0.saturating_sub(self.known().0);
        TokenCount(wanted.min(fits).saturating_sub(1))
    }

    /// Blocks to hold all its tokens.
    pub(crate) fn blocks_to_hold(&self, block_len: BlockLen) -> BlockCount {
        self.expected().blocks_to_hold(block_len)
    }

    /// Blocks it lacks to compute `more` tokens.
    pub(crate) fn blocks_to_grow(&self, more: TokenCount, block_len: BlockLen) -> BlockCount {
        if self.place == Place::Targets {
            return BlockCount(0);
        }
        let needed = TokenCount(self.computed.0 + more.0).blocks_to_hold(block_len);
        BlockCount(needed.0.saturating_sub(count_blocks(self.blocks.len()).0))
    }

    /// Blocks that may come from the prefix cache: never the last token's, whose logits are wanted, and none for a
    /// request that wants the logits of its prompt.
    pub(crate) fn blocks_to_look_up(&self, block_len: BlockLen) -> BlockCount {
        if self.request.sampling.prompt_logprobs.is_some() {
            return BlockCount(0);
        }
        TokenCount(self.known().0 - 1).blocks_filled(block_len)
    }

    pub(crate) fn extend_hashes(&mut self, block_len: BlockLen) {
        extend_chain(&mut self.hashes, &self.request.tokens, block_len);
    }

    /// Its full blocks as the prefix cache sees them: none when it computes in its peer's memory.
    pub(crate) fn chain(&self, block_len: BlockLen) -> Chain<'_> {
        Chain {
            tokens: &self.request.tokens,
            hashes: &self.hashes,
            blocks: &self.blocks,
            indexed: self.indexed,
            full: (self.computed.blocks_filled(block_len).0 as usize).min(self.blocks.len()),
        }
    }

    /// Forgets blocks and progress; the caller has given the blocks back.
    pub(crate) fn start_over(&mut self) {
        self.blocks.clear();
        self.computed = TokenCount(0);
        self.indexed = 0;
        self.pinned = 0;
    }
}

pub(crate) fn count_tokens(len: usize) -> TokenCount {
    TokenCount(u32::try_from(len).expect("max_model_len bounds a sequence below 2^32 tokens"))
}

pub(crate) fn count_blocks(len: usize) -> BlockCount {
    BlockCount(u32::try_from(len).expect("a sequence has fewer blocks than tokens"))
}
