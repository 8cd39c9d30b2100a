//! Where a packet goes once its addresses are final.

use ferroflow_common::addr::Addr;
use ferroflow_common::family::Family;
use ferroflow_common::verdict::Verdict;

use crate::tables::Tables;

/// A local pod directly, everything else by the kernel's routes.
#[inline(always)]
pub fn route<F: Family, T: Tables<F>>(tables: &T, dst: &Addr) -> Verdict {
    match tables.endpoint(dst) {
        Some(endpoint) => Verdict::Pod { ifindex: endpoint.ifindex },
        None => Verdict::Stack,
    }
}
