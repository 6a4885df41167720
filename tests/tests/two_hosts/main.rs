//! Prefill on one host, decode and the front end on another, joined by a wire: the same answers as from one worker, by
//! the transport that was asked for, whatever happens to the wire or to the peer.
//!
//! Run in two virtual machines by `tests/rdma/run-pair`.

mod doctor;
mod split;

use serde_json::json;
use split::{
    ALIKE, BESIDE_THE_WAY, LIMIT, REQUIRED, ROUNDS, Reach, Split, Way, answers, prompt, same, whole_answers,
};
use tidemill_tests::deployment::eventually;
use tidemill_tests::two_hosts::{Host, Pair};

/// Ways between two hosts, and whether they take RDMA packets.
const TRANSPORTS: [(&str, bool); 2] = [("tcp", false), ("rdma", true)];
/// The same, and who moves the bytes.
const WAYS: [Way<'_>; 4] = [
    Way { transport: "tcp", handoff: "push", caches: ALIKE },
    Way { transport: "rdma", handoff: "push", caches: ALIKE },
    Way { transport: "rdma", handoff: "pull", caches: ALIKE },
    // What decode reads is made for it, out of several of prefill's blocks.
    Way { transport: "rdma", handoff: "pull", caches: [&["--block-size", "16"], &["--block-size", "64"]] },
];

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn split_over_two_hosts_equals_whole() {
    let _pair = Pair::take();
    let expected = whole_answers().await;
    for way in WAYS {
        let (transport, is_rdma) = (way.transport, way.transport == "rdma");
        let before = Host::Second.rdma_packets_sent();
        let split = Split::start_by(way, Reach::FIRST_WIRE, REQUIRED, &[]);
        let (found, counted) = split.undisturbed(transport).await;
        same(expected, &found, &format!("{way:?}"));
        let bytes = split.client.metric("tidemill_handoff_bytes_total", "").await;
        assert!(0.0 < bytes, "{way:?}: nothing was handed over\n{}", split.front.log());
        assert_eq!(counted, [0.0; 3], "{transport}: {BESIDE_THE_WAY:?}\n{}", split.front.log());
        let speed = split
            .client
            .metric("tidemill_link_bytes_per_second", &format!("transport=\"{transport}\""))
            .await;
        assert!(0.0 < speed, "{transport} is not the way that is reported\n{}", split.front.log());
        // The kernel's count beside our own: a packet carries at most 4096 bytes.
        let packets = Host::Second.rdma_packets_sent() - before;
        if is_rdma {
            assert!(bytes / 4096.0 <= packets as f64, "{way:?}: {packets} packets for {bytes} bytes");
        } else {
            assert_eq!(packets, 0, "{transport} sends no RDMA packet");
        }
        let reads = split.decode.log().contains("from_peer=\"reads\"");
        assert_eq!(reads, way.handoff == "pull", "{way:?}: who moves the bytes\n{}", split.decode.log());
        split.is_settled(transport).await;
    }
}

