//! Packets that are too long for the way on.
//!
//! A packet that got the node's own address as its source goes past the stack ([`Verdict::Forward`]), so the stack tells
//! nobody where it does not fit: this is done here. The error is made of the packet as it now is, comes from where that
//! one goes, and goes to where that one comes from, which is this node. It then takes the way of every error about a known
//! flow ([`crate::icmp`]), which brings it to who sent the packet, with the packet as that one sent it.
//!
//! An IPv4 packet that routers may cut into fragments is answered as one that they may not: nothing here can cut it, and
//! senders heed the answer all the same.
//!
//! [`Verdict::Forward`]: ferroflow_common::verdict::Verdict::Forward

use ferroflow_common::addr::Proto;
use ferroflow_common::verdict::{DropReason, Verdict};
use network_types::udp::UdpHdr;

use crate::packet::{L3, Packet, Reshape};
use crate::parse::{self, Parse};
use crate::reject::{self, Answer};
use crate::service::{Outcome, Way};

/// How long the packet is on the wire, in bytes from the IP header on; as much as fits where it is more. A packet that is
/// several has `segment` bytes of payload in each, and others have 0 there.
#[inline(always)]
pub fn longest<F: Parse, P: Packet>(packet: &P, segment: u32) -> u16 {
    let whole = packet.length().saturating_sub(L3);
    let length = if segment == 0 { whole } else { headers::<F, P>(packet).unwrap_or(0) + segment };
    if length > u16::MAX as u32 { u16::MAX } else { length as u16 }
}

/// How long a segment's headers are.
#[inline(always)]
fn headers<F: Parse, P: Packet>(packet: &P) -> Option<u32> {
    let network = F::header(packet, L3).ok()?;
    let l4 = packet.forget(network.l4);
    if network.proto != Proto::TCP {
        return Some(l4 - L3 + UdpHdr::LEN as u32);
    }
    let [control] = packet.words(l4 + DATA_OFFSET)?;
    Some(l4 - L3 + u32::from(control.to_ne_bytes()[0] >> 4) * 4)
}

/// Of TCP's header, where it says how long it is (RFC 9293 section 3.1).
const DATA_OFFSET: u32 = 12;

