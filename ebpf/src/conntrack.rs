//! Flows through services, and those that policies were asked about: found by the tuple of either direction, kept while
//! they live.
//!
//! A flow is two entries. The forward one says what the client's packets become on their way to the backend, the reply
//! one what the backend's become on their way back. Each is refreshed by its own packets; what the other must know (a reply was seen,
//! a side closed, the flow still lives) is written to both, which happens a few times in a connection's life.

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::lb::Backend;
use ferroflow_common::abi::relay;
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::family::Family;
use ferroflow_common::hash;
use ferroflow_common::tcp::{Direction, Flags, State};
use ferroflow_common::verdict::DropReason;

use crate::nat::Rewrite;
use crate::packet::Packet;
use crate::parse::{self, Headers, Parse};
use crate::tables::{Aligned, InsertError, OnConflict, Services, Tables, Tracked};

type Key<F> = Aligned<Tuple<<F as Family>::Bytes>>;

/// What a packet's tuple leads to.
pub enum Flow<R = Rewrite> {
    /// What the packet becomes.
    Known(R),
    /// None, or one whose backend is to be chosen again.
    Unknown,
    /// The other direction's entry is gone: [`mend`] is to go before.
    Halved,
    /// Policies have changed since they were asked about it, and are to be asked again: see [`crate::judge`].
    Stale,
}

/// Whether a flow whose other direction is gone is to be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halves {
    Wanted,
    /// It has been; where it could not be entered, the flow goes on without.
    Mended,
}

/// Whether a flow about which policies are to be asked again is told from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epoch {
    Compared,
    /// They are asked elsewhere on the packet's way.
    Ignored,
}

/// How long a busy flow's other direction is not looked for, in seconds. The table evicts what was idle, so what has been
/// so for longer is looked at in both.
const UNSEEN: u32 = 60;

/// Looks the packet's flow up, brings its state up to date and says what the packet becomes.
#[inline(always)]
pub fn follow<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    halves: Halves,
    epoch: Epoch,
) -> Flow {
    match followed::<F, T>(tables, headers, halves, epoch) {
        Flow::Known(row) => Flow::Known(Rewrite::of(&row.load())),
        Flow::Unknown => Flow::Unknown,
        Flow::Halved => Flow::Halved,
        Flow::Stale => Flow::Stale,
    }
}

/// The same, with the row that says so.
#[inline(always)]
pub fn followed<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    halves: Halves,
    epoch: Epoch,
) -> Flow<T::Tracked> {
    let Some(tracked) = tables.tracked(&headers.tuple) else { return Flow::Unknown };
    let entry = tracked.load();
    let now = tables.now();
    if entry.expires < now {
        return Flow::Unknown;
    }
    let (direction, over) = if entry.kind == Entry::FORWARD {
        (Direction::Forward, chooses_again(tables, headers, &entry))
    } else {
        // A server that opens a connection from its service port to a former client's port: not a reply, and neither
        // is what follows (rule 35).
        (Direction::Reply, headers.flags.opens())
    };
    if !over && epoch == Epoch::Compared && entry.epoch != tables.epoch() {
        return Flow::Stale;
    }
    let alone = (entry.flags / Entry::RELAYS) & 1;
    let state = State(entry.state).after(headers.flags, direction).answered(alone, headers.flags);
    let lifetime = state.lifetime(headers.tuple.proto);
    let expires = now.wrapping_add(lifetime);
    let unseen = if lifetime / 8 < UNSEEN { lifetime / 8 } else { UNSEEN };
    // An opening packet that comes again may do so for want of the answer (rule 34).
    let unseen = if headers.flags.opens() { 0 } else { unseen };
    // A busy flow is written seldom, not at every packet; but then in both directions.
    let due = state.0 != entry.state || expires > entry.expires.saturating_add(unseen);
    if over || due {
        match other(tables, headers, &tracked.load()) {
            Other::Found(tuple, row) => {
                if over {
                    tables.untrack(&tuple);
                } else {
                    row.store_state(state.0, expires);
                }
            }
            // Of a flow that is relayed the other direction is on another node.
            Other::Gone if !over && halves == Halves::Wanted && alone == 0 => return Flow::Halved,
            Other::Gone | Other::AnotherFlows => {}
        }
        if over {
            tables.untrack(&headers.tuple);
            return Flow::Unknown;
        }
        tracked.store_state(state.0, expires);
    }
    Flow::Known(tracked)
}

