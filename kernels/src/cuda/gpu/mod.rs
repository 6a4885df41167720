//! A real GPU, by NVIDIA's driver, which is found at run time.
//!
//! The driver keeps the order of each queue; what this file adds is the order between them, and who may touch pinned memory, by
//! the same [timeline](super::timeline) that the fake goes by.

mod compiler;
mod exchange;
mod library;
mod modules;
mod raw;
mod shareable;
mod state;
mod tensor_map;

pub use compiler::Nvrtc;

use super::{
    Collective, ComputeCapability, CudaError, DeviceAddress, DeviceIdentity, Driver, Graph, GroupId, Launch,
    MatrixProduct, Member, MemoryInfo, PinnedAddress, Properties, Queue, Ticket, images::Images,
};
use exchange::Communicator;
use modules::Modules;
use raw::{Context, Device};
use state::{Between, State};
use std::{
    fmt,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// A GPU that computes.
pub struct Gpu {
    device: Device,
    properties: Properties,
    compiled: usize,
    // Before the context, in which it has to be dropped.
    state: Mutex<State>,
    context: Context,
}

// SAFETY: handles of the driver, whose functions any thread may call that has entered the context, as every method does first. What
// changes is behind the mutex.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// What GPUs the driver sees, in its order, whether they are of use or not.
    ///
    /// # Errors
    ///
    /// Why there is no driver to ask.
    pub fn all() -> Result<Vec<Properties>, CudaError> {
        (0..raw::library()?).map(|index| Device::new(index)?.properties()).collect()
    }

    /// Whether a GPU has the instructions that our kernels take.
    ///
    /// # Errors
    ///
    /// [`CudaError::DeviceTooOld`].
    pub fn check(properties: &Properties) -> Result<(), CudaError> {
        let (found, name) = (properties.compute_capability, properties.name.clone());
        if found < OLDEST {
            return Err(CudaError::DeviceTooOld { name, found, needed: OLDEST });
        }
        Ok(())
    }

    /// Takes the GPU of this number, and compiles the kernels for it where `images` does not have them: the
    /// [usual folder](Images::usual_folder), if in doubt.
    ///
    /// # Errors
    ///
    /// Why it cannot compute.
    pub fn open(index: u32, images: Option<PathBuf>) -> Result<Self, CudaError> {
        let device = Device::new(index)?;
        let properties = device.properties()?;
        Self::check(&properties)?;
        let context = Context::new(device)?;
        let images = Images::new(images, properties.compute_capability);
        let modules = Modules::load(&images, properties.shared_bytes)?;
        let state = Mutex::new(State::new(modules)?);
        Ok(Self { device, properties, compiled: images.compiled(), state, context })
    }

    /// How many files of kernels were compiled, and not found on disk.
    pub const fn compiled(&self) -> usize {
        self.compiled
    }

    /// The calling thread's calls are for this GPU.
    fn enter(&self) -> Result<MutexGuard<'_, State>, CudaError> {
        self.context.enter()?;
        Ok(self.state())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Panics are for wrong use, and come before anything is changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Gpu {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<MemoryInfo, CudaError> {
        drop(self.enter()?);
        state::memory()
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddress, CudaError> {
        self.enter()?.allocate(bytes)
    }

    fn allocate_shareable(&self, bytes: usize) -> Result<DeviceAddress, CudaError> {
        self.enter()?.allocate_shareable(self.device, bytes)
    }

    fn export(&self, address: DeviceAddress) -> Result<OwnedFd, CudaError> {
        self.enter()?.shareable(address).export()
    }

    fn import(&self, memory: OwnedFd, bytes: usize, of: DeviceIdentity) -> Result<DeviceAddress, CudaError> {
        self.enter()?.import(self.device, &memory, bytes, of)
    }

    fn free(&self, address: DeviceAddress) -> Result<(), CudaError> {
        self.enter()?.free(address)
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedAddress, CudaError> {
        self.enter()?.allocate_pinned(bytes)
    }

    fn free_pinned(&self, address: PinnedAddress) -> Result<(), CudaError> {
        self.enter()?.free_pinned(address)
    }

    fn write_pinned(&self, to: PinnedAddress, from: &[u8]) {
        self.state().write_pinned(to, from);
    }

    fn read_pinned(&self, to: &mut [u8], from: PinnedAddress) {
        self.state().read_pinned(to, from);
    }

    fn upload(&self, to: DeviceAddress, from: &[u8]) -> Result<(), CudaError> {
        self.enter()?.upload(to, from)
    }

    fn download(&self, to: &mut [u8], from: DeviceAddress) -> Result<(), CudaError> {
        self.enter()?.download(to, from)
    }

    fn start_upload(
        &self,
        queue: Queue,
        to: DeviceAddress,
        from: PinnedAddress,
        bytes: usize,
    ) -> Result<(), CudaError> {
        self.enter()?.copy(queue, Between::Upload { to, from }, bytes)
    }

    fn start_download(
        &self,
        queue: Queue,
        to: PinnedAddress,
        from: DeviceAddress,
        bytes: usize,
    ) -> Result<(), CudaError> {
        self.enter()?.copy(queue, Between::Download { to, from }, bytes)
    }

    fn copy(
        &self,
        queue: Queue,
        to: DeviceAddress,
        from: DeviceAddress,
        bytes: usize,
    ) -> Result<(), CudaError> {
        self.enter()?.copy(queue, Between::Device { to, from }, bytes)
    }

    fn fill(&self, address: DeviceAddress, bytes: usize, value: u8) -> Result<(), CudaError> {
        self.enter()?.fill(address, bytes, value)
    }

    fn handoff_after_compute(&self) -> Result<(), CudaError> {
        self.enter()?.handoff_after_compute()
    }

    fn launch_beside(&self, launch: &Launch) -> Result<(), CudaError> {
        self.enter()?.launch(Queue::Handoff, launch)
    }

    fn launch(&self, launch: &Launch) -> Result<(), CudaError> {
        self.enter()?.launch(Queue::Compute, launch)
    }

    fn library(&self) -> Result<String, String> {
        self.state().library()
    }

    fn multiply(&self, product: &MatrixProduct) -> Result<bool, CudaError> {
        self.enter()?.multiply(product)
    }

    fn ticket(&self, queue: Queue) -> Result<Ticket, CudaError> {
        self.enter()?.ticket(queue)
    }

    fn is_done(&self, ticket: Ticket) -> Result<bool, CudaError> {
        self.enter()?.is_done(ticket)
    }

    fn wait(&self, ticket: Ticket) -> Result<(), CudaError> {
        let Some(event) = self.enter()?.event(ticket) else { return Ok(()) };
        // Other threads may ask meanwhile.
        event.wait()?;
        self.state().arrived(ticket);
        Ok(())
    }

    fn compute_after(&self, ticket: Ticket) -> Result<(), CudaError> {
        self.enter()?.compute_after(ticket)
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.enter()?.synchronize()
    }

    fn begin_capture(&self) -> Result<(), CudaError> {
        self.enter()?.begin_capture()
    }

    fn end_capture(&self) -> Result<Graph, CudaError> {
        self.enter()?.end_capture()
    }

    fn replay(&self, graph: Graph) -> Result<(), CudaError> {
        self.enter()?.replay(graph)
    }

    fn update(&self, graph: Graph, number: usize, launch: &Launch) -> Result<(), CudaError> {
        self.enter()?.update(graph, number, launch)
    }

    fn free_graph(&self, graph: Graph) -> Result<(), CudaError> {
        self.enter()?.free_graph(graph)
    }

    fn exchange(&self) -> Result<String, String> {
        Self::exchange_library()
    }

    fn new_group(&self) -> Result<GroupId, CudaError> {
        Self::unique_id()
    }

    fn join(&self, group: &GroupId, rank: u32, ranks: u32) -> Result<Member, CudaError> {
        self.context.enter()?;
        // Others may ask meanwhile.
        let communicator = Communicator::join(group, rank, ranks)?;
        self.enter()?.add_member(communicator, rank, ranks)
    }

    fn collect(&self, member: Member, collective: Collective) -> Result<(), CudaError> {
        self.enter()?.collect(member, collective)
    }

    fn abandon(&self, member: Member) {
        self.state().abandon(member);
    }

    fn leave(&self, member: Member) -> Result<(), CudaError> {
        self.enter()?.leave(member);
        Ok(())
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What follows is dropped in this context, once nothing is under way.
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        drop(self.context.enter().and_then(|()| state.synchronize()));
        state.give_all_back();
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("properties", &self.properties).finish_non_exhaustive()
    }
}

/// `cp.async`, and `mma` of bf16.
const OLDEST: ComputeCapability = ComputeCapability { major: 8, minor: 0 };
