//! Credit, as Protocol Buffers sees it.

use crate::credit;
use crate::message::Message;
use crate::units::HandoffId;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Ask {
    #[prost(fixed64, tag = "1")]
    handoff: u64,
    #[prost(uint64, tag = "2")]
    ended: u64,
    #[prost(uint64, tag = "3")]
    wanted: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Grant {
    #[prost(fixed64, tag = "1")]
    pub(super) handoff: u64,
    #[prost(uint64, tag = "2")]
    pub(super) bytes: u64,
}

impl Ask {
    pub(super) fn new(handoff: HandoffId, ask: credit::Ask) -> Self {
        Self { handoff: handoff.0, ended: ask.ended, wanted: ask.wanted }
    }
}

impl From<Ask> for Message {
    fn from(it: Ask) -> Self {
        let ask = credit::Ask { ended: it.ended, wanted: it.wanted };
        Self::Ask { handoff: HandoffId(it.handoff), ask }
    }
}
