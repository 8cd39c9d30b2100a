//! Processes of a node itself: their sockets do not cross the packet path of pods.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bpf_tests::{
    agent::Agent,
    checks::{self, DNS_SERVICE_PORT, WEB_PORT},
    cluster::{Cluster, Family},
    manifests::{Endpoint, Service},
    netns::Prefix,
    pod::{FailureKind, Outcome},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Client, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("rule_14_the_host_is_refused_at_once_without_endpoints", refused_without_endpoints),
        ("rule_15_the_host_is_denied_at_once_without_local_endpoints", denied_without_local_endpoints),
        ("rules_16_and_26_the_host_reaches_every_backend_of_every_address", reaches_every_address),
        ("rules_16_and_17_policy_local_is_for_traffic_from_outside", policy_local_is_for_outside),
        ("rule_21_only_a_service_port_of_a_load_balancer_address_is_taken", only_the_service_port_is_taken),
        ("rule_22_source_ranges_admit_the_host_by_its_own_address", source_ranges_admit_by_own_address),
        ("rule_24_addresses_that_serve_no_node_ports_are_the_hosts_own", unchosen_addresses_are_the_hosts),
        ("rule_25_node_ports_follow_addresses_that_come_and_go", addresses_come_and_go),
        ("rule_28_pods_do_not_reach_the_nodes_loopback", pods_do_not_reach_the_loopback),
        ("rule_28_a_socket_bound_to_the_loopback_is_refused_at_once", bound_to_the_loopback_is_refused),
        ("rule_29_all_processes_of_the_host_keep_one_backend", one_backend_with_affinity),
        ("rules_31_to_33_datagrams_leave_a_backend_that_is_gone", datagrams_leave_a_backend),
        ("rule_31_a_connected_socket_is_taken_from_a_backend_that_is_gone", connected_socket_is_taken),
        ("rule_31_a_pods_connected_socket_moves_by_itself", pods_connected_socket_moves),
        ("one_socket_asks_several_services", one_socket_asks_several_services),
        ("mapped_addresses_are_ipv4", mapped_addresses_are_ipv4),
    ])
}

const HTTP_NODE_PORT: u16 = 30080;
const DNS_NODE_PORT: u16 = 30053;
/// A backend of two is missed by chance once in a million million.
const REQUESTS: u32 = 40;
const EVERY: [Protocol; 3] = [Protocol::Http, Protocol::Dns, Protocol::DnsUnconnected];
const SOON: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(10);

/// Nodes a and b with an agent and a pod each, and a service with NodePorts and a load balancer's addresses.
struct World {
    agents: Vec<Agent>,
    web: Service,
    cluster: Cluster,
}

impl World {
    /// `more` are lines of the Service's `spec`.
    fn new(sandbox: &Sandbox, agent_args: &[&str], more: &str, backends: &[&str]) -> Result<Self> {
        let cluster = Cluster::with_pods(sandbox, &["a", "b"], 1)?;
        let mut web = checks::service("web", 10);
        web.more = more.to_owned();
        cluster.manifests().write_cluster(&cluster)?;
        let yaml =
            web.exposed("LoadBalancer", &[(WEB_PORT, HTTP_NODE_PORT), (DNS_SERVICE_PORT, DNS_NODE_PORT)]);
        let [v4, v6] = Family::BOTH.map(balancer);
        let status = format!("status:\n  loadBalancer:\n    ingress:\n    - ip: {v4}\n    - ip: \"{v6}\"\n");
        cluster.manifests().write("service-web", &format!("{yaml}{status}"))?;
        let mut world = Self { agents: Vec::new(), web, cluster };
        world.set_backends(backends)?;
        for node in world.cluster.nodes() {
            world.agents.push(Agent::start(node, agent_args)?);
        }
        world.agents.iter_mut().try_for_each(|agent| agent.wait_synced().map(drop))?;
        Ok(world)
    }

