//! ICMP errors about packets of service flows (rule 37).
//!
//! An error quotes the packet that it is about as its sender saw it, and that is as we sent it on: rewritten. Turned
//! around, the quoted ends are the tuple of the flow's other direction, whose entry says what both ends were before:
//!
//! ```text
//!   client -> frontend   becomes   client -> backend          sent on, and quoted by the error
//!   client <- frontend   becomes   client <- backend          the entry found by the quoted ends turned around
//! ```
//!
//! So the error goes to the quoted packet's own sender and quotes what that one sent. Its source stays where the receiver
//! does, for a router is not part of the flow; unless it is the flow's other end, which the receiver knows by another
//! address. An error that goes to another address than it came for (a masqueraded client's, a backend's) comes from the
//! flow's other end too: it may go back the way it came, and no router takes packets from its own address. (What comes back
//! to a pod from the world does not: the pod is told which router it was.) An error
//! leaves the flow as it was: anyone may send one.

use core::mem::offset_of;

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::addr::{Port, Proto};
use ferroflow_common::crc32c;
use ferroflow_common::csum::Sum;
use ferroflow_common::family::{V4, V6};
use ferroflow_common::verdict::DropReason;
use network_types::icmp::Icmpv4Hdr;

use crate::masquerade;
use crate::nat::{self, Ends, Rewrite};
use crate::packet::{L3, L4Change, Packet};
use crate::parse::{Fragment, Parse};
use crate::route;
use crate::service::{Origin, Outcome};
use crate::tables::{Aligned, Tables, Tracked};

/// ICMP's header, in both families.
const HEADER: u32 = Icmpv4Hdr::LEN as u32;
const CHECK: u32 = offset_of!(Icmpv4Hdr, check) as u32;
/// Of an echo, in both families.
pub(crate) const IDENTIFIER: u32 = 4;
/// How much of the quoted transport header there is at the least (RFC 792).
const QUOTED: u32 = 8;
/// The longest error; a sender sends no more than 576 or 1280 bytes (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4).
const MAX_END: u32 = 0xffff;

/// The messages that quote a packet.
pub trait Errors: Parse<Bytes: Ends> {
    const ECHO_REQUEST: u8;
    const ECHO_REPLY: u8;

    fn is_error(kind: u8) -> bool;
    /// Whether a message finds neighbours, routers or members of groups, which are on the link.
    fn is_of_link(kind: u8) -> bool;
}

impl Errors for V4 {
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;

    /// Destination unreachable, time exceeded, parameter problem (RFC 792).
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 3 | 11 | 12)
    }

    /// IPv4 has protocols of their own for that.
    #[inline(always)]
    fn is_of_link(_kind: u8) -> bool {
        false
    }
}

impl Errors for V6 {
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;

    /// Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443 section 2.1).
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }

    /// Multicast listener discovery and neighbour discovery (RFC 2710, RFC 4861, RFC 3810).
    #[inline(always)]
    fn is_of_link(kind: u8) -> bool {
        matches!(kind, 130..=137 | 143)
    }
}

/// Where an error's parts are, in one register, so that steps may hand it on: see [`Outcome`]. Offsets in a packet that
/// quotes another have sixteen bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Quote(pub u64);

impl Quote {
    /// No error, or one that quotes no ports.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    const fn new(icmp: u32, l4: u32, end: u32, proto: Proto) -> Self {
        let offsets = (icmp as u16 as u64) << 32 | (l4 as u16 as u64) << 16 | end as u16 as u64;
        Self((proto.number as u64) << 48 | offsets)
    }

    /// Its parts. The verifier is to forget where they come from: the compiler would compare the register as a whole.
    #[inline(always)]
    fn parts<P: Packet>(self, packet: &P) -> Parts {
        let icmp = packet.forget((self.0 >> 32) as u16 as u32);
        let l4 = packet.forget((self.0 >> 16) as u16 as u32);
        Parts { icmp, l4, end: self.0 as u16 as u32, proto: Proto { number: (self.0 >> 48) as u8 } }
    }
}

/// An error's parts.
#[derive(Clone, Copy)]
struct Parts {
    /// Its own ICMP header.
    icmp: u32,
    /// The quoted transport header.
    l4: u32,
    /// Where the error ends.
    end: u32,
    /// The quoted protocol.
    proto: Proto,
}

