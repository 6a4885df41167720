//! One pair over TCP on this host, beside iperf3 with one stream.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::KvDtype;

use crate::report::{Row, Target};
use crate::timing::gigabytes_per_second;
use crate::workers::{Pair, Way, billion};

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut pair = Pair::new(billion(16, KvDtype::Bf16), 2 * BLOCKS, Way::Tcp, Coverage::Sampled)?;
    let bytes = pair.bytes(BLOCKS);
    pair.hand_over(BLOCKS, 1)?;
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..(rounds / 4).max(3) {
        theirs.push(iperf3()?);
        let mut took = Duration::ZERO;
        for _ in 0..HANDOFFS {
            took += pair.hand_over(BLOCKS, 1)?.until_committed;
        }
        ours.push(gigabytes_per_second(bytes * HANDOFFS, took));
    }
    let middle = |values: &[f64]| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
    Ok(vec![Row {
        measure: "TCP on loopback, one pair".to_owned(),
        value: middle(&ours),
        unit: "GB/s",
        limit: Some((middle(&theirs), "iperf3, one stream")),
        target: Some(Target::Ratio { measured: middle(&ratios), at_least: 0.9 }),
        note: format!(
            "{HANDOFFS} handoffs of {} MiB layer by layer, each until its verified commit",
            bytes >> 20
        ),
    }])
}

/// Gigabytes per second that iperf3 receives.
fn iperf3() -> anyhow::Result<f64> {
    let mut server = Command::new("iperf3")
        .args(["--server", "--one-off", "--bind", "127.0.0.1", "--port", PORT])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("iperf3 is needed as the limit (Debian: apt-get install iperf3)")?;
    let client = ["--client", "127.0.0.1", "--port", PORT, "--time", "1", "--json"];
    let mut output = None;
    for _ in 0..100 {
        let attempt = Command::new("iperf3").args(client).output()?;
        if attempt.status.success() {
            output = Some(attempt.stdout);
            break;
        }
        std::thread::park_timeout(Duration::from_millis(20)); // Until the server listens.
    }
    let _ = server.kill();
    let _ = server.wait();
    let report: Value = serde_json::from_slice(&output.context("iperf3 does not connect")?)?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap_or(0.0);
    ensure!(0.0 < bits, "iperf3 measured nothing: {}", report["error"]);
    Ok(bits / 8e9)
}

/// 2048 tokens.
const BLOCKS: u32 = 128;
/// As long as iperf3, roughly.
const HANDOFFS: usize = 16;
const PORT: &str = "45201";
