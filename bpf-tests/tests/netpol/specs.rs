//! Upstream's Netpol specs (kubernetes 1.36, `test/e2e/network/netpol/network_policy.go`): the same policies and the same
//! reachability, over nine pods, where upstream makes those that a spec names, and over both families at once. SCTP is that
//! of [`bpf_tests::probe`]. The two specs of the API server alone are not here: they ask nothing of a network.
//!
//! A namespace is its letter, a pod is `x/a`, and what a spec expects is said of two pods: who reaches whom.

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_tests::{
    probe::Transport::{self, Sctp, Tcp, Udp},
    sandbox::Sandbox,
};
use serde_json::{Value, json};

use crate::net::Net;

type Spec = (&'static str, fn(&mut Net) -> Result<()>);

/// Of 50 less the two of the API.
const COUNT: usize = 48;

pub(crate) fn rules_43_to_53_upstreams_netpol_specs_hold(sandbox: &Sandbox) -> Result<()> {
    let mut net = Net::new(sandbox)?;
    let groups = [DENIALS, SELECTORS, PORTS, CHANGES, ADDRESSES, BOTH_WAYS, DATAGRAMS, ASSOCIATIONS];
    let specs = groups.concat();
    ensure!(specs.len() == COUNT, "{} specs", specs.len());
    for (name, spec) in specs {
        // Nothing of the spec before is in force any more.
        let done = net.reach(80, Tcp, |_, _| true).context("before it").and_then(|()| spec(&mut net));
        done.map_err(|error| anyhow!("{name}: {error:#}\n{}", net.logs()))?;
        net.clean()?;
    }
    Ok(())
}

fn is_in(pod: &str, namespace: &str) -> bool {
    pod.split('/').next() == Some(namespace)
}

fn pods(name: &str) -> Value {
    json!({"matchLabels": {"pod": name}})
}

fn namespaces(name: &str) -> Value {
    json!({"matchLabels": {"kubernetes.io/metadata.name": name}})
}

fn named(key: &str, operator: &str, values: &[&str]) -> Value {
    json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]})
}

/// Namespaces by their names.
fn by_name(operator: &str, name: &str) -> Value {
    named("kubernetes.io/metadata.name", operator, &[name])
}

fn ingress(selector: Value, rules: Value) -> Value {
    json!({"podSelector": selector, "ingress": rules, "policyTypes": ["Ingress"]})
}

fn egress(selector: Value, rules: Value) -> Value {
    json!({"podSelector": selector, "egress": rules, "policyTypes": ["Egress"]})
}

/// x/a lets in who is one of these.
fn to_a(net: &mut Net, peers: Value) -> Result<()> {
    net.create("x", "to-a", ingress(pods("a"), json!([{"from": peers}])))
}

/// Who reaches x/a, of whom nobody else does; others are reached by all.
fn a_from(net: &Net, port: u16, transport: Transport, may: impl Fn(&str) -> bool) -> Result<()> {
    net.reach(port, transport, |from, to| to != "x/a" || may(from))
}

/// Whom x/a reaches; others reach all.
fn a_to(net: &Net, port: u16, may: impl Fn(&str) -> bool) -> Result<()> {
    net.reach(port, Tcp, |from, to| from != "x/a" || may(to))
}

fn denies_ingress(net: &mut Net, transport: Transport) -> Result<()> {
    net.create("x", "deny-ingress", ingress(json!({}), json!([])))?;
    net.reach(80, transport, |_, to| !is_in(to, "x"))
}

/// Only from namespace y, and only to port 81.
fn by_ports(net: &mut Net, transport: Transport) -> Result<()> {
    let ports = json!([{"port": 81, "protocol": transport.name()}]);
    let rule = json!({"from": [{"namespaceSelector": namespaces("y")}], "ports": ports});
    net.create("x", "port-81", ingress(pods("a"), json!([rule])))?;
    a_from(net, 81, transport, |from| is_in(from, "y"))
}

