//! What only a device can show. Run by `tests/rdma/run`, in a machine that has one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tidemill_kvtransfer_proto::transport::{
    Completion, ConformanceRig, Post, RemoteRange, Transport, WriteFault, WriteId, conformance,
};
use tidemill_kvtransfer_proto::units::HandoffId;

use super::checked::Domain;
use super::memory_region::{MemoryRegion, Reach};
use super::setup::Tuning;
use super::{Draft, Fabric, RdmaConfig, RdmaTransport, VerbsError};
use crate::shm::{Region, Slab};
use crate::source::{Memory, SourceRange};

/// Two connected transports in one process, each with its own devices and arena.
pub(super) struct Pair {
    pub(super) ours: Side,
    pub(super) theirs: Side,
    slabs: Vec<Arc<Slab>>,
    pub(super) deadline: Instant,
}

pub(super) struct Side {
    pub(super) fabric: Fabric,
    pub(super) arena: Arc<Region>,
    pub(super) transport: RdmaTransport,
}

impl Pair {
    pub(super) fn new(len: usize, config: &RdmaConfig) -> Self {
        let open = |name| {
            let arena = Region::new(name, len).unwrap();
            (Fabric::open(config.clone(), &arena).unwrap(), arena)
        };
        let ((our_fabric, our_arena), (their_fabric, their_arena)) = (open("ours"), open("theirs"));
        let (ours, theirs) = connect(&our_fabric, &their_fabric, len, Tuning::default());
        Self {
            ours: Side { fabric: our_fabric, arena: our_arena, transport: ours },
            theirs: Side { fabric: their_fabric, arena: their_arena, transport: theirs },
            slabs: Vec::new(),
            deadline: Instant::now() + Duration::from_secs(120),
        }
    }

    fn reconnect(&mut self) {
        let len = self.theirs.arena.len();
        (self.ours.transport, self.theirs.transport) =
            connect(&self.ours.fabric, &self.theirs.fabric, len, Tuning::default());
    }

    /// The same, and the other side lets this one read and not write.
    pub(super) fn that_reads(mut self) -> Self {
        self.theirs.fabric = self.theirs.fabric.read_only();
        self.reconnect();
        self
    }

    pub(super) fn source(&mut self, bytes: &[u8]) -> SourceRange {
        let mut slab = Slab::new(bytes.len() + 3).unwrap();
        slab.as_mut_slice()[3..].copy_from_slice(bytes);
        let slab = Arc::new(slab);
        self.slabs.push(Arc::clone(&slab));
        SourceRange::new(Memory::Staged(slab), 3, bytes.len()).unwrap()
    }

    /// Posts a write of bytes that depend on `seed` to `offset`.
    fn post(&mut self, id: u64, seed: usize, offset: usize, len: usize) {
        let source = self.source(&pattern(seed, len));
        assert_eq!(self.ours.transport.post_write(WriteId(id), source, range(offset, len)), Post::Accepted);
    }

    fn seen(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.theirs.arena.read(offset, &mut bytes);
        bytes
    }

    /// Lets both sides work until `until` says so.
    pub(super) fn work(
        &mut self,
        done: &mut Vec<Completion>,
        what: &str,
        mut until: impl FnMut(&Self, &[Completion]) -> bool,
    ) {
        while !until(self, done) {
            wait(&mut self.ours.transport);
            self.ours.transport.poll(done);
            self.theirs.transport.poll(&mut Vec::new());
            assert!(Instant::now() < self.deadline, "in time: {what}");
        }
    }

    fn tell_news(&mut self) {
        for path in self.ours.transport.take_news() {
            assert!(self.theirs.transport.fence(path));
        }
        for path in self.theirs.transport.take_news() {
            assert!(self.ours.transport.fence(path));
        }
    }
}

