//! RDMA: writes that the device makes into the memory of another host, without its processor.
//!
//! ```text
//! raw       what the C header declares; libibverbs.so.1, found at run time
//! checked   objects with owners; calls that can fail
//! safe      memory_region, queue_pair: what was posted keeps its memory        device: what there is
//! logic     transport over paths, with striping, window; setup, renewal; gid and topology choose
//! ```
//!
//! Unsafe code ends at the safe layer. The proof of quiet that the protocol asks for is [`RdmaTransport::sever`]
//! followed by the drop of its [`Access`].
#![allow(unsafe_code)]

mod checked;
mod device;
mod error;
#[cfg(test)]
mod fetch_tests;
mod gid;
mod health;
#[cfg(test)]
mod measurement;
mod memory_region;
mod paths;
mod queue_pair;
mod raw;
mod registrar;
mod renewal;
#[cfg(test)]
mod renewal_tests;
mod setup;
mod striping;
#[cfg(test)]
mod tests;
mod topology;
mod transport;
mod window;

pub(crate) use device::{Fabric, Nic};
pub use device::{PortReport, RdmaConfig, ports};
pub use error::{Unavailable, VerbsError};
pub use gid::{GidEntry, GidKind, GidRule, choose_gid};
pub(crate) use registrar::{Drafting, Registrar};
pub(crate) use renewal::NotEnded;
pub(crate) use setup::Draft;
pub use topology::{DevicePlace, Distance, Place};
pub(crate) use transport::RdmaTransport;
