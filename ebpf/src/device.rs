//! What arrives at the node's own devices: clients of NodePorts and of addresses that lead here, and the replies of
//! backends on other nodes.

use ferroflow_common::family::{Family as _, V4, V6};
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack;
use crate::lb;
use crate::nat::{self, Ends};
use crate::packet::Packet;
use crate::parse::{self, Parse};
use crate::route;
use crate::service::{self, Fate, Origin, Outcome, whole};
use crate::tables::Tables;

/// A packet from outside the node.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn arriving<P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    P: Packet,
    T: Tables<V4> + Tables<V6>,
{
    match packet.ethertype() {
        V4::ETHERTYPE => service::in_steps::<V4, P, T>(packet, tables, Origin::Outside, arrive::<V4, P, T>),
        V6::ETHERTYPE => service::in_steps::<V6, P, T>(packet, tables, Origin::Outside, arrive::<V6, P, T>),
        _ => Ok(Verdict::Stack),
    }
}

/// A packet of a flow that is known, or of no service: the stack's, which knows where the node's pods are.
#[inline(never)]
fn arrive<F, P, T>(packet: &mut P, tables: &T) -> Outcome
where
    F: Parse,
    F::Bytes: Ends,
    P: Packet,
    T: Tables<F>,
{
    Outcome::of(try_arrive(packet, tables))
}

#[inline(always)]
fn try_arrive<F, P, T>(packet: &mut P, tables: &T) -> Result<Fate, DropReason>
where
    F: Parse,
    F::Bytes: Ends,
    P: Packet,
    T: Tables<F>,
{
    let Some(headers) = parse::headers::<F, P>(packet)? else { return Ok(Fate::Goes(Verdict::Stack)) };
    if let Some(to) = conntrack::follow::<F, T>(tables, &headers) {
        whole(&headers)?;
        nat::rewrite(packet, &headers, &to)?;
        return Ok(Fate::Goes(route::rewritten::<F, T>(tables, &to)));
    }
    let mut key = lb::key::<F>(&headers.tuple);
    if lb::is_service(tables.frontend(&key)) || lb::is_service(lb::node_port(tables, &mut key)) {
        return Ok(Fate::Opens);
    }
    Ok(Fate::Goes(Verdict::Stack))
}
