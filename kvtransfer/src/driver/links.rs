//! Connections that are up: what comes in, what keeps them alive, and how they end.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemill_kvtransfer_proto::layout::Bridge;
use tidemill_kvtransfer_proto::message::{Message, TransportKind};
use tidemill_kvtransfer_proto::reservation::ReservationEvent;
use tidemill_kvtransfer_proto::sender::SenderEvent;
use tidemill_kvtransfer_proto::transport::{RemoteRange, WriteFault};
use tidemill_kvtransfer_proto::units::HandoffId;

use super::Driver;
use super::peers::{DataPath, Ended, Established, FIRST_BACKOFF, Link, Probe};
use crate::endpoint::{LinkEntry, TransportChoice};
use crate::event::{HandoffEvent, Met, PeerLink};
use crate::shm::Region;
use crate::tcp::Loss;
use crate::verification::BlockShape;

impl Driver {
    /// A handshake has come to its end.
    pub(super) fn bring_up(&mut self, instance: u64, established: Established) {
        let Established { connection, mut path, process, hello, fallback, busy } = established;
        let kind = path.kind();
        self.log_way(&hello.name, kind, fallback.as_deref());
        let probe = match &mut path {
            DataPath::SharedMemory(transport) => Probe::Done(read_speed(transport.arena())),
            DataPath::Tcp(data) => {
                data.probe(PROBE_BYTES);
                Probe::Running(Instant::now())
            }
        };
        let shape = BlockShape { block: hello.layout.block_bytes(), granule: hello.layout.strides().layer };
        let bridge = self.config.layout.bridge(&hello.layout);
        let in_place =
            self.config.in_place && kind == TransportKind::SharedMemory && bridge == Ok(Bridge::Identical);
        let link = PeerLink { transport: kind, bytes_per_second: 0.0 };
        self.links.set(instance, Some(LinkEntry { link, in_place }));
        let Some(peer) = self.peers.get_mut(&instance) else { return };
        peer.name.clone_from(&hello.name);
        peer.dial = None;
        peer.inbound = None;
        peer.process = process.or(peer.process.take());
        peer.backoff = FIRST_BACKOFF;
        peer.link = Some(Link {
            connection,
            path,
            shape,
            blocks: hello.region_bytes / shape.block as u64,
            layout: Arc::new(hello.layout),
            bridge,
            is_fresh: true,
            last_heard: self.now,
            next_beat: self.now,
            beat_every: self.config.timing.heartbeat.min(hello.lease / BEATS_PER_LEASE),
            beats: 0,
            probe,
            posting: VecDeque::new(),
            writes: BTreeMap::new(),
            ended: Ended::default(),
        });
        self.prove_quiet(instance, &busy);
        self.announce_waiting(instance);
        self.report_up(instance);
    }

    fn log_way(&self, peer: &str, kind: TransportKind, fallback: Option<&str>) {
        let transport = kind.name();
        match fallback {
            Some(reason) => tracing::warn!(peer, transport, reason, "peer connected by the second-best way"),
            None if self.config.transport == TransportChoice::SharedMemory && kind == TransportKind::Tcp => {
                tracing::warn!(peer, transport, reason = "not on this host", "no shared memory with peer");
            }
            None => tracing::info!(peer, transport, "peer connected"),
        }
    }

