//! What is asked of a device: memory, copies, launches, graphs of them.

use super::{
    Collective, ComputeCapability, CudaError, GroupId, Launch, MatrixProduct, Member, timeline::Moment,
};
use bytemuck::{AnyBitPattern, NoUninit};
use std::{fmt::Debug, os::fd::OwnedFd};

/// A place in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, AnyBitPattern, NoUninit)]
#[repr(transparent)]
pub struct DeviceAddress(pub u64);

impl DeviceAddress {
    /// No place: a parameter that may be left out.
    pub const NULL: Self = Self(0);

    /// A place some bytes further.
    #[must_use]
    pub const fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// A place in memory of the host that the device copies from and to while the host does something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PinnedAddress(pub(super) u64);

impl PinnedAddress {
    /// A place some bytes further.
    #[must_use]
    pub const fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// In which line an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Kernels, and the copies that belong to a step.
    Compute,
    /// Copies beside the computation, such as those of a handoff.
    Transfer,
    /// Copies to memory of other processes, and kernels that prove what they have brought: beside both others.
    Handoff,
}

impl Queue {
    /// How many there are.
    pub(super) const COUNT: usize = 3;
    /// All of them.
    pub(super) const ALL: [Self; Self::COUNT] = [Self::Compute, Self::Transfer, Self::Handoff];
}

/// The end of everything that was asked of a queue so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub(super) queue: Queue,
    /// Of the queue's tickets.
    pub(super) number: u64,
    pub(super) moment: Moment,
}

/// A recording of operations that can be asked for again at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Graph {
    pub(super) number: u64,
    /// Bytes of the device's memory that it takes, as near as the device tells.
    pub bytes: usize,
    /// Launches that were recorded.
    pub launches: usize,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// For people.
    pub name: String,
    /// Which instructions it has.
    pub compute_capability: ComputeCapability,
    /// Multiprocessors, each of which runs some blocks at a time.
    pub multiprocessors: u32,
    /// Bytes per second between its memory and its chip at best; zero where the device does not tell.
    pub memory_bandwidth: u64,
    /// Shared memory that a block can have at most, in bytes.
    pub shared_bytes: u32,
    /// What tells it from every other device, in all processes.
    pub identity: DeviceIdentity,
}

/// What tells a device from all others: the same in each process that sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIdentity(pub [u8; 16]);

/// A device's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// What could be taken now, in pieces.
    pub free: usize,
    /// All there is.
    pub total: usize,
}

