//! What upstream's sig-network specs do on the wire, spec by spec, on nodes with the chart's own settings: who asks, at
//! which address, from which port, and what upstream expects of it. The table in README.md says which spec is where.
#![forbid(unsafe_code)]

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_tests::{
    checks::{self, tally},
    cluster::Family,
    installed::{
        Expect::{self, Each, Fails, Refused},
        From::{self, Host, Pod},
        Installed, SOON,
    },
    manifests::{Port, Service, State},
    netns::Netns,
    patience::stretched,
    pod::{DNS_PORT, HTTP_PORT, Outcome},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};
use serde_json::json;

fn main() -> ExitCode {
    runner::main(&[
        ("e2e_pods_hosts_and_endpoints_reach_a_service_by_every_address", every_address),
        ("e2e_endpoints_of_the_host_network_serve", host_network_endpoints),
        ("e2e_large_requests_are_answered", large_requests),
        ("e2e_rule_33_a_client_with_one_udp_port_follows_server_pods", one_udp_port),
        ("e2e_rule_33_a_client_with_one_udp_port_follows_a_local_server_pod", one_udp_port_locally),
        ("e2e_rule_31_a_client_with_one_udp_port_follows_a_target_port", a_target_port_changes),
        ("e2e_rules_2_15_and_40_terminating_endpoints_serve_and_fail_health_checks", terminating_endpoints),
        ("e2e_rules_16_17_and_40_the_external_policy_changes", the_external_policy_changes),
        ("e2e_rule_19_ports_and_types_of_a_service_change", ports_and_types_change),
        ("e2e_an_external_address_that_no_node_has", an_external_address),
        ("e2e_rules_16_and_22_pods_reach_a_load_balancer_within_its_source_ranges", source_ranges),
        ("e2e_the_kernel_follows_a_host_port_to_close_wait", the_kernel_follows_to_close_wait),
        ("e2e_the_urls_of_kube_proxy_answer_on_the_host", the_urls_of_kube_proxy),
    ])
}

const HTTP_NODE_PORT: u16 = 30_080;
const UDP_NODE_PORT: u16 = 30_053;
const NODE_PORTS: &[(u16, u16)] = &[(80, HTTP_NODE_PORT), (53, UDP_NODE_PORT)];
const PROTOCOLS: [Protocol; 3] = [Protocol::Http, Protocol::Dns, Protocol::DnsUnconnected];
/// Upstream's clients of one source port.
const SOURCE_PORT: u16 = 12_345;
const READY: State = State::Ready;

fn web(more: &str) -> Service {
    Service { more: more.to_owned(), ..checks::service("web", 10) }
}

/// Of the service, and the NodePorts of both nodes.
fn addresses(it: &Installed, web: &Service, protocol: Protocol, family: Family) -> [SocketAddr; 3] {
    let node_port = if protocol == Protocol::Http { HTTP_NODE_PORT } else { UDP_NODE_PORT };
    let [a, b] = ["a", "b"].map(|name| SocketAddr::new(it.node(name, family), node_port));
    [checks::target(web, protocol, family), a, b]
}

/// A socket that is not connected is not told of a refusal.
fn refused(protocol: Protocol) -> Expect<'static> {
    if protocol == Protocol::DnsUnconnected { Fails } else { Refused }
}

/// Every protocol over every family.
fn ways() -> impl Iterator<Item = (Family, Protocol)> {
    Family::BOTH.into_iter().flat_map(|family| PROTOCOLS.map(|protocol| (family, protocol)))
}

