//! Weights on a GPU: in fewer bits as on a CPU, all else in the one type that its kernels compute in, the embedding's.

use std::sync::Arc;

use half::{bf16, f16};
use tidemill_kernels::cuda::weights::QuantizedRows;
use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver};
use tidemill_kernels::matrix::WeightDtype;

use super::formats::{Account, FewerBits, head_quantization};
use super::shard::{Part, Shard};
use super::tensor::{PlainTensor, QuantizedMatrix, Tensor};
use super::{LayerWeights, Store, Weights};
use crate::handle::Quantization;
use crate::memory::DeviceBuffer;
use crate::models::ModelError;

/// A tensor in a device's memory, row by row.
#[derive(Debug)]
pub struct DeviceTensor(DeviceBuffer);

/// A matrix in a device's memory.
#[derive(Debug)]
pub enum DeviceMatrix {
    /// In the type that everything else is in.
    Plain(DeviceTensor),
    /// In fewer bits.
    Quantized(DeviceSteps),
}

/// Steps and their scales, as [`QuantizedRows`] has them.
#[derive(Debug)]
pub struct DeviceSteps {
    pub(crate) steps: DeviceTensor,
    pub(crate) scales: DeviceTensor,
    pub(crate) quantization: Quantization,
}

/// All weights of a decoder on a device.
pub type DeviceWeights = Weights<DeviceMatrix, DeviceTensor, DeviceTensor>;

/// Puts tensors into a device's memory.
#[derive(Debug)]
pub(super) struct Uploader {
    driver: Arc<dyn Driver>,
    threads: usize,
    quantization: Option<Quantization>,
    shard: Shard,
    /// Known once the embedding has come.
    dtype: Option<WeightDtype>,
    bytes: usize,
    account: Account,
}

impl DeviceTensor {
    /// Where its first element is.
    pub const fn address(&self) -> DeviceAddress {
        self.0.address()
    }

    /// Size in bytes.
    pub const fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl DeviceMatrix {
    /// Size in bytes, scales included.
    pub const fn bytes(&self) -> usize {
        match self {
            Self::Plain(tensor) => tensor.bytes(),
            Self::Quantized(DeviceSteps { steps, scales, .. }) => steps.bytes() + scales.bytes(),
        }
    }

    /// How it is made smaller, if it is.
    pub const fn quantization(&self) -> Option<Quantization> {
        match self {
            Self::Plain(_) => None,
            Self::Quantized(DeviceSteps { quantization, .. }) => Some(*quantization),
        }
    }

    /// Whether it is in fewer bits.
    pub(crate) const fn is_quantized(&self) -> bool {
        matches!(self, Self::Quantized(_))
    }
}

impl DeviceWeights {
    /// Whether any matrix is in fewer bits.
    pub(crate) fn are_quantized(&self) -> bool {
        self.head.is_quantized() || self.layers.iter().any(LayerWeights::are_quantized)
    }
}

impl LayerWeights<DeviceMatrix, DeviceTensor> {
    fn are_quantized(&self) -> bool {
        let Self { query, key, value, output, gate, up, down, .. } = self;
        [query, key, value, output, gate, up, down].iter().any(|it| it.matrix.is_quantized())
    }
}

impl Uploader {
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        threads: usize,
        quantization: Option<Quantization>,
        shard: Shard,
    ) -> Self {
        let driver = Arc::clone(driver);
        Self { driver, threads, quantization, shard, dtype: None, bytes: 0, account: Account::default() }
    }

    fn put(
        &mut self,
        part: &Part<'_>,
        tensor: &Tensor<'_>,
        wanted: Option<Quantization>,
    ) -> Result<DeviceMatrix, ModelError> {
        let (threads, outputs, inputs) = (self.threads, part.rows.len(), part.columns.len());
        if let (Tensor::Plain(plain), None) = (tensor, wanted) {
            return Ok(DeviceMatrix::Plain(self.put_plain(&plain.part(part))?));
        }
        let rows = self.account.fewer_bits(part, tensor, wanted)?;
        let (quantization, rows) = match rows.expect("numbers that stay what they are were uploaded above") {
            FewerBits::Steps(format, steps) => {
                (format, QuantizedRows::of_steps(threads, outputs, inputs, format, &*steps))
            }
            FewerBits::Values(format, values) => {
                (format, QuantizedRows::quantize(threads, outputs, inputs, format, &*values))
            }
        };
        let (steps, scales) = (self.upload(&rows.steps)?, self.upload(&rows.scales)?);
        Ok(DeviceMatrix::Quantized(DeviceSteps { steps, scales, quantization }))
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

    /// A table of all rows in the one type, in which an embedding costs no step more than in fewer bits.
    fn put_table(&mut self, matrix: &QuantizedMatrix<'_>, rows: usize) -> Result<DeviceTensor, ModelError> {
        let dtype = *self.dtype.get_or_insert(WeightDtype::Bf16);
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
    type Matrix = DeviceMatrix;
    type Vector = DeviceTensor;
    type Table = DeviceTensor;

    fn matrix(&mut self, part: &Part<'_>, tensor: &Tensor<'_>) -> Result<DeviceMatrix, ModelError> {
        self.put(part, tensor, self.quantization)
    }

    fn head(&mut self, part: &Part<'_>, tensor: &Tensor<'_>) -> Result<DeviceMatrix, ModelError> {
        self.put(part, tensor, self.quantization.map(head_quantization))
    }

    fn embedding(&mut self, [rows, _]: [usize; 2], tensor: &Tensor<'_>) -> Result<DeviceTensor, ModelError> {
        match tensor {
            Tensor::Plain(plain) => self.put_plain(plain),
            Tensor::Quantized(matrix) => self.put_table(matrix, rows),
        }
    }

    fn vector(&mut self, tensor: &PlainTensor<'_>) -> Result<DeviceTensor, ModelError> {
        self.put_plain(tensor)
    }

    /// A rank's head has some of the tokens alone.
    fn shares_table(&self, tensor: &Tensor<'_>) -> bool {
        self.shard.ranks == 1 && self.quantization.is_none() && matches!(tensor, Tensor::Plain(_))
    }

    /// A GPU does not look into the memory of another one.
    fn reads_table_of_first(&self) -> bool {
        false
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        self.driver.synchronize().map_err(|source: CudaError| ModelError::Device { source })?;
        let (rank, bytes, dtype) = (self.shard.rank, self.bytes, self.dtype);
        // The others have to say the same.
        if rank == 0 {
            self.account.report();
        }
        tracing::info!(rank, bytes, ?dtype, "weights are on the GPU");
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
