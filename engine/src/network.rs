//! What can be told of the ways between workers without running one: for `tidemill doctor`.

pub use tidemill_kvtransfer::error::ProbeError;
pub use tidemill_kvtransfer::pair_probe::{BLOCK_BYTES, LARGE_BYTES, Measured, PairReport, measure, serve};
pub use tidemill_kvtransfer::verbs::{PortReport, Unavailable, ports};

use crate::handle::TransportChoice;

/// The same choice as the endpoint calls it.
pub const fn choice(choice: TransportChoice) -> tidemill_kvtransfer::TransportChoice {
    match choice {
        TransportChoice::Auto => tidemill_kvtransfer::TransportChoice::Auto,
        TransportChoice::SharedMemory => tidemill_kvtransfer::TransportChoice::SharedMemory,
        TransportChoice::Rdma => tidemill_kvtransfer::TransportChoice::Rdma,
        TransportChoice::Tcp => tidemill_kvtransfer::TransportChoice::Tcp,
    }
}
