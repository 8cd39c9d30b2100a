//! Packets by their fields, to bytes and back. Every checksum is computed over all that it covers, in one plain loop:
//! nothing here is the datapath's, so equal bytes prove its incremental sums.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail, ensure};

/// An IP packet in an Ethernet frame; its family is that of its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub hops: u8,
    /// Of IPv4, or of a fragment of IPv6.
    pub id: u16,
    /// Multiples of four bytes of IPv4 options, or the extension headers of IPv6 in units of eight bytes, one after the
    /// other: (number, body without its first byte, which is the next header).
    pub extras: Extras,
    pub body: Body,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    pub options: Vec<u8>,
    pub extensions: Vec<(u8, Vec<u8>)>,
}

/// What IP carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    Tcp(Segment),
    Udp {
        ports: Ports,
        /// Without one the field is zero.
        checksum: bool,
        payload: Vec<u8>,
    },
    Sctp {
        ports: Ports,
        tag: u32,
        /// Whole chunks; the first one says what becomes of the association.
        chunks: Vec<u8>,
    },
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
        payload: Vec<u8>,
    },
    Other {
        proto: u8,
        bytes: Vec<u8>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub ports: Ports,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    /// A multiple of four bytes.
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    pub src: u16,
    pub dst: u16,
}

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// Extension headers of IPv6 that programs walk past (RFC 8200 section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// Ethernet addresses of a packet's sender and of the interface it comes to.
pub const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const HERE: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The length of an Ethernet header.
pub const ETHERNET: usize = 14;

impl Packet {
    pub fn new(src: IpAddr, dst: IpAddr, body: Body) -> Self {
        Self { src, dst, hops: 64, id: 7, extras: Extras::default(), body }
    }

    pub fn proto(&self) -> u8 {
        match self.body {
            Body::Tcp(_) => TCP,
            Body::Udp { .. } => UDP,
            Body::Sctp { .. } => SCTP,
            Body::Icmp { .. } if self.src.is_ipv4() => ICMP,
            Body::Icmp { .. } => ICMPV6,
            Body::Other { proto, .. } => proto,
        }
    }

    /// `None` where the protocol has none.
    pub fn ports(&self) -> Option<Ports> {
        match &self.body {
            Body::Tcp(Segment { ports, .. }) | Body::Udp { ports, .. } | Body::Sctp { ports, .. } => {
                Some(*ports)
            }
            Body::Icmp { .. } | Body::Other { .. } => None,
        }
    }

    /// The same between other ends.
    #[must_use]
    pub fn between(&self, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Self {
        let mut packet = self.clone();
        (packet.src, packet.dst) = (src.0, dst.0);
        match &mut packet.body {
            Body::Tcp(Segment { ports, .. }) | Body::Udp { ports, .. } | Body::Sctp { ports, .. } => {
                *ports = Ports { src: src.1, dst: dst.1 };
            }
            Body::Icmp { .. } | Body::Other { .. } => {}
        }
        packet
    }

    /// Of the transport's header and what it carries.
    pub fn transport_length(&self) -> usize {
        self.transport().len()
    }

    /// As a frame.
    pub fn build(&self) -> Vec<u8> {
        self.frame(&self.transport(), None)
    }

    /// As frames of one fragment each, which carry so many bytes, a multiple of eight.
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let transport = self.transport();
        let parts = transport.chunks(size).enumerate();
        parts
            .map(|(number, part)| {
                let at = number * size;
                self.frame(part, Some((at, at + part.len() < transport.len())))
            })
            .collect()
    }

    fn frame(&self, part: &[u8], fragment: Option<(usize, bool)>) -> Vec<u8> {
        let mut frame = [HERE, SENDER].concat();
        frame.extend(if self.src.is_ipv4() { [8, 0] } else { [0x86, 0xdd] });
        frame.extend(if self.src.is_ipv4() {
            self.header_v4(part.len(), fragment)
        } else {
            self.header_v6(part.len(), fragment)
        });
        frame.extend(part);
        frame
    }

