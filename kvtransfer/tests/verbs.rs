//! Whole handoffs over RDMA. Run by `tests/rdma/run`; the tests of `handoffs` and `peer_death` take the same way there.

mod worker;

use std::sync::Arc;
use std::time::Instant;

use tidemill_kvtransfer::error::EndpointError;
use tidemill_kvtransfer::{
    Endpoint, EndpointConfig, HandoffEvent, HandoffMode, Path, PushWrite, RdmaConfig, Region, Reserve, Slab,
    Source, Tail, TransportChoice,
};
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::{Bridge, KvDtype};
use tidemill_kvtransfer_proto::message::TransportKind;
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};
use worker::{PATIENCE, Way, Worker, config, pair};

const HANDOFF: HandoffId = HandoffId(3);

/// Sixteen tokens of a model with 32 layers, 8 heads of 64: 64 blocks of one mebibyte.
fn large(name: &str, instance: u64, blocks: usize, handoff: HandoffMode) -> EndpointConfig {
    let mut config = config(name, instance, Way::Rdma, 1);
    config.handoff = handoff;
    config.layout.layers = 32;
    config.layout.kv_heads = 8;
    config.layout.heads.count = 8;
    config.layout.head_size = 64;
    config.coverage = Coverage::Sampled; // The test looks at every byte itself.
    config.region = Region::new(name, config.layout.block_bytes() * blocks).expect("memory");
    config
}

#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn a_large_handoff_is_right_in_every_bit() {
    large_handoff(HandoffMode::Push);
}

#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn a_large_handoff_that_is_read_is_right_in_every_bit() {
    large_handoff(HandoffMode::Pull);
}

/// As the decode worker wants it.
fn large_handoff(mode: HandoffMode) {
    const BLOCKS: usize = 64;
    let prefill = Worker::start(large("prefill", 1, BLOCKS, HandoffMode::Push));
    let decode = Worker::start(large("decode", 2, BLOCKS, mode));
    prefill.meet(decode.address());
    let link = prefill.endpoint.link(2).expect("connected");
    assert_eq!(link.transport, TransportKind::Rdma);
    assert!(0.0 < link.bytes_per_second, "measured");
    let block_bytes = decode.layout.block_bytes();
    assert_eq!(BLOCKS * block_bytes, 64 << 20);
    // Fully fragmented: no two neighbours of the sequence are neighbours in memory, on either side.
    let place = |index: usize, step: usize| index * step % BLOCKS;
    let targets: Vec<BlockRef> = (0..BLOCKS)
        .map(|index| BlockRef { block: BlockId(place(index, 37) as u32), epoch: Epoch(4) })
        .collect();
    let bytes = numbers(BLOCKS * block_bytes);
    for (index, block) in bytes.chunks(block_bytes).enumerate() {
        prefill.region.write(place(index, 11) * block_bytes, block);
    }
    let reserve = Reserve {
        handoff: HANDOFF,
        peer_instance: 1,
        within: PATIENCE,
        tokens: TokenCount(BLOCKS as u32 * 16),
        first_block: 0,
        cached: vec![],
        targets: targets.clone(),
    };
    decode.endpoint.reserve(reserve);
    prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
    prefill.expect_reserved();
    let since = Instant::now();
    // Layer by layer, as a model computes them.
    let layer = block_bytes / 32;
    for number in 0..32 {
        let write = |index: usize| PushWrite {
            target_index: index as u32,
            offset: number * layer,
            len: layer,
            source: Source::Region { offset: place(index, 11) * block_bytes + number * layer },
        };
        prefill.endpoint.push(HANDOFF, (0..BLOCKS).map(write).collect());
    }
    prefill.endpoint.finish(HANDOFF, vec![1]);
    assert!(matches!(decode.event(), HandoffEvent::Committed { .. }), "committed");
    eprintln!("64 MiB in 2048 pieces took {:?} ({mode:?})", since.elapsed());
    for (index, target) in targets.iter().enumerate() {
        let expected = &bytes[index * block_bytes..(index + 1) * block_bytes];
        assert!(decode.read(*target) == expected, "block {index}");
    }
    decode.endpoint.adopt(HANDOFF);
    assert!(matches!(prefill.event(), HandoffEvent::Delivered { .. }));
}

