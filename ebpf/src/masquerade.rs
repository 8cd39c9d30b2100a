//! Pods' packets to the world: they leave by the address of the node's device, for nobody out there knows the pods'.
//!
//! ```text
//!   pod -> world      becomes   node:port -> world      where it leaves by a device of the node (TC egress)
//!   node:port <- world   becomes   pod <- world         where the answer arrives (TC ingress), like any flow's
//! ```
//!
//! Until it leaves, a packet is the pod's: the node's routes, its packet filter and the hop limit see the pod's address,
//! also once its flow is known. An answer goes by the stack, too, so that a packet filter which follows connections sees
//! both directions: it would take what it saw one of for broken. A flow is opened by a packet to ports (of TCP and SCTP by the one that opens a
//! connection) and by an ICMP echo, whose identifier stands in for the port; errors about either are translated like those
//! about any flow. What has neither ports nor an identifier cannot be told apart on its way back, and is dropped.
//!
//! The host's own traffic is left alone: only what comes from a pod of this node is touched. The port is one that no
//! socket of the host gets by itself, that no socket of the host has when the flow opens, and that no service or pod is
//! reached at; so an answer to it is the pod's. What remains: a socket of the host that binds such a port later and talks
//! to the same port of the same peer; and an echo's identifier, which the host's own `ping` chooses as it likes.

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::lb::FrontendKey;
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::csum::Sum;
use ferroflow_common::family::{Family, V4, V6};
use ferroflow_common::tcp::{Flags, State};
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack::{self, Epoch, Flow, Halves};
use crate::icmp::{self, Errors};
use crate::lb;
use crate::nat::{self, Ends as _, Rewrite};
use crate::packet::{L3, Packet, Reshape};
use crate::parse::{self, Fragment, Headers, Network};
use crate::pod;
use crate::route;
use crate::service::{Origin, Outcome};
use crate::steps::Steps;
use crate::tables::{Aligned, Services, Tables, Tracked as _};

/// What is known of the ways out of the node.
pub trait Exits<P>: Services {
    /// Whether pods are masqueraded: fixed when the programs are loaded.
    fn masquerades(&self) -> bool;
    /// Whether pods are known there by their own addresses.
    fn keeps_source(&self, dst: &Addr) -> bool;
    /// The address of the device that the packet leaves by; unspecified where it has none of the family.
    fn exit_address<F: Family>(&self, packet: &P) -> F::Bytes;
    /// Whether a packet with these ends would be a socket's of the host.
    fn is_hosts<F: Family>(&self, packet: &P, tuple: &Aligned<Tuple<F::Bytes>>) -> bool;
}

/// A packet that leaves by a device of the node.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn leaving<P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    P: Reshape,
    T: Steps<V4, P> + Steps<V6, P>,
{
    pod::routed(packet, tables, Origin::Exit)
}

/// Whether the packet is a pod's of this node, to the world.
#[inline(always)]
pub fn leads_out<F, P, T>(packet: &P, tables: &T) -> bool
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Exits<P>,
{
    if !tables.masquerades() {
        return false;
    }
    let Some(Aligned([src, _])) = F::ends(packet, L3) else { return false };
    if tables.endpoint(&F::addr(src)).is_none() {
        return false;
    }
    // Read again: the stack is short.
    F::ends(packet, L3).is_some_and(|Aligned([_, dst])| !tables.keeps_source(&F::addr(dst)))
}

