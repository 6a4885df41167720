//! Shapes of well-known models, to be filled with weights from a seed.

use clap::ValueEnum;
use tidemill_engine::handle::{EmbeddedFile, ModelSource};

/// A shape by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// 11 million parameters, to try things out
    #[value(name = "llama-tiny")]
    LlamaTiny,
    /// 0.39 billion: 24 layers of 896, 14 heads, 2 of them KV
    #[value(name = "llama-0.4b")]
    Llama04b,
    /// 1.1 billion, as TinyLlama: 22 layers of 2048, 32 heads, 4 of them KV
    #[value(name = "llama-1.1b")]
    Llama11b,
    /// Llama 3.2 of 1.2 billion
    #[value(name = "llama-3.2-1b")]
    Llama32Of1b,
    /// Llama 3 of 8 billion
    #[value(name = "llama-3-8b")]
    Llama3Of8b,
    /// Qwen3 of 0.6 billion
    #[value(name = "qwen3-0.6b")]
    Qwen3Of06b,
}

impl Shape {
    /// A model of this shape, without weights.
    pub(super) fn source(self) -> ModelSource {
        match self {
            Self::LlamaTiny => ModelSource::Embedded(LLAMA_TINY),
            Self::Llama04b => ModelSource::Embedded(LLAMA_04B),
            Self::Llama11b => ModelSource::Embedded(LLAMA_11B),
            Self::Llama32Of1b => ModelSource::Embedded(LLAMA_32_1B),
            Self::Llama3Of8b => ModelSource::Embedded(LLAMA_3_8B),
            Self::Qwen3Of06b => ModelSource::Embedded(QWEN3_06B),
        }
    }
}

/// The one file that a shape is.
macro_rules! config {
    ($architecture:literal, $($field:literal: $value:expr),+ $(,)?) => {
        &[EmbeddedFile {
            name: "config.json",
            bytes: concat!(
                "{\"architectures\": [\"", $architecture, "\"], ",
                $("\"", $field, "\": ", $value, ", ",)+
                "\"max_position_embeddings\": 8192, \"rms_norm_eps\": 1e-5, \"hidden_act\": \"silu\", ",
                "\"dtype\": \"bfloat16\"}"
            )
            .as_bytes(),
        }]
    };
}

const LLAMA_TINY: &[EmbeddedFile] = config!("LlamaForCausalLM",
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 9,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true, "rope_theta": 10000.0);
const LLAMA_04B: &[EmbeddedFile] = config!("LlamaForCausalLM",
    "vocab_size": 32000, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": true, "rope_theta": 10000.0);
const LLAMA_11B: &[EmbeddedFile] = config!("LlamaForCausalLM",
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": false, "rope_theta": 10000.0);
const LLAMA_32_1B: &[EmbeddedFile] = config!("LlamaForCausalLM",
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": true, "rope_theta": 500000.0);
const LLAMA_3_8B: &[EmbeddedFile] = config!("LlamaForCausalLM",
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": false, "rope_theta": 500000.0);
const QWEN3_06B: &[EmbeddedFile] = config!("Qwen3ForCausalLM",
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": true,
    "rope_theta": 1000000.0);

#[cfg(test)]
mod tests {
    use tidemill_engine::models::ModelSpec;

    use super::*;

    #[test]
    fn every_shape_is_a_model_of_the_size_that_its_name_says() {
        for shape in Shape::value_variants() {
            let spec = ModelSpec::read(&shape.source()).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
            let attention = 2 * spec.hidden_size * (spec.query_size() + spec.kv_size());
            let layer = attention + 3 * spec.hidden_size * spec.intermediate_size;
            let tables = if spec.tied_embeddings { 1 } else { 2 };
            let parameters = spec.layers * layer + tables * spec.vocab_size * spec.hidden_size;
            let expected = match shape {
                Shape::LlamaTiny => 11e6,
                Shape::Llama04b => 0.386e9,
                Shape::Llama11b => 1.1e9,
                Shape::Llama32Of1b => 1.236e9,
                Shape::Llama3Of8b => 8.03e9,
                Shape::Qwen3Of06b => 0.596e9,
            };
            assert!((parameters as f64 / expected - 1.0).abs() < 0.01, "{shape:?}: {parameters}");
        }
    }
}
