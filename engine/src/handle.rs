//! What the engine is to the rest of the process: commands go in, events come out.
//!
//! The engine thread owns the device and everything that changes; a handle is a cheap, cloneable way to talk to
//! it. Events are delivered by a callback, so that the engine knows no async runtime.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

pub use tidemill_engine_core::blocks::Ledger;
pub use tidemill_engine_core::events::{EngineEvent, Recovery};
pub use tidemill_engine_core::prefix_tree::CacheChanges;
pub use tidemill_engine_core::routing::Role;
pub use tidemill_engine_core::speculation::{
    GuessMethod, MOST_DRAFTED, SpeculationSettings, SpeculationSums,
};
pub use tidemill_kernels::cpu::{Isa, UnknownIsa};
pub use tidemill_kernels::matrix::{Quantization, UnknownQuantization};
pub use tidemill_kvtransfer::{DeviceWay, DeviceWays, HandoffMode};
pub use tidemill_kvtransfer_proto::credit::CreditLoad;
use tidemill_kvtransfer_proto::layout::{AxisOrder, KvDtype};

pub use crate::device::DeviceChoice;

/// Where a model's files are.
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A Hugging Face folder.
    Folder(PathBuf),
    /// A GGUF file, which has everything in it.
    Gguf(PathBuf),
    /// Files compiled into the binary.
    Embedded(&'static [EmbeddedFile]),
}

/// A file of a model that is compiled into the binary.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedFile {
    /// Its name in the folder, such as `config.json`.
    pub name: &'static str,
    /// Its content.
    pub bytes: &'static [u8],
}

/// How the weights come to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// Read from the model's files: safetensors or GGUF.
    #[default]
    Safetensors,
    /// Made from a seed, in the shape of the model's config: to measure speed without a download.
    Dummy {
        /// The seed.
        seed: u64,
    },
}

/// For how many rows decode steps of a GPU are recorded. A step of fewer rows is filled up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CudaGraphs {
    /// 1, 2, 4, then every eighth up to 256 and every sixteenth up to 512.
    #[default]
    Usual,
    /// These.
    Sizes(Vec<u32>),
    /// None: each step is launched kernel by kernel.
    Off,
}

/// Which ways a handoff may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// Shared memory between processes of one host, otherwise RDMA where both have a device, otherwise TCP; what was
    /// chosen is logged and counted.
    #[default]
    Auto,
    /// Shared memory only.
    SharedMemory,
    /// RDMA, on one host too.
    Rdma,
    /// TCP only.
    Tcp,
}

/// How much of each block a digest covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigestCoverage {
    /// Some cache lines of each layer of each block.
    #[default]
    Sampled,
    /// Every byte.
    Full,
}

/// Everything an engine is started with.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Name in logs, metrics and peers' messages.
    pub name: String,
    /// Role in the deployment.
    pub role: Role,
    /// The model.
    pub model: ModelSource,
    /// What it computes on. A draft model computes on the processor in any case.
    pub device: DeviceChoice,
    /// How many ranks share the model and compute it together (`docs/decisions/0020`).
    pub tensor_parallel: u32,
    /// Which decode steps of a GPU are recorded, to be asked for in one call.
    pub cuda_graphs: CudaGraphs,
    /// Whether the next step of a GPU is planned and asked for while one computes.
    pub async_scheduling: bool,
    /// Whether a GPU multiplies by kernels alone that give a row the same bits whatever else is computed: slower.
    pub batch_invariant: bool,
    /// How its weights come to be.
    pub load_format: LoadFormat,
    /// How its weights are made smaller; `None` keeps them as they come.
    pub quantization: Option<Quantization>,
    /// Longest sequence; `None` takes the model's own limit.
    pub max_model_len: Option<u32>,
    /// Sequences in one step at most.
    pub max_num_seqs: u32,
    /// Tokens in one step at most.
    pub max_num_batched_tokens: u32,
    /// Requests that may wait.
    pub max_waiting: u32,
    /// Bytes of the KV cache; `None` chooses from free memory.
    pub kv_cache_memory: Option<u64>,
    /// Stored type of K and V; `None` takes the weights' type.
    pub kv_cache_dtype: Option<KvDtype>,
    /// Tokens per block.
    pub block_len: u32,
    /// Order of axes inside a block.
    pub axis_order: AxisOrder,
    /// Whether finished prefixes are kept for later requests.
    pub prefix_cache: bool,
    /// Cores to compute on, by number, one thread on each; empty pins nothing.
    pub cores: Vec<usize>,
    /// Number of threads where no cores are named; `None` takes as many as the process has cores.
    pub threads: Option<usize>,
    /// Instructions to compute with; `None` takes the fastest there are.
    pub isa: Option<Isa>,
    /// Where peers reach this worker; port 0 picks one.
    pub handoff_listen: SocketAddr,
    /// Which ways a handoff may take.
    pub transport: TransportChoice,
    /// Who moves the bytes of handoffs to this worker.
    pub handoff: HandoffMode,
    /// Whether a peer that cannot be reached in the preferred way is not used at all.
    pub require_transport: bool,
    /// RDMA devices to use, by name; empty takes those nearest to the KV cache.
    pub rdma_devices: Vec<String>,
    /// Which of a port's addresses RDMA connections take, by position; `None` goes by rule.
    pub rdma_gid_index: Option<u8>,
    /// Whether the KV cache is kept in huge pages, of which enough must be free.
    pub huge_pages: bool,
    /// How much of each block a digest covers.
    pub digest: DigestCoverage,
    /// Whether a handoff on one host may compute in the peer's blocks (`docs/decisions/0002`).
    pub in_place: bool,
    /// How next tokens are guessed, to be verified several in a step (`docs/decisions/0012`); `None` guesses none.
    pub speculation: Option<SpeculationSettings>,
    /// The model that guesses, where one does ([`GuessMethod::DraftModel`]): of the same vocabulary. Its weights are loaded and
    /// made smaller as those of the model are, and its keys and values share `kv_cache_memory`.
    pub draft_model: Option<ModelSource>,
    /// Where to die, for tests of recovery.
    pub fault: Option<Fault>,
}