/// Enters the other direction of the packet's flow again, as this one has it (rule 34): a reply without an entry would
/// reach the client as from a stranger, and be reset.
#[inline(always)]
pub fn mend<F: Parse, P: Packet, T: Tables<F>>(packet: &P, tables: &T) {
    let Ok(Some(headers)) = parse::headers::<F, P>(packet) else { return };
    let tuple = &headers.tuple;
    let Some(row) = tables.tracked(tuple) else { return };
    let mut entry = row.load();
    let other = partner::<F>(&entry, tuple.proto);
    entry.src = F::addr(tuple.dst);
    entry.dst = F::addr(tuple.src);
    entry.src_port = tuple.dst_port;
    entry.dst_port = tuple.src_port;
    entry.kind = if entry.kind == Entry::FORWARD { Entry::REPLY } else { Entry::FORWARD };
    let lasting = entry.flags & (Entry::PLAIN | Entry::MASQUERADED | Entry::EXEMPT);
    let relayed = Client(entry.flags & Entry::RELAYED).flags(entry.kind);
    entry.flags = if lasting != 0 { lasting } else { own_source(tables, &entry.src) | relayed };
    // Where the table has no room, or another flow has taken the tuple over, this direction goes on alone.
    let _alone = tables.track(&other, &entry, OnConflict::Fail);
}

/// Only a SYN (SCTP: an INIT) moves a connection, and only to where it is not a retransmission to a live backend (rules 30, 35). A UDP
/// flow moves as soon as its backend stopped serving (rule 31): that is what the generation is for.
#[inline(always)]
fn chooses_again<F: Family, T: Services>(tables: &T, headers: &Headers<F>, entry: &Entry) -> bool {
    if entry.flags & Entry::MASQUERADED != 0 {
        // There is no choice to be made again, and to the world it is to be the same connection for as long as it may be.
        headers.tuple.proto.connects() && headers.flags.opens() && State(entry.state).closed()
    } else if headers.tuple.proto.connects() {
        headers.flags.opens() && (entry.state != State::NEW.0 || gone(tables, entry))
    } else {
        gone(tables, entry)
    }
}

/// Whether the flow's backend has stopped serving.
#[inline(always)]
pub(crate) fn gone<T: Services>(tables: &T, entry: &Entry) -> bool {
    if entry.flags & Entry::PLAIN != 0 {
        return false;
    }
    tables.backend(entry.backend).is_none_or(|backend: Backend| backend.generation != entry.generation)
}

/// The other direction of a flow.
enum Other<F: Family, R> {
    Found(Key<F>, R),
    Gone,
    /// A flow of another frontend has taken its tuple over since.
    AnotherFlows,
}

#[inline(always)]
fn other<F: Family, T: Tables<F>>(tables: &T, headers: &Headers<F>, entry: &Entry) -> Other<F, T::Tracked> {
    let tuple = partner::<F>(entry, headers.tuple.proto);
    let Some(row) = tables.tracked(&tuple) else { return Other::Gone };
    if leads_to::<F>(&row.load(), &headers.tuple) { Other::Found(tuple, row) } else { Other::AnotherFlows }
}

/// The tuple of the same flow's other direction: what this direction's becomes, turned around.
#[inline(always)]
fn partner<F: Family>(entry: &Entry, proto: Proto) -> Aligned<Tuple<F::Bytes>> {
    Aligned(Tuple {
        src: F::bytes(&entry.dst),
        dst: F::bytes(&entry.src),
        src_port: entry.dst_port,
        dst_port: entry.src_port,
        proto,
        reserved: [0; 3],
    })
}