/// "Granular Checks: Services": pod-Service, node-Service, endpoint-Service, basic nodePort; "preserve source pod IP".
fn every_address(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let web = web("");
        it.serve(&web, &web.exposed("NodePort", NODE_PORTS), &[("a2", READY), ("b2", READY)])?;
        for (family, protocol) in ways() {
            let [cluster_ip, at_a, at_b] = addresses(it, &web, protocol, family);
            for from in [Pod("a1"), Pod("b1"), Pod("a2"), Host("a"), Host("b")] {
                for target in [cluster_ip, at_a, at_b] {
                    it.becomes(from, protocol, target, Each(&["a2", "b2"]))?;
                }
            }
            for target in [at_a, at_b] {
                it.becomes(Host("c"), protocol, target, Each(&["a2", "b2"]))?;
            }
            for name in ["a1", "b1"] {
                let client = it.cluster.pod(name);
                let outcomes = client.ask(&Ask::new(protocol, cluster_ip).count(20).strict())?;
                tally(&outcomes, cluster_ip, client.ip(family))
                    .with_context(|| format!("{name}, {protocol}"))?;
            }
        }
        Ok(())
    })
}

/// "should function for service endpoints using hostNetwork", "internalTrafficPolicy=Local Pod and Node, to Pod
/// (hostNetwork: true)".
fn host_network_endpoints(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let open = web("");
        let _servers = [it.cluster.node("a").serve("host-a")?, it.cluster.node("b").serve("host-b")?];
        it.serve(&open, &open.exposed("NodePort", NODE_PORTS), &[])?;
        it.host_endpoints(&open, &["a1", "b1"])?;
        for (family, protocol) in ways() {
            let [cluster_ip, at_a, at_b] = addresses(it, &open, protocol, family);
            for from in [Pod("a1"), Pod("b2"), Host("a"), Host("b")] {
                for target in [cluster_ip, at_a, at_b] {
                    it.becomes(from, protocol, target, Each(&["host-a", "host-b"]))?;
                }
            }
            it.becomes(Host("c"), protocol, at_a, Each(&["host-a", "host-b"]))?;
        }
        let local = web("  internalTrafficPolicy: Local\n");
        it.cluster.manifests().write("service-web", &local.yaml())?;
        it.host_endpoints(&local, &["a1"])?;
        for (family, protocol) in ways() {
            let cluster_ip = checks::target(&local, protocol, family);
            for from in [Pod("a1"), Host("a")] {
                it.becomes(from, protocol, cluster_ip, Each(&["host-a"]))?;
            }
            for from in [Pod("b1"), Host("b")] {
                it.becomes(from, protocol, cluster_ip, Fails)?;
            }
        }
        Ok(())
    })
}

const ECHO: (u16, u16) = (99, 9_099);

/// Sends every datagram back, with the number of its port in place of the first two bytes; until it is idle for long.
fn echo(netns: &Netns, port: u16) -> Result<()> {
    let server = netns.run(move |_| UdpSocket::bind(("::", port)))?.context("bind the echo")?;
    server.set_read_timeout(Some(stretched(SOON)))?;
    thread::spawn(move || {
        let mut datagram = vec![0; 65_536];
        while let Ok((length, client)) = server.recv_from(&mut datagram) {
            datagram[..2].copy_from_slice(&port.to_be_bytes());
            let _unreachable = server.send_to(&datagram[..length], client);
        }
    });
    Ok(())
}

/// From which port of the server an answer of this length comes.
fn echoed(netns: &Netns, source_port: u16, target: SocketAddr, length: usize) -> Result<u16> {
    let any: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = netns
        .run(move |_| UdpSocket::bind((any, source_port)).and_then(|it| it.connect(target).map(|()| it)))??;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let sent: Vec<u8> = (0..length).map(|index| (index ^ (index >> 8)) as u8).collect();
    let mut back = vec![0; length + 1];
    socket.send(&sent)?;
    let received = socket.recv(&mut back)?;
    ensure!(received == length && back[2..length] == sent[2..], "{received} other bytes came back");
    Ok(u16::from_be_bytes([back[0], back[1]]))
}

