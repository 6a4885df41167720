//! Kernels that take what Hopper has (compute capability 9.0) and no other GPU: what they are launched with, and where they are of use.

use super::{
    ComputeCapability, DeviceAddress, KvShape, Launch, Parameters, Product, PromptAttention, PromptTile,
    Properties, TensorMap,
};
use crate::kv::{KvBlockShape, KvDtype};
use crate::matrix::WeightDtype;
use bytemuck::NoUninit;

/// The one kind of GPU that has `wgmma`.
pub const CAPABILITY: ComputeCapability = ComputeCapability { major: 9, minor: 0 };

/// `HopperProduct` in `hopper_product.cu`.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
struct HopperProduct {
    x: TensorMap,
    w: TensorMap,
    product: Product,
    reserved: [u32; 20],
}

/// `HopperAttention` in `hopper_attention.cu`.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
struct HopperAttention {
    query: TensorMap,
    keys: TensorMap,
    values: TensorMap,
    prompt: PromptAttention,
    first_block: DeviceAddress,
    block_bytes: u64,
    reserved: [u32; 2],
}

impl Parameters for HopperProduct {
    const TENSOR_MAPS: usize = 2;
}

impl Parameters for HopperAttention {
    const TENSOR_MAPS: usize = 3;
}

/// Blocks of one shape that lie one behind the other: all that a table of blocks names.
#[derive(Clone, Copy, Debug)]
pub struct BlockRange {
    /// The first block.
    pub first: DeviceAddress,
    /// How many.
    pub count: u32,
    /// Each of them.
    pub shape: KvBlockShape,
}

/// A product of many rows, for which a smaller kernel would read weights again and again. `None` on other GPUs, and where
/// operands are no whole packs of 16 bits.
pub fn multiply(
    properties: &Properties,
    dtype: WeightDtype,
    to_f32: bool,
    product: &Product,
) -> Option<Launch> {
    let kernels = match dtype {
        WeightDtype::F32 => return None,
        WeightDtype::F16 => ["multiply_wide_128_f16", "multiply_wide_256_f16"],
        WeightDtype::Bf16 => ["multiply_wide_128_bf16", "multiply_wide_256_bf16"],
    };
    if to_f32 || properties.compute_capability != CAPABILITY {
        return None;
    }
    let tiles = |outputs: u32| product.rows.div_ceil(ROWS) * product.outputs.div_ceil(outputs);
    // Blocks compute one tile after the other; a narrow one takes a little more than half the time of a wide one.
    let turns = |outputs| tiles(outputs).div_ceil(properties.multiprocessors);
    let (narrow, wide) = (turns(OUTPUTS[0]) * 11, turns(OUTPUTS[1]) * 20);
    let choice = usize::from(wide <= narrow);
    let (outputs, stages) = (OUTPUTS[choice], STAGES[choice]);
    let map = |first, rows, tile| {
        let row_bytes = 2 * u64::from(product.inputs);
        TensorMap::new(first, &[(product.inputs, 2, TensorMap::ROW), (rows, row_bytes, tile)])
    };
    let parameters = HopperProduct {
        x: map(product.x, product.rows, ROWS)?,
        w: map(product.w, product.outputs, outputs)?,
        product: *product,
        reserved: [0; 20],
    };
    let blocks = tiles(outputs).min(properties.multiprocessors);
    // `WideMemory`: rows of a stage's inputs, and two barriers.
    let shared_bytes = stages * ((ROWS + outputs) * TensorMap::ROW * 2 + 16);
    let launch = Launch::new("hopper_product", kernels[choice], [blocks, 1, 1], THREADS, &parameters);
    Some(launch.with_shared_bytes(shared_bytes.next_multiple_of(ALIGNMENT)))
}

/// Attention of prompts, in so many tiles of `rows` rows of the query. A row is the same in any company. `None` on other GPUs,
/// and where heads, groups of query heads, or blocks are none that its kernels take; that does not depend on rows.
pub fn attend_prompts(
    properties: &Properties,
    dtype: WeightDtype,
    tiles: u32,
    rows: u32,
    blocks: &BlockRange,
    prompt: &PromptAttention,
) -> Option<Launch> {
    let shape = &blocks.shape;
    assert_eq!(prompt.shape, KvShape::new(shape), "attention: the blocks that it names are those");
    let (kernel, stages) = match (dtype, shape.dtype, shape.head_size) {
        (WeightDtype::F16, KvDtype::F16, 64) => ("attend_prompt_wide_64_f16", 4),
        (WeightDtype::F16, KvDtype::F16, 128) => ("attend_prompt_wide_128_f16", 2),
        (WeightDtype::Bf16, KvDtype::Bf16, 64) => ("attend_prompt_wide_64_bf16", 4),
        (WeightDtype::Bf16, KvDtype::Bf16, 128) => ("attend_prompt_wide_128_bf16", 2),
        _ => return None,
    };
    let kv_heads = prompt.shape.kv_heads();
    let group = prompt.query_heads / kv_heads;
    // Of a query head that is alone with its keys, half of a block would have nothing to do.
    let fits = properties.compute_capability == CAPABILITY
        && 1 < group
        && prompt.out.0.is_multiple_of(16)
        && (8..=KEYS as usize).contains(&shape.block_len);
    if !fits {
        return None;
    }
    let narrow = |number: usize| u32::try_from(number).expect("blocks are smaller than 4 GiB");
    let stored = |first| {
        let dimensions = [
            (narrow(shape.head_size), 2, TensorMap::ROW),
            (narrow(shape.block_len), shape.token_stride as u64, narrow(shape.block_len)),
            (kv_heads, shape.head_stride as u64, 1),
            (narrow(shape.layers), shape.layer_stride as u64, 1),
            (blocks.count, shape.block_bytes() as u64, 1),
        ];
        TensorMap::new(first, &dimensions)
    };
    let width = prompt.query_heads * narrow(shape.head_size);
    let query = [(width, 2, TensorMap::ROW), (rows, 2 * u64::from(prompt.query_stride), PromptTile::ROWS)];
    let parameters = HopperAttention {
        query: TensorMap::new(prompt.query, &query)?,
        keys: stored(blocks.first)?,
        values: stored(blocks.first.offset(shape.value_offset))?,
        prompt: *prompt,
        first_block: blocks.first,
        block_bytes: shape.block_bytes() as u64,
        reserved: [0; 2],
    };
    // `WideAttentionMemory`: rows of the query of two heads, stages of keys and values, and barriers.
    let (rows, barriers) = (2 * PromptTile::ROWS + stages * 2 * KEYS, 2 + 4 * stages);
    let shared_bytes = rows * narrow(shape.head_size) * 2 + barriers * 8;
    let grid = [tiles, kv_heads * group.div_ceil(2), 1];
    let launch = Launch::new("hopper_attention", kernel, grid, THREADS, &parameters);
    Some(launch.with_shared_bytes(shared_bytes.next_multiple_of(ALIGNMENT)))
}

/// `kWideThreads` and `kWideAttentionThreads`: three warpgroups.
const THREADS: u32 = 384;
/// `kWideRows`, and what the kernels have in their names.
const ROWS: u32 = 128;
const OUTPUTS: [u32; 2] = [128, 256];
/// Of a product's tiles, narrow and wide.
const STAGES: [u32; 2] = [6, 4];
/// `kTileKeys`
const KEYS: u32 = 128;
/// Of structures in shared memory that have tiles.
const ALIGNMENT: u32 = 1024;
