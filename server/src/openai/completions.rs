//! `/v1/completions`.
//!
//! `echo` with `max_tokens: 0` is how evaluation harnesses ask for the log-probabilities of a text. The engine has no
//! request without an answer, so one token is made and left out.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use serde_json::{Value, json};
use tidemill_engine_core::request::{Logprobs, TokenId};

use super::App;
use super::answer::{Finish, OutputToken};
use super::body::Fields;
use super::error::ApiError;
use super::request::{CompletionFields, Prompt, SharedFields};
use super::response::{CompletionLogprobs, Envelope, Usage, prompt_logprobs, stop_reason};
use super::sampling::{Delivery, MAX_LOGPROBS, UsageReports, Wish, at_most, within};
use super::sequence::{self, ContextLimits, Finished, Sequence};
use super::stream::{self, Chunks, Told};
use crate::tokenizer::TextDecoder;

/// Continues one or several prompts.
pub(crate) async fn complete(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = Fields::read(request, app.config.body).await?;
    let shared: SharedFields = body.get()?;
    let fields: CompletionFields = body.get()?;
    let model = app.check_model(shared.model.as_deref())?;
    let add_special_tokens = shared.add_special_tokens.unwrap_or(true);
    let mut wish = Wish::new(shared, body.as_map(), &app.text.defaults, app.text.tokenizer.vocab_size())?;
    drop(body);
    let wanted = wanted(&fields, &mut wish)?;
    at_most("prompt", fields.prompt.0.len(), MAX_PROMPTS)?;
    let max_model_len = app.max_model_len()?;
    let sequences = u32::try_from(fields.prompt.0.len()).expect("bounded above").saturating_mul(wish.n);
    let permit = app.admit(sequences)?;
    let mut prompts = Vec::with_capacity(fields.prompt.0.len());
    for prompt in fields.prompt.0 {
        prompts.push(
            PromptText::new(&app, prompt, add_special_tokens, wish.skip_special_tokens, wanted.echo).await?,
        );
    }
    let tokens: Vec<Vec<TokenId>> = prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
    let limits = ContextLimits { max_model_len, prompt_param: "prompt" };
    let sequences = sequence::start(&app, &wish, &tokens, Some(DEFAULT_MAX_TOKENS), limits, arrived).await?;
    let envelope = Envelope::new("cmpl", model);
    let answers = Answers { envelope, prompts, wanted, n: wish.n, app: Arc::clone(&app) };
    match wish.delivery {
        Delivery::Whole => {
            let finished = try_join_all(sequences.into_iter().map(Sequence::finished)).await?;
            drop(permit);
            Ok(Json(answers.whole(&finished)).into_response())
        }
        Delivery::Stream(usage) => {
            let begun = vec![false; sequences.len()];
            let counts = vec![(0, None); sequences.len()];
            let chunks = CompletionChunks { answers, usage, begun, counts };
            Ok(stream::respond(sequences, chunks, permit))
        }
    }
}

/// What to tell besides the continuation.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    logprobs: bool,
    echo: bool,
    prompt_logprobs: bool,
    /// Whether the continuation itself is left out.
    echo_alone: bool,
}

/// Sets what the endpoint's own fields mean for the engine.
fn wanted(fields: &CompletionFields, wish: &mut Wish) -> Result<Wanted, ApiError> {
    let echo = fields.echo.unwrap_or(false);
    let echo_alone = wish.max_tokens == Some(0);
    if echo_alone && !echo {
        let message = "Invalid 'max_tokens': 0 is less than the minimum of 1, unless echo is true.";
        return Err(ApiError::invalid("max_tokens", message));
    }
    if echo_alone {
        wish.max_tokens = Some(1);
    }
    let prompt_logprobs = wish.sampling.prompt_logprobs.is_some();
    wish.sampling.logprobs = match fields.logprobs {
        Some(count) => Some(within("logprobs", count, 0, MAX_LOGPROBS)?),
        None => None,
    };
    if echo && wish.sampling.logprobs.is_some() {
        wish.sampling.prompt_logprobs = wish.sampling.prompt_logprobs.max(wish.sampling.logprobs);
    }
    Ok(Wanted { logprobs: wish.sampling.logprobs.is_some(), echo, prompt_logprobs, echo_alone })
}

/// A prompt in both forms.
struct PromptText {
    tokens: Vec<TokenId>,
    /// Its text when it is echoed, otherwise empty.
    text: String,
}

impl PromptText {
    async fn new(
        app: &Arc<App>,
        prompt: Prompt,
        add_special_tokens: bool,
        skip_special_tokens: bool,
        echo: bool,
    ) -> Result<Self, ApiError> {
        let (tokens, text) = match prompt {
            Prompt::Text(text) => {
                let echoed = if echo { text.clone() } else { String::new() };
                (app.encode(text, add_special_tokens).await?, echoed)
            }
            Prompt::Tokens(tokens) => {
                app.check_tokens("prompt", &tokens)?;
                let text = if echo { app.decode(&tokens, skip_special_tokens)? } else { String::new() };
                (tokens, text)
            }
        };
        if tokens.is_empty() {
            return Err(ApiError::invalid("prompt", "Invalid 'prompt': it has no tokens."));
        }
        Ok(Self { tokens, text })
    }
}

/// Writes the answers to all prompts.
struct Answers {
    envelope: Envelope,
    prompts: Vec<PromptText>,
    wanted: Wanted,
    n: u32,
    app: Arc<App>,
}

