//! What the device knows and does.

use super::{
    Calls,
    group::Group,
    memory::Memory,
    operation::{Named, Operation, Room},
    product,
    recording::Recording,
};
use crate::cuda::{
    Collective, CudaError, DeviceAddress, DeviceIdentity, Graph, GroupId, Launch, Member, PinnedAddress,
    Queue, Ticket,
    emulator::{Kernels, Order},
    timeline::{Access, Accessor, Moment, Timeline},
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    sync::Arc,
};

pub(super) struct State {
    pub(super) kernels: Kernels,
    pub(super) order: Order,
    pub(super) capacity: usize,
    /// Whether there is one that multiplies matrices.
    pub(super) library: bool,
    /// Whether it has memory that others can be given.
    pub(super) shares: bool,
    /// Devices whose memory it does not reach.
    pub(super) out_of_reach: Vec<DeviceIdentity>,
    pub(super) device: Memory,
    pub(super) pinned: Memory,
    pub(super) launches: Vec<Launch>,
    pub(super) calls: Calls,
    /// What the computation had to do beyond each ticket that was waited for.
    pub(super) waits: Vec<u64>,
    /// Calls that still succeed, and how the next one fails.
    pub(super) failure: Option<(usize, CudaError)>,
    pub(super) recording: Option<Recording>,
    pub(super) graphs: BTreeMap<u64, Recording>,
    /// Places in groups of devices.
    pub(super) members: BTreeMap<u64, Arc<Group>>,
    memberships: u64,
    captures: u64,
    timeline: Timeline,
    tickets: u64,
    /// Tickets that were asked about, and had not come.
    asked: BTreeSet<u64>,
    /// By queue, in their order; none of the computation.
    transfers: [VecDeque<Transfer>; Queue::COUNT],
}

/// A transfer that was asked for and not carried out.
struct Transfer {
    number: u64,
    operation: Operation,
    /// What was in its source on the device when it was asked for.
    source: Option<(Range<u64>, Vec<u8>)>,
}

impl State {
    pub(super) fn new(order: Order, capacity: usize) -> Self {
        Self {
            kernels: Kernels::Ours,
            order,
            capacity,
            library: false,
            shares: true,
            out_of_reach: Vec::new(),
            device: Memory::new("the device"),
            pinned: Memory::new("pinned memory"),
            launches: Vec::new(),
            calls: Calls::default(),
            waits: Vec::new(),
            failure: None,
            recording: None,
            graphs: BTreeMap::new(),
            members: BTreeMap::new(),
            memberships: 0,
            captures: 0,
            timeline: Timeline::default(),
            tickets: 0,
            asked: BTreeSet::new(),
            transfers: Default::default(),
        }
    }

    pub(super) fn free(&self) -> usize {
        let graphs: usize = self.graphs.values().map(Recording::bytes).sum();
        self.capacity.saturating_sub(self.device.used() + graphs)
    }

