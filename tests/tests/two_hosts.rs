//! Prefill on one host, decode and the front end on another, joined by a wire: the same answers as from one worker, by
//! the transport that was asked for, whatever happens to the wire or to the peer.
//!
//! Run in two virtual machines by `tests/rdma/run-pair`.

use std::time::Duration;

use serde_json::json;
use tidemill_tests::client::{Client, Reply, comparable, merge};
use tidemill_tests::deployment::eventually;
use tidemill_tests::two_hosts::{Host, HostProcess, Pair, binary};
use tokio::sync::OnceCell;

/// Ways between two hosts, and whether they take RDMA packets.
const TRANSPORTS: [(&str, bool); 2] = [("tcp", false), ("rdma", true)];

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn split_over_two_hosts_equals_whole() {
    let _pair = Pair::take();
    let expected = whole_answers().await;
    for (transport, is_rdma) in TRANSPORTS {
        let before = Host::Second.rdma_packets_sent();
        let split = Split::start(transport, Host::address, REQUIRED, &[]);
        let (found, counted) = split.undisturbed(transport).await;
        same(expected, &found, transport);
        let bytes = split.client.metric("tidemill_handoff_bytes_total", "").await;
        assert!(0.0 < bytes, "{transport}: nothing was written\n{}", split.front.log());
        assert_eq!(counted, [0.0; 3], "{transport}: {BESIDE_THE_WAY:?}\n{}", split.front.log());
        let speed = split
            .client
            .metric("tidemill_link_bytes_per_second", &format!("transport=\"{transport}\""))
            .await;
        assert!(0.0 < speed, "{transport} is not the way that is reported\n{}", split.front.log());
        // The kernel's count beside our own: a packet carries at most 4096 bytes.
        let packets = Host::Second.rdma_packets_sent() - before;
        if is_rdma {
            assert!(bytes / 4096.0 <= packets as f64, "{transport}: {packets} packets for {bytes} bytes");
        } else {
            assert_eq!(packets, 0, "{transport} sends no RDMA packet");
        }
        split.is_settled(transport).await;
    }
}

#[tokio::test]
#[ignore = "needs two hosts with RDMA devices: tests/rdma/run-pair"]
async fn a_handoff_wire_that_is_cut_costs_no_answer_and_is_used_again_when_restored() {
    let pair = Pair::take();
    let expected = whole_answers().await;
    for (transport, _) in TRANSPORTS {
        // The router reaches both workers all the time; they cannot reach one another.
        let mut split = Split::start(transport, Host::management_address, &[], &[]);
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
        let split = Split::start(transport, Host::management_address, REQUIRED, &[]);
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
        let split = Split::start(transport, Host::address, &[], &[]);
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
        let mut split =
            Split::start(transport, Host::address, &[], &["--fault-point", &format!("pushing={trigger}")]);
        split.splits(transport).await;
        Host::Second.run(&["touch", &trigger]);
        same(expected, &answers(&split.client).await, &format!("{transport}, killed"));
        assert_eq!(split.prefill.wait(LIMIT), Some(-9), "{transport}: the fault never fired");
        split.restart_prefill();
        split.splits(&format!("{transport}, restarted")).await;
        split.is_settled(transport).await;
    }
}

/// A front end and a decode worker on the first host, a prefill worker on the second.
struct Split {
    prefill: HostProcess,
    prefill_command: Vec<String>,
    decode: HostProcess,
    front: HostProcess,
    client: Client,
}

impl Split {
    /// Workers hand over on the first wire; the router reaches them at `reach`. `required` is for all three, `faults`
    /// for the prefill worker.
    fn start(
        transport: &str,
        reach: fn(Host) -> std::net::Ipv4Addr,
        required: &[&str],
        faults: &[&str],
    ) -> Self {
        let worker = |host: Host, role: &str, more: &[&str]| {
            let (listen, handoff) = (format!("{}:0", reach(host)), format!("{}:0", host.address()));
            let mut command = command(&["worker", "--role", role, "--name", role, "--listen", &listen]);
            command.extend(["--handoff-listen", &handoff, "--transport", transport].map(str::to_owned));
            command.extend(ENGINE.iter().chain(required).chain(more).map(|word| (*word).to_owned()));
            command
        };
        let mut prefill_command = worker(Host::Second, "prefill", faults);
        let mut prefill = start(Host::Second, &prefill_command);
        let mut decode = start(Host::First, &worker(Host::First, "decode", &[]));
        let prefill_address = prefill.wait_for("address=");
        let workers = format!("{prefill_address},{}", decode.wait_for("address="));
        let route = ["route", "--workers", &workers, "--port", "0"];
        let mut front = start(Host::First, &command(&[&route, required].concat()));
        let port = front.wait_for("http://127.0.0.1:");
        let port = port.split('/').next().expect("split gives at least one part");
        let client = Client::new(&format!("http://127.0.0.1:{port}"));
        // A second start takes the same address without the fault.
        let listen = prefill_command.iter().position(|word| word == "--listen").expect("given above");
        prefill_command[listen + 1] = prefill_address;
        prefill_command.truncate(prefill_command.len() - faults.len());
        Self { prefill, prefill_command, decode, front, client }
    }

    fn restart_prefill(&mut self) {
        self.prefill = start(Host::Second, &self.prefill_command);
        self.prefill.wait_for("address=");
    }

