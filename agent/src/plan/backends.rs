//! Which endpoints of a service port are backends, and which of them get new flows.

use ferroflow_common::abi::lb::Backend;
use ferroflow_common::abi::relay::NodeNumber;
use ferroflow_common::addr::{Addr, Port};

use super::relay::LoadBalancerMode;
use crate::model::service::{Condition, EndpointSlice, NodeHint, Place, ServicePort};
use crate::model::weight::Weights;
use crate::model::{Family, TrafficPolicy};

/// A backend of a service port: it has a row as long as it serves, so that its flows stay (rules 30, 31).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    pub addr: Addr,
    pub port: Port,
    pub condition: Condition,
    /// The sets that it is in: [`Backend::CLUSTER`], [`Backend::LOCAL`], both, or none where it only keeps the flows
    /// that it has.
    pub sets: u8,
    /// Its share of new flows among those of a set.
    pub weight: u8,
    /// The node that packets to it may be relayed to; 0 where it is this one, or none is relayed.
    pub node: NodeNumber,
}

/// What is asked of [`backends`].
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// The families for which the Service has an address; endpoints of others are passed over (rule 10).
    pub families: &'a [Family],
    /// The policies that its frontends have (rule 7).
    pub policies: &'a [TrafficPolicy],
    /// This node's.
    pub zone: Option<&'a str>,
    pub weights: &'a Weights,
    pub mode: LoadBalancerMode,
}

/// An endpoint at one port, in the slice it was found in.
struct Found<'a> {
    addr: Addr,
    port: Port,
    condition: Condition,
    place: Place,
    node_hint: NodeHint,
    zones: &'a [Box<str>],
    weight: u8,
    node: NodeNumber,
}

/// Which of the ready endpoints are near enough (rule 4).
#[derive(Clone, Copy)]
enum Topology<'a> {
    Node,
    Zone(&'a str),
    Any,
}

impl Planned {
    /// Whether it gets new flows anywhere in the cluster: where no endpoint does, clients are told so (rule 14).
    pub fn usable(&self) -> bool {
        self.condition >= Condition::Draining
    }
}

/// The backends of a port, in the order of address and port.
pub fn backends<'a>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    selection: &Selection<'_>,
) -> Vec<Planned> {
    let found = found(port, slices, selection.weights);
    let mut planned = Vec::with_capacity(found.len());
    for family in Family::ALL.into_iter().filter(|family| selection.families.contains(family)) {
        let half: Vec<&Found<'_>> = found.iter().filter(|it| Family::of(&it.addr) == family).collect();
        let start = planned.len();
        planned.extend(half.iter().map(|it| Planned {
            addr: it.addr,
            port: it.port,
            condition: it.condition,
            sets: 0,
            weight: it.weight,
            node: match (selection.mode, it.place) {
                (LoadBalancerMode::Dsr, Place::Remote) => it.node,
                (LoadBalancerMode::Dsr, Place::Local) | (LoadBalancerMode::Snat, _) => 0,
            },
        }));
        for policy in selection.policies {
            let topology = topology(&half, selection.zone);
            let (set, member): (u8, &dyn Fn(&Found<'_>) -> bool) = match policy {
                TrafficPolicy::Cluster => (Backend::CLUSTER, &|it| near(it, topology)),
                // Rule 5: hints are not for it.
                TrafficPolicy::Local => (Backend::LOCAL, &|it| it.place == Place::Local),
            };
            let place = |it: &Found<'_>| *policy == TrafficPolicy::Cluster || it.place == Place::Local;
            // Rule 2: ready endpoints, or where there are none (on this node, for the policy Local) those that still
            // serve while they terminate; for those, hints are no longer asked (rule 3).
            let ready = half.iter().any(|it| it.condition == Condition::Ready && place(it));
            for (it, planned) in half.iter().zip(&mut planned[start..]) {
                let chosen = match it.condition {
                    Condition::Ready => ready && member(it),
                    Condition::Draining => !ready && place(it),
                    Condition::Serving | Condition::Down => false,
                };
                planned.sets |= if chosen { set } else { 0 };
            }
            leave_weightless(&mut planned[start..], set);
        }
    }
    planned
}

/// Takes those without weight out of a set, unless all of it is.
fn leave_weightless(planned: &mut [Planned], set: u8) {
    if planned.iter().any(|it| it.sets & set != 0 && it.weight > 0) {
        planned.iter_mut().filter(|it| it.weight == 0).for_each(|it| it.sets &= !set);
    }
}

/// All endpoints of a port that serve, one of each address and port, in that order.
fn found<'a>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    weights: &Weights,
) -> Vec<Found<'a>> {
    let mut found: Vec<Found<'_>> = Vec::new();
    for slice in slices {
        // Rule 9: by name and protocol; the number is the slice's own.
        let ports = slice.ports.iter().filter(|it| it.name == port.name && it.proto == port.proto);
        for number in ports.map(|it| it.port) {
            found.extend(slice.endpoints.iter().map(|it| Found {
                addr: it.addr,
                port: number,
                condition: it.condition,
                place: it.place,
                node_hint: it.node_hint,
                zones: slice.zones(it),
                weight: weights.of(&it.addr, it.node, it.zone),
                node: it.node.number(),
            }));
        }
    }
    // Rule 8: one of each address and port. While an endpoint moves between slices one copy may be stale; the best
    // one counts, or a live backend would be lost. It is local if any copy is.
    found.sort_unstable_by(|a, b| {
        let order = (a.addr, a.port, b.condition, b.node_hint, b.zones);
        order.cmp(&(b.addr, b.port, a.condition, a.node_hint, a.zones))
    });
    found.dedup_by(|copy, kept| {
        let same = (copy.addr, copy.port) == (kept.addr, kept.port);
        if same {
            kept.place = kept.place.max(copy.place);
        }
        same
    });
    found.retain(|it| it.condition != Condition::Down);
    found
}

