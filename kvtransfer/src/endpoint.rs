//! What the engine holds of the transfer machinery: a way to give it orders.
//!
//! One thread per endpoint owns every connection and every state; the methods here only leave a message for it.
//! They can be called from any thread, also from the event callback, and none but [`Endpoint::meet`] waits.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tidemill_kvtransfer_proto::credit::CreditLoad;
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::KvLayout;
use tidemill_kvtransfer_proto::units::{HandoffId, TokenCount};

use crate::device::DeviceBlocks;
use crate::driver::Driver;
use crate::error::{EndpointError, MeetError};
use crate::event::{HandoffEvent, Met, PeerAddress, PeerLink, PushWrite, Reserve};
use crate::shm::Region;
use crate::verbs::RdmaConfig;

/// Which ways for data a pair may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// Shared memory between processes of one host, otherwise RDMA where both sides have a device, otherwise TCP.
    #[default]
    Auto,
    /// Shared memory; TCP, with a warning, where it cannot be had.
    SharedMemory,
    /// RDMA, on one host too; TCP, with a warning, where it cannot be had.
    Rdma,
    /// TCP only.
    Tcp,
}

/// Who moves the bytes of a handoff to this worker, where a device could.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HandoffMode {
    /// The prefill worker writes them: its bytes come as they are computed, a round trip earlier.
    #[default]
    Push,
    /// No peer may write into this worker's memory: it reads from the prefill worker what that offers. Shared memory is
    /// not offered, since whoever maps it can write; over TCP each byte passes this worker's own thread as ever.
    Pull,
}

/// Intervals of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// After how much silence a peer counts as lost.
    pub lease: Duration,
    /// How often this side speaks when it has nothing to say; a fraction of the peer's lease if that is less.
    pub heartbeat: Duration,
    /// How long a peer's reservation may wait for this engine to expect it.
    pub patience: Duration,
    /// How long a handshake may take.
    pub handshake: Duration,
}

/// Everything an endpoint is started with.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Name in logs and in peers' logs.
    pub name: String,
    /// A number that no other start of any worker has.
    pub instance: u64,
    /// Meaning of the bytes of a block.
    pub layout: KvLayout,
    /// The block arena: block `b` starts at `b * layout.block_bytes()`.
    pub region: Arc<Region>,
    /// How many bytes at the end of the region are no blocks but its [`Tail`](crate::Tail): without any, peers of another layout
    /// cannot read from this worker.
    pub staging_bytes: usize,
    /// The device that has the blocks this worker computes in, where it is not the region: what is pushed to peers whose devices
    /// that one reaches never comes into a region. Their numbers are those of the region's blocks.
    pub device: Option<Arc<dyn DeviceBlocks>>,
    /// Where peers connect; port 0 picks one.
    pub listen: SocketAddr,
    /// Which ways for data are acceptable.
    pub transport: TransportChoice,
    /// Whether a pair for which the preferred way cannot be had is not connected at all. `SharedMemory` and `Rdma`
    /// then exclude TCP, and `Auto` excludes it between processes of one host and between workers with devices.
    pub require: bool,
    /// Which RDMA devices to use and how.
    pub rdma: RdmaConfig,
    /// Who moves the bytes of handoffs to this worker.
    pub handoff: HandoffMode,
    /// Whether prompts may be computed right in the blocks of a peer on this host, when layouts are equal.
    pub in_place: bool,
    /// How much of each block the digests must cover that this side verifies, as decode side.
    pub coverage: Coverage,
    /// Bytes that peers may have on their way here at a time, over RDMA and TCP; [`DEFAULT_CREDIT`] suits any network.
    pub credit: u64,
    /// Intervals.
    pub timing: Timing,
}

/// What a port of 400 Gbit/s brings in 1.3 ms, which is many times a round trip through two busy threads: less would
/// leave the port idle now and then. A handoff that is urgent waits for at most as much.
pub const DEFAULT_CREDIT: u64 = 64 << 20;

