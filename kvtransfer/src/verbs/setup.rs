//! From open devices to a connected transport: both sides make queue pairs, tell each other of them over the control
//! connection, and connect.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use tidemill_kvtransfer_proto::path::{MAX_PATHS, PathEnd};

use super::checked::{Capacity, CompletionQueue, Connect};
use super::device::{Fabric, Nic, PortAddress};
use super::error::VerbsError;
use super::gid::GidRule;
use super::memory_region::{MemoryRegion, Reach};
use super::paths::{Path, Tag};
use super::queue_pair::QueuePair;
use super::transport::RdmaTransport;
use crate::host;

/// One side's ends, not yet connected. The arena is registered for this peer alone, with keys of its own: they end
/// with the connection, whatever other peers do.
#[derive(Debug)]
pub(crate) struct Draft {
    ends: Vec<DraftEnd>,
    devices: Vec<DraftDevice>,
    terms: Terms,
}

/// How ends are made, at first and anew.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    tuning: Tuning,
    /// Which address of a port is taken.
    rule: GidRule,
    /// How patient queue pairs are.
    timeout: u8,
    retries: u8,
}

/// An end that is not connected.
pub(super) struct End {
    pair: QueuePair<Tag>,
    first_packet: u32,
    address: PortAddress,
}

struct DraftEnd {
    device: usize,
    /// `None` while one of the two ports is down: the path is made anew when both are up.
    end: Option<End>,
}

/// What the queue pairs on one device share.
struct DraftDevice {
    nic: Arc<Nic>,
    is_infiniband: bool,
    /// `None` while it is down.
    address: Option<PortAddress>,
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
        let terms = Terms { tuning, rule, timeout: fabric.config.timeout, retries: fabric.config.retries };
        let mut devices: Vec<(Arc<Nic>, bool)> = Vec::new();
        for nic in &fabric.nics {
            let is_infiniband = match nic.is_infiniband() {
                Ok(kind) => kind,
                Err(error) => {
                    tracing::warn!(device = nic.name(), error = error.to_line(), "a device is left out");
                    continue;
                }
            };
            let fits = |end: &PathEnd| end.is_infiniband == is_infiniband;
            if theirs.is_none_or(|theirs| theirs.iter().any(fits)) {
                devices.push((Arc::clone(nic), is_infiniband));
            }
        }
        let wanted = theirs.map_or(devices.len() * fabric.config.queue_pairs, <[PathEnd]>::len);
        if devices.is_empty() || wanted == 0 || MAX_PATHS < wanted {
            return Err(VerbsError::Peer { what: "no ports of the same kind, or too many of them" });
        }
        // One device can get them all.
        let completions = u32::try_from(wanted).expect("at most MAX_PATHS") * tuning.depth;
        let devices = devices
            .into_iter()
            .map(|(nic, is_infiniband)| DraftDevice::new(nic, is_infiniband, rule, completions, fabric.lends))
            .collect::<Result<Vec<_>, _>>()?;
        let is_theirs_up = |index: usize| theirs.is_none_or(|theirs| theirs[index].queue_pair.is_some());
        let can_begin = |places: &Vec<usize>| {
            places
                .iter()
                .zip(0..)
                .any(|(&place, index)| devices[place].address.is_some() && is_theirs_up(index))
        };
        // A port that is down keeps its place, so that ends on both sides meet that are on one wire: the order of ports is
        // the same then whichever are up. Unless nothing would work so.
        let places = places(&devices, wanted, theirs, |_| true).filter(can_begin);
        let places = places
            .or_else(|| self::places(&devices, wanted, theirs, |device| device.address.is_some()))
            .filter(can_begin)
            .ok_or(VerbsError::Peer { what: "no two ports of one kind that are up" })?;
        let mut ends = Vec::new();
        for (device, index) in places.into_iter().zip(0..) {
            let DraftDevice { nic, address, completions, .. } = &devices[device];
            let end = match address.filter(|_| is_theirs_up(index)) {
                Some(address) => Some(End::new(nic, address, completions, &terms)?),
                None => None,
            };
            ends.push(DraftEnd { device, end });
        }
        Ok(Self { ends, devices, terms })
    }

    /// What to tell the peer.
    pub(crate) fn ends(&self) -> Vec<PathEnd> {
        let end = |DraftEnd { device, end }: &DraftEnd| {
            let DraftDevice { nic, access, is_infiniband, .. } = &self.devices[*device];
            match end {
                Some(end) => end.describe(nic, access),
                None => End::none(*is_infiniband, nic, access),
            }
        };
        self.ends.iter().map(end).collect()
    }

    /// Connects to the ends of the peer, whose arena has `remote_len` bytes.
    pub(crate) fn connect(self, theirs: &[PathEnd], remote_len: u64) -> Result<RdmaTransport, VerbsError> {
        if theirs.len() != self.ends.len() {
            return Err(VerbsError::Peer { what: "it has another number of ends" });
        }
        let mut paths = Vec::new();
        for (DraftEnd { device: queue, end }, their) in self.ends.into_iter().zip(theirs) {
            let nic = &self.devices[queue].nic;
            let pair = match end {
                Some(end) if their.queue_pair.is_some() => Some(end.connect(nic, their, &self.terms)?),
                _ => None,
            };
            paths.push(Path::new(Arc::clone(nic), queue, pair, their, self.terms.tuning)?);
        }
        if paths.iter().all(Path::is_closed) {
            return Err(VerbsError::Peer { what: "no two ports of one kind that are up" });
        }
        let (queues, access) = self.devices.into_iter().map(|it| (it.completions, it.access)).unzip();
        Ok(RdmaTransport::new(paths, queues, access, remote_len, self.terms))
    }
}