impl Answers {
    fn whole(&self, finished: &[Finished]) -> Value {
        let choices: Vec<Value> = (0..)
            .zip(finished)
            .map(|(index, answer)| {
                let (text, tokens) = self.continuation(&answer.text, &answer.tokens);
                let prompt = self.prompt(index);
                let logprobs = self.logprobs(prompt, true, answer.prompt_logprobs.as_deref(), tokens);
                let echoed = if self.wanted.echo { prompt.text.as_str() } else { "" };
                let mut choice =
                    self.choice(index, &format!("{echoed}{text}"), &logprobs, Some(&answer.finish));
                if let (true, Some(logprobs)) = (self.wanted.prompt_logprobs, &answer.prompt_logprobs) {
                    let tokenizer = &self.app.text.tokenizer;
                    choice["prompt_logprobs"] = prompt_logprobs(tokenizer, &prompt.tokens, logprobs);
                }
                choice
            })
            .collect();
        let counts: Vec<u32> = finished.iter().map(|answer| answer.count).collect();
        let first_answers = finished.iter().step_by(self.n as usize);
        let cached_tokens = first_answers.map(|answer| answer.finish.cached_tokens).sum();
        let mut response = self.chunk(&Value::Array(choices));
        response["usage"] = json!(self.usage(&counts, cached_tokens));
        response
    }

    fn chunk(&self, choices: &Value) -> Value {
        let Envelope { id, created, model } = &self.envelope;
        json!({
            "id": id,
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": null,
            "choices": choices,
        })
    }

    fn choice(&self, index: u32, text: &str, logprobs: &Value, finish: Option<&Finish>) -> Value {
        let reason = match finish {
            // The one token that nobody asked for has no say in how the text ended.
            Some(_) if self.wanted.echo_alone => Some("length"),
            finish => finish.map(Finish::reason),
        };
        let mut choice = json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason});
        if let Some(finish) = finish {
            choice["stop_reason"] = if self.wanted.echo_alone { Value::Null } else { stop_reason(finish) };
        }
        choice
    }

    /// Log-probabilities of the echoed prompt, where `begins`, and of `tokens`.
    fn logprobs(
        &self,
        prompt: &PromptText,
        begins: bool,
        of_prompt: Option<&[Logprobs]>,
        tokens: &[OutputToken],
    ) -> Value {
        if !self.wanted.logprobs {
            return Value::Null;
        }
        let tokenizer = &self.app.text.tokenizer;
        let mut logprobs = CompletionLogprobs::default();
        if self.wanted.echo && begins {
            let known = std::iter::once(None).chain(of_prompt.unwrap_or_default().iter().map(Some));
            let mut decoder = TextDecoder::new(Arc::clone(tokenizer), true);
            let mut offset = 0;
            for (&id, known) in prompt.tokens.iter().zip(known) {
                logprobs.push(tokenizer, id, offset, known);
                offset += decoder.push(id).chars().count();
            }
        }
        logprobs.extend(tokenizer, tokens, prompt.text.chars().count());
        json!(logprobs)
    }

    /// The continuation, unless it is left out.
    fn continuation<'a>(&self, text: &'a str, tokens: &'a [OutputToken]) -> (&'a str, &'a [OutputToken]) {
        if self.wanted.echo_alone { ("", &[]) } else { (text, tokens) }
    }

    fn prompt(&self, index: u32) -> &PromptText {
        &self.prompts[(index / self.n) as usize]
    }

    fn usage(&self, counts: &[u32], cached_tokens: Option<u32>) -> Usage {
        let prompt_tokens: usize = self.prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
        let completion_tokens = if self.wanted.echo_alone { 0 } else { counts.iter().sum() };
        Usage::new(prompt_tokens, completion_tokens, cached_tokens)
    }
}

/// Writes the chunks of a stream.
struct CompletionChunks {
    answers: Answers,
    usage: UsageReports,
    /// Whether each choice has told something.
    begun: Vec<bool>,
    /// Output tokens of each choice, and its cached prompt tokens once it ended.
    counts: Vec<(u32, Option<u32>)>,
}

impl CompletionChunks {
    fn usage(&self) -> Usage {
        let counts: Vec<u32> = self.counts.iter().map(|(count, _)| *count).collect();
        let cached_tokens =
            self.counts.iter().step_by(self.answers.n as usize).map(|(_, cached)| *cached).sum();
        self.answers.usage(&counts, cached_tokens)
    }
}

impl Chunks for CompletionChunks {
    fn piece(&mut self, told: &Told) -> Vec<Value> {
        let (index, piece) = (told.index, &told.piece);
        let begins = !std::mem::replace(&mut self.begun[index as usize], true);
        let cached_tokens = piece.finish.as_ref().and_then(|finish| finish.cached_tokens);
        self.counts[index as usize] = (told.count, cached_tokens);
        let prompt = self.answers.prompt(index);
        let (text, tokens) = self.answers.continuation(&piece.text, &piece.tokens);
        let echoed = if self.answers.wanted.echo && begins { prompt.text.as_str() } else { "" };
        let logprobs = self.answers.logprobs(prompt, begins, told.prompt_logprobs.as_deref(), tokens);
        let choice = self.answers.choice(index, &format!("{echoed}{text}"), &logprobs, piece.finish.as_ref());
        let mut chunk = self.answers.chunk(&json!([choice]));
        match self.usage {
            UsageReports::Never => {}
            UsageReports::AtEnd => chunk["usage"] = Value::Null,
            UsageReports::Continuous => chunk["usage"] = json!(self.usage()),
        }
        vec![chunk]
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

/// Tokens at most where the request does not say: OpenAI's own default.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Prompts in one request.
const MAX_PROMPTS: usize = 128;
