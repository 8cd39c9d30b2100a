//! Pods of three nodes that nobody but the agents has connected.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bpf_tests::{
    agent::Agent,
    checks::{ECHO_SERVICE_PORT, WEB_PORT, failures, service, tally, target},
    cluster::{Cluster, Family},
    cni::Runtime,
    manifests::{Endpoint, Service},
    netns::{Netns, Prefix},
    outside::ping,
    pod::{ECHO_PORT, HTTP_PORT, Outcome},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("native_pods_services_and_hosts_across_nodes", |it| across_nodes(it, NATIVE)),
        ("native_nodes_come_go_and_move", |it| nodes_come_go_and_move(it, NATIVE)),
        ("native_a_node_moves_under_traffic", |it| a_node_moves_under_traffic(it, NATIVE)),
        ("native_routes_outlive_the_agents_and_are_healed", |it| routes_outlive_the_agents(it, NATIVE)),
        ("vxlan_pods_services_and_hosts_across_nodes", |it| across_nodes(it, VXLAN)),
        ("vxlan_crosses_a_network_that_knows_no_pods", crosses_a_network_that_knows_no_pods),
        ("vxlan_pods_have_room_for_the_tunnel", pods_have_room_for_the_tunnel),
        ("vxlan_nodes_come_go_and_move", |it| nodes_come_go_and_move(it, VXLAN)),
        ("vxlan_a_node_moves_under_traffic", |it| a_node_moves_under_traffic(it, VXLAN)),
        ("vxlan_routes_outlive_the_agents_and_are_healed", |it| routes_outlive_the_agents(it, VXLAN)),
        ("native_addresses_that_no_pod_has_lead_nowhere", unused_addresses_lead_nowhere),
        ("without_routing_only_our_own_routes_are_removed", only_our_own_routes_are_removed),
    ])
}

const NATIVE: &[&str] = &["--routing", "native"];
const VXLAN: &[&str] = &["--routing", "vxlan"];

const NODE_PORT: u16 = 30080;

/// How long a change of the cluster, or of the kernel's routes, may take to be in force.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);

/// Nodes a, b and c with a pod each.
struct Fixture {
    agents: Vec<Agent>,
    web: Service,
    cluster: Cluster,
}

impl Fixture {
    fn test(sandbox: &Sandbox, args: &[&str], test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut fixture = Self::new(sandbox, args)?;
        test(&mut fixture).map_err(|error| anyhow!("{error:#}\n{}", fixture.logs()))
    }

    fn new(sandbox: &Sandbox, args: &[&str]) -> Result<Self> {
        let mut cluster = Cluster::unrouted(sandbox, &["a", "b", "c"])?;
        cluster.manifests().write_cluster(&cluster)?;
        let mut runtimes = Vec::new();
        let mut agents = Vec::new();
        for node in cluster.nodes() {
            let runtime = Runtime::new(node)?;
            let cni = runtime.agent_args();
            let args: Vec<_> = cni.iter().map(String::as_str).chain(args.iter().copied()).collect();
            agents.push(Agent::start(node, &args)?);
            runtimes.push(runtime);
        }
        let logs = |agents: &[Agent]| agents.iter().map(Agent::log_tail).collect::<String>();
        for (name, runtime) in ["a", "b", "c"].into_iter().zip(&runtimes) {
            let attached =
                runtime.wait_ready().and_then(|()| cluster.attach(name, &format!("{name}1"), runtime));
            attached.map_err(|error| anyhow!("{error:#}\n{}", logs(&agents)))?;
        }
        let web = service("web", 10);
        cluster.manifests().write_cluster(&cluster)?;
        cluster.manifests().write_service(&web)?;
        cluster
            .manifests()
            .write_endpoints(&web, &Endpoint::ready([cluster.pod("b1"), cluster.pod("c1")]))?;
        let mut fixture = Self { agents, web, cluster };
        fixture.agents.iter_mut().try_for_each(|agent| agent.wait_synced().map(drop))?;
        Ok(fixture)
    }

    fn logs(&self) -> String {
        self.agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n")
    }

    /// Until a pod has an answer of another by its address, which sees the pod's own.
    fn wait_reaches(&self, from: &str, to: &str, family: Family) -> Result<()> {
        let (pod, target) = (self.cluster.pod(from), (self.cluster.pod(to).ip(family), HTTP_PORT).into());
        wait_for(|| tally(&pod.ask(&quick(target))?, target, pod.ip(family)).map(drop))
            .with_context(|| format!("{from} to {to}, {family:?}"))
    }

