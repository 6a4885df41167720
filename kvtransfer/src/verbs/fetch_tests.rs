//! Fetches over a device: the contract of transports with the sides exchanged. Run by `tests/rdma/run`.

use std::sync::Arc;
use std::time::Instant;

use tidemill_kvtransfer_proto::transport::{
    Completion, ConformanceRig, Post, RemoteRange, Transport, WriteFault, WriteId, conformance,
};

use super::RdmaTransport;
use super::tests::{Pair, Side, impatient, pattern, range, wait};
use crate::shm::Region;

/// Moves bytes from ranges of the peer's arena into this side's.
struct Fetching {
    transport: RdmaTransport,
    arena: Arc<Region>,
}

impl Transport for Fetching {
    type Source = RemoteRange;

    fn post_write(&mut self, id: WriteId, source: RemoteRange, target: RemoteRange) -> Post {
        assert_eq!(source.len, target.len);
        self.transport.post_fetch(id, source, &self.arena, target.offset)
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        self.transport.poll(done);
    }
}

struct Rig {
    fetching: Fetching,
    theirs: Side,
    deadline: Instant,
    /// Where in the peer's arena the next source goes; no two of a test share a place.
    next: usize,
}

/// Bytes of the arena that is fetched into; that of the peer, like this side's, is longer, to hold all sources.
const LEN: usize = 3_000_000;

impl ConformanceRig for Rig {
    type Transport = Fetching;

    fn transport(&mut self) -> &mut Fetching {
        &mut self.fetching
    }

    fn source(&mut self, bytes: &[u8]) -> RemoteRange {
        self.theirs.arena.write(self.next, bytes);
        let source = range(self.next, bytes.len());
        self.next += bytes.len();
        source
    }

    /// A source is memory of the peer, which nothing here can hold.
    fn sources_held(&self) -> usize {
        0
    }

    fn arena_len(&self) -> usize {
        LEN
    }

    fn range(&self, offset: usize, len: usize) -> RemoteRange {
        range(offset, len)
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fetching.arena.read(offset, &mut bytes);
        bytes
    }

    fn admits(&self) -> bool {
        false
    }

    fn keep_waiting(&mut self) -> bool {
        wait(&mut self.fetching.transport);
        Instant::now() < self.deadline
    }

    fn sever(&mut self) {
        self.theirs.transport.sever();
    }
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn fetches_conform() {
    let Pair { ours, theirs, deadline, .. } = Pair::new(3 * LEN, &impatient());
    let fetching = Fetching { transport: ours.transport, arena: ours.arena };
    conformance(Rig { fetching, theirs, deadline, next: 0 });
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn fetches_of_a_dead_path_move_without_the_peers_word() {
    let mut pair = Pair::new(8 << 20, &impatient());
    assert!(2 <= pair.ours.transport.paths().len(), "several paths");
    let bytes = pattern(3, 8 << 20);
    pair.theirs.arena.write(0, &bytes);
    assert!(pair.theirs.transport.fence(0), "the peer's side of the first path ends, and nobody says so");
    let arena = Arc::clone(&pair.ours.arena);
    for index in 0..8 {
        let source = range(index << 20, 1 << 20);
        // To the other end: nothing is where it was.
        let post =
            pair.ours.transport.post_fetch(WriteId(index as u64), source, &arena, ((7 - index) << 20) as u64);
        assert_eq!(post, Post::Accepted);
    }
    let mut done = Vec::new();
    pair.work(&mut done, "all fetches complete", |_, done| done.len() == 8);
    assert!(done.iter().all(|it| it.outcome == Ok(())), "{done:?}");
    assert!(!pair.ours.transport.paths()[0].is_up, "by the other paths");
    let mut seen = vec![0; 8 << 20];
    arena.read(0, &mut seen);
    assert!(seen.chunks(1 << 20).rev().eq(bytes.chunks(1 << 20)));
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn what_cannot_be_fetched_is_an_error_and_changes_nothing() {
    const HERE: usize = 1 << 20;
    let mut pair = Pair::new(HERE, &impatient());
    pair.theirs.arena.write(0, &pattern(5, HERE));
    pair.ours.arena.write(0, &pattern(6, HERE));
    let arena = Arc::clone(&pair.ours.arena);
    // The peer takes its memory back last: from then on nothing else would work either.
    let revoke = |pair: &mut Pair| drop(pair.theirs.transport.take_access());
    type Before = fn(&mut Pair);
    #[rustfmt::skip]
    let rows: [(&str, Before, RemoteRange, usize, WriteFault); 3] = [
        ("beyond the peer's arena",                  |_| (), range(HERE - 10, 20), 0,         WriteFault::Outside),
        ("beyond this side's",                       |_| (), range(0, 20),         HERE - 10, WriteFault::Outside),
        ("memory that the peer does not lend more",  revoke, range(0, 70_000),     0,         WriteFault::Severed),
    ];
    for (name, before, source, offset, expected) in rows {
        before(&mut pair);
        assert_eq!(
            pair.ours.transport.post_fetch(WriteId(1), source, &arena, offset as u64),
            Post::Accepted,
            "{name}"
        );
        let mut done = Vec::new();
        pair.work(&mut done, name, |_, done| !done.is_empty());
        assert_eq!(done, [Completion { id: WriteId(1), outcome: Err(expected) }], "{name}");
        let mut seen = vec![0; HERE];
        arena.read(0, &mut seen);
        assert!(seen == pattern(6, HERE), "{name}: nothing landed");
    }
}

#[test]
#[ignore = "needs a verbs device: tests/rdma/run"]
fn a_key_for_reading_lets_nobody_write() {
    const LEN: usize = 1 << 20;
    let mut pair = Pair::new(LEN, &impatient()).that_reads();
    pair.theirs.arena.write(0, &pattern(5, LEN));
    let arena = Arc::clone(&pair.ours.arena);
    let mut done = Vec::new();
    assert_eq!(pair.ours.transport.post_fetch(WriteId(1), range(0, LEN), &arena, 0), Post::Accepted);
    pair.work(&mut done, "it is read", |_, done| !done.is_empty());
    assert_eq!(done, [Completion { id: WriteId(1), outcome: Ok(()) }]);
    let mut seen = vec![0; LEN];
    arena.read(0, &mut seen);
    assert!(seen == pattern(5, LEN), "what was read is what is there");

    let source = pair.source(&pattern(6, 70_000));
    assert_eq!(pair.ours.transport.post_write(WriteId(2), source, range(0, 70_000)), Post::Accepted);
    done.clear();
    pair.work(&mut done, "the write ends", |_, done| !done.is_empty());
    assert_eq!(done, [Completion { id: WriteId(2), outcome: Err(WriteFault::Severed) }]);
    pair.theirs.arena.read(0, &mut seen);
    assert!(seen == pattern(5, LEN), "nothing landed");
}
