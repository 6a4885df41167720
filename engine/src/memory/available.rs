//! How much memory this process may still take: what the machine has left, or less where a container is limited.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that can be taken without pushing out others; `None` where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let group = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| group_available(&text));
    machine.into_iter().chain(group).min()
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The tightest limit on the way from this process's control group to the root.
fn group_available(groups: &str) -> Option<u64> {
    let (root, group, files) =
        groups.lines().find_map(|line| match line.split(':').collect::<Vec<_>>()[..] {
            ["0", "", group] => Some(("/sys/fs/cgroup", group, UNIFIED)),
            [_, controllers, group] if controllers.split(',').any(|name| name == "memory") => {
                Some(("/sys/fs/cgroup/memory", group, LEGACY))
            }
            _ => None,
        })?;
    let group = PathBuf::from(format!("{root}{group}"));
    group.ancestors().take_while(|path| path.starts_with(root)).filter_map(|path| room(path, files)).min()
}

/// What is left of one group's limit; `None` when it has none.
fn room(group: &Path, (limit, usage): (&str, &str)) -> Option<u64> {
    let number = |file| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    Some(number(limit)?.saturating_sub(number(usage)?))
}

/// Names of limit and usage in version 2 of control groups, where no limit reads "max".
const UNIFIED: (&str, &str) = ("memory.max", "memory.current");
/// The same in version 1, where no limit is a number beyond all memory.
const LEGACY: (&str, &str) = ("memory.limit_in_bytes", "memory.usage_in_bytes");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kibibytes() {
        let text = "MemTotal:       24682408 kB\nMemFree:         1000 kB\nMemAvailable:   17 kB\n";
        assert_eq!(mem_available(text), Some(17 * 1024));
        assert_eq!(mem_available("MemTotal: 5 kB\n"), None);
    }

    #[test]
    fn this_machine_has_some_memory_left() {
        let bytes = available_bytes().expect("the tests run on Linux");
        assert!((1 << 20..1 << 50).contains(&bytes), "{bytes} bytes");
    }

    #[test]
    fn the_room_of_a_group_is_its_limit_less_its_use() {
        let group = tempfile::tempdir().unwrap();
        let write = |file, text| fs::write(group.path().join(file), text).unwrap();
        write("memory.current", "30\n");
        write("memory.max", "max\n");
        assert_eq!(room(group.path(), UNIFIED), None);
        write("memory.max", "100\n");
        assert_eq!(room(group.path(), UNIFIED), Some(70));
        write("memory.current", "130\n");
        assert_eq!(room(group.path(), UNIFIED), Some(0));
    }
}
