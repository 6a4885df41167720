//! Devices that are ready for use, and the choice among them.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::checked::{self, Context, Domain};
use super::error::{Unavailable, VerbsError};
use super::gid::{GidEntry, GidKind, GidRule, choose_gid};
use super::health::Health;
use super::memory_region::{MemoryRegion, Reach};
use super::raw;
use super::topology::{self, DevicePlace, Place};
use crate::shm::{Region, Slab};
use crate::source::Memory;

/// Which devices to use and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaConfig {
    /// Names of devices, such as `mlx5_0`, or `mlx5_0:2` for their second port; empty for those nearest to the
    /// memory.
    pub devices: Vec<String>,
    /// At most so many of them.
    pub max_devices: usize,
    /// Queue pairs on each device for each peer.
    pub queue_pairs: usize,
    /// Position in the port's table of addresses, instead of the rule.
    pub gid_index: Option<u8>,
    /// A packet without an answer is repeated after 4.096 µs times two to this power.
    pub timeout: u8,
    /// How often it is repeated before the path counts as dead; seven at most.
    pub retries: u8,
    /// Cores that compute, by number: the endpoint's thread keeps off them.
    pub compute_cores: Vec<usize>,
}

/// A port as `tidemill doctor` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortReport {
    /// Device and port.
    pub name: String,
    /// Whether it can be used now.
    pub is_active: bool,
    /// `InfiniBand` or `RoCE`.
    pub link_layer: &'static str,
    /// Longest packet, in bytes.
    pub mtu: u32,
    /// The address that would be taken without knowledge of a peer.
    pub address: Option<IpAddr>,
    /// Where the device is.
    pub place: DevicePlace,
}

/// All devices of an endpoint.
#[derive(Debug)]
pub(crate) struct Fabric {
    pub(crate) nics: Vec<Arc<Nic>>,
    pub(crate) config: RdmaConfig,
    /// What peers may do with the arena.
    pub(super) lends: Reach,
}

/// A port of an open device, with the arena of this worker registered as a source of writes.
pub(crate) struct Nic {
    name: String,
    port: u8,
    place: DevicePlace,
    pub(super) domain: Arc<Domain>,
    pub(super) limits: Limits,
    region: Arc<Region>,
    arena: Arc<MemoryRegion>,
    /// Staging memory that was registered, for as long as it exists.
    slabs: Mutex<Vec<(Weak<()>, Arc<MemoryRegion>)>>,
    pub(super) health: Health,
}

/// What a device can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Requests in a queue.
    pub(super) depth: u32,
    /// Pieces in a request.
    pub(super) gather: u32,
    /// Reads under way.
    pub(super) reads: u8,
}

/// What the peer has to know of a port, and what of it may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PortAddress {
    pub(super) gid: GidEntry,
    pub(super) lid: u16,
    /// As `enum ibv_mtu`.
    pub(super) mtu: u32,
    pub(super) is_infiniband: bool,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self {
            devices: Vec::new(),
            max_devices: 4,
            queue_pairs: 2,
            gid_index: None,
            timeout: 16,
            // Not 7: Soft-RoCE takes that for "without end" (rxe_comp.c), and no path would ever be found dead.
            retries: 6,
            compute_cores: Vec::new(),
        }
    }
}

impl Fabric {
    /// Opens the devices asked for, or those nearest to `region`, and registers it with each. A port that is down takes a place
    /// that no port needs which is up: it is used when it comes up.
    ///
    /// # Errors
    ///
    /// There is none, or `region` cannot be registered.
    pub(crate) fn open(config: RdmaConfig, region: &Arc<Region>) -> Result<Self, VerbsError> {
        checked::device_names()?;
        let places = topology::devices(Path::new(SYS));
        let mut faults = Vec::new();
        let mut ports = Vec::new();
        for (place, port) in chosen(&config, &places, region)? {
            let name = format!("{}:{port}", place.name);
            match Port::open(place, port) {
                Ok(port) => ports.push(port),
                Err(error) => faults.push(format!("{name}: {}", error.to_line())),
            }
        }
        let are_up: Vec<bool> = ports.iter().map(|port| port.is_up).collect();
        let mut nics = Vec::new();
        for (port, _) in ports.into_iter().zip(taken(&are_up, config.max_devices)).filter(|(_, taken)| *taken)
        {
            let name = port.name();
            match Nic::new(port, region) {
                Ok(nic) => nics.push(Arc::new(nic)),
                Err(error @ VerbsError::MemoryLock { .. }) => return Err(error),
                Err(error) => faults.push(format!("{name}: {}", error.to_line())),
            }
        }
        if nics.is_empty() {
            return Err(Unavailable::NoneFits { reason: faults.join("; ") }.into());
        }
        Ok(Self { nics, config, lends: Reach::Peer })
    }

