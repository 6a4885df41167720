//! A graph: operations, and the memory that was there when they were recorded.

use super::{
    memory::{AllocationId, Memory},
    operation::{Operation, Room},
};
use crate::cuda::Launch;

#[derive(Clone, Debug, Default)]
pub(super) struct Recording {
    pub(super) operations: Vec<Operation>,
    /// For each operation, what it used.
    used: Vec<Vec<(Room, AllocationId)>>,
}

impl Recording {
    pub(super) fn push(&mut self, operation: Operation, device: &Memory, pinned: &Memory) {
        self.used.push(used(&operation, device, pinned));
        self.operations.push(operation);
    }

    /// Launches among the operations.
    pub(super) fn launches(&self) -> usize {
        self.operations.iter().filter(|it| matches!(it, Operation::Launch(_))).count()
    }

    /// Other parameters for the launch of a number.
    pub(super) fn update(&mut self, number: usize, launch: &Launch, device: &Memory) {
        let launches = self.launches();
        let mut all =
            self.operations.iter_mut().zip(&mut self.used).filter_map(|(operation, used)| match operation {
                Operation::Launch(launch) => Some((launch, used)),
                _ => None,
            });
        let found = all.nth(number);
        let (recorded, was_used) =
            found.unwrap_or_else(|| panic!("no launch {number} in a graph of {launches}"));
        assert!(
            recorded.kernel == launch.kernel && recorded.block == launch.block,
            "{launch:?} in the place of {recorded:?}"
        );
        *recorded = *launch;
        *was_used = pointed_to(launch, device);
    }

    /// Bytes that a device keeps for it.
    pub(super) fn bytes(&self) -> usize {
        BYTES + self.operations.len() * BYTES_EACH
    }

    /// # Panics
    ///
    /// When memory that an operation uses was given back.
    pub(super) fn check_memory(&self, device: &Memory, pinned: &Memory) {
        for (operation, used) in self.operations.iter().zip(&self.used) {
            for &(room, id) in used {
                let there = match room {
                    Room::Device => device.has(id),
                    Room::Pinned => pinned.has(id),
                };
                assert!(there, "replay of {operation:?}, whose memory was given back: {id:?}");
            }
        }
    }
}

fn pointed_to(launch: &Launch, device: &Memory) -> Vec<(Room, AllocationId)> {
    device.pointed_to(launch).into_iter().map(|id| (Room::Device, id)).collect()
}

fn used(operation: &Operation, device: &Memory, pinned: &Memory) -> Vec<(Room, AllocationId)> {
    if let Operation::Launch(launch) = operation {
        return pointed_to(launch, device);
    }
    let id_of = |room, memory| match room {
        Room::Device => (room, device.id_of(memory, operation.name())),
        Room::Pinned => (room, pinned.id_of(memory, operation.name())),
    };
    operation.memory().iter().map(|named| id_of(named.room, &named.memory)).collect()
}

/// What a graph takes in the fake: some, so that whoever counts memory counts it too.
const BYTES: usize = 4096;
const BYTES_EACH: usize = 256;
