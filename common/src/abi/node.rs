//! What the programs know of the node they run on.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::Addr;

/// One of this node's own addresses, by the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeAddress {
    pub flags: u32,
}

impl NodeAddress {
    /// NodePorts are served on it (`nodePortAddresses`, rule 24).
    pub const NODE_PORTS: u32 = 1;
}

/// What stands in for clients whose replies must come back through this node (rule 26).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Masquerade {
    /// [`Addr::UNSPECIFIED`] where the node has no address of the family.
    pub v4: Addr,
    pub v6: Addr,
}
