//! What somebody removes under a running agent is back within ten seconds, and said.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::programs::{TcAttachType, tc};
use bpf_tests::{
    agent::Agent,
    apiserver::{Recorded, Verb},
    checks::World,
    cluster::{Family, Node},
    netns::Prefix,
    patience::stretched,
    runner,
    sandbox::Sandbox,
    traffic::Protocol,
};
use ferroflow_ebpf::noise::Noise;
use nix::net::if_::{if_nameindex, if_nametoindex};
use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage},
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

fn main() -> ExitCode {
    runner::main(&[
        ("programs_of_interfaces_that_somebody_detaches_come_back", programs_of_interfaces),
        ("filters_that_somebody_deletes_come_back_under_clsact", filters_under_clsact),
        ("programs_of_the_cgroup_that_somebody_detaches_come_back", programs_of_the_cgroup),
        ("pins_of_maps_that_somebody_removes_come_back", pins_of_maps),
        ("routes_to_pods_that_somebody_removes_come_back", routes_to_pods),
        ("a_repair_becomes_an_event_on_the_node", a_repair_becomes_an_event),
        ("routes_that_others_make_are_no_answers", routes_that_others_make_are_no_answers),
    ])
}

const LIMIT: Duration = Duration::from_secs(10);

/// The links are what keeps the programs attached.
fn programs_of_interfaces(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "off"], |world| {
        heals(world, |node| remove_all(&node.bpffs.join("links"), |name| name.contains('-')))
    })
}

fn filters_under_clsact(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "off", "--attach", "clsact"], |world| {
        serves(world)?;
        let before: Vec<_> = world.agents.iter().map(repairs).collect::<Result<_>>()?;
        for node in world.cluster.nodes() {
            node.netns.run(|_| delete_filters())??;
        }
        for (agent, before) in world.agents.iter().zip(before) {
            wait_for("the agent says that it attached again", || Ok(repairs(agent)? > before))?;
        }
        // Nothing is left to delete where it was not attached again.
        for node in world.cluster.nodes() {
            let deleted = node.netns.run(|_| delete_filters())??;
            ensure!(deleted > 0, "no filters came back on {}", node.name);
        }
        wait_for("services", || Ok(serves(world).is_ok()))
    })
}

fn programs_of_the_cgroup(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "all"], |world| {
        heals(world, |node| remove_all(&node.bpffs.join("links"), |name| !name.contains('-')))
    })
}

/// Also for the next agent, which has nothing else to find them by.
fn pins_of_maps(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        heals(world, |node| remove_all(&node.bpffs.join("maps"), |_| true))?;
        for agent in &mut world.agents {
            agent.kill9()?;
            agent.restart()?;
            let status = agent.wait_synced()?;
            ensure!(status["writes"] == 0, "the next agent found other tables: {status}");
        }
        serves(world)
    })
}

/// Of pods that the agent attached.
fn routes_to_pods(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "off"], |world| {
        serves(world)?;
        let before: Vec<_> = world.agents.iter().map(repairs).collect::<Result<_>>()?;
        for node in world.cluster.nodes() {
            for pod in world.cluster.pods().filter(|pod| pod.node == node.name) {
                for addr in [IpAddr::V4(pod.v4), IpAddr::V6(pod.v6)] {
                    let to = Prefix { addr, len: if addr.is_ipv4() { 32 } else { 128 } };
                    node.netns.run(move |inside| inside.remove_route(to))??;
                }
            }
        }
        for (agent, before) in world.agents.iter().zip(before) {
            wait_for("the agent says that it made routes", || Ok(repairs(agent)? > before))?;
        }
        wait_for("services", || Ok(serves(world).is_ok()))
    })
}

fn a_repair_becomes_an_event(sandbox: &Sandbox) -> Result<()> {
    World::test_over_api(sandbox, &[], |world| {
        heals(world, |node| remove_all(&node.bpffs.join("links"), |_| true))?;
        for api in &world.apis {
            let is_event = |request: &Recorded| {
                let body = &request.body;
                request.verb == Verb::Write
                    && body["reason"] == "DatapathRepaired"
                    && body["regarding"]["kind"] == "Node"
                    && body["note"].as_str().is_some_and(|note| note.contains("again"))
            };
            wait_for("an event", || Ok(api.server.requests().iter().any(is_event)))?;
        }
        Ok(())
    })
}

