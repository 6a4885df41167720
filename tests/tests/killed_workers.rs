//! A worker that dies takes no request with it: whatever the stage of the handoff, every answer comes out as if
//! nothing had happened, no block is lost, and the worker is back.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};
use tidemill_tests::client::Client;
use tidemill_tests::deployment::{Deployment, eventually};
use tidemill_tests::fixtures;
use tidemill_tests::lateness::Lateness;

const TRANSPORTS: [&str; 2] = ["shm", "tcp"];

#[tokio::test]
async fn a_prefill_worker_that_dies_before_the_reservation_costs_nothing() {
    prefill_dies_at("before-reserve").await;
}

#[tokio::test]
async fn a_prefill_worker_that_dies_while_pushing_costs_nothing() {
    prefill_dies_at("pushing").await;
}

#[tokio::test]
async fn a_prefill_worker_that_dies_before_the_commit_costs_nothing() {
    prefill_dies_at("before-commit").await;
}

#[tokio::test]
async fn a_decode_worker_that_dies_mid_stream_costs_nothing() {
    for transport in TRANSPORTS {
        let deployment = start(transport, &[]);
        let expected = expected_texts(&deployment.client).await;
        let victim = deployment.workers("decode")[0];
        // Longer than what can be on its way to the client already.
        let mut long = request(0, true);
        long["max_tokens"] = json!(340);
        let expected_long = text_of(&deployment.client, &long).await;
        let (status, mut events) = deployment.client.stream("/v1/completions", &long).await;
        assert_eq!(status, 200);
        let mut text = String::new();
        for _ in 0..5 {
            text.push_str(
                events.next().await.expect("a stream of many tokens")["choices"][0]["text"]
                    .as_str()
                    .unwrap_or(""),
            );
        }
        let others = spawn_requests(&deployment.client);
        let lateness = Lateness::measure();
        let killed = Instant::now();
        victim.kill();
        while let Some(event) = events.next().await {
            text.push_str(event["choices"][0]["text"].as_str().unwrap_or(""));
        }
        assert_eq!(text, expected_long, "{transport}: the stream goes on where it was\n{}", deployment.log());
        assert_eq!(others.await.expect("no panic"), expected, "{transport}\n{}", deployment.log());
        let recoveries =
            recovered(&deployment, killed, &lateness, &format!("decode killed, {transport}")).await;
        assert!(0.0 < recoveries, "{transport}: the stream was over before the kill\n{}", deployment.log());
        settled(&deployment, "decode").await;
    }
}

#[tokio::test]
async fn workers_that_lost_each_other_meet_again() {
    for transport in TRANSPORTS {
        let deployment = start(transport, &[]);
        let expected = expected_texts(&deployment.client).await;
        let frozen = deployment.workers("prefill")[0];
        let before = deployment.last_said("peer lost");
        // For longer than a lease, but not so long that the router has to make its own connection again.
        frozen.freeze();
        eventually("decode notices", STUCK, || async { before < deployment.last_said("peer lost") }).await;
        frozen.wake();
        let handoffs = deployment.client.metric("tidemill_handoff_total", "").await;
        eventually("requests are split again", STUCK, || async {
            let reply = deployment.client.post("/v1/completions", &request(0, false)).await;
            assert_eq!(reply.body["choices"][0]["text"], *expected[0], "{transport}\n{}", deployment.log());
            handoffs < deployment.client.metric("tidemill_handoff_total", "").await
        })
        .await;
        eventually("the ledger closes", STUCK, || deployment.client.is_idle()).await;
    }
}

