//! Pods of this node: where their packets go.

use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::abi::policy::EndpointPolicy;
use ferroflow_common::addr::Addr;

use crate::model::World;

/// The row of a local address: there is one where a pod of this node has the address and an interface leads to it.
/// Finished pods and pods in the host's network have no addresses of their own. Who got the address from this agent
/// has a row from the start, before there is an object that names it (rule 54).
///
/// `policy` is what applies to it.
pub fn endpoint(world: &World, addr: Addr, policy: EndpointPolicy) -> Option<Endpoint> {
    if let Some(ifindex) = world.attachment(addr) {
        return Some(Endpoint { ifindex, policy });
    }
    world.pods_at(addr).next()?;
    world.local_route(addr).map(|ifindex| Endpoint { ifindex, policy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Change, Name, Pod};

    #[test]
    fn a_local_pod_needs_an_address_and_an_interface() {
        let addr = Addr::v4([10, 244, 1, 5]);
        let mut world = World::new("here");
        let mut row_after = |change| {
            world.apply(change);
            endpoint(&world, addr, EndpointPolicy::default()).map(|row| row.ifindex)
        };
        let pod = |node: &str, addresses: &[Addr]| {
            let pod = Pod { node: node.into(), addresses: addresses.into(), ..Pod::default() };
            Change::Pod(Name::new("default", "p"), Some(pod))
        };
        assert_eq!(row_after(Change::LocalRoute(addr, Some(7))), None);
        assert_eq!(row_after(pod("there", &[addr])), None);
        assert_eq!(row_after(pod("here", &[addr])), Some(7));
        assert_eq!(row_after(Change::LocalRoute(addr, Some(8))), Some(8));
        assert_eq!(row_after(pod("here", &[])), None, "it is finished (rule 51)");
        assert_eq!(row_after(pod("here", &[addr])), Some(8));
        assert_eq!(row_after(Change::LocalRoute(addr, None)), None);
    }

    #[test]
    fn rule_54_who_was_attached_has_a_row_before_there_is_a_pod() {
        let addr = Addr::v4([10, 244, 1, 5]);
        let mut world = World::new("here");
        let mut row_after = |change| {
            world.apply(change);
            endpoint(&world, addr, EndpointPolicy::default()).map(|row| row.ifindex)
        };
        assert_eq!(row_after(Change::Attachment(addr, Some(7))), Some(7));
        assert_eq!(row_after(Change::LocalRoute(addr, Some(7))), Some(7));
        assert_eq!(row_after(Change::LocalRoute(addr, None)), None, "its interface is gone");
        assert_eq!(row_after(Change::Attachment(addr, Some(8))), Some(8));
        assert_eq!(row_after(Change::LocalRoute(addr, Some(7))), Some(8), "an old route says nothing");
        assert_eq!(row_after(Change::LocalRoute(addr, None)), Some(8));
        assert_eq!(row_after(Change::Attachment(addr, None)), None);
    }
}
