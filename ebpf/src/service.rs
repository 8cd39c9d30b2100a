//! The first packet of a flow to a service.

use ferroflow_common::abi::lb::{Frontend, FrontendKey, ServiceClient};
use ferroflow_common::abi::node::Settings;
use ferroflow_common::abi::relay::NodeNumber;
use ferroflow_common::addr::Proto;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack::{self, Client, Halves, Opener, PORT_TRIES, SourcePort};
use crate::fragment::Part;
use crate::icmp::{Errors, Quote};
use crate::judge;
use crate::lb;
use crate::masquerade::{self, Exits};
use crate::packet::{Packet, Reshape};
use crate::parse::{self, Headers, Parse};
use crate::reject::{self, Answer};
use crate::relay;
use crate::shadow;
use crate::source;
use crate::steps::Steps;
use crate::tables::{Services, Tables};

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Origin {
    /// A pod of this node.
    Pod,
    Outside,
    /// The node's stack, which has routed it into the tunnel: it opens no flow, and goes on where it goes.
    Node,
    /// The same, which hands it to a pod; it came to the node by another interface.
    Inward,
    /// The same, from the node's own processes.
    Own,
    /// The same, which sends it out of one of the node's own devices: a pod's packet to the world opens a flow.
    Exit,
    /// Another node, by the tunnel, which carries what pods and nodes say to pods.
    Tunnel = 8,
    /// The same, which got it from outside and relays it as it came: see [`crate::relay`]. One bit more than
    /// [`Origin::Tunnel`]: where it is one of the two, the compiler sees that it is none of the others.
    Relay = 9,
}

impl Origin {
    /// The origin with this number; the node where there is none.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Pod,
            1 => Self::Outside,
            3 => Self::Inward,
            4 => Self::Own,
            5 => Self::Exit,
            8 => Self::Tunnel,
            9 => Self::Relay,
            _ => Self::Node,
        }
    }

    /// The node's stack has routed it: it goes on where it goes.
    #[inline(always)]
    pub const fn is_routed(self) -> bool {
        matches!(self, Self::Node | Self::Inward | Self::Own | Self::Exit)
    }

    /// It is at a pod's interface, where policies are asked.
    #[inline(always)]
    pub const fn is_at_pod(self) -> bool {
        matches!(self, Self::Pod | Self::Inward | Self::Own)
    }
}

/// How a step takes a packet. A number, so that the verifier can forget it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Way(pub u32);

impl Way {
    /// As it comes.
    pub const USUAL: Self = Self(0);
    /// After [`conntrack::mend`].
    pub const MENDED: Self = Self(1);
    /// A first fragment, as if it were whole.
    pub const FIRST_FRAGMENT: Self = Self(2);

    #[inline(always)]
    pub fn halves(self) -> Halves {
        if self == Self::USUAL { Halves::Wanted } else { Halves::Mended }
    }

    /// Once more, after another step has done what there was to be done.
    #[inline(always)]
    const fn settled(self) -> Self {
        if self.0 == Self::USUAL.0 { Self::MENDED } else { self }
    }
}

/// What becomes of a packet.
pub enum Fate {
    Goes(Verdict),
    /// There is a step to come.
    Unfinished,
}

/// A step's outcome in one register, every bit of it said. Left to itself the compiler packs an enum into a register
/// and leaves what a variant does not use to chance, which may be a pointer, and the verifier refuses to compute with
/// that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Outcome(pub u64);

const STACK: u32 = 0;
const FORWARD: u32 = 1;
const REPLY: u32 = 2;
const POD: u32 = 3;
const OPENS: u32 = 4;
const DROPPED: u32 = 5;
const RARE: u32 = 6;
const TAKEN: u32 = 7;
const HALVED: u32 = 8;
const REFUSED: u32 = 9;
const TRACKED: u32 = 10;
const GUARDED: u32 = 11;
/// With the reason why the packet may not open a flow.
const TURNED: u32 = 12;
/// With an [`Opener`]'s number.
const ADMITTED: u32 = 13;
const PORTLESS: u32 = 14;
const STALE: u32 = 15;
/// With the node's number.
const RELAY: u32 = 16;
/// Of what was admitted: a process of this node sent it.
const NODES: u32 = 2;
/// With a backend's index, and any of the bits below.
const CHOSEN: u32 = 32;
/// The backend is to see the node's address instead of the client's.
const MASQUERADED: u32 = 1;
/// The backend counts its connections.
const COUNTED: u32 = 2;
/// The client talks to the backend through a service, too: see [`crate::shadow`].
const SHADOWING: u32 = 4;
/// The client's own source port is another flow's.
const ELSEWHERE: u32 = 8;
/// Where the backend is on another node, that one gets the packets as they are.
const RELAYS: u32 = 16;
/// Another node relays the client's packets.
const RELAYED: u32 = 64;

