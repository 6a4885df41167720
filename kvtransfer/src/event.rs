//! What an endpoint is asked for, and what it reports.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tidemill_kvtransfer_proto::endpoint_core::Directions;
pub use tidemill_kvtransfer_proto::endpoint_core::HandoffStats;
use tidemill_kvtransfer_proto::error::TransferError;
use tidemill_kvtransfer_proto::layout::{Bridge, KvLayout};
use tidemill_kvtransfer_proto::message::TransportKind;
use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId, TokenCount};

use crate::error::MeetError;
use crate::shm::{Region, Slab};
use crate::tail::TailPiece;

/// Another worker, as the router tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// Its name, for logs.
    pub name: String,
    /// Its instance number.
    pub instance: u64,
    /// Where it takes handoffs.
    pub address: SocketAddr,
}

/// What became of [`meet`](crate::Endpoint::meet)ing a peer.
#[derive(Clone, Debug, PartialEq)]
pub struct Met {
    /// Its name.
    pub name: String,
    /// Its instance number.
    pub instance: u64,
    /// The connection, or why there is none.
    pub outcome: Result<PeerLink, MeetError>,
}

/// A connection to a peer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeerLink {
    /// The way for data.
    pub transport: TransportKind,
    /// What a short probe of it measured, in bytes per second; zero when the probe was not answered.
    pub bytes_per_second: f64,
    /// Whether it is a worse way than the one that both sides offer, or that this side asks for; the log has the reason.
    pub is_fallback: bool,
    /// Over how many queue pairs it is spread that work now; one for the other ways.
    pub paths: u32,
    /// In which directions handoffs can go over it.
    pub directions: Directions,
    /// How it gets from device to device.
    pub devices: DeviceWays,
}

/// How bytes get from this worker's device to the peer and from the peer to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceWays {
    /// From it.
    pub to_peer: DeviceWay,
    /// To it.
    pub from_peer: DeviceWay,
}

/// One of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceWay {
    /// This worker computes in memory of the host.
    #[default]
    NoDevice,
    /// The sender's device copies into the memory of the receiver's.
    PeerCopy,
    /// Through memory of the host, which the device copies from and to: the log says why.
    Staging,
}

impl DeviceWay {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::NoDevice, Self::PeerCopy, Self::Staging];

    /// The one of that [`name`](Self::name); none of this version's is none.
    pub fn by_name(name: &str) -> Self {
        Self::ALL.into_iter().find(|way| way.name() == name).unwrap_or_default()
    }

    /// As logs and metrics have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoDevice => "no device",
            Self::PeerCopy => "peer copy",
            Self::Staging => "staging",
        }
    }
}

/// Decode side: blocks for the KV of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reserve {
    /// Which handoff.
    pub handoff: HandoffId,
    /// Instance number of the worker that computes the prompt.
    pub peer_instance: u64,
    /// How soon it is wanted. Bytes for the handoff that is due first come first, where several peers have some.
    pub within: Duration,
    /// Tokens of the sequence whose KV is needed, those in `cached` included.
    pub tokens: TokenCount,
    /// Index in the sequence of the block that `targets[0]` will hold. With `targets` it makes just the blocks
    /// that hold `tokens`.
    pub first_block: u32,
    /// Blocks here that hold the sequence's first tokens already, for a peer that computes in place.
    pub cached: Vec<BlockRef>,
    /// Blocks to be filled, in order of the sequence. From now until adoption or
    /// [`HandoffEvent::Released`] they are the endpoint's.
    pub targets: Vec<BlockRef>,
}

/// Prefill side: one write into a block that the peer reserved. All offsets and lengths are multiples of one
/// layer of the peer's layout (`strides().layer`), and each layer of each target is written exactly once.
#[derive(Clone, Debug)]
pub struct PushWrite {
    /// Position of the block among [`Reserved::targets`].
    pub target_index: u32,
    /// Offset in that block.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
    /// Where the bytes are, in the peer's layout.
    pub source: Source,
}

/// Where the bytes of a write are. They must not change until the handoff ends.
#[derive(Clone, Debug)]
pub enum Source {
    /// In the endpoint's own region.
    Region {
        /// Offset of the first byte.
        offset: usize,
    },
    /// In staging memory, from that offset on.
    Slab(Arc<Slab>, usize),
    /// In a piece of the room behind the blocks, from that offset in it on: for a peer that reads.
    Tail(Arc<TailPiece>, usize),
    /// In blocks of this worker's device, in the place that they would have in its region, for a peer whose device that reaches. Each target
    /// comes from one block.
    Device {
        /// Offset of the first byte.
        offset: usize,
    },
}

