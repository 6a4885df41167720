//! Who comes in: connections that have yet to say what they are, and handshakes that a peer began.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::PollFlags;
use tidemill_kvtransfer_proto::codec::{self, encode};
use tidemill_kvtransfer_proto::handshake::Contact;
use tidemill_kvtransfer_proto::message::{Attach, Hello, Message, Ready, Refuse, TransportKind, Welcome};

use super::Driver;
use super::peers::{DataPath, Established, Inbound, Peer};
use super::rdma::RdmaAnswer;
use crate::host;
use crate::shm::{Access, Process, Region, SharedMemoryTransport, exchange};
use crate::tcp::{Connection, DataConnection};

/// A TCP connection whose first message has not come.
#[derive(Debug)]
pub(super) struct Visitor {
    connection: Connection,
    from: SocketAddr,
    pub(super) deadline: Instant,
}

/// A local connection over which memory is to be passed.
#[derive(Debug)]
pub(super) struct MemoryVisitor {
    stream: UnixStream,
    pub(super) deadline: Instant,
}

impl Driver {
    /// Names the descriptors of visitors, and of the doors while there is room for more of them.
    pub(super) fn visitor_interests<'a>(&'a self, interest: &mut impl FnMut(BorrowedFd<'a>, PollFlags)) {
        if self.lobby.len() < MAX_VISITORS {
            interest(self.listener.as_fd(), PollFlags::IN);
        }
        if let Some(listener) = &self.memory_listener
            && self.memory_lobby.len() < MAX_VISITORS
        {
            interest(listener.as_fd(), PollFlags::IN);
        }
        for visitor in &self.lobby {
            interest(visitor.connection.fd(), PollFlags::IN);
        }
        for visitor in &self.memory_lobby {
            interest(visitor.stream.as_fd(), PollFlags::IN);
        }
    }