/// Opens the flow of a packet that [`leads_out`]: [`Outcome::TRACKED`]. [`Outcome::STACK`] where it is amid a connection
/// that nobody knows: somebody may have reached the pod by its own address.
///
/// # Errors
/// [`DropReason::Unmasqueradable`], [`DropReason::NoMasquerade`], and as [`conntrack::enter`].
#[inline(always)]
pub fn open<F, P, T>(packet: &mut P, tables: &T) -> Result<Outcome, DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Exits<P>,
{
    let network = F::network(packet)?;
    let headers = if network.proto == F::ICMP {
        match echo::<F, P>(packet, network)? {
            Some(headers) => headers,
            // An error about no flow that is known, or an answer to who reached the pod.
            None => return Ok(Outcome::STACK),
        }
    } else {
        parse::transport(packet, network)?.ok_or(DropReason::Unmasqueradable)?
    };
    let tuple = &headers.tuple;
    let opens = headers.flags.opens() || tuple.proto == Proto::UDP;
    if !opens {
        return Ok(Outcome::STACK);
    }
    let own = tables.exit_address::<F>(packet);
    if F::words(&own) == [0; 4] {
        return Err(DropReason::NoMasquerade);
    }
    let reply_tuple = Aligned(Tuple {
        src: tuple.dst,
        dst: own,
        src_port: tuple.dst_port,
        dst_port: conntrack::random_port(tables.random()),
        proto: tuple.proto,
        reserved: [0; 3],
    });
    let entry = Entry {
        src: F::addr(tuple.dst),
        dst: F::addr(tuple.src),
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        kind: Entry::REPLY,
        state: State::NEW.0,
        flags: Entry::MASQUERADED,
        reserved: 0,
        epoch: tables.epoch(),
        backend: Entry::NO_BACKEND,
        generation: 0,
        expires: tables.now().wrapping_add(State::NEW.lifetime(tuple.proto)),
    };
    conntrack::enter(tables, &headers, (reply_tuple, entry), Entry::MASQUERADED, |tuple| {
        is_taken::<F, P, T>(tables, packet, tuple)
    })?;
    Ok(Outcome::TRACKED)
}

/// Whether a packet with these ends, which the stack hands to a pod, answers what the pod sent to the world. It was addressed to
/// the node, so the tuple by which the flow is known is no longer its own.
#[inline(always)]
pub fn answers<F: Family, T: Tables<F>>(tables: &T, tuple: &Tuple<F::Bytes>) -> bool {
    let asked = Aligned(F::turned(tuple));
    let Some(row) = tables.tracked(&asked) else { return false };
    let entry = row.load();
    entry.flags & Entry::MASQUERADED != 0 && entry.kind == Entry::FORWARD && entry.expires >= tables.now()
}

/// Whether packets with these ends, which arrive at the node, are somebody's: a service's, or a socket's of the host.
#[inline(always)]
pub fn is_taken<F, P, T>(tables: &T, packet: &P, tuple: &Aligned<Tuple<F::Bytes>>) -> bool
where
    F: Family,
    T: Tables<F> + Exits<P>,
{
    let mut key: FrontendKey = lb::key::<F>(tuple);
    lb::is_service(tables.frontend(&key))
        || lb::is_service(lb::node_port(tables, &mut key))
        || tables.is_hosts::<F>(packet, tuple)
}

/// An ICMP echo of a known flow. [`Outcome::OPENS`] for every other packet that the stack has routed and that has no
/// ports, [`Outcome::STACK`] from outside.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn known_echo<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Result<Outcome, DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F>,
{
    let unknown = if origin == Origin::Exit { Outcome::OPENS } else { Outcome::STACK };
    let network = F::network(packet)?;
    if network.proto != F::ICMP || network.fragment == Fragment::Later {
        return Ok(unknown);
    }
    let Some(headers) = echo::<F, P>(packet, network)? else { return Ok(unknown) };
    match conntrack::follow::<F, T>(tables, &headers, Halves::Mended, Epoch::Ignored) {
        // Only policies know it, yet.
        Flow::Known(to) if to.is_plain() => Ok(unknown),
        Flow::Known(to) => {
            rewrite_echo(packet, &headers, &to)?;
            Ok(Outcome::goes(route::onwards::<F, T>(tables, &to, origin)))
        }
        Flow::Unknown | Flow::Halved | Flow::Stale => Ok(unknown),
    }
}

