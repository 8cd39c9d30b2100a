//! Rewriting the ends of a packet.

use core::mem::offset_of;

use ferroflow_common::abi::conntrack::Entry;
use ferroflow_common::abi::relay::{self, NodeNumber};
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::crc32c;
use ferroflow_common::csum::Sum;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::DropReason;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;
use zerocopy::transmute_ref;

use crate::packet::{L3, L4Change, Packet};
use crate::parse::{Headers, UNKNOWN};

/// What a packet's ends become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Source and destination, side by side as in a header.
    pub addrs: [Addr; 2],
    pub src_port: Port,
    pub dst_port: Port,
    /// The bits of [`Entry::flags`].
    pub flags: u8,
}

impl Rewrite {
    #[inline(always)]
    pub const fn of(entry: &Entry) -> Self {
        let Entry { src, dst, src_port, dst_port, flags, .. } = *entry;
        Self { addrs: [src, dst], src_port, dst_port, flags }
    }

    /// The packet's ends stay what they are.
    #[inline(always)]
    pub const fn is_plain(&self) -> bool {
        self.flags & (Entry::PLAIN | Entry::RELAYS) != 0
    }

    /// The packet goes to another node as it is.
    #[inline(always)]
    pub const fn is_relayed_on(&self) -> bool {
        self.flags & Entry::RELAYS != 0
    }

    /// To this one.
    #[inline(always)]
    pub const fn node(&self) -> NodeNumber {
        relay::stands_for(&self.addrs[0])
    }

    #[inline(always)]
    pub const fn src(&self) -> &Addr {
        &self.addrs[0]
    }

    #[inline(always)]
    pub const fn dst(&self) -> &Addr {
        &self.addrs[1]
    }
}

/// Gives the packet its new ends and mends both checksums. Both addresses are written at once, and so are both ports:
/// that costs what one of them would.
///
/// # Errors
/// [`DropReason::Rewrite`], [`DropReason::Fragment`].
#[inline(always)]
pub fn rewrite<F: Family, P: Packet>(
    packet: &mut P,
    headers: &Headers<F>,
    to: &Rewrite,
) -> Result<(), DropReason>
where
    F::Bytes: Ends,
{
    if to.is_plain() {
        return Ok(());
    }
    let tuple = &headers.tuple;
    let (src, dst) = (F::bytes(to.src()), F::bytes(to.dst()));
    let addresses = difference::<F>(difference::<F>(Sum::ZERO, &tuple.src, &src), &tuple.dst, &dst);
    let (check, zero_is_none) = checksum(tuple.proto);
    if tuple.proto != Proto::SCTP {
        let l3_unsummed = F::CSUM_OFF.is_none();
        let change = L4Change::Addresses { addresses, zero_is_none, l3_unsummed };
        packet.change_l4_checksum(headers.l4 + check, &change)?;
    }
    if let Some(check) = F::CSUM_OFF {
        packet.change_l3_checksum(L3 + check, addresses)?;
    }
    F::Bytes::store(packet, L3 + F::SRC_OFF, to)?;
    if (tuple.src_port, tuple.dst_port) == (to.src_port, to.dst_port) {
        return Ok(());
    }
    let ([s0, s1], [d0, d1]) = (to.src_port.be, to.dst_port.be);
    if tuple.proto == Proto::SCTP {
        return sctp_ports(packet, headers.l4, headers.end, [s0, s1, d0, d1]);
    }
    let ports = Sum::ZERO
        .less_half(u16::from_ne_bytes(tuple.src_port.be))
        .half(u16::from_ne_bytes(to.src_port.be))
        .less_half(u16::from_ne_bytes(tuple.dst_port.be))
        .half(u16::from_ne_bytes(to.dst_port.be));
    packet.change_l4_checksum(headers.l4 + check, &L4Change::Ports { ports, zero_is_none })?;
    packet.write(headers.l4, &[s0, s1, d0, d1])
}

/// Writes the ports of an SCTP packet between `l4` and `end` and mends its CRC32c. A zero is a checksum that the device
/// is to compute (the kernel's `skb_crc32c_csum_help` wants it so) or none at all (RFC 9653), and stays.
#[inline(always)]
fn sctp_ports<P: Packet>(packet: &mut P, l4: u32, end: u32, ports: [u8; 4]) -> Result<(), DropReason> {
    if end == UNKNOWN {
        return Err(DropReason::Fragment);
    }
    let [old, tag, check] = packet.words(l4).ok_or(DropReason::Rewrite)?;
    let difference = u32::from_le(old) ^ u32::from_le_bytes(ports);
    let new = if check == 0 { 0 } else { u32::from_le(check) ^ crc32c::change(difference, end - l4) };
    let ([p0, p1, p2, p3], [t0, t1, t2, t3]) = (ports, tag.to_ne_bytes());
    let [c0, c1, c2, c3] = new.to_le_bytes();
    packet.write(l4, &[p0, p1, p2, p3, t0, t1, t2, t3, c0, c1, c2, c3])
}

