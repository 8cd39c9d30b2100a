//! Network policies on the wire: pods of two nodes, real agents, and an oracle that reads the text of the API.
#![forbid(unsafe_code)]

mod faults;
mod net;
mod objects;
mod peers;
mod refusals;
mod specs;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    checks::{self, World, target},
    cluster::{Cluster, Family},
    cni::{self, Container},
    netns::Netns,
    patience::stretched,
    pod::ECHO_PORT,
    probe::{Answering, Probe, Transport, answered},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};
use serde_json::{Value, json};

use objects::{Objects, PORTS, SOON, app, policy};

fn main() -> ExitCode {
    runner::main(&[
        ("rules_43_to_53_upstreams_netpol_specs_hold", specs::rules_43_to_53_upstreams_netpol_specs_hold),
        (
            "huge_policies_are_enforced_and_what_exceeds_the_tables_closes_its_pods_alone",
            faults::huge_policies_are_enforced_and_what_exceeds_the_tables_closes_its_pods_alone,
        ),
        (
            "policies_that_make_no_sense_close_their_pods_and_are_told",
            faults::policies_that_make_no_sense_close_their_pods_and_are_told,
        ),
        ("rules_50_and_51_who_selectors_do_not_mean", peers::rules_50_and_51_who_selectors_do_not_mean),
        (
            "rule_37_errors_reach_and_leave_isolated_pods",
            refusals::rule_37_errors_reach_and_leave_isolated_pods,
        ),
        ("rules_43_to_53_a_truth_table_holds", rules_43_to_53_a_truth_table_holds),
        ("rules_43_to_53_a_truth_table_holds_on_clsact", rules_43_to_53_a_truth_table_holds_on_clsact),
        (
            "cluster_policies_are_asked_in_tiers_and_explained",
            cluster_policies_are_asked_in_tiers_and_explained,
        ),
        ("rule_47_policies_see_backends_and_clients", rule_47_policies_see_backends_and_clients),
        (
            "rule_49_a_pod_reaches_itself_and_its_node_reaches_it",
            rule_49_a_pod_reaches_itself_and_its_node_reaches_it,
        ),
        ("rule_52_what_is_established_finishes", rule_52_what_is_established_finishes),
        (
            "rule_52_live_flows_are_cut_where_a_policy_says_so",
            rule_52_live_flows_are_cut_where_a_policy_says_so,
        ),
        (
            "rule_52_live_flows_are_cut_where_the_agent_says_so",
            rule_52_live_flows_are_cut_where_the_agent_says_so,
        ),
        (
            "rule_54_a_new_pod_is_guarded_from_its_first_packet",
            rule_54_a_new_pod_is_guarded_from_its_first_packet,
        ),
    ])
}

/// One after the other: what each says, and what pods in `shop` it is about.
fn table(cluster: &Cluster) -> Vec<Value> {
    let port = |protocol: &str, port: Value| json!({"protocol": protocol, "port": port});
    let block =
        |family, len: u8| json!({"ipBlock": {"cidr": format!("{}/{len}", cluster.pod("b1").ip(family))}});
    let node = |name: &str| {
        Family::BOTH.map(|family| {
            let ip = cluster.node(name).ip(family);
            json!({"ipBlock": {"cidr": format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })}})
        })
    };
    let except = cluster.pod("b1").v4;
    let cidr = format!("{}/24", cluster.node("b").pod_cidr_v4().addr);
    let others = json!({"namespaceSelector": {"matchLabels": {"team": "pay"}}, "podSelector": app("client")});
    vec![
        json!({"podSelector": {}, "policyTypes": ["Ingress"]}),
        json!({"podSelector": {}, "policyTypes": ["Egress"]}),
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        json!({"podSelector": {}, "ingress": [{}], "egress": [{}], "policyTypes": ["Ingress", "Egress"]}),
        json!({"podSelector": app("db"), "ingress": [{"from": [{"podSelector": app("client")}]}]}),
        json!({"podSelector": app("db"), "ingress": [{"from": [{"namespaceSelector": {}}]}]}),
        json!({"podSelector": app("db"), "ingress": [{"from": [others.clone()]}]}),
        json!({"podSelector": app("db"), "ingress": [{"from": [others, {"podSelector": {}}], "ports": [port("TCP", 8000.into())]}]}),
        json!({"podSelector": app("db"), "ingress": [{"ports": [port("UDP", 8053.into()), port("TCP", "web".into())]}]}),
        json!({"podSelector": app("db"), "ingress": [{"ports": [{"protocol": "TCP", "port": 8000, "endPort": 8001}]}]}),
        json!({"podSelector": app("db"), "ingress": [{"ports": [port("SCTP", 8000.into())]}]}),
        json!({"podSelector": app("db"), "ingress": [{"ports": [port("TCP", "nothing".into())]}]}),
        json!({"podSelector": app("db"), "ingress": [{"from": [block(Family::V4, 32), block(Family::V6, 128)]}]}),
        json!({"podSelector": app("db"), "ingress": [{"from": node("b")}]}),
        json!({"podSelector": app("db"), "ingress": [{"from": [{"ipBlock": {"cidr": cidr, "except": [format!("{except}/32")]}}]}]}),
        json!({"podSelector": {}, "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"team": "pay"}}}]}], "policyTypes": ["Egress"]}),
        json!({"podSelector": {}, "egress": [{"ports": [port("TCP", "web".into())]}], "policyTypes": ["Egress"]}),
        json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["db"]}]},
               "egress": [{"to": [block(Family::V4, 32)], "ports": [port("TCP", Value::Null)]}], "policyTypes": ["Egress"]}),
    ]
}

