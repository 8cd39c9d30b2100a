//! Rewriting one end of a packet.

use core::mem::offset_of;

use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::csum::Sum;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::DropReason;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use crate::packet::{L3, L4Change, Packet};
use crate::parse::Headers;

/// Which end is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// One end's new address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    pub end: End,
    pub addr: Addr,
    pub port: Port,
    /// The other end's address becomes what this end's was (`Entry::LOOPED` says why).
    pub looped: bool,
}

/// Gives one end of the packet another address and port and mends both checksums.
///
/// # Errors
/// [`DropReason::Rewrite`].
#[inline(always)]
pub fn rewrite<F: Family, P: Packet>(
    packet: &mut P,
    headers: &Headers<F>,
    to: &Rewrite,
) -> Result<(), DropReason>
where
    F::Bytes: Store,
{
    let Rewrite { end, addr, port, looped } = *to;
    let tuple = &headers.tuple;
    let (old, old_port, addr_off, port_off) = match end {
        End::Source => (tuple.src, tuple.src_port, F::SRC_OFF, 0),
        End::Destination => (tuple.dst, tuple.dst_port, F::DST_OFF, 2),
    };
    if looped {
        let (other, other_off) = match end {
            End::Source => (tuple.dst, F::DST_OFF),
            End::Destination => (tuple.src, F::SRC_OFF),
        };
        replace::<F, P>(packet, headers, other_off, &other, &old)?;
    }
    replace::<F, P>(packet, headers, addr_off, &old, &F::bytes(&addr))?;
    if old_port == port {
        return Ok(());
    }
    let ports = Sum::ZERO.less_half(u16::from_ne_bytes(old_port.be)).half(u16::from_ne_bytes(port.be));
    let (check, zero_is_none) = checksum(tuple.proto);
    packet.change_l4_checksum(headers.l4 + check, &L4Change::Ports { ports, zero_is_none })?;
    packet.write(headers.l4 + port_off, &port.be)
}

/// Gives the address at `offset` in the IP header another value.
#[inline(always)]
fn replace<F: Family, P: Packet>(
    packet: &mut P,
    headers: &Headers<F>,
    offset: u32,
    old: &F::Bytes,
    new: &F::Bytes,
) -> Result<(), DropReason>
where
    F::Bytes: Store,
{
    let addresses = difference::<F>(old, new);
    let (check, zero_is_none) = checksum(headers.tuple.proto);
    let l3_unsummed = F::CSUM_OFF.is_none();
    let change = L4Change::Addresses { addresses, zero_is_none, l3_unsummed };
    packet.change_l4_checksum(headers.l4 + check, &change)?;
    if let Some(check) = F::CSUM_OFF {
        packet.change_l3_checksum(L3 + check, addresses)?;
    }
    new.store(packet, L3 + offset)
}

/// Where the checksum is in the transport header, and whether zero there means none.
#[inline(always)]
const fn checksum(proto: Proto) -> (u32, bool) {
    if proto.number == Proto::UDP.number {
        (offset_of!(UdpHdr, check) as u32, true)
    } else {
        (offset_of!(TcpHdr, check) as u32, false)
    }
}

/// New minus old, over the words that this family has.
#[inline(always)]
fn difference<F: Family>(old: &F::Bytes, new: &F::Bytes) -> Sum {
    let [o0, o1, o2, o3] = F::words(old);
    let [n0, n1, n2, n3] = F::words(new);
    let sum = Sum::ZERO.less_word(o0).word(n0);
    if F::CSUM_OFF.is_some() {
        return sum;
    }
    sum.less_word(o1).word(n1).less_word(o2).word(n2).less_word(o3).word(n3)
}

/// Writes an address of either length.
pub trait Store {
    /// # Errors
    /// [`DropReason::Rewrite`].
    fn store<P: Packet>(&self, packet: &mut P, offset: u32) -> Result<(), DropReason>;
}

