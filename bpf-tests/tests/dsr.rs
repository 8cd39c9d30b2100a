//! Direct server return: clients of NodePorts and of a balancer's address whose backend is on another node, over the
//! network's own routes and over tunnels.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_tests::{
    agent::Agent,
    checks,
    cluster::{Cluster, Family},
    cni::Runtime,
    manifests::{Endpoint, Port, Service},
    netns::{Prefix, Route},
    outside::{self, Outside},
    patience::stretched,
    pod::{FailureKind, Outcome, Progress},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Client, Protocol},
};
use ferroflow_common::abi::{lb::FrontendKey, relay::SENDER_MAC, tunnel::DEVICE_MAC};
use ferroflow_ebpf::frame::{Frame, Macs};

fn main() -> ExitCode {
    runner::main(&[
        ("rule_26_native_clients_keep_their_address", |it| clients_keep_their_address(it, NATIVE)),
        ("rule_26_vxlan_clients_keep_their_address", |it| clients_keep_their_address(it, VXLAN)),
        ("rule_37_native_too_long_packets_are_answered", |it| too_long_packets_are_answered(it, NATIVE)),
        ("rule_37_vxlan_too_long_packets_are_answered", |it| too_long_packets_are_answered(it, VXLAN)),
        ("a_connection_outlives_the_node_that_it_came_by", a_connection_outlives_its_node),
        ("relays_follow_nodes_whose_addresses_change", relays_follow_nodes),
        ("rule_31_a_socket_moves_from_a_backend_that_is_gone", a_socket_moves),
        ("rule_14_without_endpoints_the_first_node_refuses", without_endpoints_it_refuses),
        ("rule_22_ranges_and_policies_see_the_client", ranges_and_policies_see_the_client),
        ("strangers_relay_nothing", strangers_relay_nothing),
    ])
}

const NATIVE: &str = "native";
const VXLAN: &str = "vxlan";

/// What is on ports of its own: a test's plain UDP server.
const PLAIN_PORT: u16 = 5400;
const NODE_PORTS: [(u16, u16); 4] = [(80, 30080), (53, 30053), (7, 30007), (PLAIN_PORT, 30540)];

/// How long a change of the cluster may take to be in force.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);

/// Nodes a and b with a pod each, and a client outside.
struct Fixture {
    agents: Vec<Agent>,
    web: Service,
    client: Outside,
    cluster: Cluster,
}

impl Fixture {
    /// The service's backends are these pods; `more` are lines of its `spec`.
    fn test(
        sandbox: &Sandbox,
        (routing, more): (&str, &str),
        backends: &[&str],
        test: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut fixture = Self::new(sandbox, routing, more, backends)?;
        test(&mut fixture).map_err(|error| anyhow!("{error:#}\n{}", fixture.logs()))
    }

    fn new(sandbox: &Sandbox, routing: &str, more: &str, backends: &[&str]) -> Result<Self> {
        let mut cluster = Cluster::unrouted(sandbox, &["a", "b"])?;
        cluster.manifests().write_cluster(&cluster)?;
        let client = Outside::beside(&cluster)?;
        let (mut agents, mut runtimes) = (Vec::new(), Vec::new());
        for node in cluster.nodes() {
            let runtime = Runtime::new(node)?;
            let cni = runtime.agent_args();
            let args = cni.iter().map(String::as_str);
            let args: Vec<_> = args.chain(["--routing", routing, "--load-balancer-mode", "dsr"]).collect();
            agents.push(Agent::start(node, &args)?);
            runtimes.push(runtime);
        }
        let logs = |agents: &[Agent]| agents.iter().map(Agent::log_tail).collect::<String>();
        for (name, runtime) in ["a", "b"].into_iter().zip(&runtimes) {
            let attached =
                runtime.wait_ready().and_then(|()| cluster.attach(name, &format!("{name}1"), runtime));
            attached.map_err(|error| anyhow!("{error:#}\n{}", logs(&agents)))?;
        }
        let mut web = checks::service("web", 10);
        let plain = Port { name: "plain".into(), protocol: "UDP", port: PLAIN_PORT, target: PLAIN_PORT };
        web.ports.push(plain);
        web.more = more.to_owned();
        cluster.manifests().write_cluster(&cluster)?;
        let fixture = Self { agents, web, client, cluster };
        fixture.expose()?;
        fixture.set_backends(backends)?;
        fixture.route_by("a")?;
        fixture.wait_relays()?;
        Ok(fixture)
    }

