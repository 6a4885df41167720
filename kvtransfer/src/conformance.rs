//! Both transports keep the contract of `Transport`: the suite that the simulated wire passes too.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use tidemill_kvtransfer_proto::reservation::{Reservation, ReservationEvent};
use tidemill_kvtransfer_proto::transport::{ConformanceRig, RemoteRange, WriteFault, conformance, stamp};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};

use crate::shm::{Access, Region, SharedMemoryTransport, Slab};
use crate::source::{Memory, SourceRange};
use crate::tcp::DataConnection;

const BLOCK: usize = 100_000;
const BLOCKS: u32 = 30;
const HANDOFF: HandoffId = HandoffId(3);

/// What both rigs have in common.
struct Arena {
    region: Arc<Region>,
    slabs: Vec<Arc<Slab>>,
    deadline: Instant,
}

impl Arena {
    fn new() -> Self {
        let region = Region::new("conformance", BLOCK * BLOCKS as usize).unwrap();
        Self { region, slabs: Vec::new(), deadline: Instant::now() + Duration::from_secs(60) }
    }

    fn source(&mut self, bytes: &[u8]) -> SourceRange {
        let mut slab = Slab::new(bytes.len() + 3).unwrap();
        slab.as_mut_slice()[3..].copy_from_slice(bytes);
        let slab = Arc::new(slab);
        self.slabs.push(Arc::clone(&slab));
        SourceRange::new(Memory::Staged(slab), 3, bytes.len()).unwrap()
    }

    fn sources_held(&self) -> usize {
        self.slabs.iter().filter(|slab| 1 < Arc::strong_count(slab)).count()
    }

    fn range(offset: usize, len: usize) -> RemoteRange {
        let covered = &targets()[offset / BLOCK..=(offset + len - 1) / BLOCK];
        let (offset, len) = (offset as u64, u32::try_from(len).unwrap());
        RemoteRange { handoff: HANDOFF, offset, len, stamp: stamp(covered) }
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.region.read(offset, &mut bytes);
        bytes
    }
}

fn targets() -> Vec<BlockRef> {
    (0..BLOCKS).map(|it| BlockRef { block: BlockId(it), epoch: Epoch(u64::from(it) + 5) }).collect()
}

struct SharedMemoryRig {
    arena: Arena,
    transport: SharedMemoryTransport,
}

impl ConformanceRig for SharedMemoryRig {
    type Transport = SharedMemoryTransport;

    fn transport(&mut self) -> &mut SharedMemoryTransport {
        &mut self.transport
    }

    fn source(&mut self, bytes: &[u8]) -> SourceRange {
        self.arena.source(bytes)
    }

    fn sources_held(&self) -> usize {
        self.arena.sources_held()
    }

    fn arena_len(&self) -> usize {
        self.arena.region.len()
    }

    fn range(&self, offset: usize, len: usize) -> RemoteRange {
        Arena::range(offset, len)
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        self.arena.read(offset, len)
    }

    fn admits(&self) -> bool {
        false
    }

    fn keep_waiting(&mut self) -> bool {
        Instant::now() < self.arena.deadline
    }

    fn sever(&mut self) {
        self.transport.sever();
    }
}

struct TcpRig {
    arena: Arena,
    sender: DataConnection,
    receiver: Option<DataConnection>,
    reservation: Reservation,
    nothing: Arc<Region>,
}

impl TcpRig {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        for stream in [&ours, &theirs] {
            stream.set_nonblocking(true).unwrap();
            // Far less than an arena, or a whole write can be on its way at once and nothing ends midway.
            set_socket_send_buffer_size(stream, BLOCK).unwrap();
            set_socket_recv_buffer_size(stream, BLOCK).unwrap();
        }
        let mut reservation = Reservation::new(HANDOFF, TokenCount(1), targets()).unwrap();
        reservation.apply(ReservationEvent::Announced);
        Self {
            arena: Arena::new(),
            sender: DataConnection::new(ours),
            receiver: Some(DataConnection::new(theirs)),
            reservation,
            nothing: Region::new("nothing", 1).unwrap(),
        }
    }
}

impl ConformanceRig for TcpRig {
    type Transport = DataConnection;

    fn transport(&mut self) -> &mut DataConnection {
        &mut self.sender
    }

    fn source(&mut self, bytes: &[u8]) -> SourceRange {
        self.arena.source(bytes)
    }

    fn sources_held(&self) -> usize {
        self.arena.sources_held()
    }

    fn arena_len(&self) -> usize {
        self.arena.region.len()
    }

    fn range(&self, offset: usize, len: usize) -> RemoteRange {
        Arena::range(offset, len)
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        self.arena.read(offset, len)
    }

    fn admits(&self) -> bool {
        true
    }

    fn keep_waiting(&mut self) -> bool {
        let reservation = &self.reservation;
        let mut admit = |range: &RemoteRange| match range.handoff {
            HANDOFF => reservation.admit(range, BLOCK),
            _ => Err(WriteFault::NotExpected),
        };
        if let Some(receiver) = &mut self.receiver {
            receiver.receive(&self.arena.region, &mut admit).unwrap();
            receiver.flush().unwrap();
        }
        let mut deny = |_: &RemoteRange| Err(WriteFault::NotExpected);
        if self.sender.receive(&self.nothing, &mut deny).is_err() {
            self.sender.sever();
        }
        Instant::now() < self.arena.deadline
    }

    fn sever(&mut self) {
        self.receiver = None;
    }
}

#[test]
fn shared_memory_conforms() {
    let arena = Arena::new();
    let fd = arena.region.fd().try_clone_to_owned().unwrap();
    let mapped = Region::map(fd, arena.region.len(), Access::ReadWrite).unwrap();
    conformance(SharedMemoryRig { arena, transport: SharedMemoryTransport::new(mapped) });
}

#[test]
fn tcp_conforms() {
    conformance(TcpRig::new());
}

#[test]
fn a_write_whose_reservation_ends_midway_lands_no_further() {
    let mut rig = TcpRig::new();
    let len = rig.arena_len();
    let (source, range) = (rig.source(&vec![7; len]), rig.range(0, len));
    use tidemill_kvtransfer_proto::transport::{Completion, Post, Transport, WriteId};
    assert_eq!(rig.transport().post_write(WriteId(0), source, range), Post::Accepted);
    let mut done = Vec::new();
    while rig.read(0, 1) != [7] {
        rig.transport().poll(&mut done);
        assert!(rig.keep_waiting(), "the first bytes land");
    }
    rig.reservation.apply(ReservationEvent::Cancel);
    let landed = rig.read(0, len);
    while done.is_empty() {
        rig.transport().poll(&mut done);
        assert!(rig.keep_waiting(), "the write completes");
    }
    assert_eq!(done, [Completion { id: WriteId(0), outcome: Err(WriteFault::NotExpected) }]);
    assert!(landed.contains(&0), "the end came midway");
    assert!(rig.read(0, len) == landed, "nothing landed after the end");
}
