//! Packets for tests: built from their fields, every checksum computed in full.

use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::crc32c;
use ferroflow_common::csum::{self, Sum};
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::tcp::{Flags, chunk};
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::device;
use crate::masquerade;
use crate::packet::{Bytes, L3};
use crate::pod;
use crate::service::Origin;
use crate::tables::fake::Fake;

/// A packet by its fields; its family is that of its addresses. What a test expects is the packet it sent with other
/// fields: built again, so that equal bytes prove the checksums too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub src: Addr,
    pub dst: Addr,
    pub src_port: u16,
    pub dst_port: u16,
    pub transport: Transport,
    pub payload: Vec<u8>,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers, by protocol number and units of eight bytes.
    pub extensions: Vec<(u8, u8)>,
    pub fragment: Option<Part>,
    /// The datagram's identification; a whole IPv6 packet has none.
    pub id: u16,
    pub hop_limit: u8,
    pub macs: Macs,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// `options` is a multiple of four bytes.
    Tcp {
        seq: u32,
        ack: u32,
        flags: u8,
        options: Vec<u8>,
    },
    Udp {
        checksum: UdpChecksum,
    },
    /// With one chunk, whose header comes before the payload.
    Sctp {
        chunk: u8,
    },
    /// ICMP of the packet's family. The source port is the identifier of an echo.
    Icmp {
        kind: u8,
        code: u8,
        /// What follows the checksum, such as a router's MTU.
        parameter: u32,
    },
    /// All of it is payload.
    Other(Proto),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpChecksum {
    Full,
    /// Zero: there is none.
    None,
}

