//! From the Ethernet header to the ports.

use ferroflow_common::abi::conntrack::Tuple;
use ferroflow_common::addr::{Port, Proto};
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::tcp::Flags;
use ferroflow_common::verdict::DropReason;
use network_types::ip::IpProto;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use crate::packet::{L3, Packet};
use crate::tables::Aligned;

/// Where a packet stands in its datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    Whole,
    First,
    /// Has no transport header.
    Later,
}

/// The IP header, read.
#[derive(Clone, Copy, Debug)]
pub struct Network<F: Family> {
    pub src: F::Bytes,
    pub dst: F::Bytes,
    pub proto: Proto,
    /// Where the transport header starts.
    pub l4: u32,
    pub fragment: Fragment,
}

/// Headers down to the ports.
#[derive(Clone, Copy, Debug)]
pub struct Headers<F: Family> {
    pub tuple: Aligned<Tuple<F::Bytes>>,
    pub l4: u32,
    /// [`Flags::NONE`] unless TCP.
    pub flags: Flags,
    pub fragment: Fragment,
}

/// Finds the transport header behind this family's network header.
pub trait Parse: Family {
    /// # Errors
    /// [`DropReason::Truncated`] or [`DropReason::ExtensionHeaders`].
    fn network<P: Packet>(packet: &P) -> Result<Network<Self>, DropReason>;
}

impl Parse for V4 {
    #[inline(always)]
    fn network<P: Packet>(packet: &P) -> Result<Network<Self>, DropReason> {
        let [first, second, third, src, dst] = packet.words(L3).ok_or(DropReason::Truncated)?;
        let [vihl, _tos, len0, len1] = first.to_ne_bytes();
        let [_id0, _id1, frag0, frag1] = second.to_ne_bytes();
        let [_ttl, proto, _check0, _check1] = third.to_ne_bytes();
        let ihl = u32::from(vihl & 0xf) * 4;
        if vihl >> 4 != 4 || ihl < Self::HDR_LEN {
            return Err(DropReason::Truncated);
        }
        // A zero length is a packet over 64 KiB built by the kernel (IPv4 BIG TCP, kernel commit b1a78b9b9886).
        let total = u32::from(u16::from_be_bytes([len0, len1]));
        if total != 0 && (total < ihl || L3 + total > packet.length()) {
            return Err(DropReason::Truncated);
        }
        let frags = u16::from_be_bytes([frag0, frag1]);
        Ok(Network {
            src: Self::from_words([src, 0, 0, 0]),
            dst: Self::from_words([dst, 0, 0, 0]),
            proto: Proto { number: proto },
            l4: L3 + ihl,
            fragment: fragment(frags & 0x1fff, frags & 0x2000),
        })
    }
}

/// How many IPv6 extension headers are followed (rule 39): the four kinds a sender may put before a transport header
/// once each, one of them twice (RFC 8200 section 4.1), and one to spare.
const EXTENSION_HEADERS: usize = 6;

impl Parse for V6 {
    #[inline(always)]
    fn network<P: Packet>(packet: &P) -> Result<Network<Self>, DropReason> {
        let [first, second, s0, s1, s2, s3, d0, d1, d2, d3] =
            packet.words(L3).ok_or(DropReason::Truncated)?;
        if first.to_ne_bytes()[0] >> 4 != 6 {
            return Err(DropReason::Truncated);
        }
        let [len0, len1, mut next, _hop_limit] = second.to_ne_bytes();
        // Zero is a jumbo payload: IPv6 BIG TCP (kernel commit 0fe79f28bfaf).
        let payload = u32::from(u16::from_be_bytes([len0, len1]));
        if payload != 0 && L3 + Self::HDR_LEN + payload > packet.length() {
            return Err(DropReason::Truncated);
        }
        let src = Self::from_words([s0, s1, s2, s3]);
        let dst = Self::from_words([d0, d1, d2, d3]);
        let mut l4 = L3 + Self::HDR_LEN;
        let mut part = Fragment::Whole;
        for _ in 0..EXTENSION_HEADERS {
            if !extension(next) {
                return Ok(Network { src, dst, proto: Proto { number: next }, l4, fragment: part });
            }
            let [word] = packet.words(l4).ok_or(DropReason::Truncated)?;
            let extension = word.to_ne_bytes();
            if next == IpProto::Ipv6Frag as u8 {
                let frags = u16::from_be_bytes([extension[2], extension[3]]);
                part = fragment(frags & 0xfff8, frags & 1);
                l4 += 8;
            } else if next == IpProto::Ah as u8 {
                l4 += (u32::from(extension[1]) + 2) * 4;
            } else {
                l4 += (u32::from(extension[1]) + 1) * 8;
            }
            next = extension[0];
            if part == Fragment::Later {
                return Ok(Network { src, dst, proto: Proto { number: next }, l4, fragment: part });
            }
        }
        Err(DropReason::ExtensionHeaders)
    }
}

#[inline(always)]
const fn fragment(offset: u16, more: u16) -> Fragment {
    if offset != 0 {
        Fragment::Later
    } else if more != 0 {
        Fragment::First
    } else {
        Fragment::Whole
    }
}

#[inline(always)]
const fn extension(next: u8) -> bool {
    next == IpProto::HopOpt as u8
        || next == IpProto::Ipv6Route as u8
        || next == IpProto::Ipv6Frag as u8
        || next == IpProto::Ah as u8
        || next == IpProto::Ipv6Opts as u8
}

/// The headers of a packet whose flow can be followed; `None` for protocols without ports and for later fragments,
/// which are the stack's.
///
/// # Errors
/// [`DropReason::Truncated`] where a header does not fit, [`DropReason::ExtensionHeaders`].
#[inline(always)]
pub fn headers<F: Parse, P: Packet>(packet: &P) -> Result<Option<Headers<F>>, DropReason> {
    let network = F::network(packet)?;
    if network.fragment == Fragment::Later {
        return Ok(None);
    }
    let (ports, flags) = if network.proto == Proto::TCP {
        let [ports, _seq, _ack, control, _check] =
            packet.words::<{ TcpHdr::LEN / 4 }>(network.l4).ok_or(DropReason::Truncated)?;
        (ports, Flags(control.to_ne_bytes()[1]))
    } else if network.proto == Proto::UDP {
        let [ports, _check] = packet.words::<{ UdpHdr::LEN / 4 }>(network.l4).ok_or(DropReason::Truncated)?;
        (ports, Flags::NONE)
    } else {
        return Ok(None);
    };
    let ports = ports.to_ne_bytes();
    let tuple = Aligned(Tuple {
        src: network.src,
        dst: network.dst,
        src_port: Port { be: [ports[0], ports[1]] },
        dst_port: Port { be: [ports[2], ports[3]] },
        proto: network.proto,
        reserved: [0; 3],
    });
    Ok(Some(Headers { tuple, l4: network.l4, flags, fragment: network.fragment }))
}
