//! The operations on a CPU.
//!
//! All methods take `&self`; one operation at a time runs on the pool, and a second caller waits for it.

mod isa;

use crate::{
    kv::{BlockAddress, KvBlockShape},
    matrix::PackedMatrix,
    reference,
    step::{AttentionParams, RopeTable, SequenceRows, TokenSpan},
};
pub use isa::Isa;
use std::{io, ops::Range};

/// How a [`Cpu`] is set up.
#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// One thread per entry, pinned to that core. Empty: one thread per core that this process may use, not pinned.
    pub cores: Vec<usize>,
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
    isa: Isa,
}

impl Cpu {
    /// Chooses the instructions and starts the threads.
    ///
    /// # Errors
    ///
    /// [`CpuError`] when the instructions or the cores that were asked for are not there.
    #[allow(clippy::needless_pass_by_value)]
    pub fn new(options: CpuOptions) -> Result<Self, CpuError> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !isa.is_available() {
            return Err(CpuError::IsaUnavailable { isa });
        }
        Ok(Self { isa })
    }

    /// One line for logs and banners: "cpu avx2+fma, 2 threads".
    pub fn describe(&self) -> String {
        format!("cpu {}, 1 thread", self.isa)
    }

    /// Grows all working memory, so that no step within `limits` allocates.
    pub fn reserve(&self, _limits: StepLimits) {}

    /// `out[row][output] = Σ_input x[row][input] * w[output][input] + bias[output]`.
    ///
    /// `x` is `[rows][inputs]`, `out` is `[rows][outputs]`.
    pub fn matmul(&self, out: &mut [f32], x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>) {
        reference::matmul(out, x, &unpack(w), w.inputs(), bias);
    }

    /// `out[row][output] += Σ_input x[row][input] * w[output][input] + bias[output]`: a residual branch.
    pub fn matmul_add(&self, out: &mut [f32], x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>) {
        let mut product = vec![0.0; out.len()];
        self.matmul(&mut product, x, w, bias);
        reference::add(out, &product);
    }

    /// `out[row] = x[row] / sqrt(mean(x[row]²) + eps) * weight`, for rows of the length of `weight`.
    pub fn rms_norm(&self, out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
        reference::rms_norm(out, x, weight, eps);
    }

    /// [`rms_norm`](Self::rms_norm) in place. With rows of one head's elements this is the q/k norm of Qwen3.
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        let rows = x.to_vec();
        reference::rms_norm(x, &rows, weight, eps);
    }

    /// `out = silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`.
    pub fn silu_mul(&self, out: &mut [f32], gate: &[f32], up: &[f32]) {
        reference::silu_mul(out, gate, up);
    }

    /// `out += x`.
    pub fn add(&self, out: &mut [f32], x: &[f32]) {
        reference::add(out, x);
    }

    /// Rotates every head of every token of `x`, `[tokens][heads][head_size]`, in place.
    pub fn rope(&self, x: &mut [f32], positions: &[u32], table: RopeTable<'_>, head_size: usize) {
        reference::rope(x, positions, table, head_size);
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
        reference::write_kv(shape, layer, k, v, sequences);
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
        reference::attention(out, q, shape, layer, sequences, params);
    }

    /// Writes the tokens of `from` into `image`, the bytes of `layers` of one block of shape `to`.
    ///
    /// Token `p` goes to slot `p % to.block_len`; all else in the image becomes zero. Equal types copy bits (and
    /// scales). Runs on the calling thread, beside whatever the pool does.
    pub fn convert_block(
        &self,
        image: &mut [u8],
        to: &KvBlockShape,
        layers: Range<usize>,
        from: TokenSpan<'_>,
    ) {
        reference::convert_block(image, to, layers, from);
    }

    /// Zeroes the token slots of a block from `from_token` on: K, V and scales of all layers. Runs on the calling
    /// thread.
    pub fn zero_tail(&self, shape: &KvBlockShape, block: BlockAddress, from_token: usize) {
        reference::zero_tail(shape, block, from_token);
    }

    /// Replaces logits by their natural-log probabilities: `x - max - ln Σ e^(x - max)`, the sum in f64. Runs on the
    /// calling thread.
    pub fn log_softmax(&self, logits: &mut [f32]) {
        reference::log_softmax(logits);
    }
}

fn unpack(w: &PackedMatrix) -> Vec<f32> {
    let mut rows = vec![0.0; w.outputs() * w.inputs()];
    for (index, row) in rows.chunks_exact_mut(w.inputs()).enumerate() {
        w.row(index, row);
    }
    rows
}
