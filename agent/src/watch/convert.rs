//! Kubernetes objects to the model: pure, and the only place that reads Kubernetes types. Whatever passes here makes
//! sense; later stages need not look again.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ferroflow_common::addr::{Addr, Port, Proto};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use super::fault::{Fault, Invalid};
use super::weights::{self, Spread};
use super::{exposure, policy};
use crate::model::service::{Place, Zones};
use crate::model::weight::Label;
use crate::model::{
    Change, Condition, Endpoint, EndpointSlice, Family, Name, Network, Node, NodeHint, Pod, Prefix, Service,
    ServicePort, SlicePort, Stay,
};

type Result<T> = std::result::Result<T, Invalid>;

/// # Errors
/// The first field that makes no sense.
pub fn service(object: &core::Service) -> Result<Change> {
    let name = name_of(&object.metadata, LABEL)?;
    let spec = object.spec.as_ref();
    let external = spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName");
    let (Some(spec), false) = (spec, external || is_for_others(&object.metadata)) else {
        return Ok(Change::Service(name, None));
    };
    let cluster_ips = cluster_ips(spec)?;
    if cluster_ips.is_empty() {
        return Ok(Change::Service(name, None));
    }
    let kind = exposure::kind(spec)?;
    let Spread { algorithm, weights } = weights::spread(&object.metadata)?;
    let service = Service {
        cluster_ips,
        ports: service_ports(spec.ports.as_deref().unwrap_or_default(), kind)?,
        internal_policy: exposure::policy(spec.internal_traffic_policy.as_deref())
            .map_err(|fault| fault.at("spec.internalTrafficPolicy"))?,
        affinity: exposure::affinity(spec)?,
        algorithm,
        weights,
        created: object.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second()),
        exposure: exposure::exposure(object, spec)?,
    };
    Ok(Change::Service(name, Some(service)))
}

/// `node` is the node this agent runs on.
///
/// # Errors
/// The first field that makes no sense.
pub fn endpoint_slice(object: &discovery::EndpointSlice, node: &str) -> Result<Change> {
    let name = name_of(&object.metadata, SUBDOMAIN)?;
    let labels = object.metadata.labels.as_ref();
    let owner = labels.and_then(|labels| labels.get("kubernetes.io/service-name"));
    let owner = owner.filter(|owner| !owner.is_empty());
    let (Some(service), false) = (owner, is_for_others(&object.metadata)) else {
        return Ok(Change::EndpointSlice(name, None));
    };
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => return Ok(Change::EndpointSlice(name, None)),
        "" => return Err(Fault::Missing { needed: "IPv4 or IPv6" }.at("addressType")),
        text => return Err(Fault::NotAnAddressType { text: text.into() }.at("addressType")),
    };
    let (mut endpoints, mut zones) = (Vec::new(), Vec::new());
    for (index, it) in object.endpoints.iter().flatten().enumerate() {
        let endpoint = endpoint(it, family, node).map_err(|e| e.within(format!("endpoints[{index}]")))?;
        endpoints.push(Endpoint { zone_hint: zone_hint(it, &mut zones), ..endpoint });
    }
    let slice = EndpointSlice {
        service: service.as_str().into(),
        ports: slice_ports(object.ports.as_deref().unwrap_or_default())?,
        endpoints: endpoints.into(),
        zones: zones.into(),
    };
    Ok(Change::EndpointSlice(name, Some(slice)))
}

/// Whether a Service or EndpointSlice says by label that no proxy is to serve it, or another one (rule 12): Services too
/// say that they are headless by label, with a cluster IP.
fn is_for_others(metadata: &ObjectMeta) -> bool {
    let label = |key| metadata.labels.as_ref().and_then(|labels| labels.get(key));
    label("service.kubernetes.io/headless").is_some()
        || label("service.kubernetes.io/service-proxy-name").is_some_and(|proxy| proxy != PROXY_NAME)
}

