//! Which kernel runs for an operation, on how many blocks of how many threads.

use super::{
    Attention, ConvertBlocks, Embed, Launch, Parameters, Product, PromptAttention, PromptTile, RmsNorm,
    RopeAndWrite, Sample, SiluMul, ZeroTail, launch::WARP,
};
use crate::matrix::WeightDtype;

/// The embedding of `rows` tokens.
pub fn embed(dtype: WeightDtype, rows: u32, parameters: &Embed) -> Launch {
    let kernel = of_type(dtype, ["embed_f32", "embed_f16", "embed_bf16"]);
    row_by_row("embedding", kernel, rows, parameters.width, 256, parameters)
}

/// A norm of `rows` rows.
pub fn rms_norm(dtype: WeightDtype, rows: u32, parameters: &RmsNorm) -> Launch {
    let kernel = of_type(dtype, ["rms_norm_f32", "rms_norm_f16", "rms_norm_bf16"]);
    row_by_row("normalize", kernel, rows, parameters.width, 1024, parameters)
}

/// The gates of `rows` rows, at most 65535.
pub fn silu_mul(dtype: WeightDtype, rows: u32, parameters: &SiluMul) -> Launch {
    let kernel = of_type(dtype, ["silu_mul_f32", "silu_mul_f16", "silu_mul_bf16"]);
    let blocks = parameters.width.div_ceil(PACK * THREADS).max(1);
    Launch::new("activation", kernel, [blocks, rows, 1], THREADS, parameters)
}

/// Query, key and value of `rows` rows.
pub fn rope_and_write(dtype: WeightDtype, rows: u32, parameters: &RopeAndWrite) -> Launch {
    let kernel = of_type(dtype, ["rope_and_write_f32", "rope_and_write_f16", "rope_and_write_bf16"]);
    let heads = parameters.query_heads + 2 * parameters.shape.kv_heads();
    Launch::new("rotary", kernel, [rows, heads.div_ceil(THREADS / WARP), 1], THREADS, parameters)
}

/// Attention of `rows` rows: one launch, and a second one that joins what the first left where there are several splits.
///
/// # Panics
///
/// When heads have more than 256 elements or no multiple of 8, or query heads are no whole groups.
pub fn attention(rows: u32, parameters: &Attention) -> (Launch, Option<Launch>) {
    let (head_size, kv_heads) = (parameters.shape.head_size(), parameters.shape.kv_heads());
    assert!(head_size.is_multiple_of(8) && head_size <= 256, "attention: heads of {head_size} elements");
    assert!(parameters.query_heads.is_multiple_of(kv_heads), "attention: whole groups of query heads");
    let (kernel, at_once) = match head_size {
        ..=64 => ("attention_64", 4),
        65..=128 => ("attention_128", 4),
        _ => ("attention_256", 2),
    };
    let groups = kv_heads * (parameters.query_heads / kv_heads).div_ceil(at_once);
    let launch = |kernel, grid| Launch::new("attention", kernel, grid, 128, parameters);
    let join = (1 < parameters.splits).then(|| launch("attention_join", [rows, parameters.query_heads, 1]));
    (launch(kernel, [rows, groups, parameters.splits]), join)
}

/// Attention of prompts in so many [tiles](PromptTile), on tensor cores. `None` for f32, which they do not take: see [`attention`].
///
/// # Panics
///
/// When heads have more than 256 elements or no multiple of 8, or query heads are no whole groups.
pub fn attend_prompts(dtype: WeightDtype, tiles: u32, parameters: &PromptAttention) -> Option<Launch> {
    let (head_size, kv_heads) = (parameters.shape.head_size(), parameters.shape.kv_heads());
    assert!(head_size.is_multiple_of(8) && head_size <= 256, "attention: heads of {head_size} elements");
    assert!(parameters.query_heads.is_multiple_of(kv_heads), "attention: whole groups of query heads");
    assert!(parameters.query_stride.is_multiple_of(PACK), "attention: rows of the query are whole packs");
    let (f16, bf16, room, keys) = match head_size {
        ..=64 => ("attend_prompt_64_f16", "attend_prompt_64_bf16", 64, 64),
        65..=96 => ("attend_prompt_96_f16", "attend_prompt_96_bf16", 96, 64),
        97..=128 => ("attend_prompt_128_f16", "attend_prompt_128_bf16", 128, 64),
        _ => ("attend_prompt_256_f16", "attend_prompt_256_bf16", 256, 32),
    };
    let kernel = match dtype {
        WeightDtype::F32 => return None,
        WeightDtype::F16 => f16,
        WeightDtype::Bf16 => bf16,
    };
    // `PromptMemory`: rows of the query, and two stages of keys and values.
    let shared_bytes = (PromptTile::ROWS + 2 * 2 * keys) * (room + PACK) * 2;
    let grid = [tiles, parameters.query_heads, if room == 256 { 2 } else { 1 }];
    Some(Launch::new("prompt_attention", kernel, grid, 128, parameters).with_shared_bytes(shared_bytes))
}

