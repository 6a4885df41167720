//! A wire that lives in memory and misbehaves as its seed says.
//!
//! It is stricter than any real wire in one respect, on purpose: control messages can be lost, doubled and
//! reordered, which TCP never does, so that the state machines are shown to be safe under anything.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;

use crate::transport::{Completion, Post, RemoteRange, Transport, WriteFault, WriteId};

/// A stream of numbers that its seed determines. Not for secrets.
#[derive(Clone, Debug)]
pub struct Chance(u64);

/// How often, in a thousand, a wire does what it should not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A message or write waits for a later turn.
    pub delay: u32,
    /// A later one overtakes it.
    pub reorder: u32,
    /// A message arrives twice.
    pub duplicate: u32,
    /// A message never arrives.
    pub lose: u32,
}

/// Carries values one way.
#[derive(Debug)]
pub struct Pipe<T> {
    queue: VecDeque<T>,
    faults: Faults,
}

/// The receiver's look at a write before it lands.
pub type Admit = Box<dyn FnMut(&RemoteRange) -> Result<(), WriteFault>>;

/// The receiver's memory.
pub type SimulatedMemory = Rc<RefCell<Vec<u8>>>;

/// Writes into a [`SimulatedMemory`], in whatever order chance has it.
pub struct SimulatedTransport {
    memory: SimulatedMemory,
    admit: Admit,
    queue: VecDeque<(WriteId, Rc<[u8]>, RemoteRange)>,
    faults: Faults,
    chance: Chance,
    severed: bool,
}

impl Chance {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number (SplitMix64; Steele, Lea, Flood, OOPSLA 2014).
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.number() % bound as u64).expect("less than a usize")
    }

    /// True `per_mille` times in a thousand.
    pub fn happens(&mut self, per_mille: u32) -> bool {
        self.below(1000) < per_mille as usize
    }
}

impl<T: Clone> Pipe<T> {
    /// An empty pipe.
    pub fn new(faults: Faults) -> Self {
        Self { queue: VecDeque::new(), faults }
    }

    /// Puts a value in, or loses or doubles it.
    pub fn send(&mut self, value: T, chance: &mut Chance) {
        if chance.happens(self.faults.lose) {
            return;
        }
        if chance.happens(self.faults.duplicate) {
            self.queue.push_back(value.clone());
        }
        self.queue.push_back(value);
    }

    /// Takes the next value out, unless it is delayed.
    pub fn receive(&mut self, chance: &mut Chance) -> Option<T> {
        if self.queue.is_empty() || chance.happens(self.faults.delay) {
            return None;
        }
        let index = if chance.happens(self.faults.reorder) { chance.below(self.queue.len()) } else { 0 };
        self.queue.remove(index)
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Loses everything that is under way.
    pub fn clear(&mut self) {
        self.queue.clear();
    }
}

impl SimulatedTransport {
    /// A wire into `memory`. `admit` is asked when a write is about to land, not when it is posted.
    pub fn new(memory: SimulatedMemory, faults: Faults, seed: u64, admit: Admit) -> Self {
        let queue = VecDeque::new();
        Self { memory, admit, queue, faults, chance: Chance::new(seed), severed: false }
    }

    /// Takes the receiver away.
    pub fn sever(&mut self) {
        self.severed = true;
    }

    fn land(&mut self, source: &[u8], target: &RemoteRange) -> Result<(), WriteFault> {
        if self.severed {
            return Err(WriteFault::Severed);
        }
        (self.admit)(target)?;
        let start = usize::try_from(target.offset).map_err(|_| WriteFault::Outside)?;
        let mut memory = self.memory.borrow_mut();
        let range = memory.get_mut(start..start + source.len()).ok_or(WriteFault::Outside)?;
        range.copy_from_slice(source);
        Ok(())
    }
}

impl Transport for SimulatedTransport {
    type Source = Rc<[u8]>;

    fn post_write(&mut self, id: WriteId, source: Self::Source, target: RemoteRange) -> Post {
        assert_eq!(source.len(), target.len as usize, "the whole of the source is written");
        if self.queue.len() == QUEUE {
            return Post::QueueFull;
        }
        self.queue.push_back((id, source, target));
        Post::Accepted
    }

    fn poll(&mut self, done: &mut Vec<Completion>) {
        while !self.queue.is_empty() {
            if self.chance.happens(self.faults.delay) {
                return;
            }
            let reorder = self.chance.happens(self.faults.reorder);
            let index = if reorder { self.chance.below(self.queue.len()) } else { 0 };
            let (id, source, target) = self.queue.remove(index).expect("below the length");
            let outcome = self.land(&source, &target);
            done.push(Completion { id, outcome });
        }
    }
}

impl fmt::Debug for SimulatedTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimulatedTransport({} queued)", self.queue.len())
    }
}

/// Writes that may be under way.
const QUEUE: usize = 64;
