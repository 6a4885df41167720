//! What two workers say to each other over their control connection.
//!
//! These are the types that the state machines speak; how they look on the wire is the business of
//! [`codec`](crate::codec) alone, so that a field can be added there without touching a decision here.

use std::time::Duration;

use crate::credit::Ask;
use crate::digest::Coverage;
use crate::endpoint_core::QuietProof;
use crate::layout::KvLayout;
use crate::path::PathEnd;
use crate::units::{BlockRef, HandoffId, TokenCount};

/// One message of the control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// First message of whoever opened the connection.
    Hello(Hello),
    /// Answer to a [`Hello`] that is acceptable.
    Welcome(Welcome),
    /// Answer to a [`Hello`] that is not. Last message.
    Refuse(Refuse),
    /// First message on a second connection (TCP data, or the local socket that passes memory): says to which
    /// control connection it belongs.
    Attach(Attach),
    /// Ends of RDMA connections, before `Ready` and only where both sides offer RDMA: first from whoever opened the
    /// connection, then from the other side, one for each.
    Paths(Paths),
    /// The path for data is set up. Each side sends one; after that, handoffs may begin.
    Ready(Ready),
    /// Decode side: these blocks wait for the KV of that handoff.
    Reserve(Reserve),
    /// Prefill side: will not do it, and has touched none of the blocks.
    Decline {
        /// Which handoff.
        handoff: HandoffId,
        /// Why, for logs.
        reason: String,
    },
    /// Prefill side: has bytes that wait for leave to be written, or is through with some. Only where the way for data
    /// takes credit, see [`credit`](crate::credit).
    Ask {
        /// Which handoff.
        handoff: HandoffId,
        /// How much.
        ask: Ask,
    },
    /// Decode side: bytes of a handoff that may be written now, all that were asked for.
    Grant {
        /// Which handoff.
        handoff: HandoffId,
        /// How many, counted from the first.
        bytes: u64,
    },
    /// Prefill side: bytes that wait to be read. Only where the decode side reads, see
    /// [`Hello::pulls`].
    Offer(Offered),
    /// Decode side: has done with the first so many pieces that were offered, and reads none of them any more.
    Fetched {
        /// Which handoff.
        handoff: HandoffId,
        /// How many pieces, counted from the first.
        pieces: u64,
    },
    /// Prefill side: these blocks hold what they are to hold. Only where the prompt is computed in the blocks themselves.
    Filled(Filled),
    /// Prefill side: everything is written.
    Commit(Commit),
    /// Decode side: verified and taken over. The prefill side may free its blocks.
    Adopted {
        /// Which handoff.
        handoff: HandoffId,
    },
    /// Decode side: the commit is not acceptable.
    Refused {
        /// Which handoff.
        handoff: HandoffId,
        /// Why, for logs.
        reason: String,
    },
    /// Decode side: no longer wanted; answer with `Quiet` when nothing can touch the blocks any more.
    Cancel {
        /// Which handoff.
        handoff: HandoffId,
    },
    /// Prefill side: nothing of mine will touch the blocks of that handoff ever again.
    Quiet {
        /// Which handoff.
        handoff: HandoffId,
        /// Why there will be no commit, for logs.
        reason: String,
    },
    /// The sender has ended its side of an RDMA path: nothing that was sent there can land in its memory any more.
    PathDown {
        /// Position among the [`Paths`].
        path: u32,
    },
    /// An end made anew for an RDMA path that both sides have ended: first from the side with the lower instance number,
    /// then from the other, which answers with `PathDown` instead where it has none. Nothing goes over the path before it
    /// is known to work.
    PathAnew {
        /// Position among the [`Paths`].
        path: u32,
        /// The end.
        end: PathEnd,
    },
    /// Bytes of the peer came over a path that was made anew: both sides may use it.
    PathUp {
        /// Position among the [`Paths`].
        path: u32,
    },
    /// Still here. Any other message says so too.
    Heartbeat {
        /// Rises by one with each.
        seq: u64,
    },
    /// The sender is about to go. Last message.
    Bye {
        /// Handoffs of which the sender cannot promise that it no longer touches their blocks.
        busy: Vec<HandoffId>,
    },
}

