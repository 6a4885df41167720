//! A worker without a model: an endpoint, blocks, and an engine that fills them with numbers which only their
//! handoff could have made.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::ops::Range;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use tidemill_kvtransfer::{
    DEFAULT_CREDIT, Endpoint, EndpointConfig, HandoffEvent, HandoffMode, Met, Path, PeerAddress, PushWrite,
    RdmaConfig, Region, Reserve, Reserved, Slab, Source, Timing, TransportChoice,
};
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::message::TransportKind;
use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, BlockRef, Epoch, HandoffId, TokenCount};

/// Far more than anything here takes; a test that gets there has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Worker {
    pub(crate) endpoint: Endpoint,
    pub(crate) region: Arc<Region>,
    pub(crate) layout: KvLayout,
    pub(crate) name: String,
    pub(crate) instance: u64,
    events: Receiver<HandoffEvent>,
    /// What came while something else was waited for.
    kept: RefCell<VecDeque<HandoffEvent>>,
    /// Blocks nobody has, with the epoch in which they were last given out.
    free: Vec<BlockRef>,
    lent: BTreeMap<HandoffId, Vec<BlockRef>>,
    pub(crate) blocks: u32,
    /// Where in the arena what peers read begins, by handoff.
    offered: RefCell<BTreeMap<HandoffId, Range<usize>>>,
}

/// How the workers of a test are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    InPlace,
    SharedMemory,
    Tcp,
    Rdma,
    /// RDMA, and the decode worker reads.
    RdmaRead,
}

/// Every way there is on this machine. `tests/rdma/run` gives one that has RDMA devices, and says so.
pub(crate) fn ways() -> Vec<Way> {
    let everywhere = [Way::InPlace, Way::SharedMemory, Way::Tcp];
    let has_rdma = std::env::var_os("RDMA_VM").is_some();
    let rdma = [Way::Rdma, Way::RdmaRead].into_iter().filter(|_| has_rdma);
    everywhere.into_iter().chain(rdma).collect()
}

pub(crate) fn layout() -> KvLayout {
    KvLayout {
        model: "numbers".into(),
        layers: 3,
        kv_heads: 2,
        heads: HeadRange { first: 0, count: 2 },
        head_size: 16,
        dtype: KvDtype::Bf16,
        block_len: BlockLen::new(16).expect("a power of two"),
        order: AxisOrder::TokenHead,
    }
}

pub(crate) fn config(name: &str, instance: u64, way: Way, blocks: u32) -> EndpointConfig {
    let layout = layout();
    // What is read lies in the arena of the prefill side.
    let blocks = if way == Way::RdmaRead { blocks.max(1024) } else { blocks };
    let region = Region::new(name, layout.block_bytes() * blocks as usize).expect("memory");
    EndpointConfig {
        name: name.into(),
        instance,
        layout,
        region,
        staging_bytes: 0,
        device: None,
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        rdma: RdmaConfig::default(),
        handoff: if way == Way::RdmaRead { HandoffMode::Pull } else { HandoffMode::Push },
        transport: match way {
            Way::InPlace | Way::SharedMemory => TransportChoice::SharedMemory,
            Way::Tcp => TransportChoice::Tcp,
            Way::Rdma | Way::RdmaRead => TransportChoice::Rdma,
        },
        require: true,
        in_place: way == Way::InPlace,
        coverage: Coverage::Full,
        credit: DEFAULT_CREDIT,
        // Tests share few cores: a lease that is never at stake, unless the test is about leases.
        timing: Timing { lease: Duration::from_secs(10), handshake: handshake(), ..Timing::default() },
    }
}

/// An emulated machine takes its time.
fn handshake() -> Duration {
    let is_emulated = std::env::var_os("RDMA_VM").is_some();
    if is_emulated { Duration::from_secs(20) } else { Timing::default().handshake }
}

