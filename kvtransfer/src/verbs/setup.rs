//! From open devices to a connected transport: both sides make queue pairs, tell each other of them over the control
//! connection, and connect.

use std::net::IpAddr;
use std::sync::Arc;

use tidemill_kvtransfer_proto::path::{MAX_PATHS, PathEnd};

use super::checked::{Capacity, CompletionQueue, Connect};
use super::device::{Fabric, Nic, PortAddress};
use super::error::VerbsError;
use super::gid::GidRule;
use super::memory_region::{MemoryRegion, Reach};
use super::paths::{Path, Tag};
use super::queue_pair::{QueuePair, Remote};
use super::transport::RdmaTransport;
use crate::host;

/// One side's ends, not yet connected. The arena is registered for this peer alone, with keys of its own: they end
/// with the connection, whatever other peers do.
#[derive(Debug)]
pub(crate) struct Draft {
    ends: Vec<DraftEnd>,
    devices: Vec<DraftDevice>,
    retry: Retry,
}

/// How patient queue pairs are.
#[derive(Clone, Copy, Debug)]
struct Retry {
    timeout: u8,
    retries: u8,
}

struct DraftEnd {
    device: usize,
    pair: QueuePair<Tag>,
    first_packet: u32,
}

/// What the queue pairs on one device share.
struct DraftDevice {
    nic: Arc<Nic>,
    address: PortAddress,
    completions: Arc<CompletionQueue>,
    access: MemoryRegion,
}

/// What queue pairs are tuned by; measured in docs/performance.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Requests that one queue pair has room for.
    pub(crate) depth: u32,
    /// Every so many requests one announces its completion.
    pub(crate) signal_every: u32,
    /// Writes of at most so many bytes travel in their request.
    pub(crate) inline: u32,
    /// Neighbouring targets from so many sources become one request.
    pub(crate) gather: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { depth: 128, signal_every: 16, inline: 64, gather: 8 }
    }
}

impl Draft {
    /// Makes one end for each of `theirs`, or as many as this side wants when it is the first to speak. `local` is
    /// this side's address of the control connection. Registers memory, which takes long for much memory.
    pub(crate) fn new(
        fabric: &Fabric,
        local: Option<IpAddr>,
        theirs: Option<&[PathEnd]>,
        tuning: Tuning,
    ) -> Result<Self, VerbsError> {
        let rule = GidRule { index: fabric.config.gid_index, local, is_infiniband: false };
        let mut devices: Vec<(Arc<Nic>, PortAddress)> = Vec::new();
        for nic in &fabric.nics {
            let address = match nic.address(rule) {
                Ok(address) => address,
                Err(error) => {
                    tracing::warn!(device = nic.name(), error = error.to_line(), "a port is left out");
                    continue;
                }
            };
            let fits = |end: &PathEnd| end.is_infiniband == address.is_infiniband;
            if theirs.is_none_or(|theirs| theirs.iter().any(fits)) {
                devices.push((Arc::clone(nic), address));
            }
        }
        let wanted = theirs.map_or(devices.len() * fabric.config.queue_pairs, <[PathEnd]>::len);
        if devices.is_empty() || wanted == 0 || MAX_PATHS < wanted {
            return Err(VerbsError::Peer { what: "no ports of the same kind, or too many of them" });
        }
        let pairs_each = u32::try_from(wanted.div_ceil(devices.len())).expect("at most MAX_PATHS");
        let devices = devices
            .into_iter()
            .map(|(nic, address)| DraftDevice::new(nic, address, pairs_each * tuning.depth, fabric.lends))
            .collect::<Result<Vec<_>, _>>()?;
        let mut ends = Vec::new();
        for index in 0..wanted {
            let fits = |device: &DraftDevice| {
                theirs.is_none_or(|theirs| theirs[index].is_infiniband == device.address.is_infiniband)
            };
            let fitting: Vec<usize> = (0..devices.len()).filter(|&it| fits(&devices[it])).collect();
            let what = "a port of a kind that this side has not";
            let device = *fitting.get(index % fitting.len().max(1)).ok_or(VerbsError::Peer { what })?;
            ends.push(DraftEnd::new(device, &devices[device], tuning)?);
        }
        let retry = Retry { timeout: fabric.config.timeout, retries: fabric.config.retries };
        Ok(Self { ends, devices, retry })
    }