fn rules_43_to_53_a_truth_table_holds(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let mut objects = Objects::new(world)?;
        let mut asked = objects.agree().context("without a policy")?;
        for spec in table(&world.cluster) {
            // One object that changes (rule 53).
            let policy = policy("shop", "policy", spec);
            objects.apply(&policy)?;
            asked += objects.agree().with_context(|| policy["spec"].to_string())?;
        }
        asked += relabelled(&mut objects)?;
        ensure!(asked > 10_000, "only {asked} probes");
        Ok(())
    })
}

/// Rules 48, 51 and 53: policies that add up, labels that change, pods that finish, and policies that go.
fn relabelled(objects: &mut Objects<'_>) -> Result<usize> {
    let from_pay =
        json!({"namespaceSelector": {"matchLabels": {"team": "pay"}}, "podSelector": app("client")});
    let first =
        policy("shop", "policy", json!({"podSelector": app("db"), "ingress": [{"from": [from_pay]}]}));
    let second = policy(
        "shop",
        "second",
        json!({"podSelector": {}, "ingress": [{"ports": [{"port": 8053, "protocol": "UDP"}]}]}),
    );
    let namespace = |team: &str| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "pay", "labels": {"team": team}}});
    let mut asked = 0;
    let mut step = |objects: &mut Objects<'_>, object: &Value, what: &str| -> Result<()> {
        objects.apply(object)?;
        asked += objects.agree().context(what.to_owned())?;
        Ok(())
    };
    step(objects, &first, "one policy")?;
    step(objects, &second, "another one")?;
    step(objects, &objects.pod("b1", "other"), "a peer is relabelled")?;
    step(objects, &objects.pod("b2", "client"), "another one becomes a peer")?;
    step(objects, &objects.pod("a2", "other"), "a subject is relabelled")?;
    step(objects, &objects.pod("a2", "db"), "and back")?;
    step(objects, &namespace("other"), "a namespace is relabelled")?;
    step(objects, &namespace("pay"), "and back")?;
    for object in [first, second] {
        objects.delete(&object)?;
        asked += objects.agree().context("a policy is deleted")?;
    }
    Ok(asked)
}

fn rules_43_to_53_a_truth_table_holds_on_clsact(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--attach", "clsact", "--socket-lb", "off"], |world| {
        let mut objects = Objects::new(world)?;
        for spec in table(&world.cluster).into_iter().step_by(4) {
            let policy = policy("shop", "policy", spec);
            objects.apply(&policy)?;
            objects.agree().with_context(|| policy["spec"].to_string())?;
        }
        Ok(())
    })
}

