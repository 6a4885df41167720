//! What both sides of a KV handoff agree on.
//!
//! Units, block layouts, control messages with their codec, and the state machines of the reservation (decode
//! side) and the sender (prefill side). Events go in, messages and writes come out.
//!
//! **This crate must never know** a socket, a thread, a clock, a random source or a device: the simulator drives
//! the very same code under a virtual clock.
#![forbid(unsafe_code)]

pub mod coalesce;
pub mod codec;
pub mod credit;
pub mod digest;
pub mod endpoint_core;
pub mod error;
pub mod extents;
pub mod handshake;
pub mod layout;
pub mod message;
pub mod path;
mod proof;
pub mod reservation;
pub mod sender;
pub mod simulated_wire;
pub mod transport;
pub mod units;

/// What the tests here share with those in `tests`, which know this crate by its name.
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod support;
#[cfg(test)]
extern crate self as tidemill_kvtransfer_proto;
