//! Pods whose device is a netkit. Kernels have it from 6.7 on, where they were built with it; those of `cargo xtask vm` from
//! 6.12 on.
#![forbid(unsafe_code)]

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    agent::Agent,
    checks::{World, pod_target, service, tally},
    cluster::{Cluster, Family, Node},
    cni::{Container, Runtime},
    manifests::{Endpoint, Port},
    patience::stretched,
    raw::Raw,
    runner,
    sandbox::Sandbox,
    steady::Traffic,
    traffic::{Ask, Protocol},
};
use ferroflow::net::device::has_netkit;
use ferroflow_ebpf::frame::Frame;

fn main() -> ExitCode {
    runner::main(&[
        ("netkit_pods_are_served_as_others_are", pods_are_served),
        ("netkit_pods_outlive_agents_and_stand_beside_veths", pods_outlive_agents),
        ("netkit_is_taken_where_the_kernel_has_it_and_its_lack_is_said", its_lack_is_said),
    ])
}

/// Nothing is translated by sockets: what is tested is the way of packets.
const NETKIT: [&str; 4] = ["--pod-device", "netkit", "--socket-lb", "off"];
const LIMIT: Duration = Duration::from_secs(20);
/// A service of datagrams: its port, and its backend's.
const DATAGRAMS: (u16, u16) = (99, 9_099);

fn pods_are_served(sandbox: &Sandbox) -> Result<()> {
    if !has_netkit()? {
        return runner::kernel_lacks("netkit_pods_are_served_as_others_are", "netkit");
    }
    World::test(sandbox, &NETKIT, |world| {
        for node in world.cluster.nodes() {
            ensure!(transmissions(node)? == 2, "not every pod of {} has a program in its way", node.name);
        }
        for family in Family::BOTH {
            for from in ["a1", "b1"] {
                for protocol in [Protocol::Http, Protocol::Dns] {
                    world.spread(from, protocol, family).into_result()?;
                    world.refusal(from, protocol, family).into_result()?;
                }
            }
            for (from, to) in [("a1", "a2"), ("a2", "a1"), ("a1", "b1"), ("b1", "a1")] {
                talks(world, from, to, family)?;
            }
            for node in ["a", "b"] {
                node_talks(world, node, "a1", family)?;
            }
            fragments_in_reverse_order(world, family)?;
        }
        reaches_itself(world)?;
        for name in ["a1", "a2", "b1", "b2"] {
            let errors = world.cluster.pod(name).checksum_errors()?;
            ensure!(errors == 0, "{name}: {errors} checksum errors");
        }
        for family in Family::BOTH {
            for (from, protocol) in [("a1", Protocol::Http), ("b1", Protocol::Http), ("a1", Protocol::Dns)] {
                world.guarded(from, protocol, family).into_result()?;
            }
        }
        Ok(())
    })
}

/// Agents die under traffic, the next ones give new pods veths, somebody takes programs away, and DEL leaves nothing.
fn pods_outlive_agents(sandbox: &Sandbox) -> Result<()> {
    if !has_netkit()? {
        return runner::kernel_lacks("netkit_pods_outlive_agents_and_stand_beside_veths", "netkit");
    }
    World::test(sandbox, &NETKIT, |world| {
        let traffic = Traffic::start(&world.cluster, &world.web)?;
        traffic.flows()?;
        world.agents.iter_mut().try_for_each(Agent::kill9)?;
        traffic.flows().context("without agents")?;
        for agent in &mut world.agents {
            agent.set_flag("--pod-device", "veth");
            agent.restart()?;
            let status = agent.wait_synced()?;
            ensure!(status["writes"] == 0, "the next agent found other tables: {status}");
        }
        traffic.flows().context("after the restart")?;
        traffic.finish()?;
        let runtime = world.runtimes[0].clone();
        world.cluster.attach("a", "a3", &runtime)?;
        ensure!(transmissions(world.cluster.node("a"))? == 2, "a veth counts as a netkit");
        for family in Family::BOTH {
            for (from, to) in [("a1", "a3"), ("a3", "a1"), ("a3", "b1"), ("b1", "a3")] {
                talks(world, from, to, family)?;
            }
            world.spread("a3", Protocol::Dns, family).into_result()?;
        }
        programs_come_back(world)?;
        for name in ["a1", "a2", "a3"] {
            runtime.del(Container { id: name, netns: "" })?;
            world.cluster.forget(name);
        }
        nothing_is_left(world.cluster.node("a"))
    })
}

/// And `auto` takes what there is.
fn its_lack_is_said(sandbox: &Sandbox) -> Result<()> {
    let mut cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    cluster.manifests().write_cluster(&cluster)?;
    let runtime = Runtime::new(cluster.node("a"))?;
    let args = runtime.agent_args();
    let args: Vec<_> = args.iter().map(String::as_str).chain(["--pod-device", "netkit"]).collect();
    let mut agent = Agent::start(cluster.node("a"), &args)?;
    if !has_netkit()? {
        ensure!(!agent.wait_ended()?.success(), "it says that it ended well");
        let log = agent.log()?;
        ensure!(log.contains("this kernel has none") && log.contains("--pod-device veth"), "{log}");
    } else {
        agent.stop()?;
    }
    agent.set_flag("--pod-device", "auto");
    agent.restart()?;
    runtime.wait_ready()?;
    cluster.attach("a", "a1", &runtime).with_context(|| agent.log_tail())?;
    ensure!(transmissions(cluster.node("a"))? == usize::from(has_netkit()?), "{}", agent.log_tail());
    Ok(())
}

