//! Starting an engine, and talking to it.
//!
//! [`EngineHandle::start`] boots the engine thread and returns when it serves. The handle sends commands; the thread
//! publishes its status after each turn of its loop. A thread that panics takes the process's usefulness with it, so
//! [`EngineHandle::is_alive`] turns false and the worker process ends, to be started afresh.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use tidemill_engine_core::request::{Request, RequestId};
use tidemill_kvtransfer::Endpoint;
use tidemill_kvtransfer::error::EndpointError;

use crate::boot::{Wires, boot};
use crate::handle::{
    CacheChanges, Description, EngineConfig, EngineStatus, EventSink, LoadProgress, Peer, PeerLink,
};
use crate::models::ModelError;

/// A way to talk to a running engine. Cheap to clone; the engine ends with [`shutdown`](Self::shutdown).
#[derive(Clone, Debug)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    endpoint: Arc<Endpoint>,
    description: Arc<Description>,
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The model cannot be read or is not supported.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Memory for the KV cache cannot be had.
    #[error("cannot reserve {bytes} bytes for the KV cache")]
    KvCache {
        /// The size asked for.
        bytes: usize,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The handoff endpoint cannot listen.
    #[error("cannot take handoffs on {address}")]
    Endpoint {
        /// The address asked for.
        address: SocketAddr,
        /// What went wrong.
        #[source]
        source: EndpointError,
    },
    /// The device cannot be used as asked.
    #[error("device: {0}")]
    Device(String),
    /// A GPU does not do what it is asked for.
    #[error("the GPU cannot be used")]
    Gpu(#[from] tidemill_kernels::cuda::CudaError),
    /// Two settings exclude each other.
    #[error("{0}")]
    Setting(String),
}

/// What the engine thread is told.
pub(crate) enum Command {
    /// Run a request.
    Generate { request: Box<Request>, peer: Option<Peer>, events: EventSink },
    /// Forget a request.
    Cancel(RequestId),
    /// Something happened to a handoff.
    Handoff(tidemill_kvtransfer::HandoffEvent),
    /// Refuse new requests from now on.
    Drain,
    /// End the thread.
    Shutdown,
}

/// What the engine thread publishes.
#[derive(Default)]
pub(crate) struct Shared {
    alive: AtomicBool,
    published: Mutex<Published>,
    listeners: Mutex<Vec<Listener>>,
}

type Listener = Box<dyn FnMut(&EngineStatus) + Send>;

#[derive(Default)]
struct Published {
    status: EngineStatus,
    /// Hash → whether it is in the cache now; only what changed since the last time it was taken.
    cache: BTreeMap<u64, bool>,
}

impl EngineHandle {
    /// Loads the model, takes the memory, starts the threads. Blocks until the engine serves.
    ///
    /// # Errors
    ///
    /// [`EngineError`] says what could not be had.
    pub fn start(config: EngineConfig, progress: &mut dyn FnMut(LoadProgress)) -> Result<Self, EngineError> {
        let shared = Arc::new(Shared::default());
        let (commands, inbox) = channel();
        let (reports, report) = channel();
        let instance = RandomState::new().hash_one("instance");
        thread::Builder::new()
            .name("engine".into())
            .spawn({
                let (shared, commands) = (Arc::clone(&shared), commands.clone());
                move || {
                    let mut on_progress = |progress| drop(reports.send(Boot::Progress(progress)));
                    let wires = Wires { shared: Arc::clone(&shared), commands, inbox };
                    match boot(config, instance, wires, &mut on_progress) {
                        Ok((engine, description, endpoint)) => {
                            shared.alive.store(true, Ordering::Release);
                            let _alive = Alive(&shared);
                            let _ = reports.send(Boot::Ready(description, endpoint));
                            drop(reports);
                            engine.run();
                        }
                        Err(error) => drop(reports.send(Boot::Failed(error))),
                    }
                }
            })
            .expect("a process that starts can have one more thread");
        for report in report {
            match report {
                Boot::Progress(step) => progress(step),
                Boot::Ready(description, endpoint) => {
                    return Ok(Self { shared, commands, endpoint, description: Arc::new(description) });
                }
                Boot::Failed(error) => return Err(error),
            }
        }
        Err(EngineError::Device("the engine thread panicked while it started".into()))
    }

    /// What the engine turned out to be.
    pub fn describe(&self) -> &Description {
        &self.description
    }

    /// Runs a request. `peer` is the other side when the request is split. Everything that happens, refusal included,
    /// arrives through `events`; after [`cancel`](Self::cancel) nothing does.
    pub fn generate(&self, request: Request, peer: Option<Peer>, events: EventSink) {
        self.send(Command::Generate { request: Box::new(request), peer, events });
    }

    /// Ends a request without a further event. Unknown and ended requests are ignored.
    pub fn cancel(&self, id: RequestId) {
        self.send(Command::Cancel(id));
    }

    /// Makes handshakes with `peers`, all at once, and returns how each went. Blocks for a bounded time; not for use on
    /// an async thread.
    pub fn meet_peers(&self, peers: Vec<Peer>) -> Vec<PeerLink> {
        crate::roles::links::meet(&self.endpoint, peers)
    }

    /// Brings what [`meet_peers`](Self::meet_peers) returned up to date.
    pub fn refresh_links(&self, links: &mut [PeerLink]) {
        crate::roles::links::refresh(&self.endpoint, links);
    }

    /// The state after the last turn of the engine's loop.
    pub fn status(&self) -> EngineStatus {
        EngineStatus { credit: self.endpoint.credit_load(), ..self.shared.published().status.clone() }
    }

    /// Calls `listener` after each turn of the engine's loop, on the engine thread: it must not block.
    pub fn watch(&self, listener: Box<dyn FnMut(&EngineStatus) + Send>) {
        lock(&self.shared.listeners).push(listener);
    }

    /// Net changes of the prefix cache since the last call.
    pub fn take_cache_changes(&self) -> CacheChanges {
        let changes = std::mem::take(&mut self.shared.published().cache);
        let (added, removed): (Vec<_>, Vec<_>) = changes.into_iter().partition(|(_, present)| *present);
        let hashes = |list: Vec<(u64, bool)>| list.into_iter().map(|(hash, _)| hash).collect();
        CacheChanges { added: hashes(added), removed: hashes(removed) }
    }

    /// From now on requests are refused; those that run go on.
    pub fn drain(&self) {
        self.send(Command::Drain);
    }

    /// Whether the engine thread runs.
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }

    /// Ends the engine thread; requests that run fail.
    pub fn shutdown(self) {
        self.send(Command::Shutdown);
    }

    fn send(&self, command: Command) {
        // Fails only when the thread is gone; `is_alive` tells, and the event sinks are dropped with the command.
        let _ = self.commands.send(command);
    }
}

