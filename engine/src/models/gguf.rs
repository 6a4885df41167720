//! The shape of a decoder from a GGUF file's metadata.
//!
//! The metadata is told in the words of `config.json`, so that one parser knows what every field means and what is
//! refused. What only a GGUF file can say (which biases there are, frequencies by a table) is set after that.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::error::ModelError;
use super::rope::RopeScaling;
use super::spec::ModelSpec;
use crate::gguf::{GgufError, GgufFile, TensorType};

/// A GGUF file that is of a family of decoders that this engine knows.
#[derive(Debug)]
pub struct GgufModel {
    /// The file.
    pub file: GgufFile,
    /// What every key about the decoder begins with.
    architecture: &'static str,
}

impl GgufModel {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// [`ModelError`] names the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let label = || path.display().to_string();
        let file = GgufFile::open(path).map_err(|source| ModelError::Gguf { file: label(), source })?;
        let found = file.header().text("general.architecture");
        let found = found.map_err(|source| ModelError::Gguf { file: label(), source })?.unwrap_or("(none)");
        let architecture = ARCHITECTURES.into_iter().find(|name| *name == found);
        let Some(architecture) = architecture else {
            return Err(ModelError::UnknownArchitecture {
                found: format!("{found} in {}", label()),
                supported: ARCHITECTURES.join(", "),
            });
        };
        Ok(Self { file, architecture })
    }

    /// The shape.
    ///
    /// # Errors
    ///
    /// [`ModelError`] names the value that is missing or asks for what is not supported.
    pub fn spec(&self) -> Result<ModelSpec, ModelError> {
        let config = self.config().map_err(|source| self.error(source))?;
        let mut spec = ModelSpec::parse(self.file.label(), config.to_string().as_bytes())?;
        let has = |name: &str| self.file.header().tensors().contains_key(name);
        spec.qkv_bias = has("blk.0.attn_q.bias");
        spec.output_bias = has("blk.0.attn_output.bias");
        spec.mlp_bias = has("blk.0.ffn_down.bias");
        if has(ROPE_FACTORS) {
            let divisors = self.rope_divisors(spec.head_size).map_err(|source| self.error(source))?;
            spec.rope.scaling = RopeScaling::Table { divisors };
        }
        Ok(spec)
    }

    /// Tokens that end a text or a turn.
    ///
    /// # Errors
    ///
    /// When one of them is no token id.
    pub fn eos_token_ids(&self) -> Result<Vec<u32>, ModelError> {
        let ids = END_TOKENS.iter().map(|key| self.token_id(key));
        let ids: Result<Vec<_>, _> = ids.collect();
        ids.map(|ids| ids.into_iter().flatten().collect()).map_err(|source| self.error(source))
    }

    /// Whether rows of query and key lie in pairs, as llama.cpp turns them, and not in halves.
    pub(crate) fn has_pairs(&self) -> bool {
        self.architecture == LLAMA
    }

    /// What is wrong with this file.
    pub fn error(&self, source: GgufError) -> ModelError {
        ModelError::Gguf { file: self.file.label().into(), source }
    }

    fn token_id(&self, key: &str) -> Result<Option<u32>, GgufError> {
        let id = self.file.header().count(key)?;
        id.map(|id| u32::try_from(id).map_err(|_| GgufError::wrong(key, "a token id"))).transpose()
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn count(&self, name: &str) -> Result<Option<u64>, GgufError> {
        self.file.header().count(&self.key(name))
    }

    fn number(&self, name: &str) -> Result<Option<f64>, GgufError> {
        self.file.header().number(&self.key(name))
    }

    fn unsupported(&self, name: &str, found: &dyn ToString, supported: &str) -> GgufError {
        let (key, found) = (self.key(name), found.to_string());
        GgufError::Unsupported { key, found, supported: supported.into() }
    }

    /// The metadata as a `config.json` says it.
    fn config(&self) -> Result<Value, GgufError> {
        let header = self.file.header();
        let mut config = Map::new();
        for (name, field) in REQUIRED {
            let number = self.count(name)?.ok_or_else(|| GgufError::Missing { key: self.key(name) })?;
            config.insert(field.into(), number.into());
        }
        let embedding = header.tensors().get(EMBEDDING);
        let embedding = embedding.ok_or_else(|| GgufError::NoTensor { name: EMBEDDING.into() })?;
        config.insert("vocab_size".into(), json!(embedding.shape.first()));
        for (name, field) in
            [("attention.head_count_kv", "num_key_value_heads"), ("attention.key_length", "head_dim")]
        {
            if let Some(number) = self.count(name)? {
                config.insert(field.into(), number.into());
            }
        }
        config.entry("num_key_value_heads").or_insert(Value::Null);
        if let Some(epsilon) = self.number("attention.layer_norm_rms_epsilon")? {
            config.insert("rms_norm_eps".into(), epsilon.into());
        }
        if let Some(theta) = self.number("rope.freq_base")? {
            config.insert("rope_theta".into(), theta.into());
        }
        config.insert("tie_word_embeddings".into(), json!(!header.tensors().contains_key(HEAD)));
        config.insert("dtype".into(), "bfloat16".into());
        config.insert("rope_scaling".into(), self.rope_scaling()?);
        let window = self.count("attention.sliding_window")?.filter(|window| 0 < *window);
        let architecture = match (self.architecture, window) {
            (LLAMA, Some(window)) => {
                config.insert("sliding_window".into(), window.into());
                "MistralForCausalLM"
            }
            (LLAMA, None) => "LlamaForCausalLM",
            (_, Some(window)) => return Err(self.unsupported("attention.sliding_window", &window, "none")),
            ("qwen2", None) => "Qwen2ForCausalLM",
            (_, None) => "Qwen3ForCausalLM",
        };
        config.insert("architectures".into(), json!([architecture]));
        let ids = END_TOKENS.iter().map(|key| self.token_id(key)).collect::<Result<Vec<_>, _>>()?;
        config.insert("eos_token_id".into(), json!(ids.into_iter().flatten().collect::<Vec<_>>()));
        self.refuse_other_heads(&config)?;
        Ok(config.into())
    }

    /// Values and keys of other sizes, and heads of which only a part turns.
    fn refuse_other_heads(&self, config: &Map<String, Value>) -> Result<(), GgufError> {
        let known = |field: &str| config.get(field).and_then(Value::as_u64);
        let heads = known("num_attention_heads").unwrap_or(1).max(1);
        let size = known("head_dim").unwrap_or(known("hidden_size").unwrap_or(0) / heads);
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(found) = self.count(name)?.filter(|found| *found != size) {
                return Err(self.unsupported(name, &found, &format!("{size}, the size of a head")));
            }
        }
        Ok(())
    }

    fn rope_scaling(&self) -> Result<Value, GgufError> {
        let kind = self.file.header().text(&self.key("rope.scaling.type"))?;
        let required =
            |name: &str| self.number(name)?.ok_or_else(|| GgufError::Missing { key: self.key(name) });
        Ok(match kind {
            None => match self.number("rope.scale_linear")? {
                Some(factor) if factor != 1.0 => json!({"rope_type": "linear", "factor": factor}),
                _ => Value::Null,
            },
            Some("none") => Value::Null,
            Some("linear") => json!({"rope_type": "linear", "factor": required("rope.scaling.factor")?}),
            Some("yarn") => {
                let factor = required("rope.scaling.factor")?;
                let mut yarn = json!({"rope_type": "yarn", "factor": factor});
                if let Some(length) = self.count("rope.scaling.original_context_length")? {
                    yarn["original_max_position_embeddings"] = length.into();
                }
                for (name, field) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                    if let Some(number) = self.number(&format!("rope.scaling.{name}"))? {
                        yarn[field] = number.into();
                    }
                }
                // Multiplies what the factor gives, where a `config.json` replaces it.
                if let Some(scale) = self.number("rope.scaling.attn_factor")? {
                    yarn["attention_factor"] = (scale * (0.1 * factor.max(1.0).ln() + 1.0)).into();
                }
                yarn
            }
            Some(other) => return Err(self.unsupported("rope.scaling.type", &other, "none, linear, yarn")),
        })
    }

    /// What each frequency is divided by; so files say what `config.json` calls rope scaling `llama3`.
    fn rope_divisors(&self, head_size: usize) -> Result<Vec<f32>, GgufError> {
        let wrong = || GgufError::wrong(ROPE_FACTORS, format!("{} numbers above 0 in F32", head_size / 2));
        let tensor = &self.file.header().tensors()[ROPE_FACTORS];
        if tensor.kind != TensorType::F32 || tensor.shape != [head_size / 2] {
            return Err(wrong());
        }
        let bytes = self.file.data_of(ROPE_FACTORS)?;
        let divisors: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if divisors.iter().all(|divisor| divisor.is_finite() && 0.0 < *divisor) {
            Ok(divisors)
        } else {
            Err(wrong())
        }
    }
}

/// Mistral's files are of the architecture `llama`.
const ARCHITECTURES: [&str; 3] = [LLAMA, "qwen2", "qwen3"];
const LLAMA: &str = "llama";
const REQUIRED: [(&str, &str); 5] = [
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("context_length", "max_position_embeddings"),
];
const END_TOKENS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";
/// A table that is no weight.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";