/// Gives a fragment that is not the first its new addresses. The transport checksum is in the first one, and covers all.
///
/// # Errors
/// [`DropReason::Rewrite`].
#[inline(always)]
pub fn readdress<F: Family, P: Packet>(
    packet: &mut P,
    [src, dst]: &[F::Bytes; 2],
    to: &Rewrite,
) -> Result<(), DropReason>
where
    F::Bytes: Ends,
{
    if let Some(check) = F::CSUM_OFF {
        let change = difference::<F>(Sum::ZERO, src, &F::bytes(to.src()));
        let change = difference::<F>(change, dst, &F::bytes(to.dst()));
        packet.change_l3_checksum(L3 + check, change)?;
    }
    F::Bytes::store(packet, L3 + F::SRC_OFF, to)
}

/// Where the Internet checksum is in the transport header, and whether zero there means none.
#[inline(always)]
pub(crate) const fn checksum(proto: Proto) -> (u32, bool) {
    if proto.number == Proto::UDP.number {
        (offset_of!(UdpHdr, check) as u32, true)
    } else {
        (offset_of!(TcpHdr, check) as u32, false)
    }
}

/// Adds new minus old, over the words that this family has.
#[inline(always)]
pub(crate) fn difference<F: Family>(sum: Sum, old: &F::Bytes, new: &F::Bytes) -> Sum {
    let [o0, o1, o2, o3] = F::words(old);
    let [n0, n1, n2, n3] = F::words(new);
    let sum = sum.less_word(o0).word(n0);
    if F::CSUM_OFF.is_some() {
        return sum;
    }
    sum.less_word(o1).word(n1).less_word(o2).word(n2).less_word(o3).word(n3)
}

/// Writes the two addresses of a header, which follow one another in both families.
pub trait Ends: Sized {
    /// # Errors
    /// [`DropReason::Rewrite`].
    fn store<P: Packet>(packet: &mut P, offset: u32, to: &Rewrite) -> Result<(), DropReason>;
}

impl Ends for [u8; 4] {
    #[inline(always)]
    fn store<P: Packet>(packet: &mut P, offset: u32, to: &Rewrite) -> Result<(), DropReason> {
        let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (to.src().v4_bytes(), to.dst().v4_bytes());
        packet.write(offset, &[s0, s1, s2, s3, d0, d1, d2, d3])
    }
}

