//! What a worker's endpoint thread does: orders and messages go into the core, actions come out.

use std::time::Duration;

use tidemill_kvtransfer_proto::digest::granule_digest;
use tidemill_kvtransfer_proto::endpoint_core::{
    DigestOrder, EndpointAction, EndpointEvent, LinkId, QuietProof, ReserveOrder, TargetWrite,
};
use tidemill_kvtransfer_proto::error::TransferError;
use tidemill_kvtransfer_proto::transport::Completion;
use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId, Moment, TokenCount};

use super::Mischief;
use super::engine::EngineInput;
use super::model::Piece;
use super::process::{LEASE, OFFERS};
use super::wire::ConnId;
use super::world::{Event, Process, World};

/// An order of the engine.
#[derive(Debug)]
pub(super) enum Order {
    Reserve(ReserveOrder),
    Adopt(HandoffId),
    Refuse(HandoffId),
    Cancel(HandoffId),
    Expect(HandoffId, u64),
    Push(HandoffId, Vec<TargetWrite<Piece>>),
    Filled(HandoffId, TokenCount),
    Computed(HandoffId),
    Finish(HandoffId, Vec<u8>),
    Abandon(HandoffId),
}

impl World<'_> {
    pub(super) fn local_moment(&self, place: usize) -> Moment {
        Moment(Duration::from_micros(self.workers[place].local(self.now)))
    }

    /// The engine has an order; the endpoint thread takes it in its own time.
    pub(super) fn order(&mut self, process: Process, order: Order) {
        let Some(life) = self.life(process) else { return };
        life.orders.push_back(order);
        let delay = self.micros(1, 40);
        self.wake_endpoint(process, self.now + delay);
    }

    /// Where the endpoint thread has its turn later than it asked for, its process stood still.
    fn stood_still(&mut self, process: Process, asked_for: u64) {
        let worker = &self.workers[process.place];
        let lateness = worker.local(self.now).saturating_sub(worker.local(asked_for));
        let (now, local) = (self.local_moment(process.place), worker.local(self.now));
        let life = self.life(process).expect("it has a turn");
        life.core.stood_still(Duration::from_micros(lateness), now);
        for heard in life.last_delivery.values_mut() {
            *heard = (*heard + lateness).min(local);
        }
    }

    pub(super) fn wake_endpoint(&mut self, process: Process, at: u64) {
        let Some(life) = self.life(process) else { return };
        if life.endpoint_turn_at.is_none_or(|due| at < due) {
            life.endpoint_turn_at = Some(at);
            self.at(at, Event::EndpointTurn(process));
        }
    }

    /// A turn of the endpoint thread.
    pub(super) fn endpoint_turn(&mut self, process: Process) {
        let now = self.local_moment(process.place);
        let Some(life) = self.life(process) else { return };
        let asked_for = life.endpoint_turn_at.take();
        self.stood_still(process, asked_for.unwrap_or(self.now));
        while let Some(order) = self.life(process).and_then(|life| life.orders.pop_front()) {
            let core = &mut self.life(process).expect("just seen").core;
            match order {
                Order::Reserve(reserve) => core.reserve(reserve, now),
                Order::Adopt(handoff) => core.adopt(handoff),
                Order::Refuse(handoff) => core.refuse(handoff, "the request is gone".to_owned()),
                Order::Cancel(handoff) => core.cancel(handoff),
                Order::Expect(handoff, peer) => core.expect(handoff, peer, RESERVATION_LIMIT, now),
                Order::Push(handoff, writes) => core.push(handoff, writes, now),
                Order::Filled(handoff, tokens) => core.filled(handoff, tokens),
                Order::Computed(handoff) => core.computed(handoff, now),
                Order::Finish(handoff, payload) => core.finish(handoff, payload, now),
                Order::Abandon(handoff) => core.abandon(handoff, "given up".to_owned(), now),
            }
            self.act(process);
        }
        let forgets = self.plants(Mischief::ForgetReaper);
        let life = self.life(process).expect("it runs");
        for &peer in life.up.keys().filter(|_| forgets) {
            life.core.heard(peer, now);
        }
        life.core.tick(now);
        self.act(process);
        self.check_leases(process);
        self.check_copies(process);
        self.tend_peers(process);
        self.plan_endpoint_turn(process);
    }

    /// No link is up whose peer has been silent for longer than the lease, give or take a turn.
    pub(super) fn check_leases(&mut self, process: Process) {
        let local = self.workers[process.place].local(self.now);
        let Some(life) = self.life(process) else { return };
        for (peer, (_, _, link)) in &life.up {
            let silence = local - life.last_delivery[peer];
            assert!(
                silence <= LEASE + LEASE / 2,
                "{link:?} of worker {} outlives its lease: {silence} µs of silence",
                process.place
            );
        }
    }

    /// No copy waits for its reader for longer than it may, on a clock that may be slow, and until that reader's access has ended.
    fn check_copies(&mut self, process: Process) {
        let (now, most) = (self.now, OFFERS.as_micros() as u64 * 5 / 3);
        let Some(life) = self.life(process) else { return };
        if let Some((handoff, since)) = life.memory.longest_staged() {
            assert!(
                now - since <= most,
                "worker {} holds a copy for {handoff} for {} µs, though nobody reads it",
                process.place,
                now - since
            );
        }
    }

    pub(super) fn plan_endpoint_turn(&mut self, process: Process) {
        let worker = &self.workers[process.place];
        let Some(life) = worker.life.as_ref().filter(|it| it.instance == process.instance) else { return };
        let peers = life.peers.iter().filter_map(|(peer, it)| {
            let is_wanted = it.is_to_be_met || life.core.wants_link(*peer);
            it.contact.next_clock(life.up.contains_key(peer), is_wanted, Duration::ZERO)
        });
        let next = life.core.next_tick().into_iter().chain(peers).min();
        if let Some(at) = next {
            let at = u64::try_from(at.0.as_micros()).expect("a short schedule");
            let at = worker.global(at) + TICK_ROUNDING;
            self.wake_endpoint(process, at.max(self.now + 1));
        }
    }

    /// Carries out what the core says.
    pub(super) fn act(&mut self, process: Process) {
        while let Some(action) = self.life(process).and_then(|life| life.core.next_action()) {
            match action {
                EndpointAction::Send { peer, message } => {
                    if let Some((conn, side, _)) = self.link_of(process, peer) {
                        self.say(conn, side, message);
                    }
                }
                EndpointAction::Sever { peer, link, reason } => self.sever(process, peer, link, &reason),
                EndpointAction::TakeDigests(order) => {
                    let delay = self.micros(5, 100);
                    self.after(delay, Event::Digest { process, order });
                }
                EndpointAction::Tell(event) => self.tell(process, event),
                EndpointAction::Log { peer, handoff, what } => {
                    self.note(|| format!("worker {}: {peer:x} {handoff}: {what}", process.place));
                }
            }
        }
        let peers: Vec<u64> = self.life(process).map_or(Vec::new(), |it| it.up.keys().copied().collect());
        for peer in peers {
            self.post(process, peer);
            self.fetch(process, peer);
            if let Some((conn, side, _)) = self.link_of(process, peer) {
                self.check_credit(conn, 1 - side);
            }
        }
        self.plan_endpoint_turn(process);
    }

    pub(super) fn tell(&mut self, process: Process, event: EndpointEvent) {
        if let EndpointEvent::ReserveFailed { error: TransferError::BadCommit(fault), handoff } = &event {
            panic!("no correct peer commits what it has not written: {handoff} {fault}");
        }
        self.note(|| format!("worker {} hears from its endpoint: {}", process.place, short(&event)));
        self.tell_engine(process, EngineInput::Handoff(event));
    }

    pub(super) fn sever(&mut self, process: Process, peer: u64, link: LinkId, reason: &str) {
        let Some(life) = self.life(process) else { return };
        let Some(&(conn, side, current)) = life.up.get(&peer) else { return };
        if current != link {
            return;
        }
        life.up.remove(&peer);
        self.summary.links_lost += 1;
        self.note(|| format!("worker {} severs its link to {peer:x}: {reason}", process.place));
        let now = self.local_moment(process.place);
        if let Some(known) = self.life(process).and_then(|life| life.peers.get_mut(&peer)) {
            known.contact.link_lost(now);
        }
        let done = self.close(conn, side);
        self.life(process).expect("it runs").core.completed(&done, now);
        if self.conns[&conn].proof == QuietProof::AccessEnded {
            let delay = self.micros(100, 30_000);
            self.after(delay, Event::AccessEnded { process, conn, side, peer, link });
        }
    }

    pub(super) fn access_ended(
        &mut self,
        process: Process,
        conn: ConnId,
        side: usize,
        peer: u64,
        link: LinkId,
    ) {
        if self.life(process).is_none() {
            return;
        }
        self.end_access(conn, side);
        let now = self.local_moment(process.place);
        self.life(process).expect("just seen").core.access_ended(peer, link, now);
        self.act(process);
    }

    pub(super) fn process_gone(&mut self, process: Process, peer: u64) {
        let now = self.local_moment(process.place);
        if let Some(life) = self.life(process) {
            life.core.process_gone(peer, now);
            self.act(process);
        }
    }

    pub(super) fn completed(&mut self, process: Process, completion: Completion) {
        let now = self.local_moment(process.place);
        if let Some(life) = self.life(process) {
            life.core.completed(&[completion], now);
            self.act(process);
        }
    }

    pub(super) fn digest(&mut self, process: Process, order: &DigestOrder) {
        let Some(life) = self.workers[process.place].life.as_ref() else { return };
        if life.instance != process.instance || !life.core.wants_digests(order.handoff, order.ticket) {
            return;
        }
        let memory = match order.owner {
            None => Some(life.memory.clone()),
            Some(peer) => self.peer_memory(life, peer),
        };
        let Some(memory) = memory else { return };
        let digest = |(position, target): (usize, &BlockRef)| {
            let start = target.block.0 as usize * order.shape.block;
            (0..order.shape.block / order.shape.granule).fold(0u64, |sum, index| {
                let granule = order.shape.granule_of(order.handoff, order.first + position, index);
                let at = start + index * order.shape.granule;
                sum.wrapping_add(granule_digest(
                    order.coverage,
                    granule,
                    order.shape.granule,
                    |offset, to| {
                        memory.copy_out(at + offset, to);
                    },
                ))
            })
        };
        let digests = order.targets.iter().enumerate().map(digest).collect();
        let believes = self.plants(Mischief::SkipDigest) && order.owner.is_none();
        let life = self.life(process).expect("just seen");
        let claimed = life.claimed.remove(&(order.handoff, order.first));
        let digests = claimed.filter(|_| believes).unwrap_or(digests);
        life.core.digested(order.handoff, order.ticket, digests);
        self.act(process);
    }
}

fn short(event: &EndpointEvent) -> String {
    match event {
        EndpointEvent::Reserved(reserved) => format!("reserved {}", reserved.handoff),
        EndpointEvent::Delivered { handoff, .. } => format!("delivered {handoff}"),
        EndpointEvent::SendFailed { handoff, error } => format!("send failed {handoff}: {error}"),
        EndpointEvent::Fetched { handoff } => format!("fetched {handoff}"),
        EndpointEvent::CancelWanted { handoff } => format!("cancel wanted {handoff}"),
        EndpointEvent::Committed { handoff, .. } => format!("committed {handoff}"),
        EndpointEvent::ReserveFailed { handoff, error } => format!("reserve failed {handoff}: {error}"),
        EndpointEvent::Released { handoff } => format!("released {handoff}"),
        EndpointEvent::PeerDown { name, reason, .. } => format!("{name} is down: {reason}"),
    }
}

/// Clocks are slept to the millisecond.
const TICK_ROUNDING: u64 = 1_000;
/// Ten minutes in production; a schedule has not the patience.
const RESERVATION_LIMIT: Duration = Duration::from_secs(5);
