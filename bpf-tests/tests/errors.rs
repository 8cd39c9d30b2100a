//! What goes wrong on the way between a client and a backend, and what does not fit into one packet: ICMP errors (rule
//! 37), fragments (rule 38) and segments out of place (rule 34).
//!
//! ```text
//!   a1 ── node a ──┬── router r ──── node b ── b1
//!                  └── node c ── c1              (no agent: its pod is a client from outside)
//! ```
//! Node a reaches the pods of b and c through r, which has agents' packets of no more than [`NARROW`] bytes pass.
#![forbid(unsafe_code)]

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_tests::{
    agent::Agent,
    checks::{self, ECHO_SERVICE_PORT},
    cluster::{Cluster, Family, Pod},
    manifests::{Endpoint, Port, Service},
    netns::{Netns, Prefix, Route},
    pod::ECHO_PORT,
    raw::Raw,
    runner,
    sandbox::Sandbox,
};
use ferroflow_common::tcp::Flags;
use ferroflow_ebpf::frame::{Frame, Transport};
use nix::sys::socket::{
    setsockopt,
    sockopt::{Ipv4RecvErr, Ipv6RecvErr, Ipv6Ttl},
};

fn main() -> ExitCode {
    runner::main(&[
        ("rule_37_a_narrow_link_is_found_through_a_service", a_narrow_link_is_found_through_a_service),
        ("rule_37_a_narrow_way_of_the_node_itself_is_told", a_narrow_way_of_the_node_itself_is_told),
        ("rule_37_a_closed_port_is_refused_through_a_service", a_closed_port_is_refused_through_a_service),
        ("rule_37_a_hop_too_far_is_told_through_a_service", a_hop_too_far_is_told_through_a_service),
        ("rule_38_large_datagrams_are_served", large_datagrams_are_served),
        ("rule_38_fragments_in_reverse_order_are_served", fragments_in_reverse_order_are_served),
        ("rule_34_a_segment_out_of_place_resets_nothing", a_segment_out_of_place_resets_nothing),
    ])
}

/// What fits through router r; IPv6 asks for 1280 at the least.
const NARROW: u32 = 1300;
/// A UDP service without and one with a server, by its port, its node port and the backends' port.
const CLOSED: (u16, u16, u16) = (9, 30_009, 9_009);
const DATAGRAMS: (u16, u16, u16) = (99, 30_099, 9_099);
const ECHO_NODE_PORT: u16 = 30_090;
const PATIENCE: Duration = Duration::from_secs(10);

struct World {
    agents: Vec<Agent>,
    service: Service,
    cluster: Cluster,
}

impl World {
    fn test(sandbox: &Sandbox, backend: &str, test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        Self::test_on(sandbox, backend, narrow, test)
    }

