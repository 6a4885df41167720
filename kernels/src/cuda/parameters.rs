//! The structures that kernels take, field by field as in `kernels/cu`; their sizes are compared when a kernel is launched.
//!
//! Addresses are of device memory. Rows, widths and strides count elements.

use super::{DeviceAddress, Parameters};
use crate::kv::{KvBlockShape, KvDtype};
use crate::matrix::WeightDtype;
use bytemuck::{NoUninit, Pod, Zeroable};

/// `out[row] = table[tokens[row]]`
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct Embed {
    /// `[rows][width]`
    pub out: DeviceAddress,
    /// `[vocabulary][width]`
    pub table: DeviceAddress,
    /// u32, `[rows]`; with [`OF_CHOSEN`](Self::OF_CHOSEN): the place of a token in `chosen`.
    pub tokens: DeviceAddress,
    /// u32: tokens that [`Sample`] chose before; null where none of `tokens` is a place there.
    pub chosen: DeviceAddress,
    /// Elements of a row.
    pub width: u32,
    /// Rows of the table. A place where no such token was chosen gets the first one.
    pub vocabulary: u32,
}

/// `state += delta` where there is one, then `out = state / sqrt(mean(state²) + eps) * weight`.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct RmsNorm {
    /// `[rows][width]`; may be `state`.
    pub out: DeviceAddress,
    /// `[rows][width]`
    pub state: DeviceAddress,
    /// `[rows][width]` or null. The sum is rounded to the element type before it is normalised.
    pub delta: DeviceAddress,
    /// `[width]`
    pub weight: DeviceAddress,
    /// Elements of a row.
    pub width: u32,
    /// Added to the mean.
    pub eps: f32,
}

/// `out[row]` is what all ranks have of the row, in their order: of rank r elements `r * width / ranks` up to where the next rank's begin.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct Join {
    /// f32, `[rows][width]`
    pub out: DeviceAddress,
    /// f32, `[ranks][stride]`: of each rank `[rows][its part of width]`, one behind the other.
    pub parts: DeviceAddress,
    /// Elements of a whole row, at least as many as ranks.
    pub width: u32,
    /// How many there are.
    pub ranks: u32,
    /// From one rank's part to the next.
    pub stride: u32,
    /// Zero.
    pub reserved: u32,
}

/// `out = silu(gate) * up`
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct SiluMul {
    /// `[rows][width]`
    pub out: DeviceAddress,
    /// `[rows][stride]`, of which `width` count.
    pub gate: DeviceAddress,
    /// Likewise.
    pub up: DeviceAddress,
    /// Elements of a row.
    pub width: u32,
    /// From one row of gate and up to the next.
    pub stride: u32,
}

/// [`KvBlockShape`] in the words of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, NoUninit)]
#[repr(C)]
pub struct KvShape {
    dtype: u32,
    block_len: u32,
    kv_heads: u32,
    head_size: u32,
    layer_stride: u32,
    value_offset: u32,
    key_scale_offset: u32,
    value_scale_offset: u32,
    token_stride: u32,
    head_stride: u32,
    scale_token_stride: u32,
    scale_head_stride: u32,
}

/// Turns query and key by their positions and writes key and value into the blocks.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct RopeAndWrite {
    /// `[rows][query_stride]`, turned in place.
    pub query: DeviceAddress,
    /// `[rows][kv_stride]`
    pub key: DeviceAddress,
    /// `[rows][kv_stride]`
    pub value: DeviceAddress,
    /// f32, `[position][half]`
    pub cos: DeviceAddress,
    /// Likewise.
    pub sin: DeviceAddress,
    /// u32, `[rows]`
    pub positions: DeviceAddress,
    /// u32, `[rows]`: which row of `blocks`.
    pub sequences: DeviceAddress,
    /// Addresses of blocks, `[sequences][blocks_per_sequence]`, from position 0 on.
    pub blocks: DeviceAddress,
    /// Shape of the blocks.
    pub shape: KvShape,
    /// The layer that is written.
    pub layer: u32,
    /// From one sequence's blocks to the next's.
    pub blocks_per_sequence: u32,
    /// Heads of the query.
    pub query_heads: u32,
    /// Half the turned elements of a head: element `i` goes with `i + half`.
    pub half: u32,
    /// From one row of the query to the next.
    pub query_stride: u32,
    /// From one row of key and value to the next.
    pub kv_stride: u32,
}

