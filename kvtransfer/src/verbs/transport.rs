//! One-sided writes over several paths to one peer.
//!
//! A path that fails hands its unfinished chunks to the others: the same bytes go to the same place again, which
//! changes nothing while the reservation lives. But packets that the dead path left in the network could land later,
//! when the place belongs to somebody else. So a write that had to move counts as complete only when the peer has
//! said that it ended its side of the dead path as well; each side ends its own before it speaks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, Transport, WriteFault, WriteId};

use super::checked::CompletionQueue;
use super::device::Nic;
use super::health::Failed;
use super::memory_region::MemoryRegion;
use super::paths::{Chunk, Direction, Heard, Path};
use super::setup::Terms;
use super::striping::{PathLoad, choose_path, piece_len};
use crate::shm::Region;
use crate::source::{Memory, SourceRange};
use tidemill_kvtransfer_proto::endpoint_core::WriteSource;

/// Both directions of the paths to one peer: writes of this side go out, and the peer's land in the arena without
/// anybody here noticing.
pub(crate) struct RdmaTransport {
    /// Go first when dropped: then nobody reaches the memory.
    pub(super) paths: Vec<Path>,
    pub(super) queues: Vec<Queue>,
    /// By which the peer reaches the arena.
    pub(super) access: Access,
    pub(super) remote_len: u64,
    /// By which ends are made anew.
    pub(super) terms: Terms,
    writes: BTreeMap<u64, Write>,
    next_write: u64,
    /// Not posted yet.
    waiting: VecDeque<Chunk>,
    /// Came while something else was being done.
    pub(super) overheard: Vec<Heard>,
    completions: Vec<Completion>,
    /// Paths that this side has ended and the peer was not told of.
    pub(super) news: Vec<u32>,
    probe: Probe,
    started: Instant,
}

/// The peer's rights to the arena. Dropping it takes them away, which takes long for much memory; when the drop
/// returns, they are gone.
#[derive(Debug)]
pub(crate) struct Access(pub(super) Vec<MemoryRegion>);

pub(super) struct Queue {
    pub(super) completions: Arc<CompletionQueue>,
    is_armed: bool,
}

#[derive(Debug)]
struct Write {
    id: WriteId,
    chunks: usize,
    /// Dead paths on which parts of it may still be travelling.
    fences: BTreeSet<usize>,
    outcome: Result<(), WriteFault>,
}

/// A measurement of the way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Probe {
    Idle,
    Running { since: Instant, bytes: usize, reads: usize },
    Done(f64),
}

/// A path as others see it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PathReport {
    /// Device and port of this side.
    pub(crate) device: String,
    /// Whether it works.
    pub(crate) is_up: bool,
    /// Bytes that arrived at the peer by it.
    pub(crate) delivered: u64,
    /// Work requests posted on it.
    pub(crate) requests: u64,
    /// Bytes per second of late.
    pub(crate) rate: Option<f64>,
}

impl RdmaTransport {
    pub(super) fn new(
        paths: Vec<Path>,
        queues: Vec<Arc<CompletionQueue>>,
        access: Vec<MemoryRegion>,
        remote_len: u64,
        terms: Terms,
    ) -> Self {
        let queues = queues.into_iter().map(|completions| Queue { completions, is_armed: false }).collect();
        Self {
            paths,
            queues,
            access: Access(access),
            remote_len,
            terms,
            writes: BTreeMap::new(),
            next_write: 0,
            waiting: VecDeque::new(),
            overheard: Vec::new(),
            completions: Vec::new(),
            news: Vec::new(),
            probe: Probe::Idle,
            started: Instant::now(),
        }
    }

