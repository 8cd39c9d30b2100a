//! The nodes of the cluster.

use std::fmt;

use ferroflow_common::addr::Addr;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// Internal addresses first, then external ones.
    pub addresses: Box<[Addr]>,
    pub pod_cidrs: Box<[Prefix]>,
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

    pub fn contains(&self, addr: &Addr) -> bool {
        let differing = u128::from_be_bytes(self.addr.bytes) ^ u128::from_be_bytes(addr.bytes);
        differing.leading_zeros() >= u32::from(self.length)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = if self.addr.ip().is_ipv4() { self.length - 96 } else { self.length };
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
}
