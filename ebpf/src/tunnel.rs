//! What goes out of the tunnel's device: which node has its destination; and what comes for it from other nodes.
//!
//! ```text
//!   pod ─▶ pod of another node      the program at the pod puts it into the tunnel; what takes the stack, its route does
//!   pod ─▶ another node itself      the kernel's route leads to the device between the nodes, where the packet is turned
//!                                   into the tunnel: that network knows no pods, and may drop what comes from one
//!   node ─▶ pod of another node     the kernel's route leads into the tunnel, and answers come as above
//!   node ─▶ node, pod ─▶ world      the device between the nodes; pods by the node's address
//! ```

use ferroflow_common::abi::tunnel::{DEVICE_MAC, Tunnel};
use ferroflow_common::addr::{Addr, Proto};
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::verdict::DropReason;

use crate::icmp::Errors;
use crate::packet::{L3, Packet};
use crate::tables::{Aligned, Services, Tables};

/// Where the Ethernet header's two addresses stand.
const ENDS_OFF: u32 = 0;

/// The nodes by the ranges of their pods.
pub trait Tunnels {
    /// Of the longest range that has the address.
    fn tunnel(&self, addr: &Addr) -> Option<Tunnel>;
}

/// The nodes by their own addresses.
pub trait NodeTunnels {
    fn node_tunnel(&self, addr: &Addr) -> Option<Tunnel>;
}

/// The way of a packet that is a pod's of this node, by its source, to another node itself; `None` for every other.
#[inline(always)]
pub fn towards_node<P, T>(packet: &P, tables: &T) -> Option<Tunnel>
where
    P: Packet,
    T: Tables<V4> + Tables<V6> + NodeTunnels,
{
    match packet.ethertype() {
        V4::ETHERTYPE => towards_node_of::<V4, P, T>(packet, tables),
        V6::ETHERTYPE => towards_node_of::<V6, P, T>(packet, tables),
        _ => None,
    }
}

#[inline(always)]
fn towards_node_of<F, P, T>(packet: &P, tables: &T) -> Option<Tunnel>
where
    F: Errors,
    P: Packet,
    T: Tables<F> + NodeTunnels,
{
    let Aligned([_, dst]) = F::ends(packet, L3)?;
    let way = tables.node_tunnel(&F::addr(dst))?;
    // Read again: the stack is short.
    let Aligned([src, _]) = F::ends(packet, L3)?;
    tables.endpoint(&F::addr(src)).map(|_pod| way)
}

/// The way of a packet by its destination. `None` where no node has that, or it is no IP packet.
#[inline(always)]
pub fn way<P: Packet, T: Tunnels>(packet: &P, tunnels: &T) -> Option<Tunnel> {
    let to = match packet.ethertype() {
        V4::ETHERTYPE => {
            packet.words(L3 + V4::DST_OFF).map(|[word]| V4::addr(V4::from_words([word, 0, 0, 0])))
        }
        V6::ETHERTYPE => packet.words(L3 + V6::DST_OFF).map(|words| V6::addr(V6::from_words(words))),
        _ => None,
    };
    to.and_then(|to| tunnels.tunnel(&to))
}

/// Gives the packet the link-layer addresses that the device at the other end takes: `sender` says what it is to that.
///
/// # Errors
/// [`DropReason::Rewrite`].
#[inline(always)]
pub fn dress<P: Packet>(packet: &mut P, sender: [u8; 6]) -> Result<(), DropReason> {
    let ([t0, t1, t2, t3, t4, t5], [f0, f1, f2, f3, f4, f5]) = (DEVICE_MAC, sender);
    packet.write(ENDS_OFF, &[t0, t1, t2, t3, t4, t5, f0, f1, f2, f3, f4, f5])
}

/// The length of a UDP header (RFC 768).
const UDP: u32 = 8;
/// How every VXLAN header begins: a network's identifier follows (RFC 7348 section 5).
const VXLAN: u32 = u32::from_ne_bytes([8, 0, 0, 0]);

/// Whether the packet carries another in VXLAN to a tunnel of this node, at UDP port `port`. Then it is the stack's, which
/// hands what is inside to the tunnel's device, and the program there has its say.
///
/// The header is looked at, too: an answer to a masqueraded client may come to any port. Fragments and packets with
/// options are none; nodes send neither.
#[inline(always)]
pub fn is_for_tunnel<P: Packet, T: Services>(packet: &P, tables: &T, port: u16) -> bool {
    let to = match packet.ethertype() {
        V4::ETHERTYPE => outer_v4(packet, port),
        V6::ETHERTYPE => outer_v6(packet, port),
        _ => None,
    };
    to.is_some_and(|to| tables.node_address(&to).is_some())
}

#[inline(always)]
fn outer_v4<P: Packet>(packet: &P, port: u16) -> Option<Addr> {
    const PLAIN: u32 = u32::from_ne_bytes([0x45, 0, 0, 0]);
    /// `More fragments`, and where the fragment begins.
    const PART: u32 = u32::from_ne_bytes([0, 0, 0x3f, 0xff]);
    const PROTO: u32 = u32::from_ne_bytes([0, Proto::UDP.number, 0, 0]);
    let [first, part, proto, _, to] = packet.words(L3)?;
    let plain = first & u32::from_ne_bytes([0xff, 0, 0, 0]) == PLAIN && part & PART == 0;
    let udp = proto & u32::from_ne_bytes([0, 0xff, 0, 0]) == PROTO;
    (plain && udp && is_vxlan(packet, L3 + V4::HDR_LEN, port))
        .then(|| V4::addr(V4::from_words([to, 0, 0, 0])))
}