impl Worker {
    pub(crate) fn start(config: EndpointConfig) -> Self {
        let (sender, events) = channel();
        let (region, layout) = (Arc::clone(&config.region), config.layout.clone());
        let (name, instance) = (config.name.clone(), config.instance);
        let offered = RefCell::default();
        let bytes = region.len() - config.staging_bytes;
        // A test that has seen enough drops its end.
        let sink = Box::new(move |event| drop(sender.send(event)));
        let endpoint = Endpoint::start(config, sink).expect("an endpoint starts");
        let blocks = u32::try_from(bytes / layout.block_bytes()).expect("few blocks");
        let free = (0..blocks).map(|it| BlockRef { block: BlockId(it), epoch: Epoch(0) }).collect();
        let lent = BTreeMap::new();
        let kept = RefCell::default();
        Self { endpoint, region, layout, name, instance, events, kept, free, lent, blocks, offered }
    }

    pub(crate) fn address(&self) -> PeerAddress {
        let (name, instance, address) = (self.name.clone(), self.instance, self.endpoint.address());
        PeerAddress { name, instance, address }
    }

    /// Connects to `other`.
    pub(crate) fn meet(&self, other: PeerAddress) {
        let met = self.endpoint.meet(vec![other], PATIENCE);
        assert!(matches!(met[..], [Met { outcome: Ok(_), .. }]), "{met:?}");
    }

    /// The next event that is not about peers.
    pub(crate) fn event(&self) -> HandoffEvent {
        let kept = self.kept.borrow_mut().pop_front();
        kept.unwrap_or_else(|| self.new_event())
    }

    /// The next event about that handoff; those about others are kept for later.
    pub(crate) fn event_of(&self, handoff: HandoffId) -> HandoffEvent {
        let mut kept = self.kept.borrow_mut();
        let at = loop {
            if let Some(at) = kept.iter().position(|event| handoff_of(event) == Some(handoff)) {
                break at;
            }
            kept.push_back(self.new_event());
        };
        kept.remove(at).expect("just found")
    }

    fn new_event(&self) -> HandoffEvent {
        loop {
            match self.events.recv_timeout(PATIENCE) {
                Ok(
                    HandoffEvent::PeerUp { .. }
                    | HandoffEvent::PeerDown { .. }
                    | HandoffEvent::Nearing { .. },
                ) => {}
                Ok(event) => return event,
                Err(RecvTimeoutError::Timeout) => panic!("{}: nothing happens", self.name),
                Err(RecvTimeoutError::Disconnected) => panic!("{}: the endpoint is gone", self.name),
            }
        }
    }

    pub(crate) fn peer_event(&self) -> HandoffEvent {
        loop {
            let event = self.events.recv_timeout(PATIENCE).expect("something happens");
            if matches!(event, HandoffEvent::PeerUp { .. } | HandoffEvent::PeerDown { .. }) {
                return event;
            }
        }
    }