    /// Lets visitors in and hears what they are.
    pub(super) fn receive_visitors(&mut self) {
        self.accept();
        let (now, visitors) = (self.now, std::mem::take(&mut self.lobby));
        for mut visitor in visitors {
            if !self.is_ready(visitor.connection.fd()) {
                if now < visitor.deadline {
                    self.lobby.push(visitor);
                }
                continue;
            }
            match visitor.connection.receive_one() {
                Ok(Some(Message::Hello(hello))) => self.greet(visitor, hello),
                Ok(Some(Message::Attach(attach))) => self.attach_data(visitor, attach),
                Ok(None) => self.lobby.push(visitor),
                Ok(Some(_)) => {
                    tracing::warn!(from = %visitor.from, "a connection began with the wrong message")
                }
                Err(loss) => {
                    tracing::warn!(from = %visitor.from, %loss, "a connection ended before it began")
                }
            }
        }
        for visitor in std::mem::take(&mut self.memory_lobby) {
            match self.exchange_memory(&visitor) {
                Ok(true) => {}
                Ok(false) if now < visitor.deadline => self.memory_lobby.push(visitor),
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "memory was not exchanged"),
            }
        }
    }

    fn accept(&mut self) {
        let deadline = self.now + self.config.timing.handshake;
        while self.is_ready(self.listener.as_fd())
            && self.lobby.len() < MAX_VISITORS
            && let Ok((stream, from)) = self.listener.accept()
        {
            match prepare(&stream) {
                Ok(()) => self.lobby.push(Visitor { connection: Connection::new(stream), from, deadline }),
                Err(error) => tracing::warn!(%from, %error, "a connection cannot be used"),
            }
        }
        let Some(listener) = self.memory_listener.as_ref().filter(|it| self.is_ready(it.as_fd())) else {
            return;
        };
        while self.memory_lobby.len() < MAX_VISITORS
            && let Ok((stream, _)) = listener.accept()
        {
            if stream.set_nonblocking(true).is_ok() {
                self.memory_lobby.push(MemoryVisitor { stream, deadline });
            }
        }
    }

    /// First message of a control connection.
    fn greet(&mut self, visitor: Visitor, hello: Hello) {
        let Visitor { mut connection, from, .. } = visitor;
        let instance = hello.instance;
        if let Err(refuse) = self.check_hello(&hello) {
            tracing::warn!(peer = hello.name, %from, field = refuse.field, reason = refuse.reason, "peer refused");
            refuse_visitor(&mut connection, refuse);
            return;
        }
        let address = SocketAddr::new(from.ip(), hello.listen_port);
        self.core.meet(instance, &hello.name);
        let contact = Contact::new(self.hello.instance, instance, self.turn);
        let peer = self
            .peers
            .entry(instance)
            .or_insert_with(|| Peer::new(hello.name.clone(), address, contact, self.now));
        if !peer.contact.answers_hello() {
            refuse_visitor(&mut connection, Refuse::crossed());
            return;
        }
        let Ok(token) = host::token() else { return };
        let welcome = Message::Welcome(Welcome { hello: self.hello.clone(), token });
        if let Err(loss) = connection.send(&welcome).and_then(|()| connection.flush()) {
            tracing::warn!(peer = hello.name, %loss, "handshake failed");
            return;
        }
        peer.contact.answered_hello(self.config.timing.handshake, self.turn);
        peer.dial = None;
        peer.inbound = Some(Inbound {
            connection,
            hello,
            token,
            memory: None,
            rdma: RdmaAnswer::Unasked,
            data: None,
            ready: None,
        });
    }

    /// Whether this side can work with whoever says so about itself.
    fn check_hello(&self, theirs: &Hello) -> Result<(), Refuse> {
        if MAX_PEERS <= self.peers.len() && !self.peers.contains_key(&theirs.instance) {
            let reason = format!("{MAX_PEERS} are known already");
            return Err(Refuse { field: "peers".to_owned(), reason });
        }
        self.hello.check(theirs)
    }

    fn attach_data(&mut self, visitor: Visitor, attach: Attach) {
        match self.inbound_of(attach) {
            Some(inbound) => inbound.data = Some(DataConnection::new(visitor.connection.into_stream())),
            None => tracing::warn!(from = %visitor.from, "a data connection belongs to no handshake"),
        }
    }

    fn inbound_of(&mut self, attach: Attach) -> Option<&mut Inbound> {
        let inbound = self.peers.get_mut(&attach.instance)?.inbound.as_mut()?;
        (inbound.token == attach.token).then_some(inbound)
    }

    /// Takes the peer's arena and gives this side's. False when the peer has said nothing yet.
    fn exchange_memory(&mut self, visitor: &MemoryVisitor) -> io::Result<bool> {
        let Some((bytes, fd, device)) = exchange::receive_with_fds(&visitor.stream)? else {
            return Ok(false);
        };
        let unexpected = || io::Error::new(io::ErrorKind::InvalidData, "no handshake waits for it");
        let Ok(Some((Message::Attach(attach), end))) = codec::decode(&bytes) else {
            return Err(unexpected());
        };
        let hello = self.inbound_of(attach).ok_or_else(unexpected)?.hello.clone();
        let process = Process::at_other_end(&visitor.stream)?;
        let len = usize::try_from(hello.region_bytes).unwrap_or(usize::MAX);
        let region = Region::map(fd, len, Access::ReadWrite)?;
        let copies = self.reach_device(&hello, &bytes[end..], device);
        let (bytes, fds) = self.passed_memory(attach);
        exchange::send_with_fds(&visitor.stream, &bytes, &fds)?;
        let inbound = self.inbound_of(attach).ok_or_else(unexpected)?;
        let memory = Box::new(SharedMemoryTransport::new(region).with_copies(copies));
        inbound.memory = Some((memory, process));
        Ok(true)
    }

    /// Goes on with the handshake that a peer began.
    pub(super) fn advance_inbound(&mut self, instance: u64) {
        let inbound = self.peers.get_mut(&instance).and_then(|peer| peer.inbound.take());
        let Some(inbound) = inbound else { return };
        let still_open = self.step_inbound(instance, inbound);
        let Some(peer) = self.peers.get_mut(&instance) else { return };
        if still_open.is_none() {
            peer.contact.answer_ended();
        }
        peer.inbound = still_open;
    }

    /// Does what the handshake allows without waiting; gives it back while it goes on.
    fn step_inbound(&mut self, instance: u64, mut inbound: Inbound) -> Option<Inbound> {
        if self.is_ready(inbound.connection.fd()) {
            match inbound.connection.receive_one() {
                Ok(None) => {}
                Ok(Some(Message::Ready(ready))) if inbound.ready.is_none() => inbound.ready = Some(ready),
                Ok(Some(Message::Paths(paths))) => {
                    if let Err(loss) = self.hear_paths(&mut inbound, paths) {
                        tracing::warn!(peer = inbound.hello.name, %loss, "handshake broken");
                        return None;
                    }
                }
                Ok(Some(_)) => {
                    tracing::warn!(peer = inbound.hello.name, "handshake broken by an odd message");
                    return None;
                }
                Err(loss) => {
                    tracing::debug!(peer = inbound.hello.name, %loss, "handshake ended");
                    return None;
                }
            }
        }
        if let Err(loss) = self.advance_paths(&mut inbound) {
            tracing::warn!(peer = inbound.hello.name, %loss, "handshake broken");
            return None;
        }
        match inbound.complete() {
            Ok((connection, hello, ready, path, process)) => {
                self.welcome_in(instance, connection, hello, ready, path, process);
                None
            }
            Err(inbound) => {
                let is_late = self.peers.get(&instance)?.contact.is_late(inbound.extra(), self.turn);
                if is_late {
                    tracing::warn!(peer = inbound.hello.name, "handshake took too long");
                }
                (!is_late).then_some(*inbound)
            }
        }
    }

    fn welcome_in(
        &mut self,
        instance: u64,
        mut connection: Connection,
        hello: Hello,
        ready: Ready,
        path: DataPath,
        process: Option<Process>,
    ) {
        if !self.hello.agrees_to(path.kind(), &hello) {
            return tracing::warn!(
                peer = hello.name,
                transport = path.kind().name(),
                "not an agreed way for data"
            );
        }
        let busy = self.core.prepare_link(instance, self.moment());
        self.act();
        let answer = Message::Ready(Ready {
            transport: path.kind(),
            fallback: None,
            busy,
            by_device: path.reaches_device(),
        });
        if let Err(loss) = connection.send(&answer).and_then(|()| connection.flush()) {
            return tracing::warn!(peer = hello.name, %loss, "handshake failed");
        }
        let Ready { fallback, busy, by_device, .. } = ready;
        self.bring_up(instance, Established { connection, path, process, hello, fallback, busy, by_device });
    }
}

