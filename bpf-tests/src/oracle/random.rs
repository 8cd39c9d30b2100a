//! Random clusters: small, so that selectors, blocks and ports meet.

use ferroflow_ebpf::noise::Noise;
use serde_json::{Map, Value, json};

/// An object to begin with, or a change to one.
pub fn object(noise: &mut Noise) -> Value {
    match noise.below(12) {
        0 => namespace(noise),
        1..=4 => pod(noise),
        5 => gone(noise),
        6..=9 => policy(noise),
        _ => cluster_policy(noise),
    }
}

const NAMESPACES: [&str; 3] = ["shop", "pay", "ops"];
const PORT_NAMES: [&str; 3] = ["web", "db", "dns"];
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
/// Ports that rules and probes have in common.
pub const PORTS: [u16; 9] = [1, 53, 79, 80, 81, 443, 8080, 9000, 65535];
/// At the edges of [`RANGES`], and far from them.
pub const ADDRESSES: [&str; 16] = [
    "10.0.0.1",
    "10.0.0.2",
    "10.0.0.3",
    "10.0.1.1",
    "10.0.1.2",
    "10.1.0.1",
    "192.0.2.1",
    "255.255.255.255",
    "9.255.255.255",
    "11.0.0.1",
    "fd00::1",
    "fd00::2",
    "fd00:0:0:1::1",
    "fd01::1",
    "2001:db8::1",
    "0.0.0.0",
];
const RANGES: [(&str, &[&str]); 9] = [
    ("0.0.0.0/0", &["10.0.0.0/8", "10.0.0.0/24", "10.0.0.1/32", "192.0.2.0/24", "255.0.0.0/8"]),
    ("10.0.0.0/8", &["10.0.0.0/24", "10.0.0.2/32", "10.0.0.0/16", "10.0.0.0/31"]),
    ("10.0.0.0/24", &["10.0.0.1/32", "10.0.0.0/30"]),
    ("10.0.0.2/32", &[]),
    ("::/0", &["fd00::/8", "fd00::/64", "2001:db8::/32"]),
    ("fd00::/8", &["fd00::/64", "fd00::1/128"]),
    ("fd00::/64", &["fd00::2/128"]),
    ("192.0.2.0/24", &[]),
    ("10.0.0.3/16", &["10.0.1.1/24"]),
];

pub const PODS: usize = 8;

/// Each pod has addresses of its own.
pub fn pod_addresses(number: usize) -> [String; 2] {
    let (half, last) = (number % 2, number / 2 + 1);
    [format!("10.0.{half}.{last}"), format!("fd00:0:0:{half}::{last}")]
}

fn namespace(noise: &mut Noise) -> Value {
    let name = noise.pick(&NAMESPACES);
    json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels(noise)}})
}

fn pod(noise: &mut Noise) -> Value {
    let number = noise.below(PODS);
    let node = if noise.percent(60) { "here" } else { "there" };
    let phase = if noise.percent(8) { "Succeeded" } else { "Running" };
    let addresses = pod_addresses(number);
    let addresses: Vec<_> =
        addresses.iter().filter(|_| !noise.percent(5)).map(|ip| json!({"ip": ip})).collect();
    let ports: Vec<_> = (0..noise.below(4))
        .map(|_| {
            let mut port = json!({"name": noise.pick(&PORT_NAMES), "containerPort": noise.pick(&PORTS)});
            if noise.percent(50) {
                port["protocol"] = noise.pick(&PROTOCOLS).into();
            }
            port
        })
        .collect();
    json!({
        "kind": "Pod",
        "metadata": {"name": format!("p{number}"), "namespace": NAMESPACES[number % 3], "labels": labels(noise)},
        "spec": {"nodeName": node, "hostNetwork": noise.percent(5), "containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": phase, "podIPs": addresses},
    })
}

fn policy(noise: &mut Noise) -> Value {
    let metadata = json!({"name": format!("n{}", noise.below(4)), "namespace": noise.pick(&NAMESPACES)});
    let mut object =
        json!({"kind": "NetworkPolicy", "metadata": metadata, "spec": {"podSelector": selector(noise)}});
    if noise.percent(15) {
        object["metadata"]["annotations"] = json!({"ferroflow.dev/policy-mode": "dry-run"});
    }
    if noise.percent(75) {
        object["spec"]["ingress"] = (0..noise.below(4)).map(|_| rule(noise, "from")).collect();
    }
    if noise.percent(60) {
        object["spec"]["egress"] = (0..noise.below(4)).map(|_| rule(noise, "to")).collect();
    }
    if noise.percent(60) {
        let types: [&[&str]; 4] = [&["Ingress"], &["Egress"], &["Ingress", "Egress"], &[]];
        object["spec"]["policyTypes"] = noise.pick(&types).into();
    }
    object
}

