//! A client that talks to a backend by its own address, from a port from which it also talks to it through a service.
//!
//! ```text
//!   client:4000 -> frontend:53     sent on as   client:4000 -> backend:5353
//!   client:4000 -> backend:5353                 the same again, and so is what the backend answers
//! ```
//!
//! The backend's answers to both would be the service's, and the client would get those to the second from somebody whom it
//! did not ask. So the second flow is tracked, too, and gets another source port towards the backend, as one through another
//! service does (netfilter does the same where a reply's tuple is taken).

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::family::Family;

use crate::conntrack;
use crate::nat::Rewrite;
use crate::parse::Headers;
use crate::tables::{Aligned, Tables, Tracked};

/// The backend that the packet is for by its own address, where its answers would be taken for those of a service. Only for
/// what opens a flow, as far as it can be told: any datagram, and a SYN or INIT.
#[inline(always)]
pub fn shadowed<F: Family, T: Tables<F>>(tables: &T, headers: &Headers<F>) -> Option<u32> {
    let tuple = &headers.tuple;
    if tuple.proto.connects() && !headers.flags.opens() {
        return None;
    }
    let answer = Aligned(F::turned(tuple));
    let row = tables.tracked(&answer)?;
    let entry = row.load();
    let of_no_service = entry.flags & (Entry::PLAIN | Entry::MASQUERADED) != 0;
    if entry.kind != Entry::REPLY || of_no_service || entry.expires < tables.now() {
        return None;
    }
    if conntrack::gone(tables, &entry) {
        // The service has left the backend: what that one sends is its own again.
        tables.untrack(&answer);
        return None;
    }
    row.store_flags(entry.flags | Entry::SHADOWING);
    Some(entry.backend)
}

/// Marks the flow with this tuple as one of the two.
#[inline(always)]
pub fn mark<F: Family, T: Tables<F>>(tables: &T, tuple: &Aligned<Tuple<F::Bytes>>) {
    if let Some(row) = tables.tracked(tuple) {
        row.store_flags(row.load().flags | Entry::SHADOWING);
    }
}

