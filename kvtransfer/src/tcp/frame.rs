//! Headers on a data connection: fixed, since nothing here depends on a version but the handshake that came
//! before.
//!
//! ```text
//! kind: u32 | len: u32 | handoff: u64 | offset: u64 | stamp: u64      all little-endian
//! ```

use tidemill_kvtransfer_proto::transport::{RemoteRange, WriteFault};
use tidemill_kvtransfer_proto::units::HandoffId;

/// What a header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// `range.len` bytes follow, for that range.
    Write(RemoteRange),
    /// This many writes have landed, in the order in which they were sent.
    Landed(u32),
    /// The next write in that order did not land.
    TurnedDown(WriteFault),
    /// This many bytes follow, to be thrown away.
    Probe(u32),
    /// The probe's bytes have arrived.
    Probed,
}

/// Bytes of a header.
pub(super) const HEADER: usize = 32;

impl Frame {
    pub(super) fn encode(self) -> [u8; HEADER] {
        let nothing = RemoteRange { handoff: HandoffId(0), offset: 0, len: 0, stamp: 0 };
        let (kind, range) = match self {
            Self::Write(range) => (1, range),
            Self::Landed(count) => (2, RemoteRange { len: count, ..nothing }),
            Self::TurnedDown(fault) => (3, RemoteRange { len: fault_number(fault), ..nothing }),
            Self::Probe(len) => (4, RemoteRange { len, ..nothing }),
            Self::Probed => (5, nothing),
        };
        let mut header = [0; HEADER];
        header[0..4].copy_from_slice(&u32::to_le_bytes(kind));
        header[4..8].copy_from_slice(&range.len.to_le_bytes());
        header[8..16].copy_from_slice(&range.handoff.0.to_le_bytes());
        header[16..24].copy_from_slice(&range.offset.to_le_bytes());
        header[24..32].copy_from_slice(&range.stamp.to_le_bytes());
        header
    }

    /// `None` for what is no header.
    pub(super) fn decode(header: &[u8; HEADER]) -> Option<Self> {
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let both = number(0);
        let (kind, len) = (both as u32, (both >> 32) as u32);
        let range = RemoteRange { handoff: HandoffId(number(8)), offset: number(16), len, stamp: number(24) };
        match kind {
            1 => Some(Self::Write(range)),
            2 => Some(Self::Landed(len)),
            3 => Some(Self::TurnedDown(fault_from_number(len)?)),
            4 => Some(Self::Probe(len)),
            5 => Some(Self::Probed),
            _ => None,
        }
    }
}

fn fault_number(fault: WriteFault) -> u32 {
    match fault {
        WriteFault::NotExpected => 1,
        WriteFault::Outside => 2,
        WriteFault::Stale => 3,
        WriteFault::Severed => 4,
    }
}

fn fault_from_number(number: u32) -> Option<WriteFault> {
    [WriteFault::NotExpected, WriteFault::Outside, WriteFault::Stale, WriteFault::Severed]
        .into_iter()
        .find(|&fault| fault_number(fault) == number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        let range =
            RemoteRange { handoff: HandoffId(u64::MAX - 1), offset: 1 << 40, len: u32::MAX, stamp: 3 };
        for frame in [
            Frame::Write(range),
            Frame::Landed(7),
            Frame::TurnedDown(WriteFault::Stale),
            Frame::TurnedDown(WriteFault::Severed),
            Frame::Probe(9),
            Frame::Probed,
        ] {
            assert_eq!(Frame::decode(&frame.encode()), Some(frame));
        }
        assert_eq!(Frame::decode(&[0; HEADER]), None);
        assert_eq!(Frame::decode(&[0xff; HEADER]), None);
    }
}
