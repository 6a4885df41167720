//! Sends each request to the workers that serve it best, and keeps it alive when they do not.

mod cluster;
mod driver;
mod links;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use futures::StreamExt;
use futures::future::BoxFuture;
use tidemill_engine_core::routing::RoutingPolicy;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

pub(crate) use cluster::{Cluster, Slot};

use crate::generation::{Generation, GenerationError, GenerationEvent};
use crate::metrics::Metrics;
use crate::openai::{ClusterHealth, Generator, Started};

/// Generates by sending token ids to workers.
#[derive(Debug)]
pub(crate) struct Router {
    cluster: Arc<Cluster>,
    metrics: Arc<Metrics>,
    policy: RoutingPolicy,
    /// Numbers requests and handoffs. Starts at a random place, so that routers of one cluster do not meet.
    next: AtomicU64,
    /// Whose turn it is among equal workers.
    turn: AtomicU64,
}

impl Router {
    /// A router over the workers of `cluster`.
    pub(crate) fn new(cluster: Arc<Cluster>, metrics: Arc<Metrics>) -> Self {
        let (next, turn) = (AtomicU64::new(rand::random()), AtomicU64::new(0));
        Self { cluster, metrics, policy: RoutingPolicy::default(), next, turn }
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// A router that is shared, as [`Generator`] wants it.
#[derive(Clone, Debug)]
pub(crate) struct SharedRouter(pub(crate) Arc<Router>);

impl Generator for SharedRouter {
    fn generate(&self, generation: Generation) -> BoxFuture<'_, Result<Started, GenerationError>> {
        Box::pin(async move {
            // The driver ends when the receiver is dropped, and its streams with it: that cancels everywhere.
            let (sender, mut events) = mpsc::channel(EVENTS_AHEAD);
            let begun = Arc::new(OnceLock::new());
            tokio::spawn(driver::drive(Arc::clone(&self.0), generation, sender, Arc::clone(&begun)));
            // A failure before the first token becomes a status of its own.
            match events.recv().await {
                Some(GenerationEvent::Failed(error)) => Err(error),
                Some(first) => {
                    let all = futures::stream::iter([first]).chain(ReceiverStream::new(events));
                    Ok(Started { begun: begun.get().copied(), events: Box::pin(all) })
                }
                None => Err(GenerationError::Internal("the request's task ended without a word".into())),
            }
        })
    }

    fn health(&self) -> ClusterHealth {
        self.0.cluster.health()
    }
}

/// A client that reads slowly holds this many events of its own request and nobody else's.
const EVENTS_AHEAD: usize = 256;

#[cfg(test)]
mod tests;
