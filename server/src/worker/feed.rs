//! A worker's status, for any number of watchers.
//!
//! The engine publishes after each step, far more often than a router wants to know, and hands out each change of
//! its prefix cache once. One task takes both in, at a pace, and tells all watchers; one that comes late, or falls
//! behind, starts from a snapshot with `cache_reset`.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{Stream, stream};
use tidemill_engine::engine::EngineHandle;
use tidemill_engine::handle::PeerLink;
use tokio::sync::{Notify, broadcast};
use tonic::Status;

use super::samples::Samples;
use crate::convert::{self, WorkerStatus};
use crate::proto;

/// Takes in an engine's status and hands it to watchers.
#[derive(Clone, Debug)]
pub(crate) struct StatusFeed {
    engine: EngineHandle,
    samples: Arc<Samples>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    /// The last status, without cache changes.
    latest: WorkerStatus,
    /// All hashes that are in the prefix cache.
    cached: BTreeSet<u64>,
    /// `None` once the engine has stopped.
    watchers: Option<broadcast::Sender<Arc<WorkerStatus>>>,
}

impl StatusFeed {
    /// Follows `engine` until it stops. Needs a running tokio runtime.
    pub(crate) fn start(engine: EngineHandle, links: Arc<Mutex<Vec<PeerLink>>>) -> Self {
        let changed = Arc::new(Notify::new());
        let samples = Arc::new(Samples::default());
        let (listener, collector) = (Arc::clone(&changed), Arc::clone(&samples));
        engine.watch(Box::new(move |status| {
            collector.add(&status.counters);
            listener.notify_one();
        }));
        let (watchers, _) = broadcast::channel(STATUSES_KEPT);
        let latest = WorkerStatus { engine: engine.status(), ..WorkerStatus::default() };
        let state = State { latest, cached: BTreeSet::new(), watchers: Some(watchers) };
        let feed = Self { engine, samples, state: Arc::new(Mutex::new(state)) };
        tokio::spawn(feed.clone().follow(changed, links));
        feed
    }

    /// Statuses from now on; the first one at once and whole. Ends with an error when the engine stops.
    pub(crate) fn watch(&self) -> impl Stream<Item = Result<proto::Status, Status>> + Send + use<> {
        let feed = self.clone();
        stream::unfold(Some(None), move |receiver| {
            let feed = feed.clone();
            async move {
                let (status, receiver) = match receiver? {
                    None => feed.subscribe(),
                    Some(receiver) => feed.next(receiver).await,
                };
                let stopped = || Err(Status::unavailable("the engine has stopped"));
                let status = status.map_or_else(stopped, |status| Ok(convert::status_to_wire(&status)));
                Some((status, receiver.map(Some)))
            }
        })
    }

    /// Waits until nothing runs and nothing waits, or the engine stops.
    pub(crate) async fn idle(&self) {
        let (_, receiver) = self.subscribe();
        let Some(mut receiver) = receiver else { return };
        loop {
            let status = self.engine.status();
            if status.running == 0 && status.waiting == 0 {
                return;
            }
            if let Err(broadcast::error::RecvError::Closed) = receiver.recv().await {
                return;
            }
        }
    }

    async fn follow(self, changed: Arc<Notify>, links: Arc<Mutex<Vec<PeerLink>>>) {
        while self.engine.is_alive() {
            let links = {
                let mut links = links.lock().unwrap_or_else(PoisonError::into_inner);
                self.engine.refresh_links(&mut links);
                links.clone()
            };
            self.publish(links);
            tokio::time::sleep(PACE).await;
            // Without a change this is the heartbeat.
            let _ = tokio::time::timeout(HEARTBEAT - PACE, changed.notified()).await;
        }
        self.state().watchers = None;
    }

    fn publish(&self, links: Vec<PeerLink>) {
        let changes = self.engine.take_cache_changes();
        let engine = self.engine.status();
        let mut state = self.state();
        for removed in &changes.removed {
            state.cached.remove(removed);
        }
        state.cached.extend(changes.added.iter().copied());
        state.latest = WorkerStatus { engine, links, ..WorkerStatus::default() };
        let status = WorkerStatus {
            cache_added: changes.added,
            cache_removed: changes.removed,
            samples: self.samples.take(),
            ..state.latest.clone()
        };
        if let Some(watchers) = &state.watchers {
            let _ = watchers.send(Arc::new(status)); // Nobody need be watching.
        }
    }

    /// A whole status, and what follows it without a gap: both are taken under one lock.
    fn subscribe(&self) -> (Option<Arc<WorkerStatus>>, Option<broadcast::Receiver<Arc<WorkerStatus>>>) {
        let state = self.state();
        let Some(watchers) = &state.watchers else { return (None, None) };
        let cache_added = state.cached.iter().copied().collect();
        let status = WorkerStatus { cache_reset: true, cache_added, ..state.latest.clone() };
        (Some(Arc::new(status)), Some(watchers.subscribe()))
    }

    async fn next(
        &self,
        mut receiver: broadcast::Receiver<Arc<WorkerStatus>>,
    ) -> (Option<Arc<WorkerStatus>>, Option<broadcast::Receiver<Arc<WorkerStatus>>>) {
        match receiver.recv().await {
            Ok(status) => (Some(status), Some(receiver)),
            Err(broadcast::error::RecvError::Lagged(_)) => self.subscribe(),
            Err(broadcast::error::RecvError::Closed) => (None, None),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Least time between two statuses: a router's decisions are no better for knowing more often.
const PACE: Duration = Duration::from_millis(20);

/// Most time between two statuses. A router takes a worker for lost after four of them.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// Statuses a slow watcher may be behind before it starts afresh: five seconds of a busy engine.
const STATUSES_KEPT: usize = 256;
