//! Both sides of many handoffs at once over a wire that loses, doubles, delays and reorders, with engines that
//! cancel, refuse and abandon and connections that break, as a seed says.
//!
//! Three things are watched: no write lands in a block that was released; what is committed is exactly what its
//! own handoff wrote; in the end every block is back.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use tidemill_kvtransfer_proto::digest::{Coverage, Granule, Seal, granule_digest};
use tidemill_kvtransfer_proto::error::CommitFault;
use tidemill_kvtransfer_proto::message::{Commit, Message, Reserve};
use tidemill_kvtransfer_proto::reservation::{
    Reservation, ReservationAction, ReservationEvent, ReservationState,
};
use tidemill_kvtransfer_proto::sender::{Sender, SenderAction, SenderEvent};
use tidemill_kvtransfer_proto::simulated_wire::{Chance, Faults, Pipe, SimulatedMemory, SimulatedTransport};
use tidemill_kvtransfer_proto::transport::{Post, RemoteRange, Transport, WriteFault, WriteId, stamp};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};

const GRANULE: usize = 32;
const GRANULES: u32 = 3;
const BLOCK: usize = GRANULE * GRANULES as usize;
const BLOCKS: u32 = 24;

/// How the receiver's memory is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wire {
    /// Each write is admitted by the receiver, like TCP: closing the socket proves quiet.
    Admitted,
    /// Nobody looks, like shared memory: only the sender's word proves quiet.
    OneSided,
}

type Reservations = Rc<RefCell<BTreeMap<HandoffId, Reservation>>>;

struct Prefill {
    sender: Sender,
    reserve: Reserve,
    /// Granules that are still to be pushed, as (target, granule).
    left: Vec<(u32, u32)>,
    unposted: Vec<(u32, u32)>,
    digests: Vec<u64>,
    told_to_stop: bool,
}

struct World {
    wire: Wire,
    faults: Faults,
    chance: Chance,
    memory: SimulatedMemory,
    reservations: Reservations,
    prefills: BTreeMap<HandoffId, Prefill>,
    seen_by_prefill: BTreeSet<HandoffId>,
    to_prefill: Pipe<Message>,
    to_decode: Pipe<Message>,
    transport: SimulatedTransport,
    writes: BTreeMap<WriteId, HandoffId>,
    free: Vec<BlockRef>,
    next_handoff: u64,
    next_write: u64,
    committed: BTreeSet<HandoffId>,
    adopted: u32,
}

fn pattern(handoff: HandoffId, target: u32, granule: u32) -> [u8; GRANULE] {
    let mut chance = Chance::new(handoff.0 << 32 | u64::from(target) << 8 | u64::from(granule));
    std::array::from_fn(|_| chance.below(256) as u8)
}

impl World {
    fn new(wire: Wire, faults: Faults, seed: u64) -> Self {
        let memory: SimulatedMemory = Rc::new(RefCell::new(vec![0; BLOCK * BLOCKS as usize]));
        let reservations = Reservations::default();
        let transport = connect(wire, &memory, &reservations, faults, seed);
        Self {
            wire,
            faults,
            chance: Chance::new(seed),
            memory,
            reservations,
            prefills: BTreeMap::new(),
            seen_by_prefill: BTreeSet::new(),
            to_prefill: Pipe::new(faults),
            to_decode: Pipe::new(faults),
            transport,
            writes: BTreeMap::new(),
            free: (0..BLOCKS).map(|it| BlockRef { block: BlockId(it), epoch: Epoch(0) }).collect(),
            next_handoff: 1,
            next_write: 0,
            committed: BTreeSet::new(),
            adopted: 0,
        }
    }

    fn turn(&mut self) {
        match self.chance.below(20) {
            0 => self.reserve(),
            1..=6 => self.prefill_engine(),
            7..=10 => {
                if let Some(message) = self.to_prefill.receive(&mut self.chance) {
                    self.prefill_hears(message);
                }
            }
            11..=14 => {
                if let Some(message) = self.to_decode.receive(&mut self.chance) {
                    self.decode_hears(message);
                }
            }
            15..=17 => self.move_bytes(),
            18 => self.decode_engine(),
            _ if self.chance.happens(20) => self.break_connection(),
            _ => {}
        }
    }

