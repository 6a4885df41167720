//! The decoder's layers as launches.

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::{
    Attention, CudaError, DeviceAddress, Embed, Product, RmsNorm, RopeAndWrite, SiluMul, launches,
};

use super::CudaRunner;
use crate::weights::{DeviceTensor, LayerWeights, Linear};

type Layer = LayerWeights<DeviceTensor, DeviceTensor>;
type Projection = Linear<DeviceTensor, DeviceTensor>;

/// A product's sizes, and whether it is added to what is there.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    inputs: usize,
    outputs: usize,
    adds: bool,
}

impl CudaRunner {
    /// Takes `rows` rows through all layers; the keys of the longest sequence are cut into at most so many parts.
    pub(super) fn compute_layers(
        &self,
        rows: usize,
        splits: u32,
        after_layers: &mut dyn FnMut(Range<usize>),
    ) -> Result<(), CudaError> {
        let model = Arc::clone(&self.model);
        let table = model.weights.embedding.as_ref().unwrap_or(&model.weights.head);
        self.take_rows(self.buffers.state.address(), table.address(), self.inputs.tokens(), rows)?;
        for (layer, weights) in model.weights.layers.iter().enumerate() {
            self.keys_and_values(layer, weights, rows)?;
            after_layers(layer..layer + 1);
            self.attend(layer, weights, rows, splits)?;
            self.feed_forward(weights, rows)?;
        }
        Ok(())
    }

    /// Copies rows of the state's width, by their numbers in a table.
    pub(super) fn take_rows(
        &self,
        out: DeviceAddress,
        table: DeviceAddress,
        numbers: DeviceAddress,
        rows: usize,
    ) -> Result<(), CudaError> {
        let width = narrow(self.model.spec.hidden_size);
        let parameters = Embed { out, table, tokens: numbers, width, reserved: 0 };
        self.launch(launches::embed(self.model.dtype, narrow(rows), &parameters))
    }

    /// Normalises rows of `width` elements.
    pub(super) fn norm(
        &self,
        out: DeviceAddress,
        state: DeviceAddress,
        weight: &DeviceTensor,
        width: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (width, eps) = (narrow(width), self.model.spec.norm_eps);
        let parameters =
            RmsNorm { out, state, delta: DeviceAddress::NULL, weight: weight.address(), width, eps };
        self.launch(launches::rms_norm(self.model.dtype, narrow(rows), &parameters))
    }

    /// Normalises the state, projects it to query, key and value, turns query and key, and stores key and value.
    fn keys_and_values(&self, layer: usize, weights: &Layer, rows: usize) -> Result<(), CudaError> {
        let spec = &self.model.spec;
        let (hidden, query_size, kv_size) = (spec.hidden_size, spec.query_size(), spec.kv_size());
        let normed = self.buffers.normed.address();
        let [query, key, value] =
            [&self.buffers.query, &self.buffers.key, &self.buffers.value].map(|it| it.address());
        self.norm(normed, self.buffers.state.address(), &weights.input_norm, hidden, rows)?;
        let shape = |outputs| Shape { rows, inputs: hidden, outputs, adds: false };
        self.project(query, normed, &weights.query, shape(query_size))?;
        self.project(key, normed, &weights.key, shape(kv_size))?;
        self.project(value, normed, &weights.value, shape(kv_size))?;
        if let Some(norms) = &weights.head_norms {
            self.norm(query, query, &norms.query, spec.head_size, rows * spec.heads)?;
            self.norm(key, key, &norms.key, spec.head_size, rows * spec.kv_heads)?;
        }
        let parameters = RopeAndWrite {
            query,
            key,
            value,
            cos: self.buffers.cos.address(),
            sin: self.buffers.sin.address(),
            positions: self.inputs.positions(),
            sequences: self.inputs.sequences(),
            blocks: self.inputs.tables(),
            shape: self.kv_shape,
            layer: narrow(layer),
            blocks_per_sequence: self.inputs.blocks_per_sequence(),
            query_heads: narrow(spec.heads),
            half: narrow(self.buffers.half),
            query_stride: narrow(query_size),
            kv_stride: narrow(kv_size),
        };
        self.launch(launches::rope_and_write(self.model.dtype, narrow(rows), &parameters))
    }

