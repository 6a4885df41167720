//! The OpenAI API over HTTP: JSON to typed requests, requests to sequences, tokens to text.
//!
//! Knows nothing of workers: whoever implements [`Generator`] has them. Everything that a request holds (its place in
//! [`admission`](crate::admission), its sequences) lives in the response's future or body, so a client that goes away
//! takes all of it along, at whatever stage.

mod answer;
mod body;
mod chat;
mod completions;
mod conversation;
mod docs;
mod error;
mod generator;
mod model_text;
mod probes;
mod request;
mod response;
mod sampling;
mod sequence;
mod stream;
mod text;

use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use tidemill_engine_core::request::TokenId;

use crate::admission::{Admission, Permit};
use crate::chat_template::{Conversation, TemplateError};
use crate::http::{self, Access, AccessError};
use crate::metrics::Metrics;

pub(crate) use body::BodyLimits;
pub(crate) use error::ApiError;
pub(crate) use generator::{ClusterHealth, Generator, Serving, Started, WorkerHealth};
pub(crate) use model_text::ModelText;

/// How a front end is set up.
#[derive(Clone, Debug)]
pub(crate) struct AppConfig {
    /// Names that the model answers to, the first being its own. At least one.
    pub(crate) model_names: Vec<String>,
    /// What `/version` says.
    pub(crate) version: &'static str,
    /// Sequences in flight or waiting, at most; more are answered with 429.
    pub(crate) max_requests: usize,
    /// How long bodies may be, in bytes and time.
    pub(crate) body: BodyLimits,
    /// Who may use the server.
    pub(crate) access: Access,
}

/// A front end: what all handlers share.
pub(crate) struct App {
    config: AppConfig,
    text: ModelText,
    generator: Arc<dyn Generator>,
    metrics: Arc<Metrics>,
    admission: Admission,
    started_s: u64,
}

/// A front end, shared by its handlers.
pub(crate) type AppState = Arc<App>;

/// The whole HTTP service; fails when its access settings mean nothing.
pub(crate) fn app(state: AppState) -> Result<Router, AccessError> {
    let access = state.config.access.clone();
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/models", get(probes::models))
        .route("/v1/models/{*name}", get(probes::model))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize));
    let open = Router::new()
        .route("/health", get(probes::health))
        .route("/ready", get(probes::ready))
        .route("/ping", get(probes::ping).post(probes::ping))
        .route("/version", get(probes::version))
        .route("/metrics", get(probes::metrics))
        .route("/docs", get(docs::page))
        .route("/openapi.json", get(docs::description));
    let routes = http::guard(guarded, access.clone())
        .merge(open)
        .method_not_allowed_fallback(async |uri: Uri| ApiError::MethodNotAllowed(uri.path().to_owned()))
        .fallback(async |method: Method, uri: Uri| ApiError::NotFound(format!("{method} {}", uri.path())))
        .with_state(state);
    http::wrap(routes, &access)
}

impl App {
    /// A front end for one model.
    pub(crate) fn new(
        config: AppConfig,
        text: ModelText,
        generator: Arc<dyn Generator>,
        metrics: Arc<Metrics>,
    ) -> AppState {
        assert!(!config.model_names.is_empty(), "a model has a name");
        let admission = Admission::new(config.max_requests);
        Arc::new(Self { config, text, generator, metrics, admission, started_s: response::now_s() })
    }

    /// The model's name as the client calls it; without one, the first.
    fn check_model(&self, name: Option<&str>) -> Result<String, ApiError> {
        let names = &self.config.model_names;
        let name = name.unwrap_or(&names[0]);
        if names.iter().any(|known| known == name) {
            Ok(name.to_owned())
        } else {
            Err(ApiError::ModelNotFound(name.to_owned()))
        }
    }

    fn max_model_len(&self) -> Result<u32, ApiError> {
        match self.generator.health().serving {
            Serving::Yes { max_model_len } => Ok(max_model_len),
            Serving::No { reason } => {
                self.metrics.record_refusal("unavailable");
                Err(ApiError::Unavailable(format!("The model cannot be served now: {reason}.")))
            }
        }
    }

    /// A place for `sequences` sequences.
    fn admit(&self, sequences: u32) -> Result<Permit, ApiError> {
        self.admission.admit(sequences).map_err(|full| {
            self.metrics.record_refusal("busy");
            ApiError::Busy { message: full.to_string(), retry_after_s: full.retry_after_s }
        })
    }

    fn check_tokens(&self, param: &str, tokens: &[TokenId]) -> Result<(), ApiError> {
        let vocab_size = self.text.tokenizer.vocab_size();
        match tokens.iter().find(|&&id| vocab_size <= id) {
            None => Ok(()),
            Some(id) => {
                let message =
                    format!("Invalid '{param}': token {id} is outside the vocabulary of {vocab_size}.");
                Err(ApiError::invalid(param, message))
            }
        }
    }

    fn decode(&self, tokens: &[TokenId], skip_special_tokens: bool) -> Result<String, ApiError> {
        let text = self.text.tokenizer.decode(tokens, skip_special_tokens);
        text.map_err(|error| ApiError::Internal(error.to_string()))
    }

    /// Encodes a text, long ones away from the threads that serve sockets.
    async fn encode(
        self: &Arc<Self>,
        text: String,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, ApiError> {
        let tokenizer = Arc::clone(&self.text.tokenizer);
        let long = SHORT_TEXT < text.len();
        let encode = move || tokenizer.encode(&text, add_special_tokens);
        let tokens = if long { in_background(encode).await? } else { encode() };
        tokens.map_err(|error| ApiError::Internal(error.to_string()))
    }

    /// The tokens of a conversation.
    async fn render_and_encode(
        self: &Arc<Self>,
        conversation: Conversation,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, ApiError> {
        let app = Arc::clone(self);
        // Templates are programs of the model's makers; how long they run is theirs to say.
        let text = in_background(move || {
            let Some(template) = &app.text.template else {
                let message = "This model has no chat template; use /v1/completions.";
                return Err(ApiError::unsupported("messages", message));
            };
            template.render(&conversation).map_err(|error| match error {
                TemplateError::Refused(message) => ApiError::invalid("messages", message),
                error => ApiError::invalid("messages", error.to_string()),
            })
        })
        .await??;
        let tokens = self.encode(text, add_special_tokens).await?;
        if tokens.is_empty() {
            return Err(ApiError::invalid(
                "messages",
                "Invalid 'messages': the chat template makes no token of them.",
            ));
        }
        Ok(tokens)
    }
}

/// Computes on a thread of its own; the number of such threads is bounded by admission.
async fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.map_err(|error| ApiError::Internal(format!("the request's text could not be processed: {error}")))
}

/// Bytes that are encoded in less time than a thread takes to start.
const SHORT_TEXT: usize = 2048;

#[cfg(test)]
pub(crate) mod tests;
