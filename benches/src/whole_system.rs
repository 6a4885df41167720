//! Real processes: what the front end costs, and how long a dead worker hurts.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::StreamExt;
use serde_json::{Value, json};
use tidemill_tests::client::Client;
use tidemill_tests::deployment::Deployment;

use crate::direct_worker::DirectWorker;
use crate::report::{Row, Target};
use crate::timing::{median, quantile};

pub(crate) fn router(rounds: usize) -> anyhow::Result<Vec<Row>> {
    Ok(vec![runtime()?.block_on(front_end(rounds))?])
}

pub(crate) fn killed(_rounds: usize) -> anyhow::Result<Vec<Row>> {
    runtime()?.block_on(killed_prefill())
}

/// How long before its first token the prompt of the demo model is computed, as its workers tell: of the models that there
/// are it has the smallest head.
pub(crate) fn head_start() -> anyhow::Result<Duration> {
    runtime()?.block_on(async {
        let options = ["--no-enable-prefix-caching", "--transport", "shm"];
        let cores = ["--prefill-cores", "0", "--decode-cores", "1"];
        let split = Deployment::start(&[&options[..], &cores].concat());
        for which in 0..PROMPTS {
            first_two(&split.client, which).await?;
        }
        let start = Instant::now();
        loop {
            let metric = async |name| split.client.metric(name, "").await;
            let handed_over = metric("tidemill_handoff_head_start_seconds_count").await;
            if f64::from(PROMPTS) <= handed_over {
                let in_place = metric("tidemill_handoff_in_place_total").await;
                ensure!(
                    f64::from(PROMPTS) <= in_place,
                    "{in_place} of {PROMPTS} prompts were computed in place"
                );
                let seconds = metric("tidemill_handoff_head_start_seconds_sum").await;
                return Ok(Duration::from_secs_f64(seconds / handed_over));
            }
            ensure!(start.elapsed() < LIMIT, "{handed_over} of {PROMPTS} prompts were handed over");
            tokio::time::sleep(POLL).await;
        }
    })
}

pub(crate) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Every worker has one core, so that a split deployment computes no faster than a colocated one.
const ONE_CORE: [&str; 4] = ["--cores", "0", "--max-num-batched-tokens", "512"];

/// When the first and the second token of an answer arrive.
pub(crate) async fn first_two(client: &Client, which: u32) -> anyhow::Result<(Duration, Duration)> {
    let start = Instant::now();
    let (status, mut events) = client.stream("/v1/completions", &prompt(which)).await;
    ensure!(status == 200, "status {status}");
    let mut times = Vec::new();
    while let Some(event) = events.next().await {
        if event["choices"][0]["text"].is_string() {
            times.push(start.elapsed());
        }
    }
    ensure!(2 <= times.len(), "{} events", times.len());
    Ok((times[0], times[1]))
}

/// About 2,000 tokens of text, which begins differently each time.
fn prompt(which: u32) -> Value {
    let text = format!("{which} {}", "Once upon a time there was a little cat. ".repeat(198));
    json!({"prompt": text, "max_tokens": 4, "temperature": 0, "ignore_eos": true, "stream": true})
}

/// The shortest request there is, once through HTTP, admission, routing and gRPC, and once by gRPC to the worker itself: what
/// the front end adds is the difference. An HTTP client costs more than one of gRPC, and that counts as the front end's too.
async fn front_end(rounds: usize) -> anyhow::Result<Row> {
    let whole = Deployment::start(&[&ONE_CORE[..], &["--colocated"]].concat());
    let mut worker = DirectWorker::connect(&whole.log()).await?;
    let request = json!({"prompt": [5], "max_tokens": 1, "temperature": 0, "ignore_eos": true});
    let (mut routed, mut direct) = (Vec::new(), Vec::new());
    for round in 0..rounds * 40 + 50 {
        let start = Instant::now();
        let reply = whole.client.post("/v1/completions", &request).await;
        let through_router = start.elapsed();
        ensure!(reply.status == 200, "{}", reply.body);
        let start = Instant::now();
        worker.first_token().await?;
        if 50 <= round {
            routed.push(through_router);
            direct.push(start.elapsed());
        }
    }
    let milliseconds = |times: &[Duration], q| quantile(times, q).as_secs_f64() * 1e3;
    let added = |q| milliseconds(&routed, q) - milliseconds(&direct, q);
    Ok(Row {
        measure: "router overhead, p99: request through the router − to the worker".to_owned(),
        value: added(0.99),
        unit: "ms",
        limit: None,
        target: Some(Target::AtMost(1.0)),
        note: format!(
            "{} requests of one token each way, in turns; through the router p50 {:.2}, p90 {:.2}, p99 {:.2} ms, to the \
             worker {:.2}, {:.2}, {:.2}; added {:.2}, {:.2}, {:.2}",
            routed.len(),
            milliseconds(&routed, 0.5),
            milliseconds(&routed, 0.9),
            milliseconds(&routed, 0.99),
            milliseconds(&direct, 0.5),
            milliseconds(&direct, 0.9),
            milliseconds(&direct, 0.99),
            added(0.5),
            added(0.9),
            added(0.99),
        ),
    })
}

