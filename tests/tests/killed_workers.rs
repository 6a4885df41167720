//! A worker that dies takes no request with it: whatever the stage of the handoff, every answer comes out as if
//! nothing had happened, no block is lost, and the worker is back.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};
use tidemill_tests::client::Client;
use tidemill_tests::deployment::{Deployment, eventually};
use tidemill_tests::fixtures;

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
        let (status, mut events) = deployment.client.stream("/v1/completions", &request(0, true)).await;
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
        victim.kill();
        while let Some(event) = events.next().await {
            text.push_str(event["choices"][0]["text"].as_str().unwrap_or(""));
        }
        assert_eq!(text, expected[0], "{transport}: the stream goes on where it was\n{}", deployment.log());
        assert_eq!(others.await.expect("no panic"), expected, "{transport}\n{}", deployment.log());
        settled(&deployment, "decode").await;
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
        arm(&trigger);
        let started = Instant::now();
        let found = spawn_requests(&deployment.client).await.expect("no panic");
        let took = started.elapsed();
        assert!(!trigger.exists(), "{transport}, {stage}: the fault never fired\n{}", deployment.log());
        assert_eq!(found, expected, "{transport}, {stage}\n{}", deployment.log());
        assert!(took < RECOVERY, "{transport}, {stage}: {took:?}\n{}", deployment.log());
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

/// Blocks are back on every worker, the dead one is replaced, and the system serves.
async fn settled(deployment: &Deployment, role: &str) {
    eventually("the worker is back", RECOVERY, || async {
        deployment.workers(role).len() == 1 && deployment.client.get("/health").await.0 == 200
    })
    .await;
    eventually("the ledger closes", RECOVERY, || deployment.client.is_idle()).await;
    let before = deployment.client.metric("tidemill_handoff_total", "").await;
    let reply = deployment.client.post("/v1/completions", &request(0, false)).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    eventually("requests are split again", RECOVERY, || async {
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

/// The texts without any failure, from the same deployment before the kill.
async fn expected_texts(client: &Client) -> Vec<String> {
    let mut texts = Vec::new();
    for which in 0..REQUESTS {
        let reply = client.post("/v1/completions", &request(which, false)).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        texts.push(reply.body["choices"][0]["text"].as_str().expect("a text").to_owned());
    }
    texts
}

fn spawn_requests(client: &Client) -> tokio::task::JoinHandle<Vec<String>> {
    let client = client.clone();
    tokio::spawn(async move {
        let requests = (0..REQUESTS).map(|which| {
            let client = client.clone();
            async move {
                let reply = client.post("/v1/completions", &request(which, false)).await;
                assert_eq!(reply.status, 200, "{}", reply.body);
                reply.body["choices"][0]["text"].as_str().expect("a text").to_owned()
            }
        });
        futures::future::join_all(requests).await
    })
}

fn arm(trigger: &Path) {
    std::fs::write(trigger, b"").expect("the folder is ours");
}

const REQUESTS: u32 = 6;
/// Not a promise about speed: the bound after which a request counts as stuck on a loaded machine.
const RECOVERY: Duration = Duration::from_secs(20);