/// Every call to a device goes through here, so that whatever runs on a GPU runs on the [`fake`](super::fake) as well.
///
/// # Order
///
/// There are three queues. Operations of one are carried out in the order of the calls. An operation of [`Queue::Transfer`] begins after
/// everything that was asked of [`Queue::Compute`] before it; one of [`Queue::Handoff`] only after what
/// [`handoff_after_compute`](Self::handoff_after_compute) has named, so that whichever thread asks for it, it need not wait for more. The
/// computation waits for either only where [`compute_after`](Self::compute_after) says so. [`upload`](Self::upload), [`download`](Self::download), [`fill`](Self::fill),
/// [`launch`](Self::launch), [`multiply`](Self::multiply), [`collect`](Self::collect) and [`replay`](Self::replay) belong to
/// [`Queue::Compute`].
///
/// An upload has read its source when it returns, a download has filled its target; everything else may still be under way.
/// The host waits for a part of it by a [`Ticket`], or for all by [`synchronize`](Self::synchronize). A ticket is for everything that
/// was asked of its queue before, and for what that comes after.
///
/// # Memory
///
/// Pinned memory belongs to the host, except while an operation that was asked for and not waited for uses it: then the host may not
/// write what is copied from, nor touch what is copied to, nor give it back. The same holds for the computation and
/// memory that a transfer uses.
///
/// Memory is given back by [`free`](Self::free) and [`free_pinned`](Self::free_pinned) alone, once nothing that was asked for uses it and
/// no graph that is still replayed does.
///
/// # Memory of other processes
///
/// Memory that was taken by [`allocate_shareable`](Self::allocate_shareable) can be [exported](Self::export), and a process that was passed the
/// descriptor can [import](Self::import) it: then [`Queue::Handoff`] copies to it. Each of the two gives its own share back by
/// [`free`](Self::free), in any order: the memory is there until both have. Who may write what of it and when is theirs to agree on.
///
/// # Graphs
///
/// Between [`begin_capture`](Self::begin_capture) and [`end_capture`](Self::end_capture) operations of [`Queue::Compute`] are
/// recorded instead of carried out: launches, products, collectives, fills, [`copy`](Self::copy), [`start_upload`](Self::start_upload) and
/// [`start_download`](Self::start_download). Everything else but access to pinned memory, and what is asked of [`Queue::Handoff`], may not be
/// asked for meanwhile. A replay uses
/// the addresses and numbers that were recorded, and reads pinned memory when it is carried out.
///
/// # Groups
///
/// Devices of one process that hold parts of one model are the ranks of a group, each asked by a thread of its own: what is asked of
/// one may wait for the others, and a device that stands alone waits for ever. So a rank that cannot go on, and whoever learns of it,
/// [abandons](Self::abandon) the group; then whatever waits for it ends, with an error.
///
/// A wrong address, length or order is a bug of the caller: the fake panics with what is wrong, a GPU may compute nonsense.
///
/// # Errors
///
/// Every method that can fail returns what the device says, also about what was asked for before.
#[expect(clippy::missing_errors_doc, reason = "the trait says it for all")]
pub trait Driver: Debug + Send + Sync {
    /// What the device is.
    fn properties(&self) -> &Properties;

    /// How much memory it has now.
    fn memory(&self) -> Result<MemoryInfo, CudaError>;

    /// Takes memory, aligned to 256 bytes, with undefined contents. Never of no bytes. [`CudaError::OutOfMemory`] leaves all as it was.
    fn allocate(&self, bytes: usize) -> Result<DeviceAddress, CudaError>;

    /// The same of memory that other processes of this host can be given, in whole pages of the device.
    /// [`CudaError::NotShareable`] where the device has none.
    fn allocate_shareable(&self, bytes: usize) -> Result<DeviceAddress, CudaError>;

    /// What another process imports shareable memory by.
    fn export(&self, address: DeviceAddress) -> Result<OwnedFd, CudaError>;

    /// Takes a share of memory that another process has exported: `bytes` bytes, as that had asked for, of a device which it names.
    /// [`CudaError::Unreachable`] when this device cannot copy to it.
    fn import(&self, memory: OwnedFd, bytes: usize, of: DeviceIdentity) -> Result<DeviceAddress, CudaError>;

    /// Gives memory back: an address that [`allocate`](Self::allocate), [`allocate_shareable`](Self::allocate_shareable) or
    /// [`import`](Self::import) returned, once.
    fn free(&self, address: DeviceAddress) -> Result<(), CudaError>;

    /// Takes memory of the host, aligned to 256 bytes, with undefined contents. Never of no bytes.
    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedAddress, CudaError>;

    /// Gives memory back: an address that [`allocate_pinned`](Self::allocate_pinned) returned, once.
    fn free_pinned(&self, address: PinnedAddress) -> Result<(), CudaError>;

    /// Writes pinned memory, at once.
    fn write_pinned(&self, to: PinnedAddress, from: &[u8]);

    /// Reads pinned memory, at once.
    fn read_pinned(&self, to: &mut [u8], from: PinnedAddress);

    /// Copies from the host.
    fn upload(&self, to: DeviceAddress, from: &[u8]) -> Result<(), CudaError>;

    /// Copies to the host, after everything that was asked of [`Queue::Compute`] before.
    fn download(&self, to: &mut [u8], from: DeviceAddress) -> Result<(), CudaError>;

    /// Copies from pinned memory.
    fn start_upload(
        &self,
        queue: Queue,
        to: DeviceAddress,
        from: PinnedAddress,
        bytes: usize,
    ) -> Result<(), CudaError>;