fn becomes_echoed(netns: &Netns, source_port: u16, target: SocketAddr, length: usize, by: u16) -> Result<()> {
    let deadline = Instant::now() + stretched(SOON);
    loop {
        match echoed(netns, source_port, target, length) {
            Ok(port) if port == by => return Ok(()),
            other if Instant::now() > deadline => {
                return other.and_then(|port| Err(anyhow!("port {port} answers"))).with_context(|| {
                    format!("{length} bytes to {target}, from port {source_port}, for port {by}")
                });
            }
            Ok(_) | Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// "should be able to handle large requests: udp", also of endpoints that are hosts: twice what the tunnel carries.
fn large_requests(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let mut web = web("");
        web.ports.push(Port { name: "echo-udp".into(), protocol: "UDP", port: ECHO.0, target: ECHO.1 });
        let yaml = web.exposed("NodePort", &[(ECHO.0, 30_099)]);
        echo(&it.cluster.pod("b2").netns, ECHO.1)?;
        echo(&it.cluster.node("b").netns, ECHO.1)?;
        it.serve(&web, &yaml, &[("b2", READY)])?;
        let clients = |it: &Installed| -> Result<()> {
            for family in Family::BOTH {
                let at = |addr| [SocketAddr::new(addr, ECHO.0), SocketAddr::new(addr, 30_099)];
                let [cluster_ip, _] = at(web.ip(family));
                let [_, node_port] = at(it.node("b", family));
                let pod = SocketAddr::new(it.cluster.pod("b2").ip(family), ECHO.1);
                for (client, target) in
                    [("a1", pod), ("a1", cluster_ip), ("b1", cluster_ip), ("a1", node_port)]
                {
                    for length in [1_000, 2_000, 20_000] {
                        let netns = &it.cluster.pod(client).netns;
                        becomes_echoed(netns, 0, target, length, ECHO.1)
                            .with_context(|| client.to_owned())?;
                    }
                }
            }
            Ok(())
        };
        clients(it)?;
        it.host_endpoints(&web, &["b2"])?;
        clients(it).context("the endpoint is a host")
    })
}

/// A client that asks from one port, each time from a new socket, as `nc -u -p 12345` in a loop.
fn from_one_port(protocol: Protocol, target: SocketAddr) -> Ask {
    Ask::new(protocol, target)
        .source_port(SOURCE_PORT)
        .interval(Duration::from_millis(50))
        .timeout(Duration::from_millis(500))
}

fn answered_by(name: &'static str) -> impl Fn(&[Outcome]) -> bool {
    move |outcomes| outcomes.iter().filter_map(Outcome::answer).any(|it| it.by == name)
}

/// "preserve UDP traffic when server pod cycles for a ClusterIP service", ".. and client is hostNetwork", ".. for a
/// NodePort service", and "when initial unready endpoints get ready": the client comes first, and is refused.
fn one_udp_port(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let web = web("");
        let yaml = web.exposed("NodePort", NODE_PORTS);
        for family in Family::BOTH {
            it.serve(&web, &yaml, &[])?;
            let [cluster_ip, _, at_b] = addresses(it, &web, Protocol::Dns, family);
            let mut clients = Vec::new();
            for (from, target) in
                [(Pod("a1"), cluster_ip), (Pod("a2"), at_b), (Host("a"), cluster_ip), (Host("c"), at_b)]
            {
                let client = it.keep_asking(from, &from_one_port(Protocol::Dns, target))?;
                client.wait(SOON, |seen| seen.len() > 3)?;
                clients.push((from, target, client));
            }
            it.endpoints(&web, &[("b1", State::Unready)])?;
            thread::sleep(Duration::from_secs(1));
            for (endpoints, by) in [
                (&[("b1", READY)][..], "b1"),
                // Rule 31: it stays where it is served.
                (&[("b1", State::Terminating), ("b2", READY)], "b1"),
                (&[("b2", READY)], "b2"),
            ] {
                it.endpoints(&web, endpoints)?;
                for (from, target, client) in &clients {
                    let all = client.wait(SOON, answered_by(by));
                    all.with_context(|| format!("{from} to {target} is not answered by {by}"))?;
                }
            }
            for (.., client) in clients {
                client.stop()?;
            }
        }
        Ok(())
    })
}

