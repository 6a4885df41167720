//! Handshakes, made when a peer joins and never on a request's path.

use std::time::Duration;

use tidemill_kvtransfer::{Endpoint, PeerAddress};

use crate::handle::{Peer, PeerLink};

/// Meets all peers at once and says how each went.
pub(crate) fn meet(endpoint: &Endpoint, peers: Vec<Peer>) -> Vec<PeerLink> {
    let addresses = peers
        .into_iter()
        .map(|Peer { name, instance, address }| PeerAddress { name, instance, address })
        .collect();
    let met = endpoint.meet(addresses, PATIENCE);
    met.into_iter()
        .map(|met| PeerLink {
            name: met.name,
            bytes_per_second: met.outcome.as_ref().map_or(0.0, |link| link.bytes_per_second),
            transport: met
                .outcome
                .map(|link| link.transport.name().to_owned())
                .map_err(|error| error.to_string()),
        })
        .collect()
}

/// Twice what a handshake may take.
const PATIENCE: Duration = Duration::from_secs(4);
