//! Weights on a GPU, in the one type that its kernels compute in: the embedding's.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::{bf16, f16};
use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver};
use tidemill_kernels::matrix::WeightDtype;

use super::tensor::{PlainTensor, QuantizedMatrix, Tensor};
use super::{Store, Weights};
use crate::memory::DeviceBuffer;
use crate::models::ModelError;

/// A tensor in a device's memory, row by row.
#[derive(Debug)]
pub struct DeviceTensor(DeviceBuffer);

/// All weights of a decoder on a device.
pub type DeviceWeights = Weights<DeviceTensor, DeviceTensor, DeviceTensor>;

/// Puts tensors into a device's memory.
#[derive(Debug)]
pub(super) struct Uploader {
    driver: Arc<dyn Driver>,
    /// Known once the embedding has come.
    dtype: Option<WeightDtype>,
    bytes: usize,
    /// How many matrices came in fewer bits, by their kind.
    widened: BTreeMap<String, usize>,
}

impl DeviceTensor {
    /// Where its first element is.
    pub const fn address(&self) -> DeviceAddress {
        self.0.address()
    }
}

impl Uploader {
    pub(super) fn new(driver: &Arc<dyn Driver>) -> Self {
        Self { driver: Arc::clone(driver), dtype: None, bytes: 0, widened: BTreeMap::new() }
    }

    fn put(&mut self, tensor: &Tensor<'_>, rows: usize) -> Result<DeviceTensor, ModelError> {
        match tensor {
            Tensor::Plain(plain) => self.put_plain(plain),
            Tensor::Quantized(matrix) => self.put_quantized(matrix, rows),
        }
    }

    fn put_plain(&mut self, tensor: &PlainTensor<'_>) -> Result<DeviceTensor, ModelError> {
        let dtype = *self.dtype.get_or_insert(tensor.dtype);
        if tensor.dtype == dtype {
            return self.upload(&tensor.bytes);
        }
        let mut bytes = Vec::with_capacity(tensor.bytes.len());
        narrow(&tensor.widened(), dtype, &mut bytes);
        self.upload(&bytes)
    }

    fn put_quantized(
        &mut self,
        matrix: &QuantizedMatrix<'_>,
        rows: usize,
    ) -> Result<DeviceTensor, ModelError> {
        let dtype = *self.dtype.get_or_insert(WeightDtype::Bf16);
        *self.widened.entry(matrix.kind.clone()).or_default() += 1;
        let mut values = vec![0.0; matrix.inputs];
        let mut bytes = Vec::with_capacity(rows * matrix.inputs * dtype.bytes());
        for row in 0..rows {
            matrix.values(row, &mut values);
            narrow(&values, dtype, &mut bytes);
        }
        self.upload(&bytes)
    }

    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceTensor, ModelError> {
        self.bytes += bytes.len();
        let buffer = DeviceBuffer::holding(&self.driver, bytes);
        Ok(DeviceTensor(buffer.map_err(|source| ModelError::Device { source })?))
    }
}

impl Store for Uploader {
    type Matrix = DeviceTensor;
    type Vector = DeviceTensor;
    type Table = DeviceTensor;

    fn matrix(&mut self, [rows, _]: [usize; 2], tensor: &Tensor<'_>) -> Result<DeviceTensor, ModelError> {
        self.put(tensor, rows)
    }

    fn head(&mut self, [rows, _]: [usize; 2], tensor: &Tensor<'_>) -> Result<DeviceTensor, ModelError> {
        self.put(tensor, rows)
    }

    fn embedding(&mut self, [rows, _]: [usize; 2], tensor: &Tensor<'_>) -> Result<DeviceTensor, ModelError> {
        self.put(tensor, rows)
    }

    fn vector(&mut self, tensor: &PlainTensor<'_>) -> Result<DeviceTensor, ModelError> {
        self.put_plain(tensor)
    }

    fn shares_table(&self, _: &Tensor<'_>) -> bool {
        true
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        self.driver.synchronize().map_err(|source: CudaError| ModelError::Device { source })?;
        for (kind, matrices) in &self.widened {
            tracing::warn!(
                matrices,
                kind,
                "quantised weights are widened: no kernel of the GPU takes them as they are"
            );
        }
        tracing::info!(bytes = self.bytes, dtype = ?self.dtype, "weights are on the GPU");
        Ok(())
    }
}

fn narrow(values: &[f32], dtype: WeightDtype, out: &mut Vec<u8>) {
    match dtype {
        WeightDtype::F32 => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        WeightDtype::F16 => out.extend(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
        WeightDtype::Bf16 => out.extend(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes())),
    }
}
