//! Memory that two processes of one host can see, and the ways it is handed from one to the other.
//!
//! This is the only room of the crate with unsafe code: everything above works with the checked methods of
//! [`Region`] and [`Slab`].
#![allow(unsafe_code)]

pub(crate) mod exchange;
mod mapping;
mod process;
mod region;
mod slab;
mod streaming;
mod transport;

pub(crate) use process::Process;
pub(crate) use region::RegionWriter;
pub use region::{Access, Pages, Region};
pub use slab::Slab;
pub(crate) use streaming::Next;
pub(crate) use transport::SharedMemoryTransport;