/// Kills the prefill worker at `stage` of one of several concurrent requests.
async fn prefill_dies_at(stage: &str) {
    for transport in TRANSPORTS {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let trigger = folder.path().join("armed");
        let fault = format!("{stage}={}", trigger.display());
        // Prompts that are cached on both sides leave nothing to push.
        let flags = ["--no-enable-prefix-caching", "--fault-point", &fault];
        let deployment = start(transport, &flags);
        let expected = expected_texts(&deployment.client).await;
        let before = deployment.workers("prefill");
        let lateness = Lateness::measure();
        let armed = Instant::now();
        arm(&trigger);
        let requests = spawn_requests(&deployment.client);
        // The worker removes the file and kills itself.
        let mut killed = Instant::now();
        while trigger.exists() {
            killed = Instant::now();
            assert!(killed - armed < STUCK, "{transport}, {stage}: no fault\n{}", deployment.log());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let quiet = tokio::spawn(quiet_again(deployment.client.clone(), killed));
        assert_eq!(requests.await.expect("no panic"), expected, "{transport}, {stage}\n{}", deployment.log());
        let case = format!("prefill killed {stage}, {transport}");
        let recoveries = recovered(&deployment, killed, &lateness, &case).await;
        assert!(0.0 < recoveries, "{case}: no request was with the killed worker\n{}", deployment.log());
        let quiet = quiet.await.expect("no panic");
        eprintln!("{case}: decode's blocks were back after {quiet:?}");
        assert!(quiet < RECLAIMED + allowance(&lateness), "{case}: {quiet:?}\n{}", deployment.log());
        settled(&deployment, "prefill").await;
        assert_ne!(before, deployment.workers("prefill"), "{transport}, {stage}: another process serves now");
    }
}

fn start(transport: &str, more: &[&str]) -> Deployment {
    let folder = fixtures::model("llama3");
    let mut arguments = vec![folder.to_str().expect("UTF-8"), "--transport", transport];
    arguments.extend(["--max-num-batched-tokens", "64"]);
    arguments.extend(more);
    Deployment::start(&arguments)
}

/// Every request that was under way is where it can go on, in time. Returns how many had to go elsewhere.
///
/// Nothing that a request waits for when a worker is killed is longer than half a second: the lease, and the time that
/// decode gets to show that it had everything. The rest of the bound is for a machine that is busy with other things.
async fn recovered(deployment: &Deployment, killed: Instant, lateness: &Lateness, case: &str) -> f64 {
    let said = deployment.last_said("request goes on elsewhere");
    let took = said.map_or(Duration::ZERO, |said| said.saturating_duration_since(killed));
    let recoveries = deployment.client.metric("tidemill_recovery_seconds_count", "").await;
    let seconds = deployment.client.metric("tidemill_recovery_seconds_sum", "").await;
    eprintln!(
        "{case}: the last of {recoveries} requests went on elsewhere {took:?} after the kill; the router took \
         {:.3} s on average; the machine was up to {:?} late",
        seconds / recoveries.max(1.0),
        lateness.worst()
    );
    assert!(took < RECOVERED + allowance(lateness), "{case}: {took:?}\n{}", deployment.log());
    recoveries
}

/// How long it took until no block of the decode worker waited for a peer any more.
async fn quiet_again(client: Client, since: Instant) -> Duration {
    eventually("no block is reserved or quarantined", STUCK, || async {
        let metrics = client.metrics().await;
        let waits = |key: &str| {
            key.starts_with("tidemill_blocks{")
                && key.contains("decode")
                && (key.contains("reserved") || key.contains("quarantined"))
        };
        metrics.iter().all(|(key, blocks)| !waits(key) || *blocks == 0.0)
    })
    .await;
    since.elapsed()
}

/// A chain of steps in several processes, each of which may be late.
fn allowance(lateness: &Lateness) -> Duration {
    lateness.worst() * 4
}

/// Blocks are back on every worker, the dead one is replaced, and the system serves.
async fn settled(deployment: &Deployment, role: &str) {
    eventually("the worker is back", STUCK, || async {
        deployment.workers(role).len() == 1 && deployment.client.get("/health").await.0 == 200
    })
    .await;
    eventually("the ledger closes", STUCK, || deployment.client.is_idle()).await;
    let before = deployment.client.metric("tidemill_handoff_total", "").await;
    let reply = deployment.client.post("/v1/completions", &request(0, false)).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    eventually("requests are split again", STUCK, || async {
        let _ = deployment.client.post("/v1/completions", &request(1, false)).await;
        before < deployment.client.metric("tidemill_handoff_total", "").await
    })
    .await;
}

fn request(which: u32, stream: bool) -> Value {
    let prompt: Vec<u32> = (0..150 + which * 11).map(|index| 3 + (index * 5 + which) % 200).collect();
    json!({
        "prompt": prompt, "max_tokens": 60, "temperature": 1.0, "seed": which, "ignore_eos": true, "stream": stream,
    })
}

async fn text_of(client: &Client, request: &Value) -> String {
    let mut request = request.clone();
    request["stream"] = json!(false);
    let reply = client.post("/v1/completions", &request).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.body["choices"][0]["text"].as_str().expect("a text").to_owned()
}

/// The texts without any failure, from the same deployment before the kill.
async fn expected_texts(client: &Client) -> Vec<String> {
    let mut texts = Vec::new();
    for which in 0..REQUESTS {
        texts.push(text_of(client, &request(which, false)).await);
    }
    texts
}

fn spawn_requests(client: &Client) -> tokio::task::JoinHandle<Vec<String>> {
    let client = client.clone();
    tokio::spawn(async move {
        let requests = (0..REQUESTS).map(|which| {
            let client = client.clone();
            async move { text_of(&client, &request(which, false)).await }
        });
        futures::future::join_all(requests).await
    })
}

fn arm(trigger: &Path) {
    std::fs::write(trigger, b"").expect("the folder is ours");
}

const REQUESTS: u32 = 6;
/// Not a promise about speed: the bound after which a request counts as stuck on a loaded machine.
const STUCK: Duration = Duration::from_secs(20);
/// From the kill of a worker until its requests are where they can go on.
const RECOVERED: Duration = Duration::from_secs(1);
/// From the kill of a prefill worker until decode has the blocks back that waited for it.
const RECLAIMED: Duration = Duration::from_secs(2);