    fn reserve(&mut self) {
        let count = 1 + self.chance.below(4);
        if self.free.len() < count {
            return;
        }
        let handoff = HandoffId(self.next_handoff);
        self.next_handoff += 1;
        let mut targets = Vec::new();
        for _ in 0..count {
            let mut target = self.free.swap_remove(self.chance.below(self.free.len()));
            target.epoch.0 += 1;
            targets.push(target);
        }
        let tokens = TokenCount(count as u32 * 16);
        let reservation = Reservation::new(handoff, tokens, targets.clone()).expect("distinct");
        self.reservations.borrow_mut().insert(handoff, reservation);
        let reserve =
            Reserve { handoff, tokens, first_block: 0, cached: vec![], targets, coverage: Coverage::Full };
        self.to_prefill.send(Message::Reserve(reserve), &mut self.chance);
        self.decode(handoff, ReservationEvent::Announced);
    }

    fn prefill_engine(&mut self) {
        let handoffs: Vec<HandoffId> = self.prefills.keys().copied().collect();
        if handoffs.is_empty() {
            return;
        }
        let handoff = handoffs[self.chance.below(handoffs.len())];
        let prefill = self.prefills.get_mut(&handoff).expect("just listed");
        if prefill.told_to_stop || self.chance.happens(10) {
            self.prefill(handoff, SenderEvent::Abandon { reason: "tired".into() });
        } else if prefill.left.is_empty() {
            self.prefill(handoff, SenderEvent::Finish { payload: handoff.0.to_le_bytes().to_vec() });
        } else if prefill.sender.accepts_writes() {
            let next = prefill.left.swap_remove(self.chance.below(prefill.left.len()));
            prefill.unposted.push(next);
            self.prefill(handoff, SenderEvent::Pushed { writes: 1 });
        }
    }

    fn move_bytes(&mut self) {
        for (&handoff, prefill) in &mut self.prefills {
            while let Some(&(target, granule)) = prefill.unposted.last() {
                let bytes = pattern(handoff, target, granule);
                let block = prefill.reserve.targets[target as usize];
                let offset = u64::from(block.block.0) * BLOCK as u64 + u64::from(granule) * GRANULE as u64;
                let range = RemoteRange { handoff, offset, len: GRANULE as u32, stamp: stamp(&[block]) };
                let id = WriteId(self.next_write);
                if self.transport.post_write(id, Rc::new(bytes), range) == Post::QueueFull {
                    break;
                }
                self.next_write += 1;
                self.writes.insert(id, handoff);
                prefill.unposted.pop();
                prefill.digests[target as usize] =
                    prefill.digests[target as usize].wrapping_add(digest(handoff, target, granule, &bytes));
            }
        }
        self.poll_transport();
    }

    fn poll_transport(&mut self) {
        let mut done = Vec::new();
        self.transport.poll(&mut done);
        for completion in done {
            let handoff = self.writes.remove(&completion.id).expect("completes once");
            if let Err(fault) = completion.outcome {
                self.prefill(handoff, SenderEvent::WriteFailed { reason: fault.to_string() });
            }
            self.prefill(handoff, SenderEvent::Settled { writes: 1 });
        }
    }

    fn decode_engine(&mut self) {
        if let Some(&handoff) = self.committed.first() {
            let event = match self.chance.below(4) {
                0 => ReservationEvent::Refuse { reason: "no".into() },
                1 => ReservationEvent::Cancel,
                _ => ReservationEvent::Adopt,
            };
            self.committed.remove(&handoff);
            return self.decode(handoff, event);
        }
        let handoffs: Vec<HandoffId> = self.reservations.borrow().keys().copied().collect();
        if !handoffs.is_empty() && self.chance.happens(150) {
            let handoff = handoffs[self.chance.below(handoffs.len())];
            self.decode(handoff, ReservationEvent::Cancel);
        }
    }