impl Parts {
    /// The quoted IP header.
    #[inline(always)]
    const fn ip(&self) -> u32 {
        self.icmp + HEADER
    }

    /// The quoted ends, turned around.
    #[inline(always)]
    fn tuple<F: Errors, P: Packet>(&self, packet: &P) -> Option<Aligned<Tuple<F::Bytes>>> {
        let Aligned([src, dst]) = F::ends(packet, self.ip())?;
        let [first, second] = packet.words(self.l4)?;
        let [s0, s1, d0, d1] = if self.proto == F::ICMP {
            // Whoever asked for an echo has the identifier for its port, and answers to it are not quoted.
            let ([kind, ..], [i0, i1, _, _]) = (first.to_ne_bytes(), second.to_ne_bytes());
            if kind != F::ECHO_REQUEST {
                return None;
            }
            [i0, i1, 0, 0]
        } else {
            first.to_ne_bytes()
        };
        Some(Aligned(Tuple {
            src: dst,
            dst: src,
            src_port: Port { be: [d0, d1] },
            dst_port: Port { be: [s0, s1] },
            proto: self.proto,
            reserved: [0; 3],
        }))
    }
}

/// Looks for an error that quotes ports. This and what follows are steps of their own, because all in one have more
/// variables than the programs' stack has room for.
#[inline(always)]
pub fn find<F: Errors, P: Packet>(packet: &P) -> Quote {
    try_find::<F, P>(packet).unwrap_or(Quote::NONE)
}

#[inline(always)]
fn try_find<F: Errors, P: Packet>(packet: &P) -> Option<Quote> {
    let outer = F::network(packet).ok()?;
    if outer.proto != F::ICMP || outer.fragment != Fragment::Whole || outer.end > MAX_END {
        return None;
    }
    let icmp = packet.forget(outer.l4);
    let [message] = packet.words(icmp)?;
    if !F::is_error(message.to_ne_bytes()[0]) {
        return None;
    }
    let inner = F::header(packet, icmp + HEADER).ok()?;
    let l4 = packet.forget(inner.l4);
    if inner.fragment == Fragment::Later || l4 + QUOTED > outer.end {
        return None;
    }
    Some(Quote::new(icmp, l4, outer.end, inner.proto))
}

/// Sends an error about a known flow to who is to get it: its own header gets new ends.
/// [`Outcome::TRACKED`] where it is to go on as it is, as a packet of its flow would; [`Outcome::RARE`] where the error is
/// about no flow that is known.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn deliver<F, P, T>(
    packet: &mut P,
    tables: &T,
    quote: Quote,
    origin: Origin,
) -> Result<Outcome, DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F>,
{
    let quote = quote.parts(packet);
    let Some(tuple) = quote.tuple::<F, P>(packet) else { return Ok(Outcome::RARE) };
    let Some(Aligned([src, dst])) = F::ends(packet, L3) else { return Ok(Outcome::RARE) };
    // Sent to another than whose packet it quotes: nobody's.
    if F::words(&tuple.dst) != F::words(&dst) {
        return Ok(Outcome::RARE);
    }
    let Some(row) = flow(tables, &tuple) else {
        // It is what the pod sent to the world already.
        let known = origin == Origin::Inward && masquerade::answers::<F, T>(tables, &tuple);
        return Ok(if known { Outcome::TRACKED } else { Outcome::RARE });
    };
    let mut to = Rewrite::of(&row.load());
    if to.is_relayed_on() {
        return Ok(Outcome::relay(to.node()));
    }
    // As its flow's packets, where it leaves the node.
    if origin == Origin::Pod && to.flags & Entry::MASQUERADED != 0 {
        return Ok(Outcome::TRACKED);
    }
    let back_inside = to.flags & Entry::MASQUERADED != 0;
    if F::words(&src) != F::words(&tuple.src)
        && (back_inside || F::words(&F::bytes(to.dst())) == F::words(&dst))
    {
        to.addrs[0] = F::addr(src);
        to.flags = 0;
    }
    let ends = nat::difference::<F>(Sum::ZERO, &src, &F::bytes(to.src()));
    let ends = nat::difference::<F>(ends, &dst, &F::bytes(to.dst()));
    match F::CSUM_OFF {
        Some(check) => packet.change_l3_checksum(L3 + check, ends)?,
        // ICMPv6 sums the addresses too (RFC 4443 section 2.3).
        None => change_checksum(packet, quote.icmp, ends)?,
    }
    F::Bytes::store(packet, L3 + F::SRC_OFF, &to)?;
    Ok(Outcome::goes(route::onwards::<F, T>(tables, &to, origin)))
}

