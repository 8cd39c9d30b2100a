//! Where a packet goes once its addresses are final.

use ferroflow_common::abi::conntrack::Entry;
use ferroflow_common::addr::Addr;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::Verdict;

use crate::nat::Rewrite;
use crate::service::Origin;
use crate::tables::Tables;

/// A local pod directly, everything else by the kernel's routes.
#[inline(always)]
pub fn route<F: Family, T: Tables<F>>(tables: &T, dst: &Addr) -> Verdict {
    match tables.endpoint(dst) {
        Some(endpoint) => Verdict::Pod { ifindex: endpoint.ifindex },
        None => Verdict::Stack,
    }
}

/// The same for a packet that was rewritten, which the stack may not accept any more.
#[inline(always)]
pub fn rewritten<F: Family, T: Tables<F>>(tables: &T, to: &Rewrite) -> Verdict {
    // It went out by the stack: the node's packet filter is to see both directions, or it takes the flow for broken.
    if to.flags & Entry::MASQUERADED != 0 {
        return Verdict::Stack;
    }
    let verdict = route::<F, T>(tables, to.dst());
    let own_source = to.flags & Entry::OWN_SOURCE != 0;
    if own_source && verdict == Verdict::Stack { Verdict::Forward } else { verdict }
}

/// The same for a packet from anywhere: what the node's stack has routed goes on there.
#[inline(always)]
pub fn onwards<F: Family, T: Tables<F>>(tables: &T, to: &Rewrite, origin: Origin) -> Verdict {
    match origin {
        Origin::Pod | Origin::Outside => rewritten::<F, T>(tables, to),
        Origin::Node | Origin::Inward | Origin::Own | Origin::Exit => Verdict::Stack,
    }
}
