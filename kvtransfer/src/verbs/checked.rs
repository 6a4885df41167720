//! The library's objects with owners: each is made by a call that can fail, keeps alive what it was made from, and
//! is undone when it is dropped.
//!
//! Memory is still named by address here, so what could touch wrong memory is an `unsafe fn`. The safe layer above
//! ([`memory_region`](super::memory_region), [`queue_pair`](super::queue_pair)) holds the memory.

mod completion;
mod context;
mod event;
mod memory;
mod queue_pair;

pub(super) use completion::{CompletionQueue, WorkCompletion};
pub(super) use context::{Context, Domain, device_names};
pub(super) use event::DeviceEvent;
pub(super) use memory::Registration;
pub(super) use queue_pair::{Capacity, Connect, Gather, QueuePair, Request, RequestKind};

use super::raw::{Library, library};

/// For objects that exist: they were made by the library.
fn loaded() -> &'static Library {
    library().expect("an object of the library exists, so it is loaded")
}