    /// The same where `lay` makes the ways between the nodes.
    fn test_on(
        sandbox: &Sandbox,
        backend: &str,
        lay: impl FnOnce(&Cluster) -> Result<()>,
        test: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<()> {
        let world = Self::new(sandbox, backend, lay)?;
        let logs = || world.agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n");
        test(&world).map_err(|error| error.context(logs()))
    }

    fn new(sandbox: &Sandbox, backend: &str, lay: impl FnOnce(&Cluster) -> Result<()>) -> Result<Self> {
        let cluster = Cluster::with_pods(sandbox, &["a", "b", "c", "r"], 1)?;
        lay(&cluster)?;
        let mut service = checks::service("web", 10);
        for (name, (port, _, target)) in [("closed", CLOSED), ("datagrams", DATAGRAMS)] {
            service.ports.push(Port { name: name.into(), protocol: "UDP", port, target });
        }
        let mut yaml = service.yaml().replace("type: ClusterIP", "type: NodePort");
        let node_ports =
            [(CLOSED.0, CLOSED.1), (DATAGRAMS.0, DATAGRAMS.1), (ECHO_SERVICE_PORT, ECHO_NODE_PORT)];
        for (port, node_port) in node_ports {
            yaml = yaml.replace(
                &format!("    port: {port}\n"),
                &format!("    port: {port}\n    nodePort: {node_port}\n"),
            );
        }
        let manifests = cluster.manifests();
        manifests.write_cluster(&cluster)?;
        manifests.write("service-web", &yaml)?;
        manifests.write_endpoints(&service, &Endpoint::ready([cluster.pod(backend)]))?;
        let mut agents = Vec::new();
        for name in ["a", "b"] {
            let mut agent = Agent::start(cluster.node(name), &["--socket-lb", "off"])?;
            agent.wait_synced()?;
            agents.push(agent);
        }
        Ok(Self { agents, service, cluster })
    }

    fn pod(&self, name: &str) -> &Pod {
        self.cluster.pod(name)
    }

    fn node(&self, name: &str, family: Family) -> IpAddr {
        node(&self.cluster, name, family)
    }

    /// A pod's way to the service, and that of a client from outside.
    fn targets(&self, family: Family, (port, node_port): (u16, u16)) -> [(&Pod, SocketAddr); 2] {
        [
            (self.pod("a1"), SocketAddr::new(self.service.ip(family), port)),
            (self.pod("c1"), SocketAddr::new(self.node("a", family), node_port)),
        ]
    }
}

fn node(cluster: &Cluster, name: &str, family: Family) -> IpAddr {
    let node = cluster.node(name);
    match family {
        Family::V4 => node.v4.into(),
        Family::V6 => node.v6.into(),
    }
}

/// Node a sends to the pods of b and c through r, which is a narrow way.
fn narrow(cluster: &Cluster) -> Result<()> {
    let router = &cluster.node("r").netns;
    for name in ["all", "eth0"] {
        router.sysctl(&format!("ipv4/conf/{name}/send_redirects"), "0")?;
    }
    for family in Family::BOTH {
        for to in ["b", "c"] {
            let pods: Prefix = match family {
                Family::V4 => cluster.node(to).pod_cidr_v4(),
                Family::V6 => cluster.node(to).pod_cidr_v6(),
            };
            let (via_router, via_node) = (node(cluster, "r", family), node(cluster, to, family));
            let route = move |via| Route { to: pods, via: Some(via), dev: "eth0" };
            cluster.node("a").netns.run(move |inside| inside.replace_route(route(via_router), None))??;
            router.run(move |inside| inside.replace_route(route(via_node), Some(NARROW)))??;
        }
    }
    Ok(())
}

/// Node a has ways to the pods of b and c that are narrow at their beginning.
fn narrow_at_the_node(cluster: &Cluster) -> Result<()> {
    for family in Family::BOTH {
        for to in ["b", "c"] {
            let pods: Prefix = match family {
                Family::V4 => cluster.node(to).pod_cidr_v4(),
                Family::V6 => cluster.node(to).pod_cidr_v6(),
            };
            let route = Route { to: pods, via: Some(node(cluster, to, family)), dev: "eth0" };
            cluster.node("a").netns.run(move |inside| inside.replace_route(route, Some(NARROW)))??;
        }
    }
    Ok(())
}

/// What is masqueraded goes past the stack, which would have said so (before: it was lost, or too long on the wire).
fn a_narrow_way_of_the_node_itself_is_told(sandbox: &Sandbox) -> Result<()> {
    World::test_on(sandbox, "b1", narrow_at_the_node, |world| {
        echo(world.pod("b1"))?;
        for family in Family::BOTH {
            let [_, (client, datagrams)] = world.targets(family, (DATAGRAMS.0, DATAGRAMS.1));
            let socket = connected(&client.netns, 0, datagrams)?;
            // One that fits and one that does not, whose sender is told and cuts the next.
            for length in [1_000, 1_440] {
                answered(&socket, &payload(length)).with_context(|| format!("{datagrams}, {length}"))?;
            }
            let [_, (_, stream)] = world.targets(family, (ECHO_SERVICE_PORT, ECHO_NODE_PORT));
            let echoed = client.stream(stream)?;
            echoed.wait_until(PATIENCE * 2, |progress| {
                progress.last().is_some_and(|progress| progress.verified > 2_000_000)
            })?;
            echoed.stop()?;
            let to = world.node("a", family);
            for end in [client, world.pod("b1")] {
                let learned = end.netns.run(move |inside| inside.path_mtu(to))??;
                ensure!(learned == Some(NARROW), "{} to {to}: {learned:?}", end.name);
            }
        }
        Ok(())
    })
}

/// Segments of full length go out with "don't fragment"; each end finds out what its way takes.
fn a_narrow_link_is_found_through_a_service(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, "b1", |world| {
        for family in Family::BOTH {
            for (client, target) in world.targets(family, (ECHO_SERVICE_PORT, ECHO_NODE_PORT)) {
                let stream = client.stream(target)?;
                stream.wait_until(PATIENCE * 2, |progress| {
                    progress.last().is_some_and(|progress| progress.verified > 2_000_000)
                })?;
                stream.stop()?;
                let to = target.ip();
                let learned = client.netns.run(move |inside| inside.path_mtu(to))??;
                ensure!(learned == Some(NARROW), "{} to {to}: {learned:?}", client.name);
            }
            // What came back to the client from outside went the narrow way too: the backend was told, of the node.
            let to = world.node("a", family);
            let learned = world.pod("b1").netns.run(move |inside| inside.path_mtu(to))??;
            ensure!(learned == Some(NARROW), "b1 to {to}: {learned:?}");
        }
        Ok(())
    })
}