#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn a_peer_that_comes_back_is_connected_by_rdma_again() {
    let mut decode = Worker::start(config("decode", 2, Way::Rdma, 16));
    for instance in 10..14 {
        let mut prefill = Worker::start(config("prefill", instance, Way::Rdma, 4));
        prefill.meet(decode.address());
        let handoff = HandoffId(instance);
        decode.reserve(handoff, instance, 3);
        prefill.endpoint.expect(handoff, 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        if instance % 2 == 0 {
            prefill.fill_all(&reserved);
            prefill.endpoint.finish(handoff, vec![]);
            assert_eq!(decode.news(), "committed");
            decode.adopt_and_check(handoff);
            assert_eq!(prefill.news(), "delivered");
        } else {
            // It goes in the middle of it.
            prefill.fill(&reserved, 0..1);
            drop(prefill);
            assert!(decode.news().starts_with("reserve-failed:"));
            assert_eq!(decode.news(), "released");
        }
    }
    decode.assert_nothing_leaked();
}

/// Of the way that is left to it each byte passes the decode worker's own thread.
#[test]
fn a_worker_that_reads_offers_no_shared_memory() {
    use TransportChoice::{Auto, SharedMemory};
    let start = |name, instance, handoff| {
        // On any machine: a device of that name is nowhere.
        let rdma = RdmaConfig { devices: vec!["no_such_device".into()], ..RdmaConfig::default() };
        let config = config(name, instance, Way::Tcp, 4);
        Worker::start(EndpointConfig { transport: Auto, handoff, rdma, ..config })
    };
    let (ours, theirs) = (start("ours", 1, HandoffMode::Push), start("theirs", 2, HandoffMode::Pull));
    ours.meet(theirs.address());
    assert_eq!(ours.endpoint.link(2).map(|it| it.transport), Some(TransportKind::Tcp));
    let config = config("contradictory", 3, Way::SharedMemory, 4);
    let contradictory = EndpointConfig { transport: SharedMemory, handoff: HandoffMode::Pull, ..config };
    let error = Endpoint::start(contradictory, Box::new(drop)).expect_err("peers could write");
    assert!(matches!(error, EndpointError::PullOverSharedMemory), "{error:?}");
}

#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn what_is_converted_cannot_be_read_without_room_for_it_and_is_declined() {
    let mut wide = config("prefill", 1, Way::RdmaRead, 8);
    wide.layout.dtype = KvDtype::F32;
    wide.region = Region::new("wide", wide.layout.block_bytes() * 8).expect("memory");
    let (mut prefill, mut decode) =
        (Worker::start(wide), Worker::start(config("decode", 2, Way::RdmaRead, 8)));
    prefill.meet(decode.address());
    decode.reserve(HANDOFF, 1, 2);
    prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
    assert_eq!(prefill.news(), "send-failed:layout");
    assert_eq!((decode.news().as_str(), decode.news().as_str()), ("reserve-failed:declined", "released"));
    decode.assert_nothing_leaked();
}

/// Whatever ends a handoff, what was converted for it makes room for others once nobody can read it.
#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn what_is_converted_is_read_out_of_room_that_is_smaller_than_all_of_it() {
    let mut decode = Worker::start(config("decode", 2, Way::RdmaRead, 64));
    let layer = decode.layout.strides().layer;
    let mut wide = config("prefill", 1, Way::RdmaRead, 8);
    wide.layout.dtype = KvDtype::F32;
    let blocks_end = wide.layout.block_bytes() * 8;
    wide.staging_bytes = 4 * layer;
    wide.region = Region::new("wide", blocks_end + wide.staging_bytes).expect("memory");
    let tail = Tail::new(Arc::clone(&wide.region), blocks_end);
    let mut prefill = Worker::start(wide);
    prefill.meet(decode.address());
    for number in 0..40 {
        let handoff = HandoffId(number);
        decode.reserve(handoff, 1, 5);
        prefill.endpoint.expect(handoff, 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        assert!(matches!(reserved.path, Path::Read) && reserved.bridge != Bridge::Identical);
        let pieces =
            (0..usize::from(decode.layout.layers)).flat_map(|it| (0..5).map(move |index| (it, index)));
        for (at, index) in pieces {
            let piece = loop {
                match tail.take(layer) {
                    Some(piece) => break Arc::new(piece),
                    None => assert_eq!(prefill.news(), "fetched"),
                }
            };
            let content = worker::content(handoff, index, &decode.layout);
            prefill.region.write(piece.offset(), &content[at * layer..(at + 1) * layer]);
            let (target_index, offset) = (index as u32, at * layer);
            let write = PushWrite { target_index, offset, len: layer, source: Source::Tail(piece, 0) };
            prefill.endpoint.push(handoff, vec![write]);
        }
        let is_given_up = number % 4 == 3;
        if is_given_up {
            prefill.endpoint.abandon(handoff, "enough".into());
            assert_eq!(
                (decode.news().as_str(), decode.news().as_str()),
                ("reserve-failed:abandoned", "released")
            );
        } else {
            prefill.endpoint.finish(handoff, vec![]);
            assert_eq!(decode.news(), "committed");
            decode.adopt_and_check(handoff);
        }
        let end = std::iter::repeat_with(|| prefill.news()).find(|news| news != "fetched");
        let expected = if is_given_up { "send-failed:abandoned" } else { "delivered" };
        assert_eq!(end.as_deref(), Some(expected), "{number}");
        assert!(tail.is_unused(), "{number}: somebody keeps what nobody reads");
    }
    // Decode dies while it may read: its queue pairs and its key end, and only then the room is free.
    decode.reserve(HandoffId(100), 1, 5);
    prefill.endpoint.expect(HandoffId(100), 2, PATIENCE);
    prefill.expect_reserved();
    let piece = Arc::new(tail.take(layer).expect("all of it is free"));
    let source = Source::Tail(piece, 0);
    prefill.endpoint.push(HandoffId(100), vec![PushWrite { target_index: 0, offset: 0, len: layer, source }]);
    drop(decode);
    while prefill.news() != "cancel-wanted" {}
    prefill.endpoint.abandon(HandoffId(100), "told to".into());
    while !prefill.news().starts_with("send-failed") {}
    assert!(tail.is_unused());
}

