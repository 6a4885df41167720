//! A device that is not there: the emulator computes, and whatever is used wrongly is a panic that says what.
//!
//! Found out are: an address given back twice or never given out; memory or graphs that are never given back
//! ([`assert_nothing_left`](Fake::assert_nothing_left)), shares of other devices' memory among them; copies beyond an allocation or of what
//! nobody wrote, or to another device's memory after that was given back; kernels that
//! use memory which was given back; memory that the host, or the computation, touches while a copy uses it; what a capture cannot
//! record; replays that use memory which was given back, even where something else has its address now; and all that the
//! [emulator](super::emulator) finds in a kernel.
//!
//! Transfers are carried out as late as the order allows, so that whoever does not wait for one sees what was there before.

mod group;
mod memory;
mod operation;
mod product;
mod recording;
mod shared;
mod state;

use super::{
    Collective, ComputeCapability, CudaError, DeviceAddress, DeviceIdentity, Driver, Graph, GroupId, Launch,
    MatrixProduct, Member, MemoryInfo, PinnedAddress, Properties, Queue, Ticket,
    emulator::{Kernels, Order},
};
use group::Group;
use operation::Operation;
use state::State;
use std::{
    fmt,
    os::fd::OwnedFd,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// The device.
pub struct Fake {
    properties: Properties,
    /// Whether there is something to exchange numbers by.
    exchanges: bool,
    state: Mutex<State>,
}

/// How often a device was asked, by what it costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Memory taken, of either kind.
    pub allocations: usize,
    /// Kernels launched one by one.
    pub launches: usize,
    /// Products that the library was asked for one by one.
    pub products: usize,
    /// Exchanges with other devices, one by one.
    pub collectives: usize,
    /// Graphs replayed.
    pub replays: usize,
    /// Copies and fills asked for one by one.
    pub copies: usize,
    /// Times that the host waited: for a ticket, for everything, or for a download.
    pub waits: usize,
}

impl Fake {
    /// A device with 4 GiB of memory, whose threads take turns in this order.
    pub fn new(order: Order) -> Self {
        let properties = Properties {
            name: format!("emulated GPU, threads {order:?}"),
            compute_capability: ComputeCapability { major: 8, minor: 0 },
            multiprocessors: 2,
            memory_bandwidth: 0,
            shared_bytes: 227 << 10,
            identity: identity(),
        };
        Self { properties, exchanges: true, state: Mutex::new(State::new(order, 4 << 30)) }
    }

    /// With other kernels.
    #[must_use]
    pub fn with_kernels(self, kernels: Kernels) -> Self {
        self.state().kernels = kernels;
        self
    }

    /// With the instructions of another kind of GPU.
    #[must_use]
    pub fn with_compute_capability(mut self, capability: ComputeCapability) -> Self {
        self.properties.compute_capability = capability;
        self
    }

    /// With a library that multiplies matrices; without it there is none.
    #[must_use]
    pub fn with_library(self) -> Self {
        self.state().library = true;
        self
    }

    /// Without anything to exchange numbers with other devices by.
    #[must_use]
    pub fn without_exchange(mut self) -> Self {
        self.exchanges = false;
        self
    }

    /// Without memory that other processes can be given.
    #[must_use]
    pub fn without_sharing(self) -> Self {
        self.state().shares = false;
        self
    }

    /// With no way to the memory of another device.
    #[must_use]
    pub fn without_reach_of(self, other: &Self) -> Self {
        self.state().out_of_reach.push(other.properties.identity);
        self
    }

    /// With this much memory.
    #[must_use]
    pub fn with_capacity(self, bytes: usize) -> Self {
        self.state().capacity = bytes;
        self
    }

    /// From now on this many more calls succeed, of those that can fail; after them each one fails like this.
    pub fn fail_after(&self, calls: usize, error: CudaError) {
        self.state().failure = Some((calls, error));
    }