    /// One call that can fail.
    pub(super) fn count_down(&mut self) -> Result<(), CudaError> {
        match &mut self.failure {
            None => Ok(()),
            Some((0, error)) => Err(error.clone()),
            Some((left, _)) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    // ---- Memory -----------------------------------------------------------------------------------------------------------

    pub(super) fn allocate(&mut self, bytes: usize) -> Result<DeviceAddress, CudaError> {
        self.check_not_recording("an allocation");
        self.count_down()?;
        self.calls.allocations += 1;
        if self.free() < bytes {
            return Err(CudaError::OutOfMemory { bytes });
        }
        Ok(DeviceAddress(self.device.take(bytes)))
    }

    pub(super) fn allocate_pinned(&mut self, bytes: usize) -> Result<PinnedAddress, CudaError> {
        self.check_not_recording("an allocation");
        self.count_down()?;
        self.calls.allocations += 1;
        Ok(PinnedAddress(self.pinned.take(bytes)))
    }

    pub(super) fn give_back(&mut self, room: Room, address: u64) {
        self.check_not_recording("giving memory back");
        let all = self.room(room).all_of(address);
        self.timeline.check(Accessor::Host, &all, Access::Write, "giving back");
        self.room_mut(room).give_back(address);
    }

    pub(super) fn write_pinned(&mut self, to: PinnedAddress, from: &[u8]) {
        let memory = to.0..to.0 + from.len() as u64;
        self.pinned.id_of(&memory, "write");
        self.timeline.check(Accessor::Host, &memory, Access::Write, "write");
        self.pinned.set_written(&memory);
        self.pinned.write(to.0, from);
    }

    pub(super) fn read_pinned(&mut self, to: &mut [u8], from: PinnedAddress) {
        let memory = from.0..from.0 + to.len() as u64;
        self.pinned.id_of(&memory, "read");
        self.timeline.check(Accessor::Host, &memory, Access::Read, "read");
        self.pinned.check_written(&memory, "read");
        to.copy_from_slice(&self.pinned.read(&memory));
    }

    pub(super) fn upload(&mut self, to: DeviceAddress, from: &[u8]) -> Result<(), CudaError> {
        self.check_not_recording("an upload from memory that is not pinned");
        self.count_down()?;
        self.calls.copies += 1;
        let memory = to.0..to.0 + from.len() as u64;
        self.device.id_of(&memory, "upload");
        self.timeline.check(Accessor::Queue(Queue::Compute), &memory, Access::Write, "upload");
        self.timeline.begin(Queue::Compute);
        self.device.set_written(&memory);
        self.device.write(to.0, from);
        Ok(())
    }

    pub(super) fn download(&mut self, to: &mut [u8], from: DeviceAddress) -> Result<(), CudaError> {
        self.check_not_recording("a download to memory that is not pinned");
        self.count_down()?;
        self.calls.copies += 1;
        self.calls.waits += 1;
        let memory = from.0..from.0 + to.len() as u64;
        self.device.id_of(&memory, "download");
        self.timeline.check(Accessor::Queue(Queue::Compute), &memory, Access::Read, "download");
        self.device.check_written(&memory, "download");
        to.copy_from_slice(&self.device.read(&memory));
        self.timeline.begin(Queue::Compute);
        self.see(self.timeline.moment(Queue::Compute));
        Ok(())
    }

    // ---- Queues -----------------------------------------------------------------------------------------------------------

    pub(super) fn ask(&mut self, queue: Queue, operation: Operation) -> Result<(), CudaError> {
        if let Some(recording) = self.recording.as_mut().filter(|_| queue != Queue::Handoff) {
            assert!(queue == Queue::Compute, "{operation:?} in the queue {queue:?} cannot be captured");
            recording.push(operation, &self.device, &self.pinned);
            return Ok(());
        }
        self.count_down()?;
        match operation {
            Operation::Launch(_) => self.calls.launches += 1,
            Operation::Multiply(_) => self.calls.products += 1,
            _ => self.calls.copies += 1,
        }
        self.begin(queue, operation);
        Ok(())
    }

    pub(super) fn begin(&mut self, queue: Queue, operation: Operation) {
        let (named, name) = (operation.memory(), operation.name());
        // A kernel that was asked of the same queue before may be what writes it.
        let is_late = queue == Queue::Handoff && matches!(operation, Operation::Download { .. });
        for Named { room, memory, access } in &named {
            self.room(*room).id_of(memory, name);
            self.timeline.check(Accessor::Queue(queue), memory, *access, name);
            if *access == Access::Read && !is_late && !matches!(operation, Operation::Copy { .. }) {
                self.room(*room).check_written(memory, name);
            }
        }
        let number = self.timeline.begin(queue);
        for Named { room, memory, access } in &named {
            if queue != Queue::Compute || *room == Room::Pinned {
                self.timeline.uses(queue, number, memory.clone(), *access);
            }
        }
        if queue == Queue::Compute {
            return self.carry_out(operation);
        }
        let mut source = None;
        for Named { room, memory, access } in named {
            match (room, access) {
                (Room::Device, Access::Write) => self.device.set_in_flight(&memory),
                (Room::Device, Access::Read) if is_late => {}
                (Room::Device, Access::Read) => source = Some((memory.clone(), self.device.read(&memory))),
                (Room::Pinned, _) => {}
            }
        }
        self.transfers[queue as usize].push_back(Transfer { number, operation, source });
    }

    fn carry_out(&mut self, operation: Operation) {
        let range = |start: u64, bytes: usize| start..start + bytes as u64;
        match operation {
            Operation::Launch(launch) => {
                self.launches.push(launch);
                let outcome = self.device.emulator.launch(self.kernels, &launch, self.order);
                outcome.unwrap_or_else(|reason| panic!("{reason}"));
            }
            Operation::Multiply(product) => product::carry_out(&product, &mut self.device),
            // Ranks meet: `bring`, `take`.
            Operation::Collect(..) => {}
            Operation::Fill { to, bytes, value } => {
                self.device.set_written(&range(to.0, bytes));
                self.device.write(to.0, &vec![value; bytes]);
            }
            Operation::Upload { to, from, bytes } => {
                self.device.set_written(&range(to.0, bytes));
                self.device.write(to.0, &self.pinned.read(&range(from.0, bytes)));
            }
            Operation::Download { to, from, bytes } => {
                self.pinned.set_written(&range(to.0, bytes));
                self.pinned.write(to.0, &self.device.read(&range(from.0, bytes)));
            }
            Operation::Copy { to, from, bytes } => {
                self.device.set_as_at(&range(to.0, bytes), from.0);
                let contents = self.device.read(&range(from.0, bytes));
                self.device.write(to.0, &contents);
            }
        }
    }

    /// Carries out the next transfer, if it is over by a moment.
    fn transfer(&mut self, until: Moment) -> bool {
        let next = Queue::ALL.into_iter().find_map(|queue| {
            self.transfers[queue as usize].pop_front_if(|transfer| until.has(queue, transfer.number))
        });
        let Some(Transfer { operation, source, .. }) = next else { return false };
        if let Some((memory, before)) = &source {
            let same = self.device.read(memory) == *before;
            assert!(same, "{operation:?} was under way, and a kernel wrote what it reads");
        }
        if let (None, &Operation::Download { from, bytes, .. }) = (&source, &operation) {
            self.device.check_written(&(from.0..from.0 + bytes as u64), operation.name());
        }
        self.carry_out(operation);
        true
    }

    /// The host learns that a moment has come.
    fn see(&mut self, moment: Moment) {
        while self.transfer(moment) {}
        self.timeline.host_saw(moment);
    }

    pub(super) fn handoff_after_compute(&mut self) -> Result<(), CudaError> {
        self.check_not_recording("an order between queues");
        self.count_down()?;
        self.timeline.handoff_after_compute();
        Ok(())
    }

    pub(super) fn ticket(&mut self, queue: Queue) -> Result<Ticket, CudaError> {
        self.check_not_recording_of(queue, "a ticket");
        self.count_down()?;
        self.tickets += 1;
        Ok(Ticket { queue, number: self.tickets, moment: self.timeline.moment(queue) })
    }

    /// One transfer is carried out for each time that somebody asks, and whoever asks hears "no" at least once.
    pub(super) fn is_done(&mut self, ticket: Ticket) -> Result<bool, CudaError> {
        self.check_not_recording_of(ticket.queue, "a question for a ticket");
        self.count_down()?;
        if self.timeline.is_over(ticket.moment) {
            return Ok(true);
        }
        // Whoever asks for two in turn comes to the end of both.
        if self.transfer(ticket.moment) || self.asked.insert(ticket.number) {
            return Ok(false);
        }
        self.asked.remove(&ticket.number);
        self.see(ticket.moment);
        Ok(true)
    }

    pub(super) fn wait(&mut self, ticket: Ticket) -> Result<(), CudaError> {
        self.check_not_recording_of(ticket.queue, "waiting");
        self.count_down()?;
        self.calls.waits += 1;
        self.waits.push(self.timeline.beyond(Queue::Compute, ticket.moment));
        self.see(ticket.moment);
        Ok(())
    }

    pub(super) fn compute_after(&mut self, ticket: Ticket) -> Result<(), CudaError> {
        self.check_not_recording("waiting");
        self.count_down()?;
        while self.transfer(ticket.moment) {}
        self.timeline.compute_after(ticket.moment);
        Ok(())
    }

    pub(super) fn synchronize(&mut self) -> Result<(), CudaError> {
        self.check_not_recording("waiting");
        self.count_down()?;
        self.calls.waits += 1;
        for queue in Queue::ALL {
            self.see(self.timeline.moment(queue));
        }
        Ok(())
    }

    // ---- Graphs -----------------------------------------------------------------------------------------------------------

    pub(super) fn begin_capture(&mut self) -> Result<(), CudaError> {
        self.check_not_recording("a capture");
        self.count_down()?;
        self.recording = Some(Recording::default());
        Ok(())
    }

    pub(super) fn end_capture(&mut self) -> Result<Graph, CudaError> {
        let recording = self.recording.take().expect("a capture ends that has begun");
        self.count_down()?;
        assert!(!recording.operations.is_empty(), "a capture of nothing");
        let (bytes, launches) = (recording.bytes(), recording.launches());
        if self.free() < bytes {
            return Err(CudaError::OutOfMemory { bytes });
        }
        self.captures += 1;
        self.graphs.insert(self.captures, recording);
        Ok(Graph { number: self.captures, bytes, launches })
    }

    /// What a graph does, for [`next`](Self::next).
    pub(super) fn replay(&mut self, graph: Graph) -> Result<Vec<Operation>, CudaError> {
        self.check_not_recording("a replay");
        self.count_down()?;
        self.calls.replays += 1;
        let recording = self.graph(graph).clone();
        recording.check_memory(&self.device, &self.pinned);
        Ok(recording.operations)
    }

    /// Does the next of what a graph does.
    pub(super) fn next(&mut self, operation: Operation) {
        self.begin(Queue::Compute, operation);
    }

    /// Whether ranks are to meet now, and not when a graph is replayed.
    pub(super) fn may_meet(&mut self, member: Member, collective: Collective) -> Result<bool, CudaError> {
        if self.recording.is_some() {
            return self.ask(Queue::Compute, Operation::Collect(member, collective)).map(|()| false);
        }
        self.count_down()?;
        self.calls.collectives += 1;
        Ok(true)
    }

    pub(super) fn update(&mut self, graph: Graph, number: usize, launch: &Launch) -> Result<(), CudaError> {
        self.count_down()?;
        let mut recording = self.graph(graph).clone();
        recording.update(number, launch, &self.device);
        self.graphs.insert(graph.number, recording);
        Ok(())
    }

    pub(super) fn free_graph(&mut self, graph: Graph) {
        self.check_not_recording("giving a graph back");
        self.graph(graph);
        self.graphs.remove(&graph.number);
    }

    // ---- Groups -----------------------------------------------------------------------------------------------------------

    /// What every way to join begins with.
    pub(super) fn may_join(&mut self) -> Result<(), CudaError> {
        self.check_not_recording("joining a group");
        self.count_down()
    }

    pub(super) fn add_member(&mut self, group: Arc<Group>, rank: u32, ranks: u32) -> Member {
        self.memberships += 1;
        self.members.insert(self.memberships, group);
        Member { number: self.memberships, rank, ranks }
    }

    pub(super) fn new_group(&mut self) -> Result<GroupId, CudaError> {
        self.may_join()?;
        Ok(Group::create())
    }

    pub(super) fn leave(&mut self, member: Member) {
        self.check_not_recording("leaving a group");
        let uses = |it: &Operation| matches!(it, Operation::Collect(by, _) if by.number == member.number);
        let is_recorded = self.graphs.values().any(|graph| graph.operations.iter().any(uses));
        assert!(!is_recorded, "{member:?} leaves its group, and a graph uses it");
        self.group(member);
        self.members.remove(&member.number);
    }

    fn graph(&self, graph: Graph) -> &Recording {
        self.graphs.get(&graph.number).unwrap_or_else(|| panic!("{graph:?} is not there"))
    }

    pub(super) fn check_not_recording(&self, what: &str) {
        assert!(self.recording.is_none(), "{what} cannot be captured");
    }

    /// What another thread does about a handoff is none of a capture's business.
    fn check_not_recording_of(&self, queue: Queue, what: &str) {
        if queue != Queue::Handoff {
            self.check_not_recording(what);
        }
    }

    fn room(&self, room: Room) -> &Memory {
        match room {
            Room::Device => &self.device,
            Room::Pinned => &self.pinned,
        }
    }

    fn room_mut(&mut self, room: Room) -> &mut Memory {
        match room {
            Room::Device => &mut self.device,
            Room::Pinned => &mut self.pinned,
        }
    }
}