/// A range that contains every address is none of a cluster: all traffic would be for services.
///
/// # Errors
/// The first field that makes no sense.
pub fn service_cidr(object: &networking::ServiceCIDR) -> Result<Change> {
    let name = name_of(&object.metadata, SUBDOMAIN)?.name;
    let texts = object.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten()).enumerate();
    let ranges = texts.map(|(index, text)| {
        prefix(text)
            .and_then(|it| {
                it.is_proper().then_some(it).ok_or_else(|| Fault::NotARange { text: text.clone() })
            })
            .map_err(|fault| fault.at(format!("spec.cidrs[{index}]")))
    });
    Ok(Change::ServiceCidr((*name).into(), Some(ranges.collect::<Result<_>>()?)))
}

/// # Errors
/// The first field that makes no sense.
pub fn node(object: &core::Node) -> Result<Change> {
    let name = name_of(&object.metadata, SUBDOMAIN)?.name;
    let reported = object.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let mut addresses = Vec::new();
    for kind in ["InternalIP", "ExternalIP"] {
        for (index, it) in reported.clone().enumerate().filter(|(_, it)| it.type_ == kind) {
            addresses
                .push(address(&it.address).map_err(|e| e.at(format!("status.addresses[{index}].address")))?);
        }
    }
    let spec = object.spec.as_ref();
    let (path, ranges) = match spec.and_then(|spec| spec.pod_cidrs.as_deref()) {
        Some(ranges) => ("spec.podCIDRs", ranges),
        None => (
            "spec.podCIDR",
            spec.and_then(|spec| spec.pod_cidr.as_ref()).map_or(&[][..], std::slice::from_ref),
        ),
    };
    let pod_cidrs = ranges.iter().enumerate();
    let pod_cidrs =
        pod_cidrs.map(|(index, text)| prefix(text).map_err(|fault| fault.at(format!("{path}[{index}]"))));
    let labels = object.metadata.labels.as_ref();
    let zone = labels.and_then(|labels| labels.get("topology.kubernetes.io/zone"));
    let zone = zone.filter(|zone| !zone.is_empty()).map(|zone| zone.as_str().into());
    let node = Node {
        addresses: addresses.into(),
        pod_cidrs: pod_cidrs.collect::<Result<_>>()?,
        zone,
        stay: stay(object),
    };
    Ok(Change::Node((*name).into(), Some(node)))
}

fn stay(object: &core::Node) -> Stay {
    let taints = object.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let leaves = object.metadata.deletion_timestamp.is_some()
        || taints.map(|taint| &taint.key).any(|key| key == "ToBeDeletedByClusterAutoscaler");
    if leaves { Stay::Leaves } else { Stay::Stays }
}

/// # Errors
/// The first field that makes no sense.
pub fn pod(object: &core::Pod) -> Result<Change> {
    let name = name_of(&object.metadata, SUBDOMAIN)?;
    let spec = object.spec.as_ref();
    let status = object.status.as_ref();
    let finished = matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed"));
    let host_network = spec.and_then(|spec| spec.host_network) == Some(true);
    let mut addresses = Vec::new();
    if let Some(status) = status.filter(|_| !finished && !host_network) {
        for (index, it) in status.pod_ips.iter().flatten().enumerate() {
            addresses.push(address(&it.ip).map_err(|fault| fault.at(format!("status.podIPs[{index}].ip")))?);
        }
        if let (true, Some(text)) = (addresses.is_empty(), &status.pod_ip) {
            addresses.push(address(text).map_err(|fault| fault.at("status.podIP"))?);
        }
    }
    let node = spec.and_then(|spec| spec.node_name.as_deref()).unwrap_or_default().into();
    let network = match (finished, host_network) {
        (true, _) => Network::Left,
        (false, true) => Network::Host,
        (false, false) => Network::Own,
    };
    let (labels, ports) = policy::labels_and_ports(object)?;
    let uid = object.metadata.uid.as_deref().unwrap_or_default().into();
    let (addresses, ports) = (addresses.into(), ports.into());
    Ok(Change::Pod(name, Some(Pod { uid, node, network, addresses, labels, ports })))
}

/// Where a slice says since when its endpoints are as they are.
pub(super) const TRIGGER: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// The moment that [`TRIGGER`] gives (RFC 3339); `None` where it gives none: it is for measuring only.
pub(super) fn trigger(text: &str) -> Option<SystemTime> {
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}

pub(super) fn name_of(metadata: &ObjectMeta, limit: usize) -> Result<Name> {
    name(metadata.namespace.as_deref(), metadata.name.as_deref().unwrap_or_default(), limit)
}

