//! Handoffs by endpoints that are connected by TCP, converted in memory of their own or in a tail as for a peer that reads.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tidemill_engine_core::request::{Part, Request, SamplingParams, StopConditions};
use tidemill_engine_core::scheduler::Limits;
use tidemill_kernels::cpu::CpuOptions;
use tidemill_kvtransfer::{
    DEFAULT_CREDIT, EndpointConfig, HandoffEvent, HandoffMode, Pages, PeerAddress, RdmaConfig, Reserve,
    Timing, TransportChoice,
};
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen, Epoch};

use super::*;

const HANDOFF: HandoffId = HandoffId(7);
const REQUEST: RequestId = RequestId(1);
const TOKENS: u32 = 75;
const LAYERS: usize = 3;
/// What a peer is given of the prompt: the last block is not full.
const TARGETS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);

struct Worker {
    arena: Arena,
    endpoint: Endpoint,
    events: Receiver<HandoffEvent>,
}

impl Worker {
    fn start(instance: u64, layout: KvLayout, tail: usize) -> Self {
        let arena = Arena::with_tail(layout.clone(), BlockCount(8), tail, Pages::Normal).unwrap();
        let (sender, events) = channel();
        let config = EndpointConfig {
            name: format!("worker-{instance}"),
            instance,
            layout,
            region: Arc::clone(arena.region()),
            staging_bytes: arena.tail_bytes(),
            device: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            transport: TransportChoice::Tcp,
            require: true,
            rdma: RdmaConfig::default(),
            handoff: HandoffMode::Push,
            in_place: false,
            coverage: Coverage::Full,
            credit: DEFAULT_CREDIT,
            timing: Timing { lease: PATIENCE, ..Timing::default() },
        };
        let endpoint = Endpoint::start(config, Box::new(move |event| drop(sender.send(event)))).unwrap();
        Self { arena, endpoint, events }
    }

    fn event(&self) -> HandoffEvent {
        loop {
            match self.events.recv_timeout(PATIENCE).expect("something happens") {
                HandoffEvent::PeerUp { .. } | HandoffEvent::PeerDown { .. } => {}
                event => return event,
            }
        }
    }
}

fn layout(dtype: KvDtype, block_len: u32) -> KvLayout {
    KvLayout {
        model: "numbers".into(),
        layers: LAYERS as u16,
        kv_heads: 2,
        heads: HeadRange { first: 0, count: 2 },
        head_size: 16,
        dtype,
        block_len: BlockLen::new(block_len).unwrap(),
        order: AxisOrder::TokenHead,
    }
}

/// A scheduler whose one request has blocks for its whole prompt.
fn scheduler(block_len: BlockLen) -> Scheduler {
    let limits = Limits {
        block_len,
        max_model_len: TokenCount(128),
        max_num_seqs: 1,
        max_num_batched_tokens: TokenCount(128),
        max_waiting: 1,
        prefix_cache: false,
        long_prefill_threshold: None,
    };
    let mut scheduler = Scheduler::new(limits, BlockCount(8));
    let request = Request {
        id: REQUEST,
        tokens: (0..TOKENS).collect(),
        prompt_len: TokenCount(TOKENS),
        sampling: SamplingParams::default(),
        stop: StopConditions::after(2),
        part: Part::PrefillFor(HANDOFF),
    };
    scheduler.submit(request).unwrap();
    let plan = scheduler.plan();
    scheduler.begin(&plan);
    scheduler
}

