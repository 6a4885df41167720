//! The blocks of a GPU as peers on this host reach them: their GPUs copy into them, and this one into theirs.
//!
//! A thread of its own asks the GPU, in a queue of its own. A call to a GPU may have to wait for one of the engine's that takes as long as a
//! step, and the endpoint's thread has heartbeats to send.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tidemill_kernels::cuda::{
    CudaError, DeviceAddress, DeviceIdentity, DigestGranules, DigestSamples, Driver, GranuleOfBlock, Queue,
    SampleOfBlock, Ticket, launches,
};
use tidemill_kvtransfer::device::{DeviceBlocks, DigestPart, MOST_PARTS, PartBytes, PeerBlocks};

use super::{DeviceBuffer, PinnedBuffer};

/// This worker's blocks.
#[derive(Debug)]
pub(super) struct SharedPool {
    memory: Arc<DeviceBuffer>,
    hand: Arc<Hand>,
}

/// Blocks that no peer reaches, for that reason.
#[derive(Debug)]
pub(super) struct LonelyPool(pub(super) String);

/// A peer's blocks.
#[derive(Debug)]
struct PeerPool {
    own: Arc<DeviceBuffer>,
    address: DeviceAddress,
    bytes: u64,
    asked: u64,
    copies: Arc<Copies>,
    hand: Arc<Hand>,
}

/// How many copies to a peer have ended.
#[derive(Debug, Default)]
struct Copies {
    ended: Mutex<u64>,
    changed: Condvar,
}

/// The thread that asks the GPU. It ends with the last who gives it something to do, when all of that is done.
#[derive(Debug)]
struct Hand {
    jobs: Option<Sender<Job>>,
    news: Arc<News>,
    thread: Option<JoinHandle<()>>,
}

/// What it has to say.
#[derive(Debug, Default)]
struct News {
    digests: Mutex<Option<Vec<u64>>>,
    /// What the device said when it failed: nothing is asked of it any more.
    failure: Mutex<Option<String>>,
}

/// What it does.
#[derive(Debug)]
enum Job {
    Copy { copies: Arc<Copies>, to: DeviceAddress, from: DeviceAddress, bytes: usize },
    Digest { parts: Vec<DigestPart>, sums: usize },
    GiveBack(DeviceAddress),
}

/// What the thread has.
#[derive(Debug)]
struct Worker {
    memory: Arc<DeviceBuffer>,
    room: DigestRoom,
    news: Arc<News>,
    /// Copies that were asked for since the last ticket.
    asked: Vec<Arc<Copies>>,
    /// Of which copies it is the end.
    tickets: VecDeque<(Ticket, Vec<Arc<Copies>>)>,
}

/// Where digests are taken, one piece of work at a time.
#[derive(Debug)]
struct DigestRoom {
    parts: DeviceBuffer,
    sums: DeviceBuffer,
    /// What goes up, zeros for the sums first, and where sums come down.
    outbox: PinnedBuffer,
    inbox: PinnedBuffer,
    /// The end of what was asked for, and how many sums it has.
    under_way: Option<(Ticket, usize)>,
}

impl SharedPool {
    pub(super) fn new(memory: Arc<DeviceBuffer>) -> Result<Self, CudaError> {
        let room = DigestRoom::new(memory.driver())?;
        let hand = Arc::new(Hand::start(Arc::clone(&memory), room));
        Ok(Self { memory, hand })
    }

    /// Why blocks of layers of so many bytes are not for peers, if they are not: the device cannot tell that they are right.
    pub(super) fn refusal(layer_bytes: usize) -> Option<String> {
        let is_fit = DigestGranules::LEAST as usize <= layer_bytes && layer_bytes.is_multiple_of(8);
        (!is_fit)
            .then(|| format!("a layer of a block has {layer_bytes} bytes, of which the GPU takes no digest"))
    }
}

impl DeviceBlocks for SharedPool {
    fn export(&self) -> Result<(OwnedFd, Vec<u8>), String> {
        let driver = self.memory.driver();
        let memory = driver.export(self.memory.address()).map_err(said)?;
        let mut note = driver.properties().identity.0.to_vec();
        note.extend((self.memory.bytes() as u64).to_le_bytes());
        Ok((memory, note))
    }

    fn import(&self, memory: OwnedFd, note: &[u8]) -> Result<Box<dyn PeerBlocks>, String> {
        let unknown = || "the peer says of its device's memory what this version does not know".to_owned();
        let (identity, rest) = note.split_first_chunk().ok_or_else(unknown)?;
        let bytes = u64::from_le_bytes(rest.try_into().map_err(|_| unknown())?);
        let length = usize::try_from(bytes).map_err(|_| unknown())?;
        let identity = DeviceIdentity(*identity);
        let address = self.memory.driver().import(memory, length, identity).map_err(said)?;
        let (own, hand) = (Arc::clone(&self.memory), Arc::clone(&self.hand));
        Ok(Box::new(PeerPool { own, address, bytes, asked: 0, copies: Arc::default(), hand }))
    }