impl Shared {
    /// Publishes the state and tells the listeners.
    pub(crate) fn publish(&self, status: EngineStatus, cache: CacheChanges) {
        let mut published = self.published();
        let changed = published.status != status;
        published.status = status;
        published.cache.extend(cache.added.into_iter().map(|hash| (hash, true)));
        published.cache.extend(cache.removed.into_iter().map(|hash| (hash, false)));
        if changed {
            let status = published.status.clone();
            drop(published);
            lock(&self.listeners).iter_mut().for_each(|listener| listener(&status));
        }
    }

    fn published(&self) -> MutexGuard<'_, Published> {
        lock(&self.published)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("alive", &self.alive).finish_non_exhaustive()
    }
}

/// What the engine thread reports while it boots.
enum Boot {
    Progress(LoadProgress),
    Ready(Description, Arc<Endpoint>),
    Failed(EngineError),
}

/// Turns `alive` off when the engine thread ends, also by a panic.
struct Alive<'a>(&'a Shared);

impl Drop for Alive<'_> {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::Release);
        // The last one again, since its sums must not fall: whoever listens looks at `is_alive` too.
        let status = self.0.published().status.clone();
        lock(&self.0.listeners).iter_mut().for_each(|listener| listener(&status));
    }
}

/// Published values are replaced whole, so one that a panic left behind is still sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
