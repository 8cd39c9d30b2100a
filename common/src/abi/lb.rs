//! The load-balancing tables: a frontend names a range of slots, a slot names a backend.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::relay::NodeNumber;
use crate::addr::{Addr, Port, Proto};

/// What a client addresses. One hash lookup by this key decides whether a packet is for a service.
///
/// A NodePort has no address of its own: its row is at [`FrontendKey::NODE_V4`] or [`FrontendKey::NODE_V6`], which
/// stand for every address of this node that serves NodePorts. A row with an address goes before it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FrontendKey {
    pub addr: Addr,
    pub port: Port,
    pub proto: Proto,
    /// [`FrontendKey::EXTERNAL`], [`FrontendKey::INTERNAL`], [`FrontendKey::OWN`] or [`FrontendKey::RELAYED`].
    pub scope: u8,
}

impl FrontendKey {
    /// The row for traffic from anywhere: the one to look up first.
    pub const EXTERNAL: u8 = 0;
    /// The row for traffic from this node's own pods and from its host, where that goes elsewhere (rule 16). It
    /// exists where the external row says [`Frontend::INTERNAL_ROW`], and is written before that.
    pub const INTERNAL: u8 = 1;
    /// A port of a loopback address: sockets of the host alone look it up. A packet that claims to be for a loopback
    /// address of the host finds nothing (CVE-2020-8558).
    pub const OWN: u8 = 2;
    /// The row for packets that another node relayed (see [`crate::abi::relay`]): it has that node's choices, as far as
    /// they are of this one. It exists where the external row says [`Frontend::RELAYS`].
    pub const RELAYED: u8 = 3;

    /// Stands for the node's IPv4 addresses.
    pub const NODE_V4: Addr = Addr::v4([0; 4]);
    /// Stands for the node's IPv6 addresses.
    pub const NODE_V6: Addr = Addr::UNSPECIFIED;

    /// The row that says of a cluster IP that a service has it: for the ports that no service has there, which refuse
    /// (rule 19). Port and protocol 0 are nobody's.
    #[inline(always)]
    pub const fn cluster_ip(addr: Addr) -> Self {
        Self { addr, port: Port::ZERO, proto: Proto { number: 0 }, scope: Self::EXTERNAL }
    }

    /// Whether it is a row of [`FrontendKey::cluster_ip`].
    pub fn is_cluster_ip(&self) -> bool {
        *self == Self::cluster_ip(self.addr)
    }
}

/// Where a frontend's slots are. Replaced as a whole, so a program sees the old range or the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Frontend {
    pub service: u32,
    /// First slot.
    pub offset: u32,
    /// Number of slots; 0 means that [`Frontend::flags`] says what happens instead.
    pub length: u32,
    pub flags: u32,
    /// Seconds for which a client keeps its backend after its last packet (rule 29); 0 without session affinity. The
    /// same for all frontends of a service, which share the client's choice.
    pub affinity: u32,
}

impl Frontend {
    /// Without slots: answer with RST or port unreachable (rule 14). Unset: drop (rule 15).
    pub const REJECT: u32 = 1;
    /// There is a row with [`FrontendKey::INTERNAL`], and it is the one for traffic from this node (rule 16).
    pub const INTERNAL_ROW: u32 = 2;
    /// The backend sees the client's address (`externalTrafficPolicy: Local`), so that [`Frontend::NORTH_SOUTH`]
    /// traffic is not masqueraded. What the host itself sends is, all the same (rule 26 d).
    pub const KEEP_CLIENT: u32 = 4;
    /// A NodePort, a load balancer's address or an external address: replies have to come back through this node
    /// (rule 26 a), and internal policy is not for it (rule 18).
    pub const NORTH_SOUTH: u32 = 8;
    /// New connections only from clients that `source_ranges` has (rule 22).
    pub const SOURCE_RANGES: u32 = 16;
    /// The slots are a Maglev table: every node chooses the same backend for a flow. Said for eyes only.
    pub const MAGLEV: u32 = 32;
    /// The slots are the service's endpoints on this node.
    pub const LOCAL: u32 = 64;
    /// Of two slots by chance the backend with fewer open connections, as `connections` has them, gets a new one.
    pub const LEAST_CONNECTION: u32 = 128;
    /// A port of this host that leads to one of its pods. Where it has no address of its own it is at every address of
    /// the host, whichever of them serve NodePorts.
    pub const HOST_PORT: u32 = 256;
    /// Packets from outside go to a backend on another node as they are, through that node
    /// ([`crate::abi::relay`]), which keeps the client's address with the policy Cluster too.
    pub const RELAYS: u32 = 512;

    /// Whether a backend that a client remembers is still one of those that this frontend chooses among; its
    /// generation is for the caller to compare (rule 29).
    #[inline(always)]
    pub const fn chooses(&self, backend: &Backend) -> bool {
        let member = if self.flags & Self::LOCAL == 0 { Backend::CLUSTER } else { Backend::LOCAL };
        backend.flags & (Backend::LIVE | member) == Backend::LIVE | member
    }
}

