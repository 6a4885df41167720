//! Blocks of KV: where they are, and that it does not matter in whose memory.

use std::sync::Arc;

use tidemill_engine::memory::Arena;
use tidemill_engine::runner::{Batch, BatchSequence, LogitsWanted, Runner, RunnerLimits};
use tidemill_kernels::cpu::{Cpu, CpuOptions};
use tidemill_kernels::kv::BlockAddress;
use tidemill_kvtransfer::{Access, Region};
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen};

use super::bench::{goldens, model};

fn layout() -> KvLayout {
    let block_len = BlockLen::new(16).expect("a power of two");
    model("llama3").kv_layout(KvDtype::Bf16, block_len, AxisOrder::HeadToken)
}

#[test]
fn blocks_lie_one_after_another() {
    let arena = Arena::new(layout(), BlockCount(3)).expect("memory for the test");
    assert_eq!(arena.blocks(), BlockCount(3));
    assert_eq!(arena.shape().block_bytes(), layout().block_bytes());
    let first = arena.region().as_ptr().addr();
    for block in 0..3 {
        let offset = block * layout().block_bytes();
        assert_eq!(arena.offset(BlockId(block as u32)), offset);
        assert_eq!(arena.address(BlockId(block as u32)).as_ptr().addr(), first + offset);
    }
}

#[test]
#[should_panic(expected = "BlockId(3) is outside an arena of BlockCount(3)")]
fn a_block_that_is_not_there_is_a_bug() {
    Arena::new(layout(), BlockCount(3)).expect("memory for the test").address(BlockId(3));
}

#[test]
fn sizes_that_no_machine_has_are_errors() {
    assert!(Arena::new(layout(), BlockCount(0)).is_err());
    let huge = KvLayout { layers: u16::MAX, head_size: u16::MAX, ..layout() };
    assert!(Arena::new(huge, BlockCount(u32::MAX)).is_err());
}

#[test]
fn a_region_that_is_not_whole_blocks_has_an_unused_rest() {
    let region = Region::new("test", 3 * layout().block_bytes() - 1).expect("memory for the test");
    assert_eq!(Arena::over(region, layout()).blocks(), BlockCount(2));
}

/// A sequence whose first blocks are a peer's, mapped here a second time, and whose last are this worker's own.
#[test]
fn a_sequence_may_lie_in_the_memory_of_two_workers() {
    let model = model("llama3");
    let golden = goldens("llama3").pop().expect("the prompt of 300 is last");
    let count = BlockCount(golden.prompt.len().div_ceil(16) as u32);
    let own = Arena::new(layout(), count).expect("memory for the test");
    let peer = Arena::new(layout(), count).expect("memory for the test");
    let shared = peer.region().fd().try_clone_to_owned().expect("a spare descriptor");
    let mapped =
        Region::map(shared, peer.region().len(), Access::ReadWrite).expect("the peer's region can be mapped");
    let mapped = Arena::over(mapped, layout());

    let limits = RunnerLimits { max_tokens: 300, max_seqs: 1, max_model_len: 300 };
    let cpu = Arc::new(Cpu::new(CpuOptions::default()).expect("a CPU"));
    let mut runner = Runner::new(model, cpu, *own.shape(), limits);
    let mut run = |tokens: &[u32], first_position, blocks: &[BlockAddress]| {
        let sequence = BatchSequence { tokens, first_position, blocks, logits: LogitsWanted::Last };
        let mut bits = Vec::new();
        let logits = runner.step(&Batch { sequences: &[sequence] }, &mut |_| {});
        logits.for_each(|row| bits.extend(row.logits.iter().map(|x| x.to_bits())));
        bits
    };
    let all = |arena: &Arena| (0..count.0).map(|block| arena.address(BlockId(block))).collect::<Vec<_>>();
    let expected = run(&golden.prompt, 0, &all(&own));

    let theirs = 10;
    let (prefix, rest) = golden.prompt.split_at(theirs * 16);
    run(prefix, 0, &all(&peer)[..theirs]);
    let mixed = [&all(&mapped)[..theirs], &all(&own)[theirs..]].concat();
    assert_eq!(run(rest, prefix.len() as u32, &mixed), expected);
}
