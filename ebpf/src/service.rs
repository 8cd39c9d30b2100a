//! The first packet of a flow to a service.

use ferroflow_common::abi::lb::{Frontend, ServiceClient};
use ferroflow_common::family::Family;
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack::{self, Halves};
use crate::fragment::{self, Part};
use crate::icmp::{self, Errors, Quote};
use crate::lb::{self, Choice};
use crate::nat::Rewrite;
use crate::packet::{Packet, Reshape};
use crate::parse::{self, Headers, Parse};
use crate::reject::{self, Answer};
use crate::tables::{Datagrams, Tables};

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A pod of this node.
    Pod,
    Outside,
    /// The node's own stack, which has routed it: it opens no flow, and goes on where it goes.
    Node,
}

/// How a step takes a packet. A number, so that the verifier can forget it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Way(u32);

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
}

/// What becomes of a packet.
pub enum Fate {
    Goes(Verdict),
    /// The first packet of a flow to a service.
    Opens,
    /// No whole TCP or UDP packet: an ICMP error or a fragment may still belong to a flow.
    Rare,
    /// One direction of its flow is to be entered again.
    Halved,
}

/// A step's outcome in one register, every bit of it said. Left to itself the compiler packs an enum into a register
/// and leaves what a variant does not use to chance, which may be a pointer, and the verifier refuses to compute with
/// that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Outcome(u64);

const STACK: u32 = 0;
const FORWARD: u32 = 1;
const REPLY: u32 = 2;
const POD: u32 = 3;
const OPENS: u32 = 4;
const DROPPED: u32 = 5;
const RARE: u32 = 6;
const TAKEN: u32 = 7;
const HALVED: u32 = 8;

impl Outcome {
    const STACK: Self = Self((STACK as u64) << 32);
    pub(crate) const FORWARD: Self = Self((FORWARD as u64) << 32);
    const OPENS: Self = Self((OPENS as u64) << 32);
    const RARE: Self = Self((RARE as u64) << 32);
    const HALVED: Self = Self((HALVED as u64) << 32);

    #[inline(always)]
    pub fn of(result: Result<Fate, DropReason>) -> Self {
        let (kind, number) = match result {
            Ok(Fate::Goes(Verdict::Stack)) => (STACK, 0),
            Ok(Fate::Goes(Verdict::Forward)) => (FORWARD, 0),
            Ok(Fate::Goes(Verdict::Reply)) => (REPLY, 0),
            Ok(Fate::Goes(Verdict::Pod { ifindex })) => (POD, ifindex),
            Ok(Fate::Goes(Verdict::Taken)) => (TAKEN, 0),
            Ok(Fate::Opens) => (OPENS, 0),
            Ok(Fate::Rare) => (RARE, 0),
            Ok(Fate::Halved) => (HALVED, 0),
            Err(reason) => (DROPPED, reason as u32),
        };
        Self(u64::from(kind) << 32 | u64::from(number))
    }

    /// A first fragment without ports is nothing of ours.
    #[inline(always)]
    fn or_stack(self) -> Self {
        if self == Self::RARE { Self::STACK } else { self }
    }

    #[inline(always)]
    const fn is_dropped(self) -> bool {
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
            OPENS => Ok(Fate::Opens),
            RARE => Ok(Fate::Rare),
            HALVED => Ok(Fate::Halved),
            TAKEN => Ok(Fate::Goes(Verdict::Taken)),
            _ => Err(DropReason::from_number(number)),
        }
    }
}

/// What a new flow gets.
enum Opened {
    Tracked,
    /// No endpoint: the packet is to be turned into its own refusal.
    Refused,
}

/// One step after the other, not one inside the other: each is a function of its own in the kernel and has the 512
/// bytes of stack that a chain of calls may use nearly to itself. A step reads the headers again, and the first packet
/// of a flow takes the way of the second, `known`, once its flow is tracked; which only that packet pays.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn in_steps<F, P, T>(
    packet: &mut P,
    tables: &T,
    origin: Origin,
    known: impl Fn(&mut P, &T, Way) -> Outcome,
) -> Result<Verdict, DropReason>
where
    F: Answer + Errors,
    P: Reshape,
    T: Tables<F> + Datagrams<P>,
{
    let mut way = Way::USUAL;
    let mut outcome = known(packet, tables, way);
    if outcome == Outcome::HALVED {
        conntrack::mend::<F, P, T>(packet, tables);
        outcome = known(packet, tables, Way::MENDED);
    } else if outcome == Outcome::RARE {
        outcome = rare::<F, P, T>(packet, tables, origin);
        if outcome == Outcome::RARE {
            way = Way::FIRST_FRAGMENT;
            outcome = known(packet, tables, way).or_stack();
        }
    }
    let way = Way(packet.forget(way.0));
    if outcome == Outcome::OPENS {
        if matches!(open::<F, P, T>(packet, tables, origin)?, Opened::Refused) {
            return refuse::<F, P>(packet);
        }
        outcome = known(packet, tables, way);
    }
    if way == Way::FIRST_FRAGMENT && !outcome.is_dropped() {
        fragment::remember::<F, P, T>(packet, tables, outcome, origin);
    }
    match outcome.fate()? {
        Fate::Goes(verdict) => Ok(verdict),
        // Another flow took the place of the one that was tracked a moment ago.
        Fate::Opens | Fate::Rare | Fate::Halved => Err(DropReason::ConntrackInsert),
    }
}

