//! How a model's makers want it sampled: `generation_config.json`.

use super::error::ModelError;
use super::fields::{Fields, parse};

/// Defaults for what a request leaves open; `None` where the file says nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keeps the most likely tokens whose probabilities add up to this.
    pub top_p: Option<f32>,
    /// Keeps this many of the most likely tokens.
    pub top_k: Option<u32>,
    /// Drops tokens less likely than this share of the most likely one's probability.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens that occurred.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// Reads a `generation_config.json`; `file` is what errors call it.
    ///
    /// # Errors
    ///
    /// [`ModelError`] names the field that is of the wrong type.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self, ModelError> {
        let value = parse(file, bytes)?;
        let config = Fields::of(file, &value)?;
        let number = |name| Ok::<_, ModelError>(config.number(name)?.map(|number| number as f32));
        Ok(Self {
            eos_token_ids: config.tokens("eos_token_id")?,
            temperature: number("temperature")?,
            top_p: number("top_p")?,
            // Zero means "all" here, as it does in transformers.
            top_k: config.index("top_k")?.filter(|top_k| 0 < *top_k),
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
        })
    }
}
