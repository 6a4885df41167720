//! Which rank computes on which cores: near to its own weights where memory is in several parts (NUMA nodes).

use std::fs;
use std::path::Path;

use tidemill_kernels::cpu::CpuOptions;

use crate::handle::EngineConfig;

/// Cores of each NUMA node that this process may use; nodes without any are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Nodes(Vec<Vec<usize>>);

impl Nodes {
    /// Those of this machine; none where the system does not say.
    pub(super) fn of_machine() -> Self {
        Self::read(Path::new("/sys/devices/system/node"), Path::new("/proc/self/status")).unwrap_or_default()
    }

    fn read(nodes: &Path, status: &Path) -> Option<Self> {
        let status = fs::read_to_string(status).ok()?;
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        let allowed = cores_of(allowed)?;
        let mut found: Vec<(usize, Vec<usize>)> = Vec::new();
        for entry in fs::read_dir(nodes).ok()?.flatten() {
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(|name| name.strip_prefix("node")?.parse().ok()) else {
                continue;
            };
            let mut cores = cores_of(&fs::read_to_string(entry.path().join("cpulist")).ok()?)?;
            cores.retain(|core| allowed.contains(core));
            if !cores.is_empty() {
                found.push((number, cores));
            }
        }
        found.sort_unstable();
        Some(Self(found.into_iter().map(|(_, cores)| cores).collect()))
    }

    fn of(&self, core: usize) -> usize {
        self.0.iter().position(|cores| cores.contains(&core)).unwrap_or(usize::MAX)
    }
}

/// What each rank computes on: neighbouring cores of those that are named, node by node; without names, of all nodes where
/// there are several, and where there is one, as many threads as there are cores, wherever the system puts them.
pub(super) fn place(config: &EngineConfig, all: usize, nodes: &Nodes) -> Vec<CpuOptions> {
    let ranks = config.tensor_parallel as usize;
    let share = |count: usize, rank: usize| rank * count / ranks..(rank + 1) * count / ranks;
    let mut cores = config.cores.clone();
    if cores.is_empty() && 1 < nodes.0.len() {
        cores = nodes.0.concat();
    }
    if cores.is_empty() {
        let threads = config.threads.unwrap_or(all);
        let of_rank = |rank| share(threads, rank).len().max(1);
        let options = |rank| CpuOptions { cores: Vec::new(), threads: Some(of_rank(rank)), isa: config.isa };
        return (0..ranks).map(options).collect();
    }
    if cores.len() < ranks {
        let cores = cores.len();
        tracing::warn!(ranks, cores, "ranks take turns on a core: fewer would be faster");
    }
    cores.sort_by_key(|core| nodes.of(*core));
    let of_rank = |rank| {
        let mut cores = match share(cores.len(), rank) {
            share if cores.len() < ranks => vec![cores[share.start]],
            share => cores[share].to_vec(),
        };
        if let (true, Some(threads)) = (config.cores.is_empty(), config.threads) {
            cores.truncate(share(threads, rank).len().max(1));
        }
        CpuOptions { cores, threads: None, isa: config.isa }
    };
    (0..ranks).map(of_rank).collect()
}

/// Reads `0-3,8`.
fn cores_of(list: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cores.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cores)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::{ModelSource, Role};

    /// Name, ranks, named cores, threads, the machine, and what is expected.
    type Row<'a> = (&'a str, u32, &'a [usize], Option<usize>, &'a Nodes, &'a str);

    #[test]
    fn ranks_lie_on_neighbouring_cores_node_by_node() {
        let two = Nodes(vec![vec![0, 1, 4, 5], vec![2, 3, 6, 7]]);
        let one = Nodes(vec![(0..8).collect()]);
        #[rustfmt::skip]
        let rows: [Row<'_>; 9] = [
            // name                             ranks  cores             threads  nodes  placement
            ("threads are shared evenly",           2, &[],              None,    &one,  "8=4+4"),
            ("some have one more",                  3, &[],              Some(5), &one,  "5=1+2+2"),
            ("each has one at least",               4, &[],              Some(2), &one,  "4=1+1+1+1"),
            ("named cores are shared in order",     2, &[4, 5, 6, 7],    None,    &one,  "4,5 6,7"),
            ("but those of a node stay together",   2, &[0, 2, 1, 3],    None,    &two,  "0,1 2,3"),
            ("a node each",                         2, &[],              None,    &two,  "0,1,4,5 2,3,6,7"),
            ("half a node each",                    4, &[],              None,    &two,  "0,1 4,5 2,3 6,7"),
            ("of a node, so many threads",          2, &[],              Some(4), &two,  "0,1 2,3"),
            ("ranks share what cores there are",    4, &[1, 2, 3],       None,    &one,  "1 1 2 3"),
        ];
        for (name, ranks, cores, threads, nodes, expected) in rows {
            let config = EngineConfig {
                tensor_parallel: ranks,
                cores: cores.to_vec(),
                threads,
                ..EngineConfig::new("w", Role::Hybrid, ModelSource::Embedded(&[]))
            };
            assert_eq!(shown(&place(&config, 8, nodes)), expected, "{name}");
        }
    }

    fn shown(options: &[CpuOptions]) -> String {
        let threads: Vec<usize> = options.iter().filter_map(|it| it.threads).collect();
        let joined =
            |numbers: &[usize], by: &str| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(by);
        if threads.is_empty() {
            let cores: Vec<String> = options.iter().map(|it| joined(&it.cores, ",")).collect();
            cores.join(" ")
        } else {
            format!("{}={}", threads.iter().sum::<usize>(), joined(&threads, "+"))
        }
    }

    #[test]
    fn nodes_are_read_as_the_system_lists_them() {
        let folder = tempfile::tempdir().unwrap();
        let status = folder.path().join("status");
        fs::write(&status, "Name:\tx\nCpus_allowed_list:\t1-5,8\n").unwrap();
        for (node, cores) in [("node10", "8-9"), ("node2", "0-3,6"), ("node3", "4,5"), ("node4", "7\n")] {
            fs::create_dir(folder.path().join(node)).unwrap();
            fs::write(folder.path().join(node).join("cpulist"), cores).unwrap();
        }
        let found = Nodes::read(folder.path(), &status);
        assert_eq!(found, Some(Nodes(vec![vec![1, 2, 3], vec![4, 5], vec![8]])));
        assert_eq!(Nodes::read(&folder.path().join("none"), &status), None);
    }
}
