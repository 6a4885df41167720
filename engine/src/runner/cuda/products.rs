//! Matrix products as launches, by weights of the model's type or in fewer bits.

use tidemill_kernels::cuda::weights::{padded, scale_stride};
use tidemill_kernels::cuda::{
    CudaError, DeviceAddress, Launch, MatrixProduct, Product, QuantizeRows, QuantizedProduct, hopper,
    launches,
};
use tidemill_kernels::matrix::{Quantization, WeightDtype};

use super::CudaRunner;
use super::layers::narrow;
use crate::weights::{DeviceMatrix, DeviceSteps, DeviceTensor, Linear};

pub(super) type Projection = Linear<DeviceMatrix, DeviceTensor>;

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
        // Mostly all want the same of the rows.
        let mut has_e4m3 = None;
        for (Linear { matrix, bias }, target) in products {
            if let Some(quantization) = matrix.quantization()
                && has_e4m3 != Some(quantization.takes_e4m3())
            {
                self.quantize(rows, quantization)?;
                has_e4m3 = Some(quantization.takes_e4m3());
            }
            let bias = bias.as_ref().map_or(DeviceAddress::NULL, DeviceTensor::address);
            self.multiply(rows, matrix, bias, *target, self.model.dtype)?;
        }
        Ok(())
    }

    /// Computes logits, which are f32: of several ranks each some tokens', which come together in all of them.
    pub(super) fn multiply_by_head(&self, rows: Rows) -> Result<(), CudaError> {
        let head = &self.model.weights.head;
        if let Some(quantization) = head.quantization() {
            self.quantize(rows, quantization)?;
        }
        let (out, outputs) = match &self.seat {
            None => (self.buffers.logits.address(), self.model.spec.vocab_size),
            Some(seat) => (seat.logits(), seat.outputs()),
        };
        let target = Target { out, outputs, adds: false };
        self.multiply(rows, head, DeviceAddress::NULL, target, WeightDtype::F32)?;
        self.gather_logits(rows.rows)
    }

    /// Products of more rows than this are done by the library that the device has for them, if it has one, else by a kernel
    /// for many rows, if there is one; `None`: no number of rows, so that a row has the same bits whatever it is.
    pub fn set_library_rows(&mut self, most: Option<usize>) {
        self.library_rows = most;
    }

    /// The one place that decides who multiplies.
    fn multiply(
        &self,
        rows: Rows,
        matrix: &DeviceMatrix,
        bias: DeviceAddress,
        target: Target,
        to: WeightDtype,
    ) -> Result<(), CudaError> {
        let dtype = self.model.dtype;
        if let DeviceMatrix::Plain(matrix) = matrix
            && self.library_rows.is_some_and(|most| most < rows.rows)
        {
            let product = plain(rows, matrix, bias, target);
            let to_f32 = to != dtype;
            if self.driver.multiply(&MatrixProduct { dtype, to_f32, product })? {
                return Ok(());
            }
            if let Some(launch) = hopper::multiply(self.driver.properties(), dtype, to_f32, &product) {
                return self.launch(launch);
            }
        }
        self.launch(self.product(rows, matrix, bias, target, to))
    }

    /// Makes of rows what matrices of a kind are multiplied with, once for all products with them.
    fn quantize(&self, Rows { x, rows, inputs }: Rows, quantization: Quantization) -> Result<(), CudaError> {
        let parameters = QuantizeRows {
            steps: self.buffers.steps.address(),
            scales: self.buffers.scales.address(),
            x,
            width: narrow(inputs),
            padded: narrow(padded(inputs)),
        };
        self.launch(launches::quantize_rows(self.model.dtype, quantization, narrow(rows), &parameters))
    }

    /// The product by a kernel of ours.
    fn product(
        &self,
        rows: Rows,
        matrix: &DeviceMatrix,
        bias: DeviceAddress,
        target: Target,
        to: WeightDtype,
    ) -> Launch {
        let dtype = self.model.dtype;
        match matrix {
            DeviceMatrix::Plain(matrix) => {
                launches::product(dtype, to != dtype, &plain(rows, matrix, bias, target))
            }
            DeviceMatrix::Quantized(DeviceSteps { steps, scales, quantization }) => {
                let (Rows { rows, inputs, .. }, Target { out, outputs, adds }) = (rows, target);
                let (rows, adds) = (narrow(rows), u32::from(adds));
                let (group, stride) = match *quantization {
                    Quantization::Int8 | Quantization::Fp8 => (0, 0),
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

fn plain(rows: Rows, matrix: &DeviceTensor, bias: DeviceAddress, target: Target) -> Product {
    Product {
        out: target.out,
        x: rows.x,
        w: matrix.address(),
        bias,
        rows: narrow(rows.rows),
        inputs: narrow(rows.inputs),
        outputs: narrow(target.outputs),
        adds: u32::from(target.adds),
    }
}

/// Rows up to which reading the weights takes the time, which our kernels do as fast as any, and give a row the same bits.
pub(super) const FEW_ROWS: usize = 64;