    /// Why nothing gets through any of its ports now; `None` when something does through one.
    pub(crate) fn unusable(&self) -> Option<Unavailable> {
        let rule = GidRule { index: self.config.gid_index, ..GidRule::default() };
        let mut faults = Vec::new();
        for nic in &self.nics {
            match nic.address(rule) {
                Ok(_) => return None,
                Err(error) => faults.push(error.to_line()),
            }
        }
        Some(Unavailable::NoneFits { reason: faults.join("; ") })
    }

    /// The same, of which peers may read the arena and not write to it.
    pub(crate) fn read_only(self) -> Self {
        Self { lends: Reach::Reader, ..self }
    }

    /// Where the thread that hears completions should run: on the processors of the first device's node, but not where
    /// something computes. `None` where the kernel does not say, or nothing is left.
    pub(crate) fn cores(&self) -> Option<Vec<usize>> {
        cores_beside(&self.nics.first()?.place.local_cpus, &self.config.compute_cores)
    }
}

/// Which ports to take, in their order, so that the first of one host is on the wire of the first of another: those that are up,
/// `most` of them, and as many of the others as there is room for.
fn taken(are_up: &[bool], most: usize) -> Vec<bool> {
    let up = are_up.iter().filter(|it| **it).count().min(most);
    let mut left = [most - up, up];
    let take = |&is_up: &bool| {
        let left = &mut left[usize::from(is_up)];
        let has_room = 0 < *left;
        *left = left.saturating_sub(1);
        has_room
    };
    are_up.iter().map(take).collect()
}

/// Those of the processors in a kernel's list where nothing computes; `None` when there are none.
fn cores_beside(local: &str, compute: &[usize]) -> Option<Vec<usize>> {
    let local = topology::parse_cpus(local)?;
    Some(local.into_iter().filter(|core| !compute.contains(core)).collect())
        .filter(|it: &Vec<_>| !it.is_empty())
}

/// Devices and ports to try, best first.
fn chosen(
    config: &RdmaConfig,
    places: &[DevicePlace],
    region: &Region,
) -> Result<Vec<(DevicePlace, u8)>, VerbsError> {
    if config.devices.is_empty() {
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
        let node = topology::node_of_mapping(&maps, region.as_ptr().addr() as u64);
        let nearest = topology::nearest(places, &Place::of_memory(node), usize::MAX);
        return Ok(nearest.into_iter().map(|place| (place, 1)).collect());
    }
    config.devices.iter().map(|name| named(name, places).map_err(VerbsError::from)).collect()
}

fn named(name: &str, places: &[DevicePlace]) -> Result<(DevicePlace, u8), Unavailable> {
    let (device, port) = name.split_once(':').unwrap_or((name, "1"));
    let place = places.iter().find(|place| place.name == device);
    match (place, port.parse()) {
        (Some(place), Ok(port)) => Ok((place.clone(), port)),
        _ => Err(Unavailable::NoneFits { reason: format!("there is no device {name}") }),
    }
}

/// A port of an open device, before memory is registered with that.
struct Port {
    place: DevicePlace,
    number: u8,
    context: Arc<Context>,
    is_up: bool,
}

impl Port {
    fn open(place: DevicePlace, number: u8) -> Result<Self, VerbsError> {
        let context = Context::open(&place.name)?;
        let is_up = context.port(number)?.state == raw::PORT_ACTIVE;
        Ok(Self { place, number, context, is_up })
    }

    fn name(&self) -> String {
        format!("{}:{}", self.place.name, self.number)
    }
}

impl Nic {
    fn new(port: Port, region: &Arc<Region>) -> Result<Self, VerbsError> {
        let name = port.name();
        let Port { place, number: port, context, is_up } = port;
        if !is_up {
            tracing::warn!(device = name, "an RDMA port is down: it is used when it comes up");
        }
        let attributes = context.attributes()?;
        let at_least_one = |number: i32| u32::try_from(number).unwrap_or(0).max(1);
        let limits = Limits {
            depth: at_least_one(attributes.max_qp_wr),
            gather: at_least_one(attributes.max_sge),
            reads: u8::try_from(attributes.max_qp_rd_atom.min(attributes.max_qp_init_rd_atom).clamp(1, 16))
                .expect("between one and sixteen"),
        };
        let domain = Domain::new(&context)?;
        let arena = Arc::new(MemoryRegion::of_region(&domain, region, Reach::Source)?);
        let region = Arc::clone(region);
        // What has happened to it since it was opened waits among its events.
        let (slabs, health) = (Mutex::default(), Health::of_port(!is_up));
        Ok(Self { name, port, place, domain, limits, region, arena, slabs, health })
    }

