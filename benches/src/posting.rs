//! What it costs to turn the pieces of a prompt's KV into posted writes: the endpoint's own core, without a wire.

use std::rc::Rc;
use std::time::Duration;

use tidemill_kvtransfer_proto::digest::{BlockDigests, BlockShape, Coverage};
use tidemill_kvtransfer_proto::endpoint_core::{
    ByDevice, EndpointCore, EndpointRules, LinkUp, QuietProof, TargetWrite, WriteSource,
};
use tidemill_kvtransfer_proto::layout::{HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::message::{Hello, Message, Offer, OnFailure, PROTOCOL, Reserve};
use tidemill_kvtransfer_proto::transport::Post;
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, Epoch, HandoffId, Moment, TokenCount};

use crate::report::{Row, Target};
use crate::timing::{cpu_time, median};
use crate::workers::billion;

/// Blocks of the prompt, and pieces of each: the 18,880 descriptors of vllm#35264.
const BLOCKS: u32 = 118;
const PIECES: u16 = 160;

pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    // One layer for each piece, 1 KiB long.
    let layout = KvLayout {
        layers: PIECES,
        kv_heads: 1,
        heads: HeadRange { first: 0, count: 1 },
        head_size: 16,
        ..billion(16, KvDtype::Bf16)
    };
    let memory: Rc<[u8]> = (0..1024 * layout.block_bytes()).map(|index| index as u8).collect();
    let mut posting = Vec::new();
    let mut digesting = Vec::new();
    let mut posted = 0;
    for round in 0..rounds as u64 + 1 {
        let handoff = HandoffId(round + 1);
        let (mut core, writes) = prepared(&layout, &memory, handoff);
        posted = 0;
        let total = cpu_time(|| {
            core.push(handoff, writes, Moment::default());
            let accept = |_, _: &_, _| {
                posted += 1;
                Post::Accepted
            };
            core.post(DECODE, accept, Moment::default());
        });
        let digests = cpu_time(|| digest_all(&layout, &memory, handoff));
        if 0 < round {
            posting.push(total.saturating_sub(digests));
            digesting.push(digests);
        }
    }
    let microseconds = |time: Duration| time.as_secs_f64() * 1e6;
    let pieces = BLOCKS * u32::from(PIECES);
    Ok(vec![Row {
        measure: format!("posting {pieces} descriptors after coalescing, CPU"),
        value: microseconds(median(&posting)),
        unit: "µs",
        limit: None,
        target: Some(Target::AtMost(500.0)),
        note: format!(
            "checked, joined to {posted} writes and named with their epochs; their sampled digests beside it: {:.0} µs",
            microseconds(median(&digesting))
        ),
    }])
}

/// A prefill side that knows a peer's reservation, and the pieces that its engine pushes, layer by layer.
fn prepared(
    layout: &KvLayout,
    memory: &Rc<[u8]>,
    handoff: HandoffId,
) -> (EndpointCore<Piece>, Vec<TargetWrite<Piece>>) {
    let second = Duration::from_secs(1);
    let now = Moment::default();
    let mut core = EndpointCore::new(EndpointRules {
        layout: layout.clone(),
        blocks: 1024,
        staging: 0,
        in_place: false,
        coverage: Coverage::Sampled,
        lease: second,
        heartbeat: second,
        patience: second,
        stall: second,
        offers: second,
        credit: u64::MAX,
        pulls: false,
    });
    core.meet(DECODE, "decode");
    core.link_up(
        DECODE,
        LinkUp {
            hello: hello(layout),
            proof: QuietProof::Process,
            busy: Vec::new(),
            by_device: ByDevice::default(),
        },
        now,
    );
    core.expect(handoff, DECODE, second, now);
    let target = |index: u32| BlockRef { block: BlockId((index * 5 + 3) % 1024), epoch: Epoch(handoff.0) };
    let reserve = Reserve {
        handoff,
        tokens: TokenCount(BLOCKS * layout.block_len.tokens()),
        first_block: 0,
        cached: Vec::new(),
        targets: (0..BLOCKS).map(target).collect(),
        coverage: Coverage::Sampled,
    };
    core.hear(DECODE, Message::Reserve(reserve), now);
    let granule = layout.strides().layer;
    let piece = |layer: usize, target: u32| {
        let start = source_block(target) * layout.block_bytes() + layer * granule;
        let source = Piece { memory: Rc::clone(memory), start, len: granule };
        TargetWrite { target_index: target, offset: layer * granule, source: Some(source) }
    };
    let layers = 0..usize::from(PIECES);
    let writes = layers.flat_map(|layer| (0..BLOCKS).map(move |target| (layer, target)));
    (core, writes.map(|(layer, target)| piece(layer, target)).collect())
}

/// What `post` spends on digests.
fn digest_all(layout: &KvLayout, memory: &Rc<[u8]>, handoff: HandoffId) {
    let shape = BlockShape::of(layout);
    let mut sums = vec![0; BLOCKS as usize];
    let read = |start: usize, offset: usize, buffer: &mut [u8]| {
        buffer.copy_from_slice(&memory[start + offset..start + offset + buffer.len()]);
    };
    let mut digests = BlockDigests::new(Coverage::Sampled, shape.granule, &mut sums, read);
    for target in 0..BLOCKS {
        for layer in 0..usize::from(PIECES) {
            let start = source_block(target) * shape.block + layer * shape.granule;
            digests.add(shape.granule_of(handoff, target as usize, layer), start);
        }
    }
    digests.finish();
    std::hint::black_box(sums);
}

fn source_block(target: u32) -> usize {
    (target as usize * 11 + 7) % 1024
}

fn hello(layout: &KvLayout) -> Hello {
    Hello {
        protocol: PROTOCOL,
        instance: DECODE,
        name: "decode".to_owned(),
        layout: layout.clone(),
        region_bytes: 1024 * layout.block_bytes() as u64,
        staging_bytes: 0,
        listen_port: 1,
        host: String::new(),
        memory_socket: String::new(),
        offer: Offer { shared_memory: true, rdma: false, tcp: true, on_failure: OnFailure::FallBack },
        pulls: false,
        lease: Duration::from_secs(1),
    }
}

/// A range of the sender's arena.
#[derive(Clone)]
struct Piece {
    memory: Rc<[u8]>,
    start: usize,
    len: usize,
}

impl WriteSource for Piece {
    fn memory(&self) -> usize {
        0
    }

    fn offset(&self) -> usize {
        self.start
    }

    fn len(&self) -> usize {
        self.len
    }

    fn range(&self, offset: usize, len: usize) -> Option<Self> {
        let inside = offset + len <= self.memory.len();
        inside.then(|| Self { memory: Rc::clone(&self.memory), start: offset, len })
    }

    fn in_region(&self) -> Option<u64> {
        Some(self.start as u64)
    }

    fn read(&self, at: usize, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.memory[self.start + at..self.start + at + buffer.len()]);
    }
}

const DECODE: u64 = 2;
