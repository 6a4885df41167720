//! What answers look like on the wire: the parts that several endpoints share.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value, json};
use tidemill_engine_core::request::{Logprobs, TokenId};

use super::answer::{Finish, OutputToken, StoppedBy};
use crate::tokenizer::Tokenizer;

/// What all responses to one request have in common.
#[derive(Clone, Debug)]
pub(crate) struct Envelope {
    /// The response's name.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The model, as the client called it.
    pub(crate) model: String,
}

/// Tokens used by a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    /// Of all prompts, each counted once.
    pub(crate) prompt_tokens: u32,
    /// Of both.
    pub(crate) total_tokens: u32,
    /// Of all answers.
    pub(crate) completion_tokens: u32,
    /// More on the prompts; missing where the workers did not say.
    pub(crate) prompt_tokens_details: Option<PromptTokensDetails>,
}

/// More on the tokens of prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct PromptTokensDetails {
    /// Those that came from a prefix cache.
    pub(crate) cached_tokens: u32,
}

/// Log-probabilities of plain completions, one entry of each list for each token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl Envelope {
    /// A fresh one, its id beginning with `prefix`.
    pub(crate) fn new(prefix: &str, model: String) -> Self {
        let id = format!("{prefix}-{:032x}", rand::random::<u128>());
        Self { id, created: now_s(), model }
    }
}

impl Usage {
    /// The usage of prompts and answers of these lengths.
    pub(crate) fn new(prompt_tokens: u32, completion_tokens: u32, cached_tokens: Option<u32>) -> Self {
        Self {
            prompt_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens,
            prompt_tokens_details: cached_tokens.map(|cached_tokens| PromptTokensDetails { cached_tokens }),
        }
    }
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The stop string or token that ended an answer, as vLLM tells it.
pub(crate) fn stop_reason(finish: &Finish) -> Value {
    match &finish.stopped_by {
        None => Value::Null,
        Some(StoppedBy::Text(text)) => Value::from(text.as_str()),
        Some(StoppedBy::Token(id)) => Value::from(*id),
    }
}

/// Log-probabilities of chat completions.
pub(crate) fn chat_logprobs(tokenizer: &Tokenizer, tokens: &[OutputToken]) -> Value {
    let entry = |id: TokenId, logprob: f32| {
        let text = tokenizer.token_text(id);
        json!({"token": text.text, "logprob": finite(logprob), "bytes": text.bytes})
    };
    let content: Vec<Value> = tokens
        .iter()
        .filter_map(|token| {
            let logprobs = token.logprobs.as_ref()?;
            let mut chosen = entry(token.id, logprobs.chosen);
            chosen["top_logprobs"] = logprobs.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
            Some(chosen)
        })
        .collect();
    json!({"content": content, "refusal": null})
}

/// Log-probabilities of a prompt as vLLM tells them: nothing for the first token, then for each token an object from
/// ids to what is known of them.
pub(crate) fn prompt_logprobs(tokenizer: &Tokenizer, prompt: &[TokenId], logprobs: &[Logprobs]) -> Value {
    let entry = |id: TokenId, logprob: f32, rank: u32| json!({"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(id).text});
    let of_token = |(&id, logprobs): (&TokenId, &Logprobs)| {
        let mut known = Map::new();
        known.insert(id.to_string(), entry(id, logprobs.chosen, logprobs.rank));
        for (&(top, logprob), rank) in logprobs.top.iter().zip(1..) {
            known.entry(top.to_string()).or_insert_with(|| entry(top, logprob, rank));
        }
        Value::Object(known)
    };
    std::iter::once(Value::Null).chain(prompt.iter().skip(1).zip(logprobs).map(of_token)).collect()
}

impl CompletionLogprobs {
    /// Adds a token at `offset` characters; `None` where nothing came before it.
    pub(crate) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        id: TokenId,
        offset: usize,
        logprobs: Option<&Logprobs>,
    ) {
        let name = tokenizer.token_text(id).text;
        self.text_offset.push(offset);
        self.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.chosen)));
        self.top_logprobs.push(logprobs.map(|logprobs| {
            let mut top = Map::new();
            for &(id, logprob) in &logprobs.top {
                top.insert(tokenizer.token_text(id).text, Value::from(finite(logprob)));
            }
            top.entry(name.clone()).or_insert_with(|| Value::from(finite(logprobs.chosen)));
            top
        }));
        self.tokens.push(name);
    }

    /// Adds output tokens of a text that begins at `start` characters.
    pub(crate) fn extend(&mut self, tokenizer: &Tokenizer, tokens: &[OutputToken], start: usize) {
        for token in tokens {
            if token.logprobs.is_some() {
                self.push(tokenizer, token.id, start + token.offset, token.logprobs.as_ref());
            }
        }
    }
}

/// JSON has no infinity; vLLM writes this instead.
const fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