/// The name of an object, in the namespace `default` where it names none.
pub(super) fn name(namespace: Option<&str>, name: &str, limit: usize) -> Result<Name> {
    let namespace = namespace.unwrap_or("default");
    if name.is_empty() {
        return Err(Fault::Missing { needed: "every object has a name" }.at("metadata.name"));
    }
    for (path, text, limit) in [("metadata.namespace", namespace, LABEL), ("metadata.name", name, limit)] {
        named(text, limit).map_err(|fault| fault.at(path))?;
    }
    Ok(Name::new(namespace, name))
}

fn cluster_ips(spec: &core::ServiceSpec) -> Result<Box<[Addr]>> {
    let first = spec.cluster_ip.as_deref().unwrap_or_default();
    let all = spec.cluster_ips.as_deref().unwrap_or_default();
    if let Some(other) = all.first().filter(|other| !first.is_empty() && *other != first) {
        let (text, other) = (first.into(), other.clone());
        return Err(Fault::Contradicts { text, other, path: "spec.clusterIPs[0]" }.at("spec.clusterIP"));
    }
    if first == "None" || all.iter().any(|text| text == "None") {
        return Ok(Box::default());
    }
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let mut addresses: Vec<Addr> = Vec::new();
    let texts = if all.is_empty() { vec![first] } else { all.iter().map(String::as_str).collect() };
    for (index, text) in texts.into_iter().enumerate().filter(|(_, text)| !text.is_empty()) {
        let path =
            || if all.is_empty() { "spec.clusterIP".into() } else { format!("spec.clusterIPs[{index}]") };
        let addr = address(text).map_err(|fault| fault.at(path()))?;
        let family = Family::of(&addr);
        if !families.is_empty() && !families.iter().any(|it| it == family.name()) {
            let family = format!("spec.ipFamilies ({})", families.join(", "));
            let way_out = "add its family there, or give an address of that family";
            return Err(Fault::WrongFamily { addr: addr.ip(), family, way_out }.at(path()));
        }
        if addresses.iter().any(|other| Family::of(other) == family) {
            return Err(Fault::SecondOfFamily { addr: addr.ip() }.at(path()));
        }
        addresses.push(addr);
    }
    Ok(addresses.into())
}

fn service_ports(ports: &[core::ServicePort], kind: exposure::Kind) -> Result<Box<[ServicePort]>> {
    if ports.is_empty() {
        return Err(Fault::Missing { needed: "a Service with a cluster IP has a port" }.at("spec.ports"));
    }
    let mut parsed: Vec<ServicePort> = Vec::with_capacity(ports.len());
    for (index, it) in ports.iter().enumerate() {
        let path = |field: &str| format!("spec.ports[{index}].{field}");
        let at = |first: usize| format!("spec.ports[{first}]");
        let name = it.name.as_deref().unwrap_or_default();
        if name.is_empty() && ports.len() > 1 {
            return Err(
                Fault::Missing { needed: "each of several ports of a Service has a name" }.at(path("name"))
            );
        }
        if !name.is_empty() {
            named(name, LABEL).map_err(|fault| fault.at(path("name")))?;
        }
        let proto = protocol(it.protocol.as_deref()).map_err(|fault| fault.at(path("protocol")))?;
        let port = port(it.port).map_err(|fault| fault.at(path("port")))?;
        if let Some(first) = parsed.iter().position(|other| &*other.name == name) {
            return Err(Fault::DuplicateName { name: name.into(), first: at(first) }.at(path("name")));
        }
        if let Some(first) = parsed.iter().position(|other| (other.port, other.proto) == (port, proto)) {
            let proto = proto.name().unwrap_or_default();
            return Err(Fault::DuplicatePort { port: port.host(), proto, first: at(first) }.at(path("port")));
        }
        let node_port =
            exposure::node_port(kind, it.node_port).map_err(|fault| fault.at(path("nodePort")))?;
        if let Some(number) = node_port
            && let Some(first) =
                parsed.iter().position(|other| (other.node_port, other.proto) == (node_port, proto))
        {
            let (port, proto) = (number.host(), proto.name().unwrap_or_default());
            return Err(Fault::DuplicatePort { port, proto, first: at(first) }.at(path("nodePort")));
        }
        parsed.push(ServicePort { name: name.into(), proto, port, node_port });
    }
    parsed.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(parsed.into())
}

