//! IPv4 and IPv6 behind one trait, so that logic is written once and compiled twice.

use core::fmt::Debug;
use core::hash::Hash;
use core::mem::offset_of;

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use zerocopy::transmute;

use crate::abi::conntrack::Tuple;
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
    /// Where the header's own checksum is; IPv6 has none.
    const CSUM_OFF: Option<u32>;
    const ICMP: Proto;

    /// The address from its words in memory order; the first one alone for IPv4.
    fn from_words(words: [u32; 4]) -> Self::Bytes;
    fn addr(bytes: Self::Bytes) -> Addr;
    fn bytes(addr: &Addr) -> Self::Bytes;
    /// The address as 32-bit words in memory order, unused ones zero: what checksums and hashes add up.
    fn words(bytes: &Self::Bytes) -> [u32; 4];
    /// A flow's key from its ends and its ports, which are side by side in memory order: by words, as the kernel reads it to
    /// hash it.
    fn tuple(ends: [Self::Bytes; 2], ports: u32, proto: Proto) -> Tuple<Self::Bytes>;

    /// The key of what comes back.
    #[inline(always)]
    fn turned(tuple: &Tuple<Self::Bytes>) -> Tuple<Self::Bytes> {
        Self::tuple([tuple.dst, tuple.src], tuple.ports().rotate_left(16), tuple.proto)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct V4;

#[derive(Clone, Copy, Debug)]
pub struct V6;

impl Family for V4 {
    type Bytes = [u8; 4];

    const ETHERTYPE: u16 = 0x0800;
    const HDR_LEN: u32 = Ipv4Hdr::LEN as u32;
    const SRC_OFF: u32 = offset_of!(Ipv4Hdr, src_addr) as u32;
    const DST_OFF: u32 = offset_of!(Ipv4Hdr, dst_addr) as u32;
    const CSUM_OFF: Option<u32> = Some(offset_of!(Ipv4Hdr, check) as u32);
    const ICMP: Proto = Proto::ICMP;

    #[inline(always)]
    fn from_words([word, ..]: [u32; 4]) -> [u8; 4] {
        word.to_ne_bytes()
    }

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

    #[inline(always)]
    fn tuple([src, dst]: [[u8; 4]; 2], ports: u32, proto: Proto) -> Tuple<[u8; 4]> {
        let [src, dst] = [src, dst].map(u32::from_ne_bytes);
        transmute!([src, dst, ports, u32::from_ne_bytes([proto.number, 0, 0, 0])])
    }
}

impl Family for V6 {
    type Bytes = [u8; 16];

    const ETHERTYPE: u16 = 0x86dd;
    const HDR_LEN: u32 = Ipv6Hdr::LEN as u32;
    const SRC_OFF: u32 = offset_of!(Ipv6Hdr, src_addr) as u32;
    const DST_OFF: u32 = offset_of!(Ipv6Hdr, dst_addr) as u32;
    const CSUM_OFF: Option<u32> = None;
    const ICMP: Proto = Proto::ICMPV6;

    #[inline(always)]
    fn from_words(words: [u32; 4]) -> [u8; 16] {
        transmute!(words)
    }

    #[inline(always)]
    fn addr(bytes: [u8; 16]) -> Addr {
        Addr::v6(bytes)
    }

    #[inline(always)]
    fn bytes(addr: &Addr) -> [u8; 16] {
        addr.bytes
    }

    #[inline(always)]
    fn words(bytes: &[u8; 16]) -> [u32; 4] {
        transmute!(*bytes)
    }

    #[inline(always)]
    fn tuple([src, dst]: [[u8; 16]; 2], ports: u32, proto: Proto) -> Tuple<[u8; 16]> {
        let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (Self::words(&src), Self::words(&dst));
        transmute!([s0, s1, s2, s3, d0, d1, d2, d3, ports, u32::from_ne_bytes([proto.number, 0, 0, 0])])
    }
}