    /// Readable when polling would move something on.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queues.iter().map(|queue| queue.completions.fd())
    }

    /// To be called when a descriptor is readable, and followed by `poll`.
    pub(crate) fn hear(&mut self, is_ready: impl Fn(BorrowedFd<'_>) -> bool) {
        for queue in self.queues.iter_mut().filter(|queue| is_ready(queue.completions.fd())) {
            if 0 < queue.completions.take_events() {
                queue.is_armed = false;
            }
        }
    }

    /// Whether polling would move something on that no descriptor announces.
    pub(crate) fn has_work(&self) -> bool {
        !self.completions.is_empty()
            || !self.overheard.is_empty()
            || self.queues.iter().any(|queue| !queue.is_armed)
            || matches!(self.probe, Probe::Done(_))
    }

    /// Whether no path is left.
    pub(crate) fn is_dead(&self) -> bool {
        !self.paths.iter().any(Path::is_up)
    }

    /// How many paths work.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.paths.iter().filter(|path| path.is_up()).count()).expect("few paths")
    }

    /// The paths, for logs and counters.
    pub(crate) fn paths(&self) -> Vec<PathReport> {
        let report = |path: &Path| PathReport {
            device: path.nic().name().to_owned(),
            is_up: path.is_up(),
            delivered: path.delivered,
            requests: path.requests,
            rate: path.rate(),
        };
        self.paths.iter().map(report).collect()
    }

    /// Paths that this side has ended since the last call: to be told to the peer.
    pub(crate) fn take_news(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.news)
    }

    /// The peer has ended its side of a path. False when it has no such path.
    pub(crate) fn fence(&mut self, path: u32) -> bool {
        let (index, now) = (path as usize, self.now());
        let Some(path) = self.paths.get_mut(index) else { return false };
        path.is_fenced = true;
        path.renewal.refused(now);
        self.bury(index, "the peer ended it");
        for write in self.writes.values_mut() {
            write.fences.remove(&index);
        }
        self.collect();
        true
    }

    /// Ends all paths: every write completes as severed. When this returns, no write of this side reads memory any
    /// more and none of the peer's can land.
    pub(crate) fn sever(&mut self) {
        let mut chunks = Vec::new();
        for path in &mut self.paths {
            path.close(&mut chunks, &mut self.overheard);
        }
        self.waiting.clear();
        self.overheard.clear();
        // Nothing comes out of them any more, so nothing is to be looked for.
        self.queues.iter_mut().for_each(|queue| queue.is_armed = true);
        let writes = std::mem::take(&mut self.writes).into_values();
        let severed = |write: Write| Completion { id: write.id, outcome: Err(WriteFault::Severed) };
        self.completions.extend(writes.map(severed));
        self.end_probe();
    }

    /// The peer's rights, to be dropped where there is time for it. Writes of the peer that come later fail.
    pub(crate) fn take_access(&mut self) -> Access {
        std::mem::replace(&mut self.access, Access(Vec::new()))
    }

    /// Begins to measure the way by reading about `len` bytes of the peer's arena over all paths.
    pub(crate) fn probe(&mut self, len: usize) {
        let up = self.paths.iter().filter(|path| path.is_up()).count();
        let each = usize::try_from(self.remote_len).unwrap_or(usize::MAX).min(len.div_ceil(up.max(1)));
        let (since, mut reads) = (Instant::now(), 0);
        for index in 0..self.paths.len() {
            if !self.paths[index].is_up() {
                continue;
            }
            match self.paths[index].probe(each) {
                Ok(()) => reads += 1,
                Err(reason) => self.bury(index, &reason),
            }
        }
        self.probe = Probe::Running { since, bytes: each * reads, reads };
        if reads == 0 {
            self.end_probe();
        }
    }

    /// Bytes per second, once, when the measurement is over; zero when it came to nothing.
    pub(crate) fn take_probed(&mut self) -> Option<f64> {
        let Probe::Done(rate) = self.probe else { return None };
        self.probe = Probe::Idle;
        Some(rate)
    }

    fn end_probe(&mut self) {
        if let Probe::Running { .. } = self.probe {
            self.probe = Probe::Done(0.0);
        }
    }

    /// Something of a device has failed; perhaps it belongs to this transport.
    pub(crate) fn hear_failure(&mut self, nic: &Nic, failed: Failed) {
        for index in 0..self.paths.len() {
            let path = &self.paths[index];
            let is_its = match failed {
                Failed::QueuePair(number) => path.number() == Some(number),
                Failed::CompletionQueue(address) => {
                    self.queues[path.queue()].completions.address() == address
                }
            };
            if is_its && std::ptr::eq(path.nic(), nic) {
                self.bury(index, "its device says that it has failed");
            }
        }
    }

    /// Ends the paths of devices that have failed, and those of ports that are down while there are others. The last
    /// one stays: what it loses it repeats, and the port may be up again before it has done so in vain.
    fn heed_health(&mut self) {
        for index in 0..self.paths.len() {
            let works = |path: &Path| path.is_up() && !path.nic().is_port_down();
            let path = &self.paths[index];
            if path.nic().is_broken() {
                self.bury(index, "its device has failed");
            } else if path.nic().is_port_down() && self.paths.iter().any(works) {
                self.bury(index, "its port is down");
            }
        }
    }

    /// Queues a fetch of the whole of `source`, a range of the peer's arena, into this side's own arena from `offset` on:
    /// for peers that may not or cannot write. What holds of a write holds of it, with the sides exchanged: the peer keeps
    /// its bytes as they are until it hears that the fetch has ended, or has proof of its own that nobody fetches any
    /// more ([`Access`] dropped after [`sever`](Self::sever)).
    pub(crate) fn post_fetch(
        &mut self,
        id: WriteId,
        source: RemoteRange,
        arena: &Arc<Region>,
        offset: u64,
    ) -> Post {
        let place = |offset| SourceRange::new(Memory::Arena(Arc::clone(arena)), offset, source.len as usize);
        let local = usize::try_from(offset).ok().and_then(place);
        let Some(local) = local else {
            self.completions.push(Completion { id, outcome: Err(WriteFault::Outside) });
            return Post::Accepted;
        };
        self.post(id, Direction::Pull, &local, &source)
    }

    /// Queues a transfer between `local` and a range of the peer's arena, of the same length.
    fn post(&mut self, id: WriteId, direction: Direction, local: &SourceRange, range: &RemoteRange) -> Post {
        assert_eq!(local.len(), range.len as usize, "all of it is moved");
        if QUEUE <= self.writes.len() {
            return Post::QueueFull;
        }
        let up = self.paths.iter().filter(|path| path.is_up()).count();
        let is_inside = range.offset.checked_add(range.len.into()).is_some_and(|end| end <= self.remote_len);
        let fault = if up == 0 { Some(WriteFault::Severed) } else { None };
        if let Some(fault) = fault.or((!is_inside).then_some(WriteFault::Outside)) {
            self.completions.push(Completion { id, outcome: Err(fault) });
            return Post::Accepted;
        }
        let (key, each) = (self.next_write, piece_len(local.len(), up));
        self.next_write += 1;
        let mut chunks = 0;
        for at in (0..local.len()).step_by(each) {
            let source = local.part(at, each.min(local.len() - at));
            let offset = range.offset + at as u64;
            self.waiting.push_back(Chunk { write: key, direction, source, offset });
            chunks += 1;
        }
        self.writes.insert(key, Write { id, chunks, fences: BTreeSet::new(), outcome: Ok(()) });
        Post::Accepted
    }

    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Gives chunks to paths and posts them.
    fn pump(&mut self) {
        let now = self.now();
        let mut last = None;
        while let Some(chunk) = self.waiting.pop_front() {
            let continues = last.filter(|&index: &usize| self.paths[index].continues(&chunk));
            let Some(index) = continues.or_else(|| self.choose(chunk.source.len())) else {
                self.waiting.push_front(chunk);
                break;
            };
            last = Some(index);
            if let Err((chunk, error)) = self.paths[index].add(chunk, now) {
                tracing::error!(error = error.to_line(), "memory to be sent cannot be registered");
                self.chunk_ended(chunk.write, Err(WriteFault::Severed));
            }
        }
        for index in 0..self.paths.len() {
            if let Err(reason) = self.paths[index].post() {
                self.bury(index, &reason);
            }
        }
    }

    fn choose(&self, len: usize) -> Option<usize> {
        let loads: Vec<PathLoad> = self.paths.iter().map(|path| path.load(len as u64)).collect();
        choose_path(&loads, len as u64)
    }

    /// Takes completions, up to a bound, and arms the queues that are empty.
    fn reap(&mut self) {
        for index in 0..self.queues.len() {
            for _ in 0..POLLS_PER_TURN {
                let mut found = Vec::new();
                let queue = &mut self.queues[index];
                let count = match queue.completions.poll(&mut found) {
                    Ok(count) => count,
                    Err(error) => {
                        tracing::error!(error = error.to_line(), "a completion queue is broken");
                        return self.sever();
                    }
                };
                let mut heard = std::mem::take(&mut self.overheard);
                if count == 0 && heard.is_empty() {
                    if queue.is_armed {
                        break;
                    }
                    if let Err(error) = queue.completions.arm() {
                        tracing::error!(error = error.to_line(), "a completion queue is broken");
                        return self.sever();
                    }
                    // One that came before is not announced, so look again.
                    queue.is_armed = true;
                    continue;
                }
                heard.extend(found.into_iter().map(|completion| Heard { queue: index, completion }));
                self.hear_completions(&heard);
            }
        }
    }

    fn hear_completions(&mut self, heard: &[Heard]) {
        let (now, mut landed, mut read, mut broken) = (self.now(), Vec::new(), Vec::new(), Vec::new());
        for it in heard {
            // What was flushed out of a queue pair that is gone has been seen to already.
            let Some(index) = self.paths.iter().position(|path| path.owns(it)) else { continue };
            if let Err(reason) = self.paths[index].complete(&it.completion, &mut landed, &mut read, now)
                && !broken.iter().any(|(other, _)| *other == index)
            {
                broken.push((index, reason));
            }
        }
        for chunk in landed {
            self.chunk_ended(chunk.write, Ok(()));
        }
        for len in read {
            self.probe_ended(len);
        }
        for (index, reason) in broken {
            self.bury(index, &reason);
        }
    }

    fn probe_ended(&mut self, len: usize) {
        let Probe::Running { since, bytes, reads } = self.probe else { return };
        debug_assert!(0 < len, "a read brings something");
        self.probe = match reads {
            1 => Probe::Done(bytes as f64 / since.elapsed().as_secs_f64().max(1e-9)),
            _ => Probe::Running { since, bytes, reads: reads - 1 },
        };
    }

    /// Ends a path, and has the others do what it did not.
    pub(super) fn bury(&mut self, index: usize, reason: &str) {
        let (mut chunks, now) = (Vec::new(), self.now());
        let path = &mut self.paths[index];
        if !path.close(&mut chunks, &mut self.overheard) {
            return;
        }
        path.renewal.ended(now);
        let left = self.paths.iter().filter(|path| path.is_up()).count();
        let path = &self.paths[index];
        tracing::warn!(device = path.nic().name(), path = index, reason, left, "an RDMA path is dead");
        self.news.push(u32::try_from(index).expect("few paths"));
        self.end_probe();
        if left == 0 {
            return self.sever();
        }
        for chunk in &chunks {
            // What was fetched on the dead path cannot land any more: this side's end of it is gone.
            if let Some(write) = self.writes.get_mut(&chunk.write)
                && chunk.direction == Direction::Push
                && !self.paths[index].is_fenced
            {
                write.fences.insert(index);
            }
        }
        for chunk in chunks.into_iter().rev() {
            self.waiting.push_front(chunk);
        }
    }

    fn chunk_ended(&mut self, key: u64, outcome: Result<(), WriteFault>) {
        let Some(write) = self.writes.get_mut(&key) else { return };
        write.chunks -= 1;
        write.outcome = write.outcome.and(outcome);
        if write.is_over() {
            self.completions.push(Completion { id: write.id, outcome: write.outcome });
            self.writes.remove(&key);
        }
    }

    /// Writes that only waited for a fence.
    fn collect(&mut self) {
        let Self { writes, completions, .. } = self;
        writes.retain(|_, write| {
            if write.is_over() {
                completions.push(Completion { id: write.id, outcome: write.outcome });
            }
            !write.is_over()
        });
    }
}

impl Write {
    fn is_over(&self) -> bool {
        self.chunks == 0 && self.fences.is_empty()
    }
}

impl Transport for RdmaTransport {
    type Source = SourceRange;

    fn post_write(&mut self, id: WriteId, source: SourceRange, target: RemoteRange) -> Post {
        self.post(id, Direction::Push, &source, &target)
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        self.heed_health();
        self.pump();
        self.reap();
        self.pump();
        done.append(&mut self.completions);
    }
}

impl std::fmt::Debug for RdmaTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RdmaTransport({} paths, {} writes)", self.paths.len(), self.writes.len())
    }
}

/// Writes that may be under way or wait.
const QUEUE: usize = 4096;
/// Batches of completions before it is another peer's turn.
const POLLS_PER_TURN: usize = 16;