    /// Does the test with the agents' logs in what it says.
    fn test(
        sandbox: &Sandbox,
        (agent_args, more, backends): (&[&str], &str, &[&str]),
        test: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<()> {
        let world = Self::new(sandbox, agent_args, more, backends)?;
        let logs = || world.agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n");
        test(&world).map_err(|error| anyhow!("{error:#}\n{}", logs()))
    }

    fn set_backends(&self, pods: &[&str]) -> Result<()> {
        let endpoints = Endpoint::ready(pods.iter().map(|name| self.cluster.pod(name)));
        self.cluster.manifests().write_endpoints(&self.web, &endpoints)
    }

    fn node(&self, name: &str, family: Family) -> IpAddr {
        self.cluster.node(name).ip(family)
    }

    fn cluster_ip(&self, protocol: Protocol, family: Family) -> SocketAddr {
        checks::target(&self.web, protocol, family)
    }

    fn balanced(&self, protocol: Protocol, family: Family) -> SocketAddr {
        SocketAddr::new(balancer(family), self.cluster_ip(protocol, family).port())
    }

    /// Every address that serves the protocol to the host of a node.
    fn served(&self, node: &str, protocol: Protocol, family: Family) -> Vec<SocketAddr> {
        let port = node_port(protocol);
        let own = [self.node(node, family)].into_iter().chain(loopbacks(family));
        let node_ports = own.map(|addr| SocketAddr::new(addr, port));
        [self.cluster_ip(protocol, family), self.balanced(protocol, family)]
            .into_iter()
            .chain(node_ports)
            .collect()
    }

    /// The pods that answer the host of node a as `target`, each of which sees the node's own address.
    fn answers(&self, protocol: Protocol, target: SocketAddr) -> Result<BTreeSet<String>> {
        self.answers_to(&Ask::new(protocol, target), target)
    }

    /// As [`Self::answers`], of the host's requests as they are said.
    fn answers_to(&self, ask: &Ask, target: SocketAddr) -> Result<BTreeSet<String>> {
        let outcomes = self.cluster.node("a").ask(&ask.clone().count(REQUESTS).strict())?;
        let own = self.node("a", Family::of(target.ip().to_canonical()));
        let by = checks::tally(&outcomes, target, own);
        Ok(by.with_context(|| target.to_string())?.into_keys().collect())
    }

    /// Every request of the host of this node fails, at once: clients wait for longer than the test does.
    fn fails(
        &self,
        node: &str,
        protocol: Protocol,
        target: SocketAddr,
    ) -> Result<Vec<(FailureKind, String)>> {
        let ask = Ask::new(protocol, target).count(3).timeout(Duration::from_secs(60));
        failures(&self.cluster.node(node).ask(&ask)?, target)
    }
}

fn balancer(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, 10).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10).into(),
    }
}

fn node_port(protocol: Protocol) -> u16 {
    match protocol {
        Protocol::Http => HTTP_NODE_PORT,
        Protocol::Dns | Protocol::DnsUnconnected | Protocol::DnsOneSocket | Protocol::DnsConnected => {
            DNS_NODE_PORT
        }
        Protocol::Sctp => panic!("sockets of SCTP are not translated"),
    }
}

fn loopbacks(family: Family) -> Vec<IpAddr> {
    match family {
        Family::V4 => vec![Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(127, 1, 2, 3).into()],
        Family::V6 => vec![Ipv6Addr::LOCALHOST.into()],
    }
}

fn unspecified(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn failures(outcomes: &[Outcome], target: SocketAddr) -> Result<Vec<(FailureKind, String)>> {
    let failed = outcomes.iter().map(|outcome| {
        let failure = outcome.failure().with_context(|| format!("{target} answered: {outcome:?}"))?;
        Ok((failure.kind, failure.detail.clone()))
    });
    failed.collect()
}

fn refused(failures: &[(FailureKind, String)]) -> Result<()> {
    ensure!(failures.iter().all(|(kind, _)| *kind == FailureKind::Refused), "{failures:?}");
    Ok(())
}

fn not_permitted(failures: &[(FailureKind, String)]) -> Result<()> {
    ensure!(failures.iter().all(|(_, detail)| detail == "EPERM"), "{failures:?}");
    Ok(())
}

fn each(mut of: impl FnMut(Protocol, Family) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        for protocol in EVERY {
            of(protocol, family).with_context(|| format!("{protocol} over {family:?}"))?;
        }
    }
    Ok(())
}

