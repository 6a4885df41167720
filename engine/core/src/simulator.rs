//! A whole cluster in one thread: production's decisions under a virtual clock, everything from one seed.
//!
//! ```text
//! clients ─► front: Journey, route ─► workers: Scheduler, BlockPool, PrefixTree, Pushes │ EndpointCore ◄─► wire
//! ```
//!
//! What decides is the very code that serves: journeys, routing, the scheduler with its pool, and the endpoint's core.
//! What is simulated is what the drivers do with threads, sockets and devices. A "language model" of one line stands for
//! the device: the content of a slot is a function of the tokens up to it and the layer, and the next token is read
//! from the cache, so that one foreign byte anywhere shows up as a wrong token or, earlier, in a check.
//!
//! Checked all the time, by assertions: bytes land only in blocks that are lent to their handoff,
//! and are read only from blocks that are held for it; whatever a step
//! reads is what the request's own tokens make; the ledger of each worker closes and each block has the owners that
//! know it; no more is on its way to a worker than that lends credit for; no link outlives its lease; each request ends exactly once, with the right tokens; and once the faults
//! stop everything comes to its end and nothing is left behind.

mod captions;
mod chaos;
mod clients;
mod credit;
mod endpoint;
mod engine;
mod front;
mod handoffs;
mod handshake;
mod model;
mod process;
mod reads;
mod status;
mod wire;
mod world;

use std::fmt;

use self::world::World;

/// Something that goes wrong in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A message or write never arrives, and its connection is broken from there on.
    Loss,
    /// A write lands twice before it completes.
    Duplication,
    /// A message or write takes a hundred times as long.
    Delay,
    /// Writes on different queues overtake one another.
    Reorder,
    /// Two nodes do not hear one another for a while.
    Partition,
    /// A worker's process dies and another takes its place.
    Crash,
    /// A worker computes at a fraction of its speed.
    Slow,
    /// A worker's clock runs faster or slower than others'.
    Skew,
    /// Queues are short: for requests, and for writes.
    FullQueue,
    /// A client hangs up.
    Cancel,
    /// A worker stands still for longer than its lease, and then goes on as if nothing had happened.
    StalePeer,
    /// A worker that reads leaves what it is offered, for as long as it likes, and says that all is well.
    Hoard,
}

/// Which faults there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults(u16);

/// A bug that is planted to see whether the checks find it. All of them are in what the simulator does in the place of
/// drivers, so that no production code can be told to misbehave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mischief {
    /// Writes land without being admitted.
    SkipEpochCheck,
    /// A write counts as complete when it is posted.
    CommitEarly,
    /// Blocks go back to the pool when a handoff fails, quiet or not.
    FreeOnTimeout,
    /// A block that is lent to one handoff is announced to another.
    ReuseBlock,
    /// Every look at the clock counts as a sign of life: leases do not end.
    ForgetReaper,
    /// Whoever asks for credit has it.
    GrantToAll,
    /// Blocks that a peer may read go back to the pool when it is told to stop, or the link is gone, read or not.
    FreeOffered,
    /// A read counts as complete when it is posted.
    ReadEarly,
    /// The same, and digests are taken for granted.
    SkipDigest,
    /// What a peer may read of what was converted for it makes room for other things at once.
    ReuseStaging,
    /// Blocks of a peer are called final when the step begins that computes them.
    NameEarly,
    /// The device stores into blocks of a peer that were called final.
    StoreAgain,
    /// What a peer was offered waits for it as long as the peer likes.
    KeepOffers,
}

/// What a schedule is made of, beside its seed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Faults that may happen.
    pub faults: Faults,
    /// A planted bug.
    pub mischief: Option<Mischief>,
}

/// What happened, in lines that a person can read. Off, it costs nothing.
#[derive(Debug, Default)]
pub struct Trace {
    lines: Option<Vec<String>>,
}

/// How much of what happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Schedules that were run.
    pub schedules: u64,
    /// Events in them.
    pub steps: u64,
    /// Virtual time, in microseconds.
    pub microseconds: u64,
    /// Requests that clients made.
    pub requests: u64,
    /// Requests that got their whole answer.
    pub answered: u64,
    /// Requests that failed, which only happens under faults.
    pub failed: u64,
    /// Requests that were hung up.
    pub cancelled: u64,
    /// The longest time from a request to its first token, in microseconds.
    pub first_token: u64,
    /// Handoffs that were delivered: admitted byte by byte, into shared memory, by one-sided writes, by one-sided reads.
    pub handoffs: [u64; 4],
    /// Handoffs that were computed in the peer's memory.
    pub in_place: u64,
    /// Blocks that were named to the peer ahead of the commit.
    pub named_ahead: u64,
    /// Handoffs between workers whose blocks have different shapes.
    pub converted: u64,
    /// Reservations that went into quarantine.
    pub quarantines: u64,
    /// Attempts after the first.
    pub replays: u64,
    /// Links that were lost.
    pub links_lost: u64,
    /// Links that came about.
    pub links: u64,
    /// Writes that were posted.
    pub writes: u64,
    /// Reads that were posted.
    pub reads: u64,
    /// Pieces that were converted for peers that read.
    pub staged: u64,
    /// How often all room for such pieces was in use when one was due.
    pub short_of_room: u64,
    /// Writes that were turned down by admission.
    pub turned_down: u64,
    /// Writes, or layers computed in place, that reached blocks in quarantine.
    pub late: u64,
    /// How often each fault happened, in the order of [`Fault::ALL`].
    pub injected: [u64; Fault::ALL.len()],
}

