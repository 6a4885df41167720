//! Flags of models, deployments and engines.

use std::str::FromStr;

use anyhow::Context as _;
use clap::Args;
use tidemill_engine::device_name::{DeviceName, UnknownDevice};
use tidemill_engine::handle::{CudaGraphs, DeviceChoice, Isa, Quantization, UnknownIsa};

use super::speculative::{DraftName, SpeculativeConfig};
use super::values::{
    AxisOrderName, ByteSize, CoreList, DigestName, FaultPoint, HandoffName, KvCacheDtype, LoadFormatName,
    RoleName, TransportName, typed,
};

/// Which model, and what of it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelFlags {
    /// A Hugging Face folder, a GGUF file, or an id such as Qwen/Qwen3-0.6B or owner/name:file.gguf; nothing serves the
    /// demo model
    #[arg(value_name = "MODEL")]
    positional: Option<String>,
    /// The same as MODEL
    #[arg(long, env = "TIDEMILL_MODEL", value_name = "MODEL")]
    model: Option<String>,
    /// Name or names in the API, comma-separated [default: MODEL as given]
    #[arg(long, env = "TIDEMILL_SERVED_MODEL_NAME", value_name = "NAME", value_delimiter = ',')]
    pub(crate) served_model_name: Vec<String>,
    /// Branch, tag or commit of a model of the hub
    #[arg(long, env = "TIDEMILL_REVISION", default_value = DEFAULT_REVISION)]
    pub(crate) revision: String,
    /// Use what is in the cache of downloads and ask no server; HF_HUB_OFFLINE=1 does the same
    #[arg(long, env = "TIDEMILL_OFFLINE")]
    pub(crate) offline: bool,
}

/// How many workers, where, and how they are linked.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Workers")]
pub(crate) struct DeploymentFlags {
    /// Prefill workers
    #[arg(long, env = "TIDEMILL_PREFILL", value_name = "N", default_value = "1", value_parser = workers())]
    pub(crate) prefill: u32,
    /// Decode workers
    #[arg(long, env = "TIDEMILL_DECODE", value_name = "N", default_value = "1", value_parser = workers())]
    pub(crate) decode: u32,
    /// One hybrid worker instead: no handoff
    #[arg(long, env = "TIDEMILL_COLOCATED")]
    pub(crate) colocated: bool,
    /// Cores to share among the workers, such as 0-3,6 [default: all]
    #[arg(long, env = "TIDEMILL_CORES", value_name = "LIST", conflicts_with = "threads")]
    pub(crate) cores: Option<CoreList>,
}