type Completed = (Connection, Hello, Ready, DataPath, Option<Process>);

impl Inbound {
    /// Everything the handshake was to bring, or the handshake back while something is missing.
    fn complete(mut self) -> Result<Completed, Box<Self>> {
        let path = match self.ready.as_ref().map(|ready| ready.transport) {
            Some(TransportKind::SharedMemory) => {
                self.memory.take().map(|(memory, process)| (DataPath::SharedMemory(memory), Some(process)))
            }
            Some(TransportKind::Rdma) => match std::mem::take(&mut self.rdma) {
                RdmaAnswer::Connected(transport) => Some((DataPath::Rdma(transport), None)),
                other => {
                    self.rdma = other;
                    None
                }
            },
            Some(TransportKind::Tcp) => self.data.take().map(|data| (DataPath::Tcp(Box::new(data)), None)),
            None => None,
        };
        match (path, self.ready.take()) {
            (Some((path, process)), Some(ready)) => Ok((self.connection, self.hello, ready, path, process)),
            (_, ready) => Err(Box::new(Self { ready, ..self })),
        }
    }
}

/// Makes a fresh stream fit for this thread.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)
}

/// The frame that opens a second connection.
pub(super) fn attach_frame(attach: Attach) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(&Message::Attach(attach), &mut frame).expect("a short message");
    frame
}

/// Says why not, as far as the socket takes it at once.
fn refuse_visitor(connection: &mut Connection, refuse: Refuse) {
    if let Err(loss) = connection.send(&Message::Refuse(refuse)).and_then(|()| connection.flush()) {
        tracing::debug!(%loss, "the refusal was not sent");
    }
}

/// Connections that may be undecided.
const MAX_VISITORS: usize = 256;
/// Peers that may be known.
const MAX_PEERS: usize = 4096;
