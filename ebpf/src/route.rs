//! Where a packet goes once its addresses are final.

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::addr::Addr;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::Verdict;

use crate::nat::Rewrite;
use crate::service::{self, Origin};
use crate::tables::Tables;

/// A local pod directly, everything else by the kernel's routes.
#[inline(always)]
pub fn route<F: Family, T: Tables<F>>(tables: &T, dst: &Addr) -> Verdict {
    match tables.endpoint(dst) {
        Some(endpoint) => Verdict::Pod { ifindex: endpoint.link },
        None => Verdict::Stack,
    }
}

/// The same, for what a pod sends: to a pod of another node past the stack.
#[inline(always)]
pub fn onto<F: Family, T: Tables<F>>(tables: &T, dst: &Addr) -> Verdict {
    let verdict = route::<F, T>(tables, dst);
    if verdict == Verdict::Stack && tables.is_elsewhere(dst) { Verdict::Forward } else { verdict }
}

/// The same, for what comes from outside: from a pod of another node to its pod past the stack, all else as it comes, as
/// does everything while rules of kube-proxy may have a part in it.
#[inline(always)]
pub fn inwards<F: Family, T: Tables<F>>(tables: &T, tuple: &Tuple<F::Bytes>) -> Verdict {
    let verdict = route::<F, T>(tables, &F::addr(tuple.dst));
    if verdict == Verdict::Stack || !tables.is_elsewhere(&F::addr(tuple.src)) || service::migrating(tables) {
        return Verdict::Stack;
    }
    verdict
}

/// The same for a packet that was rewritten, which the stack may not accept any more.
#[inline(always)]
pub fn rewritten<F: Family, T: Tables<F>>(tables: &T, to: &Rewrite) -> Verdict {
    // It went out by the stack: the node's packet filter is to see both directions, or it takes the flow for broken. What is
    // relayed is not rewritten.
    if to.flags & (Entry::MASQUERADED | Entry::RELAYS) != 0 {
        return Verdict::Stack;
    }
    let verdict = route::<F, T>(tables, to.dst());
    let own_source = to.flags & Entry::OWN_SOURCE != 0;
    let passes = verdict == Verdict::Stack && (own_source || tables.is_elsewhere(to.dst()));
    if passes { Verdict::Forward } else { verdict }
}

/// The same for a packet from anywhere: what the node's stack has routed goes on there.
#[inline(always)]
pub fn onwards<F: Family, T: Tables<F>>(tables: &T, to: &Rewrite, origin: Origin) -> Verdict {
    match origin {
        Origin::Pod | Origin::Outside | Origin::Tunnel | Origin::Relay => rewritten::<F, T>(tables, to),
        Origin::Node | Origin::Inward | Origin::Own | Origin::Exit => Verdict::Stack,
    }
}