    fn begin_digests(&self, parts: &[DigestPart], sums: usize) -> Result<(), String> {
        self.hand.news.check()?;
        *lock(&self.hand.news.digests) = None;
        self.hand.order(Job::Digest { parts: parts.to_vec(), sums });
        Ok(())
    }

    fn digests(&self) -> Result<Option<Vec<u64>>, String> {
        self.hand.news.check()?;
        Ok(lock(&self.hand.news.digests).take())
    }
}

impl DeviceBlocks for LonelyPool {
    fn export(&self) -> Result<(OwnedFd, Vec<u8>), String> {
        Err(self.0.clone())
    }

    fn import(&self, _: OwnedFd, _: &[u8]) -> Result<Box<dyn PeerBlocks>, String> {
        Err(self.0.clone())
    }

    fn begin_digests(&self, _: &[DigestPart], _: usize) -> Result<(), String> {
        unreachable!("nothing goes by a device that nobody reaches")
    }

    fn digests(&self) -> Result<Option<Vec<u64>>, String> {
        unreachable!("nothing goes by a device that nobody reaches")
    }
}

impl PeerBlocks for PeerPool {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn copy(&mut self, from: usize, to: u64, bytes: usize) -> Result<(), String> {
        self.hand.news.check()?;
        let to = self.address.offset(usize::try_from(to).expect("it is mapped here"));
        let (copies, from) = (Arc::clone(&self.copies), self.own.address().offset(from));
        self.hand.order(Job::Copy { copies, to, from, bytes });
        self.asked += 1;
        Ok(())
    }

    fn ended(&mut self) -> Result<u64, String> {
        self.hand.news.check()?;
        Ok(*lock(&self.copies.ended))
    }

