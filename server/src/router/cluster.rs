//! What the router knows of its workers, and the tasks that keep it up to date.
//!
//! One task per worker connects, introduces it to its peers, and follows its statuses. A worker that is silent for
//! [`SILENCE`] is lost, as one whose connection breaks: its streams end at once, and the task starts over. A worker that
//! comes back is another worker, since its instance number is new.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use tidemill_engine::handle::{Description, EngineStatus, Peer, PeerLink, Role};
use tidemill_engine_core::journey::Instance;
use tidemill_engine_core::routing::{Availability, ClusterView, WorkerView};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen};
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::links::{self, Stranger};
use crate::convert::{Introduction, WorkerStatus};
use crate::metrics::{Metrics, WorkerStatusSnapshot};
use crate::openai::{ClusterHealth, Serving, WorkerHealth};
use crate::worker_link::{LinkError, WorkerLink};

/// The workers.
#[derive(Debug)]
pub(crate) struct Cluster {
    slots: Mutex<Vec<SlotState>>,
    /// Somebody came, went, or changed.
    changed: Notify,
    draining: CancellationToken,
    /// Requests that are being served.
    in_flight: watch::Sender<usize>,
    metrics: Arc<Metrics>,
    /// Whether a prefill and a decode worker that are not linked make the cluster unready.
    require_links: bool,
}

/// A place for a worker, filled by one start of it after another.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Name, until the worker tells its own.
    pub(crate) name: String,
    /// Role, until the worker tells its own.
    pub(crate) role: Role,
    /// Where it is reached now; `None` while it is not running.
    pub(crate) address: watch::Receiver<Option<String>>,
}

/// What is in a slot now.
#[derive(Debug)]
pub(super) struct SlotState {
    name: String,
    role: Role,
    pub(super) live: Option<Live>,
    /// Why it is not there, for people.
    trouble: String,
}

/// A worker that answers.
#[derive(Clone, Debug)]
pub(super) struct Live {
    pub(super) link: WorkerLink,
    pub(super) introduction: Introduction,
    status: EngineStatus,
    /// What its prefix cache has. Shared with views, which live for a moment: hardly ever is it copied.
    cached: Arc<BTreeSet<u64>>,
    pub(super) links: Vec<PeerLink>,
    /// Whether its peers have been introduced.
    pub(super) is_introduced: bool,
    lost: CancellationToken,
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct InFlight(Arc<Cluster>);

/// What a request needs of a worker.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    pub(super) link: WorkerLink,
    pub(super) peer: Peer,
    pub(super) lost: CancellationToken,
}

impl Cluster {
    /// Starts to follow the workers. Needs a running tokio runtime.
    pub(crate) fn follow(slots: Vec<Slot>, metrics: Arc<Metrics>, require_links: bool) -> Arc<Self> {
        let states = slots
            .iter()
            .map(|slot| SlotState {
                name: slot.name.clone(),
                role: slot.role,
                live: None,
                trouble: "has not started yet".into(),
            })
            .collect();
        let cluster = Arc::new(Self {
            slots: Mutex::new(states),
            changed: Notify::new(),
            draining: CancellationToken::new(),
            in_flight: watch::Sender::new(0),
            metrics,
            require_links,
        });
        for (index, slot) in slots.into_iter().enumerate() {
            tokio::spawn(Arc::clone(&cluster).keep(index, slot.address));
        }
        tokio::spawn(links::keep(Arc::downgrade(&cluster)));
        cluster
    }

    /// Refuses new requests from now on; returns when none is in flight. The workers are not told: they may serve
    /// others too, and a request that has to be replayed now still can be.
    pub(crate) async fn drain(&self) {
        self.draining.cancel();
        let mut in_flight = self.in_flight.subscribe();
        let _ = in_flight.wait_for(|count| *count == 0).await; // Cannot fail: the sender is ours.
    }

    /// Waits until every worker is there and introduced. For use at the start.
    pub(crate) async fn all_up(&self) {
        self.wait_until(|slots| {
            slots.iter().all(|slot| slot.live.as_ref().is_some_and(|live| live.is_introduced))
        })
        .await;
    }

