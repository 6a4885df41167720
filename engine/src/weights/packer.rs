//! From tensors to packed matrices.

use tidemill_kernels::matrix::{Embedding, HUGE_PAGE_SETTING, MatrixSource, PackedMatrix, has_huge_pages};
use tidemill_kernels::reference::widen_matrix;

use super::Store;
use super::formats::{Account, Kept, head_quantization};
use super::tensor::{PlainTensor, QuantizedMatrix, Tensor};
use crate::handle::Quantization;
use crate::models::ModelError;

/// Packs matrices, and remembers what became of those that came in fewer bits.
#[derive(Debug)]
pub(super) struct Packer {
    threads: usize,
    quantization: Option<Quantization>,
    account: Account,
}

impl Packer {
    pub(super) fn new(threads: usize, quantization: Option<Quantization>) -> Self {
        Self { threads, quantization, account: Account::default() }
    }

    /// Tells what became of the matrices that came in fewer bits, and what makes all of them slow.
    fn report(&self) {
        if !has_huge_pages() {
            tracing::warn!(
                setting = HUGE_PAGE_SETTING,
                "the system gives weights no huge pages, so reading them takes about a quarter longer"
            );
        }
        self.account.report();
    }

    fn pack(&mut self, shape: [usize; 2], tensor: &Tensor<'_>, wanted: Option<Quantization>) -> PackedMatrix {
        let [outputs, inputs] = shape;
        match (tensor, wanted) {
            (Tensor::Plain(plain), None) => {
                PackedMatrix::pack_on(self.threads, outputs, inputs, plain.source())
            }
            (Tensor::Plain(plain), Some(wanted)) => {
                PackedMatrix::quantize_on(self.threads, outputs, inputs, plain.source(), wanted)
            }
            (Tensor::Quantized(matrix), wanted) => self.pack_quantized(shape, matrix, wanted),
        }
    }

    fn pack_quantized(
        &mut self,
        [outputs, inputs]: [usize; 2],
        matrix: &QuantizedMatrix<'_>,
        wanted: Option<Quantization>,
    ) -> PackedMatrix {
        let (format, kept) = self.account.choose(matrix, wanted);
        match kept {
            Kept::AsTheyCame => {
                let steps =
                    |row: usize, steps: &mut [i8], scales: &mut [f32]| matrix.steps(row, steps, scales);
                PackedMatrix::of_steps_on(self.threads, outputs, inputs, format, &steps)
            }
            Kept::Rounded => {
                let values = |row: usize, out: &mut [f32]| matrix.values(row, out);
                PackedMatrix::quantize_rows_on(self.threads, outputs, inputs, format, &values)
            }
        }
    }
}

impl Store for Packer {
    type Matrix = PackedMatrix;
    type Vector = Vec<f32>;
    type Table = Embedding;

    fn matrix(&mut self, shape: [usize; 2], tensor: &Tensor<'_>) -> Result<PackedMatrix, ModelError> {
        Ok(self.pack(shape, tensor, self.quantization))
    }

    fn head(&mut self, shape: [usize; 2], tensor: &Tensor<'_>) -> Result<PackedMatrix, ModelError> {
        Ok(self.pack(shape, tensor, self.quantization.map(head_quantization)))
    }

    fn embedding(&mut self, [rows, width]: [usize; 2], tensor: &Tensor<'_>) -> Result<Embedding, ModelError> {
        Ok(match tensor {
            Tensor::Plain(plain) => Embedding::new(rows, width, plain.source()),
            Tensor::Quantized(matrix) => matrix.embedding(rows),
        })
    }

    fn vector(&mut self, tensor: &PlainTensor<'_>) -> Result<Vec<f32>, ModelError> {
        Ok(tensor.widened())
    }

    fn shares_table(&self, tensor: &Tensor<'_>) -> bool {
        self.quantization.is_none() && matches!(tensor, Tensor::Plain(_))
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        self.report();
        Ok(())
    }
}

impl PlainTensor<'_> {
    pub(super) fn source(&self) -> MatrixSource<'_> {
        MatrixSource { bytes: &self.bytes, dtype: self.dtype }
    }

    pub(super) fn widened(&self) -> Vec<f32> {
        widen_matrix(self.source())
    }
}
