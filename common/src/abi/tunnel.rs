//! Where the pods of other nodes are, as far as this node has routes of its own to them: by the link, or in VXLAN
//! (RFC 7348).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::Addr;

/// The way to a range of pods, or to a node itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tunnel {
    /// The node's own address, of either family.
    pub node: Addr,
    /// The network's identifier, 24 bits.
    pub vni: u32,
    /// The interface of the tunnel's device here; 0 where there is none on the way.
    pub device: u32,
    /// Of what that carries, in bytes from the IP header on.
    pub room: u32,
}

/// The link-layer address of every tunnel device: whatever a node puts into a tunnel is for the device at its end.
pub const DEVICE_MAC: [u8; 6] = *b"\x02ferro";

/// What packets in a tunnel come from. The kernel drops those that come from the device's own address.
pub const SENDER_MAC: [u8; 6] = *b"\x02flow\0";
