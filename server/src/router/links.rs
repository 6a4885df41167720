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

/// Who can hand over to whom, as pairs of instances.
pub(super) fn links(slots: &[SlotState]) -> BTreeSet<(u64, u64)> {
    let of = |live: &Live| {
        let links = live.links.iter().filter(|link| link.transport.is_ok());
        let directions = links.flat_map(|link| {
            let to_peer = link.to_peer.is_ok().then_some((live.instance(), link.instance));
            let from_peer = link.from_peer.is_ok().then_some((link.instance, live.instance()));
            [to_peer, from_peer].into_iter().flatten()
        });
        directions.collect::<Vec<_>>()
    };
    introduced(slots).flat_map(of).collect()
}

/// Why a prefill worker cannot hand over to a decode worker, although they have met: of the first such pair. One that has
/// just come back takes no requests yet and stops none.
pub(super) fn unlinked_pair(slots: &[SlotState]) -> Option<String> {
    let live: Vec<&Live> = introduced(slots).collect();
    let mut pairs = live.iter().flat_map(|one| live.iter().map(move |other| (*one, *other)));
    pairs.find_map(|(prefill, decode)| {
        let why = why_not(prefill, decode).filter(|_| make_a_pair(prefill, decode))?;
        let name = |live: &Live| live.introduction.engine.name.clone();
        Some(format!("{} cannot hand over to {}: {why}", name(prefill), name(decode)))
    })
}

/// What keeps one worker from handing over to another.
fn why_not(from: &Live, to: &Live) -> Option<String> {
    let between = [(from, to, true), (to, from, false)].into_iter().find_map(|(one, other, is_sender)| {
        let link =
            one.links.iter().find(|link| link.instance == other.instance() && link.transport.is_ok())?;
        Some(if is_sender { &link.to_peer } else { &link.from_peer })
    });
    match between {
        Some(direction) => direction.clone().err(),
        None => Some("they have no connection of the required kind".to_owned()),
    }
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
