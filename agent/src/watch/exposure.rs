//! The fields of a Service that say how it is reached from outside.

use std::net::IpAddr;

use ferroflow_common::addr::{Addr, Port};
use k8s_openapi::api::core::v1 as core;

use super::convert::{address, port};
use super::fault::{Fault, Invalid};
use crate::model::{Exposure, Prefix, TrafficPolicy};

type Result<T> = std::result::Result<T, Invalid>;

/// What Kubernetes takes where `ClientIP` names no timeout.
const AFFINITY_TIMEOUT: i32 = 10_800;

/// # Errors
/// The first field that makes no sense.
pub(super) fn exposure(object: &core::Service, spec: &core::ServiceSpec) -> Result<Exposure> {
    let kind = kind(spec)?;
    let policy =
        policy(spec.external_traffic_policy.as_deref()).map_err(|e| e.at("spec.externalTrafficPolicy"))?;
    let external_ips = spec.external_ips.iter().flatten().enumerate();
    let external_ips = external_ips
        .map(|(index, text)| address(text).map_err(|fault| fault.at(format!("spec.externalIPs[{index}]"))))
        .collect::<Result<_>>()?;
    let exposure = Exposure { policy, external_ips, ..Exposure::default() };
    if kind != Kind::LoadBalancer {
        return Ok(exposure);
    }
    let ranges = spec.load_balancer_source_ranges.iter().flatten().enumerate();
    let source_ranges = ranges
        .map(|(index, text)| {
            source_range(text).map_err(|e| e.at(format!("spec.loadBalancerSourceRanges[{index}]")))
        })
        .collect::<Result<_>>()?;
    let health_check_port = spec.health_check_node_port.filter(|number| *number != 0);
    let health_check_port = health_check_port
        .filter(|_| policy == TrafficPolicy::Local)
        .map(|number| port(number).map_err(|fault| fault.at("spec.healthCheckNodePort")))
        .transpose()?;
    Ok(Exposure { load_balancer_ips: ingress(object)?, source_ranges, health_check_port, ..exposure })
}

/// Whether the ports of the Service have NodePorts; a number that is left over from another type is none.
pub(super) fn node_port(kind: Kind, number: Option<i32>) -> std::result::Result<Option<Port>, Fault> {
    match (kind, number) {
        // Rule 23: `allocateLoadBalancerNodePorts: false` leaves it 0.
        (Kind::ClusterIp, _) | (_, None | Some(0)) => Ok(None),
        (Kind::NodePort | Kind::LoadBalancer, Some(number)) => port(number).map(Some),
    }
}

/// Which of the types it is that have a cluster IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

pub(super) fn kind(spec: &core::ServiceSpec) -> Result<Kind> {
    match spec.type_.as_deref() {
        None | Some("" | "ClusterIP") => Ok(Kind::ClusterIp),
        Some("NodePort") => Ok(Kind::NodePort),
        Some("LoadBalancer") => Ok(Kind::LoadBalancer),
        Some(text) => {
            let values = "ClusterIP, NodePort, LoadBalancer or ExternalName";
            Err(Fault::NotOneOf { text: text.into(), values }.at("spec.type"))
        }
    }
}

pub(super) fn policy(text: Option<&str>) -> std::result::Result<TrafficPolicy, Fault> {
    match text {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(text) => Err(Fault::NotOneOf { text: text.into(), values: "Cluster or Local" }),
    }
}

/// Seconds; 0 where there is none.
pub(super) fn affinity(spec: &core::ServiceSpec) -> Result<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return Ok(0),
        Some("ClientIP") => {}
        Some(text) => {
            let values = "None or ClientIP";
            return Err(Fault::NotOneOf { text: text.into(), values }.at("spec.sessionAffinity"));
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let value = config.and_then(|config| config.timeout_seconds).unwrap_or(AFFINITY_TIMEOUT);
    match u32::try_from(value) {
        Ok(seconds @ 1..=86_400) => Ok(seconds),
        Ok(_) | Err(_) => {
            Err(Fault::NotATimeout { value }.at("spec.sessionAffinityConfig.clientIP.timeoutSeconds"))
        }
    }
}

