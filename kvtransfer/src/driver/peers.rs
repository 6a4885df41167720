//! What the thread knows of each peer.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use tidemill_kvtransfer_proto::endpoint_core::{ByDevice, Directions, LinkId};
use tidemill_kvtransfer_proto::handshake::Contact;
use tidemill_kvtransfer_proto::message::{Hello, Ready, TransportKind};
use tidemill_kvtransfer_proto::transport::Transport;
use tidemill_kvtransfer_proto::units::{HandoffId, Moment};

use super::dialling::Dial;
use super::rdma::{self, RdmaAnswer};
use crate::event::{DeviceWays, Met, PeerLink};
use crate::shm::{Process, Region, SharedMemoryTransport};
use crate::source::SourceRange;
use crate::tcp::{Connection, DataConnection};
use crate::verbs::RdmaTransport;

/// Another worker.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) name: String,
    pub(super) address: SocketAddr,
    pub(super) link: Option<Link>,
    /// What is decided about handshakes; the next two are how far they have come.
    pub(super) contact: Contact,
    /// A connection that this side is making.
    pub(super) dial: Option<Dial>,
    /// A connection that the peer is making.
    pub(super) inbound: Option<Inbound>,
    /// The peer's process, while blocks that it can write to may be in quarantine.
    pub(super) process: Option<Process>,
    /// Who waits to hear of it.
    pub(super) meets: Vec<Sender<Met>>,
    /// Whether its link was ended to be made anew.
    pub(super) is_remade: bool,
    /// Since when it has had neither link nor handoffs.
    pub(super) idle_since: Instant,
}

/// A connection that the peer is making.
#[derive(Debug)]
pub(super) struct Inbound {
    pub(super) connection: Connection,
    pub(super) hello: Hello,
    pub(super) token: u64,
    pub(super) memory: Option<(Box<SharedMemoryTransport>, Process)>,
    pub(super) rdma: RdmaAnswer,
    pub(super) data: Option<DataConnection>,
    pub(super) ready: Option<Ready>,
}

/// The outcome of a handshake, from either side.
#[derive(Debug)]
pub(super) struct Established {
    pub(super) connection: Connection,
    pub(super) path: DataPath,
    pub(super) process: Option<Process>,
    pub(super) hello: Hello,
    pub(super) fallback: Option<String>,
    /// What the peer cannot yet promise to leave alone.
    pub(super) busy: Vec<HandoffId>,
    /// Whether the peer says that its device writes into this side's.
    pub(super) by_device: bool,
}

/// A connection over which handoffs go.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) connection: Connection,
    pub(super) path: DataPath,
    /// Messages may have come along with the end of the handshake.
    pub(super) is_fresh: bool,
    /// Whether it is a worse way than the one intended.
    pub(super) is_fallback: bool,
    /// By when it is ended in any case, because there may be a better one since.
    pub(super) remade_by: Option<Moment>,
    /// Where its layouts can be bridged.
    pub(super) directions: Directions,
    /// Where bytes go from device to device.
    pub(super) by_device: ByDevice,
    pub(super) devices: DeviceWays,
    pub(super) probe: Probe,
}

/// Measures the way for data, once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Probe {
    /// Under way since then.
    Running(Instant),
    /// Bytes per second; zero when it was not answered.
    Done(f64),
}

/// The way for data.
#[derive(Debug)]
pub(super) enum DataPath {
    SharedMemory(Box<SharedMemoryTransport>),
    Rdma(Box<RdmaTransport>),
    Tcp(Box<DataConnection>),
}

impl Peer {
    pub(super) fn new(name: String, address: SocketAddr, contact: Contact, now: Instant) -> Self {
        Self {
            name,
            address,
            link: None,
            contact,
            dial: None,
            inbound: None,
            process: None,
            meets: Vec::new(),
            is_remade: false,
            idle_since: now,
        }
    }

    /// Names the descriptors to wait for.
    pub(super) fn interests<'a>(&'a self, interest: &mut impl FnMut(BorrowedFd<'a>, PollFlags)) {
        let flags = |wants_write| if wants_write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        if let Some(link) = &self.link {
            interest(link.connection.fd(), flags(link.connection.wants_write()));
            match &link.path {
                DataPath::SharedMemory(_) => {}
                DataPath::Rdma(transport) => rdma::interests(transport, interest),
                DataPath::Tcp(data) => interest(data.fd(), flags(data.wants_write())),
            }
        }
        if let Some(dial) = &self.dial {
            dial.interests(interest);
        }
        if let Some(inbound) = &self.inbound {
            interest(inbound.connection.fd(), flags(inbound.connection.wants_write()));
        }
        if let Some(process) = &self.process {
            interest(process.fd(), PollFlags::IN);
        }
    }

