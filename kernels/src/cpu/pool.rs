//! The threads that a step runs on: the caller and some workers.
//!
//! Work is handed out chunk by chunk, so that a thread which loses its core for a while leaves the rest to the others.
//! Each thread first takes neighbouring chunks from a share of its own: it reads weights as one stream, and the same ones
//! in every step. Between jobs a worker spins for some microseconds, since the operations of a step follow each other
//! closely, and then parks.

use super::{
    CpuError,
    gate::{Gate, Round},
};
use std::{
    any::Any,
    cell::UnsafeCell,
    fmt, hint, io,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

/// Runs chunks of work on the calling thread and on its own.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Which thread runs a chunk: 0 is the caller. Always below [`Pool::threads`].
pub(crate) type ThreadIndex = usize;

/// What the threads share.
struct Shared {
    gate: Gate,
    /// Written by the owner while the gate is closed and quiet, read by workers that are inside.
    job: UnsafeCell<Job>,
    /// One for each thread.
    shares: Box<[Share]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Whether the owner sleeps on `quiet`.
    owner_waits: Mutex<bool>,
    quiet: Condvar,
    stop: AtomicBool,
}

// SAFETY: all fields but `job` are `Sync`; `job` is passed from owner to workers by the gate, whose documentation has
// the order of its writes and reads.
unsafe impl Sync for Shared {}
// SAFETY: a `Job` is two pointers that are used only inside the gate, whatever thread drops them.
unsafe impl Send for Shared {}

/// The next chunk of those that one thread takes before others do, on a cache line (and the one that is fetched with it)
/// of its own.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
}

/// A borrowed `F: Fn(ThreadIndex, usize) + Sync` without its type and lifetime.
#[derive(Clone, Copy)]
struct Job {
    body: *const (),
    call: unsafe fn(*const (), ThreadIndex, usize),
    chunks: usize,
}

impl Pool {
    /// Starts `threads - 1` workers; worker `i` is pinned to `cores[i]` when there are cores.
    pub(crate) fn new(threads: usize, cores: &[usize]) -> Result<Self, CpuError> {
        Self::named("cpu", threads, cores)
    }

