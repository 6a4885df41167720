//! The decode worker: an engine with a pool of blocks, and an endpoint with reservations.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::error::CommitFault;
use tidemill_kvtransfer_proto::message::{Message, Reserve};
use tidemill_kvtransfer_proto::reservation::{
    Reservation, ReservationAction, ReservationEvent, ReservationState,
};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};

use crate::world::{BLOCK, Checked, Config, Link, Move, Planted, Wire, World};

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
    reservations: BTreeMap<HandoffId, Reservation>,
    /// Announcements that wait for a connection.
    unannounced: BTreeSet<HandoffId>,
    verifying: VecDeque<(HandoffId, Vec<u64>)>,
    pub(crate) link: Link,
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
            reservations: BTreeMap::new(),
            unannounced: BTreeSet::new(),
            verifying: VecDeque::new(),
            link: Link::Up,
        }
    }

    /// Every handoff was begun and has ended, and every block is back.
    pub(crate) fn is_over(&self) -> bool {
        self.begun == self.handoffs
            && self.owners.iter().all(Option::is_none)
            && self.reservations.is_empty()
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
        if !decode.verifying.is_empty() {
            moves.push(Move::DecodeEndpointVerifies);
        }
        if decode.link == Link::Broken {
            moves.push(Move::DecodeEndpointNoticesLoss);
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
                self.decode_endpoint_obeys(handoff, order)?;
            }
            Move::DecodeEndpointHears(index) => {
                let message = self.to_decode.remove(index).expect("there is a message");
                self.decode_endpoint_hears(message)?;
            }
            Move::DecodeEndpointVerifies => self.decode_endpoint_verifies()?,
            Move::DecodeEndpointNoticesLoss => self.decode_endpoint_notices_loss()?,
            _ => return Ok(false),
        }
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

    fn decode_endpoint_obeys(&mut self, handoff: HandoffId, order: Order) -> Checked {
        match order {
            Order::Reserve(targets) => {
                let tokens = TokenCount(16 * targets.len() as u32);
                let reservation = Reservation::new(handoff, tokens, targets).expect("distinct blocks");
                self.decode.reservations.insert(handoff, reservation);
                if self.decode.link == Link::Up {
                    return self.announce(handoff);
                }
                self.decode.unannounced.insert(handoff);
                let is_gone = self.prefill.is_none() && self.decode.link == Link::Down;
                if is_gone { self.decode_applies(handoff, lost()) } else { Ok(()) }
            }
            Order::Cancel => self.decode_applies(handoff, ReservationEvent::Cancel),
            Order::Adopt => self.decode_applies(handoff, ReservationEvent::Adopt),
            Order::Refuse => self.decode_applies(handoff, ReservationEvent::Refuse { reason: "r".into() }),
        }
    }

    fn announce(&mut self, handoff: HandoffId) -> Checked {
        let Some(reservation) = self.decode.reservations.get(&handoff) else { return Ok(()) };
        let (tokens, targets) = (reservation.tokens(), reservation.targets().to_vec());
        let (cached, coverage) = (Vec::new(), Coverage::Full);
        let reserve = Reserve { handoff, tokens, first_block: 0, cached, targets, coverage };
        self.to_prefill.push_back(Message::Reserve(reserve));
        self.decode_applies(handoff, ReservationEvent::Announced)
    }

    fn decode_endpoint_hears(&mut self, message: Message) -> Checked {
        match message {
            Message::Commit(commit) => self.decode_applies(commit.handoff, ReservationEvent::Commit(commit)),
            Message::Quiet { handoff, reason } => {
                self.decode_applies(handoff, ReservationEvent::Quiet { reason })
            }
            other => panic!("not for the decode side: {other:?}"),
        }
    }

    fn decode_endpoint_verifies(&mut self) -> Checked {
        let (handoff, expected) = self.decode.verifying.pop_front().expect("there is a commit");
        let Some(reservation) = self.decode.reservations.get(&handoff) else { return Ok(()) };
        let found = reservation.targets().iter().map(|target| self.memory[target.block.0 as usize]);
        let differs = found.zip(&expected).position(|(found, expected)| found != *expected);
        let outcome = differs.map_or(Ok(()), |index| Err(CommitFault::Digest { index }));
        self.decode_applies(handoff, ReservationEvent::Verified { outcome })
    }

    fn decode_endpoint_notices_loss(&mut self) -> Checked {
        self.decode.link = Link::Down;
        // The end of a process is proof; the end of a connection is none.
        let is_proof = self.prefill.is_none() || self.config.planted == Some(Planted::FreeOnLoss);
        for handoff in self.decode.reservations.keys().copied().collect::<Vec<_>>() {
            if self.decode.unannounced.contains(&handoff) && self.prefill.is_some() {
                continue; // It is announced when the peer is back.
            }
            self.decode_applies(handoff, lost())?;
            if is_proof {
                self.decode_applies(handoff, ReservationEvent::QuietProven)?;
            }
        }
        Ok(())
    }

    /// The peer is back, and touches nothing but the blocks of `busy`.
    pub(crate) fn decode_is_connected(&mut self, busy: &[HandoffId]) -> Checked {
        let asks = self.config.planted != Some(Planted::NobodyAsks);
        for handoff in self.decode.reservations.keys().copied().collect::<Vec<_>>() {
            if asks && !busy.contains(&handoff) {
                self.decode_applies(handoff, ReservationEvent::QuietProven)?;
            }
        }
        for handoff in std::mem::take(&mut self.decode.unannounced) {
            self.announce(handoff)?;
        }
        Ok(())
    }

    /// What the driver of the endpoint does with a reservation.
    fn decode_applies(&mut self, handoff: HandoffId, event: ReservationEvent) -> Checked {
        let is_cancel = event == ReservationEvent::Cancel;
        let Some(reservation) = self.decode.reservations.get_mut(&handoff) else { return Ok(()) };
        let mut actions = reservation.apply(event);
        let is_planted = is_cancel && self.config.planted == Some(Planted::FreeOnCancel);
        let is_quiet = self.config.wire == Wire::Admitted || is_planted;
        if is_quiet && reservation.state() == ReservationState::Quarantined {
            actions.extend(reservation.apply(ReservationEvent::QuietProven));
        }
        for action in actions {
            match action {
                ReservationAction::Send(message) if self.decode.link == Link::Up => {
                    self.to_prefill.push_back(message);
                }
                ReservationAction::Send(_) | ReservationAction::TellFailed(_) => {}
                ReservationAction::Verify(digests) => self.decode.verifying.push_back((handoff, digests)),
                ReservationAction::TellCommitted(_) => self.decode.news.push_back((handoff, News::Committed)),
                ReservationAction::TellReleased => {
                    self.decode.reservations.remove(&handoff);
                    self.decode.unannounced.remove(&handoff);
                    self.decode.news.push_back((handoff, News::Released));
                }
                ReservationAction::Forget => {
                    self.decode.reservations.remove(&handoff);
                }
            }
        }
        Ok(())
    }

    /// The receiver's look at a write, where it has one.
    pub(crate) fn admits(&self, handoff: HandoffId, target: BlockRef) -> bool {
        use tidemill_kvtransfer_proto::transport::{RemoteRange, stamp};
        let offset = u64::from(target.block.0) * BLOCK as u64;
        let range = RemoteRange { handoff, offset, len: BLOCK as u32, stamp: stamp(&[target]) };
        let reservation = self.decode.reservations.get(&handoff);
        self.config.planted == Some(Planted::AdmitEverything)
            || reservation.is_some_and(|it| it.admit(&range, BLOCK).is_ok())
    }
}

fn lost() -> ReservationEvent {
    ReservationEvent::PeerLost { peer: "p".into(), reason: "r".into() }
}