/// Ports without a number are left out (rule 9).
fn slice_ports(ports: &[discovery::EndpointPort]) -> Result<Arc<[SlicePort]>> {
    let numbered = ports.iter().enumerate().filter(|(_, it)| it.port.is_some_and(|number| number != 0));
    numbered
        .map(|(index, it)| {
            Ok(SlicePort {
                name: it.name.as_deref().unwrap_or_default().into(),
                proto: protocol(it.protocol.as_deref())
                    .map_err(|fault| fault.at(format!("ports[{index}].protocol")))?,
                port: port(it.port.unwrap_or_default())
                    .map_err(|fault| fault.at(format!("ports[{index}].port")))?,
            })
        })
        .collect()
}

fn endpoint(object: &discovery::Endpoint, family: Family, node: &str) -> Result<Endpoint> {
    let Some(text) = object.addresses.first() else {
        return Err(Fault::Missing { needed: "an endpoint has an address" }.at("addresses"));
    };
    let addr = address(text).map_err(|fault| fault.at("addresses[0]"))?;
    if Family::of(&addr) != family {
        let way_out = "put it into an EndpointSlice of its family";
        let family = format!("addressType {}", family.name());
        return Err(Fault::WrongFamily { addr: addr.ip(), family, way_out }.at("addresses[0]"));
    }
    let place = if object.node_name.as_deref() == Some(node) { Place::Local } else { Place::Remote };
    let for_nodes = || object.hints.iter().flat_map(|hints| hints.for_nodes.iter().flatten());
    let node_hint = match for_nodes().next() {
        None => NodeHint::Unsaid,
        Some(_) if for_nodes().any(|it| it.name == node) => NodeHint::ThisNode,
        Some(_) => NodeHint::Others,
    };
    let condition = condition(object.conditions.as_ref());
    let label = |name: &Option<String>| name.as_deref().map_or(Label::NONE, Label::of);
    let (node, zone) = (label(&object.node_name), label(&object.zone));
    Ok(Endpoint { addr, condition, place, node_hint, zone_hint: 0, node, zone })
}

/// Which of `known` the endpoint's zones are, counted from 1; new ones are added. More lists than can be counted
/// are as if the endpoint had none.
fn zone_hint(object: &discovery::Endpoint, known: &mut Vec<Zones>) -> u16 {
    let for_zones = object.hints.iter().flat_map(|hints| hints.for_zones.iter().flatten());
    let mut zones: Vec<Box<str>> = for_zones.map(|it| it.name.as_str().into()).collect();
    if zones.is_empty() {
        return 0;
    }
    zones.sort_unstable();
    zones.dedup();
    let index = known.iter().position(|other| **other == *zones).unwrap_or_else(|| {
        known.push(zones.into());
        known.len() - 1
    });
    u16::try_from(index + 1).unwrap_or_default()
}

/// What is not said means ready, serving, not terminating (rule 1).
fn condition(conditions: Option<&discovery::EndpointConditions>) -> Condition {
    let ready = conditions.and_then(|it| it.ready).unwrap_or(true);
    let serving = conditions.and_then(|it| it.serving).unwrap_or(true);
    let terminating = conditions.and_then(|it| it.terminating).unwrap_or(false);
    match (ready, serving, terminating) {
        (true, _, _) => Condition::Ready,
        (false, true, true) => Condition::Draining,
        (false, true, false) => Condition::Serving,
        (false, false, _) => Condition::Down,
    }
}

pub(super) fn port(number: i32) -> std::result::Result<Port, Fault> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(Port::new(port)),
        Ok(_) | Err(_) => Err(Fault::NotAPort { value: number }),
    }
}

pub(super) fn protocol(text: Option<&str>) -> std::result::Result<Proto, Fault> {
    match text {
        None | Some("TCP") => Ok(Proto::TCP),
        Some("UDP") => Ok(Proto::UDP),
        Some("SCTP") => Ok(Proto::SCTP),
        Some(text) => Err(Fault::NotAProtocol { text: text.into() }),
    }
}