impl Ends for [u8; 16] {
    #[inline(always)]
    fn store<P: Packet>(packet: &mut P, offset: u32, to: &Rewrite) -> Result<(), DropReason> {
        let both: &[u8; 32] = transmute_ref!(&to.addrs);
        packet.write(offset, both)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferroflow_common::tcp::{Flags, chunk};

    use crate::frame::{Frame, Names, Part, Socket, Transport, UdpChecksum, both_families, verify};
    use crate::noise::Noise;
    use crate::packet::Bytes;
    use crate::parse::{Parse, headers};

    both_families!(
        either_end_is_rewritten_and_the_checksums_hold,
        both_ends_are_rewritten_at_once,
        a_datagram_without_checksum_stays_without,
        a_datagram_with_checksum_never_loses_it,
        a_wrong_checksum_stays_wrong,
        an_association_without_checksum_stays_without,
        an_association_keeps_its_ports_in_a_fragment_or_is_dropped,
    );

    fn rewritten<F>(frame: &Frame, to: &Rewrite) -> Vec<u8>
    where
        F: Parse<Bytes: Ends>,
    {
        let Bytes(bytes) = rewritten_bytes::<F>(frame.packet(), to);
        bytes
    }

    fn rewritten_bytes<F>(mut packet: Bytes, to: &Rewrite) -> Bytes
    where
        F: Parse<Bytes: Ends>,
    {
        let headers = headers::<F, Bytes>(&packet).unwrap().unwrap();
        rewrite(&mut packet, &headers, to).unwrap();
        packet
    }

    /// Which end is rewritten.
    #[derive(Clone, Copy)]
    enum End {
        Source,
        Destination,
    }

    /// The frame's ends, one of them replaced.
    fn to(frame: &Frame, end: End, (addr, port): (Addr, u16)) -> Rewrite {
        let (src_port, dst_port) = (Port::new(frame.src_port), Port::new(frame.dst_port));
        let same = Rewrite { addrs: [frame.src, frame.dst], src_port, dst_port, flags: 0 };
        match end {
            End::Source => Rewrite { addrs: [addr, frame.dst], src_port: Port::new(port), ..same },
            End::Destination => Rewrite { addrs: [frame.src, addr], dst_port: Port::new(port), ..same },
        }
    }

    fn each(src: Socket, dst: Socket) -> [Frame; 3] {
        [Frame::tcp(src, dst, Flags::SYN), Frame::udp(src, dst), Frame::sctp(src, dst, chunk::DATA)]
    }

    fn either_end_is_rewritten_and_the_checksums_hold<F>()
    where
        F: Names + Parse<Bytes: Ends>,
    {
        let mut noise = Noise(1);
        let (client, vip) = ((F::pod(1), 4000), (F::vip(1), 80));
        for round in 0..500 {
            let length = noise.below(64);
            let payload = noise.bytes(length);
            let to_pod = (F::pod(noise.below(256) as u8), noise.number() as u16);
            for frame in each(client, vip) {
                for frame in [frame.clone().payload(&payload), frame.extended().payload(&payload)] {
                    let forward = rewritten::<F>(&frame, &to(&frame, End::Destination, to_pod));
                    assert_eq!(forward, frame.clone().sent_to(to_pod).build(), "round {round}");
                    verify(&forward).unwrap();
                    let reply = rewritten::<F>(&frame, &to(&frame, End::Source, to_pod));
                    assert_eq!(reply, frame.clone().sent_from(to_pod).build(), "round {round}");
                }
            }
        }
    }

    fn both_ends_are_rewritten_at_once<F>()
    where
        F: Names + Parse<Bytes: Ends>,
    {
        let (pod, vip) = (F::pod(1), F::vip(1));
        for frame in each((pod, 4000), (vip, 80)) {
            let (other, backend) = ((F::pod(7), 1024), (F::pod(2), 8080));
            let masqueraded = to(&frame.clone().sent_to(backend), End::Source, other);
            let expected = frame.clone().sent_from(other).sent_to(backend);
            assert_eq!(rewritten::<F>(&frame, &masqueraded), expected.build());
            let unchanged = to(&frame, End::Source, (frame.src, frame.src_port));
            assert_eq!(rewritten::<F>(&frame, &unchanged), frame.build());
        }
    }

    fn a_datagram_without_checksum_stays_without<F>()
    where
        F: Names + Parse<Bytes: Ends>,
    {
        let none = Transport::Udp { checksum: UdpChecksum::None };
        let frame = Frame::new((F::pod(1), 4000), (F::vip(1), 53), none).payload(b"query");
        let pod = (F::pod(2), 5353);
        let forward = rewritten::<F>(&frame, &to(&frame, End::Destination, pod));
        assert_eq!(forward, frame.sent_to(pod).build());
    }

    /// Every value of one payload word, so also the one whose checksum comes out as zero.
    fn a_datagram_with_checksum_never_loses_it<F>()
    where
        F: Names + Parse<Bytes: Ends>,
    {
        let frame = Frame::udp((F::pod(1), 4000), (F::vip(1), 53));
        let pod = (F::pod(2), 5353);
        let mut other_forms = 0;
        for word in 0..=u16::MAX {
            let frame = frame.clone().payload(&word.to_be_bytes());
            let forward = rewritten::<F>(&frame, &to(&frame, End::Destination, pod));
            let check = forward.len() - 4;
            assert_ne!(forward[check..check + 2], [0, 0], "{word}");
            other_forms += usize::from(forward[check..check + 2] == [0xff, 0xff]);
            verify(&forward).unwrap();
        }
        assert!(other_forms > 0);
    }

    fn a_wrong_checksum_stays_wrong<F>()
    where
        F: Names + Parse<Bytes: Ends>,
    {
        for (frame, what) in each((F::pod(1), 4000), (F::vip(1), 80)).into_iter().zip(["TCP", "UDP", "SCTP"])
        {
            let frame = frame.payload(b"abcd");
            let Bytes(mut bytes) = frame.packet();
            *bytes.last_mut().unwrap() ^= 0x10;
            let Bytes(bytes) =
                rewritten_bytes::<F>(Bytes(bytes), &to(&frame, End::Destination, (F::pod(2), 8080)));
            assert_eq!(verify(&bytes).unwrap_err(), format!("{what} checksum"));
        }
    }

    /// The CRC covers what is in the other fragments.
    fn an_association_keeps_its_ports_in_a_fragment_or_is_dropped<F>()
    where
        F: Names + Parse<Bytes: Ends>,
    {
        let frame =
            Frame::sctp((F::pod(1), 4000), (F::vip(1), 80), chunk::DATA).payload(&[7; 16]).part(Part::First);
        let rewritten = |dst| {
            let mut packet = frame.packet();
            let headers = headers::<F, Bytes>(&packet).unwrap().unwrap();
            rewrite(&mut packet, &headers, &to(&frame, End::Destination, dst)).map(|()| packet.0)
        };
        assert_eq!(rewritten((F::pod(2), 80)), Ok(frame.clone().sent_to((F::pod(2), 80)).build()));
        assert_eq!(rewritten((F::pod(2), 8080)), Err(DropReason::Fragment));
    }

    /// The device computes it over the packet as it is then, and wants zero there.
    fn an_association_without_checksum_stays_without<F>()
    where
        F: Names + Parse<Bytes: Ends>,
    {
        let frame = Frame::sctp((F::pod(1), 4000), (F::vip(1), 80), chunk::INIT);
        let none = |frame: &Frame| {
            let mut bytes = frame.build();
            let check = bytes.len() - 8;
            bytes[check..check + 4].copy_from_slice(&[0; 4]);
            bytes
        };
        let backend = (F::pod(2), 8080);
        let Bytes(bytes) = rewritten_bytes::<F>(Bytes(none(&frame)), &to(&frame, End::Destination, backend));
        assert_eq!(bytes, none(&frame.sent_to(backend)));
    }
}
