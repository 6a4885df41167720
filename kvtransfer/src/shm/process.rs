//! Proof that a process on the same host is gone, and with it its mapping of our memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::PidfdFlags;

/// The process at the other end of a local socket. A pidfd, unlike a number, never comes to mean another one.
#[derive(Debug)]
pub(crate) struct Process(OwnedFd);

impl Process {
    /// The process that connected to, or listens on, the other end of `stream`.
    ///
    /// # Errors
    ///
    /// It belongs to another user, is not visible from here (another PID namespace), or is gone already.
    pub(crate) fn at_other_end(stream: &UnixStream) -> io::Result<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(stream)?;
        if credentials.uid != rustix::process::getuid() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the peer is another user's"));
        }
        Ok(Self(rustix::process::pidfd_open(credentials.pid, PidfdFlags::empty())?))
    }

    /// Whether it has ended.
    pub(crate) fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(ready) if ready > 0)
    }

    /// Readable when it has ended.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
