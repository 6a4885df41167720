//! The one thread of an endpoint: waits for sockets, clocks and orders, feeds them to the [`EndpointCore`], and
//! does what that says.
//!
//! Nothing in here blocks but the wait itself. Each turn does a bounded amount of work for each peer, so that a
//! slow or busy one holds up nobody else.

mod actions;
mod device;
mod dialling;
mod links;
mod lobby;
mod peers;
mod rdma;
mod vigil;

use std::collections::{BTreeMap, VecDeque};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use tidemill_kvtransfer_proto::digest::BlockShape;
use tidemill_kvtransfer_proto::endpoint_core::{
    EndpointCore, EndpointRules, LinkId, OFFERS, ReserveOrder, STALL,
};
use tidemill_kvtransfer_proto::message::{Hello, Offer, OnFailure, PROTOCOL};
use tidemill_kvtransfer_proto::units::Moment;

use self::device::OwnDevice;
use self::lobby::{MemoryVisitor, Visitor};
use self::peers::Peer;
use self::rdma::Rdma;
use self::vigil::Vigil;
pub use self::vigil::Watch;
use crate::endpoint::{Command, EndpointConfig, EventSink, HandoffMode, LinkTable, TransportChoice};
use crate::error::EndpointError;
use crate::event::{HandoffEvent, Reserve};
use crate::host;
use crate::peer_copies::PeerCopies;
use crate::shm::exchange;
use crate::source::SourceRange;
use crate::tcp::Loss;
use crate::verification::{DeviceDigestJob, DigestJob};

