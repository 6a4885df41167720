//! Everything that an endpoint decides: which connection counts, who may speak of which handoff, when a silent
//! peer is lost, and when blocks that it could write to are proven quiet.
//!
//! ```text
//!                  orders of the engine              actions, in order
//!                  messages of peers       ┌──────┐  say, sever, post, take digests,
//!  a driver  ────► links up and down  ────►│ core │────► tell the engine            ────► the same driver
//!                  completions, digests,   └──────┘
//!                  the time
//! ```
//!
//! Three drivers exist: the thread of `tidemill-kvtransfer`, which does all this with sockets and memory, the
//! simulator, and the search of every order in `tests/ownership`. What handshakes decide is in [`handshake`](crate::handshake), except for the one question that each
//! must answer: what a side cannot yet promise to leave alone ([`EndpointCore::prepare_link`]).

mod backlog;
mod crediting;
#[cfg(test)]
mod device_tests;
mod fetching;
mod links;
mod naming;
mod prefilling;
mod reserving;
#[cfg(test)]
mod tests;
mod writing;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::credit::{CreditLoad, CreditPool};
use crate::digest::{BlockShape, Coverage};
use crate::error::TransferError;
use crate::layout::{Bridge, KvLayout};
use crate::message::{Hello, Message};
use crate::transport::WriteId;
use crate::units::{BlockRef, HandoffId, TokenCount};

use self::links::PeerState;
use self::prefilling::{Outgoing, Waiting};
use self::reserving::Incoming;
pub use self::writing::{TargetWrite, WriteSource};

/// How it is proven that nothing of a peer can land in blocks any more, which depends on the way its bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuietProof {
    /// Each byte passes the admission of its reservation in this side's own thread: a reservation that was given
    /// up is quiet at once.
    Admission,
    /// A process of this host has our memory mapped: quiet by its own word, or when the process is gone.
    Process,
    /// A device writes by itself: quiet by the peer's word while the connection lasts, since a write that
    /// completed is over. After the connection only by this side's own hand: its queue pair is in the error
    /// state and flushed, and the peer's access is invalidated. No word of the peer replaces that, for it does
    /// not know what the network still holds.
    AccessEnded,
}

/// Names one connection to a peer among all there ever were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// Names one piece of hashing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DigestTicket(pub u64);

/// What an endpoint goes by.
#[derive(Clone, Debug)]
pub struct EndpointRules {
    /// Meaning of the bytes of its blocks.
    pub layout: KvLayout,
    /// How many blocks its region has.
    pub blocks: u64,
    /// Bytes behind them in the region, for what is converted for peers that read.
    pub staging: u64,
    /// Whether prompts may be computed right in the blocks of a peer on this host, when layouts are equal.
    pub in_place: bool,
    /// How much of each block the digests must cover that this side verifies.
    pub coverage: Coverage,
    /// After how much silence a peer counts as lost.
    pub lease: Duration,
    /// How often this side speaks when it has nothing to say; a fraction of the peer's lease if that is less.
    pub heartbeat: Duration,
    /// How long a peer's reservation may wait for this engine to expect it.
    pub patience: Duration,
    /// How long no write may complete on a link that has some under way, before it counts as broken: the way for data
    /// can fail in silence while messages still come through.
    pub stall: Duration,
    /// How long what a peer was offered may wait to be read, before its link counts as broken: as long as it may be read, this
    /// side can use it for nothing else.
    pub offers: Duration,
    /// Bytes that peers may have on their way to this side at a time, over ways that take credit.
    pub credit: u64,
    /// Whether no device of a peer may write here: as decode side this side reads instead.
    pub pulls: bool,
}

/// In which directions handoffs can go over a link: layouts may be bridged in one direction only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directions {
    /// From this side to the peer, or the field that does not fit.
    pub to_peer: Result<(), &'static str>,
    /// From the peer to this side.
    pub from_peer: Result<(), &'static str>,
}

