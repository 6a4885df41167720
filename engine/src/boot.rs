//! From a configuration to an engine that serves.
//!
//! Everything that can fail for a reason outside of this process fails here, with a message that names it; after that
//! the engine thread only computes.

mod cuda;
mod placement;
mod ranks;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use tidemill_engine_core::scheduler::{Limits, Scheduler};
use tidemill_engine_core::speculation::Speculation;
use tidemill_kernels::cpu::{Cpu, CpuOptions};
use tidemill_kvtransfer::device::DeviceBlocks;
use tidemill_kvtransfer::{Endpoint, EndpointConfig, Pages, Timing, Watch};
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::layout::KvLayout;
use tidemill_kvtransfer_proto::units::{BlockCount, BlockLen, TokenCount};

use crate::device::Device;
use crate::draft_model::DraftModel;
use crate::driver::{Driver, Inbox};
use crate::engine::{Command, EngineError, Shared};
use crate::handle::{
    Counters, Description, DigestCoverage, EngineConfig, GuessMethod, LoadProgress, TransportChoice,
};
use crate::memory::{Arena, DevicePool, available_bytes};
use crate::models::{LoadOptions, Model, ModelSpec};
use crate::roles::prefill::Outgoings;
use crate::runner::{HostRunner, Runner, RunnerLimits};
use crate::sampler::Sampler;

/// How the engine thread is reached and heard.
pub(crate) struct Wires {
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: Sender<Command>,
    pub(crate) inbox: Receiver<Command>,
}

/// An engine that is ready to run.
pub(crate) type Booted = (Driver, Description, Arc<Endpoint>);

/// Loads the model, takes the memory, opens the endpoint.
pub(crate) fn boot(
    config: EngineConfig,
    instance: u64,
    wires: Wires,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Booted, EngineError> {
    let (format, quantization) = (config.load_format, config.quantization);
    let device = config.settle_device()?;
    if device.is_none() && 1 < config.tensor_parallel {
        let ranks::Started { ranks, cores } = ranks::start(&config)?;
        let cpu = Arc::clone(&ranks.cpus()[0]);
        let threads = ranks.cpus().iter().map(|cpu| cpu.threads()).sum();
        let options = LoadOptions { threads, format, quantization };
        let boot = Boot { config, instance, wires, cpu, options, progress };
        return ranks::boot(boot, ranks, &cores);
    }
    let cpu = Cpu::new(CpuOptions { cores: config.cores.clone(), threads: config.threads, isa: config.isa })
        .map_err(|error| EngineError::Device(error.to_string()))?;
    let cpu = Arc::new(cpu);
    let options = LoadOptions { threads: cpu.threads(), format, quantization };
    let boot = Boot { config, instance, wires, cpu, options, progress };
    match device {
        None => {
            let model = Arc::new(Model::load_with(options, &boot.config.model, boot.progress)?);
            boot.run(&model, host_room(), |cpu, arena, limits| {
                let runner = Runner::new(Arc::clone(&model), Arc::clone(cpu), *arena.shape(), limits);
                Ok((Device::Cpu(Box::new(HostRunner::One(runner))), None, cpu.describe()))
            })
        }
        Some(gpus) => match &gpus[..] {
            [driver] => {
                let model = Arc::new(Model::load_on(driver, options, &boot.config.model, boot.progress)?);
                let room = cuda::room(driver)?;
                let (graphs, invariant) = (boot.config.cuda_graphs.clone(), boot.config.batch_invariant);
                boot.run(&model, Some(room), |_, arena, limits| {
                    cuda::open(driver, &model, arena, limits, &graphs, invariant)
                })
            }
            gpus => cuda::boot_ranks(boot, gpus),
        },
    }
}

/// What starts whatever the device is.
struct Boot<'a> {
    config: EngineConfig,
    instance: u64,
    wires: Wires,
    cpu: Arc<Cpu>,
    options: LoadOptions,
    progress: &'a mut dyn FnMut(LoadProgress),
}

