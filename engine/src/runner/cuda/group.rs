//! A rank among others: what they sum and gather, and how all hear of one that fails.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use tidemill_kernels::cuda::{Collective, CudaError, DeviceAddress, Driver, Join, Member, launches};

use super::CudaRunner;
use super::buffers::logits_rows;
use super::layers::narrow;
use crate::memory::{Asked, DeviceBuffer};
use crate::models::{Model, ModelSpec};
use crate::runner::RunnerLimits;
use crate::weights::{DeviceWeights, Shard};

/// What all ranks know of one another.
#[derive(Debug)]
pub(super) struct Group {
    /// By rank.
    members: Vec<(Arc<dyn Driver>, Member)>,
    pub(super) asked: Arc<Asked>,
    /// Why they cannot go on: what the first that failed said.
    failure: Mutex<Option<CudaError>>,
}

/// A rank's place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    group: Arc<Group>,
    rank: usize,
}

/// A rank's place, and what it takes to compute there. Dropped after the graphs that sum.
#[derive(Debug)]
pub(super) struct Seat {
    /// Tokens of the whole vocabulary, and those whose logits this rank computes.
    vocabulary: usize,
    own: Range<usize>,
    /// Of the rank that has most.
    most: usize,
    /// `[rows][hidden]` of the model's type: what is summed, and then added to the state.
    delta: DeviceBuffer,
    /// f32, `[rows][own tokens]`
    logits: DeviceBuffer,
    /// f32, `[ranks][rows][their tokens]`
    parts: DeviceBuffer,
    place: Arc<Place>,
}

impl Group {
    /// Takes the places of all ranks, whose devices these are.
    pub(super) fn join(drivers: &[Arc<dyn Driver>], asked: &Arc<Asked>) -> Result<Arc<Self>, CudaError> {
        let ranks = narrow(drivers.len());
        let id = drivers[0].new_group()?;
        // Each waits for the others.
        let joined: Vec<Result<Member, CudaError>> = std::thread::scope(|scope| {
            let join = |(driver, rank): (&Arc<dyn Driver>, u32)| {
                let driver = Arc::clone(driver);
                scope.spawn(move || driver.join(&id, rank, ranks))
            };
            let threads: Vec<_> = drivers.iter().zip(0..ranks).map(join).collect();
            threads
                .into_iter()
                .map(|it| it.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let mut members = Vec::with_capacity(drivers.len());
        let mut failure = None;
        for (driver, member) in drivers.iter().zip(joined) {
            match member {
                Ok(member) => members.push((Arc::clone(driver), member)),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        if let Some(error) = failure {
            for (driver, member) in members {
                driver.abandon(member);
                leave(&*driver, member);
            }
            return Err(error);
        }
        Ok(Arc::new(Self { members, asked: Arc::clone(asked), failure: Mutex::new(None) }))
    }

    /// All places, in the order of ranks.
    pub(super) fn places(self: &Arc<Self>) -> Vec<Arc<Place>> {
        (0..self.members.len()).map(|rank| Arc::new(Place { group: Arc::clone(self), rank })).collect()
    }

    /// A rank cannot go on: nobody waits for it any more.
    pub(super) fn fail(&self, rank: usize, error: CudaError) {
        {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            if failure.is_some() {
                return;
            }
            *failure = Some(CudaError::Rank { rank: narrow(rank), error: Box::new(error) });
        }
        self.asked.give_up();
        // Its own place first: whoever waits there hears of it, and lets others in.
        let (own, others) = (&self.members[rank], self.members.iter().enumerate());
        own.0.abandon(own.1);
        for (_, (driver, member)) in others.filter(|(index, _)| *index != rank) {
            driver.abandon(*member);
        }
    }

    /// Why they cannot go on, if they cannot.
    pub(super) fn failure(&self) -> Option<CudaError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Seat {
    pub(super) fn new(
        place: Arc<Place>,
        whole: &ModelSpec,
        model: &Model<DeviceWeights>,
        limits: RunnerLimits,
    ) -> Result<Self, CudaError> {
        let (driver, member) = place.member();
        let shard = Shard { rank: place.rank, ranks: member.ranks as usize };
        let most = Shard::all(shard.ranks).map(|it| it.vocabulary(whole).len()).max().unwrap_or(0);
        let logits_bytes = logits_rows(limits) * most * size_of::<f32>();
        Ok(Self {
            vocabulary: whole.vocab_size,
            own: shard.vocabulary(whole),
            most,
            delta: DeviceBuffer::new(driver, limits.max_tokens * whole.hidden_size * model.dtype.bytes())?,
            // As many bytes go over as the largest part has.
            logits: DeviceBuffer::zeroed(driver, logits_bytes)?,
            parts: DeviceBuffer::new(driver, shard.ranks * logits_bytes)?,
            place,
        })
    }

    pub(super) fn group(&self) -> &Arc<Group> {
        &self.place.group
    }

    /// Whether it is the rank whose thread is the engine's, which alone takes what a step comes to.
    pub(super) fn is_first(&self) -> bool {
        self.place.rank == 0
    }

    /// How many tokens' logits this rank computes.
    pub(super) const fn outputs(&self) -> usize {
        self.own.end - self.own.start
    }

    /// Where it puts them.
    pub(super) const fn logits(&self) -> DeviceAddress {
        self.logits.address()
    }

    fn collect(&self, collective: Collective) -> Result<(), CudaError> {
        let (driver, member) = self.place.member();
        driver.collect(*member, collective)
    }
}

impl Place {
    fn member(&self) -> &(Arc<dyn Driver>, Member) {
        &self.group.members[self.rank]
    }
}

impl CudaRunner {
    /// Where a product goes that is to be added to the state: what ranks have of it is summed first.
    pub(super) fn delta(&self) -> DeviceAddress {
        self.seat.as_ref().map_or(DeviceAddress::NULL, |seat| seat.delta.address())
    }

    /// Sums what ranks have of such a product.
    pub(super) fn sum_delta(&self, rows: usize) -> Result<(), CudaError> {
        let Some(seat) = &self.seat else { return Ok(()) };
        let elements = rows * self.model.spec.hidden_size;
        seat.collect(Collective::Sum { address: seat.delta.address(), elements, dtype: self.model.dtype })
    }

    /// Brings the logits of all ranks together, in each of them: each chooses the same tokens by them.
    pub(super) fn gather_logits(&self, rows: usize) -> Result<(), CudaError> {
        let Some(seat) = &self.seat else { return Ok(()) };
        let elements = rows * seat.most;
        let (to, from, bytes) = (seat.parts.address(), seat.logits.address(), elements * size_of::<f32>());
        seat.collect(Collective::Gather { to, from, bytes })?;
        let parameters = Join {
            out: self.buffers.logits.address(),
            parts: to,
            width: narrow(seat.vocabulary),
            ranks: narrow(seat.group().members.len()),
            stride: narrow(elements),
            reserved: 0,
        };
        self.launch(launches::join(narrow(rows), &parameters))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (driver, member) = self.member();
        leave(&**driver, *member);
    }
}

fn leave(driver: &dyn Driver, member: Member) {
    // What was abandoned may never end.
    if let Err(error) = driver.leave(member) {
        tracing::warn!(%error, rank = member.rank, "a place among GPUs is not given back");
    }
}
