//! A running sequence: the events of its stream become pieces of its answer.

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::future::try_join_all;
use tidemill_engine_core::request::{Logprobs, StopConditions, TokenId};

use super::App;
use super::answer::{Answer, Finish, OutputToken, Piece};
use super::error::ApiError;
use super::generator::{EventStream, Started};
use super::sampling::Wish;
use crate::generation::{Generation, GenerationError, GenerationEvent};
use crate::metrics::{Outcome, RequestRecord};

/// One sequence. Dropping it cancels what is not finished.
pub(crate) struct Sequence {
    /// Which of the request's choices this is.
    pub(crate) index: u32,
    answer: Answer,
    /// `None` once the answer ended: a stop string is found here, so the workers must be told by the drop.
    events: Option<EventStream>,
    record: RequestRecord,
    prompt_logprobs: Option<Vec<Logprobs>>,
}

/// A sequence that is over.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The whole text.
    pub(crate) text: String,
    /// All tokens.
    pub(crate) tokens: Vec<OutputToken>,
    /// How it ended.
    pub(crate) finish: Finish,
    /// Output tokens.
    pub(crate) count: u32,
    /// Log-probabilities of the prompt's tokens but the first, when asked for.
    pub(crate) prompt_logprobs: Option<Vec<Logprobs>>,
}

/// Starts `wish.n` sequences for each prompt, all at the same time: index `p * n + i` is answer `i` to prompt `p`.
///
/// The tokens at most are the wish's, or else `default_max_tokens` as far as the context reaches.
pub(crate) async fn start(
    app: &Arc<App>,
    wish: &Wish,
    prompts: &[Vec<TokenId>],
    default_max_tokens: Option<u32>,
    limits: ContextLimits,
    arrived: Instant,
) -> Result<Vec<Sequence>, ApiError> {
    let mut starts = Vec::new();
    for (number, prompt) in prompts.iter().enumerate() {
        let max_tokens = limits.max_tokens(prompt.len(), wish.max_tokens, default_max_tokens)?;
        let number = u32::try_from(number).expect("admission bounds prompts");
        starts.extend(
            (0..wish.n).map(|answer| start_one(app, wish, prompt, (number, answer), max_tokens, arrived)),
        );
    }
    app.metrics.record_choices(wish.n);
    Ok(try_join_all(starts).await?)
}

async fn start_one(
    app: &Arc<App>,
    wish: &Wish,
    prompt: &[TokenId],
    (prompt_number, answer): (u32, u32),
    max_tokens: u32,
    arrived: Instant,
) -> Result<Sequence, GenerationError> {
    let stop = StopConditions {
        max_tokens,
        min_tokens: wish.min_tokens.min(max_tokens),
        stop_token_ids: wish.stop_token_ids.clone(),
        eos_token_ids: app.text.eos_token_ids.clone(),
        ignore_eos: wish.ignore_eos,
    };
    let mut sampling = wish.sampling.clone();
    sampling.seed = sampling.seed.wrapping_add(u64::from(answer));
    let generation = Generation { prompt: prompt.to_vec(), sampling, stop: stop.clone() };
    let prompt_tokens = u32::try_from(prompt.len()).expect("within the context");
    let Started { begun, events } = app.generator.generate(generation).await?;
    Ok(Sequence {
        index: prompt_number * wish.n + answer,
        answer: Answer::new(
            Arc::clone(&app.text.tokenizer),
            wish.skip_special_tokens,
            wish.stop_strings.clone(),
            wish.include_stop,
            stop,
        ),
        events: Some(events),
        record: app.metrics.follow(arrived, begun, prompt_tokens, max_tokens),
        prompt_logprobs: None,
    })
}

/// How long prompt and answer may be together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ContextLimits {
    /// Tokens of both.
    pub(crate) max_model_len: u32,
    /// The field that holds the prompt.
    pub(crate) prompt_param: &'static str,
}

impl ContextLimits {
    /// The tokens that an answer may have at most.
    pub(crate) fn max_tokens(
        self,
        prompt_len: usize,
        wanted: Option<u32>,
        default: Option<u32>,
    ) -> Result<u32, ApiError> {
        let exceeded = |message| ApiError::Invalid {
            message,
            param: Some(self.prompt_param.to_owned()),
            code: Some("context_length_exceeded"),
        };
        let limit = self.max_model_len;
        let room = u32::try_from(prompt_len)
            .ok()
            .and_then(|length| limit.checked_sub(length))
            .filter(|&room| 0 < room);
        let Some(room) = room else {
            return Err(exceeded(format!(
                "This model's maximum context length is {limit} tokens. However, your {} resulted in {prompt_len} \
                 tokens, which leaves no room for an answer.",
                self.prompt_param
            )));
        };
        match wanted {
            Some(wanted) if room < wanted => Err(exceeded(format!(
                "This model's maximum context length is {limit} tokens. However, you requested {} tokens \
                 ({prompt_len} in the {}, {wanted} in the completion). Please reduce one of them.",
                prompt_len as u64 + u64::from(wanted),
                self.prompt_param
            ))),
            Some(wanted) => Ok(wanted),
            None => Ok(default.map_or(room, |default| default.min(room))),
        }
    }
}

impl Sequence {
    /// Waits for the next piece; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, GenerationError>> {
        loop {
            let Some(event) = self.events.as_mut()?.next().await else {
                let error =
                    GenerationError::Internal("the workers' stream ended before the answer".to_owned());
                return Some(Err(self.failed(error)));
            };
            let piece = match event {
                GenerationEvent::PromptLogprobs(logprobs) => {
                    self.prompt_logprobs = Some(logprobs);
                    None
                }
                GenerationEvent::Token { id, logprobs } => {
                    self.record.token();
                    self.answer.token(id, logprobs)
                }
                GenerationEvent::Finished { reason, cached_tokens } => {
                    Some(self.answer.finish(reason, cached_tokens))
                }
                GenerationEvent::Failed(error) => return Some(Err(self.failed(error))),
            };
            if let Some(piece) = piece {
                if let Some(finish) = &piece.finish {
                    self.record.finished(if finish.length { Outcome::Length } else { Outcome::Stop });
                    self.events = None;
                }
                return Some(Ok(piece));
            }
        }
    }

    /// Waits for the end.
    pub(crate) async fn finished(mut self) -> Result<Finished, GenerationError> {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        while let Some(piece) = self.next().await {
            let piece = piece?;
            text.push_str(&piece.text);
            tokens.extend(piece.tokens);
            if let Some(finish) = piece.finish {
                let count = self.answer.count();
                return Ok(Finished {
                    text,
                    tokens,
                    finish,
                    count,
                    prompt_logprobs: self.prompt_logprobs.take(),
                });
            }
        }
        Err(GenerationError::Internal("an answer ended without a reason".to_owned()))
    }

    /// Output tokens so far.
    pub(crate) const fn count(&self) -> u32 {
        self.answer.count()
    }

    /// Log-probabilities of the prompt, once they came.
    pub(crate) fn take_prompt_logprobs(&mut self) -> Option<Vec<Logprobs>> {
        self.prompt_logprobs.take()
    }

    fn failed(&mut self, error: GenerationError) -> GenerationError {
        tracing::warn!(%error, "a generation failed");
        self.record.finished(Outcome::Error);
        self.events = None;
        error
    }
}

impl Finish {
    /// The API's word for it.
    pub(crate) const fn reason(&self) -> &'static str {
        if self.length { "length" } else { "stop" }
    }
}
