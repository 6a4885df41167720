//! Makes the decisions of `engine-core` happen on a device.
//!
//! One thread owns the device and loops: receive, plan (pure), run, apply, reply. This crate owns the device's
//! memory, reads a model folder into weights, and runs forward passes.
//!
//! **This crate must never** make a decision that `engine-core` could make, nor know text, JSON of the API, or HTTP.
#![deny(unsafe_code)]

mod boot;
mod device;
pub mod device_name;
mod draft_model;
mod driver;
pub mod engine;
mod fault;
mod forward;
pub mod gguf;
pub mod handle;
pub mod memory;
pub mod models;
pub mod network;
mod overlap;
mod requirements;
mod roles;
pub mod runner;
pub mod sampler;
mod verification;
pub mod weights;
