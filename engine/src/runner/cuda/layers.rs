//! The decoder's layers as launches.

use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::cuda::{
    Attention, CudaError, DeviceAddress, Embed, PromptAttention, RmsNorm, RopeAndWrite, SiluMul, hopper,
    launches,
};

use super::CudaRunner;
use super::products::{Projection, Rows, Target};
use crate::weights::{DeviceMatrix, DeviceTensor, LayerWeights};

type Layer = LayerWeights<DeviceMatrix, DeviceTensor>;

impl CudaRunner {
    /// Takes `rows` rows through all layers. Where a row is attended to alone, its keys are cut into at most so many parts.
    pub(super) fn compute_layers(
        &self,
        rows: usize,
        splits: u32,
        after_layers: &mut dyn FnMut(Range<usize>),
    ) -> Result<(), CudaError> {
        let model = Arc::clone(&self.model);
        let table = match (&model.weights.embedding, &model.weights.head) {
            (Some(table), _) | (None, DeviceMatrix::Plain(table)) => table,
            (None, DeviceMatrix::Quantized(_)) => unreachable!("a head in fewer bits has a table beside it"),
        };
        self.take_rows(self.buffers.state.address(), table.address(), self.inputs.tokens(), rows)?;
        for (layer, weights) in model.weights.layers.iter().enumerate() {
            self.keys_and_values(layer, weights, rows)?;
            after_layers(layer..layer + 1);
            self.attend(layer, weights, rows, splits)?;
            self.feed_forward(weights, rows)?;
        }
        Ok(())
    }

    /// Copies rows of the state's width, by their numbers in a table, or by those that the step before chose.
    pub(super) fn take_rows(
        &self,
        out: DeviceAddress,
        table: DeviceAddress,
        numbers: DeviceAddress,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (width, vocabulary) = (narrow(self.model.spec.hidden_size), narrow(self.model.spec.vocab_size));
        let parameters =
            Embed { out, table, tokens: numbers, chosen: self.buffers.chosen(), width, vocabulary };
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
        self.add_and_norm(out, (state, DeviceAddress::NULL), weight, width, rows)
    }

    /// Normalises the state, to which what ranks have summed is added before, where there are several.
    pub(super) fn norm_state(&self, weight: &DeviceTensor, rows: usize) -> Result<(), CudaError> {
        let (out, state) = (self.buffers.normed.address(), self.buffers.state.address());
        self.add_and_norm(out, (state, self.delta()), weight, self.model.spec.hidden_size, rows)
    }

    fn add_and_norm(
        &self,
        out: DeviceAddress,
        (state, delta): (DeviceAddress, DeviceAddress),
        weight: &DeviceTensor,
        width: usize,
        rows: usize,
    ) -> Result<(), CudaError> {
        let (width, eps) = (narrow(width), self.model.spec.norm_eps);
        let parameters = RmsNorm { out, state, delta, weight: weight.address(), width, eps };
        self.launch(launches::rms_norm(self.model.dtype, narrow(rows), &parameters))
    }

    /// Adds a product to the state; of several ranks, leaves their sum to the norm that comes next.
    fn add_to_state(&self, rows: Rows, weights: &Projection) -> Result<(), CudaError> {
        let outputs = self.model.spec.hidden_size;
        let target = match &self.seat {
            None => Target { out: self.buffers.state.address(), outputs, adds: true },
            Some(_) => Target { out: self.delta(), outputs, adds: false },
        };
        self.project(rows, &[(weights, target)])?;
        self.sum_delta(rows.rows)
    }

