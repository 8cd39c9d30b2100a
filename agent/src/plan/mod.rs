//! What the tables should say: pure functions of the model, one key in and its rows out.
//!
//! No I/O, no clock, no randomness. Numbers (service ids, backend indices, slot ranges) are not decided here but by
//! `reconcile`, which knows the ones in use; [`ids`] and [`ranges`] are how it gives them out.

pub mod backends;
pub mod endpoints;
pub mod frontends;
pub mod host_ports;
pub mod ids;
pub mod maglev;
pub mod masquerade;
pub mod node;
pub mod policy;
pub mod ranges;
pub mod relay;
pub mod routes;
pub mod slots;
pub mod sources;

use ferroflow_common::abi::lb::{Frontend, FrontendKey, ServiceName};
use ferroflow_common::addr::Proto;

use crate::model::policy::Live;
use crate::model::service::{Service, ServicePort, TrafficPolicy};
use crate::model::world::{Backing, World};
use crate::model::{Family, HostPorts, Name, Prefix};

pub use backends::Planned;
pub use frontends::PlannedFrontend;
pub use sources::Source;

/// What the agent was told of how to serve.
#[derive(Clone, Debug)]
pub struct Config {
    pub external_ips: ExternalIps,
    pub node_ports: node::NodePortAddresses,
    /// Ranges of cluster IPs, beside those of `ServiceCIDR` objects (rule 19).
    pub service_ranges: Box<[Prefix]>,
    pub masquerade: MasqueradeScope,
    pub world: masquerade::World,
    pub routing: routes::Routing,
    /// Of policies that do not say.
    pub live_flows: Live,
    /// Of the tunnel (`--vxlan-vni`).
    pub vni: u32,
    pub mode: relay::LoadBalancerMode,
    /// The lengths of Maglev tables: [`maglev::LENGTHS`], but for tests.
    pub maglev_lengths: &'static [u32],
}

/// What becomes of `spec.externalIPs`: whoever may write a Service could take any address with them
/// (CVE-2020-8554).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ExternalIps {
    /// They lead to the Service, by its external traffic policy
    Serve,
    /// They are not served
    Ignore,
}

/// Which clients of cluster IPs are masqueraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MasqueradeScope {
    /// Those whose replies would not come back through this node (rule 26 c).
    Outside,
    /// All of them, pods too (rule 26 e).
    All,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            external_ips: ExternalIps::Ignore,
            node_ports: node::NodePortAddresses::Primary,
            service_ranges: Box::default(),
            masquerade: MasqueradeScope::Outside,
            world: masquerade::World::Known,
            routing: routes::Routing::None,
            live_flows: Live::Finish,
            vni: 0,
            mode: relay::LoadBalancerMode::Snat,
            maglev_lengths: maglev::LENGTHS,
        }
    }
}

/// The rows of one Service: one entry a port, in the order of their names.
pub type Desired<'a> = Vec<PortRows<'a>>;

/// The rows of one port of a Service. What the tables call a service is this: it has an id, a name and backends.
#[derive(Debug, PartialEq, Eq)]
pub struct PortRows<'a> {
    /// The port's name, which tells it from the others.
    pub name: &'a str,
    pub text: ServiceName,
    pub proto: Proto,
    pub frontends: Vec<PlannedFrontend>,
    /// Seconds for which a client keeps its backend; 0 without session affinity.
    pub affinity: u32,
    /// Of both families, in the order of address and port.
    pub backends: Vec<Planned>,
    /// Who may use the load balancer's addresses; sorted.
    pub sources: Vec<Source>,
}

/// Why a Service has no rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("`{text}` is longer than the 192 bytes a service's name may have: shorten the port's name")]
    NameTooLong { text: String },
}

/// # Errors
/// Where the Service cannot be laid out.
pub fn service<'a>(world: &'a World, name: &Name, config: &Config) -> Result<Desired<'a>, PlanError> {
    if let Some(ports) = world.host_ports(name) {
        return host_ports::rows(world, name, ports);
    }
    let Some(backing) = world.service(name) else { return Ok(Vec::new()) };
    let Some(service) = &backing.service else { return Ok(Vec::new()) };
    let ports = service.ports.iter().map(|port| port_rows(world, (name, service, port), backing, config));
    let mut desired: Desired<'a> = ports.collect::<Result<_, _>>()?;
    // That an address is a cluster IP is the Service's to say, and every row is some port's.
    if let Some(first) = desired.first_mut() {
        first.frontends.extend(frontends::cluster_ips(service));
    }
    Ok(desired)
}

