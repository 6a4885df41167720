//! Text to token ids and back.
//!
//! The library knows tokens as strings; clients want bytes, because a token may be a part of a character. How the
//! bytes are written in a vocabulary depends on the decoder, so that is found out once, here.

mod gguf;
mod stop_text;
mod text_decoder;

use tidemill_engine_core::request::TokenId;

pub(crate) use gguf::{tokenizer_config, tokenizer_json};
pub(crate) use stop_text::{Found, StopText};
pub(crate) use text_decoder::TextDecoder;

/// A model's tokenizer. Encoding never truncates or pads, whatever its file says.
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    spelling: Spelling,
    vocab_size: u32,
}

/// How a vocabulary writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// One printable character for each byte, as GPT-2 began and Llama 3 and Qwen do; tokens may split characters.
    ByteLevel,
    /// Text with `▁` for a space, and `<0xNN>` for bytes that have no token, as SentencePiece does.
    Pieces,
}

/// The text of a single token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenText {
    /// Readable, and different for different tokens: bytes that are no text are written `bytes:\xe2\x82`.
    pub(crate) text: String,
    /// What the token adds to an answer.
    pub(crate) bytes: Vec<u8>,
}

/// A tokenizer could not be had, or could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenizerError {
    /// `tokenizer.json` is not one.
    #[error("tokenizer.json cannot be read: {0}")]
    Load(tokenizers::Error),
    /// The library refused a text.
    #[error("the text cannot be encoded: {0}")]
    Encode(tokenizers::Error),
    /// The library refused token ids.
    #[error("the tokens cannot be decoded: {0}")]
    Decode(tokenizers::Error),
}

impl Tokenizer {
    /// Reads the content of a `tokenizer.json`.
    pub(crate) fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(TokenizerError::Load)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(TokenizerError::Load)?;
        let last = inner.get_vocab(true).into_values().max();
        let vocab_size = last.map_or(0, |last| last + 1);
        let spelling = spelling(&inner);
        Ok(Self { inner, spelling, vocab_size })
    }

    /// The tokens of `text`. `add_special_tokens` adds what the model expects around a text, often a beginning-of-text
    /// token; a chat template has written it already.
    pub(crate) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(TokenizerError::Encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of all of `ids` at once.
    pub(crate) fn decode(
        &self,
        ids: &[TokenId],
        skip_special_tokens: bool,
    ) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special_tokens).map_err(TokenizerError::Decode)
    }

    /// One more than the largest token id.
    pub(crate) const fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// The id of a token by its name in the vocabulary.
    pub(crate) fn id_of(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token)
    }

    /// The name of a token in the vocabulary.
    pub(crate) fn name_of(&self, id: TokenId) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The first id that does not stand for the same token of the vocabulary in both.
    pub(crate) fn first_difference(&self, other: &Self) -> Option<TokenId> {
        (0..self.vocab_size.max(other.vocab_size)).find(|id| self.name_of(*id) != other.name_of(*id))
    }

    /// The text of one token; empty for an id without a token.
    pub(crate) fn token_text(&self, id: TokenId) -> TokenText {
        let bytes = self.token_bytes(id);
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
        };
        TokenText { text, bytes }
    }

    fn is_special(&self, id: TokenId) -> bool {
        let added = self.inner.get_added_vocabulary();
        added.simple_id_to_token(id).is_some_and(|token| added.is_special_token(&token))
    }

    fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        let Some(name) = self.inner.id_to_token(id) else { return Vec::new() };
        match self.spelling {
            Spelling::ByteLevel => byte_level_bytes(&name),
            Spelling::Pieces => match fallback_byte(&name) {
                Some(byte) => vec![byte],
                None => name.replace('▁', " ").into_bytes(),
            },
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { spelling, vocab_size, .. } = self;
        f.debug_struct("Tokenizer")
            .field("spelling", spelling)
            .field("vocab_size", vocab_size)
            .finish_non_exhaustive()
    }
}

/// Byte-level only when nothing else touches the text, since only then may the bytes be joined without the library.
fn spelling(tokenizer: &tokenizers::Tokenizer) -> Spelling {
    use tokenizers::DecoderWrapper;
    fn byte_level(decoder: &DecoderWrapper) -> bool {
        match decoder {
            DecoderWrapper::ByteLevel(_) => true,
            DecoderWrapper::Sequence(sequence) => {
                matches!(sequence.get_decoders(), [only] if byte_level(only))
            }
            _ => false,
        }
    }
    if tokenizer.get_decoder().is_some_and(byte_level) { Spelling::ByteLevel } else { Spelling::Pieces }
}

/// The bytes of a byte-level token; an added token that is not written that way stands for itself.
fn byte_level_bytes(name: &str) -> Vec<u8> {
    name.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| name.as_bytes().to_vec())
}

/// The byte that a character stands for: printable Latin-1 characters stand for themselves, the other 68 bytes are
/// written as U+0100 and following, in order.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The byte of a token such as `<0x0A>`.
fn fallback_byte(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
pub(crate) mod tests;
