//! The router over real workers in this process: two engines, two connections, handoffs between them.

use std::time::Duration;

use futures::stream::BoxStream;
use tidemill_engine::handle::{EngineConfig, ModelSource, Role};
use tidemill_engine_core::journey::Instance;
use tidemill_engine_core::request::{FinishReason, SamplingParams, StopConditions, TokenId};
use tokio::sync::watch;

use super::*;
use crate::openai::Serving;
use crate::worker::tests::{TestWorker, config, model, start_with};

struct Deployment {
    router: SharedRouter,
    cluster: Arc<Cluster>,
    metrics: Arc<Metrics>,
    workers: Vec<(TestWorker, watch::Sender<Option<String>>)>,
}

async fn deploy(roles: &[Role]) -> Deployment {
    let deployment = deploy_with(roles, |_, _| {}).await;
    tokio::time::timeout(LIMIT, deployment.cluster.all_up()).await.expect("all workers join");
    deployment
}

/// The same with other settings for each worker; does not wait until they have joined.
async fn deploy_with(roles: &[Role], change: fn(usize, &mut EngineConfig)) -> Deployment {
    follow(roles, change, Vec::new()).await
}

/// The same with slots of workers that are somewhere else, or nowhere.
async fn follow(roles: &[Role], change: fn(usize, &mut EngineConfig), mut slots: Vec<Slot>) -> Deployment {
    let mut workers = Vec::new();
    for (number, role) in roles.iter().enumerate() {
        let mut config = config(&format!("worker-{number}"), *role);
        change(number, &mut config);
        let worker = start_with(config).await;
        let (sender, address) = watch::channel(Some(worker.address.clone()));
        slots.push(Slot { name: format!("worker-{number}"), role: *role, address });
        workers.push((worker, sender));
    }
    let metrics = Arc::new(Metrics::new("fixture"));
    let cluster = Cluster::follow(slots, Arc::clone(&metrics), false);
    let router = SharedRouter(Arc::new(Router::new(Arc::clone(&cluster), Arc::clone(&metrics))));
    Deployment { router, cluster, metrics, workers }
}

impl Deployment {
    fn count(&self, series: &str) -> f64 {
        let text = self.metrics.render();
        let lines = text.lines().filter(|line| !line.starts_with('#') && line.contains(series));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    async fn generate(&self, which: u32, max_tokens: u32) -> BoxStream<'static, GenerationEvent> {
        let generation = Generation {
            prompt: (0..50).map(|index| 3 + (index * 7 + which) % 200).collect(),
            sampling: SamplingParams { seed: which.into(), ..SamplingParams::default() },
            stop: StopConditions::after(max_tokens),
        };
        let started = self.router.generate(generation).await.expect("a worker is ready");
        assert!(started.begun.is_some(), "a worker has begun before the first token");
        started.events
    }

    async fn tokens(&self, which: u32, max_tokens: u32) -> Vec<TokenId> {
        rest(self.generate(which, max_tokens).await, max_tokens as usize).await
    }
}

/// The tokens of a stream that must end well with `count` of them.
async fn rest(events: BoxStream<'static, GenerationEvent>, count: usize) -> Vec<TokenId> {
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
        // A lost prefill worker leaves nothing to be done again: decode had it all.
        assert!(role == "prefill" || 0.0 < split.count("tidemill_recovery_seconds_count"), "it is measured");
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
                if worker.engine.status().ledger.used().0 == 0 {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_ends_with_its_first_token_is_no_failed_handoff() {
    let split = deploy(&[Role::Prefill, Role::Decode]).await;
    for which in 0..8 {
        split.tokens(which, 1).await;
    }
    split.tokens(8, 2).await; // Its handoff completes after all that was left of the others.
    for (worker, _) in &split.workers {
        assert_eq!(
            worker.engine.status().counters.handoff_failures,
            0,
            "{:?}",
            worker.engine.describe().role
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_listens_everywhere_is_reached_all_the_same() {
    let anywhere = |_, config: &mut EngineConfig| config.handoff_listen = ([0, 0, 0, 0], 0).into();
    let split = deploy_with(&[Role::Prefill, Role::Decode], anywhere).await;
    tokio::time::timeout(LIMIT, split.cluster.all_up()).await.expect("all workers join");
    for instance in split.workers.iter().map(|(worker, _)| worker.engine.describe().instance) {
        let reach = split.cluster.reach(Instance(instance)).expect("it is there");
        assert_eq!(reach.peer.address.ip(), std::net::Ipv4Addr::LOCALHOST, "as the router reaches it");
    }
    split.tokens(1, 5).await;
    assert_eq!(split.count("tidemill_fallbacks_total"), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_with_another_model_stays_outside() {
    let other_model = |number, config: &mut EngineConfig| {
        if number == 1 {
            config.model = ModelSource::Folder(model("llama3"));
        }
    };
    let mixed = deploy_with(&[Role::Hybrid, Role::Hybrid], other_model).await;
    let refused = async {
        loop {
            let change = mixed.cluster.change();
            let workers = mixed.cluster.health().workers;
            let alive = workers.iter().filter(|worker| worker.alive).count();
            assert!(alive < 2, "one of two models is served");
            if alive == 1 && mixed.cluster.troubles().iter().any(|why| why.contains("another model")) {
                return;
            }
            let _ = tokio::time::timeout(Duration::from_millis(20), change).await;
        }
    };
    tokio::time::timeout(LIMIT, refused).await.expect("the second worker is refused");
    mixed.tokens(3, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_never_comes_is_said_and_what_is_there_serves() {
    for (there, missing) in [(Role::Decode, Role::Prefill), (Role::Prefill, Role::Decode)] {
        // An address at which somebody could listen, and nobody does.
        let nobody =
            std::net::TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port");
        let (_sender, address) = watch::channel(Some(nobody.to_string()));
        let absent = Slot { name: "absent".to_owned(), role: missing, address };
        let half = follow(&[there], |_, _| {}, vec![absent]).await;
        let serves = async {
            while !matches!(half.cluster.health().serving, Serving::Yes { .. }) {
                let _ = tokio::time::timeout(Duration::from_millis(20), half.cluster.change()).await;
            }
        };
        tokio::time::timeout(LIMIT, serves).await.expect("one worker is enough");
        for which in 0..3 {
            half.tokens(which, 6).await;
        }
        let troubles = half.cluster.troubles();
        assert!(
            troubles.iter().any(|it| it.starts_with("absent is not there: no connection")),
            "{there:?}: {troubles:?}"
        );
        let workers = half.cluster.health().workers;
        assert_eq!(workers.iter().filter(|it| !it.alive).count(), 1, "{there:?}: probes say which is gone");
        assert_eq!(half.count("tidemill_fallbacks_total"), 3.0, "{there:?}: each is counted");
    }
}

const LIMIT: Duration = Duration::from_secs(20);