    /// Until it has none.
    fn wait_lost(&self, from: &str, to: SocketAddr) -> Result<()> {
        wait_for(|| {
            let outcomes = self.cluster.pod(from).ask(&quick(to))?;
            ensure!(outcomes.iter().all(|outcome| outcome.answer().is_none()), "{from} reaches {to}");
            Ok(())
        })
    }

    /// Until the NodePort at this address answers host b and pod a1, both backends of it.
    fn wait_node_port(&self, addr: IpAddr) -> Result<()> {
        let target = SocketAddr::new(addr, NODE_PORT);
        let ask = Ask::http(target).count(40).timeout(Duration::from_millis(500)).strict();
        wait_for(|| {
            for outcomes in [self.cluster.node("b").ask(&ask)?, self.cluster.pod("a1").ask(&ask)?] {
                let by = outcomes.iter().map(|outcome| Ok(&*outcome.answer().context("no answer")?.by));
                let by = by.collect::<Result<BTreeSet<_>>>()?;
                ensure!(by.iter().eq(&["b1", "c1"]), "{by:?}");
            }
            Ok(())
        })
        .with_context(|| format!("{target}"))
    }

    /// Until nobody answers there.
    fn wait_no_node_port(&self, addr: IpAddr) -> Result<()> {
        let target = SocketAddr::new(addr, NODE_PORT);
        wait_for(|| {
            for outcomes in
                [self.cluster.node("b").ask(&quick(target))?, self.cluster.pod("a1").ask(&quick(target))?]
            {
                ensure!(outcomes.iter().all(|outcome| outcome.answer().is_none()), "{target} answers");
            }
            Ok(())
        })
    }

    /// The service as the pods of node a come to it.
    fn service_answers(&self, family: Family) -> Result<()> {
        let pod = self.cluster.pod("a1");
        for protocol in [Protocol::Http, Protocol::Dns, Protocol::DnsUnconnected] {
            let target = target(&self.web, protocol, family);
            let outcomes = pod.ask(&Ask::new(protocol, target).count(40).strict())?;
            let by = tally(&outcomes, target, pod.ip(family)).with_context(|| format!("{protocol}"))?;
            ensure!(by.keys().eq(["b1", "c1"]), "{protocol}: {by:?}");
        }
        Ok(())
    }

    /// From the host, which is a probe of the kubelet's, and from a process of the host to a pod of another node; and
    /// from a pod to a process of another host.
    fn hosts_and_pods(&self, family: Family) -> Result<()> {
        let node = self.cluster.node("a");
        for pod in ["a1", "b1"] {
            let target = (self.cluster.pod(pod).ip(family), HTTP_PORT).into();
            let outcomes = node.ask(&Ask::http(target).count(5).strict())?;
            tally(&outcomes, target, node.ip(family)).with_context(|| format!("host a to {pod}"))?;
        }
        let server = node.serve("host-a")?;
        let target = (node.ip(family), HTTP_PORT).into();
        for pod in ["a1", "b1"] {
            let pod = self.cluster.pod(pod);
            let outcomes = pod.http(target, 5)?;
            tally(&outcomes, target, pod.ip(family)).with_context(|| format!("{} to host a", pod.name))?;
        }
        drop(server.stop()?);
        Ok(())
    }

    /// A transfer by the pods' addresses, and one through the service: full packets, both ways.
    fn streams(&self, family: Family) -> Result<()> {
        let direct = SocketAddr::new(self.cluster.pod("b1").ip(family), ECHO_PORT);
        let through = SocketAddr::new(self.web.ip(family), ECHO_SERVICE_PORT);
        for target in [direct, through] {
            let stream = self.cluster.pod("a1").stream(target)?;
            let megabyte = |seen: &[bpf_tests::pod::Progress]| {
                seen.last().is_some_and(|last| last.verified > 1_000_000 || last.ended.is_some())
            };
            stream.wait_until(Duration::from_secs(20), megabyte).with_context(|| format!("to {target}"))?;
            let last = stream.stop()?.pop().context("a stream said nothing")?;
            ensure!(last.ended == Some(Ok(())) && last.verified > 1_000_000, "{target}: {last:?}");
        }
        Ok(())
    }
}

