//! Pods of this node.

use super::policy::EndpointPolicy;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How to reach a local pod, and who may, by its address. Both are there at once or not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Endpoint {
    /// The host's end of the pod's device; with [`Endpoint::QUEUED`] where packets to the pod wait there for their turn.
    pub link: u32,
    pub policy: EndpointPolicy,
}

impl Endpoint {
    /// A bit that no index of an interface has: the interface has a queue of its own, as a limit of the pod's bandwidth
    /// is, which packets are not to pass by.
    pub const QUEUED: u32 = 1 << 31;

    /// The index of the interface.
    #[inline(always)]
    pub const fn ifindex(&self) -> u32 {
        self.link & !Self::QUEUED
    }

    /// Whether policies apply to the pod: its flows are tracked then.
    #[inline(always)]
    pub const fn is_isolated(&self) -> bool {
        self.policy.ingress != EndpointPolicy::OPEN || self.policy.egress != EndpointPolicy::OPEN
    }
}