/// Connects two sides of one process whose arenas have `len` bytes.
pub(super) fn connect(
    ours: &Fabric,
    theirs: &Fabric,
    len: usize,
    tuning: Tuning,
) -> (RdmaTransport, RdmaTransport) {
    let our_draft = Draft::new(ours, None, None, tuning).unwrap();
    let our_ends = our_draft.ends();
    let their_draft = Draft::new(theirs, None, Some(&our_ends), tuning).unwrap();
    let their_ends = their_draft.ends();
    let theirs = their_draft.connect(&our_ends, len as u64).unwrap();
    (our_draft.connect(&their_ends, len as u64).unwrap(), theirs)
}

/// Sleeps until a descriptor is readable, but not for long.
pub(super) fn wait(transport: &mut RdmaTransport) {
    let fds: Vec<_> = transport.fds().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let timeout = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
    rustix::event::poll(&mut fds, Some(&timeout)).unwrap();
    transport.hear(|_| true);
}

pub(super) fn range(offset: usize, len: usize) -> RemoteRange {
    RemoteRange { handoff: HandoffId(1), offset: offset as u64, len: u32::try_from(len).unwrap(), stamp: 0 }
}

pub(super) fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|index| (index.wrapping_mul(31) ^ (index >> 8).wrapping_mul(7) ^ seed) as u8).collect()
}

/// One second until a path without a peer counts as dead.
pub(super) fn impatient() -> RdmaConfig {
    RdmaConfig { timeout: 16, retries: 3, ..RdmaConfig::default() }
}

impl ConformanceRig for Pair {
    type Transport = RdmaTransport;

    fn transport(&mut self) -> &mut RdmaTransport {
        &mut self.ours.transport
    }

    fn source(&mut self, bytes: &[u8]) -> SourceRange {
        Self::source(self, bytes)
    }

    fn sources_held(&self) -> usize {
        self.slabs.iter().filter(|slab| 1 < Arc::strong_count(slab)).count()
    }

    fn arena_len(&self) -> usize {
        self.theirs.arena.len()
    }

    fn range(&self, offset: usize, len: usize) -> RemoteRange {
        range(offset, len)
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        self.seen(offset, len)
    }

    fn admits(&self) -> bool {
        false
    }

    fn keep_waiting(&mut self) -> bool {
        wait(&mut self.ours.transport);
        Instant::now() < self.deadline
    }

