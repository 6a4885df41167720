//! Which kernel runs for an operation, on how many blocks of how many threads.

use super::{
    Attention, ConvertBlocks, DigestGranules, DigestSamples, Embed, Join, Launch, LogprobsOfRows,
    LogprobsRow, Parameters, Product, PromptAttention, PromptTile, QuantizeRows, QuantizedProduct, RmsNorm,
    RopeAndWrite, Sample, SiluMul, ZeroTail, launch::WARP,
};
use crate::matrix::{Quantization, WeightDtype};

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

/// What ranks have of `rows` rows, at most 65535, side by side.
///
/// # Panics
///
/// When a rank has nothing of a row.
pub fn join(rows: u32, parameters: &Join) -> Launch {
    let Join { width, ranks, .. } = *parameters;
    assert!(0 < ranks && ranks <= width, "join: {width} elements of {ranks} ranks");
    Launch::new("join", "join_parts", [width.div_ceil(THREADS), rows, 1], THREADS, parameters)
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
    let (kernel, at_once, stages, packs) = match head_size {
        ..=64 => ("attention_64", 4, 4, 1),
        65..=128 => ("attention_128", 4, 4, 2),
        _ => ("attention_256", 2, 2, 4),
    };
    // `Ring`: a key's and a value's elements for each thread, and their scales.
    let shared_bytes = stages * 2 * 128 * (packs * PACK * parameters.shape.element_bytes() + 4);
    let groups = kv_heads * (parameters.query_heads / kv_heads).div_ceil(at_once);
    let launch = |kernel, grid| Launch::new("attention", kernel, grid, 128, parameters);
    let join = (1 < parameters.splits).then(|| launch("attention_join", [rows, parameters.query_heads, 1]));
    let attend = launch(kernel, [rows, groups, parameters.splits]).with_shared_bytes(shared_bytes);
    (attend, join)
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

/// A product, into the type of its operands or into f32: on tensor cores where they take it, else by [`multiply`].
pub fn product(dtype: WeightDtype, to_f32: bool, parameters: &Product) -> Launch {
    let otherwise = || match to_f32 {
        true => multiply_to_f32(dtype, parameters),
        false => multiply(dtype, parameters),
    };
    multiply_tiles(dtype, to_f32, parameters).unwrap_or_else(otherwise)
}

/// A product on tensor cores. A row's bits are the same however many there are. `None` where the operands are f32, or
/// their rows no whole packs.
pub fn multiply_tiles(dtype: WeightDtype, to_f32: bool, parameters: &Product) -> Option<Launch> {
    let whole =
        parameters.inputs.is_multiple_of(PACK) && (parameters.x.0 | parameters.w.0).is_multiple_of(16);
    let kernels = match (dtype, to_f32) {
        _ if !whole => return None,
        (WeightDtype::F32, _) => return None,
        (WeightDtype::F16, false) => ["multiply_few_f16", "multiply_some_f16", "multiply_many_f16"],
        (WeightDtype::Bf16, false) => ["multiply_few_bf16", "multiply_some_bf16", "multiply_many_bf16"],
        (WeightDtype::F16, true) => {
            ["multiply_few_f16_to_f32", "multiply_some_f16_to_f32", "multiply_some_f16_to_f32"]
        }
        (WeightDtype::Bf16, true) => {
            ["multiply_few_bf16_to_f32", "multiply_some_bf16_to_f32", "multiply_some_bf16_to_f32"]
        }
    };
    let shapes = [FEW_ROWS, SOME_ROWS, if to_f32 { SOME_ROWS } else { MANY_ROWS }];
    let choice = usize::from(FEW_ROWS.rows < parameters.rows) + usize::from(SOME_ROWS.rows < parameters.rows);
    let TileShape { rows, outputs, threads, bytes, stages } = shapes[choice];
    let grid = [parameters.rows.div_ceil(rows), parameters.outputs.div_ceil(outputs), 1];
    let launch = Launch::new("matrix_product", kernels[choice], grid, threads, parameters);
    Some(launch.with_shared_bytes(stages * (rows + outputs) * (bytes + 16)))
}

/// Rows as weights of this kind are multiplied with: codes for fp8, else int8.
pub fn quantize_rows(
    dtype: WeightDtype,
    quantization: Quantization,
    rows: u32,
    parameters: &QuantizeRows,
) -> Launch {
    let kernels = match quantization {
        Quantization::Fp8 => {
            ["quantize_rows_f32_to_e4m3", "quantize_rows_f16_to_e4m3", "quantize_rows_bf16_to_e4m3"]
        }
        Quantization::Int8 | Quantization::Int4 { .. } => {
            ["quantize_rows_f32", "quantize_rows_f16", "quantize_rows_bf16"]
        }
    };
    let kernel = of_type(dtype, kernels);
    row_by_row("quantized_product", kernel, rows, parameters.padded, 256, parameters)
}

/// A product of rows and weights in fewer bits, on tensor cores. A row's bits are the same however many there are.
///
/// # Panics
///
/// When rows are not [padded](super::weights::padded), or the group of int4 is not one of 32, 64 or 128.
pub fn multiply_quantized(quantization: Quantization, parameters: &QuantizedProduct) -> Launch {
    assert_eq!(parameters.inputs % 128, 0, "multiply_quantized: rows of {}", parameters.inputs);
    let QuantizedProduct { rows, outputs, group, .. } = *parameters;
    let choice = usize::from(FEW_ROWS.rows < rows) + usize::from(SOME_ROWS.rows < rows);
    let (kernels, shape, scales) = match quantization {
        Quantization::Int8 => (
            ["multiply_few_int8", "multiply_some_int8", "multiply_many_int8"],
            [FEW_ROWS, SOME_ROWS, MANY_ROWS][choice],
            0,
        ),
        Quantization::Fp8 => (
            ["multiply_few_e4m3", "multiply_some_e4m3", "multiply_many_e4m3"],
            [FEW_ROWS, SOME_ROWS, MANY_ROWS][choice],
            0,
        ),
        Quantization::Int4 { group: wanted } => {
            assert!(matches!(group, 32 | 64 | 128), "multiply_quantized: groups of {group}");
            assert_eq!(group as usize, wanted, "multiply_quantized: groups are those of the weights");
            let many = TileShape { bytes: 128, stages: 3, ..MANY_ROWS };
            let shape = [TileShape { stages: 10, ..FEW_ROWS }, SOME_ROWS, many][choice];
            (
                ["multiply_few_int4", "multiply_some_int4", "multiply_many_int4"],
                shape,
                4 * (shape.outputs * 2 + 16),
            )
        }
    };
    let weight_bytes =
        if matches!(quantization, Quantization::Int4 { .. }) { shape.bytes / 2 } else { shape.bytes };
    let stage = shape.rows * (shape.bytes + 16) + shape.outputs * (weight_bytes + 16) + scales;
    let grid = [rows.div_ceil(shape.rows), outputs.div_ceil(shape.outputs), 1];
    Launch::new("quantized_product", kernels[choice], grid, shape.threads, parameters)
        .with_shared_bytes(shape.stages * stage)
}

/// The product of a few rows: the weights are read again for every eight of them.
pub fn multiply(dtype: WeightDtype, parameters: &Product) -> Launch {
    let row = ["multiply_row_f32", "multiply_row_f16", "multiply_row_bf16"];
    product_row_by_row(
        dtype,
        parameters,
        row,
        ["multiply_rows_f32", "multiply_rows_f16", "multiply_rows_bf16"],
    )
}

/// The same of logits: `out` is f32 whatever the weights are.
pub fn multiply_to_f32(dtype: WeightDtype, parameters: &Product) -> Launch {
    let row = ["multiply_row_f32", "multiply_row_f16_to_f32", "multiply_row_bf16_to_f32"];
    let rows = ["multiply_rows_f32", "multiply_rows_f16_to_f32", "multiply_rows_bf16_to_f32"];
    product_row_by_row(dtype, parameters, row, rows)
}

fn product_row_by_row(
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

/// Log-probabilities of `rows` rows, as far as they are wanted.
///
/// # Panics
///
/// When there are more than 2¹⁹ logits in a row, or more places than [`LogprobsRow::MOST`].
pub fn logprobs(rows: u32, parameters: &LogprobsOfRows) -> Launch {
    let LogprobsOfRows { vocabulary, places, .. } = *parameters;
    assert!(vocabulary <= 1 << 19, "logprobs: {vocabulary} logits");
    assert!(places <= LogprobsRow::MOST, "logprobs: {places} of the most likely tokens");
    Launch::new("sampling", "logprobs", [rows, 1, 1], 512, parameters)
}

/// Digests of `count` granules.
///
/// # Panics
///
/// When granules have fewer bytes than [`DigestGranules::LEAST`], or no multiple of eight.
pub fn digest_granules(count: u32, parameters: &DigestGranules) -> Launch {
    let bytes = parameters.bytes;
    assert!(DigestGranules::LEAST <= bytes && bytes.is_multiple_of(8), "digest_granules: {bytes} bytes");
    Launch::new("digest", "digest_granules", [count, 1, 1], THREADS, parameters)
}

/// Digests of `count` samples.
pub fn digest_samples(count: u32, parameters: &DigestSamples) -> Launch {
    Launch::new("digest", "digest_samples", [count, 1, 1], THREADS, parameters)
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

/// `TileShape` in `matrix_tiles.cuh`: what a block computes of a product, its threads, and the bytes of rows that come at a time.
#[derive(Clone, Copy)]
struct TileShape {
    rows: u32,
    outputs: u32,
    threads: u32,
    bytes: u32,
    stages: u32,
}

/// `FewRows` in `matrix_product.cu`, and the others.
const FEW_ROWS: TileShape = TileShape { rows: 16, outputs: 32, threads: 128, bytes: 128, stages: 6 };
const SOME_ROWS: TileShape = TileShape { rows: 64, outputs: 64, threads: 128, bytes: 128, stages: 4 };
const MANY_ROWS: TileShape = TileShape { rows: 128, outputs: 128, threads: 256, bytes: 64, stages: 4 };
/// More than any GPU runs at once, so that further rows come by a loop.
const MOST_BLOCKS: u32 = 4096;