/// Hands KV blocks over to peers and takes them from peers. Dropping it says goodbye and ends its thread.
pub struct Endpoint {
    address: SocketAddr,
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
    links: Arc<LinkTable>,
    thread: Option<JoinHandle<()>>,
}

/// Receives the events. Called on the endpoint's thread: it must not block.
pub type EventSink = Box<dyn FnMut(HandoffEvent) + Send>;

/// Orders to the endpoint's thread. There are at most a few for each handoff that the engine has under way, and
/// the engine bounds those.
pub(crate) enum Command {
    Meet {
        peers: Vec<PeerAddress>,
        reply: Sender<Met>,
    },
    Reserve(Reserve),
    Adopt(HandoffId),
    Refuse(HandoffId, String),
    Cancel(HandoffId),
    Expect {
        handoff: HandoffId,
        peer_instance: u64,
        patience: Duration,
    },
    Push(HandoffId, Vec<PushWrite>),
    Filled(HandoffId, TokenCount),
    /// And when it was said: the thread may have been asleep.
    Computed(HandoffId, Instant),
    /// Likewise.
    Finish(HandoffId, Vec<u8>, Instant),
    Abandon(HandoffId, String),
    LetGoOfDevice(Sender<()>),
    Stop,
}

/// Which peers are connected and how, and what they have leave for: for questions that cannot wait for the endpoint's
/// thread.
#[derive(Debug, Default)]
pub(crate) struct LinkTable {
    links: Mutex<BTreeMap<u64, LinkEntry>>,
    credit: Mutex<CreditLoad>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkEntry {
    pub(crate) link: PeerLink,
    pub(crate) in_place: bool,
}

impl Endpoint {
    /// Listens, and starts the thread.
    ///
    /// # Errors
    ///
    /// [`EndpointError`] says what could not be had.
    pub fn start(config: EndpointConfig, events: EventSink) -> Result<Self, EndpointError> {
        let (commands, inbox) = mpsc::channel();
        let links = Arc::new(LinkTable::default());
        let name = format!("kv-{}", config.name);
        let driver = Driver::new(config, events, inbox, Arc::clone(&links))?;
        let (address, wake) = (driver.address(), driver.wake());
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || driver.run())
            .map_err(|source| EndpointError::System { operation: "start a thread", source })?;
        Ok(Self { address, commands, wake, links, thread: Some(thread) })
    }

