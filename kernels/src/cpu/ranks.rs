//! Ranks: several CPUs of one process that compute one model together, each some of its heads and features, each with threads,
//! weights and buffers of its own.
//!
//! They meet where a row's features have to be summed over all of them. Sums are taken in the order of the ranks, whoever
//! comes first: with the same number of ranks, results have the same bits.

use super::{
    Cpu, CpuError, CpuOptions,
    pool::{Pool, SPINS, lock},
};
use crate::aligned::AlignedBuffer;
use std::{
    fmt, hint,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

/// CPUs that compute together, and a thread for each of them: the caller's for the first.
pub struct Ranks {
    pool: Pool,
    cpus: Vec<Arc<Cpu>>,
    exchange: Exchange,
}

/// One of them, while all are at work.
#[derive(Clone, Copy, Debug)]
pub struct Rank<'a> {
    index: usize,
    exchange: &'a Exchange,
}

/// Where ranks meet, and what they leave for one another.
struct Exchange {
    meeting: Meeting,
    /// What each rank has computed of a sum.
    partials: Vec<RwLock<Numbers>>,
    /// The part of the sum that each rank has taken.
    sums: Vec<RwLock<Numbers>>,
}

/// Some numbers, in memory for more.
struct Numbers {
    memory: AlignedBuffer,
    len: usize,
}

/// A place where each rank waits for all others. May be used again at once.
struct Meeting {
    ranks: usize,
    arrived: AtomicUsize,
    /// Rises when all have arrived; what anybody did before happens before what anybody does after.
    round: AtomicUsize,
    failed: AtomicBool,
    asleep: Mutex<()>,
    wake: Condvar,
}

/// Tells the others when a rank ends by a panic: they would wait for ever.
struct Alarm<'a>(&'a Meeting);

impl Ranks {
    /// Starts a CPU for each of the `options`, the first of which are the caller's.
    ///
    /// # Errors
    ///
    /// As for [`Cpu::new`].
    ///
    /// # Panics
    ///
    /// Without options.
    pub fn new(options: &[CpuOptions]) -> Result<Self, CpuError> {
        let cpus = options.iter().map(|options| Cpu::new(options.clone()).map(Arc::new));
        let cpus = cpus.collect::<Result<Vec<_>, _>>()?;
        let first_cores: Vec<usize> =
            options.iter().filter_map(|options| options.cores.first().copied()).collect();
        let cores = if first_cores.len() == options.len() { &first_cores[..] } else { &[] };
        let pool = Pool::named("rank", cpus.len(), cores)?;
        let numbers = || (0..cpus.len()).map(|_| RwLock::new(Numbers::new())).collect();
        let exchange = Exchange { meeting: Meeting::new(cpus.len()), partials: numbers(), sums: numbers() };
        Ok(Self { pool, cpus, exchange })
    }

    /// What each of them computes on, in their order.
    pub fn cpus(&self) -> &[Arc<Cpu>] {
        &self.cpus
    }

    /// One line for logs and banners: "cpu avx512-bf16, 2 ranks of 4 threads".
    pub fn describe(&self) -> String {
        let threads: Vec<usize> = self.cpus.iter().map(|cpu| cpu.threads()).collect();
        let (least, most) = (threads.iter().min(), threads.iter().max());
        let each = match (least, most) {
            (Some(1), Some(1)) => "1 thread".to_owned(),
            (Some(least), Some(most)) if least == most => format!("{least} threads"),
            (least, most) => {
                format!("{} to {} threads", least.unwrap_or(&0), most.unwrap_or(&0))
            }
        };
        format!("cpu {}, {} ranks of {each}", self.cpus[0].isa(), self.cpus.len())
    }

    /// Grows the memory for sums of so many elements, which would otherwise grow in the first steps.
    pub fn reserve(&self, elements: usize) {
        let ranks = self.cpus.len();
        for partial in &self.exchange.partials {
            partial.write().unwrap_or_else(PoisonError::into_inner).of(elements);
        }
        for sum in &self.exchange.sums {
            sum.write()
                .unwrap_or_else(PoisonError::into_inner)
                .of(elements.div_ceil(ranks).next_multiple_of(LINE));
        }
    }

