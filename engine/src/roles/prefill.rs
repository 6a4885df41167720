//! The prefill side of handoffs.
//!
//! A prompt is computed either *in place*, in the blocks that the peer reserved, or in blocks of its own that are
//! pushed layer by layer. In the second case neither side waits for the other to begin: the reservation may arrive
//! before, during or after the computation, and whatever is due by then is pushed at once.
//!
//! For a peer that reads, blocks of another layout are converted in the arena's tail. That is bounded and shared by all such
//! peers: what finds no room there waits, and goes when earlier pieces have been read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use tidemill_engine_core::pushes::{Due, Pushes};
use tidemill_engine_core::request::RequestId;
use tidemill_engine_core::scheduler::Scheduler;
pub(crate) use tidemill_engine_core::staging::Piece;
use tidemill_engine_core::staging::StagingQueue;
use tidemill_kernels::cpu::Cpu;
use tidemill_kernels::cuda::CudaError;
use tidemill_kernels::kv::BlockAddress;
use tidemill_kernels::step::TokenSpan;
use tidemill_kvtransfer::{Endpoint, Path, PushWrite, Reserved, Source, Tail};
use tidemill_kvtransfer_proto::layout::{Bridge, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockRef, HandoffId, TokenCount};

use super::FirstToken;
use super::staging::Staging;
use crate::device::{LayerRange, Parts};
use crate::memory::{Arena, DevicePool, block_shape};

/// All handoffs that this worker computes prompts for.
#[derive(Debug)]
pub(crate) struct Outgoings {
    by_handoff: BTreeMap<HandoffId, Outgoing>,
    staging: Staging,
    /// Where pieces for peers that read are converted, and those that wait for room there.
    tail: Arc<Tail>,
    waiting: StagingQueue,
    /// Handoffs of which none waits any more, since that was asked for.
    caught_up: Vec<HandoffId>,
}

/// One of them.
#[derive(Debug)]
struct Outgoing {
    request: RequestId,
    target: Target,
    /// The prompt is computed; waits for the reservation to be pushed and committed.
    first_token: Option<FirstToken>,
    /// The last word to the endpoint has been said.
    ended: bool,
}

/// Where the peer wants the KV cache.
#[derive(Debug)]
enum Target {
    /// Not announced yet.
    Unknown,
    /// In the peer's memory, which is computed in directly.
    InPlace { blocks: Vec<BlockAddress>, _arena: Arena },
    /// In blocks that are written to, or that the peer reads for.
    Pushed(Pushed),
}

#[derive(Debug)]
struct Pushed {
    pushes: Pushes,
    bridge: Bridge,
    layout: Arc<KvLayout>,
    source: PushSource,
}

/// Where the peer's bytes are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PushSource {
    /// This worker's arena, or what was made of it.
    Arena,
    /// The same, where the peer reads by itself.
    ArenaToRead,
    /// Blocks of the device, which copies them to the peer's.
    Device,
}

/// What the driver does about an announced reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Announced {
    /// Compute in the peer's blocks; this many tokens are there already.
    ComputeInPlace { cached: TokenCount },
    /// Compute in own blocks, then push.
    ComputeAndPush,
    /// Nobody waits for it.
    Unknown,
}

/// What pushing reads: this worker's blocks and the means to convert them.
pub(crate) struct Origin<'a> {
    pub(crate) scheduler: &'a Scheduler,
    pub(crate) arena: &'a Arena,
    pub(crate) cpu: &'a Cpu,
    pub(crate) endpoint: &'a Endpoint,
}

impl Outgoings {
    /// None yet.
    pub(crate) fn new(tail: Arc<Tail>) -> Self {
        let (by_handoff, staging, waiting) = Default::default();
        Self { by_handoff, staging, tail, waiting, caught_up: Vec::new() }
    }

    /// A prompt for another worker has come.
    pub(crate) fn begin(&mut self, handoff: HandoffId, request: RequestId) {
        let outgoing = Outgoing { request, target: Target::Unknown, first_token: None, ended: false };
        self.by_handoff.insert(handoff, outgoing);
    }

    /// The request of a handoff.
    pub(crate) fn request(&self, handoff: HandoffId) -> Option<RequestId> {
        self.by_handoff.get(&handoff).map(|outgoing| outgoing.request)
    }

