//! Which tensors a decoder has, by the names that published checkpoints give them.

use crate::models::ModelSpec;

/// One tensor of a decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorSpec {
    /// Its name in the files.
    pub(super) name: String,
    /// Rows and columns, or elements.
    pub(super) shape: Vec<usize>,
}

impl TensorSpec {
    /// How many elements it has.
    pub(super) fn elements(&self) -> u64 {
        self.shape.iter().map(|&extent| extent as u64).product()
    }
}

/// Where a layer's tensors stand in a checkpoint: `model.layers.<n>.`.
pub(super) fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

/// The number of the layer that a tensor belongs to, and its name there.
pub(super) fn layer_of(name: &str) -> Option<(usize, &str)> {
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, part))
}

/// All tensors of a decoder, in the order in which they are loaded.
pub(super) fn tensors(spec: &ModelSpec) -> Vec<TensorSpec> {
    let mut all = vec![matrix(EMBEDDING, spec.vocab_size, spec.hidden_size)];
    for layer in 0..spec.layers {
        let prefix = layer_prefix(layer);
        all.extend(layer_tensors(spec).into_iter().map(|mut tensor| {
            tensor.name.insert_str(0, &prefix);
            tensor
        }));
    }
    all.push(vector(FINAL_NORM, spec.hidden_size));
    if !spec.tied_embeddings {
        all.push(matrix(HEAD, spec.vocab_size, spec.hidden_size));
    }
    all
}

/// Whether a checkpoint may hold a tensor of this name that no forward pass reads.
pub(super) fn is_ignored(spec: &ModelSpec, name: &str) -> bool {
    // Frequencies follow from the configuration; early Llama checkpoints store them all the same.
    let stored_frequencies = name.ends_with("rotary_emb.inv_freq");
    // Scales of keys and values: each token has its own here.
    let kv_scales = name.ends_with(".k_scale") || name.ends_with(".v_scale");
    stored_frequencies || kv_scales || (spec.tied_embeddings && name == HEAD)
}

/// Name of a projection's weights.
pub(super) fn weight(part: &str) -> String {
    format!("{part}.weight")
}

/// The projection, or the head, whose weights have this name.
pub(super) fn projection_of(name: &str) -> Option<&str> {
    name.strip_suffix(".weight").filter(|part| part.ends_with("_proj") || *part == "lm_head")
}

/// Name of a projection's biases.
pub(super) fn bias(part: &str) -> String {
    format!("{part}.bias")
}

fn layer_tensors(spec: &ModelSpec) -> Vec<TensorSpec> {
    let (hidden, query, kv, inner) =
        (spec.hidden_size, spec.query_size(), spec.kv_size(), spec.intermediate_size);
    let mut all = vec![vector(INPUT_NORM, hidden), vector(MLP_NORM, hidden)];
    let projections = [
        (QUERY, query, hidden, spec.qkv_bias),
        (KEY, kv, hidden, spec.qkv_bias),
        (VALUE, kv, hidden, spec.qkv_bias),
        (OUTPUT, hidden, query, spec.output_bias),
        (GATE, inner, hidden, spec.mlp_bias),
        (UP, inner, hidden, spec.mlp_bias),
        (DOWN, hidden, inner, spec.mlp_bias),
    ];
    for (part, outputs, inputs, has_bias) in projections {
        all.push(matrix(&weight(part), outputs, inputs));
        if has_bias {
            all.push(vector(&bias(part), outputs));
        }
    }
    if spec.qk_norm {
        all.extend([vector(QUERY_NORM, spec.head_size), vector(KEY_NORM, spec.head_size)]);
    }
    all
}

fn matrix(name: &str, rows: usize, columns: usize) -> TensorSpec {
    TensorSpec { name: name.into(), shape: vec![rows, columns] }
}

fn vector(name: &str, elements: usize) -> TensorSpec {
    TensorSpec { name: name.into(), shape: vec![elements] }
}

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const FINAL_NORM: &str = "model.norm.weight";
pub(super) const HEAD: &str = "lm_head.weight";
pub(super) const INPUT_NORM: &str = "input_layernorm.weight";
pub(super) const MLP_NORM: &str = "post_attention_layernorm.weight";
pub(super) const QUERY: &str = "self_attn.q_proj";
pub(super) const KEY: &str = "self_attn.k_proj";
pub(super) const VALUE: &str = "self_attn.v_proj";
pub(super) const OUTPUT: &str = "self_attn.o_proj";
pub(super) const QUERY_NORM: &str = "self_attn.q_norm.weight";
pub(super) const KEY_NORM: &str = "self_attn.k_norm.weight";
pub(super) const GATE: &str = "mlp.gate_proj";
pub(super) const UP: &str = "mlp.up_proj";
pub(super) const DOWN: &str = "mlp.down_proj";
