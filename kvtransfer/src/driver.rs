//! The one thread of an endpoint: waits for sockets, clocks and orders, feeds the state machines of
//! `tidemill-kvtransfer-proto`, and does what they say.
//!
//! Nothing in here blocks but the wait itself. Each turn does a bounded amount of work for each peer, so that a
//! slow or busy one holds up nobody else.

mod decoding;
mod dialling;
mod links;
mod lobby;
mod peers;
mod prefilling;
mod pushing;

use std::collections::{BTreeMap, VecDeque};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use tidemill_kvtransfer_proto::message::{Hello, Offer, OnFailure, PROTOCOL};
use tidemill_kvtransfer_proto::units::HandoffId;

use self::decoding::Incoming;
use self::lobby::{MemoryVisitor, Visitor};
use self::peers::Peer;
use self::prefilling::{Outgoing, Waiting};
use crate::endpoint::{Command, EndpointConfig, EventSink, LinkTable, TransportChoice};
use crate::error::EndpointError;
use crate::event::HandoffEvent;
use crate::host;
use crate::shm::exchange;
use crate::tcp::Loss;
use crate::verification::BlockShape;

/// Everything the thread owns.
pub(crate) struct Driver {
    config: EndpointConfig,
    /// What this side says about itself.
    hello: Hello,
    shape: BlockShape,
    events: EventSink,
    inbox: Receiver<Command>,
    wake: Arc<OwnedFd>,
    links: Arc<LinkTable>,
    address: SocketAddr,
    listener: TcpListener,
    memory_listener: Option<UnixListener>,
    /// Connections that have not said what they are.
    lobby: Vec<Visitor>,
    memory_lobby: Vec<MemoryVisitor>,
    /// By instance.
    peers: BTreeMap<u64, Peer>,
    /// Handoffs with this side as decode side.
    incoming: BTreeMap<HandoffId, Incoming>,
    /// Those of them whose digests are being compared.
    verifying: VecDeque<HandoffId>,
    /// Handoffs with this side as prefill side.
    outgoing: BTreeMap<HandoffId, Outgoing>,
    /// Those of them whose digests are being taken.
    hashing: VecDeque<HandoffId>,
    /// Handoffs of which only one half is known, this side being the prefill side.
    waiting: BTreeMap<HandoffId, Waiting>,
    next_write: u64,
    /// Connections that were found broken in the middle of something else.
    doomed: Vec<(u64, Loss)>,
    ready: Vec<RawFd>,
    now: Instant,
    is_stopping: bool,
}

