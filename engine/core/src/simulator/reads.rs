//! Reads of a device from a peer's memory: a request travels there, what it finds travels back.
//!
//! The memory that is read serves whoever asks, whatever its worker is doing and whether or not the connection is up
//! there, until its access has ended or its process is gone. What comes back lands until the reader's queue is flushed.

use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, WriteFault, WriteId};
use tidemill_kvtransfer_proto::units::{BlockId, HandoffId};

use super::wire::{ConnId, QUEUES};
use super::world::{Event, Process, World};
use super::{Fault, Mischief};

/// A read under way.
#[derive(Debug)]
pub(super) struct Read {
    source: RemoteRange,
    target: u64,
    /// What was found, once it was looked for.
    found: Option<Vec<u8>>,
    is_lost: bool,
    is_repeated: bool,
    /// When the queue is flushed on which it was posted.
    flushed_at: Option<u64>,
}

impl Read {
    pub(super) fn handoff(&self) -> HandoffId {
        self.source.handoff
    }

    pub(super) fn bytes(&self) -> u64 {
        self.source.len.into()
    }
}

impl World<'_> {
    /// Posts the reads that the core has for a peer.
    pub(super) fn fetch(&mut self, process: Process, peer: u64) {
        let Some((id, side, _)) = self.link_of(process, peer) else { return };
        if self.now < self.workers[process.place].leaves_offers_until {
            if self.life(process).expect("it has a link").core.has_reads_from(peer) {
                self.count(Fault::Hoard);
            }
            return;
        }
        let end = &self.conns[&id].ends[side];
        let mut room = self.queue_depth.saturating_sub(end.flights.len() + end.reads.len());
        let (mut posted, mut was_full) = (Vec::new(), false);
        let now = self.local_moment(process.place);
        let take = |write, source, target| {
            if room == 0 {
                was_full = true;
                return Post::QueueFull;
            }
            room -= 1;
            posted.push((write, source, target));
            Post::Accepted
        };
        self.life(process).expect("it has a link").core.fetch(peer, take, now);
        if was_full && self.options.faults.contains(Fault::FullQueue) {
            self.count(Fault::FullQueue);
        }
        for (write, source, target) in posted {
            self.ask(id, side, write, source, target);
        }
    }

    fn ask(&mut self, id: ConnId, side: usize, write: WriteId, source: RemoteRange, target: u64) {
        self.summary.reads += 1;
        let latency = self.latency() + self.micros(1, 800);
        let (is_lost, is_repeated) = (self.strikes(Fault::Loss, 3), self.strikes(Fault::Duplication, 30));
        let queue = self.chance.below(QUEUES);
        let now = self.now;
        let end = &mut self.conns.get_mut(&id).expect("it is up").ends[side];
        let process = end.process;
        end.queues[queue] = end.queues[queue].max(now + latency) + 1;
        let at = end.queues[queue];
        let read = Read { source, target, found: None, is_lost, is_repeated, flushed_at: None };
        end.reads.insert(write, read);
        self.note(|| format!("worker {} reads {} B for {}", process.place, source.len, source.handoff));
        self.at(at, Event::Looks { conn: id, reader: side, id: write });
        if self.plants(Mischief::ReadEarly) || self.plants(Mischief::SkipDigest) {
            self.completed(process, Completion { id: write, outcome: Ok(()) });
        }
    }

    /// A read has come to where its bytes are.
    pub(super) fn looks(&mut self, id: ConnId, reader: usize, write: WriteId) {
        let Some((here, there)) = self.nodes(id, reader) else { return };
        if let Some(until) = self.cut(here, there) {
            return self.at(until + 1, Event::Looks { conn: id, reader, id: write });
        }
        let conn = &self.conns[&id];
        let Some(read) = conn.ends[reader].reads.get(&write) else { return };
        let (source, is_lost, is_repeated) = (read.source, read.is_lost, read.is_repeated);
        let owner = &conn.ends[1 - reader];
        let (process, memory, access_ended) = (owner.process, owner.memory.clone(), owner.access_ended);
        if is_lost || access_ended || self.life(process).is_none() {
            return self.read_fails(id, reader, write);
        }
        let offset = usize::try_from(source.offset).expect("inside the arena");
        let mut found = vec![0; source.len as usize];
        memory.copy_out(offset, &mut found);
        if let Some(holder) = memory.staged_for(offset, found.len()) {
            assert_eq!(
                holder,
                Some(source.handoff),
                "a read for handoff {} finds a copy of worker {} that is not held for it",
                source.handoff,
                process.place
            );
        } else {
            let block_bytes = memory.shape().block_bytes();
            for block in offset / block_bytes..=(offset + found.len() - 1) / block_bytes {
                self.check_held(process, BlockId(u32::try_from(block).expect("small")), source.handoff);
            }
        }
        let (latency, later) = (self.latency(), self.micros(20, 500));
        let end = &mut self.conns.get_mut(&id).expect("just seen").ends[reader];
        let read = end.reads.get_mut(&write).expect("just seen");
        read.found = Some(found);
        if is_repeated {
            // The first answer seemed lost: both arrive, and only then it is over.
            read.is_repeated = false;
            self.bring(id, reader, write);
            return self.after(later, Event::Looks { conn: id, reader, id: write });
        }
        self.after(latency, Event::Brings { conn: id, reader, id: write });
    }

    /// What a read has found has come back.
    pub(super) fn brings(&mut self, id: ConnId, reader: usize, write: WriteId) {
        let Some((here, there)) = self.nodes(id, reader) else { return };
        if let Some(until) = self.cut(here, there) {
            return self.at(until + 1, Event::Brings { conn: id, reader, id: write });
        }
        self.bring(id, reader, write);
        let end = &mut self.conns.get_mut(&id).expect("just seen").ends[reader];
        let (process, is_open) = (end.process, end.is_open);
        if end.reads.remove(&write).is_some() && is_open {
            self.note(|| format!("worker {}: a read has ended", process.place));
            self.completed(process, Completion { id: write, outcome: Ok(()) });
        }
    }

    /// Bytes that were found reach the reader's memory.
    fn bring(&mut self, id: ConnId, reader: usize, write: WriteId) {
        let end = &self.conns[&id].ends[reader];
        let Some(read) = end.reads.get(&write) else { return };
        let Some(found) = &read.found else { return };
        if read.flushed_at.is_some_and(|at| at <= self.now) {
            return;
        }
        let (process, handoff) = (end.process, read.source.handoff);
        let (start, block_bytes) =
            (usize::try_from(read.target).expect("inside the arena"), end.memory.shape().block_bytes());
        end.memory.copy_in(start, found);
        for block in start / block_bytes..=(start + found.len() - 1) / block_bytes {
            self.check_lent(process, BlockId(u32::try_from(block).expect("small")), handoff);
        }
    }

    fn read_fails(&mut self, id: ConnId, reader: usize, write: WriteId) {
        let delay = self.micros(50_000, 200_000);
        let end = &mut self.conns.get_mut(&id).expect("the caller has just seen it").ends[reader];
        let process = end.process;
        if end.reads.remove(&write).is_some() && end.is_open {
            self.note(|| format!("worker {}: a read is lost", process.place));
            let completion = Completion { id: write, outcome: Err(WriteFault::Severed) };
            self.after(delay, Event::Completed { process, completion });
        }
    }

    /// A side is done with a connection: its reads end as its queue is flushed, and land as long as it is not.
    pub(super) fn flush_reads(&mut self, id: ConnId, side: usize) {
        let end = &self.conns[&id].ends[side];
        let (process, ids): (_, Vec<WriteId>) = (end.process, end.reads.keys().copied().collect());
        for write in ids {
            let delay = self.micros(10, 2_000);
            let at = self.now + delay;
            let end = &mut self.conns.get_mut(&id).expect("just seen").ends[side];
            end.reads.get_mut(&write).expect("just listed").flushed_at = Some(at);
            let completion = Completion { id: write, outcome: Err(WriteFault::Severed) };
            self.at(at, Event::Completed { process, completion });
        }
    }

    /// What is read for a handoff is still held for it.
    fn check_held(&mut self, owner: Process, block: BlockId, handoff: HandoffId) {
        let life = self.life(owner).expect("it serves");
        let request = life.outgoing.get(&handoff).map(|it| it.request);
        let table = request.map_or(&[][..], |request| life.scheduler.block_table(request));
        assert!(
            table.iter().any(|it| it.block == block),
            "a read for handoff {handoff} finds {block:?} of worker {}, which is not held for it",
            owner.place
        );
    }
}