/// The product of many rows, on tensor cores, into the type of the operands or into f32: for prompts, where the weights would be read
/// again and again by [`multiply`]. `None` where the operands are f32, or rows that are no whole packs: see there.
pub fn multiply_tiles(dtype: WeightDtype, to_f32: bool, parameters: &Product) -> Option<Launch> {
    let whole =
        parameters.inputs.is_multiple_of(PACK) && (parameters.x.0 | parameters.w.0).is_multiple_of(16);
    let kernel = match (dtype, to_f32) {
        _ if !whole => return None,
        (WeightDtype::F32, _) => return None,
        (WeightDtype::F16, false) => "multiply_tiles_f16",
        (WeightDtype::F16, true) => "multiply_tiles_f16_to_f32",
        (WeightDtype::Bf16, false) => "multiply_tiles_bf16",
        (WeightDtype::Bf16, true) => "multiply_tiles_bf16_to_f32",
    };
    let grid = [parameters.rows.div_ceil(TILE), parameters.outputs.div_ceil(TILE), 1];
    // `kStages` of `ProductStage`.
    let shared_bytes = 4 * 2 * TILE * (32 + PACK) * 2;
    Some(Launch::new("matrix_product", kernel, grid, 256, parameters).with_shared_bytes(shared_bytes))
}

/// The product of a few rows: the weights are read again for every eight of them.
pub fn multiply(dtype: WeightDtype, parameters: &Product) -> Launch {
    let row = ["multiply_row_f32", "multiply_row_f16", "multiply_row_bf16"];
    product(dtype, parameters, row, ["multiply_rows_f32", "multiply_rows_f16", "multiply_rows_bf16"])
}

/// The same of logits: `out` is f32 whatever the weights are.
pub fn multiply_to_f32(dtype: WeightDtype, parameters: &Product) -> Launch {
    let row = ["multiply_row_f32", "multiply_row_f16_to_f32", "multiply_row_bf16_to_f32"];
    let rows = ["multiply_rows_f32", "multiply_rows_f16_to_f32", "multiply_rows_bf16_to_f32"];
    product(dtype, parameters, row, rows)
}

fn product(
    dtype: WeightDtype,
    parameters: &Product,
    row: [&'static str; 3],
    rows: [&'static str; 3],
) -> Launch {
    let (kernels, at_once) = if parameters.rows == 1 { (row, 1) } else { (rows, 8) };
    let threads = 128;
    let grid = [parameters.outputs.div_ceil(threads / WARP), parameters.rows.div_ceil(at_once), 1];
    Launch::new("product", of_type(dtype, kernels), grid, threads, parameters)
}

/// A token for each of `rows` rows.
///
/// # Panics
///
/// When there are more than 2¹⁹ logits in a row.
pub fn sample(rows: u32, parameters: &Sample) -> Launch {
    assert!(parameters.vocabulary <= 1 << 19, "sample: sums of {} weights", parameters.vocabulary);
    Launch::new("sampling", "sample", [rows, 1, 1], 512, parameters)
}

/// All tokens, layers and heads of a conversion.
pub fn convert_blocks(parameters: &ConvertBlocks) -> Launch {
    let rows = 2 * parameters.tokens * parameters.heads * parameters.layers;
    let blocks = rows.div_ceil(THREADS / WARP).min(MOST_BLOCKS);
    Launch::new("convert", "convert_blocks", [blocks, 1, 1], THREADS, parameters)
}

/// The ends of `blocks` blocks.
pub fn zero_tail(blocks: u32, parameters: &ZeroTail) -> Launch {
    Launch::new("convert", "zero_tail", [blocks, parameters.layers, 1], THREADS, parameters)
}

/// One block of threads for each row, each thread with a pack of elements while there are enough threads.
fn row_by_row(
    module: &'static str,
    kernel: &'static str,
    rows: u32,
    width: u32,
    most_threads: u32,
    parameters: &impl Parameters,
) -> Launch {
    let threads = width.div_ceil(PACK).next_multiple_of(WARP).clamp(WARP, most_threads);
    Launch::new(module, kernel, [rows, 1, 1], threads, parameters)
}

fn of_type(dtype: WeightDtype, [f32, f16, bf16]: [&'static str; 3]) -> &'static str {
    match dtype {
        WeightDtype::F32 => f32,
        WeightDtype::F16 => f16,
        WeightDtype::Bf16 => bf16,
    }
}

const THREADS: u32 = 256;
/// Elements that a thread moves at once, of 16 bits.
const PACK: u32 = 8;
/// Rows and outputs of a product that a block computes: `kTile` in `matrix_product.cu`.
const TILE: u32 = 128;
/// More than any GPU runs at once, so that further rows come by a loop.
const MOST_BLOCKS: u32 = 4096;
