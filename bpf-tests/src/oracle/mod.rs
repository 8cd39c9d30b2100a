//! What the APIs say of NetworkPolicies and ClusterNetworkPolicies, read off their text: no classes, no tables, no cleverness, and nothing of the
//! agent. Objects are the JSON that a user would write; every question walks all of them.
//!
//! [`random`] makes clusters to ask about, [`case`] asks, and shrinks what goes wrong.

pub mod case;
pub mod random;

use std::net::IpAddr;

use serde_json::Value;

/// The objects of a cluster, the last version of each.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    objects: Vec<Value>,
}

/// What a policy is to say of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Passes,
    Dropped,
    /// It passes, and a policy in dry run would drop it.
    Told,
}

/// Seen from the pod in question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    In,
    Out,
}

/// What goes to or comes from the other end; the port is that of the receiver, 0 where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow<'a> {
    pub peer: IpAddr,
    pub protocol: &'a str,
    pub port: u16,
}

impl Oracle {
    /// Takes an object in; one of kind, namespace and name that is there already is replaced. With `"gone": true` it is
    /// deleted.
    pub fn apply(&mut self, object: &Value) {
        let id = |it: &Value| {
            (it["kind"].clone(), it["metadata"]["namespace"].clone(), it["metadata"]["name"].clone())
        };
        self.objects.retain(|other| id(other) != id(object));
        if object["gone"] != true {
            self.objects.push(object.clone());
        }
    }

    /// The pods of a node that policies may be about, with their addresses.
    pub fn pods_on(&self, node: &str) -> Vec<(&Value, Vec<IpAddr>)> {
        let pods = self.of_kind("Pod").filter(|pod| pod["spec"]["nodeName"] == node);
        pods.map(|pod| (pod, addresses(pod))).collect()
    }

    /// What policies say of a flow of a pod.
    pub fn ask(&self, pod: &Value, way: Way, flow: Flow<'_>) -> Answer {
        if let Some(answer) = self.ask_tier("Admin", pod, way, flow) {
            return answer;
        }
        let (tried, enforced): (Vec<_>, Vec<_>) = self
            .policies_about(pod, way)
            .partition(|policy| policy["metadata"]["annotations"]["ferroflow.dev/policy-mode"] == "dry-run");
        let lets = |policies: &[&Value]| policies.iter().any(|policy| self.lets(policy, pod, way, flow));
        if !enforced.is_empty() {
            return if lets(&enforced) { Answer::Passes } else { Answer::Dropped };
        }
        // To who is in dry run no policy selects the pod, and the last tier is asked.
        let last = self.ask_tier("Baseline", pod, way, flow).unwrap_or(Answer::Passes);
        if last == Answer::Passes && !tried.is_empty() && !lets(&tried) { Answer::Told } else { last }
    }

    /// What the first rule of a tier that means the flow says; `None` where there is none, or it passes the flow on.
    fn ask_tier(&self, tier: &str, pod: &Value, way: Way, flow: Flow<'_>) -> Option<Answer> {
        let mut policies: Vec<_> = self
            .of_kind("ClusterNetworkPolicy")
            .filter(|it| it["spec"]["tier"] == tier && self.means_pod(&it["spec"]["subject"], pod))
            .collect();
        policies.sort_by_key(|it| it["spec"]["priority"].as_u64());
        let (rules, peers) = match way {
            Way::In => ("ingress", "from"),
            Way::Out => ("egress", "to"),
        };
        let rules = policies.into_iter().flat_map(|it| list(&it["spec"][rules]));
        let mut meant = rules.filter(|rule| {
            let protocols = list(&rule["protocols"]);
            list(&rule[peers]).iter().any(|peer| self.is_peer_of_tier(peer, flow.peer))
                && (protocols.is_empty() || protocols.iter().any(|it| self.is_protocol(it, pod, way, flow)))
        });
        match meant.next()?["action"].as_str() {
            Some("Accept") => Some(Answer::Passes),
            Some("Deny") => Some(Answer::Dropped),
            Some(_) | None => None,
        }
    }

