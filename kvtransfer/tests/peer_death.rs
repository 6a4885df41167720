//! A peer in a process of its own that is killed, or stopped, at each stage of a handoff: what this side holds
//! comes back, and never while the peer could still write to it.

mod worker;

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tidemill_kvtransfer::{HandoffEvent, Path, PeerAddress};
use tidemill_kvtransfer_proto::units::HandoffId;
use worker::{PATIENCE, Way, Worker, config, ways};

const HANDOFF: HandoffId = HandoffId(5);

/// The peer's process. Killed when dropped.
struct Peer {
    child: Child,
    orders: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    address: PeerAddress,
}

impl Peer {
    fn start(role: &str, way: Way) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "peer_process", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test starts");
        let orders = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let address = PeerAddress { name: role.into(), instance: 9, address: ([127, 0, 0, 1], 1).into() };
        let mut peer = Self { child, orders, lines, address };
        peer.order(&format!("{role} {way:?}"));
        let port = peer.await_line("port ");
        peer.address.address.set_port(port.parse().expect("a port"));
        peer
    }

    fn order(&mut self, line: &str) {
        writeln!(self.orders, "{line}").expect("the peer reads");
    }

    /// The rest of the next line that begins with this; what the test harness prints is skipped.
    fn await_line(&mut self, begin: &str) -> String {
        loop {
            let line = self.lines.next().expect("the peer still runs").expect("text");
            // The harness may print the beginning of a line of its own before it.
            if let Some(at) = line.find(begin) {
                return line[at + begin.len()..].to_owned();
            }
        }
    }

    fn await_done(&mut self, order: &str) {
        self.order(order);
        self.await_line(&format!("done {order}"));
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("our own child");
    }

    fn kill(mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill(); // It may be gone already.
        let _ = self.child.wait();
    }
}

/// The other process: does what it reads from its input, a word per line.
#[test]
#[ignore = "needs to be started by the other tests here, which tell it what to do"]
fn peer_process() {
    let mut lines = std::io::stdin().lines().map(|line| line.expect("text"));
    let first = lines.next().expect("the role");
    let (role, way) = first.split_once(' ').expect("role and way");
    let way = ways().into_iter().find(|it| format!("{it:?}") == way).expect("a way");
    let mut config = config(role, 9, way, 16);
    if lease_matters(role) {
        config.timing.lease = SHORT_LEASE;
    }
    let mut worker = Worker::start(config);
    println!("port {}", worker.endpoint.address().port());
    let mut reserved = None;
    for order in lines {
        match order.as_str() {
            "expect" => worker.endpoint.expect(HANDOFF, 1, PATIENCE),
            "await-reserved" => reserved = Some(worker.expect_reserved()),
            "half" => worker.fill(reserved.as_ref().expect("reserved first"), 0..1),
            "fill" => worker.fill_all(reserved.as_ref().expect("reserved first")),
            "finish" => worker.endpoint.finish(HANDOFF, vec![7]),
            "await-delivered" => assert_eq!(worker.news(), "delivered"),
            "reserve" => worker.reserve(HANDOFF, 1, 3),
            "await-committed" => assert_eq!(worker.news(), "committed"),
            "mark-and-abandon" => {
                assert_eq!(worker.news(), "cancel-wanted");
                let reserved = reserved.take().expect("reserved first");
                if let Path::InPlace(arena) = &reserved.path {
                    let start = reserved.targets[0].block.0 as usize * worker.layout.block_bytes();
                    arena.write(start, MARK);
                }
                worker.endpoint.abandon(HANDOFF, "told to".into());
            }
            other => panic!("no order {other}"),
        }
        println!("done {order}");
    }
}

fn lease_matters(role: &str) -> bool {
    role == "stopped"
}

fn decode_worker(way: Way) -> Worker {
    Worker::start(config("decode", 1, way, 16))
}

#[test]
fn a_prefill_worker_that_is_killed_leaves_no_block_behind() {
    for way in ways() {
        for orders in [
            &[][..],
            &["expect", "await-reserved"],
            &["expect", "await-reserved", "half"],
            &["expect", "await-reserved", "fill"],
        ] {
            let mut decode = decode_worker(way);
            let mut peer = Peer::start("prefill", way);
            decode.meet(peer.address.clone());
            decode.reserve(HANDOFF, 9, 3);
            for order in orders {
                peer.await_done(order);
            }
            peer.kill();
            assert_eq!(decode.news(), "reserve-failed:peerlost", "{way:?} after {orders:?}");
            assert_eq!(decode.news(), "released", "{way:?} after {orders:?}");
            decode.assert_nothing_leaked();
        }
    }
}

