//! Matrices that a checkpoint of safetensors holds in several tensors: packed steps, scales, zero points.
//!
//! Layouts by their makers' own code: compressed-tensors (`compressors/pack_quantized`), GPTQModel, AutoAWQ. Which matrix
//! is packed is seen by its names; sizes are checked before anything is read, and nothing is copied that is not small.

mod awq;
mod compressed;
mod fp8;
mod gptq;

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tidemill_kernels::matrix::WeightDtype;

use super::tensor::{Groups, QuantizedMatrix, Steps};
use crate::models::{ModelError, Packing, Share};

/// The tensors that make a matrix.
#[derive(Debug)]
pub(super) struct PackedParts<'v, 'a> {
    tensors: &'v BTreeMap<String, TensorView<'a>>,
    /// What the names of all of them begin with.
    projection: String,
    /// What they may end with.
    suffixes: &'static [&'static str],
}

/// Whole numbers of 32 bits, `[rows][columns]`.
#[derive(Clone, Copy, Debug)]
struct Words<'a> {
    bytes: &'a [u8],
    columns: usize,
}

/// Numbers of a floating type, `[rows][columns]`.
#[derive(Clone, Copy, Debug)]
struct Numbers<'a> {
    bytes: &'a [u8],
    dtype: WeightDtype,
    columns: usize,
}

/// Reads the parts of a matrix of `shape`.
pub(super) fn open<'a>(
    packing: Packing,
    parts: &PackedParts<'_, 'a>,
    shape: &[usize],
) -> Result<QuantizedMatrix<'a>, ModelError> {
    let shape = *shape.as_array().expect("projections are matrices");
    match packing {
        Packing::Compressed { bits, share, symmetric } => {
            compressed::open(parts, shape, compressed::Weights { bits, share, symmetric })
        }
        Packing::Fp8 { block } => fp8::open(parts, shape, block),
        Packing::Gptq { bits, share, less_one } => {
            gptq::open(parts, shape, gptq::Weights { bits, share, less_one })
        }
        Packing::Awq { share } => awq::open(parts, shape, share),
    }
}

/// The type that a plain tensor is computed in; `None` for others.
pub(super) fn dtype_of(view: &TensorView<'_>) -> Option<WeightDtype> {
    match view.dtype() {
        Dtype::F32 => Some(WeightDtype::F32),
        Dtype::F16 => Some(WeightDtype::F16),
        Dtype::BF16 => Some(WeightDtype::Bf16),
        _ => None,
    }
}

impl<'v, 'a> PackedParts<'v, 'a> {
    /// The parts of a projection, if it is packed.
    pub(super) fn find(
        packing: Packing,
        tensors: &'v BTreeMap<String, TensorView<'a>>,
        projection: &str,
    ) -> Option<Self> {
        let suffixes = match packing {
            Packing::Compressed { .. } => compressed::PARTS,
            Packing::Fp8 { .. } => fp8::PARTS,
            Packing::Gptq { .. } => gptq::PARTS,
            Packing::Awq { .. } => awq::PARTS,
        };
        let parts = Self { tensors, projection: projection.into(), suffixes };
        let is_packed = match packing {
            Packing::Compressed { .. } => {
                let is_whole = |view: &TensorView<'_>| view.dtype() == Dtype::I8;
                parts.get(compressed::PACKED).is_some() || parts.get(compressed::WHOLE).is_some_and(is_whole)
            }
            Packing::Fp8 { .. } => parts.get(fp8::CODES).is_some_and(|view| view.dtype() == Dtype::F8_E4M3),
            Packing::Gptq { .. } | Packing::Awq { .. } => parts.get(gptq::STEPS).is_some(),
        };
        is_packed.then_some(parts)
    }

