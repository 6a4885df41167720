//! What a GPU must be able to do for a configuration: one list, gone through once, before weights are read.
//!
//! A GPU that was asked for by its number is refused with the first reason; where `auto` was asked for the processor computes instead,
//! and the log says why.

use std::sync::Arc;

use tidemill_kernels::cuda::Driver;

use crate::device::DeviceChoice;
use crate::engine::EngineError;
use crate::handle::{EngineConfig, ModelSource, Quantization};
use crate::models::ModelSpec;
use crate::runner::{CudaRunner, RunnerLimits};
use crate::weights;

/// What is asked of a GPU.
struct Demand<'a> {
    config: &'a EngineConfig,
    spec: &'a ModelSpec,
    /// Bytes of its memory that are free.
    free: u64,
}

impl Demand<'_> {
    /// Bytes that weights take at least.
    fn weights(&self) -> u64 {
        let config = self.config;
        // Of files in fewer bits nobody knows here in how many, but hardly in fewer than four.
        let are_packed = self.spec.packing.is_some() || matches!(config.model, ModelSource::Gguf(_));
        let packed = are_packed.then_some(Quantization::Int4 { group: 32 });
        weights::least_bytes(self.spec, config.quantization.or(packed))
    }
}

/// Why the GPU cannot, if it cannot.
type Requirement = fn(&Demand<'_>) -> Option<String>;

/// All there are; the first that is not met is told.
const REQUIREMENTS: [Requirement; 4] = [alone, shape, memory_for_weights, memory_for_blocks];

impl EngineConfig {
    /// The GPU that is to compute, which can do what this configuration asks for; `None` where it is the processor.
    ///
    /// # Errors
    ///
    /// The model's configuration cannot be read, or a GPU that was asked for by its number cannot do what is asked for: with the reason.
    pub fn settle_device(&self) -> Result<Option<Arc<dyn Driver>>, EngineError> {
        match &self.device {
            DeviceChoice::Cpu => Ok(None),
            DeviceChoice::Cuda(driver) => match self.unmet(driver)? {
                None => Ok(Some(Arc::clone(driver))),
                Some(reason) => Err(EngineError::Device(reason)),
            },
            DeviceChoice::CudaOrCpu(driver) => match self.unmet(driver)? {
                None => Ok(Some(Arc::clone(driver))),
                Some(reason) => {
                    let gpu = &driver.properties().name;
                    tracing::warn!(%reason, %gpu, "computes on the CPU, as the GPU cannot do this");
                    Ok(None)
                }
            },
        }
    }

    /// The first requirement that a GPU does not meet.
    fn unmet(&self, driver: &Arc<dyn Driver>) -> Result<Option<String>, EngineError> {
        let (spec, free) = (ModelSpec::read(&self.model)?, driver.memory()?.free as u64);
        let demand = Demand { config: self, spec: &spec, free };
        Ok(REQUIREMENTS.iter().find_map(|requirement| requirement(&demand)))
    }
}

fn alone(demand: &Demand<'_>) -> Option<String> {
    let ranks = demand.config.tensor_parallel;
    (1 < ranks)
        .then(|| format!("--tensor-parallel-size {ranks} is for the CPU: a GPU computes the whole model"))
}

fn shape(demand: &Demand<'_>) -> Option<String> {
    let limits = RunnerLimits {
        max_tokens: demand.config.max_num_batched_tokens as usize,
        max_seqs: demand.config.max_num_seqs as usize,
        max_model_len: 1,
    };
    CudaRunner::refusal(demand.spec, limits)
}

fn memory_for_weights(demand: &Demand<'_>) -> Option<String> {
    let (needed, free) = (demand.weights(), demand.free);
    (free < needed).then(|| {
        format!("weights of {needed} bytes: {free} bytes of the GPU's memory are free, take a smaller model")
    })
}

fn memory_for_blocks(demand: &Demand<'_>) -> Option<String> {
    let left = demand.free.saturating_sub(demand.weights());
    let block = token_bytes(demand) * u64::from(demand.config.block_len);
    let (needed, room) = match demand.config.kv_cache_memory {
        Some(asked_for) => (asked_for, left),
        None => (block * u64::from(least_blocks(demand.config)), room_for_blocks(left)),
    };
    (room < needed).then(|| {
        format!(
            "a KV cache of {needed} bytes: {room} bytes of the GPU's memory are left for it beside the weights, lower \
             --kv-cache-memory or --max-model-len"
        )
    })
}

/// Of `free` bytes that weights leave: the rest is for the buffers of a step and for graphs.
pub(crate) const fn room_for_blocks(free: u64) -> u64 {
    free / 4 * 3
}

/// Blocks of one sequence as long as it was asked for, or one block: without a length the limit follows the memory.
fn least_blocks(config: &EngineConfig) -> u32 {
    config.max_model_len.map_or(1, |tokens| tokens.div_ceil(config.block_len.max(1)))
}

/// Bytes of a token's keys and values.
fn token_bytes(demand: &Demand<'_>) -> u64 {
    let spec = demand.spec;
    let head = match demand.config.kv_cache_dtype {
        None => spec.head_size * spec.dtype.bytes(),
        Some(dtype) if dtype.has_scales() => spec.head_size * dtype.bytes() + size_of::<f32>(),
        Some(dtype) => spec.head_size * dtype.bytes(),
    };
    (2 * spec.layers * spec.kv_heads * head) as u64
}
