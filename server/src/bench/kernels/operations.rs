//! The operations, their operands, and what limits each.

use anyhow::Context;
use tidemill_engine::memory::Arena;
use tidemill_kernels::cpu::{Arithmetic, Cpu};
use tidemill_kernels::kv::BlockAddress;
use tidemill_kernels::matrix::{MatrixSource, PackedMatrix, Quantization, WeightDtype, WeightFormat};
use tidemill_kernels::step::{AttentionParams, RopeTable, SequenceRows};
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::{BlockCount, BlockId, BlockLen};

use super::{BLOCK, HEAD, KV_HEADS, QUERY_HEADS};
use crate::bench::limits::{Limits, weights_name};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Operation {
    /// A matrix product of so many rows. One row reads a matrix that no cache holds.
    Matmul { rows: usize, format: WeightFormat },
    /// Attention of `rows` new tokens of each sequence, which has `context` tokens in all.
    Attention { sequences: usize, rows: usize, context: usize, dtype: KvDtype },
    /// K and V of so many tokens into their blocks.
    WriteKv { rows: usize },
    /// RMS norm.
    Norm { rows: usize },
    /// SiLU and product.
    SiluMul { rows: usize },
    /// Rotary embedding.
    Rope { rows: usize },
    /// Sum of two vectors.
    Add { rows: usize },
    /// Log-probabilities of one row of logits, on one thread.
    LogSoftmax,
}

/// What an operation cannot be faster than.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bound {
    /// Its bytes, read or written.
    Bytes,
    /// Its multiplications and additions.
    Operations(Arithmetic),
}

/// An operation with operands in memory.
pub(super) struct Prepared {
    operation: Operation,
    x: Vec<f32>,
    y: Vec<f32>,
    out: Vec<f32>,
    matrix: Option<PackedMatrix>,
    cache: Option<Cache>,
    positions: Vec<u32>,
}

/// Blocks of some sequences of one length.
struct Cache {
    arena: Arena,
    blocks: Vec<Vec<BlockAddress>>,
}

impl Operation {
    /// Everything, in sizes as models have them.
    pub(super) fn all() -> Vec<Self> {
        let stored = [WeightDtype::F32, WeightDtype::F16, WeightDtype::Bf16].map(WeightFormat::Stored);
        let quantized = [Quantization::Int8, Quantization::Fp8, Quantization::Int4 { group: 32 }]
            .map(WeightFormat::Quantized);
        let formats = stored.into_iter().chain(quantized);
        let products = formats.flat_map(|format| [1, 16, 256].map(|rows| Self::Matmul { rows, format }));
        let attention = |sequences, rows, context, dtype| Self::Attention { sequences, rows, context, dtype };
        let others = [
            attention(1, 1, 2048, KvDtype::Bf16),
            attention(1, 1, 8192, KvDtype::Bf16),
            attention(16, 1, 2048, KvDtype::Bf16),
            attention(16, 1, 8192, KvDtype::Bf16),
            attention(16, 1, 2048, KvDtype::F16),
            attention(16, 1, 2048, KvDtype::Int8),
            attention(16, 1, 2048, KvDtype::Fp8),
            attention(1, 256, 1024, KvDtype::Bf16),
            attention(1, 2048, 2048, KvDtype::Bf16),
            attention(1, 2048, 2048, KvDtype::F16),
            Self::WriteKv { rows: 4096 },
            Self::Norm { rows: 4096 },
            Self::SiluMul { rows: 4096 },
            Self::Rope { rows: 4096 },
            Self::Add { rows: 4096 },
            Self::LogSoftmax,
        ];
        products.chain(others).collect()
    }

    pub(super) fn name(&self) -> String {
        match self {
            Self::Matmul { rows: 1, format } => format!("matmul 1 row, {}", weights_name(*format)),
            Self::Matmul { rows, format } => format!("matmul {rows} rows, {}", weights_name(*format)),
            Self::Attention { sequences, rows: 1, context, dtype } => {
                format!("attention decode, {sequences} x {context}, {}", dtype.name())
            }
            Self::Attention { rows, context, dtype, .. } => {
                format!("attention prefill, {rows} of {context}, {}", dtype.name())
            }
            Self::WriteKv { .. } => "write K and V, bf16".to_owned(),
            Self::Norm { .. } => "RMS norm".to_owned(),
            Self::SiluMul { .. } => "SiLU and product".to_owned(),
            Self::Rope { .. } => "rotary embedding".to_owned(),
            Self::Add { .. } => "add".to_owned(),
            Self::LogSoftmax => "log-softmax, 1 thread".to_owned(),
        }
    }

