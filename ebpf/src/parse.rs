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
use crate::service::Way;
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
    /// Where the datagram ends; what follows is padding.
    pub end: u32,
    pub fragment: Fragment,
    /// Where the identification is that the fragments of one datagram share: two bytes in IPv4, four in IPv6, and of no
    /// meaning in an IPv6 packet that is whole.
    pub id_at: u32,
}

/// Headers down to the ports.
#[derive(Clone, Copy, Debug)]
pub struct Headers<F: Family> {
    pub tuple: Aligned<Tuple<F::Bytes>>,
    pub l4: u32,
    /// Where the datagram ends; what follows is padding. [`UNKNOWN`] where SCTP's checksum covers more than this fragment.
    pub end: u32,
    /// [`Flags::NONE`] unless TCP or SCTP.
    pub flags: Flags,
}

/// Finds the transport header behind this family's network header.
pub trait Parse: Family {
    /// The types of an ICMP echo's request and reply (RFC 792, RFC 4443 section 4).
    const ECHO: [u8; 2];

    /// The header at `at`. [`Network::end`] may be beyond the packet, as in what an ICMP error quotes.
    ///
    /// # Errors
    /// [`DropReason::Truncated`] or [`DropReason::ExtensionHeaders`].
    fn header<P: Packet>(packet: &P, at: u32) -> Result<Network<Self>, DropReason>;

    /// Source and destination of the header at `at`, `None` where the packet ends before.
    fn ends<P: Packet>(packet: &P, at: u32) -> Option<Aligned<[Self::Bytes; 2]>>;

    /// The packet's own header.
    ///
    /// # Errors
    /// [`DropReason::Truncated`] or [`DropReason::ExtensionHeaders`].
    #[inline(always)]
    fn network<P: Packet>(packet: &P) -> Result<Network<Self>, DropReason> {
        let network = Self::header(packet, L3)?;
        if network.end > packet.length() {
            return Err(DropReason::Truncated);
        }
        Ok(network)
    }
}

impl Parse for V4 {
    const ECHO: [u8; 2] = [8, 0];

    #[inline(always)]
    fn header<P: Packet>(packet: &P, at: u32) -> Result<Network<Self>, DropReason> {
        let [first, second, third, src, dst] = packet.words(at).ok_or(DropReason::Truncated)?;
        let [vihl, _tos, len0, len1] = first.to_ne_bytes();
        let [_id0, _id1, frag0, frag1] = second.to_ne_bytes();
        let [_ttl, proto, _check0, _check1] = third.to_ne_bytes();
        let ihl = u32::from(vihl & 0xf) * 4;
        if vihl >> 4 != 4 || ihl < Self::HDR_LEN {
            return Err(DropReason::Truncated);
        }
        // A zero length is a packet over 64 KiB built by the kernel (IPv4 BIG TCP, kernel commit b1a78b9b9886).
        let total = u32::from(u16::from_be_bytes([len0, len1]));
        let end = if total == 0 { packet.length() } else { at + total };
        if end < at + ihl {
            return Err(DropReason::Truncated);
        }
        let frags = u16::from_be_bytes([frag0, frag1]);
        Ok(Network {
            src: Self::from_words([src, 0, 0, 0]),
            dst: Self::from_words([dst, 0, 0, 0]),
            proto: Proto { number: proto },
            l4: at + ihl,
            end,
            fragment: fragment(frags & 0x1fff, frags & 0x2000),
            id_at: at + 4,
        })
    }

    #[inline(always)]
    fn ends<P: Packet>(packet: &P, at: u32) -> Option<Aligned<[Self::Bytes; 2]>> {
        let [src, dst] = packet.words(at + Self::SRC_OFF)?;
        Some(Aligned([Self::from_words([src, 0, 0, 0]), Self::from_words([dst, 0, 0, 0])]))
    }
}