impl<const N: usize> Store for [u8; N] {
    #[inline(always)]
    fn store<P: Packet>(&self, packet: &mut P, offset: u32) -> Result<(), DropReason> {
        packet.write(offset, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Frame, Names, Transport, UdpChecksum, both_families, verify};
    use crate::noise::Noise;
    use crate::packet::Bytes;
    use crate::parse::{Parse, headers};

    both_families!(
        either_end_is_rewritten_and_the_checksums_hold,
        a_looped_flow_changes_both_addresses,
        a_datagram_without_checksum_stays_without,
        a_datagram_with_checksum_never_loses_it,
        a_wrong_checksum_stays_wrong,
    );

    fn rewritten<F>(frame: &Frame, to: &Rewrite) -> Vec<u8>
    where
        F: Parse<Bytes: Store>,
    {
        let Bytes(bytes) = rewritten_bytes::<F>(frame.packet(), to);
        bytes
    }

    fn rewritten_bytes<F>(mut packet: Bytes, to: &Rewrite) -> Bytes
    where
        F: Parse<Bytes: Store>,
    {
        let headers = headers::<F, Bytes>(&packet).unwrap().unwrap();
        rewrite(&mut packet, &headers, to).unwrap();
        packet
    }

    fn to(end: End, (addr, port): (Addr, u16)) -> Rewrite {
        Rewrite { end, addr, port: Port::new(port), looped: false }
    }

    fn either_end_is_rewritten_and_the_checksums_hold<F>()
    where
        F: Names + Parse<Bytes: Store>,
    {
        let mut noise = Noise(1);
        let (client, vip) = ((F::pod(1), 4000), (F::vip(1), 80));
        for round in 0..500 {
            let length = noise.below(64);
            let payload = noise.bytes(length);
            let to_pod = (F::pod(noise.below(256) as u8), noise.number() as u16);
            for frame in [Frame::tcp(client, vip, 2), Frame::udp(client, vip)] {
                for frame in [frame.clone().payload(&payload), frame.extended().payload(&payload)] {
                    let forward = rewritten::<F>(&frame, &to(End::Destination, to_pod));
                    assert_eq!(forward, frame.clone().sent_to(to_pod).build(), "round {round}");
                    verify(&forward).unwrap();
                    let reply = rewritten::<F>(&frame, &to(End::Source, to_pod));
                    assert_eq!(reply, frame.clone().sent_from(to_pod).build(), "round {round}");
                }
            }
        }
    }

    fn a_looped_flow_changes_both_addresses<F>()
    where
        F: Names + Parse<Bytes: Store>,
    {
        let (pod, vip) = (F::pod(1), F::vip(1));
        for frame in [Frame::tcp((pod, 4000), (vip, 80), 2), Frame::udp((pod, 4000), (vip, 80))] {
            let forward = Rewrite { looped: true, ..to(End::Destination, (pod, 8080)) };
            let expected = frame.clone().sent_from((vip, 4000)).sent_to((pod, 8080));
            assert_eq!(rewritten::<F>(&frame, &forward), expected.build());
            let reply = expected.answer(0x12);
            let back = Rewrite { looped: true, ..to(End::Source, (vip, 80)) };
            assert_eq!(rewritten::<F>(&reply, &back), frame.answer(0x12).build());
        }
    }

    fn a_datagram_without_checksum_stays_without<F>()
    where
        F: Names + Parse<Bytes: Store>,
    {
        let none = Transport::Udp { checksum: UdpChecksum::None };
        let frame = Frame::new((F::pod(1), 4000), (F::vip(1), 53), none).payload(b"query");
        let pod = (F::pod(2), 5353);
        let forward = rewritten::<F>(&frame, &to(End::Destination, pod));
        assert_eq!(forward, frame.sent_to(pod).build());
    }

    /// Every value of one payload word, so also the one whose checksum comes out as zero.
    fn a_datagram_with_checksum_never_loses_it<F>()
    where
        F: Names + Parse<Bytes: Store>,
    {
        let frame = Frame::udp((F::pod(1), 4000), (F::vip(1), 53));
        let pod = (F::pod(2), 5353);
        let mut other_forms = 0;
        for word in 0..=u16::MAX {
            let frame = frame.clone().payload(&word.to_be_bytes());
            let forward = rewritten::<F>(&frame, &to(End::Destination, pod));
            let check = forward.len() - 4;
            assert_ne!(forward[check..check + 2], [0, 0], "{word}");
            other_forms += usize::from(forward[check..check + 2] == [0xff, 0xff]);
            verify(&forward).unwrap();
        }
        assert!(other_forms > 0);
    }

    fn a_wrong_checksum_stays_wrong<F>()
    where
        F: Names + Parse<Bytes: Store>,
    {
        let Bytes(mut bytes) = Frame::tcp((F::pod(1), 4000), (F::vip(1), 80), 2).payload(b"abcd").packet();
        *bytes.last_mut().unwrap() ^= 0x10;
        let Bytes(bytes) = rewritten_bytes::<F>(Bytes(bytes), &to(End::Destination, (F::pod(2), 8080)));
        assert_eq!(verify(&bytes).unwrap_err(), "TCP checksum");
    }
}
