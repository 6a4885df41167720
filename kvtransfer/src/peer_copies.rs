//! Writes from this side's device into memory of a peer's: copies that the device makes, in the order in which they are asked for.

use std::collections::VecDeque;

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, WriteFault, WriteId};

use crate::device::PeerBlocks;
use crate::source::SourceRange;

/// Copies under way to one peer.
#[derive(Debug)]
pub(crate) struct PeerCopies {
    blocks: Box<dyn PeerBlocks>,
    /// What was asked for and has not ended, in order. Sources are kept until then.
    under_way: VecDeque<(WriteId, SourceRange)>,
    bytes: usize,
    /// How many have ended.
    ended: u64,
    /// Writes that end without a copy.
    refused: Vec<Completion>,
    /// What the device said when it failed: nothing is asked of it any more, and nothing is said of what was under way.
    failure: Option<String>,
    is_told: bool,
}

impl PeerCopies {
    pub(crate) fn new(blocks: Box<dyn PeerBlocks>) -> Self {
        let (under_way, refused) = (VecDeque::new(), Vec::new());
        Self { blocks, under_way, bytes: 0, ended: 0, refused, failure: None, is_told: false }
    }

    /// What the device said when it failed, once.
    pub(crate) fn take_news_of_failure(&mut self) -> Option<String> {
        let news = self.failure.clone().filter(|_| !self.is_told);
        self.is_told |= news.is_some();
        news
    }

    /// Whether nothing is left to be heard of it.
    pub(crate) fn is_over(&self) -> bool {
        self.under_way.is_empty()
    }

    pub(crate) fn has_work(&self) -> bool {
        self.failure.is_none() && !self.under_way.is_empty()
    }

    pub(crate) fn post(&mut self, id: WriteId, source: SourceRange, target: RemoteRange) -> Post {
        if MOST_UNDER_WAY <= self.bytes {
            return Post::QueueFull;
        }
        let end = target.offset.checked_add(source.len() as u64);
        if end.is_none_or(|end| self.blocks.bytes() < end) {
            self.refused.push(Completion { id, outcome: Err(WriteFault::Outside) });
            return Post::Accepted;
        }
        if self.failure.is_none() {
            let asked = self.blocks.copy(source.offset(), target.offset, source.len());
            self.note(asked);
        }
        self.bytes += source.len();
        self.under_way.push_back((id, source));
        Post::Accepted
    }

    pub(crate) fn poll(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.refused);
        if self.has_work() {
            let ended = self.blocks.ended();
            if let Some(ended) = self.note(ended) {
                self.end_until(ended, Ok(()), done);
            }
        }
    }

    /// Waits for what is under way, which cannot be called back: it takes as long as [`MOST_UNDER_WAY`] bytes do, and what the device has to
    /// compute before them. A device that fails says nothing of when its copies are over, so of those nobody hears.
    pub(crate) fn sever(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.refused);
        if self.has_work() {
            let settled = self.blocks.settle();
            if self.note(settled).is_some() {
                self.end_until(self.ended + self.under_way.len() as u64, Err(WriteFault::Severed), done);
            }
        }
    }

    fn end_until(&mut self, ended: u64, outcome: Result<(), WriteFault>, done: &mut Vec<Completion>) {
        while self.ended < ended
            && let Some((id, source)) = self.under_way.pop_front()
        {
            self.ended += 1;
            self.bytes -= source.len();
            done.push(Completion { id, outcome });
        }
    }

    fn note<T>(&mut self, outcome: Result<T, String>) -> Option<T> {
        outcome
            .inspect_err(|error| {
                tracing::error!(error, "copies to a peer's device fail");
                self.failure.get_or_insert_with(|| error.clone());
            })
            .ok()
    }
}

impl Drop for PeerCopies {
    fn drop(&mut self) {
        // Nobody uses memory again, or gives it back, to which a copy is under way.
        self.sever(&mut Vec::new());
    }
}

/// Bytes that a device copies in a few milliseconds over the slowest bus.
const MOST_UNDER_WAY: usize = 64 << 20;