    fn logs(&self) -> String {
        let said = |agent: &Agent| agent.verb(&["status"]).unwrap_or_else(|error| format!("{error:#}"));
        self.agents.iter().map(|agent| format!("{}{}", agent.log_tail(), said(agent))).collect()
    }

    fn expose(&self) -> Result<()> {
        let ingress: String =
            Family::BOTH.iter().map(|family| format!("    - ip: \"{}\"\n", balancer(*family))).collect();
        let yaml = self.web.exposed("LoadBalancer", &NODE_PORTS);
        let status = format!("status:\n  loadBalancer:\n    ingress:\n{ingress}");
        self.cluster.manifests().write("service-web", &format!("{yaml}{status}"))
    }

    fn set_backends(&self, names: &[&str]) -> Result<()> {
        let pods = names.iter().map(|name| self.cluster.pod(name));
        self.cluster.manifests().write_endpoints(&self.web, &Endpoint::ready(pods))
    }

    /// The client's packets to the balancer's addresses go to this node.
    fn route_by(&self, node: &str) -> Result<()> {
        let node = self.cluster.node(node);
        Family::BOTH.into_iter().try_for_each(|family| self.route_via(node.ip(family)))
    }

    /// Those of a family, to the node that has this address.
    fn route_via(&self, node: IpAddr) -> Result<()> {
        let (to, via) = (alone(balancer(Family::of(node))), Some(node));
        self.client.netns.run(move |inside| inside.replace_route(Route { to, via, dev: "eth0" }, None))?
    }

    /// Until both nodes relay: before, clients are masqueraded.
    fn wait_relays(&self) -> Result<()> {
        let relayed = format!("\"scope\":{}", FrontendKey::RELAYED);
        wait_for(|| {
            for agent in &self.agents {
                let rows = agent.verb(&["map", "dump", "frontends"])?;
                ensure!(rows.contains(&relayed), "no rows for relays: {rows}");
                let rows = agent.verb(&["map", "dump", "relay_nodes"])?;
                ensure!(rows.contains("192.168.50."), "no nodes: {rows}");
            }
            Ok(())
        })
    }

    /// Where the service is, of node a.
    fn targets(&self, protocol: Protocol, family: Family) -> [SocketAddr; 2] {
        let (port, node_port) = if protocol == Protocol::Http { NODE_PORTS[0] } else { NODE_PORTS[1] };
        [(self.cluster.node("a").ip(family), node_port).into(), (balancer(family), port).into()]
    }

    /// Until exactly these have answered 40 requests of the client, to whom it asked, and have seen the client.
    fn wait_seen(&self, protocol: Protocol, target: SocketAddr, by: &[&str]) -> Result<()> {
        let client = outside::ip(Family::of(target.ip()));
        let expected: BTreeSet<_> = by.iter().map(|by| ((*by).to_owned(), client)).collect();
        let ask = Ask::new(protocol, target).count(40).timeout(Duration::from_millis(500)).strict();
        wait_for(|| {
            let outcomes = self.client.ask(&ask)?;
            let mut seen = BTreeSet::new();
            for outcome in &outcomes {
                let answer = outcome.answer().with_context(|| format!("{outcome:?}"))?;
                ensure!(answer.server == target, "{target} answered as {}", answer.server);
                seen.insert((answer.by.clone(), answer.client.ip()));
            }
            ensure!(seen == expected, "{seen:?} instead of {expected:?}");
            Ok(())
        })
        .with_context(|| format!("{protocol} {target}"))
    }
}

fn balancer(family: Family) -> IpAddr {
    let text = if family == Family::V4 { "192.0.2.1" } else { "2001:db8:1::1" };
    text.parse().expect("an address")
}

fn alone(addr: IpAddr) -> Prefix {
    Prefix { addr, len: if addr.is_ipv4() { 32 } else { 128 } }
}

