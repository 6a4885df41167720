//! A worker's process: what lives and dies together.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::endpoint_core::{EndpointCore, EndpointRules, LinkId};
use tidemill_kvtransfer_proto::units::{BlockId, HandoffId};

use super::endpoint::Order;
use super::engine::{ActiveRequest, EngineInput, OutgoingHandoff, Step};
use super::front::ToFront;
use super::handshake::Peer;
use super::model::{Memory, Piece};
use super::wire::ConnId;
use super::world::{Event, Node, Process, Worker, World};
use super::{Fault, Mischief};
use crate::request::RequestId;
use crate::scheduler::Scheduler;
use crate::staging::StagingQueue;

/// A process of a worker.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) instance: u64,
    /// Whether no device of a peer may write to its memory.
    pub(super) pulls: bool,
    pub(super) scheduler: Scheduler,
    pub(super) core: EndpointCore<Piece>,
    pub(super) memory: Memory,
    /// Bytes of it that are no blocks.
    pub(super) staging: usize,
    // The engine thread.
    pub(super) inbox: VecDeque<EngineInput>,
    pub(super) step: Option<Step>,
    pub(super) requests: BTreeMap<RequestId, ActiveRequest>,
    pub(super) outgoing: BTreeMap<HandoffId, OutgoingHandoff>,
    /// Pieces for peers that read, which wait for room to be converted in.
    pub(super) waiting: StagingQueue,
    /// Requests that wait for a peer's cache, and the peer.
    pub(super) incoming: BTreeMap<HandoffId, (RequestId, u64)>,
    pub(super) stuck_since: Option<u64>,
    pub(super) engine_turn_is_due: bool,
    /// Blocks that a peer may write to, and for which handoff.
    pub(super) lent: BTreeMap<BlockId, HandoffId>,
    // The endpoint thread.
    pub(super) orders: VecDeque<Order>,
    /// By instance: connection, side, link.
    pub(super) up: BTreeMap<u64, (ConnId, usize, LinkId)>,
    pub(super) last_delivery: BTreeMap<u64, u64>,
    pub(super) peers: BTreeMap<u64, Peer>,
    pub(super) endpoint_turn_at: Option<u64>,
    /// For a planted bug: digests that peers have sent, of the targets from that one on.
    pub(super) claimed: BTreeMap<(HandoffId, usize), Vec<u64>>,
}

impl Life {
    pub(super) fn new(instance: u64, worker: &Worker, in_place: bool, credit: u64, offers: Duration) -> Self {
        let Worker { shape, pulls, staging, .. } = *worker;
        let scheduler = Scheduler::new(worker.limits, worker.blocks);
        let blocks = scheduler.ledger().total.0;
        let rules = EndpointRules {
            layout: shape.layout(),
            blocks: u64::from(blocks),
            staging: staging as u64,
            in_place,
            coverage: Coverage::Full,
            lease: Duration::from_micros(LEASE),
            heartbeat: Duration::from_micros(LEASE / 5),
            patience: Duration::from_secs(3),
            stall: if worker.leaves_offers_until == 0 { Duration::from_secs(2) } else { LAZY_STALL },
            offers,
            credit,
            pulls,
        };
        Self {
            instance,
            pulls,
            scheduler,
            core: EndpointCore::new(rules),
            memory: Memory::new(shape, blocks, staging),
            staging,
            waiting: StagingQueue::default(),
            inbox: VecDeque::new(),
            step: None,
            requests: BTreeMap::new(),
            outgoing: BTreeMap::new(),
            incoming: BTreeMap::new(),
            stuck_since: None,
            engine_turn_is_due: false,
            lent: BTreeMap::new(),
            orders: VecDeque::new(),
            up: BTreeMap::new(),
            last_delivery: BTreeMap::new(),
            peers: BTreeMap::new(),
            endpoint_turn_at: None,
            claimed: BTreeMap::new(),
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.inbox.is_empty()
            && self.step.is_none()
            && self.requests.is_empty()
            && self.outgoing.is_empty()
            && self.incoming.is_empty()
            && self.lent.is_empty()
            && self.orders.is_empty()
            && self.memory.has_nothing_staged()
    }

    pub(super) fn describe(&self) -> String {
        format!(
            "requests {:?} outgoing {:?} incoming {:?} lent {:?} up {:?} core idle: {}",
            self.requests.keys(),
            self.outgoing,
            self.incoming,
            self.lent,
            self.up,
            self.core.is_idle()
        )
    }
}

impl World<'_> {
    /// A process comes up in a worker's place.
    pub(super) fn start_worker(&mut self, place: usize) {
        let instance = self.number();
        let offers = if self.plants(Mischief::KeepOffers) { FOR_EVER } else { OFFERS };
        let worker = &mut self.workers[place];
        worker.life = Some(Life::new(instance, worker, self.in_place, self.credit, offers));
        let process = Process { place, instance };
        self.note(|| format!("worker {place} starts as {instance:x}"));
        self.after(1, Event::Status(process));
    }

    /// A worker's process dies.
    pub(super) fn kill_worker(&mut self, place: usize) {
        let Some(process) = self.process(place) else { return };
        let is_silent = self.chance.happens(400);
        self.note(|| format!("worker {place} dies{}", if is_silent { " and says nothing" } else { "" }));
        self.drop_ends_of(process, is_silent);
        self.workers[place].life = None;
        if !is_silent {
            let arrival = self.arrival(Node::Worker(place), Node::Front);
            self.at(arrival, Event::ToFront { from: process, message: ToFront::Gone });
        }
    }

    pub(super) fn is_skewed(&mut self) {
        self.count(Fault::Skew);
    }
}

/// As in production, in microseconds.
pub(super) const LEASE: u64 = 500_000;
/// How long what a peer was offered may wait for it. Longer in production; a schedule has not the patience.
pub(super) const OFFERS: Duration = Duration::from_secs(6);
/// Who leaves what it is offered does not end its link for that by itself, which it would after twice this time, before its peer has
/// noticed. A write of its own that was lost is another matter.
const LAZY_STALL: Duration = Duration::from_secs(12);
/// Longer than any schedule.
const FOR_EVER: Duration = Duration::from_secs(3600);
