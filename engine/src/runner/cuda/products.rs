//! Matrix products as launches, by weights of the model's type or in fewer bits.

use tidemill_kernels::cuda::weights::{padded, scale_stride};
use tidemill_kernels::cuda::{
    CudaError, DeviceAddress, Launch, Product, QuantizeRows, QuantizedProduct, launches,
};
use tidemill_kernels::matrix::{Quantization, WeightDtype};

use super::CudaRunner;
use super::layers::narrow;
use crate::weights::{DeviceMatrix, DeviceSteps, DeviceTensor, Linear};

type Projection = Linear<DeviceMatrix, DeviceTensor>;

/// What is multiplied: `[rows][inputs]` of the model's type.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) x: DeviceAddress,
    pub(super) rows: usize,
    pub(super) inputs: usize,
}

/// Where a product goes, `[rows][outputs]`, and whether it is added to what is there.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) out: DeviceAddress,
    pub(super) outputs: usize,
    pub(super) adds: bool,
}

impl CudaRunner {
    /// Multiplies the same rows by several matrices.
    pub(super) fn project(&self, rows: Rows, products: &[(&Projection, Target)]) -> Result<(), CudaError> {
        if products.iter().any(|(linear, _)| linear.matrix.is_quantized()) {
            self.quantize(rows)?;
        }
        for (Linear { matrix, bias }, target) in products {
            let bias = bias.as_ref().map_or(DeviceAddress::NULL, DeviceTensor::address);
            self.launch(self.product(rows, matrix, bias, *target, self.model.dtype))?;
        }
        Ok(())
    }

    /// Computes logits, which are f32.
    pub(super) fn multiply_by_head(&self, rows: Rows, out: DeviceAddress) -> Result<(), CudaError> {
        let head = &self.model.weights.head;
        if head.is_quantized() {
            self.quantize(rows)?;
        }
        let target = Target { out, outputs: self.model.spec.vocab_size, adds: false };
        self.launch(self.product(rows, head, DeviceAddress::NULL, target, WeightDtype::F32))
    }

    /// Makes steps of rows, once for all products with them.
    fn quantize(&self, Rows { x, rows, inputs }: Rows) -> Result<(), CudaError> {
        let parameters = QuantizeRows {
            steps: self.buffers.steps.address(),
            scales: self.buffers.scales.address(),
            x,
            width: narrow(inputs),
            padded: narrow(padded(inputs)),
        };
        self.launch(launches::quantize_rows(self.model.dtype, narrow(rows), &parameters))
    }

    fn product(
        &self,
        Rows { x, rows, inputs }: Rows,
        matrix: &DeviceMatrix,
        bias: DeviceAddress,
        Target { out, outputs, adds }: Target,
        to: WeightDtype,
    ) -> Launch {
        let dtype = self.model.dtype;
        let (rows, adds) = (narrow(rows), u32::from(adds));
        match matrix {
            DeviceMatrix::Plain(matrix) => {
                let (inputs, outputs) = (narrow(inputs), narrow(outputs));
                let parameters = Product { out, x, w: matrix.address(), bias, rows, inputs, outputs, adds };
                launches::product(dtype, to != dtype, &parameters)
            }
            DeviceMatrix::Quantized(DeviceSteps { steps, scales, quantization }) => {
                let (group, stride) = match *quantization {
                    Quantization::Int8 => (0, 0),
                    Quantization::Int4 { group } => (group, scale_stride(outputs)),
                };
                let parameters = QuantizedProduct {
                    out,
                    x: self.buffers.steps.address(),
                    x_scales: self.buffers.scales.address(),
                    w: steps.address(),
                    w_scales: scales.address(),
                    bias,
                    rows,
                    inputs: narrow(padded(inputs)),
                    outputs: narrow(outputs),
                    group: narrow(group),
                    scale_stride: narrow(stride),
                    out_dtype: to.into(),
                    bias_dtype: dtype.into(),
                    adds,
                };
                launches::multiply_quantized(*quantization, &parameters)
            }
        }
    }
}
