//! What whole-system tests share: real processes of the real binary, and a client that speaks to them over HTTP.
#![forbid(unsafe_code)]

pub mod client;
pub mod deployment;
pub mod fixtures;
pub mod lateness;
pub mod two_hosts;
