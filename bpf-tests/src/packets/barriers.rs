//! Random network policies, and the pods and namespaces that they select: few of each, so that they meet.

use ferroflow_ebpf::noise::Noise;
use serde_json::{Value, json};

use super::random::{LOCAL, REMOTE, local_pod};

/// What a cluster with policies begins with, beside its services.
pub(super) fn objects(noise: &mut Noise) -> Vec<Value> {
    let mut objects = vec![namespace(noise, "default"), namespace(noise, "shop")];
    objects.extend((0..LOCAL.len()).map(|number| pod(noise, number)));
    objects.extend((0..REMOTE.len()).map(|number| remote(noise, number)));
    objects.extend((0..1 + noise.below(POLICIES)).map(|number| policy(noise, number)));
    objects
}

/// What changes at once.
pub(super) fn change(noise: &mut Noise) -> Vec<Value> {
    match noise.below(10) {
        0 => vec![namespace(noise, "shop")],
        1 => {
            let number = noise.below(REMOTE.len());
            vec![remote(noise, number)]
        }
        2 | 3 => {
            let number = noise.below(LOCAL.len());
            vec![pod(noise, number)]
        }
        // Another pod with the same addresses: it has nothing going.
        4 => {
            let number = noise.below(LOCAL.len());
            let pod = pod(noise, number);
            vec![gone(&pod), pod]
        }
        _ => {
            let number = noise.below(POLICIES);
            let policy = policy(noise, number);
            vec![if noise.percent(30) { gone(&policy) } else { policy }]
        }
    }
}

const POLICIES: usize = 3;
const KEYS: [&str; 2] = ["app", "tier"];
const VALUES: [&str; 2] = ["a", "b"];
/// The names of containers' ports, and where some have them.
const NAMES: [(&str, &str, [u16; 2]); 3] =
    [("web", "TCP", [8080, 9090]), ("dns", "UDP", [5353, 5353]), ("ss7", "SCTP", [3868, 3868])];
const BLOCKS: [(&str, &[&str]); 11] = [
    ("10.244.0.0/16", &["10.244.1.0/24", "10.244.2.2/32"]),
    ("10.244.1.2/31", &["10.244.1.3/32"]),
    ("0.0.0.0/0", &["203.0.113.0/24", "10.0.0.0/8"]),
    ("203.0.113.0/24", &["203.0.113.7/32"]),
    ("192.168.0.0/16", &["192.168.5.1/32"]),
    // Services' addresses, which policies do not see (rule 47).
    ("10.96.0.0/16", &[]),
    ("fd00:244::/32", &["fd00:244:1::/64", "fd00:244:2::2/128"]),
    ("fd00:244:1::2/127", &[]),
    ("::/0", &["2001:db8::/64", "fd00::/8"]),
    ("2001:db8::/32", &["2001:db8:1::/48"]),
    ("fd00:5::/64", &[]),
];

fn gone(object: &Value) -> Value {
    json!({"kind": object["kind"], "metadata": object["metadata"], "gone": true})
}

fn namespace(noise: &mut Noise, name: &str) -> Value {
    json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels(noise)}})
}

fn pod(noise: &mut Noise, number: usize) -> Value {
    described(noise, local_pod(number))
}

fn remote(noise: &mut Noise, number: usize) -> Value {
    let namespace = ["default", "shop"][number];
    let pod = json!({"kind": "Pod", "metadata": {"name": format!("r{number}"), "namespace": namespace},
        "spec": {"nodeName": "there"},
        "status": {"phase": "Running", "podIPs": REMOTE[number].map(|ip| json!({"ip": ip}))}});
    described(noise, pod)
}

/// With labels and named ports.
fn described(noise: &mut Noise, mut pod: Value) -> Value {
    pod["metadata"]["labels"] = labels(noise);
    let mut ports = Vec::new();
    for (name, protocol, numbers) in NAMES {
        if noise.percent(70) {
            let number = noise.pick(&numbers);
            ports.push(json!({"name": name, "protocol": protocol, "containerPort": number}));
        }
    }
    pod["spec"]["containers"] = json!([{"name": "c", "ports": ports}]);
    pod
}

fn policy(noise: &mut Noise, number: usize) -> Value {
    let mut policy = json!({"kind": "NetworkPolicy",
        "metadata": {"name": format!("n{number}"), "namespace": "default"},
        "spec": {"podSelector": selector(noise)}});
    if noise.percent(8) {
        policy["metadata"]["annotations"] = json!({"ferroflow.dev/policy-mode": "dry-run"});
    }
    for (field, peers, percent) in [("ingress", "from", 75), ("egress", "to", 55)] {
        if noise.percent(percent) {
            policy["spec"][field] = (0..noise.below(3)).map(|_| rule(noise, peers)).collect();
        }
    }
    if noise.percent(50) {
        let types: [&[&str]; 3] = [&["Ingress"], &["Egress"], &["Ingress", "Egress"]];
        policy["spec"]["policyTypes"] = noise.pick(&types).into();
    }
    policy
}

fn rule(noise: &mut Noise, field: &str) -> Value {
    let mut rule = json!({});
    if noise.percent(75) {
        rule[field] = (0..1 + noise.below(2)).map(|_| peer(noise)).collect();
    }
    if noise.percent(60) {
        rule["ports"] = (0..1 + noise.below(2)).map(|_| port(noise)).collect();
    }
    rule
}

fn peer(noise: &mut Noise) -> Value {
    match noise.below(10) {
        0..5 => {
            let (cidr, parts) = noise.pick(&BLOCKS);
            let except: Vec<_> = parts.iter().filter(|_| noise.percent(50)).collect();
            json!({"ipBlock": {"cidr": cidr, "except": except}})
        }
        5..8 => json!({"podSelector": selector(noise)}),
        8 => json!({"namespaceSelector": selector(noise)}),
        _ => json!({"namespaceSelector": selector(noise), "podSelector": selector(noise)}),
    }
}

fn port(noise: &mut Noise) -> Value {
    let (name, protocol, numbers) = noise.pick(&NAMES);
    let number = noise.pick(&numbers);
    let mut port = json!({"protocol": protocol});
    match noise.below(10) {
        0 => {}
        1..4 => port["port"] = name.into(),
        4..7 => port["port"] = number.into(),
        7 => {
            port["port"] = (number - 100).into();
            port["endPort"] = (number + 100).into();
        }
        8 => {
            port["port"] = 1.into();
            port["endPort"] = (number - 1).into();
        }
        // A service's port, which policies do not see (rule 47).
        _ => port["port"] = noise.pick(&[80, 53, 30_080]).into(),
    }
    port
}

fn labels(noise: &mut Noise) -> Value {
    let mut labels = json!({});
    for key in KEYS {
        if noise.percent(80) {
            labels[key] = noise.pick(&VALUES).into();
        }
    }
    labels
}

fn selector(noise: &mut Noise) -> Value {
    match noise.below(10) {
        0..3 => json!({}),
        3..8 => json!({"matchLabels": {noise.pick(&KEYS): noise.pick(&VALUES)}}),
        8 => json!({"matchExpressions": [{"key": noise.pick(&KEYS), "operator": "DoesNotExist"}]}),
        _ => {
            let (key, value) = (noise.pick(&KEYS), noise.pick(&VALUES));
            json!({"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]})
        }
    }
}
