//! What a device's driver hands over before the kernel makes a socket buffer of it.
//!
//! Only what most of the traffic through a load balancer is gets done here: packets of known flows that leave by the
//! device they came in by, to a backend on another node or back to the client. Everything else passes as it came, and
//! the device's TC program does all of it: the first packet of a flow, fragments, errors, what is for a pod of this
//! node, what has no next hop yet. So there is nothing that works with one of them and not with the other.

use ferroflow_common::addr::Proto;
use ferroflow_common::csum::Sum;
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack::{self, Epoch, Halves};
use crate::nat::{self, Ends, Rewrite};
use crate::packet::{L3, Packet};
use crate::parse::{self, Parse};
use crate::route;
use crate::service::{Fate, Outcome, Way};
use crate::tables::{Tables, Tracked};

/// A packet that can go back out of its device.
pub trait Wire: Packet {
    /// Where a packet of this length, once it is what the flow's row says, goes by the kernel's routes: the Ethernet
    /// addresses of the next hop and of the device, in the order of a header. `None` where it leaves by another
    /// device, the next hop is not known, or the packet is too long.
    fn next_hop<F: Family, R: Tracked>(&self, row: &R, length: u32) -> Option<[u8; 12]>;
}

/// A packet from outside the node: [`Verdict::Reply`] where it goes back out of the device, as another, and
/// [`Verdict::Stack`] where it passes as it came.
///
/// # Errors
/// Why a packet that is half rewritten is dropped.
#[inline(always)]
pub fn arriving<P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    P: Wire,
    T: Tables<V4> + Tables<V6>,
{
    match packet.ethertype() {
        V4::ETHERTYPE => in_steps::<V4, P, T>(packet, tables),
        V6::ETHERTYPE => in_steps::<V6, P, T>(packet, tables),
        _ => Ok(Verdict::Stack),
    }
}

/// One step after the other, as in [`crate::service::in_steps`] and for its reason. What they hand on is short: the
/// stack of the first step is nearly all that there is.
#[inline(always)]
fn in_steps<F, P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    F: Parse + HopLimit,
    F::Bytes: Ends,
    P: Wire,
    T: Tables<F>,
{
    let Some(flow) = find::<F, P, T>(packet, tables) else { return Ok(Verdict::Stack) };
    let Some(addresses) = packet.next_hop::<F, T::Tracked>(&flow.row, flow.end - L3) else {
        return Ok(Verdict::Stack);
    };
    match send::<F, P, T::Tracked>(packet, &flow, &addresses).fate()? {
        Fate::Goes(verdict) => Ok(verdict),
        Fate::Unfinished => Ok(Verdict::Stack),
    }
}

/// A packet's flow, and where the packet's parts are.
struct Flow<R> {
    row: R,
    proto: Proto,
    l4: u32,
    end: u32,
}

/// `None` where the packet passes; also where it is malformed, which the TC program is to tell.
#[inline(never)]
fn find<F, P, T>(packet: &P, tables: &T) -> Option<Flow<T::Tracked>>
where
    F: Parse + HopLimit,
    P: Packet,
    T: Tables<F>,
{
    let headers = parse::headers_of::<F, P>(packet, Way::USUAL).ok()??;
    if !F::has_hops(packet) {
        return None;
    }
    let flow = conntrack::followed::<F, T>(tables, &headers, Halves::Wanted, Epoch::Compared);
    let conntrack::Flow::Known(row) = flow else { return None };
    let leaves = route::rewritten::<F, T>(tables, &Rewrite::of(&row.load())) == Verdict::Forward;
    leaves.then_some(Flow { row, proto: headers.tuple.proto, l4: headers.l4, end: headers.end })
}

#[inline(never)]
fn send<F, P, R>(packet: &mut P, flow: &Flow<R>, addresses: &[u8; 12]) -> Outcome
where
    F: Parse + HopLimit,
    F::Bytes: Ends,
    P: Packet,
    R: Tracked,
{
    Outcome::of(try_send::<F, P, R>(packet, flow, addresses).map(|()| Outcome::goes(Verdict::Reply)))
}

#[inline(always)]
fn try_send<F, P, R>(packet: &mut P, flow: &Flow<R>, addresses: &[u8; 12]) -> Result<(), DropReason>
where
    F: Parse + HopLimit,
    F::Bytes: Ends,
    P: Packet,
    R: Tracked,
{
    let headers = parse::again::<F, P>(packet, flow.proto, flow.l4, flow.end).ok_or(DropReason::Rewrite)?;
    nat::rewrite(packet, &headers, &Rewrite::of(&flow.row.load()))?;
    F::take_hop(packet)?;
    packet.write(0, addresses)
}

