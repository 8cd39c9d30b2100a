//! How packets leave this node for the pods of others.

use std::collections::BTreeMap;

use ferroflow_common::addr::Addr;

use super::Prefix;

/// Where packets to a range of addresses go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// To a neighbour on one of this host's own links.
    Via { gateway: Addr, ifindex: u32 },
    /// Out of the tunnel's device, whose programs know the node.
    Tunnel {
        /// Of what the host itself sends; the kernel's choice where there is none.
        source: Option<Addr>,
    },
    /// Nowhere, and the sender is told.
    Unreachable,
}

/// The tunnel's device, as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TunnelLink {
    pub ifindex: u32,
    /// Of what it carries, in bytes from the IP header on.
    pub mtu: u32,
}

/// One way for a range.
pub type Routes = BTreeMap<Prefix, Way>;