/// Until it holds.
fn wait_for(mut holds: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + stretched(CHANGE_LIMIT);
    loop {
        match holds() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error.context("still, in the end")),
            Err(_not_yet) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// A pod on the other node, pods on both, and a process of the other node's host.
fn clients_keep_their_address(sandbox: &Sandbox, routing: &str) -> Result<()> {
    Fixture::test(sandbox, (routing, ""), &["b1"], |it| {
        for backends in [&["b1"][..], &["a1", "b1"]] {
            it.set_backends(backends)?;
            for family in Family::BOTH {
                for protocol in [Protocol::Http, Protocol::Dns] {
                    for target in it.targets(protocol, family) {
                        it.wait_seen(protocol, target, backends)?;
                    }
                }
            }
        }
        let _host = it.cluster.node("b").serve("host-b")?;
        let mut yaml = it.web.slices(&Endpoint::ready([it.cluster.pod("b1")]));
        for family in Family::BOTH {
            let (pod, host) = (it.cluster.pod("b1").ip(family), it.cluster.node("b").ip(family));
            yaml = yaml.replace(&pod.to_string(), &host.to_string());
        }
        it.cluster.manifests().write("endpoints-web", &yaml)?;
        for family in Family::BOTH {
            for protocol in [Protocol::Http, Protocol::Dns] {
                for target in it.targets(protocol, family) {
                    it.wait_seen(protocol, target, &["host-b"]).context("a process of the host")?;
                }
            }
        }
        let errors = it.cluster.pod("b1").checksum_errors()?;
        ensure!(errors == 0, "{errors} checksum errors");
        Ok(())
    })
}

/// Every device has room for 1,500 bytes, and so the tunnel for less: a transfer, and datagrams that are cut.
fn too_long_packets_are_answered(sandbox: &Sandbox, routing: &str) -> Result<()> {
    Fixture::test(sandbox, (routing, ""), &["b1"], |it| {
        for family in Family::BOTH {
            for target in it.targets(Protocol::Http, family) {
                it.wait_seen(Protocol::Http, target, &["b1"])?;
            }
            for target in
                [SocketAddr::new(it.cluster.node("a").ip(family), 30007), (balancer(family), 7).into()]
            {
                let stream = it.client.stream(target)?;
                goes_on(&stream, 1_000_000).with_context(|| format!("{target}"))?;
                let last = stream.stop()?.pop().context("a stream said nothing")?;
                ensure!(last.ended == Some(Ok(())), "{target}: {last:?}");
            }
            let target = SocketAddr::new(it.cluster.node("a").ip(family), 30540);
            let (client, server) = plain_sockets(it, family)?;
            let payload: Vec<u8> = (0..4_000).map(|at| (at % 251) as u8).collect();
            let sent = send_until(&client, &server, &payload, target);
            let (seen, from) = sent.with_context(|| format!("datagrams to {target}"))?;
            ensure!(seen == payload && from == client.local_addr()?, "{from}");
            server.send_to(&payload, from)?;
            let (seen, from) = outside::receive(&client)?;
            ensure!(seen == payload && from == target, "{from}");
        }
        Ok(())
    })
}

/// A socket of the client, and one that serves in pod b1.
fn plain_sockets(it: &Fixture, family: Family) -> Result<(UdpSocket, UdpSocket)> {
    let pod = it.cluster.pod("b1");
    Ok((it.client.udp(family, 6_000)?, outside::udp(&pod.netns, (pod.ip(family), PLAIN_PORT).into())?))
}

/// What the other socket gets, of datagrams that are sent until one comes: the first is lost for its length.
fn send_until(
    from: &UdpSocket,
    to: &UdpSocket,
    payload: &[u8],
    target: SocketAddr,
) -> Result<(Vec<u8>, SocketAddr)> {
    to.set_nonblocking(true)?;
    let mut came = None;
    wait_for(|| {
        match from.send_to(payload, target) {
            Err(error) if error.kind() != ErrorKind::ConnectionRefused => Err(error).context("send")?,
            _ => thread::sleep(Duration::from_millis(50)),
        }
        let mut bytes = vec![0; 65_536];
        let (length, from) = to.recv_from(&mut bytes).context("no datagram came")?;
        bytes.truncate(length);
        came = Some((bytes, from));
        Ok(())
    })?;
    to.set_nonblocking(false)?;
    came.context("it came")
}

/// Until so many more bytes have come back.
fn goes_on(stream: &Client<Progress>, bytes: u64) -> Result<()> {
    let verified = |seen: &[Progress]| seen.last().map_or(0, |progress| progress.verified);
    let before = verified(&stream.seen());
    stream.wait_until(Duration::from_secs(20), |seen| verified(seen) > before + bytes)?;
    Ok(())
}

/// The balancer sends to another node, because the first one is dead.
fn a_connection_outlives_its_node(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, (NATIVE, ""), &["b1"], |it| {
        for family in Family::BOTH {
            let [_, target] = it.targets(Protocol::Http, family);
            it.wait_seen(Protocol::Http, target, &["b1"])?;
        }
        let streams = Family::BOTH.map(|family| it.client.stream((balancer(family), 7).into()));
        let streams = streams.into_iter().collect::<Result<Vec<_>>>()?;
        streams.iter().try_for_each(|stream| goes_on(stream, 10_000))?;
        it.cluster.node("a").netns.run(|inside| inside.remove("eth0"))??;
        it.route_by("b")?;
        streams.iter().try_for_each(|stream| goes_on(stream, 10_000)).context("by the other node")?;
        for stream in streams {
            let last = stream.stop()?.pop().context("a stream said nothing")?;
            ensure!(last.ended == Some(Ok(())), "{last:?}");
        }
        Ok(())
    })
}