/// A fragment's place in its datagram. One that is not the first has no transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    First,
    /// So many bytes, a multiple of eight, come before, and more come after.
    Middle(u16),
    /// The last one.
    Later(u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Macs {
    pub dst: [u8; 6],
    pub src: [u8; 6],
}

/// A port of an address.
pub type Socket = (Addr, u16);

impl Frame {
    /// A TCP segment with these flags.
    pub fn tcp(src: Socket, dst: Socket, flags: u8) -> Self {
        let ack = if flags & Flags::ACK != 0 { 0xa0b0_c0d0 } else { 0 };
        Self::new(src, dst, Transport::Tcp { seq: 0x0102_0304, ack, flags, options: Vec::new() })
    }

    pub fn udp(src: Socket, dst: Socket) -> Self {
        Self::new(src, dst, Transport::Udp { checksum: UdpChecksum::Full })
    }

    pub fn sctp(src: Socket, dst: Socket, chunk: u8) -> Self {
        Self::new(src, dst, Transport::Sctp { chunk })
    }

    pub fn icmp(src: Addr, dst: Addr, kind: u8, code: u8) -> Self {
        Self::new((src, 0), (dst, 0), Transport::Icmp { kind, code, parameter: 0 })
    }

    pub fn new(src: Socket, dst: Socket, transport: Transport) -> Self {
        Self {
            src: src.0,
            dst: dst.0,
            src_port: src.1,
            dst_port: dst.1,
            transport,
            payload: Vec::new(),
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            id: 0,
            hop_limit: 64,
            macs: Macs { dst: [2, 0, 0, 0, 0, 1], src: [2, 0, 0, 0, 0, 2] },
        }
    }

    #[must_use]
    pub fn payload(self, payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), ..self }
    }

    /// With eight bytes of IPv4 options, or the IPv6 headers for hop-by-hop and destination options.
    #[must_use]
    pub fn extended(self) -> Self {
        if self.is_v4() {
            Self { options: vec![1; 8], ..self }
        } else {
            Self { extensions: vec![(HOP_BY_HOP, 1), (DESTINATION_OPTIONS, 2)], ..self }
        }
    }

    #[must_use]
    pub fn part(self, part: Part) -> Self {
        Self { fragment: Some(part), ..self }
    }

    /// The same datagram in fragments of so many bytes, a multiple of eight. Unlike [`Frame::part`], what they carry is
    /// this frame's, and the checksum covers all of it.
    pub fn fragments(&self, size: u16) -> Vec<Self> {
        let body = self.transport_bytes();
        let parts = body.chunks(size.into()).zip((0..).step_by(size.into()));
        parts
            .map(|(chunk, at)| {
                let more = usize::from(at) + chunk.len() < body.len();
                let part = match (at, more) {
                    (0, _) => Part::First,
                    (_, true) => Part::Middle(at),
                    (_, false) => Part::Later(at),
                };
                let transport = Transport::Other(self.proto());
                Self { transport, payload: chunk.to_vec(), fragment: Some(part), ..self.clone() }
            })
            .collect()
    }

    #[must_use]
    pub fn sent_to(self, (dst, dst_port): Socket) -> Self {
        Self { dst, dst_port, ..self }
    }

    #[must_use]
    pub fn sent_from(self, (src, src_port): Socket) -> Self {
        Self { src, src_port, ..self }
    }

    /// What its receiver would send back with these TCP flags; an INIT is acknowledged, others are as they are.
    #[must_use]
    pub fn answer(&self, flags: u8) -> Self {
        let (src, dst) = ((self.dst, self.dst_port), (self.src, self.src_port));
        match self.transport {
            Transport::Tcp { .. } => Self::tcp(src, dst, flags),
            Transport::Sctp { chunk: chunk::INIT } => Self::sctp(src, dst, chunk::INIT_ACK),
            Transport::Udp { .. } | Transport::Sctp { .. } | Transport::Icmp { .. } | Transport::Other(_) => {
                Self { transport: self.transport.clone(), ..Self::udp(src, dst) }
            }
        }
    }

    /// From the other end of the link.
    #[must_use]
    pub fn turned(self) -> Self {
        Self { macs: Macs { dst: self.macs.src, src: self.macs.dst }, ..self }
    }

    pub fn packet(&self) -> Bytes {
        Bytes(self.build())
    }

    pub fn build(&self) -> Vec<u8> {
        let transport = self.transport_bytes();
        let mut bytes = [self.macs.dst, self.macs.src].concat();
        bytes.extend(if self.is_v4() { self.v4(&transport) } else { self.v6(&transport) });
        bytes.extend(transport);
        bytes
    }

    fn is_v4(&self) -> bool {
        self.src.ip().is_ipv4()
    }

    pub fn proto(&self) -> Proto {
        match self.transport {
            Transport::Tcp { .. } => Proto::TCP,
            Transport::Udp { .. } => Proto::UDP,
            Transport::Sctp { .. } => Proto::SCTP,
            Transport::Icmp { .. } => {
                if self.is_v4() {
                    Proto::ICMP
                } else {
                    Proto::ICMPV6
                }
            }
            Transport::Other(proto) => proto,
        }
    }

    /// Through [`pod::leaving`]: where it goes and what it has become.
    ///
    /// # Errors
    /// Why it is dropped; it is as it was.
    pub fn leave(&self, tables: &Fake) -> Result<(Verdict, Vec<u8>), DropReason> {
        let mut packet = self.packet();
        let verdict = pod::leaving(&mut packet, tables);
        self.outcome(verdict, packet)
    }

    /// Through [`pod::entering`].
    ///
    /// # Errors
    /// As [`Frame::leave`].
    pub fn enter(&self, tables: &Fake) -> Result<(Verdict, Vec<u8>), DropReason> {
        let mut packet = self.packet();
        let verdict = pod::entering(&mut packet, tables);
        self.outcome(verdict, packet)
    }

    /// Through [`pod::entering_pod`].
    ///
    /// # Errors
    /// As [`Frame::leave`].
    pub fn enter_pod(&self, tables: &Fake, origin: Origin) -> Result<(Verdict, Vec<u8>), DropReason> {
        let mut packet = self.packet();
        let verdict = pod::entering_pod(&mut packet, tables, origin);
        self.outcome(verdict, packet)
    }

    /// Through [`device::arriving`].
    ///
    /// # Errors
    /// As [`Frame::leave`].
    pub fn arrive(&self, tables: &Fake) -> Result<(Verdict, Vec<u8>), DropReason> {
        let mut packet = self.packet();
        let verdict = device::arriving(&mut packet, tables);
        self.outcome(verdict, packet)
    }

    /// Through [`device::arriving_from`], as another node relays it.
    ///
    /// # Errors
    /// As [`Frame::leave`].
    pub fn relay(&self, tables: &Fake) -> Result<(Verdict, Vec<u8>), DropReason> {
        let mut packet = self.packet();
        let verdict = device::arriving_from(&mut packet, tables, Origin::Relay);
        self.outcome(verdict, packet)
    }

    /// Through [`masquerade::leaving`].
    ///
    /// # Errors
    /// As [`Frame::leave`].
    pub fn exit(&self, tables: &Fake) -> Result<(Verdict, Vec<u8>), DropReason> {
        let mut packet = self.packet();
        let verdict = masquerade::leaving(&mut packet, tables);
        self.outcome(verdict, packet)
    }

    fn outcome(
        &self,
        verdict: Result<Verdict, DropReason>,
        Bytes(bytes): Bytes,
    ) -> Result<(Verdict, Vec<u8>), DropReason> {
        assert!(verdict.is_ok() || bytes == self.build(), "dropped ({verdict:?}) and changed: {self:?}");
        Ok((verdict?, bytes))
    }

    /// EtherType and header.
    fn v4(&self, transport: &[u8]) -> Vec<u8> {
        let length = 20 + self.options.len();
        let [l0, l1] = sixteen(length + transport.len());
        let [f0, f1] = match self.fragment {
            None => [0x40, 0],
            Some(Part::First) => [0x20, 0],
            Some(Part::Middle(at)) => (0x2000 | (at / 8)).to_be_bytes(),
            Some(Part::Later(at)) => (at / 8).to_be_bytes(),
        };
        let [i0, i1] = self.id.to_be_bytes();
        let vihl = 0x40 | u8::try_from(length / 4).unwrap_or(15);
        let mut header = vec![vihl, 0, l0, l1, i0, i1, f0, f1, self.hop_limit, self.proto().number, 0, 0];
        header.extend(self.src.v4_bytes());
        header.extend(self.dst.v4_bytes());
        header.extend(&self.options);
        let sum = csum::bytes(&header).finish();
        header[10..12].copy_from_slice(&sum);
        [&V4::ETHERTYPE.to_be_bytes(), header.as_slice()].concat()
    }

    /// EtherType, header and extension headers.
    fn v6(&self, transport: &[u8]) -> Vec<u8> {
        let mut chain: Vec<(u8, Vec<u8>)> = Vec::new();
        for &(kind, units) in &self.extensions {
            let mut body = vec![0; usize::from(units) * 8];
            // An authentication header counts in words and leaves out two (RFC 4302 section 2.2); the others leave
            // out one unit, and the padding option fills them.
            body[1] = if kind == AUTHENTICATION { units * 2 - 2 } else { units - 1 };
            body[2] = if kind == AUTHENTICATION { 0 } else { 1 };
            body[3] = units * 8 - 4;
            chain.push((kind, body));
        }
        if let Some(part) = self.fragment {
            let [f0, f1] = match part {
                Part::First => [0, 1],
                Part::Middle(at) => (at | 1).to_be_bytes(),
                Part::Later(at) => (at & !7).to_be_bytes(),
            };
            let [i0, i1] = self.id.to_be_bytes();
            chain.push((FRAGMENT, vec![0, 0, f0, f1, 0, 0, i0, i1]));
        }
        let mut next = self.proto().number;
        for (kind, body) in chain.iter_mut().rev() {
            body[0] = next;
            next = *kind;
        }
        let extensions: Vec<u8> = chain.into_iter().flat_map(|(_, body)| body).collect();
        let [l0, l1] = sixteen(extensions.len() + transport.len());
        let mut header = vec![0x60, 0, 0, 0, l0, l1, next, self.hop_limit];
        header.extend(self.src.bytes);
        header.extend(self.dst.bytes);
        [&V6::ETHERTYPE.to_be_bytes(), header.as_slice(), extensions.as_slice()].concat()
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let ports = [Port::new(self.src_port).be, Port::new(self.dst_port).be].concat();
        let (mut header, check) = match &self.transport {
            _ if matches!(self.fragment, Some(Part::Middle(_) | Part::Later(_))) => {
                return self.payload.clone();
            }
            Transport::Other(_) => return self.payload.clone(),
            Transport::Tcp { seq, ack, flags, options } => {
                let offset = u8::try_from(20 + options.len()).unwrap_or(60) << 2;
                // A reset offers no window.
                let window = if flags & Flags::RST == 0 { 0x20 } else { 0 };
                let control = [offset, *flags, window, 0, 0, 0, 0, 0];
                let words = [seq.to_be_bytes(), ack.to_be_bytes()].concat();
                ([&ports, words.as_slice(), &control, options].concat(), 16)
            }
            Transport::Udp { .. } => {
                let [l0, l1] = sixteen(8 + self.payload.len());
                ([ports.as_slice(), &[l0, l1, 0, 0]].concat(), 6)
            }
            Transport::Sctp { chunk } => {
                let [l0, l1] = sixteen(4 + self.payload.len());
                let tag = [0x0a, 0x0b, 0x0c, 0x0d];
                let mut packet = [&ports, &tag[..], &[0; 4], &[*chunk, 0, l0, l1], &self.payload].concat();
                let check = crc32c::checksum(&[&packet]);
                packet[8..12].copy_from_slice(&check.to_le_bytes());
                return packet;
            }
            Transport::Icmp { kind, code, parameter } => {
                // An echo's identifier is the port of who asks for it, and the other has none.
                let [high, low] = (self.src_port | self.dst_port).to_be_bytes();
                let [p0, p1, p2, p3] = parameter.to_be_bytes();
                (vec![*kind, *code, 0, 0, p0 | high, p1 | low, p2, p3], 2)
            }
        };
        header.extend(&self.payload);
        let udp = matches!(self.transport, Transport::Udp { .. });
        if self.transport == (Transport::Udp { checksum: UdpChecksum::None }) {
            return header;
        }
        let sum = match (&self.transport, self.is_v4()) {
            (Transport::Icmp { .. }, true) => Sum::ZERO,
            _ => pseudo_header(&self.src, &self.dst, self.proto(), header.len()),
        };
        let sum = sum.half(csum::bytes(&header).folded()).finish();
        // RFC 768: a sum of zero is sent as its other form.
        let sum = if udp && sum == [0, 0] { [0xff, 0xff] } else { sum };
        header[check..check + 2].copy_from_slice(&sum);
        header
    }
}

