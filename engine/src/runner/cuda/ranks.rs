//! Several GPUs that compute one model together (`docs/decisions/0020`, `0023`): the first rank's runner, which an engine has, and
//! a thread for each other one, which is asked for the same.
//!
//! A rank is asked by its own thread, since what is asked of one may wait for the others. The first rank's thread hands a step over,
//! asks its own device, and goes on when all have asked theirs: nobody waits for a device. Where it waits for the outcome of a step,
//! the others wait for theirs, so that a device that fails is heard of while others wait for what it should have sent.

use std::any::Any;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use tidemill_kernels::cuda::hopper::BlockRange;
use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver, Queue};

use super::group::{Group, Seat};
use super::{Batch, Carried, CudaRunner, RowTask, RunnerLimits, Tasks};
use crate::memory::Asked;
use crate::models::{Model, ModelSpec};
use crate::runner::{BatchSequence, LogitsWanted};
use crate::weights::DeviceWeights;

/// One of them.
#[derive(Debug)]
pub struct CudaRank {
    /// Its device.
    pub driver: Arc<dyn Driver>,
    /// Its part of the model.
    pub model: Arc<Model<DeviceWeights>>,
    /// Its blocks, those of its heads: as far from each other as the first rank's.
    pub blocks: BlockRange,
}

/// All of them, before they begin.
#[derive(Debug)]
pub struct CudaRanks<'a> {
    /// The whole model's shape.
    pub spec: &'a ModelSpec,
    /// In their order.
    pub ranks: Vec<CudaRank>,
    /// What a step may ask for.
    pub limits: RunnerLimits,
    /// As for [`CudaRunner::new`].
    pub graph_sizes: &'a [usize],
    /// As for [`CudaRunner::set_library_rows`].
    pub library_rows: Option<usize>,
    /// Told how far each is asked.
    pub asked: Arc<Asked>,
}

/// The threads of the other ranks, as the first one has them.
#[derive(Debug)]
pub(super) struct Others {
    orders: Vec<Sender<Order>>,
    answers: Receiver<Answer>,
    group: Arc<Group>,
}

/// Waits for their ends when dropped; by then nobody orders anything.
#[derive(Debug)]
pub(super) struct Threads(Vec<JoinHandle<()>>);

/// What the others are asked for.
#[derive(Clone, Debug)]
enum Order {
    Step(Arc<Step>),
    /// Logits of some wanted rows of a step, and what is made of them.
    Make(usize, Range<usize>),
    /// To wait for the end of a step. The only one without an answer.
    Await(usize),
}

/// Whether the device was asked; if not, the group knows why. A panic goes on in the first rank's thread.
type Answer = Result<(), Box<dyn Any + Send>>;

/// A step as it is handed over: a [`Batch`], whose blocks are so many bytes from the first one.
#[derive(Debug, Default)]
pub(super) struct Step {
    tokens: Vec<u32>,
    blocks: Vec<u64>,
    sequences: Vec<StepSequence>,
    /// In the order of wanted rows.
    tasks: Vec<Option<RowTask>>,
    carried: Vec<Option<usize>>,
}

#[derive(Debug)]
struct StepSequence {
    tokens: Range<usize>,
    blocks: Range<usize>,
    first_position: u32,
    logits: LogitsWanted,
}

/// Tells the others when the first rank's thread ends by a panic.
struct Alarm<'a>(&'a Group);

impl CudaRanks<'_> {
    /// Takes the places in a group, makes every buffer, and starts the threads.
    ///
    /// # Errors
    ///
    /// A device has less memory, or there is nothing to exchange numbers by.
    ///
    /// # Panics
    ///
    /// As [`CudaRunner::new`], and with fewer than two ranks.
    pub fn start(self) -> Result<CudaRunner, CudaError> {
        let Self { spec, ranks, limits, graph_sizes, library_rows, asked } = self;
        assert!(1 < ranks.len(), "several ranks");
        let drivers: Vec<_> = ranks.iter().map(|rank| Arc::clone(&rank.driver)).collect();
        let group = Group::join(&drivers, &asked)?;
        let make = |(place, CudaRank { driver, model, blocks })| {
            let seat = Seat::new(place, spec, &model, limits)?;
            let mut runner = CudaRunner::new(model, driver, blocks.shape, limits, graph_sizes)?;
            runner.set_blocks(blocks);
            runner.set_library_rows(library_rows);
            runner.seat = Some(seat);
            Ok(runner)
        };
        let mut runners = Vec::with_capacity(ranks.len());
        // Given back, those of ranks that cannot be made, when the group is abandoned: no rank waits for another one then.
        let places = group.places();
        for (rank, parts) in places.iter().map(Arc::clone).zip(ranks).enumerate() {
            let made = make(parts).inspect_err(|error: &CudaError| group.fail(rank, error.clone()));
            runners.push(made);
        }
        if let Some(failure) = group.failure() {
            return Err(failure);
        }
        let mut runners = runners.into_iter().flatten();
        let mut first = runners.next().expect("there are several");
        let (answer, answers) = channel();
        let mut orders = Vec::new();
        let mut threads = Vec::new();
        for (index, runner) in runners.enumerate() {
            let (order, ordered) = channel();
            let answer = answer.clone();
            let thread = thread::Builder::new()
                .name(format!("rank-{}", index + 1))
                .spawn(move || serve(runner, index, &ordered, &answer))
                .expect("a process that starts can have one more thread");
            orders.push(order);
            threads.push(thread);
        }
        first.others = Some(Others { orders, answers, group });
        first.threads = Threads(threads);
        Ok(first)
    }
}