    /// Where peers connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connects to peers, all at once, and waits until each is connected or has failed, but not longer than
    /// `timeout`. Peers that are connected already are only reported. For any thread but the engine's.
    pub fn meet(&self, peers: Vec<PeerAddress>, timeout: Duration) -> Vec<Met> {
        let deadline = Instant::now() + timeout;
        let mut outcomes: Vec<Met> = peers
            .iter()
            .map(|peer| Met {
                name: peer.name.clone(),
                instance: peer.instance,
                outcome: Err(MeetError::TimedOut),
            })
            .collect();
        let mut missing = outcomes.len();
        let (reply, replies) = mpsc::channel();
        self.order(Command::Meet { peers, reply });
        while 0 < missing
            && let Ok(met) = replies.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            for outcome in outcomes.iter_mut().filter(|it| it.instance == met.instance) {
                outcome.outcome = met.outcome.clone();
                missing -= 1;
            }
        }
        outcomes
    }

    /// The connection to a peer, if there is one now.
    pub fn link(&self, peer_instance: u64) -> Option<PeerLink> {
        self.links.get(peer_instance).map(|entry| entry.link)
    }

    /// Whether a handoff to that peer would be computed in place, should it begin now.
    pub fn reaches_in_place(&self, peer_instance: u64) -> bool {
        self.links.get(peer_instance).is_some_and(|entry| entry.in_place)
    }

    /// Bytes that peers may have on their way here, and those that wait for leave.
    pub fn credit_load(&self) -> CreditLoad {
        self.links.credit()
    }

    /// Decode side: announces blocks to the worker that computes the prompt.
    pub fn reserve(&self, reserve: Reserve) {
        self.order(Command::Reserve(reserve));
    }

    /// Decode side: the engine took the committed blocks over. They are its own from now on.
    pub fn adopt(&self, handoff: HandoffId) {
        self.order(Command::Adopt(handoff));
    }

    /// Decode side: the engine cannot use the committed blocks. `Released` follows.
    pub fn refuse(&self, handoff: HandoffId, reason: String) {
        self.order(Command::Refuse(handoff, reason));
    }

    /// Decode side: the engine does not want the handoff any more. `Released` follows.
    pub fn cancel(&self, handoff: HandoffId) {
        self.order(Command::Cancel(handoff));
    }

    /// Prefill side: the peer's reservation for this handoff is welcome, whether it has come or comes within
    /// `patience`.
    pub fn expect(&self, handoff: HandoffId, peer_instance: u64, patience: Duration) {
        self.order(Command::Expect { handoff, peer_instance, patience });
    }

    /// Prefill side: writes into blocks that the peer reserved. Writes for a handoff that has failed meanwhile
    /// are dropped.
    pub fn push(&self, handoff: HandoffId, writes: Vec<PushWrite>) {
        self.order(Command::Push(handoff, writes));
    }

    /// Prefill side: the first `tokens` tokens of the prompt were computed right in the peer's blocks, and the engine writes
    /// nothing more into their places. What the peer has to know of blocks that are full, and of the last one with the last
    /// token, is said and proven meanwhile. To say it is a favour, no duty.
    pub fn filled(&self, handoff: HandoffId, tokens: TokenCount) {
        self.order(Command::Filled(handoff, tokens));
    }

    /// Prefill side: the whole prompt is computed, and [`finish`](Self::finish) follows as soon as the first token is known: the
    /// thread stays awake for a moment. To say it is a favour, no duty.
    pub fn computed(&self, handoff: HandoffId) {
        self.order(Command::Computed(handoff, Instant::now()));
    }

    /// Prefill side: the prompt is computed and everything was pushed. When all writes have completed, the peer
    /// gets the commit with this payload.
    pub fn finish(&self, handoff: HandoffId, payload: Vec<u8>) {
        self.order(Command::Finish(handoff, payload, Instant::now()));
    }

    /// Prefill side: the engine gave up, or stopped because it was asked to. It touches neither the source nor
    /// the peer's blocks any more. `SendFailed` follows.
    pub fn abandon(&self, handoff: HandoffId, reason: String) {
        self.order(Command::Abandon(handoff, reason));
    }

    /// The device is about to give its memory back: links that go by device end, and when this returns nothing here uses it or ever will. What
    /// becomes of handoffs is told as ever.
    pub fn let_go_of_device(&self) {
        let (reply, done) = mpsc::channel();
        self.order(Command::LetGoOfDevice(reply));
        // An error says that the thread is gone, and all that it had with it.
        let _ = done.recv();
    }

    fn order(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::error!("the transfer thread is gone");
            return;
        }
        // Fails only when the counter would overflow, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl LinkTable {
    pub(crate) fn get(&self, instance: u64) -> Option<LinkEntry> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).get(&instance).copied()
    }

    pub(crate) fn set(&self, instance: u64, entry: Option<LinkEntry>) {
        let mut table = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        match entry {
            Some(entry) => table.insert(instance, entry),
            None => table.remove(&instance),
        };
    }

    /// How many paths of a link work now.
    pub(crate) fn set_paths(&self, instance: u64, paths: u32) {
        let mut table = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = table.get_mut(&instance) {
            entry.link.paths = paths;
        }
    }

    pub(crate) fn credit(&self) -> CreditLoad {
        *self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_credit(&self, load: CreditLoad) {
        *self.credit.lock().unwrap_or_else(PoisonError::into_inner) = load;
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_millis(500),
            heartbeat: Duration::from_millis(100),
            patience: Duration::from_secs(30),
            handshake: Duration::from_secs(2),
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.order(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the transfer thread panicked");
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({})", self.address)
    }
}
