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
            instance: met.instance,
            bytes_per_second: met.outcome.as_ref().map_or(0.0, |link| link.bytes_per_second),
            is_fallback: met.outcome.as_ref().is_ok_and(|link| link.is_fallback),
            transport: met
                .outcome
                .map(|link| link.transport.name().to_owned())
                .map_err(|error| error.to_string()),
        })
        .collect()
}

/// Brings what was said of connections up to date: they break, and peers make them too.
pub(crate) fn refresh(endpoint: &Endpoint, links: &mut [PeerLink]) {
    for link in links {
        match endpoint.link(link.instance) {
            Some(now) => {
                link.transport = Ok(now.transport.name().to_owned());
                link.bytes_per_second = now.bytes_per_second;
                link.is_fallback = now.is_fallback;
            }
            None if link.transport.is_ok() => {
                link.transport = Err("the connection broke".to_owned());
                link.bytes_per_second = 0.0;
                link.is_fallback = false;
            }
            None => {}
        }
    }
}

/// Twice what a handshake may take.
const PATIENCE: Duration = Duration::from_secs(4);
