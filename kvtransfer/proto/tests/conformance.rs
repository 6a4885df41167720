//! The simulated wire keeps the contract that the real transports keep.

use std::cell::RefCell;
use std::rc::Rc;

use tidemill_kvtransfer_proto::reservation::{Reservation, ReservationEvent};
use tidemill_kvtransfer_proto::simulated_wire::{Faults, SimulatedMemory, SimulatedTransport};
use tidemill_kvtransfer_proto::transport::{ConformanceRig, RemoteRange, conformance, stamp};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};

struct Rig {
    transport: SimulatedTransport,
    memory: SimulatedMemory,
    sources: Vec<Rc<[u8]>>,
    patience: u32,
}

const BLOCK: usize = 100_000;
const BLOCKS: u32 = 30;

fn targets() -> Vec<BlockRef> {
    (0..BLOCKS).map(|it| BlockRef { block: BlockId(it), epoch: Epoch(u64::from(it) + 5) }).collect()
}

impl Rig {
    fn new(faults: Faults, seed: u64) -> Self {
        let memory: SimulatedMemory = Rc::new(RefCell::new(vec![0; BLOCK * BLOCKS as usize]));
        let mut reservation = Reservation::new(HandoffId(3), TokenCount(1), targets()).expect("distinct");
        reservation.apply(ReservationEvent::Announced);
        let admit = Box::new(move |range: &RemoteRange| {
            if range.handoff != HandoffId(3) {
                return Err(tidemill_kvtransfer_proto::transport::WriteFault::NotExpected);
            }
            reservation.admit(range, BLOCK)
        });
        let transport = SimulatedTransport::new(Rc::clone(&memory), faults, seed, admit);
        Self { transport, memory, sources: Vec::new(), patience: 1_000_000 }
    }
}

impl ConformanceRig for Rig {
    type Transport = SimulatedTransport;

    fn transport(&mut self) -> &mut SimulatedTransport {
        &mut self.transport
    }

    fn source(&mut self, bytes: &[u8]) -> Rc<[u8]> {
        let source: Rc<[u8]> = bytes.into();
        self.sources.push(Rc::clone(&source));
        source
    }

    fn sources_held(&self) -> usize {
        self.sources.iter().filter(|source| 1 < Rc::strong_count(source)).count()
    }

    fn arena_len(&self) -> usize {
        self.memory.borrow().len()
    }

    fn range(&self, offset: usize, len: usize) -> RemoteRange {
        let covered = &targets()[offset / BLOCK..=(offset + len - 1) / BLOCK];
        let (offset, len) = (offset as u64, u32::try_from(len).expect("short"));
        RemoteRange { handoff: HandoffId(3), offset, len, stamp: stamp(covered) }
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        self.memory.borrow()[offset..offset + len].to_vec()
    }

    fn admits(&self) -> bool {
        true
    }

    fn keep_waiting(&mut self) -> bool {
        self.patience -= 1;
        0 < self.patience
    }

    fn sever(&mut self) {
        self.transport.sever();
    }
}

#[test]
fn the_simulated_wire_conforms() {
    conformance(Rig::new(Faults::default(), 0));
    for seed in 0..4 {
        conformance(Rig::new(Faults { delay: 500, reorder: 500, ..Faults::default() }, seed));
    }
}
