//! What a node does as a service proxy beside serving: addresses that are nobody's, external addresses, masquerade.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use bpf_tests::{
    agent::Agent,
    checks::{self, World, service, target},
    cluster::{Cluster, Family},
    manifests::Endpoint,
    netns::{Prefix, Route},
    pod::{FailureKind, Outcome},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("rule_19_other_ports_refuse_and_unallocated_addresses_drop", other_ports_refuse),
        ("rule_19_ranges_of_objects_come_and_go", ranges_come_and_go),
        ("rule_26_where_all_are_masqueraded_pods_are_too", pods_are_masqueraded_too),
        ("rule_26_who_comes_from_outside_to_a_cluster_ip_is_masqueraded", outside_clients_are_masqueraded),
        ("weights_of_nodes_and_addresses_are_kept", weights_are_kept),
        ("least_connection_serves_every_backend", least_connection_serves),
        ("external_ips_are_served_where_the_flag_says_so", external_ips_are_served),
        ("the_kernels_connection_tracking_remembers_as_kube_proxy_has_it", kernel_timeouts_are_set),
    ])
}

const SOON: Duration = Duration::from_secs(10);
const RANGES: &str = "10.96.0.0/16,fd00:10:96::/112";
/// What a pod hears of addresses that nobody serves and the node has no route to; the kernel does not say so every time.
const NO_WAY: [FailureKind; 2] = [FailureKind::Unreachable, FailureKind::TimedOut];
const PROTOCOLS: [Protocol; 2] = [Protocol::Http, Protocol::Dns];

fn other_ports_refuse(sandbox: &Sandbox) -> Result<()> {
    for socket_lb in ["tcp", "off"] {
        World::test(sandbox, &["--service-cidr", RANGES, "--socket-lb", socket_lb], |world| {
            for family in Family::BOTH {
                for protocol in PROTOCOLS {
                    let other = SocketAddr::new(world.web.ip(family), 4443);
                    all_fail(world, protocol, other, &[FailureKind::Refused])?;
                    all_fail(world, protocol, nobodys(family), &[FailureKind::TimedOut])?;
                    world.spread("a1", protocol, family).into_result()?;
                }
            }
            world.agents[0].wait_status(SOON, drops_unallocated).map(drop)
        })?;
    }
    Ok(())
}

fn kernel_timeouts_are_set(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    let node = cluster.node("a");
    let read = || -> Result<[String; 2]> {
        node.netns.run(|_| {
            let of =
                |name| fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{name}"));
            Ok([of("close_wait")?, of("established")?].map(|text| text.trim().to_owned()))
        })?
    };
    let [_, established] = read()?;
    let mut agent = Agent::start(node, &["--conntrack-tcp-timeout-established=0"])?;
    let deadline = Instant::now() + SOON;
    while read()? != ["3600", &established] {
        ensure!(Instant::now() < deadline, "the kernel has {:?}\n{}", read()?, agent.log_tail());
        thread::sleep(Duration::from_millis(20));
    }
    agent.stop().map(drop)
}

fn ranges_come_and_go(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let other = SocketAddr::new(world.web.ip(Family::V4), 4443);
        // The node knows no way to it: not refused as if something were there, and not dropped by us.
        all_fail(world, Protocol::Http, other, &NO_WAY)?;
        ensure!(!drops_unallocated(&world.agents[0].status()?), "dropped without a range");
        let object = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n\
                      spec: {cidrs: [10.96.0.0/16, \"fd00:10:96::/112\"]}\n";
        world.cluster.manifests().write("ranges", object)?;
        becomes(world, other, &[FailureKind::Refused])?;
        all_fail(world, Protocol::Dns, nobodys(Family::V6), &[FailureKind::TimedOut])?;
        world.agents[0].wait_status(SOON, drops_unallocated)?;
        world.cluster.manifests().remove("ranges")?;
        becomes(world, other, &NO_WAY)
    })
}

fn pods_are_masqueraded_too(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--masquerade-all"], |world| {
        for family in Family::BOTH {
            for protocol in PROTOCOLS {
                let outcomes = ask(&world.cluster, "a1", protocol, target(&world.web, protocol, family))?;
                let expected = ["a2", "b2"].map(|pod| (pod.to_owned(), node(&world.cluster, "a", family)));
                ensure!(seen(&outcomes)? == BTreeSet::from(expected), "{protocol}: {outcomes:?}");
            }
        }
        Ok(())
    })
}

