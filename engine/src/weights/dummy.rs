//! Weights of a config's shape from a seed: to measure speed without a download.
//!
//! Each tensor's numbers depend on the seed and its name alone. They are spread so that activations neither vanish nor
//! overflow in a deep model, since denormal or infinite numbers would make the measured speed a lie.

use half::{bf16, f16};
use tidemill_kernels::matrix::WeightDtype;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::TensorSource;
use super::tensor::{PlainTensor, Tensor};
use crate::models::ModelError;

/// Makes tensors from a seed.
#[derive(Debug)]
pub(super) struct Dummy {
    pub(super) seed: u64,
    pub(super) dtype: WeightDtype,
    /// How many threads make them; it changes no number.
    pub(super) threads: usize,
}

impl TensorSource for Dummy {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError> {
        let elements: usize = shape.iter().product();
        let start = xxh3_64_with_seed(name.as_bytes(), self.seed);
        let spread = match shape {
            // Matrices: variance 1 / inputs, so that a product keeps the size of its input.
            [_, inputs] => Spread::Around((3.0 / *inputs as f32).sqrt()),
            _ if name.ends_with("norm.weight") => Spread::Ones,
            _ => Spread::Around(0.1),
        };
        let size = self.dtype.bytes();
        let mut bytes = vec![0; elements * size];
        let share = elements.div_ceil(self.threads.max(1)).max(LEAST_SHARE);
        std::thread::scope(|scope| {
            for (part, bytes) in bytes.chunks_mut(share * size).enumerate() {
                let numbers = SplitMix64::at(start, (part * share) as u64);
                let dtype = self.dtype;
                scope.spawn(move || fill(bytes, dtype, spread, numbers));
            }
        });
        Ok(Tensor::Plain(PlainTensor { bytes: bytes.into(), dtype: self.dtype }))
    }
}

/// How the numbers of a tensor are spread.
#[derive(Clone, Copy, Debug)]
enum Spread {
    Ones,
    /// Evenly from minus to plus so much.
    Around(f32),
}

fn fill(bytes: &mut [u8], dtype: WeightDtype, spread: Spread, mut numbers: SplitMix64) {
    for element in bytes.chunks_exact_mut(dtype.bytes()) {
        let value = match spread {
            Spread::Ones => 1.0,
            Spread::Around(reach) => reach * numbers.symmetric(),
        };
        match dtype {
            WeightDtype::F32 => element.copy_from_slice(&value.to_le_bytes()),
            WeightDtype::F16 => element.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            WeightDtype::Bf16 => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
    }
}

/// Fewer elements are not worth a thread.
const LEAST_SHARE: usize = 1 << 18;

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
struct SplitMix64(u64);

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

impl SplitMix64 {
    /// The generator that began at `start`, after `count` numbers: its state is a mere count.
    fn at(start: u64, count: u64) -> Self {
        Self(start.wrapping_add(GAMMA.wrapping_mul(count)))
    }

    /// A number from -1 to 1.
    fn symmetric(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(GAMMA);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let signed = (mixed >> 40) as i32 - (1 << 23);
        signed as f32 / (1 << 23) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_threads_changes_no_number() {
        for dtype in [WeightDtype::F32, WeightDtype::F16, WeightDtype::Bf16] {
            let made = |threads| {
                let mut dummy = Dummy { seed: 5, dtype, threads };
                let tensor = dummy.tensor("a.weight", &[1030, 517]).expect("dummies are always there");
                match tensor {
                    Tensor::Plain(plain) => plain.bytes.into_owned(),
                    Tensor::Quantized(matrix) => panic!("{matrix:?}"),
                }
            };
            assert_eq!(made(3), made(1), "{dtype:?}");
        }
    }
}
