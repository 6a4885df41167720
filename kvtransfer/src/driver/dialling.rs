//! Handshakes that this side begins.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, TryRecvError};
use std::time::Duration;

use rustix::event::PollFlags;
use tidemill_kvtransfer_proto::codec;
use tidemill_kvtransfer_proto::handshake::Contact;
use tidemill_kvtransfer_proto::message::{Attach, Message, Paths, Ready, TransportKind, Welcome};

use super::Driver;
use super::lobby::{attach_frame, prepare};
use super::peers::{DataPath, Established, Peer};
use super::rdma;
use crate::error::MeetError;
use crate::event::{Met, PeerAddress};
use crate::shm::{Access, Process, Region, SharedMemoryTransport, exchange};
use crate::tcp::{self, Connection, DataConnection, Loss};
use crate::verbs::{Draft, Drafting};

/// A handshake that this side began.
#[derive(Debug)]
pub(super) struct Dial {
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The control connection is being made.
    Connecting(TcpStream),
    /// Hello was said.
    AwaitingWelcome(Connection),
    /// This side's arena was passed, the peer's is awaited.
    AwaitingMemory { control: Connection, welcome: Box<Welcome>, stream: UnixStream },
    /// This side's ends of RDMA paths are being made.
    Drafting { control: Connection, welcome: Box<Welcome>, drafting: Drafting },
    /// They were said, the peer's are awaited.
    AwaitingPaths { control: Connection, welcome: Box<Welcome>, draft: Box<Draft> },
    /// The data connection is being made.
    ConnectingData { control: Connection, welcome: Box<Welcome>, stream: TcpStream, fallback: Option<String> },
    /// The way for data is there.
    AwaitingReady(Box<Established>),
}

/// What a stage leads to.
enum Step {
    /// Nothing new.
    Wait(Stage),
    /// The next stage.
    Next(Stage),
    /// The connection is there.
    Up(Box<Established>),
    /// The peer is connecting too, and its attempt counts.
    Crossed,
}

impl Dial {
    /// How much longer than usual it may take.
    pub(super) fn extra(&self) -> Duration {
        match self.stage {
            Stage::Drafting { .. } | Stage::AwaitingPaths { .. } => rdma::REGISTRATION,
            _ => Duration::ZERO,
        }
    }

    pub(super) fn interests<'a>(&'a self, interest: &mut impl FnMut(BorrowedFd<'a>, PollFlags)) {
        match &self.stage {
            Stage::Connecting(stream) => interest(stream.as_fd(), PollFlags::OUT),
            Stage::AwaitingWelcome(control) => interest(control.fd(), PollFlags::IN),
            Stage::AwaitingMemory { stream, .. } => interest(stream.as_fd(), PollFlags::IN),
            Stage::Drafting { .. } => {} // Who makes them wakes the thread.
            Stage::AwaitingPaths { control, .. } => interest(control.fd(), PollFlags::IN),
            Stage::ConnectingData { stream, .. } => interest(stream.as_fd(), PollFlags::OUT),
            Stage::AwaitingReady(established) => interest(established.connection.fd(), PollFlags::IN),
        }
    }
}

impl Driver {
    /// Connects to peers, or reports that they are connected.
    pub(super) fn meet(&mut self, addresses: Vec<PeerAddress>, reply: &Sender<Met>) {
        for PeerAddress { name, instance, address } in addresses {
            if instance == self.hello.instance {
                let (field, reason) = ("instance".to_owned(), "it is this worker itself".to_owned());
                let outcome = Err(MeetError::Mismatch { field, reason });
                let _ = reply.send(Met { name, instance, outcome }); // Nobody waits any more.
                continue;
            }
            let (now, turn) = (self.now, self.turn);
            self.core.meet(instance, &name);
            let contact = Contact::new(self.hello.instance, instance, turn);
            let peer = self.peers.entry(instance).or_insert_with(|| Peer::new(name, address, contact, now));
            peer.address = address;
            peer.contact.met(turn);
            peer.meets.push(reply.clone());
            self.answer_meets(instance);
        }
    }

    /// Whether a connection to the peer is of use to anybody here.
    pub(super) fn is_wanted(&self, instance: u64, peer: &Peer) -> bool {
        !peer.meets.is_empty() || peer.is_remade || self.core.wants_link(instance)
    }

