//! Operations of a GPU, in the sizes of Llama 3 8B: attention, and blocks on their way to a worker whose layout differs.

use std::time::Instant;

use anyhow::Context;
use tidemill_engine::memory::{DeviceBuffer, block_shape};
use tidemill_kernels::cuda::hopper::BlockRange;
use tidemill_kernels::cuda::{
    Attention, ConvertBlocks, DeviceAddress, DigestGranules, Driver, KvShape, Launch, MatrixProduct, Product,
    PromptAttention, PromptTile, hopper, launches,
};
use tidemill_kernels::kv::KvBlockShape;
use tidemill_kernels::matrix::WeightDtype;
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::units::BlockLen;

use super::{BLOCK, HEAD, KV_HEADS, QUERY_HEADS, Row};
use crate::bench::limits::Yardstick;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Operation {
    /// Attention of one new token of each sequence.
    Decode { sequences: u32, context: u32 },
    /// Attention of a whole prompt to itself.
    Prefill { tokens: u32, by: By },
    /// A product of so many rows of bf16.
    Product { rows: u32, by: By },
    /// Blocks of bf16, token by token, into blocks of another kind.
    Convert { tokens: u32, layers: u32, to: KvDtype },
    /// Digests of blocks of bf16 with every byte of them, a layer each.
    Digest { tokens: u32, layers: u32 },
}

/// Whose kernel it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum By {
    /// Ours for every GPU.
    Warps,
    /// Ours for those that have what Hopper has.
    Warpgroups,
    /// The library's.
    Library,
}

/// What a device is asked for.
enum Request {
    Launch(Box<Launch>),
    Multiply(MatrixProduct),
}

/// An operation with operands in the device's memory.
struct Prepared {
    requests: Vec<Request>,
    /// Bytes read and written, or multiplications and additions.
    amount: f64,
    unit: &'static str,
    what: &'static str,
    _memory: Vec<DeviceBuffer>,
}

/// Memory that is being taken for an operation.
struct Operands<'a> {
    driver: &'a std::sync::Arc<dyn Driver>,
    memory: Vec<DeviceBuffer>,
}

/// Measures each operation that the device has, beside the limit that was measured right before it.
///
/// # Errors
///
/// What the GPU says, or that it has too little memory.
pub(super) fn measure(
    driver: &std::sync::Arc<dyn Driver>,
    operations: &[Operation],
    runs: u32,
) -> anyhow::Result<Vec<Row>> {
    let mut yardstick = Yardstick::on_gpu(driver)?;
    let mut rows = Vec::new();
    for operation in operations {
        let name = operation.name();
        let prepared = operation.prepare(driver).with_context(|| format!("operands of {name}"))?;
        let Some(prepared) = prepared else { continue };
        if !prepared.run(driver, 1)? {
            continue;
        }
        let mut samples = Vec::new();
        for _ in 0..runs {
            let limits = yardstick.measure(None)?;
            let limit = if prepared.unit == BYTES { limits.read } else { limits.flop };
            let start = Instant::now();
            prepared.run(driver, TIMES)?;
            samples.push((prepared.amount * f64::from(TIMES) / start.elapsed().as_secs_f64(), limit));
        }
        let isa = driver.properties().name.clone();
        rows.push(Row::new(isa, name, prepared.unit, prepared.what.to_owned(), &samples));
    }
    Ok(rows)
}