    /// The same; `name` is a part of what the system calls the workers.
    pub(crate) fn named(name: &str, threads: usize, cores: &[usize]) -> Result<Self, CpuError> {
        assert!(threads > 0, "the caller is the first thread");
        let shared = Arc::new(Shared {
            gate: Gate::new(),
            job: UnsafeCell::new(Job { body: ptr::null(), call: call::<fn(ThreadIndex, usize)>, chunks: 0 }),
            shares: (0..threads).map(|_| Share::default()).collect(),
            panic: Mutex::new(None),
            owner_waits: Mutex::new(false),
            quiet: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        // Dropped on an early return, which ends the threads started so far.
        let mut pool = Self { shared, workers: Vec::with_capacity(threads - 1) };
        for thread in 1..threads {
            let core = cores.get(thread).copied();
            let shared = Arc::clone(&pool.shared);
            let (started, start) = mpsc::channel();
            let worker = thread::Builder::new()
                .name(format!("tidemill-{name}-{thread}"))
                .spawn(move || {
                    let pinned = core.map_or(Ok(()), pin_current_thread);
                    let go = pinned.is_ok();
                    // The receiver waits below for exactly this message.
                    let _ = started.send(pinned);
                    if go {
                        work(&shared, thread);
                    }
                })
                .map_err(|source| CpuError::SpawnThread { thread, source })?;
            pool.workers.push(worker);
            start
                .recv()
                .expect("a worker reports before it does anything that can fail")
                .map_err(|source| CpuError::PinThread { core: core.unwrap_or_default(), source })?;
        }
        Ok(pool)
    }

    /// Number of threads, the caller included.
    pub(crate) const fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(thread, chunk)` once for each chunk in `0..chunks`, in any order, on several threads at once, and
    /// returns when all have run. A single chunk runs on the caller. Allocates nothing.
    ///
    /// # Panics
    ///
    /// With the first panic of `body`; chunks not yet begun are then left out.
    pub(crate) fn for_each<F: Fn(ThreadIndex, usize) + Sync>(&mut self, chunks: usize, body: F) {
        let helpers = self.workers.len().min(chunks.saturating_sub(1));
        if helpers == 0 {
            (0..chunks).for_each(|chunk| body(0, chunk));
            return;
        }
        self.run(helpers, chunks, &body, None::<fn()>);
    }

    /// Runs `own` on the calling thread and, beside it, `others(index)` once for each index of another thread. Each of them has
    /// a thread of its own as long as they wait for one another; one that has not begun when `own` ends may run on the caller.
    ///
    /// # Panics
    ///
    /// With the first panic of any of them; those not yet begun are then left out.
    pub(crate) fn beside<R>(&mut self, own: impl FnOnce() -> R, others: impl Fn(ThreadIndex) + Sync) -> R {
        let threads = self.threads();
        if threads == 1 {
            return own();
        }
        let mut result = None;
        // As many chunks as threads: the first of each share, and the only one, is the thread's own.
        self.run(threads - 1, threads, &|_, index| others(index), Some(|| result = Some(own())));
        result.expect("it ran, or its panic went on")
    }

    /// `first`, where it is there, stands for the share of the caller.
    fn run<F: Fn(ThreadIndex, usize) + Sync>(
        &mut self,
        helpers: usize,
        chunks: usize,
        body: &F,
        first: Option<impl FnOnce()>,
    ) {
        let shared = &*self.shared;
        let job = Job { body: ptr::from_ref(body).cast(), call: call::<F>, chunks };
        // SAFETY: the gate is closed and quiet (new, or left so by the previous call), and `&mut self` makes this the
        // only owner: nobody reads or writes `job` now.
        unsafe { *shared.job.get() = job };
        for (thread, share) in shared.shares.iter().enumerate() {
            share.next.store(shared.first_chunk(chunks, thread), Ordering::Relaxed);
        }
        if first.is_some() {
            shared.shares[0].next.store(shared.first_chunk(chunks, 1), Ordering::Relaxed);
        }
        shared.gate.open();
        for worker in &self.workers[..helpers] {
            worker.thread().unpark();
        }
        if let Some(Err(panic)) = first.map(|first| catch_unwind(AssertUnwindSafe(first))) {
            shared.fail(job, panic);
        }
        // SAFETY: `body` outlives this call, and `run` does not return, not even by a panic (`run_chunks` catches
        // them), before the gate is quiet again.
        unsafe { run_chunks(shared, job, 0) };
        shared.gate.close();
        shared.wait_until_quiet();
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its jobs, so the only way out of it is the end.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Pool({} threads)", self.threads())
    }
}

impl Shared {
    /// Where the share of a thread begins; it ends where the next one's begins.
    fn first_chunk(&self, chunks: usize, thread: ThreadIndex) -> usize {
        chunks * thread / self.shares.len()
    }

    /// Somebody has panicked: what has not begun is left out.
    fn fail(&self, job: Job, panic: Box<dyn Any + Send>) {
        for share in &self.shares {
            share.next.store(job.chunks, Ordering::Relaxed);
        }
        lock(&self.panic).get_or_insert(panic);
    }

    fn wait_until_quiet(&self) {
        for _ in 0..SPINS {
            if self.gate.is_quiet() {
                return;
            }
            hint::spin_loop();
        }
        let mut waits = lock(&self.owner_waits);
        *waits = true;
        while !self.gate.is_quiet() {
            waits = self.quiet.wait(waits).unwrap_or_else(PoisonError::into_inner);
        }
        *waits = false;
    }

    fn leave(&self) {
        // The owner looks at the gate with the lock held before it sleeps, so it either sees that the gate is quiet or
        // is asleep when the lock is taken here.
        if self.gate.leave() && *lock(&self.owner_waits) {
            self.quiet.notify_one();
        }
    }
}

/// Pins the calling thread to one core.
#[cfg(target_os = "linux")]
pub(crate) fn pin_current_thread(core: usize) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if core >= CpuSet::MAX_CPU {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut cores = CpuSet::new();
    cores.set(core);
    Ok(sched_setaffinity(None, &cores)?)
}

/// Pins the calling thread to one core: not on this system.
#[cfg(not(target_os = "linux"))]
pub(crate) fn pin_current_thread(_core: usize) -> io::Result<()> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

/// Runs `body` on this thread with the thread, and those that it starts, kept to some cores; wherever the system likes without
/// cores.
///
/// # Errors
///
/// A core is none of the process's own.
#[cfg(target_os = "linux")]
pub fn on_cores<T>(cores: &[usize], body: impl FnOnce() -> T) -> io::Result<T> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    if cores.is_empty() {
        return Ok(body());
    }
    let mut wanted = CpuSet::new();
    for &core in cores {
        if core >= CpuSet::MAX_CPU {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        wanted.set(core);
    }
    let before = sched_getaffinity(None)?;
    sched_setaffinity(None, &wanted)?;
    let result = body();
    sched_setaffinity(None, &before)?;
    Ok(result)
}

/// Runs `body`: this system keeps no thread to cores.
///
/// # Errors
///
/// Cores are named.
#[cfg(not(target_os = "linux"))]
pub fn on_cores<T>(cores: &[usize], body: impl FnOnce() -> T) -> io::Result<T> {
    if cores.is_empty() { Ok(body()) } else { Err(io::Error::from(io::ErrorKind::Unsupported)) }
}

/// Takes a lock whose data no panic can leave half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(shared: &Shared, thread: ThreadIndex) {
    let mut seen = Round::NONE;
    let mut spins = 0;
    while !shared.stop.load(Ordering::Acquire) {
        if let Some(round) = shared.gate.enter(seen) {
            seen = round;
            spins = 0;
            // SAFETY: inside the gate: the owner wrote the job before it opened it and writes no other before this
            // thread has left.
            let job = unsafe { *shared.job.get() };
            // SAFETY: the owner is in `run`, which keeps the body alive until this thread has left.
            unsafe { run_chunks(shared, job, thread) };
            shared.leave();
        } else if spins < SPINS {
            spins += 1;
            hint::spin_loop();
        } else {
            // The owner unparks after it opened the gate; a token left by an `unpark` before this call makes it return
            // at once, so no job is slept through.
            thread::park();
            spins = 0;
        }
    }
}

/// Takes chunks until there are none left: of the thread's own share, then of the others'.
///
/// # Safety
///
/// `job.body` is alive for the whole call.
unsafe fn run_chunks(shared: &Shared, job: Job, thread: ThreadIndex) {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let threads = shared.shares.len();
        for owner in (thread..threads).chain(0..thread) {
            let end = shared.first_chunk(job.chunks, owner + 1);
            loop {
                let chunk = shared.shares[owner].next.fetch_add(1, Ordering::Relaxed);
                if end <= chunk {
                    break;
                }
                // SAFETY: `call` was made for the type behind `body`, which is alive by this function's contract.
                unsafe { (job.call)(job.body, thread, chunk) };
            }
        }
    }));
    if let Err(panic) = outcome {
        shared.fail(job, panic);
    }
}

/// Calls the `F` behind `body`.
///
/// # Safety
///
/// `body` points at a live `F`.
unsafe fn call<F: Fn(ThreadIndex, usize) + Sync>(body: *const (), thread: ThreadIndex, chunk: usize) {
    // SAFETY: a live `F` by this function's contract; shared, as `F: Sync` allows.
    let body = unsafe { &*body.cast::<F>() };
    body(thread, chunk);
}

/// How often a waiting thread looks before it sleeps: some 20 microseconds, the gap between two operations of a step.
pub(super) const SPINS: u32 = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `jobs` jobs and checks that every chunk ran exactly once, by a thread of the pool.
    fn check(threads: usize, jobs: usize, chunks: usize) {
        let mut pool = Pool::new(threads, &[]).unwrap();
        let counts: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
        for job in 1..=jobs {
            pool.for_each(chunks, |thread, chunk| {
                assert!(thread < threads);
                counts[chunk].fetch_add(1, Ordering::Relaxed);
            });
            for count in &counts {
                assert_eq!(count.load(Ordering::Relaxed), job, "job {job} of {chunks} chunks");
            }
        }
    }

    #[test]
    fn every_chunk_runs_once() {
        for (threads, jobs, chunks) in
            [(1, 3, 10), (2, 2000, 1), (2, 2000, 2), (2, 2000, 7), (5, 1000, 64), (3, 10, 0)]
        {
            check(threads, jobs, chunks);
        }
    }

    #[test]
    fn results_are_visible_to_the_caller() {
        let mut pool = Pool::new(3, &[]).unwrap();
        for round in 0..500 {
            let cells: Vec<Mutex<usize>> = (0..30).map(|_| Mutex::new(0)).collect();
            pool.for_each(30, |_, chunk| *lock(&cells[chunk]) = chunk * round);
            for (chunk, cell) in cells.into_iter().enumerate() {
                assert_eq!(cell.into_inner().unwrap(), chunk * round);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3, &[]).unwrap();
        for bad in 0..20 {
            let panic = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each(20, |_, chunk| assert!(chunk != bad, "chunk {chunk} is bad"));
            }));
            let message = panic.unwrap_err();
            assert_eq!(message.downcast_ref::<String>(), Some(&format!("chunk {bad} is bad")));
            let ran = AtomicUsize::new(0);
            pool.for_each(20, |_, _| _ = ran.fetch_add(1, Ordering::Relaxed));
            assert_eq!(ran.into_inner(), 20);
        }
    }

    #[test]
    fn the_caller_has_work_of_its_own_beside_the_others() {
        for threads in [1, 2, 4] {
            let mut pool = Pool::new(threads, &[]).unwrap();
            let met = std::sync::Barrier::new(threads);
            for round in 0..200 {
                let ran: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                let mut not_shared = std::rc::Rc::new(round);
                let caller = thread::current().id();
                let result = pool.beside(
                    || {
                        met.wait();
                        assert_eq!(thread::current().id(), caller);
                        *std::rc::Rc::make_mut(&mut not_shared) += 1;
                        round
                    },
                    |index| {
                        met.wait();
                        assert!(thread::current().id() != caller, "the others wait for one another");
                        ran[index].fetch_add(1, Ordering::Relaxed);
                    },
                );
                assert_eq!((result, *not_shared), (round, round + 1));
                let ran: Vec<usize> = ran.into_iter().map(AtomicUsize::into_inner).collect();
                assert_eq!((ran[0], &ran[1..]), (0, &vec![1; threads - 1][..]));
            }
        }
    }

    #[test]
    fn a_panic_of_the_caller_or_of_another_comes_out_beside() {
        let mut pool = Pool::new(3, &[]).unwrap();
        for bad in 0..3 {
            let panic = catch_unwind(AssertUnwindSafe(|| {
                pool.beside(
                    || assert!(bad != 0, "0 is bad"),
                    |index| assert!(index != bad, "{index} is bad"),
                );
            }));
            let panic = panic.unwrap_err();
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
            assert_eq!(message, Some(&*format!("{bad} is bad")));
            assert_eq!(pool.beside(|| 7, |_| ()), 7);
        }
    }

    #[test]
    fn dropping_the_pool_ends_its_threads() {
        let pool = Pool::new(4, &[]).unwrap();
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        assert_eq!(shared.strong_count(), 0, "each worker holds one");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn workers_sit_on_their_cores() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let cores: Vec<usize> =
            (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core)).collect();
        let mut pool = Pool::new(cores.len(), &cores).unwrap();
        pool.for_each(64, |thread, _| {
            if thread > 0 {
                let set = rustix::thread::sched_getaffinity(None).unwrap();
                assert_eq!((set.count(), set.is_set(cores[thread])), (1, true));
            }
        });
        let missing = Pool::new(2, &[0, 1 << 20]).unwrap_err();
        assert!(matches!(missing, CpuError::PinThread { core: 0x100000, .. }), "{missing}");
    }
}
