//! Clients outside the nodes that have agents: NodePorts, and what they do with the client's address.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Result, ensure};
use bpf_tests::{
    agent::Agent,
    checks,
    cluster::{Cluster, Family},
    manifests::{Endpoint, Service},
    pod::Outcome,
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("rule_26_a_node_port_reaches_every_backend_by_masquerade", a_node_port_reaches_every_backend),
        ("rules_15_and_26_with_the_policy_local_clients_keep_their_address", clients_keep_their_address),
        ("rule_14_a_node_port_without_endpoints_refuses", a_node_port_without_endpoints_refuses),
        ("rule_16_pods_reach_their_nodes_port", pods_reach_their_nodes_port),
        ("rule_29_a_client_keeps_its_backend", a_client_keeps_its_backend),
    ])
}

const NODE_PORTS: [(Protocol, u16); 2] = [(Protocol::Http, 30080), (Protocol::Dns, 30053)];
const REQUESTS: u32 = 40;

/// Nodes a and b with agents and a pod each; node c has none, so its pod is a client from outside.
struct Outside {
    agents: Vec<Agent>,
    web: Service,
    cluster: Cluster,
}

impl Outside {
    /// `more` are lines of the Service's `spec`.
    fn new(sandbox: &Sandbox, more: &str, backends: &[&str]) -> Result<Self> {
        let cluster = Cluster::with_pods(sandbox, &["a", "b", "c"], 1)?;
        let mut web = checks::service("web", 10);
        web.more = more.to_owned();
        let manifests = cluster.manifests();
        manifests.write_cluster(&cluster)?;
        let yaml = web.exposed("NodePort", &[(80, 30080), (53, 30053)]);
        manifests.write("service-web", &yaml)?;
        manifests.write_endpoints(&web, &Endpoint::ready(backends.iter().map(|name| cluster.pod(name))))?;
        let mut agents = Vec::new();
        for name in ["a", "b"] {
            let mut agent = Agent::start(cluster.node(name), &[])?;
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
        let outside = Self::new(sandbox, more, backends)?;
        let logs = || outside.agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n");
        test(&outside).map_err(|error| error.context(logs()))
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
