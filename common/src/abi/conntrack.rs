//! Tracked flows. A flow through a service has two entries, one per direction, each found by the tuple of the packet
//! as it arrives. An entry says what that tuple becomes, so its partner's key is that, turned around. So has a flow of no
//! service that policies were asked about ([`Entry::PLAIN`]).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::addr::{Addr, Port, Proto};

/// A packet's addresses and ports as it arrives; `A` is `[u8; 4]` or `[u8; 16]`. An ICMP echo has its identifier for the
/// port of who asks, and 0 for the other.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Tuple<A> {
    pub src: A,
    pub dst: A,
    pub src_port: Port,
    pub dst_port: Port,
    pub proto: Proto,
    pub reserved: [u8; 3],
}

impl<A> Tuple<A> {
    /// Both ports, as they stand side by side.
    #[inline(always)]
    pub const fn ports(&self) -> u32 {
        let ([s0, s1], [d0, d1]) = (self.src_port.be, self.dst_port.be);
        u32::from_ne_bytes([s0, s1, d0, d1])
    }
}

/// One direction of a tracked flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Entry {
    /// What the packet's source becomes. Forward: the client's own, or what stands in for it (rule 26). Reply: the
    /// frontend's.
    pub src: Addr,
    /// What the packet's destination becomes. Forward: the backend's. Reply: the client's own.
    pub dst: Addr,
    pub src_port: Port,
    pub dst_port: Port,
    /// [`Entry::FORWARD`] or [`Entry::REPLY`].
    pub kind: u8,
    /// The bits of [`crate::tcp::State`].
    pub state: u8,
    /// [`Entry::OWN_SOURCE`] and the constants behind it.
    pub flags: u8,
    pub reserved: u8,
    /// [`Settings::epoch`](super::node::Settings::epoch) when policies were last asked about the flow, by a packet of this
    /// direction.
    pub epoch: u32,
    pub backend: u32,
    /// The backend's generation when the flow chose it.
    pub generation: u32,
    /// Seconds of `CLOCK_MONOTONIC` after which an idle flow is gone.
    pub expires: u32,
}

impl Entry {
    pub const FORWARD: u8 = 1;
    pub const REPLY: u8 = 2;
    /// The source becomes this node's own address: the stack would take such a packet for a forgery, so it goes out of
    /// its device at once.
    pub const OWN_SOURCE: u8 = 1;
    /// The flow is of no service, and its packets stay what they are: it is tracked because policies apply to one of its
    /// ends, which were asked about its first packet. Where there is no port the tuple has zero, and an ICMP echo has its
    /// identifier in place of the port of who asks (RFC 5508 section 3).
    pub const PLAIN: u8 = 2;
    /// The backend of a plain flow: none that the table of backends has.
    pub const NO_BACKEND: u32 = u32::MAX;
    /// A pod's flow to the world. Its packets are rewritten where they leave the node, and no sooner: until then the
    /// stack routes them as the pod's.
    pub const MASQUERADED: u8 = 4;
    /// The client talks to the backend through a service and by its own address, from one port: once translated, packets of
    /// one flow have the tuple of the other. Those of a pod are translated where the pod sends them, and then not again.
    pub const SHADOWING: u8 = 8;
    /// This node's own process opened it: no policy has a say in it (rule 49), also when live flows are judged again.
    pub const EXEMPT: u8 = 16;
    /// The backend is on another node, which gets the client's packets as they are ([`super::relay`]) and answers by
    /// itself: there is no other direction here. The source stands for that node, the destination is the backend's address.
    pub const RELAYS: u8 = 32;
    /// The client's packets come relayed by another node, for an address that may be none of this one's. What the
    /// backend answers goes past the stack.
    pub const RELAYED: u8 = 64;
}
