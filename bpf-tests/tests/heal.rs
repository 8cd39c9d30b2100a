//! What somebody removes under a running agent is back within ten seconds, and said.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
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
use nix::net::if_::if_nameindex;

fn main() -> ExitCode {
    runner::main(&[
        ("programs_of_interfaces_that_somebody_detaches_come_back", programs_of_interfaces),
        ("filters_that_somebody_deletes_come_back_under_clsact", filters_under_clsact),
        ("programs_of_the_cgroup_that_somebody_detaches_come_back", programs_of_the_cgroup),
        ("pins_of_maps_that_somebody_removes_come_back", pins_of_maps),
        ("routes_to_pods_that_somebody_removes_come_back", routes_to_pods),
        ("a_repair_becomes_an_event_on_the_node", a_repair_becomes_an_event),
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
