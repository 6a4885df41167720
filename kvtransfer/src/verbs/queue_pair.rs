//! A connection that owns the memory of what was posted on it.
//!
//! A device reads memory when it likes between the posting of a request and its completion, and knows nothing of
//! lifetimes. So a posted request keeps what it reads from or writes to; it comes back when the request has
//! completed, or when the queue pair is gone.

use std::collections::VecDeque;
use std::sync::Arc;

use super::checked::{
    self, Capacity, CompletionQueue, Connect, Gather, Request, RequestKind, WorkCompletion,
};
use super::device::Nic;
use super::error::VerbsError;
use super::memory_region::{Landing, MemoryRegion};
use crate::source::SourceRange;
use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::path::PathEnd;

/// A reliable connection. `T` is what the caller wants to know of each request when it ends.
pub(super) struct QueuePair<T> {
    /// Goes first when dropped: after that nothing reads or writes the memory below.
    pair: checked::QueuePair,
    posted: VecDeque<Posted<T>>,
    next_id: u64,
    /// Whether a request has failed: none behind it ends well, nor does itself.
    has_failed: bool,
    /// Requests since the last one whose success is announced.
    unsignalled: u32,
    signal_every: u32,
}

/// A request to be posted.
pub(super) struct Work<T> {
    pub(super) operation: Operation,
    pub(super) remote: Remote,
    /// Given back when it ends.
    pub(super) tag: T,
}

/// What a request does, with the memory on this side.
pub(super) enum Operation {
    /// Writes these pieces one behind the other.
    Write(Vec<Piece>),
    /// Fetches the peer's bytes into this piece of an arena.
    Fetch(Piece),
    /// Reads as much as `Landing` holds.
    Read(Landing),
    /// Reads into memory that nobody looks at, only to have it done that the writes before it arrived.
    Flush(Arc<Landing>),
}

/// Memory of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    pub(super) address: u64,
    pub(super) key: u32,
}

/// A range of this side's memory and the registration that it lies in.
pub(super) struct Piece {
    source: SourceRange,
    memory: Arc<MemoryRegion>,
}

/// A request that has ended well.
pub(super) struct Ended<T> {
    pub(super) tag: T,
    /// What a read brought.
    pub(super) landing: Option<Landing>,
}

struct Posted<T> {
    id: u64,
    tag: T,
    operation: Operation,
}

/// What one posting amounts to.
#[derive(Debug)]
pub(super) enum Outcome {
    /// All of it is under way.
    Posted,
    /// The queue pair takes nothing more. What was to be posted ends like everything else on it.
    Broken(VerbsError),
}

impl Remote {
    /// The arena behind an end of the peer.
    pub(super) fn of(their: &PathEnd) -> Self {
        Self { address: their.arena_address, key: their.arena_key }
    }
}

impl Piece {
    /// The bytes of `source`, which lie in memory registered with `nic`.
    pub(super) fn new(nic: &Nic, source: SourceRange) -> Result<Self, VerbsError> {
        let memory = nic.registered(source.holder())?;
        Ok(Self { source, memory })
    }

    pub(super) fn len(&self) -> usize {
        self.source.len()
    }

    fn gather(&self) -> Gather {
        let len = u32::try_from(self.source.len()).expect("a piece is short");
        Gather { address: self.source.as_ptr().addr() as u64, len, key: self.memory.local_key() }
    }
}

impl<T> QueuePair<T> {
    /// Makes one on `nic`'s port; it is not connected.
    pub(super) fn new(
        nic: &Nic,
        completions: &Arc<CompletionQueue>,
        capacity: Capacity,
        signal_every: u32,
    ) -> Result<Self, VerbsError> {
        let pair = checked::QueuePair::new(&nic.domain, completions, nic.port(), capacity)?;
        Ok(Self {
            pair,
            posted: VecDeque::new(),
            next_id: 0,
            has_failed: false,
            unsignalled: 0,
            signal_every,
        })
    }

    pub(super) fn number(&self) -> u32 {
        self.pair.number()
    }

    pub(super) fn completions(&self) -> &Arc<CompletionQueue> {
        self.pair.completions()
    }

    /// From now on the peer's requests are taken, and own ones can be posted.
    pub(super) fn connect(&mut self, to: &Connect) -> Result<(), VerbsError> {
        self.pair.connect(to)
    }

    /// How many more requests it takes.
    pub(super) fn room(&self) -> usize {
        (self.pair.capacity().depth as usize).saturating_sub(self.posted.len())
    }

    /// How many pieces one request may have.
    pub(super) fn gather_limit(&self) -> usize {
        self.pair.capacity().gather as usize
    }

