//! Handshakes over RDMA, from either side, and what links of that kind need beside the rest.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::thread::{CpuSet, sched_setaffinity};
use tidemill_kvtransfer_proto::message::{Message, Paths};
use tidemill_kvtransfer_proto::path::PathEnd;
use tidemill_kvtransfer_proto::units::Moment;

use super::Driver;
use super::peers::{DataPath, Inbound};
use crate::endpoint::{EndpointConfig, HandoffMode, TransportChoice};
use crate::error::EndpointError;
use crate::tcp::{Connection, Loss};
use crate::verbs::{Draft, Drafting, Fabric, Nic, NotEnded, RdmaTransport, Registrar};

/// What a worker with devices has.
#[derive(Debug)]
pub(super) struct Rdma {
    pub(super) registrar: Registrar,
    /// Ports in use.
    nics: Vec<Arc<Nic>>,
    gid_index: Option<u8>,
    /// Whether something got through one of them since this side is there. Until then peers are told of no RDMA.
    has_been_usable: bool,
    /// Where the thread is to run.
    cores: Option<Vec<usize>>,
}

/// How far the peer's wish for RDMA has come.
#[derive(Debug, Default)]
pub(super) enum RdmaAnswer {
    /// It has not said any.
    #[default]
    Unasked,
    /// This side's ends are being made.
    Drafting(Drafting, Vec<PathEnd>),
    /// Both sides' ends are known.
    Connected(Box<RdmaTransport>),
    /// It came to nothing; the peer was told.
    Failed,
}

impl Rdma {
    /// Names the descriptors by which devices say that they have news.
    pub(super) fn interests<'a>(&'a self, interest: &mut impl FnMut(BorrowedFd<'a>, PollFlags)) {
        for nic in &self.nics {
            interest(nic.event_fd(), PollFlags::IN);
        }
    }

    /// Whether peers are told of it.
    pub(super) fn is_offered(&self) -> bool {
        self.has_been_usable
    }

    /// Whether something gets through for the first time.
    fn becomes_usable(&mut self) -> bool {
        !self.has_been_usable && {
            self.has_been_usable = self.nics.iter().any(|nic| nic.is_usable(self.gid_index));
            self.has_been_usable
        }
    }

    /// Moves this thread near the device, and says where it is.
    pub(super) fn place_thread(&self) {
        let Some(cores) = &self.cores else { return };
        let mut set = CpuSet::new();
        for &core in cores.iter().filter(|&&core| core < CpuSet::MAX_CPU) {
            set.set(core);
        }
        match sched_setaffinity(None, &set) {
            Ok(()) => tracing::info!(?cores, "transfer thread placed near its RDMA device"),
            // Where the process may not use them it stays where it is.
            Err(error) => {
                tracing::warn!(?cores, %error, "transfer thread cannot be placed near its RDMA device")
            }
        }
    }
}

impl RdmaAnswer {
    /// Whether memory is being registered, here or at the peer.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self, Self::Drafting(..) | Self::Connected(_))
    }
}

/// Opens devices, as far as they are wanted.
pub(super) fn open(config: &EndpointConfig, wake: &Arc<OwnedFd>) -> Result<Option<Rdma>, EndpointError> {
    if !matches!(config.transport, TransportChoice::Auto | TransportChoice::Rdma) {
        return Ok(None);
    }
    let is_required = config.require && config.transport == TransportChoice::Rdma;
    let fabric = match Fabric::open(config.rdma.clone(), &config.region) {
        Ok(fabric) if config.handoff == HandoffMode::Pull => fabric.read_only(),
        Ok(fabric) => fabric,
        Err(source) if is_required => return Err(EndpointError::Rdma { source }),
        Err(error) if config.transport == TransportChoice::Rdma => {
            tracing::warn!(reason = error.to_line(), "no RDMA on this worker: its peers are reached by TCP");
            return Ok(None);
        }
        Err(error) => {
            tracing::info!(reason = error.to_line(), "no RDMA on this worker");
            return Ok(None);
        }
    };
    for nic in &fabric.nics {
        let place = nic.place();
        tracing::info!(device = nic.name(), node = place.place.node, cpus = place.local_cpus, "RDMA device");
    }
    let unusable = fabric.unusable();
    let has_been_usable = unusable.is_none();
    if let Some(reason) = unusable {
        if is_required {
            return Err(EndpointError::Rdma { source: reason.into() });
        }
        tracing::warn!(%reason, "no RDMA on this worker until a port is up: its peers are reached by TCP");
    }
    let (operation, cores, nics) = ("start a thread", fabric.cores(), fabric.nics.clone());
    let gid_index = config.rdma.gid_index;
    let registrar = Registrar::start(fabric, Arc::clone(wake))
        .map_err(|source| EndpointError::System { operation, source })?;
    Ok(Some(Rdma { registrar, nics, gid_index, has_been_usable, cores }))
}