/// Of both tiers, around a NetworkPolicy, one after the other; and the rules that the command line names.
fn cluster_policies_are_asked_in_tiers_and_explained(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let mut objects = Objects::new(world)?;
        let of_tier = |(name, tier, priority): (&str, &str, u32), subject: &Value, rules: Value| {
            let mut object = json!({
                "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
                "metadata": {"name": name}, "spec": {"tier": tier, "priority": priority, "subject": subject},
            });
            for (direction, rule) in rules.as_object().into_iter().flatten() {
                object["spec"][direction] = json!([rule]);
            }
            object
        };
        let team = |team: &str| json!({"namespaces": {"matchLabels": {"team": team}}});
        let pods = |team: &str, it: &str| json!({"pods": {"namespaceSelector": {"matchLabels": {"team": team}}, "podSelector": app(it)}});
        let web = json!([{"tcp": {"destinationPort": {"number": 8000}}}]);
        let datagrams = json!([{"udp": {"destinationPort": {"range": {"start": 8000, "end": 8053}}}}]);
        let b1 = format!("{}/32", world.cluster.pod("b1").v4);
        let lets = json!({"podSelector": app("db"), "ingress": [{"from": [{"podSelector": {}}]}]});
        let steps = [
            of_tier(
                ("first", "Admin", 10),
                &team("shop"),
                json!({"ingress": {"action": "Deny", "from": [team("pay")], "protocols": web}}),
            ),
            of_tier(
                ("last", "Baseline", 0),
                &team("shop"),
                json!({"ingress": {"action": "Deny", "from": [{"namespaces": {}}], "protocols": datagrams}}),
            ),
            policy("shop", "lets", lets),
            of_tier(
                ("before", "Admin", 5),
                &pods("shop", "db"),
                json!({"ingress": {"action": "Accept", "from": [pods("pay", "client")], "protocols": web}}),
            ),
            of_tier(
                ("away", "Admin", 7),
                &team("shop"),
                json!({"egress": {"action": "Deny", "to": [{"networks": [b1]}]}}),
            ),
            of_tier(
                ("named", "Admin", 1),
                &team("pay"),
                json!({"ingress": {"action": "Deny", "from": [{"namespaces": {}}], "protocols": [{"destinationNamedPort": "web"}]}}),
            ),
            of_tier(
                ("by", "Admin", 0),
                &team("pay"),
                json!({"ingress": {"action": "Pass", "from": [team("shop")]}}),
            ),
        ];
        objects.agree()?;
        for step in steps {
            objects.apply(&step)?;
            objects.agree().with_context(|| step.to_string())?;
        }
        explained(world)
    })
}

/// By the names of pods, of this node or of another; for each family.
fn explained(world: &World) -> Result<()> {
    for (from, to, said) in [
        ("pay/b1", "shop/a2:8000", &["ingress allowed Admin:before ingress[0]"; 2][..]),
        ("pay/b2", "shop/a2:8000", &["ingress denied Admin:first ingress[0]"; 2]),
        ("pay/b2", "shop/a2:8001", &["ingress denied no rule allows it"; 2]),
        (
            "shop/a2",
            "shop/a1:8053/UDP",
            &[
                "egress allowed no rule denies it",
                "ingress denied Baseline:last ingress[0]",
                "egress allowed no rule denies it",
                "ingress denied Baseline:last ingress[0]",
            ],
        ),
        (
            "shop/a1",
            "shop/a2:8053/udp",
            &[
                "egress allowed no rule denies it",
                "ingress allowed shop/lets ingress[0]",
                "egress allowed no rule denies it",
                "ingress allowed shop/lets ingress[0]",
            ],
        ),
        (
            "shop/a1",
            "pay/b1:443",
            &["egress denied Admin:away egress[0]", "egress allowed no rule denies it"],
        ),
    ] {
        let text = world.agents[0].verb(&["policy", "explain", from, to, "-o", "json"])?;
        let findings: Value = serde_json::from_str(&text).context(text.clone())?;
        let word = |it: &Value, field: &str| it[field].as_str().unwrap_or_default().to_owned();
        let line = |it: &Value| ["side", "verdict", "by"].map(|field| word(it, field)).join(" ");
        let lines: Vec<_> = findings.as_array().into_iter().flatten().map(line).collect();
        ensure!(lines == said, "{from} -> {to}: {text}");
    }
    let unknown = world.agents[0].verb(&["policy", "explain", "shop/a1", "nobody:80"]);
    let error = unknown.err().context("nobody is explained")?.to_string();
    ensure!(error.contains("no pod has the name nobody"), "{error}");
    Ok(())
}

