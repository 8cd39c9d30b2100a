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

impl Endpoint {
    /// Whether policies apply to the pod: its flows are tracked then.
    #[inline(always)]
    pub const fn is_isolated(&self) -> bool {
        self.policy.ingress != EndpointPolicy::OPEN || self.policy.egress != EndpointPolicy::OPEN
    }
}
