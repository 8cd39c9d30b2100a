//! Agents that are killed, restarted and left dead while pods talk through services.
#![forbid(unsafe_code)]

use std::{
    net::IpAddr,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    agent::{Agent, Api},
    checks::{WEB_PORT, World, service, target},
    cluster::{Cluster, Family},
    manifests::Endpoint,
    metrics::is_healthy,
    netns::Prefix,
    patience::stretched,
    pod::Outcome,
    runner,
    sandbox::Sandbox,
    steady::Traffic,
    traffic::{Ask, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("kill_9_loses_nothing", kill_9_loses_nothing),
        ("kill_9_loses_nothing_on_the_packet_path", kill_9_loses_nothing_on_the_packet_path),
        ("kill_9_loses_nothing_under_clsact", kill_9_loses_nothing_under_clsact),
        ("a_stopped_agent_leaves_its_services", a_stopped_agent_leaves_its_services),
        (
            "a_restart_over_an_unchanged_cluster_writes_nothing",
            a_restart_over_an_unchanged_cluster_writes_nothing,
        ),
        ("tables_can_be_listed_without_an_agent", tables_can_be_listed_without_an_agent),
        ("a_restart_applies_what_changed_meanwhile", a_restart_applies_what_changed_meanwhile),
        ("tables_are_resized_under_traffic", tables_are_resized_under_traffic),
        ("an_api_server_that_is_away_changes_nothing", an_api_server_that_is_away_changes_nothing),
        ("an_agent_hears_of_its_nodes_new_address", an_agent_hears_of_its_nodes_new_address),
    ])
}

fn kill_9_loses_nothing(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| survives(world, Agent::kill9))
}

fn kill_9_loses_nothing_on_the_packet_path(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "off"], |world| survives(world, Agent::kill9))
}

fn kill_9_loses_nothing_under_clsact(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--socket-lb", "off", "--attach", "clsact"], |world| survives(world, Agent::kill9))
}

/// Larger, then smaller, by agents that die: rows move, connections live on, and there is nothing to write.
fn tables_are_resized_under_traffic(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &["--max-endpoints", "2048"], |world| {
        let traffic = Traffic::start(&world.cluster, &world.web)?;
        traffic.flows()?;
        for room in ["16384", "1024"] {
            for agent in &mut world.agents {
                agent.kill9()?;
                agent.set_flag("--max-endpoints", room);
                agent.restart()?;
                writes_nothing(agent)?;
            }
            thread::sleep(PHASE);
            traffic.flows().with_context(|| format!("with room for {room}"))?;
        }
        traffic.finish()?;
        for agent in &world.agents {
            ensure!(agent.log()?.contains("moved to the new map"), "nothing was moved");
        }
        world.set_backends(&["a2"])?;
        only_a2_answers_in_time(world)
    })
}

/// Also what changes is written where the programs look.
fn only_a2_answers_in_time(world: &World) -> Result<()> {
    let deadline = Instant::now() + stretched(Duration::from_secs(10));
    while let Err(error) = only_a2_answers(world) {
        ensure!(Instant::now() < deadline, "{error:#}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn a_stopped_agent_leaves_its_services(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| survives(world, |agent| agent.stop().map(drop)))
}

fn a_restart_over_an_unchanged_cluster_writes_nothing(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        for agent in &mut world.agents {
            agent.kill9()?;
            agent.restart()?;
            writes_nothing(agent)?;
        }
        Ok(())
    })
}

fn tables_can_be_listed_without_an_agent(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        world.spread("a1", Protocol::Dns, Family::V4).into_result()?;
        for agent in &mut world.agents {
            agent.kill9()?;
        }
        let agent = world.agents.first().context("no agent")?;
        let services = agent.verb(&["service", "list"])?;
        for family in Family::BOTH {
            let ip = world.web.ip(family).to_string();
            ensure!(services.contains(&ip), "`service list` does not show {ip}:\n{services}");
        }
        let connections = agent.verb(&["conntrack", "list"])?;
        let client = world.cluster.pod("a1").v4.to_string();
        ensure!(connections.contains(&client), "`conntrack list` does not show {client}:\n{connections}");
        for verb in ["service", "conntrack"] {
            let json = agent.verb(&[verb, "list", "-o", "json"])?;
            ensure!(
                serde_json::from_str::<serde_json::Value>(&json).is_ok(),
                "`{verb} list -o json`:\n{json}"
            );
        }
        Ok(())
    })
}

fn a_restart_applies_what_changed_meanwhile(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        world.agents.iter_mut().try_for_each(Agent::kill9)?;
        world.set_backends(&["a2"])?;
        world.agents.iter_mut().try_for_each(Agent::restart)?;
        world.wait_synced()?;
        only_a2_answers(world)
    })
}

fn only_a2_answers(world: &World) -> Result<()> {
    for from in ["a1", "b1"] {
        for protocol in [Protocol::Http, Protocol::Dns] {
            for family in Family::BOTH {
                let ask = Ask::new(protocol, target(&world.web, protocol, family)).count(20);
                let outcomes = world.cluster.pod(from).ask(&ask)?;
                let right = |outcome: &Outcome| outcome.answer().is_some_and(|answer| answer.by == "a2");
                let wrong = outcomes.iter().find(|outcome| !right(outcome));
                ensure!(wrong.is_none(), "{from}, {protocol}, {family:?}: {wrong:?}");
            }
        }
    }
    Ok(())
}

