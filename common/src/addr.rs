//! Addresses, ports and protocols as they stand on the wire: byte arrays in network order, so that an endianness
//! cannot be forgotten and a map key has no padding.

use core::fmt;
use core::net::{IpAddr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, transmute};

/// An address of either family in 16 bytes; IPv4 is mapped (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2). Aligned to
/// words: BPF has no unaligned stack access, and without it the compiler moves one byte at a time.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(4))]
pub struct Addr {
    pub bytes: [u8; 16],
}

impl Addr {
    pub const UNSPECIFIED: Self = Self { bytes: [0; 16] };

    #[inline(always)]
    pub const fn v4(a: [u8; 4]) -> Self {
        // By words, as programs read it.
        Self { bytes: transmute!([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), u32::from_ne_bytes(a)]) }
    }

    #[inline(always)]
    pub const fn v6(bytes: [u8; 16]) -> Self {
        Self { bytes }
    }

    /// The last four bytes: the IPv4 address of a mapped one.
    #[inline(always)]
    pub const fn v4_bytes(&self) -> [u8; 4] {
        [self.bytes[12], self.bytes[13], self.bytes[14], self.bytes[15]]
    }

    /// Whether it is a mapped one.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let b = &self.bytes;
        u64::from_ne_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) == 0
            && u32::from_be_bytes([b[8], b[9], b[10], b[11]]) == 0xffff
    }

    /// In memory order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        transmute!(self.bytes)
    }

    /// Whether it is in 127.0.0.0/8, or ::1 (RFC 1122 section 3.2.1.3, RFC 4291 section 2.5.3).
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let b = &self.bytes;
        if self.is_v4() {
            return b[12] == 127;
        }
        u64::from_ne_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) == 0
            && u64::from_be_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]) == 1
    }

    /// Whether it is 0.0.0.0 or ::, which stand for any address.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let b = &self.bytes;
        let (high, low) = ([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]], self.v4_bytes());
        let middle = u32::from_be_bytes([b[8], b[9], b[10], b[11]]);
        u64::from_ne_bytes(high) == 0 && u32::from_ne_bytes(low) == 0 && (middle == 0 || middle == 0xffff)
    }

    pub fn ip(&self) -> IpAddr {
        Ipv6Addr::from(self.bytes).to_canonical()
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::v4(ip.octets()),
            IpAddr::V6(ip) => Self::v6(ip.octets()),
        }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

/// A transport port in network order.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Port {
    pub be: [u8; 2],
}

impl Port {
    pub const ZERO: Self = Self { be: [0; 2] };

    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self { be: host.to_be_bytes() }
    }

    #[inline(always)]
    pub const fn host(self) -> u16 {
        u16::from_be_bytes(self.be)
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.host().fmt(f)
    }
}

/// An IP protocol number (IANA "Assigned Internet Protocol Numbers").
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Proto {
    pub number: u8,
}

impl Proto {
    pub const ICMP: Self = Self { number: 1 };
    pub const TCP: Self = Self { number: 6 };
    pub const UDP: Self = Self { number: 17 };
    pub const ICMPV6: Self = Self { number: 58 };
    pub const SCTP: Self = Self { number: 132 };

    /// Whether a flow opens and closes: its packets say so.
    #[inline(always)]
    pub const fn connects(self) -> bool {
        self.number == Self::TCP.number || self.number == Self::SCTP.number
    }

    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::ICMP => Some("ICMP"),
            Self::TCP => Some("TCP"),
            Self::UDP => Some("UDP"),
            Self::ICMPV6 => Some("ICMPv6"),
            Self::SCTP => Some("SCTP"),
            Self { .. } => None,
        }
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => self.number.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back_as_the_family_it_went_in() {
        for text in ["10.96.0.10", "fd00::1", "255.255.255.255", "::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(Addr::from(ip).ip(), ip);
        }
        assert_eq!(Addr::v4([1, 2, 3, 4]).v4_bytes(), [1, 2, 3, 4]);
    }

    #[test]
    fn loopback_and_unspecified_addresses_are_told_from_others() {
        for (text, loopback, unspecified) in [
            ("127.0.0.1", true, false),
            ("127.255.255.255", true, false),
            ("128.0.0.1", false, false),
            ("::1", true, false),
            ("::2", false, false),
            ("fd00::1", false, false),
            ("0.0.0.0", false, true),
            ("0.0.0.1", false, false),
            ("::", false, true),
            ("::1:0:0", false, false),
        ] {
            let addr = Addr::from(text.parse::<IpAddr>().unwrap());
            assert_eq!((addr.is_loopback(), addr.is_unspecified()), (loopback, unspecified), "{text}");
        }
    }

    #[test]
    fn a_port_is_big_endian() {
        assert_eq!(Port::new(0x1234).be, [0x12, 0x34]);
        assert_eq!(Port::new(8080).host(), 8080);
    }
}
