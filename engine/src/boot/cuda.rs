//! What starting on a GPU takes besides.

use std::sync::Arc;

use tidemill_kernels::cuda::Driver;

use super::Opened;
use crate::device::Device;
use crate::engine::EngineError;
use crate::handle::CudaGraphs;
use crate::memory::{Arena, DevicePool};
use crate::models::Model;
use crate::requirements;
use crate::runner::{CudaRunner, RunnerLimits};
use crate::weights::DeviceWeights;

/// Bytes that blocks can have, with the weights on the device.
pub(super) fn room(driver: &Arc<dyn Driver>) -> Result<u64, EngineError> {
    Ok(requirements::room_for_blocks(driver.memory()?.free as u64))
}

/// Makes the blocks and buffers on the device.
pub(super) fn open(
    driver: &Arc<dyn Driver>,
    model: &Arc<Model<DeviceWeights>>,
    arena: &Arena,
    limits: RunnerLimits,
    graphs: &CudaGraphs,
    batch_invariant: bool,
) -> Result<Opened, EngineError> {
    let pool = DevicePool::new(driver, arena.shape().block_bytes(), arena.blocks())?;
    let sizes = graphs.sizes(limits);
    let mut runner = CudaRunner::new(Arc::clone(model), Arc::clone(driver), *arena.shape(), limits, &sizes)?;
    runner.set_blocks(pool.range(arena.shape()));
    if batch_invariant {
        runner.set_library_rows(None);
    }
    match driver.library() {
        _ if batch_invariant => {
            tracing::info!("matrices are multiplied by kernels of our own, as was asked for")
        }
        Ok(library) => tracing::info!(%library, "multiplies large matrices"),
        Err(reason) => {
            tracing::warn!(%reason, "large matrices are multiplied by kernels of our own, which are slower")
        }
    }
    tracing::info!(
        bytes = pool.bytes(),
        blocks = arena.blocks().0,
        graphs = ?sizes,
        "KV blocks are on the GPU; handoffs go through as many blocks in memory of the host"
    );
    Ok((Device::Cuda(Box::new(runner)), Some(pool), driver.properties().name.clone()))
}

impl CudaGraphs {
    /// Numbers of rows that decode steps are recorded for.
    fn sizes(&self, limits: RunnerLimits) -> Vec<usize> {
        let sizes: Vec<usize> = match self {
            Self::Usual => {
                [1, 2, 4].into_iter().chain((8..=256).step_by(8)).chain((272..=512).step_by(16)).collect()
            }
            Self::Sizes(sizes) => sizes.iter().map(|size| *size as usize).collect(),
            Self::Off => Vec::new(),
        };
        sizes.into_iter().filter(|size| *size <= limits.max_seqs).collect()
    }
}
