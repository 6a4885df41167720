//! Memory that safe code cannot vouch for: KV blocks, which a peer may write, and files mapped instead of read.
//!
//! The only module of this crate that may use `unsafe`.
#![allow(unsafe_code, reason = "addresses of blocks and maps of files are made here and nowhere else")]

mod arena;
mod asked;
mod available;
mod device;
mod file_map;
mod shared_pool;
mod slices;

pub use arena::{Arena, block_shape};
pub use asked::Asked;
pub use available::available_bytes;
pub(crate) use device::Holder;
pub use device::{DeviceBuffer, DevicePool, PinnedBuffer, RankHeads};
pub use file_map::MappedFile;
pub(crate) use slices::Slice;
