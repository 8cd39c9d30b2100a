//! Clients outside the nodes that have agents: NodePorts, and what they do with the client's address.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    agent::Agent,
    checks,
    cluster::{Cluster, Family},
    manifests::{Endpoint, Service},
    netns::{Prefix, Route},
    pod::{HTTP_PORT, Outcome, Progress},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Client, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("rule_26_a_node_port_reaches_every_backend_by_masquerade", a_node_port_reaches_every_backend),
        ("rules_15_and_26_with_the_policy_local_clients_keep_their_address", clients_keep_their_address),
        ("rule_34_one_port_may_talk_to_a_service_and_to_its_backend", one_port_talks_to_both),
        ("rule_14_a_node_port_without_endpoints_refuses", a_node_port_without_endpoints_refuses),
        ("rule_16_pods_reach_their_nodes_port", pods_reach_their_nodes_port),
        ("rule_21_a_balancers_address_is_taken_port_by_port_on_every_node", an_address_is_taken_port_by_port),
        ("rule_29_a_client_keeps_its_backend", a_client_keeps_its_backend),
        ("xdp_sends_known_flows_on_by_itself", xdp_sends_known_flows_on),
    ])
}

const NODE_PORTS: [(Protocol, u16); 2] = [(Protocol::Http, 30080), (Protocol::Dns, 30053)];
const ECHO_NODE_PORT: u16 = 30007;
const REQUESTS: u32 = 40;

/// Nodes a and b with agents and a pod each; node c has none, so its pod is a client from outside.
struct Outside {
    agents: Vec<Agent>,
    web: Service,
    cluster: Cluster,
}

impl Outside {
    /// `more` are lines of the Service's `spec`.
    fn new(sandbox: &Sandbox, more: &str, backends: &[&str], options: &[&str]) -> Result<Self> {
        let cluster = Cluster::with_pods(sandbox, &["a", "b", "c"], 1)?;
        let mut web = checks::service("web", 10);
        web.more = more.to_owned();
        let manifests = cluster.manifests();
        manifests.write_cluster(&cluster)?;
        let yaml = web.exposed("NodePort", &[(80, 30080), (53, 30053), (7, ECHO_NODE_PORT)]);
        manifests.write("service-web", &yaml)?;
        manifests.write_endpoints(&web, &Endpoint::ready(backends.iter().map(|name| cluster.pod(name))))?;
        let mut agents = Vec::new();
        for name in ["a", "b"] {
            let mut agent = Agent::start(cluster.node(name), options)?;
            agent.wait_synced()?;
            agents.push(agent);
        }
        Ok(Self { agents, web, cluster })
    }

