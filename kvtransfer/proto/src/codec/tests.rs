//! The wire under good, bad and hostile input.

use std::num::NonZeroU32;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::credit::Ask;
use crate::digest::Coverage;
use crate::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use crate::message::{
    Attach, Commit, Filled, Hello, Offer, Offered, OnFailure, Paths, Piece, Ready, Refuse, Reserve,
    TransportKind, Welcome,
};
use crate::path::PathEnd;
use crate::units::{BlockId, BlockLen, BlockRef, Epoch, HandoffId, TokenCount};

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        instance: u64::MAX,
        name: "prefill-0".into(),
        layout: KvLayout {
            model: "fingerprint".into(),
            layers: 32,
            kv_heads: 8,
            heads: HeadRange { first: 4, count: 4 },
            head_size: 128,
            dtype: KvDtype::Int8,
            block_len: BlockLen::new(16).unwrap(),
            order: AxisOrder::HeadToken,
        },
        region_bytes: 1 << 40,
        staging_bytes: 1 << 26,
        listen_port: 65535,
        host: "boot/1000".into(),
        memory_socket: "tidemill".into(),
        offer: Offer { shared_memory: true, rdma: true, tcp: false, on_failure: OnFailure::Fail },
        pulls: true,
        lease: Duration::from_millis(500),
    }
}

fn blocks(count: u32) -> Vec<BlockRef> {
    (0..count).map(|it| BlockRef { block: BlockId(it * 3), epoch: Epoch(u64::from(it) << 33) }).collect()
}

fn path_end(number: u8) -> PathEnd {
    PathEnd {
        queue_pair: (number != 3).then_some(NonZeroU32::MIN.saturating_add(number.into())),
        first_packet: 0x00fe_dcba,
        gid: [number; 16],
        lid: 0xfffe,
        is_infiniband: number != 2,
        mtu_log2: 12,
        reads: 16,
        arena_address: 0x7fff_0000_1000,
        arena_key: u32::MAX,
    }
}

fn messages() -> Vec<Message> {
    let handoff = HandoffId(0xfedc_ba98_7654_3210);
    let reason = "because".to_owned();
    vec![
        Message::Hello(hello()),
        Message::Welcome(Welcome { hello: hello(), token: 17 }),
        Message::Refuse(Refuse { field: "layers".into(), reason: reason.clone() }),
        Message::Attach(Attach { instance: 1, token: 2 }),
        Message::Ready(Ready {
            transport: TransportKind::Tcp,
            fallback: Some(reason.clone()),
            busy: vec![handoff, HandoffId(0)],
            by_device: false,
        }),
        Message::Ready(Ready {
            transport: TransportKind::SharedMemory,
            fallback: None,
            busy: vec![],
            by_device: true,
        }),
        Message::Reserve(Reserve {
            handoff,
            tokens: TokenCount(100),
            first_block: 3,
            cached: blocks(3),
            targets: blocks(4),
            coverage: Coverage::Full,
        }),
        Message::Decline { handoff, reason: reason.clone() },
        Message::Filled(Filled { handoff, first: 3, targets: blocks(2), digests: vec![0, u64::MAX] }),
        Message::Filled(Filled { handoff, first: 0, targets: vec![], digests: vec![] }),
        Message::Commit(Commit {
            handoff,
            tokens: TokenCount(0),
            first: 1 << 20,
            targets: blocks(2),
            digests: vec![0, u64::MAX],
            seal: u64::MAX,
            payload: vec![0, 255, 3],
            in_place: true,
        }),
        Message::Adopted { handoff },
        Message::Refused { handoff, reason: reason.clone() },
        Message::Cancel { handoff: HandoffId(0) },
        Message::Quiet { handoff, reason },
        Message::Heartbeat { seq: 0 },
        Message::Paths(Paths { ends: vec![path_end(1), path_end(2), path_end(3)], failure: None }),
        Message::Paths(Paths { ends: vec![], failure: Some("no device".into()) }),
        Message::PathDown { path: 0 },
        Message::PathAnew { path: 31, end: path_end(4) },
        Message::PathUp { path: u32::MAX },
        Message::Ask { handoff, ask: Ask { ended: 0, wanted: u64::MAX } },
        Message::Grant { handoff, bytes: 1 << 40 },
        Message::Offer(Offered {
            handoff,
            before: 1 << 33,
            pieces: vec![Piece { source: 0, target: 1 << 41, len: u32::MAX, stamp: u64::MAX }; 3],
        }),
        Message::Offer(Offered { handoff, before: 0, pieces: vec![] }),
        Message::Fetched { handoff, pieces: u64::MAX },
        Message::Bye { busy: vec![handoff] },
    ]
}

fn frame(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(message, &mut bytes).unwrap();
    bytes
}

#[test]
fn each_message_survives_the_wire_in_any_pieces() {
    let mut stream = Vec::new();
    for message in messages() {
        assert_eq!(decode(&frame(&message)).unwrap(), Some((message.clone(), frame(&message).len())));
        encode(&message, &mut stream).unwrap();
    }
    for piece in [1, 7, 64, stream.len()] {
        let mut reader = FrameReader::new();
        let mut seen = Vec::new();
        for bytes in stream.chunks(piece) {
            reader.push(bytes);
            while let Some(message) = reader.next_message().unwrap() {
                seen.push(message);
            }
        }
        assert_eq!(seen, messages(), "in pieces of {piece}");
    }
}

