//! The device that an engine computes on, as its thread sees it.
//!
//! A CPU computes in the blocks that peers know of. A GPU has blocks of its own, as many and by the same numbers: block 7
//! of the pool holds what block 7 of the arena is for. Peers know of the arena alone, in memory of the host; what goes
//! to a peer, or is read by one, comes down first, and what came from one goes up before it is used. So whatever a peer may still
//! write, and until when, is as on a CPU, and no peer ever touches memory that the GPU computes in.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::{self, CudaError, PinnedAddress, Queue, Ticket};
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef};

use crate::memory::{Arena, DevicePool};
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
    /// Which bytes of a block, and where they land.
    copies: Vec<(BlockId, Range<usize>, PinnedAddress)>,
    ticket: Ticket,
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
        let stride = arena.shape().layer_stride;
        let bytes: usize = parts.iter().map(|(_, layers)| (layers.end - layers.first) * stride).sum();
        if self.landing().bytes() - *used < bytes {
            return Ok(None);
        }
        let mut copies = Vec::with_capacity(parts.len());
        for &(block, layers) in parts {
            let part = layers.first * stride..layers.end * stride;
            let to = self.landing().address().offset(*used);
            let from = self.address(block).offset(part.start);
            self.driver().start_download(Queue::Transfer, to, from, part.len())?;
            *used += part.len();
            copies.push((block, part, to));
        }
        Ok(Some(Descent { copies, ticket: self.driver().ticket(Queue::Transfer)? }))
    }

    /// Waits for parts that come down, and puts them into the arena.
    pub(crate) fn land(&self, descent: Descent, arena: &Arena) -> Result<(), CudaError> {
        let Descent { copies, ticket } = descent;
        self.driver().wait(ticket)?;
        for (block, part, from) in copies {
            arena.write(block, part, |target| self.driver().read_pinned(target, from));
        }
        Ok(())
    }

    /// Brings parts of blocks down when everything that was asked for is done.
    pub(crate) fn bring_down(&self, parts: &Parts, arena: &Arena) -> Result<(), CudaError> {
        let stride = arena.shape().layer_stride;
        for &(block, layers) in parts {
            let part = layers.first * stride..layers.end * stride;
            let from = self.address(block).offset(part.start);
            arena.write(block, part, |target| self.driver().download(target, from))?;
        }
        Ok(())
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
        for (index, &reference) in blocks.iter().enumerate() {
            let to = self.address(reference.block);
            arena.read(reference.block, |bytes| self.driver().upload(to, bytes))?;
            if index < full {
                self.set_same(reference);
            }
        }
        Ok(())
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
            Self::Cuda(driver) | Self::CudaOrCpu(driver) => formatter.write_str(&driver.properties().name),
        }
    }
}