/// No two have one priority: which of them comes first is not said.
fn cluster_policy(noise: &mut Noise) -> Value {
    let number = noise.below(4);
    let mut rules = |field| -> Value { (0..noise.below(4)).map(|_| tier_rule(noise, field)).collect() };
    let (ingress, egress) = (rules("from"), rules("to"));
    json!({
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": format!("c{number}")},
        "spec": {
            "tier": noise.pick(&["Admin", "Baseline"]),
            "priority": noise.below(3) * 10 + number,
            "subject": pods(noise),
            "ingress": ingress,
            "egress": egress,
        },
    })
}

fn tier_rule(noise: &mut Noise, field: &str) -> Value {
    let mut rule = json!({"action": noise.pick(&["Accept", "Accept", "Deny", "Pass"])});
    let networks = field == "to" && noise.percent(40);
    rule[field] = (0..1 + noise.below(2)).map(|_| pods(noise)).collect();
    if networks {
        let ranges: Vec<_> = (0..1 + noise.below(2)).map(|_| noise.pick(&RANGES).0).collect();
        rule[field][0] = json!({"networks": ranges});
    }
    // Networks name no ports.
    let names: &[&str] = if networks { &[] } else { &PORT_NAMES };
    if noise.percent(60) {
        rule["protocols"] = (0..1 + noise.below(3)).map(|_| protocol(noise, names)).collect();
    }
    rule
}

fn pods(noise: &mut Noise) -> Value {
    if noise.percent(50) {
        return json!({"namespaces": selector(noise)});
    }
    json!({"pods": {"namespaceSelector": selector(noise), "podSelector": selector(noise)}})
}

fn protocol(noise: &mut Noise, names: &[&str]) -> Value {
    if !names.is_empty() && noise.percent(30) {
        return json!({"destinationNamedPort": noise.pick(names)});
    }
    let (first, last) = (noise.pick(&PORTS), noise.pick(&PORTS));
    let port = if last > first && noise.percent(50) {
        json!({"range": {"start": first, "end": last}})
    } else {
        json!({"number": first})
    };
    json!({noise.pick(&PROTOCOLS).to_lowercase(): {"destinationPort": port}})
}

fn rule(noise: &mut Noise, field: &str) -> Value {
    let mut rule = json!({});
    if noise.percent(75) {
        rule[field] = (0..noise.below(4)).map(|_| peer(noise)).collect();
    }
    if noise.percent(60) {
        rule["ports"] = (0..noise.below(4)).map(|_| port(noise)).collect();
    }
    rule
}

fn peer(noise: &mut Noise) -> Value {
    if noise.percent(35) {
        let (cidr, parts) = noise.pick(&RANGES);
        let except: Vec<_> = parts.iter().filter(|_| noise.percent(40)).collect();
        return if except.is_empty() {
            json!({"ipBlock": {"cidr": cidr}})
        } else {
            json!({"ipBlock": {"cidr": cidr, "except": except}})
        };
    }
    match noise.below(3) {
        0 => json!({"podSelector": selector(noise)}),
        1 => json!({"namespaceSelector": selector(noise)}),
        _ => json!({"podSelector": selector(noise), "namespaceSelector": selector(noise)}),
    }
}

fn port(noise: &mut Noise) -> Value {
    let mut port = json!({});
    if noise.percent(60) {
        port["protocol"] = noise.pick(&PROTOCOLS).into();
    }
    match noise.below(10) {
        0 | 1 => {}
        2..=4 => port["port"] = noise.pick(&PORT_NAMES).into(),
        _ => {
            let first = noise.pick(&PORTS);
            port["port"] = first.into();
            let last = noise.pick(&PORTS);
            if last >= first && noise.percent(40) {
                port["endPort"] = last.into();
            }
        }
    }
    port
}

fn gone(noise: &mut Noise) -> Value {
    let mut object = match noise.below(6) {
        0 => namespace(noise),
        1 | 2 => pod(noise),
        3 => cluster_policy(noise),
        _ => policy(noise),
    };
    object["gone"] = true.into();
    object
}

const KEYS: [&str; 3] = ["app", "tier", "team"];
const VALUES: [&str; 2] = ["a", "b"];

fn labels(noise: &mut Noise) -> Value {
    let chosen = KEYS.iter().filter(|_| noise.percent(60)).copied().collect::<Vec<_>>();
    chosen.into_iter().map(|key| (key.to_owned(), noise.pick(&VALUES).into())).collect::<Map<_, _>>().into()
}

fn selector(noise: &mut Noise) -> Value {
    let mut selector = json!({});
    if noise.percent(50) {
        selector["matchLabels"] = json!({noise.pick(&KEYS): noise.pick(&VALUES)});
    }
    if noise.percent(10) {
        selector["matchLabels"] = json!({"kubernetes.io/metadata.name": noise.pick(&NAMESPACES)});
    }
    if noise.percent(35) {
        let operator = noise.pick(&["In", "NotIn", "Exists", "DoesNotExist"]);
        let mut expression = json!({"key": noise.pick(&KEYS), "operator": operator});
        if operator.ends_with("In") {
            let both = noise.percent(30);
            expression["values"] = if both { json!(VALUES) } else { json!([noise.pick(&VALUES)]) };
        }
        selector["matchExpressions"] = json!([expression]);
    }
    selector
}
