//! Fragments of datagrams to and from services, in any order (rule 38).
//!
//! Only a first fragment has ports. It goes the way of a whole packet, and what it became is remembered for the others,
//! which find it by what all fragments of a datagram share. The transport checksum lies in the first one and covers all
//! of the datagram, so it is mended there alone.
//!
//! ```text
//!   first     seen -> known, or opens -> remembered; a copy of it is sent round where others wait
//!   its copy  turned into one that waits, and goes on as that; a copy is sent round where more wait
//!   later     known: goes on;  not yet known: kept, up to a bound
//! ```
//!
//! A copy that is sent round arrives once more at the interface that the first one came to. That is how a program emits
//! more packets than it gets. It cannot simply send early fragments round until the first one comes: on the CPU that is
//! to send that one, they would keep it from doing so.
//!
//! What is known of a datagram may be written by two CPUs at once. The worst of it is a fragment that waits in vain and
//! a datagram lost, as on any link.
//!
//! Identifications are not translated: two masqueraded clients may use one at the same time towards one backend. The
//! kernel's own masquerade does the same; such datagrams are told by their checksum, and lost.

use ferroflow_common::abi::conntrack::Entry;
use ferroflow_common::abi::fragment::{Datagram, DatagramKey};
use ferroflow_common::abi::relay;
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::icmp::Errors;
use crate::nat::{self, Rewrite};
use crate::packet::{L3, Packet};
use crate::parse::{self, Fragment};
use crate::route;
use crate::service::{Origin, Outcome};
use crate::tables::{Aligned, Datagrams, Tables};

/// A fragment in one register, so that steps may hand it on: where its identification is, its protocol, and its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Part(pub u64);

const FIRST: u64 = 1 << 32;
const LATER: u64 = 2 << 32;

impl Part {
    /// A packet that is whole.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    const fn new(place: u64, id_at: u32, proto: Proto) -> Self {
        Self(place | (proto.number as u64) << 16 | id_at as u16 as u64)
    }

    #[inline(always)]
    pub const fn is_first(self) -> bool {
        self.0 & FIRST != 0
    }

    /// As fragments after the first have it; behind IPv6's fragment header may be another extension header.
    #[inline(always)]
    const fn proto(self) -> Proto {
        Proto { number: (self.0 >> 16) as u8 }
    }

    /// What all fragments of the datagram share.
    #[inline(always)]
    fn key<F: Errors, P: Packet>(self, packet: &P, origin: Origin) -> Option<DatagramKey> {
        let Aligned([src, dst]) = F::ends(packet, L3)?;
        let [word] = packet.words(packet.forget(self.0 as u16 as u32))?;
        let (id, proto) = if F::CSUM_OFF.is_some() {
            (word & u32::from_ne_bytes([0xff, 0xff, 0, 0]), self.proto())
        } else {
            (word, Proto { number: 0 })
        };
        let side = if origin.is_routed() { 1 } else { 0 };
        Some(DatagramKey { src: F::addr(src), dst: F::addr(dst), id, proto, part: 0, side, reserved: 0 })
    }
}

/// Looks for a fragment.
#[inline(always)]
pub fn find<F: Errors, P: Packet>(packet: &P) -> Part {
    let Ok(network) = F::network(packet) else { return Part::NONE };
    match network.fragment {
        Fragment::Whole => Part::NONE,
        Fragment::First => Part::new(FIRST, network.id_at, network.proto),
        Fragment::Later => Part::new(LATER, network.id_at, network.proto),
    }
}

/// A first fragment, before it goes the way of a whole packet: then [`Outcome::RARE`]. Until [`remember`] its datagram
/// counts as dropped, because it may be.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn first<F, P, T>(packet: &mut P, tables: &T, part: Part, origin: Origin) -> Result<Outcome, DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Datagrams<P>,
{
    let mut key = part.key::<F, P>(packet, origin).ok_or(DropReason::Truncated)?;
    tables.note(&key);
    if origin.is_routed() {
        return Ok(Outcome::RARE);
    }
    let mut datagram = known(tables, &key, tables.now());
    let judged = datagram.fate != Datagram::AWAITED && datagram.fate != Datagram::DROPPED;
    if datagram.held > 0 {
        if judged {
            datagram.held -= 1;
            write(tables, &key, &datagram);
        }
        if datagram.held > 0 {
            tables.again(packet)?;
        }
        if judged {
            key.part = datagram.held;
            let released = tables.release(packet, &key)?;
            return Ok(Outcome::goes(if released { Verdict::Stack } else { Verdict::Taken }));
        }
    }
    datagram.fate = Datagram::DROPPED;
    write(tables, &key, &datagram);
    Ok(Outcome::RARE)
}

