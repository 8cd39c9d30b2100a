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
    let Rewrite { end, addr, port } = *to;
    let tuple = &headers.tuple;
    let (old, old_port, addr_off, port_off) = match end {
        End::Source => (tuple.src, tuple.src_port, F::SRC_OFF, 0),
        End::Destination => (tuple.dst, tuple.dst_port, F::DST_OFF, 2),
    };
    let new = F::bytes(&addr);
    let addresses = difference::<F>(&old, &new);
    let ports = if old_port == port {
        Sum::ZERO
    } else {
        Sum::ZERO.less_half(u16::from_ne_bytes(old_port.be)).half(u16::from_ne_bytes(port.be))
    };
    let udp = tuple.proto == Proto::UDP;
    let check = if udp { offset_of!(UdpHdr, check) } else { offset_of!(TcpHdr, check) } as u32;
    let change = L4Change { addresses, ports, zero_is_none: udp, l3_unsummed: F::CSUM_OFF.is_none() };
    packet.change_l4_checksum(headers.l4 + check, &change)?;
    if let Some(check) = F::CSUM_OFF {
        packet.change_l3_checksum(L3 + check, addresses)?;
    }
    new.store(packet, L3 + addr_off)?;
    if old_port != port {
        packet.write(headers.l4 + port_off, &port.be)?;
    }
    Ok(())
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