    /// The names of those that are there.
    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        self.present().map(|(name, _)| name)
    }

    /// Bytes of all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.present().map(|(_, view)| view.data().len() as u64).sum()
    }

    /// What a fingerprint has to know.
    fn contents(&self, packing: impl std::fmt::Debug) -> Vec<(String, &'a [u8])> {
        let told = |(name, view): (String, &TensorView<'a>)| {
            (format!("{packing:?} {name} {:?} {:?}", view.dtype(), view.shape()), view.data())
        };
        self.present().map(told).collect()
    }

    fn present(&self) -> impl Iterator<Item = (String, &'v TensorView<'a>)> {
        let named = |suffix: &&str| {
            let name = self.name(suffix);
            self.tensors.get(&name).map(|view| (name, view))
        };
        self.suffixes.iter().filter_map(named)
    }

    fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.projection)
    }

    fn get(&self, suffix: &str) -> Option<&'v TensorView<'a>> {
        self.tensors.get(&self.name(suffix))
    }

    fn error(&self, suffix: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Packed { tensor: self.name(suffix), reason: reason.into() }
    }

    /// A part of one of some types and of a shape, to which columns of one may be missing.
    fn expect(
        &self,
        suffix: &str,
        dtypes: &[Dtype],
        [rows, columns]: [usize; 2],
    ) -> Result<&'v TensorView<'a>, ModelError> {
        let view = self.get(suffix).ok_or_else(|| self.error(suffix, "it is missing"))?;
        if !dtypes.contains(&view.dtype()) {
            let reason = format!("it is stored as {:?} instead of {dtypes:?}", view.dtype());
            return Err(self.error(suffix, reason));
        }
        let fits = view.shape() == [rows, columns] || (columns == 1 && view.shape() == [rows]);
        if !fits {
            let reason = format!("its shape is {:?} instead of {:?}", view.shape(), [rows, columns]);
            return Err(self.error(suffix, reason));
        }
        Ok(view)
    }

    fn words(&self, suffix: &str, shape: [usize; 2]) -> Result<Words<'a>, ModelError> {
        let view = self.expect(suffix, &[Dtype::I32, Dtype::U32], shape)?;
        Ok(Words { bytes: view.data(), columns: shape[1] })
    }

    fn numbers(&self, suffix: &str, shape: [usize; 2]) -> Result<Numbers<'a>, ModelError> {
        let view = self.expect(suffix, &[Dtype::F16, Dtype::BF16, Dtype::F32], shape)?;
        let dtype = dtype_of(view).expect("one of the three that were asked for");
        Ok(Numbers { bytes: view.data(), dtype, columns: shape[1] })
    }

    /// The groups of `inputs`, by the part that names the group of each, or in their order where there is none.
    fn groups(&self, suffix: &str, share: Share, inputs: usize) -> Result<Groups, ModelError> {
        let (size, count) = (share.size(inputs), share.count(inputs));
        if self.get(suffix).is_none() {
            return Ok(Groups::Of(size));
        }
        let named = self.words(suffix, [inputs, 1])?;
        let of: Vec<u32> = (0..inputs).map(|input| named.at(input, 0)).collect();
        // Minus one stands for "not used".
        if of.iter().all(|group| *group == u32::MAX)
            || (0..inputs).all(|input| of[input] as usize == input / size)
        {
            return Ok(Groups::Of(size));
        }
        match of.iter().find(|group| count <= **group as usize) {
            Some(beyond) => Err(self.error(suffix, format!("it names group {beyond} of {count}"))),
            None => Ok(Groups::Named { of, count }),
        }
    }
}

impl Words<'_> {
    fn at(&self, row: usize, column: usize) -> u32 {
        let start = (row * self.columns + column) * 4;
        u32::from_le_bytes(*self.bytes[start..start + 4].as_array().expect("four bytes"))
    }
}

impl Numbers<'_> {
    fn at(&self, row: usize, column: usize) -> f32 {
        let start = (row * self.columns + column) * self.dtype.bytes();
        let two = || *self.bytes[start..start + 2].as_array().expect("two bytes");
        match self.dtype {
            WeightDtype::F16 => f16::from_le_bytes(two()).to_f32(),
            WeightDtype::Bf16 => bf16::from_le_bytes(two()).to_f32(),
            WeightDtype::F32 => {
                f32::from_le_bytes(*self.bytes[start..start + 4].as_array().expect("four bytes"))
            }
        }
    }
}

impl Share {
    fn size(self, inputs: usize) -> usize {
        match self {
            Self::Row => inputs,
            Self::Group(size) => size,
        }
    }

    fn count(self, inputs: usize) -> usize {
        inputs.div_ceil(self.size(inputs))
    }
}

/// Number `index` of those that a word holds in so many `bits` each, the first in the lowest.
const fn field(word: u32, bits: u32, index: usize) -> i32 {
    (word >> (index as u32 * bits) & ((1 << bits) - 1)).cast_signed()
}

/// A step around zero: an unsigned number less the middle.
const fn centred(unsigned: i32, bits: u32) -> i8 {
    (unsigned - (1 << (bits - 1))) as i8
}

#[cfg(test)]
mod tests;