    /// Has all ranks work at once: the first on the calling thread, by `own`; the others on theirs.
    ///
    /// # Panics
    ///
    /// With a panic of one of them. After it they cannot work together any more.
    pub fn run<R>(&mut self, own: impl FnOnce(Rank<'_>) -> R, others: impl Fn(Rank<'_>) + Sync) -> R {
        let exchange = &self.exchange;
        self.pool.beside(|| exchange.work(0, own), |index| exchange.work(index, &others))
    }
}

impl Rank<'_> {
    /// Which one it is, from 0.
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Waits for all others: what any of them did before is seen by all after.
    ///
    /// # Panics
    ///
    /// When one of them has panicked.
    pub fn meet(&self) {
        self.exchange.meeting.wait();
    }

    /// `out += Σ partial`, over all ranks in their order, where `fill` writes this rank's partial, as long as `out`. All call it,
    /// with equally many elements.
    ///
    /// Each sums its share of the elements and then takes all shares: every partial is read once.
    ///
    /// # Panics
    ///
    /// When lengths differ, or another rank has panicked.
    pub fn add_sum(&self, cpu: &Cpu, out: &mut [f32], fill: impl FnOnce(&mut [f32])) {
        let Exchange { meeting, partials, sums } = self.exchange;
        let elements = out.len();
        fill(write(&partials[self.index]).of(elements));
        meeting.wait();
        {
            let share = self.exchange.share(self.index, elements);
            let mut sum = write(&sums[self.index]);
            let sum = sum.of(share.len());
            for (rank, partial) in partials.iter().enumerate() {
                let partial = partial.read().expect(NOT_ALONE);
                let partial = partial.all();
                assert_eq!(partial.len(), elements, "rank {rank} has a sum of as many elements");
                if rank == 0 {
                    sum.copy_from_slice(&partial[share.clone()]);
                } else {
                    cpu.add(sum, &partial[share.clone()]);
                }
            }
        }
        // Whoever comes here has read all partials; whoever comes to the next sum's first meeting has read all sums.
        meeting.wait();
        for (rank, sum) in sums.iter().enumerate() {
            let sum = sum.read().expect(NOT_ALONE);
            cpu.add(&mut out[self.exchange.share(rank, elements)], sum.all());
        }
    }
}

impl Exchange {
    fn work<R>(&self, index: usize, body: impl FnOnce(Rank<'_>) -> R) -> R {
        let _alarm = Alarm(&self.meeting);
        // From here on each rank has a thread of its own.
        self.meeting.wait();
        body(Rank { index, exchange: self })
    }

    /// Which elements of a sum a rank takes: whole cache lines.
    fn share(&self, rank: usize, elements: usize) -> Range<usize> {
        let each = elements.div_ceil(self.partials.len()).next_multiple_of(LINE);
        (rank * each).min(elements)..((rank + 1) * each).min(elements)
    }
}

impl Numbers {
    fn new() -> Self {
        Self { memory: AlignedBuffer::zeroed(0), len: 0 }
    }

    /// So many numbers, to write.
    fn of(&mut self, len: usize) -> &mut [f32] {
        self.len = len;
        self.memory.grown(len)
    }

    fn all(&self) -> &[f32] {
        &self.memory.as_slice()[..self.len]
    }
}

impl Meeting {
    fn new(ranks: usize) -> Self {
        Self {
            ranks,
            arrived: AtomicUsize::new(0),
            round: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    fn wait(&self) {
        // The round cannot rise before this rank has arrived.
        let round = self.round.load(Ordering::Relaxed);
        // Each arrival sees all before it, so the last one has seen what all ranks did; the round hands that on.
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.ranks {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round.wrapping_add(1), Ordering::Release);
            // Who goes to sleep looks at the round with the lock held: it sees this one, or sleeps before the lock is free.
            drop(lock(&self.asleep));
            self.wake.notify_all();
        } else if !self.spin(round) {
            let mut asleep = lock(&self.asleep);
            while !self.is_over(round) {
                asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
            }
        }
        assert!(!self.failed.load(Ordering::Acquire), "another rank has failed");
    }

    fn spin(&self, round: usize) -> bool {
        for _ in 0..SPINS {
            if self.is_over(round) {
                return true;
            }
            hint::spin_loop();
        }
        false
    }

    fn is_over(&self, round: usize) -> bool {
        self.round.load(Ordering::Acquire) != round || self.failed.load(Ordering::Acquire)
    }
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.failed.store(true, Ordering::Release);
            drop(lock(&self.0.asleep));
            self.0.wake.notify_all();
        }
    }
}

