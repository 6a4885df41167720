//! A request as every part of the engine sees it: token ids, how to sample, when to stop, and which part of the
//! work is done here.

use tidemill_kvtransfer_proto::units::{HandoffId, TokenCount};

/// Names a request for its whole life; unique within a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// An index into the vocabulary.
pub type TokenId = u32;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// The prompt, then the output tokens so far when the request is replayed after a failure.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are prompt. At least one, at most `tokens.len()`.
    pub prompt_len: TokenCount,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// When to end.
    pub stop: StopConditions,
    /// Which part of the work is done on this worker.
    pub part: Part,
}

/// Which part of a request a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Prefill and decode.
    Whole,
    /// Prefill and the first token; the KV cache goes to another worker.
    PrefillFor(HandoffId),
    /// Everything after the first token; the KV cache comes from another worker.
    DecodeFrom(HandoffId),
}

/// How a token is chosen from logits. Fields mean what they mean in the OpenAI API and in vLLM.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; zero means greedy.
    pub temperature: f32,
    /// Keeps the most likely tokens whose probabilities add up to this; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the most likely tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// Drops tokens less likely than this share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that occur in the output.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// The draw for the token at position `p` is a function of `(seed, p)` alone, so that neither the batch, nor
    /// preemption, nor a replay on another worker changes it.
    pub seed: u64,
    /// Log-probabilities to report for each output token: `None` for none, otherwise the number of alternatives.
    pub logprobs: Option<u32>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<u32>,
}

/// When a request ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopConditions {
    /// Output tokens at most. At least one.
    pub max_tokens: u32,
    /// Output tokens before any stop token may be chosen.
    pub min_tokens: u32,
    /// Tokens that end the text.
    pub stop_token_ids: Vec<TokenId>,
    /// The model's own end-of-sequence tokens.
    pub eos_token_ids: Vec<TokenId>,
    /// Whether end-of-sequence tokens are treated as any other token.
    pub ignore_eos: bool,
}

/// Why a request ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token, or the stop token named.
    Stop(Option<TokenId>),
    /// `max_tokens` or the model's length limit.
    Length,
}

/// Log-probabilities of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// Rank of the chosen token, 1 for the most likely.
    pub rank: u32,
    /// The most likely tokens, most likely first.
    pub top: Vec<(TokenId, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl StopConditions {
    /// Ends after `max_tokens` and nowhere else.
    pub const fn after(max_tokens: u32) -> Self {
        Self {
            max_tokens,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            eos_token_ids: Vec::new(),
            ignore_eos: true,
        }
    }

    /// Whether `token`, as output number `index` (from 0), ends the request.
    pub fn reason(&self, token: TokenId, index: u32) -> Option<FinishReason> {
        let may_stop = self.min_tokens <= index + 1;
        if may_stop && !self.ignore_eos && self.eos_token_ids.contains(&token) {
            return Some(FinishReason::Stop(None));
        }
        if may_stop && self.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop(Some(token)));
        }
        (self.max_tokens <= index + 1).then_some(FinishReason::Length)
    }
}
