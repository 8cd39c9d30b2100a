//! Pods of this node.

use super::policy::EndpointPolicy;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How to reach a local pod, and who may, by its address. Both are there at once or not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Endpoint {
    /// The host's end of the pod's veth.
    pub ifindex: u32,
    pub policy: EndpointPolicy,
}
