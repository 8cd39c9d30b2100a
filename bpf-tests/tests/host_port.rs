//! Ports of the host that lead to pods: who reaches them, whom the pod sees, and how they come and go.
#![forbid(unsafe_code)]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::{
    checks::{World, tally},
    cluster::Family,
    cni::{self, Container},
    netns::{Netns, Prefix},
    patience::stretched,
    pod::{DNS_PORT, FailureKind, HTTP_PORT, Outcome},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};
use serde_json::{Value, json};

fn main() -> ExitCode {
    runner::main(&[
        ("host_port_everybody_reaches_it_and_is_seen", everybody_reaches_it_and_is_seen),
        ("host_port_without_socket_programs", without_socket_programs),
        ("host_port_one_number_at_two_addresses_and_of_two_protocols", one_number_three_pods),
        ("host_port_is_at_every_address_of_the_host", at_every_address_of_the_host),
        ("rule_33_host_port_datagrams_move_to_the_next_pod", datagrams_move_to_the_next_pod),
        ("host_port_outlives_agents_and_goes_with_its_pod", outlives_agents_and_goes_with_its_pod),
        ("rule_49_policies_see_the_client_of_a_host_port", policies_see_the_client),
        ("host_port_conflicts_are_told", conflicts_are_told),
        ("rules_57_and_60_host_port_check_and_bad_input", check_and_bad_input),
    ])
}

const PORT: u16 = 8088;
const PROTOCOLS: [Protocol; 3] = [Protocol::Http, Protocol::Dns, Protocol::DnsUnconnected];
/// Until the agent has taken in a change.
const SOON: Duration = Duration::from_secs(10);

fn mapping(host_ip: &str, host_port: u16, protocol: &str) -> Value {
    let container_port = if protocol == "udp" { DNS_PORT } else { HTTP_PORT };
    json!({ "hostIP": host_ip, "hostPort": host_port, "containerPort": container_port, "protocol": protocol })
}

fn asks(mappings: &[Value]) -> Value {
    json!({ "runtimeConfig": { "portMappings": mappings } })
}

/// TCP and UDP at every address.
fn both() -> Value {
    asks(&[mapping("", PORT, "tcp"), mapping("", PORT, "udp")])
}

fn attach(world: &mut World, name: &str, more: Value) -> Result<()> {
    let World { cluster, runtimes, .. } = world;
    cluster.attach_with("a", name, &runtimes[0], more)
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

/// `by` answered all, as `target`, and saw `client`.
fn answered(outcomes: &[Outcome], by: &str, target: SocketAddr, client: IpAddr) -> Result<()> {
    let counts = tally(outcomes, target, client)?;
    ensure!(counts.keys().eq([by]), "{counts:?} answered, not {by}");
    Ok(())
}

fn everybody_reaches_it_and_is_seen(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], everybody)
}

fn without_socket_programs(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "off"], |world| {
        attach(world, "a3", both())?;
        clients(world)
    })
}

fn everybody(world: &mut World) -> Result<()> {
    attach(world, "a3", both())?;
    clients(world)?;
    let node = world.cluster.node("a");
    for family in Family::BOTH {
        for protocol in PROTOCOLS {
            for addr in [node.ip(family), loopback(family)] {
                let target = SocketAddr::new(addr, PORT);
                let outcomes = node.ask(&Ask::new(protocol, target).count(3).strict())?;
                answered(&outcomes, "a3", target, node.ip(family))
                    .with_context(|| format!("{protocol}: the host itself to {target}"))?;
            }
        }
    }
    let errors = world.cluster.pod("a3").checksum_errors()?;
    ensure!(errors == 0, "{errors} checksum errors");
    Ok(())
}

