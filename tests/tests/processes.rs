//! What `serve` promises about its processes: an end that cuts off nobody, health that tells the truth, a queue with a
//! bound, workers on cores of their own.

use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use tidemill_tests::client::Client;
use tidemill_tests::deployment::{Deployment, eventually};
use tidemill_tests::fixtures;

#[tokio::test]
async fn what_runs_is_finished_before_the_end() {
    let deployment = start(&[]);
    let client = deployment.client.clone();
    let long = |which| {
        let mut request = request(which, true);
        request["max_tokens"] = json!(450);
        request
    };
    let expected = text_and_finish(&client.post("/v1/completions", &long(0)).await.body);
    let (status, mut events) = client.stream("/v1/completions", &long(0)).await;
    assert_eq!(status, 200);
    let mut seen = vec![events.next().await.expect("a stream of many tokens")];
    // Others keep it busy meanwhile.
    let others = tokio::spawn({
        let client = client.clone();
        let longs = (1..=OTHERS).map(long).collect::<Vec<_>>();
        async move {
            let posts = longs.iter().map(|request| client.post("/v1/completions", request));
            futures::future::join_all(posts).await
        }
    });
    eventually("the others are there", LIMIT, || async {
        client.metric("vllm:num_requests_running", "").await > 1.0
    })
    .await;
    deployment.ask_to_end();
    eventually("it takes no more", LIMIT, || async { client.get("/ready").await.0 == 503 }).await;
    let refused = client.try_post("/v1/completions", &request(0, false)).await;
    assert_eq!(refused.expect("it listens as long as something runs").status, 503);
    while let Some(event) = events.next().await {
        seen.push(event);
    }
    assert_eq!(text_and_finish(&Value::Array(seen)), expected, "{}", deployment.log());
    assert_eq!(expected.1, json!("length"));
    for reply in others.await.expect("each is answered") {
        assert_eq!(text_and_finish(&reply.body).1, json!("length"), "{}", deployment.log());
    }
    let log = deployment.log();
    assert_eq!(deployment.exit_code(), Some(0), "{log}");
}

#[tokio::test]
async fn health_knows_a_worker_that_does_not_answer() {
    let deployment = start(&[]);
    let health = async || deployment.client.get("/health").await.0;
    assert_eq!(health().await, 200);
    for role in ["prefill", "decode"] {
        let frozen = deployment.workers(role)[0];
        frozen.freeze();
        eventually(&format!("{role} is missed"), LIMIT, || async { health().await == 503 }).await;
        frozen.wake();
        eventually(&format!("{role} is back"), LIMIT, || async { health().await == 200 }).await;
    }
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_again_and_spoils_no_answer() {
    let deployment = start(&["--max-queue", "1", "--max-num-seqs", "1"]);
    let client = &deployment.client;
    let mut expected = Vec::new();
    for which in 0..CLIENTS {
        expected.push(answer(client, which).await);
    }
    let requests =
        (0..CLIENTS).map(|which| async move { client.post("/v1/completions", &request(which, false)).await });
    let replies = futures::future::join_all(requests).await;
    let (mut served, mut refused) = (0, 0);
    for (reply, expected) in replies.iter().zip(&expected) {
        if reply.status == 429 {
            refused += 1;
            let seconds = reply.retry_after.as_deref().and_then(|seconds| seconds.parse::<u32>().ok());
            assert!(seconds.is_some_and(|seconds| 0 < seconds), "{reply:?}");
            assert_eq!(reply.body["error"]["type"], "rate_limit_error", "{reply:?}");
        } else {
            served += 1;
            assert_eq!(reply.status, 200, "{reply:?}");
            assert_eq!(reply.body["choices"][0]["text"], **expected, "{reply:?}");
        }
    }
    assert!(0 < served && 0 < refused, "{served} served, {refused} refused");
    eventually("the ledger closes", LIMIT, || client.is_idle()).await;
}

#[tokio::test]
async fn two_workers_compute_on_different_cores() {
    if std::thread::available_parallelism().expect("the system counts them").get() < 2 {
        return; // Here they can only share.
    }
    let deployment = start(&[]);
    let [prefill, decode] = ["prefill", "decode"].map(|role| deployment.workers(role)[0].engine_cores());
    assert!(prefill.is_disjoint(&decode), "prefill on {prefill:?}, decode on {decode:?}");
}

fn start(flags: &[&str]) -> Deployment {
    let folder = fixtures::model("llama3");
    let mut arguments = vec![folder.to_str().expect("UTF-8")];
    arguments.extend(flags);
    Deployment::start(&arguments)
}

fn request(which: u32, stream: bool) -> Value {
    let prompt: Vec<u32> = (0..30 + which).map(|index| 3 + (index * 5 + which) % 200).collect();
    json!({
        "prompt": prompt, "max_tokens": 300, "temperature": 1.0, "seed": which, "ignore_eos": true, "stream": stream,
    })
}

/// What a stream said in all.
fn text_and_finish(events: &Value) -> (String, Value) {
    let choices = events.as_array().into_iter().flatten().map(|event| &event["choices"][0]);
    let text = choices.clone().filter_map(|choice| choice["text"].as_str()).collect();
    let mut finishes = choices.map(|choice| &choice["finish_reason"]).filter(|reason| !reason.is_null());
    (text, finishes.next().cloned().unwrap_or(Value::Null))
}

async fn answer(client: &Client, which: u32) -> String {
    let reply = client.post("/v1/completions", &request(which, false)).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.body["choices"][0]["text"].as_str().expect("a text").to_owned()
}

const CLIENTS: u32 = 8;
const OTHERS: u32 = 11;
/// Not a promise about speed: the bound after which something counts as stuck on a loaded machine.
const LIMIT: Duration = Duration::from_secs(20);
