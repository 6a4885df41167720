//! Connections between workers, over which KV caches are handed over.
//!
//! Workers meet when one joins. A connection that breaks later, while both live on, is made again here: workers know
//! each other only from routers, so nobody else would.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::join_all;
use tidemill_engine::handle::{Peer, PeerLink, Role};

use super::cluster::{Cluster, Live, SlotState};
use crate::worker_link::WorkerLink;

/// Looks now and then whether pairs have lost each other, and introduces them again. Ends with the cluster.
pub(super) async fn keep(cluster: Weak<Cluster>) {
    let mut look = tokio::time::interval(MEND_EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let Some(cluster) = cluster.upgrade() else { return };
        let strangers = cluster.strangers();
        join_all(strangers.into_iter().map(|stranger| meet_again(&cluster, stranger))).await;
    }
}

/// A worker that has lost a peer.
pub(super) struct Stranger {
    instance: u64,
    name: String,
    link: WorkerLink,
    peers: Vec<Peer>,
}

async fn meet_again(cluster: &Arc<Cluster>, stranger: Stranger) {
    let Stranger { instance, name, link, peers } = stranger;
    tracing::info!(worker = name, "has no connection to a peer: they are introduced again");
    match link.meet_peers(&peers).await {
        Ok(links) => cluster.set_links(instance, links),
        Err(error) => tracing::debug!(worker = name, %error, "not introduced"),
    }
}

/// The workers to introduce again: one of each prefill and decode worker that have no connection.
pub(super) fn strangers(slots: &[SlotState]) -> Vec<Stranger> {
    let all: Vec<&Live> = introduced(slots).collect();
    let has_lost_a_peer =
        |one: &&&Live| all.iter().any(|other| make_a_pair(one, other) && !are_linked(one, other));
    all.iter()
        .filter(has_lost_a_peer)
        .map(|one| Stranger {
            instance: one.instance(),
            name: one.introduction.engine.name.clone(),
            link: one.link.clone(),
            peers: all
                .iter()
                .filter(|other| other.instance() != one.instance())
                .map(|other| other.peer())
                .collect(),
        })
        .collect()
}

/// All connections, as pairs of instances.
pub(super) fn links(slots: &[SlotState]) -> BTreeSet<(u64, u64)> {
    let of = |live: &Live| {
        let links = live.links.iter().filter(|link| link.transport.is_ok());
        links.map(|link| (live.instance(), link.instance)).collect::<Vec<_>>()
    };
    introduced(slots).flat_map(of).collect()
}

/// A prefill and a decode worker that have met, but cannot hand over to each other. One that has just come back takes
/// no requests yet and stops none.
pub(super) fn unlinked_pair(slots: &[SlotState]) -> Option<String> {
    let live: Vec<&Live> = introduced(slots).collect();
    let pairs = live.iter().flat_map(|one| live.iter().map(move |other| (*one, *other)));
    let (prefill, decode) =
        pairs.into_iter().find(|(one, other)| make_a_pair(one, other) && !are_linked(one, other))?;
    Some(format!("{} and {}", prefill.introduction.engine.name, decode.introduction.engine.name))
}

fn introduced(slots: &[SlotState]) -> impl Iterator<Item = &Live> {
    slots.iter().filter_map(|slot| slot.live.as_ref()).filter(|live| live.is_introduced)
}

/// Whether the first is a prefill and the other a decode worker.
fn make_a_pair(one: &Live, other: &Live) -> bool {
    let role = |live: &Live| live.introduction.engine.role;
    role(one) == Role::Prefill && role(other) == Role::Decode
}

fn are_linked(one: &Live, other: &Live) -> bool {
    let knows = |from: &Live, to: &Live| {
        let is_it = |link: &&PeerLink| link.instance == to.instance();
        from.links.iter().find(is_it).is_some_and(|link| link.transport.is_ok())
    };
    knows(one, other) || knows(other, one)
}

/// Between two looks. Long beside a handshake, short beside the life of a worker.
const MEND_EVERY: Duration = Duration::from_secs(1);
