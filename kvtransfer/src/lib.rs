//! Moves bytes of KV blocks between workers, over shared memory or TCP.
//!
//! **This crate must never know** a token or the name of a tensor: it sees ranges, epochs and bytes. What is
//! decided is decided in `tidemill-kvtransfer-proto`; here is the one driver that carries it out.
#![deny(unsafe_code)]

pub mod shm;

pub use shm::{Access, Region, Slab};