/// From outside, from a pod of the other node, of this one, and from the pod itself.
fn clients(world: &World) -> Result<()> {
    let (node, outside) = (world.cluster.node("a"), world.cluster.node("b"));
    for family in Family::BOTH {
        let target = SocketAddr::new(node.ip(family), PORT);
        for protocol in PROTOCOLS {
            let ask = Ask::new(protocol, target).count(3).strict();
            let what = |who: &str| format!("{protocol}: {who} to {target}");
            answered(&outside.ask(&ask)?, "a3", target, outside.ip(family))
                .with_context(|| what("host b"))?;
            for name in ["b1", "a1"] {
                let pod = world.cluster.pod(name);
                answered(&pod.ask(&ask)?, "a3", target, pod.ip(family)).with_context(|| what(name))?;
            }
            let outcomes = world.cluster.pod("a3").ask(&ask)?;
            let answers: Vec<_> = outcomes.iter().filter_map(Outcome::answer).collect();
            let own = answers.iter().filter(|it| it.by == "a3" && it.server == target).count();
            ensure!(own == outcomes.len() && own > 0, "{}: {outcomes:?}", what("the pod itself"));
        }
    }
    Ok(())
}

/// Upstream's "no conflict between pods with same hostPort but different hostIP and protocol".
fn one_number_three_pods(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        const SAME: u16 = 54323;
        let node = world.cluster.node("a").ip(Family::V4);
        for (name, host_ip, protocol) in [
            ("pod1", "127.0.0.1", "tcp"),
            ("pod2", &*node.to_string(), "tcp"),
            ("pod3", &*node.to_string(), "udp"),
        ] {
            attach(world, name, asks(&[mapping(host_ip, SAME, protocol)]))?;
        }
        let (host, outside) = (world.cluster.node("a"), world.cluster.node("b"));
        let local = SocketAddr::new(loopback(Family::V4), SAME);
        let real = SocketAddr::new(node, SAME);
        let ask = Ask::http(local).source(node).count(3).strict();
        answered(&host.ask(&ask)?, "pod1", local, node).context("curl --interface NODE 127.0.0.1")?;
        answered(&host.ask(&Ask::http(local).strict())?, "pod1", local, node).context("curl 127.0.0.1")?;
        answered(&host.ask(&Ask::http(real).count(3).strict())?, "pod2", real, node).context("curl NODE")?;
        for protocol in [Protocol::Dns, Protocol::DnsUnconnected] {
            let ask = Ask::new(protocol, real).count(3).strict();
            answered(&host.ask(&ask)?, "pod3", real, node).context("UDP to NODE")?;
        }
        let client = outside.ip(Family::V4);
        answered(&outside.ask(&Ask::http(real).strict())?, "pod2", real, client).context("from outside")?;
        let refused = host.ask(&Ask::dns(local).timeout(Duration::from_millis(300)))?;
        ensure!(refused.iter().all(|it| it.failure().is_some()), "nobody has UDP at 127.0.0.1: {refused:?}");
        Ok(())
    })
}

/// Addresses that serve no NodePorts, and such as come later.
fn at_every_address_of_the_host(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let second = Ipv4Addr::new(192, 168, 50, 200);
        let mappings = [mapping("", PORT, "tcp"), mapping("192.168.50.200", PORT + 1, "tcp")];
        attach(world, "a3", asks(&mappings))?;
        let (node, outside) = (world.cluster.node("a"), world.cluster.node("b"));
        node.netns.run(move |inside| inside.address("eth0", Prefix { addr: second.into(), len: 24 }))??;
        let (client, deadline) = (outside.ip(Family::V4), Instant::now() + stretched(SOON));
        for port in [PORT, PORT + 1] {
            let target = SocketAddr::new(second.into(), port);
            loop {
                let outcomes = outside.ask(&Ask::http(target).timeout(Duration::from_millis(300)))?;
                let served = answered(&outcomes, "a3", target, client);
                if served.is_ok() {
                    break;
                }
                ensure!(Instant::now() < deadline, "{target}: {served:?}");
            }
        }
        let elsewhere = SocketAddr::new(node.ip(Family::V4), PORT + 1);
        let outcomes = outside.ask(&Ask::http(elsewhere).timeout(Duration::from_millis(300)))?;
        ensure!(outcomes.iter().all(|it| it.failure().is_some()), "{elsewhere} answered: {outcomes:?}");
        Ok(())
    })
}

