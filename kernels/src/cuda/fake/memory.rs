//! Memory of the device, or what is pinned of the host's: what was taken, and which bytes of it somebody wrote.

use super::shared::SharedMemory;
use crate::cuda::{CudaError, DeviceIdentity, Launch, emulator::Emulator};
use std::{
    alloc::{Layout, alloc, dealloc},
    collections::BTreeMap,
    ops::Range,
    os::fd::OwnedFd,
};

/// All allocations of one kind.
pub(super) struct Memory {
    kind: &'static str,
    pub(super) emulator: Emulator,
    allocations: BTreeMap<u64, Allocation>,
    /// What was given back last. It is given out again, as devices do, so that whoever goes on to use it meets somebody else's bytes.
    last: Option<Allocation>,
    /// Allocations so far.
    taken: u64,
}

/// Which allocation, even where another one has its address later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AllocationId {
    address: u64,
    number: u64,
}

/// # Invariant
///
/// `first` is good for reads and writes of `bytes` bytes, which are initialised, until `drop`; only the device that has this value,
/// which is locked, gives it to anybody. Where it is shared, other devices access it too: those who use them keep each other apart, as on
/// real ones.
struct Allocation {
    first: *mut u8,
    bytes: usize,
    number: u64,
    origin: Origin,
}

/// Where the memory is from.
#[derive(Debug)]
enum Origin {
    Own,
    /// This device's, which others can be given.
    Shareable(SharedMemory),
    /// Another device's. Kept for its end.
    Imported(#[expect(dead_code, reason = "it is unmapped when it is dropped")] SharedMemory),
}

// SAFETY: an owned piece of memory, bound to no thread.
unsafe impl Send for Allocation {}

impl Memory {
    pub(super) fn new(kind: &'static str) -> Self {
        Self { kind, emulator: Emulator::new(), allocations: BTreeMap::new(), last: None, taken: 0 }
    }

    /// Sizes of what was not given back.
    pub(super) fn left(&self) -> Vec<usize> {
        self.allocations.values().map(|allocation| allocation.bytes).collect()
    }

    /// Bytes of this device that were not given back.
    pub(super) fn used(&self) -> usize {
        let own = self.allocations.values().filter(|it| !matches!(it.origin, Origin::Imported(_)));
        own.map(|allocation| allocation.bytes).sum()
    }

    /// # Panics
    ///
    /// When there are no bytes.
    pub(super) fn take(&mut self, bytes: usize) -> u64 {
        assert!(0 < bytes, "an allocation of no bytes");
        self.taken += 1;
        let mut allocation = match self.last.take_if(|last| last.bytes == bytes) {
            Some(last) => last,
            None => Allocation::new(bytes),
        };
        allocation.number = self.taken;
        allocation.forget();
        self.keep(allocation)
    }

    /// The same of memory that others can be given.
    ///
    /// # Panics
    ///
    /// When there are no bytes.
    pub(super) fn take_shareable(&mut self, bytes: usize, owner: DeviceIdentity) -> u64 {
        assert!(0 < bytes, "an allocation of no bytes");
        self.taken += 1;
        let memory = SharedMemory::new(bytes, owner);
        let (first, number) = (memory.first(), self.taken);
        let mut allocation = Allocation { first, bytes, number, origin: Origin::Shareable(memory) };
        allocation.forget();
        self.keep(allocation)
    }

    /// Takes a share of another device's memory.
    pub(super) fn import(
        &mut self,
        memory: OwnedFd,
        bytes: usize,
        owner: DeviceIdentity,
    ) -> Result<u64, CudaError> {
        let memory = SharedMemory::open(memory, bytes, owner)?;
        self.taken += 1;
        let (first, number) = (memory.first(), self.taken);
        let address = self.keep(Allocation { first, bytes, number, origin: Origin::Imported(memory) });
        // Its owner's business.
        self.set_written(&(address..address + bytes as u64));
        Ok(address)
    }

    /// # Panics
    ///
    /// When no memory that others can be given begins at the address, or some of it has not been written: nobody sees the writes of others.
    pub(super) fn export(&self, address: u64) -> OwnedFd {
        let all = self.all_of(address);
        let Origin::Shareable(memory) = &self.allocations[&address].origin else {
            panic!("export of memory at {address:#x} that is not shareable")
        };
        self.check_written(&all, "export");
        memory.descriptor()
    }

    fn keep(&mut self, allocation: Allocation) -> u64 {
        let bytes = allocation.bytes;
        // SAFETY: good for as long as it is in `allocations`; `give_back` removes it from the emulator first. The state is locked
        // while a launch runs, so that nothing else accesses it.
        unsafe { self.emulator.add(allocation.first, bytes) };
        let address = allocation.first.expose_provenance() as u64;
        self.allocations.insert(address, allocation);
        address
    }

    /// The bytes of the allocation that begins at an address.
    ///
    /// # Panics
    ///
    /// When none does.
    pub(super) fn all_of(&self, address: u64) -> Range<u64> {
        match self.allocations.get(&address) {
            Some(allocation) => address..address + allocation.bytes as u64,
            None => panic!("{} at {address:#x} is given back, and nothing was taken there", self.kind),
        }
    }

