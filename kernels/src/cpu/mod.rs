//! The operations on a CPU.
//!
//! All methods take `&self`; one operation at a time runs on the pool, and a second caller waits for it.

mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod convert;
mod e4m3;
mod gate;
mod isa;
mod kv;
mod kv_codec;
mod level;
mod limits;
mod matmul;
mod pool;
mod portable;
mod ranks;
mod row_tiles;
mod rowwise;
mod sampling;
mod shared_out;
mod simd;
mod sync;

use self::{
    attention::{Attention, Workspace},
    convert::{ConvertHeads, clear_uncovered},
    kv::KvRows,
    level::Level,
    matmul::{Memory, Product, Store, multiply},
    pool::{Pool, lock},
    row_tiles::RowTiles,
    sampling::LogSoftmax,
    shared_out::SharedOut,
};
use crate::{
    kv::{BlockAddress, KvBlockShape},
    matrix::PackedMatrix,
    reference,
    step::{AttentionParams, HeadSpan, RopeTable, SequenceRows, TokenSpan},
};
pub(crate) use e4m3::encode as encode_e4m3;
pub use isa::{Isa, UnknownIsa};
pub(crate) use kv_codec::encode_int8;
pub use limits::{Arithmetic, Numbers};
pub use pool::on_cores;
pub use ranks::{Rank, Ranks};
use std::{io, ops::Range, sync::Mutex, thread};

/// How a [`Cpu`] is set up.
#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// One thread per entry, pinned to that core; the first is the calling thread, which
    /// [`pin_caller`](Cpu::pin_caller) pins. Empty: threads that are not pinned.
    pub cores: Vec<usize>,
    /// Number of threads where there are no cores; `None`: one per core that this process may use.
    pub threads: Option<usize>,
    /// Instructions to use; `None`: the fastest there are.
    pub isa: Option<Isa>,
}

/// The most that a step will ask for, so that no operation has to allocate.
#[derive(Clone, Copy, Debug)]
pub struct StepLimits {
    /// Rows of a step.
    pub rows: usize,
    /// Inputs of the widest matrix.
    pub inputs: usize,
    /// Elements of an attention head.
    pub head_size: usize,
}

/// One of several products with the same rows: see [`Cpu::matmul_each`].
#[derive(Debug)]
pub struct Projection<'a> {
    /// `[rows][outputs]`
    pub out: &'a mut [f32],
    /// The weights.
    pub w: &'a PackedMatrix,
    /// Added to each row.
    pub bias: Option<&'a [f32]>,
}

