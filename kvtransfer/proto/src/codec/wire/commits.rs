//! Blocks that are filled, and the commit.

use super::{Blocks, block_refs};
use crate::codec::CodecError;
use crate::message;
use crate::units::{HandoffId, TokenCount};

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Filled {
    #[prost(fixed64, tag = "1")]
    handoff: u64,
    #[prost(uint32, tag = "2")]
    first: u32,
    #[prost(message, optional, tag = "3")]
    targets: Option<Blocks>,
    #[prost(fixed64, repeated, tag = "4")]
    digests: Vec<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Commit {
    #[prost(fixed64, tag = "1")]
    handoff: u64,
    #[prost(uint32, tag = "2")]
    tokens: u32,
    #[prost(message, optional, tag = "3")]
    targets: Option<Blocks>,
    #[prost(fixed64, repeated, tag = "4")]
    digests: Vec<u64>,
    #[prost(bytes = "vec", tag = "5")]
    payload: Vec<u8>,
    #[prost(bool, tag = "6")]
    in_place: bool,
    #[prost(uint32, tag = "7")]
    first: u32,
    #[prost(fixed64, tag = "8")]
    seal: u64,
}

impl From<message::Filled> for Filled {
    fn from(it: message::Filled) -> Self {
        let message::Filled { handoff, first, targets, digests } = it;
        Self { handoff: handoff.0, first, targets: Some(targets.into()), digests }
    }
}

impl TryFrom<Filled> for message::Filled {
    type Error = CodecError;

    fn try_from(it: Filled) -> Result<Self, CodecError> {
        let Filled { handoff, first, targets, digests } = it;
        Ok(Self { handoff: HandoffId(handoff), first, targets: block_refs(targets)?, digests })
    }
}

impl From<message::Commit> for Commit {
    fn from(it: message::Commit) -> Self {
        let message::Commit { handoff, tokens, first, targets, digests, seal, payload, in_place } = it;
        let (handoff, tokens, targets) = (handoff.0, tokens.0, Some(targets.into()));
        Self { handoff, tokens, targets, digests, payload, in_place, first, seal }
    }
}

impl TryFrom<Commit> for message::Commit {
    type Error = CodecError;

    fn try_from(it: Commit) -> Result<Self, CodecError> {
        let Commit { handoff, tokens, targets, digests, payload, in_place, first, seal } = it;
        let (handoff, tokens, targets) = (HandoffId(handoff), TokenCount(tokens), block_refs(targets)?);
        Ok(Self { handoff, tokens, first, targets, digests, seal, payload, in_place })
    }
}