    /// Device and port.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn place(&self) -> &DevicePlace {
        &self.place
    }

    pub(super) fn port(&self) -> u8 {
        self.port
    }

    pub(super) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Which kind of network it is on, whether or not its port is up.
    pub(super) fn is_infiniband(&self) -> Result<bool, VerbsError> {
        if self.is_broken() {
            return Err(Unavailable::NoneFits { reason: format!("{} has failed", self.name) }.into());
        }
        Ok(self.domain.context().port(self.port)?.link_layer != raw::LINK_LAYER_ETHERNET)
    }

    /// How the port is addressed, as of now: addresses come and go with those of its network device.
    pub(super) fn address(&self, rule: GidRule) -> Result<PortAddress, VerbsError> {
        let state = self.domain.context().port(self.port)?;
        if state.state != raw::PORT_ACTIVE || self.is_broken() {
            let what = if self.is_broken() { "has failed" } else { "has no active port" };
            return Err(Unavailable::NoneFits { reason: format!("{} {what}", self.name) }.into());
        }
        let is_infiniband = state.link_layer != raw::LINK_LAYER_ETHERNET;
        let table = gid_table(self.domain.context(), &self.place.name, self.port, state.gid_tbl_len);
        let gid = choose_gid(&table, GidRule { is_infiniband, ..rule }).ok_or_else(|| {
            let reason = format!("{} has no address for RoCE version 2", self.name);
            Unavailable::NoneFits { reason }
        })?;
        Ok(PortAddress { gid, lid: state.lid, mtu: state.active_mtu, is_infiniband })
    }

    /// Whether a connection could be made over it now.
    pub(crate) fn is_usable(&self, gid_index: Option<u8>) -> bool {
        self.address(GidRule { index: gid_index, ..GidRule::default() }).is_ok()
    }

    /// The registration that `memory` lies in.
    pub(super) fn registered(&self, memory: &Memory) -> Result<Arc<MemoryRegion>, VerbsError> {
        match memory {
            Memory::Arena(region) => self.registered_region(region),
            Memory::Tail(piece) => self.registered_region(piece.region()),
            Memory::Staged(slab) => self.registered_slab(slab),
            Memory::Device(_) => unreachable!("no link over RDMA goes by another device"),
        }
    }

    fn registered_region(&self, region: &Arc<Region>) -> Result<Arc<MemoryRegion>, VerbsError> {
        if Arc::ptr_eq(region, &self.region) {
            return Ok(Arc::clone(&self.arena));
        }
        MemoryRegion::of_region(&self.domain, region, Reach::Source).map(Arc::new)
    }

    fn registered_slab(&self, slab: &Arc<Slab>) -> Result<Arc<MemoryRegion>, VerbsError> {
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        // The address of a life is not used again while a `Weak` of it exists, unlike that of a slab.
        let known = slabs.iter().find(|(known, _)| std::ptr::eq(known.as_ptr(), Arc::as_ptr(slab.life())));
        if let Some((_, memory)) = known {
            return Ok(Arc::clone(memory));
        }
        slabs.retain(|(known, _)| 0 < known.strong_count());
        let memory = Arc::new(MemoryRegion::of_slab(&self.domain, slab)?);
        slabs.push((Arc::downgrade(slab.life()), Arc::clone(&memory)));
        Ok(memory)
    }
}

/// Every port of every device, for people.
///
/// # Errors
///
/// Which of the ways of having no RDMA this machine has.
pub fn ports() -> Result<Vec<PortReport>, Unavailable> {
    let names = checked::device_names()?;
    let places = topology::devices(Path::new(SYS));
    let mut reports = Vec::new();
    for name in names {
        let place = places.iter().find(|place| place.name == name).cloned();
        let place = place.unwrap_or(DevicePlace { name, place: Place::default(), local_cpus: String::new() });
        match Context::open(&place.name) {
            Ok(context) => reports.extend(
                (1..=MAX_PORTS)
                    .map_while(|port| Some(report(&context, &place, port, context.port(port).ok()?))),
            ),
            Err(error) => {
                tracing::warn!(device = place.name, error = error.to_line(), "device cannot be opened")
            }
        }
    }
    Ok(reports)
}

fn report(context: &Context, place: &DevicePlace, port: u8, state: raw::PortAttr) -> PortReport {
    let is_infiniband = state.link_layer != raw::LINK_LAYER_ETHERNET;
    let table = gid_table(context, &place.name, port, state.gid_tbl_len);
    let gid = choose_gid(&table, GidRule { is_infiniband, ..GidRule::default() });
    PortReport {
        name: format!("{}:{port}", place.name),
        is_active: state.state == raw::PORT_ACTIVE,
        link_layer: if is_infiniband { "InfiniBand" } else { "RoCE" },
        mtu: mtu_bytes(state.active_mtu),
        address: gid.map(|entry| entry.ip()),
        place: place.clone(),
    }
}

