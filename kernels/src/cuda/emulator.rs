//! The emulator of `kernels/cu/emulator`: CUDA kernels on the CPU, with every access to memory looked at.

use super::Launch;
use std::{
    ffi::{CStr, c_char},
    ptr::NonNull,
};

/// In which order the threads of a block, and blocks, get their turns. A right kernel does the same in any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As they are numbered.
    Forwards,
    /// The last first.
    Backwards,
    /// Another one for each seed.
    Random(u16),
}

impl Order {
    /// Some that are far from each other.
    pub const SOME: [Self; 4] = [Self::Forwards, Self::Backwards, Self::Random(1), Self::Random(2)];
}

/// Which kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// Those of Tidemill.
    Ours,
    /// Those with mistakes, for tests of the emulator itself.
    Planted,
}

/// What the emulator knows of one device's memory: which bytes there are, and who wrote them.
///
/// # Invariant
///
/// `memory` came from `tidemill_emulator_open` and is closed by `drop` alone. Every allocation that it knows is good for reads and
/// writes until it is removed.
#[derive(Debug)]
pub struct Emulator {
    memory: NonNull<RawMemory>,
}

// SAFETY: the memory's state belongs to this value alone; nothing in it is bound to a thread.
unsafe impl Send for Emulator {}

impl Emulator {
    /// Knows no memory yet.
    pub fn new() -> Self {
        // SAFETY: has no conditions.
        let memory = unsafe { tidemill_emulator_open() };
        Self { memory: NonNull::new(memory).expect("allocation aborts rather than fails") }
    }

    /// Makes an allocation known; nobody has written it yet.
    ///
    /// # Safety
    ///
    /// Until it is removed, the allocation is good for reads and writes by launches of this emulator, and nothing else
    /// accesses it while one runs.
    pub unsafe fn add(&mut self, first: *mut u8, bytes: usize) {
        // SAFETY: `memory` is open by the invariant; the allocation is good as the caller promises.
        unsafe { tidemill_emulator_add(self.memory.as_ptr(), first, bytes) };
    }

    /// Forgets the allocation at an address.
    pub fn remove(&mut self, first: usize) {
        // SAFETY: `memory` is open by the invariant; an unknown address is ignored.
        unsafe { tidemill_emulator_remove(self.memory.as_ptr(), first) };
    }

    /// Says that the host wrote a part of a known allocation.
    pub fn written(&mut self, first: usize, offset: usize, bytes: usize) {
        // SAFETY: `memory` is open by the invariant; the callee ends the process for an unknown address or a part beyond the end.
        unsafe { tidemill_emulator_written(self.memory.as_ptr(), first, offset, bytes) };
    }

    /// Says that a copy to a part of a known allocation is under way, until it is written.
    pub fn in_flight(&mut self, first: usize, offset: usize, bytes: usize) {
        // SAFETY: as in `written`.
        unsafe { tidemill_emulator_in_flight(self.memory.as_ptr(), first, offset, bytes) };
    }

    /// Says that bytes of one known allocation are as written as those of another: `(first, offset)` of each.
    pub fn copied(&mut self, to: (usize, usize), from: (usize, usize), bytes: usize) {
        // SAFETY: as in `written`.
        unsafe { tidemill_emulator_copied(self.memory.as_ptr(), to.0, to.1, from.0, from.1, bytes) };
    }

    /// Whether somebody wrote every byte of a part of a known allocation.
    pub fn is_written(&self, first: usize, offset: usize, bytes: usize) -> bool {
        // SAFETY: as in `written`.
        unsafe { tidemill_emulator_is_written(self.memory.as_ptr(), first, offset, bytes) }
    }

