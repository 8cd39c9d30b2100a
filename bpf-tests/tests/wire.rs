//! Requests between pods in network namespaces, through real agents.
#![forbid(unsafe_code)]

use std::{
    net::UdpSocket,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    checks::{self, ECHO_SERVICE_PORT, World, pod_target, tally, target},
    cluster::{Cluster, Family, Pod},
    manifests::Endpoint,
    patience::stretched,
    pod::{ECHO_PORT, FailureKind, Outcome},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("pods_reach_each_other_without_an_agent", pods_reach_each_other_without_an_agent),
        ("three_nodes_reach_each_other_without_an_agent", three_nodes_reach_each_other_without_an_agent),
        ("a_stream_comes_back_unchanged_without_an_agent", a_stream_comes_back_unchanged_without_an_agent),
        ("a_cluster_ip_spreads_tcp_over_its_backends", a_cluster_ip_spreads_tcp_over_its_backends),
        ("a_cluster_ip_spreads_udp_over_its_backends", a_cluster_ip_spreads_udp_over_its_backends),
        (
            "unconnected_sockets_are_answered_by_the_cluster_ip",
            unconnected_sockets_are_answered_by_the_cluster_ip,
        ),
        ("no_endpoints_refuses_at_once", no_endpoints_refuses_at_once),
        ("scaling_down_fails_no_request", scaling_down_fails_no_request),
        ("a_first_endpoint_ends_refusal", a_first_endpoint_ends_refusal),
        ("a_pod_reaches_itself_through_its_service", a_pod_reaches_itself_through_its_service),
        ("udp_from_one_port_leaves_a_removed_backend", udp_from_one_port_leaves_a_removed_backend),
        ("partial_checksums_stay_right", partial_checksums_stay_right),
        ("complete_checksums_stay_right", complete_checksums_stay_right),
        ("the_packet_path_alone_serves", the_packet_path_alone_serves),
        ("the_socket_path_serves_udp", the_socket_path_serves_udp),
        ("clsact_serves", clsact_serves),
        ("the_kubernetes_api_serves", the_kubernetes_api_serves),
        ("pod_addresses_stay_reachable_under_an_agent", pod_addresses_stay_reachable_under_an_agent),
        ("a_dropped_packet_is_named", a_dropped_packet_is_named),
        ("bad_documents_are_named_and_cost_nothing_else", bad_documents_are_named_and_cost_nothing_else),
    ])
}

fn pods_reach_each_other_without_an_agent(sandbox: &Sandbox) -> Result<()> {
    every_pod_reaches_every_pod(&Cluster::new(sandbox, &["a", "b"])?)
}

fn three_nodes_reach_each_other_without_an_agent(sandbox: &Sandbox) -> Result<()> {
    every_pod_reaches_every_pod(&Cluster::with_pods(sandbox, &["a", "b", "c"], 1)?)
}

fn a_stream_comes_back_unchanged_without_an_agent(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::new(sandbox, &["a", "b"])?;
    for family in Family::BOTH {
        let echo = (cluster.pod("b1").ip(family), ECHO_PORT).into();
        let stream = cluster.pod("a1").stream(echo)?;
        stream
            .wait_until(Duration::from_secs(5), |seen| seen.last().is_some_and(|p| p.verified > 1 << 20))?;
        let last = stream.stop()?.pop().context("no report")?;
        ensure!(last.ended == Some(Ok(())), "{last:?}");
    }
    Ok(())
}

fn a_cluster_ip_spreads_tcp_over_its_backends(sandbox: &Sandbox) -> Result<()> {
    // `spread` also compares what getpeername shows with the ClusterIP.
    World::test(sandbox, &[], |world| spreads(world, &[Protocol::Http]))
}

fn a_cluster_ip_spreads_udp_over_its_backends(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| spreads(world, &[Protocol::Dns]))
}

fn unconnected_sockets_are_answered_by_the_cluster_ip(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| spreads(world, &[Protocol::DnsUnconnected]))
}

fn no_endpoints_refuses_at_once(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], refuses)
}

fn scaling_down_fails_no_request(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| world.scale_down().into_result())
}

fn a_first_endpoint_ends_refusal(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        world.set_backends(&[])?;
        for protocol in [Protocol::Http, Protocol::Dns] {
            becomes(world, protocol, &[])?;
        }
        world.set_backends(&["b2"])?;
        for protocol in [Protocol::Http, Protocol::Dns] {
            becomes(world, protocol, &["b2"])?;
        }
        Ok(())
    })
}