impl Outcome {
    pub(crate) const STACK: Self = Self::new(STACK, 0);
    pub(crate) const FORWARD: Self = Self::new(FORWARD, 0);
    pub(crate) const OPENS: Self = Self::new(OPENS, 0);
    pub(crate) const RARE: Self = Self::new(RARE, 0);
    pub(crate) const HALVED: Self = Self::new(HALVED, 0);
    /// No endpoint: the packet is to be turned into its own refusal.
    pub(crate) const REFUSED: Self = Self::new(REFUSED, 0);
    /// The packet's flow is known now.
    pub(crate) const TRACKED: Self = Self::new(TRACKED, 0);
    /// Of no flow that is known and of no service; policies are to be asked.
    pub(crate) const GUARDED: Self = Self::new(GUARDED, 0);
    /// Of a flow that policies are to be asked about again.
    pub(crate) const STALE: Self = Self::new(STALE, 0);
    /// It has no ports.
    pub(crate) const PORTLESS: Self = Self::new(PORTLESS, 0);

    /// As it is, to another node.
    #[inline(always)]
    pub(crate) const fn relay(node: NodeNumber) -> Self {
        Self::new(RELAY, node)
    }

    /// The node that the packet goes to as it is.
    #[inline(always)]
    pub(crate) const fn node(self) -> Option<NodeNumber> {
        if (self.0 >> 32) as u32 == RELAY { Some(self.0 as u32) } else { None }
    }

    /// A packet that may not open a flow, but may be the answer of one.
    #[inline(always)]
    pub(crate) const fn turned(reason: DropReason) -> Self {
        Self::new(TURNED, reason as u32)
    }

    #[inline(always)]
    pub(crate) const fn is_turned(self) -> bool {
        (self.0 >> 32) as u32 == TURNED
    }

    /// Why a packet is dropped that is no answer either; where it was not asked about before, this reason.
    #[inline(always)]
    pub(crate) const fn reason_or(self, reason: DropReason) -> DropReason {
        if self.is_turned() { DropReason::from_number(self.0 as u32) } else { reason }
    }

    /// What was judged, let through: a choice stays that, and the flow of what was asked about again is known.
    #[inline(always)]
    pub(crate) const fn admitted(self) -> Self {
        if self.is_chosen() {
            self
        } else if self.0 == Self::STALE.0 {
            Self::TRACKED
        } else {
            Self::new(ADMITTED, self.is_turned() as u32)
        }
    }

    /// The same for what no policy has a say in.
    #[inline(always)]
    pub(crate) const fn exempt(self) -> Self {
        if self.is_chosen() { self } else { Self::new(ADMITTED, NODES) }
    }

    #[inline(always)]
    pub(crate) const fn is_admitted(self) -> bool {
        (self.0 >> 32) as u32 == ADMITTED
    }

    /// Who opened the flow that was admitted.
    #[inline(always)]
    pub(crate) const fn opener(self) -> Opener {
        match self.0 as u32 {
            0 => Opener::Sender,
            NODES => Opener::Node,
            _ => Opener::Receiver,
        }
    }

    /// The index of the backend that was chosen.
    #[inline(always)]
    pub(crate) const fn backend(self) -> u32 {
        self.0 as u32
    }

    /// What [`track`] takes: the backend with this index, for a client whose packets another node relays.
    #[inline(always)]
    pub(crate) const fn relayed(index: u32, flags: u32) -> Self {
        let counted = if flags & Frontend::LEAST_CONNECTION != 0 { COUNTED } else { 0 };
        Self::new(CHOSEN | RELAYED | counted, index)
    }

    /// Whether the backend that was chosen gets packets as they are, where it is on another node: see [`crate::relay::begin`].
    #[inline(always)]
    const fn may_relay(self) -> bool {
        let bits = CHOSEN | RELAYS;
        (self.0 >> 32) as u32 & bits == bits
    }

    /// The choice of a backend of this node, which sees the client.
    #[inline(always)]
    pub(crate) const fn unmasqueraded(self) -> Self {
        Self(self.0 & !((MASQUERADED as u64) << 32))
    }

