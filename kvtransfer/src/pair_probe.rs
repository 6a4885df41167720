//! Measures the way to another host: both ends of `tidemill doctor --peer`.
//!
//! What is timed are real handoffs, with commit and digests, since that is what requests wait for. The second half is
//! timed beside a stream of small TCP packets to the same host: where those hurt, queues of the network are shared
//! that should not be, which shows in production as handoffs that are slow for no visible reason.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::message::TransportKind;
use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, BlockRef, Epoch, HandoffId, TokenCount};

use crate::endpoint::{DEFAULT_CREDIT, Endpoint, EndpointConfig, HandoffMode, Timing, TransportChoice};
use crate::error::ProbeError;
use crate::event::{HandoffEvent, PeerAddress, PushWrite, Reserve, Source};
use crate::host;
use crate::shm::Region;
use crate::verbs::RdmaConfig;

/// What was measured of a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairReport {
    /// The way that was taken.
    pub transport: TransportKind,
    /// Whether it is a worse one than was intended.
    pub is_fallback: bool,
    /// With nothing else under way.
    pub alone: Measured,
    /// Beside small TCP packets.
    pub beside_packets: Measured,
    /// How many of those went out per second.
    pub packets_per_second: f64,
}

/// Times of handoffs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Of handoffs of [`LARGE_BYTES`], the median.
    pub bytes_per_second: f64,
    /// Of handoffs of one block of [`BLOCK_BYTES`], from the push to the peer's word: the median.
    pub latency: Duration,
    /// The worst of them.
    pub worst_latency: Duration,
}