/// How a worker computes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineFlags {
    /// Longest sequence, prompt and answer [default: the model's own limit]
    #[arg(long, env = "TIDEMILL_MAX_MODEL_LEN", value_name = "TOKENS", value_parser = positive())]
    pub(crate) max_model_len: Option<u32>,
    /// Sequences in one step
    #[arg(long, env = "TIDEMILL_MAX_NUM_SEQS", value_name = "N", default_value = "64", value_parser = positive())]
    pub(crate) max_num_seqs: u32,
    /// Tokens in one step; longer prompts are computed in chunks
    #[arg(
        long,
        env = "TIDEMILL_MAX_NUM_BATCHED_TOKENS",
        value_name = "TOKENS",
        default_value = "512",
        value_parser = positive()
    )]
    pub(crate) max_num_batched_tokens: u32,
    /// Requests that may wait at a worker before it answers 429
    #[arg(long, env = "TIDEMILL_MAX_QUEUE", value_name = "N", default_value = "512", value_parser = positive())]
    pub(crate) max_queue: u32,
    /// Memory of each worker's KV cache, such as 2GiB [default: from free memory]
    #[arg(long, env = "TIDEMILL_KV_CACHE_MEMORY", value_name = "SIZE")]
    pub(crate) kv_cache_memory: Option<ByteSize>,
    /// Stored type of keys and values
    #[arg(long, env = "TIDEMILL_KV_CACHE_DTYPE", value_enum, default_value_t)]
    pub(crate) kv_cache_dtype: KvCacheDtype,
    /// Tokens per block of the KV cache, a power of two
    #[arg(long, env = "TIDEMILL_BLOCK_SIZE", value_name = "TOKENS", default_value = "16", value_parser = block_size)]
    pub(crate) block_size: u32,
    /// Order of the axes inside a block
    #[arg(long, env = "TIDEMILL_AXIS_ORDER", value_enum, default_value_t)]
    pub(crate) axis_order: AxisOrderName,
    /// Compute every prompt from its first token
    #[arg(long, env = "TIDEMILL_NO_ENABLE_PREFIX_CACHING")]
    pub(crate) no_enable_prefix_caching: bool,
    /// Guess tokens and verify several in one step, only while that pays; answers stay the same token for token. For
    /// example '{"method": "ngram"}', which guesses what followed the last tokens where they occurred before, or
    /// '{"method": "draft_model", "model": "FOLDER_OR_ID"}', which asks a smaller model of the same tokenizer. Further
    /// fields: num_speculative_tokens, guesses in a step at most (8, of a model 5); prompt_lookup_max and
    /// prompt_lookup_min, tokens that must match (5 and 2); adaptive, false to guess even where it does not pay
    #[arg(long, env = "TIDEMILL_SPECULATIVE_CONFIG", value_name = "JSON")]
    pub(crate) speculative_config: Option<SpeculativeConfig>,
    /// Where weights come from
    #[arg(long, env = "TIDEMILL_LOAD_FORMAT", value_enum, default_value_t)]
    pub(crate) load_format: LoadFormatName,
    /// Make weights smaller and faster while they are loaded: int8, fp8, int4 (in groups of 32), int4-g64 or int4-g128
    #[arg(long, env = "TIDEMILL_QUANTIZATION", value_name = "KIND", value_parser = Quantization::from_str)]
    pub(crate) quantization: Option<Quantization>,
    /// Seed of dummy weights, and of requests that bring none
    #[arg(long, env = "TIDEMILL_SEED", default_value = "0")]
    pub(crate) seed: u64,
    /// Threads that compute, each on its own core [default: one per core]
    #[arg(long, env = "TIDEMILL_THREADS", value_name = "N", value_parser = positive())]
    pub(crate) threads: Option<u32>,
    /// What to compute on: cpu, cuda:N for GPU N, or auto for the first GPU where it is of use, else the CPU. With
    /// --tensor-parallel-size R it is R GPUs, from that one on
    #[arg(long, env = "TIDEMILL_DEVICE", value_name = "NAME", default_value_t, value_parser = device)]
    pub(crate) device: DeviceName,
    /// Ranks that share the model and compute it together, each with its part of the weights and of the heads, and of the worker's
    /// cores or a GPU of its own (which needs NCCL): as many as divide the model's heads. Workers of different numbers hand over to one
    /// another
    #[arg(long, env = "TIDEMILL_TENSOR_PARALLEL_SIZE", value_name = "N", default_value = "1", value_parser = ranks())]
    pub(crate) tensor_parallel_size: u32,
    /// Sequences in a decode step for which a GPU records a graph, comma-separated [default: 1, 2, 4, then every eighth up
    /// to 256 and every sixteenth up to 512]
    #[arg(
        long,
        env = "TIDEMILL_CUDA_GRAPH_SIZES",
        value_name = "N,…",
        value_delimiter = ',',
        value_parser = positive(),
        conflicts_with = "enforce_eager"
    )]
    pub(crate) cuda_graph_sizes: Vec<u32>,
    /// Launch each step of a GPU kernel by kernel, without graphs
    #[arg(long, env = "TIDEMILL_ENFORCE_EAGER")]
    pub(crate) enforce_eager: bool,
    /// Plan the next step of a GPU, and ask for it, while one computes: the default
    #[arg(long, env = "TIDEMILL_ASYNC_SCHEDULING", conflicts_with = "no_async_scheduling")]
    async_scheduling: bool,
    /// Wait for each step of a GPU before the next one is planned
    #[arg(long, env = "TIDEMILL_NO_ASYNC_SCHEDULING")]
    pub(crate) no_async_scheduling: bool,
    /// Multiply on a GPU by kernels alone that give a token the same bits whatever else is computed, as a CPU does: without
    /// cuBLASLt, and slower
    #[arg(long, env = "TIDEMILL_BATCH_INVARIANT")]
    pub(crate) batch_invariant: bool,
    /// Instructions to compute with, such as avx2 or portable, to compare them [default: the fastest there are]
    #[arg(long, env = "TIDEMILL_CPU_ISA", value_name = "NAME", value_parser = cpu_isa)]
    pub(crate) cpu_isa: Option<Isa>,
    /// Which ways a handoff of a KV cache may take
    #[arg(long, env = "TIDEMILL_TRANSPORT", value_enum, default_value_t)]
    pub(crate) transport: TransportName,
    /// Who moves a KV cache to this worker over RDMA: the peer writes, or this worker reads and lets nobody write
    #[arg(long, env = "TIDEMILL_HANDOFF", value_enum, default_value_t)]
    pub(crate) handoff: HandoffName,
    /// Refuse to start, or to be ready, while workers have no connection of that kind
    #[arg(long, env = "TIDEMILL_REQUIRE_TRANSPORT")]
    pub(crate) require_transport: bool,
    /// RDMA devices for handoffs, such as mlx5_0, or mlx5_0:2 for the second port [default: those nearest to the KV
    /// cache]
    #[arg(long, env = "TIDEMILL_RDMA_DEVICES", value_name = "NAMES", value_delimiter = ',')]
    pub(crate) rdma_devices: Vec<String>,
    /// Which of an RDMA port's addresses (GIDs) to use, by its position [default: RoCE v2, that of the worker's own
    /// address]
    #[arg(long, env = "TIDEMILL_RDMA_GID_INDEX", value_name = "N")]
    pub(crate) rdma_gid_index: Option<u8>,
    /// Keep the KV cache in huge pages, of which enough must be free (vm.nr_hugepages)
    #[arg(long, env = "TIDEMILL_HUGE_PAGES")]
    pub(crate) huge_pages: bool,
    /// How much of each handed-over block is verified
    #[arg(long, env = "TIDEMILL_DIGEST", value_enum, default_value_t)]
    pub(crate) digest: DigestName,
    /// Copy handed-over blocks even where prefill could compute in decode's memory
    #[arg(long, env = "TIDEMILL_NO_IN_PLACE")]
    pub(crate) no_in_place: bool,
    /// Kill a prefill worker at STAGE of a handoff once FILE exists; for tests of recovery
    #[arg(long, env = "TIDEMILL_FAULT_POINT", value_name = "STAGE=FILE", hide = true)]
    pub(crate) fault_point: Option<FaultPoint>,
}

