//! What starting on a GPU takes besides.

use std::sync::Arc;

use tidemill_kernels::cuda::Driver;
use tidemill_kernels::cuda::hopper::BlockRange;
use tidemill_kvtransfer_proto::layout::{HeadRange, KvLayout};

use super::{Boot, Booted, Opened, layout};
use crate::device::{Device, name_of};
use crate::engine::EngineError;
use crate::handle::CudaGraphs;
use crate::memory::{Arena, Asked, DevicePool, RankHeads, block_shape};
use crate::models::{Model, ModelSpec};
use crate::requirements;
use crate::runner::{CudaRank, CudaRanks, CudaRunner, RunnerLimits};
use crate::weights::{DeviceWeights, Shard};

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
    runner.set_library_rows(library_rows(batch_invariant));
    tell(driver, &pool, &sizes, batch_invariant);
    Ok((Device::Cuda(Box::new(runner)), Some(pool), driver.properties().name.clone()))
}

/// Loads each rank's part of the model onto its GPU, and starts everything around them.
pub(super) fn boot_ranks(boot: Boot<'_>, gpus: &[Arc<dyn Driver>]) -> Result<Booted, EngineError> {
    let model = Model::load_ranks_on(gpus, boot.options, &boot.config.model, boot.progress)?;
    let (whole, shards) = model.into_shards();
    let layout = layout(&boot.config, &whole)?;
    let heads = heads_of(gpus, &whole.spec, &layout);
    let mut blocks = u64::MAX;
    for rank in &heads {
        blocks = blocks.min(room(&rank.driver)? / rank.shape.block_bytes() as u64);
    }
    let room = blocks.saturating_mul(layout.block_bytes() as u64);
    let (graphs, invariant) = (boot.config.cuda_graphs.clone(), boot.config.batch_invariant);
    boot.run(&whole, Some(room), |_, arena, limits| {
        let asked = Arc::new(Asked::new(heads.len() - 1));
        let pool = DevicePool::of_ranks(arena.shape(), &heads, arena.blocks(), &asked)?;
        let sizes = graphs.sizes(limits);
        let parts = heads.iter().zip(&shards).zip(pool.firsts());
        let ranks = parts.map(|((rank, model), first)| CudaRank {
            driver: Arc::clone(&rank.driver),
            model: Arc::clone(model),
            blocks: BlockRange { first, count: arena.blocks().0, shape: rank.shape },
        });
        let ranks = CudaRanks {
            spec: &whole.spec,
            ranks: ranks.collect(),
            limits,
            graph_sizes: &sizes,
            library_rows: library_rows(invariant),
            asked,
        };
        let runner = ranks.start()?;
        tell(&gpus[0], &pool, &sizes, invariant);
        let exchange = gpus[0].exchange().unwrap_or_else(|reason| reason);
        tracing::info!(ranks = gpus.len(), %exchange, "GPUs share the model");
        Ok((Device::Cuda(Box::new(runner)), Some(pool), name_of(gpus)))
    })
}

/// Which heads each rank keeps, in blocks of which shape.
fn heads_of(gpus: &[Arc<dyn Driver>], spec: &ModelSpec, layout: &KvLayout) -> Vec<RankHeads> {
    let bounded = |number| u16::try_from(number).expect("the spec's parser bounds it");
    let of_rank = |(shard, driver): (Shard, &Arc<dyn Driver>)| {
        let heads = shard.kv_heads(spec);
        let range = HeadRange { first: bounded(heads.start), count: bounded(heads.len()) };
        RankHeads {
            driver: Arc::clone(driver),
            shape: block_shape(&KvLayout { heads: range, ..layout.clone() }),
            first: heads.start,
            is_read: shard.stores_kv(spec),
        }
    };
    Shard::all(gpus.len()).zip(gpus).map(of_rank).collect()
}

/// Products of more rows than this are the library's.
fn library_rows(batch_invariant: bool) -> Option<usize> {
    (!batch_invariant).then_some(CudaRunner::LIBRARY_ROWS)
}

/// Says who multiplies, and where blocks are.
fn tell(driver: &Arc<dyn Driver>, pool: &DevicePool, graphs: &[usize], batch_invariant: bool) {
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
        blocks = pool.blocks().0,
        ?graphs,
        "KV blocks are on the GPU; handoffs that no peer's GPU takes go through as many blocks in memory of the host"
    );
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