    /// Whether the backend that was chosen counts its connections.
    #[inline(always)]
    pub(crate) const fn is_counted(self) -> bool {
        (self.0 >> 32) as u32 & COUNTED != 0
    }

    /// What [`track`] takes: the backend with this index, to which the client talks through a service, too.
    #[inline(always)]
    pub(crate) const fn shadowing(index: u32) -> Self {
        Self::new(CHOSEN | SHADOWING, index)
    }

    #[inline(always)]
    const fn new(kind: u32, number: u32) -> Self {
        Self((kind as u64) << 32 | number as u64)
    }

    #[inline(always)]
    pub fn goes(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Stack => Self::STACK,
            Verdict::Forward => Self::FORWARD,
            Verdict::Reply => Self::new(REPLY, 0),
            Verdict::Pod { ifindex } => Self::new(POD, ifindex),
            Verdict::Taken => Self::new(TAKEN, 0),
            Verdict::Relay { node } => Self::relay(node),
        }
    }

    /// Each way out of a step says its outcome where it ends: what a variant of an enum leaves out would be undefined
    /// where the ways meet.
    #[inline(always)]
    pub fn of(result: Result<Self, DropReason>) -> Self {
        match result {
            Ok(outcome) => outcome,
            Err(reason) => Self::new(DROPPED, reason as u32),
        }
    }

    /// The same, of which the verifier forgets what it knew.
    #[inline(always)]
    pub(crate) fn forgotten<P: Packet>(self, packet: &P) -> Self {
        Self::new(packet.forget((self.0 >> 32) as u32), packet.forget(self.0 as u32))
    }

    /// A first fragment that is no whole packet either has no ports.
    #[inline(always)]
    fn or_portless(self) -> Self {
        if self == Self::RARE { Self::PORTLESS } else { self }
    }

    #[inline(always)]
    pub(crate) const fn is_chosen(self) -> bool {
        (self.0 >> 32) as u32 & CHOSEN != 0
    }

    /// A choice, to be tracked from another source port.
    #[inline(always)]
    const fn elsewhere(self) -> Self {
        Self(self.0 | (ELSEWHERE as u64) << 32)
    }

    /// The backend that was chosen serves no more, as was found before its flow was tracked, or after.
    #[inline(always)]
    fn has_lost_backend(self) -> bool {
        self == Self::new(DROPPED, DropReason::NoBackend as u32) || self == Self::OPENS
    }

    /// The source port that was tried is not free.
    #[inline(always)]
    fn is_collision(self) -> bool {
        self == Self::new(DROPPED, DropReason::TupleCollision as u32)
    }

    /// The connection table took no entry, for the moment: see [`INSERT_TRIES`](conntrack::INSERT_TRIES).
    #[inline(always)]
    pub(crate) fn is_refused_entry(self) -> bool {
        self == Self::new(DROPPED, DropReason::ConntrackInsert as u32)
    }

    /// To a pod of this node, or out of it, without the node's stack.
    #[inline(always)]
    pub(crate) const fn is_past_the_stack(self) -> bool {
        let kind = (self.0 >> 32) as u32;
        kind == POD || kind == FORWARD
    }

    #[inline(always)]
    pub(crate) const fn is_dropped(self) -> bool {
        (self.0 >> 32) as u32 == DROPPED
    }

    /// # Errors
    /// Why the packet is dropped.
    #[inline(always)]
    pub fn fate(self) -> Result<Fate, DropReason> {
        let number = self.0 as u32;
        match (self.0 >> 32) as u32 {
            STACK => Ok(Fate::Goes(Verdict::Stack)),
            FORWARD => Ok(Fate::Goes(Verdict::Forward)),
            REPLY => Ok(Fate::Goes(Verdict::Reply)),
            POD => Ok(Fate::Goes(Verdict::Pod { ifindex: number })),
            TAKEN => Ok(Fate::Goes(Verdict::Taken)),
            RELAY => Ok(Fate::Goes(Verdict::Relay { node: number })),
            OPENS | RARE | HALVED | REFUSED | TRACKED | GUARDED | TURNED | ADMITTED | PORTLESS | STALE => {
                Ok(Fate::Unfinished)
            }
            _ => Err(DropReason::from_number(number)),
        }
    }
}