    /// Goes on with all handshakes, and begins those that are wanted.
    pub(super) fn advance_handshakes(&mut self) {
        let instances: Vec<u64> = self.peers.keys().copied().collect();
        for instance in instances {
            self.advance_inbound(instance);
            self.advance_dial(instance);
            let Some(peer) = self.peers.get(&instance) else { continue };
            if peer.contact.is_due(peer.link.is_some(), self.turn) && self.is_wanted(instance, peer) {
                self.dial(instance);
            }
        }
    }

    fn dial(&mut self, instance: u64) {
        let Some(peer) = self.peers.get_mut(&instance) else { return };
        peer.contact.dials(self.config.timing.handshake, self.turn);
        match tcp::connect(peer.address) {
            Ok(stream) => peer.dial = Some(Dial { stage: Stage::Connecting(stream) }),
            Err(error) => self.dial_failed(instance, &unreachable(&error)),
        }
    }

    fn advance_dial(&mut self, instance: u64) {
        let dial = self.peers.get_mut(&instance).and_then(|it| it.dial.take());
        let Some(Dial { mut stage }) = dial else { return };
        loop {
            match self.step(instance, stage) {
                Ok(Step::Next(next)) => stage = next,
                Ok(Step::Wait(stage)) => {
                    let dial = Dial { stage };
                    let Some(peer) = self.peers.get_mut(&instance) else { return };
                    if !peer.contact.is_late(dial.extra(), self.turn) {
                        peer.dial = Some(dial);
                        return;
                    }
                    let reason = "the handshake took too long".to_owned();
                    return self.dial_failed(instance, &MeetError::Unreachable { reason });
                }
                Ok(Step::Up(established)) => return self.bring_up(instance, *established),
                Ok(Step::Crossed) => {
                    // Theirs is under way; ours again only should it come to nothing.
                    if let Some(peer) = self.peers.get_mut(&instance) {
                        peer.contact.crossed(self.config.timing.handshake, self.turn);
                    }
                    return;
                }
                Err(error) => return self.dial_failed(instance, &error),
            }
        }
    }

    /// Does what a stage allows without waiting.
    fn step(&mut self, instance: u64, stage: Stage) -> Result<Step, MeetError> {
        match stage {
            Stage::Connecting(stream) => {
                if !self.is_ready(stream.as_fd()) {
                    return Ok(Step::Wait(Stage::Connecting(stream)));
                }
                connected(&stream).map_err(|error| unreachable(&error))?;
                let mut control = Connection::new(stream);
                say(&mut control, &Message::Hello(self.hello.clone()))?;
                Ok(Step::Next(Stage::AwaitingWelcome(control)))
            }
            Stage::AwaitingWelcome(control) => self.await_welcome(instance, control),
            Stage::AwaitingMemory { control, welcome, stream } => {
                if !self.is_ready(stream.as_fd()) {
                    return Ok(Step::Wait(Stage::AwaitingMemory { control, welcome, stream }));
                }
                match self.receive_memory(&stream, &welcome) {
                    Ok((memory, process)) => {
                        let path = DataPath::SharedMemory(memory);
                        self.await_ready(instance, control, *welcome, path, Some(process), None)
                    }
                    Err(error) => {
                        self.fall_back(instance, control, welcome, format!("shared memory: {error}"))
                    }
                }
            }
            Stage::Drafting { control, welcome, drafting } => {
                self.advance_draft(instance, control, welcome, drafting)
            }
            Stage::AwaitingPaths { control, welcome, draft } => {
                self.await_paths(instance, control, welcome, draft)
            }
            Stage::ConnectingData { control, welcome, stream, fallback } => {
                if !self.is_ready(stream.as_fd()) {
                    return Ok(Step::Wait(Stage::ConnectingData { control, welcome, stream, fallback }));
                }
                connected(&stream).map_err(|error| unreachable(&error))?;
                let attach = Attach { instance: self.hello.instance, token: welcome.token };
                let sent = io::Write::write(&mut &stream, &attach_frame(attach));
                sent.map_err(|error| unreachable(&error))?; // A short frame fits an empty buffer whole.
                let path = DataPath::Tcp(Box::new(DataConnection::new(stream)));
                self.await_ready(instance, control, *welcome, path, None, fallback)
            }
            Stage::AwaitingReady(mut established) => {
                if !self.is_ready(established.connection.fd()) {
                    return Ok(Step::Wait(Stage::AwaitingReady(established)));
                }
                match established.connection.receive_one().map_err(|loss| lost(&loss))? {
                    Some(Message::Ready(ready)) => {
                        established.busy = ready.busy;
                        established.by_device = ready.by_device;
                        Ok(Step::Up(established))
                    }
                    Some(_) => Err(odd_message()),
                    None => Ok(Step::Wait(Stage::AwaitingReady(established))),
                }
            }
        }
    }

