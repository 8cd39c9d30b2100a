//! Direct server return: a packet from outside for a backend on another node goes there as it is, in the tunnel, and that
//! node answers the client by itself. So the backend sees the client's address with `externalTrafficPolicy: Cluster` too.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::Addr;

/// What stands for a node in the tables: a hash of its name, which every node computes alike. Never 0.
pub type NodeNumber = u32;

/// Stands for the node with this number where an address does.
#[inline(always)]
#[must_use]
pub const fn stand_in(node: NodeNumber) -> Addr {
    Addr::v4(node.to_ne_bytes())
}

/// The number of the node that the address [stands for](stand_in).
#[inline(always)]
#[must_use]
pub const fn stands_for(addr: &Addr) -> NodeNumber {
    let [.., number] = addr.words();
    number
}

/// How packets leave this node for others that relay nothing further.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Relay {
    /// The tunnel's interface; 0 where nothing is relayed.
    pub device: u32,
    /// How long a packet in the tunnel may be, in bytes from its IP header on.
    pub room: u32,
    /// The network's identifier, 24 bits.
    pub vni: u32,
}

/// What relayed packets come from in the tunnel, which tells them from those of pods.
pub const SENDER_MAC: [u8; 6] = *b"\x02relay";