fn from_one_pod_of_another_namespace(net: &mut Net, transport: Transport) -> Result<()> {
    to_a(net, json!([{"namespaceSelector": namespaces("y"), "podSelector": pods("a")}]))?;
    a_from(net, 80, transport, |from| from == "y/a")
}

const DENIALS: &[Spec] = &[
    ("should support a 'default-deny-ingress' policy", |net| denies_ingress(net, Tcp)),
    ("should support a 'default-deny-all' policy", |net| {
        let spec =
            json!({"podSelector": {}, "ingress": [], "egress": [], "policyTypes": ["Ingress", "Egress"]});
        net.create("x", "deny-all", spec)?;
        net.reach(80, Tcp, |from, to| !is_in(from, "x") && !is_in(to, "x"))
    }),
    ("should deny ingress from pods on other namespaces", |net| {
        let own = json!([{"from": [{"podSelector": {"matchLabels": {}}}]}]);
        net.create("x", "deny-empty-policy", ingress(json!({}), own))?;
        net.reach(80, Tcp, |from, to| !is_in(to, "x") || is_in(from, "x"))
    }),
    ("should deny egress from pods based on PodSelector", |net| {
        net.create("x", "deny-egress-pod-a", egress(pods("a"), json!([])))?;
        a_to(net, 80, |_| false)
    }),
    ("should deny egress from all pods in a namespace", |net| {
        net.create("x", "deny-egress-ns-x", egress(json!({}), json!([])))?;
        net.reach(80, Tcp, |from, _| !is_in(from, "x"))
    }),
    ("should support allow-all policy", |net| {
        net.create("x", "allow-all", ingress(json!({}), json!([{}])))?;
        net.reach(80, Tcp, |_, _| true)?;
        net.reach(81, Tcp, |_, _| true)
    }),
    ("should enforce policy to allow ingress traffic for a target", |net| {
        net.create("x", "deny-all", ingress(json!({}), json!([])))?;
        to_a(net, json!([{"podSelector": {}, "namespaceSelector": {}}]))?;
        net.reach(80, Tcp, |_, to| !is_in(to, "x") || to == "x/a")
    }),
    ("should enforce policy to allow ingress traffic from pods in all namespaces", |net| {
        to_a(net, json!([{"namespaceSelector": {"matchLabels": {}}}]))?;
        net.reach(80, Tcp, |_, _| true)
    }),
];

const SELECTORS: &[Spec] = &[
    (
        "should enforce policy to allow traffic from pods within server namespace based on PodSelector",
        |net| {
            to_a(net, json!([{"podSelector": pods("b")}]))?;
            a_from(net, 80, Tcp, |from| from == "x/b")
        },
    ),
    (
        "should enforce policy to allow traffic only from a different namespace, based on NamespaceSelector",
        |net| {
            to_a(net, json!([{"namespaceSelector": namespaces("y")}]))?;
            a_from(net, 80, Tcp, |from| is_in(from, "y"))
        },
    ),
    ("should enforce policy based on PodSelector with MatchExpressions", |net| {
        to_a(net, json!([{"podSelector": named("pod", "In", &["b"])}]))?;
        a_from(net, 80, Tcp, |from| from == "x/b")
    }),
    ("should enforce policy based on NamespaceSelector with MatchExpressions", |net| {
        to_a(net, json!([{"namespaceSelector": by_name("In", "y")}]))?;
        a_from(net, 80, Tcp, |from| is_in(from, "y"))
    }),
    ("should enforce policy based on PodSelector or NamespaceSelector", |net| {
        to_a(net, json!([{"namespaceSelector": by_name("NotIn", "x")}, {"podSelector": pods("b")}]))?;
        a_from(net, 80, Tcp, |from| from != "x/c")
    }),
    ("should enforce policy based on PodSelector and NamespaceSelector", |net| {
        to_a(net, json!([{"namespaceSelector": by_name("NotIn", "x"), "podSelector": pods("b")}]))?;
        a_from(net, 80, Tcp, |from| from == "y/b" || from == "z/b")
    }),
    ("should enforce policy based on Multiple PodSelectors and NamespaceSelectors", |net| {
        let others = json!({"namespaceSelector": by_name("NotIn", "x"), "podSelector": named("pod", "In", &["b", "c"])});
        to_a(net, json!([others]))?;
        a_from(net, 80, Tcp, |from| !is_in(from, "x") && !from.ends_with("/a"))
    }),
    ("should enforce policy based on any PodSelectors", |net| {
        to_a(net, json!([{"podSelector": pods("b")}, {"podSelector": pods("c")}]))?;
        a_from(net, 80, Tcp, |from| from == "x/b" || from == "x/c")
    }),
    (
        "should enforce policy to allow traffic only from a pod in a different namespace based on PodSelector and \
         NamespaceSelector",
        |net| from_one_pod_of_another_namespace(net, Tcp),
    ),
    (
        "should enforce policy to allow traffic based on NamespaceSelector with MatchLabels using default ns label",
        |net| {
            to_a(net, json!([{"namespaceSelector": namespaces("y")}]))?;
            a_from(net, 80, Tcp, |from| is_in(from, "y"))
        },
    ),
    (
        "should enforce policy based on NamespaceSelector with MatchExpressions using default ns label",
        |net| {
            let others = json!([{"to": [{"namespaceSelector": by_name("NotIn", "y")}]}]);
            net.create("x", "away", egress(pods("a"), others))?;
            a_to(net, 80, |to| !is_in(to, "y"))
        },
    ),
];