/// Whether `entry` is the other direction of the flow with this tuple.
#[inline(always)]
fn leads_to<F: Family>(entry: &Entry, tuple: &Tuple<F::Bytes>) -> bool {
    entry.src_port == tuple.dst_port
        && entry.dst_port == tuple.src_port
        && F::words(&F::bytes(&entry.src)) == F::words(&tuple.dst)
        && F::words(&F::bytes(&entry.dst)) == F::words(&tuple.src)
}

/// A backend that was chosen. One that was released since has a new generation, which would keep a flow there.
///
/// # Errors
/// [`DropReason::NoBackend`].
#[inline(always)]
pub(crate) fn serving<T: Services>(tables: &T, index: u32) -> Result<Backend, DropReason> {
    let backend = tables.backend(index).ok_or(DropReason::NoBackend)?;
    if backend.flags & Backend::LIVE == 0 { Err(DropReason::NoBackend) } else { Ok(backend) }
}

/// Tracks a new flow to the backend `index`. The backend sees the client's own address, or `masquerade` (rule 26).
///
/// A client that is its own backend is masqueraded by the frontend's address: a pod takes no packets from its own
/// (rule 26 b). Where two flows would share the tuple towards a backend (two frontends, one client port), the later one
/// is to be opened from another source port.
///
/// # Errors
/// [`DropReason::TupleCollision`] where the source port is not free, [`DropReason::ConntrackInsert`],
/// [`DropReason::NoBackend`].
#[inline(always)]
pub fn open<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    (index, source_port, client): (u32, SourcePort, Client),
    masquerade: Option<F::Bytes>,
    is_taken: impl Fn(&Aligned<Tuple<F::Bytes>>) -> bool,
) -> Result<(), DropReason> {
    let tuple = &headers.tuple;
    let backend = serving(tables, index)?;
    // The node takes nothing from its own address, and what its own processes answer passes it anyway.
    let masquerade = masquerade.filter(|_| tables.node_address(&backend.addr).is_none());
    let random = masquerade.is_some() || source_port == SourcePort::Random;
    let mut reply_tuple = Aligned(Tuple {
        src: F::bytes(&backend.addr),
        dst: masquerade.unwrap_or(tuple.src),
        src_port: backend.port,
        dst_port: if random { random_port(tables.random()) } else { tuple.src_port },
        proto: tuple.proto,
        reserved: [0; 3],
    });
    if F::words(&reply_tuple.src) == F::words(&tuple.src) {
        reply_tuple.0.dst = tuple.dst;
    }
    let frontend = F::addr(tuple.dst);
    let entry = Entry {
        src: frontend,
        dst: F::addr(tuple.src),
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        kind: Entry::REPLY,
        state: State::NEW.0,
        flags: own_source(tables, &frontend) | client.flags(Entry::REPLY),
        reserved: 0,
        epoch: tables.epoch(),
        backend: index,
        generation: backend.generation,
        expires: tables.now().wrapping_add(State::NEW.lifetime(tuple.proto)),
    };
    let masqueraded = masquerade.is_some();
    let flags = if masqueraded { Entry::OWN_SOURCE } else { 0 };
    let flags = flags | client.flags(Entry::FORWARD);
    enter(tables, headers, (reply_tuple, entry), flags, |tuple| masqueraded && is_taken(tuple))
}

/// Enters both directions of a new flow: the reply's, unless its tuple is another flow's or taken, and the packet's own,
/// which has these flags.
///
/// # Errors
/// [`DropReason::TupleCollision`], [`DropReason::ConntrackInsert`].
#[inline(always)]
pub fn enter<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    // The stack is short: one tuple and one entry, which are the reply's first and the forward one's then.
    (reply_tuple, mut entry): (Aligned<Tuple<F::Bytes>>, Entry),
    flags: u8,
    is_taken: impl Fn(&Aligned<Tuple<F::Bytes>>) -> bool,
) -> Result<(), DropReason> {
    claim(tables, headers, &reply_tuple, &entry, is_taken)?;
    entry.src = F::addr(reply_tuple.dst);
    entry.dst = F::addr(reply_tuple.src);
    entry.src_port = reply_tuple.dst_port;
    entry.dst_port = reply_tuple.src_port;
    entry.kind = Entry::FORWARD;
    entry.flags = flags;
    complete(tables, &headers.tuple, &entry, &reply_tuple)
}