/// A pod that may go to one backend of a service reaches that one by the service's address; a client from outside is
/// seen by its own address, though the backend sees the node's.
fn rule_47_policies_see_backends_and_clients(sandbox: &Sandbox) -> Result<()> {
    for socket_lb in ["tcp", "off"] {
        World::test(sandbox, &["--socket-lb", socket_lb], |world| {
            let mut objects = Objects::new(world)?;
            let to = json!([{"podSelector": app("db")}]);
            let spec =
                json!({"podSelector": app("client"), "egress": [{"to": to}], "policyTypes": ["Egress"]});
            objects.apply(&policy("shop", "policy", spec))?;
            objects.agree()?;
            for family in Family::BOTH {
                for protocol in [Protocol::Http, Protocol::Dns] {
                    let ask = Ask::new(protocol, target(&world.web, protocol, family));
                    world.set_backends(&["a2"])?;
                    answers(world, "a1", &ask, Some("a2"))?;
                    world.set_backends(&["b2"])?;
                    answers(world, "a1", &ask, None)?;
                }
            }
            clients_are_seen(world, &mut objects)
        })?;
    }
    Ok(())
}

/// NodePort of node a with the backend a2 there; the client is the host of node b.
fn clients_are_seen(world: &World, objects: &mut Objects<'_>) -> Result<()> {
    const NODE_PORT: u16 = 30_081;
    world.set_backends(&["a2"])?;
    let yaml = world.web.exposed("NodePort", &[(checks::WEB_PORT, NODE_PORT)]);
    world.cluster.manifests().write("service-web", &yaml)?;
    for family in Family::BOTH {
        let block = |name: &str| {
            let ip = world.cluster.node(name).ip(family);
            json!({"ipBlock": {"cidr": format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })}})
        };
        let ask = Ask::http((world.cluster.node("a").ip(family), NODE_PORT).into());
        for (allowed, expected) in [("a", None), ("b", Some("a2"))] {
            let spec = json!({"podSelector": app("db"), "ingress": [{"from": [block(allowed)]}]});
            objects.apply(&policy("shop", "ingress", spec))?;
            objects.agree()?;
            let deadline = Instant::now() + stretched(SOON);
            loop {
                let outcomes =
                    world.cluster.node("b").ask(&ask.clone().timeout(Duration::from_millis(500)))?;
                let by = outcomes.first().and_then(|it| it.answer()).map(|it| it.by.as_str());
                if by == expected {
                    break;
                }
                ensure!(Instant::now() < deadline, "{family:?}: only {allowed} may: answered by {by:?}");
            }
        }
    }
    Ok(())
}

/// Soon, and then for some requests on end.
fn answers(world: &World, from: &str, ask: &Ask, by: Option<&str>) -> Result<()> {
    let deadline = Instant::now() + stretched(SOON);
    let ask = ask.clone().count(3).timeout(Duration::from_millis(400));
    loop {
        let outcomes = world.cluster.pod(from).ask(&ask)?;
        if outcomes.iter().all(|it| it.answer().map(|it| it.by.as_str()) == by) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{ask:?}: not {by:?}: {outcomes:?}");
    }
}

/// Nothing passes it otherwise.
fn rule_49_a_pod_reaches_itself_and_its_node_reaches_it(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "off"], |world| {
        let mut objects = Objects::new(world)?;
        objects.apply(&policy(
            "shop",
            "policy",
            json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        ))?;
        // The node's own packets, among others: see `Objects::probes`.
        objects.agree()?;
        world.set_backends(&["a1"])?;
        for family in Family::BOTH {
            for protocol in [Protocol::Http, Protocol::Dns] {
                answers(world, "a1", &Ask::new(protocol, target(&world.web, protocol, family)), Some("a1"))?;
            }
        }
        Ok(())
    })
}

