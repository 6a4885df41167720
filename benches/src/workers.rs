//! Two endpoints with blocks and without a model, and handoffs between them as engines make them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tidemill_kvtransfer::{
    DEFAULT_CREDIT, Endpoint, EndpointConfig, HandoffEvent, HandoffMode, Path, PeerAddress, PushWrite,
    RdmaConfig, Region, Reserve, Source, Timing, TransportChoice,
};
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, BlockRef, Epoch, HandoffId, TokenCount};

/// How two workers are connected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    InPlace,
    SharedMemory,
    Tcp,
}

/// A connected pair of workers with equal layouts.
pub(crate) struct Pair {
    pub(crate) layout: KvLayout,
    prefill: Worker,
    decode: Worker,
    blocks: u32,
    next: u64,
    /// What the prefill engine says ahead of the first token of a prompt that it computes in place.
    pub(crate) ahead: Option<Ahead>,
}

/// What an engine says ahead of a prompt's first token.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// Blocks that it computes in one step, and says so after it.
    pub(crate) step: usize,
    /// From the last of these steps to the first token.
    pub(crate) head_start: Duration,
}

struct Worker {
    endpoint: Endpoint,
    region: Arc<Region>,
    events: Receiver<(Instant, HandoffEvent)>,
}

/// What a handoff took.
#[derive(Clone, Copy)]
pub(crate) struct Took {
    /// From the first order of the prefill engine to the commit at the decode engine.
    pub(crate) until_committed: Duration,
    /// From the last order of the prefill engine on.
    pub(crate) after_finish: Duration,
    /// Writes that the endpoint made of what the engine pushed.
    pub(crate) writes: u64,
}

/// The layout of a Llama 3.2 of a billion parameters: 32 KiB for each token.
pub(crate) fn billion(block_len: u32, dtype: KvDtype) -> KvLayout {
    KvLayout {
        model: "measured".to_owned(),
        layers: 16,
        kv_heads: 8,
        heads: HeadRange { first: 0, count: 8 },
        head_size: 64,
        dtype,
        block_len: BlockLen::new(block_len).expect("a power of two"),
        order: AxisOrder::TokenHead,
    }
}

impl Pair {
    /// Two workers whose arenas hold `blocks` blocks each, every page touched.
    pub(crate) fn new(layout: KvLayout, blocks: u32, way: Way, coverage: Coverage) -> anyhow::Result<Self> {
        // Where the prompt is computed in the peer's blocks there is no need for others.
        let own = if way == Way::InPlace { 1 } else { blocks };
        let prefill = Worker::start("prefill", 1, &layout, own, way, coverage)?;
        let decode = Worker::start("decode", 2, &layout, blocks, way, coverage)?;
        let peer = PeerAddress { name: "decode".into(), instance: 2, address: decode.endpoint.address() };
        let met = prefill.endpoint.meet(vec![peer], PATIENCE);
        met[0].outcome.as_ref().map_err(|error| anyhow::anyhow!("the workers do not meet: {error}"))?;
        Ok(Self { layout, prefill, decode, blocks, next: 1, ahead: None })
    }

    /// Bytes of a handoff of `blocks` blocks.
    pub(crate) fn bytes(&self, blocks: u32) -> usize {
        blocks as usize * self.layout.block_bytes()
    }

    /// Hands `blocks` blocks over that lie scattered on both sides, in pieces of `layers` layers.
    pub(crate) fn hand_over(&mut self, blocks: u32, layers: usize) -> anyhow::Result<Took> {
        let handoff = HandoffId(self.next);
        self.next += 1;
        let targets = scattered(self.blocks, blocks, 5);
        let targets =
            targets.map(|block| BlockRef { block: BlockId(block), epoch: Epoch(handoff.0) }).collect();
        self.prefill.endpoint.expect(handoff, 2, PATIENCE);
        self.decode.endpoint.reserve(Reserve {
            handoff,
            peer_instance: 1,
            within: Duration::ZERO,
            tokens: TokenCount(blocks * self.layout.block_len.tokens()),
            first_block: 0,
            cached: Vec::new(),
            targets,
        });
        let HandoffEvent::Reserved(reserved) = self.prefill.next()?.1 else { bail!("no reservation came") };
        if let Path::InPlace(arena) = &reserved.path {
            self.compute_in(handoff, arena, &reserved.targets);
        }
        let began = Instant::now();
        if matches!(reserved.path, Path::Write) {
            let strides = self.layout.strides();
            let sources: Vec<u32> = scattered(self.blocks, blocks, 11).collect();
            for first in (0..usize::from(self.layout.layers)).step_by(layers) {
                let (offset, len) = (first * strides.layer, layers * strides.layer);
                let write = |(target, block): (usize, &u32)| PushWrite {
                    target_index: target as u32,
                    offset,
                    len,
                    source: Source::Region { offset: *block as usize * self.layout.block_bytes() + offset },
                };
                self.prefill.endpoint.push(handoff, sources.iter().enumerate().map(write).collect());
            }
        }
        if let Some(Ahead { head_start, .. }) = self.ahead {
            self.prefill.endpoint.computed(handoff);
            let computed = Instant::now();
            while computed.elapsed() < head_start {
                std::hint::spin_loop();
            }
        }
        let finished = Instant::now();
        self.prefill.endpoint.finish(handoff, vec![1]);
        let (committed, event) = self.decode.next()?;
        let HandoffEvent::Committed { .. } = event else { bail!("no commit but {event:?}") };
        self.decode.endpoint.adopt(handoff);
        let HandoffEvent::Delivered { stats, .. } = self.prefill.next()?.1 else { bail!("not delivered") };
        Ok(Took {
            until_committed: committed.saturating_duration_since(began),
            after_finish: committed.saturating_duration_since(finished),
            writes: stats.writes,
        })
    }
}