/// How the quoted ends have changed, in one register: the sum of the addresses, and of addresses and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Changes(pub u64);

impl Changes {
    /// Nothing was changed.
    pub const NONE: Self = Self(u64::MAX);

    #[inline(always)]
    const fn new(addresses: Sum, ends: Sum) -> Self {
        Self((addresses.folded() as u64) << 16 | ends.folded() as u64)
    }

    #[inline(always)]
    const fn addresses(self) -> Sum {
        Sum::ZERO.half((self.0 >> 16) as u16)
    }

    #[inline(always)]
    const fn ends(self) -> Sum {
        Sum::ZERO.half(self.0 as u16)
    }
}

/// Gives what an error quotes the ends that its receiver knows; [`Changes::NONE`] where the packet cannot be written.
#[inline(always)]
pub fn requote<F, P, T>(packet: &mut P, tables: &T, quote: Quote) -> Changes
where
    F: Errors,
    P: Packet,
    T: Tables<F>,
{
    try_requote::<F, P, T>(packet, tables, quote).unwrap_or(Changes::NONE)
}

#[inline(always)]
fn try_requote<F, P, T>(packet: &mut P, tables: &T, quote: Quote) -> Option<Changes>
where
    F: Errors,
    P: Packet,
    T: Tables<F>,
{
    let quote = quote.parts(packet);
    let tuple = quote.tuple::<F, P>(packet)?;
    let to = turned(&flow(tables, &tuple)?.load());
    let (src, dst) = (F::bytes(to.src()), F::bytes(to.dst()));
    let addresses = nat::difference::<F>(nat::difference::<F>(Sum::ZERO, &tuple.dst, &src), &tuple.src, &dst);
    let ends = Sum::ZERO
        .half(addresses.folded())
        .less_half(u16::from_ne_bytes(tuple.dst_port.be))
        .half(u16::from_ne_bytes(to.src_port.be))
        .less_half(u16::from_ne_bytes(tuple.src_port.be))
        .half(u16::from_ne_bytes(to.dst_port.be));
    let ([s0, s1], [d0, d1]) = (to.src_port.be, to.dst_port.be);
    let ports = [s0, s1, d0, d1];
    let ends =
        if quote.proto == Proto::SCTP { requote_sctp::<F, P>(packet, &quote, ports, ends)? } else { ends };
    F::Bytes::store(packet, quote.ip() + F::SRC_OFF, &to).ok()?;
    if quote.proto == F::ICMP {
        packet.write(quote.l4 + IDENTIFIER, &[s0, s1]).ok()?;
    } else {
        packet.write(quote.l4, &ports).ok()?;
    }
    Some(Changes::new(addresses, ends))
}

/// Brings a quoted SCTP checksum in line with the ports, and adds to `ends` what that changes. It covers the packet from
/// the ports on, and what a change of these does to it depends on how much that is and not on what it is (CRC32c is
/// linear): the quoted header says how much, whether all of it is quoted or not. What was a fragment says it of the
/// fragment only; its checksum stays as it is, as does one that is not quoted and one that is none (zero, RFC 9653).
#[inline(always)]
fn requote_sctp<F: Errors, P: Packet>(
    packet: &mut P,
    quote: &Parts,
    ports: [u8; 4],
    ends: Sum,
) -> Option<Sum> {
    if quote.l4 + SCTP_CHECK + 4 > quote.end {
        return Some(ends);
    }
    let [old_ports] = packet.words(quote.l4)?;
    let [old] = packet.words(quote.l4 + SCTP_CHECK)?;
    let inner = F::header(packet, quote.ip()).ok()?;
    if old == 0 || inner.fragment != Fragment::Whole || inner.end > MAX_END {
        return Some(ends);
    }
    let difference = u32::from_le(old_ports) ^ u32::from_le_bytes(ports);
    // The compiler knows by now how much that is at the most; the verifier of older kernels has to see it.
    let length = packet.forget(inner.end.saturating_sub(quote.l4));
    let change = crc32c::change(difference, length);
    let new = u32::from_le(old) ^ change;
    packet.write(quote.l4 + SCTP_CHECK, &new.to_le_bytes()).ok()?;
    Some(ends.less_word(old).word(new.to_le()))
}

