//! A handoff through shared memory that copies: blocks of 16 tokens, none beside its neighbour on either side.

use std::time::Duration;

use tidemill_kvtransfer::Region;
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::KvDtype;

use crate::report::{Row, Target};
use crate::timing::{gigabytes_per_second, in_turns, median, ratio, time};
use crate::workers::{Pair, Way, billion};

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let layout = billion(16, KvDtype::Bf16);
    let all_layers = usize::from(layout.layers);
    let mut rows = Vec::new();
    for (name, layers) in [("whole blocks", all_layers), ("layer by layer", 1)] {
        let mut pair = Pair::new(layout.clone(), 2 * BLOCKS, Way::SharedMemory, Coverage::Sampled)?;
        let bytes = pair.bytes(BLOCKS);
        let (from, mut to) = (Region::new("limit", bytes)?, vec![2; bytes]);
        from.write(0, &vec![1; bytes]);
        let mut writes = 0;
        let mut failure = None;
        let (memcpy, handoff) = in_turns(
            rounds,
            || time(|| from.read(0, std::hint::black_box(&mut to))),
            || match pair.hand_over(BLOCKS, layers) {
                Ok(took) => {
                    writes = took.writes;
                    took.until_committed
                }
                Err(error) => {
                    failure = Some(error);
                    Duration::ZERO
                }
            },
        );
        if let Some(failure) = failure {
            return Err(failure);
        }
        rows.push(Row {
            measure: format!("shm handoff, copied, 16-token blocks fully fragmented, {name}"),
            value: gigabytes_per_second(bytes, median(&handoff)),
            unit: "GB/s",
            limit: Some((gigabytes_per_second(bytes, median(&memcpy)), "memcpy, one piece")),
            target: Some(Target::Ratio { measured: ratio(&handoff, &memcpy), at_least: 0.9 }),
            note: format!(
                "{} MiB in {writes} writes, from the first push to the verified commit, sampled digest",
                bytes >> 20
            ),
        });
    }
    Ok(rows)
}

/// 2048 tokens.
const BLOCKS: u32 = 128;
