//! Services that have endpoints, but none on this node where only those may be used (rule 15).

use crate::model::service::Place;
use crate::model::world::Backing;
use crate::model::{Condition, Family, TrafficPolicy, World};

/// Services whose traffic this node drops, by the policy that makes it do so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocal {
    pub internal: usize,
    pub external: usize,
}

/// Looks at every Service that has such a policy.
pub fn no_local(world: &World) -> NoLocal {
    let mut found = NoLocal::default();
    for (name, service) in world.services() {
        let (internal, external) = (service.internal_policy, service.exposure.policy);
        if internal != TrafficPolicy::Local && external != TrafficPolicy::Local {
            continue;
        }
        let Some(backing) = world.service(name) else { continue };
        if Family::ALL.into_iter().any(|family| service.serves(family) && only_elsewhere(backing, family)) {
            found.internal += usize::from(internal == TrafficPolicy::Local);
            found.external += usize::from(external == TrafficPolicy::Local);
        }
    }
    found
}

fn only_elsewhere(backing: &Backing, family: Family) -> bool {
    let endpoints = backing.slices.values().flat_map(|slice| &slice.endpoints);
    // Rule 2: those that terminate and serve are used where there are no others.
    let usable = endpoints.filter(|it| Family::of(&it.addr) == family && it.condition >= Condition::Draining);
    let mut places = usable.map(|it| it.place).peekable();
    places.peek().is_some() && places.all(|place| place == Place::Remote)
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::Addr;

    use super::*;
    use crate::model::{Change, Endpoint, EndpointSlice, Name, Service};

    #[test]
    fn rule_15_services_without_endpoints_here_are_counted_by_policy() {
        let mut world = World::new("here");
        let name = Name::new("shop", "web");
        let mut service = Service { cluster_ips: [Addr::v4([10, 96, 0, 1])].into(), ..Service::default() };
        service.internal_policy = TrafficPolicy::Local;
        world.apply(Change::Service(name, Some(service.clone())));
        assert_eq!(no_local(&world), NoLocal::default(), "nobody anywhere is another matter");
        let mut endpoints = |places: &[(Place, Condition)]| {
            let endpoints = places
                .iter()
                .map(|&(place, condition)| Endpoint::new(Addr::v4([10, 0, 0, 1]), condition, place));
            let slice = EndpointSlice {
                service: "web".into(),
                endpoints: endpoints.collect(),
                ..EndpointSlice::default()
            };
            world.apply(Change::EndpointSlice(Name::new("shop", "web-1"), Some(slice)));
            no_local(&world)
        };
        use Condition::{Down, Draining, Ready};
        use Place::{Local, Remote};
        assert_eq!(endpoints(&[(Remote, Ready), (Local, Down)]), NoLocal { internal: 1, external: 0 });
        assert_eq!(endpoints(&[(Remote, Ready), (Local, Draining)]), NoLocal::default());
        assert_eq!(endpoints(&[(Remote, Down)]), NoLocal::default());
        endpoints(&[(Remote, Ready)]);
        service.internal_policy = TrafficPolicy::Cluster;
        service.exposure.policy = TrafficPolicy::Local;
        world.apply(Change::Service(Name::new("shop", "web"), Some(service)));
        assert_eq!(no_local(&world), NoLocal { internal: 0, external: 1 });
    }
}
