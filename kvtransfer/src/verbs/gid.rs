//! Which of a port's addresses a connection takes.
//!
//! A RoCE port has one entry for each address of its network device and each version of the protocol. Version 1
//! does not cross routers, and a link-local address only reaches its own link, so taking entry zero, as many
//! programs do, connects two machines by luck.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What sort of packets an entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand, or RoCE version 1, which the kernel does not tell apart.
    InfiniBandOrRoceV1,
    /// RoCE version 2: UDP, routed like any other.
    RoceV2,
}

/// An entry of a port's table of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GidEntry {
    /// Position in the table.
    pub index: u8,
    /// The address.
    pub gid: [u8; 16],
    /// Its sort; `None` when the kernel does not say.
    pub kind: Option<GidKind>,
}

/// How to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GidRule {
    /// Takes this entry whatever it is.
    pub index: Option<u8>,
    /// Address of this side's end of the control connection.
    pub local: Option<IpAddr>,
    /// Whether the port is an InfiniBand one.
    pub is_infiniband: bool,
}

impl GidEntry {
    /// The address as the network knows it, when the entry holds one.
    pub fn ip(&self) -> IpAddr {
        let address = Ipv6Addr::from(self.gid);
        address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4)
    }

    fn is_empty(&self) -> bool {
        self.gid == [0; 16]
    }

    /// Smaller is better; `None` is not to be taken at all.
    fn rank(&self, rule: GidRule) -> Option<u8> {
        if self.is_empty() || (!rule.is_infiniband && self.kind != Some(GidKind::RoceV2)) {
            return None;
        }
        let ip = self.ip();
        Some(match ip {
            _ if Some(ip) == rule.local.map(unmapped) => 0,
            IpAddr::V4(it) if !it.is_link_local() && it != Ipv4Addr::UNSPECIFIED => 1,
            IpAddr::V6(it) if !it.is_unicast_link_local() => 2,
            IpAddr::V4(_) | IpAddr::V6(_) => 3,
        })
    }
}

/// The entry to take: the one asked for; else, of the right sort, the control connection's own address, the first
/// IPv4 address, the first routable IPv6 address, the first of any kind.
pub fn choose_gid(table: &[GidEntry], rule: GidRule) -> Option<GidEntry> {
    if let Some(index) = rule.index {
        return table.iter().find(|entry| entry.index == index && !entry.is_empty()).copied();
    }
    let ranked = table.iter().filter_map(|entry| Some((entry.rank(rule)?, entry.index, *entry)));
    ranked.min_by_key(|&(rank, index, _)| (rank, index)).map(|(_, _, entry)| entry)
}

fn unmapped(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u8, address: &str, kind: &str) -> GidEntry {
        let gid = match address.parse().unwrap() {
            IpAddr::V4(it) => it.to_ipv6_mapped().octets(),
            IpAddr::V6(it) => it.octets(),
        };
        let kind = match kind {
            "v2" => Some(GidKind::RoceV2),
            "v1" => Some(GidKind::InfiniBandOrRoceV1),
            _ => None,
        };
        GidEntry { index, gid, kind }
    }

    #[test]
    fn the_rule() {
        let usual = vec![
            entry(0, "fe80::1", "v1"),
            entry(1, "fe80::1", "v2"),
            entry(2, "10.0.0.5", "v1"),
            entry(3, "10.0.0.5", "v2"),
            entry(4, "192.168.7.5", "v2"),
            entry(5, "2001:db8::5", "v2"),
        ];
        let pick = |indexes: &[usize]| indexes.iter().map(|&it| usual[it]).collect::<Vec<_>>();
        let infiniband = vec![entry(0, "fe80::2:c903:a", "v1"), entry(1, "::", "")];
        #[rustfmt::skip]
        let rows = [
            ("the control connection's address",        usual.clone(),       Some("192.168.7.5"),        None,    false, Some(4)),
            ("as a mapped address too",                 usual.clone(),       Some("::ffff:192.168.7.5"), None,    false, Some(4)),
            ("IPv6 when the control connection is so",  usual.clone(),       Some("2001:db8::5"),        None,    false, Some(5)),
            ("else the first IPv4 one of version 2",    usual.clone(),       Some("127.0.0.1"),          None,    false, Some(3)),
            ("also when nothing is known",              usual.clone(),       None,                       None,    false, Some(3)),
            ("IPv6 rather than link-local",             pick(&[0, 1, 5]),    None,                       None,    false, Some(5)),
            ("link-local rather than nothing",          pick(&[0, 1]),       None,                       None,    false, Some(1)),
            ("never version 1",                         pick(&[0, 2]),       Some("10.0.0.5"),           None,    false, None),
            ("unless it is asked for",                  usual.clone(),       Some("10.0.0.5"),           Some(2), false, Some(2)),
            ("what is asked for must exist",            usual.clone(),       None,                       Some(9), false, None),
            ("InfiniBand has its own",                  infiniband.clone(),  Some("10.0.0.5"),           None,    true,  Some(0)),
            ("an empty entry is none",                  infiniband,          None,                       Some(1), true,  None),
            ("an empty table",                          vec![],              None,                       None,    false, None),
        ];
        for (name, table, local, index, is_infiniband, expected) in rows {
            let local = local.map(|it| it.parse().unwrap());
            let rule = GidRule { index, local, is_infiniband };
            assert_eq!(choose_gid(&table, rule).map(|it| it.index), expected, "{name}");
        }
    }
}