    /// Makes the operands.
    ///
    /// # Errors
    ///
    /// When there is no memory for K and V.
    pub(super) fn prepare(&self) -> anyhow::Result<Prepared> {
        let numbers =
            |count: usize| (0..count).map(|index| ((index * 37 % 101) as f32 - 50.0) / 64.0).collect();
        let mut prepared = Prepared {
            operation: *self,
            x: Vec::new(),
            y: Vec::new(),
            out: Vec::new(),
            matrix: None,
            cache: None,
            positions: Vec::new(),
        };
        match *self {
            Self::Matmul { rows, format } => {
                let outputs = outputs(rows, format);
                prepared.x = numbers(rows * INPUTS);
                prepared.out = vec![0.0; rows * outputs];
                prepared.matrix = Some(matrix(outputs, format));
            }
            Self::Attention { sequences, rows, context, dtype } => {
                prepared.x = numbers(sequences * rows * QUERY_HEADS * HEAD);
                prepared.out = vec![0.0; prepared.x.len()];
                prepared.cache = Some(Cache::new(sequences, context, dtype)?);
            }
            Self::WriteKv { rows } => {
                prepared.x = numbers(rows * KV_HEADS * HEAD);
                prepared.y = numbers(rows * KV_HEADS * HEAD);
                prepared.cache = Some(Cache::new(1, rows, KvDtype::Bf16)?);
            }
            Self::Norm { rows } | Self::SiluMul { rows } | Self::Rope { rows } | Self::Add { rows } => {
                prepared.x = numbers(rows * INPUTS);
                prepared.y = numbers(if matches!(self, Self::Norm { .. }) { INPUTS } else { rows * INPUTS });
                prepared.out = numbers(rows * INPUTS);
                prepared.positions = vec![1; rows];
            }
            Self::LogSoftmax => prepared.out = numbers(VOCABULARY),
        }
        Ok(prepared)
    }
}

impl Prepared {
    /// What limits it on `cpu`.
    pub(super) fn bound(&self, cpu: &Cpu) -> Bound {
        match self.operation {
            Operation::Matmul { rows, format } if FEW_ROWS < rows => {
                Bound::Operations(cpu.arithmetic(format))
            }
            // K and V of these types are multiplied in bf16 where there are instructions for that.
            Operation::Attention { rows, dtype: KvDtype::Bf16 | KvDtype::Int8 | KvDtype::Fp8, .. }
                if 1 < rows =>
            {
                Bound::Operations(cpu.arithmetic(WeightFormat::Stored(WeightDtype::Bf16)))
            }
            Operation::Attention { rows, .. } if 1 < rows => Bound::Operations(Arithmetic::F32),
            _ => Bound::Bytes,
        }
    }

    /// Bytes or operations of one run.
    pub(super) fn amount(&self, bound: Bound) -> f64 {
        let size = size_of::<f32>();
        let amount = match (self.operation, bound) {
            (Operation::Matmul { rows, format }, Bound::Operations(_)) => {
                2 * rows * outputs(rows, format) * INPUTS
            }
            (Operation::Matmul { .. }, Bound::Bytes) => self.matrix.as_ref().map_or(0, PackedMatrix::bytes),
            (Operation::Attention { sequences, rows, context, .. }, Bound::Operations(_)) => {
                // The rows are the last ones: each sees all that is before it, and itself.
                let pairs = rows * (context - rows) + rows * (rows + 1) / 2;
                4 * sequences * pairs * QUERY_HEADS * HEAD
            }
            (Operation::Attention { sequences, context, dtype, .. }, Bound::Bytes) => {
                let scale = usize::from(dtype.has_scales()) * size;
                2 * sequences * context * KV_HEADS * (HEAD * dtype.bytes() + scale)
            }
            (Operation::WriteKv { rows }, _) => 2 * rows * KV_HEADS * HEAD * (size + KvDtype::Bf16.bytes()),
            (Operation::Norm { rows } | Operation::Rope { rows }, _) => 2 * rows * INPUTS * size,
            (Operation::SiluMul { rows } | Operation::Add { rows }, _) => 3 * rows * INPUTS * size,
            (Operation::LogSoftmax, _) => 2 * VOCABULARY * size,
        };
        amount as f64
    }

    /// Runs it once.
    pub(super) fn run(&mut self, cpu: &Cpu) {
        let Self { operation, x, y, out, matrix, cache, positions } = self;
        match (*operation, matrix, cache) {
            (Operation::Matmul { .. }, Some(matrix), _) => cpu.matmul(out, x, matrix, None),
            (Operation::Attention { rows, context, .. }, _, Some(cache)) => {
                let sequences = cache.sequences(rows, context);
                let scale = 1.0 / (HEAD as f32).sqrt();
                let params = AttentionParams { query_heads: QUERY_HEADS, scale, sliding_window: None };
                cpu.attention(out, x, cache.arena.shape(), 0, &sequences, params);
            }
            (Operation::WriteKv { rows }, _, Some(cache)) => {
                let sequences = cache.sequences(rows, rows);
                cpu.write_kv(cache.arena.shape(), 0, x, y, &sequences);
            }
            (Operation::Norm { .. }, ..) => cpu.rms_norm(out, x, y, 1e-5),
            (Operation::SiluMul { .. }, ..) => cpu.silu_mul(out, x, y),
            (Operation::Rope { .. }, ..) => {
                // A turn by nothing, so that numbers stay what they are, run after run.
                let (cos, sin) = ([1.0; HEAD], [0.0; HEAD]);
                let table = RopeTable { cos: &cos, sin: &sin, half: HEAD / 2 };
                cpu.rope(out, positions, table, HEAD);
            }
            (Operation::Add { .. }, ..) => cpu.add(out, x),
            (Operation::LogSoftmax, ..) => cpu.log_softmax(out),
            (Operation::Matmul { .. } | Operation::Attention { .. } | Operation::WriteKv { .. }, ..) => {
                unreachable!("`prepare` made its operands")
            }
        }
    }
}