/// Attention of each row to the keys of its sequence up to its own.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct Attention {
    /// `[rows][query_heads][head_size]`
    pub out: DeviceAddress,
    /// `[rows][query_stride]`
    pub query: DeviceAddress,
    /// Addresses of blocks, `[sequences][blocks_per_sequence]`, from position 0 on.
    pub blocks: DeviceAddress,
    /// u32, `[rows]`
    pub positions: DeviceAddress,
    /// u32, `[rows]`: which row of `blocks`.
    pub sequences: DeviceAddress,
    /// f32, `[rows][query_heads][splits][head_size + 2]`: memory to work in; null where there is one split.
    pub partials: DeviceAddress,
    /// Shape of the blocks; heads of a multiple of 8 elements, at most 256.
    pub shape: KvShape,
    /// Type of query and result.
    pub dtype: ElementType,
    /// The layer that is read.
    pub layer: u32,
    /// From one sequence's blocks to the next's.
    pub blocks_per_sequence: u32,
    /// Heads of the query.
    pub query_heads: u32,
    /// From one row of the query to the next.
    pub query_stride: u32,
    /// A row sees at most this many keys, its own included; zero: all.
    pub window: u32,
    /// At least [`splits`](Self::splits) of the longest sequence.
    pub splits: u32,
    /// See [`scale`](Self::scale).
    pub scale: f32,
}

/// Rows of a prompt that are computed together: neighbours in one sequence, at most [`ROWS`](Self::ROWS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, NoUninit)]
#[repr(C)]
pub struct PromptTile {
    /// The first row, in query and result.
    pub first_row: u32,
    /// How many.
    pub rows: u32,
    /// Position of the first row in its sequence.
    pub first_position: u32,
    /// Which row of `blocks`.
    pub sequence: u32,
}

/// Attention of prompts, or chunks of them, to the keys of their sequences, which are written already.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct PromptAttention {
    /// f16 or bf16, `[rows][query_heads][head_size]`
    pub out: DeviceAddress,
    /// Of the same type, `[rows][query_stride]`
    pub query: DeviceAddress,
    /// Addresses of blocks, `[sequences][blocks_per_sequence]`, from position 0 on.
    pub blocks: DeviceAddress,
    /// [`PromptTile`], `[tiles]`
    pub tiles: DeviceAddress,
    /// Shape of the blocks; heads of a multiple of 8 elements, at most 256.
    pub shape: KvShape,
    /// The layer that is read.
    pub layer: u32,
    /// From one sequence's blocks to the next's.
    pub blocks_per_sequence: u32,
    /// Heads of the query.
    pub query_heads: u32,
    /// From one row of the query to the next: a multiple of 8.
    pub query_stride: u32,
    /// A row sees at most this many keys, its own included; zero: all.
    pub window: u32,
    /// [`Attention::scale`]
    pub scale: f32,
}

/// The type of elements in the words of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, NoUninit)]
#[repr(transparent)]
pub struct ElementType(u32);

/// `out[row][output] = Σ_input x[row][input] * w[output][input] + bias[output]`
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct Product {
    /// `[rows][outputs]`
    pub out: DeviceAddress,
    /// `[rows][inputs]`
    pub x: DeviceAddress,
    /// `[outputs][inputs]`
    pub w: DeviceAddress,
    /// `[outputs]` or null.
    pub bias: DeviceAddress,
    /// Rows of `x` and `out`.
    pub rows: u32,
    /// Elements of a row of `x` and `w`.
    pub inputs: u32,
    /// Elements of a row of `out`.
    pub outputs: u32,
    /// 1: add to what `out` has; 0: replace it.
    pub adds: u32,
}

/// Each row of `x` in int8 or E4M3, with a scale of its own: [`quantize_int8`](crate::reference::quantize_int8),
/// [`quantize_e4m3`](crate::reference::quantize_e4m3).
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct QuantizeRows {
    /// int8 or codes of E4M3, `[rows][padded]`
    pub steps: DeviceAddress,
    /// f32, `[rows]`
    pub scales: DeviceAddress,
    /// `[rows][width]`
    pub x: DeviceAddress,
    /// Elements of a row of `x`.
    pub width: u32,
    /// Steps of a row; those beyond `width` become zero.
    pub padded: u32,
}