/// Of SCTP's common header (RFC 9260 section 3.1).
const SCTP_CHECK: u32 = 8;

/// What a packet of this direction is an answer to.
#[inline(always)]
const fn turned(entry: &Entry) -> Rewrite {
    let Entry { src, dst, src_port, dst_port, .. } = *entry;
    Rewrite { addrs: [dst, src], src_port: dst_port, dst_port: src_port, flags: 0 }
}

/// Brings the quoted checksums in line with the ends' changes, and then the error's, which covers all of that.
///
/// # Errors
/// [`DropReason::Rewrite`].
#[inline(always)]
pub fn mend<F: Errors, P: Packet>(packet: &mut P, quote: Quote, changes: Changes) -> Result<(), DropReason> {
    if changes == Changes::NONE {
        return Err(DropReason::Rewrite);
    }
    let quote = quote.parts(packet);
    let mut total = changes.ends();
    if let Some(check) = F::CSUM_OFF {
        total = mend_at(packet, quote.ip() + check, (changes.addresses(), false), total)?;
    }
    let (check, zero_is_none) =
        if quote.proto == F::ICMP { (CHECK, false) } else { nat::checksum(quote.proto) };
    let at = quote.l4 + check;
    // ICMP covers no addresses in IPv4.
    let unsummed = quote.proto == F::ICMP && F::CSUM_OFF.is_some();
    let ends = if unsummed { changes.ends().less_half(changes.addresses().folded()) } else { changes.ends() };
    // An SCTP packet's checksum lies elsewhere and covers no addresses: see `requote_sctp`.
    if quote.proto != Proto::SCTP && at + 2 <= quote.end && !(zero_is_none && half(packet, at)? == [0, 0]) {
        total = mend_at(packet, at, (ends, zero_is_none), total)?;
    }
    change_checksum(packet, quote.icmp, total)
}

/// The direction in which what was quoted would be answered.
#[inline(always)]
fn flow<F: Errors, T: Tables<F>>(tables: &T, tuple: &Aligned<Tuple<F::Bytes>>) -> Option<T::Tracked> {
    let row = tables.tracked(tuple)?;
    if row.load().expires < tables.now() {
        return None;
    }
    Some(row)
}

/// Brings the error's checksum in line with a change of what it covers. Its change makes up for that in a sum over the
/// whole packet, as with ports.
#[inline(always)]
pub(crate) fn change_checksum<P: Packet>(packet: &mut P, icmp: u32, change: Sum) -> Result<(), DropReason> {
    let change = L4Change::Ports { ports: change, zero_is_none: false };
    packet.change_l4_checksum(icmp + CHECK, &change)
}

/// Brings the quoted checksum at `at` in line with a change, and adds to `total` what that changes. Where zero means
/// that there is none, a sum of zero has its other form (RFC 768).
#[inline(always)]
fn mend_at<P: Packet>(
    packet: &mut P,
    at: u32,
    (change, zero_is_none): (Sum, bool),
    total: Sum,
) -> Result<Sum, DropReason> {
    let old = half(packet, at)?;
    let new = match change.update(old) {
        [0, 0] if zero_is_none => [0xff, 0xff],
        new => new,
    };
    packet.write(at, &new)?;
    Ok(total.less_half(u16::from_ne_bytes(old)).half(u16::from_ne_bytes(new)))
}

