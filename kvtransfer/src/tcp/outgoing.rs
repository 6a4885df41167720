//! The sending half of a data connection: headers and answers are staged, payloads go to the kernel from where they
//! lie.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::ops::Range;

use tidemill_kvtransfer_proto::endpoint_core::WriteSource;
use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, WriteFault, WriteId};

use super::Loss;
use super::frame::{Frame, HEADER};
use crate::source::SourceRange;

/// Writes and answers on their way out.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Accepted and not answered, oldest first: the order of the answers.
    unanswered: VecDeque<(WriteId, SourceRange, RemoteRange)>,
    /// How many writes were answered before those.
    answered: u64,
    /// How many of `unanswered` have been planned.
    planned: usize,
    unanswered_bytes: usize,
    completions: Vec<Completion>,
    /// Headers that go between two writes.
    answers: VecDeque<Frame>,
    /// Bytes of a probe that are still to be planned.
    probe_bytes: u32,
    /// What goes out next, in order.
    pieces: VecDeque<Piece>,
    /// What the staged pieces are ranges of.
    staged: Vec<u8>,
    was_probed: bool,
}

#[derive(Debug)]
enum Piece {
    Staged(Range<usize>),
    /// The payload of a write, counted from the first write of the connection, from `done` on.
    Payload {
        write: u64,
        done: usize,
    },
}

impl Outgoing {
    pub(super) fn post(&mut self, id: WriteId, source: SourceRange, target: RemoteRange) -> Post {
        let is_full = QUEUE_BYTES < self.unanswered_bytes + source.len() || QUEUE <= self.unanswered.len();
        if is_full && !self.unanswered.is_empty() {
            return Post::QueueFull;
        }
        self.unanswered_bytes += source.len();
        self.unanswered.push_back((id, source, target));
        Post::Accepted
    }

    /// A write that never had a chance.
    pub(super) fn fail(&mut self, id: WriteId) {
        self.completions.push(Completion { id, outcome: Err(WriteFault::Severed) });
    }

    pub(super) fn has_bytes(&self) -> bool {
        !self.pieces.is_empty()
            || !self.answers.is_empty()
            || self.planned < self.unanswered.len()
            || 0 < self.probe_bytes
    }