/// One step after the other, not one inside the other: each has the 512 bytes of stack that a chain of calls may use
/// nearly to itself. A step reads the headers again, and the first packet of a flow takes the way of the second,
/// [`Steps::known`], once its flow is tracked; which only that packet pays.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn in_steps<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Result<Verdict, DropReason>
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    if origin == Origin::Pod {
        source::check::<F, P, T>(packet, tables)?;
    }
    let mut way = Way::USUAL;
    let mut outcome = tables.known(packet, origin, way);
    if outcome == Outcome::HALVED {
        tables.mend(packet);
        outcome = tables.known(packet, origin, Way::MENDED);
    } else if outcome == Outcome::RARE {
        outcome = rare::<F, P, T>(packet, tables, origin);
        if outcome == Outcome::RARE {
            way = Way::FIRST_FRAGMENT;
            outcome = tables.known(packet, origin, way).or_portless();
        }
        if outcome == Outcome::PORTLESS {
            outcome = without_ports::<F, P, T>(packet, tables, origin);
        }
    }
    let way = Way(packet.forget(way.0));
    outcome = settle::<F, P, T>(packet, tables, outcome, (origin, way));
    if outcome.has_lost_backend() {
        // It stopped serving between two looks at the tables, which name another by now.
        outcome = tables.known(packet, origin, way.settled());
        outcome = settle::<F, P, T>(packet, tables, outcome, (origin, way));
    }
    if outcome == Outcome::REFUSED {
        outcome = tables.refuse(packet);
    } else if way == Way::FIRST_FRAGMENT && !outcome.is_dropped() {
        tables.remember_fragment(packet, outcome, origin);
    }
    match outcome.fate()? {
        Fate::Goes(verdict) => Ok(verdict),
        // Another flow took the place of the one that was tracked a moment ago.
        Fate::Unfinished => Err(DropReason::ConntrackInsert),
    }
}

/// Opens the flow of a packet that may, as far as policies let it, and says what then is known.
#[inline(always)]
fn settle<F, P, T>(packet: &mut P, tables: &T, known: Outcome, (origin, way): (Origin, Way)) -> Outcome
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    let mut outcome = known;
    if outcome == Outcome::OPENS {
        outcome = tables.choose(packet, origin);
    }
    if outcome == Outcome::STALE || outcome.is_chosen() && judge::is_in_session(tables) {
        outcome = tables.judge(packet, outcome, origin);
    } else if origin.is_at_pod() && outcome == Outcome::GUARDED {
        outcome = judge::admit::<F, P, T>(packet, tables, origin);
    }
    if outcome.is_chosen() {
        let mut chosen = outcome;
        for _ in 0..PORT_TRIES {
            outcome = tables.track_flow(packet, chosen);
            if outcome.is_collision() {
                chosen = chosen.elsewhere();
            } else if !outcome.is_refused_entry() {
                break;
            }
        }
    }
    if outcome == Outcome::TRACKED { tables.known(packet, origin, way.settled()) } else { outcome }
}

/// The same for a packet that opens no flow of a service, because the node's stack has routed it. A pod's to the world
/// opens one.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn routed<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Result<Verdict, DropReason>
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    let mut way = Way::USUAL;
    let mut outcome = tables.known(packet, origin, way);
    if outcome == Outcome::HALVED {
        tables.mend(packet);
        outcome = tables.known(packet, origin, Way::MENDED);
    } else if outcome == Outcome::RARE {
        outcome = rare::<F, P, T>(packet, tables, origin);
        if outcome == Outcome::RARE {
            way = Way::FIRST_FRAGMENT;
            outcome = tables.known(packet, origin, way).or_portless();
        }
        if outcome == Outcome::PORTLESS {
            outcome = without_ports::<F, P, T>(packet, tables, origin);
        }
    }
    let way = Way(packet.forget(way.0));
    if origin.is_at_pod() && outcome == Outcome::GUARDED {
        outcome = judge::admit::<F, P, T>(packet, tables, origin);
    } else if origin.is_at_pod() && outcome == Outcome::STALE {
        outcome = tables.judge(packet, outcome, origin);
        if outcome == Outcome::TRACKED {
            outcome = tables.known(packet, origin, way.settled());
        }
    }
    if origin == Origin::Exit && outcome == Outcome::OPENS && masquerade::leads_out::<F, P, T>(packet, tables)
    {
        for _ in 0..PORT_TRIES {
            outcome = tables.masquerade_flow(packet);
            if !outcome.is_collision() && !outcome.is_refused_entry() {
                break;
            }
        }
        if outcome == Outcome::TRACKED {
            outcome = tables.known(packet, origin, Way::FIRST_FRAGMENT);
        }
        if outcome == Outcome::RARE {
            outcome = tables.known_echo(packet, origin);
        }
    }
    if way == Way::FIRST_FRAGMENT {
        tables.remember_fragment(packet, outcome, origin);
    }
    match outcome.fate()? {
        Fate::Goes(verdict) => Ok(verdict),
        Fate::Unfinished => Ok(Verdict::Stack),
    }
}

