//! The shape of a decoder: everything that the forward pass must know, read from `config.json`.
//!
//! One skeleton serves all families:
//!
//! ```text
//! x = embedding[token]
//! per layer:   x += o(attention(rope(norm?(q(norm(x)))), rope(norm?(k(norm(x)))), v(norm(x))))
//!              x += down(silu(gate(norm(x))) * up(norm(x)))
//! logits = head(norm(x))
//! ```

use tidemill_kernels::matrix::WeightDtype;

use super::error::ModelError;
use super::families::{FAMILIES, Family, Switch, WindowRule, supported};
use super::fields::{Fields, parse};
use super::packing::Packing;
use super::rope::RopeSpec;

/// Shape of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The name in `architectures`.
    pub architecture: &'static str,
    /// Rows of the embedding; can be more than the tokenizer has tokens.
    pub vocab_size: usize,
    /// Elements of a token's state between layers.
    pub hidden_size: usize,
    /// Elements of a token's state inside the feed-forward part.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head; even.
    pub head_size: usize,
    /// Added to the mean square before a norm divides by its root.
    pub norm_eps: f32,
    /// Longest sequence that the model is made for.
    pub max_positions: u32,
    /// How positions become angles.
    pub rope: RopeSpec,
    /// Per layer: how many of the last tokens it sees, itself included; `None` sees all.
    pub windows: Vec<Option<u32>>,
    /// Bias of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// Biases of the three feed-forward projections.
    pub mlp_bias: bool,
    /// Whether each head of query and key is normalised before it turns.
    pub qk_norm: bool,
    /// Whether the embedding is also the output head.
    pub tied_embeddings: bool,
    /// How matrices are packed that come in fewer bits.
    pub(crate) packing: Option<Packing>,
    /// Type that the weights are said to be stored in.
    pub dtype: WeightDtype,
    /// Tokens that end a text, by `config.json` alone.
    pub eos_token_ids: Vec<u32>,
}

impl ModelSpec {
    /// Reads a `config.json`; `file` is what errors call it.
    ///
    /// # Errors
    ///
    /// [`ModelError`] names the field that is missing, of the wrong type, or asks for what is not supported.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self, ModelError> {
        let value = parse(file, bytes)?;
        let config = Fields::of(file, &value)?;
        let family = family_of(&config)?;
        refuse_unsupported(&config)?;
        let required = |name| config.required(name, config.count(name)?);
        let max_positions = required("max_position_embeddings")?;
        let rope = RopeSpec::read(&config, max_positions)?;
        let layers = bounded(&config, "num_hidden_layers", required("num_hidden_layers")?)?;
        let (heads, kv_heads, head_size) = head_shape(&config, family)?;
        Ok(Self {
            architecture: family.architecture,
            vocab_size: required("vocab_size")? as usize,
            hidden_size: required("hidden_size")? as usize,
            intermediate_size: required("intermediate_size")? as usize,
            layers,
            heads,
            kv_heads,
            head_size,
            norm_eps: config.positive("rms_norm_eps")?.unwrap_or(DEFAULT_NORM_EPS) as f32,
            max_positions: rope.stretched_len().map_or(max_positions, |len| len.max(max_positions)),
            rope,
            windows: windows(&config, family.window, layers)?,
            qkv_bias: switched(&config, family.qkv_bias)?,
            output_bias: switched(&config, family.output_bias)?,
            mlp_bias: switched(&config, family.mlp_bias)?,
            qk_norm: family.qk_norm,
            tied_embeddings: config.flag("tie_word_embeddings")?.unwrap_or(false),
            packing: Packing::read(&config)?,
            dtype: declared_dtype(&config)?,
            eos_token_ids: config.tokens("eos_token_id")?,
        })
    }

    /// Elements of all query heads of one token.
    pub const fn query_size(&self) -> usize {
        self.heads * self.head_size
    }

    /// Elements of all key heads (or value heads) of one token.
    pub const fn kv_size(&self) -> usize {
        self.kv_heads * self.head_size
    }
}

