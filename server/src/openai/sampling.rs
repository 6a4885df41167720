//! Checks the fields that chat and plain completions share, and makes of them what the engine understands.
//!
//! Where a request is silent the model's `generation_config.json` speaks, then the engine's own defaults. A request
//! without a seed gets a random one here, because nothing below this crate draws a random number of its own.

use std::fmt::Display;

use serde_json::{Map, Value};
use tidemill_engine_core::request::{SamplingParams, TokenId};

use super::error::ApiError;
use super::model_text::GenerationDefaults;
use super::request::{OneOrMany, SharedFields};

/// What a client wants of its answers, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wish {
    /// How tokens are chosen in the first answer; further ones differ in their seed.
    pub(crate) sampling: SamplingParams,
    /// Texts that end an answer.
    pub(crate) stop_strings: Vec<String>,
    /// Whether what ended an answer is part of it.
    pub(crate) include_stop: bool,
    /// Tokens that end an answer, besides the model's own.
    pub(crate) stop_token_ids: Vec<TokenId>,
    /// Whether the model's own are treated as any other token.
    pub(crate) ignore_eos: bool,
    /// Tokens before an answer may end.
    pub(crate) min_tokens: u32,
    /// Tokens at most; `None` for the endpoint's default.
    pub(crate) max_tokens: Option<u32>,
    /// Answers for each prompt.
    pub(crate) n: u32,
    /// Whether special tokens are left out of the text.
    pub(crate) skip_special_tokens: bool,
    /// How the answers are sent.
    pub(crate) delivery: Delivery,
}

/// How answers are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// All at once.
    Whole,
    /// In pieces, as they arise.
    Stream(UsageReports),
}

/// Which pieces of a stream say how many tokens were used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UsageReports {
    /// None.
    Never,
    /// One piece at the end.
    AtEnd,
    /// Each piece, and one at the end.
    Continuous,
}