/// Who asks for frontends.
#[derive(Clone, Copy, Debug)]
pub enum Asker<'a> {
    Service(&'a Service),
    HostPorts(&'a HostPorts),
}

impl<'a> Asker<'a> {
    /// `None` where nobody is called so.
    pub fn of(world: &'a World, name: &Name) -> Option<Self> {
        let service = || world.service(name)?.service.as_ref().map(Self::Service);
        world.host_ports(name).map(Self::HostPorts).or_else(service)
    }

    /// Whether it has this frontend.
    pub fn wants(self, world: &World, key: &FrontendKey, config: &Config) -> bool {
        match self {
            Self::Service(service) => {
                frontends::cluster_ips(service).any(|it| it.key == *key)
                    || service.ports.iter().any(|port| frontends::has(service, port, config, key))
            }
            Self::HostPorts(ports) => host_ports::have(world, ports, key),
        }
    }

    /// Of those that want the same frontend, the one with the lowest rank has it: a Service, which has its port on every
    /// node, before a port of this host.
    pub fn rank(self, name: &Name) -> (bool, (i64, &Name)) {
        match self {
            Self::Service(service) => (false, service.rank(name)),
            Self::HostPorts(_) => (true, (0, name)),
        }
    }
}

/// The id's name in the tables: `namespace/name:port`, without the colon where the port has no name.
pub fn text(name: &Name, port: &str) -> String {
    if port.is_empty() { name.to_string() } else { format!("{name}:{port}") }
}

/// What [`text`] was made of; `None` where it was made of something else.
pub fn names_of(text: &str) -> Option<(Name, &str)> {
    let (namespace, rest) = text.split_once('/')?;
    let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
    Some((Name::new(namespace, name), port))
}

fn port_rows<'a>(
    world: &World,
    (name, service, port): (&Name, &Service, &'a ServicePort),
    backing: &Backing,
    config: &Config,
) -> Result<PortRows<'a>, PlanError> {
    let text = text(name, &port.name);
    let Some(bytes) = ServiceName::new(&text) else { return Err(PlanError::NameTooLong { text }) };
    let mut frontends = frontends::frontends(service, port, config);
    let families: Vec<Family> = Family::ALL.into_iter().filter(|it| service.serves(*it)).collect();
    let policies: Vec<TrafficPolicy> = [(0, TrafficPolicy::Cluster), (Frontend::LOCAL, TrafficPolicy::Local)]
        .into_iter()
        .filter(|(bit, _)| frontends.iter().any(|it| it.flags & Frontend::LOCAL == *bit))
        .map(|(_, policy)| policy)
        .collect();
    let node = world.own_node();
    let zone = node.and_then(|node| node.zone.as_deref());
    let (weights, mode) = (&service.weights, config.mode);
    let selection = backends::Selection { families: &families, policies: &policies, zone, weights, mode };
    let backends = backends::backends(port, backing.slices.values(), &selection);
    for frontend in &mut frontends {
        frontend.flags = settle(*frontend, &backends);
    }
    let guarded = frontends.iter().any(|it| it.flags & Frontend::SOURCE_RANGES != 0);
    let addresses = node.map_or(&[][..], |node| &node.addresses);
    let sources = if guarded { sources::sources(&service.exposure, addresses) } else { Vec::new() };
    Ok(PortRows {
        name: &port.name,
        text: bytes,
        proto: port.proto,
        frontends,
        affinity: service.affinity,
        backends,
        sources,
    })
}

