//! Direct server return: the backend of a client from outside is on another node, and sees the client's own address.
//!
//! ```text
//!   client -> frontend    this node: choose a backend; it is on another node
//!              |  pin the flow (one direction alone: the answers do not come by here)
//!              |  as it is, in the tunnel
//!              v
//!   client -> frontend    the backend's node: the same choice, or another of its own backends; a flow that keeps its client
//!   client <- frontend    from there, past this node
//! ```
//!
//! What the second node has is an ordinary flow, so a client whose packets come by another node tomorrow goes on with its
//! connection. It never relays further, so there are no loops; and it takes such packets from the cluster's nodes alone,
//! because they are for addresses that may be none of its own.
//!
//! Both nodes choose alike, as far as their tables are alike: the hash of a flow is the same everywhere. Where zones or
//! connection counts make the first node choose otherwise, the second one takes any of its own backends.
//!
//! A packet that is too long for the tunnel is answered as a router would ([`crate::mtu`]). An error about what the backend
//! sent comes to the first node, too, and is relayed as the client's packets are. A backend that is on no known node gets
//! its packets as without all of this: from the node's address.

use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey};
use ferroflow_common::hash;
use ferroflow_common::verdict::DropReason;

use crate::conntrack;
use crate::lb;
use crate::packet::Packet;
use crate::parse::{self, Headers, Parse};
use crate::service::Outcome;
use crate::tables::{Services, Tables};

/// Pins a new flow to the backend that was chosen, where that is on another node: [`Outcome::TRACKED`]. Else an outcome that
/// [`crate::service::track`] takes: a backend of this node sees the client, and one that is on no known node this node.
///
/// # Errors
/// [`DropReason::ConntrackInsert`], [`DropReason::NoBackend`].
#[inline(always)]
pub fn begin<F: Parse, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    chosen: Outcome,
) -> Result<Outcome, DropReason> {
    let backend = conntrack::serving(tables, chosen.backend())?;
    // Whatever the policy Cluster chooses of this node's own endpoints, the policy Local chooses, too.
    if backend.flags & Backend::LOCAL != 0 {
        return Ok(chosen.unmasqueraded());
    }
    if backend.node == 0 || tables.node(backend.node).is_none() {
        return Ok(chosen);
    }
    conntrack::open_relay(tables, headers, (chosen.backend(), &backend))?;
    if chosen.is_counted() {
        tables.connect(chosen.backend());
    }
    Ok(Outcome::TRACKED)
}

/// Chooses a backend of this node for a relayed packet: an outcome that [`crate::service::track`] takes.
///
/// # Errors
/// Why the packet is dropped; where there is no endpoint anywhere the other node refuses, as soon as it knows.
#[inline(always)]
pub fn choose<F, P, T>(packet: &mut P, tables: &T) -> Result<Outcome, DropReason>
where
    F: Parse,
    P: Packet,
    T: Tables<F>,
{
    let headers = parse::headers::<F, P>(packet)?.ok_or(DropReason::Truncated)?;
    let tuple = &headers.tuple;
    let hash = lb::flow_hash::<F>(tuple);
    let mut key = lb::key::<F>(tuple);
    let external = match tables.frontend(&key) {
        Some(external) => external,
        // The address may be the other node's: that one knows that it serves NodePorts.
        None => lb::node_row(tables, &mut key).ok_or(DropReason::AstrayRelay)?,
    };
    key.scope = FrontendKey::RELAYED;
    let mut row = tables.frontend(&key).ok_or(DropReason::AstrayRelay)?;
    if agrees(tables, &external, &row, hash) {
        (row.offset, row.length) = (external.offset, external.length);
    }
    let chosen = lb::kept_or_chosen(tables, &row, F::addr(tuple.src), tables.now(), || hash)?;
    Ok(Outcome::relayed(chosen.ok_or(DropReason::NoEndpoint)?, row.flags))
}

