//! A handoff that moves no byte: the prompt was computed in the decode worker's blocks.

use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::KvDtype;

use crate::report::{Row, Target};
use crate::timing::{median, quantile};
use crate::workers::{Pair, Way, billion};

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut pair = Pair::new(billion(16, KvDtype::Bf16), 1024, Way::InPlace, Coverage::Sampled)?;
    let mut rows = Vec::new();
    let mut times = vec![Vec::new(); SIZES.len()];
    // In turns, so that the sizes are compared under one weather.
    for _ in 0..4 * rounds {
        for (times, blocks) in times.iter_mut().zip(SIZES) {
            times.push(pair.hand_over(blocks, 1)?.after_finish);
        }
    }
    for (times, blocks) in times.iter().zip(SIZES) {
        let microseconds = |time: std::time::Duration| time.as_secs_f64() * 1e6;
        rows.push(Row {
            measure: format!("shm handoff by change of owner, {} MiB", pair.bytes(blocks) >> 20),
            value: microseconds(median(times)),
            unit: "µs",
            limit: None,
            target: Some(Target::AtMost(50.0)),
            note: format!(
                "from the end of prefill to the verified commit, two threads woken; p10 {:.0} µs, p90 {:.0} µs",
                microseconds(quantile(times, 0.1)),
                microseconds(quantile(times, 0.9))
            ),
        });
    }
    Ok(rows)
}

/// Blocks of 16 tokens: 16, 2048 and 8192 tokens.
const SIZES: [u32; 3] = [1, 128, 512];
