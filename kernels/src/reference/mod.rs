//! What is right: each operation as the plainest loop over f32.
//!
//! Nothing here is fast, and nothing here is clever. Sums of products are left to right in f32.

mod activation;
mod attention;
mod convert;
mod e4m3;
mod kv;
mod linear;
mod normalize;
mod quantized;
mod rotary;
mod sampling;

pub use activation::{add, silu_mul};
pub use attention::attention;
pub use convert::{convert_block, convert_heads, zero_tail};
pub use e4m3::{E4M3_GREATEST, E4M3_NAN, e4m3_scale, e4m3_to_f32, f32_to_e4m3};
pub use kv::{read_kv, write_kv};
pub use linear::{matmul, widen_matrix};
pub use normalize::rms_norm;
pub use quantized::{matmul_quantized, quantize_e4m3, quantize_int4, quantize_int8};
pub use rotary::{rope, rope_table};
pub use sampling::{argmax, log_softmax};
