//! How two workers come to have a link, as the driver of an endpoint does it.

use std::time::Duration;

use tidemill_kvtransfer_proto::endpoint_core::LinkUp;
use tidemill_kvtransfer_proto::message::{
    Hello, Message, Offer, OnFailure, PROTOCOL, Ready, Refuse, TransportKind, Welcome,
};
use tidemill_kvtransfer_proto::units::HandoffId;

use super::model::{BLOCK_BYTES, layout};
use super::process::{LEASE, Life};
use super::wire::ConnId;
use super::world::{Process, World};

/// What a driver knows of a peer beside the core.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) place: usize,
    pub(super) dial: Option<Dial>,
    pub(super) inbound: Option<(ConnId, Hello, u64)>,
    pub(super) is_to_be_met: bool,
    pub(super) retry_at: u64,
    pub(super) backoff: u64,
}

#[derive(Debug)]
pub(super) struct Dial {
    pub(super) conn: ConnId,
    /// Once the peer has answered.
    pub(super) hello: Option<Hello>,
    pub(super) deadline: u64,
}

impl World<'_> {
    /// The router has told of a peer.
    pub(super) fn meet(&mut self, process: Process, peer: Process) {
        let now = self.now;
        let Some(life) = self.life(process) else { return };
        life.core.meet(peer.instance, &format!("worker {}", peer.place));
        let known = life.peers.entry(peer.instance).or_insert_with(|| Peer::new(peer.place));
        known.retry_at = now;
        known.is_to_be_met = !life.up.contains_key(&peer.instance);
        self.wake_endpoint(process, now + 1);
    }

    /// Dials whoever is wanted, and gives up on handshakes that take too long.
    pub(super) fn tend_peers(&mut self, process: Process) {
        let now = self.now;
        let Some(life) = self.life(process) else { return };
        let peers: Vec<u64> = life.peers.keys().copied().collect();
        for peer in peers {
            let life = self.life(process).expect("it runs");
            let is_up = life.up.contains_key(&peer);
            let is_wanted = life.core.wants_link(peer);
            let it = life.peers.get_mut(&peer).expect("just listed");
            if it.dial.as_ref().is_some_and(|dial| dial.deadline <= now) {
                self.dial_failed(process, peer, "the handshake took too long");
                continue;
            }
            if let Some((conn, _, _)) = it.inbound.take_if(|(_, _, deadline)| *deadline <= now) {
                self.close(conn, 1);
                continue;
            }
            let is_away = !is_up && it.dial.is_none() && it.inbound.is_none();
            if is_away && it.retry_at <= now && (is_wanted || it.is_to_be_met) {
                self.dial(process, peer);
            }
        }
    }

    pub(super) fn dial(&mut self, process: Process, peer: u64) {
        let life = self.life(process).expect("it runs");
        let hello = life.hello();
        let known = life.peers.get_mut(&peer).expect("only who is known is dialled");
        let place = known.place;
        let Some(answering) = self.process(place) else {
            return self.dial_failed(process, peer, "connection refused");
        };
        let conn = self.connect(process, answering);
        let deadline = self.now + HANDSHAKE;
        let known = self.life(process).expect("it runs").peers.get_mut(&peer).expect("just seen");
        known.dial = Some(Dial { conn, hello: None, deadline });
        self.say(conn, 0, Message::Hello(hello));
    }

    pub(super) fn dial_failed(&mut self, process: Process, peer: u64, reason: &str) {
        self.note(|| format!("worker {} cannot reach {peer:x}: {reason}", process.place));
        self.back_off(process, peer);
        let life = self.life(process).expect("it runs");
        let known = life.peers.get_mut(&peer).expect("it was dialled");
        known.is_to_be_met = false;
        if let Some(dial) = known.dial.take() {
            self.close(dial.conn, 0);
        }
        let life = self.life(process).expect("it runs");
        life.core.unreachable(peer, reason);
        self.act(process);
    }

    pub(super) fn back_off(&mut self, process: Process, peer: u64) {
        let now = self.now;
        let Some(known) = self.life(process).and_then(|life| life.peers.get_mut(&peer)) else { return };
        known.retry_at = now + known.backoff;
        known.backoff = (known.backoff * 2).min(500_000);
    }

    /// A message has come over a connection.
    pub(super) fn hear(&mut self, process: Process, conn: ConnId, side: usize, message: Message) {
        let peer = self.conns[&conn].ends[1 - side].process;
        let (now, local) = (self.local_moment(process.place), self.workers[process.place].local(self.now));
        let Some(life) = self.life(process) else { return };
        if life.up.get(&peer.instance).is_some_and(|(up, _, _)| *up == conn) {
            life.last_delivery.insert(peer.instance, local);
            life.core.hear(peer.instance, message, now);
            return self.act(process);
        }
        match message {
            Message::Hello(hello) => self.greet(process, conn, peer, hello),
            Message::Welcome(welcome) => self.welcomed(process, conn, welcome.hello),
            Message::Refuse(_) => {
                let until = self.now + HANDSHAKE;
                let life = self.life(process).expect("it runs");
                if let Some(known) = life.peers.get_mut(&peer.instance)
                    && known.dial.take_if(|dial| dial.conn == conn).is_some()
                {
                    known.retry_at = until;
                }
                self.close(conn, side);
            }
            Message::Ready(ready) => self.ready(process, conn, side, peer, ready.busy),
            other => panic!("{other:?} comes before the handshake is over"),
        }
    }

    pub(super) fn greet(&mut self, process: Process, conn: ConnId, peer: Process, hello: Hello) {
        let deadline = self.now + HANDSHAKE;
        let life = self.life(process).expect("it runs");
        let welcome = Message::Welcome(Welcome { hello: life.hello(), token: 0 });
        life.core.meet(peer.instance, &hello.name);
        let known = life.peers.entry(peer.instance).or_insert_with(|| Peer::new(peer.place));
        if known.dial.is_some() && process.instance < peer.instance {
            let refuse =
                Refuse { field: "crossed".to_owned(), reason: "this side connects already".to_owned() };
            self.say(conn, 1, Message::Refuse(refuse));
            self.close(conn, 1);
            return;
        }
        let dial = known.dial.take();
        let inbound = known.inbound.replace((conn, hello, deadline));
        if let Some(dial) = dial {
            self.close(dial.conn, 0);
        }
        if let Some((older, _, _)) = inbound {
            self.close(older, 1);
        }
        self.say(conn, 1, welcome);
        self.plan_endpoint_turn(process);
    }

    pub(super) fn welcomed(&mut self, process: Process, conn: ConnId, theirs: Hello) {
        let life = self.life(process).expect("it runs");
        let dialled = life.peers.iter().find(|(_, it)| it.dial.as_ref().is_some_and(|it| it.conn == conn));
        let Some(peer) = dialled.map(|(&peer, _)| peer) else { return };
        if theirs.instance != peer {
            return self.dial_failed(process, peer, "another one answers there");
        }
        let now = self.local_moment(process.place);
        let life = self.life(process).expect("it runs");
        life.peers.get_mut(&peer).expect("just found").dial.as_mut().expect("just found").hello =
            Some(theirs);
        let busy = life.core.prepare_link(peer, now);
        self.act(process);
        self.say(conn, 0, ready(busy));
    }

    pub(super) fn ready(
        &mut self,
        process: Process,
        conn: ConnId,
        side: usize,
        peer: Process,
        busy: Vec<HandoffId>,
    ) {
        let now = self.local_moment(process.place);
        let life = self.life(process).expect("it runs");
        let Some(known) = life.peers.get_mut(&peer.instance) else { return };
        let hello = if side == 1 {
            let Some((_, hello, _)) = known.inbound.take_if(|it| it.0 == conn) else { return };
            let ours = life.core.prepare_link(peer.instance, now);
            self.act(process);
            self.say(conn, 1, ready(ours));
            hello
        } else {
            let Some(dial) = known.dial.take_if(|it| it.conn == conn) else { return };
            dial.hello.expect("the peer was welcome before it was ready")
        };
        self.bring_up(process, conn, side, peer, LinkUp { hello, proof: self.conns[&conn].proof, busy });
    }

    pub(super) fn bring_up(
        &mut self,
        process: Process,
        conn: ConnId,
        side: usize,
        peer: Process,
        up: LinkUp,
    ) {
        let (now, local) = (self.local_moment(process.place), self.workers[process.place].local(self.now));
        self.summary.links += 1;
        let life = self.life(process).expect("it runs");
        life.core.link_lost(peer.instance, "the peer connected anew", now);
        self.act(process);
        let life = self.life(process).expect("it runs");
        let link = life.core.link_up(peer.instance, up, now);
        life.up.insert(peer.instance, (conn, side, link));
        life.last_delivery.insert(peer.instance, local);
        let known = life.peers.get_mut(&peer.instance).expect("it shook hands");
        known.is_to_be_met = false;
        known.backoff = FIRST_BACKOFF;
        let (dial, inbound) = (known.dial.take(), known.inbound.take());
        if let Some(dial) = dial {
            self.close(dial.conn, 0);
        }
        if let Some((other, _, _)) = inbound {
            self.close(other, 1);
        }
        self.note(|| format!("worker {} has a link to worker {}", process.place, peer.place));
        self.say_status(process);
        self.act(process);
    }

    /// The other side has closed a connection.
    pub(super) fn connection_closed(&mut self, process: Process, conn: ConnId, side: usize) {
        let peer = self.conns[&conn].ends[1 - side].process.instance;
        let now = self.local_moment(process.place);
        let Some(life) = self.life(process) else { return };
        if life.up.get(&peer).is_some_and(|(up, _, _)| *up == conn) {
            life.core.link_lost(peer, "the connection was closed", now);
            return self.act(process);
        }
        // Whom it dialled need not be who answered.
        let dialled = life.peers.iter().find(|(_, it)| it.dial.as_ref().is_some_and(|it| it.conn == conn));
        if let Some(peer) = dialled.map(|(&peer, _)| peer) {
            return self.dial_failed(process, peer, "the connection was closed");
        }
        if let Some(known) = life.peers.get_mut(&peer) {
            known.inbound.take_if(|it| it.0 == conn);
        }
        self.close(conn, side);
    }
}

impl Peer {
    pub(super) fn new(place: usize) -> Self {
        Self { place, dial: None, inbound: None, is_to_be_met: false, retry_at: 0, backoff: FIRST_BACKOFF }
    }
}

impl Life {
    pub(super) fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL,
            instance: self.instance,
            name: format!("{:x}", self.instance),
            layout: layout(),
            region_bytes: u64::from(self.scheduler.ledger().total.0) * BLOCK_BYTES as u64,
            listen_port: 1,
            host: String::new(),
            memory_socket: String::new(),
            offer: Offer { shared_memory: true, rdma: false, tcp: true, on_failure: OnFailure::FallBack },
            lease: Duration::from_micros(LEASE),
        }
    }
}

fn ready(busy: Vec<HandoffId>) -> Message {
    Message::Ready(Ready { transport: TransportKind::Tcp, fallback: None, busy })
}

// As in production, in microseconds.
const HANDSHAKE: u64 = 2_000_000;
const FIRST_BACKOFF: u64 = 50_000;