    /// Forgets the allocation at an address, which is there.
    pub(super) fn give_back(&mut self, address: u64) {
        if let Some(allocation) = self.allocations.remove(&address) {
            self.emulator.remove(allocation.first.addr());
            if let Origin::Own = allocation.origin {
                self.last = Some(allocation);
            }
        }
    }

    /// The allocation that has these bytes.
    ///
    /// # Panics
    ///
    /// When none has.
    pub(super) fn id_of(&self, memory: &Range<u64>, operation: &str) -> AllocationId {
        let (address, _) = self.find(memory, operation);
        self.id_at(address.addr() as u64).expect("just found")
    }

    /// The allocation that has the byte at an address, if any.
    pub(super) fn id_at(&self, address: u64) -> Option<AllocationId> {
        let (&first, allocation) = self.allocations.range(..=address).next_back()?;
        let within = address - first < allocation.bytes as u64;
        within.then_some(AllocationId { address: first, number: allocation.number })
    }

    /// The allocations that a kernel's parameters point to. Pairs of small numbers may look like an address, if hardly ever.
    pub(super) fn pointed_to(&self, launch: &Launch) -> Vec<AllocationId> {
        let words = launch.parameters().chunks_exact(size_of::<u64>());
        words.filter_map(|word| self.id_at(bytemuck::pod_read_unaligned(word))).collect()
    }

    /// Whether an allocation was not given back.
    pub(super) fn has(&self, id: AllocationId) -> bool {
        self.allocations.get(&id.address).is_some_and(|allocation| allocation.number == id.number)
    }

    /// # Panics
    ///
    /// When nobody wrote some of the bytes.
    pub(super) fn check_written(&self, memory: &Range<u64>, operation: &str) {
        let (first, offset) = self.find(memory, operation);
        let bytes = length(memory);
        let written = self.emulator.is_written(first.addr(), offset, bytes);
        assert!(written, "{operation} of {bytes} bytes at {:#x}, some of which nobody wrote", memory.start);
    }

    pub(super) fn set_written(&mut self, memory: &Range<u64>) {
        let (first, offset) = self.find(memory, "write");
        self.emulator.written(first.addr(), offset, length(memory));
    }

    /// A copy is under way to these bytes, until they are written.
    pub(super) fn set_in_flight(&mut self, memory: &Range<u64>) {
        let (first, offset) = self.find(memory, "write");
        self.emulator.in_flight(first.addr(), offset, length(memory));
    }

    /// Bytes at one place are as written as those at another.
    pub(super) fn set_as_at(&mut self, memory: &Range<u64>, from: u64) {
        let (first, offset) = self.find(memory, "copy");
        let (source, source_offset) = self.find(&(from..from + length(memory) as u64), "copy");
        self.emulator.copied((first.addr(), offset), (source.addr(), source_offset), length(memory));
    }

    pub(super) fn read(&self, memory: &Range<u64>) -> Vec<u8> {
        let (first, offset) = self.find(memory, "read");
        let mut bytes = vec![0; length(memory)];
        // SAFETY: `find` found so many bytes from `offset` on in the allocation.
        let first = unsafe { first.add(offset) };
        // SAFETY: as above; they are initialised, and a new vector overlaps nothing.
        unsafe { first.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    pub(super) fn write(&mut self, to: u64, from: &[u8]) {
        let (first, offset) = self.find(&(to..to + from.len() as u64), "write");
        // SAFETY: `find` found so many bytes from `offset` on in the allocation.
        let first = unsafe { first.add(offset) };
        // SAFETY: as above; no slice can overlap an allocation.
        unsafe { first.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
    }

    /// The allocation that has these bytes, and where in it they begin.
    fn find(&self, memory: &Range<u64>, operation: &str) -> (*mut u8, usize) {
        let bytes = length(memory);
        let found = self.allocations.range(..=memory.start).next_back().and_then(|(&first, allocation)| {
            let offset = usize::try_from(memory.start - first).ok()?;
            let fits = offset <= allocation.bytes && bytes <= allocation.bytes - offset;
            fits.then_some((allocation.first, offset))
        });
        found.unwrap_or_else(|| {
            panic!(
                "{operation} of {bytes} bytes at {:#x}, outside of every allocation of {}",
                memory.start, self.kind
            )
        })
    }
}

impl Allocation {
    fn new(bytes: usize) -> Self {
        let layout = Self::layout(bytes);
        // SAFETY: not of no bytes, which `take` refuses.
        let first = unsafe { alloc(layout) };
        assert!(!first.is_null(), "the host has no {bytes} bytes for the fake");
        // SAFETY: just allocated with so many bytes.
        unsafe { first.write_bytes(0, bytes) };
        Self { first, bytes, number: 0, origin: Origin::Own }
    }

    /// Makes every number in it a NaN, as f32, f16 and bf16.
    fn forget(&mut self) {
        // SAFETY: good for writes of so many bytes by the invariant.
        unsafe { self.first.write_bytes(0xff, self.bytes) };
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGNMENT).expect("fits the address space")
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Origin::Own = self.origin {
            // SAFETY: allocated in `new` with this layout, and not given back before.
            unsafe { dealloc(self.first, Self::layout(self.bytes)) };
        }
    }
}

fn length(memory: &Range<u64>) -> usize {
    usize::try_from(memory.end - memory.start).expect("memory of this host")
}

/// That of a GPU's allocations.
const ALIGNMENT: usize = 256;
