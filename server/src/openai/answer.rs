//! One answer as it grows: tokens in, pieces of text out.
//!
//! No clock, no stream: what a client sees of the same tokens is a function of the tokens. Tokens whose text is held
//! back, because a character or a stop string may be open, wait for the piece that has it.

use std::sync::Arc;

use tidemill_engine_core::request::{FinishReason, Logprobs, StopConditions, TokenId};

use crate::tokenizer::{Found, StopText, TextDecoder, Tokenizer};

/// The state of one answer.
#[derive(Debug)]
pub(crate) struct Answer {
    decoder: TextDecoder,
    stop_text: StopText,
    stop: StopConditions,
    include_stop: bool,
    /// Output tokens so far.
    count: u32,
    /// Characters of text so far, as far as they are decoded.
    decoded: usize,
    /// Tokens that wait for their text.
    waiting: Vec<OutputToken>,
}

/// What a client is told next.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Piece {
    /// More of the text.
    pub(crate) text: String,
    /// The tokens that led to it.
    pub(crate) tokens: Vec<OutputToken>,
    /// Why there is no more; nothing comes after it.
    pub(crate) finish: Option<Finish>,
}

/// One token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct OutputToken {
    /// The token.
    pub(crate) id: TokenId,
    /// Its log-probabilities, when asked for.
    pub(crate) logprobs: Option<Logprobs>,
    /// Characters of the answer before it.
    pub(crate) offset: usize,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finish {
    /// Whether the answer was cut off by its length.
    pub(crate) length: bool,
    /// What stopped it, unless that was the model's own end.
    pub(crate) stopped_by: Option<StoppedBy>,
    /// Prompt tokens from a prefix cache, where the workers said so.
    pub(crate) cached_tokens: Option<u32>,
}

/// What a client's own stop condition was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StoppedBy {
    /// A stop string.
    Text(String),
    /// A stop token.
    Token(TokenId),
}

impl Answer {
    /// An answer without a token yet. `stop` is what the workers were told.
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        skip_special_tokens: bool,
        stop_strings: Vec<String>,
        include_stop: bool,
        stop: StopConditions,
    ) -> Self {
        Self {
            decoder: TextDecoder::new(tokenizer, skip_special_tokens),
            stop_text: StopText::new(stop_strings, include_stop),
            stop,
            include_stop,
            count: 0,
            decoded: 0,
            waiting: Vec::new(),
        }
    }

    /// Output tokens so far.
    pub(crate) const fn count(&self) -> u32 {
        self.count
    }

    /// Adds a token. `None` when its text must wait; a piece with `finish` when a stop string is complete.
    pub(crate) fn token(&mut self, id: TokenId, logprobs: Option<Logprobs>) -> Option<Piece> {
        let may_stop = self.stop.min_tokens <= self.count + 1;
        let ends = matches!(self.stop.reason(id, self.count), Some(FinishReason::Stop(_)));
        self.count += 1;
        self.waiting.push(OutputToken { id, logprobs, offset: self.decoded });
        // The token that ends an answer is a sign and no text, unless the client wants to see it.
        let decoded = if ends && !self.include_stop { String::new() } else { self.decoder.push(id) };
        self.decoded += decoded.chars().count();
        if !may_stop {
            let text = self.stop_text.pass(&decoded);
            return self.piece(text);
        }
        match self.stop_text.push(&decoded) {
            Ok(text) => self.piece(text),
            Err(found) => Some(self.stopped(found, None)),
        }
    }

    /// Ends the answer as the workers did.
    pub(crate) fn finish(&mut self, reason: FinishReason, cached_tokens: u32) -> Piece {
        let rest = self.decoder.finish();
        let mut text = match self.stop_text.push(&rest) {
            Ok(text) => text,
            Err(found) => return self.stopped(found, Some(cached_tokens)),
        };
        text.push_str(&self.stop_text.finish());
        let (length, stopped_by) = match reason {
            FinishReason::Stop(token) => (false, token.map(StoppedBy::Token)),
            FinishReason::Length => (true, None),
        };
        let finish = Some(Finish { length, stopped_by, cached_tokens: Some(cached_tokens) });
        Piece { text, tokens: std::mem::take(&mut self.waiting), finish }
    }

    fn piece(&mut self, text: String) -> Option<Piece> {
        if text.is_empty() {
            return None;
        }
        Some(Piece { text, tokens: std::mem::take(&mut self.waiting), finish: None })
    }

    fn stopped(&mut self, found: Found, cached_tokens: Option<u32>) -> Piece {
        let finish = Finish { length: false, stopped_by: Some(StoppedBy::Text(found.stop)), cached_tokens };
        Piece { text: found.text, tokens: std::mem::take(&mut self.waiting), finish: Some(finish) }
    }
}