/// How many IPv6 extension headers are followed (rule 39): the four kinds a sender may put before a transport header
/// once each, one of them twice (RFC 8200 section 4.1), and one to spare.
const EXTENSION_HEADERS: usize = 6;

impl Parse for V6 {
    const ECHO: [u8; 2] = [128, 129];

    #[inline(always)]
    fn header<P: Packet>(packet: &P, at: u32) -> Result<Network<Self>, DropReason> {
        let [first, second, s0, s1, s2, s3, d0, d1, d2, d3] =
            packet.words(at).ok_or(DropReason::Truncated)?;
        if first.to_ne_bytes()[0] >> 4 != 6 {
            return Err(DropReason::Truncated);
        }
        let [len0, len1, mut next, _hop_limit] = second.to_ne_bytes();
        // Zero is a jumbo payload: IPv6 BIG TCP (kernel commit 0fe79f28bfaf).
        let payload = u32::from(u16::from_be_bytes([len0, len1]));
        let end = if payload == 0 { packet.length() } else { at + Self::HDR_LEN + payload };
        let src = Self::from_words([s0, s1, s2, s3]);
        let dst = Self::from_words([d0, d1, d2, d3]);
        let mut l4 = at + Self::HDR_LEN;
        let mut part = Fragment::Whole;
        let mut id_at = at;
        for _ in 0..EXTENSION_HEADERS {
            if !extension(next) {
                return Ok(Network {
                    src,
                    dst,
                    proto: Proto { number: next },
                    l4,
                    end,
                    fragment: part,
                    id_at,
                });
            }
            let [word] = packet.words(l4).ok_or(DropReason::Truncated)?;
            let extension = word.to_ne_bytes();
            if next == IpProto::Ipv6Frag as u8 {
                let frags = u16::from_be_bytes([extension[2], extension[3]]);
                id_at = packet.forget(l4 + 4);
                part = fragment(frags & 0xfff8, frags & 1);
                l4 += 8;
            } else if next == IpProto::Ah as u8 {
                l4 += (u32::from(extension[1]) + 2) * 4;
            } else {
                l4 += (u32::from(extension[1]) + 1) * 8;
            }
            next = extension[0];
            l4 = packet.forget(l4);
            if part == Fragment::Later {
                return Ok(Network {
                    src,
                    dst,
                    proto: Proto { number: next },
                    l4,
                    end,
                    fragment: part,
                    id_at,
                });
            }
        }
        if extension(next) {
            return Err(DropReason::ExtensionHeaders);
        }
        Ok(Network { src, dst, proto: Proto { number: next }, l4, end, fragment: part, id_at })
    }