/// Node c has no agent, and a route to cluster IPs by way of node a.
fn outside_clients_are_masqueraded(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a", "b", "c"], 1)?;
    let web = service("web", 10);
    cluster.manifests().write_cluster(&cluster)?;
    cluster.manifests().write_service(&web)?;
    let endpoints = Endpoint::ready(["a1", "b1"].map(|name| cluster.pod(name)));
    cluster.manifests().write_endpoints(&web, &endpoints)?;
    let mut agent = Agent::start(cluster.node("a"), &["--service-cidr", RANGES])?;
    agent.wait_synced()?;
    for family in Family::BOTH {
        let (to, via) = (range(family), node(&cluster, "a", family));
        let route =
            move |inside: &bpf_tests::netns::Inside| inside.route(Route { to, via: Some(via), dev: "eth0" });
        cluster.node("c").netns.run(route)??;
        for protocol in PROTOCOLS {
            let outcomes = ask(&cluster, "c1", protocol, target(&web, protocol, family))?;
            let expected = ["a1", "b1"].map(|pod| (pod.to_owned(), via));
            ensure!(seen(&outcomes)? == BTreeSet::from(expected), "{protocol}: {outcomes:?}");
            let refused = ask(&cluster, "c1", protocol, SocketAddr::new(web.ip(family), 4443))?;
            ensure!(refused.iter().all(|it| kind(it) == Some(FailureKind::Refused)), "rule 19: {refused:?}");
        }
    }
    Ok(())
}

