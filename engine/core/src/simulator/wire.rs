//! Connections between workers: an ordered one for messages, and the way for data in each of its three kinds.
//!
//! - *Admission*: the receiver's thread lets each piece of a write in or not, in order.
//! - *Process*: the sender copies into the receiver's memory, whoever looks.
//! - *AccessEnded*: a device writes, over several queues without an order among them. What has left the sender lands
//!   even when the sender is gone, until the receiver has ended its access. Where the receiver lets nobody write, its own
//!   device reads (`reads`).

use std::collections::BTreeMap;

use tidemill_kvtransfer_proto::endpoint_core::{LinkId, QuietProof, WriteSource};
use tidemill_kvtransfer_proto::message::Message;
use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, WriteFault, WriteId};
use tidemill_kvtransfer_proto::units::{BlockId, HandoffId};

use super::captions::short;
use super::model::{Memory, Piece};
use super::process::Life;
use super::reads::Read;
use super::world::{Event, Node, Process, World};
use super::{Fault, Mischief};

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ConnId(pub(super) u64);

/// A connection between two processes; sides are 0, who dialled, and 1.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) ends: [End; 2],
    pub(super) proof: QuietProof,
}

/// One side of a connection.
#[derive(Debug)]
pub(super) struct End {
    pub(super) process: Process,
    pub(super) is_open: bool,
    /// Nothing that this side says arrives any more.
    is_mute: bool,
    /// No write of this side arrives any more, and nobody is told.
    is_data_mute: bool,
    /// No device of the other side can write here any more.
    pub(super) access_ended: bool,
    pub(super) memory: Memory,
    /// Writes of this side that may still land.
    pub(super) flights: BTreeMap<WriteId, Flight>,
    /// Reads of this side that may still land.
    pub(super) reads: BTreeMap<WriteId, Read>,
    last_arrival: u64,
    pub(super) queues: [u64; QUEUES],
    latest_landed: Option<WriteId>,
}

/// A write under way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) source: Piece,
    pub(super) range: RemoteRange,
    /// What has left the sender, once that is gone.
    snapshot: Option<Vec<u8>>,
    done: usize,
    queue: usize,
    is_lost: bool,
    fault: Option<WriteFault>,
}