/// The addresses that are served here: not those of a load balancer that is a proxy, and no names (rule 20).
fn ingress(object: &core::Service) -> Result<Box<[Addr]>> {
    let balancer = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let mut addresses = Vec::new();
    for (index, it) in balancer.iter().flat_map(|it| it.ingress.iter().flatten()).enumerate() {
        let path = |field: &str| format!("status.loadBalancer.ingress[{index}].{field}");
        let Some(text) = it.ip.as_deref().filter(|text| !text.is_empty()) else { continue };
        match it.ip_mode.as_deref() {
            None | Some("" | "VIP") => addresses.push(address(text).map_err(|fault| fault.at(path("ip")))?),
            Some("Proxy") => {}
            Some(text) => {
                return Err(Fault::NotOneOf { text: text.into(), values: "VIP or Proxy" }.at(path("ipMode")));
            }
        }
    }
    Ok(addresses.into())
}

/// Padding around it is allowed, and so are bits behind its length (rule 22).
pub(super) fn source_range(text: &str) -> std::result::Result<Prefix, Fault> {
    let parsed = text.trim().split_once('/').and_then(|(addr, length)| {
        let addr = addr.parse::<IpAddr>().ok().filter(|addr| addr.to_canonical() == *addr)?;
        Prefix::around(addr.into(), length.parse().ok()?)
    });
    parsed.ok_or_else(|| Fault::NotARange { text: text.into() })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::convert::service;
    use super::super::weights::ALGORITHM;
    use super::*;
    use crate::model::{Algorithm, Change, Service};

    fn convert(spec: &Value, more: &Value) -> Result<Service> {
        let mut object = json!({
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIPs": ["10.96.0.1", "fd00::1"], "ports": [{"port": 80, "nodePort": 30080}]},
        });
        for (key, value) in spec.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        for (key, value) in more.as_object().unwrap() {
            object[key] = value.clone();
        }
        let Change::Service(_, Some(service)) = service(&serde_json::from_value(object).unwrap())? else {
            panic!("it is not served")
        };
        Ok(service)
    }

    fn spec(spec: Value) -> Result<Service> {
        convert(&spec, &json!({}))
    }

    fn texts(items: &[impl ToString]) -> Vec<String> {
        items.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn rule_20_only_addresses_of_load_balancers_that_are_no_proxies_are_served() {
        let status = json!({"status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "VIP"}, {"ip": "192.0.2.3", "ipMode": "Proxy"},
            {"hostname": "lb.example.com"}, {"hostname": "proxy.example.com", "ipMode": "Proxy"},
            {"ip": "2001:db8::1"}]}}});
        let service = convert(&json!({"type": "LoadBalancer"}), &status).unwrap();
        assert_eq!(texts(&service.exposure.load_balancer_ips), ["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
        let other = convert(&json!({"type": "NodePort"}), &status).unwrap();
        assert_eq!(other.exposure.load_balancer_ips.len(), 0, "left over from another type");
    }

    #[test]
    fn rule_22_ranges_may_be_padded_and_have_host_bits() {
        let ranges = json!([" 10.0.0.0/8", "192.0.2.7/24 ", "\t2001:db8::/32", "0.0.0.0/0"]);
        let service = spec(json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ranges})).unwrap();
        assert_eq!(
            texts(&service.exposure.source_ranges),
            ["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0"]
        );
    }

    #[test]
    fn rule_23_a_load_balancer_may_have_no_node_ports() {
        let ports = json!([{"port": 80, "nodePort": 0}]);
        let service =
            spec(json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": ports,
            "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000}));
        let service = service.unwrap();
        assert_eq!(service.ports[0].node_port, None);
        assert_eq!(service.exposure.health_check_port, Some(Port::new(31000)));
        for (kind, node_port) in
            [("ClusterIP", None), ("NodePort", Some(30080)), ("LoadBalancer", Some(30080))]
        {
            let service = spec(json!({"type": kind, "healthCheckNodePort": 31000})).unwrap();
            assert_eq!(service.ports[0].node_port.map(Port::host), node_port, "{kind}");
            assert_eq!(service.exposure.health_check_port, None, "only with the policy Local");
        }
    }

    #[test]
    fn rule_29_affinity_has_a_timeout() {
        let with = |seconds: Value| {
            spec(
                json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}),
            )
        };
        assert_eq!(spec(json!({"sessionAffinity": "ClientIP"})).unwrap().affinity, 10_800);
        assert_eq!(spec(json!({"sessionAffinity": "None"})).unwrap().affinity, 0);
        assert_eq!(with(json!(5)).unwrap().affinity, 5);
        for value in [0, -1, 86_401] {
            let error = with(json!(value)).unwrap_err().to_string();
            assert!(
                error.contains(&format!("timeoutSeconds: {value} is not a session affinity timeout")),
                "{error}"
            );
        }
    }

    #[test]
    fn policies_addresses_and_algorithms_convert() {
        let annotated = json!({"metadata": {"name": "web", "annotations": {ALGORITHM: "maglev"},
            "creationTimestamp": "1970-01-01T00:01:00Z"}});
        let service = convert(
            &json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "externalIPs": ["192.0.2.9"]}),
            &annotated,
        );
        let service = service.unwrap();
        assert_eq!(
            (service.internal_policy, service.exposure.policy),
            (TrafficPolicy::Local, TrafficPolicy::Local)
        );
        assert_eq!(texts(&service.exposure.external_ips), ["192.0.2.9"]);
        assert_eq!((service.algorithm, service.created), (Some(Algorithm::Maglev), Some(60)));
    }

    #[test]
    fn a_bad_exposure_names_the_field_and_the_way_out() {
        for (object, error) in [
            (
                json!({"type": "Headless"}),
                "spec.type: `Headless` is none of its values: use ClusterIP, NodePort, LoadBalancer or ExternalName",
            ),
            (
                json!({"externalTrafficPolicy": "local"}),
                "spec.externalTrafficPolicy: `local` is none of its values: use Cluster or Local",
            ),
            (
                json!({"internalTrafficPolicy": "Node"}),
                "spec.internalTrafficPolicy: `Node` is none of its values: use Cluster or Local",
            ),
            (
                json!({"sessionAffinity": "Cookie"}),
                "spec.sessionAffinity: `Cookie` is none of its values: use None or ClientIP",
            ),
            (
                json!({"externalIPs": ["192.0.2.1", "x"]}),
                "spec.externalIPs[1]: `x` is not an IP address: write it like 10.96.0.10 or fd00::10",
            ),
            (
                json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.0.0.0"]}),
                "spec.loadBalancerSourceRanges[0]: `10.0.0.0` is not an address range: write it like 10.244.1.0/24 or \
              fd00:1::/64",
            ),
            (
                json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 70000}]}),
                "spec.ports[0].nodePort: 70000 is not a port (1-65535)",
            ),
            (
                json!({"type": "NodePort", "ports": [{"name": "a", "port": 80, "nodePort": 30000},
                {"name": "b", "port": 81, "nodePort": 30000}]}),
                "spec.ports[1].nodePort: 30000/TCP is also spec.ports[0]: a Service has a port and protocol once",
            ),
        ] {
            assert_eq!(spec(object).unwrap_err().to_string(), error);
        }
        let status =
            json!({"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1", "ipMode": "Direct"}]}}});
        assert_eq!(
            convert(&json!({"type": "LoadBalancer"}), &status).unwrap_err().to_string(),
            "status.loadBalancer.ingress[0].ipMode: `Direct` is none of its values: use VIP or Proxy"
        );
    }
}