/// The outcome of a handshake.
#[derive(Clone, Debug)]
pub struct LinkUp {
    /// What the peer said about itself.
    pub hello: Hello,
    /// How the way for data is proven quiet.
    pub proof: QuietProof,
    /// Handoffs that the peer cannot promise to leave alone.
    pub busy: Vec<HandoffId>,
    /// Which way bytes go from device to device.
    pub by_device: ByDevice,
}

/// In which directions of a link a device writes into memory of the other side's device, which blocks of the same numbers are in. Where
/// it does, nothing comes into the regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByDevice {
    /// From this side to the peer.
    pub to_peer: bool,
    /// From the peer to this side.
    pub from_peer: bool,
}

/// Blocks that the engine sets aside for the KV of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReserveOrder {
    /// Which handoff.
    pub handoff: HandoffId,
    /// The worker that computes the prompt.
    pub peer: u64,
    /// How soon it is wanted: among handoffs whose bytes are ready at the same time the one that is due first comes
    /// first. Not more than an hour counts.
    pub within: Duration,
    /// Tokens of the sequence whose KV is needed, those in `cached` included.
    pub tokens: TokenCount,
    /// Index in the sequence of the block that `targets[0]` will hold.
    pub first_block: u32,
    /// Blocks that hold the sequence's first tokens already.
    pub cached: Vec<BlockRef>,
    /// Blocks to be filled, in order of the sequence.
    pub targets: Vec<BlockRef>,
}

/// What the driver has to do, in the order given: what comes after a `Sever` relies on it.
#[derive(Clone, Debug, PartialEq)]
pub enum EndpointAction {
    /// Queue a message on the peer's link.
    Send {
        /// To whom.
        peer: u64,
        /// What.
        message: Message,
    },
    /// End a link: nothing is received over it any more, and every posted write and read is reported by
    /// `completed`, as soon as nothing here is touched for it. Where the proof is [`QuietProof::AccessEnded`], report `access_ended`.
    Sever {
        /// The peer.
        peer: u64,
        /// Which of its links.
        link: LinkId,
        /// Why, for logs.
        reason: String,
    },
    /// Take digests of blocks, and report them by `digested`.
    TakeDigests(DigestOrder),
    /// Tell the engine.
    Tell(EndpointEvent),
    /// A peer did what no correct one does; it had no effect.
    Log {
        /// Which peer, or zero when it was the engine here.
        peer: u64,
        /// Of which handoff it spoke.
        handoff: HandoffId,
        /// What it did.
        what: &'static str,
    },
}

/// Blocks whose digests are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DigestOrder {
    /// To be named in the answer.
    pub ticket: DigestTicket,
    /// The handoff.
    pub handoff: HandoffId,
    /// The peer whose blocks they are; `None` for this side's own.
    pub owner: Option<u64>,
    /// Whether it is those in this side's device that are meant.
    pub on_device: bool,
    /// How much of each granule to look at.
    pub coverage: Coverage,
    /// How the blocks are cut.
    pub shape: BlockShape,
    /// The blocks: some of the handoff's targets, one after the other.
    pub targets: Vec<BlockRef>,
    /// Position of the first of them among all.
    pub first: usize,
    /// How many targets the handoff has.
    pub all: usize,
    /// Whether only [`spots`](crate::digest::spots) of them are looked at: both sides see the same memory.
    pub spots: bool,
}

