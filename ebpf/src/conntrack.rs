//! Flows through services: found by the tuple of either direction, kept while they live.
//!
//! A flow is two entries. The forward one says which backend the client's packets go to, the reply one which frontend
//! the backend's packets come from. Each is refreshed by its own packets; what the other must know (a reply was seen,
//! a side closed, the flow still lives) is written to both, which happens a few times in a connection's life.

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::lb::Backend;
use ferroflow_common::addr::Proto;
use ferroflow_common::family::Family;
use ferroflow_common::tcp::{Direction, Flags, State};
use ferroflow_common::verdict::DropReason;

use crate::nat::{End, Rewrite};
use crate::parse::Headers;
use crate::tables::{Aligned, InsertError, OnConflict, Services, Tables, Tracked};

/// What is known of a packet's flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The packet belongs to a flow and is rewritten.
    Flow(Rewrite),
    /// It opens a flow, or its flow's backend is gone: what it goes to is to be chosen.
    Nothing,
}

/// Looks the packet's flow up and brings its state up to date.
#[inline(always)]
pub fn follow<F: Family, T: Tables<F>>(tables: &T, headers: &Headers<F>) -> Known {
    let Some(tracked) = tables.tracked(&headers.tuple) else { return Known::Nothing };
    let entry = tracked.load();
    let now = tables.now();
    if entry.expires < now {
        return Known::Nothing;
    }
    let change = change(tables, headers, &entry, now);
    if let Change::Refreshed { state, expires } = change {
        tracked.store_state(state.0, expires);
    }
    if change != Change::None {
        change_other(tables, headers, &entry, change);
    }
    if change == Change::Ends {
        // A forward entry is about to be replaced.
        if !entry.is_forward() {
            tables.untrack(&headers.tuple);
        }
        return Known::Nothing;
    }
    let end = if entry.is_forward() { End::Destination } else { End::Source };
    Known::Flow(Rewrite { end, addr: entry.nat, port: entry.nat_port, looped: entry.is_looped() })
}

/// What a packet does to its flow's two entries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Refreshed {
        state: State,
        expires: u32,
    },
    /// The packet opens another flow.
    Ends,
}

#[inline(always)]
fn change<F: Family, T: Services>(tables: &T, headers: &Headers<F>, entry: &Entry, now: u32) -> Change {
    let (direction, ends) = if entry.is_forward() {
        (Direction::Forward, chooses_again(tables, headers, entry))
    } else {
        // A server that opens a connection from its service port to a former client's port: not a reply, and neither
        // is what follows (rule 35).
        (Direction::Reply, headers.flags.opens())
    };
    if ends { Change::Ends } else { refreshed(headers, entry, direction, now) }
}

/// Only a SYN moves a TCP flow, and only to where it is not a retransmission to a live backend (rules 30, 35). A UDP
/// flow moves as soon as its backend stopped serving (rule 31): that is what the generation is for.
#[inline(always)]
fn chooses_again<F: Family, T: Services>(tables: &T, headers: &Headers<F>, entry: &Entry) -> bool {
    if headers.tuple.proto == Proto::TCP {
        headers.flags.opens() && (entry.state != State::NEW.0 || gone(tables, entry))
    } else {
        gone(tables, entry)
    }
}

#[inline(always)]
fn gone<T: Services>(tables: &T, entry: &Entry) -> bool {
    tables.backend(entry.backend).is_none_or(|backend: Backend| backend.generation != entry.generation)
}

/// State and expiry where they changed by more than an eighth of the lifetime: a busy flow is written every few seconds,
/// not at every packet.
#[inline(always)]
fn refreshed<F: Family>(headers: &Headers<F>, entry: &Entry, direction: Direction, now: u32) -> Change {
    let state = State(entry.state).after(headers.flags, direction);
    let lifetime = state.lifetime(headers.tuple.proto);
    let expires = now.wrapping_add(lifetime);
    let due = expires > entry.expires.saturating_add(lifetime / 8);
    if state.0 != entry.state || due { Change::Refreshed { state, expires } } else { Change::None }
}

/// The same for the other direction's entry, unless a flow of another frontend has taken its tuple over since.
#[inline(always)]
fn change_other<F: Family, T: Tables<F>>(tables: &T, headers: &Headers<F>, entry: &Entry, change: Change) {
    let own = &headers.tuple;
    let tuple = partner::<F>(own, entry);
    let Some(row) = tables.tracked(&tuple) else { return };
    let (addr, port) = if entry.is_forward() { (own.dst, own.dst_port) } else { (own.src, own.src_port) };
    let other = row.load();
    if F::bytes(&other.nat) != addr || other.nat_port != port {
        return;
    }
    match change {
        Change::None => {}
        Change::Refreshed { state, expires } => row.store_state(state.0, expires),
        Change::Ends => tables.untrack(&tuple),
    }
}

