//! The worker's service over a real engine and a real connection.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use tidemill_engine::engine::EngineHandle;
use tidemill_engine::handle::{EngineConfig, EngineEvent, ModelSource, Recovery, Role};
use tidemill_engine_core::request::{Part, Request, RequestId, SamplingParams, StopConditions};
use tidemill_kvtransfer_proto::units::TokenCount;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::convert::{Assignment, WorkerStatus};
use crate::proto::worker_client::WorkerClient;
use crate::worker_link::{LinkError, WorkerLink};

/// A worker that serves until it is dropped.
pub(crate) struct TestWorker {
    /// Where.
    pub(crate) address: String,
    /// Its engine.
    pub(crate) engine: EngineHandle,
    closed: CancellationToken,
}

impl Drop for TestWorker {
    fn drop(&mut self) {
        self.closed.cancel();
        self.engine.clone().shutdown();
    }
}

/// Where the small random model `name` is.
pub(crate) fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(name)
}

/// Starts a worker on a small random model.
pub(crate) async fn start(name: &str, role: Role) -> TestWorker {
    start_with(config(name, role)).await
}

/// What [`start`] starts a worker with.
pub(crate) fn config(name: &str, role: Role) -> EngineConfig {
    EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_waiting: 64,
        kv_cache_memory: Some(4 << 20),
        threads: Some(1),
        ..EngineConfig::new(name, role, ModelSource::Folder(model("llama2")))
    }
}

/// Starts a worker.
pub(crate) async fn start_with(config: EngineConfig) -> TestWorker {
    let engine = EngineHandle::start(config, &mut |_| {}).expect("the fixture is sound");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let closed = CancellationToken::new();
    let service = WorkerService::new(engine.clone(), "fixture", false).into_server();
    let server = tonic::transport::Server::builder().add_service(service);
    let closing = closed.clone().cancelled_owned();
    tokio::spawn(async move {
        let incoming = TcpListenerStream::new(listener);
        // Ends at once, as a process would: open streams break off.
        tokio::select! {
            _ = server.serve_with_incoming(incoming) => {}
            () = closing => {}
        }
    });
    TestWorker { address, engine, closed }
}

fn assignment(max_tokens: u32) -> Assignment {
    let request = Request {
        id: RequestId(1),
        tokens: (0..40).map(|index| 3 + index * 7 % 200).collect(),
        prompt_len: TokenCount(40),
        sampling: SamplingParams { temperature: 0.0, logprobs: Some(1), ..SamplingParams::default() },
        stop: StopConditions::after(max_tokens),
        part: Part::Whole,
    };
    Assignment { request, peer: None, reason: String::new() }
}

async fn status_where(
    statuses: &mut (impl Stream<Item = Result<WorkerStatus, LinkError>> + Unpin),
    holds: impl Fn(&WorkerStatus) -> bool,
) -> WorkerStatus {
    let wanted = async {
        loop {
            let status = statuses.next().await.expect("the worker goes on").expect("it speaks sense");
            if holds(&status) {
                return status;
            }
        }
    };
    tokio::time::timeout(LIMIT, wanted).await.expect("the worker comes to this state")
}

#[tokio::test]
async fn a_request_is_served_and_reported() {
    let worker = start("hybrid-0", Role::Hybrid).await;
    let (link, introduction) = WorkerLink::connect(&worker.address).await.expect("it listens");
    assert_eq!(introduction.engine.name, "hybrid-0");
    assert_eq!(introduction.model, "fixture");
    let mut statuses = link.watch().await.expect("it can be watched");
    let first = statuses.next().await.expect("a first status").expect("it is sound");
    assert!(first.cache_reset, "the first status is whole");
    assert_eq!(first.engine.ledger.free, first.engine.ledger.total);

    let events: Vec<EngineEvent> = link
        .generate(&assignment(5))
        .await
        .expect("it is accepted")
        .map(|event| event.expect("it is sound"))
        .collect()
        .await;
    let [EngineEvent::Begun, tokens @ .., last] = events.as_slice() else { panic!("{events:?}") };
    assert!(matches!(last, EngineEvent::Finished { .. }), "{last:?}");
    for (expected, token) in tokens.iter().enumerate() {
        let EngineEvent::Token { index, logprobs, .. } = token else { panic!("{token:?} is no token") };
        assert_eq!((*index as usize, logprobs.is_some()), (expected, true));
    }
    assert_eq!(tokens.len(), 5);

    let mut samples = Vec::new();
    let mut cached = Vec::new();
    while samples.is_empty() || cached.is_empty() {
        let status = status_where(&mut statuses, |_| true).await;
        samples.extend(status.samples);
        cached.extend(status.cache_added);
    }
    let late = link.watch().await.expect("it can be watched").next().await.expect("a status").expect("sound");
    assert!(cached.iter().all(|hash| late.cache_added.contains(hash)), "a late watcher gets the whole cache");
}

#[tokio::test]
async fn a_dropped_stream_cancels() {
    let worker = start("hybrid-0", Role::Hybrid).await;
    let (link, _) = WorkerLink::connect(&worker.address).await.expect("it listens");
    let mut statuses = link.watch().await.expect("it can be watched");
    let mut events = link.generate(&assignment(300)).await.expect("it is accepted");
    events.next().await.expect("a first token").expect("it is sound");
    drop(events);
    let idle = |status: &WorkerStatus| status.engine.running + status.engine.waiting == 0;
    let status = status_where(&mut statuses, |status| idle(status) && status.engine.ledger.held.0 == 0).await;
    assert!(status.engine.counters.generation_tokens < 300, "{:?}", status.engine.counters);
}

#[tokio::test]
async fn a_drained_worker_finishes_and_refuses() {
    let worker = start("hybrid-0", Role::Hybrid).await;
    let (link, _) = WorkerLink::connect(&worker.address).await.expect("it listens");
    let mut events = link.generate(&assignment(50)).await.expect("it is accepted");
    events.next().await.expect("it begins").expect("it is sound");
    events.next().await.expect("a first token").expect("it is sound");
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", worker.address));
    let channel = endpoint.expect("an address").connect().await.expect("it listens");
    let mut client = WorkerClient::new(channel);
    let drained = tokio::spawn(async move { client.drain(proto::DrainRequest {}).await.map(|_| ()) });
    let rest: Vec<_> = events.collect().await;
    assert_eq!(rest.len(), 50, "the other tokens and the end");
    drained.await.expect("no panic").expect("it becomes idle");
    let mut refused = link.generate(&assignment(1)).await.expect("the call itself succeeds");
    let event = refused.next().await.expect("an event").expect("it is sound");
    assert!(matches!(event, EngineEvent::Failed { recovery: Recovery::Later, .. }), "{event:?}");
}

#[tokio::test]
async fn a_worker_whose_engine_stopped_ends_its_watch() {
    let worker = start("hybrid-0", Role::Hybrid).await;
    let (link, _) = WorkerLink::connect(&worker.address).await.expect("it listens");
    let mut statuses = link.watch().await.expect("it can be watched");
    statuses.next().await.expect("a first status").expect("it is sound");
    worker.engine.clone().shutdown();
    let ends = async { while let Some(Ok(_)) = statuses.next().await {} };
    tokio::time::timeout(LIMIT, ends).await.expect("the watch ends with the engine");
}

const LIMIT: Duration = Duration::from_secs(20);
