//! Every decision of the engine.
//!
//! Scheduling, block accounting, prefix cache, routing and the way of a request as plain state and pure functions: the same code serves
//! production, the simulator and the planner, and any decision can be replayed from its inputs.
//!
//! **This crate must never** fail on I/O, read a clock, or draw a random number of its own.
#![forbid(unsafe_code)]

mod admission;
mod ahead;
pub mod blocks;
pub mod events;
pub mod handoff;
pub mod journey;
pub mod plan;
pub mod prefix_tree;
pub mod pushes;
pub mod request;
mod roster;
pub mod routing;
pub mod scheduler;
pub mod sequence;
pub mod simulator;
pub mod speculation;
pub mod staging;
mod step;