/// Flags of the engine that differ between prefill and decode workers: different devices want different layouts,
/// and the handoff converts.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Engine, per role")]
pub(crate) struct RoleOverrides {
    /// --device of prefill workers
    #[arg(long, env = "TIDEMILL_PREFILL_DEVICE", value_name = "NAME", value_parser = device)]
    prefill_device: Option<DeviceName>,
    /// --device of decode workers
    #[arg(long, env = "TIDEMILL_DECODE_DEVICE", value_name = "NAME", value_parser = device)]
    decode_device: Option<DeviceName>,
    /// --tensor-parallel-size of prefill workers
    #[arg(long, env = "TIDEMILL_PREFILL_TENSOR_PARALLEL_SIZE", value_name = "N", value_parser = ranks())]
    prefill_tensor_parallel_size: Option<u32>,
    /// --tensor-parallel-size of decode workers
    #[arg(long, env = "TIDEMILL_DECODE_TENSOR_PARALLEL_SIZE", value_name = "N", value_parser = ranks())]
    decode_tensor_parallel_size: Option<u32>,
    /// --block-size of prefill workers
    #[arg(long, env = "TIDEMILL_PREFILL_BLOCK_SIZE", value_name = "TOKENS", value_parser = block_size)]
    prefill_block_size: Option<u32>,
    /// --block-size of decode workers
    #[arg(long, env = "TIDEMILL_DECODE_BLOCK_SIZE", value_name = "TOKENS", value_parser = block_size)]
    decode_block_size: Option<u32>,
    /// --kv-cache-dtype of prefill workers
    #[arg(long, env = "TIDEMILL_PREFILL_KV_CACHE_DTYPE", value_enum)]
    prefill_kv_cache_dtype: Option<KvCacheDtype>,
    /// --kv-cache-dtype of decode workers
    #[arg(long, env = "TIDEMILL_DECODE_KV_CACHE_DTYPE", value_enum)]
    decode_kv_cache_dtype: Option<KvCacheDtype>,
    /// --axis-order of prefill workers
    #[arg(long, env = "TIDEMILL_PREFILL_AXIS_ORDER", value_enum)]
    prefill_axis_order: Option<AxisOrderName>,
    /// --axis-order of decode workers
    #[arg(long, env = "TIDEMILL_DECODE_AXIS_ORDER", value_enum)]
    decode_axis_order: Option<AxisOrderName>,
    /// --kv-cache-memory of prefill workers
    #[arg(long, env = "TIDEMILL_PREFILL_KV_CACHE_MEMORY", value_name = "SIZE")]
    prefill_kv_cache_memory: Option<ByteSize>,
    /// --kv-cache-memory of decode workers
    #[arg(long, env = "TIDEMILL_DECODE_KV_CACHE_MEMORY", value_name = "SIZE")]
    decode_kv_cache_memory: Option<ByteSize>,
    /// Cores of the prefill workers, shared among them
    #[arg(long, env = "TIDEMILL_PREFILL_CORES", value_name = "LIST")]
    pub(crate) prefill_cores: Option<CoreList>,
    /// Cores of the decode workers, shared among them
    #[arg(long, env = "TIDEMILL_DECODE_CORES", value_name = "LIST")]
    pub(crate) decode_cores: Option<CoreList>,
}

