//! What stands in a slot range.

use super::{Planned, Role};
use crate::model::Family;

/// Which backends the slots of one family name, as positions in `backends`: each selected one once, so that every
/// one gets the same share of new flows.
pub fn positions(backends: &[Planned], family: Family) -> impl Iterator<Item = usize> {
    let positions = backends.iter().enumerate();
    positions
        .filter(move |(_, it)| it.role == Role::Selected && Family::of(&it.addr) == family)
        .map(|(position, _)| position)
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::{Addr, Port};

    use super::*;

    #[test]
    fn every_selected_backend_of_the_family_has_one_slot() {
        let backend = |addr, role| Planned { addr, port: Port::new(80), role };
        let backends = [
            backend(Addr::v4([10, 0, 0, 1]), Role::Selected),
            backend(Addr::v4([10, 0, 0, 2]), Role::Kept),
            backend(Addr::v4([10, 0, 0, 3]), Role::Selected),
            backend(Addr::v6([0xfd; 16]), Role::Selected),
        ];
        assert_eq!(positions(&backends, Family::V4).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(positions(&backends, Family::V6).collect::<Vec<_>>(), [3]);
    }
}
