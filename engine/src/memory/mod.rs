//! Memory that safe code cannot vouch for: KV blocks, which a peer may write, and files mapped instead of read.
//!
//! The only module of this crate that may use `unsafe`.
#![allow(unsafe_code, reason = "addresses of blocks and maps of files are made here and nowhere else")]

mod arena;
mod available;
mod device;
mod file_map;

pub use arena::{Arena, block_shape};
pub use available::available_bytes;
pub use device::{DeviceBuffer, DevicePool, PinnedBuffer};
pub use file_map::MappedFile;