/// Answers soon or not at all.
fn quick(target: SocketAddr) -> Ask {
    Ask::http(target).timeout(Duration::from_millis(500))
}

/// Until it holds.
fn wait_for(mut holds: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + CHANGE_LIMIT;
    loop {
        match holds() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error.context("still, in the end")),
            Err(_not_yet) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn across_nodes(sandbox: &Sandbox, args: &[&str]) -> Result<()> {
    Fixture::test(sandbox, args, |it| {
        for family in Family::BOTH {
            for (from, to) in [("a1", "b1"), ("b1", "a1"), ("b1", "c1"), ("c1", "a1")] {
                it.wait_reaches(from, to, family)?;
            }
            it.service_answers(family).with_context(|| format!("the service, {family:?}"))?;
            it.hosts_and_pods(family).with_context(|| format!("{family:?}"))?;
            it.streams(family).with_context(|| format!("{family:?}"))?;
        }
        for pod in it.cluster.pods() {
            let errors = pod.checksum_errors()?;
            ensure!(errors == 0, "{}: {errors} checksum errors", pod.name);
        }
        Ok(())
    })
}

/// Nothing of this leaves a node in a pod's name: not to pods, nor to nodes, nor answers to either; not even a pod's answer to
/// a node that stands in for a client.
fn crosses_a_network_that_knows_no_pods(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, VXLAN, |it| {
        it.cluster.check_sources()?;
        let exposed = it.web.exposed("NodePort", &[(WEB_PORT, NODE_PORT)]);
        it.cluster.manifests().write("service-web", &exposed)?;
        for family in Family::BOTH {
            it.wait_reaches("a1", "b1", family)?;
            it.service_answers(family)?;
            it.hosts_and_pods(family).with_context(|| format!("{family:?}"))?;
            it.streams(family)?;
            let (a, b) = (it.cluster.node("a"), it.cluster.node("b"));
            ping(&it.cluster.pod("b1").netns, a.ip(family), 77, 56).context("ping from b1 to host a")?;
            // Host a's port, which has no backend there.
            let target = SocketAddr::new(a.ip(family), NODE_PORT);
            wait_for(|| tally(&b.ask(&quick(target))?, target, a.ip(family)).map(drop))?;
            for (who, answers) in [
                ("host b", b.ask(&Ask::http(target).count(20).strict())?),
                ("b1", it.cluster.pod("b1").ask(&Ask::http(target).count(20).strict())?),
            ] {
                let by =
                    tally(&answers, target, a.ip(family)).with_context(|| format!("{who} to {target}"))?;
                ensure!(by.keys().eq(["b1", "c1"]), "{who} to {target}: {by:?}");
            }
        }
        Ok(())
    })
}

/// A pod's packets fit the tunnel as its MTU says, and the device comes back when somebody removes it.
fn pods_have_room_for_the_tunnel(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, VXLAN, |it| {
        let mtu = |netns: &Netns, dev: &str| -> Result<String> {
            let path = format!("/proc/sys/net/ipv6/conf/{dev}/mtu");
            Ok(netns.run(move |_| std::fs::read_to_string(path))??.trim().to_owned())
        };
        let node = it.cluster.node("a");
        let found = [mtu(&it.cluster.pod("a1").netns, "eth0")?, mtu(&node.netns, "ferroflow-vxlan")?];
        ensure!(found == ["1450", "1450"], "{found:?}");
        node.netns.run(|inside| inside.remove("ferroflow-vxlan"))??;
        for family in Family::BOTH {
            it.wait_reaches("a1", "b1", family).context("the device was removed")?;
            it.streams(family)?;
        }
        Ok(())
    })
}