/// A UDP socket in the namespace, connected.
fn connected(netns: &Netns, from: u16, to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
    let socket = netns.run(move |_| UdpSocket::bind((any, from)))?.context("bind")?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// What the kernel reports of the datagrams that were sent.
fn reported(socket: &UdpSocket) -> Result<ErrorKind> {
    match socket.recv(&mut [0; 16]) {
        Ok(length) => bail!("{length} bytes came"),
        Err(error) => Ok(error.kind()),
    }
}

fn a_closed_port_is_refused_through_a_service(sandbox: &Sandbox) -> Result<()> {
    for backend in ["a1", "b1"] {
        World::test(sandbox, backend, |world| {
            for family in Family::BOTH {
                for (client, target) in world.targets(family, (CLOSED.0, CLOSED.1)) {
                    let socket = connected(&client.netns, 0, target)?;
                    socket.send(b"anyone?")?;
                    let kind = reported(&socket)?;
                    ensure!(
                        kind == ErrorKind::ConnectionRefused,
                        "{} to {target} ({backend}): {kind}",
                        client.name
                    );
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// As traceroute does it: node a is the first hop, router r the second.
fn a_hop_too_far_is_told_through_a_service(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, "b1", |world| {
        for family in Family::BOTH {
            for (client, target) in world.targets(family, (DATAGRAMS.0, DATAGRAMS.1)) {
                // A masqueraded packet is sent on past the stack, which is what counts hops.
                let hops = if client.name == "a1" { 1..=2 } else { 2..=2 };
                for hops in hops {
                    let socket = connected(&client.netns, 0, target)?;
                    match family {
                        Family::V4 => {
                            socket.set_ttl(hops)?;
                            setsockopt(&socket, Ipv4RecvErr, &true)?;
                        }
                        Family::V6 => {
                            setsockopt(&socket, Ipv6Ttl, &i32::try_from(hops)?)?;
                            setsockopt(&socket, Ipv6RecvErr, &true)?;
                        }
                    }
                    socket.send(b"how far?")?;
                    let kind = reported(&socket)?;
                    ensure!(
                        kind == ErrorKind::HostUnreachable,
                        "{} to {target}, {hops} hops: {kind}",
                        client.name
                    );
                }
            }
        }
        Ok(())
    })
}

/// Sends every datagram back, until the socket is idle for long.
fn echo(pod: &Pod) -> Result<()> {
    let server = pod.netns.run(|_| UdpSocket::bind(("::", DATAGRAMS.2)))?.context("bind the echo")?;
    server.set_read_timeout(Some(PATIENCE * 3))?;
    thread::spawn(move || {
        let mut datagram = vec![0; 65_536];
        while let Ok((length, client)) = server.recv_from(&mut datagram) {
            let _unreachable = server.send_to(&datagram[..length], client);
        }
    });
    Ok(())
}

/// A payload in which a fragment out of place shows.
fn payload(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index ^ (index >> 8)) as u8).collect()
}

fn large_datagrams_are_served(sandbox: &Sandbox) -> Result<()> {
    for backend in ["a1", "b1"] {
        World::test(sandbox, backend, |world| {
            echo(world.pod(backend))?;
            for family in Family::BOTH {
                for (client, target) in world.targets(family, (DATAGRAMS.0, DATAGRAMS.1)) {
                    let socket = connected(&client.netns, 0, target)?;
                    for length in [4_000, 1_480, 20_000, 65_000] {
                        answered(&socket, &payload(length))
                            .with_context(|| format!("{} to {target} ({backend}), {length}", client.name))?;
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Sends the datagram until it comes back: the first ones of an IPv6 sender that does not know the way's narrowness yet
/// are lost, as they are without a service.
fn answered(socket: &UdpSocket, datagram: &[u8]) -> Result<()> {
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let deadline = Instant::now() + PATIENCE;
    let mut back = vec![0; 65_536];
    loop {
        // Longer than what is known to fit: the kernel says so once.
        let sent = socket.send(datagram);
        match sent.and_then(|_| socket.recv(&mut back)) {
            Ok(length) => {
                ensure!(back[..length] == *datagram, "{length} other bytes came back");
                return Ok(());
            }
            Err(error) => ensure!(Instant::now() < deadline, "no answer: {error}"),
        }
    }
}

fn fragments_in_reverse_order_are_served(sandbox: &Sandbox) -> Result<()> {
    for backend in ["a1", "b1"] {
        World::test(sandbox, backend, |world| {
            let server = world.pod(backend);
            for family in Family::BOTH {
                for (from, (client, target)) in
                    (40_000..).zip(world.targets(family, (DATAGRAMS.0, DATAGRAMS.1)))
                {
                    let serve =
                        server.netns.run(|_| UdpSocket::bind(("::", DATAGRAMS.2)))?.context("bind")?;
                    serve.set_read_timeout(Some(PATIENCE))?;
                    let socket = connected(&client.netns, from, target)?;
                    let source = (client.ip(family).into(), from);
                    let query = Frame::udp(source, (target.ip().into(), target.port()));
                    let query = Frame { id: 77, ..query.payload(&payload(3_000)) };
                    let raw = Raw::new(&client.netns, family)?;
                    let what = || format!("{} to {target} ({backend})", client.name);
                    for part in query.fragments(800).iter().rev() {
                        raw.send(part)?;
                    }
                    let mut datagram = [0; 4_000];
                    let (length, seen) = serve.recv_from(&mut datagram).with_context(what)?;
                    ensure!(datagram[..length] == payload(3_000), "{}: {length} bytes", what());
                    let seen = SocketAddr::new(seen.ip().to_canonical(), seen.port());
                    // And the answer, from the server's own address to the client as it knows it.
                    let own = (server.ip(family).into(), DATAGRAMS.2);
                    let answer = Frame::udp(own, (seen.ip().into(), seen.port())).payload(&payload(2_500));
                    let raw = Raw::new(&server.netns, family)?;
                    for part in (Frame { id: 78, ..answer }).fragments(800).iter().rev() {
                        raw.send(part)?;
                    }
                    let length = socket.recv(&mut datagram).with_context(what)?;
                    ensure!(datagram[..length] == payload(2_500), "{}: answer of {length} bytes", what());
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A server that sends a segment outside of its window: the client must see it as one of its connection, and ignore it.
/// As one of a stranger it would reset the server's.
fn a_segment_out_of_place_resets_nothing(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, "b1", |world| {
        let (client, server) = (world.pod("a1"), world.pod("b1"));
        for family in Family::BOTH {
            let target = SocketAddr::new(world.service.ip(family), ECHO_SERVICE_PORT);
            let mut stream = client.netns.run(move |_| TcpStream::connect(target))?.context("connect")?;
            stream.set_read_timeout(Some(PATIENCE))?;
            echoed(&mut stream)?;
            let to = (client.ip(family).into(), stream.local_addr()?.port());
            let raw = Raw::new(&server.netns, family)?;
            let segment = |port| {
                let frame = Frame::tcp((server.ip(family).into(), port), to, Flags::ACK).payload(b"boom");
                // Numbers that no window has by chance but once in many thousand runs.
                let transport =
                    Transport::Tcp { seq: 0x6000_0000, ack: 0x6000_0000, flags: Flags::ACK, options: vec![] };
                Frame { transport, ..frame }
            };
            let before = [resets(client)?, resets(server)?];
            for _ in 0..5 {
                raw.send(&segment(ECHO_PORT))?;
                echoed(&mut stream)?;
            }
            let after = [resets(client)?, resets(server)?];
            ensure!(
                after == before,
                "{target}: resets sent by client and server: {before:?}, then {after:?}"
            );
            // The same of a flow that is none is a stranger's, which shows that it would have been seen.
            raw.send(&segment(ECHO_PORT + 1))?;
            let deadline = Instant::now() + PATIENCE;
            while resets(client)? == after[0] {
                ensure!(Instant::now() < deadline, "{target}: the client never saw the stranger");
                thread::sleep(Duration::from_millis(10));
            }
            echoed(&mut stream)?;
        }
        Ok(())
    })
}

fn echoed(stream: &mut TcpStream) -> Result<()> {
    let mut back = [0; 4];
    stream.write_all(b"ping")?;
    stream.read_exact(&mut back).context("no echo")?;
    ensure!(&back == b"ping", "{back:?}");
    Ok(())
}

/// How many resets the pod has sent.
fn resets(pod: &Pod) -> Result<u64> {
    let table = pod.netns.proc_net("snmp")?;
    let mut lines = table.lines().filter(|line| line.starts_with("Tcp:")).map(str::split_whitespace);
    let (names, values) = (lines.next().context("no names")?, lines.next().context("no values")?);
    let (_, value) = names.zip(values).find(|(name, _)| *name == "OutRsts").context("no OutRsts")?;
    Ok(value.parse()?)
}
