//! The first packet of a flow to a service.

use ferroflow_common::abi::lb::{Frontend, FrontendKey, ServiceClient};
use ferroflow_common::abi::node::Settings;
use ferroflow_common::addr::Proto;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack;
use crate::lb::{self, Choice};
use crate::packet::Packet;
use crate::parse::{self, Fragment, Headers, Parse};
use crate::reject::{self, Answer};
use crate::tables::{Services, Tables};

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
    /// To a port that a cluster IP does not have.
    Refused,
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
const REFUSED: u32 = 6;

impl Outcome {
    /// The first packet of a flow to a service.
    pub const OPENS: Self = Self::new(OPENS, 0);
    pub const REFUSED: Self = Self::new(REFUSED, 0);
    pub const STACK: Self = Self::new(STACK, 0);

    #[inline(always)]
    const fn new(kind: u32, number: u32) -> Self {
        Self((kind as u64) << 32 | number as u64)
    }

    #[inline(always)]
    pub fn goes(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Stack => Self::STACK,
            Verdict::Forward => Self::new(FORWARD, 0),
            Verdict::Reply => Self::new(REPLY, 0),
            Verdict::Pod { ifindex } => Self::new(POD, ifindex),
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
            REFUSED => Ok(Fate::Refused),
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
    let opened = match known(packet, tables).fate()? {
        Fate::Goes(verdict) => return Ok(verdict),
        Fate::Opens => open::<F, P, T>(packet, tables, origin)?,
        Fate::Refused => Opened::Refused,
    };
    if matches!(opened, Opened::Refused) {
        return refuse::<F, P>(packet);
    }
    match known(packet, tables).fate()? {
        Fate::Goes(verdict) => Ok(verdict),
        // Another flow took the place of the one that was tracked a moment ago.
        Fate::Opens | Fate::Refused => Err(DropReason::ConntrackInsert),
    }
}

/// The verdict of a step that opens nothing.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn final_verdict(outcome: Outcome) -> Result<Verdict, DropReason> {
    match outcome.fate()? {
        Fate::Goes(verdict) => Ok(verdict),
        Fate::Opens | Fate::Refused => Ok(Verdict::Stack),
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
    if frontend.flags & Frontend::LEAST_CONNECTION != 0 {
        tables.connect(index);
    }
    Ok(Opened::Tracked)
}

/// Replies to a client from outside must come back through this node, unless the service's backends are all here
/// (rule 26 a and c). A pod's come back past it anyway; it is masqueraded only where all are, at cluster IPs (26 e).
#[inline(always)]
fn masquerade<F: Family, T: Tables<F>>(
    tables: &T,
    frontend: &Frontend,
    origin: Origin,
) -> Result<Option<F::Bytes>, DropReason> {
    let keeps = match origin {
        Origin::Pod => {
            frontend.flags & Frontend::NORTH_SOUTH != 0 || tables.settings() & Settings::MASQUERADE_ALL == 0
        }
        Origin::Outside => frontend.flags & Frontend::KEEP_CLIENT != 0,
    };
    if keeps {
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