    /// Whether a subject or peer, by namespaces or by pods in namespaces, means the pod.
    fn means_pod(&self, it: &Value, pod: &Value) -> bool {
        let namespace = &pod["metadata"]["namespace"];
        if it["namespaces"].is_object() {
            return self.namespace_matches(&it["namespaces"], namespace);
        }
        it["pods"].is_object()
            && self.namespace_matches(&it["pods"]["namespaceSelector"], namespace)
            && matches(&it["pods"]["podSelector"], &pod["metadata"]["labels"])
    }

    fn is_peer_of_tier(&self, peer: &Value, addr: IpAddr) -> bool {
        list(&peer["networks"]).iter().any(|range| within(addr, range))
            || self.pods_at(addr).any(|pod| self.means_pod(peer, pod))
    }

    fn is_protocol(&self, it: &Value, pod: &Value, way: Way, flow: Flow<'_>) -> bool {
        if let Some(name) = it["destinationNamedPort"].as_str() {
            let calls = |pod: &Value| container_ports(pod, name, flow.protocol).contains(&flow.port);
            return match way {
                Way::In => calls(pod),
                Way::Out => self.pods_at(flow.peer).any(calls),
            };
        }
        let port = &it[flow.protocol.to_lowercase()]["destinationPort"];
        let (number, range) = (port["number"].as_u64(), &port["range"]);
        let ends = number.zip(number).or(range["start"].as_u64().zip(range["end"].as_u64()));
        ends.is_some_and(|(first, last)| (first..=last).contains(&u64::from(flow.port)))
    }

    /// Whether any policy has a say in what comes into a pod or goes out of it, be it in dry run.
    pub fn isolates(&self, pod: &Value) -> bool {
        [Way::In, Way::Out].into_iter().any(|way| self.policies_about(pod, way).next().is_some())
    }

    fn policies_about(&self, pod: &Value, way: Way) -> impl Iterator<Item = &Value> {
        self.of_kind("NetworkPolicy").filter(move |policy| {
            policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
                && is_about(policy, way)
                && matches(&policy["spec"]["podSelector"], &pod["metadata"]["labels"])
        })
    }

    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(move |it| it["kind"] == kind)
    }

    fn lets(&self, policy: &Value, pod: &Value, way: Way, flow: Flow<'_>) -> bool {
        let (rules, peers) = match way {
            Way::In => (&policy["spec"]["ingress"], "from"),
            Way::Out => (&policy["spec"]["egress"], "to"),
        };
        list(rules).iter().any(|rule| {
            let (peers, ports) = (list(&rule[peers]), list(&rule["ports"]));
            (peers.is_empty() || peers.iter().any(|peer| self.is_peer(policy, peer, flow.peer)))
                && (ports.is_empty() || ports.iter().any(|port| self.is_port(port, pod, way, flow)))
        })
    }

    fn is_peer(&self, policy: &Value, peer: &Value, addr: IpAddr) -> bool {
        if peer["ipBlock"].is_object() {
            let block = &peer["ipBlock"];
            let except = list(&block["except"]);
            return within(addr, &block["cidr"]) && !except.iter().any(|it| within(addr, it));
        }
        self.pods_at(addr).any(|pod| {
            let namespace = &pod["metadata"]["namespace"];
            let selector = &peer["namespaceSelector"];
            let in_namespace = if selector.is_null() {
                *namespace == policy["metadata"]["namespace"]
            } else {
                self.namespace_matches(selector, namespace)
            };
            in_namespace
                && (peer["podSelector"].is_null()
                    || matches(&peer["podSelector"], &pod["metadata"]["labels"]))
        })
    }

    /// Every namespace has its name for a label, whether somebody wrote it down or not.
    fn namespace_matches(&self, selector: &Value, name: &Value) -> bool {
        let object = self.of_kind("Namespace").find(|it| it["metadata"]["name"] == *name);
        let mut labels = object.map(|it| it["metadata"]["labels"].clone()).unwrap_or_default();
        labels["kubernetes.io/metadata.name"] = name.clone();
        matches(selector, &labels)
    }

    fn pods_at(&self, addr: IpAddr) -> impl Iterator<Item = &Value> {
        self.of_kind("Pod").filter(move |pod| addresses(pod).contains(&addr))
    }

    fn is_port(&self, port: &Value, pod: &Value, way: Way, flow: Flow<'_>) -> bool {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        if protocol != flow.protocol {
            return false;
        }
        if port["port"].is_null() {
            return true;
        }
        if let Some(name) = port["port"].as_str() {
            let calls = |pod: &Value| container_ports(pod, name, protocol).contains(&flow.port);
            return match way {
                Way::In => calls(pod),
                Way::Out => self.pods_at(flow.peer).any(calls),
            };
        }
        let first = port["port"].as_u64().unwrap_or_default();
        let last = port["endPort"].as_u64().unwrap_or(first);
        (first..=last).contains(&u64::from(flow.port))
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Its own addresses, while it has a network of its own and is not finished.
fn addresses(pod: &Value) -> Vec<IpAddr> {
    let finished = pod["status"]["phase"] == "Succeeded" || pod["status"]["phase"] == "Failed";
    if finished || pod["spec"]["hostNetwork"] == true {
        return Vec::new();
    }
    list(&pod["status"]["podIPs"]).iter().filter_map(|it| it["ip"].as_str()?.parse().ok()).collect()
}