/// Who opens a connection, and everything that must fit for the two to work together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Version of this protocol, [`PROTOCOL`].
    pub protocol: u32,
    /// A number that no other start of any worker has.
    pub instance: u64,
    /// Name in logs.
    pub name: String,
    /// Meaning of the bytes of its blocks.
    pub layout: KvLayout,
    /// Size of its memory in bytes; block `b` starts at `b * layout.block_bytes()`.
    pub region_bytes: u64,
    /// How many of them, at its end, are no blocks: there peers that read find what was converted for them.
    pub staging_bytes: u64,
    /// TCP port on which it listens.
    pub listen_port: u16,
    /// Equal for two processes of one host and one user.
    pub host: String,
    /// Name of the abstract local socket that passes memory; empty when it offers none.
    pub memory_socket: String,
    /// Which ways it accepts for data.
    pub offer: Offer,
    /// Whether it lets no device of a peer write into its memory: as decode side it reads from the peer instead.
    pub pulls: bool,
    /// After how much silence it takes the other side for lost.
    pub lease: Duration,
}

/// Ways for data that a worker accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Shared memory, should both be on one host.
    pub shared_memory: bool,
    /// RDMA, with a device that is ready.
    pub rdma: bool,
    /// TCP.
    pub tcp: bool,
    /// What to do when the better of the common ways cannot be set up.
    pub on_failure: OnFailure,
}

/// What to do when the better of two ways cannot be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// Take the other, and say so.
    FallBack,
    /// Treat the peer as unreachable.
    Fail,
}

/// A way for data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TransportKind {
    /// The sender stores into the receiver's memory.
    SharedMemory,
    /// The sender's device writes into the receiver's memory.
    Rdma,
    /// Frames on a TCP connection, each admitted by the receiver.
    Tcp,
}

/// Acceptance of a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The same about the accepting side.
    pub hello: Hello,
    /// To be named in [`Attach`].
    pub token: u64,
}

/// Rejection of a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refuse {
    /// The field that does not fit.
    pub field: String,
    /// In which way.
    pub reason: String,
}

/// Ties a second connection to a control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    /// Who opens it.
    pub instance: u64,
    /// The token of the [`Welcome`].
    pub token: u64,
}

/// One side's ends of RDMA connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The ends, in the order of the other side's.
    pub ends: Vec<PathEnd>,
    /// Why there are none, for logs; the two take another way then, if they may.
    pub failure: Option<String>,
}

/// The path for data is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Which way it is.
    pub transport: TransportKind,
    /// Why it is not the better one, if so.
    pub fallback: Option<String>,
    /// Handoffs of earlier connections of which the sender cannot yet promise that it no longer touches their
    /// blocks. All others are quiet: the decode side releases what it held in quarantine.
    pub busy: Vec<HandoffId>,
    /// Whether the sender's device writes into memory of the other side's device, so that nothing comes into its region.
    pub by_device: bool,
}

/// Blocks that wait for the KV of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reserve {
    /// Which handoff.
    pub handoff: HandoffId,
    /// Tokens of the sequence whose KV is needed, those in `cached` included.
    pub tokens: TokenCount,
    /// Index in the sequence of the block that `targets[0]` will hold.
    pub first_block: u32,
    /// Blocks of the decode side that hold the sequence's first tokens already; may be fewer than `first_block`.
    pub cached: Vec<BlockRef>,
    /// Blocks to be filled, in order of the sequence.
    pub targets: Vec<BlockRef>,
    /// What the digests of the commit must cover.
    pub coverage: Coverage,
}

/// Pieces of finished blocks that wait to be read, in the order in which they were offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Which handoff.
    pub handoff: HandoffId,
    /// How many pieces of it were offered before these.
    pub before: u64,
    /// What waits.
    pub pieces: Vec<Piece>,
}

/// Bytes of the prefill side's arena, and where they belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the arena of the prefill side.
    pub source: u64,
    /// Offset in the arena of the decode side.
    pub target: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`stamp`](crate::transport::stamp) of the decode side's blocks there, as the prefill side knows them.
    pub stamp: u64,
}

