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