const PORTS: &[Spec] = &[
    ("should enforce policy based on Ports", |net| by_ports(net, Tcp)),
    ("should enforce multiple, stacked policies with overlapping podSelectors", |net| {
        by_ports(net, Tcp)?;
        a_from(net, 80, Tcp, |_| false)?;
        let rule = json!({"from": [{"namespaceSelector": namespaces("y")}], "ports": [{"port": 80}]});
        net.create("x", "port-80", ingress(pods("a"), json!([rule])))?;
        a_from(net, 80, Tcp, |from| is_in(from, "y"))
    }),
    ("should allow ingress access on one named port", |net| {
        net.create("x", "named", ingress(json!({}), json!([{"ports": [{"port": "serve-81-tcp"}]}])))?;
        net.reach(80, Tcp, |_, to| !is_in(to, "x"))?;
        net.reach(81, Tcp, |_, _| true)
    }),
    ("should allow ingress access from namespace on one named port", |net| {
        let ports = json!([{"port": "serve-80-tcp", "protocol": "TCP"}]);
        let rule = json!({"from": [{"namespaceSelector": namespaces("y")}], "ports": ports});
        net.create("x", "named", ingress(pods("a"), json!([rule])))?;
        a_from(net, 80, Tcp, |from| is_in(from, "y"))?;
        a_from(net, 81, Tcp, |_| false)
    }),
    ("should allow egress access on one named port", |net| {
        net.create("x", "named", egress(json!({}), json!([{"ports": [{"port": "serve-80-tcp"}]}])))?;
        net.reach(81, Tcp, |from, _| !is_in(from, "x"))?;
        net.reach(80, Tcp, |_, _| true)
    }),
    ("should enforce ingress policy allowing any port traffic to a server on a specific protocol", |net| {
        net.create("x", "protocol", ingress(pods("a"), json!([{"ports": [{"protocol": "TCP"}]}])))?;
        a_from(net, 80, Udp, |_| false)?;
        net.reach(80, Tcp, |_, _| true)
    }),
    ("should not allow access by TCP when a policy specifies only UDP", |net| {
        net.create("x", "udp", ingress(pods("a"), json!([{"ports": [{"port": 81, "protocol": "UDP"}]}])))?;
        a_from(net, 81, Tcp, |_| false)
    }),
    (
        "should not mistakenly treat 'protocol: SCTP' as 'protocol: TCP', even if the plugin doesn't support SCTP",
        |net| {
            net.create("x", "deny-ingress", ingress(json!({}), json!([])))?;
            net.create(
                "x",
                "sctp",
                ingress(pods("a"), json!([{"ports": [{"port": 81, "protocol": "SCTP"}]}])),
            )?;
            net.reach(81, Tcp, |_, to| !is_in(to, "x"))
        },
    ),
    (
        "should properly isolate pods that are selected by a policy allowing SCTP, even if the plugin doesn't support \
         SCTP",
        |net| {
            net.create(
                "x",
                "sctp",
                ingress(pods("a"), json!([{"ports": [{"port": 80, "protocol": "SCTP"}]}])),
            )?;
            a_from(net, 81, Tcp, |_| false)
        },
    ),
];

