//! What a GPU must be able to do for a configuration: one list, gone through once, before weights are read.
//!
//! What is asked of one of several GPUs that share a model is asked of each. A GPU that was asked for by its number is refused with the first reason; where `auto` was asked for the processor computes instead,
//! and the log says why.

use std::sync::Arc;

use tidemill_kernels::cuda::Driver;

use crate::device::name_of;
use crate::engine::EngineError;
use crate::handle::{EngineConfig, ModelSource, Quantization};
use crate::models::ModelSpec;
use crate::runner::{CudaRunner, RunnerLimits};
use crate::weights::{self, Shard};

/// What is asked of a GPU, or of each of several.
struct Demand<'a> {
    config: &'a EngineConfig,
    /// The whole model's.
    spec: &'a ModelSpec,
    gpus: &'a [Arc<dyn Driver>],
    /// Bytes of memory that are free, of the one with least.
    free: u64,
}

impl Demand<'_> {
    /// Bytes that weights take at least.
    fn weights(&self) -> u64 {
        let config = self.config;
        // Of files in fewer bits nobody knows here in how many, but hardly in fewer than four.
        let are_packed = self.spec.packing.is_some() || matches!(config.model, ModelSource::Gguf(_));
        let packed = are_packed.then_some(Quantization::Int4 { group: 32 });
        weights::least_bytes(self.spec, config.quantization.or(packed), self.ranks())
    }

    fn ranks(&self) -> usize {
        self.config.tensor_parallel as usize
    }

    /// The shape of what one GPU computes: the first, beside which others have as many heads.
    fn of_one(&self) -> ModelSpec {
        Shard { rank: 0, ranks: self.ranks() }.spec(self.spec)
    }
}

/// Why the GPU cannot, if it cannot.
type Requirement = fn(&Demand<'_>) -> Option<String>;

/// All there are; the first that is not met is told.
const REQUIREMENTS: [Requirement; 6] =
    [as_many_as_ranks, shared, exchange, shape, memory_for_weights, memory_for_blocks];

impl EngineConfig {
    /// The GPUs that are to compute, one for each rank, which can do what this configuration asks for; `None` where it is the processor.
    ///
    /// # Errors
    ///
    /// The model's configuration cannot be read, or a GPU that was asked for by its number cannot do what is asked for: with the reason.
    pub fn settle_device(&self) -> Result<Option<Vec<Arc<dyn Driver>>>, EngineError> {
        let gpus = self.device.gpus();
        if gpus.is_empty() {
            return Ok(None);
        }
        match self.unmet(gpus)? {
            None => Ok(Some(gpus.to_vec())),
            Some(reason) if self.device.is_or_cpu() => {
                let gpu = name_of(gpus);
                tracing::warn!(%reason, %gpu, "computes on the CPU, as the GPU cannot do this");
                Ok(None)
            }
            Some(reason) => Err(EngineError::Device(reason)),
        }
    }

    /// The first requirement that the GPUs do not meet.
    fn unmet(&self, gpus: &[Arc<dyn Driver>]) -> Result<Option<String>, EngineError> {
        let spec = ModelSpec::read(&self.model)?;
        let mut free = u64::MAX;
        for gpu in gpus {
            free = free.min(gpu.memory()?.free as u64);
        }
        let demand = Demand { config: self, spec: &spec, gpus, free };
        Ok(REQUIREMENTS.iter().find_map(|requirement| requirement(&demand)))
    }
}

fn as_many_as_ranks(demand: &Demand<'_>) -> Option<String> {
    let (ranks, gpus) = (demand.ranks(), demand.gpus.len());
    (ranks != gpus)
        .then(|| format!("--tensor-parallel-size {ranks} takes a GPU for each rank, and {gpus} are there"))
}

fn shared(demand: &Demand<'_>) -> Option<String> {
    Shard::refusal(demand.ranks(), demand.spec)
}

fn exchange(demand: &Demand<'_>) -> Option<String> {
    let missing = || demand.gpus.iter().find_map(|gpu| gpu.exchange().err());
    if demand.gpus.len() == 1 { None } else { missing() }
}

fn shape(demand: &Demand<'_>) -> Option<String> {
    let limits = RunnerLimits {
        max_tokens: demand.config.max_num_batched_tokens as usize,
        max_seqs: demand.config.max_num_seqs as usize,
        max_model_len: 1,
    };
    CudaRunner::refusal(&demand.of_one(), limits)
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
        // Of all heads.
        Some(asked_for) => (asked_for / demand.spec.kv_heads as u64 * demand.of_one().kv_heads as u64, left),
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
    let spec = &demand.of_one();
    let head = match demand.config.kv_cache_dtype {
        None => spec.head_size * spec.dtype.bytes(),
        Some(dtype) if dtype.has_scales() => spec.head_size * dtype.bytes() + size_of::<f32>(),
        Some(dtype) => spec.head_size * dtype.bytes(),
    };
    (2 * spec.layers * spec.kv_heads * head) as u64
}