    /// What was launched so far, in order, by replays too.
    pub fn launches(&self) -> Vec<Launch> {
        self.state().launches.clone()
    }

    /// How often it was asked so far.
    pub fn calls(&self) -> Calls {
        self.state().calls
    }

    /// For each time that the host waited for a ticket: how many operations [`Queue::Compute`] had been asked for behind it, which the device
    /// goes on with meanwhile.
    pub fn waits(&self) -> Vec<u64> {
        self.state().waits.clone()
    }

    /// Panics when memory, a graph or a place in a group was not given back.
    pub fn assert_nothing_left(&self) {
        let state = self.state();
        let (left, pinned, graphs) = (state.device.left(), state.pinned.left(), state.graphs.len());
        assert!(state.members.is_empty(), "groups were not left: {:?}", state.members.keys());
        assert!(left.is_empty(), "memory was not given back: allocations of {left:?} bytes");
        assert!(pinned.is_empty(), "pinned memory was not given back: allocations of {pinned:?} bytes");
        assert!(
            graphs == 0 && state.recording.is_none(),
            "{graphs} graphs, or a capture, were not given back"
        );
    }

    fn meet(&self, member: Member, collective: Collective) -> Result<(), CudaError> {
        let (group, brought) = self.state().bring(member, collective);
        let outcome = group.collect(member.rank, member.ranks, collective, brought)?;
        self.state().take(member, collective, &outcome);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that looks for a panic goes on to use the device.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Fake {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<MemoryInfo, CudaError> {
        let mut state = self.state();
        state.count_down()?;
        Ok(MemoryInfo { free: state.free(), total: state.capacity })
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddress, CudaError> {
        self.state().allocate(bytes)
    }

    fn allocate_shareable(&self, bytes: usize) -> Result<DeviceAddress, CudaError> {
        self.state().allocate_shareable(bytes, self.properties.identity)
    }

    fn export(&self, address: DeviceAddress) -> Result<OwnedFd, CudaError> {
        self.state().export(address)
    }

    fn import(&self, memory: OwnedFd, bytes: usize, of: DeviceIdentity) -> Result<DeviceAddress, CudaError> {
        self.state().import(memory, bytes, of)
    }

    fn free(&self, address: DeviceAddress) -> Result<(), CudaError> {
        self.state().give_back(operation::Room::Device, address.0);
        Ok(())
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedAddress, CudaError> {
        self.state().allocate_pinned(bytes)
    }

    fn free_pinned(&self, address: PinnedAddress) -> Result<(), CudaError> {
        self.state().give_back(operation::Room::Pinned, address.0);
        Ok(())
    }

    fn write_pinned(&self, to: PinnedAddress, from: &[u8]) {
        self.state().write_pinned(to, from);
    }

    fn read_pinned(&self, to: &mut [u8], from: PinnedAddress) {
        self.state().read_pinned(to, from);
    }

    fn upload(&self, to: DeviceAddress, from: &[u8]) -> Result<(), CudaError> {
        self.state().upload(to, from)
    }

    fn download(&self, to: &mut [u8], from: DeviceAddress) -> Result<(), CudaError> {
        self.state().download(to, from)
    }

    fn start_upload(
        &self,
        queue: Queue,
        to: DeviceAddress,
        from: PinnedAddress,
        bytes: usize,
    ) -> Result<(), CudaError> {
        self.state().ask(queue, Operation::Upload { to, from, bytes })
    }

    fn start_download(
        &self,
        queue: Queue,
        to: PinnedAddress,
        from: DeviceAddress,
        bytes: usize,
    ) -> Result<(), CudaError> {
        self.state().ask(queue, Operation::Download { to, from, bytes })
    }

    fn copy(
        &self,
        queue: Queue,
        to: DeviceAddress,
        from: DeviceAddress,
        bytes: usize,
    ) -> Result<(), CudaError> {
        self.state().ask(queue, Operation::Copy { to, from, bytes })
    }

    fn fill(&self, to: DeviceAddress, bytes: usize, value: u8) -> Result<(), CudaError> {
        self.state().ask(Queue::Compute, Operation::Fill { to, bytes, value })
    }

    fn handoff_after_compute(&self) -> Result<(), CudaError> {
        self.state().handoff_after_compute()
    }

    fn launch_beside(&self, launch: &Launch) -> Result<(), CudaError> {
        self.state().ask(Queue::Handoff, Operation::Launch(*launch))
    }

    fn launch(&self, launch: &Launch) -> Result<(), CudaError> {
        self.state().ask(Queue::Compute, Operation::Launch(*launch))
    }

    fn library(&self) -> Result<String, String> {
        if self.state().library { Ok("plain loops".to_owned()) } else { Err("the fake has none".to_owned()) }
    }

    fn multiply(&self, product: &MatrixProduct) -> Result<bool, CudaError> {
        let mut state = self.state();
        if !state.library || !product.fits() {
            return Ok(false);
        }
        state.ask(Queue::Compute, Operation::Multiply(*product)).map(|()| true)
    }

    fn ticket(&self, queue: Queue) -> Result<Ticket, CudaError> {
        self.state().ticket(queue)
    }

    fn is_done(&self, ticket: Ticket) -> Result<bool, CudaError> {
        self.state().is_done(ticket)
    }

    fn wait(&self, ticket: Ticket) -> Result<(), CudaError> {
        self.state().wait(ticket)
    }

    fn compute_after(&self, ticket: Ticket) -> Result<(), CudaError> {
        self.state().compute_after(ticket)
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.state().synchronize()
    }

    fn begin_capture(&self) -> Result<(), CudaError> {
        self.state().begin_capture()
    }

    fn end_capture(&self) -> Result<Graph, CudaError> {
        self.state().end_capture()
    }

    fn replay(&self, graph: Graph) -> Result<(), CudaError> {
        let operations = self.state().replay(graph)?;
        operations.into_iter().try_for_each(|operation| match operation {
            Operation::Collect(member, collective) => self.meet(member, collective),
            operation => {
                self.state().next(operation);
                Ok(())
            }
        })
    }

    fn update(&self, graph: Graph, number: usize, launch: &Launch) -> Result<(), CudaError> {
        self.state().update(graph, number, launch)
    }

    fn free_graph(&self, graph: Graph) -> Result<(), CudaError> {
        self.state().free_graph(graph);
        Ok(())
    }

    fn exchange(&self) -> Result<String, String> {
        match self.exchanges {
            true => Ok("threads that meet".to_owned()),
            false => Err(CudaError::NoExchange { reason: "the fake has none".to_owned() }.to_string()),
        }
    }

    fn new_group(&self) -> Result<GroupId, CudaError> {
        self.state().new_group()
    }

    fn join(&self, group: &GroupId, rank: u32, ranks: u32) -> Result<Member, CudaError> {
        self.state().may_join()?;
        let group = Group::join(group, rank, ranks)?;
        Ok(self.state().add_member(group, rank, ranks))
    }

    fn collect(&self, member: Member, collective: Collective) -> Result<(), CudaError> {
        if self.state().may_meet(member, collective)? { self.meet(member, collective) } else { Ok(()) }
    }

    fn abandon(&self, member: Member) {
        self.state().group(member).abandon();
    }

    fn leave(&self, member: Member) -> Result<(), CudaError> {
        self.state().leave(member);
        Ok(())
    }
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fake").field("name", &self.properties.name).finish_non_exhaustive()
    }
}

/// Another one for each fake, in each process.
fn identity() -> DeviceIdentity {
    static FAKES_SO_FAR: AtomicU64 = AtomicU64::new(0);
    let number = FAKES_SO_FAR.fetch_add(1, Ordering::Relaxed);
    let mut identity = [0; 16];
    identity[..8].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
    identity[8..].copy_from_slice(&number.to_le_bytes());
    DeviceIdentity(identity)
}