    /// Adds attention's output to the state.
    fn attend(&self, layer: usize, weights: &Layer, rows: usize, splits: u32) -> Result<(), CudaError> {
        let spec = &self.model.spec;
        let at_once = match splits {
            1 => rows,
            _ => self.buffers.rows_with_partials(spec, splits).min(rows),
        };
        let row_bytes = spec.query_size() * self.model.dtype.bytes();
        for first in (0..rows).step_by(at_once) {
            let numbers = first * size_of::<u32>();
            let parameters = Attention {
                out: self.buffers.attended.address().offset(first * row_bytes),
                query: self.buffers.query.address().offset(first * row_bytes),
                blocks: self.inputs.tables(),
                positions: self.inputs.positions().offset(numbers),
                sequences: self.inputs.sequences().offset(numbers),
                partials: if splits == 1 { DeviceAddress::NULL } else { self.buffers.partials.address() },
                shape: self.kv_shape,
                dtype: self.model.dtype.into(),
                layer: narrow(layer),
                blocks_per_sequence: self.inputs.blocks_per_sequence(),
                query_heads: narrow(spec.heads),
                query_stride: narrow(spec.query_size()),
                window: spec.windows[layer].unwrap_or(0),
                splits,
                scale: Attention::scale(1.0 / (spec.head_size as f32).sqrt()),
            };
            let (attend, join) = launches::attention(narrow(at_once.min(rows - first)), &parameters);
            self.launch(attend)?;
            if let Some(join) = join {
                self.launch(join)?;
            }
        }
        let shape = Shape { rows, inputs: spec.query_size(), outputs: spec.hidden_size, adds: true };
        self.project(self.buffers.state.address(), self.buffers.attended.address(), &weights.output, shape)
    }

    /// Adds the feed-forward part's output to the state.
    fn feed_forward(&self, weights: &Layer, rows: usize) -> Result<(), CudaError> {
        let spec = &self.model.spec;
        let (hidden, inner) = (spec.hidden_size, spec.intermediate_size);
        let [state, normed, gate, up, out] = [
            &self.buffers.state,
            &self.buffers.normed,
            &self.buffers.gate,
            &self.buffers.up,
            &self.buffers.gated,
        ]
        .map(|it| it.address());
        self.norm(normed, state, &weights.mlp_norm, hidden, rows)?;
        let shape = Shape { rows, inputs: hidden, outputs: inner, adds: false };
        self.project(gate, normed, &weights.gate, shape)?;
        self.project(up, normed, &weights.up, shape)?;
        let parameters = SiluMul { out, gate, up, width: narrow(inner), stride: narrow(inner) };
        self.launch(launches::silu_mul(self.model.dtype, narrow(rows), &parameters))?;
        self.project(state, out, &weights.down, Shape { rows, inputs: inner, outputs: hidden, adds: true })
    }

    fn project(
        &self,
        out: DeviceAddress,
        x: DeviceAddress,
        linear: &Projection,
        shape: Shape,
    ) -> Result<(), CudaError> {
        let Shape { rows, inputs, outputs, adds } = shape;
        let parameters = Product {
            out,
            x,
            w: linear.matrix.address(),
            bias: linear.bias.as_ref().map_or(DeviceAddress::NULL, DeviceTensor::address),
            rows: narrow(rows),
            inputs: narrow(inputs),
            outputs: narrow(outputs),
            adds: u32::from(adds),
        };
        self.launch(launches::multiply(self.model.dtype, &parameters))
    }
}

/// Sizes of a step in the words of a kernel.
pub(super) fn narrow(number: usize) -> u32 {
    u32::try_from(number).expect("a step's limits and a model's sizes are below 2^32")
}