    pub(super) fn take_completions(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.completions);
    }

    pub(super) fn take_probed(&mut self) -> bool {
        std::mem::take(&mut self.was_probed)
    }

    pub(super) fn probed(&mut self) {
        self.was_probed = true;
    }

    pub(super) fn say(&mut self, frame: Frame) {
        self.answers.push_back(frame);
    }

    pub(super) fn waiting_answers(&self) -> usize {
        self.answers.len()
    }

    /// Says what became of the peer's next write.
    pub(super) fn answer(&mut self, outcome: Result<(), WriteFault>) {
        match (outcome, self.answers.back_mut()) {
            (Ok(()), Some(Frame::Landed(count))) => *count += 1,
            (Ok(()), _) => self.answers.push_back(Frame::Landed(1)),
            (Err(fault), _) => self.answers.push_back(Frame::TurnedDown(fault)),
        }
    }

    /// The peer answered the oldest write. It cannot answer one that was not sent whole.
    pub(super) fn answered(&mut self, outcome: Result<(), WriteFault>) -> Result<(), Loss> {
        let under_way = self.pieces.iter().find_map(|piece| match piece {
            Piece::Payload { write, .. } => Some(*write),
            Piece::Staged(_) => None,
        });
        let sent_whole = under_way.unwrap_or(self.answered + self.planned as u64) - self.answered;
        if sent_whole == 0 {
            return Err(Loss::Protocol("it answered a write that was not made"));
        }
        let (id, source, _) = self.unanswered.pop_front().expect("one was sent");
        self.answered += 1;
        self.planned -= 1;
        self.unanswered_bytes -= source.len();
        self.completions.push(Completion { id, outcome });
        Ok(())
    }

    pub(super) fn sever(&mut self) {
        let severed = std::mem::take(&mut self.unanswered).into_iter();
        self.completions.extend(severed.map(|(id, ..)| Completion { id, outcome: Err(WriteFault::Severed) }));
        self.pieces.clear();
        self.planned = 0;
        self.unanswered_bytes = 0;
    }

    /// Sends what the socket takes, up to a bound.
    pub(super) fn flush(&mut self, stream: &mut TcpStream) -> Result<(), Loss> {
        let mut budget = BYTES_PER_TURN;
        while 0 < budget {
            self.plan();
            if self.pieces.is_empty() {
                return Ok(());
            }
            let slices: Vec<IoSlice<'_>> =
                self.pieces.iter().map(|piece| IoSlice::new(self.bytes(piece))).collect();
            match stream.write_vectored(&slices) {
                Ok(0) => return Err(Loss::Closed),
                Ok(sent) => {
                    self.sent(sent);
                    budget = budget.saturating_sub(sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn bytes(&self, piece: &Piece) -> &[u8] {
        match piece {
            Piece::Staged(range) => &self.staged[range.clone()],
            Piece::Payload { write, done } => self.source(*write).to_send(*done),
        }
    }

    fn source(&self, write: u64) -> &SourceRange {
        let index = usize::try_from(write - self.answered).expect("what is not sent is not answered");
        &self.unanswered[index].1
    }

    /// Plans what goes out in the next call to the kernel, once all of the last plan is out.
    fn plan(&mut self) {
        if !self.pieces.is_empty() {
            return;
        }
        self.staged.clear();
        let mut bytes = 0;
        while self.pieces.len() < PIECES && bytes < BYTES_PER_CALL {
            let start = self.staged.len();
            if 0 < self.probe_bytes {
                let len = (self.probe_bytes as usize).min(BYTES_PER_CALL - bytes);
                self.staged.resize(start + len, 0);
                self.probe_bytes -= u32::try_from(len).expect("not more than the probe has");
            } else if let Some(answer) = self.answers.pop_front() {
                self.staged.extend_from_slice(&answer.encode());
                if let Frame::Probe(len) = answer {
                    self.probe_bytes = len;
                }
            } else if let Some((_, source, range)) = self.unanswered.get(self.planned) {
                self.staged.extend_from_slice(&Frame::Write(*range).encode());
                bytes += source.len();
                self.stage(start);
                self.pieces.push_back(Piece::Payload { write: self.answered + self.planned as u64, done: 0 });
                self.planned += 1;
                continue;
            } else {
                return;
            }
            bytes += self.staged.len() - start;
            self.stage(start);
        }
    }

    /// What was staged from `start` on goes out next.
    fn stage(&mut self, start: usize) {
        let end = self.staged.len();
        match self.pieces.back_mut() {
            Some(Piece::Staged(range)) if range.end == start => range.end = end,
            _ => self.pieces.push_back(Piece::Staged(start..end)),
        }
    }

    fn sent(&mut self, mut sent: usize) {
        while 0 < sent {
            let front = self.pieces.front().expect("no more is sent than was planned");
            let left = self.bytes(front).len();
            let now = sent.min(left);
            sent -= now;
            if now == left {
                self.pieces.pop_front();
                continue;
            }
            match self.pieces.front_mut() {
                Some(Piece::Staged(range)) => range.start += now,
                Some(Piece::Payload { done, .. }) => *done += now,
                None => {}
            }
        }
    }
}

/// Bytes given to the socket before it is another peer's turn.
const BYTES_PER_TURN: usize = 2 << 20;
/// Bytes planned for one call to the kernel.
const BYTES_PER_CALL: usize = 256 << 10;
/// Pieces of one call: the system takes 1024.
const PIECES: usize = 64;
/// Bytes that may be unanswered: two or three times what a fast line carries in its round trip.
const QUEUE_BYTES: usize = 16 << 20;
/// Writes that may be unanswered.
const QUEUE: usize = 4096;
/// Answers that may wait for the peer to read them.
pub(super) const MAX_ANSWERS: usize = 2 * QUEUE;

// A header is all that is staged for a write.
const _: () = assert!(HEADER * PIECES < BYTES_PER_CALL);