#[test]
fn what_was_committed_survives_the_death_of_its_sender() {
    for way in ways() {
        for adopts in [true, false] {
            let mut decode = decode_worker(way);
            let mut peer = Peer::start("prefill", way);
            decode.meet(peer.address.clone());
            decode.reserve(HANDOFF, 9, 3);
            for order in ["expect", "await-reserved", "fill", "finish"] {
                peer.await_done(order);
            }
            assert_eq!(decode.news(), "committed", "{way:?}");
            peer.kill();
            while !matches!(decode.peer_event(), HandoffEvent::PeerDown { .. }) {}
            if adopts {
                decode.adopt_and_check(HANDOFF);
            } else {
                decode.endpoint.refuse(HANDOFF, "no use for it".into());
                assert_eq!(decode.news(), "released", "{way:?}");
            }
            decode.assert_nothing_leaked();
        }
    }
}

#[test]
fn a_decode_worker_that_is_killed_lets_go_of_the_senders_blocks() {
    for way in ways() {
        for layers in [0, 1, 3] {
            let mut prefill = Worker::start(config("prefill", 1, way, 4));
            let mut peer = Peer::start("decode", way);
            prefill.meet(peer.address.clone());
            prefill.endpoint.expect(HANDOFF, 9, PATIENCE);
            peer.await_done("reserve");
            let reserved = prefill.expect_reserved();
            if 0 < layers {
                prefill.fill(&reserved, 0..layers);
            }
            peer.kill();
            assert_eq!(prefill.news(), "cancel-wanted", "{way:?} after {layers} layers");
            prefill.endpoint.abandon(HANDOFF, "told to".into());
            let failed = prefill.news();
            assert!(failed.starts_with("send-failed:"), "{way:?} after {layers} layers: {failed}");
        }
        // After `finish` there is nothing to stop any more.
        let mut prefill = Worker::start(config("prefill", 1, way, 4));
        let mut peer = Peer::start("decode", way);
        prefill.meet(peer.address.clone());
        prefill.endpoint.expect(HANDOFF, 9, PATIENCE);
        peer.await_done("reserve");
        let reserved = prefill.expect_reserved();
        prefill.fill_all(&reserved);
        prefill.endpoint.finish(HANDOFF, vec![]);
        peer.await_done("await-committed");
        peer.kill();
        assert_eq!(prefill.news(), "send-failed:peerlost", "{way:?}");
    }
}

/// A process that hangs is lost, but its memory mappings are not: what it could write to stays in quarantine
/// until it says itself, on a new connection, that it has stopped.
#[test]
fn a_prefill_worker_that_hangs_is_lost_and_its_blocks_come_back_when_it_is_quiet() {
    for way in ways() {
        let mut config = config("decode", 1, way, 16);
        config.timing.lease = SHORT_LEASE;
        let mut decode = Worker::start(config);
        let mut peer = Peer::start("stopped", way);
        decode.meet(peer.address.clone());
        decode.reserve(HANDOFF, 9, 3);
        for order in ["expect", "await-reserved", "half"] {
            peer.await_done(order);
        }
        peer.signal(Signal::STOP);
        assert_eq!(decode.news(), "reserve-failed:peerlost", "{way:?}");
        peer.order("mark-and-abandon");
        peer.signal(Signal::CONT);
        assert_eq!(decode.news(), "released", "{way:?}");
        if way == Way::InPlace {
            // The mark is the last thing that the peer's engine wrote: had the blocks been released on silence
            // alone, they could have been in other hands by then.
            let mut mark = [0; MARK.len()];
            let target = decode_target(&decode);
            decode.region.read(target, &mut mark);
            assert_eq!(&mark, MARK, "released only after the peer had stopped writing");
        }
        decode.assert_nothing_leaked();
    }
}

/// Where `targets[0]` of the only handoff lies: blocks are lent from the end of the list.
fn decode_target(decode: &Worker) -> usize {
    (decode.blocks as usize - 3) * decode.layout.block_bytes()
}

/// Long enough for two busy cores, short enough to wait for.
const SHORT_LEASE: Duration = Duration::from_millis(800);
const MARK: &[u8; 8] = b"last one";
