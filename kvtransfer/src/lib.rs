//! Moves bytes of KV blocks between workers, over shared memory or TCP.
//!
//! **This crate must never know** a token or the name of a tensor: it sees ranges, epochs and bytes. What is
//! decided is decided in `tidemill-kvtransfer-proto`; here is the one driver that carries it out.
//!
//! An [`Endpoint`] is both sides at once. A handoff, seen from outside:
//!
//! ```text
//! decode engine                 decode endpoint      prefill endpoint                prefill engine
//!   reserve ───────────────────► Reserve ──────────────►            ◄──────────────── expect
//!                                                        Reserved ─────────────────►
//!                                          ◄────── bytes ◄─────────────────────────── push …, or computed in place
//!                                          ◄───── Commit ◄─────────────────────────── finish
//!   Committed ◄───────────────── digests match
//!   adopt ─────────────────────► Adopted ──────────────► Delivered ────────────────►
//! ```
#![deny(unsafe_code)]

#[cfg(test)]
mod conformance;
pub mod device;
mod driver;
mod endpoint;
pub mod error;
mod event;
mod host;
pub mod pair_probe;
mod peer_copies;
pub mod shm;
mod source;
mod tail;
mod tcp;
pub mod verbs;
mod verification;

pub use driver::Watch;
pub use endpoint::{
    DEFAULT_CREDIT, Endpoint, EndpointConfig, EventSink, HandoffMode, Timing, TransportChoice,
};
pub use event::{
    DeviceWay, DeviceWays, HandoffEvent, HandoffStats, Met, Path, PeerAddress, PeerLink, PushWrite, Reserve,
    Reserved, Source,
};
pub use shm::{Access, Pages, Region, Slab};
pub use tail::{Tail, TailPiece};
pub use verbs::RdmaConfig;