impl fmt::Debug for Ranks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Ranks({})", self.describe())
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Exchange({} ranks)", self.partials.len())
    }
}

fn write(numbers: &RwLock<Numbers>) -> std::sync::RwLockWriteGuard<'_, Numbers> {
    numbers.write().expect(NOT_ALONE)
}

/// Numbers of a cache line.
const LINE: usize = 16;

/// Why a lock may be poisoned: its owner has panicked, and then all do.
const NOT_ALONE: &str = "no rank has failed";

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn ranks(count: usize) -> Ranks {
        let options = CpuOptions { threads: Some(1), ..CpuOptions::default() };
        Ranks::new(&vec![options; count]).unwrap()
    }

    /// What a rank adds: numbers whose sum depends on the order.
    fn partial(rank: usize, element: usize) -> f32 {
        [1.0e8, 1.0, -1.0e8, 0.37][rank % 4] * (1.0 + element as f32 / 64.0)
    }

    #[test]
    fn sums_are_taken_in_the_order_of_ranks() {
        for count in [1, 2, 3, 4, 8] {
            let mut ranks = ranks(count);
            for elements in [0, 1, 15, 16, 100, 5000, 3] {
                ranks.reserve(elements / 2);
                let outs: Vec<Mutex<Vec<f32>>> =
                    (0..count).map(|_| Mutex::new(vec![0.5; elements])).collect();
                let cpus = ranks.cpus().to_vec();
                let add = |rank: Rank<'_>| {
                    let index = rank.index();
                    let out = &mut *lock(&outs[index]);
                    // Twice, so that one sum follows another at once.
                    for _ in 0..2 {
                        rank.add_sum(&cpus[index], out, |numbers| {
                            for (element, number) in numbers.iter_mut().enumerate() {
                                *number = partial(index, element);
                            }
                        });
                    }
                };
                ranks.run(add, add);
                let expected: Vec<f32> = (0..elements)
                    .map(|element| {
                        let sum =
                            (1..count).fold(partial(0, element), |sum, rank| sum + partial(rank, element));
                        0.5 + sum + sum
                    })
                    .collect();
                for out in outs {
                    assert_eq!(out.into_inner().unwrap(), expected, "{count} ranks, {elements} elements");
                }
            }
        }
    }

    #[test]
    fn what_was_done_before_a_meeting_is_seen_after_it() {
        let mut ranks = ranks(4);
        let counts: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
        let work = |rank: Rank<'_>| {
            for round in 1..=500 {
                counts[rank.index()].store(round, Ordering::Relaxed);
                rank.meet();
                for count in &counts {
                    assert_eq!(count.load(Ordering::Relaxed), round);
                }
                rank.meet();
            }
        };
        ranks.run(work, work);
    }

    #[test]
    fn nobody_waits_for_a_rank_that_has_failed() {
        for bad in 0..3 {
            let mut ranks = ranks(3);
            let work = |rank: Rank<'_>| {
                rank.meet();
                assert!(rank.index() != bad, "this one fails");
                rank.meet();
            };
            let panic = catch_unwind(AssertUnwindSafe(|| ranks.run(work, work)));
            assert!(panic.is_err());
            let again = catch_unwind(AssertUnwindSafe(|| ranks.run(|rank| rank.meet(), |rank| rank.meet())));
            assert!(again.is_err(), "they cannot work together any more");
        }
    }

    #[test]
    fn ranks_say_what_they_are() {
        let isa = super::super::Isa::detect();
        assert_eq!(ranks(2).describe(), format!("cpu {isa}, 2 ranks of 1 thread"));
    }
}
