//! The two ways past a pod's interface.

use ferroflow_common::family::{Family as _, V4, V6};
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack::{self, Known};
use crate::lb::{self, Choice};
use crate::nat::{self, End, Store};
use crate::packet::Packet;
use crate::parse::{self, Fragment, Parse};
use crate::reject::{self, Answer};
use crate::route;
use crate::tables::Tables;

/// A packet that a pod sends, at the host's end of its interface.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn leaving<P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    P: Packet,
    T: Tables<V4> + Tables<V6>,
{
    match packet.ethertype() {
        V4::ETHERTYPE => leave_in_steps::<V4, P, T>(packet, tables),
        V6::ETHERTYPE => leave_in_steps::<V6, P, T>(packet, tables),
        _ => Ok(Verdict::Stack),
    }
}

/// A packet that the node's stack hands to a pod.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn entering<P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    P: Packet,
    T: Tables<V4> + Tables<V6>,
{
    match packet.ethertype() {
        V4::ETHERTYPE => enter::<V4, P, T>(packet, tables),
        V6::ETHERTYPE => enter::<V6, P, T>(packet, tables),
        _ => Ok(Verdict::Stack),
    }
}

/// What becomes of a packet that leaves a pod.
enum Fate {
    Goes(Verdict),
    /// The first packet of a flow to a service.
    Opens,
    /// To be turned into its own refusal.
    Refused,
}

/// One step after the other, not one inside the other: each is a function of its own in the kernel and has the 512
/// bytes of stack that a chain of calls may use nearly to itself. A step reads the headers again, which only the first
/// packet of a flow pays.
#[inline(always)]
fn leave_in_steps<F, P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    F: Answer,
    F::Bytes: Store,
    P: Packet,
    T: Tables<F>,
{
    let mut fate = leave::<F, P, T>(packet, tables)?;
    if matches!(fate, Fate::Opens) {
        fate = open::<F, P, T>(packet, tables)?;
    }
    match fate {
        Fate::Goes(verdict) => Ok(verdict),
        Fate::Refused | Fate::Opens => refuse::<F, P>(packet),
    }
}

/// A packet of a flow that is known, or of no service.
#[inline(never)]
fn leave<F, P, T>(packet: &mut P, tables: &T) -> Result<Fate, DropReason>
where
    F: Parse,
    F::Bytes: Store,
    P: Packet,
    T: Tables<F>,
{
    let Some(headers) = parse::headers::<F, P>(packet)? else { return Ok(Fate::Goes(Verdict::Stack)) };
    let dst = F::addr(headers.tuple.dst);
    match conntrack::follow::<F, T>(tables, &headers) {
        Known::Flow(to) => {
            nat::rewrite(packet, &headers, &to)?;
            let next = match to.end {
                End::Destination => to.addr,
                End::Source if to.looped => F::addr(headers.tuple.src),
                End::Source => dst,
            };
            Ok(Fate::Goes(route::route::<F, T>(tables, &next)))
        }
        Known::Nothing => {
            if lb::frontend(tables, dst, headers.tuple.dst_port, headers.tuple.proto).is_some() {
                return Ok(Fate::Opens);
            }
            Ok(Fate::Goes(route::route::<F, T>(tables, &dst)))
        }
    }
}

/// The first packet of a flow to a service.
#[inline(never)]
fn open<F, P, T>(packet: &mut P, tables: &T) -> Result<Fate, DropReason>
where
    F: Parse,
    F::Bytes: Store,
    P: Packet,
    T: Tables<F>,
{
    let headers = parse::headers::<F, P>(packet)?.ok_or(DropReason::Truncated)?;
    if headers.fragment == Fragment::First {
        return Err(DropReason::Fragment);
    }
    let tuple = &headers.tuple;
    let frontend =
        lb::frontend(tables, F::addr(tuple.dst), tuple.dst_port, tuple.proto).ok_or(DropReason::NoBackend)?;
    let (index, backend) = match lb::choose(tables, &frontend, lb::flow_hash::<F>(tuple))? {
        Choice::Backend { index, backend } => (index, backend),
        Choice::Reject => return Ok(Fate::Refused),
    };
    let to = conntrack::open(tables, &headers, index, &backend)?;
    nat::rewrite(packet, &headers, &to)?;
    Ok(Fate::Goes(route::route::<F, T>(tables, &to.addr)))
}

#[inline(never)]
fn refuse<F: Answer, P: Packet>(packet: &mut P) -> Result<Verdict, DropReason> {
    let headers = parse::headers::<F, P>(packet)?.ok_or(DropReason::Reject)?;
    reject::reject(packet, &headers)
}

#[inline(never)]
fn enter<F, P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    F: Parse,
    F::Bytes: Store,
    P: Packet,
    T: Tables<F>,
{
    let Some(headers) = parse::headers::<F, P>(packet)? else { return Ok(Verdict::Stack) };
    if let Known::Flow(to) = conntrack::follow::<F, T>(tables, &headers) {
        nat::rewrite(packet, &headers, &to)?;
    }
    Ok(Verdict::Stack)
}
