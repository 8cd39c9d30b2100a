//! IPv4 and IPv6 behind one trait, so that logic is written once and compiled twice.

use core::fmt::Debug;
use core::hash::Hash;

use zerocopy::{FromBytes, Immutable, IntoBytes, Unaligned};

use crate::addr::{Addr, Proto};

/// What differs between the families on the wire. Offsets are from the start of the IP header, lengths in bytes.
pub trait Family: Copy + 'static {
    /// An address in its own length.
    type Bytes: Copy + Eq + Ord + Hash + Debug + AsRef<[u8]>;

    const ETHERTYPE: u16;
    /// The fixed header, without options or extension headers.
    const HDR_LEN: u32;
    const SRC_OFF: u32;
    const DST_OFF: u32;
    const TTL_OFF: u32;
    /// Where the header's own checksum is; IPv6 has none.
    const CSUM_OFF: Option<u32>;
    const ICMP: Proto;

    fn addr(bytes: Self::Bytes) -> Addr;
    fn bytes(addr: &Addr) -> Self::Bytes;
    /// The address as 32-bit words in memory order, unused ones zero: what checksums and hashes add up.
    fn words(bytes: &Self::Bytes) -> [u32; 4];
}

/// What a flow table's key is made of; implied by every [`Family::Bytes`] this crate has.
pub trait Wire: FromBytes + IntoBytes + Immutable + Unaligned {}

impl<const N: usize> Wire for [u8; N] {}

#[derive(Clone, Copy, Debug)]
pub struct V4;

#[derive(Clone, Copy, Debug)]
pub struct V6;

impl Family for V4 {
    type Bytes = [u8; 4];

    const ETHERTYPE: u16 = 0x0800;
    const HDR_LEN: u32 = 20;
    const SRC_OFF: u32 = 12;
    const DST_OFF: u32 = 16;
    const TTL_OFF: u32 = 8;
    const CSUM_OFF: Option<u32> = Some(10);
    const ICMP: Proto = Proto::ICMP;

    #[inline(always)]
    fn addr(bytes: [u8; 4]) -> Addr {
        Addr::v4(bytes)
    }

    #[inline(always)]
    fn bytes(addr: &Addr) -> [u8; 4] {
        addr.v4_bytes()
    }

    #[inline(always)]
    fn words(bytes: &[u8; 4]) -> [u32; 4] {
        [u32::from_ne_bytes(*bytes), 0, 0, 0]
    }
}

impl Family for V6 {
    type Bytes = [u8; 16];

    const ETHERTYPE: u16 = 0x86dd;
    const HDR_LEN: u32 = 40;
    const SRC_OFF: u32 = 8;
    const DST_OFF: u32 = 24;
    const TTL_OFF: u32 = 7;
    const CSUM_OFF: Option<u32> = None;
    const ICMP: Proto = Proto::ICMPV6;

    #[inline(always)]
    fn addr(bytes: [u8; 16]) -> Addr {
        Addr::v6(bytes)
    }

    #[inline(always)]
    fn bytes(addr: &Addr) -> [u8; 16] {
        addr.bytes
    }

    #[inline(always)]
    fn words(b: &[u8; 16]) -> [u32; 4] {
        [
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ]
    }
}