#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn rdma_comes_between_shared_memory_and_tcp() {
    use TransportChoice::{Auto, Rdma, SharedMemory, Tcp};
    #[rustfmt::skip]
    let rows = [
        ("one host shares memory",                 Auto, Auto,         TransportKind::SharedMemory),
        ("RDMA where it is asked for",             Auto, Rdma,         TransportKind::Rdma),
        ("on both sides",                          Rdma, Rdma,         TransportKind::Rdma),
        ("TCP where the other knows nothing else", Rdma, Tcp,          TransportKind::Tcp),
        ("or nothing in common but that",          Rdma, SharedMemory, TransportKind::Tcp),
    ];
    for (name, ours, theirs, expected) in rows {
        let start = |name, instance, transport| {
            let config = config(name, instance, Way::Rdma, 4);
            Worker::start(EndpointConfig { transport, require: false, ..config })
        };
        let (ours, theirs) = (start("ours", 1, ours), start("theirs", 2, theirs));
        ours.meet(theirs.address());
        assert_eq!(ours.endpoint.link(2).map(|it| it.transport), Some(expected), "{name}");
    }
}

/// On any machine: a device of that name is nowhere.
#[test]
fn without_a_device_tcp_takes_over_unless_rdma_is_required() {
    let without = |name, instance, require| {
        let rdma = RdmaConfig { devices: vec!["no_such_device".into()], ..RdmaConfig::default() };
        EndpointConfig { rdma, require, ..config(name, instance, Way::Rdma, 4) }
    };
    let (ours, theirs) =
        (Worker::start(without("ours", 1, false)), Worker::start(without("theirs", 2, false)));
    ours.meet(theirs.address());
    assert_eq!(ours.endpoint.link(2).map(|it| it.transport), Some(TransportKind::Tcp));
    let error = Endpoint::start(without("strict", 3, true), Box::new(drop)).expect_err("RDMA is required");
    assert!(matches!(error, EndpointError::Rdma { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("RDMA is required and cannot be had: "), "{text}");
}

#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn staging_memory_can_be_used_again_and_again() {
    let (prefill, mut decode) = pair(Way::Rdma);
    let block_bytes = decode.layout.block_bytes();
    let mut slab = Arc::new(Slab::new(block_bytes).expect("memory"));
    for number in 0..50 {
        let handoff = HandoffId(number);
        let content = worker::content(handoff, 0, &decode.layout);
        Arc::get_mut(&mut slab).expect("nobody reads it any more").as_mut_slice().copy_from_slice(&content);
        decode.reserve(handoff, 1, 1);
        prefill.endpoint.expect(handoff, 2, PATIENCE);
        prefill.expect_reserved();
        let source = Source::Slab(Arc::clone(&slab), 0);
        prefill
            .endpoint
            .push(handoff, vec![PushWrite { target_index: 0, offset: 0, len: block_bytes, source }]);
        prefill.endpoint.finish(handoff, vec![]);
        assert_eq!(decode.news(), "committed");
        decode.adopt_and_check(handoff);
        assert!(matches!(prefill.event(), HandoffEvent::Delivered { .. }));
    }
}

/// Numbers that repeat nowhere.
fn numbers(len: usize) -> Vec<u8> {
    let mut state = 7u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}
