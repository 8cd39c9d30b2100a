//! Pods and a world that knows no pod.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr, UdpSocket},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    checks::{World, tally},
    cluster::Family,
    netns::{End, Prefix, Route},
    outside::{self, Outside},
    patience::stretched,
    pod::{DNS_PORT, ECHO_PORT, HTTP_PORT, Outcome},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Client, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("pods_reach_the_world_by_their_nodes_address", pods_reach_the_world),
        ("pings_and_fragments_go_to_the_world_and_back", pings_and_fragments),
        ("errors_reach_pods_and_the_world", errors_reach_both),
        ("the_host_shares_its_address_with_its_pods", the_host_shares_its_address),
        ("pods_keep_their_addresses_where_it_is_said", pods_keep_their_addresses),
        ("pods_leave_by_the_address_of_the_device_of_the_default_route", pods_leave_by_another_device),
        ("a_pod_sends_from_its_own_addresses_alone", a_pod_sends_from_its_own_addresses),
        (
            "flows_to_the_world_outlive_the_agent_and_new_ones_follow_the_nodes_address",
            flows_outlive_the_agent,
        ),
    ])
}

/// The world at this port.
fn world(family: Family, port: u16) -> SocketAddr {
    (outside::ip(family), port).into()
}

/// Every way to the world is that of the node, whichever pod it is; the checksums are right on the wire.
fn pods_reach_the_world(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |it| {
        let _outside = Outside::beside(&it.cluster)?;
        for family in Family::BOTH {
            for pod in it.cluster.pods() {
                let node =
                    it.cluster.nodes().iter().find(|node| node.name == pod.node).context("its node")?;
                for (protocol, port) in [
                    (Protocol::Http, HTTP_PORT),
                    (Protocol::Dns, DNS_PORT),
                    (Protocol::DnsUnconnected, DNS_PORT),
                ] {
                    let target = world(family, port);
                    let outcomes = pod.ask(&Ask::new(protocol, target).count(10).strict())?;
                    let by = tally(&outcomes, target, node.ip(family))
                        .with_context(|| format!("{} to {target}, {protocol}", pod.name))?;
                    ensure!(by.keys().eq(["world"]), "{by:?}");
                }
            }
            let target = world(family, ECHO_PORT);
            let stream = it.cluster.pod("a1").stream(target)?;
            stream.wait_until(Duration::from_secs(20), |seen| {
                seen.last().is_some_and(|last| last.verified > 1_000_000 || last.ended.is_some())
            })?;
            let last = stream.stop()?.pop().context("a stream said nothing")?;
            ensure!(last.ended == Some(Ok(())) && last.verified > 1_000_000, "{target}: {last:?}");
        }
        for pod in it.cluster.pods() {
            let errors = pod.checksum_errors()?;
            ensure!(errors == 0, "{}: {errors} checksum errors", pod.name);
        }
        Ok(())
    })
}

/// Two pods and the host ask with one identifier at a time; 4,000 bytes take three packets each way.
fn pings_and_fragments(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |it| {
        let outside = Outside::beside(&it.cluster)?;
        for family in Family::BOTH {
            for length in [56, 4_000] {
                for identifier in [7, 40_000] {
                    for pod in ["a1", "a2", "b1"] {
                        let pod = it.cluster.pod(pod);
                        outside::ping(&pod.netns, outside::ip(family), identifier, length)
                            .with_context(|| format!("from {}", pod.name))?;
                    }
                    let node = it.cluster.node("a");
                    outside::ping(&node.netns, outside::ip(family), identifier, length)
                        .context("the host")?;
                }
            }
            let server = outside.udp(family, 7_000)?;
            let node = it.cluster.node("a").ip(family);
            for pod in ["a1", "a2"] {
                let pod = it.cluster.pod(pod);
                let client = outside::udp(&pod.netns, (pod.ip(family), 5_000).into())?;
                let payload: Vec<u8> = (0..4_000).map(|at| (at % 251) as u8).collect();
                client.send_to(&payload, world(family, 7_000))?;
                let (seen, from) = outside::receive(&server)?;
                ensure!(seen == payload && from.ip() == node && from.port() != 5_000, "{from}");
                server.send_to(&payload, from)?;
                let (seen, from) = outside::receive(&client)?;
                ensure!(seen == payload && from == world(family, 7_000), "{from}");
            }
        }
        Ok(())
    })
}