/// The thread of another rank, until nobody orders anything any more.
fn serve(mut runner: CudaRunner, index: usize, orders: &Receiver<Order>, answers: &Sender<Answer>) {
    let group = Arc::clone(runner.seat.as_ref().expect("a rank among others").group());
    while let Ok(order) = orders.recv() {
        let is_answered = !matches!(order, Order::Await(_));
        let obeyed = match group.failure() {
            // The device is of no use any more.
            Some(_) => Ok(Ok(())),
            None => catch_unwind(AssertUnwindSafe(|| runner.obey(order, index, &group.asked))),
        };
        let answer = match obeyed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                group.fail(index + 1, error);
                Ok(())
            }
            Err(panic) => {
                group.fail(index + 1, CudaError::GroupAbandoned);
                Err(panic)
            }
        };
        if is_answered && answers.send(answer).is_err() {
            return;
        }
    }
}

impl CudaRunner {
    fn obey(&mut self, order: Order, index: usize, asked: &Asked) -> Result<(), CudaError> {
        match order {
            Order::Step(step) => {
                let own = self.blocks.as_ref().expect("a rank has blocks").first;
                let blocks: Vec<DeviceAddress> =
                    step.blocks.iter().map(|it| DeviceAddress(own.0 + it)).collect();
                let sequences: Vec<_> =
                    step.sequences.iter().map(|it| it.with(&step.tokens, &blocks)).collect();
                let next = Cell::new(0);
                let tasks = |_: usize, _: u32| step.tasks[next.replace(next.get() + 1)];
                let carried = |sequence: usize| step.carried[sequence];
                let mut after_layers = |layers: Range<usize>| asked.other(index, layers.end);
                let batch = Batch { sequences: &sequences };
                self.ask(&batch, &tasks, &carried, &mut after_layers).map(drop)
            }
            Order::Make(slot, rows) => {
                self.make_some(slot, rows)?;
                self.slots[slot].done = Some(self.driver.ticket(Queue::Compute)?);
                Ok(())
            }
            Order::Await(slot) => self.slots[slot].done.take().map_or(Ok(()), |done| self.driver.wait(done)),
        }
    }
}

impl Others {
    /// Has the others do what this rank does with `own`.
    ///
    /// # Panics
    ///
    /// With a panic of one of them.
    fn beside<T>(&self, order: &Order, own: impl FnOnce() -> Result<T, CudaError>) -> Result<T, CudaError> {
        self.tell(order);
        let outcome = {
            let _alarm = Alarm(&self.group);
            own()
        };
        if let Err(error) = &outcome {
            self.group.fail(0, error.clone());
        }
        for _ in &self.orders {
            let answer = self.answers.recv().expect("a rank answers as long as there are orders");
            answer.unwrap_or_else(|panic| resume_unwind(panic));
        }
        self.group.failure().map_or(outcome, Err)
    }

    /// A step of all ranks.
    pub(super) fn step<T>(
        &self,
        step: Step,
        after_layers: &mut dyn FnMut(Range<usize>),
        own: impl FnOnce(&mut dyn FnMut(Range<usize>)) -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        let asked = &self.group.asked;
        asked.begin();
        let mut after_layers = |layers: Range<usize>| {
            asked.first(layers.end);
            after_layers(layers);
        };
        self.beside(&Order::Step(Arc::new(step)), || own(&mut after_layers))
    }

    /// Logits of some rows of all ranks.
    pub(super) fn make(
        &self,
        slot: usize,
        rows: Range<usize>,
        own: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        self.beside(&Order::Make(slot, rows), own)
    }

    /// The end of a step, for which this rank waits with `own`.
    pub(super) fn wait(
        &self,
        slot: usize,
        own: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        self.tell(&Order::Await(slot));
        let waited = own();
        if let Err(error) = &waited {
            self.group.fail(0, error.clone());
        }
        // What a device that was left alone has is worth nothing, though it is done.
        self.group.failure().map_or(waited, Err)
    }

    fn tell(&self, order: &Order) {
        for rank in &self.orders {
            // One that ended by a panic has failed, which the group knows.
            let _ = rank.send(order.clone());
        }
    }
}

impl Step {
    /// `first` is where the blocks of the batch begin.
    pub(super) fn new(
        batch: &Batch<'_, DeviceAddress>,
        first: DeviceAddress,
        tasks: &Tasks<'_>,
        carried: &Carried<'_>,
    ) -> Self {
        let mut step = Self::default();
        for sequence in batch.sequences {
            let (tokens, blocks) = (step.tokens.len(), step.blocks.len());
            step.tokens.extend(sequence.tokens);
            step.blocks.extend(sequence.blocks.iter().map(|block| block.0 - first.0));
            step.sequences.push(StepSequence {
                tokens: tokens..step.tokens.len(),
                blocks: blocks..step.blocks.len(),
                first_position: sequence.first_position,
                logits: sequence.logits,
            });
        }
        let mut wanted = Vec::new();
        batch.fill_wanted(&mut wanted);
        step.tasks.extend(wanted.iter().map(|row| tasks(row.sequence, row.position)));
        step.carried.extend((0..batch.sequences.len()).map(carried));
        step
    }
}

impl StepSequence {
    fn with<'a>(&self, tokens: &'a [u32], blocks: &'a [DeviceAddress]) -> BatchSequence<'a, DeviceAddress> {
        BatchSequence {
            tokens: &tokens[self.tokens.clone()],
            first_position: self.first_position,
            blocks: &blocks[self.blocks.clone()],
            logits: self.logits,
        }
    }
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(0, CudaError::GroupAbandoned);
        }
    }
}

impl Threads {
    pub(super) const fn none() -> Self {
        Self(Vec::new())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        for thread in self.0.drain(..) {
            // Its panics were told when it was asked for something.
            drop(thread.join());
        }
    }
}