fn names(pods: &[&str]) -> BTreeSet<String> {
    pods.iter().map(|&name| name.to_owned()).collect()
}

fn refused_without_endpoints(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "", &[]), |world| {
        each(|protocol, family| {
            for target in world.served("a", protocol, family) {
                let failures = world.fails("a", protocol, target)?;
                // A socket that is not connected hears of no refusal: its datagram is not sent.
                let judge = if protocol == Protocol::DnsUnconnected { not_permitted } else { refused };
                judge(&failures).with_context(|| target.to_string())?;
            }
            Ok(())
        })
    })
}

fn denied_without_local_endpoints(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "  internalTrafficPolicy: Local\n", &["b1"]), |world| {
        each(|protocol, family| {
            let target = world.cluster_ip(protocol, family);
            not_permitted(&world.fails("a", protocol, target)?)?;
            // The policy is for cluster IPs only (rule 18).
            let answers = world.answers(protocol, world.balanced(protocol, family))?;
            ensure!(answers == names(&["b1"]), "{answers:?}");
            Ok(())
        })?;
        let counted = world.agents[0].status()?;
        let drops = counted["drops"].as_array().context("no drops in the status")?;
        ensure!(
            drops.iter().any(|it| it["reason"] == "no-local-endpoint" && it["packets"] == 18),
            "{drops:?}"
        );
        Ok(())
    })
}

fn reaches_every_address(sandbox: &Sandbox) -> Result<()> {
    // What is said of pods changes nothing.
    for socket_lb in ["tcp", "off", "all"] {
        World::test(sandbox, (&["--socket-lb", socket_lb], "", &["a1", "b1"]), |world| {
            each(|protocol, family| {
                for target in world.served("a", protocol, family) {
                    let answers = world.answers(protocol, target)?;
                    ensure!(answers == names(&["a1", "b1"]), "{target}: {answers:?}");
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}

fn policy_local_is_for_outside(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "  externalTrafficPolicy: Local\n", &["b1"]), |world| {
        each(|protocol, family| {
            for target in world.served("a", protocol, family) {
                let answers = world.answers(protocol, target)?;
                ensure!(answers == names(&["b1"]), "{target}, rule 16: {answers:?}");
            }
            Ok(())
        })?;
        each(|protocol, family| {
            // Rule 17: there it is outside traffic, so its address is kept where an endpoint is, and dropped elsewhere.
            let target = SocketAddr::new(world.node("b", family), node_port(protocol));
            let answers = world.answers(protocol, target)?;
            ensure!(answers == names(&["b1"]), "{target}, rule 17: {answers:?}");
            let target = SocketAddr::new(world.node("a", family), node_port(protocol));
            let ask = Ask::new(protocol, target).count(2).timeout(Duration::from_millis(300));
            let failures = failures(&world.cluster.node("b").ask(&ask)?, target)?;
            ensure!(
                failures.iter().all(|(kind, _)| *kind == FailureKind::TimedOut),
                "{target}: {failures:?}"
            );
            Ok(())
        })
    })
}

/// There is no route to the address, so what is left alone has nowhere to go.
fn only_the_service_port_is_taken(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "", &["a1", "b1"]), |world| {
        each(|protocol, family| {
            for port in [81, node_port(protocol)] {
                let target = SocketAddr::new(balancer(family), port);
                let failures = world.fails("a", protocol, target)?;
                let unreachable = failures.iter().all(|(kind, _)| *kind == FailureKind::Unreachable);
                ensure!(unreachable, "{target}: {failures:?}");
            }
            Ok(())
        })
    })
}

fn source_ranges_admit_by_own_address(sandbox: &Sandbox) -> Result<()> {
    let ranges = "  loadBalancerSourceRanges: [\"192.168.50.1/32\", \"fd50::1/128\"]\n";
    World::test(sandbox, (&[], ranges, &["a1", "b1"]), |world| {
        each(|protocol, family| {
            let target = world.balanced(protocol, family);
            let answers = world.answers(protocol, target)?;
            ensure!(answers == names(&["a1", "b1"]), "{target}: {answers:?}");
            not_permitted(&world.fails("b", protocol, target)?)?;
            // The ranges are the balancer's only.
            let target = world.cluster_ip(protocol, family);
            let ask = Ask::new(protocol, target).count(REQUESTS).strict();
            checks::tally(&world.cluster.node("b").ask(&ask)?, target, world.node("b", family)).map(drop)
        })
    })
}

fn second(family: Family) -> Prefix {
    match family {
        Family::V4 => Prefix { addr: Ipv4Addr::new(192, 168, 50, 101).into(), len: 24 },
        Family::V6 => Prefix { addr: Ipv6Addr::new(0xfd50, 0, 0, 0, 0, 0, 0, 0x101).into(), len: 64 },
    }
}

fn unchosen_addresses_are_the_hosts(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "", &["a1", "b1"]), |world| {
        let netns = &world.cluster.node("a").netns;
        for family in Family::BOTH {
            netns.run(move |inside| inside.address("eth0", second(family)))??;
        }
        each(|protocol, family| {
            // Nobody of the host listens there.
            if protocol != Protocol::DnsUnconnected {
                refused(&world.fails(
                    "a",
                    protocol,
                    SocketAddr::new(second(family).addr, node_port(protocol)),
                )?)?;
            }
            // By itself the kernel may send from either address.
            let target = SocketAddr::new(world.node("a", family), node_port(protocol));
            let answers = world.answers_to(&Ask::new(protocol, target).source(target.ip()), target)?;
            ensure!(answers == names(&["a1", "b1"]), "{answers:?}");
            Ok(())
        })
    })
}