    fn prefill_hears(&mut self, message: Message) {
        match message {
            Message::Reserve(reserve) => {
                let handoff = reserve.handoff;
                if self.seen_by_prefill.insert(handoff) {
                    let left = (0..reserve.targets.len() as u32)
                        .flat_map(|target| (0..GRANULES).map(move |granule| (target, granule)))
                        .collect();
                    let prefill = Prefill {
                        sender: Sender::new(handoff),
                        left,
                        unposted: Vec::new(),
                        digests: vec![0; reserve.targets.len()],
                        reserve,
                        told_to_stop: false,
                    };
                    self.prefills.insert(handoff, prefill);
                }
            }
            Message::Cancel { handoff } if self.prefills.contains_key(&handoff) => {
                self.prefill(handoff, SenderEvent::Cancelled);
            }
            Message::Cancel { handoff } => {
                // Perhaps it overtook its `Reserve`, which must not start anything now.
                self.seen_by_prefill.insert(handoff);
                let reason = "unknown".to_owned();
                self.to_decode.send(Message::Quiet { handoff, reason }, &mut self.chance);
            }
            Message::Adopted { handoff } => self.prefill(handoff, SenderEvent::Adopted),
            Message::Refused { handoff, reason } => self.prefill(handoff, SenderEvent::Refused { reason }),
            other => panic!("not for the prefill side: {other:?}"),
        }
    }

    fn decode_hears(&mut self, message: Message) {
        match message {
            Message::Commit(commit) => self.decode(commit.handoff, ReservationEvent::Commit(commit)),
            Message::Quiet { handoff, reason } => self.decode(handoff, ReservationEvent::Quiet { reason }),
            other => panic!("not for the decode side: {other:?}"),
        }
    }

    fn prefill(&mut self, handoff: HandoffId, event: SenderEvent) {
        let Some(prefill) = self.prefills.get_mut(&handoff) else { return };
        for action in prefill.sender.apply(event) {
            let prefill = self.prefills.get_mut(&handoff).expect("forgotten last");
            match action {
                SenderAction::Send(message) => self.to_decode.send(message, &mut self.chance),
                SenderAction::Commit { payload } => {
                    let mut seal = Seal::new(handoff);
                    seal.add(&prefill.reserve.targets, &prefill.digests);
                    let commit = Commit {
                        handoff,
                        tokens: prefill.reserve.tokens,
                        first: 0,
                        targets: prefill.reserve.targets.clone(),
                        digests: prefill.digests.clone(),
                        seal: seal.value(),
                        payload,
                        in_place: false,
                    };
                    self.to_decode.send(Message::Commit(commit), &mut self.chance);
                }
                SenderAction::DropUnposted => {
                    let writes = std::mem::take(&mut prefill.unposted).len() as u32;
                    self.prefill(handoff, SenderEvent::Settled { writes });
                }
                SenderAction::TellStop => prefill.told_to_stop = true,
                SenderAction::TellDelivered | SenderAction::TellFailed(_) => {
                    assert!(!self.writes.values().any(|it| *it == handoff), "no write is left behind");
                    self.prefills.remove(&handoff);
                }
            }
        }
    }

    fn decode(&mut self, handoff: HandoffId, event: ReservationEvent) {
        let actions = match self.reservations.borrow_mut().get_mut(&handoff) {
            Some(reservation) => reservation.apply(event),
            None => return,
        };
        for action in actions {
            match action {
                ReservationAction::Send(message) => self.to_prefill.send(message, &mut self.chance),
                ReservationAction::Verify { digests, .. } => {
                    let outcome = self.verify(handoff, &digests);
                    let targets = digests.len();
                    self.decode(handoff, ReservationEvent::Verified { targets, outcome });
                }
                ReservationAction::TellCommitted(payload) => {
                    assert_eq!(payload, handoff.0.to_le_bytes());
                    self.assert_holds_own_bytes(handoff);
                    self.committed.insert(handoff);
                }
                ReservationAction::TellFailed(_) => {}
                ReservationAction::TellReleased => self.take_back(handoff),
                ReservationAction::Forget => {
                    self.assert_holds_own_bytes(handoff);
                    self.adopted += 1;
                    self.take_back(handoff); // The engine is done with them at once.
                }
            }
        }
    }

    fn take_back(&mut self, handoff: HandoffId) {
        let reservation = self.reservations.borrow_mut().remove(&handoff).expect("released once");
        self.free.extend(reservation.targets());
    }

    fn verify(&self, handoff: HandoffId, digests: &[u64]) -> Result<(), CommitFault> {
        let reservations = self.reservations.borrow();
        for (index, target) in reservations[&handoff].targets().iter().enumerate() {
            let mut sum = 0u64;
            for granule in 0..GRANULES {
                let start = target.block.0 as usize * BLOCK + granule as usize * GRANULE;
                let bytes = &self.memory.borrow()[start..start + GRANULE];
                sum = sum.wrapping_add(digest(handoff, index as u32, granule, bytes));
            }
            if digests[index] != sum {
                return Err(CommitFault::Digest { index });
            }
        }
        Ok(())
    }

