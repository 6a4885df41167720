//! Random schedules of two workers, with a model of what each block contains.
//!
//! The model's cache holds, for each slot, a fingerprint of the token there and of all tokens before it. A position's
//! fingerprint is computed from the one read at the position before, and the next token is computed from the last
//! one read: if sharing, eviction, preemption, a handoff or a late write ever mixed contents, a fingerprint would
//! be wrong, and a request would get other tokens than it gets alone.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod model;
mod world;

use proptest::prelude::*;
use tidemill_engine_core::request::TokenId;
use tidemill_engine_core::scheduler::Limits;
use tidemill_kvtransfer_proto::units::{BlockLen, TokenCount};

use world::{Op, World};

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        max_shrink_iters: 1_000,
        failure_persistence: None,
        ..ProptestConfig::default() })]

    #[test]
    fn everything_ends_and_nothing_is_mixed(
        limits in limits(),
        blocks in [6_u32..16, 6_u32..16],
        ops in prop::collection::vec(op(), 1..160),
    ) {
        let mut world = World::new(limits, blocks);
        for op in ops {
            world.act(op);
            world.check();
        }
        world.drain();
    }
}

fn limits() -> impl Strategy<Value = Limits> {
    let threshold = prop::option::of(1_u32..6);
    (1_u32..=2, 1_u32..6, 1_u32..16, 4_u32..12, any::<bool>(), threshold).prop_map(
        |(block_len, max_num_seqs, budget, max_waiting, prefix_cache, threshold)| Limits {
            block_len: BlockLen::new(1 << block_len).unwrap(),
            max_model_len: TokenCount(28),
            max_num_seqs,
            max_num_batched_tokens: TokenCount(budget),
            max_waiting,
            prefix_cache,
            long_prefill_threshold: threshold.map(TokenCount),
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let worker = || 0_usize..2;
    let which = any::<prop::sample::Index>;
    prop_oneof![
        12 => (worker(), prompt(), 1_u32..20).prop_map(|(worker, prompt, max)| Op::Whole { worker, prompt, max }),
        12 => (prompt(), 1_u32..20, any::<bool>())
            .prop_map(|(prompt, max, in_place)| Op::Split { prompt, max, in_place }),
        30 => worker().prop_map(Op::Begin),
        30 => worker().prop_map(Op::Finish),
        8 => Just(Op::Announce),
        8 => (which(), any::<bool>()).prop_map(|(link, own)| Op::Place { link, own }),
        8 => which().prop_map(Op::Push),
        10 => which().prop_map(Op::Commit),
        4 => which().prop_map(Op::FailAtDecode),
        3 => which().prop_map(Op::FailAtPrefill),
        4 => which().prop_map(Op::LateWrite),
        4 => which().prop_map(Op::Settle),
        2 => which().prop_map(Op::Cancel),
        3 => (worker(), 1_u32..6).prop_map(|(worker, count)| Op::Grow { worker, count }),
        3 => (worker(), 1_u32..6).prop_map(|(worker, count)| Op::Shrink { worker, count }),
    ]
}

/// Prompts that often begin alike.
fn prompt() -> impl Strategy<Value = Vec<TokenId>> {
    (0_usize..16, prop::collection::vec(0_u32..2, 1..10))
        .prop_map(|(shared, own)| (0..).take(shared).map(|position| position % 3).chain(own).collect())
}
