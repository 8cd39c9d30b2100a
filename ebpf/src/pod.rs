//! The two ways past a pod's interface.

use ferroflow_common::abi::conntrack::Entry;
use ferroflow_common::family::{Family as _, V4, V6};
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack::{self, Epoch, Flow};
use crate::judge;
use crate::lb;
use crate::nat::{self, Ends};
use crate::packet::{Packet, Reshape};
use crate::parse::{self, Parse};
use crate::route;
use crate::service::{self, Origin, Outcome, Way};
use crate::shadow;
use crate::steps::Steps;
use crate::tables::Tables;

/// A packet that a pod sends, at the host's end of its interface.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn leaving<P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    P: Reshape,
    T: Steps<V4, P> + Steps<V6, P>,
{
    match packet.ethertype() {
        V4::ETHERTYPE => service::in_steps::<V4, P, T>(packet, tables, Origin::Pod),
        V6::ETHERTYPE => service::in_steps::<V6, P, T>(packet, tables, Origin::Pod),
        _ => Ok(Verdict::Stack),
    }
}

/// A packet that the node's stack sends through a tunnel: what it may need is to come from the service that it answers for.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn entering<P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    P: Reshape,
    T: Steps<V4, P> + Steps<V6, P>,
{
    routed(packet, tables, Origin::Node)
}

/// A packet that the node's stack hands to a pod: the same, and where policies apply to the pod, they are asked. `origin`
/// is [`Origin::Own`] or [`Origin::Inward`].
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn entering_pod<P, T>(packet: &mut P, tables: &T, origin: Origin) -> Result<Verdict, DropReason>
where
    P: Reshape,
    T: Steps<V4, P> + Steps<V6, P>,
{
    routed(packet, tables, origin)
}

/// A packet that the node's stack has routed, by its family.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub(crate) fn routed<P, T>(packet: &mut P, tables: &T, origin: Origin) -> Result<Verdict, DropReason>
where
    P: Reshape,
    T: Steps<V4, P> + Steps<V6, P>,
{
    match packet.ethertype() {
        V4::ETHERTYPE => service::routed::<V4, P, T>(packet, tables, origin),
        V6::ETHERTYPE => service::routed::<V6, P, T>(packet, tables, origin),
        _ => Ok(Verdict::Stack),
    }
}

/// A packet of a flow that is known, or of no service.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn leave<F, P, T>(packet: &mut P, tables: &T, way: Way) -> Result<Outcome, DropReason>
where
    F: Parse,
    F::Bytes: Ends,
    P: Packet,
    T: Tables<F>,
{
    let Some(headers) = parse::headers_of::<F, P>(packet, way)? else { return Ok(Outcome::RARE) };
    match conntrack::follow::<F, T>(tables, &headers, way.halves(), Epoch::Compared) {
        // Its source changes where it leaves the node.
        Flow::Known(to) if to.flags & Entry::MASQUERADED != 0 => return Ok(Outcome::STACK),
        Flow::Known(to) => {
            nat::rewrite(packet, &headers, &to)?;
            // As for an unknown flow: it may be an answer that the stack has to translate back.
            if to.is_plain() && service::migrating(tables) {
                return Ok(Outcome::STACK);
            }
            return Ok(Outcome::goes(route::rewritten::<F, T>(tables, &to)));
        }
        Flow::Halved => return Ok(Outcome::HALVED),
        Flow::Stale => return Ok(Outcome::STALE),
        Flow::Unknown => {}
    }
    let mut key = lb::key::<F>(&headers.tuple);
    if lb::is_service(tables.frontend(&key)) {
        return Ok(if service::is_kernels(tables, &headers) { Outcome::STACK } else { Outcome::OPENS });
    }
    if let Some(index) = shadow::shadowed::<F, T>(tables, &headers) {
        return Ok(Outcome::shadowing(index));
    }
    // Most packets are for a pod of this node or of another; only what is for neither may be for a NodePort.
    let verdict = route::onto::<F, T>(tables, &key.addr);
    if verdict == Verdict::Stack {
        if lb::is_service(lb::node_port(tables, &mut key)) {
            return Ok(if service::is_kernels(tables, &headers) { Outcome::STACK } else { Outcome::OPENS });
        }
        let stray = service::stray(tables, &mut key)?;
        if stray != Outcome::STACK {
            return Ok(stray);
        }
    }
    if judge::concerns::<F, T>(tables, &headers.tuple, Origin::Pod) {
        return Ok(Outcome::GUARDED);
    }
    // While kube-proxy's rules are there, this may be an answer that the stack has to translate back.
    Ok(if service::migrating(tables) { Outcome::STACK } else { Outcome::goes(verdict) })
}

