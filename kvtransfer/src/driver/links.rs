//! Connections that are up: what comes in, what keeps them alive, and how they end.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use tidemill_kvtransfer_proto::endpoint_core::LinkUp;
use tidemill_kvtransfer_proto::message::{Message, TransportKind};
use tidemill_kvtransfer_proto::units::Moment;

use super::Driver;
use super::peers::{DataPath, Established, Link, Probe};
use super::rdma;
use crate::endpoint::{LinkEntry, TransportChoice};
use crate::event::{HandoffEvent, Met, PeerLink};
use crate::shm::Region;
use crate::tcp::Loss;

impl Driver {
    /// A handshake has come to its end.
    pub(super) fn bring_up(&mut self, instance: u64, established: Established) {
        let Established { connection, mut path, process, hello, fallback, busy, by_device } = established;
        // A side that dials has no older link, and one that is dialled has ended it: only to be sure.
        self.lose(instance, &Loss::Replaced);
        let (kind, paths) = (path.kind(), path.count());
        let is_fallback = self.log_way(&hello.name, kind, fallback.as_deref());
        if kind == TransportKind::Rdma {
            let way = |pulls| if pulls { "reads" } else { "writes" };
            let (theirs, ours) = (way(hello.pulls), way(self.hello.pulls));
            tracing::info!(peer = hello.name, to_peer = theirs, from_peer = ours, "how handoffs go");
        }
        let by_device = self.by_device(&path, by_device);
        let devices = self.log_devices(&hello.name, &path, by_device);
        let probe = match &mut path {
            DataPath::SharedMemory(transport) => Probe::Done(read_speed(transport.arena())),
            DataPath::Tcp(data) => {
                data.probe(PROBE_BYTES);
                Probe::Running(Instant::now())
            }
            DataPath::Rdma(transport) => {
                let paths: Vec<String> =
                    transport.paths().into_iter().filter(|path| path.is_up).map(|path| path.device).collect();
                tracing::info!(peer = hello.name, paths = paths.join(" "), "RDMA paths");
                transport.probe(PROBE_BYTES as usize);
                Probe::Running(Instant::now())
            }
        };
        let Some(peer) = self.peers.get_mut(&instance) else { return };
        peer.name.clone_from(&hello.name);
        peer.dial = None;
        peer.inbound = None;
        peer.is_remade = false;
        peer.process = process.or(peer.process.take());
        peer.contact.is_up();
        let up = LinkUp { hello, proof: kind.quiet_proof(), busy, by_device };
        let id = self.core.link_up(instance, up, Moment(self.origin.elapsed()));
        let directions = self.core.directions(instance).expect("the link is up");
        let (is_fresh, remade_by) = (true, None);
        let link = Link {
            id,
            connection,
            path,
            is_fresh,
            is_fallback,
            remade_by,
            directions,
            by_device,
            devices,
            probe,
        };
        peer.link = Some(link);
        let in_place = self.core.reaches_in_place(instance);
        let link =
            PeerLink { transport: kind, bytes_per_second: 0.0, is_fallback, paths, directions, devices };
        self.links.set(instance, Some(LinkEntry { link, in_place }));
        self.act();
        self.report_up(instance);
    }

    /// Says which way is taken; whether it is a worse one than intended.
    fn log_way(&self, peer: &str, kind: TransportKind, fallback: Option<&str>) -> bool {
        let transport = kind.name();
        let missed = match self.config.transport {
            TransportChoice::SharedMemory => Some("shared memory: not on this host, or not offered"),
            TransportChoice::Rdma => Some("RDMA: no device on one of the two"),
            TransportChoice::Auto | TransportChoice::Tcp => None,
        };
        let missed = fallback.or(missed.filter(|_| kind == TransportKind::Tcp));
        match missed {
            Some(reason) => tracing::warn!(peer, transport, reason, "peer connected by the second-best way"),
            None => tracing::info!(peer, transport, "peer connected"),
        }
        missed.is_some()
    }

    /// The speed of a link is known, unless that was given up.
    pub(super) fn measured(&mut self, instance: u64, bytes_per_second: f64) {
        if let Some(link) = self.link_mut(instance)
            && let Probe::Running(_) = link.probe
        {
            link.probe = Probe::Done(bytes_per_second);
            self.report_up(instance);
        }
    }

    /// Reports a link once its speed is known.
    fn report_up(&mut self, instance: u64) {
        let Some(peer) = self.peers.get(&instance) else { return };
        let Some(link) = peer.link.as_ref().and_then(Link::report) else { return };
        let name = peer.name.clone();
        tracing::info!(
            peer = name,
            transport = link.transport.name(),
            speed = format_args!("{:.1} GB/s", link.bytes_per_second / 1e9),
            "peer measured"
        );
        let in_place = self.links.get(instance).is_some_and(|entry| entry.in_place);
        self.links.set(instance, Some(LinkEntry { link, in_place }));
        self.tell(HandoffEvent::PeerUp { name, instance, link });
        self.answer_meets(instance);
    }

    /// Tells those who wait for a peer, if it is up and measured.
    pub(super) fn answer_meets(&mut self, instance: u64) {
        let Some(peer) = self.peers.get_mut(&instance) else { return };
        let Some(link) = peer.link.as_ref().and_then(Link::report) else { return };
        for meet in peer.meets.drain(..) {
            // Who does not wait any more does not need to know.
            let _ = meet.send(Met { name: peer.name.clone(), instance, outcome: Ok(link) });
        }
    }

