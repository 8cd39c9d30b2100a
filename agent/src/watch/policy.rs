//! Network policies, and the labels that they select by, to the model. As [`super::convert`]: pure, and whatever
//! passes makes sense.

use ferroflow_common::addr::Port;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Deserialize as _;
use serde_json::Value;

use super::convert::{LABEL, SUBDOMAIN, name_of, port, protocol};
use super::exposure::source_range;
use super::fault::{Fault, Invalid};
use crate::model::label::{Operator, Requirement, Selector};
use crate::model::policy::{
    Block, Direction, Live, Mode, Namespaces, NetworkPolicy, Peer, PolicyPort, PortNumber, Rule,
};
use crate::model::{Change, Labels, Name, NamedPort, Namespace, Prefix};

type Result<T> = std::result::Result<T, Invalid>;

/// Our annotation on a NetworkPolicy: `enforce`, or `dry-run` to be told what would be dropped.
pub(super) const MODE: &str = "ferroflow.dev/policy-mode";

/// Our annotation on a policy: whether established flows `finish` when they are not allowed any more, or are `cut`. One
/// policy that says `cut` is enough for the pods that it selects.
const LIVE: &str = "ferroflow.dev/live-flows";

/// # Errors
/// The first field that makes no sense.
pub fn namespace(object: &core::Namespace) -> Result<Change> {
    let name = name_of(&object.metadata, LABEL)?.name;
    let labels = object.metadata.labels.iter().flatten();
    let namespace = Namespace::new(&name, labels.map(|(key, value)| (key.as_str(), value.as_str())));
    Ok(Change::Namespace((*name).into(), Some(namespace)))
}

/// Fills in what the API server would (rule 43): a directory of YAML has no such server.
///
/// # Errors
/// The first field that makes no sense. [`closed`] is what is in force then.
pub fn network_policy(object: &networking::NetworkPolicy) -> Result<Change> {
    let name = name_of(&object.metadata, SUBDOMAIN)?;
    let Some(spec) = &object.spec else {
        return Err(Fault::Missing { needed: "it says which pods the policy is about" }.at("spec"));
    };
    let mode = match annotation(&object.metadata, MODE) {
        None | Some("enforce") => Mode::Enforce,
        Some("dry-run") => Mode::DryRun,
        Some(text) => return Err(not_one_of(MODE, text, "enforce or dry-run")),
    };
    let pods = match &spec.pod_selector {
        Some(pods) => selector(pods, "spec.podSelector")?,
        None => Selector::default(),
    };
    let ingress = spec.ingress.iter().flatten().enumerate().map(|(index, it)| {
        let peers = (it.from.as_deref(), "from");
        rule(peers, it.ports.as_deref()).map_err(|e| e.within(format!("spec.ingress[{index}]")))
    });
    let ingress = ingress.collect::<Result<_>>()?;
    let egress = spec.egress.iter().flatten().enumerate().map(|(index, it)| {
        let peers = (it.to.as_deref(), "to");
        rule(peers, it.ports.as_deref()).map_err(|e| e.within(format!("spec.egress[{index}]")))
    });
    let egress: Box<[Rule]> = egress.collect::<Result<_>>()?;
    let directions = directions(spec.policy_types.as_deref().unwrap_or_default(), &egress)?;
    let policy = NetworkPolicy {
        pods,
        ingress: directions.contains(&Direction::Ingress).then_some(ingress),
        egress: directions.contains(&Direction::Egress).then_some(egress),
        mode,
        live: live(&object.metadata)?,
    };
    Ok(Change::NetworkPolicy(name, Some(policy)))
}

/// What a policy says of established flows.
pub(super) fn live(metadata: &ObjectMeta) -> Result<Option<Live>> {
    match annotation(metadata, LIVE) {
        None => Ok(None),
        Some("finish") => Ok(Some(Live::Finish)),
        Some("cut") => Ok(Some(Live::Cut)),
        Some(text) => Err(not_one_of(LIVE, text, "finish or cut")),
    }
}