impl Driver {
    /// Opens the sockets.
    pub(crate) fn new(
        config: EndpointConfig,
        events: EventSink,
        inbox: Receiver<Command>,
        links: Arc<LinkTable>,
    ) -> Result<Self, EndpointError> {
        let shape = BlockShape { block: config.layout.block_bytes(), granule: config.layout.strides().layer };
        let region_bytes = config.region.len();
        if region_bytes < shape.block {
            return Err(EndpointError::Region { region_bytes, block_bytes: shape.block });
        }
        let system = |operation| move |source| EndpointError::System { operation, source };
        let (listener, address) = listen(config.listen)
            .map_err(|source| EndpointError::Listen { address: config.listen, source })?;
        let token = host::token().map_err(system("draw a random number"))?;
        let socket_name = format!("tidemill-{:016x}-{token:016x}", config.instance);
        let memory_listener = match config.transport {
            TransportChoice::Tcp => None,
            TransportChoice::Auto | TransportChoice::SharedMemory => {
                Some(exchange::listen(&socket_name).map_err(system("listen on a local socket"))?)
            }
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| system("make an event descriptor")(errno.into()))?;
        let hello = hello(&config, address, memory_listener.is_some().then_some(socket_name));
        Ok(Self {
            config,
            hello,
            shape,
            events,
            inbox,
            wake: Arc::new(wake),
            links,
            address,
            listener,
            memory_listener,
            lobby: Vec::new(),
            memory_lobby: Vec::new(),
            peers: BTreeMap::new(),
            incoming: BTreeMap::new(),
            verifying: VecDeque::new(),
            outgoing: BTreeMap::new(),
            hashing: VecDeque::new(),
            waiting: BTreeMap::new(),
            next_write: 0,
            doomed: Vec::new(),
            ready: Vec::new(),
            now: Instant::now(),
            is_stopping: false,
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// To be written to after each order.
    pub(crate) fn wake(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.wake)
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        while !self.is_stopping {
            self.wait();
            self.now = Instant::now();
            self.take_orders();
            self.receive_visitors();
            self.advance_handshakes();
            self.read_links();
            self.check_processes();
            self.check_clocks();
            self.push();
            self.take_digests();
            self.compare_digests();
            self.flush_links();
            self.bury_the_doomed();
        }
        self.say_goodbye();
    }

    /// Sleeps until something can be done.
    fn wait(&mut self) {
        let timeout = if self.has_work() { Duration::ZERO } else { self.until_next_clock() };
        let timeout = Timespec::try_from(timeout).unwrap_or_default();
        let mut fds = vec![PollFd::new(&*self.wake, PollFlags::IN)];
        let mut interest = |fd, flags| fds.push(PollFd::from_borrowed_fd(fd, flags));
        self.visitor_interests(&mut interest);
        for peer in self.peers.values() {
            peer.interests(&mut interest);
        }
        // A signal or a lack of memory ends the wait early, which is harmless.
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
        let ready = fds.iter().filter(|fd| !fd.revents().is_empty());
        self.ready = ready.map(|fd| fd.as_fd().as_raw_fd()).collect();
    }

    fn is_ready(&self, fd: BorrowedFd<'_>) -> bool {
        self.ready.contains(&fd.as_raw_fd())
    }

    fn take_orders(&mut self) {
        let mut count = [0; 8];
        // Nothing to read means that no order came since the last look.
        let _ = rustix::io::read(&self.wake, &mut count);
        loop {
            let command = match self.inbox.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => Command::Stop,
            };
            match command {
                Command::Meet { peers, reply } => self.meet(peers, &reply),
                Command::Reserve(reserve) => self.reserve(reserve),
                Command::Adopt(handoff) => self.adopt(handoff),
                Command::Refuse(handoff, reason) => self.refuse(handoff, reason),
                Command::Cancel(handoff) => self.cancel(handoff),
                Command::Expect { handoff, peer_instance, patience } => {
                    self.expect(handoff, peer_instance, patience);
                }
                Command::Push(handoff, writes) => self.take_writes(handoff, writes),
                Command::Finish(handoff, payload) => self.finish(handoff, payload),
                Command::Abandon(handoff, reason) => self.abandon(handoff, reason),
                Command::Stop => {
                    self.is_stopping = true;
                    return;
                }
            }
        }
    }

    fn tell(&mut self, event: HandoffEvent) {
        (self.events)(event);
    }

    /// Whether there is something to do that no descriptor announces.
    fn has_work(&self) -> bool {
        !self.verifying.is_empty()
            || !self.hashing.is_empty()
            || self.peers.values().any(Peer::has_copies_to_make)
    }

    fn until_next_clock(&self) -> Duration {
        let visitors = self.lobby.iter().map(|it| it.deadline);
        let memory_visitors = self.memory_lobby.iter().map(|it| it.deadline);
        let waiting = self.waiting.values().map(Waiting::until);
        let peers = self.peers.iter().filter_map(|(&instance, peer)| {
            peer.next_clock(self.config.timing.lease, || self.is_wanted(instance, peer))
        });
        let next = visitors.chain(memory_visitors).chain(waiting).chain(peers).min();
        // Clocks are read to the nanosecond but slept to the millisecond: rather late than in vain.
        let rounding = Duration::from_millis(1);
        next.map_or(LONGEST_SLEEP, |next| {
            (next.saturating_duration_since(self.now) + rounding).min(LONGEST_SLEEP)
        })
    }
}

fn listen(address: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn hello(config: &EndpointConfig, address: SocketAddr, socket_name: Option<String>) -> Hello {
    let shared_memory = socket_name.is_some();
    let tcp = config.transport != TransportChoice::SharedMemory || !config.require;
    let on_failure = if config.require { OnFailure::Fail } else { OnFailure::FallBack };
    Hello {
        protocol: PROTOCOL,
        instance: config.instance,
        name: config.name.clone(),
        layout: config.layout.clone(),
        region_bytes: config.region.len() as u64,
        listen_port: address.port(),
        host: host::identity(),
        memory_socket: socket_name.unwrap_or_default(),
        offer: Offer { shared_memory, tcp, on_failure },
        lease: config.timing.lease,
    }
}

/// Bounds the harm of a clock that was forgotten.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