/// Everything the thread owns.
pub(crate) struct Driver {
    config: EndpointConfig,
    /// What this side says about itself.
    hello: Hello,
    /// What decides.
    core: EndpointCore<SourceRange>,
    events: EventSink,
    inbox: Receiver<Command>,
    /// What was taken out of the inbox while this side stayed awake for it.
    awaited: Option<Command>,
    vigil: Vigil,
    watch: Watch,
    wake: Arc<OwnedFd>,
    links: Arc<LinkTable>,
    address: SocketAddr,
    listener: TcpListener,
    memory_listener: Option<UnixListener>,
    /// Where there are devices.
    rdma: Option<Rdma>,
    /// Connections that have not said what they are.
    lobby: Vec<Visitor>,
    memory_lobby: Vec<MemoryVisitor>,
    /// By instance.
    peers: BTreeMap<u64, Peer>,
    /// Digests in the making.
    digesting: VecDeque<DigestJob>,
    /// The device that has this side's blocks, where they are not in the region.
    device: Option<OwnDevice>,
    /// Digests that it takes.
    device_digesting: VecDeque<DeviceDigestJob>,
    /// Copies that it makes for links which are gone.
    orphans: Vec<PeerCopies>,
    /// Connections that were found broken in the middle of something else.
    doomed: Vec<(u64, LinkId, Loss)>,
    ready: Vec<RawFd>,
    /// When this turn began, and the same as the core counts it.
    now: Instant,
    turn: Moment,
    /// When the core's time began.
    origin: Instant,
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
        let block_bytes = BlockShape::of(&config.layout).block;
        let region_bytes = config.region.len().saturating_sub(config.staging_bytes);
        if region_bytes < block_bytes {
            return Err(EndpointError::Region { region_bytes, block_bytes });
        }
        let pulls = config.handoff == HandoffMode::Pull;
        if pulls && config.transport == TransportChoice::SharedMemory {
            return Err(EndpointError::PullOverSharedMemory);
        }
        let system = |operation| move |source| EndpointError::System { operation, source };
        let (listener, address) = listen(config.listen)
            .map_err(|source| EndpointError::Listen { address: config.listen, source })?;
        let token = host::token().map_err(system("draw a random number"))?;
        let socket_name = format!("tidemill-{:016x}-{token:016x}", config.instance);
        let memory_listener = match config.transport {
            TransportChoice::Tcp | TransportChoice::Rdma => None,
            TransportChoice::Auto if pulls => {
                tracing::info!("shared memory is not offered: peers that map it could write to it");
                None
            }
            TransportChoice::Auto | TransportChoice::SharedMemory => {
                Some(exchange::listen(&socket_name).map_err(system("listen on a local socket"))?)
            }
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| system("make an event descriptor")(errno.into()))?;
        let wake = Arc::new(wake);
        let rdma = rdma::open(&config, &wake)?;
        let socket_name = memory_listener.is_some().then_some(socket_name);
        let offers_rdma = rdma.as_ref().is_some_and(Rdma::is_offered);
        let hello = hello(&config, address, socket_name, offers_rdma);
        let core = EndpointCore::new(rules(&config));
        let device = config.device.clone().map(OwnDevice::new);
        let now = Instant::now();
        Ok(Self {
            config,
            hello,
            core,
            events,
            inbox,
            awaited: None,
            vigil: Vigil::default(),
            watch: Watch::default(),
            wake,
            links,
            address,
            listener,
            memory_listener,
            rdma,
            lobby: Vec::new(),
            memory_lobby: Vec::new(),
            peers: BTreeMap::new(),
            digesting: VecDeque::new(),
            device,
            device_digesting: VecDeque::new(),
            orphans: Vec::new(),
            doomed: Vec::new(),
            ready: Vec::new(),
            now,
            turn: Moment::default(),
            origin: now,
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
        if let Some(rdma) = &self.rdma {
            rdma.place_thread();
        }
        while !self.is_stopping {
            self.keep_vigil();
            let allowed = self.wait() + LONGEST_TURN;
            let before = std::mem::replace(&mut self.now, Instant::now());
            self.turn = Moment(self.now.saturating_duration_since(self.origin));
            let lateness = (self.now - before).saturating_sub(allowed);
            self.core.stood_still(lateness, self.turn);
            self.take_orders();
            self.receive_visitors();
            self.advance_handshakes();
            self.read_links();
            self.check_processes();
            self.hear_revoked();
            self.hear_devices();
            self.check_clocks();
            self.push();
            self.watch_copies();
            self.take_digests();
            self.take_device_digests();
            self.flush_links();
            self.bury_the_doomed();
            self.links.set_credit(self.core.credit_load());
        }
        self.say_goodbye();
    }

    /// Stays awake for the next order, if that should come now, and has the peer do the same.
    fn keep_vigil(&mut self) {
        if let Some(handoff) = self.vigil.opened(Instant::now()) {
            self.core.rouse(handoff);
            self.act();
            self.flush_links();
        }
        let Self { inbox, awaited, vigil, .. } = self;
        *awaited = vigil.keep(Instant::now, || inbox.try_recv().ok());
    }

    /// Sleeps until something can be done, for as long as is returned at most, if the processor is to be had then.
    fn wait(&mut self) -> Duration {
        let alarm = self.vigil.opens(self.now).map(|opens| opens.saturating_duration_since(Instant::now()));
        let timeout = if self.has_work() || self.awaited.is_some() {
            Duration::ZERO
        } else {
            let nap = if self.awaits_device() { DEVICE_NAP } else { LONGEST_SLEEP };
            self.until_next_clock().min(alarm.unwrap_or(LONGEST_SLEEP)).min(nap)
        };
        let timespec = Timespec::try_from(timeout).unwrap_or_default();
        let mut watch = std::mem::take(&mut self.watch);
        let mut fds = vec![PollFd::new(&*self.wake, PollFlags::IN)];
        let mut interest = |fd, flags| fds.push(PollFd::from_borrowed_fd(fd, flags));
        self.visitor_interests(&mut interest);
        for peer in self.peers.values() {
            peer.interests(&mut interest);
        }
        if let Some(rdma) = &self.rdma {
            rdma.interests(&mut interest);
        }
        // A signal or a lack of memory ends the wait early, which is harmless.
        let mut poll = |timeout: &Timespec| rustix::event::poll(&mut fds, Some(timeout)).unwrap_or_default();
        let has_come = !timeout.is_zero() && watch.keep(Instant::now, || 0 < poll(&Timespec::default()));
        if !has_come {
            poll(&timespec);
        }
        let ready = fds.iter().filter(|fd| !fd.revents().is_empty());
        self.ready = ready.map(|fd| fd.as_fd().as_raw_fd()).collect();
        self.watch = watch;
        timeout
    }

    fn is_ready(&self, fd: BorrowedFd<'_>) -> bool {
        self.ready.contains(&fd.as_raw_fd())
    }

    fn take_orders(&mut self) {
        if self.is_ready(self.wake.as_fd()) {
            // Nothing to read means that no order came since the last look.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        loop {
            let command = match self.awaited.take().map_or_else(|| self.inbox.try_recv(), Ok) {
                Ok(command) => command,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => Command::Stop,
            };
            let now = self.moment();
            match command {
                Command::Meet { peers, reply } => self.meet(peers, &reply),
                Command::Reserve(reserve) => self.core.reserve(reserve_order(reserve), now),
                Command::Adopt(handoff) => self.core.adopt(handoff),
                Command::Refuse(handoff, reason) => self.core.refuse(handoff, reason),
                Command::Cancel(handoff) => self.core.cancel(handoff),
                Command::Expect { handoff, peer_instance, patience } => {
                    self.core.expect(handoff, peer_instance, patience, now);
                }
                Command::Push(handoff, writes) => self.take_writes(handoff, writes),
                Command::Filled(handoff, tokens) => self.core.filled(handoff, tokens),
                Command::Computed(handoff, said) => {
                    self.vigil.begin(handoff, said);
                    self.core.computed(handoff, self.moment_of(said));
                }
                Command::Finish(handoff, payload, said) => {
                    self.vigil.end(said);
                    self.core.finish(handoff, payload, self.moment_of(said));
                }
                Command::Abandon(handoff, reason) => self.core.abandon(handoff, reason, now),
                Command::LetGoOfDevice(reply) => {
                    self.let_go_of_device();
                    let _ = reply.send(()); // Nobody waits any more.
                }
                Command::Stop => {
                    self.is_stopping = true;
                    return;
                }
            }
            self.act();
        }
    }

    fn tell(&mut self, event: HandoffEvent) {
        (self.events)(event);
    }

    /// The present, as the core counts it.
    fn moment(&self) -> Moment {
        Moment(self.origin.elapsed())
    }

    fn moment_of(&self, instant: Instant) -> Moment {
        Moment(instant.saturating_duration_since(self.origin))
    }

    /// Whether there is something to do that no descriptor announces.
    fn has_work(&self) -> bool {
        let has_copies = |(&instance, peer): (&u64, &Peer)| {
            peer.has_completions()
                || peer.copies() && (peer.has_copies_to_make() || self.core.has_writes_for(instance))
        };
        !self.digesting.is_empty() || self.peers.iter().any(has_copies)
    }

    fn until_next_clock(&self) -> Duration {
        let visitors = self.lobby.iter().map(|it| it.deadline);
        let memory_visitors = self.memory_lobby.iter().map(|it| it.deadline);
        let peers =
            self.peers.iter().filter_map(|(&instance, peer)| peer.next_clock(self.is_wanted(instance, peer)));
        let decided = self.core.next_tick().into_iter().chain(peers).map(|at| self.origin + at.0);
        let next = visitors.chain(memory_visitors).chain(decided).min();
        // Clocks are read to the nanosecond but slept to the millisecond: rather late than in vain.
        let rounding = Duration::from_millis(1);
        next.map_or(LONGEST_SLEEP, |next| {
            (next.saturating_duration_since(self.now) + rounding).min(LONGEST_SLEEP)
        })
    }
}

fn rules(config: &EndpointConfig) -> EndpointRules {
    EndpointRules {
        layout: config.layout.clone(),
        blocks: ((config.region.len() - config.staging_bytes) / config.layout.block_bytes()) as u64,
        staging: config.staging_bytes as u64,
        in_place: config.in_place,
        coverage: config.coverage,
        lease: config.timing.lease,
        heartbeat: config.timing.heartbeat,
        patience: config.timing.patience,
        stall: STALL,
        offers: OFFERS,
        credit: config.credit,
        pulls: config.handoff == HandoffMode::Pull,
    }
}

fn reserve_order(reserve: Reserve) -> ReserveOrder {
    let Reserve { handoff, peer_instance: peer, within, tokens, first_block, cached, targets } = reserve;
    ReserveOrder { handoff, peer, within, tokens, first_block, cached, targets }
}

fn listen(address: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn hello(config: &EndpointConfig, address: SocketAddr, socket_name: Option<String>, rdma: bool) -> Hello {
    let shared_memory = socket_name.is_some();
    let is_strict =
        config.require && matches!(config.transport, TransportChoice::SharedMemory | TransportChoice::Rdma);
    let tcp = !is_strict;
    let on_failure = if config.require { OnFailure::Fail } else { OnFailure::FallBack };
    Hello {
        protocol: PROTOCOL,
        instance: config.instance,
        name: config.name.clone(),
        layout: config.layout.clone(),
        region_bytes: config.region.len() as u64,
        staging_bytes: config.staging_bytes as u64,
        listen_port: address.port(),
        host: host::identity(),
        memory_socket: socket_name.unwrap_or_default(),
        offer: Offer { shared_memory, rdma, tcp, on_failure },
        pulls: config.handoff == HandoffMode::Pull,
        lease: config.timing.lease,
    }
}

/// What one turn takes at most while it has the processor; the rest of a longer one was spent waiting for it.
const LONGEST_TURN: Duration = Duration::from_millis(20);
/// How often a device is asked how far it is, which rings no bell: what a copy of some blocks takes.
const DEVICE_NAP: Duration = Duration::from_micros(50);
/// Bounds the harm of a clock that was forgotten.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
