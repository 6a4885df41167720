//! A port that goes down under a handoff. A test binary of its own: it takes a device away from everybody in its machine.

mod worker;

use tidemill_kvtransfer::{EndpointConfig, HandoffEvent, PushWrite, RdmaConfig, Region, Source};
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::units::HandoffId;
use worker::{PATIENCE, Way, Worker, config, have_paths, port};

const BLOCKS: usize = 32;
const LAYERS: usize = 32;

/// Blocks of one mebibyte, over both devices, and queue pairs that would not notice for half a minute that nothing gets
/// through: a connection on which no write ends is given up much earlier than that.
fn patient(name: &str, instance: u64) -> EndpointConfig {
    let mut config = config(name, instance, Way::Rdma, 1);
    config.layout.layers = LAYERS as u16;
    config.layout.kv_heads = 8;
    config.layout.heads.count = 8;
    config.layout.head_size = 64;
    config.coverage = Coverage::Full;
    config.region = Region::new(name, config.layout.block_bytes() * 2 * BLOCKS).expect("memory");
    let devices = vec!["rxe0".to_owned(), "rxe1".to_owned()];
    config.rdma = RdmaConfig { devices, timeout: 20, retries: 7, ..RdmaConfig::default() };
    config
}

#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn a_port_that_goes_down_hands_over_at_once_and_is_taken_up_again_when_it_is_back() {
    let (prefill, mut decode) = (Worker::start(patient("prefill", 1)), Worker::start(patient("decode", 2)));
    prefill.meet(decode.address());

    // Nothing is written: only the device can say that its port is down. All of it is known before it comes up again.
    have_paths(4, &prefill, &decode, "two ports, two queue pairs each");
    port("rxe0", "down");
    have_paths(2, &prefill, &decode, "the paths of the port are ended");
    port("rxe0", "up");
    have_paths(4, &prefill, &decode, "the same connection takes them up again");

    // Both ports have work when one of them goes.
    let before = sent("rxe0");
    begin(HandoffId(1), &prefill, &mut decode);
    push(HandoffId(1), &prefill, 0..LAYERS / 2);
    while sent("rxe0") == before {
        std::thread::yield_now();
    }
    port("rxe0", "down");
    push(HandoffId(1), &prefill, LAYERS / 2..LAYERS);
    end(HandoffId(1), &prefill, &mut decode);

    // What begins now takes the other one.
    let (dead, alive) = (sent("rxe0"), sent("rxe1"));
    begin(HandoffId(2), &prefill, &mut decode);
    push(HandoffId(2), &prefill, 0..LAYERS);
    end(HandoffId(2), &prefill, &mut decode);
    assert_eq!(sent("rxe0"), dead, "nothing goes to a port that is down");
    assert!(alive < sent("rxe1"));

    // After its return what goes on takes both again.
    port("rxe0", "up");
    have_paths(4, &prefill, &decode, "the port is taken up again after handoffs without it");
    begin(HandoffId(3), &prefill, &mut decode);
    push(HandoffId(3), &prefill, 0..LAYERS);
    end(HandoffId(3), &prefill, &mut decode);
    assert!(dead < sent("rxe0"), "the port is used again");

    // A connection that is made while it is down takes it up when it is back.
    drop(prefill);
    let prefill = Worker::start(patient("prefill", 3));
    port("rxe0", "down");
    prefill.meet(decode.address());
    have_paths(2, &prefill, &decode, "one port is down");
    port("rxe0", "up");
    have_paths(4, &prefill, &decode, "a port that came later is taken up");
    let before = sent("rxe0");
    begin(HandoffId(4), &prefill, &mut decode);
    push(HandoffId(4), &prefill, 0..LAYERS);
    end(HandoffId(4), &prefill, &mut decode);
    assert!(before < sent("rxe0"), "the port is used");
    decode.assert_nothing_leaked();
}

fn begin(handoff: HandoffId, prefill: &Worker, decode: &mut Worker) {
    decode.reserve(handoff, prefill.instance, BLOCKS);
    prefill.endpoint.expect(handoff, 2, PATIENCE);
    prefill.expect_reserved();
}

/// Layer by layer, each block from its place in the prefill worker's own arena.
fn push(handoff: HandoffId, prefill: &Worker, layers: std::ops::Range<usize>) {
    let block_bytes = prefill.layout.block_bytes();
    let layer = block_bytes / LAYERS;
    if layers.start == 0 {
        for block in 0..BLOCKS {
            let content = worker::content(handoff, block, &prefill.layout);
            prefill.region.write(block * block_bytes, &content);
        }
    }
    for number in layers {
        let write = |block: usize| PushWrite {
            target_index: block as u32,
            offset: number * layer,
            len: layer,
            source: Source::Region { offset: block * block_bytes + number * layer },
        };
        prefill.endpoint.push(handoff, (0..BLOCKS).map(write).collect());
    }
}

fn end(handoff: HandoffId, prefill: &Worker, decode: &mut Worker) {
    prefill.endpoint.finish(handoff, vec![]);
    assert_eq!(decode.news(), "committed", "the connection has survived");
    decode.adopt_and_check(handoff);
    assert!(matches!(prefill.event(), HandoffEvent::Delivered { .. }));
}

/// Packets that a device has sent.
fn sent(device: &str) -> u64 {
    let path = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().parse().expect("a number")
}