/// The Node object of c goes, comes back, and then has other addresses.
fn nodes_come_go_and_move(sandbox: &Sandbox, args: &[&str]) -> Result<()> {
    Fixture::test(sandbox, args, |it| {
        let manifests = it.cluster.manifests();
        let all = cluster_yaml(&it.cluster)?;
        let without: String =
            documents(&all).filter(|text| !text.contains("name: node-c\n  labels")).collect();
        ensure!(without.len() < all.len(), "there is no node c in\n{all}");
        let c1 = |family| SocketAddr::new(it.cluster.pod("c1").ip(family), HTTP_PORT);
        for family in Family::BOTH {
            it.wait_reaches("a1", "c1", family)?;
        }
        manifests.write("cluster", &without)?;
        for family in Family::BOTH {
            it.wait_lost("a1", c1(family)).context("node c is gone")?;
            it.wait_reaches("a1", "b1", family)?;
        }
        manifests.write("cluster", &all)?;
        for family in Family::BOTH {
            it.wait_reaches("a1", "c1", family).context("node c is back")?;
        }
        let moved = moves()?;
        let node = it.cluster.node("c");
        for (old, addr, len) in moved {
            node.netns.run(move |inside| {
                // In this order: with the first address of a subnet the kernel takes the others.
                inside.take_address(old)?;
                inside.address("eth0", Prefix { addr, len })
            })??;
        }
        manifests.readdress(&moved.map(|(old, new, _)| (old, new)))?;
        for family in Family::BOTH {
            it.wait_reaches("a1", "c1", family).context("node c has another address")?;
            it.wait_reaches("c1", "b1", family).context("node c has another address")?;
        }
        Ok(())
    })
}

/// Node c gets other addresses beside its own, its object names those, and then the first ones go: nothing that goes on
/// meanwhile fails, and NodePorts are at the addresses that the object has, also while the node has both.
fn a_node_moves_under_traffic(sandbox: &Sandbox, args: &[&str]) -> Result<()> {
    Fixture::test(sandbox, args, |it| {
        it.cluster.manifests().write("service-web", &it.web.exposed("NodePort", &[(WEB_PORT, NODE_PORT)]))?;
        let (moved, node) = (moves()?, it.cluster.node("c"));
        // Else the kernel takes both with the first.
        node.netns.sysctl("ipv4/conf/eth0/promote_secondaries", "1")?;
        let mut clients = Vec::new();
        for (old, _, _) in moved {
            let family = Family::of(old);
            it.wait_node_port(old)?;
            for (from, to) in [("a1", "c1"), ("c1", "b1")] {
                let target = SocketAddr::new(it.cluster.pod(to).ip(family), HTTP_PORT);
                clients.push((from, target));
                clients.push((from, SocketAddr::new(it.web.ip(family), WEB_PORT)));
            }
        }
        let asking = clients.into_iter().map(|(from, target)| {
            it.cluster.pod(from).keep_asking(&Ask::http(target).interval(Duration::from_millis(10)))
        });
        let asking = asking.collect::<Result<Vec<_>>>()?;
        for (_, addr, len) in moved {
            node.netns.run(move |inside| inside.address("eth0", Prefix { addr, len }))??;
        }
        it.cluster.manifests().readdress(&moved.map(|(old, new, _)| (old, new)))?;
        for (old, new, _) in moved {
            it.wait_node_port(new)?;
            it.wait_no_node_port(old).context("the node still has the address")?;
        }
        for (old, ..) in moved {
            node.netns.run(move |inside| inside.take_address(old))??;
        }
        for client in asking {
            let before = client.count();
            client.wait_until(Duration::from_secs(20), |seen| seen.len() > before + 20)?;
            let outcomes = client.stop()?;
            if let Some(failure) = outcomes.iter().find_map(Outcome::failure) {
                bail!("{failure}; {}", failures(&outcomes));
            }
        }
        let server = node.serve("host-c")?;
        for (_, new, _) in moved {
            it.wait_node_port(new)?;
            let target = SocketAddr::new(it.cluster.pod("b1").ip(Family::of(new)), HTTP_PORT);
            tally(&node.ask(&Ask::http(target).count(5).strict())?, target, new).context("host c to b1")?;
            let (pod, target) = (it.cluster.pod("a1"), SocketAddr::new(new, HTTP_PORT));
            tally(&pod.http(target, 5)?, target, pod.ip(Family::of(new))).context("a1 to host c")?;
        }
        drop(server.stop()?);
        Ok(())
    })
}

/// What node c has, what it gets, and how long the prefix is.
fn moves() -> Result<[(IpAddr, IpAddr, u8); 2]> {
    Ok([
        ("192.168.50.3".parse()?, "192.168.50.33".parse()?, 24),
        ("fd50::3".parse()?, "fd50::33".parse()?, 64),
    ])
}

/// Each begins with its own line of dashes.
fn documents(yaml: &str) -> impl Iterator<Item = String> + '_ {
    yaml.split("---\n").filter(|text| !text.is_empty()).map(|text| format!("---\n{text}"))
}

