//! What the front end needs of whoever generates: production's is the router, the tests' runs in memory.

use std::pin::Pin;
use std::time::Instant;

use futures::Stream;
use futures::future::BoxFuture;

use crate::generation::{Generation, GenerationError, GenerationEvent};

/// The events of one sequence; dropping it cancels the sequence everywhere.
pub(crate) type EventStream = Pin<Box<dyn Stream<Item = GenerationEvent> + Send>>;

/// A sequence that has begun.
pub(crate) struct Started {
    /// When a worker began to compute; until then it waited in queues.
    pub(crate) begun: Option<Instant>,
    /// Its events.
    pub(crate) events: EventStream,
}

/// Generates token sequences.
pub(crate) trait Generator: Send + Sync + 'static {
    /// Starts a sequence. An error here reaches the client with its own HTTP status.
    fn generate(&self, generation: Generation) -> BoxFuture<'_, Result<Started, GenerationError>>;

    /// How the workers are right now. Called for each request and probe: it must not wait.
    fn health(&self) -> ClusterHealth;
}

/// The workers, and whether they can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClusterHealth {
    /// Each worker that should be there.
    pub(crate) workers: Vec<WorkerHealth>,
    /// Whether a request sent now would be served.
    pub(crate) serving: Serving,
}

/// One worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WorkerHealth {
    /// Its name.
    pub(crate) name: String,
    /// "prefill", "decode" or "hybrid".
    pub(crate) role: &'static str,
    /// Whether it answers.
    pub(crate) alive: bool,
}

/// Whether requests are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Serving {
    /// They are.
    Yes {
        /// Tokens of prompt and answer together, at most.
        max_model_len: u32,
    },
    /// They are not: still loading, draining, or too few workers left.
    No {
        /// Why, for people.
        reason: String,
    },
}
