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
    let ifindex = match world.attachment(addr) {
        Some(ifindex) => ifindex,
        None => {
            world.pods_at(addr).next()?;
            world.local_route(addr)?
        }
    };
    let queued = if world.has_queue(ifindex) { Endpoint::QUEUED } else { 0 };
    Some(Endpoint { link: ifindex | queued, policy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Change, Name, Pod, Touched};

    #[test]
    fn a_local_pod_needs_an_address_and_an_interface() {
        let addr = Addr::v4([10, 244, 1, 5]);
        let mut world = World::new("here");
        let mut row_after = |change| {
            world.apply(change);
            endpoint(&world, addr, EndpointPolicy::default()).map(|row| row.link)
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
            endpoint(&world, addr, EndpointPolicy::default()).map(|row| row.link)
        };
        assert_eq!(row_after(Change::Attachment(addr, Some(7))), Some(7));
        assert_eq!(row_after(Change::LocalRoute(addr, Some(7))), Some(7));
        assert_eq!(row_after(Change::LocalRoute(addr, None)), None, "its interface is gone");
        assert_eq!(row_after(Change::Attachment(addr, Some(8))), Some(8));
        assert_eq!(row_after(Change::LocalRoute(addr, Some(7))), Some(8), "an old route says nothing");
        assert_eq!(row_after(Change::LocalRoute(addr, None)), Some(8));
        assert_eq!(row_after(Change::Attachment(addr, None)), None);
    }

    #[test]
    fn a_row_says_whether_packets_wait_at_the_interface() {
        let addr = Addr::v4([10, 244, 1, 5]);
        let mut world = World::new("here");
        let queue = |there| Change::Queue { ifindex: 7, there };
        assert_eq!(world.apply(queue(true)), []);
        world.apply(Change::Attachment(addr, Some(7)));
        world.apply(Change::LocalRoute(addr, Some(7)));
        let link = |world: &World| endpoint(world, addr, EndpointPolicy::default()).map(|row| row.link);
        assert_eq!(link(&world), Some(7 | Endpoint::QUEUED));
        assert_eq!(world.apply(queue(false)), [Touched::Endpoint(addr)]);
        assert_eq!((link(&world), world.apply(queue(false))), (Some(7), Vec::new()));
    }
}
