//! A data connection: writes of this side go out, writes of the peer come in and land only when admitted.
//!
//! Both directions share the socket. Every byte of an incoming write passes through the admission of its
//! reservation right before it is stored, so that a reservation which was given up is quiet at once, whatever
//! is still in flight.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, Transport, WriteFault, WriteId};

use super::Loss;
use super::frame::{Frame, HEADER};
use crate::shm::Region;
use crate::source::SourceRange;

/// Says whether a write of the peer may land.
pub(crate) type Admit<'a> = &'a mut dyn FnMut(&RemoteRange) -> Result<(), WriteFault>;

/// One end of a data connection.
#[derive(Debug)]
pub(crate) struct DataConnection {
    stream: TcpStream,
    outgoing: Outgoing,
    incoming: Incoming,
    is_severed: bool,
    buffer: Vec<u8>,
}

#[derive(Debug, Default)]
struct Outgoing {
    /// Sent or to be sent, not answered; the order of the answers.
    unanswered: VecDeque<(WriteId, SourceRange, RemoteRange)>,
    /// Index in `unanswered` of the first whose header was not staged.
    next: usize,
    /// Of the write before `next`: bytes of its payload that were staged.
    payload_staged: Option<usize>,
    unanswered_bytes: usize,
    probe_bytes: u32,
    completions: Vec<Completion>,
    staged: Vec<u8>,
    sent: usize,
    /// Headers that go between two writes.
    answers: VecDeque<Frame>,
    was_probed: bool,
}

#[derive(Debug, Default)]
struct Incoming {
    header: [u8; HEADER],
    header_len: usize,
    payload: Option<Payload>,
}

#[derive(Debug)]
struct Payload {
    /// `None` for a probe.
    range: Option<RemoteRange>,
    done: u32,
    len: u32,
    fault: Option<WriteFault>,
}

impl DataConnection {
    /// Wraps a stream that does not block.
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            is_severed: false,
            buffer: vec![0; BUFFER],
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether bytes wait for room in the socket.
    pub(crate) fn wants_write(&self) -> bool {
        !self.is_severed && self.outgoing.has_bytes()
    }

    /// Sends `len` bytes of nothing, to measure the way.
    pub(crate) fn probe(&mut self, len: u32) {
        self.outgoing.answers.push_back(Frame::Probe(len));
    }

    /// True once after the probe's bytes have arrived.
    pub(crate) fn take_probed(&mut self) -> bool {
        std::mem::take(&mut self.outgoing.was_probed)
    }

    /// Ends the connection: every unanswered write completes as severed.
    pub(crate) fn sever(&mut self) {
        self.is_severed = true;
        self.outgoing.sever();
    }

    /// Reads what has come, up to a bound; admitted writes land in `region`. False when nothing has.
    pub(crate) fn receive(&mut self, region: &Region, admit: Admit<'_>) -> Result<bool, Loss> {
        let mut something = false;
        for _ in 0..READS_PER_TURN {
            let length = match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(Loss::Closed),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(something),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            something = true;
            let mut bytes = &self.buffer[..length];
            while !bytes.is_empty() {
                bytes = self.incoming.take(bytes, region, admit, &mut self.outgoing)?;
            }
        }
        Ok(something)
    }