/// Pins a new flow to the backend with this index on another node, which gets its packets as they are.
///
/// # Errors
/// [`DropReason::ConntrackInsert`].
#[inline(always)]
pub fn open_relay<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    (index, backend): (u32, &Backend),
) -> Result<(), DropReason> {
    let tuple = &headers.tuple;
    let entry = Entry {
        src: relay::stand_in(backend.node),
        dst: backend.addr,
        src_port: tuple.src_port,
        dst_port: backend.port,
        kind: Entry::FORWARD,
        state: State::NEW.0,
        flags: Entry::RELAYS,
        reserved: 0,
        epoch: tables.epoch(),
        backend: index,
        generation: backend.generation,
        expires: tables.now().wrapping_add(State::NEW.lifetime(tuple.proto)),
    };
    tables.track(tuple, &entry, OnConflict::Replace).map_err(|_refused| DropReason::ConntrackInsert)
}

/// Who opened a flow of which this packet is the first that is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opener {
    Sender,
    Receiver,
    /// The sender, which is a process of this node itself.
    Node,
}

/// Tracks a flow of no service as it is.
///
/// # Errors
/// [`DropReason::TupleCollision`] where its replies would be taken for those of a service flow,
/// [`DropReason::ConntrackInsert`].
#[inline(always)]
pub fn open_plain<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    opener: Opener,
) -> Result<(), DropReason> {
    let tuple = &headers.tuple;
    let (kind, other) = match opener {
        Opener::Sender | Opener::Node => (Entry::FORWARD, Entry::REPLY),
        Opener::Receiver => (Entry::REPLY, Entry::FORWARD),
    };
    let exempt = if opener == Opener::Node { Entry::EXEMPT } else { 0 };
    // As in `open`: one tuple and one entry, of the other direction first.
    let mut entry = Entry {
        src: F::addr(tuple.dst),
        dst: F::addr(tuple.src),
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        kind: other,
        state: State::NEW.0,
        flags: Entry::PLAIN | exempt,
        reserved: 0,
        epoch: tables.epoch(),
        backend: Entry::NO_BACKEND,
        generation: 0,
        expires: tables.now().wrapping_add(State::NEW.lifetime(tuple.proto)),
    };
    let turned = Aligned(F::turned(tuple));
    claim(tables, headers, &turned, &entry, |_| false)?;
    entry.src = F::addr(tuple.src);
    entry.dst = F::addr(tuple.dst);
    entry.src_port = tuple.src_port;
    entry.dst_port = tuple.dst_port;
    entry.kind = kind;
    complete(tables, tuple, &entry, &turned)
}

/// Enters the packet's own direction; where that fails, the other one is taken back.
#[inline(always)]
fn complete<F: Family, T: Tables<F>>(
    tables: &T,
    tuple: &Key<F>,
    entry: &Entry,
    other: &Key<F>,
) -> Result<(), DropReason> {
    if tables.track(tuple, entry, OnConflict::Replace).is_err() {
        tables.untrack(other);
        return Err(DropReason::ConntrackInsert);
    }
    Ok(())
}

#[inline(always)]
fn own_source<T: Services>(tables: &T, addr: &Addr) -> u8 {
    if tables.node_address(addr).is_some() { Entry::OWN_SOURCE } else { 0 }
}