/// Whether the row for traffic from anywhere chooses a backend of this node, as the other node most likely did; else any
/// of this node's own has to do.
#[inline(always)]
fn agrees<T: Services>(tables: &T, external: &Frontend, own: &Frontend, hash: u32) -> bool {
    if external.length == 0 || external.flags & Frontend::LEAST_CONNECTION != 0 {
        return false;
    }
    let slot = external.offset.wrapping_add(hash::slot(hash, external.length));
    let chosen = tables.slot(slot).and_then(|index| tables.backend(index));
    chosen.is_some_and(|backend| own.chooses(&backend))
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::conntrack::Entry;
    use ferroflow_common::abi::lb::{Frontend, FrontendKey, ServiceClient};
    use ferroflow_common::abi::node::{NodeAddress, Settings};
    use ferroflow_common::abi::policy::{self, PolicyKey};
    use ferroflow_common::abi::relay;
    use ferroflow_common::addr::{Addr, Port, Proto};
    use ferroflow_common::tcp::{Flags, State, chunk};
    use ferroflow_common::verdict::Verdict;

    use super::*;
    use crate::frame::{Frame, Names, Socket, Transport, both_families};
    use crate::icmp::Errors;
    use crate::mtu;
    use crate::reject::{self, Answer};
    use crate::service::Origin;
    use crate::tables::fake::Fake;

    both_families!(
        a_backend_on_another_node_gets_the_packets_as_they_are,
        rule_26_the_backends_node_answers_the_client_by_itself,
        rule_26_backends_here_see_the_client_and_those_on_no_node_this_one,
        both_nodes_choose_alike_where_their_tables_are,
        rules_30_and_31_the_backend_stays_until_it_stops_serving,
        rule_35_a_connection_is_opened_anew_and_ages_by_what_its_client_sends,
        rule_34_half_a_relayed_flow_is_mended_as_one,
        rule_37_errors_about_answers_are_relayed,
        rule_37_who_sent_too_much_for_the_tunnel_is_told_so,
        rule_38_fragments_are_relayed_in_any_order,
        rule_22_source_ranges_come_before,
        rule_14_the_first_node_refuses_and_the_other_one_never,
        what_is_relayed_astray_is_dropped,
        what_a_pod_sent_and_another_node_relays_back_is_served,
        where_nothing_is_relayed_any_more_a_flow_is_opened_anew,
    );

    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;
    const NODE_PORT: u16 = 30_080;
    /// The number of the second node.
    const OTHER: u32 = 7;

    /// The nodes `F::vip(200)` and `F::vip(201)`; pods 1 and 2 are on the second one.
    fn nodes<F: Names>(backends: &[Addr]) -> [Fake; 2] {
        [200, 201].map(|number| {
            let mut fake = Fake::default();
            fake.node.insert(F::vip(number), NodeAddress { flags: NodeAddress::NODE_PORTS });
            let any = if F::vip(1).is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
            let sockets: Vec<_> = backends.iter().map(|pod| (*pod, 8080)).collect();
            for proto in [Proto::TCP, Proto::UDP, Proto::SCTP] {
                let row = fake.service(any, NODE_PORT, proto, &sockets);
                row.flags = Frontend::NORTH_SOUTH | Frontend::RELAYS;
                let flags = Frontend::NORTH_SOUTH | Frontend::LOCAL | Frontend::KEEP_CLIENT;
                let own = Frontend { flags, ..*row };
                let key = FrontendKey { scope: FrontendKey::RELAYED, ..key(any, proto) };
                fake.frontends.insert(key, own);
            }
            let here = |addr: &Addr| [F::pod(1), F::pod(2)].contains(addr);
            for backend in &mut fake.backends {
                if !here(&backend.addr) {
                    continue;
                }
                if number == 200 {
                    backend.node = OTHER;
                } else {
                    backend.flags |= Backend::LOCAL;
                }
            }
            if number == 200 {
                fake.nodes.insert(OTHER, F::vip(201));
            } else {
                fake.local(F::pod(1), 11);
                fake.local(F::pod(2), 12);
            }
            fake
        })
    }

    fn key(addr: Addr, proto: Proto) -> FrontendKey {
        FrontendKey { addr, port: Port::new(NODE_PORT), proto, scope: FrontendKey::EXTERNAL }
    }

    fn client<F: Names>() -> Socket {
        (F::vip(99), 4000)
    }

    fn requests<F: Names>() -> [Frame; 3] {
        let to = (F::vip(200), NODE_PORT);
        [
            Frame::tcp(client::<F>(), to, SYN).payload(b"early"),
            Frame::udp(client::<F>(), to).payload(b"query"),
            Frame::sctp(client::<F>(), to, chunk::INIT).payload(b"parameters"),
        ]
    }

    /// As it is, to the second node.
    fn relayed(frame: &Frame, first: &Fake) {
        assert_eq!(frame.arrive(first), Ok((Verdict::Relay { node: OTHER }, frame.build())));
    }

    fn a_backend_on_another_node_gets_the_packets_as_they_are<F: Names>() {
        for request in requests::<F>() {
            let [first, _] = nodes::<F>(&[F::pod(1)]);
            relayed(&request, &first);
            relayed(&request.clone().payload(b"more"), &first);
            let tracked = first.tracked();
            let [entry] = &tracked.values().collect::<Vec<_>>()[..] else { panic!("{tracked:?}") };
            assert_eq!(
                (entry.flags, entry.dst, entry.src),
                (Entry::RELAYS, F::pod(1), relay::stand_in(OTHER))
            );
        }
    }

    fn rule_26_the_backends_node_answers_the_client_by_itself<F: Names>() {
        for request in requests::<F>() {
            let [_, second] = nodes::<F>(&[F::pod(1)]);
            for request in [request.clone(), request.clone().payload(b"more")] {
                let there = request.clone().sent_to((F::pod(1), 8080));
                assert_eq!(request.relay(&second), Ok((Verdict::Pod { ifindex: 11 }, there.build())));
                let back = request.answer(SYN | ACK).build();
                assert_eq!(there.answer(SYN | ACK).leave(&second), Ok((Verdict::Forward, back)));
            }
            assert_eq!(second.tracked().len(), 2);
        }
    }

    fn rule_26_backends_here_see_the_client_and_those_on_no_node_this_one<F: Names>() {
        let [_, mut second] = nodes::<F>(&[F::pod(1)]);
        second.node.insert(F::vip(200), NodeAddress { flags: NodeAddress::NODE_PORTS });
        for request in requests::<F>() {
            let there = request.clone().sent_to((F::pod(1), 8080)).build();
            assert_eq!(request.arrive(&second), Ok((Verdict::Pod { ifindex: 11 }, there)));
        }
        for lost in [0, OTHER] {
            let [mut first, _] = nodes::<F>(&[F::pod(3)]);
            first.backends.iter_mut().for_each(|backend| backend.node = lost);
            first.nodes.clear();
            for request in requests::<F>() {
                assert!(request.arrive(&first).is_ok_and(|(verdict, _)| verdict == Verdict::Forward));
                let (to, proto) = ((F::vip(200), NODE_PORT), request.proto());
                let entry = first.entry(client::<F>(), to, proto).unwrap();
                assert_eq!((entry.src, entry.dst), (F::vip(200), F::pod(3)));
            }
        }
    }

    fn both_nodes_choose_alike_where_their_tables_are<F: Names>() {
        let pods = [F::pod(1), F::pod(2), F::pod(3)];
        let mut seen = [0; 2];
        for port in 4000..4200 {
            let [first, mut second] = nodes::<F>(&pods);
            let (to, from) = ((F::vip(200), NODE_PORT), (F::vip(99), port));
            let request = Frame::tcp(from, to, SYN);
            let (verdict, _) = request.arrive(&first).unwrap();
            let chosen = first.entry(from, to, Proto::TCP).unwrap().dst;
            let is_relayed = verdict == Verdict::Relay { node: OTHER };
            assert_eq!(is_relayed, chosen != F::pod(3), "nobody knows who has pod 3");
            if is_relayed {
                assert!(request.relay(&second).is_ok());
                assert_eq!(second.entry(from, to, Proto::TCP).unwrap().dst, chosen);
                seen[usize::from(chosen == F::pod(2))] += 1;
                // What the first node did not know yet.
                second.conntrack.borrow_mut().clear();
                second.backends.iter_mut().filter(|it| it.addr == chosen).for_each(|it| it.flags = 0);
                let own = second.frontends.values_mut().filter(|row| row.flags & Frontend::LOCAL != 0);
                let left = if chosen == F::pod(1) { 1 } else { 0 };
                own.for_each(|row| (row.offset, row.length) = (row.offset + left, 1));
                assert!(request.relay(&second).is_ok());
                let other = if chosen == F::pod(1) { F::pod(2) } else { F::pod(1) };
                assert_eq!(second.entry(from, to, Proto::TCP).unwrap().dst, other);
            }
        }
        assert!(seen.iter().all(|count| *count > 30), "{seen:?}");
    }

    fn rules_30_and_31_the_backend_stays_until_it_stops_serving<F: Names>() {
        let [mut first, _] = nodes::<F>(&[F::pod(1)]);
        let [tcp, udp, _] = requests::<F>();
        let established = Frame::tcp(client::<F>(), (F::vip(200), NODE_PORT), ACK);
        for frame in [&tcp, &established, &udp] {
            relayed(frame, &first);
        }
        first.backends.iter_mut().for_each(|backend| backend.generation += 1);
        first
            .frontends
            .values_mut()
            .for_each(|row| (row.length, row.flags) = (0, row.flags | Frontend::REJECT));
        relayed(&established, &first);
        let (verdict, refusal) = udp.arrive(&first).unwrap();
        assert_eq!(verdict, Verdict::Reply);
        assert_ne!(refusal, udp.build());
    }

    fn rule_35_a_connection_is_opened_anew_and_ages_by_what_its_client_sends<F: Names>() {
        let [mut first, _] = nodes::<F>(&[F::pod(1)]);
        let to = (F::vip(200), NODE_PORT);
        let says = |flags| Frame::tcp(client::<F>(), to, flags);
        let lives = |first: &Fake| {
            let entry = first.entry(client::<F>(), to, Proto::TCP).unwrap();
            (State(entry.state).name(Proto::TCP), entry.expires - first.clock.get())
        };
        for (flags, expected) in [
            (SYN, ("opening", 60)),
            (SYN, ("opening", 60)),
            (ACK, ("established", 86_400)),
            (Flags::FIN | ACK, ("closing", 3_600)),
            (Flags::RST, ("closed", 10)),
        ] {
            relayed(&says(flags), &first);
            assert_eq!(lives(&first), expected);
        }
        // Another backend, here: which a SYN chooses, and nothing else.
        first.backends.iter_mut().for_each(|it| (it.flags, it.node) = (it.flags | Backend::LOCAL, 0));
        relayed(&says(ACK), &first);
        let there = says(SYN).sent_to((F::pod(1), 8080)).build();
        first.local(F::pod(1), 11);
        assert_eq!(says(SYN).arrive(&first), Ok((Verdict::Pod { ifindex: 11 }, there)));
        let [first, _] = nodes::<F>(&[F::pod(1)]);
        let [_, udp, _] = requests::<F>();
        relayed(&udp, &first);
        assert_eq!(first.tracked().values().next().unwrap().expires, 120, "as one that is answered");
    }

    fn rule_34_half_a_relayed_flow_is_mended_as_one<F: Names>() {
        let [_, second] = nodes::<F>(&[F::pod(1)]);
        let [request, ..] = requests::<F>();
        let there = request.clone().sent_to((F::pod(1), 8080));
        assert!(request.relay(&second).is_ok());
        let whole = second.tracked();
        for kind in [Entry::REPLY, Entry::FORWARD] {
            second.conntrack.borrow_mut().retain(|_, row| row.entry.get().kind != kind);
            second.clock.set(second.clock.get() + 1);
            let met = if kind == Entry::REPLY {
                request.relay(&second)
            } else {
                there.answer(SYN | ACK).leave(&second)
            };
            assert!(met.is_ok());
            let flags = |rows: &std::collections::BTreeMap<_, Entry>| {
                rows.iter().map(|(tuple, entry)| (*tuple, entry.flags)).collect::<Vec<_>>()
            };
            assert_eq!(flags(&second.tracked()), flags(&whole));
        }
    }

    fn rule_37_errors_about_answers_are_relayed<F: Names + Errors>() {
        let [first, second] = nodes::<F>(&[F::pod(1)]);
        for request in requests::<F>() {
            relayed(&request, &first);
            assert!(request.relay(&second).is_ok());
            let answer = request.answer(SYN | ACK).payload(&[7; 64]);
            let quoted = answer.build();
            let (kind, code) = if F::CSUM_OFF.is_some() { (3, 4) } else { (2, 0) };
            let router = F::vip(150);
            let error = Frame::icmp(router, F::vip(200), kind, code).payload(&quoted[14..]);
            relayed(&error, &first);
            let sent = answer.clone().sent_from((F::pod(1), 8080)).build();
            // As every error that goes to another than it came for: from the other end.
            let told = Frame::icmp(client::<F>().0, F::pod(1), kind, code).payload(&sent[14..]);
            assert_eq!(error.relay(&second), Ok((Verdict::Pod { ifindex: 11 }, told.build())));
        }
    }

    fn rule_37_who_sent_too_much_for_the_tunnel_is_told_so<F: Names + Answer>() {
        for (request, quoted) in requests::<F>().into_iter().zip([20, 8, 12]) {
            let [first, _] = nodes::<F>(&[F::pod(1)]);
            let long = request.payload(&[7; 1440]);
            relayed(&long, &first);
            let mut packet = long.packet();
            mtu::too_big::<F, _>(&mut packet, 1450).unwrap();
            reject::turn_around(&mut packet).unwrap();
            let quote = &long.build()[14..][..F::HDR_LEN as usize + quoted];
            let [kind, code] = F::TOO_BIG;
            let error = Frame::icmp(long.dst, long.src, kind, code).payload(quote);
            let transport = Transport::Icmp { kind, code, parameter: 1450 };
            assert_eq!(packet.0, Frame { transport, ..error }.turned().build());
        }
    }

    fn rule_38_fragments_are_relayed_in_any_order<F: Names>() {
        let request = Frame::udp(client::<F>(), (F::vip(200), NODE_PORT)).payload(&[7; 2900]);
        let parts = request.fragments(1000);
        for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            let [first, second] = nodes::<F>(&[F::pod(1)]);
            let relay = Verdict::Relay { node: OTHER };
            for (node, expected) in [(&first, relay), (&second, Verdict::Pod { ifindex: 11 })] {
                let mut out = 0;
                for part in order.map(|index| &parts[index]) {
                    let mut queue = vec![part.build()];
                    while let Some(bytes) = queue.pop() {
                        let mut packet = crate::packet::Bytes(bytes);
                        let origin = if expected == relay { Origin::Outside } else { Origin::Relay };
                        let verdict = crate::device::arriving_from(&mut packet, node, origin).unwrap();
                        queue.append(&mut node.again.borrow_mut());
                        if verdict != Verdict::Taken {
                            assert_eq!(verdict, expected);
                            out += 1;
                            let is_same = parts.iter().any(|part| part.build() == packet.0);
                            assert_eq!(is_same, expected == relay);
                        }
                    }
                }
                assert_eq!(out, parts.len(), "{order:?}");
            }
        }
    }

    fn rule_22_source_ranges_come_before<F: Names>() {
        let [mut first, _] = nodes::<F>(&[F::pod(1)]);
        for row in first.frontends.values_mut().filter(|row| row.flags & Frontend::RELAYS != 0) {
            row.flags |= Frontend::SOURCE_RANGES;
        }
        let [request, ..] = requests::<F>();
        assert_eq!(request.arrive(&first), Err(DropReason::SourceRange));
        first.ranges.extend((1..9).map(|service| ServiceClient { service, addr: client::<F>().0 }));
        relayed(&request, &first);
    }

    fn rule_14_the_first_node_refuses_and_the_other_one_never<F: Names>() {
        let [mut first, mut second] = nodes::<F>(&[F::pod(1)]);
        for fake in [&mut first, &mut second] {
            fake.frontends
                .values_mut()
                .for_each(|row| (row.length, row.flags) = (0, row.flags | Frontend::REJECT));
        }
        let [request, ..] = requests::<F>();
        assert!(request.arrive(&first).is_ok_and(|(verdict, _)| verdict == Verdict::Reply));
        assert_eq!(request.relay(&second), Err(DropReason::NoEndpoint));
    }

    fn what_is_relayed_astray_is_dropped<F: Names>() {
        let [_, second] = nodes::<F>(&[F::pod(1)]);
        let stray = Frame::tcp(client::<F>(), (F::vip(200), 22), SYN);
        assert_eq!(stray.relay(&second), Err(DropReason::AstrayRelay));
        let error = Frame::icmp(F::vip(150), F::vip(200), 3, 3).payload(&stray.build()[14..]);
        assert_eq!(error.relay(&second), Err(DropReason::AstrayRelay));
        assert!(second.tracked().is_empty());
    }

    /// A pod of the backend's node, whose own packets were tracked as they are for its policies.
    fn what_a_pod_sent_and_another_node_relays_back_is_served<F: Names>() {
        for request in requests::<F>() {
            let [_, mut second] = nodes::<F>(&[F::pod(1)]);
            second.settings = Some(Settings { flags: Settings::POLICIES, ..Settings::NONE });
            second.endpoints.get_mut(&F::pod(2)).unwrap().policy.egress = 5;
            second.policies.lay(5, PolicyKey::OTHERS, policy::Verdict::Allow, &[]);
            let request = request.sent_from((F::pod(2), 4000));
            assert_eq!(request.leave(&second), Ok((Verdict::Stack, request.build())));
            assert_eq!(
                second.entry((F::pod(2), 4000), (F::vip(200), NODE_PORT), request.proto()).unwrap().flags,
                Entry::PLAIN
            );
            let there = request.clone().sent_to((F::pod(1), 8080));
            assert_eq!(request.relay(&second), Ok((Verdict::Pod { ifindex: 11 }, there.build())));
            let back = request.answer(SYN | ACK).build();
            assert_eq!(there.answer(SYN | ACK).leave(&second), Ok((Verdict::Pod { ifindex: 12 }, back)));
        }
    }

    fn where_nothing_is_relayed_any_more_a_flow_is_opened_anew<F: Names>() {
        for request in requests::<F>() {
            let [mut first, _] = nodes::<F>(&[F::pod(1)]);
            relayed(&request, &first);
            first.frontends.values_mut().for_each(|row| row.flags &= !Frontend::RELAYS);
            first.nodes.clear();
            assert!(request.arrive(&first).is_ok_and(|(verdict, _)| verdict == Verdict::Forward));
            let to = (F::vip(200), NODE_PORT);
            assert_eq!(first.entry(client::<F>(), to, request.proto()).unwrap().src, F::vip(200));
        }
    }
}
