//! The decode worker: an engine with a pool of blocks, and its endpoint.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tidemill_kvtransfer_proto::endpoint_core::{
    DigestOrder, EndpointAction, EndpointCore, EndpointEvent, LinkId, ReserveOrder,
};
use tidemill_kvtransfer_proto::message::Message;
use tidemill_kvtransfer_proto::transport::{Completion, Post, RemoteRange, WriteFault, WriteId};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};

use crate::content::Content;
use crate::moves::Move;
use crate::settings::rules;
use crate::world::{BLOCK, Checked, Config, Link, NOW, PREFILL, Planted, TOKENS, World};

/// From the engine to its endpoint.
#[derive(Clone, Debug)]
enum Order {
    Reserve(Vec<BlockRef>),
    Cancel,
    Adopt,
    Refuse,
}

/// From the endpoint to its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    Committed,
    Released,
}

/// A read that was posted and has not ended.
#[derive(Clone, Copy, Debug)]
struct Fetch {
    link: LinkId,
    source: RemoteRange,
    target: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Decode {
    // The engine's.
    begun: u64,
    pub(crate) owners: Vec<Option<HandoffId>>,
    epochs: Vec<u64>,
    targets: BTreeMap<HandoffId, Vec<BlockRef>>,
    /// Given up by the engine, which waits for `Released`.
    given_up: BTreeSet<HandoffId>,
    in_use: BTreeSet<HandoffId>,
    pub(crate) adopted: u64,
    handoffs: u64,
    // Between the two.
    orders: VecDeque<(HandoffId, Order)>,
    news: VecDeque<(HandoffId, News)>,
    // The endpoint's.
    pub(crate) core: EndpointCore<Content>,
    hashing: VecDeque<DigestOrder>,
    /// Reads that have not ended.
    reading: VecDeque<(WriteId, Fetch)>,
    pub(crate) link: Link,
    /// The link that is up or was last.
    pub(crate) link_id: LinkId,
    /// A link that was severed while the peer's device could still write.
    to_be_revoked: VecDeque<LinkId>,
    has_seen_the_end: bool,
}

impl Decode {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            begun: 0,
            owners: vec![None; config.blocks as usize],
            epochs: vec![0; config.blocks as usize],
            targets: BTreeMap::new(),
            given_up: BTreeSet::new(),
            in_use: BTreeSet::new(),
            adopted: 0,
            handoffs: config.handoffs,
            orders: VecDeque::new(),
            news: VecDeque::new(),
            core: EndpointCore::new(rules(config)),
            hashing: VecDeque::new(),
            reading: VecDeque::new(),
            link: Link::Down,
            link_id: LinkId(0),
            to_be_revoked: VecDeque::new(),
            has_seen_the_end: false,
        }
    }

    /// Every handoff was begun and has ended, and every block is back.
    pub(crate) fn is_over(&self) -> bool {
        self.begun == self.handoffs
            && self.owners.iter().all(Option::is_none)
            && self.core.is_idle()
            && self.orders.is_empty()
    }

    pub(crate) fn is_adopted(&self, handoff: HandoffId) -> bool {
        self.in_use.contains(&handoff)
    }

    fn free(&self) -> impl Iterator<Item = usize> {
        self.owners.iter().enumerate().filter(|(_, owner)| owner.is_none()).map(|(block, _)| block)
    }

    fn take_back(&mut self, handoff: HandoffId) {
        self.targets.remove(&handoff);
        for owner in self.owners.iter_mut().filter(|owner| **owner == Some(handoff)) {
            *owner = None;
        }
    }
}