/// Remembers what the noted first fragment has become.
#[inline(always)]
pub fn remember<F, P, T>(packet: &P, tables: &T, outcome: Outcome, origin: Origin)
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Datagrams<P>,
{
    let Some(key) = tables.noted() else { return };
    let Some(Aligned([src, dst])) = F::ends(packet, L3) else { return };
    let mut datagram = known(tables, &key, tables.now());
    (datagram.src, datagram.dst) = (F::addr(src), F::addr(dst));
    let rewritten = outcome.is_past_the_stack() || datagram.src != key.src || datagram.dst != key.dst;
    let dropped = outcome.is_dropped();
    let relayed = outcome.node();
    if let Some(node) = relayed {
        datagram.src = relay::stand_in(node);
    }
    // What the stack has routed is of no service unless it is changed here.
    if origin.is_routed() && !rewritten && !dropped {
        return;
    }
    datagram.fate = if dropped {
        Datagram::DROPPED
    } else if relayed.is_some() {
        Datagram::RELAYED
    } else if rewritten {
        Datagram::REWRITTEN
    } else {
        Datagram::PASSES
    };
    // The others go where this one goes: to a pod, out at once, or by the stack. A stack that tracks connections keeps
    // fragments until the first one comes, and would keep those for ever whose first one went past it.
    datagram.flags = match outcome {
        Outcome::FORWARD => Entry::OWN_SOURCE,
        Outcome::STACK => Entry::MASQUERADED,
        _ => 0,
    };
    write(tables, &key, &datagram);
}

/// A fragment after the first.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn later<F, P, T>(packet: &mut P, tables: &T, part: Part, origin: Origin) -> Result<Outcome, DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Datagrams<P>,
{
    let mut key = part.key::<F, P>(packet, origin).ok_or(DropReason::Truncated)?;
    let mut datagram = known(tables, &key, tables.now());
    if datagram.fate == Datagram::DROPPED {
        return Err(DropReason::Fragment);
    }
    if origin.is_routed() && datagram.fate != Datagram::REWRITTEN {
        return Ok(Outcome::STACK);
    }
    if datagram.fate == Datagram::AWAITED {
        return hold::<F, P, T>(packet, tables, part, (&mut key, &mut datagram));
    }
    if datagram.fate == Datagram::PASSES {
        return Ok(Outcome::STACK);
    }
    if datagram.fate == Datagram::RELAYED {
        return Ok(Outcome::relay(relay::stands_for(&datagram.src)));
    }
    let ends = [F::bytes(&key.src), F::bytes(&key.dst)];
    let Datagram { src, dst, flags, .. } = datagram;
    let to = Rewrite { addrs: [src, dst], src_port: Port::ZERO, dst_port: Port::ZERO, flags };
    nat::readdress::<F, P>(packet, &ends, &to)?;
    Ok(Outcome::goes(route::onwards::<F, T>(tables, &to, origin)))
}

/// Keeps a fragment until the first one comes. Protocols without ports are of no service, whatever comes.
#[inline(always)]
fn hold<F, P, T>(
    packet: &mut P,
    tables: &T,
    part: Part,
    (key, datagram): (&mut DatagramKey, &mut Datagram),
) -> Result<Outcome, DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Datagrams<P>,
{
    if !parse::may_have_ports::<F>(part.proto()) {
        return Ok(Outcome::STACK);
    }
    if datagram.held >= Datagram::MAX_HELD {
        return Err(DropReason::EarlyFragment);
    }
    key.part = datagram.held;
    tables.hold(packet, key)?;
    key.part = 0;
    *datagram = known(tables, key, tables.now());
    if datagram.fate == Datagram::AWAITED {
        datagram.held += 1;
        write(tables, key, datagram);
    } else {
        // Its first fragment has come this moment on another CPU: what was kept is not waited for, and this one goes on.
        tables.again(packet)?;
    }
    Ok(Outcome::goes(Verdict::Taken))
}

