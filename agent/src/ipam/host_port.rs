//! Ports of the host that a pod was given. They are part of its lease: no two pods of a node have the same.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPort {
    /// 0.0.0.0 and :: stand for every address of the family, none for those of both.
    #[serde(default, rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub protocol: Transport,
    pub container_port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    Tcp,
    Udp,
    Sctp,
}

impl HostPort {
    /// Whether only one pod can have both: the same port at the same address. Every address is another place than one of
    /// them, which goes first.
    pub fn collides(&self, other: &Self) -> bool {
        let same = match (self.host_ip, other.host_ip) {
            (None, None) => true,
            (None, Some(addr)) | (Some(addr), None) => addr.is_unspecified(),
            (Some(own), Some(others)) => own == others,
        };
        same && (self.host_port, self.protocol) == (other.host_port, other.protocol)
    }

    /// Whether a pod with these addresses can be reached by it.
    pub fn serves(&self, addresses: &[IpAddr]) -> bool {
        self.host_ip.is_none_or(|own| addresses.iter().any(|addr| addr.is_ipv4() == own.is_ipv4()))
    }
}

impl Transport {
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host_ip, host_port, protocol, container_port: _ } = self;
        match host_ip {
            None => write!(f, "hostPort {host_port}/{}", protocol.as_str()),
            Some(addr) => write!(f, "hostPort {host_port}/{} of {addr}", protocol.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host_ip: &str, host_port: u16, protocol: Transport) -> HostPort {
        HostPort { host_ip: host_ip.parse().ok(), host_port, protocol, container_port: 80 }
    }

    #[test]
    fn one_port_at_two_addresses_or_of_two_protocols_is_two_ports() {
        use Transport::{Tcp, Udp};
        let any = port("", 8080, Tcp);
        for (other, collides) in [
            (port("", 8080, Tcp), true),
            (port("0.0.0.0", 8080, Tcp), true),
            (port("::", 8080, Tcp), true),
            (port("127.0.0.1", 8080, Tcp), false),
            (port("", 8081, Tcp), false),
            (port("", 8080, Udp), false),
        ] {
            assert_eq!((any.collides(&other), other.collides(&any)), (collides, collides), "{other}");
        }
        assert!(!port("0.0.0.0", 8080, Tcp).collides(&port("::", 8080, Tcp)));
        assert!(port("10.0.0.1", 8080, Tcp).collides(&port("10.0.0.1", 8080, Tcp)));
        assert!(!port("10.0.0.1", 8080, Tcp).collides(&port("10.0.0.2", 8080, Tcp)));
    }

    #[test]
    fn an_address_is_for_pods_of_its_family() {
        let four: [IpAddr; 1] = [[10, 244, 1, 2].into()];
        assert!(
            port("", 80, Transport::Tcp).serves(&four) && port("127.0.0.1", 80, Transport::Tcp).serves(&four)
        );
        assert!(
            !port("::1", 80, Transport::Tcp).serves(&four) && !port("::", 80, Transport::Tcp).serves(&four)
        );
    }
}