/// ".. with InternalTrafficPolicy set to Local": while the only endpoint is another node's, nobody answers.
fn one_udp_port_locally(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let web = web("  internalTrafficPolicy: Local\n");
        it.attach("a3", json!({}))?;
        for (family, from) in
            Family::BOTH.into_iter().flat_map(|family| [(family, Pod("a1")), (family, Host("a"))])
        {
            it.serve(&web, &web.yaml(), &[])?;
            let target = checks::target(&web, Protocol::Dns, family);
            let client = it.keep_asking(from, &from_one_port(Protocol::Dns, target))?;
            client.wait(SOON, |seen| seen.len() > 3)?;
            let what = |by: &str| format!("{from} to {target} is not answered by {by}");
            it.endpoints(&web, &[("a2", READY)])?;
            client.wait(SOON, answered_by("a2")).with_context(|| what("a2"))?;
            it.endpoints(&web, &[("a2", READY), ("b1", READY)])?;
            it.endpoints(&web, &[("b1", READY)])?;
            let before = client.count();
            client.wait(SOON, |seen| {
                seen.len() > before + 5 && seen.last().is_some_and(|it| it.answer().is_none())
            })?;
            it.endpoints(&web, &[("a3", READY), ("b1", READY)])?;
            client.wait(SOON, answered_by("a3")).with_context(|| what("a3"))?;
            ensure!(
                !answered_by("b1")(&client.seen()),
                "{from} to {target}: answered by another node's endpoint"
            );
            client.stop()?;
        }
        Ok(())
    })
}

/// "cleanup conntrack entries when UDP service target port changes for a NodePort service".
fn a_target_port_changes(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let mut web = web("");
        web.ports = vec![Port { name: "echo-udp".into(), protocol: "UDP", port: ECHO.0, target: ECHO.1 }];
        for port in [ECHO.1, ECHO.1 + 1] {
            echo(&it.cluster.pod("b2").netns, port)?;
        }
        let node_port = 30_099;
        for family in Family::BOTH {
            for target in [ECHO.1, ECHO.1 + 1, ECHO.1] {
                web.ports[0].target = target;
                it.serve(&web, &web.exposed("NodePort", &[(ECHO.0, node_port)]), &[("b2", READY)])?;
                for (client, to) in [
                    ("a1", SocketAddr::new(it.node("b", family), node_port)),
                    ("a2", SocketAddr::new(it.node("a", family), node_port)),
                    ("b1", SocketAddr::new(web.ip(family), ECHO.0)),
                ] {
                    let netns = &it.cluster.pod(client).netns;
                    becomes_echoed(netns, SOURCE_PORT, to, 100, target).with_context(|| client.to_owned())?;
                }
            }
        }
        Ok(())
    })
}

const CHECK_PORT: u16 = 31_040;

