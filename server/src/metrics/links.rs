//! Ways for KV cache between pairs of workers.

use std::collections::BTreeSet;

use metrics::{gauge, with_local_recorder};
use tidemill_engine::handle::{DeviceWay, PeerLink};

use super::{Metrics, TRANSPORT_FALLBACK, names};

impl Metrics {
    /// Records how a worker is connected to its peers, and which of these connections have newly come about in a worse
    /// way than intended.
    pub(crate) fn record_links(&self, worker: &str, before: &[PeerLink], now: &[PeerLink]) {
        let is_in = |list: &[PeerLink], link: &PeerLink| {
            list.iter().any(|it| it.instance == link.instance && it.transport == link.transport)
        };
        for link in before.iter().filter(|link| !is_in(now, link)) {
            self.set_link(worker, link, 0.0);
        }
        self.set_device_ways(worker, before, now);
        for link in now {
            self.set_link(worker, link, link.bytes_per_second);
            if link.is_fallback && !is_in(before, link) {
                self.record_fallback(TRANSPORT_FALLBACK);
            }
        }
    }

    fn set_link(&self, worker: &str, link: &PeerLink, bytes_per_second: f64) {
        let Ok(transport) = &link.transport else { return };
        let labels =
            [("worker", worker.to_owned()), ("peer", link.name.clone()), ("transport", transport.clone())];
        with_local_recorder(&self.recorder, || gauge!(names::LINK_SPEED, &labels).set(bytes_per_second));
    }

    /// Of a worker that computes in memory of the host nothing is said.
    fn set_device_ways(&self, worker: &str, before: &[PeerLink], now: &[PeerLink]) {
        let ways =
            |link: &PeerLink| [("to_peer", link.devices.to_peer), ("from_peer", link.devices.from_peer)];
        let told = |links: &[PeerLink]| -> BTreeSet<(String, &str, DeviceWay)> {
            let all = links.iter().flat_map(|link| ways(link).map(|(to, way)| (link.name.clone(), to, way)));
            all.filter(|(_, _, way)| *way != DeviceWay::NoDevice).collect()
        };
        let (before, now) = (told(before), told(now));
        let changes = before.difference(&now).map(|it| (it, 0.0)).chain(now.iter().map(|it| (it, 1.0)));
        for ((peer, direction, way), value) in changes {
            let labels = [
                ("worker", worker.to_owned()),
                ("peer", peer.clone()),
                ("direction", (*direction).to_owned()),
                ("way", way.name().to_owned()),
            ];
            with_local_recorder(&self.recorder, || gauge!(names::DEVICE_WAY, &labels).set(value));
        }
    }
}