fn talks(world: &World, from: &str, to: &str, family: Family) -> Result<()> {
    let (from, to) = (world.cluster.pod(from), world.cluster.pod(to));
    for protocol in [Protocol::Http, Protocol::Dns] {
        let target = pod_target(to, protocol, family);
        let outcomes = from.ask(&Ask::new(protocol, target).count(3).strict())?;
        tally(&outcomes, target, from.ip(family))
            .with_context(|| format!("{} to {}, {protocol}, {family:?}", from.name, to.name))?;
    }
    Ok(())
}

fn node_talks(world: &World, node: &str, to: &str, family: Family) -> Result<()> {
    let (node, target) =
        (world.cluster.node(node), pod_target(world.cluster.pod(to), Protocol::Http, family));
    let outcomes = node.ask(&Ask::http(target).count(3).strict())?;
    tally(&outcomes, target, node.ip(family)).with_context(|| format!("{} to {to}", node.name))?;
    Ok(())
}

/// What waits for a first fragment is sent round by the program, which is not where it came from then.
fn fragments_in_reverse_order(world: &World, family: Family) -> Result<()> {
    let (from, to) = (world.cluster.pod("a1"), world.cluster.pod("a2"));
    let mut bulk = service("bulk", 11);
    let (port, target) = DATAGRAMS;
    bulk.ports = vec![Port { name: "bulk".into(), protocol: "UDP", port, target }];
    world.cluster.manifests().write_service(&bulk)?;
    world.cluster.manifests().write_endpoints(&bulk, &Endpoint::ready([to]))?;
    let serve = to.netns.run(|_| UdpSocket::bind(("::", DATAGRAMS.1)))?.context("bind")?;
    serve.set_read_timeout(Some(Duration::from_millis(100)))?;
    let payload: Vec<u8> = (0..3_000_usize).map(|index| (index ^ (index >> 8)) as u8).collect();
    let query =
        Frame::udp((from.ip(family).into(), 40_000), (bulk.ip(family).into(), port)).payload(&payload);
    let raw = Raw::new(&from.netns, family)?;
    let deadline = Instant::now() + stretched(LIMIT);
    let mut datagram = [0; 4_000];
    // Until the service is known.
    for id in 1.. {
        for part in (Frame { id, ..query.clone() }).fragments(800).iter().rev() {
            raw.send(part)?;
        }
        match serve.recv_from(&mut datagram) {
            Ok((length, seen)) => {
                ensure!(datagram[..length] == payload, "{length} other bytes came, {family:?}");
                let client = SocketAddr::new(seen.ip().to_canonical(), seen.port());
                ensure!(client == SocketAddr::new(from.ip(family), 40_000), "from {client}");
                return Ok(());
            }
            Err(error) => ensure!(Instant::now() < deadline, "fragments, {family:?}: {error}"),
        }
    }
    Ok(())
}

fn reaches_itself(world: &World) -> Result<()> {
    world.set_backends(&["a1"])?;
    for family in Family::BOTH {
        let target = SocketAddr::new(world.web.ip(family), 80);
        let deadline = Instant::now() + stretched(LIMIT);
        loop {
            let outcomes = world.cluster.pod("a1").ask(&Ask::http(target).count(5))?;
            let wrong = outcomes.iter().find(|it| it.answer().is_none_or(|answer| answer.by != "a1"));
            let Some(wrong) = wrong else { break };
            ensure!(Instant::now() < deadline, "a1 does not reach itself, {family:?}: {wrong:?}");
        }
    }
    Ok(())
}

/// The pins are what keeps programs in the transmissions: without, a netkit lets nothing pass.
fn programs_come_back(world: &World) -> Result<()> {
    let node = world.cluster.node("a");
    for path in pins(node, TRANSMISSION)? {
        fs::remove_file(path)?;
    }
    let deadline = Instant::now() + stretched(LIMIT);
    while transmissions(node)? < 2 {
        ensure!(Instant::now() < deadline, "the programs are not back");
        thread::sleep(Duration::from_millis(50));
    }
    talks(world, "a1", "a2", Family::V4)
}

fn nothing_is_left(node: &Node) -> Result<()> {
    let deadline = Instant::now() + stretched(LIMIT);
    loop {
        let links: Vec<_> =
            node.netns.interfaces()?.into_iter().filter(|name| name.starts_with("ff")).collect();
        let pins = pins(node, "pod_")?;
        if links.is_empty() && pins.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "left: {links:?}, {pins:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

const TRANSMISSION: &str = "pod_transmission-";

/// How many pods have the program in their transmission, which the kernel takes of netkits alone.
fn transmissions(node: &Node) -> Result<usize> {
    Ok(pins(node, TRANSMISSION)?.len())
}

fn pins(node: &Node, prefix: &str) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(node.bpffs.join("links"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    Ok(found)
}
