//! Peers that speak the protocol badly, slowly or dishonestly. Each is played by hand, byte by byte.

mod worker;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use tidemill_kvtransfer::{HandoffEvent, PushWrite, Slab, Source};
use tidemill_kvtransfer_proto::codec::{FrameReader, encode};
use tidemill_kvtransfer_proto::error::{CommitFault, TransferError};
use tidemill_kvtransfer_proto::message::{
    Attach, Commit, Filled, Hello, Message, Offer, OnFailure, PROTOCOL, Ready, Reserve, TransportKind,
};
use tidemill_kvtransfer_proto::transport::stamp;
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};
use worker::{PATIENCE, Way, Worker, config, layout, pair};

const HANDOFF: HandoffId = HandoffId(5);

struct Impostor {
    control: TcpStream,
    reader: FrameReader,
    data: TcpStream,
}

fn hello(instance: u64) -> Hello {
    Hello {
        protocol: PROTOCOL,
        instance,
        name: "impostor".into(),
        layout: layout(),
        region_bytes: 1 << 40,
        staging_bytes: 0,
        listen_port: 1,
        host: "elsewhere".into(),
        memory_socket: String::new(),
        offer: Offer { shared_memory: false, rdma: false, tcp: true, on_failure: OnFailure::FallBack },
        pulls: false,
        lease: Duration::from_secs(60),
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("somebody listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

fn say(stream: &mut TcpStream, message: &Message) {
    let mut frame = Vec::new();
    encode(message, &mut frame).expect("short");
    stream.write_all(&frame).expect("the endpoint reads");
}

/// The next message; `None` when the other side has closed.
fn hear(stream: &mut TcpStream, reader: &mut FrameReader) -> Option<Message> {
    let mut buffer = [0; 4096];
    loop {
        if let Some(message) = reader.next_message().expect("the endpoint speaks well") {
            return Some(message);
        }
        match stream.read(&mut buffer) {
            Ok(0) => return None,
            Ok(length) => reader.push(&buffer[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("nothing is said: {error}"),
        }
    }
}

impl Impostor {
    /// Does the handshake as it should be.
    fn connect(worker: &Worker, instance: u64) -> Self {
        let address = worker.endpoint.address();
        let (mut control, mut reader) = (connect(address), FrameReader::new());
        say(&mut control, &Message::Hello(hello(instance)));
        let Some(Message::Welcome(welcome)) = hear(&mut control, &mut reader) else { panic!("not welcome") };
        let mut data = connect(address);
        say(&mut data, &Message::Attach(Attach { instance, token: welcome.token }));
        let ready = Ready { transport: TransportKind::Tcp, fallback: None, busy: vec![], by_device: false };
        say(&mut control, &Message::Ready(ready));
        assert!(matches!(hear(&mut control, &mut reader), Some(Message::Ready(_))));
        Self { control, reader, data }
    }

    fn say(&mut self, message: &Message) {
        say(&mut self.control, message);
    }

    /// The next message that is no heartbeat.
    fn hear(&mut self) -> Option<Message> {
        loop {
            match hear(&mut self.control, &mut self.reader) {
                Some(Message::Heartbeat { .. }) => {}
                other => return other,
            }
        }
    }

    /// Makes a write and returns the answer's kind and number, past the probe's header and bytes.
    fn write(&mut self, handoff: HandoffId, offset: u64, stamp: u64, bytes: &[u8]) -> (u32, u32) {
        let mut frame = Vec::new();
        frame.extend(1u32.to_le_bytes());
        frame.extend((bytes.len() as u32).to_le_bytes());
        frame.extend(handoff.0.to_le_bytes());
        frame.extend(offset.to_le_bytes());
        frame.extend(stamp.to_le_bytes());
        frame.extend(bytes);
        self.data.write_all(&frame).expect("the endpoint reads");
        loop {
            let mut header = [0; 32];
            self.data.read_exact(&mut header).expect("an answer");
            let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
            let (kind, len) = (number(0), number(4));
            if kind != PROBE {
                return (kind, len);
            }
            std::io::copy(&mut (&self.data).take(len.into()), &mut std::io::sink()).expect("the probe");
        }
    }
}

const LANDED: u32 = 2;
const TURNED_DOWN: u32 = 3;
const PROBE: u32 = 4;
const NOT_EXPECTED: u32 = 1;
const OUTSIDE: u32 = 2;
const STALE: u32 = 3;

#[test]
fn writes_and_commits_of_another_epoch_are_refused() {
    let mut decode = Worker::start(config("decode", 2, Way::Tcp, 8));
    let mut impostor = Impostor::connect(&decode, 66);
    while decode.endpoint.link(66).is_none() {
        std::thread::yield_now();
    }
    decode.reserve(HANDOFF, 66, 2);
    let Some(Message::Reserve(reserve)) = impostor.hear() else { panic!("not reserved") };
    let before: Vec<u8> = reserve.targets.iter().flat_map(|it| decode.read(*it)).collect();

    let target = reserve.targets[0];
    let old = BlockRef { epoch: Epoch(target.epoch.0 - 1), ..target };
    let offset = u64::from(target.block.0) * decode.layout.block_bytes() as u64;
    let (good, stale, other) = (stamp(&[target]), stamp(&[old]), HandoffId(6));
    #[rustfmt::skip]
    let rows = [
        ("an older epoch",        HANDOFF, offset,   stale, (TURNED_DOWN, STALE)),
        ("somebody else's block", HANDOFF, 0,        good,  (TURNED_DOWN, OUTSIDE)),
        ("far outside",           HANDOFF, 1 << 62,  good,  (TURNED_DOWN, OUTSIDE)),
        ("another handoff",       other,   offset,   good,  (TURNED_DOWN, NOT_EXPECTED)),
    ];
    for (name, handoff, offset, stamp, expected) in rows {
        assert_eq!(impostor.write(handoff, offset, stamp, &[0xee; 64]), expected, "{name}");
    }
    let after: Vec<u8> = reserve.targets.iter().flat_map(|it| decode.read(*it)).collect();
    assert!(before == after, "what was turned down changed nothing");
    assert_eq!(impostor.write(HANDOFF, offset, good, &[0xee; 64]), (LANDED, 1), "the right one lands");

    let mut targets = reserve.targets.clone();
    targets[1].epoch.0 -= 1;
    let (tokens, digests) = (reserve.tokens, vec![0; 2]);
    impostor.say(&Message::Commit(Commit {
        handoff: HANDOFF,
        tokens,
        first: 0,
        targets,
        digests,
        seal: 0,
        payload: vec![],
        in_place: false,
    }));
    assert!(matches!(impostor.hear(), Some(Message::Refused { handoff: HANDOFF, .. })));
    match decode.event() {
        HandoffEvent::ReserveFailed {
            error: TransferError::BadCommit(CommitFault::Target { index: 1, .. }),
            ..
        } => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(decode.news(), "released");
    assert_eq!(
        impostor.write(HANDOFF, offset, good, &[0xee; 64]),
        (TURNED_DOWN, NOT_EXPECTED),
        "nothing lands after the end"
    );
    decode.assert_nothing_leaked();
}

/// Only blocks that both sides have mapped can be final before the commit: what is written could still be written over.
#[test]
fn what_is_written_is_not_believed_to_be_final() {
    let mut decode = Worker::start(config("decode", 2, Way::Tcp, 8));
    let mut impostor = Impostor::connect(&decode, 66);
    while decode.endpoint.link(66).is_none() {
        std::thread::yield_now();
    }
    decode.reserve(HANDOFF, 66, 2);
    let Some(Message::Reserve(reserve)) = impostor.hear() else { panic!("not reserved") };
    let (handoff, tokens, targets) = (HANDOFF, reserve.tokens, reserve.targets);
    let filled = Filled { handoff, first: 0, targets: targets.clone(), digests: vec![0; 2] };
    impostor.say(&Message::Filled(filled));
    let (targets, digests, payload) = (vec![], vec![], vec![]);
    let commit = Commit { handoff, tokens, first: 2, targets, digests, seal: 0, payload, in_place: true };
    impostor.say(&Message::Commit(commit));
    assert!(matches!(impostor.hear(), Some(Message::Refused { handoff: HANDOFF, .. })));
    match decode.event() {
        HandoffEvent::ReserveFailed { error, .. } => {
            assert_eq!(error, TransferError::BadCommit(CommitFault::Order { first: 2, named: 0 }));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(decode.news(), "released");
    decode.assert_nothing_leaked();
}

#[test]
fn nobody_speaks_for_another_worker() {
    let (mut prefill, mut decode) = pair(Way::Tcp);
    let mut impostor = Impostor::connect(&decode, 66);
    decode.reserve(HANDOFF, 1, 1);
    prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
    let reserved = prefill.expect_reserved();
    let target = reserved.targets[0];
    let offset = u64::from(target.block.0) * decode.layout.block_bytes() as u64;
    assert_eq!(
        impostor.write(HANDOFF, offset, stamp(&[target]), &[0xee; 64]),
        (TURNED_DOWN, NOT_EXPECTED),
        "even with the right epoch"
    );
    impostor.say(&Message::Quiet { handoff: HANDOFF, reason: "a lie".into() });
    impostor.say(&Message::Decline { handoff: HANDOFF, reason: "a lie".into() });
    impostor.say(&Message::Cancel { handoff: HANDOFF });
    let Some(Message::Quiet { .. }) = impostor.hear() else { panic!("a cancel is answered") };
    // By now the lies were heard, and had no effect.
    prefill.fill_all(&reserved);
    prefill.endpoint.finish(HANDOFF, vec![]);
    assert_eq!(decode.news(), "committed");
    decode.adopt_and_check(HANDOFF);
    assert_eq!(prefill.news(), "delivered");
}

#[test]
fn a_peer_that_does_not_read_holds_up_nobody_else() {
    let (mut prefill, mut decode) = pair(Way::Tcp);
    let mut impostor = Impostor::connect(&prefill, 66);
    // Far more bytes than its socket takes; it reads none of them.
    const BLOCKS: u32 = 8000;
    let targets = (0..BLOCKS).map(|it| BlockRef { block: BlockId(it), epoch: Epoch(1) }).collect();
    impostor.say(&Message::Reserve(Reserve {
        handoff: HANDOFF,
        tokens: TokenCount(BLOCKS * 16),
        first_block: 0,
        cached: vec![],
        targets,
        coverage: Default::default(),
    }));
    prefill.endpoint.expect(HANDOFF, 66, PATIENCE);
    let clogged = prefill.expect_reserved();
    let len = layout().block_bytes();
    let slab = Arc::new(Slab::new(len).expect("memory"));
    let write = |target_index| {
        let source = Source::Slab(Arc::clone(&slab), 0);
        PushWrite { target_index, offset: 0, len, source }
    };
    prefill.endpoint.push(clogged.handoff, (0..BLOCKS).map(write).collect());
    prefill.endpoint.finish(HANDOFF, vec![]);

    // A peer that neither speaks nor reads is lost after ten seconds, which may come amid these on a busy machine.
    for number in 100..150 {
        let handoff = HandoffId(number);
        decode.reserve(handoff, 1, 3);
        prefill.endpoint.expect(handoff, 2, PATIENCE);
        let reserved = prefill.expect_reserved_of(handoff);
        prefill.fill_all(&reserved);
        prefill.endpoint.finish(handoff, vec![]);
        assert_eq!(decode.news(), "committed");
        decode.adopt_and_check(handoff);
        assert_eq!(prefill.news_of(handoff), "delivered");
    }
    drop(impostor);
    assert_eq!(prefill.news_of(HANDOFF), "send-failed:peerlost", "the slow one's handoff ends with it");
    decode.assert_nothing_leaked();
}

#[test]
fn bad_beginnings_are_closed_and_do_no_harm() {
    let (mut prefill, mut decode) = pair(Way::Tcp);
    let address = prefill.endpoint.address();
    let garbage: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"TK\xff\xff\0\0\0\0",
        b"TK\x01\0\xff\xff\xff\xff",
        b"TK\x01\0\x02\0\0\0\xff\xff",
    ];
    for bytes in garbage {
        let mut stream = connect(address);
        stream.write_all(bytes).expect("the endpoint reads");
        assert!(hear(&mut stream, &mut FrameReader::new()).is_none(), "{bytes:?} is answered by closing");
    }
    let mut stream = connect(address);
    say(&mut stream, &Message::Attach(Attach { instance: 66, token: 1 }));
    assert!(hear(&mut stream, &mut FrameReader::new()).is_none(), "an attach without handshake");
    let mut stream = connect(address);
    say(&mut stream, &Message::Hello(Hello { protocol: 99, ..hello(66) }));
    match hear(&mut stream, &mut FrameReader::new()) {
        Some(Message::Refuse(refuse)) => assert_eq!(refuse.field, "protocol"),
        other => panic!("{other:?}"),
    }

    // Garbage after a good beginning costs the connection, and the handoffs on it.
    for bytes in garbage {
        let mut impostor = Impostor::connect(&prefill, 66);
        impostor.control.write_all(bytes).expect("the endpoint reads");
        assert!(impostor.hear().is_none(), "{bytes:?} is answered by closing");
        let mut impostor = Impostor::connect(&prefill, 67);
        impostor.data.write_all(&[0xff; 64]).expect("the endpoint reads");
        assert!(impostor.hear().is_none(), "garbage among the data, too");
    }
    // A reservation that cannot be filled is declined, by name of what is wrong.
    let mut impostor = Impostor::connect(&prefill, 66);
    let block = |number| BlockRef { block: BlockId(number), epoch: Epoch(1) };
    for (number, (targets, cached)) in [
        (vec![], vec![]),
        (vec![block(1), block(1)], vec![]),
        (vec![block(u32::MAX), block(2)], vec![]),
        (vec![block(1), block(2)], vec![block(3)]),
        (vec![block(1)], vec![]),
    ]
    .into_iter()
    .enumerate()
    {
        let handoff = HandoffId(1000 + number as u64);
        let (tokens, coverage) = (TokenCount(32), Default::default());
        prefill.endpoint.expect(handoff, 66, PATIENCE);
        impostor.say(&Message::Reserve(Reserve {
            handoff,
            tokens,
            first_block: 0,
            cached,
            targets,
            coverage,
        }));
        let answer = impostor.hear();
        assert!(matches!(answer, Some(Message::Decline { .. })), "{answer:?}");
        assert_eq!(prefill.news(), "send-failed:invalid");
    }

    // And the good pair never noticed.
    decode.reserve(HANDOFF, 1, 3);
    prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
    let reserved = prefill.expect_reserved();
    prefill.fill_all(&reserved);
    prefill.endpoint.finish(HANDOFF, vec![]);
    assert_eq!(decode.news(), "committed");
    decode.adopt_and_check(HANDOFF);
    assert_eq!(prefill.news(), "delivered");
}

#[test]
fn a_reservation_that_nobody_expects_is_declined_in_time() {
    let mut config = config("prefill", 1, Way::Tcp, 4);
    config.timing.patience = Duration::from_millis(1);
    let prefill = Worker::start(config);
    let mut impostor = Impostor::connect(&prefill, 66);
    let targets = vec![BlockRef { block: BlockId(0), epoch: Epoch(1) }];
    impostor.say(&Message::Reserve(Reserve {
        handoff: HANDOFF,
        tokens: TokenCount(16),
        first_block: 0,
        cached: vec![],
        targets,
        coverage: Default::default(),
    }));
    assert!(matches!(impostor.hear(), Some(Message::Decline { handoff: HANDOFF, .. })));
}

#[test]
fn a_silent_peer_is_lost() {
    let mut config = config("prefill", 1, Way::Tcp, 4);
    config.timing.lease = Duration::from_millis(20);
    let prefill = Worker::start(config);
    let mut impostor = Impostor::connect(&prefill, 66);
    assert!(impostor.hear().is_none(), "closed for saying nothing");
    loop {
        if let HandoffEvent::PeerDown { instance: 66, reason, .. } = prefill.peer_event() {
            assert!(reason.contains("nothing was heard"), "{reason}");
            break;
        }
    }
}
