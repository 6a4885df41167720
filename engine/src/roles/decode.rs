//! The decode side of handoffs: which requests wait for whose KV cache.

use tidemill_engine_core::request::RequestId;

/// A request whose KV cache comes from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Incoming {
    pub(crate) request: RequestId,
    /// Instance number of the prefill worker.
    pub(crate) peer: u64,
    /// Blocks of the sequence that were in the prefix cache, and do not come from the peer.
    pub(crate) cached: usize,
}