/// The status of an answer over HTTP, as the pod gets it, and what comes with it.
fn status(netns: &Netns, to: SocketAddr, path: &str) -> Result<(u16, String)> {
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nuser-agent: curl/8\r\naccept: */*\r\n\r\n");
    netns.run(move |_| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(request.as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let code = text.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
        Ok((code, text))
    })?
}

fn becomes_status(it: &Installed, from: &str, to: SocketAddr, wanted: Option<u16>) -> Result<()> {
    let deadline = Instant::now() + stretched(SOON);
    loop {
        let answer = status(&it.cluster.pod(from).netns, to, "/healthz");
        if answer.as_ref().ok().map(|(code, _)| *code) == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{to} answers {answer:?} to {from}, not {wanted:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// "fallback to terminating endpoints .." of the four policies, "fail health check node port if there are only terminating
/// endpoints", "not be able to connect to terminating and unready endpoints".
fn terminating_endpoints(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let ask = |it: &Installed, web: &Service, from, expect| -> Result<()> {
            ways().try_for_each(|(family, protocol)| {
                it.becomes(from, protocol, checks::target(web, protocol, family), expect)
            })
        };
        let ask_port = |it: &Installed, from, node, expect| -> Result<()> {
            Family::BOTH.into_iter().try_for_each(|family| {
                let target = SocketAddr::new(it.node(node, family), HTTP_NODE_PORT);
                it.becomes(from, Protocol::Http, target, expect)
            })
        };
        let checks = |it: &Installed, wanted| -> Result<()> {
            Family::BOTH.into_iter().try_for_each(|family| {
                becomes_status(it, "a1", SocketAddr::new(it.node("a", family), CHECK_PORT), wanted)
            })
        };
        let local = web(&format!(
            "  internalTrafficPolicy: Local\n  externalTrafficPolicy: Local\n  healthCheckNodePort: {CHECK_PORT}\n"
        ));
        it.serve(&local, &local.exposed("LoadBalancer", NODE_PORTS), &[("a2", READY)])?;
        checks(it, Some(200))?;
        it.endpoints(&local, &[("a2", State::Terminating)])?;
        checks(it, Some(503))?;
        for from in [Pod("a1"), Pod("b1"), Host("c")] {
            ask_port(it, from, "a", Each(&["a2"]))?;
        }
        ask_port(it, Pod("a1"), "b", Fails)?;
        for (from, expect) in
            [(Pod("a1"), Each(&["a2"])), (Host("a"), Each(&["a2"])), (Pod("b1"), Fails), (Host("b"), Fails)]
        {
            ask(it, &local, from, expect)?;
        }
        let cluster = web("");
        it.serve(&cluster, &cluster.exposed("NodePort", NODE_PORTS), &[("a2", State::Terminating)])?;
        checks(it, None)?;
        for from in [Pod("a1"), Pod("b1"), Host("b")] {
            ask(it, &cluster, from, Each(&["a2"]))?;
            ask_port(it, from, "a", Each(&["a2"]))?;
            ask_port(it, from, "b", Each(&["a2"]))?;
        }
        it.endpoints(&cluster, &[("a2", State::Unready)])?;
        for from in [Pod("a1"), Pod("b1")] {
            for (family, protocol) in ways() {
                let target = checks::target(&cluster, protocol, family);
                it.becomes(from, protocol, target, refused(protocol))?;
            }
            ask_port(it, from, "a", Refused)?;
            ask_port(it, from, "b", Refused)?;
        }
        Ok(())
    })
}

/// "implement NodePort and HealthCheckNodePort correctly when ExternalTrafficPolicy changes", "support
/// externalTrafficPolicy=Local for type=NodePort": pods of both nodes keep their address at the node with the endpoint.
fn the_external_policy_changes(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let local = web(&format!("  externalTrafficPolicy: Local\n  healthCheckNodePort: {CHECK_PORT}\n"));
        let open = web("");
        let at = |it: &Installed, node, family, port| SocketAddr::new(it.node(node, family), port);
        for service in [&local, &open, &local] {
            let is_local = !service.more.is_empty();
            it.serve(service, &service.exposed("LoadBalancer", NODE_PORTS), &[("a2", READY)])?;
            for family in Family::BOTH {
                for (node, code) in [("a", 200), ("b", 503)] {
                    for from in ["a1", "b1"] {
                        let wanted = is_local.then_some(code);
                        becomes_status(it, from, at(it, node, family, CHECK_PORT), wanted)?;
                    }
                }
                let (at_a, at_b) = (at(it, "a", family, HTTP_NODE_PORT), at(it, "b", family, HTTP_NODE_PORT));
                let elsewhere = if is_local { Fails } else { Each(&["a2"]) };
                for from in [Pod("a1"), Host("a"), Host("c")] {
                    it.becomes(from, Protocol::Http, at_a, Each(&["a2"]))?;
                    it.becomes(from, Protocol::Http, at_b, elsewhere)?;
                }
                if !is_local {
                    continue;
                }
                for from in [Pod("a1"), Pod("b1"), Host("b"), Host("c")] {
                    let outcomes = it.ask(from, &Ask::http(at_a).count(5).strict())?;
                    tally(&outcomes, at_a, address(it, from, family)).with_context(|| from.to_string())?;
                }
            }
        }
        Ok(())
    })
}

fn address(it: &Installed, from: From, family: Family) -> IpAddr {
    match from {
        Pod(name) => it.cluster.pod(name).ip(family),
        Host(name) => it.node(name, family),
    }
}

/// "serve endpoints on same port and different protocols", "be updated after adding or deleting ports", "change the type
/// from .. to ..", "work after the service has been recreated", "be rejected when no endpoints exist".
fn ports_and_types_change(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let port = |name: &str, protocol, target| Port { name: name.into(), protocol, port: 80, target };
        let (tcp, udp) = (port("tcp-port", "TCP", HTTP_PORT), port("udp-port", "UDP", DNS_PORT));
        for (ports, over_tcp, over_udp) in [
            (vec![tcp.clone(), udp.clone()], true, true),
            (vec![tcp.clone()], true, false),
            (vec![udp], false, true),
        ] {
            let web = Service { ports, ..web("") };
            it.serve(&web, &web.yaml(), &[("b2", READY)])?;
            for family in Family::BOTH {
                let target = SocketAddr::new(web.ip(family), 80);
                let served = |is: bool| if is { Each(&["b2"]) } else { Refused };
                for from in [Pod("a1"), Pod("b1")] {
                    it.becomes(from, Protocol::Http, target, served(over_tcp))?;
                    it.becomes(from, Protocol::Dns, target, served(over_udp))?;
                }
            }
        }
        let web = web("");
        let external = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\n\
                        spec: {type: ExternalName, externalName: example.com}\n";
        let ask = |it: &Installed, expect| -> Result<()> {
            for (from, (family, protocol)) in
                [Pod("a1"), Host("b")].into_iter().flat_map(|from| ways().map(move |way| (from, way)))
            {
                it.becomes(from, protocol, checks::target(&web, protocol, family), expect)?;
            }
            Ok(())
        };
        for yaml in [web.yaml(), web.exposed("NodePort", NODE_PORTS)] {
            it.serve(&web, &yaml, &[("a2", READY), ("b2", READY)])?;
            ask(it, Each(&["a2", "b2"]))?;
            it.serve(&web, external, &[])?;
            ask(it, Fails)?;
        }
        it.serve(&web, &web.yaml(), &[("b2", READY)])?;
        ask(it, Each(&["b2"]))?;
        it.cluster.manifests().remove("service-web")?;
        ask(it, Fails)?;
        it.serve(&web, &web.yaml(), &[("b2", READY)])?;
        ask(it, Each(&["b2"]))?;
        it.endpoints(&web, &[])?;
        for from in [Pod("a1"), Pod("b1")] {
            ways().try_for_each(|(family, protocol)| {
                it.becomes(from, protocol, checks::target(&web, protocol, family), refused(protocol))
            })?;
        }
        Ok(())
    })
}

/// "connect to a service via ExternalIP when the external IP is not assigned to a node".
fn an_external_address(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let (v4, v6) = ("203.0.113.250", "2001:db8::cb00:71fa");
        let web = web(&format!("  externalIPs: [\"{v4}\", \"{v6}\"]\n"));
        it.serve(&web, &web.yaml(), &[("a2", READY), ("b2", READY)])?;
        for addr in [v4, v6] {
            let target = SocketAddr::new(addr.parse()?, 80);
            for from in [Pod("a1"), Pod("b1"), Host("a")] {
                it.becomes(from, Protocol::Http, target, Each(&["a2", "b2"]))?;
            }
        }
        Ok(())
    })
}

/// "only allow access from service loadbalancer source ranges", which upstream asks from pods, and "LoadBalancers
/// ExternalTrafficPolicy: Local should work from pods": the pod is seen by its own address.
fn source_ranges(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let balancer: IpAddr = "192.0.2.80".parse()?;
        let status = format!("status:\n  loadBalancer:\n    ingress:\n    - ip: \"{balancer}\"\n");
        let target = SocketAddr::new(balancer, 80);
        for policy in ["Cluster", "Local"] {
            for allowed in [&["a1"][..], &["b1"], &["a1", "b1"]] {
                let ranges: Vec<_> =
                    allowed.iter().map(|name| format!("{}/32", it.cluster.pod(name).v4)).collect();
                let ranges =
                    if allowed.len() == 1 { format!("[\"{}\"]", ranges.join(", ")) } else { "[]".into() };
                let web = web(&format!(
                    "  externalTrafficPolicy: {policy}\n  loadBalancerSourceRanges: {ranges}\n"
                ));
                let yaml = web.exposed("LoadBalancer", NODE_PORTS) + &status;
                it.serve(&web, &yaml, &[("a2", READY), ("b2", READY)])?;
                for name in ["a1", "b1"] {
                    let expect = if allowed.contains(&name) { Each(&["a2", "b2"]) } else { Fails };
                    it.becomes(Pod(name), Protocol::Http, target, expect)
                        .with_context(|| format!("{policy}, {ranges}"))?;
                }
            }
            let client = it.cluster.pod("a1");
            tally(&client.ask(&Ask::http(target).count(10).strict())?, target, client.v4.into())?;
        }
        Ok(())
    })
}

/// "should set TCP CLOSE_WAIT timeout": a pod's connection to a hostPort of another node, of which the server has closed
/// its half, is in the connection tracking of the client's node for an hour.
fn the_kernel_follows_to_close_wait(sandbox: &Sandbox) -> Result<()> {
    const PORT: u16 = 11_302;
    Installed::test(sandbox, |it| {
        let mapping = json!({ "hostPort": PORT, "containerPort": PORT, "protocol": "tcp" });
        it.attach("b3", json!({ "runtimeConfig": { "portMappings": [mapping] } }))?;
        let server = it.cluster.pod("b3").netns.run(|_| TcpListener::bind(("::", PORT)))??;
        let target = SocketAddr::new(it.node("b", Family::V4), PORT);
        let node = it.cluster.node("a");
        let client = it
            .cluster
            .pod("a1")
            .netns
            .run(move |_| TcpStream::connect_timeout(&target, Duration::from_secs(20)))??;
        let (closed, _) = server.accept()?;
        closed.shutdown(Shutdown::Write)?;
        let deadline = Instant::now() + stretched(SOON);
        loop {
            let table = node.netns.proc_net("nf_conntrack")?;
            let found =
                table.lines().find(|line| line.contains("CLOSE_WAIT") && line.contains("dport=11302"));
            // ipv4 2 tcp 6 3599 CLOSE_WAIT src=..
            let seconds = found.and_then(|line| line.split_whitespace().nth(4)?.parse::<u64>().ok());
            if seconds.is_some_and(|seconds| (3_541..=3_600).contains(&seconds)) {
                break;
            }
            ensure!(Instant::now() < deadline, "node a tracks {seconds:?}:\n{table}");
            thread::sleep(Duration::from_millis(200));
        }
        drop(client);
        Ok(())
    })
}

/// "should check kube-proxy urls", asked as curl asks for `localhost`.
fn the_urls_of_kube_proxy(sandbox: &Sandbox) -> Result<()> {
    Installed::test(sandbox, |it| {
        let node = it.cluster.node("a");
        let get = |port, path| {
            let at = |ip: IpAddr| status(&node.netns, SocketAddr::new(ip, port), path);
            at(Ipv6Addr::LOCALHOST.into()).or_else(|_| at(Ipv4Addr::LOCALHOST.into()))
        };
        let (_, health) = get(10_256, "/healthz")?;
        ensure!(health.starts_with("HTTP/1.1 200 OK") && health.contains("lastUpdated"), "{health}");
        let (mode, text) = get(10_249, "/proxyMode")?;
        ensure!(mode == 200, "{text}");
        Ok(())
    })
}