#[test]
fn unknown_fields_are_skipped() {
    let mut bytes = frame(&Message::Cancel { handoff: HandoffId(5) });
    bytes.extend_from_slice(&[0xfa, 0x7f, 2, 1, 2]); // Field 2047, two bytes long.
    let length = u32::try_from(bytes.len() - HEADER).unwrap();
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    let (message, _) = decode(&bytes).unwrap().unwrap();
    assert_eq!(message, Message::Cancel { handoff: HandoffId(5) });
}

#[test]
fn bad_frames_are_refused() {
    let good = frame(&Message::Heartbeat { seq: 1 });
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = good.clone();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let body = |body: &[u8]| {
        let mut frame = good[..4].to_vec();
        frame.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
        frame.extend_from_slice(body);
        frame
    };
    let mut bad_layout = hello();
    bad_layout.layout.heads.count = 9;
    #[rustfmt::skip]
    let rows = [
        ("another protocol",             with(0, b"GE"),                             CodecError::Mark),
        ("its first byte is enough",     b"G".to_vec(),                              CodecError::Mark),
        ("another version",              with(2, &[9, 0]),                           CodecError::Version { theirs: 9, ours: VERSION }),
        ("longer than allowed",          with(4, &[0xff; 4]),                        CodecError::TooLong { length: 0xffff_ffff }),
        ("an empty body",                body(&[]),                                  malformed("no message that this version knows")),
        ("heads beyond the model's",     frame(&Message::Hello(bad_layout)),         malformed("layout")),
        ("blocks without their epochs",  body(&[0x32, 8, 0x2a, 6, 0x0a, 4, 1, 0, 0, 0]), malformed("blocks and epochs differ in number")),
    ];
    for (name, bytes, expected) in rows {
        assert_eq!(decode(&bytes), Err(expected), "{name}");
    }
    assert_eq!(decode(&good[..5]), Ok(None), "an unfinished header is no error");
    assert_eq!(decode(&good[..9]), Ok(None), "nor is an unfinished body");
}

fn malformed(what: &str) -> CodecError {
    CodecError::Malformed { what: what.into() }
}

#[test]
fn a_message_that_is_too_long_is_not_sent() {
    let mut out = vec![1];
    let message = Message::Commit(Commit {
        handoff: HandoffId(1),
        tokens: TokenCount(1),
        first: 0,
        targets: vec![],
        digests: vec![],
        seal: 0,
        payload: vec![0; MAX_FRAME],
        in_place: false,
    });
    assert!(matches!(encode(&message, &mut out), Err(CodecError::TooLong { .. })));
    assert_eq!(out, [1]);
}

/// Bytes that a message owns, to be held against the bytes it was made from.
fn weight(message: &Message) -> usize {
    let refs = |list: &Vec<BlockRef>| list.capacity() * size_of::<BlockRef>();
    let hello = |it: &Hello| {
        it.name.capacity() + it.layout.model.capacity() + it.host.capacity() + it.memory_socket.capacity()
    };
    match message {
        Message::Hello(it) => hello(it),
        Message::Welcome(it) => hello(&it.hello),
        Message::Refuse(it) => it.field.capacity() + it.reason.capacity(),
        Message::Ready(it) => {
            it.fallback.as_ref().map_or(0, String::capacity) + it.busy.capacity() * size_of::<HandoffId>()
        }
        Message::Reserve(it) => refs(&it.cached) + refs(&it.targets),
        Message::Filled(it) => refs(&it.targets) + it.digests.capacity() * 8,
        Message::Commit(it) => refs(&it.targets) + it.digests.capacity() * 8 + it.payload.capacity(),
        Message::Decline { reason, .. } | Message::Refused { reason, .. } | Message::Quiet { reason, .. } => {
            reason.capacity()
        }
        Message::Offer(it) => it.pieces.capacity() * size_of::<Piece>(),
        Message::Bye { busy } => busy.capacity() * size_of::<HandoffId>(),
        Message::Paths(it) => {
            it.failure.as_ref().map_or(0, String::capacity) + it.ends.capacity() * size_of::<PathEnd>()
        }
        Message::Attach(_)
        | Message::Adopted { .. }
        | Message::Cancel { .. }
        | Message::PathDown { .. }
        | Message::PathAnew { .. }
        | Message::PathUp { .. }
        | Message::Ask { .. }
        | Message::Grant { .. }
        | Message::Fetched { .. }
        | Message::Heartbeat { .. } => 0,
    }
}

fn check_hostile(bytes: &[u8]) -> Result<(), TestCaseError> {
    if let Ok(Some((message, length))) = decode(bytes) {
        prop_assert!(length <= bytes.len());
        prop_assert!(weight(&message) <= 8 * length + 256, "{length} bytes became {}", weight(&message));
        // What was understood can be said again, and means the same.
        let again = frame(&message);
        prop_assert_eq!(decode(&again).unwrap(), Some((message, again.len())));
    }
    Ok(())
}

proptest! {
    #[test]
    fn random_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        check_hostile(&bytes)?;
    }

    #[test]
    fn random_bodies_do_no_harm(body in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = frame(&Message::Heartbeat { seq: 1 })[..4].to_vec();
        bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&body);
        check_hostile(&bytes)?;
    }

    #[test]
    fn mutated_frames_do_no_harm(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = frame(which.get(&messages()));
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        check_hostile(&bytes)?;
        check_hostile(&bytes[..cut.index(bytes.len())])?;
    }
}
