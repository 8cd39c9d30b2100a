//! Tracked flows. A flow through a service has two entries, one per direction, each found by the tuple of the packet
//! as it arrives; an entry holds what the other one's key is made of, so either finds its partner.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::addr::{Addr, Port, Proto};

/// A packet's addresses and ports as it arrives; `A` is `[u8; 4]` or `[u8; 16]`.
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

/// One direction of a tracked flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Entry {
    /// What the packet's address becomes: forward, the destination becomes the backend's; reply, the source becomes
    /// the frontend's.
    pub nat: Addr,
    pub nat_port: Port,
    /// [`Entry::FORWARD`] or [`Entry::REPLY`], with [`Entry::LOOPED`].
    pub kind: u8,
    /// The bits of [`crate::tcp::State`].
    pub state: u8,
    pub service: u32,
    pub backend: u32,
    /// The backend's generation when the flow chose it.
    pub generation: u32,
    /// Seconds of `CLOCK_BOOTTIME` after which an idle flow is gone.
    pub expires: u32,
}

impl Entry {
    pub const FORWARD: u8 = 1;
    pub const REPLY: u8 = 2;
    /// The client is its own backend (rule 26 b). A pod does not take packets from its own address, so the frontend's
    /// address stands in for the client's: the other end's address becomes what the rewritten end's was.
    pub const LOOPED: u8 = 4;

    #[inline(always)]
    pub const fn is_forward(&self) -> bool {
        self.kind & Self::FORWARD != 0
    }

    #[inline(always)]
    pub const fn is_looped(&self) -> bool {
        self.kind & Self::LOOPED != 0
    }
}