/// A packet without ports: policies have a say in it at a pod's interface, and an echo may be masqueraded where it leaves
/// the node and comes back.
#[inline(always)]
fn without_ports<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Outcome
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    if origin.is_at_pod() {
        return judge::admit_portless::<F, P, T>(packet, tables, origin);
    }
    // What was masqueraded left by another device.
    if matches!(origin, Origin::Tunnel | Origin::Relay) {
        let strays = origin == Origin::Relay;
        return if strays { Outcome::of(Err(DropReason::AstrayRelay)) } else { Outcome::STACK };
    }
    if origin != Origin::Node && tables.masquerades() {
        tables.known_echo(packet, origin)
    } else {
        Outcome::STACK
    }
}

/// What few packets need. [`Outcome::RARE`] where that is to go the way of a whole packet now, as the first fragment that it
/// is.
#[inline(always)]
fn rare<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Outcome
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    let quote = tables.find_error(packet);
    if quote != Quote::NONE {
        return error::<F, P, T>(packet, tables, quote, origin);
    }
    fragments::<F, P, T>(packet, tables, origin)
}

/// A fragment, or a packet without ports.
#[inline(always)]
fn fragments<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Outcome
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    let part = tables.find_fragment(packet);
    if part == Part::NONE {
        return Outcome::PORTLESS;
    }
    if part.is_first() {
        let outcome = tables.first_fragment(packet, part, origin);
        // It has become one that waited for it.
        if outcome != Outcome::STACK {
            return outcome;
        }
    }
    tables.later_fragment(packet, part, origin)
}

#[inline(always)]
fn error<F, P, T>(packet: &mut P, tables: &T, quote: Quote, origin: Origin) -> Outcome
where
    F: Answer + Errors,
    P: Reshape,
    T: Steps<F, P>,
{
    let outcome = tables.deliver_error(packet, quote, origin);
    match outcome.fate() {
        // As it is.
        Ok(Fate::Goes(Verdict::Relay { .. })) => outcome,
        Ok(Fate::Goes(_)) => {
            let changes = tables.requote_error(packet, quote);
            let mended = tables.mend_error(packet, quote, changes);
            if mended.is_dropped() { mended } else { outcome }
        }
        Ok(Fate::Unfinished) if outcome == Outcome::TRACKED => Outcome::STACK,
        Ok(Fate::Unfinished) => Outcome::PORTLESS,
        Err(_) => outcome,
    }
}

/// Whether rules of kube-proxy may know a packet that we do not.
#[inline(always)]
pub fn migrating<T: Services>(tables: &T) -> bool {
    tables.settings() & Settings::MIGRATING != 0
}

/// Whether a packet of no known flow is for kube-proxy's rules: a connection in its middle has its backend there.
#[inline(always)]
pub fn is_kernels<F: Family, T: Tables<F>>(tables: &T, headers: &Headers<F>) -> bool {
    headers.tuple.proto == Proto::TCP && !headers.flags.opens() && migrating(tables)
}

/// A packet that is for no service and for no pod of this node. The key is its own, or a NodePort's.
///
/// # Errors
/// [`DropReason::UnallocatedAddress`] (rule 19).
#[inline(always)]
pub fn stray<T: Services>(tables: &T, key: &mut FrontendKey) -> Result<Outcome, DropReason> {
    // An address of the node itself stays the node's, whatever the ranges say.
    if !tables.is_service_address(&key.addr) || tables.node_address(&key.addr).is_some() {
        return Ok(Outcome::STACK);
    }
    *key = FrontendKey::cluster_ip(key.addr);
    if lb::is_service(tables.frontend(key)) {
        Ok(Outcome::REFUSED)
    } else {
        Err(DropReason::UnallocatedAddress)
    }
}