    fn await_welcome(&mut self, instance: u64, mut control: Connection) -> Result<Step, MeetError> {
        if !self.is_ready(control.fd()) {
            return Ok(Step::Wait(Stage::AwaitingWelcome(control)));
        }
        let welcome = match control.receive_one().map_err(|loss| lost(&loss))? {
            Some(Message::Welcome(welcome)) => Box::new(welcome),
            Some(Message::Refuse(refuse)) if refuse.is_crossed() => return Ok(Step::Crossed),
            Some(Message::Refuse(refuse)) => {
                return Err(MeetError::Mismatch { field: refuse.field, reason: refuse.reason });
            }
            Some(_) => return Err(odd_message()),
            None => return Ok(Step::Wait(Stage::AwaitingWelcome(control))),
        };
        self.hello
            .check_answer(instance, &welcome.hello)
            .map_err(|refuse| MeetError::Mismatch { field: refuse.field, reason: refuse.reason })?;
        match self.hello.best_way(&welcome.hello) {
            Some(TransportKind::SharedMemory) => match self.pass_memory(&welcome) {
                Ok(stream) => Ok(Step::Next(Stage::AwaitingMemory { control, welcome, stream })),
                Err(error) => self.fall_back(instance, control, welcome, format!("shared memory: {error}")),
            },
            Some(TransportKind::Rdma) => match self.begin_draft(&control) {
                Some(drafting) => Ok(Step::Next(Stage::Drafting { control, welcome, drafting })),
                None => self.fall_back(instance, control, welcome, "RDMA: no device".to_owned()),
            },
            Some(TransportKind::Tcp) => self.connect_data(instance, control, welcome, None),
            None => Err(MeetError::Transport { reason: "none that both sides accept".to_owned() }),
        }
    }

    fn pass_memory(&self, welcome: &Welcome) -> io::Result<UnixStream> {
        let stream = exchange::connect(&welcome.hello.memory_socket)?;
        let attach = Attach { instance: self.hello.instance, token: welcome.token };
        let (bytes, fds) = self.passed_memory(attach);
        exchange::send_with_fds(&stream, &bytes, &fds)?;
        Ok(stream)
    }

    fn receive_memory(
        &self,
        stream: &UnixStream,
        welcome: &Welcome,
    ) -> io::Result<(Box<SharedMemoryTransport>, Process)> {
        let (bytes, fd, device) = exchange::receive_with_fds(stream)?.ok_or(io::ErrorKind::WouldBlock)?;
        let end = codec::decode(&bytes).ok().flatten().map_or(bytes.len(), |(_, end)| end);
        let process = Process::at_other_end(stream)?;
        let len = usize::try_from(welcome.hello.region_bytes).unwrap_or(usize::MAX);
        let region = Region::map(fd, len, Access::ReadWrite)?;
        let copies = self.reach_device(&welcome.hello, &bytes[end..], device);
        Ok((Box::new(SharedMemoryTransport::new(region).with_copies(copies)), process))
    }

    fn advance_draft(
        &mut self,
        instance: u64,
        mut control: Connection,
        welcome: Box<Welcome>,
        drafting: Drafting,
    ) -> Result<Step, MeetError> {
        let reason = match drafting.try_recv() {
            Ok(Ok(draft)) => {
                let paths = Paths { ends: draft.ends(), failure: None };
                say(&mut control, &Message::Paths(paths))?;
                let draft = Box::new(draft);
                return Ok(Step::Next(Stage::AwaitingPaths { control, welcome, draft }));
            }
            Err(TryRecvError::Empty) => {
                return Ok(Step::Wait(Stage::Drafting { control, welcome, drafting }));
            }
            Ok(Err(error)) => error.to_line(),
            Err(TryRecvError::Disconnected) => "registration failed".to_owned(),
        };
        self.fall_back(instance, control, welcome, format!("RDMA: {reason}"))
    }