impl Operation {
    pub(super) fn all() -> Vec<Self> {
        vec![
            Self::Decode { sequences: 32, context: 8192 },
            Self::Prefill { tokens: 8192, by: By::Warps },
            Self::Prefill { tokens: 8192, by: By::Warpgroups },
            Self::Product { rows: 1, by: By::Warps },
            Self::Product { rows: 64, by: By::Warps },
            Self::Product { rows: 2048, by: By::Warps },
            Self::Product { rows: 2048, by: By::Warpgroups },
            Self::Product { rows: 2048, by: By::Library },
            Self::Convert { tokens: 32_768, layers: 8, to: KvDtype::Bf16 },
            Self::Convert { tokens: 32_768, layers: 8, to: KvDtype::Int8 },
            Self::Convert { tokens: 32_768, layers: 8, to: KvDtype::Fp8 },
            Self::Digest { tokens: 32_768, layers: 8 },
        ]
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Decode { sequences, context } => format!("attention decode, {sequences} x {context}"),
            Self::Prefill { tokens, by } => format!("attention prefill, {tokens}{}", by.name()),
            Self::Product { rows, by } => {
                format!("matmul {rows} rows, bf16, {INPUTS} to {OUTPUTS}{}", by.name())
            }
            Self::Convert { to: KvDtype::Bf16, .. } => {
                "handoff gather, token by token to head by head".to_owned()
            }
            Self::Convert { to, .. } => {
                format!("handoff convert, bf16 to {}", format!("{to:?}").to_lowercase())
            }
            Self::Digest { .. } => "handoff digest, every byte".to_owned(),
        }
    }

    /// `None` where the device has no such kernel.
    fn prepare(self, driver: &std::sync::Arc<dyn Driver>) -> anyhow::Result<Option<Prepared>> {
        let mut operands = Operands { driver, memory: Vec::new() };
        let launched = |launches: Vec<Launch>| launches.into_iter().map(Request::launch).collect::<Vec<_>>();
        let (requests, amount, unit, what) = match self {
            Self::Decode { sequences, context } => {
                let positions = vec![context - 1; sequences as usize];
                let numbers: Vec<u32> = (0..sequences).collect();
                let launches = operands.attention(context, &positions, &numbers)?;
                let bytes = 2 * sequences as usize * context as usize * KV_HEADS * HEAD * 2;
                (launched(launches), bytes as f64, BYTES, "copied bytes")
            }
            Self::Prefill { tokens, by } => {
                let Some(launch) = operands.prompt(tokens, by)? else { return Ok(None) };
                let pairs = f64::from(tokens) * f64::from(tokens + 1) / 2.0;
                let flop = 4.0 * pairs * (QUERY_HEADS * HEAD) as f64;
                (vec![Request::launch(launch)], flop, "GFLOP/s", "a product of 8192³")
            }
            Self::Product { rows, by } => {
                let Some(request) = operands.product(rows, by)? else { return Ok(None) };
                let flop = 2.0 * f64::from(rows) * f64::from(INPUTS) * f64::from(OUTPUTS);
                let bytes = 2.0 * f64::from(INPUTS) * f64::from(OUTPUTS);
                if rows <= FEW_ROWS {
                    (vec![request], bytes, BYTES, "copied bytes")
                } else {
                    (vec![request], flop, "GFLOP/s", "a product of 8192³")
                }
            }
            Self::Convert { tokens, layers, to } => {
                let (launch, bytes) = operands.convert(tokens, layers, to)?;
                (launched(vec![launch]), bytes, BYTES, "copied bytes")
            }
            Self::Digest { tokens, layers } => {
                let (launch, bytes) = operands.digest(tokens, layers)?;
                (launched(vec![launch]), bytes, BYTES, "copied bytes")
            }
        };
        Ok(Some(Prepared { requests, amount, unit, what, _memory: operands.memory }))
    }
}

impl Request {
    fn launch(launch: Launch) -> Self {
        Self::Launch(Box::new(launch))
    }
}

impl By {
    /// What it adds to an operation's name.
    const fn name(self) -> &'static str {
        match self {
            Self::Warps => "",
            Self::Warpgroups => ", by warpgroups",
            Self::Library => ", by cuBLASLt",
        }
    }
}

impl Prepared {
    /// Runs it so many times, and waits; `false` where the library does not take it.
    fn run(&self, driver: &std::sync::Arc<dyn Driver>, times: u32) -> anyhow::Result<bool> {
        let mut is_taken = true;
        for _ in 0..times {
            for request in &self.requests {
                match request {
                    Request::Launch(launch) => driver.launch(launch)?,
                    Request::Multiply(product) => is_taken &= driver.multiply(product)?,
                }
            }
        }
        driver.synchronize()?;
        Ok(is_taken)
    }
}

