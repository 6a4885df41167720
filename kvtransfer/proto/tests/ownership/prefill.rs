//! The prefill worker: an engine that computes, and its endpoint.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tidemill_kvtransfer_proto::endpoint_core::{
    DigestOrder, EndpointAction, EndpointCore, EndpointEvent, LinkId, TargetWrite,
};
use tidemill_kvtransfer_proto::message::Message;
use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, WriteFault, WriteId};
use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId, TokenCount};

use crate::content::Content;
use crate::moves::Move;
use crate::settings::rules;
use crate::world::{BLOCK, Checked, Config, DECODE, Link, NOW, Planted, TOKENS, Wire, World, content};

/// From the engine to its endpoint.
#[derive(Clone, Copy, Debug)]
enum Order {
    Expect,
    Push(usize),
    Filled(TokenCount),
    Finish,
    Abandon,
}

/// From the endpoint to its engine.
#[derive(Clone, Debug)]
enum News {
    Reserved(Vec<BlockRef>),
    CancelWanted,
}

/// What the engine has to compute.
#[derive(Clone, Debug)]
struct Work {
    targets: Vec<BlockRef>,
    done: usize,
    should_stop: bool,
}

/// A write that was posted and has not ended.
#[derive(Clone, Debug)]
pub(crate) struct Flight {
    pub(crate) link: LinkId,
    pub(crate) content: Content,
    pub(crate) range: RemoteRange,
}

#[derive(Clone, Debug)]
pub(crate) struct Prefill {
    // The engine's.
    work: BTreeMap<HandoffId, Work>,
    /// A store that a mistaken engine still makes.
    late: Option<(HandoffId, usize, BlockRef)>,
    // Between the two.
    orders: VecDeque<(HandoffId, Order)>,
    news: VecDeque<(HandoffId, News)>,
    // The endpoint's.
    pub(crate) core: EndpointCore<Content>,
    posted: VecDeque<(WriteId, Flight)>,
    hashing: VecDeque<DigestOrder>,
    pub(crate) link: Link,
    /// The link that is up or was last.
    pub(crate) link_id: LinkId,
    /// A link that was severed while the peer's device could still read.
    to_be_revoked: VecDeque<LinkId>,
    /// Handoffs whose blocks are not free.
    held: BTreeSet<HandoffId>,
}

impl Prefill {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            work: BTreeMap::new(),
            late: None,
            orders: VecDeque::new(),
            news: VecDeque::new(),
            core: EndpointCore::new(rules(config)),
            posted: VecDeque::new(),
            hashing: VecDeque::new(),
            link: Link::Down,
            link_id: LinkId(0),
            to_be_revoked: VecDeque::new(),
            held: BTreeSet::new(),
        }
    }

    /// Its writes that are under way.
    pub(crate) fn flights(self) -> impl Iterator<Item = Flight> {
        self.posted.into_iter().map(|(_, flight)| flight)
    }

    /// Whether the blocks of a handoff are not free.
    pub(crate) fn holds(&self, handoff: HandoffId) -> bool {
        self.held.contains(&handoff)
    }

    /// Nothing is computed and no handoff is left, once those that wait for their peer have waited for long enough.
    pub(crate) fn is_over(&self) -> bool {
        let mut core = self.core.clone();
        core.tick(NOW.plus(PATIENCE));
        self.work.is_empty() && core.is_idle()
    }
}

impl World {
    pub(crate) fn prefill_moves(&self, moves: &mut Vec<Move>) {
        let Some(prefill) = &self.prefill else { return };
        if !prefill.news.is_empty() {
            moves.push(Move::PrefillEngineHears);
        }
        for (&handoff, work) in &prefill.work {
            if work.should_stop || 0 < self.faults.abandons {
                moves.push(Move::PrefillEngineGivesUp(handoff));
            }
            match work.done < work.targets.len() {
                _ if work.should_stop => {}
                true => moves.push(Move::PrefillEngineStores(handoff)),
                false => moves.push(Move::PrefillEngineFinishes(handoff)),
            }
        }
        if prefill.late.is_some() {
            moves.push(Move::PrefillEngineStoresTooLate);
        }
        if !prefill.orders.is_empty() {
            moves.push(Move::PrefillEndpointObeys);
        }
        let audible =
            if self.config.overtaking { self.to_prefill.len() } else { self.to_prefill.len().min(1) };
        moves.extend((0..audible).map(Move::PrefillEndpointHears));
        if prefill.core.has_writes_for(DECODE) {
            moves.push(Move::PrefillEndpointPosts);
        }
        // A device has several queues without an order among them.
        let ending =
            if self.config.wire == Wire::Device { prefill.posted.len() } else { prefill.posted.len().min(1) };
        moves.extend((0..ending).map(Move::PrefillEndpointWrites));
        if !prefill.hashing.is_empty() {
            moves.push(Move::PrefillEndpointTakesDigests);
        }
        if prefill.link == Link::Broken {
            moves.push(Move::PrefillEndpointNoticesLoss);
        }
        if !prefill.to_be_revoked.is_empty() {
            moves.push(Move::PrefillEndpointEndsAccess);
        }
    }

