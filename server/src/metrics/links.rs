//! Ways for KV cache between pairs of workers.

use metrics::{gauge, with_local_recorder};
use tidemill_engine::handle::PeerLink;

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
}