    #[inline(always)]
    fn ends<P: Packet>(packet: &P, at: u32) -> Option<Aligned<[Self::Bytes; 2]>> {
        let [s0, s1, s2, s3, d0, d1, d2, d3] = packet.words(at + Self::SRC_OFF)?;
        Some(Aligned([Self::from_words([s0, s1, s2, s3]), Self::from_words([d0, d1, d2, d3])]))
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

/// Whether a later fragment with this protocol may be of a datagram with ports. Behind IPv6's fragment header may be
/// more extension headers, of which only the first fragment has the end.
#[inline(always)]
pub fn may_have_ports<F: Family>(proto: Proto) -> bool {
    matches!(proto, Proto::TCP | Proto::UDP | Proto::SCTP)
        || (F::CSUM_OFF.is_none() && extension(proto.number))
}

/// An end beyond that of any packet.
pub const UNKNOWN: u32 = u32::MAX;

/// SCTP's common header and that of the first chunk.
const SCTP_LEN: usize = 16;

/// The headers of a packet whose flow can be followed; `None` for protocols without ports and for later fragments,
/// which are the stack's.
///
/// # Errors
/// [`DropReason::Truncated`] where a header does not fit, [`DropReason::ExtensionHeaders`].
#[inline(always)]
pub fn headers<F: Parse, P: Packet>(packet: &P) -> Result<Option<Headers<F>>, DropReason> {
    transport(packet, F::network(packet)?)
}

/// The same where a first fragment may be left aside, as `None`.
///
/// # Errors
/// As [`headers`].
#[inline(always)]
pub fn headers_of<F: Parse, P: Packet>(packet: &P, way: Way) -> Result<Option<Headers<F>>, DropReason> {
    let network = F::network(packet)?;
    if network.fragment == Fragment::First && way != Way::FIRST_FRAGMENT {
        return Ok(None);
    }
    transport(packet, network)
}

/// The same for a packet whose network header is read.
///
/// # Errors
/// [`DropReason::Truncated`].
#[inline(always)]
pub fn transport<F: Parse, P: Packet>(
    packet: &P,
    mut network: Network<F>,
) -> Result<Option<Headers<F>>, DropReason> {
    if network.fragment == Fragment::Later {
        return Ok(None);
    }
    network.l4 = packet.forget(network.l4);
    let (length, flags) = if network.proto == Proto::TCP {
        let [_ports, _seq, _ack, control, _check] =
            packet.words::<{ TcpHdr::LEN / 4 }>(network.l4).ok_or(DropReason::Truncated)?;
        (TcpHdr::LEN as u32, Flags(control.to_ne_bytes()[1]))
    } else if network.proto == Proto::UDP {
        (UdpHdr::LEN as u32, Flags::NONE)
    } else if network.proto == Proto::SCTP {
        // Every packet has a chunk (RFC 9260 section 3).
        let [_ports, _tag, _check, chunk] =
            packet.words::<{ SCTP_LEN / 4 }>(network.l4).ok_or(DropReason::Truncated)?;
        if network.fragment == Fragment::First {
            network.end = UNKNOWN;
        }
        (SCTP_LEN as u32, Flags::of_chunk(chunk.to_ne_bytes()[0]))
    } else {
        return Ok(None);
    };
    // From here on the protocols are one to the verifier.
    let length = packet.forget(length);
    let flags = Flags(packet.forget(u32::from(flags.0)) as u8);
    let proto = Proto { number: packet.forget(u32::from(network.proto.number)) as u8 };
    let [ports] = packet.words(network.l4).ok_or(DropReason::Truncated)?;
    if network.l4 + length > network.end {
        return Err(DropReason::Truncated);
    }
    let tuple = Aligned(F::tuple([network.src, network.dst], ports, proto));
    Ok(Some(Headers { tuple, l4: network.l4, end: network.end, flags }))
}

/// The headers of any packet but a later fragment. Without ports those of the tuple are zero, but for those of an ICMP
/// echo, whose identifier stands for the port of who asks.
///
/// # Errors
/// As [`headers`].
#[inline(always)]
pub fn flow<F: Parse, P: Packet>(packet: &P) -> Result<Option<Headers<F>>, DropReason> {
    let network = F::network(packet)?;
    if network.fragment == Fragment::Later {
        return Ok(None);
    }
    if matches!(network.proto, Proto::TCP | Proto::UDP | Proto::SCTP) {
        return transport(packet, network);
    }
    let l4 = packet.forget(network.l4);
    let (mut src_port, mut dst_port) = (Port::ZERO, Port::ZERO);
    if network.proto == F::ICMP
        && let Some([message, id]) = packet.words(l4)
    {
        let ([kind, ..], [high, low, ..]) = (message.to_ne_bytes(), id.to_ne_bytes());
        let ([request, reply], id) = (F::ECHO, Port { be: [high, low] });
        if kind == request {
            src_port = id;
        } else if kind == reply {
            dst_port = id;
        }
    }
    let (src, dst, proto) = (network.src, network.dst, network.proto);
    let tuple = Aligned(Tuple { src, dst, src_port, dst_port, proto, reserved: [0; 3] });
    Ok(Some(Headers { tuple, l4, end: network.end, flags: Flags::NONE }))
}

/// The headers of a whole packet that [`headers`] found ports in, but for its flags; `None` where it ends before.
#[inline(always)]
pub fn again<F: Parse, P: Packet>(packet: &P, proto: Proto, l4: u32, end: u32) -> Option<Headers<F>> {
    let ends = F::ends(packet, L3)?.0;
    let [ports] = packet.words(l4)?;
    let tuple = Aligned(F::tuple(ends, ports, proto));
    Some(Headers { tuple, l4, end, flags: Flags::NONE })
}

#[cfg(test)]
mod tests {
    use ferroflow_common::tcp::chunk;

    use super::*;
    use crate::frame::{self, AUTHENTICATION, Frame, Names, Part, ROUTING, Transport, both_families};
    use crate::packet::Bytes;

    both_families!(
        ports_are_found_behind_options_and_extension_headers,
        a_truncated_packet_is_told_at_every_length,
        a_length_that_lies_is_told,
        a_header_in_the_padding_is_none,
        fragments_are_told_apart,
        protocols_without_ports_are_the_stacks,
        another_version_is_told,
    );

    fn plain<F: Names>() -> [Frame; 3] {
        let (client, vip) = ((F::pod(1), 4000), (F::vip(1), 80));
        [Frame::tcp(client, vip, Flags::SYN), Frame::udp(client, vip), Frame::sctp(client, vip, chunk::INIT)]
    }

    fn read<F: Parse>(bytes: &[u8]) -> Result<Option<Headers<F>>, DropReason> {
        headers::<F, Bytes>(&Bytes(bytes.to_vec()))
    }

    fn ports_are_found_behind_options_and_extension_headers<F: Names + Parse>() {
        for frame in plain::<F>() {
            for frame in [frame.clone(), frame.clone().payload(b"payload"), frame.extended()] {
                let bytes = frame.build();
                let found = read::<F>(&bytes).unwrap().unwrap();
                let tuple = &found.tuple;
                assert_eq!((F::addr(tuple.src), F::addr(tuple.dst)), (frame.src, frame.dst));
                assert_eq!((tuple.src_port.host(), tuple.dst_port.host()), (4000, 80));
                let udp = matches!(frame.transport, Transport::Udp { .. });
                assert_eq!(found.flags, if udp { Flags::NONE } else { Flags(Flags::SYN) });
                assert_eq!(found.end as usize, bytes.len());
                assert_eq!(bytes[found.l4 as usize..][..4], [0x0f, 0xa0, 0, 80]);
            }
        }
    }

    fn a_truncated_packet_is_told_at_every_length<F: Names + Parse>() {
        for frame in plain::<F>() {
            for frame in [frame.clone(), frame.payload(b"payload").extended()] {
                let bytes = frame.build();
                for length in 0..bytes.len() {
                    let cut = read::<F>(&bytes[..length]);
                    assert!(matches!(cut, Err(DropReason::Truncated)), "{length} of {}", bytes.len());
                }
            }
        }
    }

    /// Sets the length that the IP header gives, counted from the header's start.
    fn lie<F: Family>(bytes: &mut [u8], length: u16) {
        let v4 = F::CSUM_OFF.is_some();
        let (at, length) = if v4 { (16, length) } else { (18, length - 40) };
        bytes[at..at + 2].copy_from_slice(&length.to_be_bytes());
    }

    fn a_length_that_lies_is_told<F: Names + Parse>() {
        for frame in plain::<F>() {
            let mut bytes = frame.payload(b"payload").build();
            let honest = u16::try_from(bytes.len() - L3 as usize).unwrap();
            for length in honest + 1..honest + 100 {
                lie::<F>(&mut bytes, length);
                assert!(matches!(read::<F>(&bytes), Err(DropReason::Truncated)), "{length}");
            }
        }
    }

    fn a_header_in_the_padding_is_none<F: Names + Parse>() {
        for frame in plain::<F>() {
            let mut bytes = frame.build();
            let honest = u16::try_from(bytes.len() - L3 as usize).unwrap();
            bytes.extend([0; 6]);
            assert_eq!(read::<F>(&bytes).unwrap().unwrap().end, L3 + u32::from(honest));
            // Zero is a length of its own: over 64 KiB.
            let header = u16::try_from(F::HDR_LEN).unwrap();
            for length in header + 1..honest {
                lie::<F>(&mut bytes, length);
                assert!(matches!(read::<F>(&bytes), Err(DropReason::Truncated)), "{length}");
            }
        }
    }

    fn fragments_are_told_apart<F: Names + Parse>() {
        for frame in plain::<F>() {
            let first = frame.clone().payload(&[7; 16]).part(Part::First).build();
            assert_eq!(F::network(&Bytes(first.clone())).unwrap().fragment, Fragment::First);
            assert!(read::<F>(&first).unwrap().is_some());
            assert!(headers_of::<F, Bytes>(&Bytes(first), Way::USUAL).unwrap().is_none());
            let later = frame.payload(b"later").part(Part::Later(64)).build();
            assert!(read::<F>(&later).unwrap().is_none());
        }
    }

    fn protocols_without_ports_are_the_stacks<F: Names + Parse>() {
        for proto in [Proto::ICMP, Proto::ICMPV6, Proto { number: 59 }, Proto { number: 255 }] {
            let frame = Frame::new((F::pod(1), 0), (F::vip(1), 0), Transport::Other(proto));
            assert!(read::<F>(&frame.build()).unwrap().is_none(), "{proto}");
        }
    }

    fn another_version_is_told<F: Names + Parse>() {
        let [mut frame, ..] = plain::<F>().map(|frame| frame.build());
        for version in (0..16).filter(|version| *version != frame[14] >> 4).collect::<Vec<_>>() {
            frame[14] = version << 4 | 5;
            assert!(matches!(read::<F>(&frame), Err(DropReason::Truncated)), "{version}");
        }
    }

    #[test]
    fn an_ipv4_header_length_under_five_words_is_told() {
        for words in 0..5 {
            let mut bytes = plain::<V4>()[0].build();
            bytes[14] = 0x40 | words;
            assert!(matches!(read::<V4>(&bytes), Err(DropReason::Truncated)), "{words}");
        }
    }

    #[test]
    fn big_tcp_has_no_length() {
        let [v4, v6] = [plain::<V4>()[0].build(), plain::<V6>()[0].build()];
        let big = |mut bytes: Vec<u8>, at: usize| {
            bytes[at..at + 2].copy_from_slice(&[0, 0]);
            bytes.resize(70_000, 1);
            bytes
        };
        assert_eq!(read::<V4>(&big(v4, 16)).unwrap().unwrap().end, 70_000);
        assert_eq!(read::<V6>(&big(v6, 18)).unwrap().unwrap().end, 70_000);
    }

    #[test]
    fn rule_39_extension_headers_are_followed_to_a_bound() {
        let [frame, ..] = plain::<V6>();
        let kinds = [frame::HOP_BY_HOP, frame::DESTINATION_OPTIONS, ROUTING, AUTHENTICATION];
        for count in 0..12 {
            let extensions = (0..count).map(|index| (kinds[index % 4], 1 + (index % 3) as u8)).collect();
            let found = read::<V6>(&Frame { extensions, ..frame.clone() }.build());
            if count <= EXTENSION_HEADERS {
                assert_eq!(found.unwrap().unwrap().tuple.dst_port, Port::new(80), "{count}");
            } else {
                assert!(matches!(found, Err(DropReason::ExtensionHeaders)), "{count}");
            }
        }
        // The longest one takes the ports out of reach of direct reads.
        let extensions = vec![(frame::DESTINATION_OPTIONS, 31); 3];
        assert!(read::<V6>(&Frame { extensions, ..frame.clone() }.build()).unwrap().is_some());
    }
}