    fn await_paths(
        &mut self,
        instance: u64,
        mut control: Connection,
        welcome: Box<Welcome>,
        draft: Box<Draft>,
    ) -> Result<Step, MeetError> {
        let wait = |control, welcome, draft| Ok(Step::Wait(Stage::AwaitingPaths { control, welcome, draft }));
        if !self.is_ready(control.fd()) {
            return wait(control, welcome, draft);
        }
        let paths = match control.receive_one().map_err(|loss| lost(&loss))? {
            Some(Message::Paths(paths)) => paths,
            Some(_) => return Err(odd_message()),
            None => return wait(control, welcome, draft),
        };
        match rdma::connect(*draft, &paths, welcome.hello.region_bytes) {
            Ok(transport) => {
                self.await_ready(instance, control, *welcome, DataPath::Rdma(transport), None, None)
            }
            Err(reason) => self.fall_back(instance, control, welcome, format!("RDMA: {reason}")),
        }
    }

    /// Takes TCP instead of a better way, if both sides allow it.
    fn fall_back(
        &mut self,
        instance: u64,
        control: Connection,
        welcome: Box<Welcome>,
        reason: String,
    ) -> Result<Step, MeetError> {
        if self.hello.offer.may_fall_back(welcome.hello.offer) {
            self.connect_data(instance, control, welcome, Some(reason))
        } else {
            Err(MeetError::Transport { reason })
        }
    }

    fn connect_data(
        &mut self,
        instance: u64,
        control: Connection,
        welcome: Box<Welcome>,
        fallback: Option<String>,
    ) -> Result<Step, MeetError> {
        let Some(peer) = self.peers.get(&instance) else { return Ok(Step::Crossed) };
        let stream = tcp::connect(peer.address).map_err(|error| unreachable(&error))?;
        Ok(Step::Next(Stage::ConnectingData { control, welcome, stream, fallback }))
    }

    fn await_ready(
        &mut self,
        instance: u64,
        mut connection: Connection,
        welcome: Welcome,
        path: DataPath,
        process: Option<Process>,
        fallback: Option<String>,
    ) -> Result<Step, MeetError> {
        let busy = self.core.prepare_link(instance, self.moment());
        self.act();
        let by_device = path.reaches_device();
        let ready = Ready { transport: path.kind(), fallback: fallback.clone(), busy, by_device };
        say(&mut connection, &Message::Ready(ready))?;
        let established = Established {
            connection,
            path,
            process,
            hello: welcome.hello,
            fallback,
            busy: Vec::new(),
            by_device: false,
        };
        Ok(Step::Next(Stage::AwaitingReady(Box::new(established))))
    }

    pub(super) fn dial_failed(&mut self, instance: u64, error: &MeetError) {
        let Some(peer) = self.peers.get_mut(&instance) else { return };
        tracing::warn!(peer = peer.name, address = %peer.address, %error, "peer not connected");
        peer.contact.dial_failed(self.turn);
        peer.is_remade = false;
        let name = peer.name.clone();
        for meet in peer.meets.drain(..) {
            // Who does not wait any more does not need to know.
            let _ = meet.send(Met { name: name.clone(), instance, outcome: Err(error.clone()) });
        }
        self.core.unreachable(instance, &error.to_string());
        self.act();
    }
}

/// Whether a connect that has come to an end has succeeded.
fn connected(stream: &TcpStream) -> io::Result<()> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    prepare(stream)
}

fn say(connection: &mut Connection, message: &Message) -> Result<(), MeetError> {
    connection.send(message).and_then(|()| connection.flush()).map_err(|loss| lost(&loss))
}

fn lost(loss: &Loss) -> MeetError {
    match loss {
        Loss::Codec(error) => MeetError::Mismatch { field: "protocol".to_owned(), reason: error.to_string() },
        _ => MeetError::Unreachable { reason: loss.to_string() },
    }
}

fn odd_message() -> MeetError {
    MeetError::Unreachable { reason: "the peer broke the protocol of the handshake".to_owned() }
}

fn unreachable(error: &io::Error) -> MeetError {
    MeetError::Unreachable { reason: error.to_string() }
}
