//! What the thread does by this worker's device, where that has the blocks: who reaches whose, copies whose link is gone, digests.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use tidemill_kvtransfer_proto::endpoint_core::{ByDevice, DigestOrder};
use tidemill_kvtransfer_proto::layout::Bridge;
use tidemill_kvtransfer_proto::message::{Attach, Hello};

use super::Driver;
use super::lobby::attach_frame;
use super::peers::DataPath;
use crate::device::{DeviceBlocks, LONGEST_NOTE};
use crate::error::MeetError;
use crate::event::{DeviceWay, DeviceWays, HandoffEvent};
use crate::peer_copies::PeerCopies;
use crate::tcp::Loss;
use crate::verification::DeviceDigestJob;

/// The device, and what peers reach its blocks by.
#[derive(Debug)]
pub(super) struct OwnDevice {
    blocks: Arc<dyn DeviceBlocks>,
    /// Or why there is no such thing.
    exported: Result<(OwnedFd, Vec<u8>), String>,
}

impl OwnDevice {
    pub(super) fn new(blocks: Arc<dyn DeviceBlocks>) -> Self {
        let exported = blocks.export();
        if let Ok((_, note)) = &exported {
            assert!(note.len() <= LONGEST_NOTE, "a note of {} bytes", note.len());
        }
        if let Err(reason) = &exported {
            tracing::warn!(
                reason,
                "no peer reaches the blocks of this device: handoffs come through memory of the host"
            );
        }
        Self { blocks, exported }
    }
}

