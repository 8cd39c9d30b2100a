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
    let (direction, end) = if entry.is_forward() {
        if chooses_again(tables, headers, &entry) {
            tables.untrack(&partner::<F>(&headers.tuple, &entry));
            return Known::Nothing;
        }
        (Direction::Forward, End::Destination)
    } else {
        // A server that opens a connection from its service port to a former client's port: not a reply (rule 35).
        if headers.flags.opens() {
            return Known::Nothing;
        }
        (Direction::Reply, End::Source)
    };
    refresh(tables, &tracked, headers, Refresh { entry, direction, now });
    Known::Flow(Rewrite { end, addr: entry.nat, port: entry.nat_port, looped: entry.is_looped() })
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

/// An entry as it was read, with what its packet adds.
struct Refresh {
    entry: Entry,
    direction: Direction,
    now: u32,
}

/// Writes state and expiry where they changed by more than an eighth of the lifetime, to both entries: a busy flow is
/// written every few seconds, not at every packet.
#[inline(always)]
fn refresh<F: Family, T: Tables<F>>(tables: &T, own: &T::Tracked, headers: &Headers<F>, seen: Refresh) {
    let Refresh { entry, direction, now } = seen;
    let state = State(entry.state).after(headers.flags, direction);
    let lifetime = state.lifetime(headers.tuple.proto);
    let expires = now.wrapping_add(lifetime);
    let due = expires > entry.expires.saturating_add(lifetime / 8);
    if state.0 == entry.state && !due {
        return;
    }
    own.store_state(state.0, expires);
    if let Some(other) = tables.tracked(&partner::<F>(&headers.tuple, &entry)) {
        other.store_state(state.0, expires);
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
