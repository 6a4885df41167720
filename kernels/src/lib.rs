//! Operations on device memory.
//!
//! `reference` (plain f32 loops) defines what is right; `cpu` is written for speed and agrees with it.
//!
//! **This crate must never know** a request, a policy or a layout rule: it gets pointers, strides and shapes, and
//! allocates nothing during a step.

pub mod kv;
