//! A draft model beside none.
//!
//! No trained pair is at hand, so one is made up: a model of random weights whose upper layers add little, and as its draft
//! the same weights without these layers. How little decides how often the draft is right; no step takes longer or shorter
//! for it.

use std::path::Path;

use serde_json::{Value, json};

use super::checkpoints::Checkpoint;
use super::*;

/// A draft that is often right, and one that hardly ever is.
pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let rounds = rounds.div_ceil(4).max(3);
    let mut rows = Vec::new();
    for (kind, upper, at_least) in [("mostly right", 0.1, 1.3_f64), ("mostly wrong", 4.0, 0.97)] {
        let (model, draft) = (tempfile::tempdir()?, tempfile::tempdir()?);
        write_pair(model.path(), draft.path(), upper)?;
        let settings = SpeculationSettings { method: GuessMethod::DraftModel, most: 5, adaptive: true };
        let start = |speculation: Option<SpeculationSettings>| {
            let draft_model = speculation.map(|_| ModelSource::Folder(draft.path().to_owned()));
            let config = config(model.path().to_owned(), LoadFormat::Safetensors, speculation);
            EngineHandle::start(EngineConfig { draft_model, ..config }, &mut |_| {})
        };
        let pair = Pair { plain: start(None)?, guessing: start(Some(settings))? };
        let prompt = |which: u32| (0..100).map(|place| 7 + (place * 31 + which * 997) % 1400).collect();
        let greedy = Workload {
            prompts: (0..2).map(prompt).collect(),
            stop: StopConditions::after(100),
            temperature: 0.0,
            at_once: false,
        };
        let random = Workload { temperature: 1.0, ..greedy.clone() };
        let four = Workload { prompts: (0..4).map(prompt).collect(), at_once: true, ..greedy.clone() };
        for (name, workload) in [("greedy", greedy), ("temperature 1", random), ("four at once", four)] {
            let name = format!("a draft model of a sixth of the layers, {kind}: {name}");
            // What is shared among four pays less.
            let at_least = if workload.at_once { at_least.min(1.0) } else { at_least };
            rows.push(pair.measure(&name, &workload, at_least, rounds)?);
        }
    }
    Ok(rows)
}

/// Both folders. What the upper layers add is `upper` times what those of the draft do.
fn write_pair(model: &Path, draft: &Path, upper: f32) -> anyhow::Result<()> {
    let mut tensors = Checkpoint::new();
    tensors.add("model.embed_tokens", &[VOCABULARY, HIDDEN], Some(1.0));
    tensors.add("model.norm", &[HIDDEN], None);
    for layer in 0..LAYERS {
        if layer == DRAFT_LAYERS {
            tensors.write(draft, &config_json(DRAFT_LAYERS))?;
        }
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let added = if layer < DRAFT_LAYERS { 1.0 } else { upper };
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.add(&name(norm), &[HIDDEN], None);
        }
        for (part, outputs, inputs, scale) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN, 1.0),
            ("self_attn.k_proj", HIDDEN / 4, HIDDEN, 1.0),
            ("self_attn.v_proj", HIDDEN / 4, HIDDEN, 1.0),
            ("self_attn.o_proj", HIDDEN, HIDDEN, added),
            ("mlp.gate_proj", INNER, HIDDEN, 1.0),
            ("mlp.up_proj", INNER, HIDDEN, 1.0),
            ("mlp.down_proj", HIDDEN, INNER, added),
        ] {
            tensors.add(&name(part), &[outputs, inputs], Some(scale * (3.0 / inputs as f32).sqrt()));
        }
    }
    tensors.write(model, &config_json(LAYERS))
}

/// What describes a model of so many layers.
fn config_json(layers: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    })
}

// 92 million parameters: their weights come from memory, as those of real models do.
const VOCABULARY: usize = 8_000;
const HIDDEN: usize = 512;
const INNER: usize = 2_048;
const LAYERS: usize = 24;
const DRAFT_LAYERS: usize = 4;