/// Rounding to eight bits changes answers, but who moves the bytes changes nothing.
#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn what_is_converted_and_read_gives_the_answers_of_what_is_converted_and_written() {
    let _pair = Pair::take();
    let caches: [&[&str]; 2] =
        [&["--kv-cache-dtype", "bf16", "--block-size", "32"], &["--kv-cache-dtype", "int8"]];
    let mut answers = Vec::new();
    for (transport, handoff) in [("tcp", "push"), ("rdma", "pull")] {
        let split = Split::start_by(Way { transport, handoff, caches }, Reach::FIRST_WIRE, REQUIRED, &[]);
        let (found, counted) = split.undisturbed(handoff).await;
        assert!(found.iter().all(|(_, reply)| reply.status == 200), "{handoff}: {found:?}");
        assert_eq!(counted, [0.0; 3], "{handoff}: {BESIDE_THE_WAY:?}\n{}", split.front.log());
        let reads = split.decode.log().contains("from_peer=\"reads\"");
        assert_eq!(reads, handoff == "pull", "who moves the bytes\n{}", split.decode.log());
        split.is_settled(handoff).await;
        answers.push(found);
    }
    same(&answers[0], &answers[1], "written, read");
}

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn a_handoff_wire_that_is_cut_costs_no_answer_and_is_used_again_when_restored() {
    let pair = Pair::take();
    let expected = whole_answers().await;
    for (transport, _) in TRANSPORTS {
        let mut split = Split::start(transport, Reach::ROUTER_BESIDE, &[], &[]);
        split.splits(transport).await;
        pair.cut();
        same(expected, &answers(&split.client).await, &format!("{transport}, cut"));
        split.decode.wait_for("peer lost");
        pair.restore();
        split.splits(&format!("{transport}, restored")).await;
        same(expected, &answers(&split.client).await, &format!("{transport}, restored"));
        split.is_settled(transport).await;
    }
}

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn a_required_wire_that_is_cut_makes_the_front_end_unready_until_it_is_restored() {
    let pair = Pair::take();
    for (transport, _) in TRANSPORTS {
        let split = Split::start(transport, Reach::ROUTER_BESIDE, REQUIRED, &[]);
        split.splits(transport).await;
        pair.cut();
        eventually("the loss is seen", LIMIT, || async { split.client.get("/ready").await.0 == 503 }).await;
        let reply = split.client.complete(&prompt(20), 4, json!({})).await;
        assert_eq!(reply.status, 503, "{}", reply.body);
        pair.restore();
        eventually("the link is back", LIMIT, || async { split.client.get("/ready").await.0 == 200 }).await;
        split.splits(&format!("{transport}, restored")).await;
        split.is_settled(transport).await;
    }
}

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn a_partition_in_mid_transfer_costs_no_answer_and_heals() {
    let pair = Pair::take();
    let expected = whole_answers().await;
    for (transport, _) in TRANSPORTS {
        let split = Split::start(transport, Reach::FIRST_WIRE, &[], &[]);
        split.splits(transport).await;
        // Slow enough that the cut falls into transfers.
        pair.worsen(&["rate", "20mbit"]);
        let client = split.client.clone();
        let answers_meanwhile = tokio::spawn(async move { answers(&client).await });
        let before = split.client.metric("tidemill_handoff_total", "").await;
        eventually("a handoff is done", LIMIT, || async {
            before < split.client.metric("tidemill_handoff_total", "").await
        })
        .await;
        pair.cut();
        let found = answers_meanwhile.await.expect("no panic");
        same(expected, &found, &format!("{transport}, cut"));
        pair.restore();
        split.splits(&format!("{transport}, restored")).await;
        split.is_settled(transport).await;
    }
}

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn a_prefill_host_whose_worker_dies_while_pushing_costs_no_answer_and_comes_back() {
    let _pair = Pair::take();
    let expected = whole_answers().await;
    for (transport, _) in TRANSPORTS {
        let folder = Host::Second.run(&["mktemp", "--directory"]);
        let trigger = format!("{}/armed", folder.trim());
        let mut split = Split::start(
            transport,
            Reach::FIRST_WIRE,
            &[],
            &["--fault-point", &format!("pushing={trigger}")],
        );
        split.splits(transport).await;
        Host::Second.run(&["touch", &trigger]);
        same(expected, &answers(&split.client).await, &format!("{transport}, killed"));
        assert_eq!(split.prefill.wait(LIMIT), Some(-9), "{transport}: the fault never fired");
        split.restart_prefill();
        split.splits(&format!("{transport}, restarted")).await;
        split.is_settled(transport).await;
    }
}

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn the_speed_that_is_reported_is_that_of_the_wire() {
    let pair = Pair::take();
    // 100 Mbit/s are 12.5 MB/s, of which a probe sees a little more as long as buffers take it in.
    pair.worsen(&["rate", "100mbit"]);
    // A probe that has not come back within a second is given up, which happens where processors are emulated.
    for _ in 0..ROUNDS {
        let split = Split::start("tcp", Reach::FIRST_WIRE, REQUIRED, &[]);
        split.splits("slow").await;
        assert!(split.prefill.log().contains("peer measured"), "{}", split.prefill.log());
        let slow = split.client.metric("tidemill_link_bytes_per_second", "transport=\"tcp\"").await;
        if slow == 0.0 {
            continue;
        }
        // Both directions are reported, and summed up here.
        assert!(2e6 < slow && slow < 40e6, "{slow} bytes per second\n{}", split.front.log());
        return;
    }
    panic!("the probe took longer than a second in each of {ROUNDS} rounds; is the machine overloaded?");
}

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn one_of_two_wires_that_is_cut_leaves_the_handoffs_to_the_other_until_it_is_back() {
    let pair = Pair::take();
    let expected = whole_answers().await;
    let (wire, when) = (0, "a wire cut");
    let mut split = Split::start("rdma", Reach::MESSAGES_BESIDE, &[], &[]);
    split.splits(when).await;
    pair.worsen(&["rate", "20mbit"]);
    let client = split.client.clone();
    let before = Host::First.bytes_received_on(wire);
    let meanwhile = tokio::spawn(async move { (answers(&client).await, answers(&client).await) });
    eventually("bytes of handoffs are on the wire", LIMIT, || async {
        before + SOME_BYTES < Host::First.bytes_received_on(wire)
    })
    .await;
    pair.cut_wire(wire);
    let (first, second) = meanwhile.await.expect("no panic");
    same(expected, &first, when);
    same(expected, &second, when);
    // A path dies of a write that it did not bring over, and not before.
    split.prefill.wait_for("an RDMA path is dead");
    let (packets, bytes) = (Host::Second.rdma_packets_sent_on(1 - wire), split.bytes_handed_over().await);
    split.splits(&format!("{when}: still")).await;
    let packets = Host::Second.rdma_packets_sent_on(1 - wire) - packets;
    let bytes = split.bytes_handed_over().await - bytes;
    // At most 4096 bytes are in a packet.
    assert!(bytes / 4096.0 <= packets as f64, "{when}: {packets} packets on the other for {bytes} bytes");
    let refusals = split.client.metric("tidemill_handoff_refusals_total", "").await;
    assert_eq!(refusals, 0.0, "{when}: what came over the other wire is whole");
    // The connection takes the wire up again by itself.
    pair.restore();
    split.prefill.wait_for("an RDMA path is up again");
    let packets = Host::Second.rdma_packets_sent_on(wire);
    eventually("handoffs take the wire that is back", LIMIT, || async {
        let reply = split.client.complete(&prompt(100), 4, json!({})).await;
        reply.status == 200 && packets + SOME_PACKETS < Host::Second.rdma_packets_sent_on(wire)
    })
    .await;
    assert!(!split.prefill.log().contains("peer lost"), "{}", split.prefill.log());
    same(expected, &answers(&split.client).await, "the wire is back");
    split.is_settled(when).await;
}

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn a_prefill_host_that_loses_its_power_in_mid_transfer_costs_no_answer_and_no_block() {
    let pair = Pair::take();
    let expected = whole_answers().await;
    for way in WAYS {
        let transport = &format!("{way:?}");
        let mut split = Split::start_by(way, Reach::FIRST_WIRE, &[], &[]);
        split.splits(transport).await;
        pair.worsen(&["rate", "20mbit"]);
        let client = split.client.clone();
        let before = Host::First.bytes_received_on(0);
        let failures = split.client.metric("tidemill_handoff_failures_total", "worker=\"decode\"").await;
        let meanwhile = tokio::spawn(async move { answers(&client).await });
        eventually("bytes of a handoff are on the wire", LIMIT, || async {
            before + SOME_BYTES < Host::First.bytes_received_on(0)
        })
        .await;
        let crashed = pair.crash_second();
        // Every request ends, with its answer, and decode has all its blocks, while nothing answers for the dead host.
        same(expected, &meanwhile.await.expect("no panic"), &format!("{transport}, without power"));
        eventually(&format!("{transport}: decode has all its blocks"), LIMIT, || split.decode_is_whole())
            .await;
        let failed = split.client.metric("tidemill_handoff_failures_total", "worker=\"decode\"").await;
        assert!(failures < failed, "{transport}: no handoff was under way\n{}", split.front.log());
        drop(crashed);
        pair.restore();
        split.restart_prefill();
        split.splits(&format!("{transport}, power is back")).await;
        same(expected, &answers(&split.client).await, &format!("{transport}, power is back"));
        split.is_settled(transport).await;
    }
}

/// More than heartbeats and statuses are, less than a handoff of many blocks is.
const SOME_BYTES: u64 = 200_000;
/// More than it takes to try a path out.
const SOME_PACKETS: u64 = 200;