/// Answers measurements until `stop` is set. `started` is told the address, whose port is one that is free where none was
/// asked for; small packets are taken at the port after it.
///
/// # Errors
///
/// The addresses cannot be had.
pub fn serve(
    listen: SocketAddr,
    transport: TransportChoice,
    stop: &AtomicBool,
    started: impl FnOnce(SocketAddr),
) -> Result<(), ProbeError> {
    let (endpoint, events, sink) = open(listen, transport)?;
    thread::spawn(move || swallow(&sink));
    started(endpoint.address());
    let mut server = Server { endpoint, waiting: VecDeque::new(), current: None, epoch: 0 };
    while !stop.load(Ordering::Relaxed) {
        match events.recv_timeout(STOP_LATENCY) {
            Ok(event) => server.hear(&event),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(())
}

/// Measures the way to whoever answers at `peer`.
///
/// # Errors
///
/// Nobody answers there, or the way breaks.
pub fn measure(peer: SocketAddr, transport: TransportChoice) -> Result<PairReport, ProbeError> {
    let instance = host::token().map_err(ProbeError::System)?;
    let listen = SocketAddr::new(if peer.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() }, 0);
    let (sender, events) = channel();
    let config = config("doctor", instance, listen, transport)?;
    let region = Arc::clone(&config.region);
    for at in (0..region.len()).step_by(BLOCK_BYTES) {
        region.write(at, &at.to_le_bytes()); // Touched, so that no page fault is timed.
    }
    let endpoint = Endpoint::start(config, Box::new(move |event| drop(sender.send(event))))?;
    let address = PeerAddress { name: peer.to_string(), instance: SERVER, address: peer };
    let met = endpoint.meet(vec![address], PATIENCE).into_iter().next();
    let link = met.map(|met| met.outcome).unwrap_or(Err(crate::error::MeetError::TimedOut))?;
    let mut client = Client { endpoint, events, instance, next: 0 };
    let alone = client.phase()?;
    let packets = Packets::start(beside(peer)?)?;
    let beside_packets = client.phase()?;
    let (transport, is_fallback) = (link.transport, link.is_fallback);
    let packets_per_second = packets.stop();
    Ok(PairReport { transport, is_fallback, alone, beside_packets, packets_per_second })
}

/// The answering side's end and, at the port after it, where small packets go.
fn open(
    listen: SocketAddr,
    transport: TransportChoice,
) -> Result<(Endpoint, Receiver<HandoffEvent>, TcpListener), ProbeError> {
    // Two neighbouring ports cannot be asked of the system, so a few are tried.
    let mut attempts = if listen.port() == 0 { PORT_PAIRS } else { 1 };
    loop {
        let (sender, events) = channel();
        let config = config("doctor", SERVER, listen, transport)?;
        let endpoint = Endpoint::start(config, Box::new(move |event| drop(sender.send(event))))?;
        let sink = beside(endpoint.address()).and_then(|address| {
            TcpListener::bind(address).map_err(|source| ProbeError::Sink { address, source })
        });
        attempts -= 1;
        match sink {
            Ok(sink) => return Ok((endpoint, events, sink)),
            Err(error) if attempts == 0 => return Err(error),
            Err(_) => {}
        }
    }
}

/// Where small packets go, beside the address for handoffs.
fn beside(address: SocketAddr) -> Result<SocketAddr, ProbeError> {
    let no_such_port = || io::Error::new(io::ErrorKind::InvalidInput, "no port comes after it");
    let port = address.port().checked_add(1);
    let port = port.ok_or_else(|| ProbeError::Sink { address, source: no_such_port() })?;
    Ok(SocketAddr::new(address.ip(), port))
}

/// The answering side: reserves what the plan says, one handoff after another, one client after another.
struct Server {
    endpoint: Endpoint,
    waiting: VecDeque<u64>,
    /// The client whose turn it is, and the number of the handoff.
    current: Option<(u64, u64)>,
    epoch: u64,
}

impl Server {
    fn hear(&mut self, event: &HandoffEvent) {
        match event {
            HandoffEvent::PeerUp { instance, .. } => self.waiting.push_back(*instance),
            HandoffEvent::Committed { handoff, .. } => {
                self.endpoint.adopt(*handoff);
                if let Some((client, number)) = self.current.take() {
                    self.current = (number + 1 < 2 * PHASE).then_some((client, number + 1));
                    self.reserve();
                }
            }
            // The client is gone; its blocks are the next one's once they are released.
            HandoffEvent::Released { .. } => self.current = None,
            _ => {}
        }
        if self.current.is_none()
            && let Some(client) = self.waiting.pop_front()
        {
            self.current = Some((client, 0));
            self.reserve();
        }
    }

    fn reserve(&mut self) {
        let Some((client, number)) = self.current else { return };
        self.epoch += 1;
        let epoch = Epoch(self.epoch);
        let count = blocks_of(number);
        let targets = (0..count).map(|block| BlockRef { block: BlockId(block), epoch }).collect();
        self.endpoint.reserve(Reserve {
            handoff: name(client, number),
            peer_instance: client,
            within: Duration::ZERO,
            tokens: TokenCount(count * TOKENS),
            first_block: 0,
            cached: Vec::new(),
            targets,
        });
    }
}

/// The asking side.
struct Client {
    endpoint: Endpoint,
    events: Receiver<HandoffEvent>,
    instance: u64,
    next: u64,
}

impl Client {
    fn phase(&mut self) -> Result<Measured, ProbeError> {
        let (mut small, mut large) = (Vec::new(), Vec::new());
        for _ in 0..PHASE {
            let took = self.handoff()?;
            if blocks_of(self.next) == 1 {
                small.push(took)
            } else {
                large.push(took)
            }
            self.next += 1;
        }
        small.sort_unstable();
        large.sort_unstable();
        let seconds = large[large.len() / 2].as_secs_f64().max(1e-9);
        Ok(Measured {
            bytes_per_second: LARGE_BYTES as f64 / seconds,
            latency: small[small.len() / 2],
            worst_latency: small[small.len() - 1],
        })
    }

    /// How long the next handoff takes, from the push to the peer's word that it took over.
    fn handoff(&mut self) -> Result<Duration, ProbeError> {
        let handoff = name(self.instance, self.next);
        self.endpoint.expect(handoff, SERVER, PATIENCE);
        self.await_event(|event| matches!(event, HandoffEvent::Reserved(_)))?;
        let count = blocks_of(self.next);
        let write = |index: u32| PushWrite {
            target_index: index,
            offset: 0,
            len: BLOCK_BYTES,
            source: Source::Region { offset: index as usize * BLOCK_BYTES },
        };
        let since = Instant::now();
        self.endpoint.push(handoff, (0..count).map(write).collect());
        self.endpoint.finish(handoff, Vec::new());
        self.await_event(|event| matches!(event, HandoffEvent::Delivered { .. }))?;
        Ok(since.elapsed())
    }

    fn await_event(&self, is_it: impl Fn(&HandoffEvent) -> bool) -> Result<(), ProbeError> {
        loop {
            match self.events.recv_timeout(PATIENCE) {
                Ok(event) if is_it(&event) => return Ok(()),
                Ok(HandoffEvent::SendFailed { error, .. }) => return Err(error.into()),
                Ok(_) => {}
                Err(_) => return Err(ProbeError::Silent),
            }
        }
    }
}

/// Small packets on their way.
struct Packets {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    since: Instant,
    thread: thread::JoinHandle<()>,
}

impl Packets {
    fn start(to: SocketAddr) -> Result<Self, ProbeError> {
        let sink = |source| ProbeError::Sink { address: to, source };
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).map_err(sink)?;
        stream.set_nodelay(true).map_err(sink)?;
        stream.set_write_timeout(Some(STOP_LATENCY)).map_err(sink)?;
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let thread = thread::spawn(move || {
            // A full socket only means that it is looked at `stopped` again.
            while !stopped.load(Ordering::Relaxed) {
                if stream.write(&[0; PACKET]).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Self { stop, sent, since: Instant::now(), thread })
    }

    fn stop(self) -> f64 {
        let rate = self.sent.load(Ordering::Relaxed) as f64 / self.since.elapsed().as_secs_f64();
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join(); // It cannot panic.
        rate
    }
}

/// Takes small packets, one sender at a time, and forgets them.
fn swallow(listener: &TcpListener) {
    let mut buffer = vec![0; 64 << 10];
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        while stream.read(&mut buffer).is_ok_and(|length| 0 < length) {}
    }
}

fn config(
    name: &str,
    instance: u64,
    listen: SocketAddr,
    transport: TransportChoice,
) -> Result<EndpointConfig, ProbeError> {
    let layout = KvLayout {
        model: "tidemill-doctor".to_owned(),
        layers: 1,
        kv_heads: 4,
        heads: HeadRange { first: 0, count: 4 },
        head_size: 64,
        dtype: KvDtype::Bf16,
        block_len: BlockLen::new(TOKENS).expect("a power of two"),
        order: AxisOrder::TokenHead,
    };
    assert_eq!(layout.block_bytes(), BLOCK_BYTES, "the constants agree");
    Ok(EndpointConfig {
        name: name.to_owned(),
        instance,
        layout,
        region: Region::new(name, LARGE_BYTES).map_err(ProbeError::System)?,
        staging_bytes: 0,
        device: None,
        listen,
        transport,
        require: false,
        rdma: RdmaConfig::default(),
        handoff: HandoffMode::Push,
        in_place: false,
        coverage: Coverage::Sampled,
        credit: DEFAULT_CREDIT,
        // A machine that is busy with packets may be late.
        timing: Timing { lease: Duration::from_secs(5), ..Timing::default() },
    })
}

/// Blocks of the handoff of that number: in each phase small ones first, then large ones.
fn blocks_of(number: u64) -> u32 {
    if number % PHASE < SMALL_HANDOFFS { 1 } else { (LARGE_BYTES / BLOCK_BYTES) as u32 }
}

fn name(client: u64, number: u64) -> HandoffId {
    HandoffId(client << 16 | number)
}

/// Bytes of one block.
pub const BLOCK_BYTES: usize = 16 << 10;
/// Bytes of a large handoff.
pub const LARGE_BYTES: usize = 16 << 20;

/// The answering side's number. The asking one draws its own.
const SERVER: u64 = 0xd0c7_0000_0000_0001;
const TOKENS: u32 = 16;
const SMALL_HANDOFFS: u64 = 50;
const LARGE_HANDOFFS: u64 = 5;
/// Handoffs of a phase; there are two.
const PHASE: u64 = SMALL_HANDOFFS + LARGE_HANDOFFS;
const PACKET: usize = 64;
/// Pairs of ports that are tried.
const PORT_PAIRS: u32 = 32;
const PATIENCE: Duration = Duration::from_secs(10);
const STOP_LATENCY: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ends_on_one_host_measure_each_other_again_and_again() {
        let stop = AtomicBool::new(false);
        let (told, address) = channel();
        thread::scope(|scope| {
            let server = scope.spawn(|| {
                let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
                let started = |address| told.send(address).expect("the test waits");
                serve(anywhere, TransportChoice::Auto, &stop, started)
            });
            let address = address.recv().expect("it starts");
            for transport in [TransportChoice::Tcp, TransportChoice::Auto] {
                let report = measure(address, transport).expect("measured");
                let expected = match transport {
                    TransportChoice::Tcp => TransportKind::Tcp,
                    _ => TransportKind::SharedMemory,
                };
                assert_eq!((report.transport, report.is_fallback), (expected, false));
                for measured in [report.alone, report.beside_packets] {
                    assert!(0.0 < measured.bytes_per_second && measured.latency <= measured.worst_latency);
                }
                assert!(0.0 < report.packets_per_second);
            }
            stop.store(true, Ordering::Relaxed);
            server.join().expect("no panic").expect("it served");
        });
    }

    #[test]
    fn small_packets_go_to_the_next_port() {
        let at = |port| beside(SocketAddr::from(([127, 0, 0, 1], port))).map(|address| address.port());
        assert_eq!(at(18515).expect("there is one"), 18516);
        let error = line(&at(u16::MAX).expect_err("there is none"));
        assert_eq!(error, "no connection for small packets at 127.0.0.1:65535: no port comes after it");
    }

    fn line(error: &dyn std::error::Error) -> String {
        let cause = error.source().expect("the system's word");
        format!("{error}: {cause}")
    }

    #[test]
    fn nobody_there_is_an_error() {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
        let error = measure(free, TransportChoice::Tcp).expect_err("nobody listens");
        assert!(error.to_string().contains("cannot be reached"), "{error}");
    }
}
