//! Writes into the mapped arena of a peer on the same host: copies, made by the thread that polls.

use std::collections::VecDeque;
use std::sync::Arc;

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, Transport, WriteFault, WriteId};

use super::region::{Region, RegionWriter};
use super::streaming::Next;
use crate::peer_copies::PeerCopies;
use crate::source::SourceRange;

/// The sending end. The receiver does not look at writes: the protocol alone keeps them out of blocks that were
/// given to somebody else, which is why a reservation is released only when this side is proven quiet.
#[derive(Debug)]
pub(crate) struct SharedMemoryTransport {
    target: Arc<Region>,
    queue: VecDeque<Copy>,
    /// Bytes of the queue, those included that were copied of the write in front.
    queued: usize,
    severed: Vec<Completion>,
    /// Writes to the memory of the peer's device, where this side's device reaches it.
    copies: Option<PeerCopies>,
    /// Why there is none.
    no_copies: Option<String>,
}

#[derive(Debug)]
struct Copy {
    id: WriteId,
    source: SourceRange,
    target: RemoteRange,
    done: usize,
}

impl SharedMemoryTransport {
    /// Writes go to `target`, the peer's arena.
    pub(crate) fn new(target: Arc<Region>) -> Self {
        Self { target, queue: VecDeque::new(), queued: 0, severed: Vec::new(), copies: None, no_copies: None }
    }

    /// With a way from device to device, which is taken for what lies in this side's device; or the reason for which there is none.
    pub(crate) fn with_copies(self, copies: Result<PeerCopies, String>) -> Self {
        let no_copies = copies.as_ref().err().cloned();
        Self { copies: copies.ok(), no_copies, ..self }
    }

    /// Why there is no way from device to device.
    pub(crate) fn why_no_copies(&self) -> Option<&str> {
        self.no_copies.as_deref()
    }

    /// Whether there is a way from device to device.
    pub(crate) fn reaches_device(&self) -> bool {
        self.copies.is_some()
    }

    /// What the device said when it failed, once.
    pub(crate) fn take_news_of_failure(&mut self) -> Option<String> {
        self.copies.as_mut().and_then(PeerCopies::take_news_of_failure)
    }

    /// Copies that the device makes, if any are under way: they go on without the link.
    pub(crate) fn take_copies(&mut self) -> Option<PeerCopies> {
        self.copies.take_if(|copies| copies.has_work())
    }

    /// Whether the device makes copies.
    pub(crate) fn has_copies(&self) -> bool {
        self.copies.as_ref().is_some_and(PeerCopies::has_work)
    }

    /// The peer's arena.
    pub(crate) fn arena(&self) -> &Arc<Region> {
        &self.target
    }

    /// Stops writing: every queued write completes as severed.
    pub(crate) fn sever(&mut self) {
        let queue = std::mem::take(&mut self.queue);
        self.queued = 0;
        let outcome = Err(WriteFault::Severed);
        self.severed.extend(queue.into_iter().map(|copy| Completion { id: copy.id, outcome }));
        if let Some(copies) = &mut self.copies {
            copies.sever(&mut self.severed);
        }
    }

    /// Whether polling would move bytes.
    pub(crate) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Copies at most `budget` bytes of the write in front. `None` while it is not done, or where there is none.
    fn advance(&mut self, writer: &RegionWriter<'_>, budget: &mut usize) -> Option<Completion> {
        let next = self.queue.get(1).or(self.queue.front())?;
        // What the peer named is checked when it is its turn: this is only a hint.
        let offset = usize::try_from(next.target.offset).unwrap_or(0);
        let to = self.target.as_ptr().wrapping_add(offset).cast_const();
        let next = Next { source: next.source.as_ptr(), target: to };
        let Copy { id, source, target, done } = self.queue.front_mut()?;
        let inside =
            usize::try_from(target.offset).ok().filter(|&offset| self.target.contains(offset, source.len()));
        let outcome = match inside {
            None => Err(WriteFault::Outside),
            Some(offset) => {
                let len = (source.len() - *done).min(*budget);
                source.copy_to(*done, writer, offset + *done, len, next);
                *done += len;
                *budget -= len;
                if *done < source.len() {
                    return None;
                }
                Ok(())
            }
        };
        let completion = Completion { id: *id, outcome };
        self.queued -= source.len();
        self.queue.pop_front();
        Some(completion)
    }
}

impl Transport for SharedMemoryTransport {
    type Source = SourceRange;

    fn post_write(&mut self, id: WriteId, source: SourceRange, target: RemoteRange) -> Post {
        assert_eq!(source.len(), target.len as usize, "the whole of the source is written");
        if source.is_on_device() {
            let copies =
                self.copies.as_mut().expect("a handoff goes by device where that reaches the peer's");
            return copies.post(id, source, target);
        }
        if BYTES_PER_POLL <= self.queued {
            return Post::QueueFull;
        }
        self.queued += source.len();
        self.queue.push_back(Copy { id, source, target, done: 0 });
        Post::Accepted
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.severed);
        if let Some(copies) = &mut self.copies {
            copies.poll(done);
        }
        let target = Arc::clone(&self.target);
        // Gone before anybody hears of what has completed.
        let writer = target.writer();
        let mut budget = BYTES_PER_POLL;
        while 0 < budget
            && let Some(completion) = self.advance(&writer, &mut budget)
        {
            done.push(completion);
        }
    }
}

/// Half a millisecond of copying: what another peer may have to wait. As much is queued and no more: what waits where
/// writes are made can still become longer.
const BYTES_PER_POLL: usize = 4 << 20;