    /// Normalises the state, projects it to query, key and value, turns query and key, and stores key and value.
    fn keys_and_values(&self, layer: usize, weights: &Layer, rows: usize) -> Result<(), CudaError> {
        let spec = &self.model.spec;
        let (hidden, query_size, kv_size) = (spec.hidden_size, spec.query_size(), spec.kv_size());
        let normed = self.buffers.normed.address();
        let [query, key, value] =
            [&self.buffers.query, &self.buffers.key, &self.buffers.value].map(|it| it.address());
        match layer {
            0 => self.norm(normed, self.buffers.state.address(), &weights.input_norm, hidden, rows)?,
            _ => self.norm_state(&weights.input_norm, rows)?,
        }
        let to = |out, outputs| Target { out, outputs, adds: false };
        let products = [
            (&weights.query, to(query, query_size)),
            (&weights.key, to(key, kv_size)),
            (&weights.value, to(value, kv_size)),
        ];
        self.project(Rows { x: normed, rows, inputs: hidden }, &products)?;
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
        for run in self.inputs.singles() {
            self.attend_one_by_one(layer, run.clone(), splits)?;
        }
        self.attend_together(layer, rows)?;
        let attended = Rows { x: self.buffers.attended.address(), rows, inputs: spec.query_size() };
        self.add_to_state(attended, &weights.output)
    }

    /// Attention of rows that are alone in their sequence, or of a type that is not attended to together.
    fn attend_one_by_one(&self, layer: usize, rows: Range<usize>, splits: u32) -> Result<(), CudaError> {
        let spec = &self.model.spec;
        let at_once = match splits {
            1 => rows.len(),
            _ => self.buffers.rows_with_partials(spec, splits).min(rows.len()),
        };
        let row_bytes = spec.query_size() * self.model.dtype.bytes();
        for first in rows.clone().step_by(at_once) {
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
                scale: self.attention_scale(),
            };
            let (attend, join) = launches::attention(narrow(at_once.min(rows.end - first)), &parameters);
            self.launch(attend)?;
            if let Some(join) = join {
                self.launch(join)?;
            }
        }
        Ok(())
    }

    /// Attention of neighbours in one sequence.
    fn attend_together(&self, layer: usize, rows: usize) -> Result<(), CudaError> {
        let spec = &self.model.spec;
        let tiles = self.inputs.tile_count();
        if tiles == 0 {
            return Ok(());
        }
        let parameters = PromptAttention {
            out: self.buffers.attended.address(),
            query: self.buffers.query.address(),
            blocks: self.inputs.tables(),
            tiles: self.inputs.tiles(),
            shape: self.kv_shape,
            layer: narrow(layer),
            blocks_per_sequence: self.inputs.blocks_per_sequence(),
            query_heads: narrow(spec.heads),
            query_stride: narrow(spec.query_size()),
            window: spec.windows[layer].unwrap_or(0),
            scale: self.attention_scale(),
        };
        let (dtype, tiles) = (self.model.dtype, narrow(tiles));
        let by_blocks = self.blocks.as_ref().and_then(|blocks| {
            hopper::attend_prompts(self.driver.properties(), dtype, tiles, narrow(rows), blocks, &parameters)
        });
        let launch = by_blocks.or_else(|| launches::attend_prompts(dtype, tiles, &parameters));
        self.launch(launch.expect("rows of f32 are no tiles"))
    }

    fn attention_scale(&self) -> f32 {
        Attention::scale(1.0 / (self.model.spec.head_size as f32).sqrt())
    }

    /// Adds the feed-forward part's output to the state.
    fn feed_forward(&self, weights: &Layer, rows: usize) -> Result<(), CudaError> {
        let spec = &self.model.spec;
        let (hidden, inner) = (spec.hidden_size, spec.intermediate_size);
        let [normed, gate, up, out] =
            [&self.buffers.normed, &self.buffers.gate, &self.buffers.up, &self.buffers.gated]
                .map(|it| it.address());
        self.norm_state(&weights.mlp_norm, rows)?;
        let to = |out| Target { out, outputs: inner, adds: false };
        let products = [(&weights.gate, to(gate)), (&weights.up, to(up))];
        self.project(Rows { x: normed, rows, inputs: hidden }, &products)?;
        let parameters = SiluMul { out, gate, up, width: narrow(inner), stride: narrow(inner) };
        self.launch(launches::silu_mul(self.model.dtype, narrow(rows), &parameters))?;
        self.add_to_state(Rows { x: out, rows, inputs: inner }, &weights.down)
    }
}

/// Sizes of a step in the words of a kernel.
pub(super) fn narrow(number: usize) -> u32 {
    u32::try_from(number).expect("a step's limits and a model's sizes are below 2^32")
}