    /// Waits for the next change of any kind from the call on, not from the first poll.
    pub(super) fn change(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Workers that have lost a peer that is there.
    pub(super) fn strangers(&self) -> Vec<Stranger> {
        links::strangers(&self.lock())
    }

    /// What a worker said about its connections just now.
    pub(super) fn set_links(&self, instance: u64, links: Vec<PeerLink>) {
        let mut slots = self.lock();
        let live = slots.iter_mut().filter_map(|slot| slot.live.as_mut());
        if let Some(live) = live.into_iter().find(|live| live.instance() == instance) {
            self.metrics.record_links(&live.introduction.engine.name, &live.links, &links);
            live.links = links;
        }
        drop(slots);
        self.changed.notify_waiters();
    }

    /// Counts a request as in flight until the guard is dropped.
    pub(super) fn in_flight(self: &Arc<Self>) -> InFlight {
        self.in_flight.send_modify(|count| *count += 1);
        InFlight(Arc::clone(self))
    }

    /// How the workers are, for probes.
    pub(crate) fn health(&self) -> ClusterHealth {
        let slots = self.lock();
        let workers = slots
            .iter()
            .map(|slot| WorkerHealth {
                name: slot.name.clone(),
                role: slot.role.as_str(),
                alive: slot.live.is_some(),
            })
            .collect();
        let serving = slots.iter().filter_map(|slot| slot.live.as_ref()).filter(|live| live.is_introduced);
        let max_model_len = serving.map(|live| live.introduction.engine.max_model_len).min();
        let serving = match max_model_len {
            _ if self.draining.is_cancelled() => Serving::No { reason: "shutting down".into() },
            Some(_)
                if self.require_links
                    && let Some(reason) = links::unlinked_pair(&slots) =>
            {
                Serving::No { reason }
            }
            Some(max_model_len) => Serving::Yes { max_model_len },
            None => {
                drop(slots);
                Serving::No { reason: self.troubles().join("; ") }
            }
        };
        ClusterHealth { workers, serving }
    }

    /// Why workers do not serve, for people.
    pub(crate) fn troubles(&self) -> Vec<String> {
        let trouble = |slot: &SlotState| match &slot.live {
            Some(live) if live.is_introduced => None,
            Some(_) => Some(format!("{} gets to know its peers", slot.name)),
            None => Some(format!("{} {}", slot.name, slot.trouble)),
        };
        self.lock().iter().filter_map(trouble).collect()
    }

    /// What routing decides on.
    pub(super) fn view(&self) -> ClusterView {
        let slots = self.lock();
        ClusterView { workers: slots.iter().map(SlotState::view).collect(), links: links::links(&slots) }
    }

    /// How to speak to a worker; `None` when it is gone.
    pub(super) fn reach(&self, instance: Instance) -> Option<Reach> {
        self.lock()
            .iter()
            .filter_map(|slot| slot.live.as_ref())
            .find(|live| live.instance() == instance.0)
            .map(|live| Reach { link: live.link.clone(), peer: live.peer(), lost: live.lost.clone() })
    }

    /// Keeps one slot filled for as long as there is an address for it, now or later.
    async fn keep(self: Arc<Self>, index: usize, mut address: watch::Receiver<Option<String>>) {
        let mut pause = RECONNECT_FIRST;
        loop {
            let Some(place) = address.borrow_and_update().clone() else {
                if address.changed().await.is_err() {
                    return;
                }
                pause = RECONNECT_FIRST;
                continue;
            };
            let trouble = tokio::select! {
                trouble = self.serve_slot(index, &place) => trouble,
                _ = address.changed() => continue,
            };
            let was_live = self.lose(index, &trouble);
            if was_live {
                pause = RECONNECT_FIRST;
            }
            // A new address is worth an attempt at once.
            let _ = timeout(pause, address.changed()).await;
            pause = (pause * 2).min(RECONNECT_LAST);
        }
    }

    /// Connects to a worker and follows it until it is lost. Returns why.
    async fn serve_slot(&self, index: usize, address: &str) -> LinkError {
        match self.try_serve_slot(index, address).await {
            Ok(()) => LinkError::Ended,
            Err(error) => error,
        }
    }

    async fn try_serve_slot(&self, index: usize, address: &str) -> Result<(), LinkError> {
        let (link, introduction) = WorkerLink::connect(address).await?;
        let mut statuses = link.watch().await?;
        let engine = introduction.engine.clone();
        let lost = CancellationToken::new();
        let live = Live {
            link: link.clone(),
            introduction,
            status: EngineStatus::default(),
            cached: Arc::default(),
            links: Vec::new(),
            is_introduced: false,
            lost,
        };
        {
            let mut slots = self.lock();
            slots[index].name = engine.name.clone();
            slots[index].role = engine.role;
            refuse_other_model(&slots, index, &engine)?;
            slots[index].live = Some(live);
        }
        let mut first = true;
        loop {
            let status = timeout(SILENCE, statuses.next()).await.map_err(|_| LinkError::Silent)?;
            let status = status.ok_or(LinkError::Ended)??;
            if first {
                self.metrics.record_ranks(&engine.name, engine.tensor_parallel);
                self.metrics.record_cache_config(
                    &engine.name,
                    engine.block_len,
                    status.engine.ledger.total.0,
                );
            }
            self.take_status(index, &status);
            if std::mem::take(&mut first) {
                self.introduce(index, &link).await;
                let ranks = engine.tensor_parallel;
                tracing::info!(worker = %engine.name, device = %engine.device, ranks, "worker is ready");
            }
        }
    }

    /// Makes the handshakes between a worker and those that are there already, before the first request needs them.
    async fn introduce(&self, index: usize, link: &WorkerLink) {
        let peers: Vec<Peer> = {
            let slots = self.lock();
            let others = slots.iter().enumerate().filter(|(other, _)| *other != index);
            others.filter_map(|(_, slot)| Some(slot.live.as_ref()?.peer())).collect()
        };
        let links = match peers.is_empty() {
            true => Vec::new(),
            false => link.meet_peers(&peers).await.unwrap_or_else(|error| {
                tracing::warn!(%error, "a worker could not be introduced to its peers");
                Vec::new()
            }),
        };
        let mut slots = self.lock();
        if let Some(live) = &mut slots[index].live {
            // Its next status says the same, but comes later.
            self.metrics.record_links(&live.introduction.engine.name, &live.links, &links);
            live.links = links;
            live.is_introduced = true;
        }
        drop(slots);
        self.changed.notify_waiters();
    }

    fn take_status(&self, index: usize, status: &WorkerStatus) {
        let mut slots = self.lock();
        let Some(live) = &mut slots[index].live else { return };
        live.status = status.engine.clone();
        live.take_cache_changes(status);
        let engine = &live.introduction.engine;
        let (name, role, instance) = (engine.name.clone(), engine.role, engine.instance);
        // An empty list may be from before the introduction.
        let links_before =
            (!status.links.is_empty()).then(|| std::mem::replace(&mut live.links, status.links.clone()));
        drop(slots);
        self.changed.notify_waiters();
        // Requests are routed meanwhile. A worker's statuses come one after the other, from one task.
        if let Some(before) = links_before {
            self.metrics.record_links(&name, &before, &status.links);
        }
        let EngineStatus { running, waiting, ledger, counters, credit, .. } = status.engine;
        self.metrics.record_worker_status(&WorkerStatusSnapshot {
            worker: &name,
            role,
            instance,
            running,
            waiting,
            ledger,
            counters,
            credit,
        });
        for sample in &status.samples {
            self.metrics.record_sample(&name, &sample.name, sample.value);
        }
    }

    /// Marks a worker as gone and ends its streams. True when it was there.
    fn lose(&self, index: usize, trouble: &LinkError) -> bool {
        let mut slots = self.lock();
        let slot = &mut slots[index];
        let before = std::mem::replace(&mut slot.trouble, format!("is not there: {trouble}"));
        let Some(live) = slot.live.take() else {
            // Said once, not with each attempt.
            if before == slot.trouble {
                tracing::debug!(worker = %slot.name, %trouble, "still not there");
            } else {
                tracing::warn!(worker = %slot.name, %trouble, "worker is not there");
            }
            return false;
        };
        live.lost.cancel();
        if !self.draining.is_cancelled() {
            tracing::warn!(worker = %slot.name, %trouble, "worker is lost");
        }
        self.metrics.record_worker_down(&slot.name, slot.role);
        drop(slots);
        self.changed.notify_waiters();
        true
    }

    async fn wait_until(&self, holds: impl Fn(&[SlotState]) -> bool) {
        loop {
            let changed = self.changed.notified();
            if holds(&self.lock()) {
                return;
            }
            changed.await;
        }
    }

    /// Values are replaced whole, so that what a panic left behind is sound.
    fn lock(&self) -> MutexGuard<'_, Vec<SlotState>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    fn take_cache_changes(&mut self, status: &WorkerStatus) {
        if !status.cache_reset && status.cache_added.is_empty() && status.cache_removed.is_empty() {
            return;
        }
        let cached = Arc::make_mut(&mut self.cached);
        if status.cache_reset {
            cached.clear();
        }
        cached.extend(&status.cache_added);
        for hash in &status.cache_removed {
            cached.remove(hash);
        }
    }

