//! What was asked of a GPU and is not over yet.

use super::{
    exchange::Communicator,
    library::Library,
    modules::Modules,
    raw::{Event, RecordedGraph, Stream, check},
    shareable::Shareable,
};
use crate::cuda::{
    Collective, CudaError, DeviceAddress, Graph, Launch, MatrixProduct, Member, MemoryInfo, PinnedAddress,
    Queue, Ticket,
    timeline::{Access, Accessor, Timeline},
};
use cudarc::driver::sys::{self, CUgraphNode, CUresult};
use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    ptr,
    sync::Arc,
};

/// # Invariant
///
/// `pinned` has the allocations of `cuMemHostAlloc` that were not given back, by address, with their lengths: good for reads and writes.
/// Whatever the driver may still do with them is in `timeline`.
#[derive(Debug)]
pub(super) struct State {
    // Graphs and events are dropped before the streams they are for, and these before the modules.
    graphs: BTreeMap<u64, Recorded>,
    /// Places in groups; none where one was abandoned. After the graphs that use them.
    members: BTreeMap<u64, Option<Communicator>>,
    /// Tickets that may not have come yet, by queue, in their order.
    tickets: [VecDeque<(Ticket, Arc<Event>)>; Queue::COUNT],
    /// Events without a use.
    spare: Vec<Arc<Event>>,
    /// Where the computation was when the last transfer was asked for.
    fork: Event,
    streams: [Stream; Queue::COUNT],
    /// Memory that other processes can be given, or have given, by address.
    pub(super) shareable: BTreeMap<u64, Shareable>,
    modules: Modules,
    /// What multiplies large matrices, or why nothing does.
    library: Result<Library, String>,
    pinned: BTreeMap<u64, usize>,
    timeline: Timeline,
    recording: Option<Recording>,
    numbers: u64,
}

/// What is being recorded.
#[derive(Debug, Default)]
struct Recording {
    launches: Vec<CUgraphNode>,
    pinned: Vec<(Range<u64>, Access)>,
    operations: usize,
}

#[derive(Debug)]
struct Recorded {
    graph: RecordedGraph,
    recording: Recording,
}

/// From where to where.
#[derive(Clone, Copy, Debug)]
pub(super) enum Between {
    Upload { to: DeviceAddress, from: PinnedAddress },
    Download { to: PinnedAddress, from: DeviceAddress },
    Device { to: DeviceAddress, from: DeviceAddress },
}

impl State {
    /// In the context that the caller's thread has entered.
    pub(super) fn new(modules: Modules) -> Result<Self, CudaError> {
        Ok(Self {
            graphs: BTreeMap::new(),
            members: BTreeMap::new(),
            tickets: Default::default(),
            spare: Vec::new(),
            fork: Event::new()?,
            streams: [Stream::new()?, Stream::new()?, Stream::new()?],
            shareable: BTreeMap::new(),
            modules,
            library: Library::open(),
            pinned: BTreeMap::new(),
            timeline: Timeline::default(),
            recording: None,
            numbers: 0,
        })
    }

    // ---- Memory -----------------------------------------------------------------------------------------------------------