impl World {
    pub(crate) fn decode_moves(&self, moves: &mut Vec<Move>) {
        let decode = &self.decode;
        if decode.begun < decode.handoffs && self.config.blocks_each as usize <= decode.free().count() {
            moves.push(Move::DecodeEngineReserves);
        }
        if 0 < self.faults.cancels {
            let wanted = decode.targets.keys().filter(|it| !decode.given_up.contains(it));
            moves.extend(
                wanted.filter(|it| !decode.in_use.contains(it)).map(|&it| Move::DecodeEngineCancels(it)),
            );
        }
        if let Some((handoff, news)) = decode.news.front() {
            moves.push(Move::DecodeEngineHears);
            let is_wanted = *news == News::Committed && !decode.given_up.contains(handoff);
            if is_wanted && 0 < self.faults.cancels {
                moves.push(Move::DecodeEngineRefuses);
            }
        }
        moves.extend(decode.in_use.iter().map(|&it| Move::DecodeEngineFrees(it)));
        if !decode.orders.is_empty() {
            moves.push(Move::DecodeEndpointObeys);
        }
        let audible = if self.config.overtaking { self.to_decode.len() } else { self.to_decode.len().min(1) };
        moves.extend((0..audible).map(Move::DecodeEndpointHears));
        if !decode.hashing.is_empty() {
            moves.push(Move::DecodeEndpointTakesDigests);
        }
        if decode.link == Link::Broken {
            moves.push(Move::DecodeEndpointNoticesLoss);
        }
        if !decode.to_be_revoked.is_empty() {
            moves.push(Move::DecodeEndpointEndsAccess);
        }
        if decode.core.has_reads_from(PREFILL) {
            moves.push(Move::DecodeEndpointFetches);
        }
        moves.extend((0..decode.reading.len()).map(Move::DecodeEndpointReads));
        if self.prefill.is_none() && !decode.has_seen_the_end && self.config.wire.is_mapped() {
            moves.push(Move::DecodeEndpointSeesTheEnd);
        }
        if self.prefill.is_none() && decode.link == Link::Down && decode.core.wants_link(PREFILL) {
            moves.push(Move::DecodeEndpointReachesNobody);
        }
    }

    /// False when the move is not this side's.
    pub(crate) fn decode_moves_by(&mut self, step: Move) -> Result<bool, String> {
        match step {
            Move::DecodeEngineReserves => self.decode_engine_reserves(),
            Move::DecodeEngineCancels(handoff) => {
                self.faults.cancels -= 1;
                self.decode.given_up.insert(handoff);
                self.decode.orders.push_back((handoff, Order::Cancel));
            }
            Move::DecodeEngineHears => self.decode_engine_hears()?,
            Move::DecodeEngineRefuses => {
                self.faults.cancels -= 1;
                let (handoff, _) = self.decode.news.pop_front().expect("there is news");
                self.decode.given_up.insert(handoff);
                self.decode.orders.push_back((handoff, Order::Refuse));
            }
            Move::DecodeEngineFrees(handoff) => {
                self.check_content(handoff, &self.decode.targets[&handoff])?;
                self.decode.in_use.remove(&handoff);
                self.decode.take_back(handoff);
            }
            Move::DecodeEndpointObeys => {
                let (handoff, order) = self.decode.orders.pop_front().expect("there is an order");
                self.decode_endpoint_obeys(handoff, order);
            }
            Move::DecodeEndpointHears(index) => {
                let message = self.to_decode.remove(index).expect("there is a message");
                self.decode.core.hear(PREFILL, message, NOW);
            }
            Move::DecodeEndpointTakesDigests => {
                let order = self.decode.hashing.pop_front().expect("there is a commit");
                let digests = self.digests(&order);
                self.decode.core.digested(order.handoff, order.ticket, digests);
            }
            Move::DecodeEndpointNoticesLoss => {
                // The end of a process is proof; the end of a connection is none.
                self.decode.core.link_lost(PREFILL, "r", NOW);
                if self.config.planted == Some(Planted::FreeOnLoss) {
                    self.decode.core.process_gone(PREFILL, NOW);
                }
            }
            Move::DecodeEndpointEndsAccess => {
                let link = self.decode.to_be_revoked.pop_front().expect("there is one");
                self.end_access(link);
                self.decode.core.access_ended(PREFILL, link, NOW);
            }
            Move::DecodeEndpointSeesTheEnd => {
                self.decode.has_seen_the_end = true;
                self.decode.core.process_gone(PREFILL, NOW);
            }
            Move::DecodeEndpointFetches => self.decode_endpoint_fetches(),
            Move::DecodeEndpointReads(index) => self.decode_endpoint_reads(index)?,
            Move::DecodeEndpointReachesNobody => self.decode.core.unreachable(PREFILL, "r"),
            _ => return Ok(false),
        }
        self.decode_acts();
        Ok(true)
    }

    fn decode_engine_reserves(&mut self) {
        let decode = &mut self.decode;
        decode.begun += 1;
        let handoff = HandoffId(decode.begun);
        let blocks: Vec<usize> = decode.free().take(self.config.blocks_each as usize).collect();
        let mut targets = Vec::new();
        for block in blocks {
            decode.owners[block] = Some(handoff);
            decode.epochs[block] += 1;
            targets.push(BlockRef { block: BlockId(block as u32), epoch: Epoch(decode.epochs[block]) });
        }
        decode.targets.insert(handoff, targets.clone());
        decode.orders.push_back((handoff, Order::Reserve(targets)));
        // The router has told both sides.
        self.prefill_is_told_of(handoff);
    }