/// Why a [`Cpu`] could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// The instructions were asked for by name and this machine does not have them.
    #[error("this machine does not have {isa}")]
    IsaUnavailable {
        /// What was asked for.
        isa: Isa,
    },
    /// A thread of the pool could not be started.
    #[error("starting compute thread {thread} failed")]
    SpawnThread {
        /// Index of the thread.
        thread: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A thread could not be pinned: mostly a core outside of the process's own.
    #[error("pinning a compute thread to core {core} failed")]
    PinThread {
        /// The core that was asked for.
        core: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The CPU kernels and the threads that they run on.
#[derive(Debug)]
pub struct Cpu {
    level: Level,
    cores: Vec<usize>,
    threads: usize,
    /// Locked for the length of an operation.
    step: Mutex<Step>,
    attention: Vec<Mutex<Workspace>>,
}

/// What one operation at a time uses.
#[derive(Debug)]
struct Step {
    pool: Pool,
    products: Memory,
    tiles: RowTiles,
    attention: attention::Memory,
}

impl Cpu {
    /// Chooses the instructions and starts the threads.
    ///
    /// # Errors
    ///
    /// [`CpuError`] when the instructions or the cores that were asked for are not there.
    pub fn new(options: CpuOptions) -> Result<Self, CpuError> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        let level = Level::new(isa).ok_or(CpuError::IsaUnavailable { isa })?;
        let cores = options.cores;
        let threads = match cores.len() {
            0 => options.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from)),
            cores => cores,
        };
        let pool = Pool::new(threads, &cores)?;
        let step = Mutex::new(Step {
            pool,
            products: Memory::new(),
            tiles: RowTiles::default(),
            attention: attention::Memory::new(),
        });
        let attention = (0..threads).map(|_| Mutex::new(Workspace::new())).collect();
        Ok(Self { level, cores, threads, step, attention })
    }

    /// Pins the calling thread to the first of the cores; nothing without cores.
    ///
    /// For the thread that will call the operations. Not done by [`new`](Self::new), since threads that the caller
    /// starts later would inherit it.
    ///
    /// # Errors
    ///
    /// [`CpuError::PinThread`] when the core is not one of the process's own.
    pub fn pin_caller(&self) -> Result<(), CpuError> {
        self.cores.first().map_or(Ok(()), |&core| {
            pool::pin_current_thread(core).map_err(|source| CpuError::PinThread { core, source })
        })
    }

    /// One line for logs and banners: "cpu avx512-bf16, 2 threads".
    pub fn describe(&self) -> String {
        let plural = if self.threads == 1 { "" } else { "s" };
        format!("cpu {}, {} thread{plural}", self.isa(), self.threads)
    }

    /// The instructions in use.
    pub const fn isa(&self) -> Isa {
        self.level.isa()
    }

    /// Threads that an operation runs on, the caller included.
    pub const fn threads(&self) -> usize {
        self.threads
    }

    /// Grows all working memory, so that no step within `limits` allocates. Without it, the first steps do.
    pub fn reserve(&self, limits: StepLimits) {
        let mut step = lock(&self.step);
        step.products.reserve(limits.rows, limits.inputs);
        step.tiles.reserve(limits.rows);
        step.attention.reserve(limits.rows, limits.head_size, self.threads);
        for workspace in &self.attention {
            lock(workspace).reserve(limits.head_size);
        }
    }

    /// `out[row][output] = Σ_input x[row][input] * w[output][input] + bias[output]`.
    ///
    /// `x` is `[rows][inputs]`, `out` is `[rows][outputs]`.
    pub fn matmul(&self, out: &mut [f32], x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>) {
        self.product(out, x, w, bias, Store::Replace);
    }

    /// `out[row][output] += Σ_input x[row][input] * w[output][input] + bias[output]`: a residual branch.
    pub fn matmul_add(&self, out: &mut [f32], x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>) {
        self.product(out, x, w, bias, Store::Add);
    }

    /// [`matmul`](Self::matmul) of the same `x` with up to three matrices at a time, which costs one rearrangement of `x`
    /// and one meeting of the threads where all are of one format: query, key and value, or gate and up.
    pub fn matmul_each<const N: usize>(&self, x: &[f32], projections: [Projection<'_>; N]) {
        let step = &mut *lock(&self.step);
        let products = projections.map(|Projection { out, w, bias }| Product {
            w,
            bias,
            store: Store::Replace,
            out: SharedOut::new(out),
        });
        multiply(x, &products, self.level, &mut step.pool, &mut step.products);
    }

    /// `out[row] = x[row] / sqrt(mean(x[row]²) + eps) * weight`, for rows of the length of `weight`.
    pub fn rms_norm(&self, out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
        rowwise::rms_norm(out, Some(x), weight, eps, self.level, &mut lock(&self.step).pool);
    }

    /// [`rms_norm`](Self::rms_norm) in place. With rows of one head's elements this is the q/k norm of Qwen3.
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        rowwise::rms_norm(x, None, weight, eps, self.level, &mut lock(&self.step).pool);
    }

    /// `out = silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`.
    pub fn silu_mul(&self, out: &mut [f32], gate: &[f32], up: &[f32]) {
        rowwise::silu_mul(out, gate, up, self.level, &mut lock(&self.step).pool);
    }

    /// `out += x`.
    pub fn add(&self, out: &mut [f32], x: &[f32]) {
        rowwise::add(out, x, self.level, &mut lock(&self.step).pool);
    }

    /// Rotates every head of every token of `x`, `[tokens][heads][head_size]`, in place.
    pub fn rope(&self, x: &mut [f32], positions: &[u32], table: RopeTable<'_>, head_size: usize) {
        rowwise::rope(x, positions, table, head_size, self.level, &mut lock(&self.step).pool);
    }

    /// Writes the K and V rows of a step, `[rows][kv_heads][head_size]` each, into `layer` of the sequences' blocks,
    /// converted to the stored type as [`reference::write_kv`] says.
    pub fn write_kv(
        &self,
        shape: &KvBlockShape,
        layer: usize,
        k: &[f32],
        v: &[f32],
        sequences: &[SequenceRows<'_>],
    ) {
        let step = &mut *lock(&self.step);
        KvRows { shape, layer, k, v, sequences }.write(self.level, &mut step.pool, &mut step.tiles);
    }

    /// Causal attention of each row to the keys of its sequence up to itself. The K and V of the step's own rows are
    /// already in the blocks. `q` and `out` are `[rows][query_heads][head_size]`; rows of no sequence stay as they are.
    pub fn attention(
        &self,
        out: &mut [f32],
        q: &[f32],
        shape: &KvBlockShape,
        layer: usize,
        sequences: &[SequenceRows<'_>],
        params: AttentionParams,
    ) {
        let step = &mut *lock(&self.step);
        let attention = Attention { q, shape, layer, sequences, params };
        attention.compute(out, self.level, &mut step.pool, &mut step.attention, &self.attention);
    }

    /// Writes the tokens of `from` into `image`, the bytes of `layers` of one block of shape `to`, whose heads are
    /// those of the source from `first_head` on.
    ///
    /// Token `p` goes to slot `p % to.block_len`; all else in the image becomes zero. Equal types copy bits (and
    /// scales). Runs on the calling thread, beside whatever the pool does.
    pub fn convert_block(
        &self,
        image: &mut [u8],
        to: &KvBlockShape,
        layers: Range<usize>,
        from: TokenSpan<'_>,
        first_head: usize,
    ) {
        let heads = HeadSpan { from: first_head, to: 0, count: to.kv_heads };
        heads.assert_fits(from.shape, to);
        from.assert_converts(to, &layers, image);
        clear_uncovered(image, to, layers.len(), from);
        self.level.run(ConvertHeads { image, to, layers, from, heads });
    }

    /// The same for some heads of the target, between workers that hold different ones: everything else in the image
    /// stays as it is.
    /// A block for all heads is put together from the blocks of several workers by one call for each of them, into an
    /// image that began as zeros.
    pub fn convert_heads(
        &self,
        image: &mut [u8],
        to: &KvBlockShape,
        layers: Range<usize>,
        from: TokenSpan<'_>,
        heads: HeadSpan,
    ) {
        from.assert_converts(to, &layers, image);
        heads.assert_fits(from.shape, to);
        self.level.run(ConvertHeads { image, to, layers, from, heads });
    }

    /// Zeroes the token slots of a block from `from_token` on: K, V and scales of all layers. Runs on the calling
    /// thread.
    pub fn zero_tail(&self, shape: &KvBlockShape, block: BlockAddress, from_token: usize) {
        reference::zero_tail(shape, block, from_token);
    }

    /// Replaces logits by their natural-log probabilities: `x - max - ln Σ e^(x - max)`, the sum in f64. Runs on the
    /// calling thread.
    pub fn log_softmax(&self, logits: &mut [f32]) {
        self.level.run(LogSoftmax { logits });
    }

    fn product(&self, out: &mut [f32], x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>, store: Store) {
        let step = &mut *lock(&self.step);
        let product = Product { w, bias, store, out: SharedOut::new(out) };
        multiply(x, &[product], self.level, &mut step.pool, &mut step.products);
    }
}
