//! In which format of the kernels a matrix of few bits is held, and an account of it for the log.

use std::collections::BTreeMap;

use super::tensor::QuantizedMatrix;
use crate::handle::Quantization;

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

impl Account {
    /// Chooses the format that holds a matrix: what is wanted, or else what keeps its steps, or else hides the difference.
    pub(super) fn choose(
        &mut self,
        matrix: &QuantizedMatrix<'_>,
        wanted: Option<Quantization>,
    ) -> (Quantization, Kept) {
        let format = wanted.or(matrix.exact).unwrap_or(OTHERWISE);
        let kept = if matrix.exact == Some(format) { Kept::AsTheyCame } else { Kept::Rounded };
        *self.matrices.entry((matrix.kind.clone(), format.to_string(), kept)).or_default() += 1;
        (format, kept)
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

/// The head has 8 bits where all else has 4: its errors are those of the logits.
pub(super) const fn head_quantization(quantization: Quantization) -> Quantization {
    match quantization {
        Quantization::Int8 | Quantization::Int4 { .. } => Quantization::Int8,
    }
}

/// What holds weights of few bits that no format holds as they are: eight of them hide the difference.
const OTHERWISE: Quantization = Quantization::Int8;