    fn decode_engine_hears(&mut self) -> Checked {
        let (handoff, news) = self.decode.news.pop_front().expect("there is news");
        match news {
            News::Committed if self.decode.given_up.contains(&handoff) => {}
            News::Committed => {
                self.check_content(handoff, &self.decode.targets[&handoff])?;
                self.decode.adopted += 1;
                self.decode.in_use.insert(handoff);
                self.decode.orders.push_back((handoff, Order::Adopt));
            }
            News::Released => {
                self.decode.given_up.remove(&handoff);
                self.decode.take_back(handoff);
            }
        }
        Ok(())
    }

    fn decode_endpoint_obeys(&mut self, handoff: HandoffId, order: Order) {
        let core = &mut self.decode.core;
        match order {
            Order::Reserve(targets) => {
                let tokens = TokenCount(TOKENS * targets.len() as u32);
                let (peer, cached) = (PREFILL, Vec::new());
                core.reserve(
                    ReserveOrder {
                        handoff,
                        peer,
                        tokens,
                        first_block: 0,
                        cached,
                        targets,
                        within: Duration::from_secs(1),
                    },
                    NOW,
                );
            }
            Order::Cancel => {
                core.cancel(handoff);
                if self.config.planted == Some(Planted::FreeOnCancel) {
                    core.hear(PREFILL, Message::Quiet { handoff, reason: "a lie".into() }, NOW);
                }
            }
            Order::Adopt => core.adopt(handoff),
            Order::Refuse => core.refuse(handoff, "r".into()),
        }
    }

    /// One read leaves.
    fn decode_endpoint_fetches(&mut self) {
        let mut taken = None;
        let take = |id, source, target| match taken {
            None => {
                taken = Some((id, source, target));
                Post::Accepted
            }
            Some(_) => Post::QueueFull,
        };
        self.decode.core.fetch(PREFILL, take, NOW);
        let Some((id, source, target)) = taken else { return };
        let link = self.decode.link_id;
        self.decode.reading.push_back((id, Fetch { link, source, target }));
        if self.config.planted == Some(Planted::SettleWhenFetched) {
            self.decode.core.completed(&[Completion { id, outcome: Ok(()) }], NOW);
        }
    }

    /// One read comes to its end: what the prefill worker has there lands, if it can still be read.
    fn decode_endpoint_reads(&mut self, index: usize) -> Checked {
        let (id, Fetch { link, source, target }) = self.decode.reading.remove(index).expect("just listed");
        let handoff = source.handoff;
        let mut outcome = Err(WriteFault::Severed);
        if let Some(prefill) = self.prefill.as_ref().filter(|_| self.readable_from <= link) {
            if !prefill.holds(handoff) {
                return Err(format!("handoff {handoff} reads a block that prefill does not hold"));
            }
            let (number, block) = (source.offset / BLOCK as u64, target / BLOCK as u64);
            self.store(handoff, number, BlockId(block as u32))?;
            outcome = Ok(());
        }
        self.decode.core.completed(&[Completion { id, outcome }], NOW);
        Ok(())
    }

    /// Carries out what the endpoint wants.
    pub(crate) fn decode_acts(&mut self) {
        while let Some(action) = self.decode.core.next_action() {
            match action {
                EndpointAction::Send { message, .. } if self.decode.link == Link::Up => {
                    self.to_prefill.push_back(message);
                }
                EndpointAction::Send { .. } | EndpointAction::Log { .. } => {}
                EndpointAction::Sever { link, .. } => {
                    self.decode.link = Link::Down;
                    if self.config.wire.has_devices() {
                        self.decode.to_be_revoked.push_back(link);
                    }
                    // Its own queue is flushed: nothing that it reads lands any more.
                    let severed = |(id, _)| Completion { id, outcome: Err(WriteFault::Severed) };
                    let done: Vec<Completion> = self.decode.reading.drain(..).map(severed).collect();
                    self.decode.core.completed(&done, NOW);
                }
                EndpointAction::TakeDigests(order) => self.decode.hashing.push_back(order),
                EndpointAction::Tell(event) => {
                    let news = match event {
                        EndpointEvent::Committed { handoff, .. } => Some((handoff, News::Committed)),
                        EndpointEvent::Released { handoff } => Some((handoff, News::Released)),
                        _ => None,
                    };
                    self.decode.news.extend(news);
                }
            }
        }
    }

    /// The receiver's look at a write, where it has one.
    pub(crate) fn admit(&self, range: &RemoteRange) -> Result<(), WriteFault> {
        let admitted = self.decode.core.admit(PREFILL, range);
        if self.config.planted == Some(Planted::AdmitEverything) { Ok(()) } else { admitted }
    }
}