/// Turns the packet into the error that a router sends whose way on has `room` bytes; 0 where that is not known, and then
/// it is the least that it can be.
///
/// # Errors
/// [`DropReason::TooBig`] for what has no ports, and so is of no known flow; else as [`reject::error`].
#[inline(always)]
pub fn too_big<F: Answer, P: Reshape>(packet: &mut P, room: u32) -> Result<Outcome, DropReason> {
    let headers = parse::headers_of::<F, P>(packet, Way::FIRST_FRAGMENT)?.ok_or(DropReason::TooBig)?;
    let room = if room == 0 { F::LEAST_MTU } else { room };
    reject::error(packet, &headers, F::TOO_BIG, room)?;
    Ok(Outcome::goes(Verdict::Reply))
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::{Frontend, FrontendKey};
    use ferroflow_common::abi::node::NodeAddress;
    use ferroflow_common::addr::Addr;
    use ferroflow_common::tcp::{Flags, chunk};

    use super::*;
    use crate::device;
    use crate::frame::{Frame, Names, Socket, Transport, both_families, verify};
    use crate::packet::Bytes;
    use crate::tables::fake::Fake;

    both_families!(
        rule_37_who_sent_too_much_to_a_node_port_is_told_so,
        rule_37_a_backend_that_answers_too_much_is_told_so,
        rule_37_what_has_no_ports_is_dropped_by_name,
        a_packet_that_is_several_is_as_long_as_one_of_them,
    );

    const NODE_PORT: u16 = 30_080;

    /// A NodePort with one backend on another node.
    struct Net {
        fake: Fake,
        client: Socket,
        node: Socket,
        backend: Socket,
    }

    impl Net {
        fn new<F: Names>(proto: Proto) -> Self {
            let mut fake = Fake::default();
            let (node, backend) = (F::vip(200), (F::pod(3), 8080));
            let any = if node.is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
            fake.node.insert(node, NodeAddress { flags: NodeAddress::NODE_PORTS });
            fake.service(any, NODE_PORT, proto, &[backend]).flags = Frontend::NORTH_SOUTH;
            Self { fake, client: (F::vip(99), 4000), node: (node, NODE_PORT), backend }
        }

        /// What a request of the client is on its way on.
        fn sent_on(&self, request: &Frame) -> Bytes {
            let (verdict, bytes) = request.arrive(&self.fake).unwrap();
            assert_eq!(verdict, Verdict::Forward);
            Bytes(bytes)
        }

        /// The way of an error about a packet that is sent on, through the same interface.
        fn told<F: Names + Answer>(&self, mut packet: Bytes, room: u32) -> Bytes {
            too_big::<F, _>(&mut packet, room).unwrap();
            verify(&packet.0).unwrap();
            assert_eq!(device::arriving(&mut packet, &self.fake), Ok(Verdict::Forward));
            verify(&packet.0).unwrap();
            packet
        }
    }

    fn requests(client: Socket, node: Socket) -> [(Frame, usize); 3] {
        let large = [7; 1400];
        let sctp = Frame::sctp(client, node, chunk::INIT).payload(&large);
        let tcp = Frame::tcp(client, node, Flags::SYN).payload(&large);
        [(tcp, 20), (Frame::udp(client, node).payload(&large), 8), (sctp, 12)]
    }

    /// The error about `frame`, of which `length` bytes behind the IP header are quoted.
    fn error<F: Names + Answer>(frame: &Frame, from: Addr, length: usize, room: u32) -> Frame {
        let quoted = &frame.build()[L3 as usize..][..F::HDR_LEN as usize + length];
        let [kind, code] = F::TOO_BIG;
        let answer = Frame::icmp(from, frame.src, kind, code).payload(quoted);
        Frame { transport: Transport::Icmp { kind, code, parameter: room }, macs: frame.macs, ..answer }
    }

    fn rule_37_who_sent_too_much_to_a_node_port_is_told_so<F: Names + Answer>() {
        for room in [1300, 0] {
            for (index, proto) in [Proto::TCP, Proto::UDP, Proto::SCTP].into_iter().enumerate() {
                let net = Net::new::<F>(proto);
                let (request, quoted) = &requests(net.client, net.node)[index];
                let told = net.told::<F>(net.sent_on(request), room);
                let expected = if room == 0 { F::LEAST_MTU } else { room };
                assert_eq!(told.0, error::<F>(request, net.node.0, *quoted, expected).build(), "{proto:?}");
            }
        }
    }

    fn rule_37_a_backend_that_answers_too_much_is_told_so<F: Names + Answer>() {
        let net = Net::new::<F>(Proto::TCP);
        let request = Frame::tcp(net.client, net.node, Flags::SYN);
        let there = net.sent_on(&request);
        let seen = parse::headers::<F, _>(&there).unwrap().unwrap().tuple;
        let own = (F::addr(seen.src), seen.src_port.host());
        let answer = Frame::tcp(net.backend, own, Flags::SYN | Flags::ACK).payload(&[7; 1400]);
        let told = net.told::<F>(net.sent_on(&answer), 1300);
        assert_eq!(told.0, error::<F>(&answer, own.0, 20, 1300).build());
    }

    fn rule_37_what_has_no_ports_is_dropped_by_name<F: Names + Answer>() {
        let net = Net::new::<F>(Proto::UDP);
        let datagram = Frame::udp(net.client, net.node).payload(&[7; 1500]);
        let [_first, later] = &datagram.fragments(1000)[..] else { panic!("two") };
        assert_eq!(too_big::<F, _>(&mut later.packet(), 900), Err(DropReason::TooBig));
    }

    fn a_packet_that_is_several_is_as_long_as_one_of_them<F: Names + Answer>() {
        let (src, dst) = ((F::pod(1), 4000), (F::pod(3), 80));
        let header = F::HDR_LEN as u16;
        let frame = Frame::tcp(src, dst, Flags::ACK).payload(&[7; 3000]);
        assert_eq!(longest::<F, _>(&frame.packet(), 0), header + 20 + 3000);
        assert_eq!(longest::<F, _>(&frame.packet(), 1000), header + 20 + 1000);
        let timestamps = Transport::Tcp { seq: 1, ack: 1, flags: Flags::ACK, options: vec![1; 12] };
        let frame = Frame { transport: timestamps, ..frame };
        assert_eq!(longest::<F, _>(&frame.packet(), 1000), header + 32 + 1000);
        let frame = Frame::udp(src, dst).payload(&[7; 3000]);
        assert_eq!(longest::<F, _>(&frame.packet(), 1000), header + 8 + 1000);
        assert_eq!(longest::<F, _>(&Bytes(vec![0; 70_000]), 0), u16::MAX);
    }
}