impl ModelFlags {
    /// What was typed, if anything was.
    pub(crate) fn name(&self) -> Option<&str> {
        self.positional.as_deref().or(self.model.as_deref())
    }

    /// The same for the model that guesses for this one.
    pub(crate) fn of_draft(&self, draft: &DraftName) -> Self {
        Self {
            positional: Some(draft.model.clone()),
            revision: draft.revision.clone().unwrap_or_else(|| DEFAULT_REVISION.to_owned()),
            ..self.clone()
        }
    }
}

impl EngineFlags {
    /// These flags with what `overrides` says for `role`.
    pub(crate) fn for_role(&self, role: RoleName, overrides: &RoleOverrides) -> Self {
        let mut flags = self.clone();
        let (block_size, dtype, order, memory) = match role {
            RoleName::Prefill => (
                overrides.prefill_block_size,
                overrides.prefill_kv_cache_dtype,
                overrides.prefill_axis_order,
                overrides.prefill_kv_cache_memory,
            ),
            RoleName::Decode => (
                overrides.decode_block_size,
                overrides.decode_kv_cache_dtype,
                overrides.decode_axis_order,
                overrides.decode_kv_cache_memory,
            ),
            RoleName::Hybrid => (None, None, None, None),
        };
        let (device, ranks) = match role {
            RoleName::Prefill => (overrides.prefill_device, overrides.prefill_tensor_parallel_size),
            RoleName::Decode => (overrides.decode_device, overrides.decode_tensor_parallel_size),
            RoleName::Hybrid => (None, None),
        };
        flags.device = device.unwrap_or(flags.device);
        flags.tensor_parallel_size = ranks.unwrap_or(flags.tensor_parallel_size);
        flags.block_size = block_size.unwrap_or(flags.block_size);
        flags.kv_cache_dtype = dtype.unwrap_or(flags.kv_cache_dtype);
        flags.axis_order = order.unwrap_or(flags.axis_order);
        flags.kv_cache_memory = memory.or(flags.kv_cache_memory);
        flags.fault_point = flags.fault_point.filter(|_| role == RoleName::Prefill);
        flags
    }

    /// Takes the GPUs, if it is to be any.
    pub(crate) fn open_device(&self) -> anyhow::Result<DeviceChoice> {
        let Self { device, tensor_parallel_size: ranks, .. } = self;
        device.open(*ranks).with_context(|| match ranks {
            1 => format!("--device {device}"),
            _ => format!("--device {device} --tensor-parallel-size {ranks}"),
        })
    }

    /// Which decode steps of a GPU are recorded.
    pub(crate) fn cuda_graphs(&self) -> CudaGraphs {
        match &self.cuda_graph_sizes[..] {
            _ if self.enforce_eager => CudaGraphs::Off,
            [] => CudaGraphs::Usual,
            sizes => CudaGraphs::Sizes(sizes.to_vec()),
        }
    }

