//! Which addresses of a range pods may have.

use ferroflow_common::addr::Addr;

use super::IpamError;
use crate::model::{Family, Prefix};

/// The addresses of a range but for those with a meaning of their own: the network's (RFC 4632; for IPv6 that of all
/// its routers, RFC 4291 2.6.1), IPv4's broadcast (RFC 919), and the second, which by custom is the gateway's. Ranges
/// of one or two addresses have no such (RFC 3021, RFC 6164).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usable {
    first: u128,
    last: u128,
}

impl Usable {
    /// # Errors
    /// [`IpamError::Unusable`].
    pub fn of(range: &Prefix) -> Result<Self, IpamError> {
        if let Some(why) = fault(range) {
            return Err(IpamError::Unusable { range: *range, why });
        }
        let network = u128::from_be_bytes(range.addr().bytes);
        let host = u128::MAX.checked_shr(u32::from(range.bits())).unwrap_or(0);
        let (first, last) = (network, network | host);
        if host <= 1 {
            return Ok(Self { first, last });
        }
        let broadcast = u128::from(range.family() == Family::V4);
        Ok(Self { first: first + 2, last: last - broadcast })
    }

    /// All of them once, from the one behind the cursor on and around.
    pub fn after(self, cursor: Option<Addr>) -> impl Iterator<Item = Addr> {
        let Self { first, last } = self;
        let cursor = cursor.map(|addr| u128::from_be_bytes(addr.bytes));
        let start = cursor.filter(|at| (first..last).contains(at)).map_or(first, |at| at + 1);
        (start..=last).chain(first..start).map(|bits| Addr { bytes: bits.to_be_bytes() })
    }
}

fn fault(range: &Prefix) -> Option<&'static str> {
    let bits = match range.family() {
        Family::V4 => range.bits() - 96,
        Family::V6 => range.bits(),
    };
    if bits < 8 {
        return Some("it is larger than any network");
    }
    let overlapping = |(addr, bits, _why): &&([u8; 16], u8, &str)| {
        let special = Prefix::around(Addr { bytes: *addr }, *bits);
        special.is_some_and(|special| {
            let within = special.contains(&range.addr()) || range.contains(&special.addr());
            special.family() == range.family() && within
        })
    };
    SPECIAL.iter().find(overlapping).map(|(_, _, why)| *why)
}

/// Of the registries of special-purpose addresses (RFC 6890) those that no host can have on a link.
const SPECIAL: [([u8; 16], u8, &str); 9] = [
    (Addr::v4([0, 0, 0, 0]).bytes, 8, "0.0.0.0/8 stands for this network"),
    (Addr::v4([127, 0, 0, 0]).bytes, 8, "127.0.0.0/8 is loopback"),
    (Addr::v4([169, 254, 0, 0]).bytes, 16, "169.254.0.0/16 is link-local, and the pods' gateway is in it"),
    (Addr::v4([224, 0, 0, 0]).bytes, 4, "224.0.0.0/4 is multicast"),
    (Addr::v4([240, 0, 0, 0]).bytes, 4, "240.0.0.0/4 is reserved"),
    ([0; 16], 80, "::/80 has loopback and the unspecified address"),
    ([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 10, "fe80::/10 is link-local"),
    ([0xfe, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 10, "fec0::/10 is deprecated"),
    ([0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8, "ff00::/8 is multicast"),
];

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn range(text: &str) -> Prefix {
        let (addr, bits) = text.split_once('/').unwrap();
        Prefix::new(addr.parse::<IpAddr>().unwrap().into(), bits.parse().unwrap()).unwrap()
    }

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn network_gateway_and_broadcast_are_left_out() {
        for (text, first, last) in [
            ("10.244.1.0/24", "10.244.1.2", "10.244.1.254"),
            ("10.0.0.0/30", "10.0.0.2", "10.0.0.2"),
            ("10.0.0.0/31", "10.0.0.0", "10.0.0.1"),
            ("10.0.0.7/32", "10.0.0.7", "10.0.0.7"),
            ("fd00:1::/120", "fd00:1::2", "fd00:1::ff"),
            ("fd00:1::6/127", "fd00:1::6", "fd00:1::7"),
            ("fd00:1::9/128", "fd00:1::9", "fd00:1::9"),
        ] {
            let all: Vec<_> = Usable::of(&range(text)).unwrap().after(None).collect();
            assert_eq!((all[0], all[all.len() - 1]), (addr(first), addr(last)), "{text}");
        }
        let large = Usable::of(&range("fd00:1::/64")).unwrap();
        assert_eq!(large.after(None).next(), Some(addr("fd00:1::2")));
    }

    #[test]
    fn it_goes_around_from_the_cursor() {
        let usable = Usable::of(&range("10.0.0.0/29")).unwrap();
        let from = |cursor: &str| {
            usable.after(Some(addr(cursor))).map(|addr| addr.v4_bytes()[3]).collect::<Vec<_>>()
        };
        assert_eq!(from("10.0.0.4"), [5, 6, 2, 3, 4]);
        for elsewhere in ["10.0.0.6", "10.0.0.7", "10.9.9.9", "fd00::1"] {
            assert_eq!(from(elsewhere), [2, 3, 4, 5, 6], "{elsewhere}");
        }
    }

    #[test]
    fn absurd_ranges_are_refused() {
        for text in [
            "0.0.0.0/0",
            "0.0.0.0/8",
            "127.0.0.0/8",
            "127.0.0.64/26",
            "169.254.1.0/24",
            "224.0.0.0/4",
            "240.0.0.0/5",
            "126.0.0.0/7",
            "::/0",
            "::/64",
            "fe80::/64",
            "ff00::/8",
            "fc00::/7",
        ] {
            let error = Usable::of(&range(text)).unwrap_err();
            assert!(matches!(error, IpamError::Unusable { .. }), "{text}");
            assert!(error.to_string().contains(text), "{error}");
        }
        for text in ["10.0.0.0/8", "100.64.0.0/10", "192.168.0.0/16", "fd00::/8", "2001:db8::/32"] {
            assert!(Usable::of(&range(text)).is_ok(), "{text}");
        }
    }
}