    fn settle(&mut self) -> Result<(), String> {
        let mut ended = lock(&self.copies.ended);
        while *ended < self.asked {
            self.hand.news.check()?;
            let waited = self.copies.changed.wait_timeout(ended, NEWS);
            ended = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for PeerPool {
    fn drop(&mut self) {
        match self.settle() {
            Ok(()) => self.hand.order(Job::GiveBack(self.address)),
            // Of a device that has failed nobody knows what still uses it.
            Err(error) => tracing::warn!(error, "a peer's blocks stay mapped"),
        }
    }
}

impl Hand {
    fn start(memory: Arc<DeviceBuffer>, room: DigestRoom) -> Self {
        let (jobs, inbox) = channel();
        let news = Arc::new(News::default());
        let (asked, tickets) = (Vec::new(), VecDeque::new());
        let worker = Worker { memory, room, news: Arc::clone(&news), asked, tickets };
        let thread = thread::Builder::new()
            .name("kv-device".into())
            .spawn(move || worker.run(&inbox))
            .expect("a process that starts can have one more thread");
        Self { jobs: Some(jobs), news, thread: Some(thread) }
    }

    fn order(&self, job: Job) {
        let jobs = self.jobs.as_ref().expect("there until `drop`");
        if jobs.send(job).is_err() {
            self.news.fail("the thread that asks the GPU is gone".to_owned());
        }
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        self.jobs = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that asks the GPU panicked");
        }
    }
}

impl News {
    fn check(&self) -> Result<(), String> {
        lock(&self.failure).clone().map_or(Ok(()), Err)
    }

    fn fail(&self, reason: String) {
        lock(&self.failure).get_or_insert(reason);
    }
}

impl Worker {
    fn run(mut self, inbox: &Receiver<Job>) {
        loop {
            let job = if self.has_work() {
                inbox.recv_timeout(LOOK)
            } else {
                inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            let is_over = matches!(job, Err(RecvTimeoutError::Disconnected)) && !self.has_work();
            let jobs: Vec<Job> = job.into_iter().chain(inbox.try_iter()).collect();
            let turned = self.turn(jobs);
            if let Err(error) = turned {
                self.news.fail(error.to_string());
                (self.asked, self.tickets, self.room.under_way) = Default::default();
            }
            if is_over {
                return;
            }
        }
    }

    fn has_work(&self) -> bool {
        !self.tickets.is_empty() || self.room.under_way.is_some()
    }

    fn turn(&mut self, jobs: Vec<Job>) -> Result<(), CudaError> {
        let driver = Arc::clone(self.memory.driver());
        if self.news.check().is_err() {
            return Ok(());
        }
        for job in jobs {
            match job {
                Job::Copy { copies, to, from, bytes } => {
                    driver.copy(Queue::Handoff, to, from, bytes)?;
                    self.asked.push(copies);
                }
                Job::Digest { parts, sums } => self.room.begin(&self.memory, &parts, sums)?,
                Job::GiveBack(address) => driver.free(address)?,
            }
        }
        if !self.asked.is_empty() {
            let ticket = driver.ticket(Queue::Handoff)?;
            self.tickets.push_back((ticket, std::mem::take(&mut self.asked)));
        }
        while let Some((ticket, _)) = self.tickets.front()
            && driver.is_done(*ticket)?
            && let Some((_, ended)) = self.tickets.pop_front()
        {
            for copies in ended {
                *lock(&copies.ended) += 1;
                copies.changed.notify_all();
            }
        }
        if self.room.under_way.is_some()
            && let Some(sums) = self.room.take(&driver)?
        {
            *lock(&self.news.digests) = Some(sums);
        }
        Ok(())
    }
}

impl DigestRoom {
    fn new(driver: &Arc<dyn Driver>) -> Result<Self, CudaError> {
        let (parts, sums) = (MOST_PARTS * size_of::<SampleOfBlock>(), MOST_PARTS * size_of::<u64>());
        Ok(Self {
            parts: DeviceBuffer::new(driver, parts)?,
            sums: DeviceBuffer::new(driver, sums)?,
            outbox: PinnedBuffer::new(driver, sums + parts)?,
            inbox: PinnedBuffer::new(driver, sums)?,
            under_way: None,
        })
    }

    fn begin(&mut self, blocks: &DeviceBuffer, parts: &[DigestPart], sums: usize) -> Result<(), CudaError> {
        assert!(parts.len() <= MOST_PARTS && sums <= MOST_PARTS, "a bounded piece of work");
        let driver = blocks.driver();
        if let Some((given_up, _)) = self.under_way.take() {
            driver.wait(given_up)?;
        }
        let samples: Vec<SampleOfBlock> = parts.iter().filter_map(|part| sample(blocks, part)).collect();
        let whole: Vec<(GranuleOfBlock, usize)> =
            parts.iter().filter_map(|part| granule(blocks, part)).collect();
        assert!(samples.is_empty() || whole.is_empty(), "one kind of parts");
        let count = u32::try_from(parts.len()).expect("a bounded piece of work");
        let zeros = vec![0; sums * size_of::<u64>()];
        driver.write_pinned(self.outbox.address(), &zeros);
        driver.start_upload(Queue::Handoff, self.sums.address(), self.outbox.address(), zeros.len())?;
        let (sums_at, parts_at, secret) = (self.sums.address(), self.parts.address(), DigestGranules::SECRET);
        if let Some((_, bytes)) = whole.first() {
            let granules: Vec<GranuleOfBlock> = whole.iter().map(|(granule, _)| *granule).collect();
            self.send(driver, zeros.len(), bytemuck::cast_slice(&granules))?;
            let bytes = u32::try_from(*bytes).expect("a layer of a block");
            let parameters = DigestGranules { sums: sums_at, granules: parts_at, secret, bytes, reserved: 0 };
            driver.launch_beside(&launches::digest_granules(count, &parameters))?;
        } else {
            self.send(driver, zeros.len(), bytemuck::cast_slice(&samples))?;
            let parameters = DigestSamples { sums: sums_at, samples: parts_at, secret };
            driver.launch_beside(&launches::digest_samples(count, &parameters))?;
        }
        driver.start_download(Queue::Handoff, self.inbox.address(), sums_at, zeros.len())?;
        self.under_way = Some((driver.ticket(Queue::Handoff)?, sums));
        Ok(())
    }

    /// Has parts go up, from behind the zeros.
    fn send(&self, driver: &Arc<dyn Driver>, behind: usize, bytes: &[u8]) -> Result<(), CudaError> {
        let from = self.outbox.address().offset(behind);
        driver.write_pinned(from, bytes);
        driver.start_upload(Queue::Handoff, self.parts.address(), from, bytes.len())
    }

    fn take(&mut self, driver: &Arc<dyn Driver>) -> Result<Option<Vec<u64>>, CudaError> {
        let (ticket, count) = self.under_way.expect("digests were begun");
        if !driver.is_done(ticket)? {
            return Ok(None);
        }
        self.under_way = None;
        let mut sums = vec![0u64; count];
        driver.read_pinned(bytemuck::cast_slice_mut(&mut sums), self.inbox.address());
        Ok(Some(sums))
    }
}

fn sample(blocks: &DeviceBuffer, part: &DigestPart) -> Option<SampleOfBlock> {
    let PartBytes::Lines(lines) = part.bytes else { return None };
    let lines = lines.map(|line| blocks.address().offset(line).0);
    Some(SampleOfBlock { lines, seed: part.seed, sum: part.sum, reserved: 0 })
}

/// And how many bytes it has.
fn granule(blocks: &DeviceBuffer, part: &DigestPart) -> Option<(GranuleOfBlock, usize)> {
    let PartBytes::All { offset, len } = part.bytes else { return None };
    let bytes = blocks.address().offset(offset);
    Some((GranuleOfBlock { bytes, seed: part.seed, sum: part.sum, reserved: 0 }, len))
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn said(error: CudaError) -> String {
    error.to_string()
}

/// Numbers and news are replaced whole, so those that a panic left behind are sound.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often a GPU is asked how far it is, which rings no bell: what a copy of some blocks takes.
const LOOK: Duration = Duration::from_micros(50);
/// How soon who waits hears of a failure.
const NEWS: Duration = Duration::from_millis(10);