impl Driver {
    /// Has this side's ends made, as the first to speak. `None` without a device.
    pub(super) fn begin_draft(&self, control: &Connection) -> Option<Drafting> {
        Some(self.rdma.as_ref()?.registrar.draft(control.local_ip(), None))
    }

    /// The peer has ends; this side's answer is begun.
    pub(super) fn hear_paths(&self, inbound: &mut Inbound, paths: Paths) -> Result<(), Loss> {
        let is_first = matches!(inbound.rdma, RdmaAnswer::Unasked);
        if !is_first || paths.ends.is_empty() {
            return Err(Loss::Protocol("paths that nobody asked for"));
        }
        let Some(Rdma { registrar, .. }) = &self.rdma else {
            return refuse_paths(inbound, "this side has no device".to_owned());
        };
        let drafting = registrar.draft(inbound.connection.local_ip(), Some(paths.ends.clone()));
        inbound.rdma = RdmaAnswer::Drafting(drafting, paths.ends);
        Ok(())
    }

    /// Goes on with the answer.
    pub(super) fn advance_paths(&self, inbound: &mut Inbound) -> Result<(), Loss> {
        let RdmaAnswer::Drafting(drafting, theirs) = &inbound.rdma else { return Ok(()) };
        let draft = match drafting.try_recv() {
            Ok(Ok(draft)) => draft,
            Ok(Err(error)) => return refuse_paths(inbound, error.to_line()),
            Err(TryRecvError::Empty) => return Ok(()),
            Err(TryRecvError::Disconnected) => {
                return refuse_paths(inbound, "registration failed".to_owned());
            }
        };
        let ends = draft.ends();
        match draft.connect(theirs, inbound.hello.region_bytes) {
            Ok(transport) => {
                inbound.rdma = RdmaAnswer::Connected(Box::new(transport));
                inbound.connection.send(&Message::Paths(Paths { ends, failure: None }))?;
                inbound.connection.flush()
            }
            Err(error) => refuse_paths(inbound, error.to_line()),
        }
    }

    /// Hears what devices say of themselves. Transports see to it when they are polled, later in the same turn.
    pub(super) fn hear_devices(&mut self) {
        let Self { rdma, peers, ready, .. } = self;
        let Some(rdma) = rdma else { return };
        let mut has_news = false;
        for nic in rdma.nics.iter().filter(|nic| ready.contains(&nic.event_fd().as_raw_fd())) {
            has_news = true;
            for failed in nic.hear_events() {
                for peer in peers.values_mut() {
                    if let Some(DataPath::Rdma(transport)) = peer.link.as_mut().map(|link| &mut link.path) {
                        transport.hear_failure(nic, failed);
                    }
                }
            }
        }
        if has_news && rdma.becomes_usable() {
            self.offer_rdma();
        }
    }

    /// A port is up for the first time. Peers that were reached by TCP for want of one are connected anew.
    fn offer_rdma(&mut self) {
        tracing::info!("RDMA can be had from now on");
        self.hello.offer.rdma = true;
        let until = self.turn.plus(REMAKING);
        for link in self.peers.values_mut().filter_map(|peer| peer.link.as_mut()) {
            link.remade_by = matches!(link.path, DataPath::Tcp(_)).then_some(until);
        }
    }

    /// Ends links in whose place there may be better ones: when no handoff is on them, or when these have kept it waiting for
    /// long.
    pub(super) fn remake_links(&mut self) {
        let Self { peers, core, turn, .. } = self;
        let may_end = |instance: u64, by: Moment| core.is_idle_with(instance) || by <= *turn;
        let ending: Vec<u64> = peers
            .iter()
            .filter(|(instance, peer)| {
                let by = peer.link.as_ref().and_then(|link| link.remade_by);
                by.is_some_and(|by| may_end(**instance, by))
            })
            .map(|(&instance, _)| instance)
            .collect();
        for instance in ending {
            self.lose(instance, &Loss::Remade);
            if let Some(peer) = self.peers.get_mut(&instance) {
                peer.is_remade = true;
            }
        }
    }

    /// Peers that have lost their rights to this side's memory.
    pub(super) fn hear_revoked(&mut self) {
        let revoked = self.rdma.as_ref().map(|rdma| rdma.registrar.revoked()).unwrap_or_default();
        for (instance, link) in revoked {
            self.core.access_ended(instance, link, self.moment());
            self.act();
        }
    }

