//! What starting on a GPU takes besides.

use std::sync::Arc;

use tidemill_kernels::cuda::Driver;

use super::Opened;
use crate::device::Device;
use crate::engine::EngineError;
use crate::handle::{CudaGraphs, EngineConfig};
use crate::memory::{Arena, DevicePool};
use crate::models::{Model, ModelSpec};
use crate::runner::{CudaRunner, RunnerLimits};
use crate::weights::DeviceWeights;

/// Refuses, before weights are read, what the kernels do not do.
pub(super) fn check(config: &EngineConfig) -> Result<(), EngineError> {
    let limits = RunnerLimits {
        max_tokens: config.max_num_batched_tokens as usize,
        max_seqs: config.max_num_seqs as usize,
        max_model_len: 1,
    };
    match CudaRunner::refusal(&ModelSpec::read(&config.model)?, limits) {
        Some(reason) => Err(EngineError::Device(reason)),
        None => Ok(()),
    }
}

/// Bytes that blocks can have, with the weights on the device: three quarters of what is left, which leaves room for the buffers
/// of a step and for graphs.
pub(super) fn room(driver: &Arc<dyn Driver>) -> Result<u64, EngineError> {
    let memory = driver.memory()?;
    Ok(memory.free as u64 / 4 * 3)
}

/// Makes the blocks and buffers on the device.
pub(super) fn open(
    driver: &Arc<dyn Driver>,
    model: &Arc<Model<DeviceWeights>>,
    arena: &Arena,
    limits: RunnerLimits,
    graphs: &CudaGraphs,
) -> Result<Opened, EngineError> {
    let pool = DevicePool::new(driver, arena.shape().block_bytes(), arena.blocks())?;
    let sizes = graphs.sizes(limits);
    let runner = CudaRunner::new(Arc::clone(model), Arc::clone(driver), *arena.shape(), limits, &sizes)?;
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