/// Two bytes of the packet; two more come before.
#[inline(always)]
fn half<P: Packet>(packet: &P, at: u32) -> Result<[u8; 2], DropReason> {
    let [word] = packet.words(at - 2).ok_or(DropReason::Rewrite)?;
    let [_, _, first, second] = word.to_ne_bytes();
    Ok([first, second])
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::{Frontend, FrontendKey};
    use ferroflow_common::abi::node::NodeAddress;
    use ferroflow_common::addr::Addr;
    use std::ops::Range;

    use ferroflow_common::tcp::{Flags, chunk};
    use ferroflow_common::verdict::Verdict;

    use super::*;
    use crate::frame::{Frame, Names, Part, Socket, Transport, UdpChecksum, both_families};
    use crate::noise::world;
    use crate::tables::fake::Fake;

    both_families!(
        rule_37_an_error_about_a_request_reaches_the_client,
        rule_37_an_error_about_a_reply_reaches_the_backend,
        rule_37_masqueraded_clients_and_their_backends_get_their_errors,
        rule_37_a_pod_that_is_its_own_backend_gets_its_errors,
        rule_37_short_quotes_and_those_without_checksum,
        rule_37_errors_leave_the_flow_as_it_was,
        rule_37_what_is_about_no_known_flow_is_left_alone,
        rule_37_a_quote_is_cut_at_every_length,
    );

    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;

    /// Type and code of every error.
    fn kinds<F: Names>() -> Vec<(u8, u8)> {
        if F::CSUM_OFF.is_some() {
            vec![(3, 0), (3, 3), (3, 4), (11, 0), (11, 1), (12, 0)]
        } else {
            vec![(1, 0), (1, 4), (2, 0), (3, 0), (3, 1), (4, 1)]
        }
    }

    /// The error of `from` about `frame`, which quotes `quoted` bytes of its IP packet.
    fn error(from: Addr, frame: &Frame, (kind, code): (u8, u8), quoted: usize) -> Frame {
        let bytes = frame.build();
        let ip = &bytes[L3 as usize..];
        Frame::icmp(from, frame.src, kind, code).payload(&ip[..quoted.min(ip.len())])
    }

    /// A request to the service whose only backend is the remote pod 3 or the local pod 2, with that backend.
    fn requests<F: Names>(backend: u8) -> Vec<(Frame, Socket)> {
        let (vip, pod) = (F::vip(backend), F::pod(backend));
        let client = (F::pod(1), 4000);
        let tcp = Frame::tcp(client, (vip, 80), SYN).payload(b"data of a segment");
        let udp = Frame::udp(client, (vip, 53)).payload(b"a query");
        let sctp = Frame::sctp(client, (vip, 38412), chunk::INIT).payload(b"parameters");
        let frames = [(tcp, (pod, TCP)), (udp, (pod, 5353)), (sctp, (pod, SCTP))];
        frames.into_iter().flat_map(|(frame, to)| [(frame.clone(), to), (frame.extended(), to)]).collect()
    }

    /// Where backends listen.
    const TCP: u16 = 8080;
    const SCTP: u16 = 3868;

    /// The bytes of a transport header, and those of its checksum, by where its receiver listens.
    fn transport(port: u16) -> (usize, Range<usize>) {
        match port {
            TCP => (20, 16..18),
            SCTP => (16, 8..12),
            _ => (8, 6..8),
        }
    }

    const LOCAL: u8 = 2;
    const REMOTE: u8 = 3;
    const ALL: usize = usize::MAX;

    fn rule_37_an_error_about_a_request_reaches_the_client<F: Names>() {
        for (request, backend) in requests::<F>(REMOTE) {
            let fake = world();
            assert!(request.leave(&fake).is_ok());
            let sent_on = request.clone().sent_to(backend);
            for kind in kinds::<F>() {
                // A router keeps its name; the backend is known by the service's.
                for (from, seen) in [(F::vip(200), F::vip(200)), (backend.0, request.dst)] {
                    let came = error(from, &sent_on, kind, ALL);
                    let expected = error(seen, &request, kind, ALL).build();
                    let to_pod = Ok((Verdict::Pod { ifindex: 11 }, expected.clone()));
                    assert_eq!(came.arrive(&fake), to_pod, "{kind:?}");
                    assert_eq!(came.enter(&fake), Ok((Verdict::Stack, expected)), "{kind:?}");
                }
            }
        }
        for (request, backend) in requests::<F>(LOCAL) {
            let fake = world();
            assert!(request.leave(&fake).is_ok());
            let came = error(backend.0, &request.clone().sent_to(backend), kinds::<F>()[1], ALL);
            let expected = error(request.dst, &request, kinds::<F>()[1], ALL).build();
            assert_eq!(came.leave(&fake), Ok((Verdict::Pod { ifindex: 11 }, expected)));
        }
    }

    fn rule_37_an_error_about_a_reply_reaches_the_backend<F: Names>() {
        for backend in [LOCAL, REMOTE] {
            for (request, to) in requests::<F>(backend) {
                let fake = world();
                assert!(request.leave(&fake).is_ok());
                let reply = request.answer(SYN | ACK).payload(b"an answer");
                let sent = reply.clone().sent_from(to);
                for kind in kinds::<F>() {
                    // The client is known to the backend by its own name.
                    for from in [F::vip(200), request.src] {
                        let came = error(from, &reply, kind, ALL);
                        let pod = Verdict::Pod { ifindex: 12 };
                        let verdict = if backend == LOCAL { pod } else { Verdict::Stack };
                        let expected = error(request.src, &sent, kind, ALL).build();
                        assert_eq!(came.leave(&fake), Ok((verdict, expected)), "{kind:?}");
                    }
                }
            }
        }
    }

    fn rule_37_masqueraded_clients_and_their_backends_get_their_errors<F: Names>() {
        let mut fake = Fake::default();
        let (node, client, backend) = (F::vip(200), (F::vip(99), 4000), (F::pod(2), 8080));
        let any = if node.is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
        fake.node.insert(node, NodeAddress { flags: NodeAddress::NODE_PORTS });
        fake.service(any, 30_080, Proto::TCP, &[backend]).flags = Frontend::NORTH_SOUTH;
        let request = Frame::tcp(client, (node, 30_080), SYN).payload(b"request");
        assert!(request.arrive(&fake).is_ok());
        let entry = fake.entry(client, (node, 30_080), Proto::TCP).unwrap();
        let sent_on = request.clone().sent_from((node, entry.src_port.host())).sent_to(backend);
        let reply = request.answer(SYN | ACK);
        let sent = sent_on.answer(SYN | ACK);
        for kind in kinds::<F>() {
            // About what went to the backend: the client gets it, whom the node stood in for. About what went to the
            // client: the backend gets it. Both know the node, whose own address the stack would not forward.
            for from in [F::vip(201), backend.0] {
                let expected = (Verdict::Forward, error(node, &request, kind, ALL).build());
                assert_eq!(error(from, &sent_on, kind, ALL).arrive(&fake), Ok(expected));
            }
            for from in [F::vip(201), client.0] {
                let expected = (Verdict::Forward, error(node, &sent, kind, ALL).build());
                assert_eq!(error(from, &reply, kind, ALL).arrive(&fake), Ok(expected));
            }
        }
    }

    fn rule_37_a_pod_that_is_its_own_backend_gets_its_errors<F: Names>() {
        let fake = world();
        let request = Frame::tcp((F::pod(2), 4000), (F::vip(2), 80), SYN);
        let (_, sent_on) = request.leave(&fake).unwrap();
        let looped = request.clone().sent_from((F::vip(2), 4000)).sent_to((F::pod(2), 8080));
        assert_eq!(sent_on, looped.build());
        let came = error(F::pod(2), &looped, kinds::<F>()[1], ALL);
        let expected = error(F::vip(2), &request, kinds::<F>()[1], ALL).build();
        assert_eq!(came.leave(&fake), Ok((Verdict::Pod { ifindex: 12 }, expected)));
    }

    fn rule_37_short_quotes_and_those_without_checksum<F: Names>() {
        let none = Transport::Udp { checksum: UdpChecksum::None };
        let mut cases = requests::<F>(REMOTE);
        let unsummed = Frame::new((F::pod(1), 4000), (F::vip(3), 53), none).payload(b"query");
        cases.push((unsummed, (F::pod(3), 5353)));
        for (request, backend) in cases {
            let fake = world();
            assert!(request.leave(&fake).is_ok());
            let sent_on = request.clone().sent_to(backend);
            let whole = request.build().len() - L3 as usize;
            let (length, checksum) = transport(backend.1);
            let header = whole - request.payload.len() - length;
            // A quote that ends amid the checksum has some bytes of it, which nobody can use.
            let amid = header + checksum.start + 1..header + checksum.end;
            for quoted in (header + 8..=whole).filter(|quoted| !amid.contains(quoted)) {
                let expected = error(F::vip(200), &request, kinds::<F>()[2], quoted).build();
                let came = error(F::vip(200), &sent_on, kinds::<F>()[2], quoted);
                assert_eq!(came.enter(&fake), Ok((Verdict::Stack, expected)), "{quoted} of {whole}");
            }
        }
        // Every value of one quoted word, so also those whose checksums come out as zero.
        let fake = world();
        for word in 0..=u16::MAX {
            let request = Frame::udp((F::pod(1), 4000), (F::vip(3), 53)).payload(&word.to_be_bytes());
            assert!(request.leave(&fake).is_ok());
            let came = error(F::vip(200), &request.clone().sent_to((F::pod(3), 5353)), kinds::<F>()[1], ALL);
            let (_, bytes) = came.enter(&fake).unwrap();
            crate::frame::verify(&bytes).unwrap();
            assert_eq!(bytes.len(), came.build().len());
            assert_ne!(bytes[bytes.len() - 4..][..2], [0, 0], "{word}");
        }
    }

    fn rule_37_errors_leave_the_flow_as_it_was<F: Names>() {
        for (request, backend) in requests::<F>(REMOTE) {
            let fake = world();
            assert!(request.leave(&fake).is_ok());
            let before = fake.tracked();
            fake.clock.set(fake.clock.get() + 29);
            let came = error(backend.0, &request.clone().sent_to(backend), kinds::<F>()[0], ALL);
            assert!(came.arrive(&fake).is_ok());
            assert!(came.enter(&fake).is_ok());
            assert_eq!(fake.tracked(), before);
            assert_eq!(fake.refreshed.get(), 0);
        }
    }

    fn rule_37_what_is_about_no_known_flow_is_left_alone<F: Names>() {
        for (request, backend) in requests::<F>(REMOTE) {
            let fake = world();
            assert!(request.leave(&fake).is_ok());
            let sent_on = request.clone().sent_to(backend);
            let about = |frame: &Frame| error(F::vip(200), frame, kinds::<F>()[1], ALL);
            let mut others = vec![
                about(&request.clone().sent_to((backend.0, backend.1 + 1))),
                about(&sent_on.clone().sent_from((request.src, 1))),
                // What the client sent is nobody's before it is sent on.
                about(&request),
                about(&sent_on.clone().payload(&[7; 64]).part(Part::Later(64))),
                Frame { dst: F::pod(2), ..about(&sent_on) },
                about(&Frame::icmp(request.src, backend.0, 8, 0).payload(&[0; 64])),
            ];
            // Echo, and neighbour discovery (rule 39): the same bytes behind another type.
            let (errors, end) =
                if F::CSUM_OFF.is_some() { (vec![3, 11, 12], 20) } else { (vec![1, 2, 3, 4], 160) };
            for kind in (0..end).filter(|kind| !errors.contains(kind)) {
                others.push(error(F::vip(200), &sent_on, (kind, 0), ALL));
            }
            for other in others {
                let same = Ok((Verdict::Stack, other.build()));
                assert_eq!((other.leave(&fake), other.enter(&fake)), (same.clone(), same.clone()));
                assert_eq!(other.arrive(&fake), same);
            }
            fake.clock.set(1_000);
            let late = about(&sent_on);
            assert_eq!(late.arrive(&fake), Ok((Verdict::Stack, late.build())), "the flow has expired");
        }
    }

    fn rule_37_a_quote_is_cut_at_every_length<F: Names>() {
        for (request, backend) in requests::<F>(REMOTE) {
            let fake = world();
            assert!(request.leave(&fake).is_ok());
            let sent_on = request.clone().sent_to(backend);
            let whole = request.build().len() - L3 as usize;
            let header = whole - request.payload.len() - transport(backend.1).0;
            for quoted in 0..header + 8 {
                let came = error(F::vip(200), &sent_on, kinds::<F>()[1], quoted);
                assert_eq!(came.arrive(&fake), Ok((Verdict::Stack, came.build())), "{quoted}");
            }
        }
    }
}
