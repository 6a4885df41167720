//! `/v1/chat/completions`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use serde_json::{Value, json};
use tidemill_engine_core::request::TokenId;

use super::App;
use super::answer::OutputToken;
use super::body::Fields;
use super::conversation::{check_tool_choice, conversation};
use super::error::ApiError;
use super::request::{ChatFields, SharedFields};
use super::response::{Envelope, Usage, chat_logprobs, prompt_logprobs, stop_reason};
use super::sampling::{Delivery, MAX_LOGPROBS, UsageReports, Wish, within};
use super::sequence::{self, ContextLimits, Finished};
use super::stream::{self, Chunks, Told};

/// Answers a conversation.
pub(crate) async fn complete(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = Fields::read(request, app.config.body).await?;
    let shared: SharedFields = body.get()?;
    let fields: ChatFields = body.get()?;
    let model = app.check_model(shared.model.as_deref())?;
    check_tool_choice(fields.tool_choice.as_ref())?;
    let add_special_tokens = shared.add_special_tokens.unwrap_or(false);
    let mut wish = Wish::new(shared, body.as_map(), &app.text.defaults, app.text.tokenizer.vocab_size())?;
    wish.sampling.logprobs = logprobs(&fields)?;
    if wish.max_tokens == Some(0) {
        return Err(ApiError::invalid(
            "max_tokens",
            "Invalid 'max_tokens': 0 is less than the minimum of 1.",
        ));
    }
    let conversation = conversation(&body)?;
    drop(body);
    let max_model_len = app.max_model_len()?;
    let permit = app.admit(wish.n)?;
    let prompt = app.render_and_encode(conversation, add_special_tokens).await?;
    let limits = ContextLimits { max_model_len, prompt_param: "messages" };
    let prompts = [prompt];
    let sequences = sequence::start(&app, &wish, &prompts, None, limits, arrived).await?;
    let [prompt] = prompts;
    let answers = Answers {
        envelope: Envelope::new("chatcmpl", model),
        prompt,
        logprobs: wish.sampling.logprobs.is_some(),
        app: Arc::clone(&app),
    };
    match wish.delivery {
        Delivery::Whole => {
            let finished = try_join_all(sequences.into_iter().map(sequence::Sequence::finished)).await?;
            drop(permit);
            Ok(Json(answers.whole(&finished)).into_response())
        }
        Delivery::Stream(usage) => {
            let counts = vec![0; sequences.len()];
            let chunks = ChatChunks { answers, usage, begun: BTreeSet::new(), counts, cached_tokens: None };
            Ok(stream::respond(sequences, chunks, permit))
        }
    }
}

/// The number of alternatives to report, as the engine wants it.
fn logprobs(fields: &ChatFields) -> Result<Option<u32>, ApiError> {
    let top = within("top_logprobs", fields.top_logprobs.unwrap_or(0), 0, MAX_LOGPROBS)?;
    match (fields.logprobs.unwrap_or(false), top) {
        (true, top) => Ok(Some(top)),
        (false, 0) => Ok(None),
        (false, _) => Err(ApiError::invalid("top_logprobs", "top_logprobs requires logprobs to be true.")),
    }
}

/// Writes the answers to one conversation.
struct Answers {
    envelope: Envelope,
    prompt: Vec<TokenId>,
    logprobs: bool,
    app: Arc<App>,
}

impl Answers {
    fn whole(&self, finished: &[Finished]) -> Value {
        let Envelope { id, created, model } = &self.envelope;
        let choices: Vec<Value> = (0..)
            .zip(finished)
            .map(|(index, answer): (u32, &Finished)| {
                json!({
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": null},
                    "logprobs": self.logprobs_of(&answer.tokens),
                    "finish_reason": answer.finish.reason(),
                    "stop_reason": stop_reason(&answer.finish),
                })
            })
            .collect();
        let cached_tokens = finished.first().and_then(|answer| answer.finish.cached_tokens);
        let mut response = json!({
            "id": id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": choices,
            "usage": self.usage(finished.iter().map(|answer| answer.count).sum(), cached_tokens),
            "system_fingerprint": null,
        });
        if let Some(logprobs) = finished.first().and_then(|answer| answer.prompt_logprobs.as_ref()) {
            response["prompt_logprobs"] = prompt_logprobs(&self.app.text.tokenizer, &self.prompt, logprobs);
        }
        response
    }

    fn chunk(&self, choices: &Value) -> Value {
        let Envelope { id, created, model } = &self.envelope;
        json!({
            "id": id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": null,
            "choices": choices,
        })
    }

    fn logprobs_of(&self, tokens: &[OutputToken]) -> Value {
        if self.logprobs { chat_logprobs(&self.app.text.tokenizer, tokens) } else { Value::Null }
    }

    fn usage(&self, completion_tokens: u32, cached_tokens: Option<u32>) -> Usage {
        let prompt_tokens = u32::try_from(self.prompt.len()).expect("within the context");
        Usage::new(prompt_tokens, completion_tokens, cached_tokens)
    }
}

/// Writes the chunks of a stream.
struct ChatChunks {
    answers: Answers,
    usage: UsageReports,
    /// Choices whose role was told.
    begun: BTreeSet<u32>,
    /// Output tokens of each choice.
    counts: Vec<u32>,
    /// Of the first choice.
    cached_tokens: Option<u32>,
}

impl ChatChunks {
    fn chunk(
        &self,
        index: u32,
        delta: &Value,
        logprobs: &Value,
        finish: &Value,
        stop_reason: &Value,
    ) -> Value {
        let mut choice =
            json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
        if !finish.is_null() {
            choice["stop_reason"] = stop_reason.clone();
        }
        let mut chunk = self.answers.chunk(&json!([choice]));
        match self.usage {
            UsageReports::Never => {}
            UsageReports::AtEnd => chunk["usage"] = Value::Null,
            UsageReports::Continuous => chunk["usage"] = json!(self.usage()),
        }
        chunk
    }

    fn usage(&self) -> Usage {
        self.answers.usage(self.counts.iter().sum(), self.cached_tokens)
    }
}

impl Chunks for ChatChunks {
    fn piece(&mut self, told: &Told) -> Vec<Value> {
        let (index, piece) = (told.index, &told.piece);
        let mut chunks = Vec::new();
        if self.begun.insert(index) {
            let role = json!({"role": "assistant", "content": ""});
            chunks.push(self.chunk(index, &role, &Value::Null, &Value::Null, &Value::Null));
        }
        self.counts[index as usize] = told.count;
        let logprobs = self.answers.logprobs_of(&piece.tokens);
        if !piece.text.is_empty() || !piece.tokens.is_empty() && self.answers.logprobs {
            let delta = json!({"content": piece.text});
            chunks.push(self.chunk(index, &delta, &logprobs, &Value::Null, &Value::Null));
        }
        if let Some(finish) = &piece.finish {
            if index == 0 {
                self.cached_tokens = finish.cached_tokens;
            }
            let (reason, stop_reason) = (Value::from(finish.reason()), stop_reason(finish));
            chunks.push(self.chunk(index, &json!({}), &Value::Null, &reason, &stop_reason));
        }
        chunks
    }

    fn end(&mut self) -> Option<Value> {
        if self.usage == UsageReports::Never {
            return None;
        }
        let mut chunk = self.answers.chunk(&json!([]));
        chunk["usage"] = json!(self.usage());
        Some(chunk)
    }
}
