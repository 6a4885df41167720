//! Weights of a config's shape from a seed: to measure speed without a download.
//!
//! Each tensor's numbers depend on the seed and its name alone. They are spread so that activations neither vanish nor
//! overflow in a deep model, since denormal or infinite numbers would make the measured speed a lie.

use half::{bf16, f16};
use tidemill_kernels::matrix::WeightDtype;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Tensor, TensorSource};
use crate::models::ModelError;

/// Makes tensors from a seed.
#[derive(Debug)]
pub(super) struct Dummy {
    pub(super) seed: u64,
    pub(super) dtype: WeightDtype,
}

impl TensorSource for Dummy {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError> {
        let elements = shape.iter().product();
        let mut numbers = SplitMix64(xxh3_64_with_seed(name.as_bytes(), self.seed));
        let mut bytes = Vec::with_capacity(elements * self.dtype.bytes());
        let value: &mut dyn FnMut() -> f32 = match shape {
            // Matrices: variance 1 / inputs, so that a product keeps the size of its input.
            [_, inputs] => {
                let reach = (3.0 / *inputs as f32).sqrt();
                &mut move || reach * numbers.symmetric()
            }
            _ if name.ends_with("norm.weight") => &mut || 1.0,
            _ => &mut move || 0.1 * numbers.symmetric(),
        };
        for _ in 0..elements {
            match self.dtype {
                WeightDtype::F32 => bytes.extend(value().to_le_bytes()),
                WeightDtype::F16 => bytes.extend(f16::from_f32(value()).to_le_bytes()),
                WeightDtype::Bf16 => bytes.extend(bf16::from_f32(value()).to_le_bytes()),
            }
        }
        Ok(Tensor { bytes: bytes.into(), dtype: self.dtype })
    }
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
struct SplitMix64(u64);

impl SplitMix64 {
    /// A number from -1 to 1.
    fn symmetric(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let signed = (mixed >> 40) as i32 - (1 << 23);
        signed as f32 / (1 << 23) as f32
    }
}
