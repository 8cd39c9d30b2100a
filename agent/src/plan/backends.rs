//! Which endpoints of a service port are backends, and which of them get new flows.

use ferroflow_common::addr::{Addr, Port};

use crate::model::Family;
use crate::model::service::{Condition, Endpoint, EndpointSlice, ServicePort};

/// A backend of a service port: it has a row as long as it serves, so that its flows stay (rules 30, 31).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    pub addr: Addr,
    pub port: Port,
    pub role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Gets new flows.
    Selected,
    /// Keeps the ones it has.
    Kept,
}

/// The backends of a port, in the order of address and port. `serves` says for which families the Service has an
/// address; endpoints of others are passed over (rule 10).
pub fn backends<'a>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    serves: impl Fn(Family) -> bool,
) -> Vec<Planned> {
    let mut found: Vec<(Addr, Port, Condition)> = Vec::new();
    for slice in slices {
        // Rule 9: by name and protocol; the number is the slice's own.
        let ports = slice.ports.iter().filter(|it| it.name == port.name && it.proto == port.proto);
        for number in ports.map(|it| it.port) {
            let serving = slice.endpoints.iter().filter(|it| it.condition != Condition::Down);
            found.extend(serving.map(|&Endpoint { addr, condition, place: _ }| (addr, number, condition)));
        }
    }
    // Rule 8: one of each address and port. While an endpoint moves between slices one copy may be stale; the best
    // one counts, or a live backend would be lost.
    found.sort_unstable_by(|a, b| (a.0, a.1, b.2).cmp(&(b.0, b.1, a.2)));
    found.dedup_by_key(|it| (it.0, it.1));
    let mut planned = Vec::with_capacity(found.len());
    for family in Family::ALL.into_iter().filter(|&family| serves(family)) {
        let half = || found.iter().filter(|it| Family::of(&it.0) == family);
        // Rule 2: ready endpoints, or where there are none those that still serve while they terminate.
        let best =
            if half().any(|it| it.2 == Condition::Ready) { Condition::Ready } else { Condition::Draining };
        planned.extend(half().map(|&(addr, port, condition)| {
            let role = if condition == best { Role::Selected } else { Role::Kept };
            Planned { addr, port, role }
        }));
    }
    planned
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ferroflow_common::addr::Proto;

    use super::*;
    use crate::model::service::{Place, SlicePort};

    fn slice(port: u16, endpoints: &[(&str, Condition)]) -> EndpointSlice {
        let endpoints = endpoints.iter().map(|&(addr, condition)| Endpoint {
            addr: Addr::from(addr.parse::<IpAddr>().unwrap()),
            condition,
            place: Place::Remote,
        });
        EndpointSlice {
            service: "web".into(),
            ports: Box::new([SlicePort { name: "http".into(), proto: Proto::TCP, port: Port::new(port) }]),
            endpoints: endpoints.collect(),
        }
    }

    /// `addr:port` of the selected backends, `(addr:port)` of the kept ones.
    fn planned(slices: &[EndpointSlice]) -> String {
        let port = ServicePort { name: "http".into(), proto: Proto::TCP, port: Port::new(80) };
        let backends = backends(&port, slices.iter(), |_| true);
        let texts: Vec<_> = backends
            .iter()
            .map(|it| match it.role {
                Role::Selected => format!("{}:{}", it.addr, it.port),
                Role::Kept => format!("({}:{})", it.addr, it.port),
            })
            .collect();
        texts.join(" ")
    }

    use Condition::{Down, Draining, Ready, Serving};

    #[test]
    fn rule_2_ready_ones_or_else_those_that_serve_while_they_terminate() {
        let table: &[(&[(&str, Condition)], &str)] = &[
            (&[], ""),
            (&[("10.0.0.1", Ready), ("10.0.0.2", Draining)], "10.0.0.1:8080 (10.0.0.2:8080)"),
            (&[("10.0.0.1", Down), ("10.0.0.2", Draining)], "10.0.0.2:8080"),
            (&[("10.0.0.1", Serving), ("10.0.0.2", Draining)], "(10.0.0.1:8080) 10.0.0.2:8080"),
            (&[("10.0.0.1", Serving), ("10.0.0.2", Down)], "(10.0.0.1:8080)"),
            (&[("10.0.0.1", Down)], ""),
        ];
        for (endpoints, expected) in table {
            assert_eq!(planned(&[slice(8080, endpoints)]), *expected, "{endpoints:?}");
        }
    }

    #[test]
    fn rules_30_and_31_what_serves_keeps_its_row() {
        let endpoints =
            [("10.0.0.1", Ready), ("10.0.0.2", Serving), ("10.0.0.3", Draining), ("10.0.0.4", Down)];
        assert_eq!(planned(&[slice(1, &endpoints)]), "10.0.0.1:1 (10.0.0.2:1) (10.0.0.3:1)");
    }

    #[test]
    fn rule_8_an_endpoint_in_two_slices_counts_once_and_at_its_best() {
        let one = slice(8080, &[("10.0.0.1", Down), ("10.0.0.2", Ready)]);
        let two = slice(8080, &[("10.0.0.1", Ready), ("10.0.0.2", Draining)]);
        assert_eq!(planned(&[one.clone(), two.clone()]), "10.0.0.1:8080 10.0.0.2:8080");
        assert_eq!(planned(&[two, one]), "10.0.0.1:8080 10.0.0.2:8080");
    }

    #[test]
    fn rule_9_ports_match_by_name_and_protocol_and_number_by_slice() {
        let mut other = slice(9090, &[("10.0.0.2", Ready)]);
        assert_eq!(
            planned(&[slice(8080, &[("10.0.0.1", Ready)]), other.clone()]),
            "10.0.0.1:8080 10.0.0.2:9090"
        );
        other.ports[0].proto = Proto::UDP;
        assert_eq!(planned(&[other.clone()]), "");
        other.ports[0] = SlicePort { name: "".into(), proto: Proto::TCP, port: Port::new(1) };
        assert_eq!(planned(&[other]), "");
    }

    #[test]
    fn rule_10_the_families_are_independent() {
        let v4 = slice(80, &[("10.0.0.2", Draining), ("10.0.0.1", Draining)]);
        let v6 = slice(80, &[("fd00::2", Ready), ("fd00::1", Draining)]);
        assert_eq!(planned(&[v6.clone(), v4.clone()]), "10.0.0.1:80 10.0.0.2:80 (fd00::1:80) fd00::2:80");
        let port = ServicePort { name: "http".into(), proto: Proto::TCP, port: Port::new(80) };
        let only_v6 = backends(&port, [v4, v6].iter(), |family| family == Family::V6);
        assert_eq!(only_v6.len(), 2);
    }
}
