//! Where a service port is reached, and by which policy.
//!
//! | frontend | policy | scope |
//! | --- | --- | --- |
//! | cluster IP | internal | external row only |
//! | NodePort, load balancer, external address | external | external row; with the policy Local also an internal one, which has the set of the policy Cluster (rule 16); with the policy Cluster and direct server return also one for what other nodes relay, which has this node's own |

use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey};
use ferroflow_common::addr::{Addr, Port};

use super::relay::LoadBalancerMode;
use super::{Config, ExternalIps};
use crate::model::Family;
use crate::model::service::{Algorithm, Service, ServicePort, TrafficPolicy};

/// A frontend, and the flags that its row has where there is a backend for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PlannedFrontend {
    pub key: FrontendKey,
    pub flags: u32,
}

/// The bit that says of a backend that it is in the set of a frontend with these flags.
pub fn set(flags: u32) -> u8 {
    if flags & Frontend::LOCAL == 0 { Backend::CLUSTER } else { Backend::LOCAL }
}

/// Every frontend of a port, internal rows too; each key once.
pub fn frontends(service: &Service, port: &ServicePort, config: &Config) -> Vec<PlannedFrontend> {
    let mut planned = Vec::new();
    for (place, addr, number) in places(service, port, config) {
        let key = FrontendKey { addr, port: number, proto: port.proto, scope: FrontendKey::EXTERNAL };
        if planned.iter().any(|other: &PlannedFrontend| other.key == key) {
            continue;
        }
        let flags = flags(service, place, Family::of(&addr)) | relays(service, place, config);
        if flags & Frontend::RELAYS != 0 {
            let key = FrontendKey { scope: FrontendKey::RELAYED, ..key };
            let kept = flags & !(Frontend::RELAYS | Frontend::SOURCE_RANGES);
            let flags = kept | Frontend::LOCAL | Frontend::KEEP_CLIENT;
            planned.push(PlannedFrontend { key, flags });
        }
        if flags & Frontend::INTERNAL_ROW != 0 {
            let key = FrontendKey { scope: FrontendKey::INTERNAL, ..key };
            let flags = flags & !(Frontend::INTERNAL_ROW | Frontend::LOCAL);
            planned.push(PlannedFrontend { key, flags });
        }
        planned.push(PlannedFrontend { key, flags });
    }
    planned
}

/// The rows that say which addresses are cluster IPs: they have no slots, whatever backends there are (rule 19).
pub fn cluster_ips(service: &Service) -> impl Iterator<Item = PlannedFrontend> + '_ {
    let row = |addr: &Addr| PlannedFrontend { key: FrontendKey::cluster_ip(*addr), flags: Frontend::REJECT };
    service.cluster_ips.iter().filter(|_| !service.ports.is_empty()).map(row)
}

/// Whether the port has this frontend.
pub fn has(service: &Service, port: &ServicePort, config: &Config, key: &FrontendKey) -> bool {
    key.proto == port.proto
        && places(service, port, config).any(|(_, addr, number)| (addr, number) == (key.addr, key.port))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    ClusterIp,
    LoadBalancer,
    /// A NodePort or an external address.
    Outside,
}

/// Where the port is reached. Of the families that the Service has no cluster IP of, nothing is served (rule 10).
fn places<'a>(
    service: &'a Service,
    port: &'a ServicePort,
    config: &Config,
) -> impl Iterator<Item = (Place, Addr, Port)> + 'a {
    let exposure = &service.exposure;
    let external_ips = match config.external_ips {
        ExternalIps::Serve => &*exposure.external_ips,
        ExternalIps::Ignore => &[],
    };
    let at = move |place| move |addr: &Addr| (place, *addr, port.port);
    let node = port.node_port.into_iter().flat_map(|number| {
        [FrontendKey::NODE_V4, FrontendKey::NODE_V6].map(|addr| (Place::Outside, addr, number))
    });
    let cluster = service.cluster_ips.iter().map(at(Place::ClusterIp));
    let balancer = exposure.load_balancer_ips.iter().map(at(Place::LoadBalancer));
    let all = cluster.chain(balancer).chain(external_ips.iter().map(at(Place::Outside))).chain(node);
    all.filter(|(_, addr, _)| service.serves(Family::of(addr)))
}