/// News for the engine.
///
/// Prefill side: every handoff that was expected ends with exactly one `Delivered` or `SendFailed`. Decode side:
/// every reservation ends with adoption or with exactly one `Released`.
#[derive(Clone, Debug, PartialEq)]
pub enum EndpointEvent {
    /// Prefill side: an expected handoff may begin.
    Reserved(ReservedHandoff),
    /// Prefill side: the peer took over; the source blocks are free.
    Delivered {
        /// Which handoff.
        handoff: HandoffId,
        /// What it took.
        stats: HandoffStats,
    },
    /// Prefill side: it failed, and nothing reads the source or touches the peer's blocks any more.
    SendFailed {
        /// Which handoff.
        handoff: HandoffId,
        /// Why.
        error: TransferError,
    },
    /// Prefill side: the peer has done with what was staged for it so far, which can be used again.
    Fetched {
        /// Which handoff.
        handoff: HandoffId,
    },
    /// Prefill side: stop, then abandon.
    CancelWanted {
        /// Which handoff.
        handoff: HandoffId,
    },
    /// Decode side: all bytes are there, of the right epoch and digest.
    Committed {
        /// Which handoff.
        handoff: HandoffId,
        /// As reserved.
        tokens: TokenCount,
        /// What the peer sent along.
        payload: Vec<u8>,
        /// Whether they are in blocks of this side's device, and not in its region.
        on_device: bool,
    },
    /// Decode side: the KV will not come. The blocks are not free before `Released`.
    ReserveFailed {
        /// Which handoff.
        handoff: HandoffId,
        /// Why.
        error: TransferError,
    },
    /// Decode side: nothing can write to the blocks any more.
    Released {
        /// Which handoff.
        handoff: HandoffId,
    },
    /// The link to a peer is gone.
    PeerDown {
        /// Its name.
        name: String,
        /// Its instance number.
        peer: u64,
        /// How it showed.
        reason: String,
    },
}

/// Prefill side: a peer's reservation that may be filled.
#[derive(Clone, Debug, PartialEq)]
pub struct ReservedHandoff {
    /// Which handoff.
    pub handoff: HandoffId,
    /// Who reserved.
    pub peer: u64,
    /// The peer's layout.
    pub layout: Arc<KvLayout>,
    /// How blocks of this side become blocks of the peer.
    pub bridge: Bridge,
    /// Tokens of the sequence whose KV the peer needs, those it has included.
    pub tokens: TokenCount,
    /// Index in the sequence of the block that `targets[0]` will hold.
    pub first_block: u32,
    /// Blocks of the peer that hold the sequence's first tokens already.
    pub cached: Vec<BlockRef>,
    /// Blocks of the peer to be filled.
    pub targets: Vec<BlockRef>,
    /// How they are filled.
    pub delivery: Delivery,
}

/// How a peer's blocks are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The engine may compute right in them. It may push as well.
    InPlace,
    /// What is pushed is written to them.
    Written,
    /// What is pushed lies in blocks of this side's device, whole pieces of one for each of the peer's, and its device writes it to those of
    /// the peer's device.
    ByDevice,
    /// What is pushed is read by the peer, out of this side's region. It lies there, unchanged, until [`EndpointEvent::Fetched`] or the
    /// handoff's end.
    Read,
}

/// What a handoff took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HandoffStats {
    /// Bytes written.
    pub bytes: u64,
    /// Writes posted, after neighbours were joined. Zero when everything was computed in place.
    pub writes: u64,
    /// From the end of the prompt, where that was said ahead, to `finish`.
    pub head_start: Duration,
    /// From `finish` to the peer's adoption.
    pub took: Duration,
}

/// All handoffs of one endpoint, both sides, and the links over which they go. `S` is what writes read from.
#[derive(Clone, Debug)]
pub struct EndpointCore<S> {
    rules: EndpointRules,
    /// Of this side's blocks.
    shape: BlockShape,
    credit: CreditPool,
    peers: BTreeMap<u64, PeerState>,
    /// Handoffs with this side as decode side.
    incoming: BTreeMap<HandoffId, Incoming>,
    /// Handoffs with this side as prefill side.
    outgoing: BTreeMap<HandoffId, Outgoing<S>>,
    /// Handoffs of which only one half is known, this side being the prefill side.
    waiting: BTreeMap<HandoffId, Waiting>,
    /// Posted, not completed.
    writes: BTreeMap<WriteId, PostedWrite>,
    next_write: u64,
    next_link: u64,
    next_ticket: u64,
    actions: VecDeque<EndpointAction>,
}

#[derive(Clone, Copy, Debug)]
struct PostedWrite {
    peer: u64,
    link: LinkId,
    handoff: HandoffId,
    len: u64,
    direction: Direction,
}

/// Which of the two sides' memory a transfer ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// The peer's.
    Write,
    /// This side's.
    Read,
}