    fn prefill(&mut self) -> &mut Prefill {
        self.prefill.as_mut().expect("the dead do not move")
    }

    /// The router tells the prefill worker of a request.
    pub(crate) fn prefill_is_told_of(&mut self, handoff: HandoffId) {
        if let Some(prefill) = &mut self.prefill {
            prefill.orders.push_back((handoff, Order::Expect));
        }
    }

    pub(crate) fn prefill_moves_by(&mut self, step: Move) -> Checked {
        match step {
            Move::PrefillEngineHears => self.prefill_engine_hears(),
            Move::PrefillEngineStores(handoff) => self.prefill_engine_stores(handoff)?,
            Move::PrefillEngineFinishes(handoff) => {
                self.prefill().work.remove(&handoff);
                self.prefill().orders.push_back((handoff, Order::Finish));
            }
            Move::PrefillEngineGivesUp(handoff) => self.prefill_engine_gives_up(handoff),
            Move::PrefillEngineStoresTooLate => {
                let (handoff, position, target) = self.prefill().late.take().expect("there is one");
                self.store(handoff, content(handoff, position), target.block)?;
            }
            Move::PrefillEndpointObeys => self.prefill_endpoint_obeys(),
            Move::PrefillEndpointHears(index) => {
                let message = self.to_prefill.remove(index).expect("there is a message");
                self.prefill().core.hear(DECODE, message, NOW);
            }
            Move::PrefillEndpointPosts => self.prefill_endpoint_posts(),
            Move::PrefillEndpointWrites(index) => self.prefill_endpoint_writes(index)?,
            Move::PrefillEndpointTakesDigests => {
                let order = self.prefill().hashing.pop_front().expect("there is one");
                let digests = self.digests(&order);
                self.prefill().core.digested(order.handoff, order.ticket, digests);
            }
            Move::PrefillEndpointNoticesLoss => {
                self.prefill().core.link_lost(DECODE, "r", NOW);
                if self.config.planted == Some(Planted::FreeOfferedOnLoss) {
                    let link = self.prefill().link_id;
                    self.prefill().core.access_ended(DECODE, link, NOW);
                }
            }
            Move::PrefillEndpointEndsAccess => {
                let link = self.prefill().to_be_revoked.pop_front().expect("there is one");
                self.readable_from = LinkId(link.0 + 1);
                self.prefill().core.access_ended(DECODE, link, NOW);
            }
            other => unreachable!("{other:?} is nobody's"),
        }
        self.prefill_acts();
        Ok(())
    }

    fn prefill_engine_hears(&mut self) {
        let (handoff, news) = self.prefill().news.pop_front().expect("there is news");
        match news {
            News::Reserved(targets) => {
                self.prefill().held.insert(handoff);
                let work = Work { targets, done: 0, should_stop: false };
                self.prefill().work.insert(handoff, work);
            }
            News::CancelWanted => {
                // It may have finished meanwhile.
                if let Some(work) = self.prefill().work.get_mut(&handoff) {
                    work.should_stop = true;
                }
            }
        }
    }

    fn prefill_engine_stores(&mut self, handoff: HandoffId) -> Checked {
        let work = self.prefill().work.get_mut(&handoff).expect("just listed");
        let position = work.done;
        work.done += 1;
        let target = work.targets[position];
        let filled = TokenCount(work.done as u32 * TOKENS);
        if self.config.wire == Wire::InPlace {
            self.prefill().orders.push_back((handoff, Order::Filled(filled)));
            return self.store(handoff, content(handoff, position), target.block);
        }
        self.prefill().orders.push_back((handoff, Order::Push(position)));
        Ok(())
    }

    fn prefill_engine_gives_up(&mut self, handoff: HandoffId) {
        let stores_on = self.config.planted == Some(Planted::StoreAfterAbandon);
        let work = self.prefill().work.remove(&handoff).expect("just listed");
        if !work.should_stop {
            self.faults.abandons -= 1;
        }
        if stores_on && work.done < work.targets.len() {
            self.prefill().late = Some((handoff, work.done, work.targets[work.done]));
        }
        if self.config.planted == Some(Planted::FreeOffered) {
            self.prefill().held.remove(&handoff);
        }
        self.prefill().orders.push_back((handoff, Order::Abandon));
    }