/// The same for a packet that opens nothing, because the node's stack has routed it.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn routed<F, P, T>(
    packet: &mut P,
    tables: &T,
    known: impl Fn(&mut P, &T, Way) -> Outcome,
) -> Result<Verdict, DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Datagrams<P>,
{
    let mut outcome = known(packet, tables, Way::USUAL);
    if outcome == Outcome::HALVED {
        conntrack::mend::<F, P, T>(packet, tables);
        outcome = known(packet, tables, Way::MENDED);
    } else if outcome == Outcome::RARE {
        outcome = rare::<F, P, T>(packet, tables, Origin::Node);
        if outcome == Outcome::RARE {
            outcome = known(packet, tables, Way::FIRST_FRAGMENT).or_stack();
            if !outcome.is_dropped() {
                fragment::remember::<F, P, T>(packet, tables, outcome, Origin::Node);
            }
        }
    }
    match outcome.fate()? {
        Fate::Goes(verdict) => Ok(verdict),
        Fate::Opens | Fate::Rare | Fate::Halved => Ok(Verdict::Stack),
    }
}

/// What few packets need. [`Fate::Rare`] where that is to go the way of a whole packet now, as the first fragment that it
/// is.
#[inline(always)]
fn rare<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Outcome
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Datagrams<P>,
{
    let quote = icmp::find::<F, P>(packet);
    if quote != Quote::NONE {
        return error::<F, P, T>(packet, tables, quote, origin);
    }
    fragments::<F, P, T>(packet, tables, origin)
}

/// A fragment, or nothing of ours.
#[inline(always)]
fn fragments<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Outcome
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Datagrams<P>,
{
    let part = fragment::find::<F, P>(packet);
    if part == Part::NONE {
        return Outcome::STACK;
    }
    if part.is_first() {
        let outcome = fragment::first::<F, P, T>(packet, tables, part, origin);
        // It has become one that waited for it.
        if outcome != Outcome::STACK {
            return outcome;
        }
    }
    fragment::later::<F, P, T>(packet, tables, part, origin)
}

#[inline(always)]
fn error<F, P, T>(packet: &mut P, tables: &T, quote: Quote, origin: Origin) -> Outcome
where
    F: Errors,
    P: Packet,
    T: Tables<F>,
{
    let outcome = icmp::deliver::<F, P, T>(packet, tables, quote, origin);
    match outcome.fate() {
        Ok(Fate::Goes(_)) => {
            let changes = icmp::requote::<F, P, T>(packet, tables, quote);
            match icmp::mend::<F, P>(packet, quote, changes) {
                Ok(()) => outcome,
                Err(reason) => Outcome::of(Err(reason)),
            }
        }
        Ok(Fate::Opens | Fate::Rare | Fate::Halved) => Outcome::STACK,
        Err(_) => outcome,
    }
}

/// Chooses a backend and tracks the flow.
#[inline(never)]
fn open<F, P, T>(packet: &mut P, tables: &T, origin: Origin) -> Result<Opened, DropReason>
where
    F: Parse,
    P: Packet,
    T: Tables<F>,
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
    let index = match lb::kept(tables, &frontend, client, now) {
        Some(index) => index,
        None => match lb::choose(tables, &frontend, lb::flow_hash::<F>(tuple))? {
            Choice::Backend { index, .. } => index,
            Choice::Reject => return Ok(Opened::Refused),
        },
    };
    lb::keep(tables, &frontend, client, index, now);
    let masquerade = masquerade::<F, T>(tables, &frontend, origin)?;
    conntrack::open(tables, &headers, index, masquerade)?;
    Ok(Opened::Tracked)
}

/// Replies to a client from outside must come back through this node, unless the service's backends are all here
/// (rule 26). A pod's come back past it anyway.
#[inline(always)]
fn masquerade<F: Family, T: Tables<F>>(
    tables: &T,
    frontend: &Frontend,
    origin: Origin,
) -> Result<Option<F::Bytes>, DropReason> {
    if origin != Origin::Outside || frontend.flags & Frontend::KEEP_CLIENT != 0 {
        return Ok(None);
    }
    let own = tables.masquerade();
    if F::words(&own) == [0; 4] {
        return Err(DropReason::NoMasquerade);
    }
    Ok(Some(own))
}

#[inline(never)]
fn refuse<F: Answer, P: Reshape>(packet: &mut P) -> Result<Verdict, DropReason> {
    let headers = parse::headers::<F, P>(packet)?.ok_or(DropReason::Reject)?;
    reject::reject(packet, &headers)
}
