//! The device that an engine computes on, as its thread sees it.
//!
//! A CPU computes in the blocks that peers know of. A GPU has blocks of its own, as many and by the same numbers: block 7
//! of the pool holds what block 7 of the arena is for. Peers know of the arena alone, in memory of the host; what goes
//! to a peer, or is read by one, comes down first, and what came from one goes up before it is used. So whatever a peer may still
//! write, and until when, is as on a CPU. Peers' GPUs on this host that reach the pool write into it by the same rules (`docs/decisions/0024`).

#[cfg(test)]
tidemill_kernels::where_emulated! {
    mod tests;
}

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::{self, CudaError, PinnedAddress, Queue, Ticket};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef};

use crate::memory::{Arena, DevicePool, Holder, Slice};
use crate::models::ModelSpec;
use crate::runner::{CudaRunner, HostRunner};

/// What to compute on.
#[derive(Clone, Debug, Default)]
pub enum DeviceChoice {
    /// The processor, by the instructions and threads that the configuration names.
    #[default]
    Cpu,
    /// A GPU that was opened. What it cannot do is refused.
    Cuda(Arc<dyn cuda::Driver>),
    /// A GPU that was opened, if it can do what is asked for, else the processor.
    CudaOrCpu(Arc<dyn cuda::Driver>),
    /// A GPU for each rank. What they cannot do is refused.
    CudaRanks(Vec<Arc<dyn cuda::Driver>>),
    /// A GPU for each rank, if they can do what is asked for, else the processor.
    CudaRanksOrCpu(Vec<Arc<dyn cuda::Driver>>),
}

impl DeviceChoice {
    /// The GPUs that were opened.
    pub fn gpus(&self) -> &[Arc<dyn cuda::Driver>] {
        match self {
            Self::Cpu => &[],
            Self::Cuda(gpu) | Self::CudaOrCpu(gpu) => std::slice::from_ref(gpu),
            Self::CudaRanks(gpus) | Self::CudaRanksOrCpu(gpus) => gpus,
        }
    }

    /// Whether the processor computes where GPUs cannot.
    pub const fn is_or_cpu(&self) -> bool {
        matches!(self, Self::Cpu | Self::CudaOrCpu(_) | Self::CudaRanksOrCpu(_))
    }
}

/// What computes.
#[derive(Debug)]
pub(crate) enum Device {
    Cpu(Box<HostRunner>),
    Cuda(Box<CudaRunner>),
}

/// Parts of blocks: which layers of which block.
pub(crate) type Parts = BTreeSet<(BlockId, LayerRange)>;

/// Layers from one on up to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LayerRange {
    first: usize,
    end: usize,
}

impl Device {
    pub(crate) fn spec(&self) -> &ModelSpec {
        match self {
            Self::Cpu(runner) => runner.spec(),
            Self::Cuda(runner) => &runner.model().spec,
        }
    }
}

/// Parts of blocks on their way down to the arena.
#[derive(Debug)]
pub(crate) struct Descent {
    /// Which layers of a block, and where they land: of all that have it.
    copies: Vec<Vec<(BlockId, LayerRange, PinnedAddress)>>,
    /// Theirs, one each.
    tickets: Vec<Ticket>,
}

impl DevicePool {
    /// Begins to bring parts of blocks down, beside whatever computes, to the landing from `used` bytes on, which rises. `None`
    /// when they do not fit there.
    pub(crate) fn start_down(
        &self,
        parts: &Parts,
        arena: &Arena,
        used: &mut usize,
    ) -> Result<Option<Descent>, CudaError> {
        let bytes: usize = parts.iter().map(|(_, layers)| self.own(layers.range(), arena).len()).sum();
        if self.landing().bytes() - *used < bytes {
            return Ok(None);
        }
        self.await_ranks();
        let first = std::mem::replace(used, *used + bytes);
        let mut descent = Descent { copies: Vec::new(), tickets: Vec::new() };
        for holder in self.holders().filter(|holder| holder.is_read) {
            let mut copies = Vec::with_capacity(parts.len());
            let mut place = first;
            for &(block, layers) in parts {
                let part = self.own(layers.range(), arena);
                let to = holder.landing.address().offset(place);
                let from = holder.address(block).offset(part.start);
                holder.driver().start_download(Queue::Transfer, to, from, part.len())?;
                place += part.len();
                copies.push((block, layers, to));
            }
            descent.copies.push(copies);
            descent.tickets.push(holder.driver().ticket(Queue::Transfer)?);
        }
        Ok(Some(descent))
    }

