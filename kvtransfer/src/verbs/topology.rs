//! Where things sit in the machine: which devices are near which memory, read from `/sys`.
//!
//! Everything here is a function of a folder, so that machines that nobody has can be tested.

use std::fs;
use std::path::{Path, PathBuf};

/// An RDMA device as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePlace {
    /// Its name, such as `mlx5_0`.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// Processors of its node, such as `0-15,32-47`; empty when the kernel does not say.
    pub local_cpus: String,
}

/// Where a PCI device or a piece of memory is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Memory node; `None` on machines with one, and for devices without a place.
    pub node: Option<u32>,
    /// The bridges above it and the device itself, from the host bridge down. Empty for memory and for devices in
    /// software.
    pub pci: Vec<String>,
}

/// How far apart two places are, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// One device, or two behind the same switch.
    Switch,
    /// Under one host bridge.
    HostBridge,
    /// On one memory node.
    Node,
    /// Nothing is known.
    Unknown,
    /// On different memory nodes.
    System,
}

impl Place {
    /// The place of a PCI device, by its folder in `/sys`, links resolved.
    pub fn of_device(folder: &Path) -> Self {
        let pci = fs::canonicalize(folder).map(|path| pci_path(&path)).unwrap_or_default();
        let node = read(&folder.join("numa_node")).and_then(|text| text.parse().ok());
        Self { node, pci }
    }

    /// Memory on a node.
    pub fn of_memory(node: Option<u32>) -> Self {
        Self { node, pci: Vec::new() }
    }

    /// How far the other is.
    pub fn distance(&self, other: &Self) -> Distance {
        let shared = self.pci.iter().zip(&other.pci).take_while(|(ours, theirs)| ours == theirs).count();
        match (shared, self.node, other.node) {
            (2.., ..) => Distance::Switch,
            (1, ..) => Distance::HostBridge,
            (_, Some(ours), Some(theirs)) if ours == theirs => Distance::Node,
            (_, Some(_), Some(_)) => Distance::System,
            _ => Distance::Unknown,
        }
    }
}

/// The RDMA devices under `sys`, which is `/sys` but for tests, in order of their names.
pub(crate) fn devices(sys: &Path) -> Vec<DevicePlace> {
    let Ok(entries) = fs::read_dir(sys.join("class/infiniband")) else { return Vec::new() };
    let mut devices: Vec<DevicePlace> = entries
        .flatten()
        .map(|entry| {
            let folder = entry.path().join("device");
            DevicePlace {
                name: entry.file_name().to_string_lossy().into_owned(),
                place: Place::of_device(&folder),
                local_cpus: read(&folder.join("local_cpulist")).unwrap_or_default(),
            }
        })
        .collect();
    devices.sort_by(|one, other| one.name.cmp(&other.name));
    devices
}

/// The devices to use for memory at `near`: those at the least distance, at most `limit` of them, one per physical
/// way being what the limit is for. Devices of unknown place all count as equally far.
pub(crate) fn nearest(devices: &[DevicePlace], near: &Place, limit: usize) -> Vec<DevicePlace> {
    let least = devices.iter().map(|device| device.place.distance(near)).min();
    devices.iter().filter(|device| Some(device.place.distance(near)) == least).take(limit).cloned().collect()
}

/// The memory node that holds most pages of the mapping that begins at `start`, from the text of
/// `/proc/self/numa_maps`. `None` when no page was touched yet.
pub(crate) fn node_of_mapping(numa_maps: &str, start: u64) -> Option<u32> {
    let line = numa_maps
        .lines()
        .find(|line| line.split(' ').next().and_then(|it| u64::from_str_radix(it, 16).ok()) == Some(start))?;
    let counts = line.split(' ').filter_map(|field| {
        let (node, pages) = field.strip_prefix('N')?.split_once('=')?;
        Some((pages.parse::<u64>().ok()?, node.parse::<u32>().ok()?))
    });
    counts.max_by_key(|&(pages, node)| (pages, std::cmp::Reverse(node))).map(|(_, node)| node)
}

/// Numbers in a kernel list such as `0-3,8`; `None` when it is no such list.
pub(crate) fn parse_cpus(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || MAX_CPUS <= last {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// The names of a device and of what is above it, from the host bridge on: `pci0000:00/0000:00:01.0/…`.
fn pci_path(path: &Path) -> Vec<String> {
    let names = path.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
    names
        .skip_while(|name| !name.starts_with("pci"))
        .take_while(|name| !name.starts_with("virtual"))
        .collect()
}

fn read(path: &PathBuf) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned()).filter(|text| !text.is_empty())
}