    fn header_v4(&self, payload: usize, fragment: Option<(usize, bool)>) -> Vec<u8> {
        let length = 20 + self.extras.options.len();
        // Whole packets must not be fragmented.
        let flags = fragment.map_or(0x4000, |(at, more)| number(at / 8) | if more { 0x2000 } else { 0 });
        let mut header = vec![0x40 | (length / 4) as u8, 0];
        for word in [number(length + payload), self.id, flags] {
            header.extend(word.to_be_bytes());
        }
        header.extend([self.hops, self.proto(), 0, 0]);
        header.extend(bytes_of(self.src));
        header.extend(bytes_of(self.dst));
        header.extend(&self.extras.options);
        let sum = internet_sum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    fn header_v6(&self, payload: usize, fragment: Option<(usize, bool)>) -> Vec<u8> {
        let mut chain = self.extras.extensions.clone();
        if let Some((at, more)) = fragment {
            let [o0, o1] = (number(at) | u16::from(more)).to_be_bytes();
            let [i0, i1] = self.id.to_be_bytes();
            chain.push((FRAGMENT, vec![0, o0, o1, 0, 0, i0, i1]));
        }
        let mut extensions = Vec::new();
        for (index, (_, body)) in chain.iter().enumerate() {
            extensions.push(chain.get(index + 1).map_or(self.proto(), |(kind, _)| *kind));
            extensions.extend(body);
        }
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(number(extensions.len() + payload).to_be_bytes());
        header.extend([chain.first().map_or(self.proto(), |(kind, _)| *kind), self.hops]);
        header.extend(bytes_of(self.src));
        header.extend(bytes_of(self.dst));
        header.extend(extensions);
        header
    }

    /// Header and payload of the transport, with its checksum.
    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let check = match &self.body {
            Body::Tcp(Segment { ports, seq, ack, flags, options, payload }) => {
                bytes.extend(ports.bytes());
                bytes.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
                bytes.extend([(20 + options.len() as u8) << 2, *flags, 0x20, 0, 0, 0, 0, 0]);
                bytes.extend([options.as_slice(), payload].concat());
                16
            }
            Body::Udp { ports, payload, .. } => {
                bytes.extend(ports.bytes());
                bytes.extend(number(8 + payload.len()).to_be_bytes());
                bytes.extend([&[0, 0], payload.as_slice()].concat());
                6
            }
            Body::Sctp { ports, tag, chunks } => {
                bytes.extend(ports.bytes());
                bytes.extend([&tag.to_be_bytes(), &[0; 4], chunks.as_slice()].concat());
                let check = crc32c(&bytes);
                bytes[8..12].copy_from_slice(&check.to_le_bytes());
                return bytes;
            }
            Body::Icmp { kind, code, rest, payload } => {
                bytes.extend([*kind, *code, 0, 0]);
                bytes.extend([rest, payload.as_slice()].concat());
                2
            }
            Body::Other { bytes, .. } => return bytes.clone(),
        };
        if let Body::Udp { checksum: false, .. } = self.body {
            return bytes;
        }
        let mut sum = self.sum(&bytes);
        // RFC 768: zero would mean that there is none.
        if sum == 0 && self.proto() == UDP {
            sum = 0xffff;
        }
        bytes[check..check + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// The checksum of a transport of this packet: zero where the right one is in it already.
    fn sum(&self, transport: &[u8]) -> u16 {
        if self.proto() == ICMP {
            return internet_sum(&[transport]);
        }
        let length = (transport.len() as u32).to_be_bytes();
        let kind = [0, 0, 0, self.proto()];
        internet_sum(&[&bytes_of(self.src), &bytes_of(self.dst), &length, &kind, transport])
    }

    /// A whole packet. Padding behind it is left out.
    ///
    /// # Errors
    /// Where a header is cut or contradicts another, or a checksum is wrong.
    pub fn parse(frame: &[u8]) -> Result<Self> {
        ensure!(frame.len() > ETHERNET, "no frame");
        let ip = &frame[ETHERNET..];
        match (&frame[12..14], ip[0] >> 4) {
            ([8, 0], 4) => parse_v4(ip),
            ([0x86, 0xdd], 6) => parse_v6(ip),
            (kind, version) => bail!("EtherType {kind:02x?}, IP version {version}"),
        }
    }

    fn of(self, proto: u8, transport: &[u8]) -> Result<Self> {
        let body = parse_body(proto, transport).with_context(|| format!("protocol {proto}"))?;
        let packet = Self { body, ..self };
        match &packet.body {
            Body::Sctp { .. } => {
                let mut blank = transport.to_vec();
                blank[8..12].copy_from_slice(&[0; 4]);
                ensure!(crc32c(&blank).to_le_bytes() == transport[8..12], "wrong SCTP checksum");
            }
            Body::Udp { checksum: false, .. } => {
                ensure!(packet.src.is_ipv4(), "a datagram of IPv6 without checksum");
            }
            Body::Tcp(_) | Body::Udp { .. } | Body::Icmp { .. } => {
                ensure!(packet.sum(transport) == 0, "wrong checksum of protocol {proto}");
            }
            Body::Other { .. } => {}
        }
        Ok(packet)
    }
}

impl Ports {
    fn bytes(self) -> [u8; 4] {
        let ([s0, s1], [d0, d1]) = (self.src.to_be_bytes(), self.dst.to_be_bytes());
        [s0, s1, d0, d1]
    }

    fn of(bytes: &[u8]) -> Self {
        Self { src: word(bytes, 0), dst: word(bytes, 2) }
    }
}

fn parse_v4(ip: &[u8]) -> Result<Packet> {
    let length = usize::from(ip[0] & 15) * 4;
    ensure!(length >= 20 && ip.len() >= length, "IPv4 header of {length} bytes");
    let total = usize::from(word(ip, 2));
    ensure!((length..=ip.len()).contains(&total), "IPv4 says {total} bytes of {}", ip.len());
    ensure!(internet_sum(&[&ip[..length]]) == 0, "wrong IPv4 checksum");
    ensure!(word(ip, 6) & 0x3fff == 0, "a fragment");
    let addr = |at: usize| IpAddr::from([ip[at], ip[at + 1], ip[at + 2], ip[at + 3]]);
    let extras = Extras { options: ip[20..length].to_vec(), ..Extras::default() };
    let body = Body::Other { proto: ip[9], bytes: Vec::new() };
    let packet = Packet { src: addr(12), dst: addr(16), hops: ip[8], id: word(ip, 4), extras, body };
    packet.of(ip[9], &ip[length..total])
}

fn parse_v6(ip: &[u8]) -> Result<Packet> {
    ensure!(ip.len() >= 40, "IPv6 header is cut");
    let total = 40 + usize::from(word(ip, 4));
    ensure!(total <= ip.len(), "IPv6 says {total} bytes of {}", ip.len());
    let addr = |at: usize| -> Result<IpAddr> { Ok(<[u8; 16]>::try_from(&ip[at..at + 16])?.into()) };
    let (mut next, mut at, mut extensions) = (ip[6], 40, Vec::new());
    while [HOP_BY_HOP, ROUTING, DESTINATION].contains(&next) {
        ensure!(at + 8 <= total, "an extension header is cut");
        let length = usize::from(ip[at + 1]) * 8 + 8;
        ensure!(at + length <= total, "an extension header is cut");
        extensions.push((next, ip[at + 1..at + length].to_vec()));
        (next, at) = (ip[at], at + length);
    }
    ensure!(next != FRAGMENT, "a fragment");
    let extras = Extras { extensions, ..Extras::default() };
    let body = Body::Other { proto: next, bytes: Vec::new() };
    let packet = Packet { src: addr(8)?, dst: addr(24)?, hops: ip[7], id: 7, extras, body };
    packet.of(next, &ip[at..total])
}

fn parse_body(proto: u8, bytes: &[u8]) -> Result<Body> {
    let long = |length: usize| {
        ensure!(bytes.len() >= length, "{} bytes are too few", bytes.len());
        Ok(())
    };
    Ok(match proto {
        TCP => {
            long(20)?;
            let offset = usize::from(bytes[12] >> 4) * 4;
            ensure!(offset >= 20, "a header of {offset} bytes");
            long(offset)?;
            let long = |at: usize| u32::from(word(bytes, at)) << 16 | u32::from(word(bytes, at + 2));
            Body::Tcp(Segment {
                ports: Ports::of(bytes),
                seq: long(4),
                ack: long(8),
                flags: bytes[13],
                options: bytes[20..offset].to_vec(),
                payload: bytes[offset..].to_vec(),
            })
        }
        UDP => {
            long(8)?;
            ensure!(usize::from(word(bytes, 4)) == bytes.len(), "another length");
            Body::Udp { ports: Ports::of(bytes), checksum: word(bytes, 6) != 0, payload: bytes[8..].to_vec() }
        }
        SCTP => {
            long(12)?;
            let tag = u32::from(word(bytes, 4)) << 16 | u32::from(word(bytes, 6));
            Body::Sctp { ports: Ports::of(bytes), tag, chunks: bytes[12..].to_vec() }
        }
        ICMP | ICMPV6 => {
            long(8)?;
            let rest = [bytes[4], bytes[5], bytes[6], bytes[7]];
            Body::Icmp { kind: bytes[0], code: bytes[1], rest, payload: bytes[8..].to_vec() }
        }
        proto => Body::Other { proto, bytes: bytes.to_vec() },
    })
}

/// The packet that fragments carry, whose headers must be those of one packet but for what fragments are told apart by.
///
/// # Errors
/// Where they are not of one packet, or that is not whole.
pub fn reassemble(frames: &[Vec<u8>]) -> Result<Packet> {
    let (first, _) = frames.split_first().context("no fragments")?;
    let v4 = first[12..14] == [8, 0];
    let (mut transport, mut last) = (Vec::<u8>::new(), false);
    for frame in frames {
        ensure!(!last, "a fragment behind the last one");
        let ip = &frame[ETHERNET..];
        let (header, flags) = if v4 {
            let length = usize::from(ip[0] & 15) * 4;
            ensure!(internet_sum(&[&ip[..length]]) == 0, "wrong IPv4 checksum of a fragment");
            ensure!(ip[12..20] == first[ETHERNET + 12..ETHERNET + 20], "fragments of other ends");
            (length, word(ip, 6))
        } else {
            ensure!(ip[8..40] == first[ETHERNET + 8..ETHERNET + 40], "fragments of other ends");
            ensure!(ip[6] == FRAGMENT, "a fragment with other extension headers");
            let field = word(ip, 42);
            (48, field >> 3 | (field & 1) << 13)
        };
        ensure!(usize::from(flags & 0x1fff) * 8 == transport.len(), "a fragment is missing");
        transport.extend(&ip[header..]);
        last = flags & 0x2000 == 0;
    }
    ensure!(last, "the last fragment is missing");
    let mut whole = first[..ETHERNET].to_vec();
    let ip = &first[ETHERNET..];
    if v4 {
        let length = usize::from(ip[0] & 15) * 4;
        whole.extend(&ip[..length]);
        let total = number(length + transport.len()).to_be_bytes();
        whole[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&total);
        whole[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&[0x40, 0]);
        whole[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&[0, 0]);
        let sum = internet_sum(&[&whole[ETHERNET..]]).to_be_bytes();
        whole[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum);
    } else {
        whole.extend(&ip[..40]);
        whole[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&number(transport.len()).to_be_bytes());
        whole[ETHERNET + 6] = ip[40];
    }
    whole.extend(transport);
    let packet = Packet::parse(&whole)?;
    Ok(if v4 { packet } else { Packet { id: word(first, ETHERNET + 46), ..packet } })
}

fn number(length: usize) -> u16 {
    length as u16
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub fn bytes_of(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

/// The Internet checksum (RFC 1071) over parts that are one after the other; all but the last are of even length.
fn internet_sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u64::from);
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// RFC 9260 appendix A, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets() -> Vec<Packet> {
        let mut packets = Vec::new();
        for [src, dst] in [["10.0.0.1", "10.0.0.2"], ["fd00::1", "fd00::2"]] {
            let ports = Ports { src: 4000, dst: 80 };
            let segment =
                Segment { ports, seq: 1, ack: 2, flags: ACK, options: vec![1; 8], payload: vec![7; 5] };
            let bodies = [
                Body::Tcp(segment),
                Body::Udp { ports, checksum: true, payload: vec![9; 3] },
                Body::Sctp { ports, tag: 77, chunks: vec![1, 0, 0, 4] },
                Body::Icmp { kind: 8, code: 0, rest: [0; 4], payload: vec![1] },
                Body::Other { proto: 47, bytes: vec![1, 2, 3] },
            ];
            for body in bodies {
                packets.push(Packet::new(src.parse().unwrap(), dst.parse().unwrap(), body));
            }
        }
        packets
    }

    #[test]
    fn what_is_built_is_read_back() {
        for mut packet in packets() {
            assert_eq!(Packet::parse(&packet.build()).unwrap(), packet);
            packet.extras = if packet.src.is_ipv4() {
                Extras { options: vec![1; 8], ..Extras::default() }
            } else {
                let extensions = vec![(HOP_BY_HOP, vec![0, 1, 4, 0, 0, 0, 0]), (DESTINATION, vec![0; 7])];
                Extras { extensions, ..Extras::default() }
            };
            let mut padded = packet.build();
            padded.extend([0; 9]);
            assert_eq!(Packet::parse(&padded).unwrap(), packet);
        }
    }

    #[test]
    fn a_changed_bit_is_seen() {
        for packet in packets().into_iter().filter(|packet| packet.proto() != 47) {
            let mut frame = packet.build();
            *frame.last_mut().unwrap() ^= 1;
            Packet::parse(&frame).unwrap_err();
            let at = if packet.src.is_ipv4() { 31 } else { 50 };
            let mut frame = packet.build();
            frame[at] ^= 1;
            if packet.proto() != SCTP || packet.src.is_ipv4() {
                Packet::parse(&frame).unwrap_err();
            }
        }
    }

    /// The published check value of the polynomial (RFC 3720 appendix B.4 has more of them).
    #[test]
    fn the_sctp_checksum_is_crc32c() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn fragments_carry_what_the_packet_does() {
        for packet in packets().into_iter().filter(|packet| packet.proto() != 47) {
            let whole = packet.build();
            let parts = packet.fragments(8);
            let header = if packet.src.is_ipv4() { 34 } else { 62 };
            assert_eq!(reassemble(&parts).unwrap(), packet);
            assert!(reassemble(&parts[1..]).is_err());
            let carried: Vec<u8> = parts.iter().flat_map(|part| part[header..].to_vec()).collect();
            assert!(whole.ends_with(&carried) && parts.len() > 1 || carried.len() <= 8);
        }
    }
}
