//! The API in process, over a generator that runs in memory.

mod bad_requests;
mod chat;
mod completions;
mod docs;
pub(crate) mod memory_generator;
mod server;
pub(crate) mod support;