/// Blocks that are final while others of the handoff are still being computed: the sender touches them no more. They are
/// named and proven ahead of the commit, so that this has nothing more to say about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Which handoff.
    pub handoff: HandoffId,
    /// How many of the targets of [`Reserve`] were named before these.
    pub first: u32,
    /// The next ones, as in [`Reserve`].
    pub targets: Vec<BlockRef>,
    /// One for each of them, see [`digest`](crate::digest).
    pub digests: Vec<u64>,
}

/// All writes of a handoff have completed; this is what they must amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Which handoff.
    pub handoff: HandoffId,
    /// As in [`Reserve`].
    pub tokens: TokenCount,
    /// How many of the targets were named before, by [`Filled`].
    pub first: u32,
    /// The rest, as in [`Reserve`]: names the epochs that the sender believed to write.
    pub targets: Vec<BlockRef>,
    /// One for each of the rest, see [`digest`](crate::digest).
    pub digests: Vec<u64>,
    /// The [`Seal`](crate::digest::Seal) of all targets with their digests, those named before included.
    pub seal: u64,
    /// Opaque to this crate: the first token, the sampler's state.
    pub payload: Vec<u8>,
    /// Whether nothing was written: the prompt was computed in the targets themselves.
    pub in_place: bool,
}

impl Offer {
    /// The way that two workers take: the best that both accept. `None` when there is none.
    pub fn common(self, other: Self, same_host: bool) -> Option<TransportKind> {
        if same_host && self.shared_memory && other.shared_memory {
            Some(TransportKind::SharedMemory)
        } else if self.rdma && other.rdma {
            Some(TransportKind::Rdma)
        } else if self.tcp && other.tcp {
            Some(TransportKind::Tcp)
        } else {
            None
        }
    }

    /// Whether TCP may replace a better way that could not be set up.
    pub fn may_fall_back(self, other: Self) -> bool {
        self.tcp
            && other.tcp
            && self.on_failure == OnFailure::FallBack
            && other.on_failure == OnFailure::FallBack
    }
}

impl TransportKind {
    /// How it is proven that nothing that came this way can still land.
    pub const fn quiet_proof(self) -> QuietProof {
        match self {
            Self::SharedMemory => QuietProof::Process,
            Self::Rdma => QuietProof::AccessEnded,
            Self::Tcp => QuietProof::Admission,
        }
    }

    /// The name used by flags, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SharedMemory => "shm",
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
        }
    }
}

/// Version of the protocol. Raised when an old worker would misunderstand a new one; fields that an old worker
/// may ignore do not raise it.
pub const PROTOCOL: u32 = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_common_way_is_taken() {
        let offer = |ways: &str| Offer {
            shared_memory: ways.contains("shm"),
            rdma: ways.contains("rdma"),
            tcp: ways.contains("tcp"),
            on_failure: OnFailure::FallBack,
        };
        #[rustfmt::skip]
        let rows = [
            ("one host shares memory",              "shm rdma tcp", "shm rdma tcp", true,  Some(TransportKind::SharedMemory)),
            ("two hosts take RDMA",                 "shm rdma tcp", "shm rdma tcp", false, Some(TransportKind::Rdma)),
            ("or TCP, where one has no device",     "shm rdma tcp", "shm tcp",      false, Some(TransportKind::Tcp)),
            ("one host without shared memory",      "shm rdma tcp", "rdma tcp",     true,  Some(TransportKind::Rdma)),
            ("TCP when one side wants it",          "shm rdma tcp", "tcp",          true,  Some(TransportKind::Tcp)),
            ("memory only, on two hosts: no way",   "shm",          "shm rdma tcp", false, None),
            ("RDMA only, and one has no device",    "rdma",         "shm tcp",      false, None),
            ("nothing in common",                   "shm",          "tcp",          true,  None),
        ];
        for (name, ours, theirs, same_host, expected) in rows {
            let (ours, theirs) = (offer(ours), offer(theirs));
            assert_eq!(ours.common(theirs, same_host), expected, "{name}");
            assert_eq!(theirs.common(ours, same_host), expected, "{name}, seen from the other side");
        }
        let both = offer("shm rdma tcp");
        let strict = Offer { on_failure: OnFailure::Fail, ..both };
        assert!(both.may_fall_back(both) && !both.may_fall_back(strict) && !strict.may_fall_back(both));
        assert!(!both.may_fall_back(offer("shm")), "nothing to fall back to");
    }
}
