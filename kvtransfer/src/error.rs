//! Why an endpoint did not start, and why a peer cannot be reached.
//!
//! What goes wrong with a single handoff is [`tidemill_kvtransfer_proto::error::TransferError`].

use std::io;
use std::net::SocketAddr;

use tidemill_kvtransfer_proto::error::TransferError;

use crate::verbs::VerbsError;

/// An endpoint that did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// The address is taken, or not this machine's.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something that every process should be able to get.
    #[error("cannot {operation}")]
    System {
        /// What was attempted, as a verb phrase.
        operation: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// RDMA is required and cannot be had.
    #[error("RDMA is required and cannot be had: {}", source.to_line())]
    Rdma {
        /// Why.
        source: VerbsError,
    },
    /// Shared memory is the only way, and peers may not write.
    #[error("handoffs over shared memory are written by the peer, which this worker does not allow")]
    PullOverSharedMemory,
    /// The region is smaller than one block of the layout.
    #[error("a region of {region_bytes} bytes holds no block of {block_bytes} bytes")]
    Region {
        /// Size of the region.
        region_bytes: usize,
        /// Size of a block.
        block_bytes: usize,
    },
}

/// A measurement that came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// This side's end did not start.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No connection came about.
    #[error(transparent)]
    Meet(#[from] MeetError),
    /// A handoff failed.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The other side said nothing more.
    #[error("the other side fell silent")]
    Silent,
    /// The port for small packets, the one after that for handoffs, cannot be used.
    #[error("no connection for small packets at {address}")]
    Sink {
        /// Its address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something that every process should be able to get.
    #[error("the system refuses what every process should get")]
    System(#[source] io::Error),
}

/// A peer with which no connection came about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MeetError {
    /// Nobody answers there, or the connection broke.
    #[error("cannot be reached: {reason}")]
    Unreachable {
        /// How it showed.
        reason: String,
    },
    /// The two do not fit together: no later attempt can succeed.
    #[error("does not fit: {field}: {reason}")]
    Mismatch {
        /// The field of the handshake in which they differ.
        field: String,
        /// In which way.
        reason: String,
    },
    /// The way for data that is required cannot be set up.
    #[error("no way for data: {reason}")]
    Transport {
        /// What was tried and how it failed.
        reason: String,
    },
    /// Nothing was decided within the time given.
    #[error("not connected in time")]
    TimedOut,
}