impl<S: WriteSource> EndpointCore<S> {
    /// An endpoint that knows nobody.
    pub fn new(rules: EndpointRules) -> Self {
        let shape = BlockShape::of(&rules.layout);
        Self {
            credit: CreditPool::new(rules.credit),
            rules,
            shape,
            peers: BTreeMap::new(),
            incoming: BTreeMap::new(),
            outgoing: BTreeMap::new(),
            waiting: BTreeMap::new(),
            writes: BTreeMap::new(),
            next_write: 0,
            next_link: 0,
            next_ticket: 0,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do. To be asked for until there is none, after each input.
    pub fn next_action(&mut self) -> Option<EndpointAction> {
        self.actions.pop_front()
    }

    fn act(&mut self, action: EndpointAction) {
        self.actions.push_back(action);
    }

    fn tell(&mut self, event: EndpointEvent) {
        self.act(EndpointAction::Tell(event));
    }

    fn log(&mut self, peer: u64, handoff: HandoffId, what: &'static str) {
        self.act(EndpointAction::Log { peer, handoff, what });
    }

    fn order_digests(&mut self, order: impl FnOnce(DigestTicket) -> DigestOrder) -> DigestTicket {
        let ticket = DigestTicket(self.next_ticket);
        self.next_ticket += 1;
        self.act(EndpointAction::TakeDigests(order(ticket)));
        ticket
    }

    /// How many bytes peers may have on their way to this side, and how many wait for leave.
    pub fn credit_load(&self) -> CreditLoad {
        self.credit.load()
    }

    /// Whether no handoff is under way and no write.
    pub fn is_idle(&self) -> bool {
        let waits = |it: &Waiting| !matches!(it, Waiting::Over { .. });
        self.incoming.is_empty()
            && self.outgoing.is_empty()
            && self.writes.is_empty()
            && !self.waiting.values().any(waits)
    }

    /// Whether digests that were asked for are still of use.
    pub fn wants_digests(&self, handoff: HandoffId, ticket: DigestTicket) -> bool {
        self.incoming.get(&handoff).is_some_and(|it| it.verifies(ticket))
            || self.outgoing.get(&handoff).is_some_and(|it| it.hashes(ticket))
    }

    /// The digests that were asked for, one for each block.
    pub fn digested(&mut self, handoff: HandoffId, ticket: DigestTicket, digests: Vec<u64>) {
        if self.incoming.get(&handoff).is_some_and(|it| it.verifies(ticket)) {
            self.compare(handoff, ticket, &digests);
        } else if self.outgoing.get(&handoff).is_some_and(|it| it.hashes(ticket)) {
            self.hashed(handoff, digests);
        }
    }
}

/// What must hold of a reservation whatever its side: the blocks exist and are those that hold the tokens.
fn check_shape(
    layout: &KvLayout,
    blocks: u64,
    tokens: TokenCount,
    first_block: u32,
    cached: &[BlockRef],
    targets: &[BlockRef],
) -> Result<(), TransferError> {
    let invalid = |what| Err(TransferError::Invalid { what });
    if targets.iter().chain(cached).any(|it| blocks <= u64::from(it.block.0)) {
        return invalid("a block is outside the region");
    }
    if targets.is_empty() {
        return invalid("no block is to be filled");
    }
    if first_block < u32::try_from(cached.len()).unwrap_or(u32::MAX) {
        return invalid("more blocks are cached than come before the first target");
    }
    let needed = tokens.blocks_to_hold(layout.block_len).0;
    if u64::from(needed) != u64::from(first_block) + targets.len() as u64 {
        return invalid("the blocks are not those that hold the tokens");
    }
    Ok(())
}

/// The usual [`EndpointRules::stall`]. A write is a MiB at most: a line that takes longer for it is of no use.
pub const STALL: Duration = Duration::from_secs(10);
/// The usual [`EndpointRules::offers`]. A correct reader ends a way that stands still after one stall, and one that keeps others
/// waiting after two.
pub const OFFERS: Duration = Duration::from_secs(30);