/// [`Frontend::RELAYS`] for what outsiders may reach on any node.
fn relays(service: &Service, place: Place, config: &Config) -> u32 {
    let outside = place != Place::ClusterIp && service.exposure.policy == TrafficPolicy::Cluster;
    match config.mode {
        LoadBalancerMode::Dsr if outside => Frontend::RELAYS,
        LoadBalancerMode::Dsr | LoadBalancerMode::Snat => 0,
    }
}

fn flags(service: &Service, place: Place, family: Family) -> u32 {
    let exposure = &service.exposure;
    if place == Place::ClusterIp {
        let choice = match service.algorithm {
            Some(Algorithm::Maglev) => Frontend::MAGLEV,
            Some(Algorithm::LeastConnection) => Frontend::LEAST_CONNECTION,
            None | Some(Algorithm::Random | Algorithm::Weighted) => 0,
        };
        let local = service.internal_policy == TrafficPolicy::Local;
        return choice | if local { Frontend::LOCAL } else { 0 };
    }
    let choice = match service.algorithm {
        None | Some(Algorithm::Maglev | Algorithm::Weighted) => Frontend::MAGLEV,
        Some(Algorithm::LeastConnection) => Frontend::LEAST_CONNECTION,
        Some(Algorithm::Random) => 0,
    };
    let mut flags = Frontend::NORTH_SOUTH | choice;
    if exposure.policy == TrafficPolicy::Local {
        flags |= Frontend::LOCAL | Frontend::KEEP_CLIENT | Frontend::INTERNAL_ROW;
    }
    // Rule 22: only what the load balancer has, and only where there is a range of the family.
    if place == Place::LoadBalancer && exposure.source_ranges.iter().any(|it| it.family() == family) {
        flags |= Frontend::SOURCE_RANGES;
    }
    flags
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ferroflow_common::addr::Proto;

    use super::*;
    use crate::model::{Exposure, Prefix};

    fn config() -> Config {
        Config { external_ips: ExternalIps::Serve, maglev_lengths: &[7], ..Config::default() }
    }

    fn addrs(texts: &[&str]) -> Box<[Addr]> {
        texts.iter().map(|text| Addr::from(text.parse::<IpAddr>().unwrap())).collect()
    }

    fn exposed(external: TrafficPolicy) -> Service {
        let exposure = Exposure {
            policy: external,
            external_ips: addrs(&["192.0.2.9"]),
            load_balancer_ips: addrs(&["192.0.2.1", "2001:db8::1"]),
            ..Exposure::default()
        };
        Service { cluster_ips: addrs(&["10.96.0.1"]), exposure, ..Service::default() }
    }

    fn port() -> ServicePort {
        ServicePort {
            name: "http".into(),
            proto: Proto::TCP,
            port: Port::new(80),
            node_port: Some(Port::new(30080)),
        }
    }

    /// `10.96.0.1:80 cluster` and so on.
    fn said(service: &Service, config: &Config) -> Vec<String> {
        let names = [
            (Frontend::LOCAL, "local"),
            (Frontend::INTERNAL_ROW, "has-internal"),
            (Frontend::KEEP_CLIENT, "keep"),
            (Frontend::NORTH_SOUTH, "ns"),
            (Frontend::RELAYS, "relays"),
            (Frontend::SOURCE_RANGES, "ranges"),
            (Frontend::MAGLEV, "maglev"),
        ];
        let text = |it: &PlannedFrontend| {
            let scope = ["", "/internal", "/own", "/relayed"][usize::from(it.key.scope)];
            let mut words = vec![format!("{}:{}{scope}", it.key.addr, it.key.port)];
            words.extend(names.iter().filter(|(bit, _)| it.flags & bit != 0).map(|(_, name)| (*name).into()));
            words.join(" ")
        };
        frontends(service, &port(), config).iter().map(text).collect()
    }

    #[test]
    fn rule_18_each_policy_is_for_its_own_frontends() {
        let mut service = exposed(TrafficPolicy::Cluster);
        service.internal_policy = TrafficPolicy::Local;
        let expected = [
            "10.96.0.1:80 local",
            "192.0.2.1:80 ns maglev",
            "192.0.2.9:80 ns maglev",
            "0.0.0.0:30080 ns maglev",
        ];
        assert_eq!(said(&service, &config()), expected);
    }

    #[test]
    fn rule_16_with_the_policy_local_traffic_of_this_node_has_a_row_of_its_own() {
        let expected = [
            "10.96.0.1:80",
            "192.0.2.1:80/internal keep ns maglev",
            "192.0.2.1:80 local has-internal keep ns maglev",
            "192.0.2.9:80/internal keep ns maglev",
            "192.0.2.9:80 local has-internal keep ns maglev",
            "0.0.0.0:30080/internal keep ns maglev",
            "0.0.0.0:30080 local has-internal keep ns maglev",
        ];
        assert_eq!(said(&exposed(TrafficPolicy::Local), &config()), expected);
    }

    #[test]
    fn with_dsr_what_other_nodes_relay_has_a_row_of_this_nodes_own_backends() {
        let config = Config { mode: LoadBalancerMode::Dsr, ..config() };
        let mut service = exposed(TrafficPolicy::Cluster);
        service.exposure.source_ranges = Box::new([Prefix::new(Addr::v4([10, 0, 0, 0]), 8).unwrap()]);
        let expected = [
            "10.96.0.1:80",
            "192.0.2.1:80/relayed local keep ns maglev",
            "192.0.2.1:80 ns relays ranges maglev",
            "192.0.2.9:80/relayed local keep ns maglev",
            "192.0.2.9:80 ns relays maglev",
            "0.0.0.0:30080/relayed local keep ns maglev",
            "0.0.0.0:30080 ns relays maglev",
        ];
        assert_eq!(said(&service, &config), expected);
        let local = exposed(TrafficPolicy::Local);
        assert_eq!(said(&local, &config), said(&local, &self::config()), "it keeps its clients anyway");
    }

    #[test]
    fn rule_22_ranges_are_for_load_balancer_addresses_of_their_family() {
        let mut service = exposed(TrafficPolicy::Cluster);
        service.cluster_ips = addrs(&["10.96.0.1", "fd00::1"]);
        service.exposure.source_ranges = Box::new([Prefix::new(Addr::v4([10, 0, 0, 0]), 8).unwrap()]);
        let expected = [
            "10.96.0.1:80",
            "fd00::1:80",
            "192.0.2.1:80 ns ranges maglev",
            "2001:db8::1:80 ns maglev",
            "192.0.2.9:80 ns maglev",
            "0.0.0.0:30080 ns maglev",
            ":::30080 ns maglev",
        ];
        assert_eq!(said(&service, &config()), expected);
    }

    #[test]
    fn external_addresses_are_served_only_where_the_agent_is_told_to() {
        let config = Config { external_ips: ExternalIps::Ignore, ..config() };
        assert!(!said(&exposed(TrafficPolicy::Local), &config).concat().contains("192.0.2.9"));
        assert_eq!(Config::default().external_ips, ExternalIps::Ignore);
    }

    #[test]
    fn an_address_that_stands_twice_is_one_frontend() {
        let mut service = exposed(TrafficPolicy::Cluster);
        service.exposure.external_ips = addrs(&["192.0.2.1", "10.96.0.1"]);
        let expected = ["10.96.0.1:80", "192.0.2.1:80 ns maglev", "0.0.0.0:30080 ns maglev"];
        assert_eq!(said(&service, &config()), expected);
    }

    #[test]
    fn an_annotation_says_how_flows_are_spread() {
        let maglev = |algorithm| {
            let service = Service { algorithm, ..exposed(TrafficPolicy::Cluster) };
            let planned = frontends(&service, &port(), &config());
            planned.iter().filter(|it| it.flags & Frontend::MAGLEV != 0).count()
        };
        assert_eq!([None, Some(Algorithm::Random), Some(Algorithm::Maglev)].map(maglev), [3, 0, 4]);
    }
}