fn a_pod_reaches_itself_through_its_service(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        world.set_backends(&["a1"])?;
        for protocol in [Protocol::Http, Protocol::Dns] {
            becomes(world, protocol, &["a1"])?;
        }
        Ok(())
    })
}

fn udp_from_one_port_leaves_a_removed_backend(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        for (family, port) in Family::BOTH.into_iter().zip([40053, 40054]) {
            world.set_backends(&["a2"])?;
            becomes(world, Protocol::Dns, &["a2"])?;
            let ask = Ask::dns(target(&world.web, Protocol::Dns, family)).source_port(port).interval(TICK);
            let client = world.cluster.pod("a1").keep_asking(&ask)?;
            client.wait_until(SOON, |outcomes| outcomes.iter().any(|o| by(o) == Some("a2")))?;
            world.set_backends(&["b2"])?;
            client.wait_until(SOON, |outcomes| outcomes.last().and_then(by) == Some("b2"))?;
            let failed = client.stop()?.into_iter().find(|outcome| outcome.failure().is_some());
            ensure!(failed.is_none(), "{failed:?}");
        }
        Ok(())
    })
}

fn partial_checksums_stay_right(sandbox: &Sandbox) -> Result<()> {
    for socket_lb in ["tcp", "off"] {
        World::test(sandbox, &["--socket-lb", socket_lb], checksums_stay_right)?;
    }
    Ok(())
}

fn complete_checksums_stay_right(sandbox: &Sandbox) -> Result<()> {
    for socket_lb in ["tcp", "off"] {
        World::test(sandbox, &["--socket-lb", socket_lb], |world| {
            world.cluster.pods().try_for_each(Pod::complete_checksums)?;
            checksums_stay_right(world)
        })?;
    }
    Ok(())
}

fn the_packet_path_alone_serves(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "off"], serves)
}

fn the_socket_path_serves_udp(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "all"], |world| {
        serves(world)?;
        spreads(world, &[Protocol::DnsUnconnected])
    })
}

fn clsact_serves(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--attach", "clsact", "--socket-lb", "off"], serves)
}

/// The objects come from an API server instead of a directory; all else is the same.
fn the_kubernetes_api_serves(sandbox: &Sandbox) -> Result<()> {
    World::test_over_api(sandbox, &[], |world| {
        serves(world)?;
        world.scale_down().into_result()
    })
}

fn pod_addresses_stay_reachable_under_an_agent(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| every_pod_reaches_every_pod(&world.cluster))
}

/// Datagrams to a service whose endpoints are elsewhere and may not be used (rule 15): in `status`, and with
/// `--log-drops` also in the log.
fn a_dropped_packet_is_named(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--log-drops"], |world| {
        let mut local = checks::service("local", 15);
        local.more = "  internalTrafficPolicy: Local\n".to_owned();
        let manifests = world.cluster.manifests();
        manifests.write_endpoints(&local, &Endpoint::ready([world.cluster.pod("b2")]))?;
        manifests.write_service(&local)?;
        let agent = &world.agents[0];
        let dropped = || -> Result<u64> {
            let status = agent.status()?;
            let drops = status["drops"].as_array().into_iter().flatten();
            let of_ours = drops.filter(|drop| drop["reason"] == "no-local-endpoint");
            Ok(of_ours.filter_map(|drop| drop["packets"].as_u64()).sum())
        };
        let logged = || agent.log_tail().matches("dropped: no-local-endpoint").count();
        let deadline = Instant::now() + stretched(SOON);
        // The first ones may come before the agent has read of the service.
        while dropped()? < 2 || logged() < 2 {
            ensure!(Instant::now() < deadline, "{} dropped, {} lines in the log", dropped()?, logged());
            for family in Family::BOTH {
                let dns = target(&local, Protocol::Dns, family);
                let own = world.cluster.pod("a1").ip(family);
                let sent = world.cluster.pod("a1").netns.run(move |_| {
                    UdpSocket::bind((own, 0)).and_then(|socket| socket.send_to(&[0; 40], dns))
                })?;
                ensure!(sent? == 40, "not sent");
            }
            thread::sleep(TICK);
        }
        Ok(())
    })
}

