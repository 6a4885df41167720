//! Handshakes, made when a peer joins and never on a request's path.

use std::time::Duration;

use tidemill_kvtransfer::{DeviceWays, Endpoint, PeerAddress};

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
            to_peer: direction(met.outcome.as_ref().map(|link| link.directions.to_peer)),
            from_peer: direction(met.outcome.as_ref().map(|link| link.directions.from_peer)),
            devices: met.outcome.as_ref().map(|link| link.devices).unwrap_or_default(),
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
                link.to_peer = direction::<()>(Ok(now.directions.to_peer));
                link.from_peer = direction::<()>(Ok(now.directions.from_peer));
                link.devices = now.devices;
            }
            None if link.transport.is_ok() => {
                link.transport = Err("the connection broke".to_owned());
                link.bytes_per_second = 0.0;
                link.is_fallback = false;
                link.devices = DeviceWays::default();
            }
            None => {}
        }
    }
}

/// Of a link that is up, whether blocks of one side can be made of the other's; without a link there is more to say.
fn direction<E>(found: Result<Result<(), &'static str>, E>) -> Result<(), String> {
    let mismatch = |field| format!("{field} differs, and nothing bridges that");
    found.map_or(Ok(()), |direction| direction.map_err(mismatch))
}

/// Twice what a handshake may take.
const PATIENCE: Duration = Duration::from_secs(4);
