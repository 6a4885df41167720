//! How [`Message`]s look on the wire: length-prefixed frames with a Protocol Buffers body.
//!
//! ```text
//! frame = "TK" | version: u16 | length: u32 | body        all little-endian
//! ```
//!
//! The body describes itself, so fields can be added and unknown ones are skipped. Lists of blocks are packed
//! fixed-width numbers: what decoding allocates is then at most a small multiple of what was received, whatever
//! a hostile peer sends.

mod wire;

use prost::Message as _;

use crate::message::{Message, PROTOCOL};

/// Turns received bytes into messages.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
}

/// Bytes that are no message. The connection they came from is of no further use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Not our protocol at all.
    #[error("frame does not start with the mark of this protocol")]
    Mark,
    /// Our protocol in another version.
    #[error("peer speaks protocol version {theirs}, this side {ours}")]
    Version {
        /// The peer's.
        theirs: u16,
        /// Ours.
        ours: u16,
    },
    /// Longer than any message may be.
    #[error("frame of {length} bytes, {MAX_FRAME} are allowed")]
    TooLong {
        /// Bytes of the body.
        length: usize,
    },
    /// The body is not what it should be.
    #[error("frame is malformed: {what}")]
    Malformed {
        /// What is wrong with it.
        what: String,
    },
}

/// Appends the frame of `message` to `out`.
///
/// # Errors
///
/// The message is longer than [`MAX_FRAME`]; `out` is unchanged then.
pub fn encode(message: &Message, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let body = wire::Envelope::from(message.clone());
    let length = body.encoded_len();
    if MAX_FRAME < length {
        return Err(CodecError::TooLong { length });
    }
    out.reserve(HEADER + length);
    out.extend_from_slice(&MARK);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&u32::try_from(length).expect("below MAX_FRAME").to_le_bytes());
    body.encode(out).expect("a vector grows");
    Ok(())
}

impl FrameReader {
    /// An empty reader.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that were received.
    pub fn push(&mut self, bytes: &[u8]) {
        if 0 < self.start {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes the next message out; `None` until it is complete.
    ///
    /// # Errors
    ///
    /// What was received is no message. Nothing after it can be understood either.
    pub fn next_message(&mut self) -> Result<Option<Message>, CodecError> {
        let Some((message, length)) = decode(&self.buffer[self.start..])? else { return Ok(None) };
        self.start += length;
        Ok(Some(message))
    }
}

/// Reads one message from the front of `bytes`, together with the length of its frame; `None` when the frame is
/// not complete.
///
/// # Errors
///
/// See [`CodecError`].
pub fn decode(bytes: &[u8]) -> Result<Option<(Message, usize)>, CodecError> {
    let mark = bytes.len().min(MARK.len());
    if bytes[..mark] != MARK[..mark] {
        return Err(CodecError::Mark);
    }
    let Some((header, rest)) = bytes.split_at_checked(HEADER) else { return Ok(None) };
    let theirs = u16::from_le_bytes([header[2], header[3]]);
    if theirs != VERSION {
        return Err(CodecError::Version { theirs, ours: VERSION });
    }
    let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    if MAX_FRAME < length {
        return Err(CodecError::TooLong { length });
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    let envelope =
        wire::Envelope::decode(body).map_err(|error| CodecError::Malformed { what: error.to_string() })?;
    let message = Message::try_from(envelope)?;
    Ok(Some((message, HEADER + length)))
}

/// Longest body. A reservation of a million tokens in blocks of 16 takes 0.8 MB.
pub const MAX_FRAME: usize = 4 << 20;

const MARK: [u8; 2] = *b"TK";
const VERSION: u16 = PROTOCOL as u16;
const HEADER: usize = 8;

#[cfg(test)]
mod tests;
