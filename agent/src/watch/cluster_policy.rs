//! ClusterNetworkPolicies of `policy.networking.k8s.io/v1alpha2` to the model
//! (kubernetes-sigs/network-policy-api, `apis/v1alpha2/clusternetworkpolicy_types.go`). As [`super::convert`]: pure, and
//! whatever passes makes sense.
//!
//! Peers by nodes and by domain names, which the API has as experiments, are refused by name; a rule with one fails closed, as
//! the API has it for what an implementation cannot read: [`closed`].
//!
//! No `status` is written. The API leaves it to implementations (`+optional`), has no type of condition, and lists conditions by
//! their type, one of each: the agents of all nodes would write over each other's, or each have a type of its own on every
//! policy, and every policy would be written as often as there are nodes. Nobody here sees a policy for the whole cluster.
//! What is wrong with one is an event on the object, by each node that it is wrong on (`InvalidObject`, `PolicyOverflow`).

use ferroflow_common::addr::Proto;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::convert::{SUBDOMAIN, name_of, port};
use super::exposure::source_range;
use super::fault::{Fault, Invalid};
use super::policy::{MODE, annotation, is_port_name, live, selector};
use crate::model::label::Selector;
use crate::model::policy::{Block, Namespaces, Peer, PolicyPort, PortNumber, Rule};
use crate::model::tier::{Action, ClusterNetworkPolicy, Subject, Tier, TierRule};
use crate::model::{Change, Name};

type Result<T> = std::result::Result<T, Invalid>;

/// The object as a user writes it.
#[derive(Deserialize)]
pub struct Object {
    #[serde(default)]
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Deserialize)]
struct Spec {
    tier: String,
    priority: i32,
    subject: Pods,
    #[serde(default)]
    ingress: Vec<IngressRule>,
    #[serde(default)]
    egress: Vec<EgressRule>,
}

/// A subject, or a peer that is pods.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Pods {
    namespaces: Option<LabelSelector>,
    pods: Option<NamespacedPod>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NamespacedPod {
    #[serde(default)]
    namespace_selector: LabelSelector,
    #[serde(default)]
    pod_selector: LabelSelector,
}

#[derive(Deserialize)]
struct IngressRule {
    action: String,
    #[serde(default)]
    from: Vec<Pods>,
    protocols: Option<Vec<Protocol>>,
}