/// The tuple of the same flow's other direction.
#[inline(always)]
fn partner<F: Family>(tuple: &Tuple<F::Bytes>, entry: &Entry) -> Aligned<Tuple<F::Bytes>> {
    let nat = F::bytes(&entry.nat);
    // Which addresses the packet and its partner's share (see `Entry::LOOPED`).
    let (own, other) = if entry.is_looped() { (tuple.src, tuple.dst) } else { (tuple.dst, tuple.src) };
    if entry.is_forward() {
        Aligned(Tuple { src: nat, src_port: entry.nat_port, dst: other, dst_port: tuple.src_port, ..*tuple })
    } else {
        Aligned(Tuple { src: own, src_port: tuple.dst_port, dst: nat, dst_port: entry.nat_port, ..*tuple })
    }
}

/// Tracks a new flow to `backend` and says how its packets are rewritten.
///
/// # Errors
/// [`DropReason::TupleCollision`] where another frontend's flow has the tuple towards this backend (section 4 of the
/// design: to be resolved by a new source port), [`DropReason::ConntrackInsert`].
#[inline(always)]
pub fn open<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    index: u32,
    backend: &Backend,
) -> Result<Rewrite, DropReason> {
    let tuple = &headers.tuple;
    let state = State::NEW;
    let looped = backend.addr == F::addr(tuple.src);
    let loops = if looped { Entry::LOOPED } else { 0 };
    let forward = Entry {
        nat: backend.addr,
        nat_port: backend.port,
        kind: Entry::FORWARD | loops,
        state: state.0,
        service: backend.service,
        backend: index,
        generation: backend.generation,
        expires: tables.now().wrapping_add(state.lifetime(tuple.proto)),
    };
    let reply =
        Entry { nat: F::addr(tuple.dst), nat_port: tuple.dst_port, kind: Entry::REPLY | loops, ..forward };
    let reply_tuple = partner::<F>(tuple, &forward);
    match tables.track(&reply_tuple, &reply, OnConflict::Fail) {
        Ok(()) => {}
        Err(InsertError::Exists) => take_over(tables, headers, &reply_tuple, &reply)?,
        Err(InsertError::Refused) => return Err(DropReason::ConntrackInsert),
    }
    if tables.track(tuple, &forward, OnConflict::Replace).is_err() {
        tables.untrack(&reply_tuple);
        return Err(DropReason::ConntrackInsert);
    }
    Ok(Rewrite { end: End::Destination, addr: backend.addr, port: backend.port, looped })
}

/// Replaces a reply entry that is of the same frontend or no longer lives.
#[inline(always)]
fn take_over<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    tuple: &Aligned<Tuple<F::Bytes>>,
    reply: &Entry,
) -> Result<(), DropReason> {
    if let Some(other) = tables.tracked(tuple) {
        let other = other.load();
        let same = other.nat == reply.nat && other.nat_port == reply.nat_port;
        let over = other.expires < tables.now()
            || (headers.tuple.proto == Proto::TCP && State(other.state).closed());
        if !same && !over {
            return Err(DropReason::TupleCollision);
        }
    }
    tables.track(tuple, reply, OnConflict::Replace).map_err(|_refused| DropReason::ConntrackInsert)
}

