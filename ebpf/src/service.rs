//! The first packet of a flow to a service.

use ferroflow_common::abi::lb::{Frontend, ServiceClient};
use ferroflow_common::family::Family;
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack;
use crate::lb;
use crate::packet::Packet;
use crate::parse::{self, Fragment, Headers, Parse};
use crate::reject::{self, Answer};
use crate::tables::Tables;

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A pod of this node.
    Pod,
    Outside,
}

/// What becomes of a packet.
pub enum Fate {
    Goes(Verdict),
    /// The first packet of a flow to a service.
    Opens,
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

impl Outcome {
    #[inline(always)]
    pub fn of(result: Result<Fate, DropReason>) -> Self {
        let (kind, number) = match result {
            Ok(Fate::Goes(Verdict::Stack)) => (STACK, 0),
            Ok(Fate::Goes(Verdict::Forward)) => (FORWARD, 0),
            Ok(Fate::Goes(Verdict::Reply)) => (REPLY, 0),
            Ok(Fate::Goes(Verdict::Pod { ifindex })) => (POD, ifindex),
            Ok(Fate::Opens) => (OPENS, 0),
            Err(reason) => (DROPPED, reason as u32),
        };
        Self(u64::from(kind) << 32 | u64::from(number))
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
    known: impl Fn(&mut P, &T) -> Outcome,
) -> Result<Verdict, DropReason>
where
    F: Answer,
    P: Packet,
    T: Tables<F>,
{
    for _ in 0..2 {
        if let Fate::Goes(verdict) = known(packet, tables).fate()? {
            return Ok(verdict);
        }
        if matches!(open::<F, P, T>(packet, tables, origin)?, Opened::Refused) {
            return refuse::<F, P>(packet);
        }
    }
    // Another flow took the place of the one that was tracked a moment ago.
    Err(DropReason::ConntrackInsert)
}

/// The verdict of a step that opens nothing.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn final_verdict(outcome: Outcome) -> Result<Verdict, DropReason> {
    match outcome.fate()? {
        Fate::Goes(verdict) => Ok(verdict),
        Fate::Opens => Ok(Verdict::Stack),
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
    whole(&headers)?;
    let tuple = &headers.tuple;
    let mut key = lb::key::<F>(tuple);
    let mut frontend = match tables.frontend(&key) {
        Some(frontend) => frontend,
        None => lb::node_port(tables, &mut key).ok_or(DropReason::NoBackend)?,
    };
    if origin == Origin::Pod {
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
        return Ok(Opened::Refused);
    };
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
    if origin == Origin::Pod || frontend.flags & Frontend::KEEP_CLIENT != 0 {
        return Ok(None);
    }
    let own = tables.masquerade();
    if F::words(&own) == [0; 4] {
        return Err(DropReason::NoMasquerade);
    }
    Ok(Some(own))
}

#[inline(never)]
fn refuse<F: Answer, P: Packet>(packet: &mut P) -> Result<Verdict, DropReason> {
    let headers = parse::headers::<F, P>(packet)?.ok_or(DropReason::Reject)?;
    reject::reject(packet, &headers)
}

/// A first fragment that is to be rewritten: nothing would rewrite the later ones, which have no ports, so the datagram
/// could never be put together again.
///
/// # Errors
/// [`DropReason::Fragment`].
#[inline(always)]
pub fn whole<F: Family>(headers: &Headers<F>) -> Result<(), DropReason> {
    if headers.fragment == Fragment::First { Err(DropReason::Fragment) } else { Ok(()) }
}
