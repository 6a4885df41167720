//! The prefill worker: an engine that computes, and an endpoint with senders.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tidemill_kvtransfer_proto::message::{Commit, Message, Reserve};
use tidemill_kvtransfer_proto::sender::{Sender, SenderAction, SenderEvent, SenderState};
use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId};

use crate::world::{Checked, Link, Move, Planted, Wire, World, content};

/// From the engine to its endpoint.
#[derive(Clone, Copy, Debug)]
enum Order {
    Push(usize),
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

/// A sender and what its driver keeps.
#[derive(Clone, Debug)]
struct Outgoing {
    sender: Sender,
    reserve: Reserve,
    /// Positions of writes that are not posted, and of those that are.
    unposted: VecDeque<usize>,
    posted: VecDeque<usize>,
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
    outgoing: BTreeMap<HandoffId, Outgoing>,
    ended: BTreeSet<HandoffId>,
    hashing: VecDeque<HandoffId>,
    pub(crate) link: Link,
}

impl Default for Prefill {
    fn default() -> Self {
        Self {
            work: BTreeMap::new(),
            late: None,
            orders: VecDeque::new(),
            news: VecDeque::new(),
            outgoing: BTreeMap::new(),
            ended: BTreeSet::new(),
            hashing: VecDeque::new(),
            link: Link::Up,
        }
    }
}

impl Prefill {
    /// Handoffs of which it cannot promise that nothing touches their blocks.
    pub(crate) fn busy(&self) -> Vec<HandoffId> {
        self.outgoing.iter().filter(|(_, it)| it.sender.is_busy()).map(|(&handoff, _)| handoff).collect()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.work.is_empty() && self.outgoing.is_empty()
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
        for (&handoff, outgoing) in &prefill.outgoing {
            if !outgoing.unposted.is_empty() && prefill.link == Link::Up {
                moves.push(Move::PrefillEndpointPosts(handoff));
            }
            if !outgoing.posted.is_empty() {
                moves.push(Move::PrefillEndpointCopies(handoff));
            }
        }
        if !prefill.hashing.is_empty() {
            moves.push(Move::PrefillEndpointTakesDigests);
        }
        if prefill.link == Link::Broken {
            moves.push(Move::PrefillEndpointNoticesLoss);
        }
    }

    fn prefill(&mut self) -> &mut Prefill {
        self.prefill.as_mut().expect("the dead do not move")
    }

    pub(crate) fn prefill_moves_by(&mut self, step: Move) -> Checked {
        match step {
            Move::PrefillEngineHears => self.prefill_engine_hears(),
            Move::PrefillEngineStores(handoff) => return self.prefill_engine_stores(handoff),
            Move::PrefillEngineFinishes(handoff) => {
                self.prefill().work.remove(&handoff);
                self.prefill().orders.push_back((handoff, Order::Finish));
            }
            Move::PrefillEngineGivesUp(handoff) => self.prefill_engine_gives_up(handoff),
            Move::PrefillEngineStoresTooLate => {
                let (handoff, position, target) = self.prefill().late.take().expect("there is one");
                return self.store(handoff, position, target);
            }
            Move::PrefillEndpointObeys => self.prefill_endpoint_obeys(),
            Move::PrefillEndpointHears(index) => {
                let message = self.to_prefill.remove(index).expect("there is a message");
                self.prefill_endpoint_hears(message);
            }
            Move::PrefillEndpointPosts(handoff) => {
                let settles_early = self.config.planted == Some(Planted::SettleWhenPosted);
                let outgoing = self.prefill().outgoing.get_mut(&handoff).expect("just listed");
                let position = outgoing.unposted.pop_front().expect("just listed");
                outgoing.posted.push_back(position);
                if settles_early {
                    self.prefill_applies(handoff, SenderEvent::Settled { writes: 1 });
                }
            }
            Move::PrefillEndpointCopies(handoff) => return self.prefill_endpoint_copies(handoff),
            Move::PrefillEndpointTakesDigests => {
                let handoff = self.prefill().hashing.pop_front().expect("there is one");
                self.commit(handoff);
            }
            Move::PrefillEndpointNoticesLoss => self.prefill_endpoint_notices_loss(),
            other => unreachable!("{other:?} is nobody's"),
        }
        Ok(())
    }

