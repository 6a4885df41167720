//! Groups of devices that are not there: their threads meet, and the last to come computes.

use super::{operation::Operation, product::rounded, state::State};
use crate::{
    cuda::{Collective, CudaError, GroupId, Member, Queue},
    matrix::{MatrixSource, WeightDtype},
    reference,
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Ranks that meet.
#[derive(Debug, Default)]
pub(super) struct Group {
    round: Mutex<Round>,
    changed: Condvar,
}

/// One meeting. It begins when all have left the one before.
#[derive(Debug, Default)]
struct Round {
    /// What each rank has brought along.
    brought: BTreeMap<u32, Brought>,
    /// What each may take, once all are there.
    outcome: Option<Result<Vec<u8>, String>>,
    taken: u32,
    /// Ranks that ever joined.
    joined: u32,
    is_abandoned: bool,
}

/// One rank's part. A rank that joins brings nothing along.
#[derive(Debug)]
struct Brought {
    what: Option<Collective>,
    ranks: u32,
    bytes: Vec<u8>,
}

/// All groups that somebody may still join, by the number in their id.
static GROUPS: Mutex<BTreeMap<u64, Arc<Group>>> = Mutex::new(BTreeMap::new());
/// No number comes twice.
static GROUPS_SO_FAR: AtomicU64 = AtomicU64::new(0);

impl Group {
    /// A new group's id.
    pub(super) fn create() -> GroupId {
        let number = GROUPS_SO_FAR.fetch_add(1, Ordering::Relaxed);
        lock(&GROUPS).insert(number, Arc::default());
        let mut id = [0; GroupId::BYTES];
        id[..8].copy_from_slice(&number.to_le_bytes());
        GroupId(id)
    }

    /// Waits until all ranks are there.
    ///
    /// # Panics
    ///
    /// When another one says otherwise about the group, or does not come.
    pub(super) fn join(id: &GroupId, rank: u32, ranks: u32) -> Result<Arc<Self>, CudaError> {
        assert!(rank < ranks, "rank {rank} of {ranks}");
        let number = u64::from_le_bytes(*id.0.first_chunk().expect("an id is longer"));
        let group = lock(&GROUPS).get(&number).cloned();
        let group =
            group.unwrap_or_else(|| panic!("rank {rank} joins a group that is not there, or no more"));
        {
            let mut round = lock(&group.round);
            round.joined += 1;
            assert!(round.joined <= ranks, "a group of {ranks} ranks, and one more joins it");
        }
        group.meet(rank, Brought { what: None, ranks, bytes: Vec::new() })?;
        lock(&GROUPS).remove(&number);
        Ok(group)
    }

    /// What a rank gets for what it brings along.
    ///
    /// # Panics
    ///
    /// When another one asks for something else, or does not come.
    pub(super) fn collect(
        &self,
        rank: u32,
        ranks: u32,
        what: Collective,
        bytes: Vec<u8>,
    ) -> Result<Vec<u8>, CudaError> {
        self.meet(rank, Brought { what: Some(what), ranks, bytes })
    }

    /// Whoever waits, or comes, hears that it is over.
    pub(super) fn abandon(&self) {
        lock(&self.round).is_abandoned = true;
        self.changed.notify_all();
    }

    fn meet(&self, rank: u32, brought: Brought) -> Result<Vec<u8>, CudaError> {
        let (ranks, name) = (brought.ranks, brought.what.as_ref().map_or("joining", Collective::name));
        let mut round = self.wait_until(rank, name, |round| round.outcome.is_none())?;
        if round.is_abandoned {
            return Err(CudaError::GroupAbandoned);
        }
        assert!(round.brought.insert(rank, brought).is_none(), "two ranks {rank} meet for {name}");
        if round.brought.len() == ranks as usize {
            round.outcome = Some(join_together(&round.brought));
            self.changed.notify_all();
        }
        drop(round);
        let mut round = self.wait_until(rank, name, |round| round.outcome.is_some())?;
        let outcome = round.outcome.clone().expect("just seen");
        round.taken += 1;
        if round.taken == ranks {
            (round.taken, round.outcome) = (0, None);
            round.brought.clear();
            self.changed.notify_all();
        }
        drop(round);
        Ok(outcome.unwrap_or_else(|wrong| panic!("{wrong}")))
    }

    fn wait_until(
        &self,
        rank: u32,
        name: &str,
        come: impl Fn(&Round) -> bool,
    ) -> Result<MutexGuard<'_, Round>, CudaError> {
        let waits = |round: &mut Round| !round.is_abandoned && !come(round);
        let waited = self.changed.wait_timeout_while(lock(&self.round), PATIENCE, waits);
        let (round, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        // Who has met has met, though one fails before all have left.
        if round.is_abandoned && !come(&round) {
            return Err(CudaError::GroupAbandoned);
        }
        assert!(!timeout.timed_out(), "rank {rank} waits for others in {name}, and they do not come");
        Ok(round)
    }
}

fn join_together(brought: &BTreeMap<u32, Brought>) -> Result<Vec<u8>, String> {
    let first = &brought[&0];
    for (rank, it) in brought {
        let same = match (&first.what, &it.what) {
            (None, None) => true,
            (Some(first), Some(it)) => alike(first, it),
            _ => false,
        };
        if !same || it.ranks != first.ranks {
            let ranks = (first.ranks, it.ranks);
            return Err(format!(
                "rank 0 asks for {:?}, and rank {rank} for {:?}, of {ranks:?}",
                first.what, it.what
            ));
        }
    }
    let parts = || brought.values().map(|it| it.bytes.as_slice());
    Ok(match first.what {
        None => Vec::new(),
        Some(Collective::Sum { dtype, .. }) => sum(parts(), dtype),
        Some(Collective::Gather { .. }) => parts().collect::<Vec<_>>().concat(),
        Some(Collective::Spread { .. }) => first.bytes.clone(),
    })
}

/// The same but for addresses.
fn alike(first: &Collective, other: &Collective) -> bool {
    let dtype = |it: &Collective| match it {
        Collective::Sum { dtype, .. } => Some(*dtype),
        _ => None,
    };
    (first.name(), first.bytes(), dtype(first)) == (other.name(), other.bytes(), dtype(other))
}

/// In f32, in the order of the ranks, rounded once.
fn sum<'a>(parts: impl Iterator<Item = &'a [u8]>, dtype: WeightDtype) -> Vec<u8> {
    let mut sum: Vec<f32> = Vec::new();
    for bytes in parts {
        let part = reference::widen_matrix(MatrixSource { bytes, dtype });
        if sum.is_empty() {
            sum = part;
        } else {
            reference::add(&mut sum, &part);
        }
    }
    rounded(&sum, dtype)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Panics are for wrong use; whoever looks for them goes on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A rank that has not come after this long does not come.
const PATIENCE: Duration = Duration::from_secs(20);

impl State {
    /// The group that a rank meets, and what it brings along. Until it has what it [takes](Self::take) away, others may ask the device,
    /// as they may while a GPU waits.
    pub(super) fn bring(&mut self, member: Member, collective: Collective) -> (Arc<Group>, Vec<u8>) {
        self.begin(Queue::Compute, Operation::Collect(member, collective));
        let bytes = collective.bytes() as u64;
        let from = match collective {
            Collective::Sum { address, .. } => Some(address),
            Collective::Gather { from, .. } => Some(from),
            Collective::Spread { address, .. } => (member.rank == 0).then_some(address),
        };
        let brought = from.map(|from| self.device.read(&(from.0..from.0 + bytes)));
        (self.group(member), brought.unwrap_or_default())
    }

    /// What a rank has from meeting others.
    pub(super) fn take(&mut self, member: Member, collective: Collective, outcome: &[u8]) {
        let to = match collective {
            Collective::Sum { address, .. } => address,
            Collective::Gather { to, .. } => to,
            Collective::Spread { .. } if member.rank == 0 => return,
            Collective::Spread { address, .. } => address,
        };
        self.device.set_written(&(to.0..to.0 + outcome.len() as u64));
        self.device.write(to.0, outcome);
    }

    pub(super) fn group(&self, member: Member) -> Arc<Group> {
        let group = self.members.get(&member.number);
        Arc::clone(group.unwrap_or_else(|| panic!("{member:?} is in no group")))
    }
}
