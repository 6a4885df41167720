//! One of the ways to a peer: a queue pair, its flow control, and what it is about to post.

use std::sync::Arc;
use std::time::Duration;

use super::checked::WorkCompletion;
use super::device::Nic;
use super::error::VerbsError;
use super::memory_region::Landing;
use super::queue_pair::{Ended, Operation, Outcome, Piece, QueuePair, Remote, Work};
use super::renewal::Renewal;
use super::setup::Tuning;
use super::striping::{LONGEST, PathLoad};
use super::window::{Bounds, Ticket, Window};
use crate::source::SourceRange;
use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::path::PathEnd;

/// A way to the peer.
pub(super) struct Path {
    nic: Arc<Nic>,
    /// Which of the completion queues is its.
    queue: usize,
    /// `None` once it is dead.
    pair: Option<QueuePair<Tag>>,
    /// Whether the peer has ended its side, after which nothing that was sent here can land.
    pub(super) is_fenced: bool,
    /// How far it is with being made anew.
    pub(super) renewal: Renewal,
    /// The peer's arena.
    remote: Remote,
    window: Window,
    /// To be posted with the next call.
    batch: Vec<Work<Tag>>,
    /// Acknowledged by the peer's device, but not yet certain to be visible to its processor.
    unflushed: Vec<Chunk>,
    /// Where flushes read to.
    scratch: Arc<Landing>,
    /// Bytes that arrived, there or here.
    pub(super) delivered: u64,
    /// Work requests posted.
    pub(super) requests: u64,
}

/// A completion, and the position of the queue that it came from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heard {
    pub(super) queue: usize,
    pub(super) completion: WorkCompletion,
}

/// A part of a write or of a fetch.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Which one.
    pub(super) write: u64,
    pub(super) direction: Direction,
    /// This side's memory.
    pub(super) source: SourceRange,
    /// Offset in the peer's arena.
    pub(super) offset: u64,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From this side to the peer.
    Push,
    /// From the peer to this side.
    Pull,
}

/// What a request was for.
#[derive(Debug)]
pub(super) enum Tag {
    /// These chunks, which lie one behind the other in the peer's arena.
    Chunks(Vec<(Chunk, Ticket)>),
    /// Sees to it that the chunks before it are visible.
    Flush,
    /// To see how fast the path is.
    Probe,
    /// To see whether a path that was made anew works.
    Trial,
}

impl Path {
    /// A way over `pair`; without one it has ended on both sides, and may be made anew.
    pub(super) fn new(
        nic: Arc<Nic>,
        queue: usize,
        pair: Option<QueuePair<Tag>>,
        their: &PathEnd,
        tuning: Tuning,
    ) -> Result<Self, VerbsError> {
        let scratch = Arc::new(Landing::new(&nic.domain, FLUSH_BYTES)?);
        let most = u64::from(tuning.depth) * LONGEST as u64;
        let window = Window::new(Bounds { least: LEAST_WINDOW.min(most), most });
        let (is_fenced, mut renewal) = (pair.is_none(), Renewal::default());
        if is_fenced {
            renewal.ended(Duration::ZERO);
        }
        Ok(Self {
            nic,
            queue,
            pair,
            is_fenced,
            renewal,
            remote: Remote::of(their),
            window,
            batch: Vec::new(),
            unflushed: Vec::new(),
            scratch,
            delivered: 0,
            requests: 0,
        })
    }

    /// Whether bytes can be sent over it.
    pub(super) fn is_up(&self) -> bool {
        self.pair.is_some() && !self.renewal.is_on_trial()
    }

    /// Whether this side has ended it.
    pub(super) fn is_closed(&self) -> bool {
        self.pair.is_none()
    }

    /// Takes a new pair, which is connected, for the one that is gone.
    pub(super) fn reopen(&mut self, pair: QueuePair<Tag>, their: &PathEnd) {
        assert!(self.pair.is_none(), "a path has one pair at a time");
        self.pair = Some(pair);
        self.remote = Remote::of(their);
    }

    /// Number of its queue pair, while it is up.
    pub(super) fn number(&self) -> Option<u32> {
        self.pair.as_ref().map(QueuePair::number)
    }

    /// Which of the completion queues is its.
    pub(super) fn queue(&self) -> usize {
        self.queue
    }

    pub(super) fn nic(&self) -> &Nic {
        &self.nic
    }

    /// Bytes per second of late, once something has arrived.
    pub(super) fn rate(&self) -> Option<f64> {
        self.window.rate()
    }

    /// Whether a completion is its. Numbers of queue pairs only differ within one device.
    pub(super) fn owns(&self, heard: &Heard) -> bool {
        let number = heard.completion.queue_pair;
        self.queue == heard.queue && self.pair.as_ref().is_some_and(|pair| pair.number() == number)
    }

    /// What the choice among paths has to know, for a chunk of `len` bytes.
    pub(super) fn load(&self, len: u64) -> PathLoad {
        let has_place = self.pair.as_ref().is_some_and(|pair| self.batch.len() + FLUSHES < pair.room());
        PathLoad {
            has_room: has_place && self.is_up() && self.window.admits(len),
            in_flight: self.window.in_flight(),
            rate: self.window.rate(),
        }
    }

    /// Whether `chunk` can travel in the request that was added last.
    pub(super) fn continues(&self, chunk: &Chunk) -> bool {
        let Some(pair) = &self.pair else { return false };
        let Some(Work { operation: Operation::Write(pieces), remote, .. }) = self.batch.last() else {
            return false;
        };
        let len: usize = pieces.iter().map(Piece::len).sum();
        chunk.direction == Direction::Push
            && remote.address + len as u64 == self.remote.address + chunk.offset
            && pieces.len() < pair.gather_limit()
            && len + chunk.source.len() <= LONGEST
            && self.window.admits(chunk.source.len() as u64)
    }

