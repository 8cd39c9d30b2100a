//! Fragmented datagrams (rule 38). Only the first fragment has ports, so what it was judged to be is kept for the others;
//! those that come before it wait for it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{Addr, Proto};

/// What all fragments of a datagram have in common as they arrive.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DatagramKey {
    pub src: Addr,
    pub dst: Addr,
    /// As on the wire; IPv4 has the first two bytes.
    pub id: u32,
    /// Zero for IPv6, where the address pair and the identification say it all (RFC 8200 section 4.5).
    pub proto: Proto,
    /// In the table of waiting fragments: which of the datagram's. Zero elsewhere.
    pub part: u8,
    /// 1 where the node's stack sends the fragment, which has passed another hook before; else 0.
    pub side: u8,
    pub reserved: u8,
}

/// What becomes of a datagram's fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Datagram {
    /// What source and destination become, where it is [`Datagram::REWRITTEN`]; the source stands for the node that it goes
    /// to, where it is [`Datagram::RELAYED`].
    pub src: Addr,
    pub dst: Addr,
    /// [`Datagram::AWAITED`], [`Datagram::PASSES`], [`Datagram::REWRITTEN`], [`Datagram::DROPPED`] or
    /// [`Datagram::RELAYED`].
    pub fate: u8,
    /// Those of the flow's [`crate::abi::conntrack::Entry`].
    pub flags: u8,
    /// How many fragments wait.
    pub held: u8,
    pub reserved: u8,
    /// Seconds of `CLOCK_MONOTONIC` after which this is another datagram with the same identification.
    pub expires: u32,
}

impl Datagram {
    /// Its first fragment has not come yet.
    pub const AWAITED: u8 = 0;
    /// Of no service.
    pub const PASSES: u8 = 1;
    pub const REWRITTEN: u8 = 2;
    /// Its first fragment was dropped or refused.
    pub const DROPPED: u8 = 3;
    /// To another node, as it is ([`super::relay`]).
    pub const RELAYED: u8 = 4;

    /// How long a receiver waits for the rest (`net.ipv4.ipfrag_time`).
    pub const LIFETIME: u32 = 30;
    /// How many fragments of one datagram wait: those of 64 KiB, the most a datagram may have, at the common MTU.
    pub const MAX_HELD: u8 = 45;
}

/// A fragment that waits, from its Ethernet header on.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HeldFragment {
    /// How many of the bytes are its.
    pub length: u32,
    pub bytes: [u8; Self::MAX_LEN],
}

impl HeldFragment {
    /// A jumbo frame.
    pub const MAX_LEN: usize = 9_216;
}