    /// What is heard next of a peer's commit: that it nears, or that it is there.
    pub(crate) fn news_of_commit(&self) -> &'static str {
        loop {
            match self.events.recv_timeout(PATIENCE).expect("something happens") {
                HandoffEvent::Nearing { .. } => return "nearing",
                HandoffEvent::Committed { .. } => return "committed",
                _ => {}
            }
        }
    }

    /// The next event in one word, with a word for the error.
    pub(crate) fn news(&mut self) -> String {
        let event = self.event();
        self.in_a_word(event)
    }

    /// The next event about that handoff, likewise.
    pub(crate) fn news_of(&mut self, handoff: HandoffId) -> String {
        let event = self.event_of(handoff);
        self.in_a_word(event)
    }

    fn in_a_word(&mut self, event: HandoffEvent) -> String {
        match event {
            HandoffEvent::Reserved(_) => "reserved".into(),
            HandoffEvent::Delivered { .. } => "delivered".into(),
            HandoffEvent::SendFailed { error, .. } => format!("send-failed:{}", word(&error)),
            HandoffEvent::CancelWanted { .. } => "cancel-wanted".into(),
            HandoffEvent::Fetched { .. } => "fetched".into(),
            HandoffEvent::Committed { .. } => "committed".into(),
            HandoffEvent::ReserveFailed { error, .. } => format!("reserve-failed:{}", word(&error)),
            HandoffEvent::Released { handoff } => {
                self.take_back(handoff);
                "released".into()
            }
            HandoffEvent::DeviceFailed { .. } => "device-failed".into(),
            HandoffEvent::PeerUp { .. } | HandoffEvent::PeerDown { .. } | HandoffEvent::Nearing { .. } => {
                unreachable!("left out")
            }
        }
    }

    pub(crate) fn expect_reserved(&self) -> Reserved {
        match self.event() {
            HandoffEvent::Reserved(reserved) => reserved,
            other => panic!("{}: not reserved but {other:?}", self.name),
        }
    }

    pub(crate) fn expect_reserved_of(&self, handoff: HandoffId) -> Reserved {
        match self.event_of(handoff) {
            HandoffEvent::Reserved(reserved) => reserved,
            other => panic!("{}: not reserved but {other:?}", self.name),
        }
    }

    /// Lends blocks for a prompt of `blocks` blocks.
    pub(crate) fn lend(&mut self, handoff: HandoffId, blocks: usize) -> Vec<BlockRef> {
        let at = self.free.len() - blocks;
        let mut targets = self.free.split_off(at);
        for target in &mut targets {
            target.epoch.0 += 1;
        }
        self.lent.insert(handoff, targets.clone());
        targets
    }

    pub(crate) fn take_back(&mut self, handoff: HandoffId) -> Vec<BlockRef> {
        let targets = self.lent.remove(&handoff).expect("released or adopted once");
        // To the other end of the list, so that blocks do not stay in order.
        self.free.splice(0..0, targets.iter().copied());
        targets
    }

    pub(crate) fn reserve(&mut self, handoff: HandoffId, peer_instance: u64, blocks: usize) {
        let targets = self.lend(handoff, blocks);
        // The last block is not full: one token less.
        let tokens = TokenCount(blocks as u32 * self.layout.block_len.tokens() - 1);
        self.endpoint.reserve(Reserve {
            handoff,
            peer_instance,
            within: Duration::from_secs(1),
            tokens,
            first_block: 0,
            cached: vec![],
            targets,
        });
    }

    /// Takes committed blocks over, looks at every byte, and gives them back.
    pub(crate) fn adopt_and_check(&mut self, handoff: HandoffId) {
        self.endpoint.adopt(handoff);
        let targets = self.take_back(handoff);
        for (index, target) in targets.iter().enumerate() {
            let expected = content(handoff, index, &self.layout);
            assert!(self.read(*target) == expected, "{handoff}: block {index} holds foreign bytes");
        }
    }

    pub(crate) fn read(&self, block: BlockRef) -> Vec<u8> {
        let mut bytes = vec![0; self.layout.block_bytes()];
        self.region.read(block.block.0 as usize * bytes.len(), &mut bytes);
        bytes
    }

    /// What an engine does about a reservation, layer by layer.
    pub(crate) fn fill(&self, reserved: &Reserved, layers: std::ops::Range<usize>) {
        let granule = self.layout.strides().layer;
        let bytes = self.layout.block_bytes();
        match &reserved.path {
            Path::InPlace(arena) => {
                for (index, target) in reserved.targets.iter().enumerate() {
                    let content = content(reserved.handoff, index, &self.layout);
                    let (from, to) = (layers.start * granule, layers.end * granule);
                    arena.write(target.block.0 as usize * bytes + from, &content[from..to]);
                }
            }
            Path::Read => self.offer(reserved, layers),
            Path::Device => unreachable!("workers of these tests have no device"),
            Path::Write => {
                let mut slab = Slab::new(reserved.targets.len() * bytes).expect("memory");
                for index in 0..reserved.targets.len() {
                    let content = content(reserved.handoff, index, &self.layout);
                    slab.as_mut_slice()[index * bytes..(index + 1) * bytes].copy_from_slice(&content);
                }
                let slab = Arc::new(slab);
                let write = |index: usize| PushWrite {
                    target_index: index as u32,
                    offset: layers.start * granule,
                    len: layers.len() * granule,
                    source: Source::Slab(Arc::clone(&slab), index * bytes + layers.start * granule),
                };
                let writes = (0..reserved.targets.len()).map(write).collect();
                self.endpoint.push(reserved.handoff, writes);
            }
        }
    }

    /// The same for a peer that reads: in blocks of this worker, which are never used again.
    fn offer(&self, reserved: &Reserved, layers: std::ops::Range<usize>) {
        let (granule, bytes) = (self.layout.strides().layer, self.layout.block_bytes());
        let mut offered = self.offered.borrow_mut();
        let next = offered.values().map(|blocks| blocks.end).max().unwrap_or(0);
        let fresh = next..next + reserved.targets.len();
        let blocks = offered.entry(reserved.handoff).or_insert(fresh).clone();
        assert!(blocks.end <= self.blocks as usize, "the arena has room");
        let (from, to) = (layers.start * granule, layers.end * granule);
        let write = |index: usize| {
            let content = content(reserved.handoff, index, &self.layout);
            let offset = (blocks.start + index) * bytes + from;
            self.region.write(offset, &content[from..to]);
            let source = Source::Region { offset };
            PushWrite { target_index: index as u32, offset: from, len: to - from, source }
        };
        self.endpoint.push(reserved.handoff, (0..blocks.len()).map(write).collect());
    }

    pub(crate) fn fill_all(&self, reserved: &Reserved) {
        for layer in 0..usize::from(self.layout.layers) {
            self.fill(reserved, layer..layer + 1);
        }
    }

    /// Every block is where it should be.
    pub(crate) fn assert_nothing_leaked(&self) {
        assert!(self.lent.is_empty(), "{}: lent are {:?}", self.name, self.lent.keys());
        let blocks: BTreeSet<BlockId> = self.free.iter().map(|it| it.block).collect();
        assert_eq!(blocks.len(), self.blocks as usize, "{}: free + lent = total", self.name);
    }
}