/// The index of a backend; 0 is no backend, which is what a fresh array holds.
pub type Slot = u32;

/// How many connections a backend has open, as far as this node opened them: counted up by the programs as they open
/// one of a [`Frontend::LEAST_CONNECTION`] service, and set right by the agent each time it sweeps the connection
/// tables. In between, what closed still counts: the figure is too high by at most what closed since the last sweep. (A
/// connection that opens during a sweep may be missed, until the next.) A number that served another backend before
/// starts from that one's figure, until the next sweep.
pub type Connections = u64;

/// One endpoint of one service port. A row that slots may name never becomes another endpoint's: it is released by a
/// new generation, rests for a grace period and may then serve another endpoint. A flow that remembers (index,
/// generation) therefore learns at its next packet that its backend is gone. Only the flags and the node change
/// meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Backend {
    pub addr: Addr,
    pub port: Port,
    pub proto: Proto,
    pub flags: u8,
    pub generation: u32,
    pub service: u32,
    /// The node that it is on, where packets may be relayed there; 0 where it is on this one, on none that is known, or
    /// nothing is relayed.
    pub node: NodeNumber,
}

impl Backend {
    /// The row is in use.
    pub const LIVE: u8 = 1;
    /// It is one of those that frontends with the policy Cluster choose among.
    pub const CLUSTER: u8 = 2;
    /// It is one of those that frontends with the policy Local choose among.
    pub const LOCAL: u8 = 4;
}

/// Clients that may use a service's load balancer addresses: a key of the LPM trie `source_ranges`, which wants the
/// number of significant bits first and compares the rest from its first byte on. To look a client up, ask with
/// [`SourceRangeKey::EVERY_BIT`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SourceRangeKey {
    /// The service's 32 bits, and those of the prefix: 96 more than it says where it is of IPv4.
    pub bits: u32,
    pub data: ServiceClient,
}

/// What [`SourceRangeKey::bits`] counts the bits of.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ServiceClient {
    pub service: u32,
    pub addr: Addr,
}

impl SourceRangeKey {
    pub const EVERY_BIT: u32 = 32 + 128;
    /// Neither is who is in no range.
    pub const DENY: SourceRange = 0;
    pub const ALLOW: SourceRange = 1;
}

/// [`SourceRangeKey::ALLOW`] or [`SourceRangeKey::DENY`]: whether clients in a range, and in none that is longer, may
/// use the service. (An IPv6 range like `::/0` contains the mapped IPv4 addresses, for which it does not speak.)
pub type SourceRange = u32;

/// Whose choice is remembered: a client's, for all frontends of a service port (rule 29).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AffinityKey {
    pub client: Addr,
    pub service: u32,
}

/// Which backend a client of a service with session affinity has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Affinity {
    pub backend: u32,
    /// The backend's generation at the choice.
    pub generation: u32,
    /// Seconds of `CLOCK_MONOTONIC` at its last packet.
    pub last_used: u32,
}

/// Who a service id is, as `namespace/name:port`, ended by zeros. Each of the three is a DNS label of at most 63 bytes
/// (RFC 1123), and an unnamed port leaves out the colon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ServiceName {
    pub text: [u8; 192],
}

impl ServiceName {
    /// `None` where the text is longer than the field.
    pub fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; 192];
        bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(Self { text: bytes })
    }

    /// The text, or `None` where another writer left bytes that are not UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        let end = self.text.iter().position(|&byte| byte == 0).unwrap_or(self.text.len());
        core::str::from_utf8(self.text.get(..end)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_29_a_backend_is_kept_only_while_the_frontend_chooses_it() {
        let frontend = |flags| Frontend { service: 1, offset: 0, length: 1, flags, affinity: 9 };
        let backend = |flags| {
            let (addr, port, proto) = (Addr::UNSPECIFIED, Port::ZERO, Proto::TCP);
            Backend { addr, port, proto, flags, generation: 0, service: 1, node: 0 }
        };
        let (live, cluster, local) = (Backend::LIVE, Backend::CLUSTER, Backend::LOCAL);
        for (policy, flags, chosen) in [
            (0, live | cluster, true),
            (0, live | local, false),
            (0, live, false),
            (0, cluster, false),
            (Frontend::LOCAL, live | local, true),
            (Frontend::LOCAL, live | cluster, false),
        ] {
            assert_eq!(frontend(policy).chooses(&backend(flags)), chosen, "{policy} {flags}");
        }
    }

    #[test]
    fn a_service_name_fits_or_is_refused() {
        let longest = core::str::from_utf8(&[b'a'; 192]).unwrap();
        for text in ["default/web:http", "", longest] {
            assert_eq!(ServiceName::new(text).unwrap().as_str(), Some(text));
        }
        assert_eq!(ServiceName::new(core::str::from_utf8(&[b'a'; 193]).unwrap()), None);
    }
}
