//! What the tables should say: pure functions of the model, one key in and its rows out.
//!
//! No I/O, no clock, no randomness. Numbers (service ids, backend indices, slot ranges) are not decided here but by
//! `reconcile`, which knows the ones in use; [`ids`] and [`ranges`] are how it gives them out.

pub mod backends;
pub mod endpoints;
pub mod ids;
pub mod ranges;
pub mod slots;

use ferroflow_common::abi::lb::{FrontendKey, ServiceName};
use ferroflow_common::addr::Proto;

use crate::model::service::{Service, ServicePort};
use crate::model::world::Backing;
use crate::model::{Family, Name};

pub use backends::{Planned, Role};

/// The rows of one Service: one entry a port, in the order of their names.
pub type Desired<'a> = Vec<PortRows<'a>>;

/// The rows of one port of a Service. What the tables call a service is this: it has an id, a name and backends.
#[derive(Debug, PartialEq, Eq)]
pub struct PortRows<'a> {
    /// The port's name, which tells it from the others.
    pub name: &'a str,
    pub text: ServiceName,
    pub proto: Proto,
    /// One for each cluster IP.
    pub frontends: Vec<FrontendKey>,
    /// Of both families, in the order of address and port.
    pub backends: Vec<Planned>,
}

/// Why a Service has no rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("`{text}` is longer than the 192 bytes a service's name may have: shorten the port's name")]
    NameTooLong { text: String },
}

/// # Errors
/// Where the Service cannot be laid out.
pub fn service<'a>(name: &Name, backing: &'a Backing) -> Result<Desired<'a>, PlanError> {
    let Some(service) = &backing.service else { return Ok(Vec::new()) };
    service.ports.iter().map(|port| port_rows(name, service, port, backing)).collect()
}

/// The frontend of a port at one of the Service's addresses.
pub fn frontends<'a>(service: &'a Service, port: &'a ServicePort) -> impl Iterator<Item = FrontendKey> + 'a {
    let ServicePort { name: _, proto, port } = *port;
    service.cluster_ips.iter().map(move |&addr| FrontendKey {
        addr,
        port,
        proto,
        scope: FrontendKey::EXTERNAL,
    })
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
    name: &Name,
    service: &Service,
    port: &'a ServicePort,
    backing: &Backing,
) -> Result<PortRows<'a>, PlanError> {
    let text = text(name, &port.name);
    let Some(bytes) = ServiceName::new(&text) else { return Err(PlanError::NameTooLong { text }) };
    let has = |family| service.cluster_ips.iter().any(|addr| Family::of(addr) == family);
    Ok(PortRows {
        name: &port.name,
        text: bytes,
        proto: port.proto,
        frontends: frontends(service, port).collect(),
        backends: backends::backends(port, backing.slices.values(), has),
    })
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::{Addr, Port};

    use super::*;

    #[test]
    fn a_service_has_a_row_for_each_address_and_port() {
        let v6 = Addr::from("fd00::10".parse::<std::net::IpAddr>().unwrap());
        let port = |name: &str, proto| ServicePort { name: name.into(), proto, port: Port::new(53) };
        let service_object = Service {
            cluster_ips: Box::new([Addr::v4([10, 96, 0, 10]), v6]),
            ports: Box::new([port("dns", Proto::UDP), port("dns-tcp", Proto::TCP)]),
        };
        let backing = Backing { service: Some(service_object), slices: Default::default() };
        let name = Name::new("kube-system", "dns");
        let desired = service(&name, &backing).unwrap();
        let texts: Vec<_> = desired.iter().map(|rows| rows.text.as_str().unwrap()).collect();
        assert_eq!(texts, ["kube-system/dns:dns", "kube-system/dns:dns-tcp"]);
        let keys: Vec<_> =
            desired[1].frontends.iter().map(|key| (key.addr, key.port.host(), key.proto)).collect();
        assert_eq!(keys, [(Addr::v4([10, 96, 0, 10]), 53, Proto::TCP), (v6, 53, Proto::TCP)]);
        assert_eq!(service(&name, &Backing::default()), Ok(Vec::new()));
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
        let port = ServicePort { name: "p".repeat(63).into(), proto: Proto::TCP, port: Port::new(80) };
        let object = Service { cluster_ips: Box::default(), ports: Box::new([port]) };
        let backing = Backing { service: Some(object), slices: Default::default() };
        let long = Name::new("n".repeat(65), "s".repeat(63));
        assert!(
            matches!(service(&long, &backing), Err(PlanError::NameTooLong { text }) if text.len() == 193)
        );
    }
}