/// First the backend's node, then the one that the client's packets come to.
fn relays_follow_nodes(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, (VXLAN, ""), &["b1"], |it| {
        for (name, moved) in [("b", ["192.168.50.102", "fd50::102"]), ("a", ["192.168.50.101", "fd50::101"])]
        {
            let node = it.cluster.node(name);
            let mut addresses = Vec::new();
            for (family, new) in Family::BOTH.into_iter().zip(moved) {
                let (old, addr): (IpAddr, IpAddr) = (node.ip(family), new.parse()?);
                let prefix = Prefix { addr, len: if addr.is_ipv4() { 24 } else { 64 } };
                node.netns.run(move |inside| -> Result<()> {
                    inside.take_address(old)?;
                    inside.address("eth0", prefix)?;
                    // They went with the last address of IPv4.
                    if addr.is_ipv4() { outside::lead_to(inside, family) } else { Ok(()) }
                })??;
                addresses.push((old, addr));
            }
            it.cluster.manifests().readdress(&addresses)?;
            if name == "a" {
                addresses.iter().try_for_each(|(_, new)| it.route_via(*new))?;
            }
            for family in Family::BOTH {
                let [_, target] = it.targets(Protocol::Http, family);
                it.wait_seen(Protocol::Http, target, &["b1"])
                    .with_context(|| format!("node {name} moved"))?;
            }
        }
        Ok(())
    })
}

/// One connected socket, whose port stays what it is.
fn a_socket_moves(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, (NATIVE, ""), &["b1"], |it| {
        for family in Family::BOTH {
            let [target, _] = it.targets(Protocol::Dns, family);
            it.wait_seen(Protocol::Dns, target, &["b1"])?;
            let ask = Ask::new(Protocol::DnsConnected, target).source_port(7_000);
            let ask = ask.interval(Duration::from_millis(10)).timeout(Duration::from_millis(500));
            let client = it.client.keep_asking(&ask)?;
            for by in ["b1", "a1", "b1"] {
                it.set_backends(&[by])?;
                let is_by = |seen: &[Outcome]| {
                    seen.last().and_then(Outcome::answer).is_some_and(|answer| answer.by == by)
                };
                let seen =
                    client.wait_until(Duration::from_secs(10), is_by).with_context(|| by.to_owned())?;
                let answer = seen.last().and_then(Outcome::answer).context("an answer")?;
                ensure!(answer.client.ip() == outside::ip(family), "{answer:?}");
            }
            client.stop()?;
        }
        Ok(())
    })
}

fn without_endpoints_it_refuses(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, (NATIVE, ""), &["b1"], |it| {
        it.set_backends(&[])?;
        for family in Family::BOTH {
            for protocol in [Protocol::Http, Protocol::Dns] {
                for target in it.targets(protocol, family) {
                    let ask = Ask::new(protocol, target).count(3).timeout(Duration::from_millis(500));
                    wait_for(|| {
                        let outcomes = it.client.ask(&ask)?;
                        let refused = |it: &Outcome| {
                            it.failure().is_some_and(|failure| failure.kind == FailureKind::Refused)
                        };
                        ensure!(outcomes.iter().all(refused), "{protocol} {target}: {outcomes:?}");
                        Ok(())
                    })?;
                }
            }
        }
        Ok(())
    })
}