/// A packet that goes on where it goes, as what a known flow makes of it. [`Outcome::OPENS`] where there is none.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn enter<F, P, T>(packet: &mut P, tables: &T, way: Way, origin: Origin) -> Result<Outcome, DropReason>
where
    F: Parse,
    F::Bytes: Ends,
    P: Packet,
    T: Tables<F>,
{
    let Some(headers) = parse::headers_of::<F, P>(packet, way)? else { return Ok(Outcome::RARE) };
    let epoch = if origin.is_at_pod() { Epoch::Compared } else { Epoch::Ignored };
    match conntrack::follow::<F, T>(tables, &headers, way.halves(), epoch) {
        // Only policies know it, yet.
        Flow::Known(to) if to.is_plain() && origin == Origin::Exit => return Ok(Outcome::OPENS),
        Flow::Known(to) if shadow::is_translated::<F, T>(tables, &headers, &to) => {}
        Flow::Known(to) => nat::rewrite(packet, &headers, &to)?,
        Flow::Halved => return Ok(Outcome::HALVED),
        Flow::Stale => return Ok(Outcome::STALE),
        Flow::Unknown if origin.is_at_pod() && judge::concerns::<F, T>(tables, &headers.tuple, origin) => {
            return Ok(Outcome::GUARDED);
        }
        Flow::Unknown => return Ok(if origin == Origin::Exit { Outcome::OPENS } else { Outcome::STACK }),
    }
    Ok(Outcome::STACK)
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use ferroflow_common::abi::lb::Frontend;
    use ferroflow_common::abi::node::{NodeAddress, Settings};
    use ferroflow_common::addr::Addr;
    use ferroflow_common::tcp::{Flags, chunk};

    use super::*;
    use crate::frame::{Frame, Names, Socket, Transport, UdpChecksum, both_families, verify};
    use crate::noise::{Noise, world};
    use crate::packet::Bytes;
    use crate::tables::fake::{Fake, Release};

    both_families!(
        a_service_is_reached_and_answers_as_itself,
        a_remote_backend_is_the_stacks_and_its_answer_enters,
        what_another_nodes_pod_gets_goes_past_the_stack,
        a_pod_address_is_no_service,
        rule_14_and_15_without_endpoints,
        rule_19_a_port_that_a_cluster_ip_has_not_is_refused_and_an_address_that_is_none_dropped,
        rule_26_where_all_are_masqueraded_pods_are_at_cluster_ips,
        while_it_migrates_what_the_kernel_opened_is_the_stacks,
        truncated_at_every_length,
        a_datagram_without_checksum_is_served,
        a_slot_without_backend_is_told,
        rule_31_a_backend_released_under_a_packet_costs_nothing_and_keeps_nobody,
        noise_leaves_packets_whole,
    );

    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;

    /// The first packet of a client in pod 1 to service 1, by each protocol, and where the backends listen.
    fn flows<F: Names>() -> [(Frame, u16); 3] {
        let client = (F::pod(1), 4000);
        [
            (Frame::tcp(client, (F::vip(1), 80), SYN), 8080),
            (Frame::udp(client, (F::vip(1), 53)).payload(b"query"), 5353),
            (Frame::sctp(client, (F::vip(1), 38412), chunk::INIT).payload(b"parameters"), 3868),
        ]
    }

    /// The world with one backend for everything.
    fn only(addr: Addr) -> Fake {
        let mut fake = world();
        let like = |proto| fake.backends.iter().position(|row| row.addr == addr && row.proto == proto);
        let slots = fake.slots.iter().map(|&slot| like(fake.backends[slot as usize].proto).unwrap() as u32);
        fake.slots = slots.collect();
        fake
    }

    fn a_service_is_reached_and_answers_as_itself<F: Names>() {
        for (frame, port) in flows::<F>() {
            for frame in [frame.clone(), frame.extended()] {
                let fake = only(F::pod(2));
                let backend: Socket = (F::pod(2), port);
                for _ in 0..3 {
                    let there = frame.clone().sent_to(backend);
                    assert_eq!(frame.leave(&fake), Ok((Verdict::Pod { ifindex: 12 }, there.build())));
                    let back = frame.answer(SYN | ACK).sent_from(backend).leave(&fake);
                    assert_eq!(back, Ok((Verdict::Pod { ifindex: 11 }, frame.answer(SYN | ACK).build())));
                }
                assert_eq!(fake.tracked().len(), 2);
            }
        }
    }

    fn a_remote_backend_is_the_stacks_and_its_answer_enters<F: Names>() {
        for (frame, port) in flows::<F>() {
            let fake = only(F::pod(3));
            let backend: Socket = (F::pod(3), port);
            assert_eq!(frame.leave(&fake), Ok((Verdict::Stack, frame.clone().sent_to(backend).build())));
            let back = frame.answer(SYN | ACK).sent_from(backend).enter(&fake);
            assert_eq!(back, Ok((Verdict::Stack, frame.answer(SYN | ACK).build())));
            let stranger = frame.answer(ACK).sent_from((F::pod(3), port + 1));
            assert_eq!(stranger.enter(&fake), Ok((Verdict::Stack, stranger.build())));
        }
    }

    fn what_another_nodes_pod_gets_goes_past_the_stack<F: Names>() {
        for (frame, port) in flows::<F>() {
            let mut fake = only(F::pod(3));
            fake.elsewhere.push(F::pod(3));
            let backend: Socket = (F::pod(3), port);
            for _ in 0..2 {
                let there = frame.clone().sent_to(backend);
                assert_eq!(frame.leave(&fake), Ok((Verdict::Forward, there.build())));
            }
            let direct = frame.clone().sent_to((F::pod(3), port + 1));
            assert_eq!(direct.leave(&fake), Ok((Verdict::Forward, direct.build())));
            let world = frame.clone().sent_to((F::vip(99), 443));
            assert_eq!(world.leave(&fake), Ok((Verdict::Stack, world.build())));
            fake.settings = Some(Settings { flags: Settings::MIGRATING, ..Settings::NONE });
            assert_eq!(direct.leave(&fake), Ok((Verdict::Stack, direct.build())), "kube-proxy may know it");
        }
    }

    fn a_pod_address_is_no_service<F: Names>() {
        let fake = world();
        for (frame, _) in flows::<F>() {
            let local = frame.clone().sent_to((F::pod(2), 80));
            assert_eq!(local.leave(&fake), Ok((Verdict::Pod { ifindex: 12 }, local.build())));
            let other_port = frame.clone().sent_to((F::vip(1), 443));
            assert_eq!(other_port.leave(&fake), Ok((Verdict::Stack, other_port.build())));
            let remote = frame.sent_to((F::pod(3), 80));
            for packet in [remote.leave(&fake), remote.enter(&fake)] {
                assert_eq!(packet, Ok((Verdict::Stack, remote.build())));
            }
        }
        let icmp = Frame::icmp(F::pod(1), F::vip(1), 8, 0);
        assert_eq!(icmp.leave(&fake), Ok((Verdict::Stack, icmp.build())));
        assert!(fake.tracked().is_empty());
    }

    fn rule_14_and_15_without_endpoints<F: Names>() {
        let fake = world();
        for (frame, _) in flows::<F>() {
            let refused = frame.clone().sent_to((F::vip(9), frame.dst_port));
            assert!(matches!(refused.leave(&fake), Ok((Verdict::Reply, _))));
            let dropped = frame.clone().sent_to((F::vip(8), frame.dst_port));
            assert_eq!(dropped.leave(&fake), Err(DropReason::NoLocalEndpoint));
        }
        assert!(fake.tracked().is_empty(), "a refusal tracks nothing");
    }

    fn rule_19_a_port_that_a_cluster_ip_has_not_is_refused_and_an_address_that_is_none_dropped<F: Names>() {
        let mut fake = world();
        // Outside of the ranges other ports pass untouched (rule 21).
        for (frame, _) in flows::<F>() {
            let other = frame.sent_to((F::vip(1), 443));
            assert_eq!(other.leave(&fake), Ok((Verdict::Stack, other.build())));
            assert_eq!(other.arrive(&fake), Ok((Verdict::Stack, other.build())));
        }
        fake.cluster_ips::<F>(&[1, 9]);
        for (frame, port) in flows::<F>() {
            for vip in [1, 9] {
                let other = frame.clone().sent_to((F::vip(vip), 443));
                for answered in [other.leave(&fake), other.arrive(&fake)] {
                    let (verdict, bytes) = answered.unwrap();
                    assert_eq!(verdict, Verdict::Reply);
                    assert_eq!(verify(&bytes), Ok(()));
                }
            }
            let nobodys = frame.clone().sent_to((F::vip(77), port));
            for dropped in [nobodys.leave(&fake), nobodys.arrive(&fake)] {
                assert_eq!(dropped, Err(DropReason::UnallocatedAddress));
            }
            // The node's own address is the node's, also inside a range.
            fake.node.insert(F::vip(78), NodeAddress { flags: NodeAddress::NODE_PORTS });
            let own = frame.clone().sent_to((F::vip(78), port));
            assert_eq!(own.leave(&fake), Ok((Verdict::Stack, own.build())));
            let remote = frame.clone().sent_to((F::pod(3), port));
            assert_eq!(remote.leave(&fake), Ok((Verdict::Stack, remote.build())));
            assert!(frame.leave(&fake).is_ok(), "its own ports serve");
        }
        let reset = Frame::tcp((F::pod(1), 4000), (F::vip(1), 443), Flags::RST);
        assert_eq!(reset.leave(&fake), Err(DropReason::NoEndpoint), "a reset is not answered");
        let echo = Frame::icmp(F::pod(1), F::vip(1), 8, 0);
        assert_eq!(echo.leave(&fake), Ok((Verdict::Stack, echo.build())));
    }

    fn rule_26_where_all_are_masqueraded_pods_are_at_cluster_ips<F: Names>() {
        for (frame, port) in flows::<F>() {
            let mut fake = only(F::pod(2));
            let node = F::vip(200);
            fake.node.insert(node, NodeAddress { flags: 0 });
            fake.settings = Some(Settings { flags: Settings::MASQUERADE_ALL, ..Settings::NONE });
            let (verdict, bytes) = frame.leave(&fake).unwrap();
            let entry =
                fake.entry((frame.src, frame.src_port), (frame.dst, frame.dst_port), frame.proto()).unwrap();
            let there = frame.clone().sent_from((node, entry.src_port.host())).sent_to((F::pod(2), port));
            assert_eq!((verdict, bytes), (Verdict::Pod { ifindex: 12 }, there.build()));
            let back = there.answer(SYN | ACK).leave(&fake);
            assert_eq!(back, Ok((Verdict::Pod { ifindex: 11 }, frame.answer(SYN | ACK).build())));
            // The external policy says what becomes of other addresses.
            let mut outer = only(F::pod(2));
            outer.settings = fake.settings;
            outer.frontends.values_mut().for_each(|row| row.flags |= Frontend::NORTH_SOUTH);
            let there = frame.clone().sent_to((F::pod(2), port));
            assert_eq!(frame.leave(&outer), Ok((Verdict::Pod { ifindex: 12 }, there.build())));
        }
    }

    fn while_it_migrates_what_the_kernel_opened_is_the_stacks<F: Names>() {
        let mut fake = only(F::pod(2));
        fake.settings = Some(Settings { flags: Settings::MIGRATING, ..Settings::NONE });
        let (client, vip) = ((F::pod(1), 4000), (F::vip(1), 80));
        for flags in [ACK, ACK | Flags::FIN, Flags::RST, SYN | ACK] {
            let middle = Frame::tcp(client, vip, flags);
            assert_eq!(middle.leave(&fake), Ok((Verdict::Stack, middle.build())));
            assert_eq!(middle.arrive(&fake), Ok((Verdict::Stack, middle.build())));
        }
        let answer = Frame::tcp((F::pod(2), 8080), client, ACK);
        assert_eq!(answer.leave(&fake), Ok((Verdict::Stack, answer.build())), "it translates that back");
        assert!(fake.tracked().is_empty());
        let there = |flags| Frame::tcp(client, (F::pod(2), 8080), flags).build();
        let pod = Verdict::Pod { ifindex: 12 };
        assert_eq!(Frame::tcp(client, vip, SYN).leave(&fake), Ok((pod, there(SYN))), "new ones are ours");
        assert_eq!(Frame::tcp(client, vip, ACK).leave(&fake), Ok((pod, there(ACK))));
    }

    fn truncated_at_every_length<F: Names>() {
        let fake = world();
        let mut frames = Vec::new();
        for (frame, port) in flows::<F>() {
            assert!(frame.leave(&fake).is_ok());
            let refused = frame.clone().sent_to((F::vip(9), frame.dst_port)).payload(b"payload");
            let reply = frame.answer(ACK).sent_from((F::pod(2), port));
            frames.extend([frame.clone(), frame.extended(), refused.clone().extended(), refused, reply]);
        }
        let before = fake.tracked();
        for frame in frames {
            let whole = frame.build();
            for length in 0..whole.len() {
                for step in [leaving::<Bytes, Fake>, entering::<Bytes, Fake>] {
                    let mut packet = Bytes(whole[..length].to_vec());
                    let verdict = step(&mut packet, &fake);
                    assert!(
                        matches!(verdict, Ok(Verdict::Stack) | Err(DropReason::Truncated)),
                        "{verdict:?}"
                    );
                    assert_eq!(packet.0, whole[..length]);
                }
            }
        }
        assert_eq!(fake.tracked(), before);
    }

    fn a_datagram_without_checksum_is_served<F: Names>() {
        let fake = only(F::pod(2));
        let none = Transport::Udp { checksum: UdpChecksum::None };
        let frame = Frame::new((F::pod(1), 4000), (F::vip(1), 53), none).payload(b"query");
        let there = frame.clone().sent_to((F::pod(2), 5353)).build();
        assert_eq!(frame.leave(&fake), Ok((Verdict::Pod { ifindex: 12 }, there)));
        let back = frame.answer(0).sent_from((F::pod(2), 5353)).leave(&fake);
        assert_eq!(back, Ok((Verdict::Pod { ifindex: 11 }, frame.answer(0).build())));
    }

    fn a_slot_without_backend_is_told<F: Names>() {
        let mut fake = world();
        fake.slots.fill(0);
        for (frame, _) in flows::<F>() {
            assert_eq!(frame.leave(&fake), Err(DropReason::NoBackend));
        }
        assert!(fake.tracked().is_empty());
    }

    fn rule_31_a_backend_released_under_a_packet_costs_nothing_and_keeps_nobody<F: Names>() {
        for (frame, port) in flows::<F>() {
            let proto = frame.proto();
            let index = |fake: &Fake, addr| {
                fake.backends
                    .iter()
                    .position(|it| (it.addr, it.proto, it.port.host()) == (addr, proto, port))
                    .unwrap()
            };
            let mut moved = 0;
            for looks in 0..8 {
                let mut fake = only(F::pod(2));
                let (old, new) = (index(&fake, F::pod(2)) as u32, index(&fake, F::pod(3)) as u32);
                fake.release = Some(Release { index: old, instead: new, looks: Cell::new(looks) });
                assert!(frame.leave(&fake).is_ok(), "{proto:?} after {looks} looks");
                let entry =
                    fake.entry((frame.src, frame.src_port), (frame.dst, frame.dst_port), proto).unwrap();
                moved += u32::from(entry.backend == new);
                assert!([old, new].contains(&entry.backend));
                assert_eq!(
                    entry.generation, 1,
                    "{proto:?} after {looks} looks: what was released has another"
                );
            }
            assert!((1..8).contains(&moved), "{proto:?}: {moved} of 8");
        }
    }

    /// Whatever comes, a packet is dropped as it was, or goes as it was, or goes with right checksums if it came so.
    fn noise_leaves_packets_whole<F: Names>() {
        let (mut fake, mut noise) = (world(), Noise(u64::from(F::ETHERTYPE)));
        let mut changed = 0;
        for round in 0..20_000 {
            if noise.percent(2) {
                fake.clock.set(fake.clock.get() + noise.pick(&[1, 31, 100, 4_000]));
                let index = noise.below(fake.backends.len());
                fake.backends[index].generation += 1;
            }
            let bytes = if noise.percent(80) { noise.frame::<F>().build() } else { noise.packet() };
            let mut packet = Bytes(bytes.clone());
            let verdict =
                if noise.percent(75) { leaving(&mut packet, &fake) } else { entering(&mut packet, &fake) };
            if packet.0 == bytes {
                continue;
            }
            changed += 1;
            assert!(verdict.is_ok(), "{round}: {verdict:?} and changed");
            if verify(&bytes).is_ok() {
                assert_eq!(verify(&packet.0), Ok(()), "{round}: {verdict:?}");
            }
        }
        assert!(changed > 5_000, "{changed} packets were changed");
    }

    #[test]
    fn what_is_not_ip_is_the_stacks() {
        let fake = world();
        let arp = [&[0xff; 12][..], &[8, 6], &[0; 28]].concat();
        let vlan = [&[2; 12][..], &[0x81, 0, 0, 1, 8, 0], &[0x45; 40]].concat();
        for bytes in [arp, vlan, vec![], vec![1; 13], vec![8; 14]] {
            for step in [leaving::<Bytes, Fake>, entering::<Bytes, Fake>] {
                let mut packet = Bytes(bytes.clone());
                assert_eq!(step(&mut packet, &fake), Ok(Verdict::Stack));
                assert_eq!(packet.0, bytes);
            }
        }
    }

    #[test]
    fn random_bytes_do_no_harm() {
        let (fake, mut noise) = (world(), Noise(99));
        for _ in 0..50_000 {
            let length = noise.below(200);
            let mut bytes = noise.bytes(length);
            if let Some(kind) = bytes.get_mut(12..15) {
                kind.copy_from_slice(&noise.pick(&[[8, 0, 0x45], [0x86, 0xdd, 0x60], [8, 0, 0x4f]]));
            }
            for step in [leaving::<Bytes, Fake>, entering::<Bytes, Fake>] {
                let mut packet = Bytes(bytes.clone());
                let verdict = step(&mut packet, &fake);
                assert!(packet.0 == bytes || verdict.is_ok());
            }
        }
    }
}