impl Wish {
    /// Checks `fields`; `body` is the whole request, for fields that mean something elsewhere but cannot be done here.
    pub(crate) fn new(
        fields: SharedFields,
        body: &Map<String, Value>,
        defaults: &GenerationDefaults,
        vocab_size: u32,
    ) -> Result<Self, ApiError> {
        refuse_unsupported(body)?;
        if let Some(format) = &fields.response_format
            && format.r#type != "text"
        {
            let message = format!("response_format '{}' is not supported, only 'text'.", format.r#type);
            return Err(ApiError::unsupported("response_format", message));
        }
        let delivery = delivery(&fields)?;
        let sampling = sampling(&fields, defaults, vocab_size)?;
        let max_tokens = fields.max_completion_tokens.map(|value| ("max_completion_tokens", value));
        let max_tokens = match max_tokens.or(fields.max_tokens.map(|value| ("max_tokens", value))) {
            Some((param, value)) => Some(within(param, value, 0, i64::from(u32::MAX))?),
            None => None,
        };
        let min_tokens = within("min_tokens", fields.min_tokens.unwrap_or(0), 0, i64::from(u32::MAX))?;
        if max_tokens.is_some_and(|max_tokens| max_tokens < min_tokens) {
            return Err(ApiError::invalid("min_tokens", "min_tokens must not be greater than max_tokens."));
        }
        if matches!(delivery, Delivery::Stream(_)) && sampling.prompt_logprobs.is_some() {
            let message = "prompt_logprobs are not available while streaming.";
            return Err(ApiError::unsupported("prompt_logprobs", message));
        }
        let stop_token_ids = fields.stop_token_ids.unwrap_or_default();
        at_most("stop_token_ids", stop_token_ids.len(), MAX_STOP_TOKENS)?;
        Ok(Self {
            sampling,
            stop_strings: stop_strings(fields.stop)?,
            include_stop: fields.include_stop_str_in_output.unwrap_or(false),
            stop_token_ids,
            ignore_eos: fields.ignore_eos.unwrap_or(false),
            min_tokens,
            max_tokens,
            n: within("n", fields.n.unwrap_or(1), 1, i64::from(MAX_ANSWERS))?,
            skip_special_tokens: fields.skip_special_tokens.unwrap_or(true),
            delivery,
        })
    }
}

/// Checks a whole number against its range.
pub(crate) fn within(param: &str, value: i64, low: i64, high: i64) -> Result<u32, ApiError> {
    if value < low {
        return Err(out_of_range(param, value, "less than the minimum of", low));
    }
    if high < value {
        return Err(out_of_range(param, value, "greater than the maximum of", high));
    }
    Ok(u32::try_from(value).expect("all ranges lie within u32"))
}

/// Checks the length of a list.
pub(crate) fn at_most(param: &str, length: usize, most: usize) -> Result<(), ApiError> {
    if most < length {
        let message =
            format!("Invalid '{param}': the list is too long, {length} entries with a maximum of {most}.");
        return Err(ApiError::invalid(param, message));
    }
    Ok(())
}

fn out_of_range(param: &str, value: impl Display, relation: &str, limit: impl Display) -> ApiError {
    ApiError::invalid(param, format!("Invalid '{param}': {value} is {relation} {limit}."))
}

fn delivery(fields: &SharedFields) -> Result<Delivery, ApiError> {
    let stream = fields.stream.unwrap_or(false);
    let Some(options) = fields.stream_options else {
        return Ok(if stream { Delivery::Stream(UsageReports::Never) } else { Delivery::Whole });
    };
    if !stream {
        let message = "stream_options is only allowed when stream is true.";
        return Err(ApiError::invalid("stream_options", message));
    }
    let usage =
        match (options.include_usage.unwrap_or(false), options.continuous_usage_stats.unwrap_or(false)) {
            (true, true) => UsageReports::Continuous,
            (true, false) => UsageReports::AtEnd,
            (false, _) => UsageReports::Never,
        };
    Ok(Delivery::Stream(usage))
}

fn sampling(
    fields: &SharedFields,
    defaults: &GenerationDefaults,
    vocab_size: u32,
) -> Result<SamplingParams, ApiError> {
    let engine = SamplingParams::default();
    let number = |param: &str, value: Option<f64>, default: f32, low: f64, high: f64| {
        let Some(value) = value else { return Ok(default) };
        if value < low {
            return Err(out_of_range(param, value, "less than the minimum of", low));
        }
        if high < value {
            return Err(out_of_range(param, value, "greater than the maximum of", high));
        }
        Ok(value as f32)
    };
    let f = fields;
    let repetition_penalty = f.repetition_penalty.or(defaults.repetition_penalty);
    if repetition_penalty == Some(0.0) {
        return Err(ApiError::invalid(
            "repetition_penalty",
            "Invalid 'repetition_penalty': it must be positive.",
        ));
    }
    let top_p = number("top_p", f.top_p.or(defaults.top_p), engine.top_p, 0.0, 1.0)?;
    Ok(SamplingParams {
        temperature: number(
            "temperature",
            f.temperature.or(defaults.temperature),
            engine.temperature,
            0.0,
            2.0,
        )?,
        // Zero keeps the most likely token alone, as the least positive number does.
        top_p: top_p.max(f32::MIN_POSITIVE),
        top_k: top_k(f.top_k.or(defaults.top_k))?,
        min_p: number("min_p", f.min_p.or(defaults.min_p), engine.min_p, 0.0, 1.0)?,
        repetition_penalty: number(
            "repetition_penalty",
            repetition_penalty,
            engine.repetition_penalty,
            0.0,
            100.0,
        )?,
        presence_penalty: number("presence_penalty", f.presence_penalty, engine.presence_penalty, -2.0, 2.0)?,
        frequency_penalty: number(
            "frequency_penalty",
            f.frequency_penalty,
            engine.frequency_penalty,
            -2.0,
            2.0,
        )?,
        logit_bias: logit_bias(f, vocab_size)?,
        seed: f.seed.map_or_else(rand::random, i64::cast_unsigned),
        logprobs: None,
        prompt_logprobs: match f.prompt_logprobs {
            Some(count) => Some(within("prompt_logprobs", count, 0, MAX_LOGPROBS)?),
            None => None,
        },
    })
}

/// Zero and minus one both mean all, for different clients.
fn top_k(value: Option<i64>) -> Result<Option<u32>, ApiError> {
    match value {
        None | Some(0 | -1) => Ok(None),
        Some(value) => within("top_k", value, -1, i64::from(u32::MAX)).map(Some),
    }
}

fn logit_bias(fields: &SharedFields, vocab_size: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(biases) = &fields.logit_bias else { return Ok(Vec::new()) };
    at_most("logit_bias", biases.len(), MAX_BIASES)?;
    let mut checked = Vec::with_capacity(biases.len());
    for (token, bias) in biases {
        let id = token.parse::<TokenId>().ok().filter(|id| *id < vocab_size).ok_or_else(|| {
            ApiError::invalid(
                "logit_bias",
                format!("Invalid key in 'logit_bias': {token} is not a token id of this model."),
            )
        })?;
        if !(-100.0..=100.0).contains(bias) {
            let message =
                format!("Invalid value in 'logit_bias': {bias} for token {id} is not between -100 and 100.");
            return Err(ApiError::invalid("logit_bias", message));
        }
        checked.push((id, *bias as f32));
    }
    checked.sort_unstable_by_key(|(id, _)| *id);
    Ok(checked)
}

fn stop_strings(stop: Option<OneOrMany<String>>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stops)) => stops,
    };
    at_most("stop", stops.len(), MAX_STOP_STRINGS)?;
    for stop in &stops {
        if stop.is_empty() {
            return Err(ApiError::invalid("stop", "Invalid 'stop': a stop string must not be empty."));
        }
        if MAX_STOP_BYTES < stop.len() {
            let message = format!("Invalid 'stop': a stop string is longer than {MAX_STOP_BYTES} bytes.");
            return Err(ApiError::invalid("stop", message));
        }
    }
    Ok(stops)
}

/// Refuses fields that would change the answer and that this server cannot honour. Unknown fields are ignored, but
/// ignoring these would be a wrong answer without a word.
fn refuse_unsupported(body: &Map<String, Value>) -> Result<(), ApiError> {
    for field in UNSUPPORTED {
        let idle = match body.get(*field) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::String(text)) => text.is_empty(),
            Some(_) => false,
        };
        if !idle {
            return Err(ApiError::unsupported(field, format!("{field} is not supported.")));
        }
    }
    let best_of = body.get("best_of").and_then(Value::as_i64);
    if best_of.is_some_and(|best_of| best_of != body.get("n").and_then(Value::as_i64).unwrap_or(1)) {
        return Err(ApiError::unsupported("best_of", "best_of other than n is not supported."));
    }
    Ok(())
}

const UNSUPPORTED: &[&str] = &[
    "allowed_token_ids",
    "audio",
    "bad_words",
    "chat_template",
    "continue_final_message",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "logits_processors",
    "prompt_embeds",
    "structured_outputs",
    "suffix",
    "truncate_prompt_tokens",
    "use_beam_search",
];

/// Answers to one prompt, at most.
const MAX_ANSWERS: u32 = 128;
/// Alternatives in log-probabilities, at most.
pub(crate) const MAX_LOGPROBS: i64 = 20;
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STOP_TOKENS: usize = 256;
const MAX_BIASES: usize = 1024;