/// What computes, where it has its blocks if not in the arena, and what it is called.
type Opened = (Device, Option<DevicePool>, String);

impl Boot<'_> {
    /// Starts everything around a model, for whose blocks there are `available` bytes.
    fn run<W>(
        self,
        model: &Model<W>,
        available: Option<u64>,
        open: impl FnOnce(&Arc<Cpu>, &Arena, RunnerLimits) -> Result<Opened, EngineError>,
    ) -> Result<Booted, EngineError> {
        let Self { config, instance, wires, cpu, options, progress } = self;
        let draft_model = load_draft_model(&config, options, &model.spec, progress)?;
        let Cache { arena, draft_arena, blocks, max_model_len } =
            reserve(&config, model, draft_model.as_ref(), available, progress)?;
        let layout = arena.layout().clone();
        let runner_limits = RunnerLimits {
            max_tokens: config.max_num_batched_tokens as usize,
            max_seqs: config.max_num_seqs as usize,
            max_model_len: max_model_len as usize,
        };
        let (device, pool, described) = open(&cpu, &arena, runner_limits)?;
        let tail = Arc::clone(arena.tail());
        // A peer that computes in these blocks reads them too, and the arena does not have what a GPU has computed.
        let in_place = config.in_place && pool.is_none();
        let for_peers = pool.as_ref().map(|pool| pool.for_peers(arena.shape().layer_stride)).transpose()?;
        let endpoint = Arc::new(endpoint(&config, in_place, instance, &arena, for_peers, wires.commands)?);
        // After the endpoint's thread has started, which would otherwise inherit the core.
        cpu.pin_caller().map_err(|error| EngineError::Device(error.to_string()))?;
        let draft_model = draft_model
            .zip(draft_arena)
            .map(|(model, arena)| DraftModel::new(Arc::new(model), &cpu, arena, runner_limits));
        let mut speculation = config.speculation.map(Speculation::new);
        if let (Some(speculation), Some(draft_model)) = (&mut speculation, &draft_model) {
            speculation.bound_draft_model(draft_model.longest());
        }
        let description = Description {
            name: config.name.clone(),
            role: config.role,
            instance,
            fingerprint: model.fingerprint.clone(),
            max_model_len,
            block_len: config.block_len,
            vocab_size: u32::try_from(model.spec.vocab_size).expect("a vocabulary is indexed by u32"),
            handoff_address: endpoint.address(),
            kv_dtype: layout.dtype,
            axis_order: layout.order,
            device: described,
            max_num_seqs: config.max_num_seqs,
            tensor_parallel: config.tensor_parallel,
        };
        let mut driver = Driver {
            scheduler: Scheduler::new(limits(&config, &layout, max_model_len), blocks),
            speculation,
            draft_model,
            sampler: Sampler::new(model.spec.vocab_size),
            overlaps: config.async_scheduling && matches!(device, Device::Cuda(_)),
            under_way: None,
            device,
            cpu,
            arena,
            pool,
            failure: None,
            endpoint: Arc::clone(&endpoint),
            in_place,
            fault: config.fault,
            shared: wires.shared,
            inbox: Inbox { commands: wires.inbox, seen: VecDeque::new() },
            requests: BTreeMap::new(),
            outgoing: Outgoings::new(tail),
            incoming: BTreeMap::new(),
            repeats: Vec::new(),
            watch: Watch::default(),
            is_checked: false,
            last_step: Duration::ZERO,
            counters: Counters::default(),
            draining: false,
            stuck_since: None,
        };
        // Whoever asks right after the start gets the real numbers of blocks.
        driver.publish();
        Ok((driver, description, endpoint))
    }
}

/// Bytes that blocks can have in the memory of the host.
fn host_room() -> Option<u64> {
    available_bytes().map(|bytes| bytes / DEFAULT_SHARE)
}