impl Driver {
    /// What is passed to a peer on this host: the region, and what it reaches the device's blocks by.
    pub(super) fn passed_memory(&self, attach: Attach) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
        let (mut bytes, mut fds) = (attach_frame(attach), vec![self.config.region.fd()]);
        if let Some(OwnDevice { exported: Ok((memory, note)), .. }) = &self.device {
            bytes.extend(note);
            fds.push(memory.as_fd());
        }
        (bytes, fds)
    }

    /// A way from this side's device to that of the peer, which has passed so much of it.
    pub(super) fn reach_device(
        &self,
        hello: &Hello,
        note: &[u8],
        memory: Option<OwnedFd>,
    ) -> Result<PeerCopies, String> {
        let Some(device) = &self.device else {
            return Err("this worker computes in memory of the host".to_owned());
        };
        let Some(memory) = memory else {
            return Err("the peer has no blocks in a device that it can share".to_owned());
        };
        if self.config.layout.bridge(&hello.layout) != Ok(Bridge::Identical) {
            return Err("layouts differ, and conversions are the host's".to_owned());
        }
        let blocks = device.blocks.import(memory, note)?;
        if blocks.bytes() < hello.blocks() * hello.layout.block_bytes() as u64 {
            return Err("the peer's device has fewer blocks than its region".to_owned());
        }
        Ok(PeerCopies::new(blocks))
    }

    /// Which way bytes go from device to device over a link, as both sides have said.
    pub(super) fn by_device(&self, path: &DataPath, peer_says: bool) -> ByDevice {
        let is_exported = self.device.as_ref().is_some_and(|device| device.exported.is_ok());
        let from_peer = peer_says && is_exported && matches!(path, DataPath::SharedMemory(_));
        ByDevice { to_peer: path.reaches_device(), from_peer }
    }

    /// Says how handoffs over a link get from and to the device, where there is one.
    pub(super) fn log_devices(&self, peer: &str, path: &DataPath, by_device: ByDevice) -> DeviceWays {
        if self.device.is_none() {
            return DeviceWays::default();
        }
        let way = |by_device| if by_device { DeviceWay::PeerCopy } else { DeviceWay::Staging };
        let ways = DeviceWays { to_peer: way(by_device.to_peer), from_peer: way(by_device.from_peer) };
        let (to_peer, from_peer) = (ways.to_peer.name(), ways.from_peer.name());
        match path.why_not_by_device() {
            Some(reason) => {
                tracing::info!(peer, to_peer, from_peer, reason, "how handoffs leave and reach the device")
            }
            None => tracing::info!(peer, to_peer, from_peer, "how handoffs leave and reach the device"),
        }
        ways
    }

    /// Goes on with copies whose link is gone, forgets those that have ended, and tells of a device that has failed.
    pub(super) fn watch_copies(&mut self) {
        let links = self.peers.values_mut().filter_map(|peer| peer.link.as_mut());
        let of_links = links.filter_map(|link| match &mut link.path {
            DataPath::SharedMemory(transport) => transport.take_news_of_failure(),
            DataPath::Rdma(_) | DataPath::Tcp(_) => None,
        });
        let failures: Vec<String> =
            of_links.chain(self.orphans.iter_mut().filter_map(PeerCopies::take_news_of_failure)).collect();
        for reason in failures {
            self.tell(HandoffEvent::DeviceFailed { reason });
        }
        let now = self.moment();
        for mut copies in std::mem::take(&mut self.orphans) {
            let mut done = Vec::new();
            copies.poll(&mut done);
            self.core.completed(&done, now);
            if !copies.is_over() {
                self.orphans.push(copies);
            }
        }
        self.act();
    }

    /// Whether the device does something that nothing announces the end of.
    pub(super) fn awaits_device(&self) -> bool {
        let copies = self
            .peers
            .values()
            .any(|peer| peer.link.as_ref().is_some_and(|link| link.path.has_device_copies()));
        let orphans = self.orphans.iter().any(PeerCopies::has_work);
        copies || orphans || !self.device_digesting.is_empty()
    }

    /// Digests of blocks that are in the device.
    pub(super) fn begin_device_digests(&mut self, order: DigestOrder) {
        // Without it links that need it are gone, and their handoffs with them.
        if let Some(device) = &self.device {
            self.device_digesting.push_back(DeviceDigestJob::new(order, Arc::clone(&device.blocks)));
        }
    }

    /// Goes on with the first of them; the device does one thing after the other.
    pub(super) fn take_device_digests(&mut self) {
        while let Some(mut job) = self.device_digesting.pop_front() {
            let (handoff, ticket) = job.name();
            if !self.core.wants_digests(handoff, ticket) {
                continue;
            }
            match job.advance() {
                Ok(Some(digests)) => {
                    self.core.digested(handoff, ticket, digests);
                    self.act();
                }
                Ok(None) => return self.device_digesting.push_front(job),
                Err(reason) => {
                    tracing::error!(reason, "digests of blocks in the device cannot be taken");
                    return self.tell(HandoffEvent::DeviceFailed { reason });
                }
            }
        }
    }

    /// Nothing uses the device any more when this returns.
    pub(super) fn let_go_of_device(&mut self) {
        let uses =
            |peer: &super::Peer| peer.link.as_ref().is_some_and(|link| link.by_device != ByDevice::default());
        let linked: Vec<u64> = self.peers.iter().filter(|(_, it)| uses(it)).map(|(&it, _)| it).collect();
        for instance in linked {
            self.lose(instance, &Loss::NoDevice);
        }
        // Handshakes may have taken hold of a peer's blocks; there will be others.
        let instances: Vec<u64> = self.peers.keys().copied().collect();
        for instance in instances {
            let Some(peer) = self.peers.get_mut(&instance) else { continue };
            if peer.inbound.take().is_some() {
                peer.contact.answer_ended();
            }
            if peer.dial.take().is_some() {
                let reason = Loss::NoDevice.to_string();
                self.dial_failed(instance, &MeetError::Unreachable { reason });
            }
        }
        let now = self.moment();
        for mut copies in std::mem::take(&mut self.orphans) {
            let mut done = Vec::new();
            copies.sever(&mut done);
            self.core.completed(&done, now);
        }
        self.act();
        self.device_digesting.clear();
        self.device = None;
        self.config.device = None;
    }
}