    /// Says which paths have ended and which work again, has some made anew, and takes note of a measurement.
    pub(super) fn follow_paths(&mut self, instance: u64) {
        let speaks_first = self.hello.instance < instance;
        let Some(link) = self.link_mut(instance) else { return };
        let DataPath::Rdma(transport) = &mut link.path else { return };
        let (news, proven) = (transport.take_news(), transport.take_proven());
        let (rate, is_dead) = (transport.take_probed(), transport.is_dead());
        let changed = (!news.is_empty() || !proven.is_empty()).then(|| transport.count());
        let down = news.into_iter().map(|path| Message::PathDown { path });
        let up = proven.into_iter().map(|path| Message::PathUp { path });
        let ends = if speaks_first { transport.renew() } else { Vec::new() };
        let anew = ends.into_iter().map(|(path, end)| Message::PathAnew { path, end });
        // In this order: what is made anew has ended, as the peer must know.
        let lost = down.chain(up).chain(anew).find_map(|message| link.connection.send(&message).err());
        let id = link.id;
        if let Some(paths) = changed {
            self.links.set_paths(instance, paths);
        }
        // With no way left a new connection is made rather than waited for the next handoff to fail.
        if let Some(loss) = lost.or(is_dead.then_some(Loss::NoPath)) {
            self.doomed.push((instance, id, loss));
        }
        if let Some(rate) = rate {
            self.measured(instance, rate);
        }
    }

    /// The peer has ended its side of a path.
    pub(super) fn hear_path_down(&mut self, instance: u64, path: u32) {
        let Some(link) = self.link_mut(instance) else { return };
        let id = link.id;
        let is_known = match &mut link.path {
            DataPath::Rdma(transport) => transport.fence(path),
            DataPath::SharedMemory(_) | DataPath::Tcp(_) => false,
        };
        if !is_known {
            self.doomed.push((instance, id, Loss::Protocol("it spoke of a path that there is not")));
        }
    }

    /// The peer has made an end of a path anew.
    pub(super) fn hear_path_anew(&mut self, instance: u64, path: u32, end: &PathEnd) {
        let speaks_first = self.hello.instance < instance;
        let Some(link) = self.link_mut(instance) else { return };
        let answer = match &mut link.path {
            DataPath::Rdma(transport) => transport.hear_anew(path, end, speaks_first),
            DataPath::SharedMemory(_) | DataPath::Tcp(_) => Err(NotEnded),
        };
        let loss = match answer {
            Ok(None) => None,
            Ok(Some(end)) => link.connection.send(&Message::PathAnew { path, end }).err(),
            Err(NotEnded) => Some(Loss::Protocol("it made a path anew that has not ended")),
        };
        let id = link.id;
        self.doomed.extend(loss.map(|loss| (instance, id, loss)));
    }

    /// The peer has seen that a path works again.
    pub(super) fn hear_path_up(&mut self, instance: u64, path: u32) {
        let Some(link) = self.link_mut(instance) else { return };
        let id = link.id;
        let count = match &mut link.path {
            DataPath::Rdma(transport) => transport.hear_up(path).then(|| transport.count()),
            DataPath::SharedMemory(_) | DataPath::Tcp(_) => None,
        };
        match count {
            Some(paths) => self.links.set_paths(instance, paths),
            None => {
                self.doomed.push((instance, id, Loss::Protocol("it spoke of a path that there is not")));
            }
        }
    }
}

/// The dialling side has heard the other's ends, or that there are none.
pub(super) fn connect(draft: Draft, paths: &Paths, region_bytes: u64) -> Result<Box<RdmaTransport>, String> {
    if let Some(failure) = &paths.failure {
        return Err(format!("the peer says: {failure}"));
    }
    let transport = draft.connect(&paths.ends, region_bytes);
    transport.map(Box::new).map_err(|error| error.to_line())
}

/// Names the descriptors of a transport.
pub(super) fn interests<'a>(
    transport: &'a RdmaTransport,
    interest: &mut impl FnMut(BorrowedFd<'a>, PollFlags),
) {
    for fd in transport.fds() {
        interest(fd, PollFlags::IN);
    }
}

/// Takes note of descriptors that became readable.
pub(super) fn hear(transport: &mut RdmaTransport, ready: &[i32]) {
    transport.hear(|fd| ready.contains(&fd.as_raw_fd()));
}

fn refuse_paths(inbound: &mut Inbound, reason: String) -> Result<(), Loss> {
    tracing::warn!(peer = inbound.hello.name, reason, "RDMA cannot be had");
    inbound.rdma = RdmaAnswer::Failed;
    inbound.connection.send(&Message::Paths(Paths { ends: Vec::new(), failure: Some(reason) }))?;
    inbound.connection.flush()
}

/// For how long handoffs may keep a link from being made anew, which ends them. They are computed again elsewhere.
const REMAKING: Duration = Duration::from_secs(30);
/// How much longer a handshake may take while memory is registered: that walks all pages of the arena.
pub(super) const REGISTRATION: Duration = Duration::from_secs(30);
