//! Whatever a worker can say survives the wire: any message, in any pieces, among any others.

use std::num::NonZeroU32;
use std::time::Duration;

use proptest::prelude::*;
use tidemill_kvtransfer_proto::codec::{self, FrameReader};
use tidemill_kvtransfer_proto::credit::Ask;
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::message::{
    Attach, Commit, Filled, Hello, Message, Offer, Offered, OnFailure, Paths, Piece, Ready, Refuse, Reserve,
    TransportKind, Welcome,
};
use tidemill_kvtransfer_proto::path::{MAX_PATHS, PathEnd};
use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, BlockRef, Epoch, HandoffId, TokenCount};

fn handoff() -> impl Strategy<Value = HandoffId> {
    any::<u64>().prop_map(HandoffId)
}

fn handoffs() -> impl Strategy<Value = Vec<HandoffId>> {
    prop::collection::vec(handoff(), 0..20)
}

fn blocks() -> impl Strategy<Value = Vec<BlockRef>> {
    let block = (any::<u32>(), any::<u64>());
    let block = block.prop_map(|(block, epoch)| BlockRef { block: BlockId(block), epoch: Epoch(epoch) });
    prop::collection::vec(block, 0..40)
}

/// Any layout that can be: no size is zero, and the heads that are held are among the model's.
fn layout() -> impl Strategy<Value = KvLayout> {
    let dtypes = vec![KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8];
    let dtype = prop::sample::select(dtypes);
    let order = prop::sample::select(vec![AxisOrder::TokenHead, AxisOrder::HeadToken]);
    let heads = (0..u16::MAX).prop_flat_map(|first| (Just(first), 1..=u16::MAX - first));
    let heads = heads.prop_flat_map(|(first, count)| (Just((first, count)), first + count..=u16::MAX));
    let block_len = (0..=12u32).prop_map(|power| BlockLen::new(1 << power).expect("a power of two"));
    (".{0,40}", 1..=u16::MAX, heads, 1..=u16::MAX, dtype, block_len, order).prop_map(
        |(model, layers, ((first, count), kv_heads), head_size, dtype, block_len, order)| {
            let heads = HeadRange { first, count };
            KvLayout { model, layers, kv_heads, heads, head_size, dtype, block_len, order }
        },
    )
}

fn hello() -> impl Strategy<Value = Hello> {
    let text = || ".{0,30}";
    let numbers = (any::<u32>(), any::<u64>(), any::<(u64, u64)>(), any::<u16>());
    let offer = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    // The wire counts whole milliseconds.
    let lease = any::<u32>().prop_map(|milliseconds| Duration::from_millis(milliseconds.into()));
    (numbers, text(), layout(), text(), text(), offer, lease).prop_map(
        |(
            (protocol, instance, (region_bytes, staging_bytes), listen_port),
            name,
            layout,
            host,
            memory_socket,
            offer,
            lease,
        )| {
            let (shared_memory, rdma, tcp, strict, pulls) = offer;
            let on_failure = if strict { OnFailure::Fail } else { OnFailure::FallBack };
            let offer = Offer { shared_memory, rdma, tcp, on_failure };
            Hello {
                protocol,
                instance,
                name,
                layout,
                region_bytes,
                staging_bytes,
                listen_port,
                host,
                memory_socket,
                offer,
                pulls,
                lease,
            }
        },
    )
}

fn reserve() -> impl Strategy<Value = Reserve> {
    let coverage = prop::sample::select(vec![Coverage::Sampled, Coverage::Full]);
    (handoff(), any::<u32>(), any::<u32>(), blocks(), blocks(), coverage).prop_map(
        |(handoff, tokens, first_block, cached, targets, coverage)| {
            let tokens = TokenCount(tokens);
            Reserve { handoff, tokens, first_block, cached, targets, coverage }
        },
    )
}

fn filled() -> impl Strategy<Value = Filled> {
    let digests = prop::collection::vec(any::<u64>(), 0..40);
    (handoff(), any::<u32>(), blocks(), digests).prop_map(|(handoff, first, targets, digests)| Filled {
        handoff,
        first,
        targets,
        digests,
    })
}

fn commit() -> impl Strategy<Value = Commit> {
    let payload = prop::collection::vec(any::<u8>(), 0..200);
    (filled(), any::<u32>(), any::<u64>(), payload, any::<bool>()).prop_map(
        |(Filled { handoff, first, targets, digests }, tokens, seal, payload, in_place)| {
            let tokens = TokenCount(tokens);
            Commit { handoff, tokens, first, targets, digests, seal, payload, in_place }
        },
    )
}

fn offered() -> impl Strategy<Value = Offered> {
    let piece = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u64>())
        .prop_map(|(source, target, len, stamp)| Piece { source, target, len, stamp });
    let pieces = prop::collection::vec(piece, 0..40);
    (handoff(), any::<u64>(), pieces).prop_map(|(handoff, before, pieces)| Offered {
        handoff,
        before,
        pieces,
    })
}