/// Whether every checksum of the packet is right, computed over all that it covers.
///
/// # Errors
/// What is wrong, also where the packet is not IP or too short. A fragment's transport checksum is not looked at.
pub fn verify(packet: &[u8]) -> Result<(), String> {
    let short = || "too short".to_owned();
    let ip = packet.get(L3 as usize..).ok_or_else(short)?;
    let (proto, at, whole, end, src, dst) = match ip.first().map(|byte| byte >> 4) {
        Some(4) => {
            let length = usize::from(ip[0] & 0xf) * 4;
            let header = ip.get(..length.max(20)).ok_or_else(short)?;
            if csum::bytes(header).folded() != 0xffff {
                return Err("IPv4 header checksum".into());
            }
            let word = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
            let whole = u16::from_be_bytes([header[6], header[7]]) & 0x3fff == 0;
            let end = usize::from(u16::from_be_bytes([header[2], header[3]]));
            (header[9], length, whole, end, Addr::v4(word(12)), Addr::v4(word(16)))
        }
        Some(6) => {
            let header = ip.get(..40).ok_or_else(short)?;
            let (proto, at, whole) = transport(ip, header[6]).ok_or_else(short)?;
            let address = |at: usize| Addr::v6(std::array::from_fn(|byte| header[at + byte]));
            let end = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
            (proto, at, whole, end, address(8), address(24))
        }
        _ => return Err("not IP".into()),
    };
    let body = ip.get(at..end).ok_or_else(short)?;
    let proto = Proto { number: proto };
    let sum = match proto {
        _ if !whole => return Ok(()),
        Proto::SCTP => return crc(body),
        Proto::ICMP => Sum::ZERO,
        Proto::UDP if body.get(6..8) == Some(&[0, 0]) && src.ip().is_ipv4() => return Ok(()),
        Proto::TCP | Proto::UDP | Proto::ICMPV6 => pseudo_header(&src, &dst, proto, body.len()),
        Proto { .. } => return Ok(()),
    };
    if sum.half(csum::bytes(body).folded()).folded() == 0xffff {
        Ok(())
    } else {
        Err(format!("{proto} checksum"))
    }
}

