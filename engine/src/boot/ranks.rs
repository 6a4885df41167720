//! What starting as several ranks takes besides.

use std::thread::available_parallelism;

use tidemill_kernels::cpu::Ranks;

use super::placement::{Nodes, place};
use super::{Boot, Booted, host_room};
use crate::device::Device;
use crate::engine::EngineError;
use crate::handle::EngineConfig;
use crate::models::{Model, ModelSpec};
use crate::runner::{HostRunner, RankedRunner};
use crate::weights::Shard;

/// Ranks, and the cores of each; none where they are not kept to any.
pub(super) struct Started {
    pub(super) ranks: Ranks,
    pub(super) cores: Vec<Vec<usize>>,
}

/// Starts the threads of all ranks, if so many can share the model.
pub(super) fn start(config: &EngineConfig) -> Result<Started, EngineError> {
    let count = config.tensor_parallel as usize;
    if let Some(reason) = Shard::refusal(count, &ModelSpec::read(&config.model)?) {
        return Err(EngineError::Setting(reason));
    }
    let all = available_parallelism().map_or(1, usize::from);
    let options = place(config, all, &Nodes::of_machine());
    let ranks = Ranks::new(&options).map_err(|error| EngineError::Device(error.to_string()))?;
    Ok(Started { ranks, cores: options.into_iter().map(|options| options.cores).collect() })
}

/// Loads each rank's part of the model, and starts everything around them.
pub(super) fn boot(boot: Boot<'_>, ranks: Ranks, cores: &[Vec<usize>]) -> Result<Booted, EngineError> {
    let model = Model::load_ranks(boot.options, cores, &boot.config.model, boot.progress)?;
    let (whole, shards) = model.into_shards();
    let bytes: Vec<usize> = shards.iter().map(|shard| shard.weights.bytes()).collect();
    tracing::info!(ranks = bytes.len(), ?bytes, ?cores, "ranks share the model");
    boot.run(&whole, host_room(), |_, arena, limits| {
        let described = ranks.describe();
        let runner = RankedRunner::new(whole.spec.clone(), shards, ranks, *arena.shape(), limits);
        Ok((Device::Cpu(Box::new(HostRunner::Ranks(runner))), None, described))
    })
}