    fn assert_holds_own_bytes(&self, handoff: HandoffId) {
        for (index, target) in self.reservations.borrow()[&handoff].targets().iter().enumerate() {
            for granule in 0..GRANULES {
                let start = target.block.0 as usize * BLOCK + granule as usize * GRANULE;
                let bytes = &self.memory.borrow()[start..start + GRANULE];
                assert_eq!(bytes, pattern(handoff, index as u32, granule), "{handoff}: a foreign byte");
            }
        }
    }

    /// Both sides notice, the prefill side connects again and says what it is still busy with.
    fn break_connection(&mut self) {
        self.to_prefill.clear();
        self.to_decode.clear();
        self.transport.sever();
        let lost = || ("peer".to_owned(), "reset".to_owned());
        for handoff in self.reservations() {
            let (peer, reason) = lost();
            self.decode(handoff, ReservationEvent::PeerLost { peer, reason });
        }
        while !self.writes.is_empty() {
            self.poll_transport();
        }
        for handoff in self.prefills.keys().copied().collect::<Vec<_>>() {
            let (peer, reason) = lost();
            self.prefill(handoff, SenderEvent::PeerLost { peer, reason });
        }
        self.to_decode.clear();
        self.to_prefill.clear();
        let seed = self.chance.number();
        self.transport = connect(self.wire, &self.memory, &self.reservations, self.faults, seed);
        for handoff in self.reservations() {
            let busy = self.prefills.get(&handoff).is_some_and(|it| it.sender.is_busy());
            if self.wire == Wire::Admitted || !busy {
                self.decode(handoff, ReservationEvent::QuietProven);
            }
        }
    }

    fn reservations(&self) -> Vec<HandoffId> {
        self.reservations.borrow().keys().copied().collect()
    }

    /// The prefill worker dies; what the decode engine holds it uses up.
    fn end(&mut self) {
        self.break_connection();
        self.prefills.clear();
        self.writes.clear();
        for handoff in self.reservations() {
            self.decode(handoff, ReservationEvent::QuietProven);
            self.decode(handoff, ReservationEvent::Refuse { reason: "over".into() });
        }
    }
}

fn digest(handoff: HandoffId, target: u32, index: u32, bytes: &[u8]) -> u64 {
    granule_digest(Coverage::Full, Granule { handoff, target, index }, bytes.len(), |offset, buffer| {
        buffer.copy_from_slice(&bytes[offset..offset + buffer.len()]);
    })
}

fn connect(
    wire: Wire,
    memory: &SimulatedMemory,
    reservations: &Reservations,
    faults: Faults,
    seed: u64,
) -> SimulatedTransport {
    let reservations = Rc::clone(reservations);
    let admit = Box::new(move |range: &RemoteRange| {
        let reservations = reservations.borrow();
        let reservation = reservations.get(&range.handoff);
        match wire {
            Wire::Admitted => reservation.ok_or(WriteFault::NotExpected)?.admit(range, BLOCK),
            Wire::OneSided => {
                let state = reservation.map(Reservation::state);
                assert!(
                    matches!(state, Some(ReservationState::Filling | ReservationState::Quarantined)),
                    "handoff {} writes while its reservation is {state:?}",
                    range.handoff
                );
                Ok(())
            }
        }
    });
    SimulatedTransport::new(Rc::clone(memory), faults, seed, admit)
}

fn run(wire: Wire, faults: Faults, seed: u64) -> u32 {
    let mut world = World::new(wire, faults, seed);
    for _ in 0..3000 {
        world.turn();
    }
    world.end();
    assert_eq!(world.free.len(), BLOCKS as usize, "every block is back");
    world.adopted
}

#[test]
fn no_schedule_leaks_or_mixes() {
    let calm = Faults { delay: 300, ..Faults::default() };
    let wild = Faults { delay: 300, reorder: 200, duplicate: 100, lose: 30 };
    for wire in [Wire::Admitted, Wire::OneSided] {
        for faults in [calm, wild] {
            let adopted: u32 = (0..40)
                .map(|seed| {
                    // The seed shows up in the output of the run that fails.
                    println!("{wire:?} {faults:?} seed {seed}");
                    run(wire, faults, seed)
                })
                .sum();
            assert!(40 < adopted, "schedules get somewhere: {adopted} adopted over {wire:?}, {faults:?}");
        }
    }
}
