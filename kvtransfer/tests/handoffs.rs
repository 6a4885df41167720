//! Two endpoints in one process, over each way for data: whole handoffs, and handoffs that end at each stage.

mod worker;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemill_kvtransfer::error::MeetError;
use tidemill_kvtransfer::{
    EndpointConfig, HandoffEvent, Path, PeerAddress, PushWrite, Region, Reserve, Reserved, Source,
    TransportChoice,
};
use tidemill_kvtransfer_proto::credit::CreditLoad;
use tidemill_kvtransfer_proto::error::{CommitFault, TransferError};
use tidemill_kvtransfer_proto::layout::{Bridge, KvDtype};
use tidemill_kvtransfer_proto::message::TransportKind;
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};
use worker::{PATIENCE, Way, Worker, config, content, pair, ways};

const HANDOFF: HandoffId = HandoffId(77);

#[test]
fn a_handoff_brings_every_byte() {
    for way in ways() {
        let (mut prefill, mut decode) = pair(way);
        assert_eq!(prefill.endpoint.reaches_in_place(2), way == Way::InPlace);
        decode.reserve(HANDOFF, 1, 5);
        prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        assert_eq!(matches!(reserved.path, Path::InPlace(_)), way == Way::InPlace);
        assert_eq!((reserved.bridge, reserved.tokens), (Bridge::Identical, TokenCount(79)));
        prefill.fill_all(&reserved);
        prefill.endpoint.finish(HANDOFF, b"the first token".to_vec());
        match decode.event() {
            HandoffEvent::Committed {
                handoff: HANDOFF,
                tokens: TokenCount(79),
                payload,
                on_device: false,
            } => {
                assert_eq!(payload, b"the first token");
            }
            other => panic!("{way:?}: {other:?}"),
        }
        decode.adopt_and_check(HANDOFF);
        let HandoffEvent::Delivered { stats, .. } = prefill.event() else { panic!("{way:?}: not delivered") };
        let bytes = 5 * decode.layout.block_bytes() as u64;
        assert_eq!(stats.bytes, if way == Way::InPlace { 0 } else { bytes }, "{way:?}");
        assert_eq!(stats.writes == 0, way == Way::InPlace);

        // Blocks that come back are used again, in a later epoch.
        decode.reserve(HandoffId(78), 1, 1);
        prefill.endpoint.expect(HandoffId(78), 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        prefill.fill_all(&reserved);
        prefill.endpoint.finish(HandoffId(78), vec![]);
        assert_eq!(decode.news(), "committed");
        decode.adopt_and_check(HandoffId(78));
        assert_eq!(prefill.news(), "delivered");
        decode.assert_nothing_leaked();
    }
}

/// An engine that is told so is awake when the commit comes.
#[test]
fn an_engine_hears_that_nothing_but_the_commit_is_missing() {
    for (name, said, expected) in [
        ("all blocks are named ahead", &[32, 47][..], &["nearing", "committed"][..]),
        ("some are, and the rest with the commit", &[32], &["committed"]),
        ("none is", &[], &["committed"]),
    ] {
        let (prefill, mut decode) = pair(Way::InPlace);
        decode.reserve(HANDOFF, 1, 3);
        prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
        prefill.fill_all(&prefill.expect_reserved());
        for tokens in said {
            prefill.endpoint.filled(HANDOFF, TokenCount(*tokens));
        }
        let heard = |word: &str| assert_eq!(decode.news_of_commit(), word, "{name}");
        let (last, before) = expected.split_last().expect("it is committed");
        before.iter().for_each(|word| heard(word));
        prefill.endpoint.finish(HANDOFF, vec![]);
        heard(last);
        decode.adopt_and_check(HANDOFF);
    }
}

#[test]
fn writes_come_from_the_arena_too_and_whole_blocks_are_one_write() {
    for way in [Way::SharedMemory, Way::Tcp] {
        let (prefill, mut decode) = pair(way);
        let bytes = prefill.layout.block_bytes();
        decode.reserve(HANDOFF, 1, 3);
        prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
        prefill.expect_reserved();
        for index in 0..3 {
            prefill.region.write((index + 1) * bytes, &content(HANDOFF, index, &prefill.layout));
        }
        let write = |index: usize| PushWrite {
            target_index: index as u32,
            offset: 0,
            len: bytes,
            source: Source::Region { offset: (index + 1) * bytes },
        };
        prefill.endpoint.push(HANDOFF, (0..3).map(write).collect());
        prefill.endpoint.finish(HANDOFF, vec![]);
        assert_eq!(decode.news(), "committed");
        decode.adopt_and_check(HANDOFF);
        let HandoffEvent::Delivered { stats, .. } = prefill.event() else { panic!("{way:?}: not delivered") };
        assert_eq!((stats.bytes, stats.writes), (3 * bytes as u64, 1), "neighbours on both sides are joined");
    }
}

#[test]
fn hundreds_at_once() {
    const HANDOFFS: u64 = 400;
    for way in ways() {
        let prefill = Worker::start(config("prefill", 1, way, 4));
        let mut decode = Worker::start(config("decode", 2, way, 1000));
        decode.meet(prefill.address());
        for number in 0..HANDOFFS {
            // The two halves come in either order.
            let (handoff, blocks) = (HandoffId(number), 1 + number as usize % 4);
            if number % 2 == 0 {
                prefill.endpoint.expect(handoff, 2, PATIENCE);
            }
            decode.reserve(handoff, 1, blocks.min(2));
            if number % 2 == 1 {
                prefill.endpoint.expect(handoff, 2, PATIENCE);
            }
        }
        for _ in 0..HANDOFFS {
            let reserved = prefill.expect_reserved();
            prefill.fill_all(&reserved);
            prefill.endpoint.finish(reserved.handoff, vec![]);
        }
        let mut adopted = BTreeSet::new();
        for _ in 0..HANDOFFS {
            let HandoffEvent::Committed { handoff, .. } = decode.event() else {
                panic!("{way:?}: not committed")
            };
            decode.adopt_and_check(handoff);
            assert!(adopted.insert(handoff));
        }
        let mut delivered = BTreeSet::new();
        for _ in 0..HANDOFFS {
            let HandoffEvent::Delivered { handoff, .. } = prefill.event() else {
                panic!("{way:?}: not delivered")
            };
            assert!(delivered.insert(handoff));
        }
        assert_eq!(adopted, delivered);
        decode.assert_nothing_leaked();
    }
}

/// What one side does, a word each; `!` words are events that have to come on that side.
/// `D` and `P` say whose turn it is.
fn play(way: Way, script: &str) {
    let (mut prefill, mut decode) = pair(way);
    let mut reserved = None;
    let context = format!("{way:?}: {script}");
    let mut on_decode = true;
    for word in script.split_whitespace() {
        let actor = if on_decode { &mut decode } else { &mut prefill };
        match word {
            "D" => on_decode = true,
            "P" => on_decode = false,
            "reserve" => actor.reserve(HANDOFF, 1, 3),
            "cancel" => actor.endpoint.cancel(HANDOFF),
            "refuse" => actor.endpoint.refuse(HANDOFF, "no".into()),
            "adopt" => actor.adopt_and_check(HANDOFF),
            "expect" => actor.endpoint.expect(HANDOFF, 2, PATIENCE),
            "expect-at-once" => actor.endpoint.expect(HANDOFF, 2, Duration::ZERO),
            "reserved!" => reserved = Some(actor.expect_reserved()),
            "fill" => actor.fill_all(reserved.as_ref().expect("reserved first")),
            "half" => actor.fill(reserved.as_ref().expect("reserved first"), 0..1),
            "some" => actor.endpoint.filled(HANDOFF, TokenCount(20)),
            "all" => {
                actor.endpoint.filled(HANDOFF, TokenCount(47));
                actor.endpoint.computed(HANDOFF);
            }
            "finish" => actor.endpoint.finish(HANDOFF, vec![1]),
            "abandon" => actor.endpoint.abandon(HANDOFF, "tired".into()),
            news => assert_eq!(format!("{}!", actor.news()), news, "{context}"),
        }
    }
    decode.assert_nothing_leaked();
}

#[test]
fn every_stage_can_be_the_last() {
    #[rustfmt::skip]
    let scripts = [
        // The decode side cancels.
        "D reserve P expect reserved! D cancel P cancel-wanted! abandon send-failed:cancelled! D released!",
        "D reserve P expect reserved! half D cancel P cancel-wanted! abandon send-failed:cancelled! D released!",
        "D reserve P expect reserved! fill D cancel P cancel-wanted! abandon send-failed:cancelled! D released!",
        "D reserve P expect reserved! fill finish D committed! cancel P send-failed:refused! D released!",
        // It refuses what is right.
        "D reserve P expect reserved! fill finish D committed! refuse P send-failed:refused! D released!",
        // The prefill side finishes although it should stop: the same as giving up.
        "D reserve P expect reserved! half D cancel P cancel-wanted! finish send-failed:cancelled! D released!",
        // The prefill side gives up.
        "P expect abandon send-failed:abandoned! D reserve reserve-failed:abandoned! released!",
        "D reserve P expect reserved! abandon send-failed:abandoned! D reserve-failed:abandoned! released!",
        "D reserve P expect reserved! half abandon send-failed:abandoned! D reserve-failed:abandoned! released!",
        "D reserve P expect reserved! fill abandon send-failed:abandoned! D reserve-failed:abandoned! released!",
        // What is computed is named ahead, where it is computed in place, and it may end there too.
        "D reserve P expect reserved! fill some all finish D committed! adopt P delivered!",
        "D reserve P expect reserved! fill some finish D committed! adopt P delivered!",
        "D reserve P expect reserved! fill some D cancel P cancel-wanted! abandon send-failed:cancelled! D released!",
        "D reserve P expect reserved! fill some all abandon send-failed:abandoned! D reserve-failed:abandoned! released!",
        // After `finish` the decode side has the say.
        "D reserve P expect reserved! fill finish abandon D committed! adopt P delivered!",
        // Nobody reserves in time; the reservation that comes too late is declined.
        "P expect-at-once send-failed:expired! D reserve reserve-failed:abandoned! released!",
    ];
    // `Released` says that the prefill side has heard of the end, where it takes its word: not over TCP, and not of who reads.
    let early = "D reserve cancel released! P expect send-failed:cancelled!";
    // What was not written is noticed; what was not computed in place only the engine can know.
    let missing = "D reserve P expect reserved! half finish D reserve-failed:badcommit! P send-failed:refused! D released!";
    for way in ways() {
        for script in scripts {
            play(way, script);
        }
        if way != Way::Tcp && way != Way::RdmaRead {
            play(way, early);
        }
        if way != Way::InPlace {
            play(way, missing);
        }
    }
}

/// With leave for less than a block at a time, one goes after the other.
#[test]
fn many_prefill_workers_take_turns() {
    for way in ways() {
        let mut decode = Worker::start(EndpointConfig { credit: 1000, ..config("decode", 2, way, 64) });
        let mut prefills: Vec<Worker> =
            (10..16).map(|instance| Worker::start(config("prefill", instance, way, 4))).collect();
        for prefill in &prefills {
            prefill.meet(decode.address());
            prefill.endpoint.expect(HandoffId(prefill.instance), 2, PATIENCE);
            decode.reserve(HandoffId(prefill.instance), prefill.instance, 4);
        }
        // All have their bytes before any has leave for more than the first.
        let reserved: Vec<Reserved> = prefills.iter().map(Worker::expect_reserved).collect();
        for (prefill, reserved) in prefills.iter().zip(&reserved) {
            prefill.fill_all(reserved);
            prefill.endpoint.finish(reserved.handoff, vec![]);
        }
        for _ in &reserved {
            let HandoffEvent::Committed { handoff, .. } = decode.event() else {
                panic!("{way:?}: not committed");
            };
            decode.adopt_and_check(handoff);
        }
        for prefill in &mut prefills {
            assert_eq!(prefill.news(), "delivered", "{way:?}");
        }
        let since = Instant::now();
        while decode.endpoint.credit_load() != CreditLoad::default() {
            assert!(since.elapsed() < PATIENCE, "{way:?}: {:?} stays lent", decode.endpoint.credit_load());
            std::thread::yield_now();
        }
        decode.assert_nothing_leaked();
    }
}

#[test]
fn a_changed_byte_is_noticed() {
    for way in ways() {
        let (mut prefill, mut decode) = pair(way);
        decode.reserve(HANDOFF, 1, 3);
        prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        prefill.fill_all(&reserved);
        let target = reserved.targets[1];
        let written = content(HANDOFF, 1, &decode.layout);
        while decode.read(target) != written {
            std::thread::yield_now(); // The bytes are on their way.
        }
        if way == Way::InPlace {
            // Both digests would be taken of the changed bytes: there is nothing that could notice.
            prefill.endpoint.abandon(HANDOFF, "enough".into());
            continue;
        }
        decode.region.write(target.block.0 as usize * written.len() + 1000, &[written[1000] ^ 4]);
        prefill.endpoint.finish(HANDOFF, vec![]);
        match decode.event() {
            HandoffEvent::ReserveFailed { error, .. } => {
                assert_eq!(error, TransferError::BadCommit(CommitFault::Digest { index: 1 }), "{way:?}");
            }
            other => panic!("{way:?}: {other:?}"),
        }
        assert_eq!(decode.news(), "released");
        assert_eq!(prefill.news(), "send-failed:refused");
        decode.assert_nothing_leaked();
    }
}

#[test]
fn impossible_orders_are_turned_down() {
    let (prefill, decode) = pair(Way::Tcp);
    let block = |number| BlockRef { block: BlockId(number), epoch: Epoch(1) };
    let reserve = |peer_instance, tokens, first_block, cached: &[u32], targets: &[u32]| Reserve {
        handoff: HANDOFF,
        peer_instance,
        within: Duration::ZERO,
        tokens: TokenCount(tokens),
        first_block,
        cached: cached.iter().copied().map(block).collect(),
        targets: targets.iter().copied().map(block).collect(),
    };
    #[rustfmt::skip]
    let rows = [
        ("a peer that was never met",          reserve(9, 16, 0, &[], &[1])),
        ("no target",                          reserve(1, 16, 1, &[0], &[])),
        ("a target twice",                     reserve(1, 32, 0, &[], &[1, 1])),
        ("a target outside",                   reserve(1, 16, 0, &[], &[32])),
        ("a cached block outside",             reserve(1, 32, 1, &[32], &[1])),
        ("fewer targets than tokens need",     reserve(1, 33, 0, &[], &[1, 2])),
        ("more targets than tokens need",      reserve(1, 16, 0, &[], &[1, 2])),
        ("more cached than come before",       reserve(1, 32, 1, &[0, 3], &[1])),
    ];
    for (name, reserve) in rows {
        decode.endpoint.reserve(reserve);
        assert!(matches!(decode.event(), HandoffEvent::ReserveFailed { .. }), "{name}");
        assert!(matches!(decode.event(), HandoffEvent::Released { .. }), "{name}");
    }
    drop(prefill);
}

#[test]
fn a_push_outside_its_target_ends_the_handoff() {
    for (offset, len) in [(0, 100), (64, 4096), (0, 0), (usize::MAX - 63, 4096)] {
        let (mut prefill, mut decode) = pair(Way::SharedMemory);
        decode.reserve(HANDOFF, 1, 1);
        prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
        prefill.expect_reserved();
        let source = Source::Region { offset: 0 };
        let write = PushWrite { target_index: 0, offset, len, source };
        prefill.endpoint.push(HANDOFF, vec![write]);
        assert_eq!(prefill.news(), "cancel-wanted");
        prefill.endpoint.abandon(HANDOFF, "told to".into());
        assert_eq!(prefill.news(), "send-failed:refused");
        assert_eq!(decode.news(), "reserve-failed:abandoned");
        assert_eq!(decode.news(), "released");
        decode.assert_nothing_leaked();
    }
}

#[test]
fn a_peer_that_leaves_in_good_order_leaves_nothing_behind() {
    for way in ways() {
        // The prefill side leaves: writes end with it, but an engine that computes in place it cannot stop.
        let (prefill, mut decode) = pair(way);
        decode.reserve(HANDOFF, 1, 3);
        prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        prefill.fill(&reserved, 0..1);
        if way == Way::InPlace {
            prefill.endpoint.abandon(HANDOFF, "leaving".into());
        }
        drop(prefill);
        let failed = decode.news();
        assert!(failed.starts_with("reserve-failed:"), "{way:?}: {failed}");
        assert_eq!(decode.news(), "released", "{way:?}");
        decode.assert_nothing_leaked();

        // The decode side leaves.
        let (mut prefill, mut decode) = pair(way);
        decode.reserve(HANDOFF, 1, 3);
        prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        prefill.fill(&reserved, 0..1);
        drop(decode);
        assert_eq!(prefill.news(), "cancel-wanted", "{way:?}");
        prefill.endpoint.abandon(HANDOFF, "told to".into());
        let failed = prefill.news();
        assert!(failed.starts_with("send-failed:"), "{way:?}: {failed}");
    }
}

#[test]
fn meeting() {
    // Both sides at once, over and over: one connection comes of it, and it works.
    for round in 0..20 {
        let mut prefill = Worker::start(config("prefill", 1, Way::SharedMemory, 4));
        let mut decode = Worker::start(config("decode", 2, Way::SharedMemory, 32));
        let (from, to) = (&prefill.endpoint, decode.address());
        std::thread::scope(|scope| {
            scope.spawn(move || from.meet(vec![to], PATIENCE));
            let met = decode.endpoint.meet(vec![prefill.address()], PATIENCE);
            let link = met[0].outcome.as_ref().expect("met");
            assert_eq!(link.transport, TransportKind::SharedMemory);
            assert!(0.0 < link.bytes_per_second);
        });
        decode.reserve(HandoffId(round), 1, 1);
        prefill.endpoint.expect(HandoffId(round), 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        prefill.fill_all(&reserved);
        prefill.endpoint.finish(HandoffId(round), vec![]);
        assert_eq!(decode.news(), "committed");
        decode.adopt_and_check(HandoffId(round));
        assert_eq!(prefill.news(), "delivered");
    }
}

type Change<'a> = &'a dyn Fn(&mut EndpointConfig);

#[test]
fn a_mismatch_names_what_differs() {
    let start = |change: Change<'_>| {
        let mut config = config("other", 2, Way::Tcp, 4);
        change(&mut config);
        Worker::start(config)
    };
    let ours = Worker::start(config("ours", 1, Way::Tcp, 4));
    let rows: [(&str, &str, Change<'_>); 3] = [
        ("another model", "model", &|config| config.layout.model = "letters".into()),
        ("another depth", "layers", &|config| config.layout.layers = 2),
        ("memory only, for one that wants TCP", "transports", &|config| {
            config.transport = TransportChoice::SharedMemory;
        }),
    ];
    for (name, expected, change) in rows {
        let other = start(change);
        match &ours.endpoint.meet(vec![other.address()], PATIENCE)[0].outcome {
            Err(MeetError::Mismatch { field, .. }) => assert_eq!(field, expected, "{name}"),
            outcome => panic!("{name}: {outcome:?}"),
        }
    }
    let itself = ours.endpoint.meet(vec![ours.address()], PATIENCE);
    assert!(matches!(itself[0].outcome, Err(MeetError::Mismatch { .. })), "{itself:?}");
    let mut impostor = start(&|_| {}).address();
    impostor.instance = 3;
    let other = start(&|_| {});
    impostor.address = other.endpoint.address();
    let met = ours.endpoint.meet(vec![impostor], PATIENCE);
    assert!(
        matches!(&met[0].outcome, Err(MeetError::Mismatch { field, .. }) if field == "instance"),
        "{met:?}"
    );
    let nobody = PeerAddress {
        name: "nobody".into(),
        instance: 9,
        address: { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() },
    };
    let met = ours.endpoint.meet(vec![nobody], PATIENCE);
    assert!(matches!(met[0].outcome, Err(MeetError::Unreachable { .. })), "{met:?}");
}

#[test]
fn layouts_that_differ_are_written_not_computed_in_place() {
    let mut prefill = Worker::start(config("prefill", 1, Way::InPlace, 4));
    let mut wide = config("decode", 2, Way::InPlace, 32);
    wide.layout.dtype = KvDtype::F32;
    wide.region = Region::new("wide", wide.layout.block_bytes() * 8).unwrap();
    let layout = wide.layout.clone();
    let mut decode = Worker::start(wide);
    decode.meet(prefill.address());
    decode.reserve(HANDOFF, 1, 2);
    prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
    let reserved = prefill.expect_reserved();
    assert!(matches!(reserved.path, Path::Write));
    assert_eq!(reserved.bridge, Bridge::Convert { lossless: true });
    assert_eq!(*reserved.layout, layout);
    // The engine converts: here it makes the wide blocks right away.
    prefill.layout = layout;
    prefill.fill_all(&reserved);
    prefill.endpoint.finish(HANDOFF, vec![]);
    assert_eq!(decode.news(), "committed");
    decode.adopt_and_check(HANDOFF);
}

#[test]
fn shared_memory_falls_back_to_tcp_only_where_that_is_allowed() {
    for (require, expected) in [(false, Some(TransportKind::Tcp)), (true, None)] {
        let mut ours = config("ours", 1, Way::SharedMemory, 4);
        let mut theirs = config("theirs", 2, Way::Tcp, 4);
        ours.require = require;
        theirs.require = false;
        let (ours, theirs) = (Worker::start(ours), Worker::start(theirs));
        let met = ours.endpoint.meet(vec![theirs.address()], PATIENCE);
        assert_eq!(met[0].outcome.as_ref().ok().map(|link| link.transport), expected, "{met:?}");
    }
}

#[test]
fn a_connection_is_remembered_and_made_again_on_demand() {
    for way in ways() {
        let (prefill, mut decode) = pair(way);
        // Who is met already is only reported.
        let again = decode.endpoint.meet(vec![prefill.address()], PATIENCE);
        assert_eq!(again[0].outcome.as_ref().ok(), decode.endpoint.link(1).as_ref());
        decode.reserve(HANDOFF, 1, 1);
        prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
        let reserved = prefill.expect_reserved();
        prefill.fill_all(&reserved);
        prefill.endpoint.finish(HANDOFF, vec![]);
        assert_eq!(decode.news(), "committed");
        let address = prefill.address();
        drop(prefill);
        // What was committed is complete, whoever is still there.
        while decode.endpoint.link(1).is_some() {
            std::thread::yield_now();
        }
        decode.adopt_and_check(HANDOFF);
        // A reservation for a peer that is gone fails by itself.
        decode.reserve(HandoffId(78), 1, 1);
        assert_eq!(decode.news(), "reserve-failed:peerlost", "{way:?}: {address:?}");
        assert_eq!(decode.news(), "released");
        decode.assert_nothing_leaked();
    }
}

#[test]
fn endpoints_are_shared_between_threads() {
    fn is_shared<T: Send + Sync>(_: &T) {}
    let worker = Arc::new(Worker::start(config("alone", 1, Way::Tcp, 1)).endpoint);
    is_shared(&worker);
}