/// Connections from before the first policy, and from before it changed, to a pod of this node and of another.
fn rule_52_what_is_established_finishes(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let mut objects = Objects::new(world)?;
        objects.agree()?;
        let mut streams = Vec::new();
        let open = |streams: &mut Vec<_>| -> Result<()> {
            for (family, to) in Family::BOTH.into_iter().flat_map(|family| [(family, "a2"), (family, "b2")]) {
                let echo = (world.cluster.pod(to).ip(family), ECHO_PORT).into();
                streams.push(world.cluster.pod("a1").stream(echo)?);
            }
            for stream in streams {
                stream.wait_until(SOON, |seen: &[bpf_tests::pod::Progress]| {
                    seen.last().is_some_and(|it| it.verified > 1 << 16)
                })?;
            }
            Ok(())
        };
        open(&mut streams)?;
        let both = json!(["Ingress", "Egress"]);
        let nothing = policy("shop", "policy", json!({"podSelector": {}, "policyTypes": both}));
        let all = json!({"podSelector": {}, "ingress": [{}], "egress": [{}], "policyTypes": both});
        // Those of before are nowhere tracked, those of later are.
        for object in [&nothing, &policy("shop", "policy", all), &nothing] {
            objects.apply(object)?;
            objects.agree()?;
            if object != &nothing {
                open(&mut streams)?;
            }
        }
        for stream in streams {
            let before = stream.seen().last().map_or(0, |it| it.verified);
            stream.wait_until(SOON, |seen| seen.last().is_some_and(|it| it.verified > before + (1 << 16)))?;
            let last = stream.stop()?.pop().context("no report")?;
            ensure!(last.ended == Some(Ok(())), "{last:?}");
        }
        Ok(())
    })
}

fn rule_52_live_flows_are_cut_where_a_policy_says_so(sandbox: &Sandbox) -> Result<()> {
    let annotations = json!({"ferroflow.dev/live-flows": "cut"});
    World::test(sandbox, &[], |world| cut(world, annotations.clone()))
}

fn rule_52_live_flows_are_cut_where_the_agent_says_so(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--live-flows", "cut"], |world| cut(world, json!({})))
}

/// Connections from before the first policy, and from before it tightened, to and from a pod of this node and of another.
fn cut(world: &World, annotations: Value) -> Result<()> {
    let mut objects = Objects::new(world)?;
    let policy = |spec: Value| {
        let mut policy = policy("shop", "policy", spec);
        policy["metadata"]["annotations"] = annotations.clone();
        policy
    };
    let to_db = |rules: Value| policy(json!({"podSelector": app("db"), "ingress": rules}));
    let web_only = json!([{"ports": [{"protocol": "TCP", "port": 8000}]}]);
    objects.agree()?;
    // From a pod of this node and from one of another to a2, which will be cut; and to b2, which no policy selects.
    let open = || -> Result<Vec<_>> {
        let mut streams = Vec::new();
        for (from, to) in [("a1", "a2"), ("b1", "a2"), ("a1", "b2")] {
            for family in Family::BOTH {
                let echo = (world.cluster.pod(to).ip(family), ECHO_PORT).into();
                streams.push((to, world.cluster.pod(from).stream(echo)?));
            }
        }
        for (_, stream) in &mut streams {
            stream.wait_until(stretched(SOON), |seen| seen.last().is_some_and(|it| it.verified > 1 << 16))?;
        }
        Ok(streams)
    };
    for before in [None, Some(to_db(json!([{}])))] {
        if let Some(before) = &before {
            objects.apply(before)?;
            objects.agree()?;
        }
        let streams = open()?;
        objects.apply(&to_db(web_only.clone()))?;
        for (to, stream) in streams {
            if to == "a2" {
                let ended =
                    |seen: &[bpf_tests::pod::Progress]| seen.last().is_some_and(|it| it.ended.is_some());
                stream.wait_until(stretched(SOON * 2), ended).context("a flow that is cut goes on")?;
                let last = stream.stop()?.pop().context("no report")?;
                ensure!(matches!(last.ended, Some(Err(_))), "{last:?}");
            } else {
                let before = stream.seen().last().map_or(0, |it| it.verified);
                stream.wait_until(stretched(SOON), |seen| {
                    seen.last().is_some_and(|it| it.verified > before + (1 << 16))
                })?;
                let last = stream.stop()?.pop().context("no report")?;
                ensure!(last.ended == Some(Ok(())), "of another pod: {last:?}");
            }
        }
        objects.agree()?;
    }
    Ok(())
}