    /// Requests are split, now or soon.
    async fn splits(&self, when: &str) {
        let before = self.client.metric("tidemill_handoff_total", "").await;
        eventually(&format!("{when}: requests are split"), LIMIT, || async {
            let reply = self.client.complete(&prompt(100), 4, json!({})).await;
            reply.status == 200 && before < self.client.metric("tidemill_handoff_total", "").await
        })
        .await;
    }

    /// Answers from a round in which neither host was too slow for the other's heartbeat, as happens where the machine
    /// has other work, and how much was done [`BESIDE_THE_WAY`] in it.
    async fn undisturbed(&self, when: &str) -> (Vec<(&'static str, Reply)>, [f64; 3]) {
        for _ in 0..ROUNDS {
            self.splits(when).await;
            let (losses, before) = (self.losses(), self.beside_the_way().await);
            let answers = answers(&self.client).await;
            let after = self.beside_the_way().await;
            if losses == self.losses() {
                return (answers, std::array::from_fn(|index| after[index] - before[index]));
            }
        }
        panic!("{when}: the hosts lost one another in each of {ROUNDS} rounds; is the machine overloaded?")
    }

    fn losses(&self) -> usize {
        [&self.prefill, &self.decode, &self.front]
            .map(|process| process.log().matches(" lost").count())
            .iter()
            .sum()
    }

    async fn beside_the_way(&self) -> [f64; 3] {
        let mut counts = [0.0; 3];
        for (count, name) in counts.iter_mut().zip(BESIDE_THE_WAY) {
            *count = self.client.metric(name, "").await;
        }
        counts
    }

    async fn is_settled(&self, when: &str) {
        eventually(&format!("{when}: the ledger closes"), LIMIT, || self.client.is_idle()).await;
    }
}

fn command(words: &[&str]) -> Vec<String> {
    let binary = binary().to_str().expect("the repository's path is UTF-8").to_owned();
    [binary].into_iter().chain(words.iter().map(|word| (*word).to_owned())).collect()
}

fn start(host: Host, command: &[String]) -> HostProcess {
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    host.start(&words)
}

/// From one worker, on the first host.
async fn whole_answers() -> &'static [(&'static str, Reply)] {
    static ANSWERS: OnceCell<Vec<(&str, Reply)>> = OnceCell::const_new();
    ANSWERS.get_or_init(ask_one_worker).await
}

async fn ask_one_worker() -> Vec<(&'static str, Reply)> {
    let mut words = command(&["serve", "--colocated", "--port", "0"]);
    words.extend(ENGINE.iter().map(|word| (*word).to_owned()));
    let mut whole = start(Host::First, &words);
    let port = whole.wait_for("http://127.0.0.1:");
    let port = port.split('/').next().expect("split gives at least one part");
    let client = Client::new(&format!("http://127.0.0.1:{port}"));
    let answers = answers(&client).await;
    assert!(answers.iter().all(|(_, reply)| reply.status == 200), "{answers:?}");
    let sum = &answers.last().expect("not empty").1.body["choices"][0]["message"]["content"];
    assert!(sum.as_str().is_some_and(|text| text.contains("12")), "7 + 5: {sum}");
    answers
}

async fn answers(client: &Client) -> Vec<(&'static str, Reply)> {
    #[rustfmt::skip]
    let requests = [
        ("one token",           prompt(1),   json!({})),
        ("a block",             prompt(16),  json!({})),
        ("more than a block",   prompt(17),  json!({})),
        ("many blocks",         prompt(400), json!({})),
        ("sampled with a seed", prompt(40),  json!({"temperature": 1.0, "top_p": 0.9, "seed": 7})),
        ("three choices",       prompt(70),  json!({"temperature": 1.0, "seed": 9, "n": 3})),
        ("one output token",    prompt(33),  json!({"max_tokens": 1})),
    ];
    let mut replies = Vec::new();
    for (name, prompt, extra) in requests {
        let reply = client.complete(&prompt, 16, extra).await;
        replies.push((name, comparable(reply)));
    }
    let mut chat = json!({"messages": [{"role": "user", "content": "What is 7 + 5?"}]});
    merge(&mut chat, json!({"temperature": 0, "logprobs": true}));
    let reply = client.post("/v1/chat/completions", &chat).await;
    replies.push(("a sum", comparable(reply)));
    replies
}

fn same(expected: &[(&str, Reply)], found: &[(&str, Reply)], when: &str) {
    for ((name, expected), (_, found)) in expected.iter().zip(found) {
        assert_eq!(expected, found, "{when}: {name}");
    }
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|index| 3 + (index * 7 + length) % 200).collect()
}

/// What stays at zero while all goes as intended.
const BESIDE_THE_WAY: [&str; 3] =
    ["tidemill_fallbacks_total", "tidemill_handoff_refusals_total", "tidemill_handoff_in_place_total"];
const ROUNDS: u32 = 6;
/// Another way than the one asked for is an error.
const REQUIRED: &[&str] = &["--require-transport"];
/// Every prompt is computed and handed over anew, and the cache fits a small machine.
const ENGINE: [&str; 3] = ["--no-enable-prefix-caching", "--kv-cache-memory", "64MiB"];
/// Not a promise about speed: the bound after which something counts as stuck on a loaded, emulated machine.
const LIMIT: Duration = Duration::from_secs(60);
