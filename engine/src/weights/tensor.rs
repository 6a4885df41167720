//! A tensor as it comes: an array of numbers, or rows of steps that are unpacked one at a time.
//!
//! Every format of few bits is the same thing in another wrapping: `step * scale + offset`, scale and offset shared by a
//! group of inputs, where a step is a whole number or the number that a code of E4M3 stands for. So each says how a row of it is unpacked, and nothing more.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use half::bf16;
use tidemill_kernels::matrix::{Embedding, MatrixSource, Quantization, WeightDtype};
use tidemill_kernels::reference::e4m3_to_f32;

use super::shard::Part;
use crate::models::ModelError;

/// One tensor.
#[derive(Debug)]
pub(super) enum Tensor<'a> {
    /// In a type that can be computed with.
    Plain(PlainTensor<'a>),
    /// In fewer bits.
    Quantized(QuantizedMatrix<'a>),
}

/// Numbers, row by row, little-endian.
#[derive(Debug)]
pub(super) struct PlainTensor<'a> {
    pub(super) bytes: Cow<'a, [u8]>,
    pub(super) dtype: WeightDtype,
}

/// A matrix whose rows are steps.
pub(super) struct QuantizedMatrix<'a> {
    /// What logs call it: `Q4_K`, `GPTQ`.
    pub(super) kind: String,
    pub(super) inputs: usize,
    pub(super) groups: Groups,
    pub(super) steps: Steps,
    /// The format of the kernels that holds its steps as they are, if there is one.
    pub(super) exact: Option<Quantization>,
    /// Unpacks the row of that number.
    pub(super) unpack: Unpack<'a>,
    /// Everything that `unpack` reads, with what a fingerprint has to know of it.
    pub(super) parts: Vec<(String, &'a [u8])>,
}

/// Unpacks the row of a number.
pub(super) type Unpack<'a> = Box<dyn Fn(usize, &mut UnpackedRow) + Sync + 'a>;

/// What the bytes of an unpacked row are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Steps {
    /// Whole numbers.
    Whole,
    /// Codes of E4M3.
    E4m3,
}

/// Which inputs share a scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Groups {
    /// So many neighbours.
    Of(usize),
    /// Those of equal number.
    Named {
        /// The group of each input.
        of: Vec<u32>,
        /// How many there are.
        count: usize,
    },
}

/// A row of `step * scale + offset`.
#[derive(Debug)]
pub(super) struct UnpackedRow {
    /// One per input.
    pub(super) steps: Vec<i8>,
    /// One per group.
    pub(super) scales: Vec<f32>,
    /// One per group; zero unless the format has them.
    pub(super) offsets: Vec<f32>,
}

impl Tensor<'_> {
    /// Type of an embedding's elements, which stands for that of the model.
    pub(super) const fn dtype(&self) -> WeightDtype {
        match self {
            Self::Plain(plain) => plain.dtype,
            Self::Quantized(_) => WeightDtype::Bf16,
        }
    }

    /// Every byte of it, with what tells how it is read.
    pub(super) fn parts(&self) -> Vec<(String, &[u8])> {
        match self {
            Self::Plain(plain) => vec![(format!("{:?}", plain.dtype), &*plain.bytes)],
            Self::Quantized(matrix) => matrix.parts.clone(),
        }
    }
}

impl PlainTensor<'_> {
    /// Some rows and columns of a matrix.
    pub(super) fn part(&self, part: &Part<'_>) -> PlainTensor<'_> {
        let size = self.dtype.bytes();
        let row_bytes = part.shape[1] * size;
        let rows = &self.bytes[part.rows.start * row_bytes..part.rows.end * row_bytes];
        let bytes = if part.is_of_inputs() {
            let columns = part.columns.start * size..part.columns.end * size;
            Cow::Owned(rows.chunks_exact(row_bytes).flat_map(|row| &row[columns.clone()]).copied().collect())
        } else {
            Cow::Borrowed(rows)
        };
        PlainTensor { bytes, dtype: self.dtype }
    }

    /// Some elements of a vector.
    pub(super) fn elements(&self, elements: &Range<usize>) -> PlainTensor<'_> {
        let size = self.dtype.bytes();
        let bytes = Cow::Borrowed(&self.bytes[elements.start * size..elements.end * size]);
        PlainTensor { bytes, dtype: self.dtype }
    }
}

impl Steps {
    fn number(self, step: i8) -> f32 {
        match self {
            Self::Whole => f32::from(step),
            Self::E4m3 => e4m3_to_f32(step.cast_unsigned()),
        }
    }
}

impl Groups {
    /// The group of an input.
    fn of_input(&self, input: usize) -> usize {
        match self {
            Self::Of(size) => input / size,
            Self::Named { of, .. } => of[input] as usize,
        }
    }

    /// How many there are in a row.
    fn count(&self, inputs: usize) -> usize {
        match self {
            Self::Of(size) => inputs.div_ceil(*size),
            Self::Named { count, .. } => *count,
        }
    }
}