#[derive(Deserialize)]
struct EgressRule {
    action: String,
    #[serde(default)]
    to: Vec<EgressPeer>,
    protocols: Option<Vec<Protocol>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EgressPeer {
    #[serde(flatten)]
    pods: Pods,
    networks: Option<Vec<String>>,
    nodes: Option<Value>,
    domain_names: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Protocol {
    tcp: Option<OfProtocol>,
    udp: Option<OfProtocol>,
    sctp: Option<OfProtocol>,
    destination_named_port: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OfProtocol {
    destination_port: Option<Ports>,
}

#[derive(Deserialize)]
struct Ports {
    number: Option<i32>,
    range: Option<PortRange>,
}

#[derive(Deserialize)]
struct PortRange {
    start: i32,
    end: i32,
}

/// # Errors
/// The first field that makes no sense. [`closed`] is what is in force then.
pub fn cluster_network_policy(object: &Object) -> Result<Change> {
    let name = name_of(&object.metadata, SUBDOMAIN)?.name;
    if annotation(&object.metadata, MODE).is_some_and(|mode| mode != "enforce") {
        let others = "a ClusterNetworkPolicy, which is always enforced";
        return Err(Fault::Alone { others }.at(format!("metadata.annotations[{MODE}]")));
    }
    let spec = &object.spec;
    let tier = tier(&spec.tier).map_err(|fault| fault.at("spec.tier"))?;
    let priority = priority(spec.priority).map_err(|fault| fault.at("spec.priority"))?;
    let subject = subject(&spec.subject).map_err(|e| e.within("spec.subject"))?;
    let ingress = spec
        .ingress
        .iter()
        .enumerate()
        .map(|(index, it)| ingress_rule(it).map_err(|e| e.within(format!("spec.ingress[{index}]"))));
    let egress = spec
        .egress
        .iter()
        .enumerate()
        .map(|(index, it)| egress_rule(it).map_err(|e| e.within(format!("spec.egress[{index}]"))));
    let policy = ClusterNetworkPolicy {
        tier,
        priority,
        subject,
        ingress: ingress.collect::<Result<_>>()?,
        egress: egress.collect::<Result<_>>()?,
        live: live(&object.metadata)?,
    };
    Ok(Change::ClusterNetworkPolicy(name.as_ref().into(), Some(policy)))
}

/// What is in force in place of a policy that makes no sense, until it does: as the API wants it, a rule that cannot be
/// read means nothing where it accepts, and everything, which it denies, where it does not. What cannot be placed comes
/// first of all. Without a subject that can be read nobody is known to be affected, and nobody is.
pub(super) fn closed(name: &Name, object: &Value) -> Change {
    let spec = &object["spec"];
    let read = Pods::deserialize(&spec["subject"]).ok().and_then(|read| subject(&read).ok());
    let policy = read.map(|subject| ClusterNetworkPolicy {
        tier: spec["tier"].as_str().and_then(|text| tier(text).ok()).unwrap_or(Tier::Admin),
        priority: i32::deserialize(&spec["priority"]).ok().and_then(|it| priority(it).ok()).unwrap_or(0),
        subject,
        ingress: rules(&spec["ingress"], ingress_rule),
        egress: rules(&spec["egress"], egress_rule),
        live: None,
    });
    Change::ClusterNetworkPolicy(name.name.as_ref().into(), policy)
}

/// The rules of a list, each as far as it can be read.
fn rules<T: DeserializeOwned>(list: &Value, read: impl Fn(&T) -> Result<TierRule>) -> Box<[TierRule]> {
    let denial = || TierRule { action: Action::Deny, about: Rule::default() };
    let Some(list) = list.as_array() else {
        return if list.is_null() { Box::default() } else { Box::new([denial()]) };
    };
    let rules = list.iter().filter_map(|it| {
        let rule = T::deserialize(it).ok().and_then(|it| read(&it).ok());
        rule.or_else(|| (it["action"] != "Accept").then(denial))
    });
    rules.collect()
}

fn tier(text: &str) -> std::result::Result<Tier, Fault> {
    let known = [Tier::Admin, Tier::Baseline].into_iter().find(|it| it.name() == text);
    known.ok_or_else(|| Fault::NotOneOf { text: text.into(), values: "Admin or Baseline" })
}

fn priority(number: i32) -> std::result::Result<u16, Fault> {
    let known = u16::try_from(number).ok().filter(|it| *it <= 1000);
    known.ok_or(Fault::NotAPriority { value: number })
}

fn subject(object: &Pods) -> Result<Subject> {
    let (namespaces, pods) = selectors(object)?;
    Ok(Subject { namespaces, pods })
}

/// The selectors of namespaces and of pods in them.
fn selectors(object: &Pods) -> Result<(Selector, Selector)> {
    match (&object.namespaces, &object.pods) {
        (Some(namespaces), None) => Ok((selector(namespaces, "namespaces")?, Selector::default())),
        (None, Some(pods)) => Ok((
            selector(&pods.namespace_selector, "pods.namespaceSelector")?,
            selector(&pods.pod_selector, "pods.podSelector")?,
        )),
        (Some(_), Some(_)) => Err(Fault::Alone { others: "pods" }.at("namespaces")),
        (None, None) => {
            Err(Fault::Missing { needed: "it is namespaces or pods, and this is neither" }.at("pods"))
        }
    }
}

fn action(text: &str) -> Result<Action> {
    match text {
        "Accept" => Ok(Action::Accept),
        "Deny" => Ok(Action::Deny),
        "Pass" => Ok(Action::Pass),
        text => Err(Fault::NotOneOf { text: text.into(), values: "Accept, Deny or Pass" }.at("action")),
    }
}

fn ingress_rule(object: &IngressRule) -> Result<TierRule> {
    let peers = object.from.iter().enumerate();
    let peers = peers.map(|(index, it)| pods(it).map_err(|e| e.within(format!("from[{index}]"))));
    rule(&object.action, (peers.collect::<Result<_>>()?, "from"), object.protocols.as_deref())
}

fn egress_rule(object: &EgressRule) -> Result<TierRule> {
    let mut peers = Vec::new();
    for (index, it) in object.to.iter().enumerate() {
        peers.extend(egress_peers(it).map_err(|e| e.within(format!("to[{index}]")))?);
    }
    let protocols = object.protocols.as_deref();
    let named = |it: &Protocol| it.destination_named_port.is_some();
    if peers.iter().any(|it| matches!(it, Peer::Block(_)))
        && let Some(index) = protocols.and_then(|it| it.iter().position(named))
    {
        let path = format!("protocols[{index}].destinationNamedPort");
        return Err(Fault::Alone { others: "networks, which name no ports" }.at(path));
    }
    rule(&object.action, (peers, "to"), protocols)
}

fn rule(text: &str, (peers, field): (Vec<Peer>, &str), protocols: Option<&[Protocol]>) -> Result<TierRule> {
    let action = action(text)?;
    if peers.is_empty() {
        return Err(Fault::Missing { needed: "a rule has at least one peer" }.at(field));
    }
    let mut ports = Vec::new();
    for (index, it) in protocols.unwrap_or_default().iter().enumerate() {
        ports.extend(policy_ports(it).map_err(|e| e.within(format!("protocols[{index}]")))?);
    }
    if ports.is_empty() && protocols.is_some() {
        return Err(Fault::Missing { needed: "a list has at least one protocol" }.at("protocols"));
    }
    Ok(TierRule { action, about: Rule { peers: peers.into(), ports: ports.into() } })
}

fn pods(object: &Pods) -> Result<Peer> {
    let (namespaces, pods) = selectors(object)?;
    Ok(Peer::Pods { namespaces: Namespaces::Matching(namespaces), pods })
}

fn egress_peers(object: &EgressPeer) -> Result<Vec<Peer>> {
    let unsupported = |field| Fault::NotSupported { way_out: "name their addresses in networks" }.at(field);
    if object.nodes.is_some() {
        return Err(unsupported("nodes"));
    }
    if object.domain_names.is_some() {
        return Err(unsupported("domainNames"));
    }
    let Some(networks) = &object.networks else { return Ok(vec![pods(&object.pods)?]) };
    if object.pods.namespaces.is_some() || object.pods.pods.is_some() {
        return Err(Fault::Alone { others: "namespaces and pods" }.at("networks"));
    }
    if networks.is_empty() {
        return Err(Fault::Missing { needed: "a list has at least one range" }.at("networks"));
    }
    let blocks = networks.iter().enumerate().map(|(index, text)| {
        let range = source_range(text).map_err(|fault| fault.at(format!("networks[{index}]")))?;
        Ok(Peer::Block(Block { range, except: Box::default() }))
    });
    blocks.collect()
}

/// A port by its name is one of any protocol: which one the container says.
fn policy_ports(object: &Protocol) -> Result<Vec<PolicyPort>> {
    let of = [
        (Proto::TCP, "tcp", &object.tcp),
        (Proto::UDP, "udp", &object.udp),
        (Proto::SCTP, "sctp", &object.sctp),
    ];
    let mut said = of.into_iter().filter_map(|(proto, field, of)| Some((proto, field, of.as_ref()?)));
    let only = "one of tcp, udp, sctp and destinationNamedPort";
    match (said.next(), said.next(), &object.destination_named_port) {
        (Some((proto, field, of)), None, None) => {
            let number = numbers(of).map_err(|e| e.within(field))?;
            Ok(vec![PolicyPort { proto, number }])
        }
        (None, _, Some(name)) if is_port_name(name) => {
            let port = |proto| PolicyPort { proto, number: PortNumber::Named(name.as_str().into()) };
            Ok([Proto::TCP, Proto::UDP, Proto::SCTP].map(port).into())
        }
        (None, _, Some(name)) => Err(Fault::NotAPortName { text: name.clone() }.at("destinationNamedPort")),
        (None, _, None) => Err(Fault::Missing { needed: only }.at("tcp")),
        (Some((_, field, _)), _, _) => {
            Err(Fault::Alone { others: "another protocol or a named port" }.at(field))
        }
    }
}

fn numbers(of: &OfProtocol) -> Result<PortNumber> {
    let at = |path: &'static str| move |fault: Fault| fault.at(format!("destinationPort.{path}"));
    match of.destination_port.as_ref().map(|it| (it.number, &it.range)) {
        Some((Some(number), None)) => {
            let number = port(number).map_err(at("number"))?;
            Ok(PortNumber::Range(number, number))
        }
        Some((None, Some(range))) => {
            let (first, last) =
                (port(range.start).map_err(at("range.start"))?, port(range.end).map_err(at("range.end"))?);
            if last.host() <= first.host() {
                let (first, last) = (first.host(), last.host());
                return Err(at("range.end")(Fault::EndsBefore { first, last }));
            }
            Ok(PortNumber::Range(first, last))
        }
        Some((Some(_), Some(_))) => Err(at("number")(Fault::Alone { others: "range" })),
        Some((None, None)) | None => {
            Err(at("number")(Fault::Missing { needed: "a port is a number or a range" }))
        }
    }
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::Port;
    use serde_json::json;

    use super::*;

    fn object(spec: &Value) -> Value {
        json!({"metadata": {"name": "p"}, "spec": spec})
    }

    /// With one egress rule in which these fields are others.
    fn with(fields: &Value) -> Value {
        let mut rule = json!({"action": "Accept", "to": [{"namespaces": {}}]});
        for (key, value) in fields.as_object().into_iter().flatten() {
            rule[key] = value.clone();
        }
        json!({"tier": "Admin", "priority": 7, "subject": {"namespaces": {}}, "egress": [rule]})
    }

    fn read(spec: &Value) -> std::result::Result<ClusterNetworkPolicy, String> {
        let read: Object = serde_path_to_error::deserialize(object(spec)).map_err(|it| it.to_string())?;
        match cluster_network_policy(&read) {
            Ok(Change::ClusterNetworkPolicy(name, Some(policy))) if &*name == "p" => Ok(policy),
            Ok(other) => panic!("{other:?}"),
            Err(invalid) => Err(invalid.to_string()),
        }
    }

    fn instead(spec: &Value) -> Option<ClusterNetworkPolicy> {
        let Change::ClusterNetworkPolicy(name, policy) = closed(&Name::new("default", "p"), &object(spec))
        else {
            panic!("an object of another kind");
        };
        assert_eq!(&*name, "p");
        policy
    }

    #[test]
    fn every_field_converts() {
        let labels = json!({"matchLabels": {"a": "b"}});
        let spec = json!({
            "tier": "Baseline", "priority": 1000,
            "subject": {"pods": {"namespaceSelector": labels, "podSelector": {}}},
            "ingress": [{"name": "first", "action": "Pass", "from": [{"namespaces": labels}]}],
            "egress": [{
                "action": "Deny",
                "to": [{"networks": ["10.0.0.0/8", "fd00::/8"]}, {"pods": {"namespaceSelector": {}, "podSelector": labels}}],
                "protocols": [
                    {"tcp": {"destinationPort": {"number": 80}}},
                    {"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}},
                ],
            }, {"action": "Accept", "to": [{"namespaces": {}}], "protocols": [{"destinationNamedPort": "web"}]}],
        });
        let policy = read(&spec).unwrap();
        assert_eq!((policy.tier, policy.priority, policy.live), (Tier::Baseline, 1000, None));
        assert_eq!(
            (policy.subject.namespaces.to_string(), policy.subject.pods.to_string()),
            ("a=b".into(), "any".into())
        );
        assert_eq!(policy.ingress.len(), 1);
        assert_eq!((policy.ingress[0].action, policy.ingress[0].about.ports.len()), (Action::Pass, 0));
        let [first, second] = &*policy.egress else { panic!("{policy:?}") };
        assert_eq!((first.action, first.about.peers.len(), first.about.ports.len()), (Action::Deny, 3, 2));
        let range = PortNumber::Range(Port::new(1), Port::new(65535));
        assert_eq!(first.about.ports[1], PolicyPort { proto: Proto::UDP, number: range });
        assert_eq!(second.about.ports.len(), 3, "of each protocol");
        assert_eq!(instead(&spec), Some(policy), "nothing of it is closed");
    }

    #[test]
    fn what_makes_no_sense_is_named_and_fails_closed() {
        let (accepts, denies) = (0, 1);
        for (fields, message) in [
            (json!({"to": []}), "spec.egress[0].to: is missing: a rule has at least one peer"),
            (
                json!({"to": [{"domainNames": ["a.b"]}]}),
                "spec.egress[0].to[0].domainNames: is not supported: name their addresses in networks",
            ),
            (
                json!({"to": [{"nodes": {}}]}),
                "spec.egress[0].to[0].nodes: is not supported: name their addresses in networks",
            ),
            (
                json!({"to": [{"unheardOf": {}}]}),
                "spec.egress[0].to[0].pods: is missing: it is namespaces or pods, and this is neither",
            ),
            (
                json!({"to": [{"networks": ["10.0.0.0"]}]}),
                "spec.egress[0].to[0].networks[0]: `10.0.0.0` is not an address range: write it like 10.244.1.0/24 or fd00:1::/64",
            ),
            (
                json!({"protocols": [{"tcp": {}}]}),
                "spec.egress[0].protocols[0].tcp.destinationPort.number: is missing: a port is a number or a range",
            ),
            (
                json!({"protocols": []}),
                "spec.egress[0].protocols: is missing: a list has at least one protocol",
            ),
            (
                json!({"protocols": [{}]}),
                "spec.egress[0].protocols[0].tcp: is missing: one of tcp, udp, sctp and destinationNamedPort",
            ),
            (
                json!({"protocols": [{"udp": {"destinationPort": {"range": {"start": 9, "end": 9}}}}]}),
                "spec.egress[0].protocols[0].udp.destinationPort.range.end: 9 is before port 9, where the range begins: exchange them",
            ),
            (
                json!({"to": [{"networks": ["10.0.0.0/8"]}], "protocols": [{"destinationNamedPort": "web"}]}),
                "spec.egress[0].protocols[0].destinationNamedPort: does not go together with networks, which name no ports: use one or the other",
            ),
        ] {
            let spec = with(&fields);
            assert_eq!(read(&spec).unwrap_err(), message);
            assert_eq!(instead(&spec).unwrap().egress.len(), accepts, "{fields}");
            let mut denying = spec.clone();
            denying["egress"][0]["action"] = "Deny".into();
            assert_eq!(instead(&denying).unwrap().egress.len(), denies);
            denying["egress"][0]["action"] = "Pass".into();
            let closed = instead(&denying).unwrap();
            assert_eq!(
                *closed.egress,
                [TierRule { action: Action::Deny, about: Rule::default() }],
                "{fields}"
            );
        }
    }

    #[test]
    fn an_object_that_cannot_be_placed_comes_first_and_without_subject_affects_nobody() {
        for (field, value, message) in [
            ("tier", json!("Platform"), "spec.tier: `Platform` is none of its values: use Admin or Baseline"),
            (
                "priority",
                json!(1001),
                "spec.priority: 1001 is not a priority: use 0 to 1000, of which 0 comes first",
            ),
        ] {
            let mut spec = with(&json!({}));
            spec[field] = value;
            assert_eq!(read(&spec).unwrap_err(), message);
            let closed = instead(&spec).unwrap();
            assert_eq!((closed.tier, closed.egress.len()), (Tier::Admin, 1));
        }
        let mut spec = with(&json!({}));
        spec["subject"] = json!({"unheardOf": {}});
        assert_eq!(
            read(&spec).unwrap_err(),
            "spec.subject.pods: is missing: it is namespaces or pods, and this is neither"
        );
        assert_eq!(instead(&spec), None);
    }
}