/// The memory of KV blocks: as many for the draft model as for the model.
struct Cache {
    arena: Arena,
    draft_arena: Option<Arena>,
    blocks: BlockCount,
    max_model_len: u32,
}

fn reserve<W>(
    config: &EngineConfig,
    model: &Model<W>,
    draft_model: Option<&Model>,
    available: Option<u64>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Cache, EngineError> {
    let draft_layout = draft_model.map(|it| layout(config, it)).transpose()?;
    let layout = layout(config, model)?;
    let draft_bytes = draft_layout.as_ref().map_or(0, KvLayout::block_bytes);
    let block_bytes = layout.block_bytes() + draft_bytes;
    let (max_model_len, blocks) = capacity(config, &model.spec, block_bytes, available)?;
    let bytes = blocks.0 as usize * block_bytes;
    if draft_layout.is_some() {
        let of_draft_model = blocks.0 as usize * draft_bytes;
        tracing::info!(blocks = blocks.0, bytes, of_draft_model, "the KV cache is shared with a draft model");
    }
    progress(LoadProgress { stage: "reserving KV cache", done: 0, total: bytes as u64 });
    let pages = if config.huge_pages { Pages::Huge } else { Pages::Normal };
    let take = |layout, tail| {
        Arena::with_tail(layout, blocks, tail, pages).map_err(|source| EngineError::KvCache { bytes, source })
    };
    let tail = staging_bytes(config.transport, blocks.0 as usize * layout.block_bytes());
    let (arena, draft_arena) = (take(layout, tail)?, draft_layout.map(|layout| take(layout, 0)).transpose()?);
    Ok(Cache { arena, draft_arena, blocks, max_model_len })
}

/// How much room there is for blocks that are converted for peers that read, which they do over RDMA alone. Without an RDMA
/// device it is never touched, so that it takes no memory.
fn staging_bytes(transport: TransportChoice, cache_bytes: usize) -> usize {
    match transport {
        TransportChoice::Auto | TransportChoice::Rdma => {
            (cache_bytes / STAGING_SHARE).min(MOST_STAGING).next_multiple_of(STAGING_STEP)
        }
        TransportChoice::SharedMemory | TransportChoice::Tcp => 0,
    }
}

fn layout<W>(config: &EngineConfig, model: &Model<W>) -> Result<KvLayout, EngineError> {
    let block_len = BlockLen::new(config.block_len)
        .ok_or_else(|| EngineError::Setting(format!("block size {} is no power of two", config.block_len)))?;
    let dtype = config.kv_cache_dtype.unwrap_or_else(|| model.kv_dtype());
    Ok(model.kv_layout(dtype, block_len, config.axis_order))
}

/// The model that guesses, where one is to.
fn load_draft_model(
    config: &EngineConfig,
    options: LoadOptions,
    spec: &ModelSpec,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Option<Model>, EngineError> {
    let is_wanted = config.speculation.is_some_and(|it| it.method == GuessMethod::DraftModel);
    let source = match (is_wanted, &config.draft_model) {
        (false, None) => return Ok(None),
        (true, Some(source)) => source,
        (true, None) => {
            return Err(EngineError::Setting("a draft model is to guess, but none is named".into()));
        }
        (false, Some(_)) => {
            return Err(EngineError::Setting("a draft model is named, but it is not to guess".into()));
        }
    };
    let (ours, theirs) = (spec.vocab_size, ModelSpec::read(source)?.vocab_size);
    if ours != theirs {
        return Err(EngineError::Setting(format!(
            "the draft model's vocabulary has {theirs} tokens, the model's {ours}: only a model of the same vocabulary can \
             guess for it"
        )));
    }
    Ok(Some(Model::load_with(options, source, progress)?))
}

/// The longest sequence and the number of blocks, which take so many bytes each.
fn capacity(
    config: &EngineConfig,
    spec: &ModelSpec,
    block_bytes: usize,
    available: Option<u64>,
) -> Result<(u32, BlockCount), EngineError> {
    let longest = spec.max_positions;
    let wanted = config.max_model_len.unwrap_or(longest);
    if longest < wanted {
        return Err(EngineError::Setting(format!(
            "a maximum length of {wanted} tokens is beyond the {longest} that the model is made for"
        )));
    }
    let block_bytes = block_bytes as u64;
    let per_sequence = wanted.div_ceil(config.block_len);
    let bytes = config.kv_cache_memory.unwrap_or_else(|| {
        let enough = u64::from(per_sequence) * u64::from(config.max_num_seqs) * block_bytes;
        enough.min(available.unwrap_or(u64::MAX)).max(block_bytes)
    });
    let blocks = u32::try_from(bytes / block_bytes).unwrap_or(u32::MAX);
    let tokens = u64::from(blocks) * u64::from(config.block_len);
    if u64::from(wanted) <= tokens {
        return Ok((wanted, BlockCount(blocks)));
    }
    let fits = u32::try_from(tokens).expect("fewer than the wanted ones, which fit");
    if config.max_model_len.is_some() || fits == 0 {
        return Err(EngineError::Setting(format!(
            "a KV cache of {bytes} bytes holds {tokens} tokens, but one sequence may have {wanted}: \
             raise --kv-cache-memory or lower --max-model-len"
        )));
    }
    tracing::warn!(
        fits,
        longest,
        "the KV cache holds less than the model's longest sequence: the limit is lowered"
    );
    Ok((fits, BlockCount(blocks)))
}

fn limits(config: &EngineConfig, layout: &KvLayout, max_model_len: u32) -> Limits {
    Limits {
        block_len: layout.block_len,
        max_model_len: TokenCount(max_model_len),
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: TokenCount(config.max_num_batched_tokens),
        max_waiting: config.max_waiting,
        prefix_cache: config.prefix_cache,
        long_prefill_threshold: None,
    }
}

fn endpoint(
    config: &EngineConfig,
    in_place: bool,
    instance: u64,
    arena: &Arena,
    device: Option<Arc<dyn DeviceBlocks>>,
    commands: Sender<Command>,
) -> Result<Endpoint, EngineError> {
    let address = config.handoff_listen;
    Endpoint::start(
        EndpointConfig {
            name: config.name.clone(),
            instance,
            layout: arena.layout().clone(),
            region: Arc::clone(arena.region()),
            staging_bytes: arena.tail_bytes(),
            device,
            listen: address,
            transport: crate::network::choice(config.transport),
            rdma: tidemill_kvtransfer::RdmaConfig {
                devices: config.rdma_devices.clone(),
                gid_index: config.rdma_gid_index,
                compute_cores: config.cores.clone(),
                ..tidemill_kvtransfer::RdmaConfig::default()
            },
            handoff: config.handoff,
            require: config.require_transport,
            in_place,
            credit: tidemill_kvtransfer::DEFAULT_CREDIT,
            timing: Timing::default(),
            coverage: match config.digest {
                DigestCoverage::Sampled => Coverage::Sampled,
                DigestCoverage::Full => Coverage::Full,
            },
        },
        // The engine thread is gone only when the process ends.
        Box::new(move |event| drop(commands.send(Command::Handoff(event)))),
    )
    .map_err(|source| EngineError::Endpoint { address, source })
}

/// Share of the free memory that a KV cache takes when nobody says how much: there are other workers, and other things
/// than Tidemill.
const DEFAULT_SHARE: u64 = 4;
/// As much as any receiver has on its way at a time: more would wait there.
const MOST_STAGING: usize = tidemill_kvtransfer::DEFAULT_CREDIT as usize;
/// A small cache gets less: this share of its size.
const STAGING_SHARE: usize = 8;
/// But a huge page, in which a layer of a block of any usual model finds room.
const STAGING_STEP: usize = 2 << 20;
