//! The operations on NVIDIA GPUs.
//!
//! The kernels are CUDA C++ in `kernels/cu`. What is launched, with which grid and parameters, is decided by pure functions
//! ([`launches`]) whose result is a value; a [`Driver`] carries it out. There is one driver for tests ([`fake`]), which computes on
//! the CPU, by the emulator in `kernels/cu/emulator`, and finds out what is used wrongly.

mod driver;
#[cfg(all(feature = "emulator", not(no_cpp_compiler)))]
pub mod emulator;
#[cfg(all(feature = "emulator", not(no_cpp_compiler)))]
pub mod fake;
mod launch;
pub mod launches;
mod parameters;

pub use driver::{CudaError, DeviceAddress, Driver};
pub use launch::{Launch, Parameters};
pub use parameters::*;