/// Has a prompt handed over, and returns what decode's blocks hold then.
fn hand_over(is_read: bool) -> Vec<u8> {
    let theirs = layout(KvDtype::Bf16, 32);
    // Room for two of nine pieces.
    let prefill = Worker::start(1, layout(KvDtype::F32, 16), 2 * theirs.strides().layer);
    let decode = Worker::start(2, theirs, 0);
    let (arena, tail) = (&prefill.arena, prefill.arena.tail());
    let scheduler = scheduler(arena.layout().block_len);
    for (index, reference) in scheduler.block_table(REQUEST).iter().enumerate() {
        arena.write(reference.block, 0..arena.shape().block_bytes(), |bytes| {
            for (number, bytes) in bytes.chunks_exact_mut(4).enumerate() {
                bytes.copy_from_slice(&((number * 37 + index * 1000) as f32 / 64.0).to_le_bytes());
            }
        });
    }
    let (name, address) = ("decode".to_owned(), decode.endpoint.address());
    prefill.endpoint.meet(vec![PeerAddress { name, instance: 2, address }], PATIENCE);
    let targets = [5, 0, 3].map(|block| BlockRef { block: BlockId(block), epoch: Epoch(1) });
    prefill.endpoint.expect(HANDOFF, 2, PATIENCE);
    decode.endpoint.reserve(Reserve {
        handoff: HANDOFF,
        peer_instance: 1,
        within: PATIENCE,
        tokens: TokenCount(TOKENS),
        first_block: 0,
        cached: Vec::new(),
        targets: targets.to_vec(),
    });
    let HandoffEvent::Reserved(mut reserved) = prefill.event() else { panic!("not reserved") };
    if is_read {
        reserved.path = Path::Read;
    }

    let cpu = Cpu::new(CpuOptions { cores: Vec::new(), threads: Some(1), isa: None }).unwrap();
    let origin = Origin { scheduler: &scheduler, arena, cpu: &cpu, endpoint: &prefill.endpoint };
    let mut outgoings = Outgoings::new(Arc::clone(tail));
    outgoings.begin(HANDOFF, REQUEST);
    assert_eq!(outgoings.announce(&reserved, false), Announced::ComputeAndPush);
    let somebody_elses = tail.take(tail.longest());
    for layer in 0..LAYERS {
        let pieces = outgoings.due(HANDOFF, layer..layer + 1, TokenCount(TOKENS)).expect("all is computed");
        assert_eq!(pieces.len(), TARGETS);
        outgoings.push(HANDOFF, pieces, &origin);
    }
    let first = FirstToken { id: 1, logprobs: None, prompt_logprobs: Vec::new(), cached_tokens: 0 };
    outgoings.computed(HANDOFF, first);
    let mut commit = outgoings.take_commit(HANDOFF);
    assert_eq!(commit.is_none(), is_read, "it waits for room where it needs any");
    drop(somebody_elses);
    let since = Instant::now();
    while commit.is_none() {
        assert!(since.elapsed() < PATIENCE, "what was sent makes room");
        outgoings.push_waiting(&origin);
        if outgoings.take_caught_up().contains(&HANDOFF) {
            commit = outgoings.take_commit(HANDOFF);
            assert!(commit.is_some(), "nothing of it waits");
        }
    }
    prefill.endpoint.finish(HANDOFF, Vec::new());
    let committed = decode.event();
    assert!(matches!(committed, HandoffEvent::Committed { .. }), "{committed:?}");
    decode.endpoint.adopt(HANDOFF);
    assert!(matches!(prefill.event(), HandoffEvent::Delivered { .. }));
    assert!(tail.is_unused(), "nothing of it is kept");
    targets.iter().flat_map(|target| decode.arena.read(target.block, <[u8]>::to_vec)).collect()
}

#[test]
fn what_is_converted_in_a_tail_that_is_too_small_for_it_comes_piece_by_piece_and_is_the_same() {
    let written = hand_over(false);
    assert!(written.iter().any(|&byte| byte != 0));
    assert!(hand_over(true) == written);
}

#[test]
fn who_gives_up_while_pieces_wait_leaves_none_behind() {
    let theirs = layout(KvDtype::Bf16, 32);
    let worker = Worker::start(1, layout(KvDtype::F32, 16), theirs.strides().layer);
    let scheduler = scheduler(worker.arena.layout().block_len);
    let cpu = Cpu::new(CpuOptions { cores: Vec::new(), threads: Some(1), isa: None }).unwrap();
    let origin =
        Origin { scheduler: &scheduler, arena: &worker.arena, cpu: &cpu, endpoint: &worker.endpoint };
    let tail = worker.arena.tail();
    let mut outgoings = Outgoings::new(Arc::clone(tail));
    let somebody_elses = tail.take(tail.longest());
    // The second gets its turn although the first is gone.
    for number in [HANDOFF, HandoffId(8)] {
        outgoings.begin(number, REQUEST);
        let reserved = Reserved {
            handoff: number,
            peer_instance: 2,
            layout: Arc::new(theirs.clone()),
            bridge: worker.arena.layout().bridge(&theirs).unwrap(),
            tokens: TokenCount(TOKENS),
            first_block: 0,
            cached: Vec::new(),
            targets: (0..TARGETS as u32).map(|it| BlockRef { block: BlockId(it), epoch: Epoch(1) }).collect(),
            path: Path::Read,
        };
        outgoings.announce(&reserved, false);
        let pieces = outgoings.due(number, 0..1, TokenCount(TOKENS)).expect("all is computed");
        outgoings.push(number, pieces, &origin);
    }
    assert!(outgoings.give_up(HANDOFF));
    assert_eq!(outgoings.end(HANDOFF), Some(REQUEST));
    drop(somebody_elses);
    // Nobody reserved these: the endpoint lets go of what is pushed at once.
    let since = Instant::now();
    while outgoings.take_caught_up() != [HandoffId(8)] {
        assert!(since.elapsed() < PATIENCE, "its turn comes");
        outgoings.push_waiting(&origin);
    }
}