/// Rule 4: a hint counts only where every ready endpoint has one and one of them names this node or its zone.
fn topology<'a>(half: &[&Found<'_>], zone: Option<&'a str>) -> Topology<'a> {
    let ready = || half.iter().filter(|it| it.condition == Condition::Ready);
    if ready().all(|it| it.node_hint != NodeHint::Unsaid)
        && ready().any(|it| it.node_hint == NodeHint::ThisNode)
    {
        return Topology::Node;
    }
    match zone {
        Some(zone)
            if ready().all(|it| !it.zones.is_empty()) && ready().any(|it| near(it, Topology::Zone(zone))) =>
        {
            Topology::Zone(zone)
        }
        Some(_) | None => Topology::Any,
    }
}

fn near(it: &Found<'_>, topology: Topology<'_>) -> bool {
    match topology {
        Topology::Node => it.node_hint == NodeHint::ThisNode,
        Topology::Zone(zone) => it.zones.iter().any(|other| **other == *zone),
        Topology::Any => true,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ferroflow_common::addr::Proto;

    use super::*;
    use crate::model::Prefix;
    use crate::model::service::{Endpoint, SlicePort};
    use crate::model::weight::{Label, Target};

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().unwrap())
    }

    fn slice_of(port: u16, endpoints: Vec<Endpoint>) -> EndpointSlice {
        let ports = [SlicePort { name: "http".into(), proto: Proto::TCP, port: Port::new(port) }].into();
        EndpointSlice { service: "web".into(), ports, endpoints: endpoints.into(), ..Default::default() }
    }

    fn slice(port: u16, endpoints: &[(&str, Condition)]) -> EndpointSlice {
        let endpoints =
            endpoints.iter().map(|&(text, condition)| Endpoint::new(addr(text), condition, Place::Remote));
        slice_of(port, endpoints.collect())
    }

    fn http() -> ServicePort {
        ServicePort { name: "http".into(), proto: Proto::TCP, port: Port::new(80), node_port: None }
    }

    /// `addr:port` of the backends in a set, `(addr:port)` of the others.
    fn chosen(slices: &[EndpointSlice], policy: TrafficPolicy, zone: Option<&str>) -> String {
        let selection = Selection {
            families: &Family::ALL,
            policies: &[policy],
            zone,
            weights: &Weights::default(),
            mode: LoadBalancerMode::Snat,
        };
        let texts = backends(&http(), slices.iter(), &selection).into_iter().map(|it| match it.sets {
            0 => format!("({}:{})", it.addr, it.port),
            _ => format!("{}:{}", it.addr, it.port),
        });
        texts.collect::<Vec<_>>().join(" ")
    }

    fn planned(slices: &[EndpointSlice]) -> String {
        chosen(slices, TrafficPolicy::Cluster, None)
    }

    use Condition::{Down, Draining, Ready, Serving};

    /// Endpoints `10.0.0.1`, `10.0.0.2` and so on: `L` local, `r`/`d`/`s` its condition, `@` the zones it is for, `#`
    /// the nodes.
    fn hinted(endpoints: &[&str]) -> EndpointSlice {
        let mut zones: Vec<Box<[Box<str>]>> = Vec::new();
        let endpoints = endpoints.iter().enumerate().map(|(index, text)| {
            let (text, nodes) = text.split_once('#').unwrap_or((text, ""));
            let (text, names) = text.split_once('@').unwrap_or((text, ""));
            let condition = match text.as_bytes().last().unwrap() {
                b'd' => Draining,
                b's' => Serving,
                _ => Ready,
            };
            let place = if text.starts_with('L') { Place::Local } else { Place::Remote };
            let mut endpoint = Endpoint::new(Addr::v4([10, 0, 0, index as u8 + 1]), condition, place);
            if !names.is_empty() {
                zones.push(names.split(',').map(Into::into).collect());
                endpoint.zone_hint = zones.len() as u16;
            }
            endpoint.node_hint = match nodes {
                "" => NodeHint::Unsaid,
                "here" => NodeHint::ThisNode,
                _ => NodeHint::Others,
            };
            endpoint
        });
        let slice = slice_of(1, endpoints.collect());
        EndpointSlice { zones: zones.into(), ..slice }
    }

    /// The last digits of the chosen ones.
    fn digits(endpoints: &[&str], policy: TrafficPolicy, zone: &str) -> String {
        let zone = Some(zone).filter(|zone| !zone.is_empty());
        let text = chosen(&[hinted(endpoints)], policy, zone);
        let chosen = text.split(' ').filter(|it| !it.starts_with('(') && !it.is_empty());
        chosen.map(|it| it.split([':', '.']).nth(3).unwrap()).collect()
    }

    #[test]
    fn rule_4_hints_are_all_or_nothing() {
        let cluster = |endpoints: &[&str], zone: &str| digits(endpoints, TrafficPolicy::Cluster, zone);
        assert_eq!(cluster(&["r@a", "r@b", "r@a,b"], "a"), "13");
        assert_eq!(cluster(&["r@a", "r@b", "r"], "a"), "123", "one ready endpoint has none");
        assert_eq!(cluster(&["r@a", "r@b", "s", "d"], "a"), "1", "those that are not ready are not asked");
        assert_eq!(cluster(&["r@b", "r@c"], "a"), "12", "none for this zone");
        assert_eq!(cluster(&["r@a#here", "r@a#there"], "a"), "1", "the node goes before the zone");
        assert_eq!(cluster(&["r@b#here", "r@a#there"], "a"), "1");
        assert_eq!(cluster(&["r@a#there", "r@b#there"], "a"), "1", "none for this node: the zone counts");
        assert_eq!(cluster(&["r@a#here", "r@b"], "a"), "1", "not all have nodes: the zone counts");
        assert_eq!(cluster(&["r#here", "r"], "a"), "12", "no mixing");
    }

    #[test]
    fn rule_3_the_fallback_to_terminating_endpoints_has_no_topology() {
        assert_eq!(digits(&["d@a", "d@b", "s@a"], TrafficPolicy::Cluster, "a"), "12");
    }

    #[test]
    fn rule_5_hints_are_not_for_the_policy_local_and_not_without_a_zone() {
        assert_eq!(digits(&["Lr@b", "Lr@b#there", "r@a"], TrafficPolicy::Local, "a"), "12");
        assert_eq!(digits(&["r@a", "r@b"], TrafficPolicy::Cluster, ""), "12");
    }

    #[test]
    fn rules_2_and_7_the_sets_of_both_policies_are_decided_apart() {
        let policies = [TrafficPolicy::Cluster, TrafficPolicy::Local];
        let sets = |endpoints: &[&str]| {
            let selection = Selection {
                families: &Family::ALL,
                policies: &policies,
                zone: None,
                weights: &Weights::default(),
                mode: LoadBalancerMode::Snat,
            };
            let slice = hinted(endpoints);
            let found = backends(&http(), [&slice].into_iter(), &selection);
            found.iter().map(|it| it.sets).collect::<Vec<_>>()
        };
        let (cluster, local) = (Backend::CLUSTER, Backend::LOCAL);
        assert_eq!(sets(&["r", "Lr", "Ld"]), [cluster, cluster | local, 0]);
        assert_eq!(sets(&["r", "Ld", "Ls"]), [cluster, local, 0], "none is ready here: the one that drains");
        assert_eq!(sets(&["d", "Ld"]), [cluster, cluster | local]);
        assert_eq!(sets(&["r", "s"]), [cluster, 0], "none here");
    }

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
        assert_eq!(planned(&[two.clone(), one.clone()]), "10.0.0.1:8080 10.0.0.2:8080");
        let mut local = slice(8080, &[("10.0.0.1", Down), ("10.0.0.2", Serving)]);
        local.endpoints[1].place = Place::Local;
        for slices in [[one.clone(), local.clone()], [local, one]] {
            let text = chosen(&slices, TrafficPolicy::Local, None);
            assert_eq!(text, "10.0.0.2:8080", "it is local if any copy is");
        }
    }

    #[test]
    fn rule_9_ports_match_by_name_and_protocol_and_number_by_slice() {
        let mut other = slice(9090, &[("10.0.0.2", Ready)]);
        assert_eq!(
            planned(&[slice(8080, &[("10.0.0.1", Ready)]), other.clone()]),
            "10.0.0.1:8080 10.0.0.2:9090"
        );
        let port = |name: &str, proto| SlicePort { name: name.into(), proto, port: Port::new(1) };
        other.ports = [port("http", Proto::UDP)].into();
        assert_eq!(planned(&[other.clone()]), "");
        other.ports = [port("", Proto::TCP)].into();
        assert_eq!(planned(&[other]), "");
    }

    #[test]
    fn rule_10_the_families_are_independent() {
        let v4 = slice(80, &[("10.0.0.2", Draining), ("10.0.0.1", Draining)]);
        let v6 = slice(80, &[("fd00::2", Ready), ("fd00::1", Draining)]);
        assert_eq!(planned(&[v6.clone(), v4.clone()]), "10.0.0.1:80 10.0.0.2:80 (fd00::1:80) fd00::2:80");
        let selection = Selection {
            families: &[Family::V6],
            policies: &[TrafficPolicy::Cluster],
            zone: None,
            weights: &Weights::default(),
            mode: LoadBalancerMode::Snat,
        };
        assert_eq!(backends(&http(), [v4, v6].iter(), &selection).len(), 2);
    }

    #[test]
    fn with_dsr_backends_on_other_nodes_say_which() {
        let there = Label::of("there");
        let mut slice = hinted(&["r", "Lr", "r"]);
        slice.endpoints.iter_mut().take(2).for_each(|it| it.node = there);
        let nodes = |mode| {
            let (policies, weights) = ([TrafficPolicy::Cluster], Weights::default());
            let selection = Selection {
                families: &Family::ALL,
                policies: &policies,
                zone: None,
                weights: &weights,
                mode,
            };
            let found = backends(&http(), [&slice].into_iter(), &selection);
            found.iter().map(|it| it.node).collect::<Vec<_>>()
        };
        assert_eq!(nodes(LoadBalancerMode::Dsr), [there.number(), 0, 0], "here, and outside of the cluster");
        assert_eq!(nodes(LoadBalancerMode::Snat), [0, 0, 0]);
    }

    #[test]
    fn an_endpoint_without_weight_keeps_its_flows_and_gets_new_ones_only_where_none_has_any() {
        let sets = |zero: &[u8]| {
            let target = |last| Target::Range(Prefix::new(Addr::v4([10, 0, 0, last]), 32).unwrap());
            let weights = Weights::new(zero.iter().map(|last| (target(*last), 0)).collect());
            let policies = [TrafficPolicy::Cluster, TrafficPolicy::Local];
            let selection = Selection {
                families: &Family::ALL,
                policies: &policies,
                zone: None,
                weights: &weights,
                mode: LoadBalancerMode::Snat,
            };
            let slice = hinted(&["r", "Lr", "r"]);
            let found = backends(&http(), [&slice].into_iter(), &selection);
            found.iter().map(|it| it.sets).collect::<Vec<_>>()
        };
        let (cluster, local) = (Backend::CLUSTER, Backend::LOCAL);
        assert_eq!(sets(&[1]), [0, cluster | local, cluster]);
        assert_eq!(sets(&[2]), [cluster, local, cluster], "it is the only one of this node");
        assert_eq!(sets(&[1, 2, 3]), [cluster, cluster | local, cluster]);
    }
}