/// A port that nobody listens at, out there and in the pod.
fn errors_reach_both(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |it| {
        let outside = Outside::beside(&it.cluster)?;
        let pod = it.cluster.pod("a1");
        for family in Family::BOTH {
            let client = outside::udp(&pod.netns, (pod.ip(family), 0).into())?;
            client.connect(world(family, 7_001))?;
            client.send(b"to nobody")?;
            outside::is_refused(&client).with_context(|| format!("the pod is not told, {family:?}"))?;
            let server = outside.udp(family, 7_002)?;
            let gone = outside::udp(&pod.netns, (pod.ip(family), 0).into())?;
            gone.send_to(b"and gone", world(family, 7_002))?;
            let (_, from) = outside::receive(&server)?;
            drop(gone);
            server.connect(from)?;
            server.send(b"too late")?;
            outside::is_refused(&server).with_context(|| format!("the world is not told, {family:?}"))?;
        }
        Ok(())
    })
}

/// How many sockets the host has, and how many flows a pod opens: with ports at random one would hit a host's in all but
/// one case of a million.
const SOCKETS: usize = 800;
const FLOWS: usize = 500;

/// Pods get no port that a socket of the host has, and the host's traffic to the same place stays its own.
fn the_host_shares_its_address(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |it| {
        let outside = Outside::beside(&it.cluster)?;
        let (node, pod) = (it.cluster.node("a"), it.cluster.pod("a1"));
        for family in Family::BOTH {
            let server = outside.udp(family, 7_003)?;
            // Evenly over the ports that are given out.
            let ports = (0..SOCKETS).map(|number| 1_024 + u16::try_from(number * 36).unwrap_or(0));
            let all = (if family == Family::V4 { "0.0.0.0" } else { "::" }).parse::<IpAddr>()?;
            let hosts: Vec<UdpSocket> =
                ports.filter_map(|port| outside::udp(&node.netns, (all, port).into()).ok()).collect();
            ensure!(hosts.len() > SOCKETS - 20, "{} sockets", hosts.len());
            let taken = hosts.iter().map(|socket| Ok(socket.local_addr()?.port()));
            let taken = taken.collect::<Result<BTreeSet<_>>>()?;
            let mut seen = BTreeMap::new();
            for _ in 0..FLOWS {
                let client = outside::udp(&pod.netns, (pod.ip(family), 0).into())?;
                client.send_to(b"?", world(family, 7_003))?;
                let (_, from) = outside::receive(&server)?;
                ensure!(from.ip() == node.ip(family), "{from}");
                ensure!(!taken.contains(&from.port()), "{from} is the host's");
                // The kernel may give a client the port of one that is gone, which is then the same flow.
                let port = client.local_addr()?.port();
                let other = seen.insert(from.port(), port);
                ensure!(other.is_none_or(|other| other == port), "{from} is another flow's");
                server.send_to(b"!", from)?;
                ensure!(outside::receive(&client)?.0 == b"!");
            }
            for host in &hosts[..20] {
                host.send_to(b"host", world(family, 7_003))?;
                let (_, from) = outside::receive(&server)?;
                ensure!(from == SocketAddr::from((node.ip(family), host.local_addr()?.port())), "{from}");
                server.send_to(b"yours", from)?;
                ensure!(outside::receive(host)?.0 == b"yours");
            }
        }
        Ok(())
    })
}