pub(super) fn annotation<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn not_one_of(annotation: &str, text: &str, values: &'static str) -> Invalid {
    Fault::NotOneOf { text: text.into(), values }.at(format!("metadata.annotations[{annotation}]"))
}

/// What is in force in place of a policy that makes no sense: the pods that it selects, or where it does not say
/// which, all of its namespace, are cut off until it does. What cannot be read is no permission.
pub(super) fn closed(name: Name, object: &Value) -> Change {
    let read = object.pointer("/spec/podSelector").and_then(|value| LabelSelector::deserialize(value).ok());
    let pods = read.and_then(|read| selector(&read, "").ok()).unwrap_or_default();
    let nothing = || Some(Box::default());
    let policy =
        NetworkPolicy { pods, ingress: nothing(), egress: nothing(), mode: Mode::Enforce, live: None };
    Change::NetworkPolicy(name, Some(policy))
}

/// The labels of a pod, and those ports of its containers that have names (rule 46).
///
/// # Errors
/// The first port that makes no sense.
pub(super) fn labels_and_ports(object: &core::Pod) -> Result<(Labels, Vec<NamedPort>)> {
    let labels = object.metadata.labels.iter().flatten();
    let labels = Labels::new(labels.map(|(key, value)| (key.as_str(), value.as_str())));
    let spec = object.spec.as_ref();
    let containers = spec.iter().flat_map(|spec| &spec.containers).enumerate();
    // Of those that run before the others, only the ones that stay have ports to speak of.
    let sidecars = spec.iter().flat_map(|spec| spec.init_containers.iter().flatten()).enumerate();
    let sidecars = sidecars.filter(|(_, it)| it.restart_policy.as_deref() == Some("Always"));
    let all = containers.map(|it| ("containers", it)).chain(sidecars.map(|it| ("initContainers", it)));
    let mut ports = Vec::new();
    for (field, (container, it)) in all {
        for (index, it) in it.ports.iter().flatten().enumerate() {
            let Some(name) = it.name.as_deref().filter(|name| !name.is_empty()) else { continue };
            let at = |field: &str, inner| format!("spec.{field}[{container}].ports[{index}].{inner}");
            let proto = protocol(it.protocol.as_deref()).map_err(|e| e.at(at(field, "protocol")))?;
            let number = port(it.container_port).map_err(|e| e.at(at(field, "containerPort")))?;
            ports.push(NamedPort { name: name.into(), proto, port: number });
        }
    }
    Ok((labels, ports))
}

/// Which directions a policy is about. Where it does not say: ingress, and egress where there is a rule for it
/// (rule 43).
fn directions(said: &[String], egress: &[Rule]) -> Result<Vec<Direction>> {
    if said.is_empty() {
        let egress = (!egress.is_empty()).then_some(Direction::Egress);
        return Ok([Direction::Ingress].into_iter().chain(egress).collect());
    }
    let said = said.iter().enumerate().map(|(index, text)| match text.as_str() {
        "Ingress" => Ok(Direction::Ingress),
        "Egress" => Ok(Direction::Egress),
        text => {
            let fault = Fault::NotOneOf { text: text.into(), values: "Ingress and Egress" };
            Err(fault.at(format!("spec.policyTypes[{index}]")))
        }
    });
    said.collect()
}

/// `peers` with the name of their field.
fn rule(
    (peers, field): (Option<&[networking::NetworkPolicyPeer]>, &str),
    ports: Option<&[networking::NetworkPolicyPort]>,
) -> Result<Rule> {
    let peers = peers.unwrap_or_default().iter().enumerate();
    let peers = peers.map(|(index, it)| peer(it).map_err(|e| e.within(format!("{field}[{index}]"))));
    let ports = ports.unwrap_or_default().iter().enumerate();
    let ports = ports.map(|(index, it)| policy_port(it).map_err(|e| e.within(format!("ports[{index}]"))));
    Ok(Rule { peers: peers.collect::<Result<_>>()?, ports: ports.collect::<Result<_>>()? })
}

