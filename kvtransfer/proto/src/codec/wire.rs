//! Twins of the messages as Protocol Buffers sees them, and the way to and from the real ones.
//!
//! Tags are never used for another meaning; a field that is no longer needed leaves a gap.

mod commits;
mod credit;
mod layout;
mod offers;
mod paths;

use std::time::Duration;

use crate::codec::CodecError;
use crate::digest::Coverage;
use crate::message::{self, Message, OnFailure, TransportKind};
use crate::units::{BlockId, BlockRef, Epoch, HandoffId, TokenCount};

use self::layout::Layout;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Envelope {
    #[prost(
        oneof = "Body",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23"
    )]
    body: Option<Body>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Body {
    #[prost(message, tag = "1")]
    Hello(Hello),
    #[prost(message, tag = "2")]
    Welcome(Welcome),
    #[prost(message, tag = "3")]
    Refuse(Refuse),
    #[prost(message, tag = "4")]
    Attach(Attach),
    #[prost(message, tag = "5")]
    Ready(Ready),
    #[prost(message, tag = "6")]
    Reserve(Reserve),
    #[prost(message, tag = "7")]
    Decline(Reason),
    #[prost(message, tag = "8")]
    Commit(commits::Commit),
    #[prost(message, tag = "9")]
    Adopted(Reason),
    #[prost(message, tag = "10")]
    Refused(Reason),
    #[prost(message, tag = "11")]
    Cancel(Reason),
    #[prost(message, tag = "12")]
    Quiet(Reason),
    #[prost(uint64, tag = "13")]
    Heartbeat(u64),
    #[prost(message, tag = "14")]
    Bye(Bye),
    #[prost(message, tag = "15")]
    Paths(paths::Paths),
    #[prost(uint32, tag = "16")]
    PathDown(u32),
    #[prost(message, tag = "17")]
    Ask(credit::Ask),
    #[prost(message, tag = "18")]
    Grant(credit::Grant),
    #[prost(message, tag = "19")]
    Offer(offers::Offered),
    #[prost(message, tag = "20")]
    Fetched(offers::Fetched),
    #[prost(message, tag = "21")]
    Filled(commits::Filled),
    #[prost(message, tag = "22")]
    PathAnew(paths::PathAnew),
    #[prost(uint32, tag = "23")]
    PathUp(u32),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Hello {
    #[prost(uint32, tag = "1")]
    protocol: u32,
    #[prost(fixed64, tag = "2")]
    instance: u64,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(message, optional, tag = "4")]
    layout: Option<Layout>,
    #[prost(uint64, tag = "5")]
    region_bytes: u64,
    #[prost(uint32, tag = "6")]
    listen_port: u32,
    #[prost(string, tag = "7")]
    host: String,
    #[prost(string, tag = "8")]
    memory_socket: String,
    #[prost(bool, tag = "9")]
    offers_shared_memory: bool,
    #[prost(bool, tag = "10")]
    offers_tcp: bool,
    #[prost(bool, tag = "11")]
    requires_best: bool,
    #[prost(uint64, tag = "12")]
    lease_ms: u64,
    #[prost(bool, tag = "13")]
    offers_rdma: bool,
    #[prost(bool, tag = "14")]
    pulls: bool,
    #[prost(uint64, tag = "15")]
    staging_bytes: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Welcome {
    #[prost(message, optional, tag = "1")]
    hello: Option<Hello>,
    #[prost(fixed64, tag = "2")]
    token: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Refuse {
    #[prost(string, tag = "1")]
    field: String,
    #[prost(string, tag = "2")]
    reason: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Attach {
    #[prost(fixed64, tag = "1")]
    instance: u64,
    #[prost(fixed64, tag = "2")]
    token: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Ready {
    #[prost(uint32, tag = "1")]
    transport: u32,
    #[prost(string, optional, tag = "2")]
    fallback: Option<String>,
    #[prost(fixed64, repeated, tag = "3")]
    busy: Vec<u64>,
    #[prost(bool, tag = "4")]
    by_device: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Blocks {
    #[prost(fixed32, repeated, tag = "1")]
    blocks: Vec<u32>,
    #[prost(fixed64, repeated, tag = "2")]
    epochs: Vec<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Reserve {
    #[prost(fixed64, tag = "1")]
    handoff: u64,
    #[prost(uint32, tag = "2")]
    tokens: u32,
    #[prost(uint32, tag = "3")]
    first_block: u32,
    #[prost(message, optional, tag = "4")]
    cached: Option<Blocks>,
    #[prost(message, optional, tag = "5")]
    targets: Option<Blocks>,
    #[prost(uint32, tag = "6")]
    coverage: u32,
}

/// A handoff and, where there is one, the reason for what happens to it.
#[derive(Clone, PartialEq, prost::Message)]
struct Reason {
    #[prost(fixed64, tag = "1")]
    handoff: u64,
    #[prost(string, tag = "2")]
    reason: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Bye {
    #[prost(fixed64, repeated, tag = "1")]
    busy: Vec<u64>,
}

impl From<Message> for Envelope {
    fn from(message: Message) -> Self {
        let reason = |handoff: HandoffId, reason| Reason { handoff: handoff.0, reason };
        let body = match message {
            Message::Hello(it) => Body::Hello(it.into()),
            Message::Welcome(it) => Body::Welcome(Welcome { hello: Some(it.hello.into()), token: it.token }),
            Message::Refuse(it) => Body::Refuse(Refuse { field: it.field, reason: it.reason }),
            Message::Attach(it) => Body::Attach(Attach { instance: it.instance, token: it.token }),
            Message::Ready(it) => Body::Ready(Ready {
                transport: transport_to_wire(it.transport),
                fallback: it.fallback,
                busy: it.busy.into_iter().map(|handoff| handoff.0).collect(),
                by_device: it.by_device,
            }),
            Message::Reserve(it) => Body::Reserve(it.into()),
            Message::Decline { handoff, reason: why } => Body::Decline(reason(handoff, why)),
            Message::Filled(it) => Body::Filled(it.into()),
            Message::Commit(it) => Body::Commit(it.into()),
            Message::Adopted { handoff } => Body::Adopted(reason(handoff, String::new())),
            Message::Refused { handoff, reason: why } => Body::Refused(reason(handoff, why)),
            Message::Cancel { handoff } => Body::Cancel(reason(handoff, String::new())),
            Message::Quiet { handoff, reason: why } => Body::Quiet(reason(handoff, why)),
            Message::Heartbeat { seq } => Body::Heartbeat(seq),
            Message::Paths(it) => Body::Paths(it.into()),
            Message::PathDown { path } => Body::PathDown(path),
            Message::PathAnew { path, end } => Body::PathAnew(paths::PathAnew::new(path, end)),
            Message::PathUp { path } => Body::PathUp(path),
            Message::Ask { handoff, ask } => Body::Ask(credit::Ask::new(handoff, ask)),
            Message::Grant { handoff, bytes } => Body::Grant(credit::Grant { handoff: handoff.0, bytes }),
            Message::Offer(it) => Body::Offer(it.into()),
            Message::Fetched { handoff, pieces } => {
                Body::Fetched(offers::Fetched { handoff: handoff.0, pieces })
            }
            Message::Bye { busy } => Body::Bye(Bye { busy: busy.into_iter().map(|it| it.0).collect() }),
        };
        Self { body: Some(body) }
    }
}

impl TryFrom<Envelope> for Message {
    type Error = CodecError;

    fn try_from(envelope: Envelope) -> Result<Self, CodecError> {
        // A message of a later version that this one cannot know is as good as none, so it is refused: whether
        // it may be skipped only its sender knows, who was told our version.
        let body = envelope.body.ok_or_else(|| malformed("no message that this version knows"))?;
        Ok(match body {
            Body::Hello(it) => Self::Hello(it.try_into()?),
            Body::Welcome(it) => {
                let hello = it.hello.ok_or_else(|| malformed("welcome without hello"))?.try_into()?;
                Self::Welcome(message::Welcome { hello, token: it.token })
            }
            Body::Refuse(it) => Self::Refuse(message::Refuse { field: it.field, reason: it.reason }),
            Body::Attach(it) => Self::Attach(message::Attach { instance: it.instance, token: it.token }),
            Body::Ready(it) => Self::Ready(message::Ready {
                transport: transport_from_wire(it.transport)?,
                fallback: it.fallback,
                busy: it.busy.into_iter().map(HandoffId).collect(),
                by_device: it.by_device,
            }),
            Body::Reserve(it) => Self::Reserve(it.try_into()?),
            Body::Decline(it) => Self::Decline { handoff: HandoffId(it.handoff), reason: it.reason },
            Body::Filled(it) => Self::Filled(it.try_into()?),
            Body::Commit(it) => Self::Commit(it.try_into()?),
            Body::Adopted(it) => Self::Adopted { handoff: HandoffId(it.handoff) },
            Body::Refused(it) => Self::Refused { handoff: HandoffId(it.handoff), reason: it.reason },
            Body::Cancel(it) => Self::Cancel { handoff: HandoffId(it.handoff) },
            Body::Quiet(it) => Self::Quiet { handoff: HandoffId(it.handoff), reason: it.reason },
            Body::Heartbeat(seq) => Self::Heartbeat { seq },
            Body::Paths(it) => Self::Paths(it.try_into()?),
            Body::PathDown(path) => Self::PathDown { path },
            Body::PathAnew(it) => it.try_into()?,
            Body::PathUp(path) => Self::PathUp { path },
            Body::Ask(it) => it.into(),
            Body::Grant(it) => Self::Grant { handoff: HandoffId(it.handoff), bytes: it.bytes },
            Body::Offer(it) => it.try_into()?,
            Body::Fetched(it) => Self::Fetched { handoff: HandoffId(it.handoff), pieces: it.pieces },
            Body::Bye(it) => Self::Bye { busy: it.busy.into_iter().map(HandoffId).collect() },
        })
    }
}

impl From<message::Hello> for Hello {
    fn from(it: message::Hello) -> Self {
        Self {
            protocol: it.protocol,
            instance: it.instance,
            name: it.name,
            layout: Some(it.layout.into()),
            region_bytes: it.region_bytes,
            listen_port: it.listen_port.into(),
            host: it.host,
            memory_socket: it.memory_socket,
            offers_shared_memory: it.offer.shared_memory,
            offers_tcp: it.offer.tcp,
            requires_best: it.offer.on_failure == OnFailure::Fail,
            lease_ms: u64::try_from(it.lease.as_millis()).unwrap_or(u64::MAX),
            offers_rdma: it.offer.rdma,
            pulls: it.pulls,
            staging_bytes: it.staging_bytes,
        }
    }
}

impl TryFrom<Hello> for message::Hello {
    type Error = CodecError;

    fn try_from(it: Hello) -> Result<Self, CodecError> {
        Ok(Self {
            protocol: it.protocol,
            instance: it.instance,
            name: it.name,
            layout: it.layout.ok_or_else(|| malformed("hello without layout"))?.try_into()?,
            region_bytes: it.region_bytes,
            staging_bytes: it.staging_bytes,
            listen_port: narrow(it.listen_port, "listen_port")?,
            host: it.host,
            memory_socket: it.memory_socket,
            offer: message::Offer {
                shared_memory: it.offers_shared_memory,
                rdma: it.offers_rdma,
                tcp: it.offers_tcp,
                on_failure: if it.requires_best { OnFailure::Fail } else { OnFailure::FallBack },
            },
            pulls: it.pulls,
            lease: Duration::from_millis(it.lease_ms),
        })
    }
}

impl From<Vec<BlockRef>> for Blocks {
    fn from(refs: Vec<BlockRef>) -> Self {
        Self {
            blocks: refs.iter().map(|it| it.block.0).collect(),
            epochs: refs.iter().map(|it| it.epoch.0).collect(),
        }
    }
}

fn block_refs(wire: Option<Blocks>) -> Result<Vec<BlockRef>, CodecError> {
    let Blocks { blocks, epochs } = wire.unwrap_or_default();
    if blocks.len() != epochs.len() {
        return Err(malformed("blocks and epochs differ in number"));
    }
    let pairs = blocks.into_iter().zip(epochs);
    Ok(pairs.map(|(block, epoch)| BlockRef { block: BlockId(block), epoch: Epoch(epoch) }).collect())
}

impl From<message::Reserve> for Reserve {
    fn from(it: message::Reserve) -> Self {
        Self {
            handoff: it.handoff.0,
            tokens: it.tokens.0,
            first_block: it.first_block,
            cached: Some(it.cached.into()),
            targets: Some(it.targets.into()),
            coverage: match it.coverage {
                Coverage::Sampled => 0,
                Coverage::Full => 1,
            },
        }
    }
}

impl TryFrom<Reserve> for message::Reserve {
    type Error = CodecError;

    fn try_from(it: Reserve) -> Result<Self, CodecError> {
        Ok(Self {
            handoff: HandoffId(it.handoff),
            tokens: TokenCount(it.tokens),
            first_block: it.first_block,
            cached: block_refs(it.cached)?,
            targets: block_refs(it.targets)?,
            coverage: from_wire_number(&[Coverage::Sampled, Coverage::Full], it.coverage, "coverage")?,
        })
    }
}

fn transport_to_wire(kind: TransportKind) -> u32 {
    match kind {
        TransportKind::SharedMemory => 1,
        TransportKind::Tcp => 2,
        TransportKind::Rdma => 3,
    }
}

fn transport_from_wire(number: u32) -> Result<TransportKind, CodecError> {
    match number {
        1 => Ok(TransportKind::SharedMemory),
        2 => Ok(TransportKind::Tcp),
        3 => Ok(TransportKind::Rdma),
        _ => Err(malformed("transport")),
    }
}

fn from_wire_number<T: Copy>(list: &[T], number: u32, field: &str) -> Result<T, CodecError> {
    let position = usize::try_from(number).map_err(|_| malformed(field))?;
    list.get(position).copied().ok_or_else(|| malformed(field))
}

fn narrow(number: u32, field: &str) -> Result<u16, CodecError> {
    u16::try_from(number).map_err(|_| malformed(field))
}

fn malformed(what: &str) -> CodecError {
    CodecError::Malformed { what: what.to_owned() }
}