    fn prefill_engine_hears(&mut self) {
        let (handoff, news) = self.prefill().news.pop_front().expect("there is news");
        match news {
            News::Reserved(targets) => {
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
        if self.config.wire == Wire::InPlace {
            return self.store(handoff, position, target);
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
        self.prefill().orders.push_back((handoff, Order::Abandon));
    }

    fn prefill_endpoint_obeys(&mut self) {
        let (handoff, order) = self.prefill().orders.pop_front().expect("there is an order");
        match order {
            Order::Push(position) => {
                let Some(outgoing) = self.prefill().outgoing.get_mut(&handoff) else { return };
                if outgoing.sender.accepts_writes() {
                    outgoing.unposted.push_back(position);
                    self.prefill_applies(handoff, SenderEvent::Pushed { writes: 1 });
                }
            }
            Order::Finish => self.prefill_applies(handoff, SenderEvent::Finish { payload: vec![1] }),
            Order::Abandon => self.prefill_applies(handoff, SenderEvent::Abandon { reason: "r".into() }),
        }
    }

    fn prefill_endpoint_hears(&mut self, message: Message) {
        match message {
            Message::Reserve(reserve) => {
                let (handoff, targets) = (reserve.handoff, reserve.targets.clone());
                if self.prefill().ended.contains(&handoff) {
                    return;
                }
                let outgoing = Outgoing {
                    sender: Sender::new(handoff),
                    reserve,
                    unposted: VecDeque::new(),
                    posted: VecDeque::new(),
                };
                self.prefill().outgoing.insert(handoff, outgoing);
                self.prefill().news.push_back((handoff, News::Reserved(targets)));
            }
            Message::Cancel { handoff } if self.prefill().outgoing.contains_key(&handoff) => {
                self.prefill_applies(handoff, SenderEvent::Cancelled);
            }
            Message::Cancel { handoff } => {
                self.prefill().ended.insert(handoff);
                self.to_decode.push_back(Message::Quiet { handoff, reason: "unknown".into() });
            }
            Message::Adopted { handoff } => self.prefill_applies(handoff, SenderEvent::Adopted),
            Message::Refused { handoff, reason } => {
                self.prefill_applies(handoff, SenderEvent::Refused { reason });
            }
            other => panic!("not for the prefill side: {other:?}"),
        }
    }

    /// One posted write comes to its end: it lands, or is turned down by a receiver that looks, or by a broken way.
    fn prefill_endpoint_copies(&mut self, handoff: HandoffId) -> Checked {
        let settled_early = self.config.planted == Some(Planted::SettleWhenPosted);
        let is_admitted = self.config.wire == Wire::Admitted;
        let is_up = self.prefill().link == Link::Up;
        let outgoing = self.prefill().outgoing.get_mut(&handoff).expect("just listed");
        let position = outgoing.posted.pop_front().expect("just listed");
        let target = outgoing.reserve.targets[position];
        // Memory does not break with the connection; a socket does.
        let lands = if is_admitted { is_up && self.admits(handoff, target) } else { true };
        if lands {
            self.store(handoff, position, target)?;
        } else if is_up {
            self.prefill_applies(handoff, SenderEvent::Cancelled);
        }
        if !settled_early {
            self.prefill_applies(handoff, SenderEvent::Settled { writes: 1 });
        }
        self.forget_if_over(handoff);
        Ok(())
    }

    /// The driver may forget a sender at once; where writes settle early, some still wait to be made.
    fn forget_if_over(&mut self, handoff: HandoffId) {
        let is_over = |it: &Outgoing| {
            matches!(it.sender.state(), SenderState::Done | SenderState::Abandoned) && it.posted.is_empty()
        };
        if self.prefill().outgoing.get(&handoff).is_some_and(is_over) {
            self.prefill().outgoing.remove(&handoff);
        }
    }

    fn prefill_endpoint_notices_loss(&mut self) {
        self.prefill().link = Link::Down;
        for handoff in self.prefill().outgoing.keys().copied().collect::<Vec<_>>() {
            let outgoing = self.prefill().outgoing.get_mut(&handoff).expect("just listed");
            let severed = std::mem::take(&mut outgoing.posted).len() as u32;
            self.prefill_applies(handoff, SenderEvent::PeerLost { peer: "p".into(), reason: "r".into() });
            if 0 < severed {
                self.prefill_applies(handoff, SenderEvent::Settled { writes: severed });
            }
        }
    }

    fn commit(&mut self, handoff: HandoffId) {
        let in_place = self.config.wire == Wire::InPlace;
        let memory = self.memory.clone();
        let is_up = self.prefill().link == Link::Up;
        let Some(outgoing) = self.prefill().outgoing.get(&handoff) else { return };
        let Reserve { tokens, targets, .. } = outgoing.reserve.clone();
        let digest = |(position, target): (usize, &BlockRef)| {
            if in_place { memory[target.block.0 as usize] } else { content(handoff, position) }
        };
        let digests = targets.iter().enumerate().map(digest).collect();
        let commit = Commit { handoff, tokens, targets, digests, payload: vec![1], in_place };
        if is_up {
            self.to_decode.push_back(Message::Commit(commit));
        }
    }

    /// What the driver of the endpoint does with a sender.
    fn prefill_applies(&mut self, handoff: HandoffId, event: SenderEvent) {
        let in_place = self.config.wire == Wire::InPlace;
        let Some(outgoing) = self.prefill().outgoing.get_mut(&handoff) else { return };
        for action in outgoing.sender.apply(event) {
            match action {
                SenderAction::Send(message) => {
                    if self.prefill().link == Link::Up {
                        self.to_decode.push_back(message);
                    }
                }
                SenderAction::Commit { .. } if in_place => self.prefill().hashing.push_back(handoff),
                SenderAction::Commit { .. } => self.commit(handoff),
                SenderAction::DropUnposted => {
                    let Some(outgoing) = self.prefill().outgoing.get_mut(&handoff) else { return };
                    let writes = std::mem::take(&mut outgoing.unposted).len() as u32;
                    self.prefill_applies(handoff, SenderEvent::Settled { writes });
                }
                SenderAction::TellStop => self.prefill().news.push_back((handoff, News::CancelWanted)),
                SenderAction::TellDelivered | SenderAction::TellFailed(_) => {
                    self.prefill().ended.insert(handoff);
                    self.forget_if_over(handoff);
                }
            }
        }
    }
}