fn peer(object: &networking::NetworkPolicyPeer) -> Result<Peer> {
    let namespaces = object.namespace_selector.as_ref();
    let pods = object.pod_selector.as_ref();
    match (&object.ip_block, namespaces, pods) {
        (Some(object), None, None) => block(object).map(Peer::Block),
        (Some(_), _, _) => Err(Fault::Alone { others: "podSelector and namespaceSelector" }.at("ipBlock")),
        (None, None, None) => {
            let needed = "a peer has a podSelector, a namespaceSelector or an ipBlock";
            Err(Fault::Missing { needed }.at("podSelector"))
        }
        (None, namespaces, pods) => Ok(Peer::Pods {
            namespaces: match namespaces {
                Some(it) => Namespaces::Matching(selector(it, "namespaceSelector")?),
                None => Namespaces::Own,
            },
            pods: match pods {
                Some(it) => selector(it, "podSelector")?,
                None => Selector::default(),
            },
        }),
    }
}

fn block(object: &networking::IPBlock) -> Result<Block> {
    let range = source_range(&object.cidr).map_err(|fault| fault.at("ipBlock.cidr"))?;
    let except = object.except.iter().flatten().enumerate().map(|(index, text)| {
        let inner = source_range(text);
        let inner = inner.and_then(|inner| match is_inside(&inner, &range) {
            true => Ok(inner),
            false => Err(Fault::NotWithin { text: text.clone(), range: range.to_string() }),
        });
        inner.map_err(|fault| fault.at(format!("ipBlock.except[{index}]")))
    });
    let mut except = except.collect::<Result<Vec<_>>>()?;
    except.sort_unstable();
    except.dedup();
    Ok(Block { range, except: except.into() })
}

/// Whether a range is a smaller part of another.
fn is_inside(inner: &Prefix, outer: &Prefix) -> bool {
    inner.family() == outer.family() && inner.bits() > outer.bits() && outer.contains(&inner.addr())
}

fn policy_port(object: &networking::NetworkPolicyPort) -> Result<PolicyPort> {
    let proto = protocol(object.protocol.as_deref()).map_err(|fault| fault.at("protocol"))?;
    let number = match (&object.port, object.end_port) {
        (None, None) => PortNumber::Every,
        (Some(IntOrString::Int(number)), last) => {
            let first = port(*number).map_err(|fault| fault.at("port"))?;
            let last = last.map_or(Ok(first), |last| range_end(first, last))?;
            PortNumber::Range(first, last)
        }
        (Some(IntOrString::String(name)), None) if is_port_name(name) => {
            PortNumber::Named(name.as_str().into())
        }
        (Some(IntOrString::String(name)), None) => {
            return Err(Fault::NotAPortName { text: name.clone() }.at("port"));
        }
        (None | Some(IntOrString::String(_)), Some(_)) => {
            return Err(Fault::EndsNothing.at("endPort"));
        }
    };
    Ok(PolicyPort { proto, number })
}

fn range_end(first: Port, last: i32) -> Result<Port> {
    let last = port(last).map_err(|fault| fault.at("endPort"))?;
    if last.host() < first.host() {
        return Err(Fault::EndsBefore { first: first.host(), last: last.host() }.at("endPort"));
    }
    Ok(last)
}

/// As IANA has them (RFC 6335 section 5.1).
pub(super) fn is_port_name(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=15).contains(&text.len())
        && text.bytes().all(fits)
        && text.bytes().any(|byte| byte.is_ascii_lowercase())
        && !text.starts_with('-')
        && !text.ends_with('-')
        && !text.contains("--")
}

