//! `healthCheckNodePort`: whether a load balancer should send a service's traffic to this node (rule 40).

use std::collections::{BTreeMap, BTreeSet};

use ferroflow_common::addr::{Addr, Port};
use serde_json::json;

use super::{Answer, Verdict};
use crate::model::service::Place;
use crate::model::world::Backing;
use crate::model::{Condition, Family, Name, World};

/// What is answered on one health check port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub service: Name,
    pub(super) ipv4: usize,
    pub(super) ipv6: usize,
}

/// The checks of this node by port. Of two Services with one port the first by name has it.
pub fn checks(world: &World) -> BTreeMap<Port, Check> {
    let mut checks = BTreeMap::new();
    for (name, backing) in world.health_checked() {
        let port = backing.service.as_ref().and_then(|service| service.exposure.health_check_port);
        if let Some(port) = port {
            checks.entry(port).or_insert_with(|| Check::new(name.clone(), backing));
        }
    }
    checks
}

impl Check {
    fn new(service: Name, backing: &Backing) -> Self {
        // Addresses, not addresses and ports; what only terminates gets traffic and does not count.
        let endpoints = backing.slices.values().flat_map(|slice| &slice.endpoints);
        let ready = endpoints.filter(|it| it.condition == Condition::Ready && it.place == Place::Local);
        let addresses: BTreeSet<Addr> = ready.map(|it| it.addr).collect();
        let ipv4 = addresses.iter().filter(|addr| Family::of(addr) == Family::V4).count();
        Self { service, ipv4, ipv6: addresses.len() - ipv4 }
    }

    /// How many endpoints there are here for those who ask over this family.
    pub fn endpoints(&self, family: Family) -> usize {
        match family {
            Family::V4 => self.ipv4,
            Family::V6 => self.ipv6,
        }
    }

    /// The answer to one who asks over `family`, whatever the path.
    pub fn answer(&self, family: Family, proxy: Verdict) -> Answer {
        let (count, healthy) = (self.endpoints(family), proxy == Verdict::Healthy);
        let body = json!({
            "service": { "namespace": &*self.service.namespace, "name": &*self.service.name },
            "localEndpoints": count,
            "serviceProxyHealthy": healthy,
        });
        let mut answer = Answer::new(Verdict::from(count > 0 && healthy), body.to_string());
        answer.headers.push(("x-load-balancing-endpoint-weight", count.to_string()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::{Change, Endpoint, EndpointSlice, Service};

    fn name(text: &str) -> Name {
        Name::new("shop", text)
    }

    fn service(port: u16) -> Service {
        let mut service = Service::default();
        service.exposure.health_check_port = Some(Port::new(port)).filter(|port| *port != Port::ZERO);
        service
    }

    fn slice(slice: &str, endpoints: &[(&str, Condition, Place)]) -> Change {
        let endpoints = endpoints.iter().map(|(text, condition, place)| {
            Endpoint::new(Addr::from(text.parse::<IpAddr>().unwrap()), *condition, *place)
        });
        let object = EndpointSlice {
            service: "web".into(),
            endpoints: endpoints.collect(),
            ..EndpointSlice::default()
        };
        Change::EndpointSlice(name(slice), Some(object))
    }

    #[test]
    fn rule_40_local_ready_addresses_count_once() {
        let mut world = World::new("here");
        world.apply(Change::Service(name("web"), Some(service(31000))));
        world.apply(slice(
            "web-1",
            &[
                ("10.0.0.1", Condition::Ready, Place::Local),
                ("10.0.0.2", Condition::Ready, Place::Remote),
                ("10.0.0.3", Condition::Draining, Place::Local),
                ("10.0.0.4", Condition::Serving, Place::Local),
                ("fd00::1", Condition::Ready, Place::Local),
            ],
        ));
        world.apply(slice(
            "web-2",
            &[("10.0.0.1", Condition::Ready, Place::Local), ("10.0.0.5", Condition::Ready, Place::Local)],
        ));
        let checks = checks(&world);
        let check = &checks[&Port::new(31000)];
        assert_eq!((check.endpoints(Family::V4), check.endpoints(Family::V6)), (2, 1));
        let answer = check.answer(Family::V4, Verdict::Healthy);
        assert_eq!(answer.status, 200);
        let headers: Vec<_> = answer.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let expected = [
            ("content-type", "application/json"),
            ("x-content-type-options", "nosniff"),
            ("x-load-balancing-endpoint-weight", "2"),
        ];
        assert_eq!(headers, expected);
        let body: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        let expected = json!({"service": {"namespace": "shop", "name": "web"}, "localEndpoints": 2,
            "serviceProxyHealthy": true});
        assert_eq!(body, expected);
        assert_eq!(check.answer(Family::V4, Verdict::Unhealthy).status, 503);
    }

    #[test]
    fn rule_40_only_terminating_endpoints_are_none() {
        let mut world = World::new("here");
        world.apply(Change::Service(name("web"), Some(service(31000))));
        world.apply(slice("web-1", &[("10.0.0.1", Condition::Draining, Place::Local)]));
        let check = checks(&world).remove(&Port::new(31000)).unwrap();
        assert_eq!(check.answer(Family::V4, Verdict::Healthy).status, 503);
        assert!(check.answer(Family::V4, Verdict::Healthy).body.contains("\"localEndpoints\":0"));
    }

    #[test]
    fn ports_come_and_go_with_their_services() {
        let mut world = World::new("here");
        let ports = |world: &World| checks(world).into_keys().map(Port::host).collect::<Vec<_>>();
        world.apply(slice("web-1", &[("10.0.0.1", Condition::Ready, Place::Local)]));
        assert_eq!(ports(&world), [0; 0]);
        world.apply(Change::Service(name("web"), Some(service(31000))));
        world.apply(Change::Service(name("able"), Some(service(31000))));
        world.apply(Change::Service(name("more"), Some(service(31001))));
        assert_eq!(ports(&world), [31000, 31001]);
        assert_eq!(checks(&world)[&Port::new(31000)].service, name("able"));
        world.apply(Change::Service(name("more"), Some(service(31002))));
        world.apply(Change::Service(name("able"), None));
        assert_eq!(ports(&world), [31000, 31002]);
        assert_eq!(checks(&world)[&Port::new(31000)].service, name("web"));
        world.apply(Change::Service(name("more"), Some(service(0))));
        world.apply(Change::Service(name("web"), None));
        assert_eq!(ports(&world), [0; 0]);
    }
}