    /// Runs every thread of the grid.
    ///
    /// # Errors
    ///
    /// What the kernel did that it may not do, and where; or why it cannot run like this.
    pub fn launch(&mut self, kernels: Kernels, launch: &Launch, order: Order) -> Result<(), String> {
        let kernel = find(kernels, launch.kernel).ok_or_else(|| format!("no kernel {}", launch.kernel))?;
        let (expected, given) = (kernel.params_bytes, launch.parameters().len());
        if expected != given {
            return Err(format!("{} takes {expected} bytes of parameters, not {given}", launch.kernel));
        }
        let order = match order {
            Order::Forwards => 0,
            Order::Backwards => 1,
            Order::Random(seed) => 2 + u32::from(seed),
        };
        let mut message = [0u8; 512];
        // SAFETY: `memory` is open by the invariant, and its allocations are good; the kernel is one of the list, whose items live
        // forever; the parameters are as long as it expects; grid and block are three numbers each; the message has the given room.
        let fine = unsafe {
            tidemill_emulator_launch(
                self.memory.as_ptr(),
                kernel,
                launch.grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared_bytes,
                launch.parameters().as_ptr(),
                order,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        if fine {
            return Ok(());
        }
        let message = CStr::from_bytes_until_nul(&message).map(|text| text.to_string_lossy().into_owned());
        Err(message.unwrap_or_else(|_| "the emulator said nothing".to_owned()))
    }
}

impl Default for Emulator {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // SAFETY: opened by `new` and closed only here.
        unsafe { tidemill_emulator_close(self.memory.as_ptr()) };
    }
}

/// Names of all kernels.
pub fn names(kernels: Kernels) -> Vec<String> {
    list(kernels).map(|kernel| name(kernel).to_string_lossy().into_owned()).collect()
}

fn find(kernels: Kernels, wanted: &str) -> Option<&'static RawKernel> {
    list(kernels).find(|kernel| name(kernel).to_bytes() == wanted.as_bytes())
}

fn list(kernels: Kernels) -> impl Iterator<Item = &'static RawKernel> {
    let first = match kernels {
        // SAFETY: has no conditions.
        Kernels::Ours => unsafe { tidemill_emulator_kernels() },
        // SAFETY: has no conditions.
        Kernels::Planted => unsafe { tidemill_emulator_planted() },
    };
    let next = |kernel: *const RawKernel| {
        // SAFETY: null, or an item of a list of static variables that nothing writes once the process has started.
        unsafe { kernel.as_ref() }
    };
    std::iter::successors(next(first), move |kernel| next(kernel.next))
}

fn name(kernel: &RawKernel) -> &CStr {
    // SAFETY: a string literal of the kernel's file.
    unsafe { CStr::from_ptr(kernel.name) }
}

/// `emulator::Memory`
#[repr(C)]
struct RawMemory {
    _private: [u8; 0],
}

/// `emulator::Kernel`
#[repr(C)]
struct RawKernel {
    name: *const c_char,
    max_threads: u32,
    params_bytes: usize,
    run: unsafe extern "C" fn(*const u8),
    next: *const Self,
}

unsafe extern "C" {
    fn tidemill_emulator_kernels() -> *const RawKernel;
    fn tidemill_emulator_planted() -> *const RawKernel;
    fn tidemill_emulator_open() -> *mut RawMemory;
    fn tidemill_emulator_close(memory: *mut RawMemory);
    fn tidemill_emulator_add(memory: *mut RawMemory, first: *mut u8, bytes: usize);
    fn tidemill_emulator_remove(memory: *mut RawMemory, first: usize);
    fn tidemill_emulator_written(memory: *mut RawMemory, first: usize, offset: usize, bytes: usize);
    fn tidemill_emulator_in_flight(memory: *mut RawMemory, first: usize, offset: usize, bytes: usize);
    fn tidemill_emulator_copied(
        memory: *mut RawMemory,
        to_first: usize,
        to_offset: usize,
        from_first: usize,
        from_offset: usize,
        bytes: usize,
    );
    fn tidemill_emulator_is_written(
        memory: *mut RawMemory,
        first: usize,
        offset: usize,
        bytes: usize,
    ) -> bool;
    fn tidemill_emulator_launch(
        memory: *mut RawMemory,
        kernel: *const RawKernel,
        grid: *const u32,
        block: *const u32,
        shared_bytes: u32,
        parameters: *const u8,
        order: u32,
        message: *mut c_char,
        message_bytes: usize,
    ) -> bool;
}