    fn sever(&mut self) {
        self.theirs.transport.sever();
    }
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn verbs_conform() {
    conformance(Pair::new(3_000_000, &impatient()));
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn scattered_small_writes_land_where_they_belong() {
    const PIECE: usize = 3000;
    const COUNT: usize = 2000;
    let mut pair = Pair::new(2 * PIECE * COUNT, &RdmaConfig::default());
    // Runs of three neighbours, then a gap: some travel together, none may touch the gaps. The last is a short one.
    let place = |index: usize| (index * PIECE) + (index / 3) * PIECE;
    for index in 0..COUNT {
        pair.post(index as u64, index, place(index), PIECE);
    }
    pair.post(COUNT as u64, 5, 2 * PIECE * COUNT - 7, 7);
    let mut done = Vec::new();
    pair.work(&mut done, "all writes complete", |_, done| done.len() == COUNT + 1);
    assert!(done.iter().all(|it| it.outcome == Ok(())), "each write lands");
    let mut expected = vec![0; 2 * PIECE * COUNT];
    for index in 0..COUNT {
        expected[place(index)..][..PIECE].copy_from_slice(&pattern(index, PIECE));
    }
    expected[2 * PIECE * COUNT - 7..].copy_from_slice(&pattern(5, 7));
    assert!(pair.seen(0, expected.len()) == expected, "these bytes and no others");
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn a_write_in_flight_lands_no_further_once_access_is_revoked() {
    const WRITE: usize = 1 << 20;
    const LEN: usize = 8 * WRITE;
    type Revoke = fn(&mut RdmaTransport);
    let rows: [(&str, Revoke); 2] = [
        ("its key alone is taken away", |theirs| drop(theirs.take_access())),
        ("its connections are ended, then its key is taken away", |theirs| {
            theirs.sever();
            drop(theirs.take_access());
        }),
    ];
    for (name, revoke) in rows {
        let mut pair = Pair::new(LEN, &impatient());
        let sources = [pair.source(&vec![1; WRITE]), pair.source(&vec![2; WRITE])];
        // The memory changes without end, until its owner takes it back in the middle of that.
        let arena = Arc::clone(&pair.theirs.arena);
        let theirs = &mut pair.theirs.transport;
        let ours = &mut pair.ours.transport;
        let (landed, mut done, posted) = std::thread::scope(|scope| {
            let revoked = scope.spawn(move || {
                let seen = |at| {
                    let mut byte = [0];
                    arena.read(at, &mut byte);
                    byte[0]
                };
                while seen(LEN - 1) != 2 {
                    std::thread::yield_now();
                }
                revoke(theirs);
                let mut landed = vec![0; LEN];
                arena.read(0, &mut landed);
                landed
            });
            let (mut done, mut posted) = (Vec::new(), 0);
            while done.iter().all(|it: &Completion| it.outcome.is_ok()) {
                while posted < done.len() + 32 {
                    let source = sources[posted / 8 % 2].clone();
                    let target = range(posted % 8 * WRITE, WRITE);
                    assert_eq!(ours.post_write(WriteId(posted as u64), source, target), Post::Accepted);
                    posted += 1;
                }
                wait(ours);
                ours.poll(&mut done);
            }
            (revoked.join().unwrap(), done, posted)
        });
        pair.work(&mut done, "all writes complete", |_, done| done.len() == posted);
        let severed = done.iter().filter(|it| it.outcome == Err(WriteFault::Severed)).count();
        assert!(0 < severed, "{name}: writes were in flight");
        assert!(pair.seen(0, LEN) == landed, "{name}: nothing landed after the end");
        // The same two workers get on with each other again.
        pair.reconnect();
        pair.post(99, 9, 5000, 70_000);
        done.clear();
        pair.work(&mut done, "a write after reconnecting", |_, done| !done.is_empty());
        assert_eq!(done, [Completion { id: WriteId(99), outcome: Ok(()) }], "{name}");
        assert!(pair.seen(5000, 70_000) == pattern(9, 70_000), "{name}");
    }
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn a_dead_path_hands_over_to_the_others_and_is_fenced() {
    const LEN: usize = 8 << 20;
    let mut pair = Pair::new(LEN, &impatient());
    let count = pair.ours.transport.paths().len();
    assert!(2 <= count, "several paths");
    assert!(pair.theirs.transport.fence(0), "the peer's side of the first path ends, and nobody says so");
    let bytes = pattern(3, 1 << 20);
    for index in 0..8 {
        let source = pair.source(&bytes);
        let target = range(index << 20, 1 << 20);
        assert_eq!(pair.ours.transport.post_write(WriteId(index as u64), source, target), Post::Accepted);
    }
    let mut done = Vec::new();
    pair.work(&mut done, "all bytes land", |pair, _| pair.seen(0, LEN).chunks(1 << 20).all(|it| it == bytes));
    pair.work(&mut done, "the path is found dead", |pair, _| !pair.ours.transport.paths()[0].is_up);
    let (mut before, mut patience) = (usize::MAX, 0);
    pair.work(&mut done, "what can complete does", |_, done| {
        patience = if done.len() == before { patience + 1 } else { 0 };
        before = done.len();
        patience == 50
    });
    assert!(done.len() < 8, "writes that had to move wait for the peer's word");
    assert_eq!(pair.ours.transport.paths().iter().filter(|path| path.is_up).count(), count - 1);
    pair.tell_news();
    pair.work(&mut done, "all writes complete", |_, done| done.len() == 8);
    assert!(done.iter().all(|it| it.outcome == Ok(())));
    // The last path goes too: now there is no way left.
    for path in 0..u32::try_from(count).unwrap() {
        assert!(pair.ours.transport.fence(path));
    }
    assert!(pair.ours.transport.is_dead() && !pair.ours.transport.has_work(), "and nothing to do");
    pair.post(100, 3, 0, 4096);
    done.clear();
    pair.work(&mut done, "the write is refused", |_, done| !done.is_empty());
    assert_eq!(done, [Completion { id: WriteId(100), outcome: Err(WriteFault::Severed) }]);
    assert!(!pair.ours.transport.fence(1000), "a path that never was");
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn a_write_that_failed_is_not_taken_for_landed_by_those_behind_it() {
    // One path and no other, whose far end goes without a word.
    let config = RdmaConfig { devices: vec!["rxe0".to_owned()], queue_pairs: 1, ..impatient() };
    let mut pair = Pair::new(1 << 20, &config);
    assert!(pair.theirs.transport.fence(0));
    let mut done = Vec::new();
    for index in 0..8 {
        pair.post(index, 3, 0, 4096);
        pair.ours.transport.poll(&mut done); // Posts it, with a flush behind it.
    }
    pair.work(&mut done, "all writes complete", |_, done| done.len() == 8);
    assert!(done.iter().all(|it| it.outcome == Err(WriteFault::Severed)), "{done:?}");
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn a_probe_measures_the_way_and_writes_nothing() {
    let mut pair = Pair::new(1 << 20, &impatient());
    pair.theirs.arena.write(0, &pattern(8, 1 << 20));
    pair.ours.transport.probe(4 << 20);
    let mut rate = None;
    while rate.is_none() {
        wait(&mut pair.ours.transport);
        pair.ours.transport.poll(&mut Vec::new());
        rate = pair.ours.transport.take_probed();
        assert!(Instant::now() < pair.deadline, "the probe ends");
    }
    assert!(rate.is_some_and(|rate| 1e5 < rate), "{rate:?} bytes per second");
    assert!(pair.seen(0, 1 << 20) == pattern(8, 1 << 20));
    pair.theirs.transport.sever();
    pair.ours.transport.probe(4 << 20);
    pair.work(&mut Vec::new(), "a probe of a dead way ends too", |pair, _| {
        pair.ours.transport.paths().iter().all(|path| !path.is_up)
    });
    assert_eq!(pair.ours.transport.take_probed(), Some(0.0));
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn a_limit_on_pinned_memory_is_named() {
    // Capabilities are a thread's own, and the limit does not bind the threads that keep theirs.
    std::thread::spawn(pin_too_much).join().unwrap();
}

fn pin_too_much() {
    let arena = Region::new("small", 4096).unwrap();
    let fabric = Fabric::open(RdmaConfig::default(), &arena).unwrap();
    let large = Region::new("large", 64 << 20).unwrap();
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).unwrap();
    let limit = Rlimit { current: Some(8 << 20), maximum: Some(8 << 20) };
    rustix::process::setrlimit(Resource::Memlock, limit).unwrap();
    let error = MemoryRegion::of_region(&fabric.nics[0].domain, &large, Reach::Peer).unwrap_err();
    assert!(matches!(error, VerbsError::MemoryLock { bytes: 67_108_864, .. }), "{error:?}");
    let text = error.to_line();
    assert!(text.contains("RLIMIT_MEMLOCK") && text.contains("8388608"), "{text}");
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn memory_that_a_device_cannot_take_is_an_error() {
    let arena = Region::new("arena", 4096).unwrap();
    let fabric = Fabric::open(RdmaConfig::default(), &arena).unwrap();
    let domain: &Arc<Domain> = &fabric.nics[0].domain;
    // Soft-RoCE has no such call; a driver that has one would see that this is no dma-buf.
    let error = MemoryRegion::of_dma_buf(domain, arena.fd(), 0, 4096, Reach::Peer).unwrap_err();
    let is_refused = match fabric.nics[0].name().starts_with("rxe") {
        true => matches!(error, VerbsError::NoDmaBuf),
        false => {
            matches!(error, VerbsError::NoDmaBuf | VerbsError::Call { operation: "register memory", .. })
        }
    };
    assert!(is_refused, "{}", error.to_line());
    let missing = RdmaConfig { devices: vec!["mlx9_9".to_owned()], ..RdmaConfig::default() };
    let error = Fabric::open(missing, &arena).unwrap_err();
    assert_eq!(error.to_line(), "no RDMA device can be used: there is no device mlx9_9");
}