/// A file with three bad documents and a good one, and a service that works spoilt afterwards.
fn bad_documents_are_named_and_cost_nothing_else(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let manifests = world.cluster.manifests();
        let late = checks::service("late", 77);
        let bad = [
            "apiVersion: v1\nkind: Service\nmetadata: {name: high}\nspec: {clusterIP: 10.96.0.70, ports: [{port: 70000}]}",
            "apiVersion: v1\nkind: Service\nmetadata: {name: odd}\nspec: {clusterIP: 10.96.0.700, ports: [{port: 80}]}",
            "apiVersion: v1\nkind: Service\nmetadata: {name: [unclosed",
            "apiVersion: example.com/v1\nkind: Gadget\nmetadata: {name: unknown}",
        ];
        manifests.write("bad", &format!("{}\n---\n{}", bad.join("\n---\n"), late.yaml()))?;
        let spoilt = world.web.yaml().replace("port: 80", "port: eighty");
        ensure!(spoilt != world.web.yaml(), "the service was not spoilt");
        manifests.write("service-web", &spoilt)?;
        for agent in &world.agents {
            agent.wait_status(SOON, |status| status["rejected"] == 4 && status["frontends"] == 24)?;
            let log = agent.log_tail();
            for named in [
                ["bad.yaml", "document 1", "ports[0].port"],
                ["bad.yaml", "document 2", "clusterIP"],
                ["bad.yaml", "document 3", "line"],
                ["service-web.yaml", "document 1", "ports"],
                ["bad.yaml", "Gadget", "passed over"],
            ] {
                let found = log.lines().any(|line| named.iter().all(|part| line.contains(part)));
                ensure!(found, "no line names {named:?} in\n{log}");
            }
        }
        serves(world)
    })
}

const SOON: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(10);

fn every_pod_reaches_every_pod(cluster: &Cluster) -> Result<()> {
    for from in cluster.pods() {
        for to in cluster.pods() {
            for family in Family::BOTH {
                for protocol in [Protocol::Http, Protocol::Dns, Protocol::DnsUnconnected] {
                    let target = pod_target(to, protocol, family);
                    let outcomes = from.ask(&Ask::new(protocol, target).count(2).strict())?;
                    let by = tally(&outcomes, target, from.ip(family))
                        .with_context(|| format!("{} -> {}: {protocol} {target}", from.name, to.name))?;
                    ensure!(by.keys().eq([&to.name]), "{target} is {}, answered: {by:?}", to.name);
                }
            }
        }
    }
    Ok(())
}

fn checksums_stay_right(world: &mut World) -> Result<()> {
    serves(world)?;
    for family in Family::BOTH {
        let echo = (world.web.ip(family), ECHO_SERVICE_PORT).into();
        let stream = world.cluster.pod("a1").stream(echo)?;
        thread::sleep(stretched(Duration::from_millis(300)));
        let last = stream.stop()?.pop().context("no report")?;
        ensure!(last.ended == Some(Ok(())) && last.verified > 0, "{last:?}");
    }
    for pod in world.cluster.pods() {
        let wrong = pod.checksum_errors()?;
        ensure!(wrong == 0, "{}: {wrong} packets with a wrong checksum", pod.name);
    }
    Ok(())
}

fn serves(world: &mut World) -> Result<()> {
    spreads(world, &[Protocol::Http, Protocol::Dns])?;
    refuses(world)
}

fn spreads(world: &mut World, protocols: &[Protocol]) -> Result<()> {
    for &protocol in protocols {
        for family in Family::BOTH {
            for from in ["a1", "b1"] {
                world.spread(from, protocol, family).into_result()?;
            }
        }
    }
    Ok(())
}

fn refuses(world: &mut World) -> Result<()> {
    for protocol in [Protocol::Http, Protocol::Dns] {
        for family in Family::BOTH {
            for from in ["a1", "b1"] {
                world.refusal(from, protocol, family).into_result()?;
            }
        }
    }
    Ok(())
}

/// Soon the backends of `web`, as `a1` sees them in either family, are these; none: it refuses.
fn becomes(world: &World, protocol: Protocol, backends: &[&str]) -> Result<()> {
    let right = |outcome: &Outcome| match &outcome.result {
        Ok(answer) => backends.contains(&answer.by.as_str()),
        Err(failure) => backends.is_empty() && failure.kind == FailureKind::Refused,
    };
    for family in Family::BOTH {
        let ask = Ask::new(protocol, target(&world.web, protocol, family)).interval(TICK);
        let client = world.cluster.pod("a1").keep_asking(&ask.timeout(Duration::from_millis(500)))?;
        client
            // Enough in a row that no backend is missed by chance.
            .wait_until(SOON, |outcomes| {
                outcomes.iter().rev().take_while(|outcome| right(outcome)).count() >= 20
            })
            .with_context(|| format!("{protocol} {family:?}: the backends do not become {backends:?}"))?;
    }
    Ok(())
}

fn by(outcome: &Outcome) -> Option<&str> {
    outcome.answer().map(|answer| answer.by.as_str())
}