    /// The peer's reservation has arrived. `in_place`: the request waits for it and has no blocks of its own.
    pub(crate) fn announce(&mut self, reserved: &Reserved, in_place: bool) -> Announced {
        let Some(outgoing) = self.by_handoff.get_mut(&reserved.handoff) else { return Announced::Unknown };
        let layout = &reserved.layout;
        match &reserved.path {
            Path::InPlace(region) if in_place => {
                let arena = Arena::over(Arc::clone(region), (**layout).clone());
                let all = reserved.cached.iter().chain(&reserved.targets);
                let blocks = all.map(|reference| arena.address(reference.block)).collect();
                outgoing.target = Target::InPlace { blocks, _arena: arena };
                let cached = reserved.first_block * layout.block_len.tokens();
                Announced::ComputeInPlace { cached: TokenCount(cached) }
            }
            Path::InPlace(_) | Path::Write | Path::Device | Path::Read => {
                let targets =
                    u32::try_from(reserved.targets.len()).expect("a frame bounds the number of blocks");
                let layers = usize::from(layout.layers);
                let pushes =
                    Pushes::new(layout.block_len, reserved.first_block, targets, reserved.tokens, layers);
                let (bridge, layout) = (reserved.bridge, Arc::clone(layout));
                let source = match reserved.path {
                    Path::InPlace(_) | Path::Write => PushSource::Arena,
                    Path::Read => PushSource::ArenaToRead,
                    Path::Device => PushSource::Device,
                };
                outgoing.target = Target::Pushed(Pushed { pushes, bridge, layout, source });
                Announced::ComputeAndPush
            }
        }
    }

    /// Whether the peer has not announced where it wants the KV cache.
    pub(crate) fn awaits_reservation(&self, handoff: HandoffId) -> bool {
        self.by_handoff.get(&handoff).is_some_and(|outgoing| matches!(outgoing.target, Target::Unknown))
    }

    /// The peer's blocks that a prompt is computed in; `None` when it is computed in own blocks.
    pub(crate) fn blocks_in_place(&self, handoff: HandoffId) -> Option<&[BlockAddress]> {
        match &self.by_handoff.get(&handoff)?.target {
            Target::InPlace { blocks, .. } => Some(blocks),
            Target::Unknown | Target::Pushed(_) => None,
        }
    }

    /// Takes what is due of `layers` now that `computed` tokens of the prompt are there.
    pub(crate) fn due(
        &mut self,
        handoff: HandoffId,
        layers: Range<usize>,
        computed: TokenCount,
    ) -> Option<Vec<Piece>> {
        let outgoing = self.by_handoff.get_mut(&handoff)?;
        let Target::Pushed(Pushed { pushes, .. }) = &mut outgoing.target else { return None };
        let due = pushes.take_due(layers, computed);
        if outgoing.ended || due.is_empty() {
            return None;
        }
        let pieces = due
            .into_iter()
            .flat_map(|Due { layers, targets }| targets.map(move |target| (layers.clone(), target)))
            .collect();
        Some(pieces)
    }

    /// The parts of own blocks, which lie in `table`, that pieces are made from.
    pub(crate) fn parts(
        &self,
        handoff: HandoffId,
        pieces: &[Piece],
        table: &[BlockRef],
        block_len: usize,
    ) -> Parts {
        let Some(Target::Pushed(Pushed { pushes, .. })) = self.by_handoff.get(&handoff).map(|it| &it.target)
        else {
            return Parts::new();
        };
        let mut parts = Parts::new();
        for (layers, target) in pieces {
            let tokens = pushes.tokens_of(*target);
            let blocks = tokens.start as usize / block_len..(tokens.end as usize).div_ceil(block_len);
            let layers = LayerRange::from(layers.clone());
            parts.extend(table[blocks].iter().map(|reference| (reference.block, layers)));
        }
        parts
    }