fn addresses_come_and_go(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&["--node-port-addresses", "all"], "", &["a1", "b1"]), |world| {
        let node = world.cluster.node("a");
        for family in Family::BOTH {
            let prefix = second(family);
            let target = SocketAddr::new(prefix.addr, HTTP_NODE_PORT);
            let client =
                node.keep_asking(&Ask::http(target).interval(TICK).timeout(Duration::from_secs(1)))?;
            client.wait_until(SOON, |outcomes| outcomes.len() >= 3)?;
            ensure!(client.seen().iter().all(|outcome| outcome.answer().is_none()), "{target} answered");
            node.netns.run(move |inside| inside.address("eth0", prefix))??;
            let answers = |outcomes: &[Outcome]| outcomes.last().is_some_and(|it| it.answer().is_some());
            client.wait_until(SOON, answers).with_context(|| format!("{target} came"))?;
            node.netns.run(move |inside| inside.take_address(prefix.addr))??;
            client
                .wait_until(SOON, |outcomes| outcomes.last().is_some_and(|it| it.answer().is_none()))
                .with_context(|| format!("{target} went"))?;
        }
        Ok(())
    })
}

fn pods_do_not_reach_the_loopback(sandbox: &Sandbox) -> Result<()> {
    for socket_lb in ["tcp", "all"] {
        World::test(sandbox, (&["--socket-lb", socket_lb], "", &["a1", "b1"]), |world| {
            each(|protocol, family| {
                if protocol == Protocol::DnsUnconnected {
                    return Ok(());
                }
                for addr in loopbacks(family).into_iter().chain([unspecified(family)]) {
                    let target = SocketAddr::new(addr, node_port(protocol));
                    let ask = Ask::new(protocol, target).count(3).timeout(Duration::from_secs(60));
                    refused(&failures(&world.cluster.pod("a1").ask(&ask)?, target)?)
                        .with_context(|| target.to_string())?;
                }
                Ok(())
            })?;
            // Nor does anybody else: nothing that comes by a device may be for 127.0.0.0/8 (CVE-2020-8558).
            world.cluster.node("a").netns.run(|_| {
                for interface in std::fs::read_dir("/proc/sys/net/ipv4/conf")? {
                    let sysctl = interface?.path().join("route_localnet");
                    ensure!(std::fs::read_to_string(&sysctl)?.trim() == "0", "{} is set", sysctl.display());
                }
                Ok(())
            })?
        })?;
    }
    Ok(())
}