pub(super) fn selector(object: &LabelSelector, path: &str) -> Result<Selector> {
    let labels = object.match_labels.iter().flatten();
    let labels = labels.map(|(key, value)| Ok(Requirement::equals(key.as_str(), value.as_str())));
    let expressions = object.match_expressions.iter().flatten().enumerate().map(|(index, it)| {
        let at = |field: &str| format!("{path}.matchExpressions[{index}].{field}");
        if it.key.is_empty() {
            return Err(Fault::Missing { needed: "it names the label" }.at(at("key")));
        }
        let values: Box<[Box<str>]> = it.values.iter().flatten().map(|text| text.as_str().into()).collect();
        let operator = match (it.operator.as_str(), values.is_empty()) {
            ("In", false) => Operator::In(values),
            ("NotIn", false) => Operator::NotIn(values),
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            ("In" | "NotIn", true) => {
                return Err(Fault::Missing { needed: "In and NotIn compare with values" }.at(at("values")));
            }
            ("Exists" | "DoesNotExist", false) => {
                return Err(Fault::Alone { others: "values" }.at(at("operator")));
            }
            (text, _) => {
                let values = "In, NotIn, Exists or DoesNotExist";
                return Err(Fault::NotOneOf { text: text.into(), values }.at(at("operator")));
            }
        };
        Ok(Requirement { key: it.key.as_str().into(), operator })
    });
    Ok(Selector::new(labels.chain(expressions).collect::<Result<Vec<_>>>()?))
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::{Addr, Proto};
    use serde_json::json;

    use super::super::convert;
    use super::*;
    use crate::model::Pod;

    fn policy_of(spec: &Value) -> Result<Change> {
        let object = json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec});
        network_policy(&serde_json::from_value(object).unwrap())
    }

    #[track_caller]
    fn policy(spec: &Value) -> NetworkPolicy {
        match policy_of(spec) {
            Ok(Change::NetworkPolicy(name, Some(policy))) if name == Name::new("shop", "p") => policy,
            other => panic!("{other:?}"),
        }
    }

    /// The one ingress rule with this peer or port.
    fn ingress(field: &str, value: &Value) -> Result<Rule> {
        match policy_of(&json!({"podSelector": {}, "ingress": [{field: [value]}]})) {
            Ok(Change::NetworkPolicy(_, Some(policy))) => Ok(policy.ingress.unwrap()[0].clone()),
            Err(invalid) => Err(invalid),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(result: Result<T>, message: &str) {
        assert_eq!(result.unwrap_err().to_string(), message);
    }

    #[test]
    fn rule_43_types_that_are_not_said() {
        let rule = json!([{}]);
        for (spec, ingress, egress) in [
            (json!({}), Some(0), None),
            (json!({"ingress": []}), Some(0), None),
            (json!({"egress": []}), Some(0), None),
            (json!({"egress": rule}), Some(0), Some(1)),
            (json!({"policyTypes": [], "egress": rule}), Some(0), Some(1)),
            (json!({"policyTypes": ["Ingress"], "egress": rule}), Some(0), None),
            (json!({"policyTypes": ["Egress"], "ingress": rule}), None, Some(0)),
            (json!({"policyTypes": ["Egress", "Ingress"], "ingress": rule}), Some(1), Some(0)),
        ] {
            let policy = policy(&spec);
            let rules = |direction| policy.rules(direction).map(<[_]>::len);
            assert_eq!((rules(Direction::Ingress), rules(Direction::Egress)), (ingress, egress), "{spec}");
        }
        refused(
            policy_of(&json!({"policyTypes": ["Ingress", "egress"]})),
            "spec.policyTypes[1]: `egress` is none of its values: use Ingress and Egress",
        );
    }

    #[test]
    fn rule_44_selectors_of_one_peer_go_together() {
        let app = Selector::new([Requirement::equals("app", "db")]);
        let team = Selector::new([Requirement { key: "team".into(), operator: Operator::Exists }]);
        let app_json = json!({"matchLabels": {"app": "db"}});
        let team_json = json!({"matchExpressions": [{"key": "team", "operator": "Exists"}]});
        let every = Selector::default();
        for (peer, namespaces, pods) in [
            (json!({"podSelector": app_json}), Namespaces::Own, &app),
            (json!({"podSelector": {}}), Namespaces::Own, &every),
            (json!({"namespaceSelector": team_json}), Namespaces::Matching(team.clone()), &every),
            (json!({"namespaceSelector": {}}), Namespaces::Matching(every.clone()), &every),
            (
                json!({"podSelector": app_json, "namespaceSelector": team_json}),
                Namespaces::Matching(team.clone()),
                &app,
            ),
        ] {
            let expected = Peer::Pods { namespaces, pods: pods.clone() };
            assert_eq!(*ingress("from", &peer).unwrap().peers, [expected], "{peer}");
        }
        for spec in [json!({"ingress": [{}]}), json!({"ingress": [{"from": [], "ports": []}]})] {
            assert_eq!(*policy(&spec).ingress.unwrap(), [Rule::default()], "{spec}");
        }
    }

    #[test]
    fn rule_45_ports_have_a_protocol_and_may_have_an_end() {
        let number = |first, last| PortNumber::Range(Port::new(first), Port::new(last));
        for (port, proto, number) in [
            (json!({}), Proto::TCP, PortNumber::Every),
            (json!({"protocol": "SCTP"}), Proto::SCTP, PortNumber::Every),
            (json!({"port": 80}), Proto::TCP, number(80, 80)),
            (json!({"port": 1, "endPort": 65535, "protocol": "UDP"}), Proto::UDP, number(1, 65535)),
            (json!({"port": "http-2"}), Proto::TCP, PortNumber::Named("http-2".into())),
        ] {
            assert_eq!(*ingress("ports", &port).unwrap().ports, [PolicyPort { proto, number }], "{port}");
        }
    }

    #[test]
    fn rule_47_blocks_are_of_one_family_and_leave_parts_out() {
        let block = json!({"ipBlock": {"cidr": "10.1.2.3/8", "except": ["10.1.0.0/16", "10.0.0.0/9"]}});
        let Peer::Block(block) = &ingress("from", &block).unwrap().peers[0] else { panic!() };
        assert_eq!(block.range.to_string(), "10.0.0.0/8", "bits behind the length do not count");
        for (addr, inside) in
            [("10.200.0.1", true), ("10.1.0.1", false), ("10.127.0.1", false), ("11.0.0.1", false)]
        {
            let addr = Addr::from(addr.parse::<std::net::IpAddr>().unwrap());
            assert_eq!(block.contains(&addr), inside, "{addr}");
        }
        let Ok(Rule { peers, .. }) = ingress("from", &json!({"ipBlock": {"cidr": "::/0"}})) else { panic!() };
        let Peer::Block(block) = &peers[0] else { panic!() };
        assert!(!block.contains(&Addr::v4([10, 0, 0, 1])), "mapped addresses are of IPv4");
    }

    #[test]
    fn a_bad_port_names_the_field_and_the_way_out() {
        for (field, value, message) in [
            ("ports", json!({"port": 0}), "ports[0].port: 0 is not a port (1-65535)"),
            (
                "ports",
                json!({"port": 80, "endPort": 79}),
                "ports[0].endPort: 79 is before port 80, where the range begins: exchange them",
            ),
            (
                "ports",
                json!({"port": "http", "endPort": 80}),
                "ports[0].endPort: ends no range: it needs a port that is a number",
            ),
            (
                "ports",
                json!({"port": "80"}),
                "ports[0].port: `80` is not the name of a port: use at most 15 lower case letters, digits and `-`, \
                 with a letter",
            ),
            (
                "ports",
                json!({"protocol": "ICMP"}),
                "ports[0].protocol: `ICMP` is not a protocol of a port: use TCP, UDP or SCTP",
            ),
        ] {
            refused(ingress(field, &value), &format!("spec.ingress[0].{message}"));
        }
    }

    #[test]
    fn a_bad_peer_names_the_field_and_the_way_out() {
        for (field, value, message) in [
            (
                "from",
                json!({}),
                "from[0].podSelector: is missing: a peer has a podSelector, a namespaceSelector or an ipBlock",
            ),
            (
                "from",
                json!({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}),
                "from[0].ipBlock: does not go together with podSelector and namespaceSelector: use one or the other",
            ),
            (
                "from",
                json!({"ipBlock": {"cidr": "10.0.0.0/33"}}),
                "from[0].ipBlock.cidr: `10.0.0.0/33` is not an address range: write it like 10.244.1.0/24 or \
                 fd00:1::/64",
            ),
            (
                "from",
                json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}),
                "from[0].ipBlock.except[0]: `11.0.0.0/16` is not a smaller part of 10.0.0.0/8: except leaves out \
                 addresses of its cidr",
            ),
            (
                "from",
                json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
                "from[0].podSelector.matchExpressions[0].values: is missing: In and NotIn compare with values",
            ),
            (
                "from",
                json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}}),
                "from[0].podSelector.matchExpressions[0].operator: `Gt` is none of its values: use In, NotIn, Exists \
                 or DoesNotExist",
            ),
        ] {
            refused(ingress(field, &value), &format!("spec.ingress[0].{message}"));
        }
        let annotated = json!({"metadata": {"name": "p", "annotations": {MODE: "off"}}, "spec": {}});
        refused(
            network_policy(&serde_json::from_value(annotated).unwrap()),
            "metadata.annotations[ferroflow.dev/policy-mode]: `off` is none of its values: use enforce or dry-run",
        );
    }

    #[test]
    fn what_makes_no_sense_cuts_off_the_pods_it_selects() {
        let closed = |spec: Value| {
            let change = closed(Name::new("shop", "p"), &json!({"spec": spec}));
            let Change::NetworkPolicy(_, Some(policy)) = change else { panic!("{change:?}") };
            assert_eq!((policy.ingress, policy.egress), (Some(Box::default()), Some(Box::default())));
            policy.pods
        };
        let selector = json!({"matchLabels": {"app": "db"}});
        assert_eq!(
            closed(json!({"podSelector": selector, "ingress": 7})),
            Selector::new([Requirement::equals("app", "db")])
        );
        for spec in [json!(7), json!({}), json!({"podSelector": {"matchLabels": 7}})] {
            assert_eq!(closed(spec), Selector::default(), "all of the namespace");
        }
    }

    #[test]
    fn rule_46_pods_have_named_ports_and_labels() {
        let object = json!({"metadata": {"name": "p", "uid": "u", "labels": {"app": "db"}}, "spec": {
            "containers": [
                {"name": "a", "ports": [{"name": "http", "containerPort": 80}, {"containerPort": 81}]},
                {"name": "b", "ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]}],
            "initContainers": [
                {"name": "c", "restartPolicy": "Always", "ports": [{"name": "proxy", "containerPort": 90}]},
                {"name": "d", "ports": [{"name": "init", "containerPort": 91}]}]}});
        let Ok(Change::Pod(_, Some(Pod { labels, ports, uid, .. }))) =
            convert::pod(&serde_json::from_value(object).unwrap())
        else {
            panic!()
        };
        assert_eq!((&*uid, labels.value("app")), ("u", Some("db")));
        let ports: Vec<_> = ports.iter().map(|it| (&*it.name, it.proto, it.port.host())).collect();
        assert_eq!(ports, [("http", Proto::TCP, 80), ("dns", Proto::UDP, 53), ("proxy", Proto::TCP, 90)]);
        let bad = json!({"metadata": {"name": "p"}, "spec": {"containers": [
            {"name": "a", "ports": [{"name": "http", "containerPort": 0}]}]}});
        refused(
            convert::pod(&serde_json::from_value(bad).unwrap()),
            "spec.containers[0].ports[0].containerPort: 0 is not a port (1-65535)",
        );
    }
}
