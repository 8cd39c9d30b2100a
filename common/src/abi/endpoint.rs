//! Pods of this node.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How to reach a local pod, by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Endpoint {
    /// The host's end of the pod's veth.
    pub ifindex: u32,
}