/// Whether the flow's first packet may be answered by a refusal.
#[inline(always)]
pub const fn refusable(flags: Flags) -> bool {
    flags.0 & Flags::RST == 0
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::Addr;
    use ferroflow_common::verdict::Verdict;

    use super::*;
    use crate::frame::{Frame, Names, Socket, both_families};
    use crate::tables::fake::Fake;

    both_families!(
        rule_30_a_retransmitted_syn_keeps_its_backend,
        rule_30_a_retransmitted_syn_leaves_a_backend_that_is_gone,
        rule_30_an_established_connection_keeps_a_backend_that_is_gone,
        rule_35_a_syn_after_the_close_chooses_again,
        rule_31_a_datagram_flow_moves_at_once_and_leaves_nothing,
        an_idle_flow_expires,
        a_busy_flow_is_written_seldom_and_in_both_directions,
        a_tuple_of_two_frontends_collides,
        a_tuple_is_taken_over_when_its_flow_is_over,
        a_flow_whose_tuple_was_taken_leaves_the_other_alone,
        rule_36_a_full_table_is_told_and_leaves_nothing,
        rule_35_a_server_may_open_to_a_former_client,
        a_looped_flow_is_followed_both_ways,
    );

    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;
    const FIN: u8 = Flags::FIN | ACK;

    /// A client of pod 1 and two frontends with the backends pod 2 and 3, all of this node.
    struct Net {
        fake: Fake,
        client: Socket,
        vip: Socket,
        proto: Proto,
    }

    impl Net {
        fn new<F: Names>(proto: Proto) -> Self {
            let mut fake = Fake::default();
            let backends = Self::backends::<F>();
            fake.service(F::vip(1), 80, proto, &backends);
            fake.service(F::vip(2), 80, proto, &backends[..1]);
            for pod in 1..4 {
                fake.local(F::pod(pod), pod.into());
            }
            fake.clock.set(1_000);
            Self { fake, client: (F::pod(1), 4000), vip: (F::vip(1), 80), proto }
        }

        fn backends<F: Names>() -> [Socket; 2] {
            [(F::pod(2), 8080), (F::pod(3), 8080)]
        }

        /// One frontend with one backend, so every choice is the same.
        fn single<F: Names>(proto: Proto) -> Self {
            let net = Self::new::<F>(proto);
            Self { vip: (F::vip(2), 80), ..net }
        }

        fn frame(&self, flags: u8) -> Frame {
            if self.proto == Proto::TCP {
                Frame::tcp(self.client, self.vip, flags)
            } else {
                Frame::udp(self.client, self.vip).payload(b"datagram")
            }
        }

        /// Sends to the frontend and says which backend got it; the packet must have changed in nothing else.
        fn send(&self, flags: u8) -> Socket {
            let frame = self.frame(flags);
            let (_verdict, bytes) = frame.leave(&self.fake).unwrap();
            let backends = self.fake.backends.iter().map(|backend| (backend.addr, backend.port.host()));
            let right = |backend: &Socket| frame.clone().sent_to(*backend).build() == bytes;
            backends.into_iter().find(right).expect("some backend gets it")
        }

        /// The backend answers; the client must see the frontend.
        fn answer(&self, backend: Socket, flags: u8) {
            let expected = self.frame(0).answer(flags);
            let answer = expected.clone().sent_from(backend);
            assert_eq!(answer.leave(&self.fake).unwrap().1, expected.build());
        }

        fn forward(&self) -> Option<Entry> {
            self.fake.entry(self.client, self.vip, self.proto)
        }

        fn reply(&self, backend: Socket) -> Option<Entry> {
            self.fake.entry(backend, self.client, self.proto)
        }

        /// All slots name the one backend.
        fn only(&mut self, index: u32) -> Socket {
            self.fake.slots.fill(index);
            let backend = self.fake.backends[index as usize];
            (backend.addr, backend.port.host())
        }

        fn other_than(&mut self, backend: Socket) -> Socket {
            let index = (1..=2).find(|&index| self.fake.backends[index].addr != backend.0).unwrap();
            self.only(u32::try_from(index).unwrap())
        }

        /// The backend stops serving: its row is another's from now on.
        fn retire(&mut self, gone: Socket) {
            let rows = self.fake.backends.iter_mut();
            rows.filter(|row| row.addr == gone.0).for_each(|row| row.generation += 1);
        }

        fn wait(&self, seconds: u32) {
            self.fake.clock.set(self.fake.clock.get() + seconds);
        }

        fn establish(&self) -> Socket {
            let backend = self.send(SYN);
            self.answer(backend, SYN | ACK);
            assert_eq!(self.send(ACK), backend);
            backend
        }
    }

    fn rule_30_a_retransmitted_syn_keeps_its_backend<F: Names>() {
        let mut net = Net::new::<F>(Proto::TCP);
        let backend = net.send(SYN);
        net.other_than(backend);
        for _ in 0..3 {
            net.wait(7);
            assert_eq!(net.send(SYN), backend);
        }
        net.answer(backend, SYN | ACK);
        assert_eq!(net.send(ACK), backend);
    }

    fn rule_30_a_retransmitted_syn_leaves_a_backend_that_is_gone<F: Names>() {
        let mut net = Net::new::<F>(Proto::TCP);
        let gone = net.send(SYN);
        net.retire(gone);
        let other = net.other_than(gone);
        assert_eq!(net.send(SYN), other);
        assert!(net.reply(gone).is_none());
        assert!(net.reply(other).is_some());
    }

    fn rule_30_an_established_connection_keeps_a_backend_that_is_gone<F: Names>() {
        let mut net = Net::new::<F>(Proto::TCP);
        let backend = net.establish();
        net.retire(backend);
        net.other_than(backend);
        for _ in 0..3 {
            net.wait(3_600);
            assert_eq!(net.send(ACK), backend);
            net.answer(backend, ACK);
        }
        assert_eq!(net.send(FIN), backend);
        net.answer(backend, FIN);
        assert_eq!(net.send(ACK), backend);
    }

    fn rule_35_a_syn_after_the_close_chooses_again<F: Names>() {
        for close in [FIN, Flags::RST] {
            let mut net = Net::new::<F>(Proto::TCP);
            let former = net.establish();
            assert_eq!(net.send(close), former);
            if close == FIN {
                net.answer(former, FIN);
            }
            let other = net.other_than(former);
            assert_eq!(net.send(SYN), other);
            assert!(net.reply(former).is_none(), "the former server would be heard as the service");
            let entry = net.forward().unwrap();
            assert_eq!((entry.state, entry.expires), (State::NEW.0, 1_060));
        }
    }

    fn rule_31_a_datagram_flow_moves_at_once_and_leaves_nothing<F: Names>() {
        let mut net = Net::new::<F>(Proto::UDP);
        let gone = net.send(0);
        net.answer(gone, 0);
        let other = net.other_than(gone);
        assert_eq!(net.send(0), gone, "out of the slots is not gone");
        net.retire(gone);
        assert_eq!(net.send(0), other);
        assert!(net.reply(gone).is_none());
        net.answer(other, 0);
        // What the former one still sends is a stranger's.
        let late = net.frame(0).answer(0).sent_from(gone);
        assert_eq!(late.leave(&net.fake).unwrap().1, late.build());
    }

    fn an_idle_flow_expires<F: Names>() {
        for (proto, lifetime) in [(Proto::TCP, 60), (Proto::UDP, 30)] {
            let mut net = Net::new::<F>(proto);
            let first = net.send(SYN);
            let other = net.other_than(first);
            net.wait(lifetime);
            assert_eq!(net.send(SYN), first, "its last second");
            net.wait(lifetime + 1);
            let late = net.frame(0).answer(ACK).sent_from(first);
            assert_eq!(late.leave(&net.fake).unwrap().1, late.build(), "the reply entry too");
            assert_eq!(net.send(SYN), other);
        }
    }

    fn a_busy_flow_is_written_seldom_and_in_both_directions<F: Names>() {
        for (proto, lifetime) in [(Proto::TCP, 86_400), (Proto::UDP, 120)] {
            let net = Net::new::<F>(proto);
            let backend = net.establish();
            net.fake.refreshed.set(0);
            let step = (lifetime / 240).max(1);
            let mut sent = 0;
            for turn in 0..240u32 {
                net.wait(step);
                if turn.is_multiple_of(2) {
                    net.send(ACK);
                } else {
                    net.answer(backend, ACK);
                }
                sent += 1;
                let (forward, reply) = (net.forward().unwrap(), net.reply(backend).unwrap());
                assert_eq!((forward.state, forward.expires), (reply.state, reply.expires));
                let left = forward.expires - net.fake.clock.get();
                assert!((lifetime * 7 / 8..=lifetime).contains(&left), "{left} s left of {lifetime}");
            }
            let writes = net.fake.refreshed.get();
            assert!((2..=2 * 18).contains(&writes), "{writes} writes for {sent} packets");
        }
    }

    fn a_tuple_of_two_frontends_collides<F: Names>() {
        for proto in [Proto::TCP, Proto::UDP] {
            let mut net = Net::new::<F>(proto);
            let backend = net.only(1);
            assert_eq!(net.send(SYN), backend);
            let before = net.fake.tracked();
            let second = Net { vip: (F::vip(2), 80), ..net };
            second.fake.slots.iter().for_each(|slot| assert_eq!(*slot, 1));
            assert_eq!(second.frame(SYN).leave(&second.fake), Err(DropReason::TupleCollision));
            assert_eq!(second.fake.tracked(), before);
        }
    }

    fn a_tuple_is_taken_over_when_its_flow_is_over<F: Names>() {
        // Expired, or closed by a reset.
        for (proto, seconds, flags) in
            [(Proto::UDP, 31, None), (Proto::TCP, 61, None), (Proto::TCP, 0, Some(Flags::RST))]
        {
            let mut net = Net::new::<F>(proto);
            let backend = net.only(1);
            net.send(SYN);
            net.wait(seconds);
            flags.map(|flags| net.send(flags));
            let second = Net { vip: (F::vip(2), 80), ..net };
            assert_eq!(second.send(SYN), backend);
            second.answer(backend, SYN | ACK);
        }
        // The client's own earlier flow, whose forward entry is gone.
        let net = Net::single::<F>(Proto::UDP);
        let backend = net.send(0);
        net.fake.conntrack.borrow_mut().retain(|_, row| !row.load().is_forward());
        assert_eq!(net.send(0), backend);
        net.answer(backend, 0);
    }

    fn a_flow_whose_tuple_was_taken_leaves_the_other_alone<F: Names>() {
        let mut first = Net::new::<F>(Proto::TCP);
        let backend = first.only(1);
        first.establish();
        first.send(Flags::RST);
        let second = Net { vip: (F::vip(2), 80), ..first };
        second.establish();
        let live = second.reply(backend).unwrap();
        // A late reset of the first flow, then a new connection on it.
        let first = Net { vip: (F::vip(1), 80), ..second };
        first.send(Flags::RST | ACK);
        assert_eq!(first.reply(backend), Some(live));
        assert_eq!(first.frame(SYN).leave(&first.fake), Err(DropReason::TupleCollision));
        assert_eq!(first.reply(backend), Some(live));
        let second = Net { vip: (F::vip(2), 80), ..first };
        second.answer(backend, ACK);
        assert_eq!(second.send(ACK), backend);
    }

    fn rule_36_a_full_table_is_told_and_leaves_nothing<F: Names>() {
        for room in 0..2 {
            let net = Net::new::<F>(Proto::TCP);
            net.fake.room.set(Some(room));
            assert_eq!(net.frame(SYN).leave(&net.fake), Err(DropReason::ConntrackInsert));
            assert!(net.fake.tracked().is_empty());
        }
        let net = Net::new::<F>(Proto::TCP);
        net.fake.room.set(Some(2));
        let backend = net.establish();
        net.answer(backend, ACK);
        let more = Net { client: (F::pod(1), 4001), ..net };
        assert_eq!(more.frame(SYN).leave(&more.fake), Err(DropReason::ConntrackInsert));
        let net = Net { client: (F::pod(1), 4000), ..more };
        assert_eq!(net.send(ACK), backend, "who is in stays in");
    }

    fn rule_35_a_server_may_open_to_a_former_client<F: Names>() {
        for close in [Flags::RST, ACK] {
            let net = Net::new::<F>(Proto::TCP);
            let server = net.establish();
            net.send(close);
            if close == ACK {
                net.fake.conntrack.borrow_mut().retain(|_, row| !row.load().is_forward());
            }
            for (frame, enters) in [
                (Frame::tcp(server, net.client, SYN), false),
                (Frame::tcp(net.client, server, SYN | ACK), false),
                (Frame::tcp(server, net.client, ACK).payload(b"data"), false),
                (Frame::tcp(server, net.client, ACK), true),
                (Frame::tcp(net.client, server, ACK), true),
            ] {
                let (_, bytes) =
                    if enters { frame.enter(&net.fake) } else { frame.leave(&net.fake) }.unwrap();
                assert_eq!(bytes, frame.build(), "rewritten as if it were the service's");
            }
        }
    }

    fn a_looped_flow_is_followed_both_ways<F: Names>() {
        for proto in [Proto::TCP, Proto::UDP] {
            let net = Net::single::<F>(proto);
            let pod: (Addr, u16) = (F::pod(2), 4000);
            let net = Net { client: pod, ..net };
            let frame = net.frame(SYN);
            let there = frame.clone().sent_from((net.vip.0, 4000)).sent_to((F::pod(2), 8080));
            for _ in 0..2 {
                let arrived = frame.leave(&net.fake);
                assert_eq!(arrived, Ok((Verdict::Pod { ifindex: 2 }, there.build())));
                let back = there.answer(SYN | ACK).leave(&net.fake);
                assert_eq!(back, Ok((Verdict::Pod { ifindex: 2 }, frame.answer(SYN | ACK).build())));
            }
            let entries = net.fake.tracked();
            assert_eq!(entries.len(), 2);
            assert!(entries.values().all(|entry| entry.is_looped() && entry.state == State::REPLIED));
            // The end of one is the end of both.
            if proto == Proto::TCP {
                assert!(net.frame(Flags::RST).leave(&net.fake).is_ok());
                assert!(net.fake.tracked().values().all(|entry| State(entry.state).closed()));
            }
        }
    }
}