/// Enters the reply's tuple, unless it is another flow's or taken. One try: the programs' verifier would follow every
/// further one as if it were code of its own, so it is the caller that tries again.
#[inline(always)]
fn claim<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    reply_tuple: &Aligned<Tuple<F::Bytes>>,
    reply: &Entry,
    is_taken: impl Fn(&Aligned<Tuple<F::Bytes>>) -> bool,
) -> Result<(), DropReason> {
    if is_taken(reply_tuple) {
        return Err(DropReason::TupleCollision);
    }
    let mut entered = tables.track(reply_tuple, reply, OnConflict::Fail);
    if entered == Err(InsertError::Exists) && replaceable(tables, headers, reply_tuple) {
        entered = tables.track(reply_tuple, reply, OnConflict::Replace);
    }
    match entered {
        Ok(()) => Ok(()),
        Err(InsertError::Refused) => Err(DropReason::ConntrackInsert),
        Err(InsertError::Exists) => Err(DropReason::TupleCollision),
    }
}

/// How often a flow that needs no other source port is entered (rule 36). An insert into an LRU table fails for a moment
/// where the lock of the tuple's bucket is not to be had (`-EBUSY` before kernel commit 2775da216287, `-EDEADLK` and
/// `-ETIMEDOUT` since these locks are rqspinlocks), and where no entry can be evicted because of that (`-ENOMEM`).
pub const INSERT_TRIES: u32 = 3;

/// How many source ports a new flow tries: with half of a backend's ports taken all fail once in 256 times.
pub const PORT_TRIES: u32 = 8;

/// How a client's packets come. A number, so that the verifier follows no ways of its own for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Client(u8);

impl Client {
    pub const DIRECT: Self = Self(0);
    /// By another node, which relays them.
    pub const RELAYED: Self = Self(Entry::RELAYED);

    /// What a direction of the flow has for it. What goes to a client of another node leaves past the stack.
    #[inline(always)]
    const fn flags(self, kind: u8) -> u8 {
        let to_client = (kind / Entry::REPLY) & 1;
        let past_stack = (self.0 / Entry::RELAYED) * to_client * Entry::OWN_SOURCE;
        self.0 | past_stack
    }
}

/// A new flow's source port towards its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourcePort {
    /// The client's, unless it is masqueraded.
    Kept,
    Random,
}

/// A source port that no socket chooses by itself: below `net.ipv4.ip_local_port_range`, and below NodePorts. Random
/// throughout (rule 27), so that two CPUs seldom want the same.
#[inline(always)]
pub(crate) const fn random_port(random: u32) -> Port {
    Port::new(FIRST_PORT + hash::slot(random, PORTS) as u16)
}

const FIRST_PORT: u16 = 1024;
const LAST_PORT: u16 = 29_999;
const PORTS: u32 = (LAST_PORT - FIRST_PORT) as u32 + 1;

/// A random number that gives this port, for tests; `None` where none does.
#[cfg(not(target_arch = "bpf"))]
pub fn throw_for(port: Port) -> Option<u32> {
    let slot = u64::from(port.host().checked_sub(FIRST_PORT)?);
    u32::try_from((slot << 32).div_ceil(u64::from(PORTS))).ok()
}

/// Whether the reply entry under `tuple` is this flow's own from before, or of a flow that is over.
#[inline(always)]
fn replaceable<F: Family, T: Tables<F>>(
    tables: &T,
    headers: &Headers<F>,
    tuple: &Aligned<Tuple<F::Bytes>>,
) -> bool {
    let Some(row) = tables.tracked(tuple) else { return true };
    let entry = row.load();
    leads_to::<F>(&entry, &headers.tuple)
        || entry.expires < tables.now()
        || (headers.tuple.proto.connects() && State(entry.state).closed())
}

/// Whether the flow's first packet may be answered by a refusal.
#[inline(always)]
pub const fn refusable(flags: Flags) -> bool {
    flags.0 & Flags::RST == 0
}

