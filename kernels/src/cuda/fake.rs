//! A device that is not there: the emulator computes, and whatever is used wrongly is a panic that says what.
//!
//! Found out are: an address given back twice or never given out, memory that is never given back
//! ([`assert_nothing_left`](Fake::assert_nothing_left)), copies beyond an allocation, downloads of what nobody wrote, kernels that
//! use memory which was given back, and all that the [emulator](super::emulator) finds in a kernel.

use super::{
    CudaError, DeviceAddress, Driver, Launch,
    emulator::{Emulator, Kernels, Order},
};
use std::{
    alloc::{Layout, alloc, dealloc},
    collections::BTreeMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The device.
pub struct Fake {
    order: Order,
    kernels: Kernels,
    capacity: usize,
    state: Mutex<State>,
}

struct State {
    emulator: Emulator,
    allocations: BTreeMap<u64, Allocation>,
    launches: Vec<Launch>,
}

/// Memory of the device.
///
/// # Invariant
///
/// `first` is good for reads and writes of `bytes` bytes until `drop`; only the device that has this value, which is locked, gives
/// it to anybody.
struct Allocation {
    first: *mut u8,
    bytes: usize,
}

// SAFETY: an owned piece of memory, bound to no thread.
unsafe impl Send for Allocation {}

impl Fake {
    /// A device with 4 GiB of memory, whose threads take turns in this order.
    pub fn new(order: Order) -> Self {
        let state = State { emulator: Emulator::new(), allocations: BTreeMap::new(), launches: Vec::new() };
        Self { order, kernels: Kernels::Ours, capacity: 4 << 30, state: Mutex::new(state) }
    }

    /// With other kernels.
    #[must_use]
    pub fn with_kernels(self, kernels: Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// With this much memory.
    #[must_use]
    pub fn with_capacity(self, bytes: usize) -> Self {
        Self { capacity: bytes, ..self }
    }

    /// What was launched so far, in order.
    pub fn launches(&self) -> Vec<Launch> {
        self.state().launches.clone()
    }

    /// Panics when memory was not given back.
    pub fn assert_nothing_left(&self) {
        let state = self.state();
        let left: Vec<usize> = state.allocations.values().map(|allocation| allocation.bytes).collect();
        assert!(left.is_empty(), "memory was not given back: allocations of {left:?} bytes");
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that looks for a panic goes on to use the device.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Fake {
    fn describe(&self) -> String {
        format!("emulated GPU, threads {:?}", self.order)
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceAddress, CudaError> {
        assert!(0 < bytes, "an allocation of no bytes");
        let mut state = self.state();
        let taken: usize = state.allocations.values().map(|allocation| allocation.bytes).sum();
        if self.capacity - taken < bytes {
            return Err(CudaError::OutOfMemory { bytes });
        }
        let allocation = Allocation::new(bytes);
        // SAFETY: good for as long as it is in `allocations`; `free` removes it from the emulator first. The state is locked while a
        // launch runs, so that nothing else accesses it.
        unsafe { state.emulator.add(allocation.first, bytes) };
        let address = allocation.first.expose_provenance() as u64;
        state.allocations.insert(address, allocation);
        Ok(DeviceAddress(address))
    }

    fn free(&self, address: DeviceAddress) -> Result<(), CudaError> {
        let mut state = self.state();
        let allocation = state.allocations.remove(&address.0);
        let allocation =
            allocation.unwrap_or_else(|| panic!("{address:?} is given back, and nothing was taken there"));
        state.emulator.remove(allocation.first.addr());
        Ok(())
    }

    fn upload(&self, to: DeviceAddress, from: &[u8]) -> Result<(), CudaError> {
        let mut state = self.state();
        let first = state.written(to, from.len(), "upload");
        // SAFETY: `written` found room for so many bytes in an allocation, which no slice can overlap.
        unsafe { first.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    fn download(&self, to: &mut [u8], from: DeviceAddress) -> Result<(), CudaError> {
        let state = self.state();
        let bytes = to.len();
        let (allocation, offset) = state.find(from, bytes, "download");
        let written = state.emulator.is_written(allocation.addr(), offset, bytes);
        assert!(written, "download of {bytes} bytes at {from:?}, some of which nobody wrote");
        // SAFETY: `find` found so many bytes from `offset` on in the allocation.
        let first = unsafe { allocation.add(offset) };
        // SAFETY: as above; allocations are initialised when they are made, and no slice can overlap them.
        unsafe { first.copy_to_nonoverlapping(to.as_mut_ptr(), bytes) };
        Ok(())
    }

    fn fill(&self, address: DeviceAddress, bytes: usize, value: u8) -> Result<(), CudaError> {
        let first = self.state().written(address, bytes, "fill");
        // SAFETY: `written` found room for so many bytes in an allocation.
        unsafe { first.write_bytes(value, bytes) };
        Ok(())
    }

    fn launch(&self, launch: &Launch) -> Result<(), CudaError> {
        let mut state = self.state();
        state.launches.push(*launch);
        let outcome = state.emulator.launch(self.kernels, launch, self.order);
        outcome.unwrap_or_else(|reason| panic!("{reason}"));
        Ok(())
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        Ok(())
    }
}

impl State {
    /// The allocation that has these bytes, and where in it they begin.
    fn find(&self, address: DeviceAddress, bytes: usize, operation: &str) -> (*mut u8, usize) {
        let found = self.allocations.range(..=address.0).next_back().and_then(|(&first, allocation)| {
            let offset = usize::try_from(address.0 - first).ok()?;
            let fits = offset <= allocation.bytes && bytes <= allocation.bytes - offset;
            fits.then_some((allocation.first, offset))
        });
        found.unwrap_or_else(|| {
            panic!("{operation} of {bytes} bytes at {address:?}, outside of every allocation")
        })
    }

    /// Where the bytes are, which the host writes now.
    fn written(&mut self, address: DeviceAddress, bytes: usize, operation: &str) -> *mut u8 {
        let (allocation, offset) = self.find(address, bytes, operation);
        self.emulator.written(allocation.addr(), offset, bytes);
        // SAFETY: `find` found so many bytes from `offset` on in the allocation.
        unsafe { allocation.add(offset) }
    }
}

impl Allocation {
    fn new(bytes: usize) -> Self {
        let layout = Self::layout(bytes);
        // SAFETY: not of no bytes, which `allocate` refuses.
        let first = unsafe { alloc(layout) };
        assert!(!first.is_null(), "the host has no {bytes} bytes for the fake");
        // As f32, f16 and bf16 a NaN.
        // SAFETY: just allocated with so many bytes.
        unsafe { first.write_bytes(0xff, bytes) };
        Self { first, bytes }
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGNMENT).expect("fits the address space")
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and not given back before.
        unsafe { dealloc(self.first, Self::layout(self.bytes)) };
    }
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fake")
            .field("order", &self.order)
            .field("kernels", &self.kernels)
            .finish_non_exhaustive()
    }
}

/// That of a GPU's allocations.
const ALIGNMENT: usize = 256;