/// What is known of a datagram: nothing yet, where another one had its identification long ago.
#[inline(always)]
fn known<P, T: Datagrams<P>>(tables: &T, key: &DatagramKey, now: u32) -> Datagram {
    let mut datagram = Datagram {
        src: Addr::UNSPECIFIED,
        dst: Addr::UNSPECIFIED,
        fate: Datagram::AWAITED,
        flags: 0,
        held: 0,
        reserved: 0,
        expires: now.wrapping_add(Datagram::LIFETIME),
    };
    if let Some(found) = tables.datagram(key)
        && found.expires >= now
    {
        datagram = found;
    }
    datagram
}

/// Where the table has no room, later fragments are held in vain, and the datagram is lost.
#[inline(always)]
fn write<P, T: Datagrams<P>>(tables: &T, key: &DatagramKey, datagram: &Datagram) {
    let _lost = tables.remember_datagram(key, datagram);
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::{Frontend, FrontendKey};
    use ferroflow_common::abi::node::NodeAddress;
    use ferroflow_common::tcp::Flags;

    use super::*;
    use crate::frame::{Frame, Names, Part as Place, Transport, both_families};
    use crate::noise::world;
    use crate::packet::Bytes;
    use crate::tables::fake::Fake;
    use crate::{device, pod};

    both_families!(
        rule_38_fragments_of_a_service_in_any_order,
        rule_38_replies_in_any_order,
        rule_38_fragments_of_no_service_in_any_order,
        rule_38_masqueraded_fragments_go_one_way,
        rule_38_the_nodes_stack_sends_in_order,
        rule_38_what_is_dropped_is_dropped_to_the_end,
        rule_38_what_waits_is_bounded,
        rule_38_an_identification_is_used_again,
        rule_38_protocols_without_ports_do_not_wait,
        a_fragment_cut_at_every_length,
    );

    type Step = fn(&mut Bytes, &Fake) -> Result<Verdict, DropReason>;

    const LEAVE: Step = pod::leaving::<Bytes, Fake>;
    const ENTER: Step = pod::entering::<Bytes, Fake>;
    const ARRIVE: Step = device::arriving::<Bytes, Fake>;

    /// Sends the packets through a hook, and what goes round with them: where each went and as what.
    fn through(step: Step, fake: &Fake, packets: &[Frame]) -> Vec<(Verdict, Vec<u8>)> {
        let mut out = Vec::new();
        for packet in packets {
            let mut queue = vec![packet.build()];
            while !queue.is_empty() {
                let mut bytes = Bytes(queue.remove(0));
                let verdict = step(&mut bytes, fake).unwrap();
                queue.append(&mut fake.again.borrow_mut());
                if verdict != Verdict::Taken {
                    out.push((verdict, bytes.0));
                }
            }
        }
        assert!(fake.held.borrow().is_empty());
        out
    }

    /// Every order of four.
    fn orders() -> Vec<[usize; 4]> {
        let all = 0..4;
        let mut orders = Vec::new();
        for a in all.clone() {
            for b in all.clone() {
                for c in all.clone() {
                    let mut rest = all.clone().filter(|index| ![a, b, c].contains(index));
                    if a != b && b != c && a != c {
                        orders.push([a, b, c, rest.next().unwrap()]);
                    }
                }
            }
        }
        assert_eq!(orders.len(), 24);
        orders
    }

    /// Sends a datagram in four fragments in each order; all come out, each once, as those of `expected`, and the
    /// last of them at the latest lets all others go.
    fn in_any_order(step: Step, fake: &Fake, sent: &Frame, (verdict, expected): (Verdict, &Frame)) {
        for (id, order) in (1..).zip(orders()) {
            let parts = Frame { id, ..sent.clone() }.fragments(40);
            assert_eq!(parts.len(), 4);
            let mut out = through(step, fake, &order.map(|index| parts[index].clone()));
            let mut expected: Vec<_> = Frame { id, ..expected.clone() }.fragments(40);
            expected.sort_by_key(Frame::build);
            out.sort_by(|(_, a), (_, b)| a.cmp(b));
            let bytes: Vec<_> = out.iter().map(|(_, bytes)| bytes.clone()).collect();
            assert_eq!(bytes, expected.iter().map(Frame::build).collect::<Vec<_>>(), "{order:?}");
            assert!(out.iter().all(|(to, _)| *to == verdict), "{order:?}: {out:?}");
        }
    }

    fn query<F: Names>() -> Frame {
        Frame::udp((F::pod(1), 4000), (F::vip(3), 53)).payload(&(0..140).collect::<Vec<u8>>())
    }

    fn rule_38_fragments_of_a_service_in_any_order<F: Names>() {
        for frame in [query::<F>(), query::<F>().extended()] {
            let there = frame.clone().sent_to((F::pod(3), 5353));
            in_any_order(LEAVE, &world(), &frame, (Verdict::Stack, &there));
            let near = frame.sent_to((F::vip(2), 53));
            let there = near.clone().sent_to((F::pod(2), 5353));
            in_any_order(LEAVE, &world(), &near, (Verdict::Pod { ifindex: 12 }, &there));
        }
        let segment = Frame::tcp((F::pod(1), 4000), (F::vip(3), 80), Flags::SYN).payload(&[9; 130]);
        in_any_order(
            LEAVE,
            &world(),
            &segment,
            (Verdict::Stack, &segment.clone().sent_to((F::pod(3), 8080))),
        );
    }

    fn rule_38_replies_in_any_order<F: Names>() {
        let fake = world();
        assert!(query::<F>().leave(&fake).is_ok());
        let reply = query::<F>().answer(0).payload(&[5; 140]);
        let sent = reply.clone().sent_from((F::pod(3), 5353));
        in_any_order(ARRIVE, &fake, &sent, (Verdict::Pod { ifindex: 11 }, &reply));
        in_any_order(LEAVE, &fake, &sent, (Verdict::Pod { ifindex: 11 }, &reply));
    }

    fn rule_38_fragments_of_no_service_in_any_order<F: Names>() {
        let direct = query::<F>().sent_to((F::pod(3), 5353));
        for step in [LEAVE, ARRIVE] {
            in_any_order(step, &world(), &direct, (Verdict::Stack, &direct));
        }
        let own = Frame::tcp((F::pod(1), 4000), (F::vip(1), 443), Flags::SYN).payload(&[9; 130]);
        in_any_order(LEAVE, &world(), &own, (Verdict::Stack, &own));
        // Past the stack all of them, or none.
        let local = query::<F>().sent_to((F::pod(2), 5353));
        in_any_order(LEAVE, &world(), &local, (Verdict::Pod { ifindex: 12 }, &local));
        let mut fake = world();
        fake.elsewhere = vec![F::pod(3)];
        in_any_order(LEAVE, &fake, &direct, (Verdict::Forward, &direct));
        let back = direct.answer(0).payload(&[5; 140]);
        in_any_order(ARRIVE, &fake, &back, (Verdict::Pod { ifindex: 11 }, &back));
    }

    fn rule_38_masqueraded_fragments_go_one_way<F: Names>() {
        let mut fake = Fake::default();
        let (node, client, backend) = (F::vip(200), (F::vip(99), 4000), (F::pod(2), 5353));
        let any = if node.is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
        fake.node.insert(node, NodeAddress { flags: NodeAddress::NODE_PORTS });
        fake.service(any, 30_053, Proto::UDP, &[backend]).flags = Frontend::NORTH_SOUTH;
        let request = query::<F>().sent_from(client).sent_to((node, 30_053));
        assert!(request.arrive(&fake).is_ok());
        let entry = fake.entry(client, (node, 30_053), Proto::UDP).unwrap();
        let there = request.clone().sent_from((node, entry.src_port.host())).sent_to(backend);
        in_any_order(ARRIVE, &fake, &request, (Verdict::Forward, &there));
        let (reply, sent) = (request.answer(0).payload(&[5; 140]), there.answer(0).payload(&[5; 140]));
        in_any_order(ARRIVE, &fake, &sent, (Verdict::Forward, &reply));
    }

    /// Nothing waits there: what is out of order has been so before, and been dealt with.
    fn rule_38_the_nodes_stack_sends_in_order<F: Names>() {
        let fake = world();
        assert!(query::<F>().leave(&fake).is_ok());
        let reply = query::<F>().answer(0).payload(&[5; 140]);
        let parts = reply.clone().sent_from((F::pod(3), 5353)).fragments(40);
        let stack = |frames: Vec<Frame>| frames.iter().map(|part| (Verdict::Stack, part.build())).collect();
        let expected: Vec<_> = stack(reply.fragments(40));
        assert_eq!(through(ENTER, &fake, &parts), expected);
        let other = query::<F>().sent_to((F::pod(3), 5353)).fragments(40);
        for order in [[0, 1, 2, 3], [3, 2, 1, 0]] {
            let order = order.map(|index| other[index].clone());
            let expected: Vec<_> = stack(order.to_vec());
            assert_eq!(through(ENTER, &fake, &order), expected);
        }
    }

    fn rule_38_what_is_dropped_is_dropped_to_the_end<F: Names>() {
        let fake = world();
        let parts = query::<F>().sent_to((F::vip(8), 53)).fragments(40);
        assert_eq!(parts[0].leave(&fake), Err(DropReason::NoLocalEndpoint));
        assert_eq!(parts[1].leave(&fake), Err(DropReason::Fragment));
        assert!(fake.tracked().is_empty());
    }

    fn rule_38_what_waits_is_bounded<F: Names>() {
        let fake = world();
        let parts = Frame { id: 9, ..query::<F>().payload(&[1; 2_000]) }.fragments(40);
        for part in &parts[1..=usize::from(Datagram::MAX_HELD)] {
            assert_eq!(part.leave(&fake), Ok((Verdict::Taken, part.build())));
        }
        assert_eq!(parts[46].leave(&fake), Err(DropReason::EarlyFragment));
        let out = through(LEAVE, &fake, &parts[..1]);
        assert_eq!(out.len(), 46, "the first one lets all others go");
        assert!(parts[46].leave(&fake).is_ok(), "and is known");
        let jumbo = Frame { id: 10, ..query::<F>() }.payload(&[1; 9_216]).part(Place::Later(64));
        assert_eq!(jumbo.leave(&fake), Err(DropReason::EarlyFragment));
        assert!(fake.again.borrow().is_empty());
    }

    fn rule_38_an_identification_is_used_again<F: Names>() {
        let fake = world();
        let parts = query::<F>().fragments(40);
        through(LEAVE, &fake, &parts);
        fake.clock.set(fake.clock.get() + Datagram::LIFETIME + 1);
        assert_eq!(parts[1].leave(&fake), Ok((Verdict::Taken, parts[1].build())), "another datagram");
        let other = query::<F>().sent_from((F::pod(1), 4000)).sent_to((F::vip(3), 443)).fragments(40);
        let out = through(LEAVE, &fake, &other[..1]);
        assert_eq!(out.len(), 2, "of the one that comes first: {out:?}");
    }

    fn rule_38_protocols_without_ports_do_not_wait<F: Names>() {
        for proto in [F::ICMP, Proto { number: 47 }, Proto { number: 50 }] {
            let fake = world();
            let frame =
                Frame::new((F::pod(1), 0), (F::vip(1), 0), Transport::Other(proto)).payload(&[3; 160]);
            let parts = frame.fragments(40);
            for part in parts.iter().rev().chain(&parts) {
                assert_eq!(part.leave(&fake), Ok((Verdict::Stack, part.build())));
            }
        }
    }

    fn a_fragment_cut_at_every_length<F: Names>() {
        for frame in [query::<F>(), query::<F>().extended()] {
            for part in &frame.fragments(40)[..2] {
                let whole = part.build();
                for length in 0..whole.len() {
                    let (fake, mut packet) = (world(), Bytes(whole[..length].to_vec()));
                    let verdict = LEAVE(&mut packet, &fake);
                    assert!(
                        matches!(verdict, Ok(Verdict::Stack) | Err(DropReason::Truncated)),
                        "{length}: {verdict:?}"
                    );
                }
            }
        }
    }
}
