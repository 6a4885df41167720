//! A handoff that moves no byte: the prompt was computed in the decode worker's blocks.

use std::time::Duration;

use tidemill_engine_core::request::{Part, Request, RequestId, SamplingParams, StopConditions};
use tidemill_engine_core::scheduler::{Limits, Scheduler};
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::KvDtype;
use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, HandoffId, TokenCount};

use crate::report::{Row, Target};
use crate::timing::{median, quantile, time};
use crate::whole_system;
use crate::workers::{Ahead, Pair, Way, billion};

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let least = whole_system::head_start()?;
    let mut pair = Pair::new(billion(BLOCK_LEN, KvDtype::Bf16), 4096, Way::InPlace, Coverage::Sampled)?;
    let mut rows = Vec::new();
    let mut said = vec![Vec::new(); SIZES.len()];
    let mut unsaid = said.clone();
    let mut hurried = said.clone();
    let mut adopted = said.clone();
    // In turns, so that the sizes are compared under one weather.
    for _ in 0..2 * rounds {
        for (index, blocks) in SIZES.into_iter().enumerate() {
            for (kept, head_start) in [(&mut said, HEAD), (&mut hurried, least)] {
                pair.ahead = Some(Ahead { step: STEP as usize, head_start });
                // The endpoint expects that a head takes as long as the last one did, as those of one model do.
                pair.hand_over(blocks, 1)?;
                kept[index].push(pair.hand_over(blocks, 1)?.after_finish);
            }
            pair.ahead = None;
            unsaid[index].push(pair.hand_over(blocks, 1)?.after_finish);
            adopted[index].push(adoption(blocks));
        }
    }
    for (index, blocks) in SIZES.into_iter().enumerate() {
        let times = &said[index];
        rows.push(Row {
            measure: format!("shm handoff by change of owner, {} MiB", pair.bytes(blocks) >> 20),
            value: microseconds(median(times)),
            unit: "µs",
            limit: None,
            target: Some(Target::AtMost(50.0)),
            note: format!(
                "from the first token to the verified commit, decode's thread woken; the engine says after each {} tokens how \
                 far it is, and for the last time {} ms before the first token, as a model with such blocks would; p10 {:.0} µs, \
                 p90 {:.0} µs; if it says so {:.0} µs before, as the demo model just did, {:.0} µs; if it says nothing {:.0} µs; then decode's \
                 scheduler takes the blocks over: {:.0} µs",
                STEP * BLOCK_LEN,
                HEAD.as_millis(),
                microseconds(quantile(times, 0.1)),
                microseconds(quantile(times, 0.9)),
                microseconds(least),
                microseconds(median(&hurried[index])),
                microseconds(median(&unsaid[index])),
                microseconds(median(&adopted[index])),
            ),
        });
    }
    Ok(rows)
}

/// How long decode's scheduler takes to make committed blocks a running sequence's own.
fn adoption(blocks: u32) -> Duration {
    let tokens = TokenCount(blocks * BLOCK_LEN);
    let limits = Limits {
        block_len: BlockLen::new(BLOCK_LEN).expect("a power of two"),
        max_num_seqs: 4,
        max_num_batched_tokens: TokenCount(STEP * BLOCK_LEN),
        max_model_len: TokenCount(tokens.0 + 8),
        long_prefill_threshold: None,
        max_waiting: 8,
        prefix_cache: true,
    };
    let mut scheduler = Scheduler::new(limits, BlockCount(blocks + 8));
    let id = RequestId(1);
    let request = Request {
        id,
        tokens: (0..tokens.0).collect(),
        prompt_len: tokens,
        sampling: SamplingParams::default(),
        stop: StopConditions::after(8),
        part: Part::DecodeFrom(HandoffId(1)),
    };
    scheduler.submit(request).expect("there is room");
    let plan = scheduler.plan();
    scheduler.begin(&plan);
    scheduler.finish(&plan, &[]);
    assert_eq!(scheduler.take_reservations().len(), 1, "it waits for its cache");
    time(|| {
        let outcome = scheduler.adopt(id, 7);
        assert!(outcome.is_some(), "it is adopted");
    })
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Blocks of 16 tokens: 16, 2048, 8192 and 32,768 tokens.
const SIZES: [u32; 4] = [1, 128, 512, 2048];
const BLOCK_LEN: u32 = 16;
/// What the head of a model of a billion parameters takes at least on a CPU: it reads half a gigabyte, at up to 200 GB/s.
const HEAD: Duration = Duration::from_millis(3);
/// Blocks of a step with the usual `--max-num-batched-tokens`.
const STEP: u32 = 32;