fn cluster_yaml(cluster: &Cluster) -> Result<String> {
    let path = cluster.manifests().path().join("cluster.yaml");
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn routes_outlive_the_agents(sandbox: &Sandbox, args: &[&str]) -> Result<()> {
    Fixture::test(sandbox, args, |it| {
        let mut clients = Vec::new();
        for family in Family::BOTH {
            for target in [(it.cluster.pod("b1").ip(family), HTTP_PORT), (it.web.ip(family), 80)] {
                let ask = Ask::http(target.into()).interval(Duration::from_millis(10));
                clients.push(it.cluster.pod("a1").keep_asking(&ask)?);
            }
        }
        let go_on = || -> Result<()> {
            for client in &clients {
                let before = client.seen().len();
                client.wait_until(Duration::from_secs(10), |seen| seen.len() > before + 20)?;
            }
            Ok(())
        };
        go_on()?;
        it.agents.iter_mut().try_for_each(Agent::kill9)?;
        go_on().context("without agents")?;
        for agent in &mut it.agents {
            agent.restart()?;
            agent.wait_synced()?;
        }
        go_on().context("after the restart")?;
        for client in clients {
            let outcomes = client.stop()?;
            if let Some(failure) = outcomes.iter().find_map(Outcome::failure) {
                bail!("{failure}; {}", failures(&outcomes));
            }
        }
        for family in Family::BOTH {
            delete_route(it, "b", family)?;
            it.wait_reaches("a1", "b1", family).context("a route was removed")?;
        }
        let agent = it.agents.first().context("no agent")?;
        wait_for(|| {
            let said = agent.log()?.contains("routes between nodes: made again");
            ensure!(said, "nobody says that routes were made again");
            Ok(())
        })?;
        Ok(())
    })
}

/// From node a to the pods of another.
fn delete_route(it: &Fixture, to: &str, family: Family) -> Result<()> {
    let node = it.cluster.node(to);
    let cidr = match family {
        Family::V4 => node.pod_cidr_v4(),
        Family::V6 => node.pod_cidr_v6(),
    };
    it.cluster.node("a").netns.run(move |inside| inside.remove_route(cidr))?
}

/// Without its own route such a packet would go out by the default route, and perhaps come back.
fn unused_addresses_lead_nowhere(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, NATIVE, |it| {
        for (family, unused) in [(Family::V4, "10.244.2.200"), (Family::V6, "fd00:10:244:2::200")] {
            let target = SocketAddr::new(unused.parse()?, HTTP_PORT);
            for pod in ["a1", "b1"] {
                let started = Instant::now();
                let outcomes =
                    it.cluster.pod(pod).ask(&Ask::http(target).timeout(Duration::from_secs(20)))?;
                let failure = outcomes.first().and_then(Outcome::failure).context("somebody answered")?;
                ensure!(
                    failure.kind == bpf_tests::pod::FailureKind::Unreachable,
                    "{pod}, {family:?}: {failure} after {:?}",
                    started.elapsed()
                );
            }
        }
        Ok(())
    })
}

/// An agent that is to make no routes removes those of the one before, and no others.
fn only_our_own_routes_are_removed(sandbox: &Sandbox) -> Result<()> {
    Fixture::test(sandbox, NATIVE, |it| {
        it.wait_reaches("a1", "b1", Family::V4)?;
        it.wait_reaches("a1", "b1", Family::V6)?;
        let node = it.cluster.node("a");
        let via = it.cluster.node("c").v4.into();
        let foreign = Prefix { addr: "10.77.0.0".parse()?, len: 16 };
        node.netns.run(move |inside| {
            inside.route(bpf_tests::netns::Route { to: foreign, via: Some(via), dev: "eth0" })
        })??;
        it.agents.iter_mut().try_for_each(Agent::kill9)?;
        it.agents.clear();
        let mut agent = Agent::start(node, &[])?;
        agent.wait_synced()?;
        for family in Family::BOTH {
            let target = (it.cluster.pod("b1").ip(family), HTTP_PORT).into();
            it.wait_lost("a1", target)?;
        }
        let left = node.netns.proc_net("route")?;
        ensure!(left.contains("00004D0A"), "the administrator's own route is gone:\n{left}");
        ensure!(!left.contains("0002F40A"), "a route of ours is left:\n{left}");
        Ok(())
    })
}