    /// Posts requests with one call. The last of them, and every so many before it, makes a completion; one
    /// completion stands for all requests up to its own.
    pub(super) fn post(&mut self, works: Vec<Work<T>>) -> Outcome {
        let mut requests = Vec::with_capacity(works.len());
        let mut gather = Vec::with_capacity(works.len());
        let count = works.len();
        for (index, work) in works.into_iter().enumerate() {
            let before = gather.len();
            let kind = match &work.operation {
                Operation::Write(pieces) => {
                    gather.extend(pieces.iter().map(Piece::gather));
                    let len: usize = pieces.iter().map(Piece::len).sum();
                    let is_short = len <= self.pair.capacity().inline as usize;
                    if is_short { RequestKind::WriteInline } else { RequestKind::Write }
                }
                Operation::Fetch(piece) => {
                    gather.push(piece.gather());
                    RequestKind::Read
                }
                Operation::Read(landing) => {
                    gather.push(landing.gather());
                    RequestKind::Read
                }
                Operation::Flush(landing) => {
                    gather.push(landing.gather());
                    RequestKind::Read
                }
            };
            self.unsignalled += 1;
            let is_signalled = index + 1 == count || self.signal_every <= self.unsignalled;
            if is_signalled {
                self.unsignalled = 0;
            }
            requests.push(Request {
                id: self.next_id,
                kind,
                pieces: u32::try_from(gather.len() - before).expect("few pieces"),
                remote_address: work.remote.address,
                remote_key: work.remote.key,
                is_signalled,
            });
            self.posted.push_back(Posted { id: self.next_id, tag: work.tag, operation: work.operation });
            self.next_id += 1;
        }
        // SAFETY: each piece is part of memory that its registration covers, both of which `posted` keeps until the
        // request has completed or the queue pair is gone; what a read writes to belongs to it alone, or is part of an
        // arena, whose bytes may change at any time and are never lent out as a slice.
        match unsafe { self.pair.post(&requests, &gather) } {
            Ok(()) => Outcome::Posted,
            // The rest was not posted and would never complete; neither may anything overtake it.
            Err((_, error)) => Outcome::Broken(error),
        }
    }

    /// Hears a completion of this queue pair: requests up to it have ended, since they end in order. `Err` says why
    /// one failed, and with it all that are left.
    pub(super) fn complete(
        &mut self,
        completion: &WorkCompletion,
        ended: &mut Vec<Ended<T>>,
    ) -> Result<(), String> {
        // What comes after a failure tells of flushed requests, each with its number: those before it have not ended well.
        if self.has_failed {
            return Err(completion.reason());
        }
        self.has_failed = !completion.is_ok();
        let last = if completion.is_ok() { completion.id + 1 } else { completion.id };
        while self.posted.front().is_some_and(|posted| posted.id < last) {
            let Posted { tag, operation, .. } = self.posted.pop_front().expect("there is a front");
            let landing = match operation {
                Operation::Read(landing) => Some(landing),
                Operation::Write(_) | Operation::Fetch(_) | Operation::Flush(_) => None,
            };
            ended.push(Ended { tag, landing });
        }
        if completion.is_ok() { Ok(()) } else { Err(completion.reason()) }
    }

    /// Ends the connection and gives back what had not completed. When this returns, the device has let go of the
    /// memory of all requests, and nothing that the peer sent on this connection can land any more.
    pub(super) fn close(mut self, flushed: &mut Vec<WorkCompletion>) -> Vec<T> {
        if let Err(error) = self.pair.fail() {
            // Already in that state, or the device is gone; `drop` is the proof in any case.
            tracing::debug!(error = error.to_line(), "a queue pair did not stop");
        }
        self.wait_for_flush(flushed);
        let Self { pair, posted, .. } = self;
        drop(pair);
        posted.into_iter().map(|posted| posted.tag).collect()
    }

    /// Gives the device a moment to say that it is through with everything. Completions of other queue pairs that
    /// come meanwhile are left in `flushed` too.
    fn wait_for_flush(&mut self, flushed: &mut Vec<WorkCompletion>) {
        let Some(last) = self.posted.back().map(|posted| posted.id) else { return };
        let number = self.number();
        for _ in 0..FLUSH_POLLS {
            let from = flushed.len();
            if self.completions().poll(flushed).is_err() {
                return;
            }
            if flushed[from..].iter().any(|it| it.queue_pair == number && it.id == last) {
                return;
            }
            std::thread::yield_now();
        }
        tracing::debug!(queue_pair = number, "a queue pair was not flushed in time");
    }
}

impl<T> std::fmt::Debug for QueuePair<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QueuePair({}, {} posted)", self.number(), self.posted.len())
    }
}

/// A flush takes microseconds; a device that does not answer must not hold up the thread.
const FLUSH_POLLS: usize = 1000;