fn crc(body: &[u8]) -> Result<(), String> {
    let (before, rest) = body.split_at_checked(8).ok_or("too short")?;
    let (check, after) = rest.split_first_chunk::<4>().ok_or("too short")?;
    let right = u32::from_le_bytes(*check) == crc32c::checksum(&[before, &[0; 4], after]);
    if right { Ok(()) } else { Err("SCTP checksum".into()) }
}

/// The protocol behind the extension headers, where its header is, and whether the packet is no fragment.
fn transport(ip: &[u8], mut next: u8) -> Option<(u8, usize, bool)> {
    let mut at = 40;
    let mut whole = true;
    while [HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS].contains(&next) {
        let extension = ip.get(at..at + 8)?;
        at += match next {
            FRAGMENT => 8,
            AUTHENTICATION => usize::from(extension[1]) * 4 + 8,
            _ => usize::from(extension[1]) * 8 + 8,
        };
        whole &= next != FRAGMENT;
        next = extension[0];
    }
    Some((next, at, whole))
}

fn pseudo_header(src: &Addr, dst: &Addr, proto: Proto, length: usize) -> Sum {
    let (src, dst) = if src.ip().is_ipv4() {
        (src.v4_bytes().to_vec(), dst.v4_bytes().to_vec())
    } else {
        (src.bytes.to_vec(), dst.bytes.to_vec())
    };
    let [l0, l1] = sixteen(length);
    csum::bytes(&[src, dst, vec![0, proto.number, l0, l1]].concat())
}

