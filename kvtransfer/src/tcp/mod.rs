//! Handoffs to other hosts: one TCP connection per pair for control, one for data.

mod connection;
mod data;
mod frame;
mod outgoing;

pub(crate) use connection::{Connection, Loss, connect};
pub(crate) use data::DataConnection;
