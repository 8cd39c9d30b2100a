//! What goes out of the tunnel's device: which node has its destination.

use ferroflow_common::abi::tunnel::{DEVICE_MAC, SENDER_MAC, Tunnel};
use ferroflow_common::addr::Addr;
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::verdict::DropReason;

use crate::packet::{L3, Packet};

/// To the device at the other end, and where that stands in the Ethernet header.
const ENDS: [u8; 12] = ends();
const ENDS_OFF: u32 = 0;

const fn ends() -> [u8; 12] {
    let ([t0, t1, t2, t3, t4, t5], [f0, f1, f2, f3, f4, f5]) = (DEVICE_MAC, SENDER_MAC);
    [t0, t1, t2, t3, t4, t5, f0, f1, f2, f3, f4, f5]
}

/// The nodes by the ranges of their pods.
pub trait Tunnels {
    /// Of the longest range that has the address.
    fn tunnel(&self, addr: &Addr) -> Option<Tunnel>;
}

/// Makes a packet one that the other end takes, and says which end that is.
///
/// # Errors
/// [`DropReason::NoTunnel`] where no node has the destination, or it is no IP packet.
#[inline(always)]
pub fn leaving<P: Packet, T: Tunnels>(packet: &mut P, tunnels: &T) -> Result<Tunnel, DropReason> {
    let to = match packet.ethertype() {
        V4::ETHERTYPE => {
            packet.words(L3 + V4::DST_OFF).map(|[word]| V4::addr(V4::from_words([word, 0, 0, 0])))
        }
        V6::ETHERTYPE => packet.words(L3 + V6::DST_OFF).map(|words| V6::addr(V6::from_words(words))),
        _ => None,
    };
    let tunnel = to.and_then(|to| tunnels.tunnel(&to)).ok_or(DropReason::NoTunnel)?;
    packet.write(ENDS_OFF, &ENDS)?;
    Ok(tunnel)
}

#[cfg(test)]
mod tests {
    use ferroflow_common::tcp::Flags;

    use super::*;
    use crate::frame::{Frame, Names, both_families};
    use crate::packet::Bytes;

    both_families!(the_node_that_has_the_destination_gets_the_packet, what_nobody_has_is_dropped_by_name,);

    /// One pod of one node.
    struct One(Addr);

    const THERE: Tunnel = Tunnel { node: Addr::v4([192, 168, 50, 2]), vni: 7 };

    impl Tunnels for One {
        fn tunnel(&self, addr: &Addr) -> Option<Tunnel> {
            (*addr == self.0).then_some(THERE)
        }
    }

    fn frame<F: Names>() -> Bytes {
        Bytes(Frame::tcp((F::pod(1), 4000), (F::pod(3), 80), Flags::SYN).build())
    }

    fn the_node_that_has_the_destination_gets_the_packet<F: Names>() {
        let (before, mut packet) = (frame::<F>(), frame::<F>());
        assert_eq!(leaving(&mut packet, &One(F::pod(3))), Ok(THERE));
        assert_eq!((&packet.0[..6], &packet.0[6..12]), (&DEVICE_MAC[..], &SENDER_MAC[..]));
        assert_eq!(packet.0[12..], before.0[12..], "nothing else changes");
    }

    fn what_nobody_has_is_dropped_by_name<F: Names>() {
        let mut packet = frame::<F>();
        assert_eq!(leaving(&mut packet, &One(F::pod(1))), Err(DropReason::NoTunnel));
        packet.0.truncate(20);
        assert_eq!(leaving(&mut packet, &One(F::pod(3))), Err(DropReason::NoTunnel), "truncated");
        packet.0[12] = 0;
        assert_eq!(leaving(&mut packet, &One(F::pod(3))), Err(DropReason::NoTunnel), "no IP");
    }
}