/// Also for agents that start meanwhile; when it is back, what changed is applied.
fn an_api_server_that_is_away_changes_nothing(sandbox: &Sandbox) -> Result<()> {
    World::test_over_api(sandbox, &[], |world| {
        let traffic = Traffic::start(&world.cluster, &world.web)?;
        traffic.flows()?;
        world.apis.iter_mut().for_each(|api| api.server.go_away());
        for agent in &world.agents {
            agent.wait_status(AWAY_LIMIT, |status| status["api_away"].is_u64())?;
        }
        traffic.flows().context("without the API")?;
        world.cluster.nodes().iter().try_for_each(is_healthy).context("without the API")?;
        for agent in &mut world.agents {
            agent.kill9()?;
            agent.restart()?;
            agent
                .wait_status(AWAY_LIMIT, |status| status["api_away"].is_u64() && status["synced"] == false)?;
        }
        thread::sleep(PHASE);
        traffic.flows().context("with agents that have never seen the API")?;
        world.cluster.nodes().iter().try_for_each(is_healthy).context("have never seen the API")?;
        traffic.finish()?;
        world.set_backends(&["a2"])?;
        world.cluster.manifests().remove("service-empty")?;
        for (api, node) in world.apis.iter_mut().zip(world.cluster.nodes()) {
            api.come_back(node)?;
        }
        for agent in &world.agents {
            agent
                .wait_status(AWAY_LIMIT, |status| status["api_away"].is_null() && status["synced"] == true)?;
        }
        for agent in &world.agents {
            let services = agent.verb(&["service", "list"])?;
            let gone = world.empty.ip(Family::V4).to_string();
            ensure!(!services.contains(&gone), "{gone} was deleted meanwhile:\n{services}");
        }
        only_a2_answers(world)
    })
}

/// Its connections to the API server are by the address of before, and nobody tells it that they are dead. Without a reason it
/// would take them to be so after 150 s.
fn an_agent_hears_of_its_nodes_new_address(sandbox: &Sandbox) -> Result<()> {
    const NODE_PORT: u16 = 30_080;
    const SOON: Duration = Duration::from_secs(45);
    let cluster = Cluster::with_pods(sandbox, &["a", "b"], 1)?;
    let web = service("web", 10);
    let manifests = cluster.manifests();
    manifests.write_cluster(&cluster)?;
    manifests.write("service-web", &web.exposed("NodePort", &[(WEB_PORT, NODE_PORT)]))?;
    manifests.write_endpoints(&web, &Endpoint::ready([cluster.pod("a1")]))?;
    let (node, other) = (cluster.node("a"), cluster.node("b"));
    let api = Api::beside(node, other)?;
    let mut agent = Agent::start_over(&api, node, &[])?;
    agent.wait_synced()?;
    let answers = |addr: IpAddr| -> Result<()> {
        let ask = Ask::http((addr, NODE_PORT).into()).timeout(Duration::from_millis(500));
        let outcomes = other.ask(&ask)?;
        ensure!(outcomes.iter().all(|it| it.answer().is_some()), "{addr}: {outcomes:?}");
        Ok(())
    };
    Family::BOTH.into_iter().try_for_each(|family| answers(node.ip(family)))?;
    let moved: [(IpAddr, IpAddr, u8); 2] =
        [(node.v4.into(), "192.168.50.101".parse()?, 24), (node.v6.into(), "fd50::101".parse()?, 64)];
    for (old, addr, len) in moved {
        node.netns.run(move |inside| {
            inside.take_address(old)?;
            inside.address("eth0", Prefix { addr, len })
        })??;
    }
    manifests.readdress(&moved.map(|(old, new, _)| (old, new)))?;
    let deadline = Instant::now() + stretched(SOON);
    while let Err(error) = moved.iter().try_for_each(|(_, new, _)| answers(*new)) {
        ensure!(Instant::now() < deadline, "{error:#}\n{}", agent.log_tail());
        thread::sleep(Duration::from_millis(50));
    }
    let said = agent.log()?;
    ensure!(said.contains("192.168.50.1, the first IPv4 address"), "nothing is said of it:\n{said}");
    Ok(())
}

/// Within it an agent has noticed, at the third try.
const AWAY_LIMIT: Duration = Duration::from_secs(60);

/// Of traffic before the agents end, without them, and after their return.
const PHASE: Duration = Duration::from_millis(500);

/// Traffic does not notice that agents end and come back, and they find nothing to write.
fn survives(world: &mut World, end: impl Fn(&mut Agent) -> Result<()>) -> Result<()> {
    let traffic = Traffic::start(&world.cluster, &world.web)?;
    traffic.flows()?;
    thread::sleep(PHASE);
    world.agents.iter_mut().try_for_each(&end)?;
    thread::sleep(PHASE);
    traffic.flows().context("without agents")?;
    for agent in &mut world.agents {
        agent.restart()?;
        writes_nothing(agent)?;
    }
    thread::sleep(PHASE);
    traffic.flows().context("after the restart")?;
    traffic.finish()
}

fn writes_nothing(agent: &mut Agent) -> Result<()> {
    let start = Instant::now();
    let status = agent.wait_synced()?;
    ensure!(status["writes"] == 0, "synced {:?} after a restart, having written: {status}", start.elapsed());
    Ok(())
}
