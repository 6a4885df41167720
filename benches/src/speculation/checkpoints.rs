//! Checkpoints of the size that a measurement wants, made for it.
//!
//! A trained model whose weights fit a cache says little about guesses: a row more costs it computing time, where a model
//! whose weights come from memory waits for them anyway. So the demo model is *widened*: the same function, with the
//! same answers, in matrices as large as one likes. Its residual stream has further places that stay zero, its layers have heads
//! and inner features that nobody adds up, and layers follow that add nothing; all of them are computed like any other.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use crate::timing::Noise;

/// The tensors of a checkpoint in bf16, as far as they are known.
pub(super) struct Checkpoint {
    noise: Noise,
    tensors: BTreeMap<String, Tensor>,
}

/// A shape, and its numbers in the order of safetensors.
struct Tensor {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Checkpoint {
    pub(super) fn new() -> Self {
        Self { noise: Noise::new(), tensors: BTreeMap::new() }
    }

    /// Adds noise of that size, or ones.
    pub(super) fn add(&mut self, name: &str, shape: &[usize], scale: Option<f32>) {
        self.add_by_place(name, shape, |noise, _| scale.map_or(1.0, |scale| noise.number() * scale));
    }

    /// Adds what `value` says of each place, counted row by row.
    fn add_by_place(&mut self, name: &str, shape: &[usize], value: impl Fn(&mut Noise, usize) -> f32) {
        let places = 0..shape.iter().product();
        let bytes =
            places.flat_map(|place| ((value(&mut self.noise, place).to_bits() >> 16) as u16).to_le_bytes());
        let tensor = Tensor { shape: shape.to_vec(), bytes: bytes.collect() };
        self.tensors.insert(format!("{name}.weight"), tensor);
    }

    /// Writes what there is as a model that `config` describes.
    pub(super) fn write(&self, folder: &Path, config: &Value) -> anyhow::Result<()> {
        let mut views = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in &self.tensors {
            views.push((name.clone(), TensorView::new(Dtype::BF16, tensor.shape.clone(), &tensor.bytes)?));
        }
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
        Ok(fs::write(folder.join("config.json"), config.to_string())?)
    }
}

fn count(config: &Value, name: &str) -> anyhow::Result<usize> {
    Ok(config[name].as_u64().with_context(|| format!("config.json says no {name}"))? as usize)
}

/// What stands in a widened matrix outside of the one that it was.
#[derive(Clone, Copy, PartialEq)]
enum Outside {
    /// Nothing comes in there: nobody reads what is computed, or it is multiplied by zero.
    Noise,
    /// It must add nothing.
    Zero,
}

/// A Llama checkpoint in bf16 whose layers are wider by `width`, and of which there are `layers`. Its answers are those of
/// `source`, up to the order of sums.
///
/// # Errors
///
/// When `source` cannot be read or written as `target`.
///
/// # Panics
///
/// When `width` is no power of four. RMSNorm divides by the root of a mean over `width` times as many places, and its root
/// must be a power of two to be exact in bf16.
pub(super) fn widen(source: &Path, target: &Path, width: usize, layers: usize) -> anyhow::Result<()> {
    assert!(
        width.is_power_of_two() && width.trailing_zeros().is_multiple_of(2),
        "{width} is no power of four"
    );
    let mut config: Value = serde_json::from_slice(&fs::read(source.join("config.json"))?)?;
    let bytes = fs::read(source.join("model.safetensors"))?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let source_layers = count(&config, "num_hidden_layers")?;
    let mut made = Checkpoint::new();
    for (name, tensor) in tensors.iter() {
        let stem = name.strip_suffix(".weight").with_context(|| format!("{name} is no weight"))?;
        let layer = stem.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        made.widen(stem, &tensor, width, true);
        // Further layers are shaped like the first one and add nothing.
        if let Some(("0", part)) = layer {
            for layer in source_layers..layers {
                made.widen(&format!("model.layers.{layer}.{part}"), &tensor, width, false);
            }
        }
    }
    for name in ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"] {
        config[name] = json!(count(&config, name)? * width);
    }
    config["num_hidden_layers"] = json!(layers);
    let epsilon = config["rms_norm_eps"].as_f64().context("rms_norm_eps")?;
    config["rms_norm_eps"] = json!(epsilon / width as f64);
    made.write(target, &config)
}

impl Checkpoint {
    /// Adds `tensor` as a part of one that is `width` times as wide, or one of this shape without it.
    fn widen(&mut self, name: &str, tensor: &TensorView, width: usize, with_values: bool) {
        let values: Vec<f32> = tensor
            .data()
            .chunks_exact(2)
            .map(|bits| f32::from_bits(u32::from(u16::from_le_bytes([bits[0], bits[1]])) << 16))
            .collect();
        let part = name.rsplit('.').next().unwrap_or(name);
        let (outside, rows) = match part {
            "embed_tokens" | "lm_head" => (Outside::Zero, 1),
            "o_proj" | "down_proj" => (Outside::Zero, width),
            _ => (Outside::Noise, width),
        };
        let &[.., columns] = tensor.shape() else { unreachable!("a weight has columns") };
        if let &[length] = tensor.shape() {
            // The mean of squares is over `width` times as many places.
            let scale = 1.0 / (width as f32).sqrt();
            let value = |_: &mut Noise, place| values.get(place).map_or(1.0, |value| value * scale);
            return self.add_by_place(name, &[length * width], value);
        }
        let noise_scale = 1.0 / ((columns * width) as f32).sqrt();
        let shape = [tensor.shape()[0] * rows, columns * width];
        self.add_by_place(name, &shape, |noise, place| {
            let (row, column) = (place / (columns * width), place % (columns * width));
            let old = (with_values && column < columns).then(|| values.get(row * columns + column)).flatten();
            match (old, outside) {
                (Some(&value), _) => value,
                (None, Outside::Zero) => 0.0,
                (None, Outside::Noise) => noise.number() * noise_scale,
            }
        });
    }
}