/// A prefill worker is killed in the middle of a prompt.
async fn killed_prefill() -> anyhow::Result<Vec<Row>> {
    let mut rehomed = Vec::new();
    let mut reclaimed = Vec::new();
    for round in 0..KILLS {
        let deployment = Deployment::start(&[
            "--transport",
            "shm",
            "--no-enable-prefix-caching",
            "--prefill-cores",
            "0",
            "--decode-cores",
            "1",
        ]);
        first_two(&deployment.client, 0).await?;
        let client = deployment.client.clone();
        let request = tokio::spawn(async move { first_two(&client, round + 1).await });
        // As soon as blocks wait for the prompt that is being computed.
        wait_for(&deployment.client, |held| 0.0 < held).await.context("no block was ever reserved")?;
        let victim = *deployment.workers("prefill").first().context("no prefill worker")?;
        let before = deployment.log().lines().count();
        let killed = Instant::now();
        victim.kill();
        rehomed.push(log_line(&deployment, before, killed).await?);
        wait_for(&deployment.client, |held| held == 0.0).await.context("blocks stay reserved")?;
        reclaimed.push(killed.elapsed());
        request.await?.context("the request did not survive")?;
    }
    let row = |measure: &str, times: &[Duration], most: f64, note: &str| Row {
        measure: measure.to_owned(),
        value: median(times).as_secs_f64() * 1e3,
        unit: "ms",
        limit: None,
        target: Some(Target::AtMost(most)),
        note: format!("{note}; worst of {} {:.0} ms", times.len(), quantile(times, 1.0).as_secs_f64() * 1e3),
    };
    Ok(vec![
        row(
            "SIGKILL of prefill → request sent to another worker",
            &rehomed,
            1000.0,
            "until the front end says so",
        ),
        row(
            "SIGKILL of prefill → no block reserved or quarantined on decode",
            &reclaimed,
            2000.0,
            "as /metrics shows it, which lags by a worker's report",
        ),
    ])
}

/// When the front end says that it sends the request elsewhere.
async fn log_line(deployment: &Deployment, before: usize, since: Instant) -> anyhow::Result<Duration> {
    while since.elapsed() < LIMIT {
        if deployment.log().lines().skip(before).any(|line| line.contains("fallback")) {
            return Ok(since.elapsed());
        }
        tokio::time::sleep(POLL).await;
    }
    anyhow::bail!("nothing was re-homed within {LIMIT:?}:\n{}", deployment.log())
}

/// Waits until the blocks that decode holds for a peer are as `wanted`.
async fn wait_for(client: &Client, wanted: impl Fn(f64) -> bool) -> Option<()> {
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        let metrics = client.metrics().await;
        let is_held = |name: &str| name.contains("reserved") || name.contains("quarantined");
        let held = metrics.iter().filter(|(name, _)| name.starts_with("tidemill_blocks") && is_held(name));
        if wanted(held.map(|(_, blocks)| blocks).sum()) {
            return Some(());
        }
        tokio::time::sleep(POLL).await;
    }
    None
}

const KILLS: u32 = 5;
/// Prompts whose mean head start counts.
const PROMPTS: u32 = 12;
const POLL: Duration = Duration::from_millis(2);
const LIMIT: Duration = Duration::from_secs(20);