/// More than any kernel counts.
const MAX_CPUS: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A `/sys` with these devices: name, path of the PCI device below `devices`, node.
    fn sys(devices: &[(&str, &str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let class = root.path().join("class/infiniband");
        fs::create_dir_all(&class).unwrap();
        for (name, path, node) in devices {
            let folder = root.path().join("devices").join(path);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("numa_node"), format!("{node}\n")).unwrap();
            fs::write(folder.join("local_cpulist"), "0-3,8\n").unwrap();
            fs::create_dir_all(class.join(name)).unwrap();
            symlink(&folder, class.join(name).join("device")).unwrap();
        }
        root
    }

    #[test]
    fn devices_are_chosen_by_distance() {
        let root = sys(&[
            ("mlx5_0", "pci0000:00/0000:00:01.0/0000:01:00.0", "0"),
            ("mlx5_1", "pci0000:00/0000:00:01.0/0000:01:00.1", "0"),
            ("mlx5_2", "pci0000:00/0000:00:02.0/0000:02:00.0", "0"),
            ("mlx5_3", "pci0000:80/0000:80:01.0/0000:81:00.0", "1"),
            ("rxe0", "virtual/net/dum0", "-1"),
        ]);
        let all = devices(root.path());
        assert_eq!(all.len(), 5);
        assert_eq!(all[0].local_cpus, "0-3,8");
        assert_eq!(all[4].place, Place::default(), "a device in software has no place");
        let gpu = |path: &str, node| Place {
            node,
            pci: path.split('/').filter(|it| !it.is_empty()).map(str::to_owned).collect(),
        };
        #[rustfmt::skip]
        let rows = [
            ("behind the GPU's own switch",     gpu("pci0000:00/0000:00:01.0/0000:03:00.0", Some(0)), 8, "mlx5_0 mlx5_1"),
            ("not more than asked for",         gpu("pci0000:00/0000:00:01.0/0000:03:00.0", Some(0)), 1, "mlx5_0"),
            ("under its host bridge",           gpu("pci0000:00/0000:00:09.0/0000:09:00.0", Some(0)), 8, "mlx5_0 mlx5_1 mlx5_2"),
            ("on its node",                     gpu("pci0000:c0/0000:c0:01.0/0000:c1:00.0", Some(1)), 8, "mlx5_3"),
            ("near memory of a node",           Place::of_memory(Some(1)),                            8, "mlx5_3"),
            ("all when nothing is known",       Place::of_memory(None),                               8, "mlx5_0 mlx5_1 mlx5_2 mlx5_3 rxe0"),
            ("unknown rather than far",         Place::of_memory(Some(7)),                            8, "rxe0"),
        ];
        for (name, near, limit, expected) in rows {
            let names: Vec<String> = nearest(&all, &near, limit).into_iter().map(|it| it.name).collect();
            assert_eq!(names.join(" "), expected, "{name}");
        }
    }

    #[test]
    fn a_machine_without_devices() {
        assert!(devices(tempfile::tempdir().unwrap().path()).is_empty());
    }

    #[test]
    fn the_node_of_a_mapping() {
        let text = "7f0000000000 default file=/memfd:kv dirty=9 N0=3 N1=6 kernelpagesize_kB=4\n\
                    7f1000000000 default anon=1\n7f2000000000 default N0=5 N1=5\n";
        let rows = [
            ("most pages decide", 0x7f00_0000_0000, Some(1)),
            ("no page was touched", 0x7f10_0000_0000, None),
            ("of equals the first", 0x7f20_0000_0000, Some(0)),
            ("no such mapping", 0x7f30_0000_0000, None),
        ];
        for (name, start, expected) in rows {
            assert_eq!(node_of_mapping(text, start), expected, "{name}");
        }
    }

    #[test]
    fn lists_of_processors() {
        #[rustfmt::skip]
        let rows = [
            ("0-3,8\n",      Some(vec![0, 1, 2, 3, 8])),
            ("5",            Some(vec![5])),
            ("",             Some(vec![])),
            ("3-1",          None),
            ("0-99999999",   None),
            ("a",            None),
        ];
        for (list, expected) in rows {
            assert_eq!(parse_cpus(list), expected, "{list:?}");
        }
    }
}