/// A part of the world that has routes to the pods, and is named; and one in which nothing is masqueraded.
fn pods_keep_their_addresses(sandbox: &Sandbox) -> Result<()> {
    let args: [&[&str]; 2] =
        [&["--non-masquerade-cidrs", "203.0.113.0/24,2001:db8::/64"], &["--masquerade", "off"]];
    for args in args {
        World::test(sandbox, args, |it| {
            let outside = Outside::beside(&it.cluster)?;
            for node in it.cluster.nodes() {
                for (to, via) in [(node.pod_cidr_v4(), node.v4.into()), (node.pod_cidr_v6(), node.v6.into())]
                {
                    outside
                        .netns
                        .run(move |inside| inside.route(Route { to, via: Some(via), dev: "eth0" }))??;
                }
            }
            for family in Family::BOTH {
                let (pod, target) = (it.cluster.pod("a1"), world(family, HTTP_PORT));
                tally(&pod.http(target, 5)?, target, pod.ip(family))?;
                outside::ping(&pod.netns, outside::ip(family), 9, 56)?;
            }
            Ok(())
        })
        .with_context(|| args.join(" "))?;
    }
    Ok(())
}

/// The default route is moved to a device that has none of the Node object's addresses.
fn pods_leave_by_another_device(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |it| {
        let outside = Outside::beside(&it.cluster)?;
        let node = it.cluster.node("a");
        let addresses: [IpAddr; 2] = ["203.0.113.77".parse()?, "2001:db8::77".parse()?];
        let (here, there) = (end("eth1", 1), end("eth-a", 2));
        node.netns.veth(&here, &outside.netns, &there)?;
        for addr in addresses {
            let (family, len) = (Family::of(addr), if addr.is_ipv4() { 32 } else { 128 });
            let (here, there) = (here.mac, there.mac);
            outside.netns.run(move |inside| -> Result<()> {
                inside.neighbour("eth-a", addr, here)?;
                inside.route(Route { to: Prefix { addr, len }, via: None, dev: "eth-a" })
            })??;
            node.netns.run(move |inside| -> Result<()> {
                outside::turn_to(inside, addr, "eth1")?;
                inside.neighbour("eth1", outside::ip(family), there)
            })??;
            let target = world(family, HTTP_PORT);
            wait_seen_as(it, target, addr)?;
            outside::ping(&it.cluster.pod("a1").netns, outside::ip(family), 5, 56)?;
        }
        Ok(())
    })
}

fn end(name: &str, number: u8) -> End {
    End { name: name.into(), mac: [2, 0, 0, 0xee, 0, number] }
}

/// Neither from another pod's address nor from one that nobody has; what it sends from its own comes through, before and
/// after.
fn a_pod_sends_from_its_own_addresses(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |it| {
        let outside = Outside::beside(&it.cluster)?;
        let pod = it.cluster.pod("a1");
        for family in Family::BOTH {
            let unused: IpAddr =
                if family == Family::V4 { "10.244.1.222" } else { "fd00:10:244:1::222" }.parse()?;
            let (other, len) = (it.cluster.pod("b1").ip(family), if family == Family::V4 { 32 } else { 128 });
            let neighbour = it.cluster.pod("a2");
            let received = outside::udp(&neighbour.netns, (neighbour.ip(family), 7_004).into())?;
            let far = outside.udp(family, 7_004)?;
            let own = outside::udp(&pod.netns, (pod.ip(family), 0).into())?;
            for (number, addr) in [unused, other].into_iter().enumerate() {
                pod.netns.run(move |inside| inside.address("eth0", Prefix { addr, len }))??;
                let spoofed = outside::udp(&pod.netns, (addr, 0).into())?;
                for (socket, to) in
                    [(&received, (neighbour.ip(family), 7_004).into()), (&far, world(family, 7_004))]
                {
                    spoofed.send_to(b"spoofed", to)?;
                    let text = format!("own {number}").into_bytes();
                    own.send_to(&text, to)?;
                    let (seen, from) = outside::receive(socket)?;
                    ensure!(
                        seen == text,
                        "{from} got through to {to} with {}",
                        String::from_utf8_lossy(&seen)
                    );
                }
            }
        }
        let dropped = it.agents[0].verb(&["status"])?;
        ensure!(dropped.contains("spoofed-source"), "nothing is said of it:\n{dropped}");
        Ok(())
    })
}

