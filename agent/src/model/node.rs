//! The nodes of the cluster.

use std::fmt;

use ferroflow_common::addr::Addr;

use super::Family;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Node {
    /// Internal addresses first, then external ones.
    pub addresses: Box<[Addr]>,
    pub pod_cidrs: Box<[Prefix]>,
    pub zone: Option<Box<str>>,
    pub stay: Stay,
}

/// Whether a node is to get new connections (rule 41).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Stay {
    #[default]
    Stays,
    /// It is deleted, or the autoscaler is about to.
    Leaves,
}

impl Node {
    /// The address of a family that stands for the node: where NodePorts are served by default (rule 24).
    pub fn primary(&self, family: Family) -> Option<Addr> {
        self.addresses.iter().find(|addr| Family::of(addr) == family).copied()
    }
}

/// An address range; the bits behind its length are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    addr: Addr,
    /// Of the 128 bits of a mapped address.
    length: u8,
}

impl Prefix {
    /// `length` counts the bits of the address's own family; `None` where it is too long or cuts set bits off.
    pub fn new(addr: Addr, length: u8) -> Option<Self> {
        let length = if addr.ip().is_ipv4() { length.checked_add(96)? } else { length };
        let host = u128::MAX.checked_shr(u32::from(length)).unwrap_or(0);
        (length <= 128 && u128::from_be_bytes(addr.bytes) & host == 0).then_some(Self { addr, length })
    }

    /// As [`Prefix::bits`] counts them; `None` as for [`Prefix::new`].
    pub fn mapped(addr: Addr, bits: u8) -> Option<Self> {
        let host = u128::MAX.checked_shr(u32::from(bits)).unwrap_or(0);
        (bits <= 128 && u128::from_be_bytes(addr.bytes) & host == 0).then_some(Self { addr, length: bits })
    }

    /// The range of this length that the address is in.
    pub fn around(addr: Addr, length: u8) -> Option<Self> {
        let length = if addr.ip().is_ipv4() { length.checked_add(96)? } else { length };
        let host = u128::MAX.checked_shr(u32::from(length)).unwrap_or(0);
        let bytes = (u128::from_be_bytes(addr.bytes) & !host).to_be_bytes();
        (length <= 128).then_some(Self { addr: Addr { bytes }, length })
    }

    pub fn addr(&self) -> Addr {
        self.addr
    }

    /// How many bits of the 16 bytes of [`Prefix::addr`] count.
    pub fn bits(&self) -> u8 {
        self.length
    }

    pub fn family(&self) -> Family {
        // An IPv4 address is mapped; its first 96 bits are part of every IPv4 range.
        if self.length >= 96 { Family::of(&self.addr) } else { Family::V6 }
    }

    /// Whether it leaves an address of its family out.
    pub fn is_proper(&self) -> bool {
        self.length > if self.family() == Family::V4 { 96 } else { 0 }
    }

    pub fn contains(&self, addr: &Addr) -> bool {
        let differing = u128::from_be_bytes(self.addr.bytes) ^ u128::from_be_bytes(addr.bytes);
        differing.leading_zeros() >= u32::from(self.length)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = match self.family() {
            Family::V4 => self.length - 96,
            Family::V6 => self.length,
        };
        write!(f, "{}/{length}", self.addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_contains_what_shares_its_bits() {
        let v4 = Prefix::new(Addr::v4([10, 1, 2, 0]), 24).unwrap();
        assert!(v4.contains(&Addr::v4([10, 1, 2, 255])) && !v4.contains(&Addr::v4([10, 1, 3, 0])));
        assert_eq!(v4.to_string(), "10.1.2.0/24");
        let v6 = Prefix::new(Addr::from("fd00::".parse::<std::net::IpAddr>().unwrap()), 8).unwrap();
        assert!(v6.contains(&Addr::from("fdff::1".parse::<std::net::IpAddr>().unwrap())));
        assert!(!v6.contains(&Addr::v4([10, 1, 2, 3])));
        assert_eq!(v6.to_string(), "fd00::/8");
    }

    #[test]
    fn a_prefix_with_host_bits_or_too_many_bits_is_none() {
        assert_eq!(Prefix::new(Addr::v4([10, 1, 2, 1]), 24), None);
        assert_eq!(Prefix::new(Addr::v4([10, 1, 2, 1]), 33), None);
        assert!(Prefix::new(Addr::v4([10, 1, 2, 1]), 32).is_some());
    }

    #[test]
    fn a_range_around_an_address_cuts_bits_off() {
        let texts = [("10.1.2.3", 24, "10.1.2.0/24"), ("10.1.2.3", 0, "0.0.0.0/0"), ("fd00::1", 0, "::/0")];
        for (addr, length, text) in texts {
            let addr = Addr::from(addr.parse::<std::net::IpAddr>().unwrap());
            let prefix = Prefix::around(addr, length).unwrap();
            assert_eq!((prefix.to_string(), prefix.family()), (text.into(), Family::of(&addr)));
        }
        assert_eq!(Prefix::around(Addr::v4([10, 1, 2, 3]), 33), None);
    }

    #[test]
    fn rule_24_the_primary_address_of_a_family_is_the_first() {
        let v6 = Addr::v6([0xfd; 16]);
        let addresses = Box::new([Addr::v4([10, 0, 0, 1]), v6, Addr::v4([10, 0, 0, 2])]);
        let node = Node { addresses, ..Node::default() };
        assert_eq!(
            (node.primary(Family::V4), node.primary(Family::V6)),
            (Some(Addr::v4([10, 0, 0, 1])), Some(v6))
        );
        assert_eq!(Node::default().primary(Family::V4), None);
    }
}