impl QuantizedMatrix<'_> {
    /// Writes the weights of a row.
    pub(super) fn values(&self, row: usize, out: &mut [f32]) {
        let UnpackedRow { steps, scales, offsets } = self.row(row);
        match &self.groups {
            Groups::Of(size) => {
                let groups = out.chunks_mut(*size).zip(steps.chunks(*size)).zip(scales.iter().zip(&offsets));
                for ((out, steps), (scale, offset)) in groups {
                    for (out, step) in out.iter_mut().zip(steps) {
                        *out = self.steps.number(*step) * scale + offset;
                    }
                }
            }
            Groups::Named { of, .. } => {
                for ((out, step), group) in out.iter_mut().zip(&steps).zip(of) {
                    let group = *group as usize;
                    *out = self.steps.number(*step) * scales[group] + offsets[group];
                }
            }
        }
    }

    /// Writes the steps of some inputs of a row, and their scales in a format of the kernels that has them as they are.
    pub(super) fn steps(
        &self,
        row: usize,
        columns: &Range<usize>,
        format: Quantization,
        steps: &mut [i8],
        scales: &mut [f32],
    ) {
        let unpacked = self.row(row);
        steps.copy_from_slice(&unpacked.steps[columns.clone()]);
        // A group of ours may be a part of one of theirs.
        let group = match format {
            Quantization::Int8 | Quantization::Fp8 => columns.len(),
            Quantization::Int4 { group } => group,
        };
        for (scale, input) in scales.iter_mut().zip(columns.clone().step_by(group)) {
            *scale = unpacked.scales[self.groups.of_input(input)];
        }
    }

    /// The format of the kernels that holds the steps of some of its inputs as they are, if there is one.
    pub(super) fn exact_of(&self, part: &Part<'_>) -> Result<Option<Quantization>, ModelError> {
        match self.exact {
            Some(Quantization::Int4 { group }) => {
                let whole = |size: &usize| group.is_multiple_of(*size) && part.has_groups_of(*size);
                match INT4_GROUPS.into_iter().find(whole) {
                    Some(group) => Ok(Some(Quantization::Int4 { group })),
                    None => Err(part.refused(INT4_GROUPS[INT4_GROUPS.len() - 1])),
                }
            }
            exact => Ok(exact),
        }
    }

    /// A table of all rows in bf16, in which an embedding costs no step more than in fewer bits.
    pub(super) fn embedding(&self, rows: usize) -> Embedding {
        let mut values = vec![0.0; self.inputs];
        let mut bytes = Vec::with_capacity(rows * self.inputs * 2);
        for row in 0..rows {
            self.values(row, &mut values);
            bytes.extend(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()));
        }
        Embedding::new(rows, self.inputs, MatrixSource { bytes: &bytes, dtype: WeightDtype::Bf16 })
    }

    fn row(&self, row: usize) -> UnpackedRow {
        let groups = self.groups.count(self.inputs);
        let mut unpacked = UnpackedRow {
            steps: vec![0; self.inputs],
            scales: vec![0.0; groups],
            offsets: vec![0.0; groups],
        };
        (self.unpack)(row, &mut unpacked);
        unpacked
    }
}

/// The format of the kernels that holds steps of so many `bits`, around a zero in the middle, as they are: with one scale
/// for each `group` of a row's `inputs`.
pub(super) fn exact_format(bits: u32, group: usize, inputs: usize) -> Option<Quantization> {
    match bits {
        8 => (inputs <= group).then_some(Quantization::Int8),
        4 if inputs <= group => Some(Quantization::Int4 { group: INT4_GROUPS[0] }),
        4 => {
            let part = INT4_GROUPS.into_iter().find(|part| group.is_multiple_of(*part));
            part.map(|group| Quantization::Int4 { group })
        }
        _ => None,
    }
}

impl fmt::Debug for QuantizedMatrix<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, inputs, exact, .. } = self;
        let mut debug = formatter.debug_struct("QuantizedMatrix");
        debug.field("kind", kind).field("inputs", inputs).field("exact", exact).finish_non_exhaustive()
    }
}

/// Largest first.
const INT4_GROUPS: [usize; 3] = [128, 64, 32];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_taken_as_they_are_where_a_format_has_their_groups() {
        let int4 = |group| Some(Quantization::Int4 { group });
        #[rustfmt::skip]
        let rows = [
            ("8 bits, a scale per output",          8, 512, 512, Some(Quantization::Int8)),
            ("8 bits in groups",                    8, 128, 512, None),
            ("4 bits, a scale per output",          4, 512, 512, int4(128)),
            ("4 bits in groups of 32",              4,  32, 512, int4(32)),
            ("4 bits in groups of 64",              4,  64, 512, int4(64)),
            ("4 bits in groups of 128",             4, 128, 512, int4(128)),
            ("4 bits in groups of 96",              4,  96, 960, int4(32)),
            ("4 bits in groups of 256",             4, 256, 512, int4(128)),
            ("4 bits in groups of 16",              4,  16, 512, None),
        ];
        for (name, bits, group, inputs, expected) in rows {
            assert_eq!(exact_format(bits, group, inputs), expected, "{name}");
        }
    }
}