/// Chooses a backend: an outcome that [`track`] takes, or [`Outcome::REFUSED`] where there is none.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn choose<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Result<Outcome, DropReason>
where
    F: Parse,
    P: Packet,
    T: Tables<F> + Exits<P>,
{
    let headers = parse::headers::<F, P>(packet)?.ok_or(DropReason::Truncated)?;
    let tuple = &headers.tuple;
    let mut key = lb::key::<F>(tuple);
    let mut frontend = match tables.frontend(&key) {
        Some(frontend) => frontend,
        None => lb::node_port(tables, &mut key).ok_or(DropReason::NoBackend)?,
    };
    if origin != Origin::Outside {
        frontend = lb::internal(tables, frontend, &mut key);
    }
    let (client, now) = (F::addr(tuple.src), tables.now());
    if frontend.flags & Frontend::SOURCE_RANGES != 0
        && !tables.allows(&ServiceClient { service: frontend.service, addr: client })
    {
        return Err(DropReason::SourceRange);
    }
    let hash = || lb::flow_hash::<F>(tuple);
    let Some(index) = lb::kept_or_chosen(tables, &frontend, client, now, hash)? else {
        return Ok(Outcome::REFUSED);
    };
    // At once where the backend is out in the world: one flow, and not one inside of the other.
    let stands_in = masquerades(tables, &frontend, origin)
        || (origin == Origin::Pod
            && tables.masquerades()
            && tables.backend(index).is_some_and(|backend| !tables.keeps_source(&backend.addr)));
    let masqueraded = if stands_in { MASQUERADED } else { 0 };
    let counted = if frontend.flags & Frontend::LEAST_CONNECTION != 0 { COUNTED } else { 0 };
    let relays =
        if origin == Origin::Outside { ((frontend.flags / Frontend::RELAYS) & 1) * RELAYS } else { 0 };
    Ok(Outcome::new(CHOSEN | masqueraded | counted | relays, index))
}

/// Tracks the flow to the backend that [`choose`] chose: [`Outcome::TRACKED`].
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn track<F, P, T>(packet: &mut P, tables: &T, chosen: Outcome) -> Result<Outcome, DropReason>
where
    F: Parse,
    P: Packet,
    T: Tables<F> + Exits<P>,
{
    let headers = parse::headers::<F, P>(packet)?.ok_or(DropReason::Truncated)?;
    let chosen = if chosen.may_relay() { relay::begin(tables, &headers, chosen)? } else { chosen };
    if chosen == Outcome::TRACKED {
        return Ok(chosen);
    }
    let (kind, index) = ((chosen.0 >> 32) as u32, chosen.0 as u32);
    let mut masquerade = None;
    if kind & MASQUERADED != 0 {
        let own = tables.masquerade();
        if F::words(&own) == [0; 4] {
            return Err(DropReason::NoMasquerade);
        }
        masquerade = Some(own);
    }
    let source_port = if kind & ELSEWHERE != 0 { SourcePort::Random } else { SourcePort::Kept };
    let client = if kind & RELAYED != 0 { Client::RELAYED } else { Client::DIRECT };
    conntrack::open(tables, &headers, (index, source_port, client), masquerade, |tuple| {
        masquerade::is_taken::<F, P, T>(tables, packet, tuple)
    })?;
    if kind & COUNTED != 0 {
        tables.connect(index);
    }
    if kind & SHADOWING != 0 {
        shadow::mark(tables, &headers.tuple);
    }
    Ok(Outcome::TRACKED)
}

/// Replies to a client from outside must come back through this node, unless the service's backends are all here
/// (rule 26 a and c). A pod's come back past it anyway; it is masqueraded only where all are, at cluster IPs (26 e).
#[inline(always)]
fn masquerades<T: Services>(tables: &T, frontend: &Frontend, origin: Origin) -> bool {
    match origin {
        Origin::Pod | Origin::Node | Origin::Inward | Origin::Own | Origin::Exit => {
            frontend.flags & Frontend::NORTH_SOUTH == 0 && tables.settings() & Settings::MASQUERADE_ALL != 0
        }
        Origin::Outside | Origin::Tunnel | Origin::Relay => frontend.flags & Frontend::KEEP_CLIENT == 0,
    }
}

/// Turns the packet into its refusal.
///
/// # Errors
/// Why it is dropped instead.
#[inline(always)]
pub fn refuse<F: Answer, P: Reshape>(packet: &mut P) -> Result<Outcome, DropReason> {
    let headers = parse::headers::<F, P>(packet)?.ok_or(DropReason::Reject)?;
    Ok(Outcome::goes(reject::reject(packet, &headers)?))
}
