//! How two workers come to have a link: what production's [`Contact`] decides, over simulated connections.

use std::time::Duration;

use tidemill_kvtransfer_proto::endpoint_core::{ByDevice, LinkUp};
use tidemill_kvtransfer_proto::handshake::Contact;
use tidemill_kvtransfer_proto::message::{
    Commit, Filled, Hello, Message, Offer, OnFailure, PROTOCOL, Ready, Refuse, TransportKind, Welcome,
};
use tidemill_kvtransfer_proto::units::{HandoffId, Moment};

use super::process::{LEASE, Life};
use super::wire::ConnId;
use super::world::{Process, World};

/// What a driver knows of a peer beside the core.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) place: usize,
    pub(super) contact: Contact,
    /// A connection that this side is making.
    pub(super) dial: Option<Dial>,
    /// One that the peer is making.
    pub(super) inbound: Option<(ConnId, Hello)>,
    pub(super) is_to_be_met: bool,
}

#[derive(Debug)]
pub(super) struct Dial {
    pub(super) conn: ConnId,
    /// Once the peer has answered.
    pub(super) hello: Option<Hello>,
}

impl World<'_> {
    /// The router has told of a peer.
    pub(super) fn meet(&mut self, process: Process, peer: Process) {
        let now = self.local_moment(process.place);
        let Some(life) = self.life(process) else { return };
        life.core.meet(peer.instance, &format!("worker {}", peer.place));
        let known = life.peers.entry(peer.instance).or_insert_with(|| Peer::new(peer, process.instance, now));
        known.contact.met(now);
        known.is_to_be_met = !life.up.contains_key(&peer.instance);
        self.wake_endpoint(process, self.now + 1);
    }

    /// Dials whoever is wanted, and gives up on handshakes that take too long.
    pub(super) fn tend_peers(&mut self, process: Process) {
        let now = self.local_moment(process.place);
        let Some(life) = self.life(process) else { return };
        let peers: Vec<u64> = life.peers.keys().copied().collect();
        for peer in peers {
            let life = self.life(process).expect("it runs");
            let is_up = life.up.contains_key(&peer);
            let is_wanted = life.core.wants_link(peer);
            let it = life.peers.get_mut(&peer).expect("just listed");
            let is_late = it.contact.is_late(Duration::ZERO, now);
            if is_late && it.dial.is_some() {
                self.dial_failed(process, peer, "the handshake took too long");
                continue;
            }
            if let Some((conn, _)) = it.inbound.take_if(|_| is_late) {
                it.contact.answer_ended();
                self.close(conn, 1);
                continue;
            }
            if it.contact.is_due(is_up, now) && (is_wanted || it.is_to_be_met) {
                self.dial(process, peer);
            }
        }
    }

    pub(super) fn dial(&mut self, process: Process, peer: u64) {
        let now = self.local_moment(process.place);
        let life = self.life(process).expect("it runs");
        let hello = life.hello();
        let known = life.peers.get_mut(&peer).expect("only who is known is dialled");
        known.contact.dials(HANDSHAKE, now);
        let place = known.place;
        let Some(answering) = self.process(place) else {
            return self.dial_failed(process, peer, "connection refused");
        };
        let conn = self.connect(process, answering);
        let known = self.life(process).expect("it runs").peers.get_mut(&peer).expect("just seen");
        known.dial = Some(Dial { conn, hello: None });
        self.say(conn, 0, Message::Hello(hello));
    }

    pub(super) fn dial_failed(&mut self, process: Process, peer: u64, reason: &str) {
        self.note(|| format!("worker {} cannot reach {peer:x}: {reason}", process.place));
        let now = self.local_moment(process.place);
        let life = self.life(process).expect("it runs");
        let known = life.peers.get_mut(&peer).expect("it was dialled");
        known.contact.dial_failed(now);
        known.is_to_be_met = false;
        if let Some(dial) = known.dial.take() {
            self.close(dial.conn, 0);
        }
        let life = self.life(process).expect("it runs");
        life.core.unreachable(peer, reason);
        self.act(process);
    }

    /// A message has come over a connection.
    pub(super) fn hear(&mut self, process: Process, conn: ConnId, side: usize, message: Message) {
        let peer = self.conns[&conn].ends[1 - side].process;
        let (now, local) = (self.local_moment(process.place), self.workers[process.place].local(self.now));
        let Some(life) = self.life(process) else { return };
        if life.up.get(&peer.instance).is_some_and(|(up, _, _)| *up == conn) {
            life.last_delivery.insert(peer.instance, local);
            if let Message::Filled(filled) = &message {
                self.check_filled(process, filled);
            }
            let Some(life) = self.life(process) else { return };
            match &message {
                Message::Filled(Filled { handoff, first, digests, .. })
                | Message::Commit(Commit { handoff, first, digests, .. }) => {
                    life.claimed.insert((*handoff, *first as usize), digests.clone());
                }
                _ => {}
            }
            life.core.hear(peer.instance, message, now);
            return self.act(process);
        }
        match message {
            Message::Hello(hello) => self.greet(process, conn, peer, hello),
            Message::Welcome(welcome) => self.welcomed(process, conn, welcome.hello),
            Message::Refuse(refuse) => self.refused(process, conn, &refuse),
            Message::Ready(ready) => self.ready(process, conn, side, peer, ready.busy),
            other => panic!("{other:?} comes before the handshake is over"),
        }
    }

    /// The other side does not want a connection that this side makes.
    fn refused(&mut self, process: Process, conn: ConnId, refuse: &Refuse) {
        let Some(peer) = self.dialled(process, conn) else { return };
        if !refuse.is_crossed() {
            return self.dial_failed(process, peer, &refuse.reason);
        }
        let now = self.local_moment(process.place);
        let known = self.life(process).expect("it runs").peers.get_mut(&peer).expect("it was dialled");
        known.contact.crossed(HANDSHAKE, now);
        known.dial = None;
        self.close(conn, 0);
    }

    /// Whom this side tries to reach over a connection; whoever answered need not be the one.
    fn dialled(&mut self, process: Process, conn: ConnId) -> Option<u64> {
        let is_it = |it: &Peer| it.dial.as_ref().is_some_and(|dial| dial.conn == conn);
        let life = self.life(process)?;
        life.peers.iter().find(|(_, it)| is_it(it)).map(|(&peer, _)| peer)
    }

    pub(super) fn greet(&mut self, process: Process, conn: ConnId, peer: Process, hello: Hello) {
        let now = self.local_moment(process.place);
        let life = self.life(process).expect("it runs");
        let ours = life.hello();
        if let Err(refuse) = ours.check(&hello) {
            self.say(conn, 1, Message::Refuse(refuse));
            self.close(conn, 1);
            return;
        }
        life.core.meet(peer.instance, &hello.name);
        let known = life.peers.entry(peer.instance).or_insert_with(|| Peer::new(peer, process.instance, now));
        if !known.contact.answers_hello() {
            self.say(conn, 1, Message::Refuse(Refuse::crossed()));
            self.close(conn, 1);
            return;
        }
        known.contact.answered_hello(HANDSHAKE, now);
        let dial = known.dial.take();
        let inbound = known.inbound.replace((conn, hello));
        let welcome = Message::Welcome(Welcome { hello: ours, token: 0 });
        if let Some(dial) = dial {
            self.close(dial.conn, 0);
        }
        if let Some((older, _)) = inbound {
            self.close(older, 1);
        }
        self.say(conn, 1, welcome);
        self.plan_endpoint_turn(process);
    }

    pub(super) fn welcomed(&mut self, process: Process, conn: ConnId, theirs: Hello) {
        let Some(peer) = self.dialled(process, conn) else { return };
        if let Err(refuse) = self.life(process).expect("it runs").hello().check_answer(peer, &theirs) {
            return self.dial_failed(process, peer, &refuse.reason);
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
            let Some((_, hello)) = known.inbound.take_if(|it| it.0 == conn) else { return };
            known.contact.answer_ended();
            let ours = life.core.prepare_link(peer.instance, now);
            self.act(process);
            self.say(conn, 1, ready(ours));
            hello
        } else {
            let Some(dial) = known.dial.take_if(|it| it.conn == conn) else { return };
            dial.hello.expect("the peer was welcome before it was ready")
        };
        self.bring_up(
            process,
            conn,
            side,
            peer,
            LinkUp { hello, proof: self.conns[&conn].proof, busy, by_device: ByDevice::default() },
        );
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
        known.contact.is_up();
        let (dial, inbound) = (known.dial.take(), known.inbound.take());
        if let Some(dial) = dial {
            self.close(dial.conn, 0);
        }
        if let Some((other, _)) = inbound {
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
        if let Some(peer) = self.dialled(process, conn) {
            return self.dial_failed(process, peer, "the connection was closed");
        }
        if let Some(known) = self.life(process).and_then(|life| life.peers.get_mut(&peer))
            && known.inbound.take_if(|it| it.0 == conn).is_some()
        {
            known.contact.answer_ended();
        }
        self.close(conn, side);
    }
}

impl Peer {
    fn new(peer: Process, ours: u64, now: Moment) -> Self {
        let contact = Contact::new(ours, peer.instance, now);
        Self { place: peer.place, contact, dial: None, inbound: None, is_to_be_met: false }
    }
}

impl Life {
    pub(super) fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL,
            instance: self.instance,
            name: format!("{:x}", self.instance),
            layout: self.memory.shape().layout(),
            region_bytes: u64::from(self.scheduler.ledger().total.0)
                * self.memory.shape().block_bytes() as u64
                + self.staging as u64,
            staging_bytes: self.staging as u64,
            listen_port: 1,
            host: String::new(),
            memory_socket: String::new(),
            offer: Offer { shared_memory: true, rdma: false, tcp: true, on_failure: OnFailure::FallBack },
            pulls: self.pulls,
            lease: Duration::from_micros(LEASE),
        }
    }
}

fn ready(busy: Vec<HandoffId>) -> Message {
    Message::Ready(Ready { transport: TransportKind::Tcp, fallback: None, busy, by_device: false })
}

/// As in production.
const HANDSHAKE: Duration = Duration::from_secs(2);