pub(super) fn address(text: &str) -> std::result::Result<Addr, Fault> {
    let Ok(addr) = text.parse::<IpAddr>() else {
        return Err(Fault::NotAnAddress { text: text.into() });
    };
    if addr.to_canonical() != addr {
        return Err(Fault::MappedAddress { text: text.into(), canonical: addr.to_canonical() });
    }
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    let what = if addr.is_unspecified() {
        "the unspecified address"
    } else if addr.is_loopback() {
        "a loopback address"
    } else if addr.is_multicast() || addr == IpAddr::from([255; 4]) {
        "a multicast address"
    } else if link_local {
        "a link-local address"
    } else {
        return Ok(Addr::from(addr));
    };
    Err(Fault::SpecialAddress { addr, what })
}

pub(super) fn prefix(text: &str) -> std::result::Result<Prefix, Fault> {
    let parsed = text.split_once('/').and_then(|(addr, length)| {
        let addr = addr.parse::<IpAddr>().ok().filter(|addr| addr.to_canonical() == *addr)?;
        Prefix::new(addr.into(), length.parse().ok()?)
    });
    parsed.ok_or_else(|| Fault::NotARange { text: text.into() })
}

fn named(text: &str, limit: usize) -> std::result::Result<(), Fault> {
    let fits = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || (limit > LABEL && byte == b'.')
    };
    if (1..=limit).contains(&text.len()) && text.bytes().all(fits) {
        return Ok(());
    }
    Err(Fault::NotAName { text: text.into(), limit })
}