const CHANGES: &[Spec] = &[
    ("should enforce updated policy", |net| {
        net.create("x", "mutates", ingress(json!({}), json!([{}])))?;
        net.reach(81, Tcp, |_, _| true)?;
        net.create("x", "mutates", ingress(json!({}), json!([])))?;
        net.reach(81, Tcp, |_, to| !is_in(to, "x"))
    }),
    ("should allow ingress access from updated namespace", |net| {
        to_a(net, json!([{"namespaceSelector": {"matchLabels": {"ns2": "updated"}}}]))?;
        a_from(net, 80, Tcp, |_| false)?;
        net.label_namespace("y", json!({"ns2": "updated"}))?;
        a_from(net, 80, Tcp, |from| is_in(from, "y"))?;
        net.label_namespace("y", json!({}))
    }),
    ("should allow ingress access from updated pod", |net| {
        to_a(net, json!([{"podSelector": {"matchLabels": {"pod": "b", "pod2": "updated"}}}]))?;
        a_from(net, 80, Tcp, |_| false)?;
        net.label("x/b", json!({"pod2": "updated"}))?;
        a_from(net, 80, Tcp, |from| from == "x/b")?;
        net.label("x/b", json!({}))
    }),
    ("should deny ingress access to updated pod", |net| {
        net.create("x", "by-label", ingress(json!({"matchLabels": {"target": "isolated"}}), json!([])))?;
        net.reach(80, Tcp, |_, _| true)?;
        net.label("x/a", json!({"target": "isolated"}))?;
        a_from(net, 80, Tcp, |_| false)?;
        net.label("x/a", json!({}))
    }),
    ("should stop enforcing policies after they are deleted", |net| {
        let spec =
            json!({"podSelector": {}, "ingress": [], "egress": [], "policyTypes": ["Ingress", "Egress"]});
        net.create("x", "deny-all", spec)?;
        net.reach(80, Tcp, |from, to| !is_in(from, "x") && !is_in(to, "x"))?;
        net.clean()?;
        net.reach(80, Tcp, |_, _| true)
    }),
    ("should enforce multiple ingress policies with ingress allow-all policy taking precedence", |net| {
        net.create("x", "port-80", ingress(json!({}), json!([{"ports": [{"port": 80}]}])))?;
        net.reach(81, Tcp, |_, to| !is_in(to, "x"))?;
        net.create("x", "all", ingress(json!({}), json!([{}])))?;
        net.reach(81, Tcp, |_, _| true)
    }),
    ("should enforce multiple egress policies with egress allow-all policy taking precedence", |net| {
        net.create("x", "port-80", egress(json!({}), json!([{"ports": [{"port": 80}]}])))?;
        net.reach(81, Tcp, |from, _| !is_in(from, "x"))?;
        net.create("x", "all", egress(json!({}), json!([{}])))?;
        net.reach(81, Tcp, |_, _| true)
    }),
];

/// From x/a to blocks of addresses.
fn a_to_blocks(net: &mut Net, blocks: &[Value]) -> Result<()> {
    let blocks: Vec<_> = blocks.iter().map(|it| json!({"ipBlock": it})).collect();
    net.create("x", "cidr", egress(pods("a"), json!([{"to": blocks}])))
}

/// Wide ranges around a pod, but for itself.
fn all_but(net: &mut Net, pod: &str) -> Result<()> {
    let (wide, own) = (net.ranges(pod, [4, 4])?, net.ranges(pod, [32, 128])?);
    let blocks: Vec<_> =
        wide.iter().zip(&own).map(|(cidr, it)| json!({"cidr": cidr, "except": [it]})).collect();
    a_to_blocks(net, &blocks)?;
    a_to(net, 80, |to| to != pod)
}