/// [`matmul_quantized`](crate::reference::matmul_quantized), of rows that [`QuantizeRows`] made and weights as
/// [`QuantizedRows`](super::weights::QuantizedRows) has them.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct QuantizedProduct {
    /// `[rows][outputs]`
    pub out: DeviceAddress,
    /// int8, `[rows][inputs]`
    pub x: DeviceAddress,
    /// f32, `[rows]`
    pub x_scales: DeviceAddress,
    /// Steps.
    pub w: DeviceAddress,
    /// Their scales.
    pub w_scales: DeviceAddress,
    /// `[outputs]` or null.
    pub bias: DeviceAddress,
    /// Rows of `x` and `out`.
    pub rows: u32,
    /// Steps of a row, [padded](super::weights::padded).
    pub inputs: u32,
    /// Elements of a row of `out`.
    pub outputs: u32,
    /// Inputs of int4 that share a scale; zero for int8.
    pub group: u32,
    /// Scales of int4 from one group to the next: a multiple of 8; zero for int8.
    pub scale_stride: u32,
    /// Type of `out`.
    pub out_dtype: ElementType,
    /// Type of `bias`.
    pub bias_dtype: ElementType,
    /// 1: add to what `out` has; 0: replace it.
    pub adds: u32,
}

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, NoUninit)]
#[repr(C)]
pub struct SampleRow {
    /// Of the request.
    pub seed: u64,
    /// Number of the output token.
    pub position: u32,
    /// Below 10⁻⁵: the greatest logit.
    pub temperature: f32,
    /// Zero: all.
    pub top_k: u32,
    /// 1: all.
    pub top_p: f32,
    /// Least share of the greatest probability.
    pub min_p: f32,
    /// Zero.
    pub reserved: u32,
}

/// Chooses a token for each row.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct Sample {
    /// u32, `[rows]`; [`NOT_FINITE`](Self::NOT_FINITE) or [`NOTHING_LEFT`](Self::NOTHING_LEFT) where none can be chosen.
    pub tokens: DeviceAddress,
    /// f32, `[rows][vocabulary]`
    pub logits: DeviceAddress,
    /// u64, `[rows][vocabulary]`: memory to work in.
    pub weights: DeviceAddress,
    /// [`SampleRow`], `[rows]`
    pub rows: DeviceAddress,
    /// Logits of a row, at most 2¹⁹.
    pub vocabulary: u32,
    /// Zero.
    pub reserved: u32,
}

/// Which log-probabilities of a row are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, NoUninit)]
#[repr(C)]
pub struct LogprobsRow {
    /// Whose; [`CHOSEN`](Self::CHOSEN): the one's that [`Sample`] chose.
    pub token: u32,
    /// And of how many of the most likely tokens, at most [`MOST`](Self::MOST).
    pub count: u32,
}

/// What log-probabilities of a row are made of: `logit - greatest - ln(total)` each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct LogprobsSum {
    /// Of `exp(logit - greatest)`; no number where the row has a logit that is none, or infinite.
    pub total: f64,
    /// The greatest logit.
    pub greatest: f32,
    /// The token's.
    pub chosen: f32,
    /// How many logits are not less than the token's.
    pub rank: u32,
    /// Zero.
    pub reserved: u32,
}

/// One of the most likely tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct LikelyToken {
    /// Which.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
}

/// Looks for log-probabilities of each row that is not left out.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct LogprobsOfRows {
    /// [`LogprobsSum`], `[rows]`
    pub sums: DeviceAddress,
    /// [`LikelyToken`], `[rows][places]`: as many as wanted, or as there are; greatest first, equal ones by rising id.
    pub likely: DeviceAddress,
    /// f32, `[rows][vocabulary]`
    pub logits: DeviceAddress,
    /// u64, `[rows][vocabulary]`: memory to work in.
    pub weights: DeviceAddress,
    /// [`LogprobsRow`], `[rows]`
    pub rows: DeviceAddress,
    /// u32, `[rows]`: what was chosen.
    pub chosen: DeviceAddress,
    /// Logits of a row, at most 2¹⁹.
    pub vocabulary: u32,
    /// At least any row's count.
    pub places: u32,
}

