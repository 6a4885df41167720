//! How near models in fewer bits are to themselves in f32.

use std::fs;
use std::sync::Arc;

use super::bench::{Bench, Storage, Work, goldens, quantized_model};
use super::parity::MODELS;
use serde_json::json;
use tidemill_engine::handle::{LoadFormat, ModelSource, Quantization};
use tidemill_engine::models::{LoadOptions, Model};
use tidemill_engine::runner::LogitsWanted;

const INT8: Quantization = Quantization::Int8;
const FP8: Quantization = Quantization::Fp8;
const fn int4(group: usize) -> Quantization {
    Quantization::Int4 { group }
}

/// Logits of every position of one prompt.
pub(crate) fn logits(model: &Arc<Model>, prompt: &[u32]) -> Vec<Vec<f32>> {
    let mut bench = Bench::new(model, Storage::PLAIN);
    let mut place = bench.place(prompt.len());
    bench.step(&mut [Work { place: &mut place, tokens: prompt }], LogitsWanted::All).remove(0)
}

pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Random weights that keep the size of activations, in the shape of a small Llama.
#[test]
fn logits_of_random_models_hardly_turn() {
    let folder = tempfile::tempdir().expect("a place for temporary files");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1408, "vocab_size": 1000,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "dtype": "float32",
    });
    fs::write(folder.path().join("config.json"), config.to_string()).expect("it can be written");
    let source = ModelSource::Folder(folder.path().into());
    let load = |seed, quantization| {
        let options = LoadOptions { threads: 2, format: LoadFormat::Dummy { seed }, quantization };
        Arc::new(Model::load_with(options, &source, &mut |_| {}).expect("a config is enough"))
    };
    let prompt: Vec<u32> = (0..100).map(|index| index * 37 % 1000).collect();
    for seed in 0..3 {
        let expected = logits(&load(seed, None), &prompt);
        for (quantization, bound) in
            [(INT8, 0.999), (FP8, 0.985), (int4(32), 0.93), (int4(64), 0.92), (int4(128), 0.91)]
        {
            let found = logits(&load(seed, Some(quantization)), &prompt);
            let cosine = cosine(&found.concat(), &expected.concat());
            assert!((bound..1.0).contains(&cosine), "seed {seed}: {quantization}: a cosine of {cosine}");
        }
    }
}

/// The fixture models multiply errors by about ten: int8 K and V alone move their logits by several hundredths.
#[test]
fn logits_of_fixture_models_turn_little_in_int8() {
    for name in MODELS {
        let model = quantized_model(name, INT8);
        for golden in goldens(name) {
            let (length, found) = (golden.prompt.len(), logits(&model, &golden.prompt));
            // Goldens may have the last positions only.
            for (found, expected) in found.iter().rev().zip(golden.logits.iter().rev()) {
                let cosine = cosine(found, expected);
                assert!((0.99..1.0).contains(&cosine), "{name}: {length} tokens: a cosine of {cosine}");
            }
        }
    }
}