/// The field of the IP header that keeps a packet from going in circles.
pub trait HopLimit {
    /// Whether a router may send the packet on.
    fn has_hops<P: Packet>(packet: &P) -> bool;

    /// # Errors
    /// [`DropReason::Rewrite`].
    fn take_hop<P: Packet>(packet: &mut P) -> Result<(), DropReason>;
}

/// Where IPv4's time to live stands in a packet, protocol and checksum behind it.
const TTL: u32 = L3 + 8;

impl HopLimit for V4 {
    #[inline(always)]
    fn has_hops<P: Packet>(packet: &P) -> bool {
        packet.words(TTL).is_some_and(|[word]: [u32; 1]| word.to_ne_bytes()[0] > 1)
    }

    #[inline(always)]
    fn take_hop<P: Packet>(packet: &mut P) -> Result<(), DropReason> {
        let [word] = packet.words(TTL).ok_or(DropReason::Rewrite)?;
        let [ttl, proto, ..] = word.to_ne_bytes();
        let half = |ttl| u16::from_ne_bytes([ttl, proto]);
        packet.write(TTL, &[ttl - 1])?;
        packet.change_l3_checksum(TTL + 2, Sum::ZERO.less_half(half(ttl)).half(half(ttl - 1)))
    }
}

/// Where IPv6's hop limit stands in a packet, behind the length and the next header.
const HOPS: u32 = L3 + 4;

impl HopLimit for V6 {
    #[inline(always)]
    fn has_hops<P: Packet>(packet: &P) -> bool {
        packet.words(HOPS).is_some_and(|[word]: [u32; 1]| word.to_ne_bytes()[3] > 1)
    }

    #[inline(always)]
    fn take_hop<P: Packet>(packet: &mut P) -> Result<(), DropReason> {
        let [word] = packet.words(HOPS).ok_or(DropReason::Rewrite)?;
        packet.write(HOPS + 3, &[word.to_ne_bytes()[3].wrapping_sub(1)])
    }
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::{Frontend, FrontendKey};
    use ferroflow_common::abi::node::NodeAddress;
    use ferroflow_common::addr::Addr;
    use ferroflow_common::tcp::{Flags, chunk};

    use super::*;
    use crate::frame::{Frame, Macs, Names, Part, Socket, both_families, verify};
    use crate::noise::{Noise, world};
    use crate::packet::{Bytes, L4Change};
    use crate::tables::fake::Fake;

    both_families!(
        a_known_flow_goes_back_out_of_its_device_both_ways,
        what_cannot_leave_passes_untouched,
        the_first_packet_and_what_is_local_pass,
        what_is_relayed_passes,
        noise_passes_untouched_or_leaves_whole,
    );

    const HOP: Macs = Macs { dst: [6; 6], src: [7; 6] };

    /// A packet in memory, at a device that leads everywhere by one hop, or nowhere.
    struct Wired {
        bytes: Bytes,
        hop: Option<Macs>,
    }

    impl Packet for Wired {
        fn length(&self) -> u32 {
            self.bytes.length()
        }

        fn ethertype(&self) -> u16 {
            self.bytes.ethertype()
        }

        fn forget(&self, number: u32) -> u32 {
            number
        }

        fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
            self.bytes.words(offset)
        }

        fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), DropReason> {
            self.bytes.write(offset, bytes)
        }

        fn change_l3_checksum(&mut self, offset: u32, change: Sum) -> Result<(), DropReason> {
            self.bytes.change_l3_checksum(offset, change)
        }

        fn change_l4_checksum(&mut self, offset: u32, change: &L4Change) -> Result<(), DropReason> {
            self.bytes.change_l4_checksum(offset, change)
        }
    }

    impl Wire for Wired {
        fn next_hop<F: Family, R: Tracked>(&self, _row: &R, length: u32) -> Option<[u8; 12]> {
            assert_eq!(length, self.length() - L3);
            self.hop.map(|Macs { dst, src }| [dst, src].concat().try_into().unwrap())
        }
    }

    /// A node with a NodePort for each protocol, whose one backend is on another node.
    fn node<F: Names>() -> (Fake, [(Frame, Socket); 3]) {
        let mut fake = Fake::default();
        let (client, own): (Socket, Addr) = ((F::vip(200), 4000), F::vip(100));
        let backend = F::pod(3);
        let any = if own.is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
        for (proto, port) in [(Proto::TCP, 8080), (Proto::UDP, 5353), (Proto::SCTP, 3868)] {
            fake.service(any, 30_000, proto, &[(backend, port)]).flags = Frontend::NORTH_SOUTH;
        }
        fake.node.insert(own, NodeAddress { flags: NodeAddress::NODE_PORTS });
        fake.local(F::pod(1), 11);
        let to = (own, 30_000);
        let frames = [
            (Frame::tcp(client, to, Flags::SYN).payload(b"early"), (backend, 8080)),
            (Frame::udp(client, to).payload(b"query"), (backend, 5353)),
            (Frame::sctp(client, to, chunk::INIT), (backend, 3868)),
        ];
        (fake, frames)
    }

    fn arrive(frame: &Frame, fake: &Fake, hop: Option<Macs>) -> (Verdict, Vec<u8>) {
        let mut packet = Wired { bytes: frame.packet(), hop };
        let verdict = arriving(&mut packet, fake).unwrap();
        (verdict, packet.bytes.0)
    }

    /// As the device sends it on.
    fn sent_on(frame: Frame) -> Vec<u8> {
        Frame { macs: HOP, hop_limit: frame.hop_limit - 1, ..frame }.build()
    }

    /// The client's packet as the TC program sent the first one to the backend.
    fn opened(frame: &Frame, fake: &Fake, backend: Socket) -> Frame {
        let (verdict, bytes) = frame.arrive(fake).unwrap();
        assert_eq!(verdict, Verdict::Forward);
        let forward = fake.entry((frame.src, frame.src_port), (frame.dst, frame.dst_port), frame.proto());
        let forward = forward.unwrap();
        let there = frame.clone().sent_from((forward.src, forward.src_port.host())).sent_to(backend);
        assert_eq!(bytes, there.build());
        there
    }

    fn a_known_flow_goes_back_out_of_its_device_both_ways<F: Names>() {
        let (fake, frames) = node::<F>();
        for (frame, backend) in frames {
            for frame in [frame.clone(), Frame { src_port: 4001, ..frame }.extended()] {
                let there = opened(&frame, &fake, backend);
                assert_eq!(arrive(&frame, &fake, Some(HOP)), (Verdict::Reply, sent_on(there.clone())));
                let (answer, back) = (there.answer(Flags::ACK), frame.answer(Flags::ACK));
                assert_eq!(arrive(&answer, &fake, Some(HOP)), (Verdict::Reply, sent_on(back)));
            }
        }
    }

    fn what_cannot_leave_passes_untouched<F: Names>() {
        let (fake, frames) = node::<F>();
        for (frame, backend) in frames {
            opened(&frame, &fake, backend);
            assert_eq!(arrive(&frame, &fake, None), (Verdict::Stack, frame.build()));
            let tired = Frame { hop_limit: 1, ..frame.clone() };
            let part = frame.clone().payload(&[1; 64]).part(Part::First);
            for frame in [tired, part] {
                assert_eq!(arrive(&frame, &fake, Some(HOP)), (Verdict::Stack, frame.build()));
            }
        }
    }

    fn the_first_packet_and_what_is_local_pass<F: Names>() {
        let (mut fake, frames) = node::<F>();
        for (frame, backend) in frames {
            assert_eq!(arrive(&frame, &fake, Some(HOP)), (Verdict::Stack, frame.build()));
            assert!(fake.tracked().is_empty(), "an early packet opens nothing");
            opened(&frame, &fake, backend);
            fake.local(F::pod(3), 13);
            assert_eq!(arrive(&frame, &fake, Some(HOP)), (Verdict::Stack, frame.build()));
            fake = node::<F>().0;
        }
    }

    /// To another node, as it is: by the tunnel, and not out of the device.
    fn what_is_relayed_passes<F: Names>() {
        let (mut fake, frames) = node::<F>();
        fake.frontends.values_mut().for_each(|row| row.flags |= Frontend::RELAYS);
        fake.backends.iter_mut().for_each(|backend| backend.node = 7);
        fake.nodes.insert(7, F::vip(201));
        fake.elsewhere.push(F::pod(3));
        for (frame, _) in frames {
            assert_eq!(frame.arrive(&fake), Ok((Verdict::Relay { node: 7 }, frame.build())));
            assert_eq!(arrive(&frame, &fake, Some(HOP)), (Verdict::Stack, frame.build()));
        }
    }

    fn noise_passes_untouched_or_leaves_whole<F: Names>() {
        let (mut noise, mut fake) = (Noise(5), world());
        fake.node.insert(F::vip(100), NodeAddress { flags: 0 });
        let mut sent = 0;
        for _ in 0..20_000 {
            let frame = noise.frame::<F>();
            if frame.fragment.is_none() {
                // What this one drops does not matter here.
                let _opens = frame.arrive(&fake);
            }
            let (verdict, bytes) = arrive(&frame, &fake, Some(HOP));
            if verdict == Verdict::Stack {
                assert_eq!(bytes, frame.build());
            } else {
                sent += 1;
                assert_eq!(verify(&bytes), verify(&frame.build()));
                assert_eq!(bytes.len(), frame.build().len());
            }
        }
        assert!(sent > 100, "{sent} sent");
    }
}