    /// Reports a link once its speed is known.
    fn report_up(&mut self, instance: u64) {
        let Some(peer) = self.peers.get(&instance) else { return };
        let Some(Link { probe: Probe::Done(bytes_per_second), path, .. }) = &peer.link else { return };
        let link = PeerLink { transport: path.kind(), bytes_per_second: *bytes_per_second };
        let name = peer.name.clone();
        tracing::info!(
            peer = name,
            transport = link.transport.name(),
            gigabytes_per_second = bytes_per_second / 1e9,
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
        let Some(Link { probe: Probe::Done(bytes_per_second), path, .. }) = &peer.link else { return };
        let link = PeerLink { transport: path.kind(), bytes_per_second: *bytes_per_second };
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
                self.hear(instance, message);
            }
            if let Err(loss) = outcome {
                self.lose(instance, &loss);
            }
        }
    }

    fn read_link(&mut self, instance: u64, messages: &mut Vec<Message>) -> Result<(), Loss> {
        let Self { peers, incoming, config, shape, ready, now, .. } = self;
        let Some(link) = peers.get_mut(&instance).and_then(|peer| peer.link.as_mut()) else { return Ok(()) };
        if std::mem::take(&mut link.is_fresh) || is_in(ready, link.connection.fd()) {
            let outcome = link.connection.receive(messages);
            if !messages.is_empty() {
                link.last_heard = *now;
            }
            outcome?;
        }
        if let DataPath::Tcp(data) = &mut link.path
            && is_in(ready, data.fd())
        {
            let mut admit = |range: &RemoteRange| {
                let it = incoming.get(&range.handoff).filter(|it| it.peer == instance);
                it.ok_or(WriteFault::NotExpected)?.reservation.admit(range, shape.block)
            };
            if data.receive(&config.region, &mut admit)? {
                link.last_heard = *now;
            }
            if let Probe::Running(since) = link.probe
                && data.take_probed()
            {
                link.probe = Probe::Done(f64::from(PROBE_BYTES) / since.elapsed().as_secs_f64());
                self.report_up(instance);
            }
        }
        Ok(())
    }

    fn hear(&mut self, instance: u64, message: Message) {
        match message {
            Message::Reserve(reserve) => self.hear_reserve(instance, reserve),
            Message::Cancel { handoff } => self.hear_cancel(instance, handoff),
            Message::Adopted { handoff } => self.hear_of_sender(instance, handoff, SenderEvent::Adopted),
            Message::Refused { handoff, reason } => {
                self.hear_of_sender(instance, handoff, SenderEvent::Refused { reason });
            }
            Message::Decline { handoff, reason } => {
                self.hear_of_reservation(instance, handoff, ReservationEvent::Declined { reason });
            }
            Message::Commit(commit) => {
                self.hear_of_reservation(instance, commit.handoff, ReservationEvent::Commit(commit));
            }
            Message::Quiet { handoff, reason } => {
                self.hear_of_reservation(instance, handoff, ReservationEvent::Quiet { reason });
            }
            Message::Heartbeat { .. } => {}
            Message::Bye { busy } => {
                self.lose(instance, &Loss::Goodbye);
                self.prove_quiet(instance, &busy);
            }
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Refuse(_)
            | Message::Attach(_)
            | Message::Ready(_) => {
                self.doomed.push((instance, Loss::Protocol("a message of the handshake after its end")));
            }
        }
    }

    /// Queues a message for a peer. Without a link it is dropped: the end of a link is news enough for the other
    /// side, and the next handshake says what is still of interest.
    pub(super) fn send(&mut self, instance: u64, message: &Message) {
        if let Some(link) = self.link_mut(instance)
            && let Err(loss) = link.connection.send(message)
        {
            self.doomed.push((instance, loss));
        }
    }

    pub(super) fn link_mut(&mut self, instance: u64) -> Option<&mut Link> {
        self.peers.get_mut(&instance)?.link.as_mut()
    }

    /// Ends a link and everything that depends on it.
    pub(super) fn lose(&mut self, instance: u64, loss: &Loss) {
        let Some(peer) = self.peers.get_mut(&instance) else { return };
        let Some(mut link) = peer.link.take() else { return };
        let (name, reason) = (peer.name.clone(), loss.to_string());
        tracing::warn!(peer = name, reason, "peer lost");
        self.links.set(instance, None);
        peer.idle_since = self.now;
        peer.back_off(self.now);
        link.path.sever();
        let mut done = Vec::new();
        link.path.transport().poll(&mut done);
        drop(link.connection); // From here on nothing of the old link can be received.
        self.tell(HandoffEvent::PeerDown { name: name.clone(), instance, reason: reason.clone() });
        self.lose_reservations(instance, &name, &reason);
        self.lose_senders(instance, &name, &reason);
        // Only now: a handoff that had finished would take its last completion for the time to commit.
        for completion in done {
            if let Some(handoff) = link.writes.remove(&completion.id) {
                self.apply_to_sender(handoff, SenderEvent::Settled { writes: 1 });
            }
        }
    }

    /// Ends the links that were found broken while something else was being done.
    pub(super) fn bury_the_doomed(&mut self) {
        for (instance, loss) in std::mem::take(&mut self.doomed) {
            self.lose(instance, &loss);
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
            self.lose(instance, &Loss::ProcessGone);
            self.prove_quiet(instance, &[]);
            if let Some(peer) = self.peers.get_mut(&instance) {
                peer.process = None;
            }
        }
    }

    /// Heartbeats, leases and everything else that happens because time passes.
    pub(super) fn check_clocks(&mut self) {
        let (now, lease) = (self.now, self.config.timing.lease);
        let instances: Vec<u64> = self.peers.keys().copied().collect();
        for instance in instances {
            let Some(link) = self.link_mut(instance) else { continue };
            let silence = now.saturating_duration_since(link.last_heard);
            if lease < silence {
                self.lose(instance, &Loss::Silent(silence));
                continue;
            }
            if link.next_beat <= now {
                link.next_beat = now + link.beat_every;
                link.beats += 1;
                let beat = Message::Heartbeat { seq: link.beats };
                self.send(instance, &beat);
            }
            if let Some(link) = self.link_mut(instance)
                && let Probe::Running(since) = link.probe
                && since + PROBE_PATIENCE <= now
            {
                link.probe = Probe::Done(0.0);
                self.report_up(instance);
            }
        }
        self.end_waiting();
        self.forget_idle_peers();
    }

    /// A peer that restarts comes back under another number; the old one need not be kept for ever.
    fn forget_idle_peers(&mut self) {
        let Self { peers, incoming, outgoing, now, .. } = self;
        peers.retain(|instance, peer| {
            let is_connected = peer.link.is_some() || peer.dial.is_some() || peer.inbound.is_some();
            is_connected
                || !peer.meets.is_empty()
                || *now < peer.idle_since + IDLE
                || incoming.values().any(|it| it.peer == *instance)
                || outgoing.values().any(|it| it.peer == *instance)
        });
    }

    /// Sends what the control sockets take.
    pub(super) fn flush_links(&mut self) {
        for (&instance, peer) in &mut self.peers {
            if let Some(link) = &mut peer.link
                && let Err(loss) = link.connection.flush()
            {
                self.doomed.push((instance, loss));
            }
        }
    }

    /// Handoffs to that peer of which this side cannot promise that it no longer touches their blocks.
    pub(super) fn busy_with(&self, instance: u64) -> Vec<HandoffId> {
        let busy = self.outgoing.iter().filter(|(_, it)| it.peer == instance && it.sender.is_busy());
        busy.map(|(&handoff, _)| handoff).collect()
    }

    /// Last words to everybody.
    pub(super) fn say_goodbye(&mut self) {
        let instances: Vec<u64> = self.peers.keys().copied().collect();
        for instance in instances {
            // Writes end with this thread; only an engine that computes in place goes on without it.
            let is_in_place = |handoff: &HandoffId| self.outgoing[handoff].computes_in_place();
            let busy = self.busy_with(instance).into_iter().filter(is_in_place).collect();
            let Some(link) = self.link_mut(instance) else { continue };
            link.path.sever();
            if let Err(loss) =
                link.connection.send(&Message::Bye { busy }).and_then(|()| link.connection.flush())
            {
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

/// A beat may be late, and the one after it too.
const BEATS_PER_LEASE: u32 = 4;
/// Long enough to see the line behind the socket buffers, short enough for a slow one.
const PROBE_BYTES: u32 = 4 << 20;
const PROBE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a peer is remembered with which nothing is going on.
const IDLE: Duration = Duration::from_secs(300);