    /// Waits for parts that come down, and puts them into the arena.
    pub(crate) fn land(&self, descent: Descent, arena: &Arena) -> Result<(), CudaError> {
        let holders = self.holders().filter(|holder| holder.is_read);
        for ((holder, copies), ticket) in holders.zip(descent.copies).zip(descent.tickets) {
            holder.driver().wait(ticket)?;
            for (block, layers, from) in copies {
                let read = |bytes: Range<usize>, target: &mut [u8]| {
                    holder.driver().read_pinned(target, from.offset(bytes.start));
                };
                self.put(&holder, block, layers, arena, read);
            }
        }
        Ok(())
    }

    /// Brings parts of blocks down when everything that was asked for is done.
    pub(crate) fn bring_down(&self, parts: &Parts, arena: &Arena) -> Result<(), CudaError> {
        let mut of_rank = Vec::new();
        for holder in self.holders().filter(|holder| holder.is_read) {
            for &(block, layers) in parts {
                let part = self.own(layers.range(), arena);
                let from = holder.address(block).offset(part.start);
                if holder.slices.is_none() {
                    arena.write(block, part, |target| holder.driver().download(target, from))?;
                    continue;
                }
                of_rank.resize(part.len(), 0);
                holder.driver().download(&mut of_rank, from)?;
                let read = |bytes: Range<usize>, target: &mut [u8]| target.copy_from_slice(&of_rank[bytes]);
                self.put(&holder, block, layers, arena, read);
            }
        }
        Ok(())
    }

    /// Bytes of a block here that some layers are.
    fn own(&self, layers: Range<usize>, arena: &Arena) -> Range<usize> {
        let stride = arena.shape().layer_stride;
        let holder = self.holders().next().expect("somebody has the blocks");
        match holder.slices {
            Some(slices) => slices.own(&layers),
            None => layers.start * stride..layers.end * stride,
        }
    }

    /// Writes what a holder has of some layers of a block; `read` has them, its first byte being theirs.
    fn put(
        &self,
        holder: &Holder<'_>,
        block: BlockId,
        layers: LayerRange,
        arena: &Arena,
        mut read: impl FnMut(Range<usize>, &mut [u8]),
    ) {
        let own = self.own(layers.range(), arena);
        let Some(slices) = holder.slices else {
            return arena.write(block, own.clone(), |target| read(0..own.len(), target));
        };
        for Slice { whole, own: bytes } in slices.of(layers.range()) {
            let bytes = bytes.start - own.start..bytes.end - own.start;
            arena.write(block, whole, |target| read(bytes, target));
        }
    }

    /// Brings cached blocks down, which are full, where the arena does not have them: a peer that computes what comes behind them
    /// in the arena itself reads them there.
    pub(crate) fn bring_down_cached(&mut self, blocks: &[BlockRef], arena: &Arena) -> Result<(), CudaError> {
        let layers = LayerRange::from(0..arena.shape().layers);
        for &reference in blocks {
            if !self.is_same(reference) {
                self.bring_down(&Parts::from([(reference.block, layers)]), arena)?;
                self.set_same(reference);
            }
        }
        Ok(())
    }

    /// Takes blocks that a peer has filled up to the device; the first so many are full.
    pub(crate) fn bring_up(
        &mut self,
        blocks: &[BlockRef],
        full: usize,
        arena: &Arena,
    ) -> Result<(), CudaError> {
        let layers = 0..arena.shape().layers;
        for (index, &reference) in blocks.iter().enumerate() {
            for holder in self.holders() {
                let to = holder.address(reference.block);
                arena.read(reference.block, |bytes| {
                    let Some(slices) = holder.slices else { return holder.driver().upload(to, bytes) };
                    let mut of_rank = vec![0; holder.block_bytes()];
                    for Slice { whole, own } in slices.of(layers.clone()) {
                        of_rank[own].copy_from_slice(&bytes[whole]);
                    }
                    holder.driver().upload(to, &of_rank)
                })?;
            }
            if index < full {
                self.set_same(reference);
            }
        }
        Ok(())
    }
}

impl LayerRange {
    const fn range(self) -> Range<usize> {
        self.first..self.end
    }
}

impl From<Range<usize>> for LayerRange {
    fn from(Range { start, end }: Range<usize>) -> Self {
        Self { first: start, end }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => formatter.write_str("cpu"),
            _ => formatter.write_str(&name_of(self.gpus())),
        }
    }
}

/// What GPUs are called together.
pub(crate) fn name_of(gpus: &[Arc<dyn cuda::Driver>]) -> String {
    match gpus {
        [] => "cpu".to_owned(),
        [gpu] => gpu.properties().name.clone(),
        [first, ..] => format!("{} x {}", gpus.len(), first.properties().name),
    }
}
