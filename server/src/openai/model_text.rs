//! Everything about a model that has to do with text: the small files beside its weights.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use tidemill_engine::handle::ModelSource;
use tidemill_engine::models::{GgufModel, ModelError};
use tidemill_engine_core::request::TokenId;

use crate::chat_template::{ChatTemplate, Clock, TemplateError};
use crate::tokenizer::{Tokenizer, TokenizerError, tokenizer_config, tokenizer_json};

/// A model's text side.
#[derive(Debug)]
pub(crate) struct ModelText {
    /// Text to tokens and back.
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Messages to text; `None` for models that were not made to chat.
    pub(crate) template: Option<ChatTemplate>,
    /// Tokens that end an answer: those of `generation_config.json`, or else `config.json`, and the tokenizer's.
    pub(crate) eos_token_ids: Vec<TokenId>,
    /// What the model's makers recommend where a request is silent.
    pub(crate) defaults: GenerationDefaults,
}

/// Sampling as `generation_config.json` recommends it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct GenerationDefaults {
    /// See [`SamplingParams`](tidemill_engine_core::request::SamplingParams), as all of them.
    pub(crate) temperature: Option<f64>,
    /// As above.
    pub(crate) top_p: Option<f64>,
    /// As above.
    pub(crate) top_k: Option<i64>,
    /// As above.
    pub(crate) min_p: Option<f64>,
    /// As above.
    pub(crate) repetition_penalty: Option<f64>,
}

/// The files are not there or not what they should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelTextError {
    /// A file that every model has is missing.
    #[error("the model has no {0}")]
    Missing(&'static str),
    /// A file could not be read.
    #[error("{path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is not JSON, or no object.
    #[error("{name} is not a JSON object")]
    Json {
        /// The file.
        name: &'static str,
        /// Where it breaks.
        #[source]
        source: serde_json::Error,
    },
    /// A file is not text.
    #[error("{0} is not UTF-8")]
    Utf8(&'static str),
    /// The metadata of a GGUF file.
    #[error(transparent)]
    Gguf(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

impl ModelText {
    /// Reads the files of `source`. Blocks while it does. `clock` is the time that templates show.
    pub(crate) fn load(source: &ModelSource, clock: Clock) -> Result<Self, ModelTextError> {
        if let ModelSource::Gguf(path) = source {
            return Self::of_gguf(path, clock);
        }
        let tokenizer = read(source, TOKENIZER)?.ok_or(ModelTextError::Missing(TOKENIZER))?;
        let tokenizer = Arc::new(Tokenizer::from_json(&tokenizer)?);
        let tokenizer_config = object(source, "tokenizer_config.json")?;
        let generation_config = object(source, "generation_config.json")?;
        let template = match read(source, TEMPLATE)? {
            Some(bytes) => {
                let text = String::from_utf8(bytes).map_err(|_| ModelTextError::Utf8(TEMPLATE))?;
                Some(Value::String(text))
            }
            None => tokenizer_config.get("chat_template").filter(|template| !template.is_null()).cloned(),
        };
        let template =
            template.map(|template| ChatTemplate::new(&template, &tokenizer_config, clock)).transpose()?;
        let mut eos_token_ids = token_ids(generation_config.get("eos_token_id"));
        if eos_token_ids.is_empty() {
            eos_token_ids = token_ids(object(source, "config.json")?.get("eos_token_id"));
        }
        let eos_token = tokenizer_config.get("eos_token");
        let eos_token = eos_token.and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
        eos_token_ids.extend(eos_token.and_then(|token| tokenizer.id_of(token)));
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        Ok(Self { tokenizer, template, eos_token_ids, defaults: GenerationDefaults::of(&generation_config) })
    }
}

impl ModelText {
    /// Everything is in the metadata; sampling is as a request says, since files say nothing about it.
    fn of_gguf(path: &Path, clock: Clock) -> Result<Self, ModelTextError> {
        let model = GgufModel::open(path)?;
        let tokenizer = tokenizer_json(&model.file).map_err(|error| model.error(error))?;
        let config = tokenizer_config(&model.file).map_err(|error| model.error(error))?;
        let template = config.get("chat_template");
        Ok(Self {
            tokenizer: Arc::new(Tokenizer::from_json(tokenizer.to_string().as_bytes())?),
            template: template.map(|template| ChatTemplate::new(template, &config, clock)).transpose()?,
            eos_token_ids: model.eos_token_ids()?,
            defaults: GenerationDefaults::default(),
        })
    }
}

impl GenerationDefaults {
    fn of(generation_config: &Map<String, Value>) -> Self {
        let number = |name: &str| generation_config.get(name).and_then(Value::as_f64);
        Self {
            temperature: number("temperature"),
            top_p: number("top_p"),
            top_k: generation_config.get("top_k").and_then(Value::as_i64),
            min_p: number("min_p"),
            repetition_penalty: number("repetition_penalty"),
        }
    }
}

/// One id or a list of them.
fn token_ids(value: Option<&Value>) -> Vec<TokenId> {
    let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The object in a file; empty when there is no such file.
fn object(source: &ModelSource, name: &'static str) -> Result<Map<String, Value>, ModelTextError> {
    let Some(bytes) = read(source, name)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes).map_err(|source| ModelTextError::Json { name, source })
}

fn read(source: &ModelSource, name: &str) -> Result<Option<Vec<u8>>, ModelTextError> {
    match source {
        ModelSource::Embedded(files) => {
            Ok(files.iter().find(|file| file.name == name).map(|file| file.bytes.to_vec()))
        }
        ModelSource::Gguf(_) => Ok(None),
        ModelSource::Folder(folder) => {
            let path = folder.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(ModelTextError::Read { path, source }),
            }
        }
    }
}

const TOKENIZER: &str = "tokenizer.json";
const TEMPLATE: &str = "chat_template.jinja";