    /// Pushes pieces of a prompt; the arena holds what they are made from.
    pub(crate) fn push(&mut self, handoff: HandoffId, pieces: Vec<Piece>, origin: &Origin<'_>) {
        let Some(Outgoing { request, target: Target::Pushed(pushed), .. }) = self.by_handoff.get(&handoff)
        else {
            return;
        };
        let table = origin.scheduler.block_table(*request);
        match pushed.bridge {
            Bridge::Identical => {
                origin.endpoint.push(handoff, origin.as_it_is(&pushed.pushes, pieces, table));
            }
            Bridge::Convert { .. } if pushed.source == PushSource::ArenaToRead => {
                self.waiting.add(handoff, pieces);
                self.push_waiting(origin);
            }
            Bridge::Convert { .. } => {
                let mut slab = self.staging.take(pushed.bytes(&pieces));
                let image = Arc::get_mut(&mut slab).expect("nobody reads what was just taken").as_mut_slice();
                origin.convert(pushed, &pieces, table, image);
                let writes = pushed.writes(pieces, |at| Source::Slab(Arc::clone(&slab), at));
                origin.endpoint.push(handoff, writes);
                self.staging.keep(slab);
            }
        }
    }

    /// Whether pieces go from the device to that of the peer, and not through the arena.
    pub(crate) fn goes_by_device(&self, handoff: HandoffId) -> bool {
        let target = self.by_handoff.get(&handoff).map(|outgoing| &outgoing.target);
        matches!(target, Some(Target::Pushed(Pushed { source: PushSource::Device, .. })))
    }

    /// Pushes pieces of a prompt that goes by device, as the device has them once it has computed what it was asked for so far.
    pub(crate) fn push_from_device(
        &mut self,
        handoff: HandoffId,
        pieces: Vec<Piece>,
        origin: &Origin<'_>,
        pool: &DevicePool,
    ) -> Result<(), CudaError> {
        let Some(Outgoing { request, target: Target::Pushed(pushed), .. }) = self.by_handoff.get(&handoff)
        else {
            return Ok(());
        };
        let (shape, table) = (origin.arena.shape(), origin.scheduler.block_table(*request));
        let mut writes = Vec::with_capacity(pieces.len());
        for (layers, target) in pieces {
            let tokens = pushed.pushes.tokens_of(target);
            let block = table[tokens.start as usize / shape.block_len].block;
            if tokens.len() < shape.block_len {
                // As in the arena.
                pool.zero_tail(block, shape, layers.clone(), tokens.len())?;
            }
            let offset = layers.start * shape.layer_stride;
            writes.push(PushWrite {
                target_index: target,
                offset,
                len: layers.len() * shape.layer_stride,
                source: Source::Device { offset: origin.arena.offset(block) + offset },
            });
        }
        pool.push_after_compute()?;
        origin.endpoint.push(handoff, writes);
        Ok(())
    }

    /// Pushes what waits for room in the tail, as far as there is some.
    pub(crate) fn push_waiting(&mut self, origin: &Origin<'_>) {
        let Self { by_handoff, waiting, tail, caught_up, .. } = self;
        let pushed = |handoff: HandoffId| match &by_handoff[&handoff] {
            Outgoing { request, target: Target::Pushed(pushed), .. } => (*request, pushed),
            Outgoing { .. } => unreachable!("only what is pushed waits"),
        };
        while let Some((handoff, pieces)) =
            waiting.take(tail.longest(), |handoff| pushed(handoff).1.layer_bytes())
        {
            let (request, pushed) = pushed(handoff);
            let mut room = tail.take(pushed.bytes(&pieces)).expect("others only give back");
            let table = origin.scheduler.block_table(request);
            origin.arena.fill(&mut room, |image| origin.convert(pushed, &pieces, table, image));
            let room = Arc::new(room);
            let writes = pushed.writes(pieces, |at| Source::Tail(Arc::clone(&room), at));
            origin.endpoint.push(handoff, writes);
            if !waiting.has(handoff) {
                caught_up.push(handoff);
            }
        }
    }

    /// Handoffs of which pieces waited for room in the tail, and none does now.
    pub(crate) fn take_caught_up(&mut self) -> Vec<HandoffId> {
        std::mem::take(&mut self.caught_up)
    }

    /// The prompt is computed and its first token known.
    pub(crate) fn computed(&mut self, handoff: HandoffId, first_token: FirstToken) {
        if let Some(outgoing) = self.by_handoff.get_mut(&handoff) {
            outgoing.first_token = Some(first_token);
        }
    }