fn container_ports(pod: &Value, name: &str, protocol: &str) -> Vec<u16> {
    let containers = list(&pod["spec"]["containers"]).iter();
    let ports = containers.flat_map(|it| list(&it["ports"]));
    let ports = ports.filter(|it| it["name"] == name && it["protocol"].as_str().unwrap_or("TCP") == protocol);
    ports.filter_map(|it| u16::try_from(it["containerPort"].as_u64()?).ok()).collect()
}

fn is_about(policy: &Value, way: Way) -> bool {
    let types = list(&policy["spec"]["policyTypes"]);
    match (way, types.is_empty()) {
        (Way::In, true) => true,
        (Way::Out, true) => !list(&policy["spec"]["egress"]).is_empty(),
        (Way::In, false) => types.iter().any(|it| it == "Ingress"),
        (Way::Out, false) => types.iter().any(|it| it == "Egress"),
    }
}

fn matches(selector: &Value, labels: &Value) -> bool {
    let wanted = selector["matchLabels"].as_object();
    let equal = wanted.into_iter().flatten().all(|(key, value)| labels[key] == *value);
    equal
        && list(&selector["matchExpressions"]).iter().all(|it| {
            let value = &labels[it["key"].as_str().unwrap_or_default()];
            let among = list(&it["values"]).contains(value);
            match it["operator"].as_str() {
                Some("In") => among,
                Some("NotIn") => !among,
                Some("Exists") => !value.is_null(),
                Some("DoesNotExist") => value.is_null(),
                Some(_) | None => false,
            }
        })
}

fn within(addr: IpAddr, range: &Value) -> bool {
    let parsed = range.as_str().and_then(|text| text.split_once('/'));
    let Some((base, length)) = parsed else { return false };
    let (Ok(base), Ok(length)) = (base.parse::<IpAddr>(), length.parse::<usize>()) else { return false };
    let bits = |addr: IpAddr| -> Vec<bool> {
        let bytes = match addr {
            IpAddr::V4(addr) => addr.octets().to_vec(),
            IpAddr::V6(addr) => addr.octets().to_vec(),
        };
        bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1 == 1)).collect()
    };
    addr.is_ipv4() == base.is_ipv4() && bits(addr).iter().zip(bits(base)).take(length).all(|(a, b)| *a == b)
}