impl EngineConfig {
    /// A worker that serves `model` with what `tidemill worker` takes where nothing is said: loopback, the fastest
    /// instructions, memory and threads as there are.
    pub fn new(name: impl Into<String>, role: Role, model: ModelSource) -> Self {
        Self {
            name: name.into(),
            role,
            model,
            device: DeviceChoice::Cpu,
            tensor_parallel: 1,
            cuda_graphs: CudaGraphs::Usual,
            async_scheduling: true,
            batch_invariant: false,
            load_format: LoadFormat::Safetensors,
            quantization: None,
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_waiting: 512,
            kv_cache_memory: None,
            kv_cache_dtype: None,
            block_len: 16,
            axis_order: AxisOrder::TokenHead,
            prefix_cache: true,
            cores: Vec::new(),
            threads: None,
            isa: None,
            handoff_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            transport: TransportChoice::Auto,
            handoff: HandoffMode::Push,
            require_transport: false,
            rdma_devices: Vec::new(),
            rdma_gid_index: None,
            huge_pages: false,
            digest: DigestCoverage::Sampled,
            in_place: true,
            speculation: None,
            draft_model: None,
            fault: None,
        }
    }
}

/// A place at which the process kills itself, so that tests meet each stage of a handoff and not just some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The stage.
    pub stage: FaultStage,
    /// Fires once, when this file exists; the file is removed first.
    pub trigger: PathBuf,
}

/// Stages of a handoff on the prefill worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultStage {
    /// The request has come, the decode worker's reservation has not been looked at.
    BeforeReserve,
    /// Some layers are with the decode worker, some are not.
    Pushing,
    /// Everything is with the decode worker but the commit.
    BeforeCommit,
}

/// Progress of [`EngineHandle::start`](crate::engine::EngineHandle::start).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadProgress {
    /// What is going on: "reading weights", "reserving KV cache".
    pub stage: &'static str,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// What an engine turned out to be once started.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// Name, as configured.
    pub name: String,
    /// Role, as configured.
    pub role: Role,
    /// A number that no other start of any worker has.
    pub instance: u64,
    /// Fingerprint of the model.
    pub fingerprint: String,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Tokens per block.
    pub block_len: u32,
    /// Size of the vocabulary.
    pub vocab_size: u32,
    /// Where peers reach this worker.
    pub handoff_address: SocketAddr,
    /// Stored type of K and V.
    pub kv_dtype: KvDtype,
    /// Order of axes inside a block.
    pub axis_order: AxisOrder,
    /// The device in words: "cpu avx512-bf16, 2 threads".
    pub device: String,
    /// Sequences in one step at most.
    pub max_num_seqs: u32,
    /// How many ranks compute together.
    pub tensor_parallel: u32,
}

/// Another worker, as told by the router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its instance number.
    pub instance: u64,
    /// Where it takes handoffs.
    pub address: SocketAddr,
}

/// State of the connection to a peer.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerLink {
    /// The peer's name.
    pub name: String,
    /// The peer's instance number.
    pub instance: u64,
    /// The transport in use ("shm", "rdma", "tcp"), or why there is none.
    pub transport: Result<String, String>,
    /// What a probe of the path measured, bytes per second; zero when not measured.
    pub bytes_per_second: f64,
    /// Whether it is a worse way than the one that was intended.
    pub is_fallback: bool,
    /// Whether this worker can hand prompts over to the peer, or why not although they are connected.
    pub to_peer: Result<(), String>,
    /// Whether the peer can to this worker.
    pub from_peer: Result<(), String>,
    /// How handoffs leave and reach this worker's device.
    pub devices: DeviceWays,
}

/// Receives the events of one request. Called on the engine thread: it must not block.
pub type EventSink = Box<dyn FnMut(EngineEvent) + Send>;

/// Sums since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counters {
    /// Forward passes.
    pub steps: u64,
    /// Those that were asked for while the one before computed.
    pub overlapped_steps: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Output tokens.
    pub generation_tokens: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Sequences that lost their blocks and were computed again.
    pub preemptions: u64,
    /// Handoffs completed, as sender.
    pub handoffs: u64,
    /// Bytes written to peers.
    pub handoff_bytes: u64,
    /// Writes posted to peers.
    pub handoff_writes: u64,
    /// Handoffs that failed, as sender or receiver.
    pub handoff_failures: u64,
    /// Handoffs that moved no byte.
    pub handoff_in_place: u64,
    /// Commits that were refused because epoch or digest did not match.
    pub handoff_refusals: u64,
    /// Seconds from the end of the prompt until its first token was known, summed over handoffs.
    pub handoff_head_start_seconds: f64,
    /// Seconds from the end of prefill to adoption, summed.
    pub handoff_seconds: f64,
    /// Guesses at tokens, and what became of them.
    pub speculation: SpeculationSums,
}

/// The engine's state, as published after each change.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStatus {
    /// Whether new requests are refused.
    pub draining: bool,
    /// Sequences that compute.
    pub running: u32,
    /// Requests that wait.
    pub waiting: u32,
    /// Prompt tokens that wait to be computed: what a new prompt would queue behind.
    pub queued_tokens: u64,
    /// Where the blocks are.
    pub ledger: Ledger,
    /// Sums.
    pub counters: Counters,
    /// What peers may send here, and what waits for leave.
    pub credit: CreditLoad,
}
