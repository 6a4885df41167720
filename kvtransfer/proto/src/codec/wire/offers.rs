//! Offers, as Protocol Buffers sees them: packed numbers, so that decoding allocates little more than was received.

use super::malformed;
use crate::codec::CodecError;
use crate::message::{self, Message, Piece};
use crate::units::HandoffId;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Offered {
    #[prost(fixed64, tag = "1")]
    handoff: u64,
    #[prost(uint64, tag = "2")]
    before: u64,
    #[prost(fixed64, repeated, tag = "3")]
    sources: Vec<u64>,
    #[prost(fixed64, repeated, tag = "4")]
    targets: Vec<u64>,
    #[prost(fixed32, repeated, tag = "5")]
    lens: Vec<u32>,
    #[prost(fixed64, repeated, tag = "6")]
    stamps: Vec<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Fetched {
    #[prost(fixed64, tag = "1")]
    pub(super) handoff: u64,
    #[prost(uint64, tag = "2")]
    pub(super) pieces: u64,
}

impl From<message::Offered> for Offered {
    fn from(it: message::Offered) -> Self {
        Self {
            handoff: it.handoff.0,
            before: it.before,
            sources: it.pieces.iter().map(|piece| piece.source).collect(),
            targets: it.pieces.iter().map(|piece| piece.target).collect(),
            lens: it.pieces.iter().map(|piece| piece.len).collect(),
            stamps: it.pieces.iter().map(|piece| piece.stamp).collect(),
        }
    }
}

impl TryFrom<Offered> for Message {
    type Error = CodecError;

    fn try_from(it: Offered) -> Result<Self, CodecError> {
        let count = it.sources.len();
        if [it.targets.len(), it.lens.len(), it.stamps.len()] != [count; 3] {
            return Err(malformed("the pieces of an offer differ in number"));
        }
        let piece = |index: usize| Piece {
            source: it.sources[index],
            target: it.targets[index],
            len: it.lens[index],
            stamp: it.stamps[index],
        };
        let pieces = (0..count).map(piece).collect();
        Ok(Self::Offer(message::Offered { handoff: HandoffId(it.handoff), before: it.before, pieces }))
    }
}
