//! Handoffs to other hosts: one TCP connection per pair for control, one for data.

mod connection;
mod data;
mod frame;

pub(crate) use connection::{Connection, Loss, connect};
pub(crate) use data::DataConnection;
