//! Turns tokens into text as they arrive, without ever splitting a character.
//!
//! The pieces add up to what decoding all tokens at once gives. For byte-level vocabularies that is exact for any
//! tokens whatever: bytes are joined and text leaves as soon as it is whole. Other decoders look at neighbours (a
//! leading space is dropped at the start only, bytes are joined in runs), so a window of tokens is decoded twice,
//! without and with the new ones, and the difference is the new text.

use std::sync::Arc;

use tidemill_engine_core::request::TokenId;

use super::{Spelling, Tokenizer};

/// Decodes one sequence.
#[derive(Debug)]
pub(crate) struct TextDecoder {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Bytes that may begin a character: three at most.
    Bytes(Vec<u8>),
    Window(Window),
}

#[derive(Debug, Default)]
struct Window {
    /// Tokens of the last text that left, then tokens whose text is held back.
    ids: Vec<TokenId>,
    /// How many of `ids` are of the first kind.
    told: usize,
}

impl TextDecoder {
    /// A decoder at the start of a text.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let state = match tokenizer.spelling {
            Spelling::ByteLevel => State::Bytes(Vec::new()),
            Spelling::Pieces => State::Window(Window::default()),
        };
        Self { tokenizer, skip_special_tokens, state }
    }

    /// Adds a token and returns the text that is certain now, often that of the token.
    pub(crate) fn push(&mut self, id: TokenId) -> String {
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return String::new();
        }
        match &mut self.state {
            State::Bytes(pending) => {
                pending.extend(self.tokenizer.token_bytes(id));
                whole_characters(pending)
            }
            // Rows of an embedding that no token has would pile up in the window.
            State::Window(_) if self.tokenizer.name_of(id).is_none() => String::new(),
            State::Window(window) => window.push(&self.tokenizer, id),
        }
    }

    /// Ends the text: what is held back cannot become a character any more.
    pub(crate) fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes(pending) => String::from_utf8_lossy(&std::mem::take(pending)).into_owned(),
            State::Window(window) => window.finish(&self.tokenizer),
        }
    }
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> String {
        self.ids.push(id);
        let new = self.new_text(tokenizer);
        let held = self.ids.len() - self.told;
        if new.is_empty() {
            // A space that is dropped at the start. It stays, because the next token is no longer the first.
            self.told = self.ids.len();
            return new;
        }
        // A character has four bytes at most, so what four tokens leave open is no character.
        if new.ends_with(char::REPLACEMENT_CHARACTER) && held < LONGEST_CHARACTER {
            return String::new();
        }
        self.ids.drain(..self.told);
        self.told = self.ids.len();
        new
    }

    fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let new = self.new_text(tokenizer);
        self.ids.clear();
        self.told = 0;
        new
    }

    /// The text of the held tokens. Decoded alone where they change the text before them: that is the case when
    /// more bytes make a run invalid whose characters were told already.
    fn new_text(&self, tokenizer: &Tokenizer) -> String {
        let decode = |ids: &[TokenId]| tokenizer.decode(ids, false).unwrap_or_default();
        let all = decode(&self.ids);
        match all.strip_prefix(&decode(&self.ids[..self.told])) {
            Some(new) => new.to_owned(),
            None => decode(&self.ids[self.told..]),
        }
    }
}

/// Takes all text from the front of `bytes`, with a replacement character for each sequence that is no text, as
/// `String::from_utf8_lossy` does; leaves the beginning of a character.
fn whole_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(whole) => {
                text.push_str(whole);
                rest = &[];
                break;
            }
            Err(error) => {
                let (whole, after) = rest.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(whole).expect("valid up to here"));
                rest = after;
                let Some(wrong) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[wrong..];
            }
        }
    }
    *bytes = rest.to_vec();
    text
}

/// Bytes of the longest character.
const LONGEST_CHARACTER: usize = 4;