const ADDRESSES: &[Spec] = &[
    ("should allow egress access to server in CIDR block", |net| {
        let own = net.ranges("y/b", [32, 128])?.map(|cidr| json!({"cidr": cidr}));
        a_to_blocks(net, &own)?;
        a_to(net, 80, |to| to == "y/b")
    }),
    ("should enforce except clause while egress access to server in CIDR block", |net| all_but(net, "x/b")),
    ("should ensure an IP overlapping both IPBlock.CIDR and IPBlock.Except is allowed", |net| {
        all_but(net, "x/b")?;
        let own = net.ranges("x/b", [32, 128])?.map(|cidr| json!({"cidr": cidr}));
        a_to_blocks(net, &own)?;
        a_to(net, 80, |to| to == "x/b")
    }),
];

const BOTH_WAYS: &[Spec] = &[
    (
        "should enforce policies to check ingress and egress policies can be controlled independently based on \
         PodSelector",
        |net| {
            net.create("x", "out", egress(pods("a"), json!([{}])))?;
            net.reach(80, Tcp, |_, _| true)?;
            net.create("x", "in", ingress(pods("a"), json!([])))?;
            a_from(net, 80, Tcp, |_| false)
        },
    ),
    ("should work with Ingress, Egress specified together", |net| {
        net.create(
            "x",
            "both",
            json!({
                "podSelector": pods("a"), "policyTypes": ["Egress", "Ingress"],
                "ingress": [{"from": [{"podSelector": pods("b")}]}], "egress": [{"ports": [{"port": 80}]}],
            }),
        )?;
        a_from(net, 80, Tcp, |from| from == "x/b")?;
        net.reach(81, Tcp, |from, to| from != "x/a" && (to != "x/a" || from == "x/b"))
    }),
    (
        "should support denying of egress traffic on the client side (even if the server explicitly allows this \
         traffic)",
        |net| {
            let peer =
                |namespace| json!({"namespaceSelector": namespaces(namespace), "podSelector": pods("a")});
            net.create("x", "to-y-a", egress(pods("a"), json!([{"to": [peer("y")]}])))?;
            for pod in ["a", "b"] {
                net.create("y", pod, ingress(pods(pod), json!([{"from": [peer("x")]}])))?;
            }
            let guarded = |to: &str| to == "y/a" || to == "y/b";
            net.reach(80, Tcp, |from, to| match (from, to) {
                ("x/a", to) => to == "y/a",
                (_, to) => !guarded(to),
            })
        },
    ),
    (
        "should enforce egress policy allowing traffic to a server in a different namespace based on PodSelector and \
         NamespaceSelector",
        |net| {
            let peer = json!({"namespaceSelector": namespaces("y"), "podSelector": pods("a")});
            net.create("x", "to-y-a", egress(pods("a"), json!([{"to": [peer]}])))?;
            a_to(net, 80, |to| to == "y/a")
        },
    ),
];

const DATAGRAMS: &[Spec] = &[
    ("using UDP should support a 'default-deny-ingress' policy", |net| denies_ingress(net, Udp)),
    ("using UDP should enforce policy based on Ports", |net| by_ports(net, Udp)),
    (
        "using UDP should enforce policy to allow traffic only from a pod in a different namespace based on PodSelector \
         and NamespaceSelector",
        |net| from_one_pod_of_another_namespace(net, Udp),
    ),
];

const ASSOCIATIONS: &[Spec] = &[
    ("using SCTP should support a 'default-deny-ingress' policy", |net| denies_ingress(net, Sctp)),
    ("using SCTP should enforce policy based on Ports", |net| by_ports(net, Sctp)),
    (
        "using SCTP should enforce policy to allow traffic only from a pod in a different namespace based on PodSelector \
         and NamespaceSelector",
        |net| from_one_pod_of_another_namespace(net, Sctp),
    ),
];
