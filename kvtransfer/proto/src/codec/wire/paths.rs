//! Ends of RDMA connections on the wire: a list for each field, so that what decoding allocates stays near what came.

use std::num::NonZeroU32;

use super::{malformed, narrow};
use crate::codec::CodecError;
use crate::message;
use crate::path::{MAX_PATHS, PathEnd};

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Paths {
    /// Zero where there is none.
    #[prost(fixed32, repeated, tag = "1")]
    queue_pairs: Vec<u32>,
    #[prost(fixed32, repeated, tag = "2")]
    first_packets: Vec<u32>,
    /// Sixteen bytes each.
    #[prost(bytes = "vec", tag = "3")]
    gids: Vec<u8>,
    #[prost(fixed32, repeated, tag = "4")]
    lids: Vec<u32>,
    /// One bit for each end, from the lowest on.
    #[prost(uint64, tag = "5")]
    infiniband: u64,
    #[prost(bytes = "vec", tag = "6")]
    mtu_log2: Vec<u8>,
    #[prost(bytes = "vec", tag = "7")]
    reads: Vec<u8>,
    #[prost(fixed64, repeated, tag = "8")]
    arena_addresses: Vec<u64>,
    #[prost(fixed32, repeated, tag = "9")]
    arena_keys: Vec<u32>,
    #[prost(string, optional, tag = "10")]
    failure: Option<String>,
}

/// One end, in the form of a list of them.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PathAnew {
    #[prost(uint32, tag = "1")]
    path: u32,
    #[prost(message, optional, tag = "2")]
    end: Option<Paths>,
}

impl PathAnew {
    pub(super) fn new(path: u32, end: PathEnd) -> Self {
        Self { path, end: Some(message::Paths { ends: vec![end], failure: None }.into()) }
    }
}

impl TryFrom<PathAnew> for message::Message {
    type Error = CodecError;

    fn try_from(it: PathAnew) -> Result<Self, CodecError> {
        let ends = it.end.map(message::Paths::try_from).transpose()?.map(|paths| paths.ends);
        match ends.as_deref() {
            Some(&[end]) => Ok(Self::PathAnew { path: it.path, end }),
            _ => Err(malformed("a path without its end")),
        }
    }
}

impl From<message::Paths> for Paths {
    fn from(it: message::Paths) -> Self {
        let ends = &it.ends;
        let infiniband = ends.iter().rev().fold(0, |bits, end| bits << 1 | u64::from(end.is_infiniband));
        Self {
            queue_pairs: ends.iter().map(|end| end.queue_pair.map_or(0, NonZeroU32::get)).collect(),
            first_packets: ends.iter().map(|end| end.first_packet).collect(),
            gids: ends.iter().flat_map(|end| end.gid).collect(),
            lids: ends.iter().map(|end| end.lid.into()).collect(),
            infiniband,
            mtu_log2: ends.iter().map(|end| end.mtu_log2).collect(),
            reads: ends.iter().map(|end| end.reads).collect(),
            arena_addresses: ends.iter().map(|end| end.arena_address).collect(),
            arena_keys: ends.iter().map(|end| end.arena_key).collect(),
            failure: it.failure,
        }
    }
}

impl TryFrom<Paths> for message::Paths {
    type Error = CodecError;

    fn try_from(it: Paths) -> Result<Self, CodecError> {
        let count = it.queue_pairs.len();
        let (gids, rest) = it.gids.as_chunks::<16>();
        let lengths = [
            it.first_packets.len(),
            gids.len(),
            it.lids.len(),
            it.mtu_log2.len(),
            it.reads.len(),
            it.arena_addresses.len(),
            it.arena_keys.len(),
        ];
        if MAX_PATHS < count || !rest.is_empty() || lengths.iter().any(|&length| length != count) {
            return Err(malformed("paths"));
        }
        let end = |index: usize| {
            Ok(PathEnd {
                queue_pair: NonZeroU32::new(it.queue_pairs[index]),
                first_packet: it.first_packets[index],
                gid: gids[index],
                lid: narrow(it.lids[index], "lid")?,
                is_infiniband: it.infiniband >> index & 1 == 1,
                mtu_log2: it.mtu_log2[index],
                reads: it.reads[index],
                arena_address: it.arena_addresses[index],
                arena_key: it.arena_keys[index],
            })
        };
        let ends = (0..count).map(end).collect::<Result<_, _>>()?;
        Ok(Self { ends, failure: it.failure })
    }
}