    /// Whether its transport moves bytes when polled, without anybody saying that it is time.
    pub(super) fn copies(&self) -> bool {
        self.link.as_ref().is_some_and(|link| matches!(link.path, DataPath::SharedMemory(_)))
    }

    /// Whether it has bytes to move.
    pub(super) fn has_copies_to_make(&self) -> bool {
        self.link.as_ref().is_some_and(|link| match &link.path {
            DataPath::SharedMemory(transport) => transport.has_work(),
            DataPath::Rdma(_) | DataPath::Tcp(_) => false,
        })
    }

    /// Whether completions of its device wait that no descriptor announces.
    pub(super) fn has_completions(&self) -> bool {
        self.link.as_ref().is_some_and(|link| match &link.path {
            DataPath::Rdma(transport) => transport.has_work(),
            DataPath::SharedMemory(_) | DataPath::Tcp(_) => false,
        })
    }

    /// When something about it is due that is not the core's.
    pub(super) fn next_clock(&self, is_wanted: bool) -> Option<Moment> {
        let dial = self.dial.as_ref().map(Dial::extra);
        let inbound = self.inbound.as_ref().map(Inbound::extra);
        let extra = dial.or(inbound).unwrap_or_default();
        self.contact.next_clock(self.link.is_some(), is_wanted, extra)
    }
}

impl Link {
    /// What others are told of it, once it was measured.
    pub(super) fn report(&self) -> Option<PeerLink> {
        let Probe::Done(bytes_per_second) = self.probe else { return None };
        let (transport, paths) = (self.path.kind(), self.path.count());
        let (is_fallback, directions) = (self.is_fallback, self.directions);
        let devices = self.devices;
        Some(PeerLink { transport, bytes_per_second, is_fallback, paths, directions, devices })
    }
}

impl Inbound {
    /// How much longer than usual it may take.
    pub(super) fn extra(&self) -> Duration {
        if self.rdma.is_under_way() { rdma::REGISTRATION } else { Duration::ZERO }
    }
}

impl DataPath {
    pub(super) fn kind(&self) -> TransportKind {
        match self {
            Self::SharedMemory(_) => TransportKind::SharedMemory,
            Self::Rdma(_) => TransportKind::Rdma,
            Self::Tcp(_) => TransportKind::Tcp,
        }
    }

    /// Over how many queue pairs it is spread that work now.
    pub(super) fn count(&self) -> u32 {
        match self {
            Self::SharedMemory(_) | Self::Tcp(_) => 1,
            Self::Rdma(transport) => transport.count(),
        }
    }

    /// Whether this side's device copies to the peer's.
    pub(super) fn reaches_device(&self) -> bool {
        matches!(self, Self::SharedMemory(transport) if transport.reaches_device())
    }

    /// Whether it makes copies now.
    pub(super) fn has_device_copies(&self) -> bool {
        matches!(self, Self::SharedMemory(transport) if transport.has_copies())
    }

    /// Why it does not reach it.
    pub(super) fn why_not_by_device(&self) -> Option<&str> {
        match self {
            Self::SharedMemory(transport) => transport.why_no_copies(),
            Self::Rdma(_) => Some("network devices are given memory of the host"),
            Self::Tcp(_) => Some("sockets are given memory of the host"),
        }
    }

    /// The peer's memory, where it is mapped here.
    pub(super) fn arena(&self) -> Option<&Arc<Region>> {
        match self {
            Self::SharedMemory(transport) => Some(transport.arena()),
            Self::Rdma(_) | Self::Tcp(_) => None,
        }
    }

    pub(super) fn transport(&mut self) -> &mut dyn Transport<Source = SourceRange> {
        match self {
            Self::SharedMemory(transport) => &mut **transport,
            Self::Rdma(transport) => &mut **transport,
            Self::Tcp(data) => &mut **data,
        }
    }

    /// Nothing more is written; every write completes.
    pub(super) fn sever(&mut self) {
        match self {
            Self::SharedMemory(transport) => transport.sever(),
            Self::Rdma(transport) => transport.sever(),
            Self::Tcp(data) => data.sever(),
        }
    }
}
