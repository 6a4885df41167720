//! In which format of the kernels a matrix of few bits is held, how its rows become that, and an account of it for the log.

use std::collections::BTreeMap;

use tidemill_kernels::matrix::{RowSteps, RowValues};
use tidemill_kernels::reference::{quantize_e4m3, quantize_int8};

use super::shard::Part;
use super::tensor::{QuantizedMatrix, Tensor};
use crate::handle::Quantization;
use crate::models::ModelError;

/// What became of matrices that came in fewer bits.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// How many there were that came as, became, and did or did not keep their steps.
    matrices: BTreeMap<(String, String, Kept), usize>,
}

/// Whether steps are computed with as they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kept {
    AsTheyCame,
    Rounded,
}

/// The rows of some of a matrix, on their way into fewer bits.
pub(super) enum FewerBits<'a> {
    /// As steps.
    Steps(Quantization, Box<RowSteps<'a>>),
    /// As numbers that are still to be rounded.
    Values(Quantization, Box<RowValues<'a>>),
}

impl Account {
    /// How some of a matrix gets into what is wanted, or else into what keeps its steps, or else into what hides the
    /// difference. `None` when it stays what it is.
    pub(super) fn fewer_bits<'a>(
        &mut self,
        part: &'a Part<'_>,
        tensor: &'a Tensor<'a>,
        wanted: Option<Quantization>,
    ) -> Result<Option<FewerBits<'a>>, ModelError> {
        match (tensor, wanted) {
            (Tensor::Plain(_), None) => Ok(None),
            (Tensor::Plain(plain), Some(wanted)) => {
                rounded(part, wanted, Box::new(|row, out| plain.values(row, out))).map(Some)
            }
            (Tensor::Quantized(matrix), wanted) => self.of_steps(part, matrix, wanted).map(Some),
        }
    }

    fn of_steps<'a>(
        &mut self,
        part: &'a Part<'_>,
        matrix: &'a QuantizedMatrix<'a>,
        wanted: Option<Quantization>,
    ) -> Result<FewerBits<'a>, ModelError> {
        let exact = matrix.exact_of(part)?;
        let format = wanted.or(exact).unwrap_or(OTHERWISE);
        let kept = if exact == Some(format) { Kept::AsTheyCame } else { Kept::Rounded };
        *self.matrices.entry((matrix.kind.clone(), format.to_string(), kept)).or_default() += 1;
        match kept {
            Kept::AsTheyCame => {
                let steps = move |row: usize, steps: &mut [i8], scales: &mut [f32]| {
                    matrix.steps(part.rows.start + row, &part.columns, format, steps, scales);
                };
                Ok(FewerBits::Steps(format, Box::new(steps)))
            }
            Kept::Rounded => rounded(part, format, Box::new(|row, out| matrix.values(row, out))),
        }
    }

    pub(super) fn report(&self) {
        for ((from, to, kept), matrices) in &self.matrices {
            match kept {
                Kept::AsTheyCame => {
                    tracing::info!(matrices, from, to, "quantised weights are computed with as they come");
                }
                Kept::Rounded => tracing::warn!(
                    matrices,
                    from,
                    to,
                    "quantised weights are rounded again, to a format that can be computed with"
                ),
            }
        }
    }
}

/// Rows of which `values` makes the whole. Of some inputs they have the steps that the whole rows have: weights are the same
/// however many ranks share them.
fn rounded<'a>(
    part: &'a Part<'_>,
    format: Quantization,
    values: Box<RowValues<'a>>,
) -> Result<FewerBits<'a>, ModelError> {
    let first = part.rows.start;
    if !part.is_of_inputs() {
        let values = move |row: usize, out: &mut [f32]| values(first + row, out);
        return Ok(FewerBits::Values(format, Box::new(values)));
    }
    let whole = move |row: usize| {
        let mut whole = vec![0.0; part.shape[1]];
        values(first + row, &mut whole);
        whole
    };
    match format {
        Quantization::Int8 => {
            let steps = move |row: usize, steps: &mut [i8], scales: &mut [f32]| {
                let mut all = vec![0; part.shape[1]];
                scales[0] = quantize_int8(&whole(row), &mut all);
                steps.copy_from_slice(&all[part.columns.clone()]);
            };
            Ok(FewerBits::Steps(format, Box::new(steps)))
        }
        Quantization::Fp8 => {
            let codes = move |row: usize, codes: &mut [i8], scales: &mut [f32]| {
                let mut all = vec![0; part.shape[1]];
                scales[0] = quantize_e4m3(&whole(row), &mut all);
                codes
                    .iter_mut()
                    .zip(&all[part.columns.clone()])
                    .for_each(|(to, code)| *to = code.cast_signed());
            };
            Ok(FewerBits::Steps(format, Box::new(codes)))
        }
        Quantization::Int4 { group } if part.has_groups_of(group) => {
            let values =
                move |row: usize, out: &mut [f32]| out.copy_from_slice(&whole(row)[part.columns.clone()]);
            Ok(FewerBits::Values(format, Box::new(values)))
        }
        Quantization::Int4 { group } => Err(part.refused(group)),
    }
}

/// The head is int8 whatever all else is: its errors are those of the logits, and int8 has the least.
pub(super) const fn head_quantization(quantization: Quantization) -> Quantization {
    match quantization {
        Quantization::Int8 | Quantization::Fp8 | Quantization::Int4 { .. } => Quantization::Int8,
    }
}

/// What holds weights of few bits that no format holds as they are: eight of them hide the difference.
const OTHERWISE: Quantization = Quantization::Int8;