fn external_ips_are_served(sandbox: &Sandbox) -> Result<()> {
    let ips: [IpAddr; 2] =
        [Ipv4Addr::new(192, 0, 2, 50).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x50).into()];
    for (flag, served) in [("serve", true), ("ignore", false)] {
        World::test(sandbox, &["--external-ips", flag], |world| {
            world.web.more = format!("  externalIPs: [{}, \"{}\"]\n", ips[0], ips[1]);
            world.cluster.manifests().write_service(&world.web)?;
            for ip in ips {
                for protocol in PROTOCOLS {
                    let to = SocketAddr::new(ip, target(&world.web, protocol, Family::of(ip)).port());
                    if !served {
                        all_fail(world, protocol, to, &NO_WAY)?;
                        continue;
                    }
                    let soon = Ask::new(protocol, to).interval(Duration::from_millis(20));
                    let client = world.cluster.pod("a1").keep_asking(&soon)?;
                    client.wait_until(SOON, |all| all.last().is_some_and(|it| it.answer().is_some()))?;
                    let outcomes = ask(&world.cluster, "a1", protocol, to)?;
                    let own = world.cluster.pod("a1").ip(Family::of(ip));
                    let expected = ["a2", "b2"].map(|pod| (pod.to_owned(), own));
                    ensure!(seen(&outcomes)? == BTreeSet::from(expected), "{to}: {outcomes:?}");
                    // Other ports of it are not ours (rule 21).
                    all_fail(world, protocol, SocketAddr::new(ip, 4443), &NO_WAY)?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A Service with an annotation of ours.
fn annotated(world: &World, key: &str, text: &str) -> Result<()> {
    let yaml = world.web.yaml();
    let with = yaml.replace("\nspec:", &format!("\n  annotations:\n    {key}: \"{text}\"\nspec:"));
    ensure!(with != yaml, "no place for an annotation in\n{yaml}");
    world.cluster.manifests().write("service-web", &with)
}

/// `a2` has a ninth of the weight of `b2`, and then none at all.
fn weights_are_kept(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        annotated(world, "ferroflow.dev/weights", "node/node-b=9")?;
        let share = |protocol, family| -> Result<usize> {
            let to = target(&world.web, protocol, family);
            let outcomes = world.cluster.pod("a1").ask(&Ask::new(protocol, to).count(300))?;
            let failed = outcomes.iter().find(|it| it.answer().is_none());
            ensure!(failed.is_none(), "{failed:?}");
            Ok(outcomes.iter().filter(|it| it.answer().is_some_and(|it| it.by == "a2")).count())
        };
        for (protocol, family) in PROTOCOLS.into_iter().zip(Family::BOTH) {
            let deadline = Instant::now() + SOON;
            // 30 of 300, give or take four times their deviation of 5.2.
            while !(9..=51).contains(&share(protocol, family)?) {
                ensure!(Instant::now() < deadline, "a2 gets {} of 300 {protocol}", share(protocol, family)?);
            }
        }
        annotated(
            world,
            "ferroflow.dev/weights",
            &format!("{}=0, {}=0", ip("a2", world, Family::V4), ip("a2", world, Family::V6)),
        )?;
        for (protocol, family) in PROTOCOLS.into_iter().zip(Family::BOTH) {
            let deadline = Instant::now() + SOON;
            while share(protocol, family)? != 0 {
                ensure!(Instant::now() < deadline, "a2 still gets some {protocol}");
            }
        }
        Ok(())
    })
}

fn ip(pod: &str, world: &World, family: Family) -> IpAddr {
    world.cluster.pod(pod).ip(family)
}

fn least_connection_serves(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        annotated(world, "ferroflow.dev/lb-algorithm", "least-connection")?;
        let web = (world.web.ip(Family::V4), checks::WEB_PORT);
        // 128 is what says so of a frontend.
        let chosen = |rows: &serde_json::Value| {
            rows.as_array().is_some_and(|rows| {
                rows.iter().any(|row| {
                    row["key"]["addr"] == web.0.to_string()
                        && row["key"]["port"] == web.1
                        && row["value"]["flags"].as_u64().is_some_and(|flags| flags & 128 != 0)
                })
            })
        };
        let deadline = Instant::now() + SOON;
        for agent in &world.agents {
            while !chosen(&serde_json::from_str(&agent.verb(&["map", "dump", "frontends", "-o", "json"])?)?) {
                ensure!(Instant::now() < deadline, "the tables do not follow");
            }
        }
        for family in Family::BOTH {
            for protocol in PROTOCOLS {
                world.spread("a1", protocol, family).into_result()?;
            }
        }
        Ok(())
    })
}

fn ask(cluster: &Cluster, from: &str, protocol: Protocol, to: SocketAddr) -> Result<Vec<Outcome>> {
    cluster.pod(from).ask(&Ask::new(protocol, to).count(40).timeout(Duration::from_secs(2)))
}

fn all_fail(world: &World, protocol: Protocol, to: SocketAddr, wanted: &[FailureKind]) -> Result<()> {
    let ask = Ask::new(protocol, to).count(3).timeout(Duration::from_millis(700));
    let outcomes = world.cluster.pod("a1").ask(&ask)?;
    ensure!(
        outcomes.iter().all(|it| kind(it).is_some_and(|it| wanted.contains(&it))),
        "{protocol} {to}, not {wanted:?}: {outcomes:?}"
    );
    Ok(())
}

/// Soon HTTP to that address fails like this.
fn becomes(world: &World, to: SocketAddr, wanted: &[FailureKind]) -> Result<()> {
    let ask = Ask::http(to).interval(Duration::from_millis(20)).timeout(Duration::from_millis(700));
    let client = world.cluster.pod("a1").keep_asking(&ask)?;
    client
        .wait_until(SOON, |outcomes| outcomes.last().and_then(kind).is_some_and(|it| wanted.contains(&it)))?;
    Ok(())
}

fn kind(outcome: &Outcome) -> Option<FailureKind> {
    outcome.failure().map(|failure| failure.kind)
}

/// Who answered, and as whom it saw its client.
fn seen(outcomes: &[Outcome]) -> Result<BTreeSet<(String, IpAddr)>> {
    let answers = outcomes.iter().map(|outcome| {
        let answer = outcome.answer().ok_or_else(|| anyhow::anyhow!("{outcome:?}"))?;
        Ok((answer.by.clone(), answer.client.ip()))
    });
    answers.collect()
}

fn node(cluster: &Cluster, name: &str, family: Family) -> IpAddr {
    let node = cluster.node(name);
    match family {
        Family::V4 => node.v4.into(),
        Family::V6 => node.v6.into(),
    }
}

/// In the ranges, and no service's.
fn nobodys(family: Family) -> SocketAddr {
    let ip: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(10, 96, 7, 7).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x777).into(),
    };
    SocketAddr::new(ip, 80)
}

fn range(family: Family) -> Prefix {
    match family {
        Family::V4 => Prefix { addr: Ipv4Addr::new(10, 96, 0, 0).into(), len: 16 },
        Family::V6 => Prefix { addr: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0).into(), len: 112 },
    }
}

fn drops_unallocated(status: &serde_json::Value) -> bool {
    let drops = status["drops"].as_array();
    drops.is_some_and(|drops| drops.iter().any(|it| it["reason"] == "unallocated-service-address"))
}