/// A client that keeps its port is answered by the pod that has the port of the host next.
fn datagrams_move_to_the_next_pod(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        attach(world, "a3", both())?;
        let target = SocketAddr::new(world.cluster.node("a").ip(Family::V4), PORT);
        let ask = Ask::new(Protocol::DnsOneSocket, target)
            .source_port(40_000)
            .interval(Duration::from_millis(20))
            .timeout(Duration::from_millis(300));
        let mut clients = Vec::new();
        for (name, client) in [
            ("host b", world.cluster.node("b").keep_asking(&ask)?),
            ("b1", world.cluster.pod("b1").keep_asking(&ask)?),
            ("a1", world.cluster.pod("a1").keep_asking(&ask)?),
            ("host a", world.cluster.node("a").keep_asking(&ask)?),
        ] {
            let by = |name: &'static str| {
                move |seen: &[Outcome]| seen.iter().filter_map(Outcome::answer).any(|it| it.by == name)
            };
            client.wait_until(SOON, by("a3")).with_context(|| format!("{name}, before"))?;
            clients.push((name, client, by("a4")));
        }
        world.runtimes[0].del(Container { id: "a3", netns: "" })?;
        world.cluster.forget("a3");
        attach(world, "a4", both())?;
        for (name, client, moved) in clients {
            client.wait_until(Duration::from_secs(60), moved).with_context(|| format!("{name}, after"))?;
        }
        Ok(())
    })
}

fn outlives_agents_and_goes_with_its_pod(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        attach(world, "a3", both())?;
        world.wait_synced()?;
        clients(world)?;
        world.agents[0].kill9()?;
        clients(world).context("without an agent")?;
        world.agents[0].restart()?;
        let status = world.agents[0].wait_synced()?;
        ensure!(status["writes"] == 0, "a restart wrote: {status}");
        clients(world).context("after the restart")?;
        let listed = world.agents[0].verb(&["service", "list"])?;
        ensure!(listed.contains("hostPort/ff"), "{listed}");
        world.runtimes[0].del(Container { id: "a3", netns: "" })?;
        let gone = |world: &World| -> Result<bool> {
            Ok(!world.agents[0].verb(&["service", "list"])?.contains("hostPort/"))
        };
        let deadline = Instant::now() + stretched(SOON);
        while !gone(world)? {
            ensure!(Instant::now() < deadline, "rows of a pod that is gone");
            thread::sleep(Duration::from_millis(20));
        }
        let target = SocketAddr::new(world.cluster.node("a").ip(Family::V4), PORT);
        let outcomes = world.cluster.node("b").ask(&Ask::http(target))?;
        let refused = |it: &Outcome| it.failure().is_some_and(|failure| failure.kind == FailureKind::Refused);
        ensure!(outcomes.iter().all(refused), "nobody listens on the host: {outcomes:?}");
        Ok(())
    })
}

const POLICY: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guard, namespace: default}
spec:
  podSelector: {matchLabels: {pod: a3}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - ipBlock: {cidr: 192.168.50.2/32}
    - podSelector: {matchLabels: {pod: b1}}
";

fn policies_see_the_client(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        attach(world, "a3", both())?;
        world.cluster.manifests().write_cluster(&world.cluster)?;
        world.cluster.manifests().write("policy-guard", POLICY)?;
        let (node, outside) = (world.cluster.node("a"), world.cluster.node("b"));
        let target = SocketAddr::new(node.ip(Family::V4), PORT);
        let ask = Ask::http(target).timeout(Duration::from_millis(500));
        let deadline = Instant::now() + stretched(SOON);
        while world.cluster.pod("a1").ask(&ask)?.iter().any(|it| it.answer().is_some()) {
            ensure!(Instant::now() < deadline, "a1 is let in");
        }
        for name in ["b2", "a2"] {
            let outcomes = world.cluster.pod(name).ask(&ask)?;
            ensure!(outcomes.iter().all(|it| it.failure().is_some()), "{name} is let in: {outcomes:?}");
        }
        let ask = Ask::http(target).count(3).strict();
        let b1 = world.cluster.pod("b1");
        answered(&b1.ask(&ask)?, "a3", target, b1.ip(Family::V4)).context("b1")?;
        answered(&outside.ask(&ask)?, "a3", target, outside.ip(Family::V4)).context("host b")?;
        answered(&node.ask(&ask)?, "a3", target, node.ip(Family::V4)).context("a pod's own node")
    })
}