fn sixteen(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const AUTHENTICATION: u8 = 51;
pub const DESTINATION_OPTIONS: u8 = 60;

/// Addresses by number, so that one test serves both families.
pub trait Names: Family {
    fn pod(number: u8) -> Addr;
    fn vip(number: u8) -> Addr;
}

impl Names for V4 {
    fn pod(number: u8) -> Addr {
        Addr::v4([10, 244, 1, number])
    }

    fn vip(number: u8) -> Addr {
        Addr::v4([10, 96, 0, number])
    }
}

impl Names for V6 {
    fn pod(number: u8) -> Addr {
        Addr::v6([0xfd, 0, 0, 0x10, 2, 0x44, 0, 1, 0, 0, 0, 0, 0, 0, 0, number])
    }

    fn vip(number: u8) -> Addr {
        Addr::v6([0xfd, 0, 0, 0x10, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, number])
    }
}

/// Runs each of these tests for IPv4 and IPv6.
#[cfg(test)]
macro_rules! both_families {
    ($($test:ident),+ $(,)?) => {
        mod v4 {
            $(#[test]
            fn $test() {
                super::$test::<ferroflow_common::family::V4>();
            })+
        }
        mod v6 {
            $(#[test]
            fn $test() {
                super::$test::<ferroflow_common::family::V6>();
            })+
        }
    };
}
#[cfg(test)]
pub(crate) use both_families;

#[cfg(test)]
mod tests {
    use super::*;

    both_families!(what_is_built_is_right_and_what_is_changed_is_wrong);

    fn what_is_built_is_right_and_what_is_changed_is_wrong<F: Names>() {
        let (client, server) = ((F::pod(1), 4000), (F::vip(1), 80));
        let icmp = Frame::icmp(client.0, server.0, 8, 0).payload(b"abc");
        let sctp = Frame::sctp(client, server, chunk::DATA);
        for frame in [Frame::tcp(client, server, Flags::SYN), Frame::udp(client, server), sctp, icmp] {
            for frame in [frame.clone(), frame.clone().extended(), frame.payload(b"odd")] {
                let good = frame.build();
                verify(&good).unwrap();
                let mut bad = good.clone();
                *bad.last_mut().unwrap() ^= 1;
                verify(&bad).unwrap_err();
            }
        }
    }
}
