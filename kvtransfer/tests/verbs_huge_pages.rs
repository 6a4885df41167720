//! Arenas in huge pages, registered with a device. A test binary of its own, which takes the machine's pool of them.

mod worker;

use std::fs;
use std::time::Instant;

use tidemill_kvtransfer::{EndpointConfig, HandoffEvent, Pages, Region};
use tidemill_kvtransfer_proto::units::HandoffId;
use worker::{PATIENCE, Way, Worker, config};

/// Of the size that is the kernel's default on x86-64.
const PAGE: usize = 2 << 20;

fn in_huge_pages(name: &str, instance: u64) -> EndpointConfig {
    let config = config(name, instance, Way::Rdma, 1);
    // Not a whole number of huge pages.
    let blocks = 2 * PAGE / config.layout.block_bytes() + 1;
    let region = Region::with_pages(name, blocks * config.layout.block_bytes(), Pages::Huge);
    EndpointConfig { region: region.expect("there are huge pages"), ..config }
}

#[test]
#[ignore = "needs verbs devices and a kernel with huge pages: tests/rdma/run --vm qemu"]
fn arenas_in_huge_pages_are_written_to() {
    fs::write("/proc/sys/vm/nr_hugepages", "16").expect("a kernel with huge pages, and rights");
    assert_eq!(free_pages(), 16, "all of them could be had");
    {
        let (prefill, mut decode) =
            (Worker::start(in_huge_pages("prefill", 1)), Worker::start(in_huge_pages("decode", 2)));
        for worker in [&prefill, &decode] {
            assert_eq!(kernel_page_size(worker.region.as_ptr().addr()), PAGE, "{}", worker.name);
        }
        prefill.meet(decode.address());
        for number in 0..8 {
            let handoff = HandoffId(number);
            // Blocks all over the arena, the last one included.
            decode.reserve(handoff, 1, 40);
            prefill.endpoint.expect(handoff, 2, PATIENCE);
            let reserved = prefill.expect_reserved();
            prefill.fill_all(&reserved);
            prefill.endpoint.finish(handoff, vec![]);
            assert_eq!(decode.news(), "committed");
            decode.adopt_and_check(handoff);
            assert!(matches!(prefill.event(), HandoffEvent::Delivered { .. }));
        }
        decode.assert_nothing_leaked();
    }
    // By the last thread that knows the memory, which may be one that ends after the endpoint.
    let since = Instant::now();
    while free_pages() != 16 {
        assert!(since.elapsed() < PATIENCE, "they are given back, not {} of 16", free_pages());
        std::thread::yield_now();
    }
}

fn free_pages() -> usize {
    let text = fs::read_to_string("/proc/meminfo").expect("proc is mounted");
    let line = text.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    line.and_then(|number| number.trim().parse().ok()).expect("a number of huge pages")
}

/// Bytes of the pages that an address is mapped by.
fn kernel_page_size(address: usize) -> usize {
    let text = fs::read_to_string("/proc/self/smaps").expect("proc is mounted");
    let start = format!("{address:x}-");
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
    let size = lines.find_map(|line| line.strip_prefix("KernelPageSize:")).expect("the mapping is there");
    size.trim().trim_end_matches("kB").trim().parse::<usize>().expect("a number") * 1024
}
