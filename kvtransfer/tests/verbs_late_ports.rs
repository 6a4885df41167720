//! Ports that are down when a worker starts. A test binary of its own: it takes devices away from everybody in its machine.

mod worker;

use tidemill_kvtransfer::error::EndpointError;
use tidemill_kvtransfer::{Endpoint, EndpointConfig, HandoffEvent, RdmaConfig};
use tidemill_kvtransfer_proto::message::TransportKind;
use tidemill_kvtransfer_proto::units::HandoffId;
use worker::{PATIENCE, Way, Worker, config, have_paths, port};

/// Of a worker that takes both devices, and TCP where neither works.
fn both(name: &str, instance: u64) -> EndpointConfig {
    let devices = vec!["rxe0".to_owned(), "rxe1".to_owned()];
    let rdma = RdmaConfig { devices, ..RdmaConfig::default() };
    EndpointConfig { rdma, require: false, ..config(name, instance, Way::Rdma, 16) }
}

#[test]
#[ignore = "needs verbs devices: tests/rdma/run"]
fn a_port_that_is_down_when_a_worker_starts_is_used_when_it_comes_up() {
    // One of two: its place among the paths is kept.
    port("rxe0", "down");
    let (prefill, mut decode) = (Worker::start(both("prefill", 1)), Worker::start(both("decode", 2)));
    prefill.meet(decode.address());
    have_paths(2, &prefill, &decode, "one port is up");
    port("rxe0", "up");
    have_paths(4, &prefill, &decode, "the other came up");
    hand_over(HandoffId(1), &prefill, &mut decode);
    drop((prefill, decode));

    // Both: RDMA must not be promised, and TCP is only for as long as there is nothing better.
    port("rxe0", "down");
    port("rxe1", "down");
    let strict = EndpointConfig { require: true, ..both("strict", 5) };
    let error = Endpoint::start(strict, Box::new(drop)).expect_err("RDMA is required");
    assert!(matches!(error, EndpointError::Rdma { .. }), "{error:?}");
    let (prefill, mut decode) = (Worker::start(both("prefill", 3)), Worker::start(both("decode", 4)));
    prefill.meet(decode.address());
    let link = decode.endpoint.link(3).expect("connected");
    assert_eq!((link.transport, link.is_fallback), (TransportKind::Tcp, true), "and that is said");
    hand_over(HandoffId(2), &prefill, &mut decode);
    port("rxe1", "up");
    have_paths(2, &prefill, &decode, "nobody had to ask for a new connection");
    hand_over(HandoffId(3), &prefill, &mut decode);
    port("rxe0", "up");
    have_paths(4, &prefill, &decode, "the second one came up");
    hand_over(HandoffId(4), &prefill, &mut decode);
    decode.assert_nothing_leaked();
}

fn hand_over(handoff: HandoffId, prefill: &Worker, decode: &mut Worker) {
    decode.reserve(handoff, prefill.instance, 5);
    prefill.endpoint.expect(handoff, decode.instance, PATIENCE);
    let reserved = prefill.expect_reserved();
    prefill.fill_all(&reserved);
    prefill.endpoint.finish(handoff, vec![]);
    assert_eq!(decode.news(), "committed");
    decode.adopt_and_check(handoff);
    assert!(matches!(prefill.event(), HandoffEvent::Delivered { .. }));
}