/// Which of the devices each end is on: those of the end's kind in turn. `None` when there is none for one of them.
fn places(
    devices: &[DraftDevice],
    wanted: usize,
    theirs: Option<&[PathEnd]>,
    is_usable: impl Fn(&DraftDevice) -> bool,
) -> Option<Vec<usize>> {
    let place = |index: usize| {
        let fits = |device: &DraftDevice| {
            theirs.is_none_or(|theirs| theirs[index].is_infiniband == device.is_infiniband)
        };
        let fitting: Vec<usize> =
            (0..devices.len()).filter(|&it| fits(&devices[it]) && is_usable(&devices[it])).collect();
        fitting.get(index % fitting.len().max(1)).copied()
    };
    (0..wanted).map(place).collect()
}

impl DraftDevice {
    fn new(
        nic: Arc<Nic>,
        is_infiniband: bool,
        rule: GidRule,
        completions: u32,
        lends: Reach,
    ) -> Result<Self, VerbsError> {
        let address = match nic.address(rule) {
            Ok(address) => Some(address),
            Err(error) => {
                tracing::warn!(device = nic.name(), error = error.to_line(), "a port is down for now");
                None
            }
        };
        let completions = CompletionQueue::new(nic.domain.context(), completions)?;
        let access = MemoryRegion::of_region(&nic.domain, nic.region(), lends)?;
        Ok(Self { nic, is_infiniband, address, completions, access })
    }
}

impl End {
    fn new(
        nic: &Nic,
        address: PortAddress,
        completions: &Arc<CompletionQueue>,
        terms: &Terms,
    ) -> Result<Self, VerbsError> {
        let (limits, tuning) = (nic.limits, terms.tuning);
        let capacity = Capacity {
            depth: tuning.depth.min(limits.depth),
            gather: tuning.gather.min(limits.gather),
            inline: tuning.inline,
        };
        let make = |capacity| QueuePair::new(nic, completions, capacity, tuning.signal_every);
        // Some devices carry nothing in a request, and only say so by refusing.
        let pair = make(capacity).or_else(|_| make(Capacity { inline: 0, ..capacity }))?;
        let operation = "draw a random number";
        let token = host::token().map_err(|source| VerbsError::Call { operation, source })?;
        let first_packet = u32::try_from(token & 0xff_ffff).expect("24 bits");
        Ok(Self { pair, first_packet, address })
    }

    /// Another one on a port, as that is addressed now.
    pub(super) fn anew(
        nic: &Nic,
        completions: &Arc<CompletionQueue>,
        terms: &Terms,
    ) -> Result<Self, VerbsError> {
        Self::new(nic, nic.address(terms.rule)?, completions, terms)
    }

    /// What to tell the peer, whose rights to the arena are `access`.
    pub(super) fn describe(&self, nic: &Nic, access: &MemoryRegion) -> PathEnd {
        PathEnd {
            queue_pair: NonZeroU32::new(self.pair.number()),
            first_packet: self.first_packet,
            gid: self.address.gid.gid,
            lid: self.address.lid,
            is_infiniband: self.address.is_infiniband,
            mtu_log2: u8::try_from(self.address.mtu + 7).unwrap_or(0),
            reads: nic.limits.reads,
            arena_address: access.address(),
            arena_key: access.remote_key(),
        }
    }

    /// What to tell the peer where there is no end for now.
    fn none(is_infiniband: bool, nic: &Nic, access: &MemoryRegion) -> PathEnd {
        PathEnd {
            queue_pair: None,
            first_packet: 0,
            gid: [0; 16],
            lid: 0,
            is_infiniband,
            mtu_log2: 0,
            reads: nic.limits.reads,
            arena_address: access.address(),
            arena_key: access.remote_key(),
        }
    }

    /// Connects to an end of the peer.
    pub(super) fn connect(
        self,
        nic: &Nic,
        their: &PathEnd,
        terms: &Terms,
    ) -> Result<QueuePair<Tag>, VerbsError> {
        let Self { mut pair, first_packet, address } = self;
        their.check().map_err(|what| VerbsError::Peer { what })?;
        if their.is_infiniband != address.is_infiniband {
            return Err(VerbsError::Peer { what: "it is on another kind of network" });
        }
        let needs_route = !their.is_infiniband || their.lid == 0;
        pair.connect(&Connect {
            port: nic.port(),
            gid_index: address.gid.index,
            gid: needs_route.then_some(their.gid),
            lid: their.lid,
            queue_pair: their.queue_pair.map_or(0, NonZeroU32::get),
            their_psn: their.first_packet,
            our_psn: first_packet,
            mtu: address.mtu.min(u32::from(their.mtu_log2) - 7),
            timeout: terms.timeout,
            retries: terms.retries,
            reads: nic.limits.reads.min(their.reads),
        })?;
        Ok(pair)
    }
}

impl std::fmt::Debug for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "End({:?})", self.pair)
    }
}

impl std::fmt::Debug for DraftEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DraftEnd({:?})", self.end)
    }
}

impl std::fmt::Debug for DraftDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DraftDevice({:?})", self.nic)
    }
}
