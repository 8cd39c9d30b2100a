//! What stands in a slot range.

use ferroflow_common::abi::lb::Frontend;

use super::backends::Planned;
use super::{frontends, maglev};
use crate::model::Family;

/// Which backends the slots of a frontend with these flags name, as positions in `backends`. A Maglev table, or each
/// backend once, so that every one gets the same share of new flows.
pub fn positions(backends: &[Planned], family: Family, flags: u32, lengths: &[u32]) -> Vec<usize> {
    let set = frontends::set(flags);
    let members = backends.iter().enumerate();
    let members = members.filter(|(_, it)| it.sets & set != 0 && Family::of(&it.addr) == family);
    if flags & Frontend::MAGLEV == 0 {
        return members.map(|(position, _)| position).collect();
    }
    let (positions, chosen): (Vec<_>, Vec<_>) =
        members.map(|(position, it)| (position, (it.addr, it.port))).unzip();
    maglev::table(&chosen, lengths).into_iter().filter_map(|at| positions.get(at).copied()).collect()
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::Backend;
    use ferroflow_common::addr::{Addr, Port};

    use super::*;
    use crate::model::Condition;

    #[test]
    fn every_backend_of_the_set_and_family_has_its_share() {
        let backend = |addr, sets| Planned { addr, port: Port::new(80), condition: Condition::Ready, sets };
        let backends = [
            backend(Addr::v4([10, 0, 0, 1]), Backend::CLUSTER),
            backend(Addr::v4([10, 0, 0, 2]), 0),
            backend(Addr::v4([10, 0, 0, 3]), Backend::CLUSTER | Backend::LOCAL),
            backend(Addr::v6([0xfd; 16]), Backend::CLUSTER),
        ];
        let positions = |family, flags| positions(&backends, family, flags, &[7]);
        assert_eq!(positions(Family::V4, 0), [0, 2]);
        assert_eq!(positions(Family::V6, 0), [3]);
        assert_eq!(positions(Family::V4, Frontend::LOCAL), [2]);
        assert_eq!(positions(Family::V6, Frontend::LOCAL), [0; 0]);
        let mut table = positions(Family::V4, Frontend::MAGLEV);
        assert_eq!(table.len(), 7);
        table.sort_unstable();
        table.dedup();
        assert_eq!(table, [0, 2]);
        assert_eq!(positions(Family::V4, Frontend::MAGLEV | Frontend::LOCAL), [2]);
    }
}