    /// Reads all links and acts on what they say.
    pub(super) fn read_links(&mut self) {
        let instances: Vec<u64> = self.peers.keys().copied().collect();
        let mut messages = Vec::new();
        for instance in instances {
            let outcome = self.read_link(instance, &mut messages);
            for message in messages.drain(..) {
                match &message {
                    Message::PathDown { path } => self.hear_path_down(instance, *path),
                    Message::PathAnew { path, end } => self.hear_path_anew(instance, *path, end),
                    Message::PathUp { path } => self.hear_path_up(instance, *path),
                    _ => {}
                }
                let is_sign = matches!(message, Message::Filled(_) | Message::Heartbeat { .. });
                if let Message::Commit(_) = message {
                    self.watch.end();
                }
                self.core.hear(instance, message, self.moment());
                self.act();
                if is_sign && self.core.awaits_commit(instance) {
                    self.watch.begin(Instant::now());
                    self.tell(HandoffEvent::Nearing { peer: instance });
                }
            }
            if let Err(loss) = outcome {
                self.lose(instance, &loss);
            }
        }
    }

    fn read_link(&mut self, instance: u64, messages: &mut Vec<Message>) -> Result<(), Loss> {
        let now = self.moment();
        let Self { peers, core, config, ready, .. } = self;
        let Some(link) = peers.get_mut(&instance).and_then(|peer| peer.link.as_mut()) else { return Ok(()) };
        if std::mem::take(&mut link.is_fresh) || is_in(ready, link.connection.fd()) {
            link.connection.receive(messages)?;
        }
        if let DataPath::Rdma(transport) = &mut link.path {
            rdma::hear(transport, ready);
        }
        if let DataPath::Tcp(data) = &mut link.path
            && is_in(ready, data.fd())
        {
            if data.receive(&config.region, &mut |range| core.admit(instance, range))? {
                core.heard(instance, now);
            }
            if let Probe::Running(since) = link.probe
                && data.take_probed()
            {
                let rate = f64::from(PROBE_BYTES) / since.elapsed().as_secs_f64();
                self.measured(instance, rate);
            }
        }
        Ok(())
    }

    pub(super) fn link_mut(&mut self, instance: u64) -> Option<&mut Link> {
        self.peers.get_mut(&instance)?.link.as_mut()
    }

    /// Ends a link and everything that depends on it.
    pub(super) fn lose(&mut self, instance: u64, loss: &Loss) {
        self.core.link_lost(instance, &loss.to_string(), self.moment());
        self.act();
    }

    /// Ends the links that were found broken while something else was being done.
    pub(super) fn bury_the_doomed(&mut self) {
        for (instance, id, loss) in std::mem::take(&mut self.doomed) {
            if self.link_mut(instance).is_some_and(|link| link.id == id) {
                self.lose(instance, &loss);
            }
        }
    }

    /// A process that is gone has no mapping any more: whatever it could write to is quiet.
    pub(super) fn check_processes(&mut self) {
        let is_gone = |ready: &[RawFd], peer: &super::Peer| {
            peer.process.as_ref().is_some_and(|process| is_in(ready, process.fd()) && process.is_gone())
        };
        let gone: Vec<u64> =
            self.peers.iter().filter(|(_, peer)| is_gone(&self.ready, peer)).map(|(&it, _)| it).collect();
        for instance in gone {
            self.core.process_gone(instance, self.moment());
            self.act();
            if let Some(peer) = self.peers.get_mut(&instance) {
                peer.process = None;
            }
        }
    }

    /// Everything that happens because time passes.
    pub(super) fn check_clocks(&mut self) {
        // As of when it was seen what has come: what came since is not silence.
        self.core.tick(self.turn);
        self.act();
        let now = self.now;
        let instances: Vec<u64> = self.peers.keys().copied().collect();
        for instance in instances {
            if let Some(link) = self.link_mut(instance)
                && let Probe::Running(since) = link.probe
                && since + PROBE_PATIENCE <= now
            {
                self.measured(instance, 0.0);
            }
        }
        self.remake_links();
        self.forget_idle_peers();
    }

    /// A peer that restarts comes back under another number; the old one need not be kept for ever.
    fn forget_idle_peers(&mut self) {
        let Self { peers, core, now, .. } = self;
        peers.retain(|&instance, peer| {
            let is_connected = peer.link.is_some() || peer.contact.is_under_way();
            is_connected || !peer.meets.is_empty() || *now < peer.idle_since + IDLE || !core.forget(instance)
        });
    }

    /// Sends what the control sockets take.
    pub(super) fn flush_links(&mut self) {
        for (&instance, peer) in &mut self.peers {
            if let Some(link) = &mut peer.link
                && let Err(loss) = link.connection.flush()
            {
                self.doomed.push((instance, link.id, loss));
            }
        }
    }

    /// Last words to everybody.
    pub(super) fn say_goodbye(&mut self) {
        for (instance, bye) in self.core.goodbye() {
            let Some(link) = self.link_mut(instance) else { continue };
            link.path.sever();
            if let Err(loss) = link.connection.send(&bye).and_then(|()| link.connection.flush()) {
                tracing::debug!(%loss, "no goodbye");
            }
        }
    }
}

fn is_in(ready: &[RawFd], fd: BorrowedFd<'_>) -> bool {
    ready.contains(&fd.as_raw_fd())
}

/// How fast bytes come out of a peer's arena, in bytes per second.
fn read_speed(arena: &Region) -> f64 {
    let len = arena.len().min(PROBE_BYTES as usize);
    let mut target = vec![0; len];
    arena.read(0, &mut target); // Once for the page tables.
    let since = Instant::now();
    arena.read(0, &mut target);
    std::hint::black_box(&target);
    len as f64 / since.elapsed().as_secs_f64().max(1e-9)
}

/// Long enough to see the line behind the socket buffers, short enough for a slow one.
const PROBE_BYTES: u32 = 4 << 20;
const PROBE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a peer is remembered with which nothing is going on.
const IDLE: Duration = Duration::from_secs(300);