fn bound_to_the_loopback_is_refused(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "", &["a1", "b1"]), |world| {
        each(|protocol, family| {
            if protocol == Protocol::DnsUnconnected {
                return Ok(());
            }
            for addr in loopbacks(family) {
                let target = SocketAddr::new(addr, node_port(protocol));
                let ask = Ask::new(protocol, target).count(3).timeout(Duration::from_secs(60)).source(addr);
                refused(&failures(&world.cluster.node("a").ask(&ask)?, target)?)?;
            }
            Ok(())
        })
    })
}

fn one_backend_with_affinity(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "  sessionAffinity: ClientIP\n", &["a1", "b1"]), |world| {
        for family in Family::BOTH {
            // TCP and UDP are two ports of the service, connected or not is the same one.
            for protocols in [&[Protocol::Http][..], &[Protocol::Dns, Protocol::DnsUnconnected]] {
                let mut by = BTreeSet::new();
                for &protocol in protocols {
                    for target in world.served("a", protocol, family) {
                        by.extend(world.answers(protocol, target)?);
                    }
                }
                ensure!(by.len() == 1, "{protocols:?} over {family:?}: {by:?}");
            }
        }
        Ok(())
    })
}

fn datagrams_leave_a_backend(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "", &["a1"]), |world| {
        let mut source_port = 40_100;
        for protocol in [Protocol::Dns, Protocol::DnsUnconnected, Protocol::DnsOneSocket] {
            for family in Family::BOTH {
                for target in world.served("a", protocol, family) {
                    source_port += 1;
                    let ask = Ask::new(protocol, target).source_port(source_port).interval(TICK);
                    moves(world, &ask).with_context(|| format!("{protocol} {target}"))?;
                }
            }
        }
        Ok(())
    })
}

/// From a1 to b1, without a failure; but who waits at a connected socket for what a1 will not answer is told so.
fn moves(world: &World, ask: &Ask) -> Result<()> {
    world.set_backends(&["a1"])?;
    let failed = moved(world, world.cluster.node("a").keep_asking(ask)?)?;
    let told = |it: &Outcome| it.failure().is_some_and(|it| it.detail == "ECONNABORTED");
    ensure!(failed.len() <= 1 && failed.iter().all(told), "{failed:?}");
    Ok(())
}

/// Moves a client that asks a1 to b1, and says what failed from its first answer on.
fn moved(world: &World, client: Client<Outcome>) -> Result<Vec<Outcome>> {
    let last_is = |name: &'static str| move |outcomes: &[Outcome]| outcomes.last().and_then(by) == Some(name);
    client.wait_until(SOON, last_is("a1"))?;
    world.set_backends(&["b1"])?;
    client.wait_until(SOON, last_is("b1"))?;
    // What was there before comes first, and a connected socket that was sent there is told, too.
    let outcomes = client.stop()?.into_iter().skip_while(|outcome| by(outcome) != Some("a1"));
    let (failed, outcomes): (Vec<_>, Vec<_>) = outcomes.partition(|outcome| outcome.failure().is_some());
    let served = outcomes.iter().map(by).skip_while(|it| *it == Some("a1"));
    ensure!(served.into_iter().all(|it| it == Some("b1")), "it went back");
    Ok(failed)
}