    pub(super) fn instance(&self) -> u64 {
        self.introduction.engine.instance
    }

    pub(super) fn peer(&self) -> Peer {
        let engine = &self.introduction.engine;
        Peer { name: engine.name.clone(), instance: engine.instance, address: engine.handoff_address }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|count| *count -= 1);
    }
}

impl SlotState {
    fn view(&self) -> WorkerView {
        let Some(live) = &self.live else {
            return WorkerView {
                instance: 0,
                role: self.role,
                availability: Availability::Down,
                running: 0,
                waiting: 0,
                max_num_seqs: 0,
                queued_tokens: 0,
                free: BlockCount(0),
                total: BlockCount(0),
                block_len: ANY_BLOCK_LEN,
                cached: Arc::default(),
            };
        };
        let (engine, status) = (&live.introduction.engine, &live.status);
        WorkerView {
            instance: engine.instance,
            role: engine.role,
            availability: match (live.is_introduced, status.draining) {
                (false, _) => Availability::Down,
                (true, true) => Availability::Draining,
                (true, false) => Availability::Serving,
            },
            running: status.running,
            waiting: status.waiting,
            max_num_seqs: engine.max_num_seqs,
            queued_tokens: status.queued_tokens,
            free: BlockCount(status.ledger.free.0 + status.ledger.cached.0),
            total: status.ledger.total,
            block_len: BlockLen::new(engine.block_len).unwrap_or(ANY_BLOCK_LEN),
            cached: Arc::clone(&live.cached),
        }
    }
}

/// Two models behind one name would answer as the dice fall, so the one that was there first stays.
fn refuse_other_model(slots: &[SlotState], index: usize, engine: &Description) -> Result<(), LinkError> {
    let others = slots.iter().enumerate().filter(|(other, _)| *other != index);
    let mut others = others.filter_map(|(_, slot)| Some(&slot.live.as_ref()?.introduction.engine));
    match others.find(|other| other.fingerprint != engine.fingerprint) {
        Some(other) => Err(LinkError::OtherModel { other: other.name.clone() }),
        None => Ok(()),
    }
}

/// Four missed heartbeats.
const SILENCE: Duration = Duration::from_secs(1);
const RECONNECT_FIRST: Duration = Duration::from_millis(20);
const RECONNECT_LAST: Duration = Duration::from_secs(1);
/// Stands for the block length of a worker that is not there.
const ANY_BLOCK_LEN: BlockLen = match BlockLen::new(16) {
    Some(block_len) => block_len,
    None => panic!("16 is a power of two"),
};