    /// The arguments that make a worker of these flags. `threads` is left out: `serve` hands out cores.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut set = |flag: &str, value: String| arguments.extend([format!("--{flag}"), value]);
        set("device", self.device.to_string());
        set("tensor-parallel-size", self.tensor_parallel_size.to_string());
        set("max-num-seqs", self.max_num_seqs.to_string());
        set("max-num-batched-tokens", self.max_num_batched_tokens.to_string());
        set("max-queue", self.max_queue.to_string());
        set("kv-cache-dtype", typed(self.kv_cache_dtype));
        set("block-size", self.block_size.to_string());
        set("axis-order", typed(self.axis_order));
        set("load-format", typed(self.load_format));
        set("seed", self.seed.to_string());
        set("transport", typed(self.transport));
        set("handoff", typed(self.handoff));
        set("digest", typed(self.digest));
        if !self.cuda_graph_sizes.is_empty() {
            let sizes: Vec<String> = self.cuda_graph_sizes.iter().map(u32::to_string).collect();
            set("cuda-graph-sizes", sizes.join(","));
        }
        if !self.rdma_devices.is_empty() {
            set("rdma-devices", self.rdma_devices.join(","));
        }
        if let Some(index) = self.rdma_gid_index {
            set("rdma-gid-index", index.to_string());
        }
        if let Some(config) = &self.speculative_config {
            set("speculative-config", config.to_string());
        }
        if let Some(quantization) = self.quantization {
            set("quantization", quantization.to_string());
        }
        if let Some(isa) = self.cpu_isa {
            set("cpu-isa", isa.to_string());
        }
        if let Some(tokens) = self.max_model_len {
            set("max-model-len", tokens.to_string());
        }
        if let Some(bytes) = self.kv_cache_memory {
            set("kv-cache-memory", bytes.to_string());
        }
        if let Some(point) = &self.fault_point {
            set("fault-point", point.to_string());
        }
        let switches = [
            ("--no-enable-prefix-caching", self.no_enable_prefix_caching),
            ("--require-transport", self.require_transport),
            ("--no-in-place", self.no_in_place),
            ("--huge-pages", self.huge_pages),
            ("--enforce-eager", self.enforce_eager),
            ("--no-async-scheduling", self.no_async_scheduling),
            ("--batch-invariant", self.batch_invariant),
        ];
        arguments.extend(switches.iter().filter(|(_, on)| *on).map(|(flag, _)| (*flag).to_owned()));
        arguments
    }
}

fn positive() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

fn ranks() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(MAX_RANKS))
}

fn workers() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(MAX_WORKERS))
}

fn block_size(text: &str) -> Result<u32, String> {
    let tokens: u32 = text.parse().map_err(|_| format!("`{text}` is not a number of tokens"))?;
    if tokens.is_power_of_two() && tokens <= MAX_BLOCK_SIZE {
        Ok(tokens)
    } else {
        Err(format!("a block has 1, 2, 4, … or {MAX_BLOCK_SIZE} tokens, not {tokens}"))
    }
}

/// Refuses at once what this machine does not have.
pub(crate) fn cpu_isa(name: &str) -> Result<Isa, String> {
    let isa: Isa = name.parse().map_err(|error: UnknownIsa| error.to_string())?;
    if isa.is_available() { Ok(isa) } else { Err(format!("this machine does not have {isa}")) }
}

/// Refuses at once a GPU that is not there, with the reason.
pub(crate) fn device(name: &str) -> Result<DeviceName, String> {
    let device: DeviceName = name.parse().map_err(|error: UnknownDevice| error.to_string())?;
    device.check().map(|()| device).map_err(|error| error.to_string())
}

/// The hub's usual branch.
const DEFAULT_REVISION: &str = "main";

/// Workers of one role that `serve` starts at most; more belong on more machines.
const MAX_WORKERS: u32 = 64;

/// Ranks of a worker; they would wait for one another more than they compute long before.
const MAX_RANKS: u32 = 64;