/// Without an agent, and after it came back, as before; then the node gets other addresses.
fn flows_outlive_the_agent(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |it| {
        let _outside = Outside::beside(&it.cluster)?;
        let mut clients = Vec::new();
        for family in Family::BOTH {
            let ask = Ask::http(world(family, HTTP_PORT)).interval(Duration::from_millis(10));
            clients.push(it.cluster.pod("a1").keep_asking(&ask)?);
        }
        let stream = it.cluster.pod("a2").stream(world(Family::V4, ECHO_PORT))?;
        let go_on = || -> Result<()> {
            for client in &clients {
                let before = client.seen().len();
                client.wait_until(Duration::from_secs(10), |seen| seen.len() > before + 20)?;
            }
            let before = stream.seen().last().map_or(0, |last| last.verified);
            let more = |seen: &[bpf_tests::pod::Progress]| {
                seen.last().is_some_and(|last| last.verified > before || last.ended.is_some())
            };
            stream.wait_until(Duration::from_secs(10), more).map(drop)
        };
        go_on()?;
        it.agents[0].kill9()?;
        go_on().context("without the agent")?;
        it.agents[0].restart()?;
        it.agents[0].wait_synced()?;
        go_on().context("after the restart")?;
        for client in clients {
            let outcomes = client.stop()?;
            ensure!(outcomes.iter().all(|it| it.answer().is_some()), "a request failed");
        }
        let last = stream.stop()?.pop().context("a stream said nothing")?;
        ensure!(last.ended == Some(Ok(())), "{last:?}");
        another_address(it)
    })
}

/// Also what goes on from one socket is by the new address in the end.
fn another_address(it: &World) -> Result<()> {
    let node = it.cluster.node("a");
    let mut sockets = Vec::new();
    for family in Family::BOTH {
        let ask = Ask::new(Protocol::DnsOneSocket, world(family, DNS_PORT));
        let ask = ask.interval(Duration::from_millis(20)).timeout(Duration::from_millis(500));
        sockets.push((it.cluster.pod("a2").keep_asking(&ask)?, node.ip(family)));
    }
    seen_from(&sockets)?;
    let moved = [("192.168.50.1", "192.168.50.101", 24), ("fd50::1", "fd50::101", 64)];
    let moved = moved.map(|(old, new, len)| (old.parse::<IpAddr>(), new.parse::<IpAddr>(), len));
    let mut addresses = Vec::new();
    for (old, new, len) in moved {
        let (old, addr) = (old?, new?);
        node.netns.run(move |inside| -> Result<()> {
            inside.take_address(old)?;
            inside.address("eth0", Prefix { addr, len })?;
            // They went with the last address of IPv4.
            if addr.is_ipv4() { outside::lead_to(inside, Family::V4) } else { Ok(()) }
        })??;
        addresses.push((old, addr));
    }
    it.cluster.manifests().readdress(&addresses)?;
    for ((_, new), (_, seen)) in addresses.iter().zip(&mut sockets) {
        wait_seen_as(it, world(Family::of(*new), HTTP_PORT), *new)?;
        *seen = *new;
    }
    seen_from(&sockets).context("from one socket, after the node's address has changed")
}

/// Until the world answers each client, and sees it by this address.
fn seen_from(sockets: &[(Client<Outcome>, IpAddr)]) -> Result<()> {
    for (client, addr) in sockets {
        client.wait_until(stretched(Duration::from_secs(60)), |seen| {
            seen.last().and_then(Outcome::answer).is_some_and(|answer| answer.client.ip() == *addr)
        })?;
    }
    Ok(())
}

/// Until the world sees pod a1 by this address.
fn wait_seen_as(it: &World, target: SocketAddr, addr: IpAddr) -> Result<()> {
    let deadline = Instant::now() + stretched(Duration::from_secs(10));
    loop {
        let ask = Ask::http(target).timeout(Duration::from_millis(500));
        let outcomes = it.cluster.pod("a1").ask(&ask)?;
        let client = outcomes.first().and_then(Outcome::answer).map(|answer| answer.client.ip());
        if client == Some(addr) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{target} sees {client:?}, not {addr}");
        thread::sleep(Duration::from_millis(50));
    }
}