/// The flags of a frontend, now that its backends are known: without any there are no slots to be a table, and it
/// rejects where there is none anywhere (rule 14), but drops where only this node has none (rule 15).
fn settle(PlannedFrontend { key, flags }: PlannedFrontend, backends: &[Planned]) -> u32 {
    let half = || backends.iter().filter(|it| Family::of(&it.addr) == Family::of(&key.addr));
    if half().any(|it| it.sets & frontends::set(flags) != 0) {
        flags
    } else if half().any(Planned::usable) {
        flags & !Frontend::MAGLEV
    } else {
        (flags & !Frontend::MAGLEV) | Frontend::REJECT
    }
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::{Addr, Port};

    use super::*;
    use crate::model::service::Place;
    use crate::model::{Change, Condition, Endpoint, EndpointSlice, SlicePort};

    fn world(name: &Name, service: Service) -> World {
        let mut world = World::new("here");
        world.apply(Change::Service(name.clone(), Some(service)));
        world
    }

    #[test]
    fn a_service_has_a_row_for_each_address_and_port() {
        let v6 = Addr::from("fd00::10".parse::<std::net::IpAddr>().unwrap());
        let port = |name: &str, proto| ServicePort {
            name: name.into(),
            proto,
            port: Port::new(53),
            node_port: None,
        };
        let object = Service {
            cluster_ips: Box::new([Addr::v4([10, 96, 0, 10]), v6]),
            ports: Box::new([port("dns", Proto::UDP), port("dns-tcp", Proto::TCP)]),
            ..Service::default()
        };
        let name = Name::new("kube-system", "dns");
        let world = world(&name, object);
        let desired = service(&world, &name, &Config::default()).unwrap();
        let texts: Vec<_> = desired.iter().map(|rows| rows.text.as_str().unwrap()).collect();
        assert_eq!(texts, ["kube-system/dns:dns", "kube-system/dns:dns-tcp"]);
        let keys = desired[1].frontends.iter().map(|it| (it.key.addr, it.key.port.host(), it.key.proto));
        let expected = [(Addr::v4([10, 96, 0, 10]), 53, Proto::TCP), (v6, 53, Proto::TCP)];
        assert_eq!(keys.collect::<Vec<_>>(), expected);
        assert_eq!(service(&world, &Name::new("a", "b"), &Config::default()), Ok(Vec::new()));
    }

    #[test]
    fn rules_14_and_15_nobody_anywhere_rejects_and_nobody_here_drops() {
        let name = Name::new("default", "web");
        let number = Port::new(80);
        let port = ServicePort { name: "".into(), proto: Proto::TCP, port: number, node_port: Some(number) };
        let mut object = Service {
            cluster_ips: Box::new([Addr::v4([10, 96, 0, 1])]),
            ports: Box::new([port]),
            ..Service::default()
        };
        object.exposure.policy = TrafficPolicy::Local;
        let mut world = world(&name, object);
        let mut rows = |endpoints: &[Endpoint]| {
            let ports = [SlicePort { name: "".into(), proto: Proto::TCP, port: number }].into();
            let slice = EndpointSlice {
                service: "web".into(),
                ports,
                endpoints: endpoints.into(),
                ..Default::default()
            };
            world.apply(Change::EndpointSlice(Name::new("default", "s"), Some(slice)));
            let desired = service(&world, &name, &Config::default()).unwrap();
            let has = |it: &PlannedFrontend| {
                let set = frontends::set(it.flags);
                let any = desired[0].backends.iter().any(|backend| backend.sets & set != 0);
                (it.key.addr == FrontendKey::NODE_V4, it.key.scope, any, it.flags & Frontend::REJECT != 0)
            };
            let ports = desired[0].frontends.iter().filter(|it| !it.key.is_cluster_ip());
            ports.map(has).collect::<Vec<_>>()
        };
        let remote = |condition| Endpoint::new(Addr::v4([10, 0, 0, 1]), condition, Place::Remote);
        let (external, internal) = (FrontendKey::EXTERNAL, FrontendKey::INTERNAL);
        let nobody =
            [(false, external, false, true), (true, internal, false, true), (true, external, false, true)];
        assert_eq!(rows(&[]), nobody);
        assert_eq!(rows(&[remote(Condition::Serving)]), nobody, "it gets no new flows");
        for condition in [Condition::Ready, Condition::Draining] {
            assert_eq!(
                rows(&[remote(condition)]),
                [
                    (false, external, true, false),
                    (true, internal, true, false),
                    (true, external, false, false)
                ],
                "dropped from outside, and rule 16 inside"
            );
        }
    }

    #[test]
    fn rule_19_a_cluster_ip_is_known_as_such_once_whatever_its_ports_are() {
        let port = |name: &str, number| ServicePort {
            name: name.into(),
            proto: Proto::TCP,
            port: Port::new(number),
            node_port: Some(Port::new(30_000 + number)),
        };
        let mut object = Service {
            cluster_ips: Box::new([Addr::v4([10, 96, 0, 1])]),
            ports: Box::new([port("a", 80), port("b", 81)]),
            ..Service::default()
        };
        object.exposure.load_balancer_ips = Box::new([Addr::v4([192, 0, 2, 1])]);
        let name = Name::new("default", "web");
        let rows = |object: &Service| {
            let world = world(&name, object.clone());
            let desired = service(&world, &name, &Config::default()).unwrap();
            let all = desired.iter().flat_map(|rows| rows.frontends.clone());
            all.filter(|it| it.key.is_cluster_ip()).collect::<Vec<_>>()
        };
        let key = FrontendKey::cluster_ip(Addr::v4([10, 96, 0, 1]));
        assert_eq!(
            rows(&object),
            [PlannedFrontend { key, flags: Frontend::REJECT }],
            "rule 21: no other address"
        );
        let world = world(&name, object.clone());
        assert!(Asker::of(&world, &name).unwrap().wants(&world, &key, &Config::default()));
        object.ports = Box::default();
        assert_eq!(rows(&object), []);
    }

    #[test]
    fn a_name_can_be_read_back() {
        for (namespace, name, port) in [("default", "web", "http"), ("a", "b", "")] {
            let name = Name::new(namespace, name);
            assert_eq!(names_of(&text(&name, port)), Some((name, port)));
        }
        assert_eq!(text(&Name::new("a", "b"), ""), "a/b");
        assert_eq!(names_of("nonsense"), None);
    }

    #[test]
    fn a_name_that_is_too_long_is_an_error() {
        let port = ServicePort {
            name: "p".repeat(63).into(),
            proto: Proto::TCP,
            port: Port::new(80),
            node_port: None,
        };
        let object = Service { ports: Box::new([port]), ..Service::default() };
        let long = Name::new("n".repeat(65), "s".repeat(63));
        let world = world(&long, object);
        let result = service(&world, &long, &Config::default());
        assert!(matches!(result, Err(PlanError::NameTooLong { text }) if text.len() == 193));
    }
}