/// Removes something of every node while it serves: it is there again, was said, and services are served.
fn heals(world: &World, remove: impl Fn(&Node) -> Result<BTreeSet<PathBuf>>) -> Result<()> {
    serves(world)?;
    let before: Vec<_> = world.agents.iter().map(repairs).collect::<Result<_>>()?;
    let mut removed = BTreeSet::new();
    for node in world.cluster.nodes() {
        removed.extend(remove(node)?);
    }
    ensure!(!removed.is_empty(), "there was nothing to remove");
    let missing = || removed.iter().find(|path| !path.exists());
    let start = Instant::now();
    while let Some(path) = missing() {
        ensure!(start.elapsed() < stretched(LIMIT), "{} is not back", path.display());
        thread::sleep(Duration::from_millis(50));
    }
    for (agent, before) in world.agents.iter().zip(before) {
        wait_for("the agent says that it repaired something", || Ok(repairs(agent)? > before))?;
    }
    serves(world)
}

fn serves(world: &World) -> Result<()> {
    for from in ["a1", "b1"] {
        for family in Family::BOTH {
            for protocol in [Protocol::Http, Protocol::Dns] {
                world.spread(from, protocol, family).into_result()?;
            }
        }
    }
    Ok(())
}

/// How many repairs the agent has said of.
fn repairs(agent: &Agent) -> Result<usize> {
    let log = agent.log()?;
    Ok(log.lines().filter(|line| line.contains("somebody removed it")).count())
}

fn remove_all(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<BTreeSet<PathBuf>> {
    let mut removed = BTreeSet::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        if wanted(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
            removed.insert(entry.path());
        }
    }
    Ok(removed)
}

/// The agent's filters of every interface, on whichever of the two sides; how many there were.
fn delete_filters() -> Result<usize> {
    let mut deleted = 0;
    for dev in &if_nameindex()? {
        for program in ["pod_egress", "pod_ingress", "device_ingress", "device_egress"] {
            for side in [TcAttachType::Ingress, TcAttachType::Egress] {
                deleted += usize::from(tc::qdisc_detach_program(dev.index(), side.into(), program).is_ok());
            }
        }
    }
    Ok(deleted)
}

fn wait_for(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + stretched(LIMIT);
    while !done()? {
        if Instant::now() > deadline {
            bail!("waited {LIMIT:?} for {what}");
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The kernel tells an agent of others' routes with the numbers of the requests that made them. Where one is taken for the
/// answer to a list of the agent's own, that list lacks routes to pods. Each agent numbers its requests from 1.
fn routes_that_others_make_are_no_answers(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let others = world.cluster.node("a").netns.run(|_| thread::spawn(move || make_routes(&stopped)))?;
        let restarted = (0..5).try_for_each(|turn| {
            world.agents[0].kill9()?;
            world.agents[0].restart()?;
            // Some events later.
            thread::sleep(Duration::from_millis(200));
            let writes = world.agents[0].wait_synced()?["writes"].clone();
            ensure!(writes == 0, "start {turn}: {writes} writes to tables\n{}", world.logs());
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        others.join().map_err(|_panic| anyhow!("it panicked")).flatten().context("make routes")?;
        restarted?;
        serves(world)
    })
}

/// A route to nobody comes and goes, again and again.
fn make_routes(stop: &AtomicBool) -> Result<()> {
    const NUMBERS: usize = 64;
    const AT_ONCE: usize = 32;
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(Ipv4Addr::new(203, 0, 113, 0), 24)
        .output_interface(if_nametoindex("eth0")?)
        .build();
    let mut turns = [
        (RouteNetlinkMessage::NewRoute(route.clone()), NLM_F_REQUEST | NLM_F_CREATE),
        (RouteNetlinkMessage::DelRoute(route), NLM_F_REQUEST),
    ]
    .map(|(change, flags)| {
        let mut message = NetlinkMessage::from(change);
        message.header.flags = flags;
        message.finalize();
        message
    });
    let mut noise = Noise(1);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..AT_ONCE {
            for message in &mut turns {
                message.header.sequence_number = u32::try_from(1 + noise.below(NUMBERS))?;
                let mut bytes = vec![0; message.buffer_len()];
                message.serialize(&mut bytes);
                socket.send(&bytes, 0)?;
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
