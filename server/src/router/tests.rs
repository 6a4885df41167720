//! The router over real workers in this process: two engines, two connections, handoffs between them.

use std::time::Duration;

use tidemill_engine::handle::Role;
use tidemill_engine_core::request::{FinishReason, SamplingParams, StopConditions, TokenId};
use tokio::sync::watch;

use super::*;
use crate::openai::Serving;
use crate::worker::tests::{TestWorker, start};

struct Deployment {
    router: SharedRouter,
    cluster: Arc<Cluster>,
    metrics: Arc<Metrics>,
    workers: Vec<(TestWorker, watch::Sender<Option<String>>)>,
}

async fn deploy(roles: &[Role]) -> Deployment {
    let mut workers = Vec::new();
    let mut slots = Vec::new();
    for (number, role) in roles.iter().enumerate() {
        let worker = start(&format!("worker-{number}"), *role).await;
        let (sender, address) = watch::channel(Some(worker.address.clone()));
        slots.push(Slot { name: format!("worker-{number}"), role: *role, address });
        workers.push((worker, sender));
    }
    let metrics = Arc::new(Metrics::new("fixture"));
    let cluster = Cluster::follow(slots, Arc::clone(&metrics), false);
    tokio::time::timeout(LIMIT, cluster.all_up()).await.expect("all workers join");
    let router = SharedRouter(Arc::new(Router::new(Arc::clone(&cluster), Arc::clone(&metrics))));
    Deployment { router, cluster, metrics, workers }
}

impl Deployment {
    fn count(&self, series: &str) -> f64 {
        let text = self.metrics.render();
        let lines = text.lines().filter(|line| !line.starts_with('#') && line.contains(series));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    async fn generate(&self, which: u32, max_tokens: u32) -> EventStream {
        let generation = Generation {
            prompt: (0..50).map(|index| 3 + (index * 7 + which) % 200).collect(),
            sampling: SamplingParams { seed: which.into(), ..SamplingParams::default() },
            stop: StopConditions::after(max_tokens),
        };
        self.router.generate(generation).await.expect("a worker is ready")
    }

    async fn tokens(&self, which: u32, max_tokens: u32) -> Vec<TokenId> {
        rest(self.generate(which, max_tokens).await, max_tokens as usize).await
    }
}

/// The tokens of a stream that must end well with `count` of them.
async fn rest(events: EventStream, count: usize) -> Vec<TokenId> {
    let events: Vec<GenerationEvent> = events.collect().await;
    let (last, tokens) = events.split_last().expect("there are events");
    assert!(matches!(last, GenerationEvent::Finished { reason: FinishReason::Length, .. }), "{last:?}");
    let id = |event: &GenerationEvent| match event {
        GenerationEvent::Token { id, .. } => *id,
        other => panic!("{other:?} is no token"),
    };
    let tokens: Vec<TokenId> = tokens.iter().map(id).collect();
    assert_eq!(tokens.len(), count);
    tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_gives_the_tokens_of_one_worker() {
    let whole = deploy(&[Role::Hybrid]).await;
    let split = deploy(&[Role::Prefill, Role::Decode]).await;
    for which in 0..4 {
        let max_tokens = 1 + which * 7;
        assert_eq!(
            split.tokens(which, max_tokens).await,
            whole.tokens(which, max_tokens).await,
            "request {which}"
        );
    }
    assert_eq!(split.count("tidemill_fallbacks_total"), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_worker_can_be_lost_in_the_middle_of_a_stream() {
    for (lost, role) in [(0, "prefill"), (1, "decode")] {
        let mut split = deploy(&[Role::Prefill, Role::Decode]).await;
        let expected = split.tokens(7, 200).await;
        let mut events = split.generate(7, 200).await;
        let Some(GenerationEvent::Token { id, .. }) = events.next().await else { panic!("a first token") };
        assert_eq!(id, expected[0], "{role} lost");
        drop(split.workers.remove(lost));
        assert_eq!(rest(events, 199).await, expected[1..], "{role} lost");
        assert_eq!(split.tokens(7, 200).await, expected, "{role} gone: the other does it all");
        assert!(0.0 < split.count("tidemill_fallbacks_total"), "{role}: it is counted");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_dropped_frees_both_sides() {
    let split = deploy(&[Role::Prefill, Role::Decode]).await;
    for events_seen in [0, 1, 5] {
        let mut events = split.generate(3, 300).await;
        for _ in 0..events_seen {
            events.next().await.expect("a token");
        }
        drop(events);
    }
    // Nobody in flight, so that this returns.
    tokio::time::timeout(LIMIT, split.cluster.drain()).await.expect("dropped requests are not in flight");
    for (worker, _) in &split.workers {
        let mut watch = tokio::time::interval(Duration::from_millis(5));
        let free = async {
            loop {
                let ledger = worker.engine.status().ledger;
                if ledger.free + ledger.cached == ledger.total {
                    return;
                }
                watch.tick().await;
            }
        };
        tokio::time::timeout(LIMIT, free).await.expect("all blocks come back");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_router_finishes_and_refuses() {
    let deployment = deploy(&[Role::Hybrid]).await;
    let events = deployment.generate(1, 100).await;
    let cluster = Arc::clone(&deployment.cluster);
    let drained = tokio::spawn(async move { cluster.drain().await });
    rest(events, 100).await;
    tokio::time::timeout(LIMIT, drained).await.expect("it ends").expect("no panic");
    assert!(matches!(deployment.router.health().serving, Serving::No { .. }));
}

const LIMIT: Duration = Duration::from_secs(20);
