//! A data connection: writes of this side go out, writes of the peer come in and land only when admitted.
//!
//! Both directions share the socket. Every byte of an incoming write passes through the admission of its
//! reservation right before it is stored, so that a reservation which was given up is quiet at once, whatever
//! is still in flight. The kernel stores it where it belongs: nothing is copied twice.

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, Transport, WriteFault, WriteId};

use super::Loss;
use super::frame::{Frame, HEADER};
use super::outgoing::{MAX_ANSWERS, Outgoing};
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
        self.outgoing.say(Frame::Probe(len));
    }

    /// True once after the probe's bytes have arrived.
    pub(crate) fn take_probed(&mut self) -> bool {
        self.outgoing.take_probed()
    }

    /// Ends the connection: every unanswered write completes as severed.
    pub(crate) fn sever(&mut self) {
        self.is_severed = true;
        self.outgoing.sever();
    }

    /// Reads what has come, up to a bound; admitted writes land in `region`. False when nothing has.
    pub(crate) fn receive(&mut self, region: &Region, admit: Admit<'_>) -> Result<bool, Loss> {
        let mut budget = BYTES_PER_TURN;
        while 0 < budget {
            let (came, landed) = match self.read(region, admit) {
                Ok((0, _)) => return Err(Loss::Closed),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(budget < BYTES_PER_TURN),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            // Even a single byte is some of a turn.
            budget = budget.saturating_sub(came.max(BYTES_PER_TURN / READS_PER_TURN));
            self.incoming.took(landed, &mut self.outgoing);
            let mut bytes = &self.buffer[..came - landed];
            while !bytes.is_empty() {
                bytes = self.incoming.take(bytes, region, admit, &mut self.outgoing)?;
            }
        }
        Ok(true)
    }

    /// Reads once. Returns how many bytes came, and how many of them are payload that is dealt with; the others are in
    /// the buffer.
    fn read(&mut self, region: &Region, admit: Admit<'_>) -> io::Result<(usize, usize)> {
        let Some(payload) = &mut self.incoming.payload else {
            return Ok((self.stream.read(&mut self.buffer[..BEHIND])?, 0));
        };
        let rest = (payload.len - payload.done) as usize;
        match payload.place(admit) {
            Some(offset) => {
                let behind = &mut self.buffer[..BEHIND];
                let came = region.receive_from(offset, rest, self.stream.as_fd(), behind)?;
                Ok((came, came.min(rest)))
            }
            // Nobody wants it.
            None => {
                let length = rest.min(self.buffer.len());
                let came = self.stream.read(&mut self.buffer[..length])?;
                Ok((came, came))
            }
        }
    }

    /// Sends what the socket takes, up to a bound.
    pub(crate) fn flush(&mut self) -> Result<(), Loss> {
        if self.is_severed { Ok(()) } else { self.outgoing.flush(&mut self.stream) }
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
            if let Some(offset) = payload.place(admit) {
                region.write(offset, piece);
            }
            self.took(length, outgoing);
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

    /// So many bytes of the payload have been dealt with.
    fn took(&mut self, length: usize, outgoing: &mut Outgoing) {
        let Some(payload) = &mut self.payload else { return };
        payload.done += u32::try_from(length).expect("a piece of the payload");
        if payload.done == payload.len {
            match payload.range {
                Some(_) => outgoing.answer(payload.fault.map_or(Ok(()), Err)),
                None => outgoing.say(Frame::Probed),
            }
            self.payload = None;
        }
    }

    fn begin(&mut self, outgoing: &mut Outgoing) -> Result<(), Loss> {
        let frame = Frame::decode(&self.header).ok_or(Loss::Protocol("no data header"))?;
        // A peer that makes writes and reads no answers may not make this side remember them all.
        if MAX_ANSWERS < outgoing.waiting_answers() {
            return Err(Loss::Clogged { queued: outgoing.waiting_answers() * HEADER });
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
            Frame::Probed => outgoing.probed(),
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
    /// Where the next byte goes; `None` when it goes nowhere. Asked for each piece right before it is stored: the
    /// reservation may have been given up since the one before.
    fn place(&mut self, admit: Admit<'_>) -> Option<usize> {
        let range = self.range.as_ref().filter(|_| self.fault.is_none())?;
        match admit(range) {
            Ok(()) => {
                let start = usize::try_from(range.offset).expect("admitted, so inside the arena");
                Some(start + self.done as usize)
            }
            Err(fault) => {
                self.fault = Some(fault);
                None
            }
        }
    }
}

impl Transport for DataConnection {
    type Source = SourceRange;

    fn post_write(&mut self, id: WriteId, source: SourceRange, target: RemoteRange) -> Post {
        assert_eq!(source.len(), target.len as usize, "the whole of the source is written");
        if self.is_severed {
            self.outgoing.fail(id);
            return Post::Accepted;
        }
        self.outgoing.post(id, source, target)
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        // A broken socket shows up again when it is read, where there is somebody to tell.
        if let Err(loss) = self.flush() {
            tracing::debug!(%loss, "data connection");
            self.sever();
        }
        self.outgoing.take_completions(done);
    }
}

/// Bytes of a write that nobody wants, read at a time.
const BUFFER: usize = 256 << 10;
/// Bytes read behind a payload: the next header, or many answers; short, since what else comes with it is payload
/// that will have to be copied.
const BEHIND: usize = 4 << 10;
/// Bytes read before it is another peer's turn.
const BYTES_PER_TURN: usize = 2 << 20;
/// Reads before it is another peer's turn.
const READS_PER_TURN: usize = 64;