    /// Copies to pinned memory.
    fn start_download(
        &self,
        queue: Queue,
        to: PinnedAddress,
        from: DeviceAddress,
        bytes: usize,
    ) -> Result<(), CudaError>;

    /// Copies within the device's memory; the two parts do not overlap.
    fn copy(
        &self,
        queue: Queue,
        to: DeviceAddress,
        from: DeviceAddress,
        bytes: usize,
    ) -> Result<(), CudaError>;

    /// Sets bytes to one value.
    fn fill(&self, address: DeviceAddress, bytes: usize, value: u8) -> Result<(), CudaError>;

    /// What is asked of [`Queue::Handoff`] from now on comes after everything that was asked of [`Queue::Compute`] so far.
    fn handoff_after_compute(&self) -> Result<(), CudaError>;

    /// Runs a kernel in [`Queue::Handoff`].
    fn launch_beside(&self, launch: &Launch) -> Result<(), CudaError>;

    /// Runs a kernel.
    fn launch(&self, launch: &Launch) -> Result<(), CudaError>;

    /// What multiplies large matrices beside our kernels, or why nothing does.
    fn library(&self) -> Result<String, String>;

    /// Has the [library](Self::library) multiply matrices, none of which overlaps the result; `false` where there is none, or none that
    /// [takes](MatrixProduct::fits) the product: then nothing was asked for, and a kernel of ours is to do it. The same product is always
    /// answered alike, so that what is captured is what was tried before.
    fn multiply(&self, product: &MatrixProduct) -> Result<bool, CudaError>;

    /// The end of everything that was asked of a queue so far. Nothing needs to be given back.
    fn ticket(&self, queue: Queue) -> Result<Ticket, CudaError>;

    /// Whether it has come to the ticket. Does not wait.
    fn is_done(&self, ticket: Ticket) -> Result<bool, CudaError>;

    /// Waits until it has come to the ticket.
    fn wait(&self, ticket: Ticket) -> Result<(), CudaError>;

    /// What is asked of [`Queue::Compute`] from now on comes after the ticket. The host does not wait.
    fn compute_after(&self, ticket: Ticket) -> Result<(), CudaError>;

    /// Waits for everything that was asked for.
    fn synchronize(&self) -> Result<(), CudaError>;

    /// Records from now on.
    fn begin_capture(&self) -> Result<(), CudaError>;

    /// What was recorded, at least one operation. After an error nothing is recorded any more and no graph is left.
    fn end_capture(&self) -> Result<Graph, CudaError>;

    /// Carries out what was recorded.
    fn replay(&self, graph: Graph) -> Result<(), CudaError>;

    /// Gives the recorded launch of this number, counted from zero among launches, another grid and other parameters, for all
    /// replays from now on. The kernel and its block stay.
    fn update(&self, graph: Graph, number: usize, launch: &Launch) -> Result<(), CudaError>;

    /// Gives a graph back, once, when no replay is under way.
    fn free_graph(&self, graph: Graph) -> Result<(), CudaError>;

    /// What devices exchange numbers by, or why nothing does.
    fn exchange(&self) -> Result<String, String>;

    /// A group that nobody has joined yet.
    fn new_group(&self) -> Result<GroupId, CudaError>;

    /// Takes a place in a group, and waits until all `ranks` places are taken.
    fn join(&self, group: &GroupId, rank: u32, ranks: u32) -> Result<Member, CudaError>;

    /// Asks for what all ranks do together. It is done when all have asked for it.
    fn collect(&self, member: Member, collective: Collective) -> Result<(), CudaError>;

    /// Ends what this rank waits for in its group, and all that it asks of it from now on, with [`CudaError::GroupAbandoned`]. Any thread
    /// may ask for it, of each rank's device, that of the rank which failed first.
    fn abandon(&self, member: Member);

    /// Gives a place in a group back, once nothing that was asked of the group is under way and no graph uses it.
    fn leave(&self, member: Member) -> Result<(), CudaError>;
}