    /// Does the test with the agents' logs in what it says.
    fn test(
        sandbox: &Sandbox,
        more: &str,
        backends: &[&str],
        test: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<()> {
        Self::new(sandbox, more, backends, &[])?.held_to(test)
    }

    fn held_to(&self, test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let logs = || self.agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n");
        test(self).map_err(|error| error.context(logs()))
    }

    fn node(&self, name: &str, family: Family) -> IpAddr {
        let node = self.cluster.node(name);
        match family {
            Family::V4 => node.v4.into(),
            Family::V6 => node.v6.into(),
        }
    }

    fn ask(&self, from: &str, protocol: Protocol, target: SocketAddr) -> Result<Vec<Outcome>> {
        let ask = Ask::new(protocol, target).count(REQUESTS).timeout(Duration::from_millis(500));
        self.cluster.pod(from).ask(&ask)
    }
}

/// Who answered, and as whom the servers saw the client.
fn seen(outcomes: &[Outcome], target: SocketAddr) -> Result<BTreeSet<(String, IpAddr)>> {
    let mut seen = BTreeSet::new();
    for outcome in outcomes {
        let Some(answer) = outcome.answer() else { anyhow::bail!("{target}: {outcome:?}") };
        ensure!(answer.server == target, "{target} answered as {}", answer.server);
        seen.insert((answer.by.clone(), answer.client.ip()));
    }
    Ok(seen)
}

fn a_node_port_reaches_every_backend(sandbox: &Sandbox) -> Result<()> {
    Outside::test(sandbox, "", &["a1", "b1"], |outside| {
        for family in Family::BOTH {
            for (protocol, port) in NODE_PORTS {
                for node in ["a", "b"] {
                    let target = SocketAddr::new(outside.node(node, family), port);
                    let seen = seen(&outside.ask("c1", protocol, target)?, target)?;
                    let expected = ["a1", "b1"].map(|pod| (pod.to_owned(), outside.node(node, family)));
                    ensure!(seen == BTreeSet::from(expected), "{protocol} {target}: {seen:?}");
                }
            }
        }
        Ok(())
    })
}

fn clients_keep_their_address(sandbox: &Sandbox) -> Result<()> {
    Outside::test(sandbox, "  externalTrafficPolicy: Local\n", &["a1"], |outside| {
        for family in Family::BOTH {
            let client = outside.cluster.pod("c1").ip(family);
            for (protocol, port) in NODE_PORTS {
                let target = SocketAddr::new(outside.node("a", family), port);
                let seen = seen(&outside.ask("c1", protocol, target)?, target)?;
                ensure!(seen == BTreeSet::from([("a1".to_owned(), client)]), "{protocol} {target}: {seen:?}");
                let target = SocketAddr::new(outside.node("b", family), port);
                let ask = Ask::new(protocol, target).count(2).timeout(Duration::from_millis(300));
                let dropped = outside.cluster.pod("c1").ask(&ask)?;
                let silent = dropped.iter().all(|outcome| {
                    outcome
                        .failure()
                        .is_some_and(|failure| failure.kind == bpf_tests::pod::FailureKind::TimedOut)
                });
                ensure!(silent, "{target} has no local endpoint and must drop: {dropped:?}");
            }
        }
        Ok(())
    })
}

/// One socket asks both in turn, and each answer comes from whom it asked: clients from outside by a NodePort, pods by the
/// cluster IP.
fn one_port_talks_to_both(sandbox: &Sandbox) -> Result<()> {
    Outside::test(sandbox, "  externalTrafficPolicy: Local\n", &["a1"], |outside| {
        let protocol = Protocol::DnsOneSocket;
        for family in Family::BOTH {
            let node_port = SocketAddr::new(outside.node("a", family), 30053);
            let cluster_ip = checks::target(&outside.web, protocol, family);
            let backend = checks::pod_target(outside.cluster.pod("a1"), protocol, family);
            for (client, service) in [("c1", node_port), ("b1", cluster_ip)] {
                let ask = Ask::new(protocol, service).also(&[backend]).count(REQUESTS).strict();
                let outcomes = outside.cluster.pod(client).ask(&ask)?;
                ensure!(outcomes.len() == REQUESTS as usize, "{client}, {service}: {outcomes:?}");
                for (outcome, target) in outcomes.iter().zip([service, backend].iter().cycle()) {
                    let answer = outcome.answer().with_context(|| format!("{client}: {outcome:?}"))?;
                    ensure!(answer.server == *target, "{client} asked {target}: {answer:?}");
                }
            }
        }
        Ok(())
    })
}

fn a_node_port_without_endpoints_refuses(sandbox: &Sandbox) -> Result<()> {
    Outside::test(sandbox, "", &[], |outside| {
        for family in Family::BOTH {
            for (protocol, port) in NODE_PORTS {
                let target = SocketAddr::new(outside.node("a", family), port);
                let outcomes = outside.ask("c1", protocol, target)?;
                let refused = outcomes.iter().all(|outcome| {
                    outcome
                        .failure()
                        .is_some_and(|failure| failure.kind == bpf_tests::pod::FailureKind::Refused)
                });
                ensure!(refused, "{protocol} {target}: {outcomes:?}");
            }
        }
        Ok(())
    })
}

fn pods_reach_their_nodes_port(sandbox: &Sandbox) -> Result<()> {
    Outside::test(sandbox, "  externalTrafficPolicy: Local\n", &["b1"], |outside| {
        for family in Family::BOTH {
            let client = outside.cluster.pod("a1").ip(family);
            for (protocol, port) in NODE_PORTS {
                let target = SocketAddr::new(outside.node("a", family), port);
                let seen = seen(&outside.ask("a1", protocol, target)?, target)?;
                ensure!(seen == BTreeSet::from([("b1".to_owned(), client)]), "{protocol} {target}: {seen:?}");
            }
        }
        Ok(())
    })
}

fn a_client_keeps_its_backend(sandbox: &Sandbox) -> Result<()> {
    Outside::test(sandbox, "  sessionAffinity: ClientIP\n", &["a1", "b1"], |outside| {
        for family in Family::BOTH {
            for (protocol, port) in NODE_PORTS {
                let node = SocketAddr::new(outside.node("a", family), port);
                let by = seen(&outside.ask("c1", protocol, node)?, node)?;
                ensure!(by.len() == 1, "{protocol} {node}: {by:?}");
                let service = if protocol == Protocol::Http { 80 } else { 53 };
                let vip = SocketAddr::new(outside.web.ip(family), service);
                let by = seen(&outside.ask("a1", protocol, vip)?, vip)?;
                ensure!(by.len() == 1, "{protocol} {vip}: {by:?}");
            }
        }
        Ok(())
    })
}

/// A balancer sends to node a, which also has the address, and to node b, which has not. A third address is on the link
/// of all nodes: none may say that it is there.
fn an_address_is_taken_port_by_port(sandbox: &Sandbox) -> Result<()> {
    Outside::test(sandbox, "", &["a1"], |outside| {
        let addresses: Vec<_> = Family::BOTH.into_iter().flat_map(balancers).collect();
        let ingress: String = addresses.iter().map(|addr| format!("    - ip: \"{addr}\"\n")).collect();
        let yaml = outside.web.exposed("LoadBalancer", &[]);
        let status = format!("status:\n  loadBalancer:\n    ingress:\n{ingress}");
        outside.cluster.manifests().write("service-web", &format!("{yaml}{status}"))?;
        let _host = outside.cluster.node("a").serve("host-a")?;
        for family in Family::BOTH {
            let [at_a, at_b, nowhere] = balancers(family);
            outside.cluster.node("a").netns.run(move |inside| inside.address("lo", alone(at_a)))??;
            let routes = [
                (at_a, Some(outside.node("a", family))),
                (at_b, Some(outside.node("b", family))),
                (nowhere, None),
            ];
            outside.cluster.node("c").netns.run(move |inside| {
                routes
                    .into_iter()
                    .try_for_each(|(to, via)| inside.route(Route { to: alone(to), via, dev: "eth0" }))
            })??;
            for (protocol, port) in [(Protocol::Http, 80), (Protocol::Dns, 53)] {
                for addr in [at_a, at_b] {
                    answered(outside, protocol, SocketAddr::new(addr, port), "a1")?;
                }
                let ask = Ask::new(protocol, SocketAddr::new(nowhere, port)).timeout(Duration::from_secs(1));
                let to_nobody = outside.cluster.pod("c1").ask(&ask)?;
                ensure!(
                    to_nobody.iter().all(|it| it.answer().is_none()),
                    "{nowhere} is nobody's: {to_nobody:?}"
                );
            }
            // A port of the node's own server, which the service leaves to it.
            let target = SocketAddr::new(at_a, HTTP_PORT);
            let outcome = answered(outside, Protocol::Http, target, "host-a")?;
            let client = outcome.answer().map(|answer| answer.client.ip());
            ensure!(client == Some(outside.cluster.pod("c1").ip(family)), "{outcome:?}");
        }
        Ok(())
    })
}

/// With the TC program taken from the device, whatever still arrives has come through the driver.
fn xdp_sends_known_flows_on(sandbox: &Sandbox) -> Result<()> {
    let outside = Outside::new(sandbox, "", &["b1"], &["--xdp", "native"])?;
    let _passes = outside.cluster.real_wires(&sandbox.place()?)?;
    outside.held_to(|outside| {
        let goes_on = |stream: &Client<Progress>| -> Result<()> {
            let verified = |seen: &[Progress]| seen.last().map_or(0, |progress| progress.verified);
            let before = verified(&stream.seen());
            stream.wait_until(Duration::from_secs(5), |seen| verified(seen) > before + 10_000)?;
            Ok(())
        };
        for family in Family::BOTH {
            for (protocol, port) in NODE_PORTS {
                let target = SocketAddr::new(outside.node("a", family), port);
                let seen = seen(&outside.ask("c1", protocol, target)?, target)?;
                let expected = ("b1".to_owned(), outside.node("a", family));
                ensure!(seen == BTreeSet::from([expected]), "{protocol} {target}: {seen:?}");
            }
        }
        let streams = Family::BOTH
            .map(|family| SocketAddr::new(outside.node("a", family), ECHO_NODE_PORT))
            .map(|target| outside.cluster.pod("c1").stream(target));
        let streams = streams.into_iter().collect::<Result<Vec<_>>>()?;
        streams.iter().try_for_each(goes_on)?;
        let links = outside.cluster.node("a").bpffs.join("links");
        for entry in fs::read_dir(&links)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("device_ingress-")) {
                fs::remove_file(path)?;
            }
        }
        streams.iter().try_for_each(goes_on)?;
        // A first packet is the TC program's, which is gone.
        let target = SocketAddr::new(outside.node("a", Family::V4), NODE_PORTS[1].1);
        let ask = Ask::new(Protocol::Dns, target).count(2).timeout(Duration::from_millis(300));
        let outcomes = outside.cluster.pod("c1").ask(&ask)?;
        ensure!(outcomes.iter().all(|outcome| outcome.answer().is_none()), "still attached: {outcomes:?}");
        ensure!(outside.cluster.pod("b1").checksum_errors()? == 0, "a wrong checksum arrived");
        for stream in streams {
            stream.stop()?;
        }
        Ok(())
    })
}

/// Soon `by` answers: the agents may not have read of it yet.
fn answered(outside: &Outside, protocol: Protocol, target: SocketAddr, by: &str) -> Result<Outcome> {
    let ask =
        Ask::new(protocol, target).interval(Duration::from_millis(10)).timeout(Duration::from_millis(500));
    let client = outside.cluster.pod("c1").keep_asking(&ask)?;
    let seen = client.wait_until(Duration::from_secs(10), |outcomes| {
        outcomes.last().and_then(Outcome::answer).is_some_and(|it| it.by == by && it.server == target)
    });
    let seen = seen.with_context(|| format!("{protocol} {target} is not answered by {by}"))?;
    seen.last().cloned().context("no outcome")
}

fn balancers(family: Family) -> [IpAddr; 3] {
    [1, 2, 3].map(|number| match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, number).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into(),
    })
}

fn alone(addr: IpAddr) -> Prefix {
    Prefix { addr, len: if addr.is_ipv4() { 32 } else { 128 } }
}