/// Bytes of one block that only this handoff has at this place.
pub(crate) fn content(handoff: HandoffId, index: usize, layout: &KvLayout) -> Vec<u8> {
    let mut state = handoff.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index as u64) << 17;
    let mut bytes = vec![0; layout.block_bytes()];
    for byte in &mut bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 56) as u8;
    }
    bytes
}

fn handoff_of(event: &HandoffEvent) -> Option<HandoffId> {
    match event {
        HandoffEvent::Reserved(reserved) => Some(reserved.handoff),
        HandoffEvent::Delivered { handoff, .. }
        | HandoffEvent::SendFailed { handoff, .. }
        | HandoffEvent::Fetched { handoff }
        | HandoffEvent::CancelWanted { handoff }
        | HandoffEvent::Committed { handoff, .. }
        | HandoffEvent::ReserveFailed { handoff, .. }
        | HandoffEvent::Released { handoff } => Some(*handoff),
        HandoffEvent::PeerUp { .. }
        | HandoffEvent::PeerDown { .. }
        | HandoffEvent::Nearing { .. }
        | HandoffEvent::DeviceFailed { .. } => None,
    }
}

fn word(error: &tidemill_kvtransfer_proto::error::TransferError) -> String {
    let text = format!("{error:?}");
    text.split([' ', '(', '{']).next().unwrap_or_default().to_lowercase()
}

/// Two connected workers: prefill and decode.
pub(crate) fn pair(way: Way) -> (Worker, Worker) {
    let prefill = Worker::start(config("prefill", 1, way, 4));
    let decode = Worker::start(config("decode", 2, way, 32));
    prefill.meet(decode.address());
    (prefill, decode)
}

/// Waits until both sides of an RDMA link know of so many paths that work.
pub(crate) fn have_paths(expected: u32, prefill: &Worker, decode: &Worker, why: &str) {
    let since = Instant::now();
    let paths = |worker: &Worker, peer: &Worker| {
        let link = worker.endpoint.link(peer.instance)?;
        (link.transport == TransportKind::Rdma).then_some(link.paths)
    };
    while (paths(prefill, decode), paths(decode, prefill)) != (Some(expected), Some(expected)) {
        assert!(since.elapsed() < PATIENCE, "{why}: not {expected} paths");
        std::thread::yield_now();
    }
}

/// Has the network device under a Soft-RoCE device go up or down.
pub(crate) fn port(device: &str, state: &str) {
    let parent = std::fs::read_to_string(format!("/sys/class/infiniband/{device}/parent"));
    let parent = parent.expect("a Soft-RoCE device");
    // Not the one of BusyBox, which some shells prefer.
    let status = Command::new("/usr/sbin/ip").args(["link", "set", parent.trim(), state]).status();
    assert!(status.expect("iproute2 is there").success(), "the network device goes {state}");
}
