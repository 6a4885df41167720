//! What a commit says beside the KV cache: the first output token, with its log-probabilities.
//!
//! The transfer layer carries it as opaque bytes. Decode reports the token too, so that a client loses nothing when the
//! prefill worker dies right after its commit. The draw of later tokens needs no state: it is a function of the seed and
//! the position.

use tidemill_engine_core::request::{Logprobs, TokenId};

/// The first output token of a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FirstToken {
    pub(crate) id: TokenId,
    pub(crate) logprobs: Option<Logprobs>,
    /// Prompt tokens that came from a prefix cache, for the usage report.
    pub(crate) cached_tokens: u32,
}

impl FirstToken {
    /// `version u8, id u32, cached u32, has_logprobs u8, [chosen f32, rank u32, count u32, count × (id u32, f32)]`,
    /// little-endian.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend(self.id.to_le_bytes());
        bytes.extend(self.cached_tokens.to_le_bytes());
        bytes.push(u8::from(self.logprobs.is_some()));
        if let Some(logprobs) = &self.logprobs {
            bytes.extend(logprobs.chosen.to_le_bytes());
            bytes.extend(logprobs.rank.to_le_bytes());
            let count =
                u32::try_from(logprobs.top.len()).expect("alternatives are bounded by the vocabulary");
            bytes.extend(count.to_le_bytes());
            for (id, logprob) in &logprobs.top {
                bytes.extend(id.to_le_bytes());
                bytes.extend(logprob.to_le_bytes());
            }
        }
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
        let logprobs = match bytes.take::<1>()? {
            [0] => None,
            [1] => {
                let chosen = bytes.float()?;
                let rank = bytes.number()?;
                let count = usize::try_from(bytes.number()?).ok()?;
                if bytes.0.len() != count.checked_mul(8)? {
                    return None;
                }
                let top =
                    (0..count).map(|_| Some((bytes.number()?, bytes.float()?))).collect::<Option<_>>()?;
                Some(Logprobs { chosen, rank, top })
            }
            _ => return None,
        };
        bytes.0.is_empty().then_some(Self { id, logprobs, cached_tokens })
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
}

const VERSION: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_as_it_was_and_no_other_bytes_are_taken() {
        let logprobs = Logprobs { chosen: -0.5, rank: 2, top: vec![(7, -0.1), (3, -0.5)] };
        for first in [
            FirstToken { id: 9, logprobs: None, cached_tokens: 0 },
            FirstToken { id: u32::MAX, logprobs: Some(logprobs), cached_tokens: 48 },
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