/// While somebody of this node and of another knock without end at the address that the pod will have.
fn rule_54_a_new_pod_is_guarded_from_its_first_packet(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let mut objects = Objects::new(world)?;
        let rule =
            json!({"from": [{"podSelector": app("client")}], "ports": [{"port": 8000, "protocol": "TCP"}]});
        objects.apply(&policy("shop", "policy", json!({"podSelector": app("new"), "ingress": [rule], "egress": [], "policyTypes": ["Ingress", "Egress"]})))?;
        // Nobody has pods that it selects: where this one is in force, it has been read.
        objects.apply(&policy("shop", "read", json!({"podSelector": app("db"), "ingress": []})))?;
        objects.agree()?;
        let netns = Netns::new("new")?;
        let _answering = Answering::start(&netns, &PORTS)?;
        let path = netns.path()?;
        let container = Container { id: "new", netns: cni::path(&path)? };
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=new;K8S_POD_UID=u1";
        let add = || world.runtimes[0].command_with("ADD", container, args, json!({}));
        // Nobody knows what selects it.
        let refused = add()?;
        ensure!(refused.code()? == 11 && refused.text.contains("pod new"), "{refused:?}");
        objects.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "new", "namespace": "shop", "uid": "u1", "labels": {"app": "new"}},
            "spec": {"nodeName": world.cluster.node("a").name, "containers": [{"name": "pod", "image": "pod"}]},
            "status": {"phase": "Pending"},
        }))?;
        guarded(world, &netns, &add)
    })
}

fn guarded(world: &World, new: &Netns, add: &(dyn Fn() -> Result<cni::Answer> + Sync)) -> Result<()> {
    // The ranges' next ones, and some of those that will be tried and given back.
    let addresses: Vec<IpAddr> = (3..9u8)
        .flat_map(|last| {
            let v4 = Ipv4Addr::new(10, 244, 1, last);
            [v4.into(), Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, last.into()).into()]
        })
        .filter(|addr| world.cluster.pods().all(|pod| pod.ip(Family::of(*addr)) != *addr))
        .collect();
    let probe = |transport, addr, port| Probe { transport, target: SocketAddr::new(addr, port) };
    let knocks: Vec<_> = addresses
        .iter()
        .flat_map(|addr| [probe(Transport::Tcp, *addr, 8001), probe(Transport::Udp, *addr, 8000)])
        .collect();
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let knocking: Vec<_> = ["a1", "b1"]
            .map(|from| {
                let (knocks, ended) = (&knocks, &ended);
                scope.spawn(move || -> Result<usize> {
                    let mut rounds = 0;
                    while !ended.load(Ordering::Relaxed) {
                        let through = answered(&world.cluster.pod(from).netns, knocks)?;
                        ensure!(!through.contains(&true), "{from} came in: {through:?} of {knocks:?}");
                        rounds += 1;
                    }
                    Ok(rounds)
                })
            })
            .into();
        thread::sleep(stretched(Duration::from_millis(500)));
        let added = add().and_then(|answer| answer.result());
        let first = added.and_then(|result| first_packets(world, new, &result));
        thread::sleep(stretched(Duration::from_millis(500)));
        ended.store(true, Ordering::Relaxed);
        for thread in knocking {
            let rounds = thread.join().map_err(|_panic| anyhow::anyhow!("a prober panicked"))??;
            ensure!(rounds > 2, "only {rounds} rounds");
        }
        first
    })
}

/// At once after ADD: who may does, and the pod itself may nothing.
fn first_packets(world: &World, new: &Netns, result: &Value) -> Result<()> {
    for addr in cni::addresses(result) {
        let target = SocketAddr::new(addr.parse()?, 8000);
        let allowed = [Probe { transport: Transport::Tcp, target }];
        let passed = answered(&world.cluster.pod("a1").netns, &allowed)?;
        ensure!(passed == [true], "a1, which may, does not reach {target}");
        let out = (world.cluster.pod("a2").ip(Family::of(target.ip())), 8000).into();
        let out = Transport::BOTH.map(|transport| Probe { transport, target: out });
        ensure!(answered(new, &out)? == [false, false], "the new pod reaches {out:?}");
    }
    Ok(())
}