/// Ranges without the client leave the balancer's address to others, and the NodePort to all; a policy that lets the
/// client in, and nobody else, lets it in.
fn ranges_and_policies_see_the_client(sandbox: &Sandbox) -> Result<()> {
    let ranges = "  loadBalancerSourceRanges: [198.51.100.0/24, \"2001:db8:9::/64\"]\n";
    Fixture::test(sandbox, (NATIVE, ranges), &["b1"], |it| {
        for family in Family::BOTH {
            let [node_port, balancer] = it.targets(Protocol::Http, family);
            it.wait_seen(Protocol::Http, node_port, &["b1"])?;
            silent(it, balancer).context("ranges")?;
        }
        let policy = |client: [&str; 2]| {
            let [v4, v6] = client;
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: web, namespace: default}}\n\
                 spec:\n  podSelector: {{}}\n  policyTypes: [Ingress]\n  ingress:\n  - from:\n\
                 \x20   - ipBlock: {{cidr: {v4}}}\n    - ipBlock: {{cidr: \"{v6}\"}}\n"
            )
        };
        it.cluster.manifests().write("policy", &policy(["192.168.50.0/24", "fd50::/64"]))?;
        for family in Family::BOTH {
            let [node_port, _] = it.targets(Protocol::Http, family);
            wait_for(|| silent(it, node_port)).context("a policy for the nodes")?;
        }
        it.cluster.manifests().write("policy", &policy(["203.0.113.1/32", "2001:db8::1/128"]))?;
        for family in Family::BOTH {
            let [node_port, _] = it.targets(Protocol::Http, family);
            it.wait_seen(Protocol::Http, node_port, &["b1"]).context("a policy for the client")?;
        }
        Ok(())
    })
}

/// Whether the client has no answer.
fn silent(it: &Fixture, target: SocketAddr) -> Result<()> {
    let outcomes = it.client.ask(&Ask::http(target).count(2).timeout(Duration::from_millis(300)))?;
    let timed_out = |it: &Outcome| it.failure().is_some_and(|failure| failure.kind == FailureKind::TimedOut);
    ensure!(outcomes.iter().all(timed_out), "{target}: {outcomes:?}");
    Ok(())
}

/// The same relayed packet, from a machine that is no node and from one that is.
fn strangers_relay_nothing(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, (NATIVE, ""), &["b1"], |it| {
        for family in Family::BOTH {
            let (_, server) = plain_sockets(it, family)?;
            let node = it.cluster.node("a");
            let client = (outside::ip(family).into(), 6_001);
            let mut frame = Frame::udp(client, (node.ip(family).into(), 30540)).payload(b"for the backend");
            frame.macs = Macs { dst: DEVICE_MAC, src: SENDER_MAC };
            // RFC 7348 section 5: the flag of a network's identifier, and the identifier.
            let packet = [&[8, 0, 0, 0, 0, 0, 1, 0][..], &frame.build()].concat();
            let end = SocketAddr::new(it.cluster.node("b").v4.into(), 8472);
            let refused = || drops(it, "relayed-by-stranger");
            let before = refused()?;
            it.client.udp(Family::V4, 6_002)?.send_to(&packet, end)?;
            wait_for(|| {
                ensure!(refused()? > before, "nobody counts a stranger's packet");
                Ok(())
            })?;
            let node = outside::udp(&node.netns, (node.v4, 6_003).into())?;
            node.send_to(&packet, end)?;
            let (seen, from) = outside::receive(&server).context("a node's")?;
            ensure!(seen == b"for the backend" && from.port() == 6_001, "{from}");
            server.set_read_timeout(Some(Duration::from_millis(300)))?;
            ensure!(outside::receive(&server).is_err(), "a stranger's packet arrived, too");
        }
        Ok(())
    })
}

/// What node b has dropped for the reason.
fn drops(it: &Fixture, reason: &str) -> Result<u64> {
    let agent = it.agents.get(1).context("an agent")?;
    let status: serde_json::Value = serde_json::from_str(&agent.verb(&["status", "-o", "json"])?)?;
    let rows = status["drops"].as_array().context("drops")?;
    let row = rows.iter().find(|row| row["reason"] == reason);
    Ok(row.and_then(|row| row["packets"].as_u64()).unwrap_or(0))
}
