//! A handoff that moves no byte: the prompt was computed in the decode worker's blocks.

use std::time::Duration;

use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::KvDtype;

use crate::report::{Row, Target};
use crate::timing::{median, quantile};
use crate::workers::{Pair, Way, billion};

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut pair = Pair::new(billion(16, KvDtype::Bf16), 1024, Way::InPlace, Coverage::Sampled)?;
    let mut rows = Vec::new();
    let mut announced = vec![Vec::new(); SIZES.len()];
    let mut unannounced = announced.clone();
    // In turns, so that the sizes are compared under one weather.
    for _ in 0..4 * rounds {
        for (index, blocks) in SIZES.into_iter().enumerate() {
            pair.announces = Some(FIRST_TOKEN);
            announced[index].push(pair.hand_over(blocks, 1)?.after_finish);
            pair.announces = None;
            unannounced[index].push(pair.hand_over(blocks, 1)?.after_finish);
        }
    }
    for (index, blocks) in SIZES.into_iter().enumerate() {
        let microseconds = |time: Duration| time.as_secs_f64() * 1e6;
        let times = &announced[index];
        rows.push(Row {
            measure: format!("shm handoff by change of owner, {} MiB", pair.bytes(blocks) >> 20),
            value: microseconds(median(times)),
            unit: "µs",
            limit: None,
            target: Some(Target::AtMost(50.0)),
            note: format!(
                "from the first token to the verified commit, decode's thread woken; the engine says {} µs before that \
                 the prompt is computed; p10 {:.0} µs, p90 {:.0} µs; if it does not say so {:.0} µs",
                FIRST_TOKEN.as_micros(),
                microseconds(quantile(times, 0.1)),
                microseconds(quantile(times, 0.9)),
                microseconds(median(&unannounced[index])),
            ),
        });
    }
    Ok(rows)
}

/// Blocks of 16 tokens: 16, 2048 and 8192 tokens.
const SIZES: [u32; 3] = [1, 128, 512];
/// Between the end of the prompt and the first token: a guess at what a small model takes for its head and the choice.
const FIRST_TOKEN: Duration = Duration::from_micros(50);
