//! The library that multiplies matrices: plain loops, sums in f32.

use super::memory::Memory;
use crate::{
    cuda::{DeviceAddress, MatrixProduct},
    matrix::{MatrixSource, WeightDtype},
    reference,
};
use half::{bf16, f16};

/// Everything that it reads is there and was written, as [`memory`](super::operation::Operation::memory) says.
pub(super) fn carry_out(it: &MatrixProduct, device: &mut Memory) {
    let read = |address: DeviceAddress, bytes: usize, dtype| {
        let bytes = device.read(&(address.0..address.0 + bytes as u64));
        reference::widen_matrix(MatrixSource { bytes: &bytes, dtype })
    };
    let product = it.product;
    let [x, w] = [(product.x, it.x_bytes()), (product.w, it.w_bytes())]
        .map(|(address, bytes)| read(address, bytes, it.dtype));
    let has_bias = product.bias != DeviceAddress::NULL;
    let bias = has_bias.then(|| read(product.bias, it.bias_bytes(), it.dtype));
    let mut out = vec![0.0; product.rows as usize * product.outputs as usize];
    reference::matmul(&mut out, &x, &w, product.inputs as usize, bias.as_deref());
    if product.adds != 0 {
        reference::add(&mut out, &read(product.out, it.out_bytes(), it.out_dtype()));
    }
    let bytes = rounded(&out, it.out_dtype());
    device.set_written(&(product.out.0..product.out.0 + bytes.len() as u64));
    device.write(product.out.0, &bytes);
}

/// Numbers as they are stored.
pub(super) fn rounded(values: &[f32], dtype: WeightDtype) -> Vec<u8> {
    match dtype {
        WeightDtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        WeightDtype::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        WeightDtype::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
    }
}

impl MatrixProduct {
    /// Bytes of `out`.
    pub(super) fn out_bytes(&self) -> usize {
        self.product.rows as usize * self.product.outputs as usize * self.out_dtype().bytes()
    }

    /// Bytes of `x`.
    pub(super) fn x_bytes(&self) -> usize {
        self.product.rows as usize * self.product.inputs as usize * self.dtype.bytes()
    }

    /// Bytes of `w`.
    pub(super) fn w_bytes(&self) -> usize {
        self.product.outputs as usize * self.product.inputs as usize * self.dtype.bytes()
    }

    /// Bytes of `bias`, should there be one.
    pub(super) fn bias_bytes(&self) -> usize {
        self.product.outputs as usize * self.dtype.bytes()
    }
}
