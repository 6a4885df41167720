//! How two processes of one host hand each other their arenas: over a local socket in the abstract namespace,
//! which needs no file, is seen only inside one network namespace, and goes away with its process.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Listens under an abstract name, without blocking.
pub(crate) fn listen(name: &str) -> io::Result<UnixListener> {
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connects to an abstract name. A local connect is accepted by the kernel at once or not at all.
pub(crate) fn connect(name: &str) -> io::Result<UnixStream> {
    let stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Sends `bytes` together with one descriptor or two. All are small enough for an empty socket buffer.
pub(crate) fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let pushed = ancillary.push(SendAncillaryMessage::ScmRights(fds));
    assert!(pushed, "the space was made for so many descriptors");
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives what [`send_with_fds`] sent, its second descriptor where there is one; `None` when nothing has come yet.
pub(crate) fn receive_with_fds(stream: &UnixStream) -> io::Result<Option<Received>> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = match recvmsg(stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
        Ok(received) => received.bytes,
        Err(rustix::io::Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let mut fds = fds.flatten();
    let Some(fd) = fds.next().filter(|_| 0 < received) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer closed, or passed no memory"));
    };
    bytes.truncate(received);
    Ok(Some((bytes, fd, fds.next())))
}

/// What came over a socket.
pub(crate) type Received = (Vec<u8>, OwnedFd, Option<OwnedFd>);

/// Longest first message.
const LONGEST: usize = 4096;
/// Of a region, and of memory of a device.
const MOST_FDS: usize = 2;

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::shm::{Access, Region};

    #[test]
    fn a_region_passes_through_a_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        assert!(receive_with_fds(&theirs).unwrap().is_none(), "nothing has come");

        let region = Region::new("test", 4096).unwrap();
        region.write(7, b"x");
        send_with_fds(&ours, b"hello", &[region.fd()]).unwrap();
        let (bytes, fd, second) = receive_with_fds(&theirs).unwrap().unwrap();
        assert_eq!((bytes.as_slice(), second.is_some()), (b"hello".as_slice(), false));
        let other = Region::new("test", 64).unwrap();
        send_with_fds(&ours, b"two", &[region.fd(), other.fd()]).unwrap();
        let (_, _, second) = receive_with_fds(&theirs).unwrap().unwrap();
        let second = Region::map(second.expect("two were sent"), 64, Access::Read);
        assert!(second.is_ok(), "{second:?}");
        let mapped = Region::map(fd, 4096, Access::Read).unwrap();
        let mut seen = [0];
        mapped.read(7, &mut seen);
        assert_eq!(&seen, b"x");

        rustix::io::write(ours.as_fd(), b"no descriptor").unwrap();
        assert!(receive_with_fds(&theirs).is_err());
        drop(ours);
        assert!(receive_with_fds(&theirs).is_err(), "the end of the stream is an error");
    }
}