/// Runs the schedule of a seed to its end.
///
/// # Panics
///
/// When a check fails: the message says which. The trace then ends with what led to it.
pub fn run(seed: u64, options: Options, trace: &mut Trace) -> Summary {
    World::new(seed, options, trace).run()
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Loss,
        Self::Duplication,
        Self::Delay,
        Self::Reorder,
        Self::Partition,
        Self::Crash,
        Self::Slow,
        Self::Skew,
        Self::FullQueue,
        Self::Cancel,
        Self::StalePeer,
        Self::Hoard,
    ];

    /// As it is named on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::Duplication => "duplication",
            Self::Delay => "delay",
            Self::Reorder => "reorder",
            Self::Partition => "partition",
            Self::Crash => "crash",
            Self::Slow => "slow",
            Self::Skew => "skew",
            Self::FullQueue => "full-queue",
            Self::Cancel => "cancel",
            Self::StalePeer => "stale-peer",
            Self::Hoard => "hoard",
        }
    }
}

impl Faults {
    /// None.
    pub const fn none() -> Self {
        Self(0)
    }

    /// All.
    pub fn all() -> Self {
        Fault::ALL.into_iter().fold(Self::none(), Self::with)
    }

    /// These and one more.
    #[must_use]
    pub const fn with(self, fault: Fault) -> Self {
        Self(self.0 | 1 << fault as u16)
    }

    /// Whether this one may happen.
    pub const fn contains(self, fault: Fault) -> bool {
        self.0 & 1 << fault as u16 != 0
    }

    /// Reads `all`, `none`, or names with commas between them.
    ///
    /// # Errors
    ///
    /// Names what is no fault.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "all" => return Ok(Self::all()),
            "none" => return Ok(Self::none()),
            _ => {}
        }
        text.split(',').try_fold(Self::none(), |faults, name| {
            let fault = Fault::ALL.into_iter().find(|it| it.name() == name);
            fault.map(|it| faults.with(it)).ok_or_else(|| {
                let names = Fault::ALL.map(Fault::name).join(", ");
                format!("`{name}` is no fault; there are all, none, or a list of: {names}")
            })
        })
    }
}

impl Trace {
    /// One that records.
    pub fn recording() -> Self {
        Self { lines: Some(Vec::new()) }
    }

    /// What was recorded.
    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }

    fn note(&mut self, now: u64, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{:>9.3} ms  {}", now as f64 / 1000.0, line()));
        }
    }
}

impl Summary {
    /// Adds another one up.
    pub fn add(&mut self, other: &Self) {
        let add_all = |ours: &mut [u64], theirs: &[u64]| {
            for (ours, theirs) in ours.iter_mut().zip(theirs) {
                *ours += theirs;
            }
        };
        self.schedules += other.schedules;
        self.steps += other.steps;
        self.microseconds += other.microseconds;
        self.requests += other.requests;
        self.answered += other.answered;
        self.failed += other.failed;
        self.cancelled += other.cancelled;
        self.first_token = self.first_token.max(other.first_token);
        add_all(&mut self.handoffs, &other.handoffs);
        self.in_place += other.in_place;
        self.named_ahead += other.named_ahead;
        self.converted += other.converted;
        self.quarantines += other.quarantines;
        self.replays += other.replays;
        self.links_lost += other.links_lost;
        self.links += other.links;
        self.writes += other.writes;
        self.reads += other.reads;
        self.staged += other.staged;
        self.short_of_room += other.short_of_room;
        self.turned_down += other.turned_down;
        self.late += other.late;
        add_all(&mut self.injected, &other.injected);
    }

    /// Faults that were asked for and never happened.
    pub fn missing(&self, faults: Faults) -> Vec<Fault> {
        let happened = |fault: &Fault| 0 < self.injected[*fault as usize];
        Fault::ALL.into_iter().filter(|it| faults.contains(*it) && !happened(it)).collect()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [admitted, shared, written, read] = self.handoffs;
        writeln!(
            f,
            "{} schedules, {} steps, {:.0} s of virtual time",
            self.schedules,
            self.steps,
            self.microseconds as f64 / 1e6
        )?;
        writeln!(
            f,
            "requests: {} made, {} answered, {} hung up, {} failed, {} replays",
            self.requests, self.answered, self.cancelled, self.failed, self.replays
        )?;
        writeln!(
            f,
            "handoffs delivered: {admitted} admitted byte by byte, {shared} through shared memory ({} of them computed \
             in place, {} blocks named ahead), {written} by one-sided writes, {read} by one-sided reads; {} of all between blocks of different shapes",
            self.in_place, self.named_ahead, self.converted
        )?;
        writeln!(
            f,
            "writes: {} posted, {} turned down, {} into quarantined blocks; {} reads, {} of copies, which lacked room {} \
             times; {} quarantines; links: {} up, {} lost",
            self.writes,
            self.turned_down,
            self.late,
            self.reads,
            self.staged,
            self.short_of_room,
            self.quarantines,
            self.links,
            self.links_lost
        )?;
        write!(f, "faults:")?;
        for (fault, count) in Fault::ALL.iter().zip(self.injected) {
            write!(f, " {} {count}", fault.name())?;
        }
        Ok(())
    }
}
