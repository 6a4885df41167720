//! The operations on NVIDIA GPUs.
//!
//! The kernels are CUDA C++ in `kernels/cu`. What is launched, with which grid and parameters, is decided by pure functions
//! ([`launches`]) whose result is a value; a [`Driver`] carries it out: a GPU ([`gpu`]), whose driver and compiler are found at run
//! time, or in tests one that is not there ([`fake`]), which computes on the CPU, by the emulator in `kernels/cu/emulator`, and finds
//! out what is used wrongly.

mod collective;
mod driver;
#[cfg(all(feature = "emulator", not(no_cpp_compiler)))]
pub mod emulator;
mod error;
#[cfg(all(feature = "emulator", not(no_cpp_compiler)))]
pub mod fake;
pub mod gpu;
pub mod hopper;
pub mod images;
mod launch;
pub mod launches;
mod matrix_product;
mod parameters;
pub mod sources;
mod tensor_map;
mod timeline;
pub mod weights;

pub use collective::{Collective, GroupId, Member};
pub use driver::{
    DeviceAddress, DeviceIdentity, Driver, Graph, MemoryInfo, PinnedAddress, Properties, Queue, Ticket,
};
pub use error::{ComputeCapability, CudaError, CudaVersion};
pub use launch::{Launch, Parameters};
pub use matrix_product::MatrixProduct;
pub use parameters::*;
pub use tensor_map::TensorMap;