/// Writes tokens of a sequence into blocks of another shape.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct ConvertBlocks {
    /// Addresses of the sequence's blocks from position 0 on.
    pub from: DeviceAddress,
    /// Addresses of blocks; the first has the token `first_token`.
    pub to: DeviceAddress,
    /// Shape of the source.
    pub from_shape: KvShape,
    /// Shape of the target.
    pub to_shape: KvShape,
    /// Position of the first token.
    pub first_token: u32,
    /// Number of tokens.
    pub tokens: u32,
    /// First layer in the source.
    pub first_layer: u32,
    /// Where it goes in the target.
    pub to_first_layer: u32,
    /// Number of layers.
    pub layers: u32,
    /// First head in the source.
    pub first_head: u32,
    /// Where it goes in the target.
    pub to_first_head: u32,
    /// Number of heads.
    pub heads: u32,
}

/// A part of a block whose bytes are hashed.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct GranuleOfBlock {
    /// The first byte, at a multiple of eight.
    pub bytes: DeviceAddress,
    /// What the hash begins with.
    pub seed: u64,
    /// Which of the sums the digest is added to.
    pub sum: u32,
    /// Zero.
    pub reserved: u32,
}

/// Adds the digests of granules up, each the 64 bits of XXH3 with a seed.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct DigestGranules {
    /// u64
    pub sums: DeviceAddress,
    /// [`GranuleOfBlock`], one for each digest.
    pub granules: DeviceAddress,
    /// [`SECRET`](Self::SECRET)
    pub secret: [u64; 24],
    /// Bytes of each granule: [more than 240](Self::LEAST), a multiple of eight.
    pub bytes: u32,
    /// Zero.
    pub reserved: u32,
}

/// Some lines of a part of a block, whose bytes are hashed as if they lay one behind the other.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct SampleOfBlock {
    /// Address at which each begins, a multiple of eight: 64 bytes each.
    pub lines: [u64; 4],
    /// What the hash begins with.
    pub seed: u64,
    /// Which of the sums the digest is added to.
    pub sum: u32,
    /// Zero.
    pub reserved: u32,
}

/// The same as [`DigestGranules`] of samples.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct DigestSamples {
    /// u64
    pub sums: DeviceAddress,
    /// [`SampleOfBlock`], one for each digest.
    pub samples: DeviceAddress,
    /// [`DigestGranules::SECRET`]
    pub secret: [u64; 24],
}

/// Zeroes the ends of blocks: K, V and scales of all layers.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub struct ZeroTail {
    /// Addresses, `[blocks]`
    pub blocks: DeviceAddress,
    /// u32, `[blocks]`: the tokens of the block from this one on become zero.
    pub from_token: DeviceAddress,
    /// Shape of the blocks.
    pub shape: KvShape,
    /// Layers of the blocks.
    pub layers: u32,
    /// Zero.
    pub reserved: u32,
}

impl Parameters for Embed {}
impl Parameters for RmsNorm {}
impl Parameters for Join {}
impl Parameters for SiluMul {}
impl Parameters for RopeAndWrite {}
impl Parameters for Attention {}
impl Parameters for PromptAttention {}
impl Parameters for Product {}
impl Parameters for QuantizeRows {}
impl Parameters for QuantizedProduct {}
impl Parameters for Sample {}
impl Parameters for DigestGranules {}
impl Parameters for DigestSamples {}
impl Parameters for LogprobsOfRows {}
impl Parameters for ConvertBlocks {}
impl Parameters for ZeroTail {}

impl Attention {
    /// Parts into which the keys of a sequence of this many tokens are cut: `kSplitKeys` in `attention.cu`.
    pub const fn splits(tokens: u32) -> u32 {
        tokens.div_ceil(512)
    }

    /// What a kernel takes for a factor of `q · k`: its weights are powers of two.
    pub const fn scale(factor: f32) -> f32 {
        factor * std::f32::consts::LOG2_E
    }
}

impl PromptTile {
    /// The most rows of a tile: `kPromptRows` in `prompt_attention.cu`.
    pub const ROWS: u32 = 64;

    /// Cuts the rows of a sequence that are in a step into tiles.
    pub fn cut(first_row: u32, rows: u32, first_position: u32, sequence: u32) -> impl Iterator<Item = Self> {
        (0..rows).step_by(Self::ROWS as usize).map(move |done| Self {
            first_row: first_row + done,
            rows: Self::ROWS.min(rows - done),
            first_position: first_position + done,
            sequence,
        })
    }
}