fn family_of(config: &Fields<'_>) -> Result<&'static Family, ModelError> {
    let names = config.required("architectures", config.texts("architectures")?)?;
    let known = |name: &&str| FAMILIES.iter().find(|family| family.architecture == *name);
    names
        .first()
        .and_then(known)
        .ok_or_else(|| ModelError::UnknownArchitecture { found: names.join(", "), supported: supported() })
}

fn refuse_unsupported(config: &Fields<'_>) -> Result<(), ModelError> {
    match config.text("hidden_act")? {
        None | Some("silu" | "swish") => Ok(()),
        Some(_) => Err(config.unsupported("hidden_act", "silu")),
    }
}

/// Query heads, KV heads, elements per head.
fn head_shape(config: &Fields<'_>, family: &Family) -> Result<(usize, usize, usize), ModelError> {
    let heads = bounded(config, "num_attention_heads", {
        config.required("num_attention_heads", config.count("num_attention_heads")?)?
    })?;
    let kv_heads = match (config.count("num_key_value_heads")?, family.kv_heads) {
        (Some(kv_heads), _) => bounded(config, "num_key_value_heads", kv_heads)?,
        (None, Some(default)) if !config.has("num_key_value_heads") => default as usize,
        (None, _) => heads,
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(
            config.invalid("num_key_value_heads", format!("a divisor of num_attention_heads, {heads}"))
        );
    }
    let hidden = config.required("hidden_size", config.count("hidden_size")?)? as usize;
    let head_size = match (config.count("head_dim")?, family.head_size) {
        (Some(head_size), _) => bounded(config, "head_dim", head_size)?,
        (None, Some(default)) => default as usize,
        (None, None) if hidden.is_multiple_of(heads) => {
            bounded(config, "hidden_size", (hidden / heads) as u32)?
        }
        (None, None) => {
            return Err(config.invalid("hidden_size", format!("a multiple of num_attention_heads, {heads}")));
        }
    };
    if head_size % 2 == 1 {
        return Err(config.invalid("head_dim", "an even number"));
    }
    Ok((heads, kv_heads, head_size))
}

fn windows(config: &Fields<'_>, rule: WindowRule, layers: usize) -> Result<Vec<Option<u32>>, ModelError> {
    let size = || -> Result<Option<u32>, ModelError> {
        let absent = (!config.has("sliding_window")).then_some(DEFAULT_WINDOW);
        Ok(config.count("sliding_window")?.or(absent))
    };
    match rule {
        WindowRule::Never => Ok(vec![None; layers]),
        WindowRule::EveryLayer => Ok(vec![size()?; layers]),
        WindowRule::NamedLayers => {
            let used = config.flag("use_sliding_window")?.unwrap_or(false);
            let size = if used { size()? } else { None };
            if let Some(types) = config.texts("layer_types")? {
                return named_windows(config, &types, size, layers);
            }
            let first = config.index("max_window_layers")?.unwrap_or(DEFAULT_FIRST_WINDOW_LAYER) as usize;
            Ok((0..layers).map(|layer| size.filter(|_| first <= layer)).collect())
        }
    }
}

fn named_windows(
    config: &Fields<'_>,
    types: &[&str],
    size: Option<u32>,
    layers: usize,
) -> Result<Vec<Option<u32>>, ModelError> {
    if types.len() != layers {
        return Err(config.invalid("layer_types", format!("a list of {layers}, one per layer")));
    }
    let window =
        |name: &&str| match *name {
            "full_attention" => Ok(None),
            "sliding_attention" if size.is_some() => Ok(size),
            "sliding_attention" => Err(config
                .invalid("layer_types", "full_attention throughout, as there is no sliding_window in use")),
            _ => Err(config.unsupported("layer_types", "full_attention, sliding_attention")),
        };
    types.iter().map(window).collect()
}

fn switched(config: &Fields<'_>, switch: Switch) -> Result<bool, ModelError> {
    match switch {
        Switch::On => Ok(true),
        Switch::Off => Ok(false),
        Switch::Field(name) => Ok(config.flag(name)?.unwrap_or(false)),
    }
}

fn declared_dtype(config: &Fields<'_>) -> Result<WeightDtype, ModelError> {
    let name = if config.value("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match config.text(name)? {
        None | Some("float32") => Ok(WeightDtype::F32),
        Some("float16") => Ok(WeightDtype::F16),
        Some("bfloat16") => Ok(WeightDtype::Bf16),
        Some(_) => Err(config.unsupported(name, "bfloat16, float16, float32")),
    }
}

/// A number that a KV layout must be able to carry.
fn bounded(config: &Fields<'_>, name: &str, number: u32) -> Result<usize, ModelError> {
    let bounded = u16::try_from(number).map_err(|_| config.invalid(name, format!("at most {}", u16::MAX)))?;
    Ok(usize::from(bounded))
}

const DEFAULT_NORM_EPS: f64 = 1e-6;
const DEFAULT_WINDOW: u32 = 4096;
const DEFAULT_FIRST_WINDOW_LAYER: u32 = 28;
