//! Ends of RDMA connections, as the two sides tell each other of them.

use std::num::NonZeroU32;

/// One end of a reliable connection, and the memory that can be reached by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathEnd {
    /// Number of the queue pair, 24 bits; `None` where the port is down for now, and there may be one later. Zero is the
    /// number of the pair by which subnets are managed.
    pub queue_pair: Option<NonZeroU32>,
    /// Number of the first packet that it will send, 24 bits.
    pub first_packet: u32,
    /// Address of the port.
    pub gid: [u8; 16],
    /// Local address of the port on an InfiniBand subnet; zero on Ethernet.
    pub lid: u16,
    /// Whether the port is an InfiniBand one, and not Ethernet.
    pub is_infiniband: bool,
    /// Longest packet, as the power of two that it is.
    pub mtu_log2: u8,
    /// Reads that it can have under way in either direction.
    pub reads: u8,
    /// Address by which the first byte of the block arena is named.
    pub arena_address: u64,
    /// Key for the arena, for the peer at the other end alone.
    pub arena_key: u32,
}

impl PathEnd {
    /// Whether each field is one that a connection can be made to; otherwise the name of the first that is not.
    pub fn check(&self) -> Result<(), &'static str> {
        let is_24_bits = |number: u32| number < 1 << 24;
        if !self.queue_pair.is_some_and(|number| is_24_bits(number.get())) {
            return Err("queue_pair");
        }
        if !is_24_bits(self.first_packet) {
            return Err("first_packet");
        }
        if self.gid == [0; 16] && (!self.is_infiniband || self.lid == 0) {
            return Err("gid");
        }
        if !(8..=12).contains(&self.mtu_log2) {
            return Err("mtu");
        }
        if self.reads == 0 {
            return Err("reads");
        }
        Ok(())
    }
}

/// Paths between two workers, at most.
pub const MAX_PATHS: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_that_cannot_be_connected_to_are_found() {
        let good = PathEnd {
            queue_pair: NonZeroU32::new(17),
            first_packet: 0xff_ffff,
            gid: [1; 16],
            lid: 0,
            is_infiniband: false,
            mtu_log2: 12,
            reads: 16,
            arena_address: 0x1000,
            arena_key: 7,
        };
        #[rustfmt::skip]
        let rows = [
            ("a good one",                         good,                                                       None),
            ("InfiniBand by local address",        PathEnd { gid: [0; 16], lid: 3, is_infiniband: true, ..good }, None),
            ("a queue pair of more than 24 bits",  PathEnd { queue_pair: NonZeroU32::new(1 << 24), ..good },   Some("queue_pair")),
            ("no queue pair for now",                PathEnd { queue_pair: None, ..good },                       Some("queue_pair")),
            ("a packet number of more",            PathEnd { first_packet: 1 << 24, ..good },                  Some("first_packet")),
            ("Ethernet without an address",        PathEnd { gid: [0; 16], lid: 3, ..good },                   Some("gid")),
            ("packets of no such length",          PathEnd { mtu_log2: 13, ..good },                           Some("mtu")),
            ("no reads at all",                    PathEnd { reads: 0, ..good },                               Some("reads")),
        ];
        for (name, end, expected) in rows {
            assert_eq!(end.check().err(), expected, "{name}");
        }
    }
}