fn gid_table(context: &Context, device: &str, port: u8, len: i32) -> Vec<GidEntry> {
    let types = Path::new(SYS).join(format!("class/infiniband/{device}/ports/{port}/gid_attrs/types"));
    // The kernel's sort of an entry is only there when the entry is in use.
    let entry = |index: u8| {
        let gid = context.gid(port, index.into()).ok().filter(|gid| *gid != [0; 16])?;
        let kind = std::fs::read_to_string(types.join(index.to_string())).ok();
        let kind = kind.and_then(|text| match text.trim() {
            "RoCE v2" => Some(GidKind::RoceV2),
            "IB/RoCE v1" => Some(GidKind::InfiniBandOrRoceV1),
            _ => None,
        });
        Some(GidEntry { index, gid, kind })
    };
    // Work requests name an entry by one byte.
    let len = u8::try_from(len.clamp(0, u8::MAX.into())).expect("clamped");
    (0..len).filter_map(entry).collect()
}

/// Bytes of an `enum ibv_mtu`.
pub(super) const fn mtu_bytes(code: u32) -> u32 {
    if code == 0 || 6 < code { 0 } else { 128 << code }
}

impl fmt::Debug for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nic({})", self.name)
    }
}

const SYS: &str = "/sys";
/// No device has more.
const MAX_PORTS: u8 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// On any machine, whatever it has: what is said is held against what the kernel shows.
    #[test]
    fn a_machine_says_which_part_of_rdma_it_lacks() {
        let shown = |class: &str| {
            let entries = std::fs::read_dir(Path::new(SYS).join("class").join(class)).ok()?;
            // The folder of the class has a file of its own beside the devices.
            Some(entries.flatten().filter(|it| !it.file_name().to_string_lossy().starts_with("abi")).count())
        };
        let is_installed = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"]
            .iter()
            .any(|folder| Path::new(folder).join("libibverbs.so.1").exists());
        let expected = match (is_installed, shown("infiniband_verbs")) {
            (false, _) => "no-library",
            (true, None) => "no-kernel-support",
            (true, Some(0)) => "no-device",
            (true, Some(_)) => "devices",
        };
        let found = match ports() {
            Ok(ports) => {
                assert!(!ports.is_empty());
                "devices"
            }
            Err(reason) => {
                assert!(reason.to_string().len() > 10, "{reason}");
                reason.name()
            }
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn completions_are_heard_near_the_device_and_where_nothing_computes() {
        #[rustfmt::skip]
        let rows = [
            ("on the device's node, beside what computes",  "0-3,8", &[0, 1, 9][..], Some(vec![2, 3, 8])),
            ("anywhere on it where nothing does",           "4-5",   &[],            Some(vec![4, 5])),
            ("nowhere in particular when all of it does",   "0-1",   &[0, 1, 2],     None),
            ("nor where the kernel says nothing",           "",      &[0],           None),
            ("nor what nobody understands",                 "3-1",   &[],            None),
        ];
        for (name, local, compute, expected) in rows {
            assert_eq!(cores_beside(local, compute), expected, "{name}");
        }
    }

    #[test]
    fn ports_that_are_up_come_first_and_stay_in_their_order() {
        #[rustfmt::skip]
        let rows = [
            ("all that there are",                           "ud",     4, "ud"),
            ("the nearest ones",                             "uuuuu",  4, "uuuu."),
            ("none that is down where it takes another's place", "duuuu", 4, ".uuuu"),
            ("those that are down where there is room",      "dudud",  4, "dudu."),
            ("though none is up",                            "ddd",    2, "dd."),
            ("none where none is wanted",                    "ud",     0, ".."),
        ];
        for (name, ports, most, expected) in rows {
            let are_up: Vec<bool> = ports.chars().map(|it| it == 'u').collect();
            let taken = taken(&are_up, most);
            let found: String =
                ports.chars().zip(taken).map(|(port, taken)| if taken { port } else { '.' }).collect();
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn devices_are_named_with_or_without_a_port() {
        let place = |name: &str| DevicePlace {
            name: name.to_owned(),
            place: Place::default(),
            local_cpus: String::new(),
        };
        let places = [place("mlx5_0"), place("rxe0")];
        #[rustfmt::skip]
        let rows = [
            ("rxe0",      Some(("rxe0", 1))),
            ("mlx5_0:2",  Some(("mlx5_0", 2))),
            ("mlx5_0:x",  None),
            ("mlx5_9",    None),
            ("",          None),
        ];
        for (name, expected) in rows {
            let found = named(name, &places).ok();
            let found = found.as_ref().map(|(place, port)| (place.name.as_str(), *port));
            assert_eq!(found, expected, "{name:?}");
        }
    }
}
