//! What the settings of queue pairs are worth. Prints a table for docs/performance.md:
//!
//! ```text
//! cargo test --release -p tidemill-kvtransfer --lib --no-run
//! TIDEMILL_MEASURE=1 tests/rdma/run target/release/deps/tidemill_kvtransfer-… measurement --ignored --nocapture
//! ```

use std::sync::Arc;
use std::time::Instant;

use tidemill_kvtransfer_proto::transport::{Post, Transport, WriteId};

use super::setup::Tuning;
use super::tests::{connect, range, wait};
use super::{Fabric, RdmaConfig, RdmaTransport};
use crate::shm::Region;
use crate::source::{Memory, SourceRange};

const ARENA: usize = 32 << 20;
const ROUNDS: usize = 5;

/// One line of the table: medians of a few rounds.
struct Case {
    setting: &'static str,
    tuning: Tuning,
    /// Length of a write.
    len: usize,
    /// Writes of one round.
    writes: usize,
    queue_pairs: usize,
}

#[test]
#[ignore = "prints measurements, and needs a verbs device: tests/rdma/run"]
fn settings_of_queue_pairs() {
    if std::env::var_os("TIDEMILL_MEASURE").is_none() {
        return println!("no measurement was asked for (TIDEMILL_MEASURE)");
    }
    let usual = Tuning::default();
    let case = |setting, tuning, len, writes| Case { setting, tuning, len, writes, queue_pairs: 1 };
    let (large, block, small) = (1 << 20, 16 << 10, 64);
    #[rustfmt::skip]
    let cases = [
        case("depth 8",            Tuning { depth: 8, ..usual },          block, 2000),
        case("depth 32",           Tuning { depth: 32, ..usual },         block, 2000),
        case("depth 128",          usual,                                 block, 2000),
        case("depth 512",          Tuning { depth: 512, ..usual },        block, 2000),
        case("each announced",     Tuning { signal_every: 1, ..usual },   block, 2000),
        case("every 4th",          Tuning { signal_every: 4, ..usual },   block, 2000),
        case("every 16th",         usual,                                 block, 2000),
        case("every 64th",         Tuning { signal_every: 64, ..usual },  block, 2000),
        case("64 B, not inline",   Tuning { inline: 0, gather: 1, ..usual },  small, 20_000),
        case("64 B, inline",       Tuning { inline: 64, gather: 1, ..usual }, small, 20_000),
        case("gather 1",           Tuning { gather: 1, ..usual },         2 << 10, 8000),
        case("gather 4",           Tuning { gather: 4, ..usual },         2 << 10, 8000),
        case("gather 8",           usual,                                 2 << 10, 8000),
        case("gather 16",          Tuning { gather: 16, ..usual },        2 << 10, 8000),
        case("1 MiB writes",       usual,                                 large, 64),
        Case { queue_pairs: 2, ..case("1 MiB, two queue pairs", usual, large, 64) },
        Case { queue_pairs: 4, ..case("1 MiB, four queue pairs", usual, large, 64) },
    ];
    println!("| setting | write | MB/s | writes/s | requests/s | CPU s per GiB |");
    println!("|---|---|---|---|---|---|");
    for case in cases {
        measure(&case);
    }
}

fn measure(case: &Case) {
    let config = RdmaConfig { max_devices: 1, queue_pairs: case.queue_pairs, ..RdmaConfig::default() };
    let open = |name| {
        let arena = Region::new(name, ARENA).unwrap();
        (Fabric::open(config.clone(), &arena).unwrap(), arena)
    };
    let ((our_fabric, arena), (their_fabric, _)) = (open("ours"), open("theirs"));
    let (mut ours, _theirs) = connect(&our_fabric, &their_fabric, ARENA, case.tuning);
    let mut rounds: Vec<[f64; 4]> = (0..=ROUNDS).map(|_| round(&mut ours, &arena, case)).skip(1).collect();
    let mut median = |index: usize| {
        rounds.sort_by(|one, other| one[index].total_cmp(&other[index]));
        rounds[ROUNDS / 2][index]
    };
    let [rate, writes, requests, cpu] = [median(0), median(1), median(2), median(3)];
    println!(
        "| {} | {} | {:.0} | {writes:.0} | {requests:.0} | {cpu:.2} |",
        case.setting,
        case.len,
        rate / 1e6
    );
}

/// Bytes, writes and requests per second; processor seconds of the whole machine per GiB.
fn round(ours: &mut RdmaTransport, arena: &Arc<Region>, case: &Case) -> [f64; 4] {
    let places = ARENA / case.len;
    let requests = |ours: &RdmaTransport| ours.paths().iter().map(|path| path.requests).sum::<u64>();
    let (since, busy, before) = (Instant::now(), busy_seconds(), requests(ours));
    let (mut posted, mut done) = (0, Vec::new());
    while done.len() < case.writes {
        while posted < case.writes {
            // Targets follow each other, sources do not.
            let from = posted * 7919 % places * case.len;
            let source = SourceRange::new(Memory::Arena(Arc::clone(arena)), from, case.len).unwrap();
            let target = range(posted % places * case.len, case.len);
            if ours.post_write(WriteId(posted as u64), source, target) == Post::QueueFull {
                break;
            }
            posted += 1;
        }
        ours.poll(&mut done);
        if done.len() < case.writes {
            wait(ours);
        }
    }
    assert!(done.iter().all(|it| it.outcome.is_ok()));
    let (took, bytes) = (since.elapsed().as_secs_f64(), (case.writes * case.len) as f64);
    let cpu = (busy_seconds() - busy) / (bytes / f64::from(1 << 30));
    [bytes / took, case.writes as f64 / took, (requests(ours) - before) as f64 / took, cpu]
}

/// What the processors of the machine have worked: Soft-RoCE does most of it outside any process.
fn busy_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let numbers = stat.lines().next().unwrap().split_whitespace().skip(1);
    let ticks: Vec<f64> = numbers.map(|number| number.parse().unwrap()).collect();
    // user nice system idle iowait irq softirq steal, in hundredths of a second
    (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) / 100.0
}