/// Its datagrams ask no program: it would send to a1 for ever. It is told once, and connects again.
fn connected_socket_is_taken(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "", &["a1"]), |world| {
        let mut source_port = 40_200;
        for family in Family::BOTH {
            let mut targets = world.served("a", Protocol::DnsConnected, family);
            if let SocketAddr::V4(target) = world.cluster_ip(Protocol::DnsConnected, family) {
                targets.push(SocketAddr::new(target.ip().to_ipv6_mapped().into(), target.port()));
            }
            for target in targets {
                source_port += 1;
                let ask = Ask::new(Protocol::DnsConnected, target).source_port(source_port).interval(TICK);
                world.set_backends(&["a1"])?;
                let bystander = checks::pod_target(world.cluster.pod("a1"), Protocol::DnsConnected, family);
                let node = world.cluster.node("a");
                let direct = node.keep_asking(&Ask::new(Protocol::DnsConnected, bystander).interval(TICK))?;
                direct.wait_until(SOON, |outcomes| !outcomes.is_empty())?;
                let failed = moved(world, node.keep_asking(&ask)?).with_context(|| target.to_string())?;
                let details: Vec<_> =
                    failed.iter().filter_map(Outcome::failure).map(|it| it.detail.as_str()).collect();
                // What it was doing decides which: it waited for an answer, or sent.
                let told = details == ["ECONNABORTED"] || details == ["EDESTADDRREQ"];
                ensure!(told, "{target}: {details:?}");
                let untouched = direct.stop()?;
                ensure!(untouched.iter().all(|it| by(it) == Some("a1")), "who named the pod: {untouched:?}");
            }
        }
        Ok(())
    })
}

/// Its datagrams go the packet path, whatever is said of pods' sockets.
fn pods_connected_socket_moves(sandbox: &Sandbox) -> Result<()> {
    for socket_lb in ["tcp", "all"] {
        World::test(sandbox, (&["--socket-lb", socket_lb], "", &["a1"]), |world| {
            for family in Family::BOTH {
                let target = world.cluster_ip(Protocol::DnsConnected, family);
                world.set_backends(&["a1"])?;
                let ask = Ask::new(Protocol::DnsConnected, target).interval(TICK);
                let failed = moved(world, world.cluster.pod("b1").keep_asking(&ask)?)?;
                ensure!(failed.is_empty(), "--socket-lb {socket_lb}: {failed:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn by(outcome: &Outcome) -> Option<&str> {
    outcome.answer().map(|answer| answer.by.as_str())
}

/// Each answer comes from the address that was asked, though one pod gives them all.
fn one_socket_asks_several_services(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "", &["a1"]), |world| {
        for family in Family::BOTH {
            let mut targets = world.served("a", Protocol::Dns, family);
            targets.push(checks::pod_target(world.cluster.pod("a1"), Protocol::Dns, family));
            targets.push(checks::pod_target(world.cluster.pod("b1"), Protocol::Dns, family));
            let Some((first, others)) = targets.split_first() else { bail!("no targets") };
            let ask = Ask::new(Protocol::DnsOneSocket, *first).also(others).count(REQUESTS).strict();
            let outcomes = world.cluster.node("a").ask(&ask)?;
            ensure!(outcomes.len() == REQUESTS as usize, "{:?}", outcomes.last());
            for (outcome, target) in outcomes.iter().zip(targets.iter().cycle()) {
                ensure!(outcome.answer().is_some_and(|it| it.server == *target), "{target}: {outcome:?}");
            }
        }
        Ok(())
    })
}

fn mapped_addresses_are_ipv4(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, (&[], "", &["a1", "b1"]), |world| {
        for protocol in EVERY {
            for target in world.served("a", protocol, Family::V4) {
                let IpAddr::V4(addr) = target.ip() else { bail!("{target} is not IPv4") };
                let mapped = SocketAddr::new(addr.to_ipv6_mapped().into(), target.port());
                let answers = world.answers(protocol, mapped)?;
                ensure!(answers == names(&["a1", "b1"]), "{protocol} {mapped}: {answers:?}");
            }
        }
        Ok(())
    })
}