fn path_end() -> impl Strategy<Value = PathEnd> {
    let numbers = (any::<u32>(), any::<u32>(), any::<u64>(), any::<u32>());
    let small = (any::<u16>(), any::<bool>(), any::<u8>(), any::<u8>());
    (numbers, any::<[u8; 16]>(), small).prop_map(
        |(
            (queue_pair, first_packet, arena_address, arena_key),
            gid,
            (lid, is_infiniband, mtu_log2, reads),
        )| {
            PathEnd {
                queue_pair: NonZeroU32::new(queue_pair),
                first_packet,
                gid,
                lid,
                is_infiniband,
                mtu_log2,
                reads,
                arena_address,
                arena_key,
            }
        },
    )
}

fn message() -> impl Strategy<Value = Message> {
    let reason = || ".{0,60}";
    let kinds = vec![TransportKind::SharedMemory, TransportKind::Rdma, TransportKind::Tcp];
    let transport = prop::sample::select(kinds);
    prop_oneof![
        hello().prop_map(Message::Hello),
        (hello(), any::<u64>()).prop_map(|(hello, token)| Message::Welcome(Welcome { hello, token })),
        (reason(), reason()).prop_map(|(field, reason)| Message::Refuse(Refuse { field, reason })),
        (any::<u64>(), any::<u64>())
            .prop_map(|(instance, token)| Message::Attach(Attach { instance, token })),
        (transport, prop::option::of(reason()), handoffs(), any::<bool>()).prop_map(
            |(transport, fallback, busy, by_device)| {
                Message::Ready(Ready { transport, fallback, busy, by_device })
            }
        ),
        reserve().prop_map(Message::Reserve),
        (handoff(), reason()).prop_map(|(handoff, reason)| Message::Decline { handoff, reason }),
        filled().prop_map(Message::Filled),
        commit().prop_map(Message::Commit),
        handoff().prop_map(|handoff| Message::Adopted { handoff }),
        (handoff(), reason()).prop_map(|(handoff, reason)| Message::Refused { handoff, reason }),
        handoff().prop_map(|handoff| Message::Cancel { handoff }),
        (handoff(), reason()).prop_map(|(handoff, reason)| Message::Quiet { handoff, reason }),
        any::<u64>().prop_map(|seq| Message::Heartbeat { seq }),
        (prop::collection::vec(path_end(), 0..=MAX_PATHS), prop::option::of(reason()))
            .prop_map(|(ends, failure)| Message::Paths(Paths { ends, failure })),
        any::<u32>().prop_map(|path| Message::PathDown { path }),
        (any::<u32>(), path_end()).prop_map(|(path, end)| Message::PathAnew { path, end }),
        any::<u32>().prop_map(|path| Message::PathUp { path }),
        (handoff(), any::<u64>(), any::<u64>())
            .prop_map(|(handoff, ended, wanted)| Message::Ask { handoff, ask: Ask { ended, wanted } }),
        (handoff(), any::<u64>()).prop_map(|(handoff, bytes)| Message::Grant { handoff, bytes }),
        offered().prop_map(Message::Offer),
        (handoff(), any::<u64>()).prop_map(|(handoff, pieces)| Message::Fetched { handoff, pieces }),
        handoffs().prop_map(|busy| Message::Bye { busy }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn any_messages_survive_the_wire(
        messages in prop::collection::vec(message(), 1..5),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let mut stream = Vec::new();
        for message in &messages {
            codec::encode(message, &mut stream).expect("far below the longest frame");
        }
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
        ends.push(stream.len());
        ends.sort_unstable();
        let mut reader = FrameReader::new();
        let mut seen = Vec::new();
        let mut start = 0;
        for end in ends {
            reader.push(&stream[start..end]);
            start = end;
            while let Some(message) = reader.next_message().expect("nothing is wrong with it") {
                seen.push(message);
            }
        }
        prop_assert_eq!(seen, messages);
    }

    /// A stream that goes bad is refused where it goes bad, and what came before still counts.
    #[test]
    fn what_comes_before_a_bad_byte_counts(
        messages in prop::collection::vec(message(), 0..4),
        noise in prop::collection::vec(any::<u8>(), 8..40),
    ) {
        let mut stream = Vec::new();
        for message in &messages {
            codec::encode(message, &mut stream).expect("far below the longest frame");
        }
        prop_assume!(noise[..2] != *b"TK");
        stream.extend_from_slice(&noise);
        let mut reader = FrameReader::new();
        reader.push(&stream);
        for message in messages {
            prop_assert_eq!(reader.next_message(), Ok(Some(message)));
        }
        prop_assert_eq!(reader.next_message(), Err(codec::CodecError::Mark));
    }

    /// Layouts that differ name the difference or can be bridged, and each is bridged to itself for nothing.
    #[test]
    fn any_layout_bridges_to_itself(layout in layout()) {
        use tidemill_kvtransfer_proto::layout::Bridge;
        prop_assert_eq!(layout.bridge(&layout.clone()), Ok(Bridge::Identical));
    }
}