/// The ends of an ICMP echo, and whether it is asked for (as a SYN) or answered; `None` where it is another message.
///
/// # Errors
/// [`DropReason::Truncated`].
#[inline(always)]
fn echo<F: Errors, P: Packet>(packet: &P, network: Network<F>) -> Result<Option<Headers<F>>, DropReason> {
    if network.fragment == Fragment::Later {
        return Ok(None);
    }
    let l4 = packet.forget(network.l4);
    let [message, rest] = packet.words(l4).ok_or(DropReason::Truncated)?;
    let [kind, ..] = message.to_ne_bytes();
    let [i0, i1, ..] = rest.to_ne_bytes();
    let identifier = Port { be: [i0, i1] };
    let (src_port, dst_port, flags) = if kind == F::ECHO_REQUEST {
        (identifier, Port::ZERO, Flags(Flags::SYN))
    } else if kind == F::ECHO_REPLY {
        (Port::ZERO, identifier, Flags(Flags::ACK))
    } else {
        return Ok(None);
    };
    let Network { src, dst, end, .. } = network;
    let tuple = Aligned(Tuple { src, dst, src_port, dst_port, proto: F::ICMP, reserved: [0; 3] });
    Ok(Some(Headers { tuple, l4, end, flags }))
}

/// Gives an echo its new ends: one of the two ports is its identifier, the other 0 before and after.
#[inline(always)]
fn rewrite_echo<F: Errors, P: Packet>(
    packet: &mut P,
    headers: &Headers<F>,
    to: &Rewrite,
) -> Result<(), DropReason> {
    let tuple = &headers.tuple;
    let ([s0, s1], [d0, d1]) = (to.src_port.be, to.dst_port.be);
    let identifier = [s0 | d0, s1 | d1];
    let ends = nat::difference::<F>(Sum::ZERO, &tuple.src, &F::bytes(to.src()));
    let ends = nat::difference::<F>(ends, &tuple.dst, &F::bytes(to.dst()));
    let mut change = Sum::ZERO
        .less_half(u16::from_ne_bytes(tuple.src_port.be))
        .less_half(u16::from_ne_bytes(tuple.dst_port.be))
        .half(u16::from_ne_bytes(identifier));
    match F::CSUM_OFF {
        Some(check) => packet.change_l3_checksum(L3 + check, ends)?,
        None => change = change.half(ends.folded()),
    }
    icmp::change_checksum(packet, headers.l4, change)?;
    F::Bytes::store(packet, L3 + F::SRC_OFF, to)?;
    packet.write(headers.l4 + icmp::IDENTIFIER, &identifier)
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::Frontend;
    use ferroflow_common::abi::node::{NodeAddress, Settings};
    use ferroflow_common::abi::policy::EndpointPolicy;
    use ferroflow_common::tcp::chunk;

    use super::*;
    use crate::device;
    use crate::frame::{Frame, Names, Part, Socket, Transport, both_families, verify};
    use crate::noise::Noise;
    use crate::packet::Bytes;
    use crate::tables::fake::Fake;

    both_families!(
        a_pod_is_the_node_to_the_world_and_gets_its_answers,
        a_pod_keeps_its_address_where_it_is_known,
        the_hosts_own_packets_are_left_alone,
        where_it_is_off_everything_passes,
        two_pods_with_one_port_get_two,
        ports_of_the_host_of_services_and_of_others_are_left_alone,
        amid_a_connection_nothing_is_opened,
        a_half_that_was_evicted_is_mended,
        rule_48_answers_reach_a_pod_that_policies_isolate,
        rule_48_answers_reach_a_pod_that_is_isolated_while_it_waits,
        an_echo_is_the_nodes_by_its_identifier,
        errors_are_translated_both_ways,
        an_error_about_an_echo_finds_who_asked,
        fragments_leave_and_come_back,
        what_has_no_ports_is_dropped_by_name,
        without_an_address_of_the_family_nothing_leaves,
        a_service_out_in_the_world_is_one_flow,
        noise_leaves_packets_whole,
    );

    const ACK: u8 = Flags::ACK;
    const SYN: u8 = Flags::SYN;

    fn node<F: Names>() -> Addr {
        F::vip(200)
    }

    fn world<F: Names>(port: u16) -> Socket {
        (F::vip(99), port)
    }

    /// Pods 1 and 2 are here, pod 3 is on another node.
    fn fake<F: Names>() -> Fake {
        let mut fake = Fake::default();
        fake.unmasqueraded = Some(vec![F::pod(3)]);
        fake.node.insert(node::<F>(), NodeAddress { flags: NodeAddress::NODE_PORTS });
        fake.local(F::pod(1), 11);
        fake.local(F::pod(2), 12);
        fake.clock.set(1_000);
        fake
    }

    /// The first packets of pod 1 to the world, by each protocol with ports.
    fn flows<F: Names>() -> [Frame; 3] {
        let client = (F::pod(1), 40_000);
        [
            Frame::tcp(client, world::<F>(443), SYN),
            Frame::udp(client, world::<F>(53)).payload(b"query"),
            Frame::sctp(client, world::<F>(3868), chunk::INIT).payload(b"parameters"),
        ]
    }

    /// Lets a frame leave, which must come out as the node's with nothing else changed; as it came out.
    fn leaves<F: Names>(fake: &Fake, frame: &Frame) -> Frame {
        let before = frame.leave(fake);
        assert_eq!(before, Ok((Verdict::Stack, frame.build())), "it is the pod's until it leaves");
        let (verdict, bytes) = frame.exit(fake).unwrap();
        let entry = fake.entry((frame.src, frame.src_port), (frame.dst, frame.dst_port), frame.proto());
        let out = frame.clone().sent_from((node::<F>(), entry.unwrap().src_port.host()));
        assert_eq!((verdict, bytes), (Verdict::Stack, out.build()));
        out
    }

    fn a_pod_is_the_node_to_the_world_and_gets_its_answers<F: Names>() {
        for frame in flows::<F>().into_iter().flat_map(|frame| [frame.clone().extended(), frame]) {
            let fake = fake::<F>();
            let out = leaves::<F>(&fake, &frame);
            assert!((1024..30_000).contains(&out.src_port), "no socket chooses it by itself");
            for _ in 0..3 {
                let back = out.answer(SYN | ACK).arrive(&fake);
                assert_eq!(back, Ok((Verdict::Stack, frame.answer(SYN | ACK).build())));
                assert_eq!(leaves::<F>(&fake, &frame).src_port, out.src_port, "it keeps its port");
            }
            assert_eq!(fake.tracked().len(), 2);
        }
    }

    fn rule_48_answers_reach_a_pod_that_policies_isolate<F: Names>() {
        let answered = Transport::Icmp { kind: kind::<F>(0), code: 0, parameter: 0 };
        for frame in flows::<F>().into_iter().chain([ping::<F>(7)]) {
            let mut fake = fake::<F>();
            fake.settings = Some(Settings { flags: Settings::POLICIES, ..Settings::NONE });
            let row = fake.endpoints.get_mut(&F::pod(1)).unwrap();
            row.policy = EndpointPolicy { ingress: EndpointPolicy::CLOSED, ..EndpointPolicy::default() };
            let answer = |frame: &Frame| {
                let answer = frame.answer(SYN | ACK);
                if frame.proto() == F::ICMP {
                    Frame { transport: answered.clone(), ..answer }
                } else {
                    answer
                }
            };
            let out = leaves::<F>(&fake, &frame);
            for _ in 0..2 {
                let back = answer(&frame);
                assert_eq!(answer(&out).arrive(&fake), Ok((Verdict::Stack, back.build())));
                assert_eq!(back.enter_pod(&fake, Origin::Inward), Ok((Verdict::Stack, back.build())));
                assert_eq!(leaves::<F>(&fake, &frame).src_port, out.src_port, "it keeps its port");
            }
            let stranger = Frame::udp(world::<F>(53), (F::pod(1), 40_001));
            assert_eq!(stranger.enter_pod(&fake, Origin::Inward), Err(DropReason::PolicyIngress));
        }
    }

    fn rule_48_answers_reach_a_pod_that_is_isolated_while_it_waits<F: Names>() {
        let answered = Transport::Icmp { kind: kind::<F>(0), code: 0, parameter: 0 };
        for frame in flows::<F>().into_iter().chain([ping::<F>(7)]) {
            let mut fake = fake::<F>();
            let out = leaves::<F>(&fake, &frame);
            fake.settings = Some(Settings { flags: Settings::POLICIES, ..Settings::NONE });
            let row = fake.endpoints.get_mut(&F::pod(1)).unwrap();
            row.policy = EndpointPolicy { ingress: EndpointPolicy::CLOSED, ..EndpointPolicy::default() };
            let answer = |frame: &Frame| {
                let answer = frame.answer(SYN | ACK);
                if frame.proto() == F::ICMP {
                    Frame { transport: answered.clone(), ..answer }
                } else {
                    answer
                }
            };
            let back = answer(&frame);
            for _ in 0..2 {
                assert_eq!(answer(&out).arrive(&fake), Ok((Verdict::Stack, back.build())));
                assert_eq!(back.enter_pod(&fake, Origin::Inward), Ok((Verdict::Stack, back.build())));
            }
            let stranger = Frame { src: F::vip(66), ..back.clone() };
            assert_eq!(stranger.enter_pod(&fake, Origin::Inward), Err(DropReason::PolicyIngress));
            fake.clock.set(fake.clock.get() + 100_000);
            assert!(back.enter_pod(&fake, Origin::Inward).is_err(), "it waits no longer");
        }
    }

    fn a_pod_keeps_its_address_where_it_is_known<F: Names>() {
        let fake = fake::<F>();
        for frame in flows::<F>() {
            let inside = frame.sent_to((F::pod(3), 80));
            assert_eq!(inside.exit(&fake), Ok((Verdict::Stack, inside.build())));
        }
        let echo = Frame::icmp(F::pod(1), F::pod(3), kind::<F>(8), 0);
        assert_eq!(echo.exit(&fake), Ok((Verdict::Stack, echo.build())));
        assert!(fake.tracked().is_empty());
    }

    fn the_hosts_own_packets_are_left_alone<F: Names>() {
        let fake = fake::<F>();
        for source in [node::<F>(), F::vip(201), F::pod(3)] {
            for frame in flows::<F>() {
                let own = frame.sent_from((source, 40_000));
                assert_eq!(own.exit(&fake), Ok((Verdict::Stack, own.build())));
                let answer = own.answer(SYN | ACK);
                assert_eq!(answer.arrive(&fake), Ok((Verdict::Stack, answer.build())));
            }
        }
        assert!(fake.tracked().is_empty());
    }

    fn where_it_is_off_everything_passes<F: Names>() {
        let mut fake = fake::<F>();
        fake.unmasqueraded = None;
        for frame in flows::<F>() {
            assert_eq!(frame.exit(&fake), Ok((Verdict::Stack, frame.build())));
        }
        let other = Frame::new((F::pod(1), 0), world::<F>(0), Transport::Other(Proto { number: 47 }));
        assert_eq!(other.exit(&fake), Ok((Verdict::Stack, other.build())));
        assert!(fake.tracked().is_empty());
    }

    fn two_pods_with_one_port_get_two<F: Names>() {
        for frame in flows::<F>() {
            let fake = fake::<F>();
            let other = frame.clone().sent_from((F::pod(2), frame.src_port));
            // Both want the same port at first.
            fake.dice.set(conntrack::throw_for(Port::new(5_000)));
            let first = leaves::<F>(&fake, &frame);
            assert_eq!(first.src_port, 5_000);
            assert_eq!(other.exit(&fake), Err(DropReason::TupleCollision), "there is no other");
            fake.dice.set(None);
            let second = leaves::<F>(&fake, &other);
            assert_ne!(first.src_port, second.src_port);
            for (out, frame) in [(first, &frame), (second, &other)] {
                let back = out.answer(SYN | ACK).arrive(&fake);
                assert_eq!(back, Ok((Verdict::Stack, frame.answer(SYN | ACK).build())));
            }
        }
    }

    fn ports_of_the_host_of_services_and_of_others_are_left_alone<F: Names>() {
        for frame in flows::<F>() {
            let mut fake = fake::<F>();
            fake.dice.set(conntrack::throw_for(Port::new(5_000)));
            fake.host_ports.push((frame.proto(), 5_000));
            assert_eq!(frame.exit(&fake), Err(DropReason::TupleCollision));
            fake.host_ports.clear();
            fake.service(node::<F>(), 5_000, frame.proto(), &[(F::pod(2), 80)]);
            assert_eq!(frame.exit(&fake), Err(DropReason::TupleCollision));
            fake.frontends.clear();
            let any = lb::key::<F>(&Tuple {
                src: F::bytes(&F::pod(1)),
                dst: F::bytes(&node::<F>()),
                src_port: Port::ZERO,
                dst_port: Port::new(5_000),
                proto: frame.proto(),
                reserved: [0; 3],
            });
            let mut any = any;
            assert!(lb::node_port(&fake, &mut any).is_none());
            fake.service(any.addr, 5_000, frame.proto(), &[(F::pod(2), 80)]).flags |= Frontend::NORTH_SOUTH;
            assert_eq!(frame.exit(&fake), Err(DropReason::TupleCollision));
            assert!(fake.tracked().is_empty());
            fake.frontends.clear();
            assert_eq!(leaves::<F>(&fake, &frame).src_port, 5_000);
        }
    }

    fn amid_a_connection_nothing_is_opened<F: Names>() {
        let fake = fake::<F>();
        let client = (F::pod(1), 8080);
        for flags in [ACK, SYN | ACK, ACK | Flags::FIN, Flags::RST] {
            let frame = Frame::tcp(client, world::<F>(50_000), flags);
            assert_eq!(frame.exit(&fake), Ok((Verdict::Stack, frame.build())));
        }
        let reply = Frame { dst_port: 9, ..Frame::icmp(F::pod(1), F::vip(99), kind::<F>(0), 0) };
        assert_eq!(reply.exit(&fake), Ok((Verdict::Stack, reply.build())));
        assert!(fake.tracked().is_empty());
    }

    fn a_half_that_was_evicted_is_mended<F: Names>() {
        let fake = fake::<F>();
        let [frame, ..] = flows::<F>();
        let out = leaves::<F>(&fake, &frame);
        let whole = fake.tracked();
        for (tuple, _) in whole.clone() {
            fake.conntrack.borrow_mut().remove(&tuple);
            // A packet of the other direction, long enough after for it to be looked for.
            fake.clock.set(fake.clock.get() + 50);
            assert!(out.answer(SYN | ACK).arrive(&fake).is_ok());
            assert_eq!(leaves::<F>(&fake, &frame).src_port, out.src_port);
            let flags = |rows: &std::collections::BTreeMap<Tuple<[u8; 16]>, Entry>| {
                rows.iter().map(|(tuple, entry)| (*tuple, entry.kind, entry.flags)).collect::<Vec<_>>()
            };
            assert_eq!(flags(&fake.tracked()), flags(&whole));
        }
    }

    /// Of the family, by IPv4's numbers of a request and a reply.
    fn kind<F: Names>(v4: u8) -> u8 {
        if F::CSUM_OFF.is_some() { v4 } else { [129, 128][usize::from(v4 == 8)] }
    }

    /// Pod 1 asks for an echo with this identifier.
    fn ping<F: Names>(identifier: u16) -> Frame {
        let echo = Frame::icmp(F::pod(1), F::vip(99), kind::<F>(8), 0).payload(b"abcdefgh");
        Frame { src_port: identifier, ..echo }
    }

    fn an_echo_is_the_nodes_by_its_identifier<F: Names>() {
        for identifier in [0, 1, 40_000, 65_535] {
            let (fake, frame) = (fake::<F>(), ping::<F>(identifier));
            for frame in [frame.clone(), frame.extended()] {
                let out = leaves::<F>(&fake, &frame);
                let transport = Transport::Icmp { kind: kind::<F>(0), code: 0, parameter: 0 };
                let answer = |echo: &Frame| Frame {
                    transport: transport.clone(),
                    payload: frame.payload.clone(),
                    ..echo.answer(0)
                };
                let back = answer(&out).arrive(&fake);
                assert_eq!(back, Ok((Verdict::Stack, answer(&frame).build())));
                let stranger = Frame { dst_port: out.src_port ^ 1, ..answer(&out) };
                assert_eq!(stranger.arrive(&fake), Ok((Verdict::Stack, stranger.build())), "the host's own");
            }
            assert_eq!(fake.tracked().len(), 2);
        }
    }

    /// An error of this kind about a packet, whose first bytes it quotes.
    fn error(from: Addr, about: &Frame, v4: u8, v6: u8) -> Frame {
        let kind = if from.is_v4() { v4 } else { v6 };
        let Bytes(bytes) = about.packet();
        // What is quoted of SCTP's checksum stays as it was: it cannot be computed from a part.
        let cut = if about.proto() == Proto::SCTP { about.payload.len() + 8 } else { 0 };
        let end = bytes.len() - cut;
        Frame::icmp(from, about.src, kind, 0).payload(&bytes[L3 as usize..end])
    }

    fn errors_are_translated_both_ways<F: Names>() {
        let router = F::vip(98);
        for frame in flows::<F>() {
            let fake = fake::<F>();
            let out = leaves::<F>(&fake, &frame);
            let seen = error(router, &out, 11, 3).arrive(&fake);
            assert_eq!(seen, Ok((Verdict::Pod { ifindex: 11 }, error(router, &frame, 11, 3).build())));
            let answer = |out: &Frame| out.answer(SYN | ACK);
            assert!(answer(&out).arrive(&fake).is_ok());
            let refused = error(F::pod(1), &answer(&frame), 3, 1).sent_to((frame.dst, 0));
            assert_eq!(
                refused.leave(&fake),
                Ok((Verdict::Stack, refused.build())),
                "the pod's until it leaves"
            );
            let expected = error(node::<F>(), &answer(&out), 3, 1).sent_to((frame.dst, 0));
            assert_eq!(refused.exit(&fake), Ok((Verdict::Stack, expected.build())));
        }
    }

    fn an_error_about_an_echo_finds_who_asked<F: Names>() {
        let router = F::vip(98);
        for frame in [ping::<F>(77), ping::<F>(0)] {
            let fake = fake::<F>();
            let out = leaves::<F>(&fake, &frame);
            let seen = error(router, &out, 11, 3).arrive(&fake);
            assert_eq!(seen, Ok((Verdict::Pod { ifindex: 11 }, error(router, &frame, 11, 3).build())));
            let stranger = error(router, &Frame { src_port: out.src_port ^ 1, ..out }, 11, 3);
            assert_eq!(stranger.arrive(&fake), Ok((Verdict::Stack, stranger.build())));
        }
    }

    fn fragments_leave_and_come_back<F: Names>() {
        let udp = Frame::udp((F::pod(1), 4000), world::<F>(53)).payload(&[7; 3000]);
        for frame in [udp, Frame { payload: vec![7; 3000], ..ping::<F>(9) }] {
            let (fake, frame) = (fake::<F>(), Frame { id: 5, ..frame });
            let mut out = None;
            for part in frame.fragments(1000) {
                assert_eq!(part.leave(&fake), Ok((Verdict::Stack, part.build())));
                let (verdict, bytes) = part.exit(&fake).unwrap();
                let entry =
                    fake.entry((frame.src, frame.src_port), (frame.dst, frame.dst_port), frame.proto());
                let sent = frame.clone().sent_from((node::<F>(), entry.unwrap().src_port.host()));
                let same = sent.fragments(1000).into_iter().find(|it| it.fragment == part.fragment);
                assert_eq!((verdict, bytes), (Verdict::Stack, same.unwrap().build()));
                out = Some(sent);
            }
            let out = out.unwrap();
            let answer = |frame: &Frame| {
                let echoed = Frame { payload: vec![9; 3000], id: 6, ..frame.answer(0) };
                if frame.proto() == F::ICMP {
                    Frame {
                        transport: Transport::Icmp { kind: kind::<F>(0), code: 0, parameter: 0 },
                        ..echoed
                    }
                } else {
                    echoed
                }
            };
            for (part, expected) in answer(&out).fragments(1000).iter().zip(answer(&frame).fragments(1000)) {
                assert_eq!(part.arrive(&fake), Ok((Verdict::Stack, expected.build())));
            }
        }
    }

    fn what_has_no_ports_is_dropped_by_name<F: Names>() {
        let fake = fake::<F>();
        let frame = |part| {
            let gre = Transport::Other(Proto { number: 47 });
            let frame = Frame::new((F::pod(1), 0), world::<F>(0), gre).payload(&[1; 40]);
            Frame { fragment: part, ..frame }
        };
        for part in [None, Some(Part::First)] {
            assert_eq!(frame(part).exit(&fake), Err(DropReason::Unmasqueradable));
        }
        let inside = frame(None).sent_to((F::pod(3), 0));
        assert_eq!(inside.exit(&fake), Ok((Verdict::Stack, inside.build())));
        let own = frame(None).sent_from((node::<F>(), 0));
        assert_eq!(own.exit(&fake), Ok((Verdict::Stack, own.build())));
    }

    fn without_an_address_of_the_family_nothing_leaves<F: Names>() {
        let mut fake = fake::<F>();
        fake.node.clear();
        for frame in flows::<F>().into_iter().chain([ping::<F>(1)]) {
            assert_eq!(frame.exit(&fake), Err(DropReason::NoMasquerade));
        }
        assert!(fake.tracked().is_empty());
    }

    fn a_service_out_in_the_world_is_one_flow<F: Names>() {
        for frame in flows::<F>() {
            let mut fake = fake::<F>();
            let backend = (F::vip(99), 6000);
            fake.service(F::vip(1), frame.dst_port, frame.proto(), &[backend]);
            let port = frame.dst_port;
            let frame = frame.sent_to((F::vip(1), port));
            let (verdict, bytes) = frame.leave(&fake).unwrap();
            let entry = fake.entry((frame.src, frame.src_port), (frame.dst, frame.dst_port), frame.proto());
            let out = frame.clone().sent_from((node::<F>(), entry.unwrap().src_port.host())).sent_to(backend);
            assert_eq!((verdict, bytes), (Verdict::Forward, out.build()));
            assert_eq!(out.exit(&fake), Ok((Verdict::Stack, out.build())), "the node's by now");
            let back = out.answer(SYN | ACK).arrive(&fake);
            assert_eq!(back, Ok((Verdict::Pod { ifindex: 11 }, frame.answer(SYN | ACK).build())));
            assert_eq!(fake.tracked().len(), 2);
        }
    }

    /// Whatever leaves, it is dropped as it was, or goes as it was, or goes with right checksums if it came so.
    fn noise_leaves_packets_whole<F: Names>() {
        let (mut fake, mut noise) = (crate::noise::world(), Noise(u64::from(F::ETHERTYPE)));
        fake.node.insert(node::<F>(), NodeAddress { flags: 0 });
        fake.unmasqueraded = Some(vec![F::pod(3)]);
        let mut changed = 0;
        for round in 0..20_000 {
            let bytes = if noise.percent(80) { noise.frame::<F>().build() } else { noise.packet() };
            let mut packet = Bytes(bytes.clone());
            // One that was held comes back as another packet, which this is not about.
            fake.held.borrow_mut().clear();
            let step = noise.pick(&[leaving::<Bytes, Fake>, device::arriving, pod::leaving]);
            let verdict = step(&mut packet, &fake);
            if packet.0 == bytes {
                continue;
            }
            changed += 1;
            assert!(verdict.is_ok(), "{round}: {verdict:?} and changed");
            if verify(&bytes).is_ok() {
                assert_eq!(verify(&packet.0), Ok(()), "{round}: {verdict:?}");
            }
        }
        assert!(changed > 2_000, "{changed} packets were changed");
    }
}
