//! Operations on device memory.
//!
//! [`reference`] (plain f32 loops) defines what is right; [`cpu`] and [`cuda`] are written for speed and agree with it.
//!
//! Every operation reduces a row in one fixed order, whatever else is in the step: the bits of a row depend neither on
//! the other rows, nor on how a prompt is cut into chunks, nor on the number of threads. Prefill and decode on two
//! workers therefore give the same tokens as one worker does.
//!
//! Lengths that do not fit together are bugs of the caller, and every operation panics on them.
//!
//! **This crate must never know** a request, a policy or a layout rule: it gets pointers, strides and shapes, and
//! allocates nothing during a step.

mod aligned;
pub mod cpu;
pub mod cuda;
pub mod kv;
mod kv_rows;
pub mod matrix;
pub mod reference;
pub mod step;

/// Items of tests that need the emulator: nothing where no C++ compiler was there to build it, which the build has said.
#[cfg(all(feature = "emulator", not(no_cpp_compiler)))]
#[macro_export]
macro_rules! where_emulated {
    ($($item:item)*) => { $($item)* };
}

/// Items of tests that need the emulator: nothing where no C++ compiler was there to build it, which the build has said.
#[cfg(all(feature = "emulator", no_cpp_compiler))]
#[macro_export]
macro_rules! where_emulated {
    ($($item:item)*) => {};
}

// Weights and stored KV are little-endian files and wires, used as they lie.
const _: () = assert!(cfg!(target_endian = "little"), "big-endian machines are not supported");