impl Operands<'_> {
    /// Memory full of numbers of bf16 that are neither zero nor great: multipliers take more power for them than for zeros.
    fn numbers(&mut self, bytes: usize) -> anyhow::Result<DeviceAddress> {
        let buffer = DeviceBuffer::zeroed(self.driver, bytes)?;
        let (mut state, mut some) = (1_u64, Vec::with_capacity(PATTERN.min(bytes)));
        while some.len() < PATTERN.min(bytes) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            some.extend((0x3e00 | ((state >> 40) as u16 & 0x81ff)).to_le_bytes());
        }
        for first in (0..bytes).step_by(PATTERN) {
            let part = &some[..PATTERN.min(bytes - first).min(some.len())];
            self.driver.upload(buffer.address().offset(first), part)?;
        }
        let address = buffer.address();
        self.memory.push(buffer);
        Ok(address)
    }

    fn empty(&mut self, bytes: usize) -> anyhow::Result<DeviceAddress> {
        let buffer = DeviceBuffer::zeroed(self.driver, bytes)?;
        let address = buffer.address();
        self.memory.push(buffer);
        Ok(address)
    }

    fn holding(
        &mut self,
        contents: impl Iterator<Item = u64>,
        bytes_each: usize,
    ) -> anyhow::Result<DeviceAddress> {
        let bytes: Vec<u8> =
            contents.flat_map(|number| number.to_le_bytes().into_iter().take(bytes_each)).collect();
        let buffer = DeviceBuffer::holding(self.driver, &bytes)?;
        let address = buffer.address();
        self.memory.push(buffer);
        Ok(address)
    }

    /// Blocks for so many tokens of each of some sequences: the table of their addresses.
    fn blocks(
        &mut self,
        shape: &KvBlockShape,
        sequences: usize,
        tokens: usize,
    ) -> anyhow::Result<DeviceAddress> {
        self.blocks_in_range(shape, sequences, tokens).map(|(table, _)| table)
    }

    /// The same, and where they all are.
    fn blocks_in_range(
        &mut self,
        shape: &KvBlockShape,
        sequences: usize,
        tokens: usize,
    ) -> anyhow::Result<(DeviceAddress, BlockRange)> {
        let count = sequences * tokens.div_ceil(shape.block_len);
        let first = self.numbers(count * shape.block_bytes())?;
        // Neighbours in a sequence are none in memory, as after some hours of serving.
        let order = (0..count).map(|block| (block * STRIDE) % count);
        let addresses: Vec<u64> = order.map(|block| first.offset(block * shape.block_bytes()).0).collect();
        let table = self.holding(addresses.into_iter(), size_of::<u64>())?;
        Ok((table, BlockRange { first, count: u32::try_from(count)?, shape: *shape }))
    }

    /// Attention of a row at each position, of the sequence of that number.
    fn attention(
        &mut self,
        longest: u32,
        positions: &[u32],
        sequences: &[u32],
    ) -> anyhow::Result<Vec<Launch>> {
        let shape = shape_of(1, KvDtype::Bf16, AxisOrder::HeadToken);
        let (rows, width) = (positions.len(), QUERY_HEADS * HEAD);
        let count = sequences.iter().max().map_or(0, |last| *last as usize + 1);
        let splits = Attention::splits(longest);
        let partials = rows * QUERY_HEADS * splits as usize * (HEAD + 2) * size_of::<f32>();
        let parameters = Attention {
            out: self.empty(rows * width * 2)?,
            query: self.numbers(rows * width * 2)?,
            blocks: self.blocks(&shape, count, longest as usize)?,
            positions: self.holding(positions.iter().map(|it| u64::from(*it)), size_of::<u32>())?,
            sequences: self.holding(sequences.iter().map(|it| u64::from(*it)), size_of::<u32>())?,
            partials: self.empty(partials)?,
            shape: KvShape::new(&shape),
            dtype: WeightDtype::Bf16.into(),
            layer: 0,
            blocks_per_sequence: longest.div_ceil(BLOCK as u32),
            query_heads: QUERY_HEADS as u32,
            query_stride: width as u32,
            window: 0,
            splits,
            scale: Attention::scale((HEAD as f32).sqrt().recip()),
        };
        let (attend, join) = launches::attention(rows as u32, &parameters);
        Ok([Some(attend), join].into_iter().flatten().collect())
    }

    /// Attention of a prompt to itself.
    fn prompt(&mut self, tokens: u32, by: By) -> anyhow::Result<Option<Launch>> {
        let shape = shape_of(1, KvDtype::Bf16, AxisOrder::TokenHead);
        let width = QUERY_HEADS * HEAD;
        let tiles: Vec<PromptTile> = PromptTile::cut(0, tokens, 0, 0).collect();
        let words = tiles.iter().flat_map(|it| [it.first_row, it.rows, it.first_position, it.sequence]);
        let (blocks, range) = self.blocks_in_range(&shape, 1, tokens as usize)?;
        let parameters = PromptAttention {
            out: self.empty(tokens as usize * width * 2)?,
            query: self.numbers(tokens as usize * width * 2)?,
            blocks,
            tiles: self.holding(words.map(u64::from), size_of::<u32>())?,
            shape: KvShape::new(&shape),
            layer: 0,
            blocks_per_sequence: tokens.div_ceil(BLOCK as u32),
            query_heads: QUERY_HEADS as u32,
            query_stride: width as u32,
            window: 0,
            scale: Attention::scale((HEAD as f32).sqrt().recip()),
        };
        let (dtype, tiles, properties) = (WeightDtype::Bf16, tiles.len() as u32, self.driver.properties());
        Ok(match by {
            By::Warps => launches::attend_prompts(dtype, tiles, &parameters),
            By::Warpgroups => hopper::attend_prompts(properties, dtype, tiles, tokens, &range, &parameters),
            By::Library => None,
        })
    }

    fn product(&mut self, rows: u32, by: By) -> anyhow::Result<Option<Request>> {
        let bytes = |elements: u32| elements as usize * 2;
        let parameters = Product {
            out: self.empty(rows as usize * bytes(OUTPUTS))?,
            x: self.numbers(rows as usize * bytes(INPUTS))?,
            w: self.numbers(INPUTS as usize * bytes(OUTPUTS))?,
            bias: DeviceAddress::NULL,
            rows,
            inputs: INPUTS,
            outputs: OUTPUTS,
            adds: 0,
        };
        let (dtype, to_f32) = (WeightDtype::Bf16, false);
        Ok(match by {
            By::Warps => Some(Request::launch(launches::product(dtype, to_f32, &parameters))),
            By::Warpgroups => {
                hopper::multiply(self.driver.properties(), dtype, to_f32, &parameters).map(Request::launch)
            }
            By::Library => Some(Request::Multiply(MatrixProduct { dtype, to_f32, product: parameters })),
        })
    }

    /// The conversion of one sequence, and its bytes.
    fn convert(&mut self, tokens: u32, layers: u32, to: KvDtype) -> anyhow::Result<(Launch, f64)> {
        let from_shape = shape_of(layers, KvDtype::Bf16, AxisOrder::TokenHead);
        let to_shape = shape_of(layers, to, AxisOrder::HeadToken);
        let parameters = ConvertBlocks {
            from: self.blocks(&from_shape, 1, tokens as usize)?,
            to: self.blocks(&to_shape, 1, tokens as usize)?,
            from_shape: KvShape::new(&from_shape),
            to_shape: KvShape::new(&to_shape),
            first_token: 0,
            tokens,
            first_layer: 0,
            to_first_layer: 0,
            layers,
            first_head: 0,
            to_first_head: 0,
            heads: KV_HEADS as u32,
        };
        let scale = if to.has_scales() { size_of::<f32>() } else { 0 };
        let head = HEAD * (KvDtype::Bf16.bytes() + to.bytes()) + scale;
        let bytes = 2 * tokens as usize * layers as usize * KV_HEADS * head;
        Ok((launches::convert_blocks(&parameters), bytes as f64))
    }

    /// The digests of one sequence's blocks, and its bytes.
    fn digest(&mut self, tokens: u32, layers: u32) -> anyhow::Result<(Launch, f64)> {
        let shape = shape_of(layers, KvDtype::Bf16, AxisOrder::TokenHead);
        let (blocks, layers) = (tokens.div_ceil(BLOCK as u32), u64::from(layers));
        let first = self.numbers(blocks as usize * shape.block_bytes())?;
        let count = blocks * layers as u32;
        // `GranuleOfBlock`, whose last two words are the number of the sum.
        let granule = |number: u64| {
            let (block, layer) = (number / layers, number % layers);
            let bytes = first.offset(number as usize * shape.layer_stride).0;
            [bytes, (block << 32) | layer, block]
        };
        let parameters = DigestGranules {
            sums: self.empty(blocks as usize * size_of::<u64>())?,
            granules: self.holding((0..u64::from(count)).flat_map(granule), size_of::<u64>())?,
            secret: DigestGranules::SECRET,
            bytes: shape.layer_stride as u32,
            reserved: 0,
        };
        let bytes = blocks as usize * shape.block_bytes();
        Ok((launches::digest_granules(count, &parameters), bytes as f64))
    }
}

