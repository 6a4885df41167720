//! From tensors to packed matrices.

use tidemill_kernels::matrix::{Embedding, HUGE_PAGE_SETTING, MatrixSource, PackedMatrix, has_huge_pages};
use tidemill_kernels::reference::widen_matrix;

use super::Store;
use super::formats::{Account, FewerBits, head_quantization};
use super::shard::{Part, Shard};
use super::tensor::{PlainTensor, Tensor};
use crate::handle::Quantization;
use crate::models::ModelError;

/// Packs matrices, and remembers what became of those that came in fewer bits.
#[derive(Debug)]
pub(super) struct Packer {
    threads: usize,
    quantization: Option<Quantization>,
    shard: Shard,
    account: Account,
}

impl Packer {
    pub(super) fn new(threads: usize, quantization: Option<Quantization>, shard: Shard) -> Self {
        Self { threads, quantization, shard, account: Account::default() }
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

    fn pack(
        &mut self,
        part: &Part<'_>,
        tensor: &Tensor<'_>,
        wanted: Option<Quantization>,
    ) -> Result<PackedMatrix, ModelError> {
        let (threads, outputs, inputs) = (self.threads, part.rows.len(), part.columns.len());
        if let Tensor::Plain(plain) = tensor
            && (wanted.is_none() || !part.is_of_inputs())
        {
            let part = plain.part(part);
            return Ok(match wanted {
                None => PackedMatrix::pack_on(threads, outputs, inputs, part.source()),
                Some(wanted) => PackedMatrix::quantize_on(threads, outputs, inputs, part.source(), wanted),
            });
        }
        let rows = self.account.fewer_bits(part, tensor, wanted)?;
        Ok(match rows.expect("numbers that stay what they are were packed above") {
            FewerBits::Steps(format, steps) => {
                PackedMatrix::of_steps_on(threads, outputs, inputs, format, &*steps)
            }
            FewerBits::Values(format, values) => {
                PackedMatrix::quantize_rows_on(threads, outputs, inputs, format, &*values)
            }
        })
    }
}

impl Store for Packer {
    type Matrix = PackedMatrix;
    type Vector = Vec<f32>;
    type Table = Embedding;

    fn matrix(&mut self, part: &Part<'_>, tensor: &Tensor<'_>) -> Result<PackedMatrix, ModelError> {
        self.pack(part, tensor, self.quantization)
    }

    fn head(&mut self, part: &Part<'_>, tensor: &Tensor<'_>) -> Result<PackedMatrix, ModelError> {
        self.pack(part, tensor, self.quantization.map(head_quantization))
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

    fn reads_table_of_first(&self) -> bool {
        true
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        // The others have to say the same.
        if self.shard.rank == 0 {
            self.report();
        }
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

    /// A row of as many elements as `out` has.
    pub(super) fn values(&self, row: usize, out: &mut [f32]) {
        let bytes = out.len() * self.dtype.bytes();
        let bytes = &self.bytes[row * bytes..(row + 1) * bytes];
        out.copy_from_slice(&widen_matrix(MatrixSource { bytes, dtype: self.dtype }));
    }
}