impl World<'_> {
    pub(super) fn connect(&mut self, from: Process, to: Process) -> ConnId {
        let id = ConnId(self.next_conn);
        self.next_conn += 1;
        let proof = self.proofs[&(from.place.min(to.place), from.place.max(to.place))];
        let ends = [from, to].map(|process| End {
            process,
            is_open: true,
            is_mute: false,
            is_data_mute: false,
            access_ended: false,
            memory: self.workers[process.place].life.as_ref().expect("it is up").memory.clone(),
            flights: BTreeMap::new(),
            reads: BTreeMap::new(),
            last_arrival: 0,
            queues: [0; QUEUES],
            latest_landed: None,
        });
        self.conns.insert(id, Conn { ends, proof });
        id
    }

    /// Says something over a connection.
    pub(super) fn say(&mut self, id: ConnId, side: usize, message: Message) {
        let latency = self.latency();
        let Some((from, to)) = self.nodes(id, side) else { return };
        let start = self.cut(from, to).unwrap_or(self.now);
        let is_lost = self.strikes(Fault::Loss, 1);
        let end = &mut self.conns.get_mut(&id).expect("just seen").ends[side];
        if !end.is_open || end.is_mute {
            return;
        }
        if is_lost {
            // A hole in a stream: what comes behind it is never delivered.
            end.is_mute = true;
            return self.note(|| format!("{from:?} ─✗ {to:?}  {}", short(&message)));
        }
        end.last_arrival = (start + latency).max(end.last_arrival + 1);
        let at = end.last_arrival;
        self.note(|| format!("{from:?} ──► {to:?}  {} (arrives at {:.3})", short(&message), at as f64 / 1e3));
        self.grant_to_all(id, side, at, &message);
        self.at(at, Event::Control { conn: id, to: 1 - side, message });
    }

    pub(super) fn control_arrives(&mut self, id: ConnId, to: usize, message: Message) {
        let Some((here, there)) = self.nodes(id, to) else { return };
        if let Some(until) = self.cut(here, there) {
            return self.at(until, Event::Control { conn: id, to, message });
        }
        let end = &self.conns[&id].ends[to];
        if end.is_open {
            let process = end.process;
            self.hear(process, id, to, message);
        }
    }

    /// This side is done with a connection: writes that have left may still arrive, the others never do. Returns those
    /// that the sender is told of now.
    pub(super) fn close(&mut self, id: ConnId, side: usize) -> Vec<Completion> {
        let Some((from, to)) = self.nodes(id, side) else { return Vec::new() };
        let arrival = self.cut(from, to).unwrap_or(self.now) + self.latency();
        let chance = &mut self.chance;
        let conn = self.conns.get_mut(&id).expect("just seen");
        let proof = conn.proof;
        let end = &mut conn.ends[side];
        if !std::mem::replace(&mut end.is_open, false) {
            return Vec::new();
        }
        let process = end.process;
        let ids: Vec<WriteId> = end.flights.keys().copied().collect();
        end.flights.retain(|_, flight| {
            let mut bytes = vec![0; flight.source.len()];
            flight.source.read(0, &mut bytes);
            flight.snapshot = Some(bytes);
            proof != QuietProof::Process && !flight.is_lost && chance.happens(500)
        });
        if conn.ends[1 - side].is_open {
            self.at(arrival, Event::Closed { conn: id, to: 1 - side });
        }
        let severed = |id| Completion { id, outcome: Err(WriteFault::Severed) };
        if proof != QuietProof::AccessEnded {
            return ids.into_iter().map(severed).collect();
        }
        // The queue pair is flushed in its own time.
        self.flush_reads(id, side);
        for id in ids {
            let delay = self.micros(10, 2_000);
            self.after(delay, Event::Completed { process, completion: severed(id) });
        }
        Vec::new()
    }

    pub(super) fn closed(&mut self, id: ConnId, to: usize) {
        let Some((here, there)) = self.nodes(id, to) else { return };
        if let Some(until) = self.cut(here, there) {
            return self.at(until, Event::Closed { conn: id, to });
        }
        if self.conns[&id].ends[to].is_open {
            let process = self.conns[&id].ends[to].process;
            self.connection_closed(process, id, to);
        }
    }

    /// Ends a peer's access; writes that land later change nothing.
    pub(super) fn end_access(&mut self, id: ConnId, side: usize) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.ends[side].access_ended = true;
        }
    }

    /// Posts what the core has for a peer.
    pub(super) fn post(&mut self, process: Process, peer: u64) {
        let Some(life) = self.life(process) else { return };
        let Some(&(id, side, _)) = life.up.get(&peer) else { return };
        let depth = self.queue_depth;
        let end = &self.conns[&id].ends[side];
        let mut room = depth.saturating_sub(end.flights.len() + end.reads.len());
        let mut posted = Vec::new();
        let mut was_full = false;
        let now = self.local_moment(process.place);
        let life = self.life(process).expect("just seen");
        let take = |write, source: &Piece, range| {
            if room == 0 {
                was_full = true;
                return Post::QueueFull;
            }
            room -= 1;
            posted.push((write, source.clone(), range));
            Post::Accepted
        };
        life.core.post(peer, take, now);
        if was_full && self.options.faults.contains(Fault::FullQueue) {
            self.count(Fault::FullQueue);
        }
        for (write, source, range) in posted {
            self.take_off(id, side, write, source, range);
        }
    }

    fn take_off(&mut self, id: ConnId, side: usize, write: WriteId, source: Piece, range: RemoteRange) {
        self.summary.writes += 1;
        let latency = self.latency() + self.micros(1, 1_500);
        let proof = self.conns[&id].proof;
        let is_lost = proof != QuietProof::Process && self.strikes(Fault::Loss, 3);
        let is_silent = is_lost && proof == QuietProof::Admission && self.chance.happens(500);
        let echoes = proof == QuietProof::AccessEnded && self.strikes(Fault::Duplication, 30);
        let queue = if proof == QuietProof::AccessEnded { self.chance.below(QUEUES) } else { 0 };
        let early = self.micros(1, 20);
        let now = self.now;
        let end = &mut self.conns.get_mut(&id).expect("it is up").ends[side];
        let process = end.process;
        end.is_data_mute |= is_silent;
        let is_lost = is_lost || end.is_data_mute;
        end.queues[queue] = end.queues[queue].max(now + latency) + 1;
        let at = end.queues[queue];
        let flight = Flight { source, range, snapshot: None, done: 0, queue, is_lost, fault: None };
        end.flights.insert(write, flight);
        let block_bytes = self.conns[&id].ends[1 - side].memory.shape().block_bytes();
        self.note(|| {
            let block = range.offset / block_bytes as u64;
            format!("worker {} writes {} B to block {block} for {}", process.place, range.len, range.handoff)
        });
        self.at(at, Event::Lands { conn: id, from: side, id: write });
        if echoes {
            self.after(early, Event::Echo { conn: id, from: side, id: write });
        }
        if self.plants(Mischief::CommitEarly) {
            self.completed(process, Completion { id: write, outcome: Ok(()) });
        }
    }

    pub(super) fn echo(&mut self, id: ConnId, from: usize, write: WriteId) {
        if let Some(flight) = self.conns.get(&id).and_then(|it| it.ends[from].flights.get(&write)) {
            let (range, bytes) = (flight.range, flight.bytes(0, flight.source.len()));
            self.store(id, from, &range, 0, &bytes);
        }
    }

    pub(super) fn lands(&mut self, id: ConnId, from: usize, write: WriteId) {
        let Some((sender, receiver)) = self.nodes(id, from) else { return };
        let Some(flight) = self.conns[&id].ends[from].flights.get(&write) else { return };
        let (range, is_lost, queue) = (flight.range, flight.is_lost, flight.queue);
        let proof = self.conns[&id].proof;
        if let Some(until) = self.cut(sender, receiver)
            && proof != QuietProof::Process
        {
            return self.at(until + 1, Event::Lands { conn: id, from, id: write });
        }
        if is_lost {
            return self.writes_are_lost(id, from, write);
        }
        let whole = self.conns[&id].ends[from].flights[&write].source.len();
        let done = self.conns[&id].ends[from].flights[&write].done;
        let layer_bytes = self.conns[&id].ends[1 - from].memory.shape().layer_bytes();
        let goes_on = layer_bytes < whole - done && self.chance.happens(300);
        let len = if goes_on { layer_bytes } else { whole - done };
        let fault = self.piece_lands(id, from, write, done, len);
        let end = &mut self.conns.get_mut(&id).expect("just seen").ends[from];
        let flight = end.flights.get_mut(&write).expect("just seen");
        flight.fault = flight.fault.or(fault);
        flight.done += len;
        if goes_on {
            let delay = self.micros(5, 50);
            let at = self.now + delay;
            let end = &mut self.conns.get_mut(&id).expect("just seen").ends[from];
            end.queues[queue] = end.queues[queue].max(at);
            return self.at(at, Event::Lands { conn: id, from, id: write });
        }
        let fault = flight.fault;
        end.flights.remove(&write);
        let overtook = end.latest_landed.is_some_and(|latest| write < latest);
        end.latest_landed = end.latest_landed.max(Some(write));
        if overtook && self.options.faults.contains(Fault::Reorder) {
            self.count(Fault::Reorder);
        }
        if self.conns[&id].ends[from].is_open {
            let process = self.conns[&id].ends[from].process;
            let delay = if proof == QuietProof::Process { 0 } else { self.latency() };
            let completion = Completion { id: write, outcome: fault.map_or(Ok(()), Err) };
            self.note(|| format!("write for {} has landed: {:?}", range.handoff, completion.outcome));
            self.after(delay, Event::Completed { process, completion });
        }
    }

    fn piece_lands(
        &mut self,
        id: ConnId,
        from: usize,
        write: WriteId,
        done: usize,
        len: usize,
    ) -> Option<WriteFault> {
        let conn = &self.conns[&id];
        let flight = &conn.ends[from].flights[&write];
        let (range, bytes, earlier) = (flight.range, flight.bytes(done, len), flight.fault);
        let (sender, receiver) = (conn.ends[from].process, conn.ends[1 - from].process);
        let (is_open, access_ended) = (conn.ends[1 - from].is_open, conn.ends[1 - from].access_ended);
        match conn.proof {
            QuietProof::Process => {}
            QuietProof::AccessEnded if access_ended => return Some(WriteFault::Severed),
            QuietProof::AccessEnded => {}
            QuietProof::Admission => {
                let now = self.local_moment(receiver.place);
                let local = self.workers[receiver.place].local(self.now);
                let skips = self.plants(Mischief::SkipEpochCheck);
                let Some(life) = self.life(receiver).filter(|_| is_open || skips) else {
                    return Some(WriteFault::Severed);
                };
                life.core.heard(sender.instance, now);
                if let Some(last) = life.last_delivery.get_mut(&sender.instance) {
                    *last = local;
                }
                let admitted = life.core.admit(sender.instance, &range);
                if let Some(fault) = earlier.or(admitted.err())
                    && !skips
                {
                    self.summary.turned_down += 1;
                    return Some(fault);
                }
            }
        }
        self.store(id, from, &range, done, &bytes);
        None
    }

    /// Bytes reach the memory of the receiving side.
    fn store(&mut self, id: ConnId, from: usize, range: &RemoteRange, done: usize, bytes: &[u8]) {
        let end = &self.conns[&id].ends[1 - from];
        if end.access_ended {
            return;
        }
        let start = usize::try_from(range.offset).expect("inside the arena") + done;
        end.memory.copy_in(start, bytes);
        let (process, block_bytes) = (end.process, end.memory.shape().block_bytes());
        for block in start / block_bytes..=(start + bytes.len() - 1) / block_bytes {
            self.check_lent(process, BlockId(u32::try_from(block).expect("small")), range.handoff);
        }
    }

    /// Whoever's bytes land in a block, it is lent to that handoff.
    pub(super) fn check_lent(&mut self, owner: Process, block: BlockId, handoff: HandoffId) {
        let Some(life) = self.life(owner) else { return }; // Nobody's memory any more.
        let lent_to = life.lent.get(&block).copied();
        let is_late = !life.incoming.contains_key(&handoff);
        assert_eq!(
            lent_to,
            Some(handoff),
            "a byte of handoff {handoff} lands in {block:?} of worker {}, which is not lent to it",
            owner.place
        );
        self.summary.late += u64::from(is_late);
    }

    fn writes_are_lost(&mut self, id: ConnId, from: usize, write: WriteId) {
        let end = &mut self.conns.get_mut(&id).expect("the caller has just seen it").ends[from];
        let is_told = end.is_open && !end.is_data_mute;
        if !end.is_data_mute {
            end.flights.remove(&write);
        } // In silence it stays under way until somebody gives up.
        let process = end.process;
        self.note(|| format!("worker {}: a write is lost", process.place));
        if is_told {
            // Retries are exhausted, or the stream is reset: the connection is broken.
            let delay = self.micros(50_000, 200_000);
            let completion = Completion { id: write, outcome: Err(WriteFault::Severed) };
            self.after(delay, Event::Completed { process, completion });
        }
    }

    /// A process has died: what had left it may still arrive.
    pub(super) fn drop_ends_of(&mut self, process: Process, is_silent: bool) {
        let ids: Vec<ConnId> = self.conns.keys().copied().collect();
        for id in ids {
            for side in 0..2 {
                let conn = &self.conns[&id];
                if conn.ends[side].process != process {
                    continue;
                }
                let (other, proof) = (conn.ends[1 - side].process, conn.proof);
                let (is_open, other_is_open) = (conn.ends[side].is_open, conn.ends[1 - side].is_open);
                if proof == QuietProof::Process {
                    // Whoever has mapped its memory, or lent it some, watches the process itself.
                    let delay = self.micros(100, 3_000);
                    self.after(delay, Event::ProcessGone { process: other, peer: process.instance });
                }
                if !is_open {
                    continue;
                }
                if is_silent && proof != QuietProof::Process {
                    // A host that loses its power says nothing.
                    self.conns.get_mut(&id).expect("just seen").ends[1 - side].is_open = false;
                    self.close(id, side);
                    self.conns.get_mut(&id).expect("just seen").ends[1 - side].is_open = other_is_open;
                } else {
                    self.close(id, side);
                }
            }
        }
    }

    /// The nodes of a connection: this side's and the other's.
    pub(super) fn nodes(&self, id: ConnId, side: usize) -> Option<(Node, Node)> {
        let conn = self.conns.get(&id)?;
        let node = |side: usize| Node::Worker(conn.ends[side].process.place);
        Some((node(side), node(1 - side)))
    }

    /// The memory of the other side, as it is mapped on one host.
    pub(super) fn peer_memory(&self, life: &Life, peer: u64) -> Option<Memory> {
        let (id, side, _) = life.up.get(&peer)?;
        Some(self.conns[id].ends[1 - side].memory.clone())
    }

    pub(super) fn link_of(&self, process: Process, peer: u64) -> Option<(ConnId, usize, LinkId)> {
        let life = self.workers[process.place].life.as_ref()?;
        life.up.get(&peer).copied().filter(|_| life.instance == process.instance)
    }
}

impl Flight {
    fn bytes(&self, done: usize, len: usize) -> Vec<u8> {
        match &self.snapshot {
            Some(bytes) => bytes[done..done + len].to_vec(),
            None => {
                let mut bytes = vec![0; len];
                self.source.read(done, &mut bytes);
                bytes
            }
        }
    }
}

/// Queues of a device's connection.
pub(super) const QUEUES: usize = 3;