#[cfg(test)]
mod tests {
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
        rule_27_a_tuple_of_two_frontends_gets_another_source_port,
        source_ports_run_out,
        a_tuple_is_taken_over_when_its_flow_is_over,
        a_flow_whose_tuple_was_taken_leaves_the_other_alone,
        rule_36_a_full_table_is_told_and_leaves_nothing,
        rule_36_an_insert_that_fails_for_a_moment_loses_nothing,
        rule_35_a_server_may_open_to_a_former_client,
        a_looped_flow_is_followed_both_ways,
        rule_34_a_request_mends_its_missing_reply_direction,
        rule_34_a_reply_mends_its_missing_request_direction,
        rule_34_what_cannot_be_mended_goes_on_alone,
        rule_34_a_backend_contacted_by_its_own_address_is_left_alone,
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
            let step = (lifetime / 240).clamp(1, 5);
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
            assert!((2..=2 * 22).contains(&writes), "{writes} writes for {sent} packets");
        }
    }

    fn rule_27_a_tuple_of_two_frontends_gets_another_source_port<F: Names>() {
        for proto in [Proto::TCP, Proto::UDP] {
            let mut net = Net::new::<F>(proto);
            let backend = net.only(1);
            let first = net.frame(SYN);
            assert_eq!(net.send(SYN), backend);
            let second = Net { vip: (F::vip(2), 80), ..net };
            let mut ports = Vec::new();
            for frame in [second.frame(SYN), second.frame(ACK)] {
                let (_, bytes) = frame.leave(&second.fake).unwrap();
                let entry = second.forward().unwrap();
                let there = frame.clone().sent_from((entry.src, entry.src_port.host())).sent_to(backend);
                assert_eq!(bytes, there.build());
                let (_, bytes) = there.answer(SYN | ACK).leave(&second.fake).unwrap();
                assert_eq!(bytes, frame.answer(SYN | ACK).build(), "the client sees its own port");
                ports.push(there.src_port);
            }
            assert!((1024..30_000).contains(&ports[0]) && ports[0] == ports[1], "{ports:?}");
            // The first flow goes on.
            let there = first.clone().sent_to(backend);
            assert_eq!(there.answer(ACK).leave(&second.fake).unwrap().1, first.answer(ACK).build());
        }
    }

    fn source_ports_run_out<F: Names>() {
        let mut net = Net::new::<F>(Proto::TCP);
        let backend = net.only(1);
        net.fake.service(F::vip(3), 80, Proto::TCP, &[backend]);
        net.fake.dice.set(Some(7));
        let second = Net { vip: (F::vip(2), 80), ..net };
        assert!(second.frame(SYN).leave(&second.fake).is_ok());
        let first = Net { vip: (F::vip(1), 80), ..second };
        assert!(first.frame(SYN).leave(&first.fake).is_ok());
        let before = first.fake.tracked();
        assert_eq!(before.len(), 4);
        let third = Net { vip: (F::vip(3), 80), ..first };
        assert_eq!(third.frame(SYN).leave(&third.fake), Err(DropReason::TupleCollision));
        assert_eq!(third.fake.tracked(), before);
    }

    fn a_tuple_is_taken_over_when_its_flow_is_over<F: Names>() {
        // Expired, closed by a reset, or the client's own earlier flow whose forward entry is gone.
        type End = fn(&Net);
        let over: [(Proto, End); 3] = [
            (Proto::UDP, |net| net.wait(31)),
            (Proto::TCP, |net| net.wait(61)),
            (Proto::TCP, |net| {
                net.send(Flags::RST);
            }),
        ];
        for (proto, end) in over {
            let mut net = Net::new::<F>(proto);
            let backend = net.only(1);
            net.send(SYN);
            end(&net);
            let second = Net { vip: (F::vip(2), 80), ..net };
            assert_eq!(second.send(SYN), backend);
            second.answer(backend, SYN | ACK);
        }
        let net = Net::single::<F>(Proto::UDP);
        let backend = net.send(0);
        net.fake.conntrack.borrow_mut().retain(|_, row| row.load().kind != Entry::FORWARD);
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
        assert!(first.frame(SYN).leave(&first.fake).is_ok());
        assert_eq!(first.reply(backend), Some(live));
        let second = Net { vip: (F::vip(2), 80), ..first };
        second.answer(backend, ACK);
        assert_eq!(second.send(ACK), backend);
    }

    fn rule_36_an_insert_that_fails_for_a_moment_loses_nothing<F: Names>() {
        for refusals in 0..PORT_TRIES {
            let net = Net::new::<F>(Proto::TCP);
            net.fake.refusals.set(refusals);
            let backend = net.send(SYN);
            net.answer(backend, SYN | ACK);
            assert_eq!((net.send(ACK), net.fake.tracked().len()), (backend, 2), "{refusals} refusals");
        }
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
            // Also where the other half of the former flow is gone already.
            if close == ACK {
                net.fake.conntrack.borrow_mut().retain(|_, row| row.load().kind != Entry::FORWARD);
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
            assert!(entries.values().all(|entry| entry.state == State::REPLIED));
            // The end of one is the end of both.
            if proto == Proto::TCP {
                assert!(net.frame(Flags::RST).leave(&net.fake).is_ok());
                assert!(net.fake.tracked().values().all(|entry| State(entry.state).closed()));
            }
        }
    }

    #[test]
    fn every_source_port_has_its_throw() {
        for port in (FIRST_PORT..=LAST_PORT).map(Port::new) {
            assert_eq!(random_port(throw_for(port).unwrap()), port);
        }
        assert_eq!([0, LAST_PORT + 1, u16::MAX].map(|port| throw_for(Port::new(port))), [None; 3]);
    }

    /// Takes one direction away, as the table does under pressure.
    fn evict(net: &Net, src: Socket, dst: Socket) -> Entry {
        let entry = net.fake.entry(src, dst, net.proto).unwrap();
        net.fake.conntrack.borrow_mut().retain(|_, row| row.entry.get() != entry);
        assert!(net.fake.entry(src, dst, net.proto).is_none());
        entry
    }

    fn rule_34_a_request_mends_its_missing_reply_direction<F: Names>() {
        for proto in [Proto::TCP, Proto::UDP] {
            let net = Net::new::<F>(proto);
            let backend = net.establish();
            net.wait(UNSEEN + 1);
            let gone = evict(&net, backend, net.client);
            assert_eq!(net.send(ACK), backend);
            let mended = net.reply(backend).unwrap();
            assert_eq!(Entry { expires: 0, ..mended }, Entry { expires: 0, ..gone });
            net.answer(backend, ACK);
        }
        // A client that had no answer sends its first packet again, at once.
        let net = Net::new::<F>(Proto::TCP);
        let backend = net.send(SYN);
        evict(&net, backend, net.client);
        net.wait(1);
        assert_eq!(net.send(SYN), backend);
        net.answer(backend, SYN | ACK);
    }

    fn rule_34_a_reply_mends_its_missing_request_direction<F: Names>() {
        for proto in [Proto::TCP, Proto::UDP] {
            let mut net = Net::new::<F>(proto);
            let backend = net.establish();
            net.wait(UNSEEN + 1);
            let gone = evict(&net, net.client, net.vip);
            net.answer(backend, ACK);
            assert_eq!(Entry { expires: 0, ..net.forward().unwrap() }, Entry { expires: 0, ..gone });
            // So the connection stays where it is, whatever the slots say now.
            net.other_than(backend);
            assert_eq!(net.send(ACK), backend);
        }
    }

    fn rule_34_what_cannot_be_mended_goes_on_alone<F: Names>() {
        let net = Net::new::<F>(Proto::TCP);
        let backend = net.establish();
        net.wait(UNSEEN + 1);
        evict(&net, backend, net.client);
        net.fake.room.set(Some(1));
        assert_eq!(net.send(ACK), backend);
        assert!(net.reply(backend).is_none());
    }

    /// Nothing tells such a packet from one whose flow was forgotten: it is not dropped.
    fn rule_34_a_backend_contacted_by_its_own_address_is_left_alone<F: Names>() {
        let net = Net::new::<F>(Proto::TCP);
        let backend = net.establish();
        let direct = Frame::tcp((net.client.0, 4001), backend, SYN);
        for frame in [direct.clone(), direct.answer(SYN | ACK), direct.answer(ACK), direct.answer(FIN)] {
            assert_eq!(frame.leave(&net.fake).unwrap().1, frame.build());
        }
    }
}