    /// What to tell the peer.
    pub(crate) fn ends(&self) -> Vec<PathEnd> {
        let end = |end: &DraftEnd| {
            let device = &self.devices[end.device];
            PathEnd {
                queue_pair: end.pair.number(),
                first_packet: end.first_packet,
                gid: device.address.gid.gid,
                lid: device.address.lid,
                is_infiniband: device.address.is_infiniband,
                mtu_log2: u8::try_from(device.address.mtu + 7).unwrap_or(0),
                reads: device.nic.limits.reads,
                arena_address: device.access.address(),
                arena_key: device.access.remote_key(),
            }
        };
        self.ends.iter().map(end).collect()
    }

    /// Connects to the ends of the peer, whose arena has `remote_len` bytes.
    pub(crate) fn connect(
        self,
        theirs: &[PathEnd],
        remote_len: u64,
        tuning: Tuning,
    ) -> Result<RdmaTransport, VerbsError> {
        if theirs.len() != self.ends.len() {
            return Err(VerbsError::Peer { what: "it has another number of ends" });
        }
        let mut paths = Vec::new();
        for (DraftEnd { device: queue, mut pair, first_packet }, their) in self.ends.into_iter().zip(theirs) {
            let device = &self.devices[queue];
            their.check().map_err(|what| VerbsError::Peer { what })?;
            if their.is_infiniband != device.address.is_infiniband {
                return Err(VerbsError::Peer { what: "it is on another kind of network" });
            }
            let needs_route = !their.is_infiniband || their.lid == 0;
            pair.connect(&Connect {
                port: device.nic.port(),
                gid_index: device.address.gid.index,
                gid: needs_route.then_some(their.gid),
                lid: their.lid,
                queue_pair: their.queue_pair,
                their_psn: their.first_packet,
                our_psn: first_packet,
                mtu: device.address.mtu.min(u32::from(their.mtu_log2) - 7),
                timeout: self.retry.timeout,
                retries: self.retry.retries,
                reads: device.nic.limits.reads.min(their.reads),
            })?;
            let remote = Remote { address: their.arena_address, key: their.arena_key };
            paths.push(Path::new(Arc::clone(&device.nic), queue, pair, remote, tuning)?);
        }
        let (queues, access) = self.devices.into_iter().map(|it| (it.completions, it.access)).unzip();
        Ok(RdmaTransport::new(paths, queues, access, remote_len))
    }
}

impl DraftDevice {
    fn new(nic: Arc<Nic>, address: PortAddress, completions: u32, lends: Reach) -> Result<Self, VerbsError> {
        let completions = CompletionQueue::new(nic.domain.context(), completions)?;
        let access = MemoryRegion::of_region(&nic.domain, nic.region(), lends)?;
        Ok(Self { nic, address, completions, access })
    }
}

impl DraftEnd {
    fn new(index: usize, device: &DraftDevice, tuning: Tuning) -> Result<Self, VerbsError> {
        let limits = device.nic.limits;
        let capacity = Capacity {
            depth: tuning.depth.min(limits.depth),
            gather: tuning.gather.min(limits.gather),
            inline: tuning.inline,
        };
        let make = |capacity| QueuePair::new(&device.nic, &device.completions, capacity, tuning.signal_every);
        // Some devices carry nothing in a request, and only say so by refusing.
        let pair = make(capacity).or_else(|_| make(Capacity { inline: 0, ..capacity }))?;
        let operation = "draw a random number";
        let token = host::token().map_err(|source| VerbsError::Call { operation, source })?;
        let first_packet = u32::try_from(token & 0xff_ffff).expect("24 bits");
        Ok(Self { device: index, pair, first_packet })
    }
}

impl std::fmt::Debug for DraftEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DraftEnd({:?})", self.pair)
    }
}

impl std::fmt::Debug for DraftDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DraftDevice({:?})", self.nic)
    }
}
