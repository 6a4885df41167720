//! What a queue is asked for, as a value that can wait or be recorded.

use crate::cuda::{
    Collective, DeviceAddress, Launch, MatrixProduct, Member, PinnedAddress, timeline::Access,
};
use std::ops::Range;

/// Lengths are in bytes.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "most of them are launches")]
pub(super) enum Operation {
    Launch(Launch),
    Multiply(MatrixProduct),
    Collect(Member, Collective),
    Fill { to: DeviceAddress, bytes: usize, value: u8 },
    Upload { to: DeviceAddress, from: PinnedAddress, bytes: usize },
    Download { to: PinnedAddress, from: DeviceAddress, bytes: usize },
    Copy { to: DeviceAddress, from: DeviceAddress, bytes: usize },
}

/// Memory that an operation names.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) room: Room,
    pub(super) memory: Range<u64>,
    pub(super) access: Access,
}

/// Whose memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Device,
    Pinned,
}

impl Operation {
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Launch(_) => "launch",
            Self::Multiply(_) => "product",
            Self::Collect(_, collective) => collective.name(),
            Self::Fill { .. } => "fill",
            Self::Upload { .. } => "upload",
            Self::Download { .. } => "download",
            Self::Copy { .. } => "copy",
        }
    }

    /// The target first. A launch says only in its kernel's words what it uses.
    pub(super) fn memory(&self) -> Vec<Named> {
        let named = |room, start: u64, bytes: usize, access| Named {
            room,
            memory: start..start + bytes as u64,
            access,
        };
        let target = |room, start, bytes| named(room, start, bytes, Access::Write);
        let source = |room, start, bytes| named(room, start, bytes, Access::Read);
        match *self {
            Self::Launch(_) => Vec::new(),
            Self::Multiply(it) => {
                let (product, out) = (it.product, target(Room::Device, it.product.out.0, it.out_bytes()));
                let mut sources = vec![
                    source(Room::Device, product.x.0, it.x_bytes()),
                    source(Room::Device, product.w.0, it.w_bytes()),
                ];
                if product.bias != DeviceAddress::NULL {
                    sources.push(source(Room::Device, product.bias.0, it.bias_bytes()));
                }
                for Named { memory, .. } in &sources {
                    let apart = memory.end <= out.memory.start || out.memory.end <= memory.start;
                    assert!(apart, "{it:?}, whose result overlaps an operand");
                }
                if product.adds != 0 {
                    sources.push(source(Room::Device, product.out.0, it.out_bytes()));
                }
                sources.insert(0, out);
                sources
            }
            Self::Collect(member, collective) => match collective {
                Collective::Sum { address, .. } => {
                    let bytes = collective.bytes();
                    vec![target(Room::Device, address.0, bytes), source(Room::Device, address.0, bytes)]
                }
                Collective::Gather { to, from, bytes } => {
                    let all = bytes * member.ranks as usize;
                    let apart = to.0 + all as u64 <= from.0 || from.0 + bytes as u64 <= to.0;
                    assert!(apart, "{collective:?}, which overlap");
                    vec![target(Room::Device, to.0, all), source(Room::Device, from.0, bytes)]
                }
                Collective::Spread { address, bytes } if member.rank == 0 => {
                    vec![source(Room::Device, address.0, bytes)]
                }
                Collective::Spread { address, bytes } => vec![target(Room::Device, address.0, bytes)],
            },
            Self::Fill { to, bytes, .. } => vec![target(Room::Device, to.0, bytes)],
            Self::Upload { to, from, bytes } => {
                vec![target(Room::Device, to.0, bytes), source(Room::Pinned, from.0, bytes)]
            }
            Self::Download { to, from, bytes } => {
                vec![target(Room::Pinned, to.0, bytes), source(Room::Device, from.0, bytes)]
            }
            Self::Copy { to, from, bytes } => {
                let apart = to.0 + bytes as u64 <= from.0 || from.0 + bytes as u64 <= to.0;
                assert!(apart, "copy of {bytes} bytes from {from:?} to {to:?}, which overlap");
                vec![target(Room::Device, to.0, bytes), source(Room::Device, from.0, bytes)]
            }
        }
    }
}