    /// Adds a chunk to what is posted next.
    pub(super) fn add(&mut self, chunk: Chunk, now: Duration) -> Result<(), (Chunk, VerbsError)> {
        let joins = self.continues(&chunk);
        let piece = match Piece::new(&self.nic, chunk.source.clone()) {
            Ok(piece) => piece,
            Err(error) => return Err((chunk, error)),
        };
        let ticket = self.window.post(chunk.source.len() as u64, now);
        match self.batch.last_mut() {
            Some(Work { operation: Operation::Write(pieces), tag: Tag::Chunks(chunks), .. }) if joins => {
                pieces.push(piece);
                chunks.push((chunk, ticket));
            }
            _ => {
                let remote = Remote { address: self.remote.address + chunk.offset, ..self.remote };
                let operation = match chunk.direction {
                    Direction::Push => Operation::Write(vec![piece]),
                    Direction::Pull => Operation::Fetch(piece),
                };
                let tag = Tag::Chunks(vec![(chunk, ticket)]);
                self.batch.push(Work { operation, remote, tag });
            }
        }
        Ok(())
    }

    /// Posts what was added, and a flush behind it: the acknowledgement of a write says that the peer's device has
    /// it, while a read that follows it is answered from memory.
    pub(super) fn post(&mut self) -> Result<(), String> {
        let mut batch = std::mem::take(&mut self.batch);
        let Some(pair) = self.pair.as_mut().filter(|_| !batch.is_empty()) else { return Ok(()) };
        // What was fetched is here when it completes.
        if batch.iter().any(|work| matches!(work.operation, Operation::Write(_))) {
            let operation = Operation::Flush(Arc::clone(&self.scratch));
            batch.push(Work { operation, remote: self.remote, tag: Tag::Flush });
        }
        self.requests += batch.len() as u64;
        match pair.post(batch) {
            Outcome::Posted => Ok(()),
            Outcome::Broken(error) => Err(error.to_line()),
        }
    }

    /// Reads `len` bytes from the beginning of the peer's arena, to see how long it takes.
    pub(super) fn probe(&mut self, len: usize) -> Result<(), String> {
        self.read(len, Tag::Probe)
    }

    /// The same, to see whether it works at all.
    pub(super) fn try_out(&mut self, len: usize) -> Result<(), String> {
        self.read(len, Tag::Trial)
    }

    fn read(&mut self, len: usize, tag: Tag) -> Result<(), String> {
        let Some(pair) = &mut self.pair else { return Ok(()) };
        let landing = Landing::new(&self.nic.domain, len).map_err(|error| error.to_line())?;
        let work = Work { operation: Operation::Read(landing), remote: self.remote, tag };
        match pair.post(vec![work]) {
            Outcome::Posted => Ok(()),
            Outcome::Broken(error) => Err(error.to_line()),
        }
    }

    /// Hears a completion of its queue pair. Adds chunks that the peer can see to `landed`, and to `read` the lengths
    /// of probes that ended. `Err` says why the path is dead.
    pub(super) fn complete(
        &mut self,
        completion: &WorkCompletion,
        landed: &mut Vec<Chunk>,
        read: &mut Vec<usize>,
        now: Duration,
    ) -> Result<(), String> {
        let Some(pair) = &mut self.pair else { return Ok(()) };
        let mut ended = Vec::new();
        let outcome = pair.complete(completion, &mut ended);
        for Ended { tag, landing } in ended {
            match tag {
                Tag::Chunks(chunks) => {
                    for (chunk, ticket) in chunks {
                        self.window.complete(ticket, now);
                        match chunk.direction {
                            Direction::Push => self.unflushed.push(chunk),
                            Direction::Pull => {
                                self.delivered += chunk.source.len() as u64;
                                landed.push(chunk);
                            }
                        }
                    }
                }
                Tag::Flush => {
                    self.delivered +=
                        self.unflushed.iter().map(|chunk| chunk.source.len() as u64).sum::<u64>();
                    landed.append(&mut self.unflushed);
                }
                Tag::Probe => read.push(landing.map_or(0, |landing| landing.bytes().len())),
                Tag::Trial => self.renewal.proven(now),
            }
        }
        outcome
    }

    /// Ends the path, if it has not ended, and gives back what did not arrive for certain. When this returns, nothing
    /// that the peer sent here can land any more. Whether it was up.
    pub(super) fn close(&mut self, chunks: &mut Vec<Chunk>, overheard: &mut Vec<Heard>) -> bool {
        let Some(pair) = self.pair.take() else { return false };
        chunks.append(&mut self.unflushed);
        let unposted = std::mem::take(&mut self.batch).into_iter().map(|work| work.tag);
        let mut flushed = Vec::new();
        let unfinished = pair.close(&mut flushed);
        overheard.extend(flushed.into_iter().map(|completion| Heard { queue: self.queue, completion }));
        for tag in unfinished.into_iter().chain(unposted) {
            let Tag::Chunks(tickets) = tag else { continue };
            for (chunk, ticket) in tickets {
                self.window.forget(ticket);
                chunks.push(chunk);
            }
        }
        true
    }
}

/// What a flush reads: anything at all.
const FLUSH_BYTES: usize = 8;
/// Places in the queue that are kept for them.
const FLUSHES: usize = 2;
/// Two pieces: one arrives while the next is under way.
const LEAST_WINDOW: u64 = 2 * LONGEST as u64;