/// Whether what the stack sends on is of such a flow and comes from a pod of this node: [`crate::pod::leave`] has made it
/// what it is, which looks like what is still to be translated of the other flow.
#[inline(always)]
pub fn is_translated<F: Family, T: Tables<F>>(tables: &T, headers: &Headers<F>, to: &Rewrite) -> bool {
    to.flags & Entry::SHADOWING != 0 && tables.endpoint(&F::addr(headers.tuple.src)).is_some()
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::Proto;
    use ferroflow_common::tcp::{Flags, chunk};
    use ferroflow_common::verdict::Verdict;

    use crate::frame::{Frame, Names, Socket, both_families};
    use crate::noise::world;
    use crate::tables::fake::Fake;

    both_families!(
        rule_34_answers_to_a_backends_own_address_come_from_there,
        rule_34_what_a_pod_sent_is_translated_once,
        rule_34_a_client_from_outside_may_talk_to_both,
        a_backend_that_the_service_has_left_is_its_own_again,
        the_middle_of_a_connection_opens_nothing,
    );

    /// A client's first packet to service 2, the one backend of which is pod 2.
    fn requests<F: Names>(client: Socket) -> [(Frame, Socket); 3] {
        let vip = F::vip(2);
        [
            (Frame::tcp(client, (vip, 80), Flags::SYN), (F::pod(2), 8080)),
            (Frame::udp(client, (vip, 53)).payload(b"query"), (F::pod(2), 5353)),
            (Frame::sctp(client, (vip, 38412), chunk::INIT), (F::pod(2), 3868)),
        ]
    }

    const ANSWER: u8 = Flags::SYN | Flags::ACK;

    fn port(fake: &Fake, direct: &Frame) -> u16 {
        let to = (direct.dst, direct.dst_port);
        fake.entry((direct.src, direct.src_port), to, direct.proto()).unwrap().src_port.host()
    }

    /// Both flows work, one after the other and again.
    fn rule_34_answers_to_a_backends_own_address_come_from_there<F: Names>() {
        let client = (F::pod(1), 4000);
        for (request, backend) in requests::<F>(client) {
            let fake = world();
            let direct = request.clone().sent_to(backend);
            let to_backend = Verdict::Pod { ifindex: 12 };
            for _ in 0..3 {
                assert_eq!(request.leave(&fake), Ok((to_backend, direct.build())));
                let answer = request.answer(ANSWER);
                let back = answer.clone().sent_from(backend).leave(&fake);
                assert_eq!(back, Ok((Verdict::Pod { ifindex: 11 }, answer.build())));

                let (verdict, bytes) = direct.leave(&fake).unwrap();
                let there = direct.clone().sent_from((client.0, port(&fake, &direct)));
                assert_eq!((verdict, bytes), (to_backend, there.build()));
                assert_ne!(there.src_port, client.1);
                let back = there.answer(ANSWER).leave(&fake);
                assert_eq!(back, Ok((Verdict::Pod { ifindex: 11 }, direct.answer(ANSWER).build())));
            }
        }
    }

    /// To a backend on another node, by the stack and out of a device.
    fn rule_34_what_a_pod_sent_is_translated_once<F: Names>() {
        let client = (F::pod(1), 4000);
        let request = Frame::udp(client, (F::vip(3), 53)).payload(b"query");
        let direct = request.clone().sent_to((F::pod(3), 5353));
        let fake = world();
        for _ in 0..2 {
            assert_eq!(request.leave(&fake), Ok((Verdict::Stack, direct.build())));
            assert_eq!(direct.enter(&fake), Ok((Verdict::Stack, direct.build())), "through the service");
            let (verdict, bytes) = direct.leave(&fake).unwrap();
            let there = direct.clone().sent_from((client.0, port(&fake, &direct)));
            assert_eq!((verdict, bytes), (Verdict::Stack, there.build()));
            assert_eq!(there.enter(&fake), Ok((Verdict::Stack, there.build())));
            let answer = request.answer(0).sent_from((F::pod(3), 5353));
            assert_eq!(answer.arrive(&fake).unwrap().1, request.answer(0).build());
            assert_eq!(there.answer(0).arrive(&fake).unwrap().1, direct.answer(0).build());
        }
    }

    fn rule_34_a_client_from_outside_may_talk_to_both<F: Names>() {
        let client = (F::vip(99), 4000);
        for (request, backend) in requests::<F>(client) {
            let mut fake = world();
            let keep = ferroflow_common::abi::lb::Frontend::KEEP_CLIENT;
            fake.frontends.values_mut().for_each(|frontend| frontend.flags |= keep);
            let direct = request.clone().sent_to(backend);
            assert_eq!(request.arrive(&fake).unwrap().1, direct.build());
            let there = direct.arrive(&fake).unwrap().1;
            assert_eq!(there, direct.clone().sent_from((client.0, port(&fake, &direct))).build());
            let answer = direct.clone().sent_from((client.0, port(&fake, &direct))).answer(ANSWER);
            let seen = direct.answer(ANSWER);
            assert_eq!(answer.leave(&fake), Ok((Verdict::Stack, seen.build())));
            assert_eq!(seen.enter(&fake), Ok((Verdict::Stack, seen.build())), "on its way out");
        }
    }

    fn a_backend_that_the_service_has_left_is_its_own_again<F: Names>() {
        for (request, backend) in requests::<F>((F::pod(1), 4000)) {
            let mut fake = world();
            assert!(request.leave(&fake).is_ok());
            fake.backends.iter_mut().for_each(|row| row.generation += 1);
            let direct = request.clone().sent_to(backend);
            for frame in [direct.clone(), direct.answer(ANSWER)] {
                assert_eq!(frame.leave(&fake).unwrap().1, frame.build());
            }
        }
    }

    fn the_middle_of_a_connection_opens_nothing<F: Names>() {
        let fake = world();
        let request = Frame::tcp((F::pod(1), 4000), (F::vip(2), 80), Flags::SYN);
        assert!(request.leave(&fake).is_ok());
        let before = fake.tracked();
        let direct = Frame::tcp((F::pod(1), 4000), (F::pod(2), 8080), Flags::ACK);
        assert_eq!(direct.leave(&fake).unwrap().1, direct.build());
        assert_eq!(fake.tracked(), before);
        let other = Frame::udp((F::pod(1), 4000), (F::pod(2), 5353));
        assert_eq!(other.leave(&fake).unwrap().1, other.build());
        assert_eq!(fake.entry((F::pod(1), 4000), (F::pod(2), 5353), Proto::UDP), None);
    }
}