impl From<WeightDtype> for ElementType {
    fn from(dtype: WeightDtype) -> Self {
        Self(match dtype {
            WeightDtype::F32 => 0,
            WeightDtype::F16 => 1,
            WeightDtype::Bf16 => 2,
        })
    }
}

impl DigestGranules {
    /// The fewest bytes that are hashed in this way.
    pub const LEAST: u32 = 248;
    /// What XXH3 mixes with, by its specification.
    pub const SECRET: [u64; 24] = [
        0xbe4b_a423_396c_feb8,
        0x1cad_21f7_2c81_017c,
        0xdb97_9083_e96d_d4de,
        0x1f67_b3b7_a4a4_4072,
        0x78e5_c0cc_4ee6_79cb,
        0x2172_ffcc_7dd0_5a82,
        0x8e24_43f7_7446_08b8,
        0x4c26_3a81_e690_35e0,
        0xcb00_c391_bb52_283c,
        0xa32e_531b_8b65_d088,
        0x4ef9_0da2_9748_6471,
        0xd8ac_dea9_46ef_1938,
        0x3f34_9ce3_3f76_faa8,
        0x1d4f_0bc7_c7bb_dcf9,
        0x3159_b4cd_4be0_518a,
        0x6473_78d9_c97e_9fc8,
        0xc3eb_d334_83ac_c5ea,
        0xeb63_13fa_ffa0_81c5,
        0x49da_f0b7_51dd_0d17,
        0x9e68_d429_2655_16d3,
        0xfca1_477d_58be_162b,
        0xce31_d07a_d1b8_f88f,
        0x2804_1695_8f3a_cb45,
        0x7e40_4bbb_cafb_d7af,
    ];
}

impl Embed {
    /// A token is the one at a place of those that were chosen.
    pub const OF_CHOSEN: u32 = 1 << 31;
}

impl LogprobsRow {
    /// Nothing of the row is wanted.
    pub const LEFT_OUT: Self = Self { token: 0, count: u32::MAX };
    /// The token is the one that was chosen.
    pub const CHOSEN: u32 = u32::MAX;
    /// The most tokens that are found: `kMostLikely` in `sampling.cu`.
    pub const MOST: u32 = 32;
}

impl Sample {
    /// A logit of the row is no number or infinite.
    pub const NOT_FINITE: u32 = u32::MAX;
    /// Every token of the row is ruled out.
    pub const NOTHING_LEFT: u32 = u32::MAX - 1;
}

impl KvShape {
    /// # Panics
    ///
    /// When a block has 4 GiB or more, or the shape is that of a part of its heads.
    pub fn new(shape: &KvBlockShape) -> Self {
        assert_eq!(shape.key_offset, 0, "the blocks of a device have its heads alone");
        let narrow = |number: usize| u32::try_from(number).expect("blocks are smaller than 4 GiB");
        Self {
            dtype: match shape.dtype {
                KvDtype::F32 => 0,
                KvDtype::F16 => 1,
                KvDtype::Bf16 => 2,
                KvDtype::Int8 => 3,
                KvDtype::Fp8 => 4,
            },
            block_len: narrow(shape.block_len),
            kv_heads: narrow(shape.kv_heads),
            head_size: narrow(shape.head_size),
            layer_stride: narrow(shape.layer_stride),
            value_offset: narrow(shape.value_offset),
            key_scale_offset: narrow(shape.key_scale_offset),
            value_scale_offset: narrow(shape.value_scale_offset),
            token_stride: narrow(shape.token_stride),
            head_stride: narrow(shape.head_stride),
            scale_token_stride: narrow(shape.scale_token_stride),
            scale_head_stride: narrow(shape.scale_head_stride),
        }
    }

    pub(super) const fn head_size(&self) -> u32 {
        self.head_size
    }

    /// Bytes of an element: of `dtype` in the words of `new`.
    pub(super) const fn element_bytes(&self) -> u32 {
        match self.dtype {
            0 => 4,
            1 | 2 => 2,
            _ => 1,
        }
    }

    pub(super) const fn kv_heads(&self) -> u32 {
        self.kv_heads
    }
}