    fn prefill_endpoint_obeys(&mut self) {
        let (handoff, order) = self.prefill().orders.pop_front().expect("there is an order");
        let core = &mut self.prefill().core;
        match order {
            Order::Expect => core.expect(handoff, DECODE, PATIENCE, NOW),
            Order::Push(position) => {
                let source = Some(Content(content(handoff, position)));
                let target_index = position as u32;
                core.push(handoff, vec![TargetWrite { target_index, offset: 0, source }], NOW);
            }
            Order::Filled(tokens) => core.filled(handoff, tokens),
            Order::Finish => core.finish(handoff, vec![1], NOW),
            Order::Abandon => core.abandon(handoff, "r".into(), NOW),
        }
    }

    /// One write leaves.
    fn prefill_endpoint_posts(&mut self) {
        let settles_early = self.config.planted == Some(Planted::SettleWhenPosted);
        let prefill = self.prefill();
        let mut taken = None;
        let take = |id, content: &Content, range| match taken {
            None => {
                taken = Some((id, *content, range));
                Post::Accepted
            }
            Some(_) => Post::QueueFull,
        };
        prefill.core.post(DECODE, take, NOW);
        let Some((id, content, range)) = taken else { return };
        let link = prefill.link_id;
        prefill.posted.push_back((id, Flight { link, content, range }));
        if settles_early {
            prefill.core.completed(&[Completion { id, outcome: Ok(()) }], NOW);
        }
    }

    /// One posted write comes to its end: it lands, or is turned down by a receiver that looks, or by a broken way.
    fn prefill_endpoint_writes(&mut self, index: usize) -> Checked {
        let is_up = self.prefill().link == Link::Up;
        let (id, flight) = self.prefill().posted.remove(index).expect("just listed");
        let outcome = match self.config.wire {
            Wire::Admitted if is_up => self.admit(&flight.range),
            Wire::Admitted => Err(WriteFault::Severed),
            Wire::Device if !self.may_write(&flight) => Err(WriteFault::Severed),
            // Memory does not break with the connection, and what a device has sent is on its way.
            Wire::Device | Wire::Copied | Wire::InPlace => Ok(()),
            Wire::Read => unreachable!("nobody writes"),
        };
        if outcome.is_ok() {
            self.land(&flight)?;
        }
        self.prefill().core.completed(&[Completion { id, outcome }], NOW);
        Ok(())
    }

    /// Bytes of a write reach the decode worker's memory.
    pub(crate) fn land(&mut self, flight: &Flight) -> Checked {
        let blocks = flight.range.blocks(BLOCK).expect("the core names whole ranges");
        blocks.into_iter().try_for_each(|block| self.store(flight.range.handoff, flight.content.0, block))
    }

    /// What a device has sent goes on without it, if it can still land.
    pub(crate) fn leave(&mut self, flight: Flight) {
        if self.config.wire == Wire::Device && self.may_write(&flight) {
            self.in_network.push_back(flight);
        }
    }

    /// Carries out what the endpoint wants.
    pub(crate) fn prefill_acts(&mut self) {
        while let Some(action) = self.prefill.as_mut().and_then(|it| it.core.next_action()) {
            match action {
                // A sign of life: it changes nothing on the other side.
                EndpointAction::Send { message: Message::Heartbeat { .. }, .. } => {}
                EndpointAction::Send { message, .. } => {
                    if self.prefill().link == Link::Up {
                        self.to_decode.push_back(message);
                    }
                }
                EndpointAction::Sever { link, .. } => self.prefill_severs(link),
                EndpointAction::TakeDigests(order) => self.prefill().hashing.push_back(order),
                EndpointAction::Tell(EndpointEvent::Reserved(reserved)) => {
                    let news = News::Reserved(reserved.targets);
                    self.prefill().news.push_back((reserved.handoff, news));
                }
                EndpointAction::Tell(EndpointEvent::CancelWanted { handoff }) => {
                    self.prefill().news.push_back((handoff, News::CancelWanted));
                }
                EndpointAction::Tell(
                    EndpointEvent::Delivered { handoff, .. } | EndpointEvent::SendFailed { handoff, .. },
                ) => {
                    self.prefill().held.remove(&handoff);
                }
                EndpointAction::Tell(_) | EndpointAction::Log { .. } => {}
            }
        }
    }

    /// Nothing more leaves. What has left by a device may still arrive; the rest does not.
    fn prefill_severs(&mut self, link: LinkId) {
        self.prefill().link = Link::Down;
        if self.config.wire == Wire::Read {
            self.prefill().to_be_revoked.push_back(link);
        }
        let posted = std::mem::take(&mut self.prefill().posted);
        let mut done = Vec::new();
        for (id, flight) in posted {
            self.leave(flight);
            done.push(Completion { id, outcome: Err(WriteFault::Severed) });
        }
        self.prefill().core.completed(&done, NOW);
    }
}

/// How long a handoff waits for its other half; no time passes in a search.
const PATIENCE: Duration = Duration::from_secs(600);