    /// Takes the commit's payload once everything else has been said: all is pushed, or was computed in place.
    pub(crate) fn take_commit(&mut self, handoff: HandoffId) -> Option<FirstToken> {
        let outgoing = self.by_handoff.get_mut(&handoff)?;
        let is_complete = match &outgoing.target {
            Target::Unknown => false,
            Target::InPlace { .. } => true,
            Target::Pushed(Pushed { pushes, .. }) => pushes.is_complete() && !self.waiting.has(handoff),
        };
        let first_token = outgoing.first_token.take_if(|_| is_complete && !outgoing.ended)?;
        outgoing.ended = true;
        Some(first_token)
    }

    /// The handoff will not complete: nothing more is pushed. True when the endpoint has not been told.
    pub(crate) fn give_up(&mut self, handoff: HandoffId) -> bool {
        self.waiting.remove(handoff);
        self.by_handoff
            .get_mut(&handoff)
            .is_some_and(|outgoing| !std::mem::replace(&mut outgoing.ended, true))
    }

    /// The sender is quiet: forgets the handoff and returns its request.
    pub(crate) fn end(&mut self, handoff: HandoffId) -> Option<RequestId> {
        self.waiting.remove(handoff);
        self.by_handoff.remove(&handoff).map(|outgoing| outgoing.request)
    }
}

impl Pushed {
    /// Bytes of a layer of a block of the peer.
    fn layer_bytes(&self) -> usize {
        self.layout.strides().layer
    }

    /// Bytes that pieces have at the peer.
    fn bytes(&self, pieces: &[Piece]) -> usize {
        pieces.iter().map(|(layers, _)| layers.len()).sum::<usize>() * self.layer_bytes()
    }

    /// Pieces that were converted one behind the other into one memory; `source` names a place there.
    fn writes(&self, pieces: Vec<Piece>, source: impl Fn(usize) -> Source) -> Vec<PushWrite> {
        let layer_bytes = self.layer_bytes();
        let mut at = 0;
        let write = |(layers, target): Piece| {
            let len = layers.len() * layer_bytes;
            let source = source(at);
            at += len;
            PushWrite { target_index: target, offset: layers.start * layer_bytes, len, source }
        };
        pieces.into_iter().map(write).collect()
    }
}

impl Origin<'_> {
    /// The peer's blocks are ours, byte for byte.
    fn as_it_is(&self, pushes: &Pushes, pieces: Vec<Piece>, table: &[BlockRef]) -> Vec<PushWrite> {
        let shape = self.arena.shape();
        let write = |(layers, target): Piece| {
            let tokens = pushes.tokens_of(target);
            let block = table[tokens.start as usize / shape.block_len].block;
            if tokens.len() < shape.block_len {
                // What an earlier user of the block left behind its last token is nobody else's business.
                self.cpu.zero_tail(shape, self.arena.address(block), tokens.len());
            }
            let offset = layers.start * shape.layer_stride;
            PushWrite {
                target_index: target,
                offset,
                len: layers.len() * shape.layer_stride,
                source: Source::Region { offset: self.arena.offset(block) + offset },
            }
        };
        pieces.into_iter().map(write).collect()
    }

    /// The peer's blocks are gathered and converted, one piece behind the other.
    fn convert(&self, pushed: &Pushed, pieces: &[Piece], table: &[BlockRef], image: &mut [u8]) {
        let Pushed { pushes, layout, .. } = pushed;
        let shape = &block_shape(layout);
        // A tensor-parallel peer holds some of our heads.
        let first_head = usize::from(layout.heads.first - self.arena.layout().heads.first);
        let blocks: Vec<BlockAddress> =
            table.iter().map(|reference| self.arena.address(reference.block)).collect();
        let mut rest = image;
        for (layers, target) in pieces {
            let (image, behind) = rest.split_at_mut(layers.len() * shape.layer_stride);
            let tokens = pushes.tokens_of(*target);
            let (first, count) = (tokens.start as usize, tokens.len());
            let from = TokenSpan { shape: self.arena.shape(), blocks: &blocks, first, count };
            self.cpu.convert_block(image, shape, layers.clone(), from, first_head);
            rest = behind;
        }
    }
}

#[cfg(test)]
mod tests;
