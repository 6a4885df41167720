//! Why a handoff failed, grouped by what the caller should do next.

use crate::layout::LayoutMismatch;
use crate::units::BlockRef;

/// A handoff that did not complete.
///
/// A variant exists where a caller acts differently; the numbers ride along as fields, so that one log line is
/// enough to start looking.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// No connection to that worker, and no address to make one.
    #[error("no way to reach worker {instance:016x}")]
    PeerUnknown {
        /// The worker's instance number.
        instance: u64,
    },
    /// The worker went away or fell silent.
    #[error("peer {peer} is lost: {reason}")]
    PeerLost {
        /// Its name.
        peer: String,
        /// How it showed.
        reason: String,
    },
    /// The prefill side will not do it.
    #[error("peer declined: {reason}")]
    Declined {
        /// Its words.
        reason: String,
    },
    /// The decode side did not accept the commit, or a write.
    #[error("peer refused: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// This side did not accept the commit.
    #[error("commit is not acceptable: {0}")]
    BadCommit(#[from] CommitFault),
    /// One of the two sides no longer wants it.
    #[error("cancelled")]
    Cancelled,
    /// The prefill side gave up.
    #[error("abandoned: {reason}")]
    Abandoned {
        /// Its words.
        reason: String,
    },
    /// The other side's part of the handoff never came.
    #[error("nothing heard of the handoff in time")]
    Expired,
    /// Too many handoffs wait already.
    #[error("{limit} handoffs wait already")]
    Full {
        /// How many may.
        limit: usize,
    },
    /// The two sides' bytes mean different things.
    #[error(transparent)]
    Layout(#[from] LayoutMismatch),
    /// The engine asked for something that cannot be.
    #[error("not a valid handoff: {what}")]
    Invalid {
        /// What is wrong with it.
        what: &'static str,
    },
}

/// What is wrong with a commit record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitFault {
    /// It speaks of another number of tokens.
    #[error("it covers {theirs} tokens, reserved were {ours}")]
    Tokens {
        /// Reserved.
        ours: u32,
        /// Committed.
        theirs: u32,
    },
    /// It names other blocks, or the right ones in another generation.
    #[error("target {index} is {ours:?} here and {theirs:?} in the commit")]
    Target {
        /// Position among the targets.
        index: usize,
        /// What was reserved.
        ours: Option<BlockRef>,
        /// What the commit names.
        theirs: Option<BlockRef>,
    },
    /// It comes before this side has read what it is about.
    #[error("it comes while {reads} pieces are still being read")]
    Early {
        /// Pieces.
        reads: u64,
    },
    /// It has not one digest for each target.
    #[error("it has {digests} digests for {targets} targets")]
    Shape {
        /// Digests it has.
        digests: usize,
        /// Targets it has.
        targets: usize,
    },
    /// It does not go on where the blocks end that were named ahead of it.
    #[error("it goes on from target {first}, but {named} were named before it")]
    Order {
        /// Where it goes on.
        first: usize,
        /// Targets that were named ahead.
        named: usize,
    },
    /// It does not stand for what was named ahead of it and in it.
    #[error("its seal is not that of the blocks and digests that were named")]
    Seal,
    /// The bytes of a block are not those that were sent.
    #[error("the bytes of target {index} are not those that were sent")]
    Digest {
        /// Position among the targets.
        index: usize,
    },
}

/// What the router does with the request that owned a failed handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Reserve again on the same pair: nothing is known to be wrong with it.
    Again,
    /// Take another pair, or decode alone.
    Reroute,
    /// The workers disagree about the meaning of bytes: no later attempt on this pair can succeed.
    NeverThisPair,
}

impl TransferError {
    /// Whether something went wrong, rather than that one of the two sides did not want it any more.
    pub const fn is_failure(&self) -> bool {
        !matches!(self, Self::Cancelled | Self::Abandoned { .. })
    }

    /// The one place where failures turn into policy.
    pub fn recovery(&self) -> Recovery {
        match self {
            Self::Refused { .. } | Self::BadCommit(_) => Recovery::Again,
            Self::PeerUnknown { .. }
            | Self::PeerLost { .. }
            | Self::Declined { .. }
            | Self::Cancelled
            | Self::Abandoned { .. }
            | Self::Expired
            | Self::Full { .. }
            | Self::Invalid { .. } => Recovery::Reroute,
            Self::Layout(_) => Recovery::NeverThisPair,
        }
    }
}
