//! A split deployment over both hosts, and what it is asked.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::json;
use tidemill_tests::client::{Client, Reply, comparable, merge};
use tidemill_tests::deployment::eventually;
use tidemill_tests::two_hosts::{Host, HostProcess, binary};
use tokio::sync::OnceCell;

/// A front end and a decode worker on the first host, a prefill worker on the second.
pub(crate) struct Split {
    pub(crate) prefill: HostProcess,
    prefill_command: Vec<String>,
    pub(crate) decode: HostProcess,
    pub(crate) front: HostProcess,
    pub(crate) client: Client,
}

/// How a handoff goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way<'a> {
    /// As `--transport` calls it.
    pub(crate) transport: &'a str,
    /// As `--handoff` does.
    pub(crate) handoff: &'a str,
    /// What kind of cache prefill and decode have.
    pub(crate) caches: [&'a [&'a str]; 2],
}

/// By which addresses its parts reach one another.
#[derive(Clone, Copy)]
pub(crate) struct Reach {
    /// The router its workers.
    pub(crate) router: fn(Host) -> Ipv4Addr,
    /// Workers one another, for handoffs.
    pub(crate) handoffs: fn(Host) -> Ipv4Addr,
}

impl Reach {
    /// Everything on the first wire.
    pub(crate) const FIRST_WIRE: Self = Self { router: Host::address, handoffs: Host::address };
    /// The router reaches both workers all the time; what workers say to one another is on the first wire.
    pub(crate) const ROUTER_BESIDE: Self = Self { router: Host::management_address, handoffs: Host::address };
    /// Messages are on a wire of their own, and RDMA has the others to itself.
    pub(crate) const MESSAGES_BESIDE: Self =
        Self { router: Host::management_address, handoffs: Host::management_address };
}

impl Split {
    /// `required` is for all three, `faults` for the prefill worker.
    pub(crate) fn start(transport: &str, reach: Reach, required: &[&str], faults: &[&str]) -> Self {
        Self::start_by(Way { transport, handoff: "push", caches: ALIKE }, reach, required, faults)
    }

    /// The same, and what workers let their peers do.
    pub(crate) fn start_by(way: Way<'_>, reach: Reach, required: &[&str], faults: &[&str]) -> Self {
        let Way { transport, handoff, caches } = way;
        let worker = |host: Host, role: &str, more: &[&str]| {
            let (listen, address) =
                (format!("{}:0", (reach.router)(host)), format!("{}:0", (reach.handoffs)(host)));
            let mut command = command(&["worker", "--role", role, "--name", role, "--listen", &listen]);
            command.extend(["--handoff-listen", &address, "--transport", transport].map(str::to_owned));
            command.extend(["--handoff", handoff].map(str::to_owned));
            command.extend(ENGINE.iter().chain(required).chain(more).map(|word| (*word).to_owned()));
            command
        };
        let mut prefill_command = worker(Host::Second, "prefill", &[caches[0], faults].concat());
        let mut prefill = start(Host::Second, &prefill_command);
        let mut decode = start(Host::First, &worker(Host::First, "decode", caches[1]));
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

    pub(crate) fn restart_prefill(&mut self) {
        self.prefill = start(Host::Second, &self.prefill_command);
        self.prefill.wait_for("address=");
    }

    /// Requests are split, now or soon.
    pub(crate) async fn splits(&self, when: &str) {
        let before = self.client.metric("tidemill_handoff_total", "").await;
        eventually(&format!("{when}: requests are split"), LIMIT, || async {
            let reply = self.client.complete(&prompt(100), 4, json!({})).await;
            reply.status == 200 && before < self.client.metric("tidemill_handoff_total", "").await
        })
        .await;
    }

    /// Answers from a round in which neither host was too slow for the other's heartbeat, as happens where the machine
    /// has other work, and how much was done [`BESIDE_THE_WAY`] in it.
    pub(crate) async fn undisturbed(&self, when: &str) -> (Vec<(&'static str, Reply)>, [f64; 3]) {
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

    pub(crate) async fn bytes_handed_over(&self) -> f64 {
        self.client.metric("tidemill_handoff_bytes_total", "").await
    }

    /// Whether each of decode's blocks is free or cached. Of a worker that is gone the front end knows what it said last.
    pub(crate) async fn decode_is_whole(&self) -> bool {
        let metrics = self.client.metrics().await;
        let of_decode = |key: &&String| key.starts_with("tidemill_blocks{") && key.contains("\"decode\"");
        let (unused, used): (Vec<_>, Vec<_>) = metrics
            .iter()
            .filter(|(key, _)| of_decode(key))
            .partition(|(key, _)| key.contains("\"free\"") || key.contains("\"cached\""));
        used.len() == 3 && used.iter().all(|(_, count)| **count == 0.0) && unused.iter().any(|it| 0.0 < *it.1)
    }

    pub(crate) async fn is_settled(&self, when: &str) {
        eventually(&format!("{when}: the ledger closes"), LIMIT, || self.client.is_idle()).await;
    }
}

pub(crate) fn command(words: &[&str]) -> Vec<String> {
    let binary = binary().to_str().expect("the repository's path is UTF-8").to_owned();
    [binary].into_iter().chain(words.iter().map(|word| (*word).to_owned())).collect()
}

pub(crate) fn start(host: Host, command: &[String]) -> HostProcess {
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    host.start(&words)
}

/// From one worker, on the first host.
pub(crate) async fn whole_answers() -> &'static [(&'static str, Reply)] {
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

pub(crate) async fn answers(client: &Client) -> Vec<(&'static str, Reply)> {
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

pub(crate) fn same(expected: &[(&str, Reply)], found: &[(&str, Reply)], when: &str) {
    for ((name, expected), (_, found)) in expected.iter().zip(found) {
        assert_eq!(expected, found, "{when}: {name}");
    }
}

pub(crate) fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|index| 3 + (index * 7 + length) % 200).collect()
}

/// What stays at zero while all goes as intended.
pub(crate) const BESIDE_THE_WAY: [&str; 3] =
    ["tidemill_fallbacks_total", "tidemill_handoff_refusals_total", "tidemill_handoff_in_place_total"];
pub(crate) const ROUNDS: u32 = 6;
/// Both workers' caches are of the usual kind.
pub(crate) const ALIKE: [&[&str]; 2] = [&[], &[]];
/// Another way than the one asked for is an error.
pub(crate) const REQUIRED: &[&str] = &["--require-transport"];
/// Every prompt is computed and handed over anew, and the cache fits a small machine.
const ENGINE: [&str; 3] = ["--no-enable-prefix-caching", "--kv-cache-memory", "64MiB"];
/// Not a promise about speed: the bound after which something counts as stuck on a loaded, emulated machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