impl Bound {
    pub(super) const fn unit(self) -> &'static str {
        match self {
            Self::Bytes => "GB/s",
            Self::Operations(_) => "GOP/s",
        }
    }

    pub(super) fn what(self) -> String {
        match self {
            Self::Bytes => "memory read".to_owned(),
            Self::Operations(arithmetic) => format!("{} multiply-add", arithmetic.name()),
        }
    }

    /// Which operations to measure; where bytes are the limit, any.
    pub(super) const fn arithmetic(self) -> Arithmetic {
        match self {
            Self::Bytes => Arithmetic::F32,
            Self::Operations(arithmetic) => arithmetic,
        }
    }

    pub(super) const fn limit(self, limits: Limits) -> f64 {
        match self {
            Self::Bytes => limits.read,
            Self::Operations(_) => limits.flop,
        }
    }
}

impl Cache {
    fn new(sequences: usize, tokens: usize, dtype: KvDtype) -> anyhow::Result<Self> {
        let layout = KvLayout {
            model: String::new(),
            layers: 1,
            kv_heads: KV_HEADS as u16,
            heads: HeadRange { first: 0, count: KV_HEADS as u16 },
            head_size: HEAD as u16,
            dtype,
            block_len: BlockLen::new(BLOCK as u32).expect("a power of two"),
            order: AxisOrder::TokenHead,
        };
        let each = tokens.div_ceil(BLOCK);
        let arena =
            Arena::new(layout, BlockCount((sequences * each) as u32)).context("memory for K and V")?;
        let address = |index: usize| arena.address(BlockId(index as u32));
        let blocks =
            (0..sequences).map(|one| (one * each..(one + 1) * each).map(address).collect()).collect();
        Ok(Self { arena, blocks })
    }

    /// The last `rows` of `context` tokens of every sequence.
    fn sequences(&self, rows: usize, context: usize) -> Vec<SequenceRows<'_>> {
        let rows_of = |(index, blocks)| {
            let blocks: &Vec<BlockAddress> = blocks;
            SequenceRows { first_row: index * rows, rows, first_position: context - rows, blocks }
        };
        self.blocks.iter().enumerate().map(rows_of).collect()
    }
}

/// Few rows are limited by the bytes of the matrix, which must be more than a cache holds; many by the operations.
const fn outputs(rows: usize, format: WeightFormat) -> usize {
    if FEW_ROWS < rows {
        return 2048;
    }
    match format {
        WeightFormat::Stored(dtype) => MATRIX_BYTES / INPUTS / dtype.bytes(),
        WeightFormat::Quantized(Quantization::Int8 | Quantization::Fp8) => MATRIX_BYTES / INPUTS,
        WeightFormat::Quantized(Quantization::Int4 { .. }) => 2 * MATRIX_BYTES / INPUTS,
    }
}

fn matrix(outputs: usize, format: WeightFormat) -> PackedMatrix {
    let dtype = match format {
        WeightFormat::Stored(dtype) => dtype,
        WeightFormat::Quantized(_) => WeightDtype::Bf16,
    };
    // Sixteen values around a quarter in any of the types: their upper byte says so.
    let values = (0..16_u8).flat_map(|low| match dtype {
        WeightDtype::F32 => vec![0, 0, low, 0x3e],
        WeightDtype::F16 => vec![low, 0x34],
        WeightDtype::Bf16 => vec![low, 0x3e],
    });
    let bytes = values.collect::<Vec<u8>>().repeat(outputs * INPUTS / 16);
    let source = MatrixSource { bytes: &bytes, dtype };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    match format {
        WeightFormat::Stored(_) => PackedMatrix::pack_on(threads, outputs, INPUTS, source),
        WeightFormat::Quantized(kind) => PackedMatrix::quantize_on(threads, outputs, INPUTS, source, kind),
    }
}

/// Of a matrix that is limited by its bytes.
const MATRIX_BYTES: usize = 128 << 20;
const INPUTS: usize = 2048;
/// Rows up to which the matrix is the larger part.
const FEW_ROWS: usize = 16;
const VOCABULARY: usize = 131_072;