/// Prefill side: a peer's reservation.
#[derive(Clone, Debug)]
pub struct Reserved {
    /// Which handoff.
    pub handoff: HandoffId,
    /// Who reserved.
    pub peer_instance: u64,
    /// The peer's layout.
    pub layout: Arc<KvLayout>,
    /// How blocks of this worker become blocks of the peer.
    pub bridge: Bridge,
    /// Tokens of the sequence whose KV the peer needs, those it has included.
    pub tokens: TokenCount,
    /// Index in the sequence of the block that `targets[0]` will hold.
    pub first_block: u32,
    /// Blocks of the peer that hold the sequence's first tokens already.
    pub cached: Vec<BlockRef>,
    /// Blocks of the peer to be filled.
    pub targets: Vec<BlockRef>,
    /// How to fill them.
    pub path: Path,
}

/// How the blocks of a peer are filled.
#[derive(Clone, Debug)]
pub enum Path {
    /// By computing in them: this is the peer's arena, block `b` at `b * layout.block_bytes()`. `targets` may be
    /// written and `cached` read until `finish` or `abandon`, and not after. There is nothing to push. Pushing
    /// is allowed all the same, for instance when the prompt was computed before the reservation came.
    InPlace(Arc<Region>),
    /// By pushing.
    Write,
    /// By pushing what lies in blocks of this worker's device.
    Device,
    /// By pushing what lies in the endpoint's own region, where the peer reads it: in blocks, or in pieces of its
    /// [`Tail`](crate::Tail).
    Read,
}

/// What happens to handoffs and peers. Delivered on the endpoint's own thread: a receiver passes it on and
/// returns.
///
/// Prefill side: every handoff that was expected ends with exactly one `Delivered` or `SendFailed`. Decode side:
/// every reservation ends with adoption or with exactly one `Released`, whatever else is reported before.
#[derive(Clone, Debug)]
pub enum HandoffEvent {
    /// Prefill side: an expected handoff may begin.
    Reserved(Reserved),
    /// Prefill side: the peer took over; the source blocks are free.
    Delivered {
        /// Which handoff.
        handoff: HandoffId,
        /// What it took.
        stats: HandoffStats,
    },
    /// Prefill side: the handoff failed, and nothing reads the source or touches the peer's blocks any more.
    SendFailed {
        /// Which handoff.
        handoff: HandoffId,
        /// Why.
        error: TransferError,
    },
    /// Prefill side: the peer has read the pieces of the tail that were pushed so far, and nobody keeps them any more.
    Fetched {
        /// Which handoff.
        handoff: HandoffId,
    },
    /// Prefill side: the peer does not want it any more, or is gone. Stop, then call `abandon`; `SendFailed`
    /// follows.
    CancelWanted {
        /// Which handoff.
        handoff: HandoffId,
    },
    /// Decode side: of some handoff of a peer everything is there but its commit, which is about to come: after a sign of that
    /// peer, whatever that was.
    Nearing {
        /// Instance number of the peer.
        peer: u64,
    },
    /// Decode side: all bytes are there, of the right epoch and digest. Answer with `adopt` or `refuse`.
    /// May still come after `cancel` was called, and is then of no consequence.
    Committed {
        /// Which handoff.
        handoff: HandoffId,
        /// As reserved.
        tokens: TokenCount,
        /// What the peer sent along.
        payload: Vec<u8>,
        /// Whether they are in blocks of this worker's device, and not in its region.
        on_device: bool,
    },
    /// Decode side: the KV will not come. The blocks are not free before `Released`.
    ReserveFailed {
        /// Which handoff.
        handoff: HandoffId,
        /// Why.
        error: TransferError,
    },
    /// Decode side: nothing can write to the blocks any more; they may go back to the pool.
    Released {
        /// Which handoff.
        handoff: HandoffId,
    },
    /// A peer can be handed to, and can hand over.
    PeerUp {
        /// Its name.
        name: String,
        /// Its instance number.
        instance: u64,
        /// The connection.
        link: PeerLink,
    },
    /// The device has failed: no handoff by it comes to an end any more.
    DeviceFailed {
        /// What it says.
        reason: String,
    },
    /// The connection to a peer is gone. Its handoffs report for themselves.
    PeerDown {
        /// Its name.
        name: String,
        /// Its instance number.
        instance: u64,
        /// How it showed.
        reason: String,
    },
}