/// Longer blocks waste more memory than they save in bookkeeping.
const MAX_BLOCK_SIZE: u32 = 256;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::flags::{Cli, Command};

    #[test]
    fn a_worker_gets_the_flags_of_its_role() {
        let typed = [
            "tidemill",
            "serve",
            "--block-size",
            "32",
            "--decode-block-size",
            "64",
            "--decode-kv-cache-dtype",
            "int8",
            "--prefill-axis-order",
            "head-token",
            "--kv-cache-memory",
            "1GiB",
            "--decode-kv-cache-memory",
            "3MiB",
            "--no-enable-prefix-caching",
            "--max-model-len",
            "99",
            "--digest",
            "full",
            "--transport",
            "rdma",
            "--handoff",
            "pull",
            "--rdma-devices",
            "mlx5_0,mlx5_1:2",
            "--rdma-gid-index",
            "3",
            "--speculative-config",
            r#"{"method": "ngram", "num_speculative_tokens": 5}"#,
            "--cpu-isa",
            "portable",
            "--decode-device",
            "auto",
            "--tensor-parallel-size",
            "4",
            "--prefill-tensor-parallel-size",
            "2",
            "--cuda-graph-sizes",
            "1,8,3",
            "--quantization",
            "int4",
            "--huge-pages",
        ];
        let Command::Serve(serve) = Cli::parse_from(typed).command else { panic!("typed serve") };
        let parsed = |role: RoleName| {
            let mut arguments =
                vec!["tidemill".to_owned(), "worker".into(), "--role".into(), super::typed(role)];
            arguments.extend(serve.engine.for_role(role, &serve.overrides).to_arguments());
            match Cli::parse_from(arguments).command {
                Command::Worker(worker) => worker.engine,
                other => panic!("worker was parsed as {other:?}"),
            }
        };
        let (prefill, decode) = (parsed(RoleName::Prefill), parsed(RoleName::Decode));
        assert_eq!((prefill.block_size, decode.block_size), (32, 64));
        assert_eq!((prefill.kv_cache_dtype, decode.kv_cache_dtype), (KvCacheDtype::Auto, KvCacheDtype::Int8));
        assert_eq!(
            (prefill.axis_order, decode.axis_order),
            (AxisOrderName::HeadToken, AxisOrderName::TokenHead)
        );
        assert_eq!(prefill.kv_cache_memory, Some(ByteSize(1 << 30)));
        assert_eq!(decode.kv_cache_memory, Some(ByteSize(3 << 20)));
        assert!(prefill.no_enable_prefix_caching && decode.no_enable_prefix_caching);
        assert_eq!((decode.max_model_len, decode.digest), (Some(99), DigestName::Full));
        assert_eq!((decode.transport, decode.handoff), (TransportName::Rdma, HandoffName::Pull));
        assert_eq!(decode.speculative_config.as_ref().map(|it| it.settings.most), Some(5));
        assert_eq!(prefill.cpu_isa, Some(Isa::Portable));
        assert_eq!((prefill.device, decode.device), (DeviceName::Cpu, DeviceName::Auto));
        assert_eq!((prefill.tensor_parallel_size, decode.tensor_parallel_size), (2, 4));
        assert_eq!(decode.cuda_graphs(), CudaGraphs::Sizes(vec![1, 8, 3]));
        assert_eq!(decode.quantization, Some(Quantization::Int4 { group: 32 }));
        assert_eq!(
            (decode.rdma_devices.join(" "), decode.rdma_gid_index),
            ("mlx5_0 mlx5_1:2".into(), Some(3))
        );
        assert!(prefill.huge_pages && decode.huge_pages);
    }

    #[test]
    fn devices_that_are_unknown_or_absent_are_refused() {
        let error = Cli::try_parse_from(["tidemill", "serve", "--device", "tpu"]).expect_err("is none");
        assert!(error.to_string().contains("`tpu` is no device; there are cpu, auto, and cuda:0"), "{error}");
        let beyond = Cli::try_parse_from(["tidemill", "serve", "--prefill-device", "cuda:1000"]);
        let text = beyond.expect_err("no machine has so many").to_string();
        let reason = DeviceName::Cuda(1000).check().expect_err("no machine has so many").to_string();
        assert!(text.contains(&reason), "{text}");
    }

    #[test]
    fn graphs_are_recorded_as_typed() {
        for (typed, expected) in [
            (&[][..], CudaGraphs::Usual),
            (&["--cuda-graph-sizes", "4"], CudaGraphs::Sizes(vec![4])),
            (&["--enforce-eager"], CudaGraphs::Off),
        ] {
            let arguments = ["tidemill", "serve"].iter().chain(typed);
            let Command::Serve(serve) = Cli::parse_from(arguments).command else { panic!("typed serve") };
            assert_eq!(serve.engine.cuda_graphs(), expected);
            // And the worker hears of it.
            let arguments = serve.engine.to_arguments();
            let worker = ["tidemill", "worker", "--role", "hybrid"].map(str::to_owned).into_iter();
            let Command::Worker(worker) = Cli::parse_from(worker.chain(arguments)).command else {
                panic!("made a worker's arguments")
            };
            assert_eq!(worker.engine.cuda_graphs(), expected);
        }
        assert!(Cli::try_parse_from(["tidemill", "serve", "--cuda-graph-sizes", "0"]).is_err());
    }

    #[test]
    fn instructions_that_are_unknown_or_absent_are_refused() {
        let error = Cli::try_parse_from(["tidemill", "worker", "--role", "decode", "--cpu-isa", "sse9"]);
        let text = error.expect_err("there is no such set").to_string();
        assert!(text.contains("`sse9` is no instruction set; there are amx, avx512-bf16"), "{text}");
        for isa in Isa::ALL {
            match cpu_isa(isa.name()) {
                Ok(found) => assert!(found == isa && isa.is_available()),
                Err(text) => assert_eq!(text, format!("this machine does not have {isa}")),
            }
        }
    }
}
