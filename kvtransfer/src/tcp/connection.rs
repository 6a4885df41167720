//! A control connection that never blocks: messages in, messages out, with a bound on what may queue up.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tidemill_kvtransfer_proto::codec::{self, CodecError, FrameReader};
use tidemill_kvtransfer_proto::message::Message;

/// A control connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    reader: FrameReader,
    outgoing: Vec<u8>,
    sent: usize,
}

/// Why a connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Loss {
    #[error("the connection was closed")]
    Closed,
    #[error("no RDMA path is left")]
    NoPath,
    #[error("the connection broke")]
    Io(#[from] io::Error),
    #[error("the peer does not speak the protocol: {0}")]
    Codec(#[from] CodecError),
    #[error("the peer does not read: {queued} bytes wait")]
    Clogged { queued: usize },
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the peer connected anew")]
    Replaced,
    #[error("this worker gives its device back")]
    NoDevice,
    #[error("RDMA can be had, so the connection is made anew")]
    Remade,
}

/// Starts to connect; the stream becomes writable when that has succeeded or failed.
pub(crate) fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

impl Connection {
    /// Wraps a stream that does not block.
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, reader: FrameReader::new(), outgoing: Vec::new(), sent: 0 }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// This side's address, if it can still be had.
    pub(crate) fn local_ip(&self) -> Option<IpAddr> {
        self.stream.local_addr().ok().map(|address| address.ip())
    }

    /// The stream itself, once it turned out to be a data connection.
    pub(crate) fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Whether bytes wait for room in the socket.
    pub(crate) fn wants_write(&self) -> bool {
        self.sent < self.outgoing.len()
    }

    /// Queues a message.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), Loss> {
        let queued = self.outgoing.len() - self.sent;
        if MAX_QUEUED < queued {
            return Err(Loss::Clogged { queued });
        }
        Ok(codec::encode(message, &mut self.outgoing)?)
    }

    /// Sends what the socket takes.
    pub(crate) fn flush(&mut self) -> Result<(), Loss> {
        while self.wants_write() {
            match self.stream.write(&self.outgoing[self.sent..]) {
                Ok(0) => return Err(Loss::Closed),
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// Reads what has come, up to a bound, appending the complete messages to `messages`. They count even when
    /// the connection turns out to be lost behind them.
    pub(crate) fn receive(&mut self, messages: &mut Vec<Message>) -> Result<(), Loss> {
        self.take_messages(messages)?; // They may have come along with the handshake.
        for _ in 0..READS_PER_TURN {
            let length = self.read()?;
            self.take_messages(messages)?;
            if length < READ {
                return Ok(()); // There was room for more: nothing is left, or poll will tell.
            }
        }
        Ok(())
    }

    fn take_messages(&mut self, messages: &mut Vec<Message>) -> Result<(), CodecError> {
        while let Some(message) = self.reader.next_message()? {
            messages.push(message);
        }
        Ok(())
    }

    /// Like [`receive`](Self::receive) for one message; what came behind it stays for later.
    pub(crate) fn receive_one(&mut self) -> Result<Option<Message>, Loss> {
        loop {
            if let Some(message) = self.reader.next_message()? {
                return Ok(Some(message));
            }
            if self.read()? == 0 {
                return Ok(None);
            }
        }
    }

    /// Reads once. Returns how many bytes came, zero when none are there.
    fn read(&mut self) -> Result<usize, Loss> {
        let mut buffer = [0; READ];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(Loss::Closed),
                Ok(length) => {
                    self.reader.push(&buffer[..length]);
                    return Ok(length);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// What may wait for a slow reader: several of the longest messages.
const MAX_QUEUED: usize = 4 * codec::MAX_FRAME;
/// Bytes read at a time.
const READ: usize = 16 << 10;
/// Reads before it is another peer's turn.
const READS_PER_TURN: usize = 16;