/// The value of the label `service.kubernetes.io/service-proxy-name` that means us.
const PROXY_NAME: &str = "ferroflow";
/// Lengths of RFC 1123 names.
pub(super) const LABEL: usize = 63;
pub(super) const SUBDOMAIN: usize = 253;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service_of(spec: &Value) -> Result<Change> {
        let object = json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec});
        service(&serde_json::from_value(object).unwrap())
    }

    fn slice_of(mut object: Value) -> Result<Change> {
        object["metadata"] =
            json!({"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}});
        endpoint_slice(&serde_json::from_value(object).unwrap(), "here")
    }

    #[track_caller]
    fn served(spec: &Value) -> Service {
        match service_of(spec) {
            Ok(Change::Service(_, Some(service))) => service,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(result: Result<T>, message: &str) {
        assert_eq!(result.unwrap_err().to_string(), message);
    }

    #[test]
    fn rule_19_ranges_of_cluster_ips_convert() {
        let convert = |cidrs: Value| {
            let object = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}});
            match service_cidr(&serde_json::from_value(object).unwrap()) {
                Ok(Change::ServiceCidr(name, Some(ranges))) => {
                    let texts: Vec<_> = ranges.iter().map(ToString::to_string).collect();
                    format!("{name}: {}", texts.join(" "))
                }
                other => other.unwrap_err().to_string(),
            }
        };
        assert_eq!(convert(json!(["10.96.0.0/12", "fd00::/112"])), "kubernetes: 10.96.0.0/12 fd00::/112");
        for bad in ["10.96.0.1/12", "0.0.0.0/0", "::/0", "10.96.0.0"] {
            let message = convert(json!(["fd00::/112", bad]));
            assert!(
                message.starts_with(&format!("spec.cidrs[1]: `{bad}` is not an address range")),
                "{message}"
            );
        }
    }

    #[test]
    fn a_dual_stack_service_converts() {
        let service = served(&json!({
            "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00::10"], "ipFamilies": ["IPv4", "IPv6"],
            "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53}],
        }));
        let ips: Vec<_> = service.cluster_ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.96.0.10", "fd00::10"]);
        let ports: Vec<_> = service.ports.iter().map(|it| (&*it.name, it.proto, it.port.host())).collect();
        assert_eq!(ports, [("dns", Proto::UDP, 53), ("dns-tcp", Proto::TCP, 53)]);
    }

    #[test]
    fn rule_12_headless_external_and_foreign_services_are_not_ours() {
        let ports = json!([{"port": 80}]);
        for spec in [
            json!({"clusterIP": "None", "ports": ports}),
            json!({"clusterIPs": ["None"]}),
            json!({"clusterIP": ""}),
            json!({"type": "ExternalName", "externalName": "example.com", "ports": [{"port": 0}]}),
        ] {
            let change = service_of(&spec);
            assert_eq!(change, Ok(Change::Service(Name::new("shop", "web"), None)), "{spec}");
        }
        let proxy = "service.kubernetes.io/service-proxy-name";
        for (label, value, ours) in [
            (proxy, "other", false),
            (proxy, "", false),
            (proxy, PROXY_NAME, true),
            ("service.kubernetes.io/headless", "", false),
            ("service.kubernetes.io/other", "", true),
        ] {
            let object = json!({
                "metadata": {"name": "web", "labels": {label: value}},
                "spec": {"clusterIP": "10.96.0.1", "ports": ports},
            });
            let change = service(&serde_json::from_value(object).unwrap()).unwrap();
            assert!(
                matches!(change, Change::Service(_, service) if service.is_some() == ours),
                "{label} {value}"
            );
        }
    }

    #[test]
    fn a_bad_service_names_the_field_and_the_way_out() {
        let with_ports = |ports: Value| service_of(&json!({"clusterIP": "10.96.0.1", "ports": ports}));
        let with_ip = |ip: &str| service_of(&json!({"clusterIP": ip, "ports": [{"port": 80}]}));
        let a = json!({"name": "a", "port": 80});
        refused(
            with_ports(json!([a, {"name": "b", "port": 70000}])),
            "spec.ports[1].port: 70000 is not a port (1-65535)",
        );
        refused(with_ports(json!([{"port": 0}])), "spec.ports[0].port: 0 is not a port (1-65535)");
        refused(
            with_ports(json!([{"port": 80, "protocol": "tcp"}])),
            "spec.ports[0].protocol: `tcp` is not a protocol of a port: use TCP, UDP or SCTP",
        );
        refused(
            with_ports(json!([a, {"name": "b", "port": 80}])),
            "spec.ports[1].port: 80/TCP is also spec.ports[0]: a Service has a port and protocol once",
        );
        refused(
            with_ports(json!([a, {"name": "a", "port": 81}])),
            "spec.ports[1].name: `a` is also spec.ports[0]: the ports of a Service have different names",
        );
        refused(
            with_ports(json!([a, {"port": 81}])),
            "spec.ports[1].name: is missing: each of several ports of a Service has a name",
        );
        refused(with_ports(json!([])), "spec.ports: is missing: a Service with a cluster IP has a port");
        refused(
            with_ip("10.96.0.256"),
            "spec.clusterIP: `10.96.0.256` is not an IP address: write it like 10.96.0.10 or fd00::10",
        );
        refused(
            with_ip("::ffff:10.1.1.1"),
            "spec.clusterIP: `::ffff:10.1.1.1` is an IPv4 address written as IPv6: write 10.1.1.1",
        );
        refused(
            with_ip("127.0.0.1"),
            "spec.clusterIP: 127.0.0.1 is a loopback address, which is the same on every host: use an address of \
             the cluster",
        );
    }

    #[test]
    fn cluster_ips_that_contradict_are_refused() {
        refused(
            service_of(&json!({"clusterIP": "10.96.0.1", "ipFamilies": ["IPv6"], "ports": [{"port": 80}]})),
            "spec.clusterIP: 10.96.0.1 does not fit spec.ipFamilies (IPv6): add its family there, or give an \
             address of that family",
        );
        refused(
            service_of(&json!({"clusterIPs": ["10.96.0.1", "10.96.0.2"]})),
            "spec.clusterIPs[1]: 10.96.0.2 is a second IPv4 address: a Service has at most one of each family",
        );
        refused(
            service_of(&json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.2"]})),
            "spec.clusterIP: `10.96.0.1` contradicts `10.96.0.2` in spec.clusterIPs[0]: leave one of them out",
        );
    }

    #[test]
    fn impossible_names_are_refused() {
        let named =
            |metadata: Value| service(&serde_json::from_value(json!({"metadata": metadata})).unwrap());
        refused(named(json!({})), "metadata.name: is missing: every object has a name");
        refused(
            named(json!({"name": "a/b"})),
            "metadata.name: `a/b` is not a name: use at most 63 lower case letters, digits, `-`",
        );
    }

    #[test]
    fn rules_1_and_11_conditions_that_are_not_said() {
        for (conditions, expected) in [
            (json!(null), Condition::Ready),
            (json!({}), Condition::Ready),
            (json!({"ready": false}), Condition::Serving),
            (json!({"ready": false, "terminating": true}), Condition::Draining),
            (json!({"ready": false, "serving": false}), Condition::Down),
            (json!({"ready": false, "serving": false, "terminating": true}), Condition::Down),
            // Rule 11: publishNotReadyAddresses.
            (json!({"ready": true, "serving": false, "terminating": true}), Condition::Ready),
        ] {
            let parsed: Option<discovery::EndpointConditions> =
                serde_json::from_value(conditions.clone()).unwrap();
            assert_eq!(condition(parsed.as_ref()), expected, "{conditions}");
        }
    }

    #[test]
    fn a_slice_converts() {
        let change = slice_of(json!({
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}, {"name": "any"}, {"name": "zero", "port": 0}],
            "endpoints": [
                {"addresses": ["10.0.0.1", "10.9.9.9"], "nodeName": "here", "zone": "east"},
                {"addresses": ["10.0.0.2"], "nodeName": "there", "conditions": {"ready": false, "serving": false}},
            ],
        }));
        let port = SlicePort { name: "http".into(), proto: Proto::TCP, port: Port::new(8080) };
        let mut first = Endpoint::new(Addr::v4([10, 0, 0, 1]), Condition::Ready, Place::Local);
        (first.node, first.zone) = (Label::of("here"), Label::of("east"));
        let mut second = Endpoint::new(Addr::v4([10, 0, 0, 2]), Condition::Down, Place::Remote);
        second.node = Label::of("there");
        let slice = EndpointSlice {
            service: "web".into(),
            ports: [port].into(),
            endpoints: Box::new([first, second]),
            zones: Box::default(),
        };
        assert_eq!(change, Ok(Change::EndpointSlice(Name::new("shop", "web-1"), Some(slice))));
    }

    #[test]
    fn rule_4_hints_are_kept_by_zone_and_node() {
        let endpoint =
            |last: u8, hints: Value| json!({"addresses": [format!("10.0.0.{last}")], "hints": hints});
        let change = slice_of(json!({"addressType": "IPv4", "endpoints": [
            endpoint(1, json!({"forZones": [{"name": "b"}, {"name": "a"}]})),
            endpoint(2, json!({"forZones": [{"name": "c"}], "forNodes": [{"name": "there"}]})),
            endpoint(3, json!({"forZones": [{"name": "a"}, {"name": "b"}],
                "forNodes": [{"name": "there"}, {"name": "here"}]})),
            endpoint(4, json!({"forZones": []})),
            endpoint(5, json!(null)),
        ]}));
        let Ok(Change::EndpointSlice(_, Some(slice))) = change else { panic!("{change:?}") };
        let zones: Vec<_> = slice.endpoints.iter().map(|it| slice.zones(it).join(" ")).collect();
        assert_eq!(zones, ["a b", "c", "a b", "", ""]);
        assert_eq!(slice.zones.len(), 2, "equal lists are kept once");
        let nodes: Vec<_> = slice.endpoints.iter().map(|it| it.node_hint).collect();
        use NodeHint::{Others, ThisNode, Unsaid};
        assert_eq!(nodes, [Unsaid, Others, ThisNode, Unsaid, Unsaid]);
    }

    #[test]
    fn slices_that_are_not_for_us_are_no_error() {
        let labels = json!({"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""});
        let others =
            json!({"kubernetes.io/service-name": "web", "service.kubernetes.io/service-proxy-name": "other"});
        for object in [
            json!({"metadata": {"name": "s"}, "addressType": "IPv4"}),
            json!({"metadata": {"name": "s", "labels": labels}, "addressType": "IPv4"}),
            json!({"metadata": {"name": "s", "labels": others}, "addressType": "IPv4"}),
            json!({"metadata": {"name": "s", "labels": {"kubernetes.io/service-name": "w"}}, "addressType": "FQDN"}),
        ] {
            let change = endpoint_slice(&serde_json::from_value(object.clone()).unwrap(), "here");
            assert_eq!(change, Ok(Change::EndpointSlice(Name::new("default", "s"), None)), "{object}");
        }
    }

    #[test]
    fn a_bad_slice_names_the_field() {
        let with_address = |text: &str| {
            slice_of(
                json!({"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": [text]}]}),
            )
        };
        refused(
            with_address("fd00::1"),
            "endpoints[1].addresses[0]: fd00::1 does not fit addressType IPv4: put it into an EndpointSlice of its \
             family",
        );
        refused(
            with_address("169.254.1.1"),
            "endpoints[1].addresses[0]: 169.254.1.1 is a link-local address, which is the same on every host: use \
             an address of the cluster",
        );
        refused(
            slice_of(json!({"addressType": "IPv4", "endpoints": [{"addresses": []}]})),
            "endpoints[0].addresses: is missing: an endpoint has an address",
        );
        refused(
            slice_of(json!({"addressType": "ipv4"})),
            "addressType: `ipv4` is not an address type: use IPv4, IPv6 or FQDN",
        );
        refused(
            slice_of(json!({"addressType": "IPv4", "ports": [{"port": -1}]})),
            "ports[0].port: -1 is not a port (1-65535)",
        );
    }

    #[test]
    fn rule_41_a_node_leaves_when_it_is_deleted_or_about_to_be() {
        let stay_of = |metadata: Value, spec: Value| {
            let object = json!({"metadata": metadata, "spec": spec});
            stay(&serde_json::from_value(object).unwrap())
        };
        let taint = |key: &str| json!({"taints": [{"key": key, "effect": "NoSchedule"}]});
        assert_eq!(stay_of(json!({"name": "n"}), taint("node.kubernetes.io/unschedulable")), Stay::Stays);
        assert_eq!(stay_of(json!({"name": "n"}), taint("ToBeDeletedByClusterAutoscaler")), Stay::Leaves);
        let deleted = json!({"name": "n", "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert_eq!(stay_of(deleted, json!({})), Stay::Leaves);
    }

    /// Cordoned (`kubectl cordon`), and kept out of the cloud's load balancers: neither is this node's to act on, and what does
    /// not differ is planned anew nowhere.
    #[test]
    fn rule_41_a_cordoned_node_is_what_it_was() {
        let node_of = |labels: Value, spec: Value| {
            let mut object = json!({"metadata": {"name": "n", "labels": labels}, "spec": {"podCIDRs": ["10.244.1.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.168.50.1"}]}});
            object["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
            node(&serde_json::from_value(object).unwrap()).unwrap()
        };
        let plain = node_of(json!({}), json!({}));
        let cordoned = json!({"unschedulable": true,
            "taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]});
        assert_eq!(node_of(json!({}), cordoned), plain);
        let excluded = json!({"node.kubernetes.io/exclude-from-external-load-balancers": ""});
        assert_eq!(node_of(excluded, json!({})), plain);
    }

    #[test]
    fn pods_and_nodes_convert() {
        let pod_of = |spec: Value, phase: &str| {
            let object = json!({"metadata": {"name": "p"}, "spec": spec, "status": {
                "phase": phase, "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}});
            match pod(&serde_json::from_value(object).unwrap()) {
                Ok(Change::Pod(_, Some(pod))) => (pod.node, pod.addresses.len(), pod.network),
                other => panic!("{other:?}"),
            }
        };
        let containers = json!([]);
        assert_eq!(
            pod_of(json!({"nodeName": "here", "containers": containers}), "Running"),
            ("here".into(), 2, Network::Own)
        );
        let (_, addresses, network) = pod_of(json!({"containers": containers}), "Succeeded");
        assert_eq!((addresses, network), (0, Network::Left), "rule 51");
        let (_, addresses, network) =
            pod_of(json!({"hostNetwork": true, "containers": containers}), "Running");
        assert_eq!((addresses, network), (0, Network::Host), "rule 50");
        let object = json!({
            "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]},
            "status": {"addresses": [
                {"type": "Hostname", "address": "n1"}, {"type": "ExternalIP", "address": "192.0.2.1"},
                {"type": "InternalIP", "address": "192.168.1.1"}]},
        });
        let Ok(Change::Node(name, Some(node))) = node(&serde_json::from_value(object).unwrap()) else {
            panic!()
        };
        assert_eq!((&*name, node.zone.as_deref()), ("n1", Some("a")));
        let addresses: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.168.1.1", "192.0.2.1"]);
        assert_eq!(
            node.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.244.1.0/24", "fd00:1::/64"]
        );
    }
}