/// A namespace as a runtime makes it before it runs the plugin.
fn add(world: &World, id: &str, more: Value) -> Result<(Netns, cni::Answer)> {
    let netns = Netns::new(id)?;
    let path = netns.path()?;
    let answer = world.runtimes[0].command("ADD", Container { id, netns: cni::path(&path)? }, more)?;
    Ok((netns, answer))
}

fn conflicts_are_told(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        attach(world, "a3", both())?;
        let (netns, answer) = add(world, "second", asks(&[mapping("0.0.0.0", PORT, "udp")]))?;
        ensure!(answer.code()? == 103 && answer.text.contains("hostPort 8088/udp"), "{answer:?}");
        ensure!(answer.text.contains("container a3") && netns.interfaces()? == ["lo"], "{answer:?}");
        let exposed = world.web.exposed("NodePort", &[(80, 30_099)]);
        world.cluster.manifests().write("service-web", &exposed)?;
        let deadline = Instant::now() + stretched(SOON);
        while !world.agents[0].verb(&["service", "list"])?.contains(":30099") {
            ensure!(Instant::now() < deadline, "the NodePort does not come");
            thread::sleep(Duration::from_millis(20));
        }
        let (netns, answer) = add(world, "third", asks(&[mapping("", 30_099, "tcp")]))?;
        ensure!(answer.code()? == 103 && answer.text.contains("Service default/web"), "{answer:?}");
        ensure!(netns.interfaces()? == ["lo"] && world.runtimes[0].leases()?.len() == 3, "something is left");
        // A Service that comes later has it, too; that is told where the agent tells what fails.
        let exposed = world.web.exposed("NodePort", &[(80, PORT)]);
        world.cluster.manifests().write("service-web", &exposed)?;
        let deadline = Instant::now() + stretched(SOON);
        while !world.agents[0].log_tail().contains("belongs to Service default/web, which goes first") {
            ensure!(Instant::now() < deadline, "it is not told");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })
}

fn check_and_bad_input(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let (netns, answer) = add(world, "a3", both())?;
        let result = answer.result()?;
        let path = netns.path()?;
        let check = |mut more: Value| -> Result<cni::Answer> {
            more["prevResult"] = result.clone();
            world.runtimes[0].command("CHECK", Container { id: "a3", netns: cni::path(&path)? }, more)
        };
        let answer = check(both())?;
        ensure!(answer.success, "{answer:?}");
        let answer = check(asks(&[mapping("", PORT, "tcp")]))?;
        ensure!(answer.code()? == 102 && answer.text.contains("hostPort"), "{answer:?}");
        for (field, bad) in [
            ("hostPort", json!({ "hostPort": 65536, "containerPort": 1, "protocol": "tcp" })),
            ("containerPort", json!({ "hostPort": 1, "containerPort": 0, "protocol": "tcp" })),
            ("protocol", json!({ "hostPort": 1, "containerPort": 1, "protocol": "quic" })),
            ("hostIP", json!({ "hostPort": 1, "containerPort": 1, "protocol": "tcp", "hostIP": "node" })),
        ] {
            let (netns, answer) = add(world, "bad", asks(&[bad]))?;
            ensure!(answer.code()? == 7, "{answer:?}");
            if !answer.text.contains(&format!("runtimeConfig.portMappings[0].{field}")) {
                bail!("{field} is not named: {answer:?}");
            }
            ensure!(netns.interfaces()? == ["lo"], "something is left");
        }
        Ok(())
    })
}
