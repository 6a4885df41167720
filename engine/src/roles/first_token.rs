//! What a commit says beside the KV cache: the first output token, and the log-probabilities asked for.
//!
//! The transfer layer carries it as opaque bytes. Decode reports all of it too, so that a client loses nothing when the
//! prefill worker dies right after its commit, and nothing comes before its turn. The draw of later tokens needs no
//! state: it is a function of the seed and the position.

use tidemill_engine_core::request::{Logprobs, TokenId};

/// The first output token of a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FirstToken {
    pub(crate) id: TokenId,
    pub(crate) logprobs: Option<Logprobs>,
    /// Of the prompt's tokens but the first; empty when not asked for.
    pub(crate) prompt_logprobs: Vec<Logprobs>,
    /// Prompt tokens that came from a prefix cache, for the usage report.
    pub(crate) cached_tokens: u32,
}

impl FirstToken {
    /// `version u8, id u32, cached u32, tokens, tokens`, little-endian, where `tokens` is `count u32, count × (chosen f32,
    /// rank u32, count u32, count × (id u32, f32))`: none or one for the token itself, then those of the prompt.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend(self.id.to_le_bytes());
        bytes.extend(self.cached_tokens.to_le_bytes());
        encode_logprobs(&mut bytes, self.logprobs.as_slice());
        encode_logprobs(&mut bytes, &self.prompt_logprobs);
        bytes
    }

    /// `None` when the bytes are not exactly what [`encode`](Self::encode) writes.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut bytes = Reader(bytes);
        if bytes.take::<1>()? != [VERSION] {
            return None;
        }
        let id = bytes.number()?;
        let cached_tokens = bytes.number()?;
        let mut logprobs = bytes.logprobs()?;
        let prompt_logprobs = bytes.logprobs()?;
        let is_whole = bytes.0.is_empty() && logprobs.len() <= 1;
        is_whole.then(|| Self { id, logprobs: logprobs.pop(), prompt_logprobs, cached_tokens })
    }
}

fn encode_logprobs(bytes: &mut Vec<u8>, tokens: &[Logprobs]) {
    let count =
        |length: usize| u32::try_from(length).expect("bounded by the vocabulary and the longest prompt");
    bytes.extend(count(tokens.len()).to_le_bytes());
    for Logprobs { chosen, rank, top } in tokens {
        bytes.extend(chosen.to_le_bytes());
        bytes.extend(rank.to_le_bytes());
        bytes.extend(count(top.len()).to_le_bytes());
        for (id, logprob) in top {
            bytes.extend(id.to_le_bytes());
            bytes.extend(logprob.to_le_bytes());
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    fn number(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn float(&mut self) -> Option<f32> {
        self.take().map(f32::from_le_bytes)
    }

    fn logprobs(&mut self) -> Option<Vec<Logprobs>> {
        let count = self.count(MIN_LOGPROBS_BYTES)?;
        let token = |_| {
            let (chosen, rank) = (self.float()?, self.number()?);
            let top = self.count(ALTERNATIVE_BYTES)?;
            let top = (0..top).map(|_| Some((self.number()?, self.float()?))).collect::<Option<_>>()?;
            Some(Logprobs { chosen, rank, top })
        };
        (0..count).map(token).collect()
    }

    /// A number of things of at least `bytes_each`: more than the rest can hold are refused before memory is taken.
    fn count(&mut self, bytes_each: usize) -> Option<usize> {
        let count = usize::try_from(self.number()?).ok()?;
        (count <= self.0.len() / bytes_each).then_some(count)
    }
}

const VERSION: u8 = 1;
const ALTERNATIVE_BYTES: usize = 8;
const MIN_LOGPROBS_BYTES: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_as_it_was_and_no_other_bytes_are_taken() {
        let logprobs = Logprobs { chosen: -0.5, rank: 2, top: vec![(7, -0.1), (3, -0.5)] };
        for first in [
            FirstToken { id: 9, logprobs: None, prompt_logprobs: Vec::new(), cached_tokens: 0 },
            FirstToken {
                id: u32::MAX,
                logprobs: Some(logprobs.clone()),
                prompt_logprobs: vec![logprobs; 3],
                cached_tokens: 48,
            },
        ] {
            let bytes = first.encode();
            assert_eq!(FirstToken::decode(&bytes), Some(first));
            for end in 0..bytes.len() {
                assert_eq!(FirstToken::decode(&bytes[..end]), None, "cut at {end}");
            }
            let longer = [bytes.as_slice(), &[0]].concat();
            assert_eq!(FirstToken::decode(&longer), None, "a byte too many");
        }
    }
}