fn shape_of(layers: u32, dtype: KvDtype, order: AxisOrder) -> KvBlockShape {
    block_shape(&KvLayout {
        model: String::new(),
        layers: layers as u16,
        kv_heads: KV_HEADS as u16,
        heads: HeadRange { first: 0, count: KV_HEADS as u16 },
        head_size: HEAD as u16,
        dtype,
        block_len: BlockLen::new(BLOCK as u32).expect("a power of two"),
        order,
    })
}

const BYTES: &str = "GB/s";
/// The widest matrix of a layer.
const INPUTS: u32 = 4096;
const OUTPUTS: u32 = 14_336;
/// Rows up to which a product is bound by reading the weights.
const FEW_ROWS: u32 = 64;
/// Runs between two looks at the clock.
const TIMES: u32 = 10;
/// Bytes of numbers that are made at a time.
const PATTERN: usize = 16 << 20;
/// Odd and no factor of numbers of blocks, which are mostly powers of two.
const STRIDE: usize = 4999;

#[cfg(test)]
mod tests {
    tidemill_kernels::where_emulated! {
        use std::sync::Arc;

        use tidemill_kernels::cuda::{emulator::Order, fake::Fake};

        use super::*;

        #[test]
        fn each_operation_runs_and_gives_its_memory_back() {
            let fake = Fake::new(Order::Forwards).with_capacity(64 << 20);
            let fake = Arc::new(fake.with_compute_capability(hopper::CAPABILITY));
            let driver: Arc<dyn Driver> = Arc::clone(&fake) as _;
            let operations = [
                Operation::Decode { sequences: 2, context: 40 },
                Operation::Prefill { tokens: 20, by: By::Warps },
                Operation::Prefill { tokens: 20, by: By::Warpgroups },
                Operation::Convert { tokens: 40, layers: 2, to: KvDtype::Bf16 },
                Operation::Convert { tokens: 33, layers: 1, to: KvDtype::Int8 },
                Operation::Convert { tokens: 33, layers: 1, to: KvDtype::Fp8 },
                Operation::Digest { tokens: 40, layers: 2 },
            ];
            let rows = measure(&driver, &operations, 1).expect("it has the memory");
            assert_eq!(rows.len(), operations.len());
            for (row, operation) in rows.iter().zip(operations) {
                assert!(0.0 < row.rate && row.rate.is_finite(), "{row:?}");
                assert!(row.line().contains(&operation.name()), "{}", row.line());
            }
            fake.assert_nothing_left();
        }
    }
}