    pub(super) fn allocate(&self, bytes: usize) -> Result<DeviceAddress, CudaError> {
        self.check_not_recording("an allocation");
        assert!(0 < bytes, "an allocation of no bytes");
        let mut address = 0;
        // SAFETY: writes an address.
        match unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(CudaError::OutOfMemory { bytes }),
            result => check("cuMemAlloc_v2", result).map(|()| DeviceAddress(address)),
        }
    }

    pub(super) fn free(&mut self, address: DeviceAddress) -> Result<(), CudaError> {
        self.check_not_recording("giving memory back");
        if self.shareable.remove(&address.0).is_some() {
            return Ok(());
        }
        // SAFETY: memory of the device alone; the driver knows what it has given out, and refuses everything else.
        check("cuMemFree_v2", unsafe { sys::cuMemFree_v2(address.0) })
    }

    pub(super) fn allocate_pinned(&mut self, bytes: usize) -> Result<PinnedAddress, CudaError> {
        self.check_not_recording("an allocation");
        assert!(0 < bytes, "an allocation of no bytes");
        let mut first = ptr::null_mut();
        // SAFETY: writes an address.
        match unsafe { sys::cuMemHostAlloc(&raw mut first, bytes, 0) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(CudaError::OutOfPinnedMemory { bytes }),
            result => check("cuMemHostAlloc", result)?,
        }
        // SAFETY: just allocated with so many bytes. What was there before is nobody's, and to read memory it has to be initialised.
        unsafe { first.cast::<u8>().write_bytes(0, bytes) };
        let address = first.expose_provenance() as u64;
        self.pinned.insert(address, bytes);
        Ok(PinnedAddress(address))
    }

    pub(super) fn free_pinned(&mut self, address: PinnedAddress) -> Result<(), CudaError> {
        self.check_not_recording("giving memory back");
        let bytes = self.pinned.get(&address.0);
        let bytes =
            *bytes.unwrap_or_else(|| panic!("{address:?} is given back, and nothing was taken there"));
        self.timeline.check(Accessor::Host, &range(address.0, bytes), Access::Write, "giving back");
        self.pinned.remove(&address.0);
        // SAFETY: allocated and not given back by the invariant, and nothing that is under way uses it.
        check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(pointer(address.0).cast()) })
    }

    pub(super) fn write_pinned(&mut self, to: PinnedAddress, from: &[u8]) {
        let memory = self.pinned_range(to, from.len(), "write");
        self.timeline.check(Accessor::Host, &memory, Access::Write, "write");
        // SAFETY: an allocation has these bytes by the invariant, which no slice overlaps, and nothing that is under way uses them.
        unsafe { pointer(to.0).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
    }

    pub(super) fn read_pinned(&mut self, to: &mut [u8], from: PinnedAddress) {
        let memory = self.pinned_range(from, to.len(), "read");
        self.timeline.check(Accessor::Host, &memory, Access::Read, "read");
        // SAFETY: as in `write_pinned`; allocations are initialised when they are made.
        unsafe { pointer(from.0).copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
    }

    pub(super) fn upload(&mut self, to: DeviceAddress, from: &[u8]) -> Result<(), CudaError> {
        self.check_not_recording("an upload from memory that is not pinned");
        self.timeline.begin(Queue::Compute);
        let stream = &self.streams[Queue::Compute as usize];
        // SAFETY: the source is there until the stream has been waited for.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), stream.0) };
        check("cuMemcpyHtoDAsync_v2", result)?;
        stream.synchronize()?;
        self.timeline.host_saw(self.timeline.moment(Queue::Compute));
        Ok(())
    }

    pub(super) fn download(&mut self, to: &mut [u8], from: DeviceAddress) -> Result<(), CudaError> {
        self.check_not_recording("a download to memory that is not pinned");
        self.timeline.begin(Queue::Compute);
        let stream = &self.streams[Queue::Compute as usize];
        // SAFETY: the target is there until the stream has been waited for.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), stream.0) };
        check("cuMemcpyDtoHAsync_v2", result)?;
        stream.synchronize()?;
        self.timeline.host_saw(self.timeline.moment(Queue::Compute));
        Ok(())
    }

    /// Gives back what nobody gave back. Nothing may be under way.
    pub(super) fn give_all_back(&mut self) {
        self.graphs.clear();
        self.shareable.clear();
        for address in std::mem::take(&mut self.pinned).into_keys() {
            // SAFETY: allocated and not given back by the invariant; nobody has the address any more who could use it.
            drop(check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(pointer(address).cast()) }));
        }
    }

    // ---- Queues -----------------------------------------------------------------------------------------------------------

    pub(super) fn copy(&mut self, queue: Queue, between: Between, bytes: usize) -> Result<(), CudaError> {
        let pinned = match between {
            Between::Upload { from, .. } => Some((self.pinned_range(from, bytes, "upload"), Access::Read)),
            Between::Download { to, .. } => Some((self.pinned_range(to, bytes, "download"), Access::Write)),
            Between::Device { .. } => None,
        };
        self.begin(queue, pinned)?;
        let stream = self.streams[queue as usize].0;
        match between {
            Between::Upload { to, from } => {
                // SAFETY: `pinned_range` found the source; it stays until nothing that is under way uses it, as `begin` noted.
                let result =
                    unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, pointer(from.0).cast(), bytes, stream) };
                check("cuMemcpyHtoDAsync_v2", result)
            }
            Between::Download { to, from } => {
                // SAFETY: as above, of the target, which nobody touches meanwhile.
                let result =
                    unsafe { sys::cuMemcpyDtoHAsync_v2(pointer(to.0).cast(), from.0, bytes, stream) };
                check("cuMemcpyDtoHAsync_v2", result)
            }
            Between::Device { to, from } => {
                // SAFETY: memory of the device alone.
                let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, stream) };
                check("cuMemcpyDtoDAsync_v2", result)
            }
        }
    }

    pub(super) fn fill(&mut self, address: DeviceAddress, bytes: usize, value: u8) -> Result<(), CudaError> {
        self.begin(Queue::Compute, None)?;
        let stream = self.streams[Queue::Compute as usize].0;
        // SAFETY: memory of the device alone.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address.0, value, bytes, stream) })
    }

    pub(super) fn launch(&mut self, queue: Queue, launch: &Launch) -> Result<(), CudaError> {
        self.begin(queue, None)?;
        let stream = &self.streams[queue as usize];
        self.modules.launch(launch, stream.0)?;
        if let Some(recording) = self.recording.as_mut().filter(|_| queue == Queue::Compute) {
            recording.launches.push(stream.last_node()?);
        }
        Ok(())
    }

    pub(super) fn library(&self) -> Result<String, String> {
        self.library.as_ref().map(Library::name).map_err(Clone::clone)
    }

    pub(super) fn multiply(&mut self, product: &MatrixProduct) -> Result<bool, CudaError> {
        if self.library.is_err() || !product.fits() {
            return Ok(false);
        }
        self.begin(Queue::Compute, None)?;
        let Ok(library) = &mut self.library else { return Ok(false) };
        library.multiply(product, self.streams[Queue::Compute as usize].0)
    }

    /// Notes an operation, with the pinned memory that it uses.
    fn begin(&mut self, queue: Queue, pinned: Option<(Range<u64>, Access)>) -> Result<(), CudaError> {
        if let Some(recording) = self.recording.as_mut().filter(|_| queue != Queue::Handoff) {
            assert!(queue == Queue::Compute, "an operation of the queue {queue:?} cannot be captured");
            recording.operations += 1;
            recording.pinned.extend(pinned);
            return Ok(());
        }
        if let Some((memory, access)) = &pinned {
            self.timeline.check(Accessor::Queue(queue), memory, *access, "copy");
        }
        if queue == Queue::Transfer {
            let [compute, transfer, _] = &self.streams;
            self.fork.record(compute)?;
            transfer.wait_for(&self.fork)?;
        }
        let number = self.timeline.begin(queue);
        if let Some((memory, access)) = pinned {
            self.timeline.uses(queue, number, memory, access);
        }
        Ok(())
    }

    pub(super) fn handoff_after_compute(&mut self) -> Result<(), CudaError> {
        self.check_not_recording("an order between queues");
        let [compute, _, handoff] = &self.streams;
        self.fork.record(compute)?;
        handoff.wait_for(&self.fork)?;
        self.timeline.handoff_after_compute();
        Ok(())
    }

    pub(super) fn ticket(&mut self, queue: Queue) -> Result<Ticket, CudaError> {
        self.check_not_recording_of(queue, "a ticket");
        self.forget_done(queue)?;
        let event = self.spare.pop().map_or_else(|| Event::new().map(Arc::new), Ok)?;
        event.record(&self.streams[queue as usize])?;
        self.numbers += 1;
        let ticket = Ticket { queue, number: self.numbers, moment: self.timeline.moment(queue) };
        self.tickets[queue as usize].push_back((ticket, event));
        Ok(ticket)
    }

    /// Tickets that nobody waits for would become more and more.
    fn forget_done(&mut self, queue: Queue) -> Result<(), CudaError> {
        while let Some((ticket, event)) = self.tickets[queue as usize].front() {
            if !event.is_done()? {
                break;
            }
            self.arrived(*ticket);
        }
        Ok(())
    }

    /// What to wait for; nothing when a ticket has come.
    pub(super) fn event(&self, ticket: Ticket) -> Option<Arc<Event>> {
        self.check_not_recording_of(ticket.queue, "waiting");
        let mut tickets = self.tickets[ticket.queue as usize].iter();
        tickets.find(|(it, _)| it.number == ticket.number).map(|(_, event)| Arc::clone(event))
    }

    /// A ticket has come, and so have all of its queue before it.
    pub(super) fn arrived(&mut self, ticket: Ticket) {
        self.timeline.host_saw(ticket.moment);
        let tickets = &mut self.tickets[ticket.queue as usize];
        while let Some((_, event)) = tickets.pop_front_if(|(it, _)| it.number <= ticket.number) {
            // One that somebody still waits for is not recorded anew.
            if Arc::strong_count(&event) == 1 {
                self.spare.push(event);
            }
        }
    }

    pub(super) fn is_done(&mut self, ticket: Ticket) -> Result<bool, CudaError> {
        let Some(event) = self.event(ticket).filter(|_| !self.timeline.is_over(ticket.moment)) else {
            return Ok(true);
        };
        let done = event.is_done()?;
        if done {
            self.arrived(ticket);
        }
        Ok(done)
    }

    pub(super) fn compute_after(&mut self, ticket: Ticket) -> Result<(), CudaError> {
        if let Some(event) = self.event(ticket) {
            self.streams[Queue::Compute as usize].wait_for(&event)?;
        }
        self.timeline.compute_after(ticket.moment);
        Ok(())
    }

    pub(super) fn synchronize(&mut self) -> Result<(), CudaError> {
        self.check_not_recording("waiting");
        for (queue, stream) in Queue::ALL.into_iter().zip(&self.streams) {
            stream.synchronize()?;
            self.timeline.host_saw(self.timeline.moment(queue));
        }
        Ok(())
    }

    // ---- Graphs -----------------------------------------------------------------------------------------------------------

    pub(super) fn begin_capture(&mut self) -> Result<(), CudaError> {
        self.check_not_recording("a capture");
        self.streams[Queue::Compute as usize].begin_capture()?;
        self.recording = Some(Recording::default());
        Ok(())
    }

    pub(super) fn end_capture(&mut self) -> Result<Graph, CudaError> {
        let recording = self.recording.take().expect("a capture ends that has begun");
        let stream = &self.streams[Queue::Compute as usize];
        let mut graph = stream.end_capture()?;
        assert!(recording.operations != 0, "a capture of nothing");
        let before = memory()?.free;
        stream.prepare(&mut graph)?;
        let bytes = before.saturating_sub(memory()?.free);
        self.numbers += 1;
        let launches = recording.launches.len();
        self.graphs.insert(self.numbers, Recorded { graph, recording });
        Ok(Graph { number: self.numbers, bytes, launches })
    }

    pub(super) fn replay(&mut self, graph: Graph) -> Result<(), CudaError> {
        self.check_not_recording("a replay");
        let Recorded { graph, recording } =
            self.graphs.get(&graph.number).expect("a graph is replayed that is there");
        for (memory, access) in &recording.pinned {
            let queue = Accessor::Queue(Queue::Compute);
            self.timeline.check(queue, memory, *access, "replay");
        }
        let number = self.timeline.begin(Queue::Compute);
        for (memory, access) in &recording.pinned {
            assert!(has(&self.pinned, memory), "replay with pinned memory that was given back");
            self.timeline.uses(Queue::Compute, number, memory.clone(), *access);
        }
        self.streams[Queue::Compute as usize].replay(graph)
    }

    pub(super) fn update(&mut self, graph: Graph, number: usize, launch: &Launch) -> Result<(), CudaError> {
        let Recorded { graph, recording } =
            self.graphs.get(&graph.number).expect("a graph is updated that is there");
        let node = recording.launches.get(number).expect("a launch is updated that the graph has");
        self.modules.update(graph.executable, *node, launch)
    }

    pub(super) fn free_graph(&mut self, graph: Graph) -> Result<(), CudaError> {
        self.check_not_recording("giving a graph back");
        self.graphs.remove(&graph.number).expect("a graph is given back that is there");
        Ok(())
    }

    // ---- Groups -----------------------------------------------------------------------------------------------------------

    /// Takes in a place in a group whose other ranks do the same.
    pub(super) fn add_member(
        &mut self,
        communicator: Communicator,
        rank: u32,
        ranks: u32,
    ) -> Result<Member, CudaError> {
        let room = self.allocate(Communicator::warm_up_bytes(ranks))?;
        let warm = communicator.warm_up(room, &self.streams[Queue::Compute as usize]);
        self.free(room)?;
        warm?;
        self.numbers += 1;
        self.members.insert(self.numbers, Some(communicator));
        Ok(Member { number: self.numbers, rank, ranks })
    }

    pub(super) fn collect(&mut self, member: Member, collective: Collective) -> Result<(), CudaError> {
        self.begin(Queue::Compute, None)?;
        let place = self.members.get(&member.number).expect("a rank that asks is in its group");
        let communicator = place.as_ref().ok_or(CudaError::GroupAbandoned)?;
        communicator.collect(collective, self.streams[Queue::Compute as usize].0)
    }

    pub(super) fn abandon(&mut self, member: Member) {
        if let Some(communicator) = self.members.get_mut(&member.number).and_then(Option::take) {
            communicator.abort();
        }
    }

    pub(super) fn leave(&mut self, member: Member) {
        self.check_not_recording("leaving a group");
        self.members.remove(&member.number).expect("a rank leaves its group once");
    }

    /// What another thread does about a handoff is none of a capture's business.
    fn check_not_recording_of(&self, queue: Queue, what: &str) {
        if queue != Queue::Handoff {
            self.check_not_recording(what);
        }
    }

    pub(super) fn check_not_recording(&self, what: &str) {
        assert!(self.recording.is_none(), "{what} cannot be captured");
    }

    fn pinned_range(&self, first: PinnedAddress, bytes: usize, operation: &str) -> Range<u64> {
        let memory = range(first.0, bytes);
        assert!(
            has(&self.pinned, &memory),
            "{operation} of {bytes} bytes at {first:?}, outside of every allocation of pinned memory"
        );
        memory
    }
}

/// In the context that the caller's thread has entered.
pub(super) fn memory() -> Result<MemoryInfo, CudaError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: writes two numbers.
    check("cuMemGetInfo_v2", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
    Ok(MemoryInfo { free, total })
}

/// Whether one of the allocations has these bytes.
fn has(pinned: &BTreeMap<u64, usize>, memory: &Range<u64>) -> bool {
    let before = pinned.range(..=memory.start).next_back();
    before.is_some_and(|(first, bytes)| memory.end <= first + *bytes as u64)
}

fn range(first: u64, bytes: usize) -> Range<u64> {
    first..first + bytes as u64
}

/// Where a pinned address is. Its provenance was exposed when it was allocated.
fn pointer(address: u64) -> *mut u8 {
    ptr::with_exposed_provenance_mut(usize::try_from(address).expect("an address of this host"))
}
