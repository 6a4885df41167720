//! The single looks at the machine.

use std::path::Path;
use std::{fs, thread};

use rustix::process::{Resource, getrlimit};
use tidemill_engine::device_name::{self, CudaError, GpuProperties};
use tidemill_engine::handle::Isa;
use tidemill_engine::memory::available_bytes;
use tidemill_engine::network::{self, PortReport, Unavailable};

use super::Finding;

/// Everything, in the order of the report.
pub(super) fn all(isa: Option<Isa>) -> Vec<Finding> {
    let mut findings = vec![processor(), instructions(), cores(), memory()];
    findings.extend([locked_memory(), open_files(), huge_pages(), shared_memory()]);
    findings.extend([gpus(), rdma(), would_use(isa.unwrap_or_else(Isa::detect))]);
    findings
}

fn processor() -> Finding {
    let info = read("/proc/cpuinfo");
    let name = field(&info, "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    Finding::good("processor", name)
}

fn instructions() -> Finding {
    let info = read("/proc/cpuinfo");
    let flags = field(&info, "flags").unwrap_or_default();
    let flags: Vec<&str> = flags.split(' ').collect();
    let known: Vec<&str> = INSTRUCTIONS.into_iter().filter(|name| flags.contains(name)).collect();
    if ["avx2", "fma", "f16c"].iter().all(|name| known.contains(name)) {
        Finding::good("instructions", known.join(" "))
    } else {
        let hint = "without AVX2, FMA and F16C the portable kernels are used, which are several times slower";
        Finding::limited(
            "instructions",
            if known.is_empty() { "none of use".into() } else { known.join(" ") },
            hint,
        )
    }
}

fn cores() -> Finding {
    let usable = thread::available_parallelism().map_or(1, usize::from);
    let nodes = count("/sys/devices/system/node", "node");
    match (usable, nodes) {
        (1, _) => {
            Finding::limited("cores", "1", "prefill and decode share it; --colocated is the better choice")
        }
        (_, 0 | 1) => Finding::good("cores", format!("{usable}")),
        _ => Finding::limited(
            "cores",
            format!("{usable} on {nodes} NUMA nodes"),
            format!(
                "a worker's weights are read across nodes unless each has a rank: --tensor-parallel-size {nodes}"
            ),
        ),
    }
}

fn memory() -> Finding {
    match available_bytes() {
        Some(bytes) => Finding::good("memory", format!("{} free", size(bytes))),
        None => Finding::limited("memory", "unknown", "set --kv-cache-memory"),
    }
}

fn locked_memory() -> Finding {
    match getrlimit(Resource::Memlock).current {
        None => Finding::good("memory locking", "no limit"),
        Some(bytes) => Finding::limited(
            "memory locking",
            format!("up to {}", size(bytes)),
            "matters for RDMA only: raise it with `ulimit -l unlimited` or LimitMEMLOCK=infinity",
        ),
    }
}

fn open_files() -> Finding {
    match getrlimit(Resource::Nofile).current {
        Some(files) if files < ENOUGH_FILES => Finding::limited(
            "open files",
            format!("up to {files}"),
            format!("each client takes one: raise it with `ulimit -n {ENOUGH_FILES}`"),
        ),
        Some(files) => Finding::good("open files", format!("up to {files}")),
        None => Finding::good("open files", "no limit"),
    }
}

fn huge_pages() -> Finding {
    let reserved = field(&read("/proc/meminfo"), "HugePages_Total").unwrap_or_else(|| "0".into());
    let mode = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let mode = mode.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned();
    Finding::good("huge pages", format!("transparent: {mode}, reserved: {reserved}"))
}

fn shared_memory() -> Finding {
    // The KV cache lies in a memfd, which needs no mount; what counts is that the kernel gives one out.
    match rustix::fs::memfd_create("tidemill-doctor", rustix::fs::MemfdFlags::CLOEXEC) {
        Ok(_) => Finding::good("shared memory", "memfd works: handoffs on this machine move no byte"),
        Err(error) => Finding::limited("shared memory", format!("memfd fails: {error}"), "handoffs take TCP"),
    }
}

fn gpus() -> Finding {
    let gpus = match device_name::gpus() {
        Ok(gpus) if !gpus.is_empty() => gpus,
        Ok(_) => return Finding::absent("gpus", "cpu only: the NVIDIA driver sees no GPU"),
        Err(CudaError::NoDriver { reason }) if Path::new("/proc/driver/nvidia").exists() => {
            return Finding::limited("gpus", "a driver without a usable library", reason);
        }
        Err(reason) => return Finding::absent("gpus", format!("cpu only: {reason}")),
    };
    let names: Vec<String> = gpus.iter().map(|(gpu, _)| describe_gpu(gpu)).collect();
    let names = names.join("; ");
    match gpus.into_iter().find_map(|(_, reason)| reason) {
        None => Finding::good("gpus", format!("{names}; used with --device cuda:N or auto")),
        Some(reason) => Finding::limited("gpus", names, reason.to_string()),
    }
}

fn describe_gpu(gpu: &GpuProperties) -> String {
    let GpuProperties { name, compute_capability, multiprocessors, .. } = gpu;
    format!("{name} ({compute_capability}, {multiprocessors} multiprocessors)")
}

fn rdma() -> Finding {
    let ports = match network::ports() {
        Ok(ports) => ports,
        Err(Unavailable::NoLibrary { .. }) if !names("/sys/class/infiniband").is_empty() => {
            let devices = names("/sys/class/infiniband").join(", ");
            return Finding::limited(
                "rdma",
                devices,
                "libibverbs.so.1 is missing: install libibverbs1 or rdma-core",
            );
        }
        Err(reason) => return Finding::absent("rdma", reason.to_string()),
    };
    let described: Vec<String> = ports.iter().map(describe_port).collect();
    let found = described.join("; ");
    match ports.iter().any(|port| port.is_active && port.address.is_some()) {
        true => Finding::good("rdma", found),
        false => Finding::limited("rdma", found, "no port is up and has an address: handoffs take TCP"),
    }
}

fn describe_port(port: &PortReport) -> String {
    let state = if port.is_active { "up" } else { "down" };
    let address = port.address.map_or_else(|| "no address".to_owned(), |address| address.to_string());
    let node = port.place.place.node.map(|node| format!(", node {node}")).unwrap_or_default();
    format!("{} {} {state}, {address}, MTU {}{node}", port.name, port.link_layer, port.mtu)
}

fn would_use(isa: Isa) -> Finding {
    let usable = thread::available_parallelism().map_or(1, usize::from);
    let split =
        if usable < 2 { "both workers on one core" } else { "prefill and decode on cores of their own" };
    Finding::good(
        "would use",
        format!(
            "cpu kernels ({isa}), {split}, handoff in place by shared memory; between machines RDMA where both have it, else TCP"
        ),
    )
}

/// The value of `name: value` or `name : value` in a file of such lines.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn names(folder: &str) -> Vec<String> {
    let entries =
        fs::read_dir(folder).map(|entries| entries.flatten().collect()).unwrap_or_else(|_| Vec::new());
    let mut names: Vec<String> =
        entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn count(folder: &str, prefix: &str) -> usize {
    let numbered = |name: &&String| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|it| it.is_ascii_digit()))
    };
    names(folder).iter().filter(numbered).count()
}

fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let (unit, bytes_each) = UNITS.into_iter().find(|(_, each)| *each <= bytes).unwrap_or(("bytes", 1));
    format!("{:.1} {unit}", bytes as f64 / bytes_each as f64)
}

/// What the kernels use now or will.
const INSTRUCTIONS: [&str; 9] =
    ["avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8"];
const ENOUGH_FILES: u64 = 4096;