    /// Sends what the socket takes, up to a bound.
    pub(crate) fn flush(&mut self) -> Result<(), Loss> {
        if self.is_severed {
            return Ok(());
        }
        for _ in 0..WRITES_PER_TURN {
            self.outgoing.stage();
            if self.outgoing.staged.is_empty() {
                return Ok(());
            }
            match self.stream.write(&self.outgoing.staged[self.outgoing.sent..]) {
                Ok(0) => return Err(Loss::Closed),
                Ok(sent) => self.outgoing.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Outgoing {
    fn has_bytes(&self) -> bool {
        self.sent < self.staged.len()
            || !self.answers.is_empty()
            || self.next < self.unanswered.len()
            || self.payload_staged.is_some()
            || 0 < self.probe_bytes
    }

    /// Fills the staging buffer once it is empty.
    fn stage(&mut self) {
        if self.sent < self.staged.len() {
            return;
        }
        self.staged.clear();
        self.sent = 0;
        while self.staged.len() < BUFFER {
            let room = BUFFER - self.staged.len();
            if 0 < self.probe_bytes {
                let len = room.min(self.probe_bytes as usize);
                self.staged.resize(self.staged.len() + len, 0);
                self.probe_bytes -= u32::try_from(len).expect("not more than the probe has");
            } else if let Some(done) = self.payload_staged {
                self.stage_payload(done, room);
            } else if let Some(answer) = self.answers.pop_front() {
                self.staged.extend_from_slice(&answer.encode());
                if let Frame::Probe(len) = answer {
                    self.probe_bytes = len;
                }
            } else if let Some((_, _, range)) = self.unanswered.get(self.next) {
                self.staged.extend_from_slice(&Frame::Write(*range).encode());
                self.next += 1;
                self.payload_staged = Some(0);
            } else {
                break;
            }
        }
    }

    fn stage_payload(&mut self, done: usize, room: usize) {
        let (_, source, _) = &self.unanswered[self.next - 1];
        let len = room.min(source.len() - done);
        let start = self.staged.len();
        self.staged.resize(start + len, 0);
        source.read(done, &mut self.staged[start..]);
        self.payload_staged = (done + len < source.len()).then_some(done + len);
    }

    /// The peer answered the oldest write. It cannot answer one that was not sent whole.
    fn answered(&mut self, outcome: Result<(), WriteFault>) -> Result<(), Loss> {
        let sent_whole = self.next - usize::from(self.payload_staged.is_some());
        if sent_whole == 0 {
            return Err(Loss::Protocol("it answered a write that was not made"));
        }
        let (id, source, _) = self.unanswered.pop_front().expect("one was sent");
        self.next -= 1;
        self.unanswered_bytes -= source.len();
        self.completions.push(Completion { id, outcome });
        Ok(())
    }

    fn sever(&mut self) {
        let severed = std::mem::take(&mut self.unanswered).into_iter();
        self.completions.extend(severed.map(|(id, ..)| Completion { id, outcome: Err(WriteFault::Severed) }));
        self.next = 0;
        self.payload_staged = None;
        self.unanswered_bytes = 0;
    }

    fn answer(&mut self, outcome: Result<(), WriteFault>) {
        match (outcome, self.answers.back_mut()) {
            (Ok(()), Some(Frame::Landed(count))) => *count += 1,
            (Ok(()), _) => self.answers.push_back(Frame::Landed(1)),
            (Err(fault), _) => self.answers.push_back(Frame::TurnedDown(fault)),
        }
    }
}

impl Incoming {
    /// Takes one header or one piece of payload off the front of `bytes`; returns the rest.
    fn take<'a>(
        &mut self,
        bytes: &'a [u8],
        region: &Region,
        admit: Admit<'_>,
        outgoing: &mut Outgoing,
    ) -> Result<&'a [u8], Loss> {
        if let Some(payload) = &mut self.payload {
            let length = bytes.len().min((payload.len - payload.done) as usize);
            let (piece, rest) = bytes.split_at(length);
            payload.land(piece, region, admit);
            if payload.done == payload.len {
                match payload.range {
                    Some(_) => outgoing.answer(payload.fault.map_or(Ok(()), Err)),
                    None => outgoing.answers.push_back(Frame::Probed),
                }
                self.payload = None;
            }
            return Ok(rest);
        }
        let length = bytes.len().min(HEADER - self.header_len);
        let (piece, rest) = bytes.split_at(length);
        self.header[self.header_len..self.header_len + length].copy_from_slice(piece);
        self.header_len += length;
        if self.header_len == HEADER {
            self.header_len = 0;
            self.begin(outgoing)?;
        }
        Ok(rest)
    }

    fn begin(&mut self, outgoing: &mut Outgoing) -> Result<(), Loss> {
        let frame = Frame::decode(&self.header).ok_or(Loss::Protocol("no data header"))?;
        // A peer that makes writes and reads no answers may not make this side remember them all.
        if MAX_ANSWERS < outgoing.answers.len() {
            return Err(Loss::Clogged { queued: outgoing.answers.len() * HEADER });
        }
        match frame {
            Frame::Write(range) => {
                if range.len == 0 {
                    return Err(Loss::Protocol("an empty write"));
                }
                self.payload = Some(Payload { range: Some(range), done: 0, len: range.len, fault: None });
            }
            Frame::Probe(0) => return Err(Loss::Protocol("an empty probe")),
            Frame::Probe(len) => self.payload = Some(Payload { range: None, done: 0, len, fault: None }),
            Frame::Probed => outgoing.was_probed = true,
            Frame::Landed(count) => {
                for _ in 0..count {
                    outgoing.answered(Ok(()))?;
                }
            }
            Frame::TurnedDown(fault) => outgoing.answered(Err(fault))?,
        }
        Ok(())
    }
}

impl Payload {
    fn land(&mut self, piece: &[u8], region: &Region, admit: Admit<'_>) {
        if let Some(range) = &self.range
            && self.fault.is_none()
        {
            // Asked for each piece: the reservation may have been given up since the one before.
            match admit(range) {
                Ok(()) => {
                    let start = usize::try_from(range.offset).expect("admitted, so inside the arena");
                    region.write(start + self.done as usize, piece);
                }
                Err(fault) => self.fault = Some(fault),
            }
        }
        self.done += u32::try_from(piece.len()).expect("a piece of the payload");
    }
}

impl Transport for DataConnection {
    type Source = SourceRange;

    fn post_write(&mut self, id: WriteId, source: SourceRange, target: RemoteRange) -> Post {
        assert_eq!(source.len(), target.len as usize, "the whole of the source is written");
        let out = &mut self.outgoing;
        if self.is_severed {
            out.completions.push(Completion { id, outcome: Err(WriteFault::Severed) });
            return Post::Accepted;
        }
        let is_full = QUEUE_BYTES < out.unanswered_bytes + source.len() || QUEUE <= out.unanswered.len();
        if is_full && !out.unanswered.is_empty() {
            return Post::QueueFull;
        }
        out.unanswered_bytes += source.len();
        out.unanswered.push_back((id, source, target));
        Post::Accepted
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        // A broken socket shows up again when it is read, where there is somebody to tell.
        if let Err(loss) = self.flush() {
            tracing::debug!(%loss, "data connection");
            self.sever();
        }
        done.append(&mut self.outgoing.completions);
    }
}

/// Bytes read or staged at a time.
const BUFFER: usize = 256 << 10;
/// Reads before it is another peer's turn.
const READS_PER_TURN: usize = 8;
/// Writes to the socket before it is another peer's turn.
const WRITES_PER_TURN: usize = 8;
/// Bytes that may be unanswered: two or three times what a fast line carries in its round trip.
const QUEUE_BYTES: usize = 16 << 20;
/// Writes that may be unanswered.
const QUEUE: usize = 4096;
/// Answers that may wait for the peer to read them.
const MAX_ANSWERS: usize = 2 * QUEUE;