#[inline(always)]
fn outer_v6<P: Packet>(packet: &P, port: u16) -> Option<Addr> {
    const PROTO: u32 = u32::from_ne_bytes([0, 0, Proto::UDP.number, 0]);
    let [_, proto] = packet.words(L3)?;
    let udp = proto & u32::from_ne_bytes([0, 0, 0xff, 0]) == PROTO;
    if !udp || !is_vxlan(packet, L3 + V6::HDR_LEN, port) {
        return None;
    }
    packet.words(L3 + V6::DST_OFF).map(|words| V6::addr(V6::from_words(words)))
}

#[inline(always)]
fn is_vxlan<P: Packet>(packet: &P, udp: u32, port: u16) -> bool {
    packet.words(udp).is_some_and(|[ports, _, vxlan]: [u32; UDP as usize / 4 + 1]| {
        (u32::from_be(ports) as u16, vxlan) == (port, VXLAN)
    })
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::node::NodeAddress;
    use ferroflow_common::abi::tunnel::SENDER_MAC;
    use ferroflow_common::tcp::Flags;

    use super::*;
    use crate::frame::{Frame, Names, Part, both_families};
    use crate::packet::Bytes;
    use crate::tables::fake::Fake;

    both_families!(
        the_node_that_has_the_destination_gets_the_packet,
        what_nobody_has_has_no_way,
        what_a_tunnel_of_this_node_carries_is_the_stacks,
        what_a_pod_says_to_another_node_is_for_the_tunnel,
    );

    /// One pod of one node.
    struct One(Addr);

    const THERE: Tunnel = Tunnel { node: Addr::v4([192, 168, 50, 2]), vni: 7, device: 9, room: 1450 };

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
        assert_eq!(way(&packet, &One(F::pod(3))), Some(THERE));
        dress(&mut packet, SENDER_MAC).unwrap();
        assert_eq!((&packet.0[..6], &packet.0[6..12]), (&DEVICE_MAC[..], &SENDER_MAC[..]));
        assert_eq!(packet.0[12..], before.0[12..], "nothing else changes");
    }

    fn what_nobody_has_has_no_way<F: Names>() {
        let mut packet = frame::<F>();
        assert_eq!(way(&packet, &One(F::pod(1))), None);
        packet.0.truncate(20);
        assert_eq!(way(&packet, &One(F::pod(3))), None, "truncated");
        packet.0[12] = 0;
        assert_eq!(way(&packet, &One(F::pod(3))), None, "no IP");
    }

    fn what_a_pod_says_to_another_node_is_for_the_tunnel<F: Names>() {
        let mut fake = Fake::default();
        let (here, there) = (F::vip(200), F::vip(201));
        fake.local(F::pod(1), 11);
        fake.node_tunnels.insert(there, THERE);
        for (src, dst, found) in [
            (F::pod(1), there, Some(THERE)),
            (here, there, None),
            (F::pod(3), there, None),
            (F::pod(1), here, None),
            (F::pod(1), F::vip(99), None),
        ] {
            let packet = Bytes(Frame::tcp((src, 4000), (dst, 6443), Flags::SYN).build());
            assert_eq!(towards_node(&packet, &fake), found, "{src} to {dst}");
            let echo = Bytes(Frame::icmp(src, dst, 8, 0).build());
            assert_eq!(towards_node(&echo, &fake), found, "ping, {src} to {dst}");
        }
    }

    fn what_a_tunnel_of_this_node_carries_is_the_stacks<F: Names>() {
        const PORT: u16 = 8472;
        let mut fake = Fake::default();
        let (node, peer) = (F::vip(200), F::vip(201));
        fake.node.insert(node, NodeAddress { flags: 0 });
        let is_for_tunnel = |frame: Frame| is_for_tunnel(&Bytes(frame.build()), &fake, PORT);
        let outer = Frame::udp((peer, 40_000), (node, PORT)).payload(&[8, 0, 0, 0, 0, 0, 7, 0, 1, 2, 3, 4]);
        assert!(is_for_tunnel(outer.clone()));
        for (what, frame) in [
            ("another's", outer.clone().sent_to((peer, PORT))),
            ("another port", outer.clone().sent_to((node, PORT + 1))),
            ("no VXLAN", outer.clone().payload(&[8, 1, 0, 0, 0, 0, 7, 0, 1, 2, 3, 4])),
            ("TCP", Frame::tcp((peer, 40_000), (node, PORT), Flags::SYN).payload(&[8, 0, 0, 0])),
            ("extended", outer.clone().extended()),
            ("a fragment", outer.clone().part(Part::First)),
            ("too short", Frame::udp((peer, 40_000), (node, PORT)).payload(&[8, 0, 0])),
        ] {
            assert!(!is_for_tunnel(frame), "{what}");
        }
    }
}