impl Pair {
    /// What an engine does that computes in its peer's blocks: it stores into each of them, and says how far it is.
    fn compute_in(&self, handoff: HandoffId, arena: &Region, targets: &[BlockRef]) {
        let bytes = vec![5; self.layout.block_bytes()];
        let step = self.ahead.map_or(targets.len(), |ahead| ahead.step);
        let mut computed = 0;
        for targets in targets.chunks(step) {
            for target in targets {
                arena.write(target.block.0 as usize * bytes.len(), &bytes);
            }
            computed += targets.len() as u32;
            if self.ahead.is_some() {
                let tokens = TokenCount(computed * self.layout.block_len.tokens());
                self.prefill.endpoint.filled(handoff, tokens);
            }
        }
    }
}

impl Worker {
    fn start(
        name: &str,
        instance: u64,
        layout: &KvLayout,
        blocks: u32,
        way: Way,
        coverage: Coverage,
    ) -> anyhow::Result<Self> {
        let region = Region::new(name, blocks as usize * layout.block_bytes())?;
        let noise: Vec<u8> =
            (0..1u32 << 20).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for offset in (0..region.len()).step_by(noise.len()) {
            region.write(offset, &noise[..noise.len().min(region.len() - offset)]);
        }
        let (sender, events) = channel();
        // The time is taken where the news arises: waking this thread is not part of a handoff.
        let sink = Box::new(move |event| drop(sender.send((Instant::now(), event))));
        let config = EndpointConfig {
            name: name.to_owned(),
            instance,
            layout: layout.clone(),
            region: Arc::clone(&region),
            staging_bytes: 0,
            device: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            transport: if way == Way::Tcp { TransportChoice::Tcp } else { TransportChoice::SharedMemory },
            require: true,
            in_place: way == Way::InPlace,
            coverage,
            credit: DEFAULT_CREDIT,
            timing: Timing { lease: PATIENCE, ..Timing::default() },
            rdma: RdmaConfig::default(),
            handoff: HandoffMode::Push,
        };
        Ok(Self { endpoint: Endpoint::start(config, sink)?, region, events })
    }

    /// The next event that is not about peers.
    fn next(&self) -> anyhow::Result<(Instant, HandoffEvent)> {
        loop {
            let (time, event) = self.events.recv_timeout(PATIENCE).context("nothing happens")?;
            match event {
                HandoffEvent::PeerUp { .. }
                | HandoffEvent::PeerDown { .. }
                | HandoffEvent::Nearing { .. } => {}
                HandoffEvent::SendFailed { error, .. } | HandoffEvent::ReserveFailed { error, .. } => {
                    bail!("the handoff failed: {error}")
                }
                event => return Ok((time, event)),
            }
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Both sides saw the same bytes; a benchmark that moves nothing must not look fast.
        let mut first = [0; 64];
        let block = scattered(self.blocks, 1, 5).next().unwrap_or_default() as usize;
        self.decode.region.read(block * self.layout.block_bytes(), &mut first);
        assert!(first.iter().any(|&byte| byte != 0), "the target holds what was written");
        let _ = &self.prefill.region;
    }
}

/// `count` of `all` blocks, no two of them neighbours in order: steps of `step`, which is odd while `all` is a power
/// of two.
fn scattered(all: u32, count: u32, step: u32) -> impl Iterator<Item = u32> {
    (0..count).map(move |index| (index * step + step) % all)
}

const PATIENCE: Duration = Duration::from_secs(30);
