//! Limits of what pods get and send (`runtimeConfig.bandwidth`): they hold on every way to a pod, policies still apply, and
//! they outlive agents.
#![forbid(unsafe_code)]

use std::{
    net::SocketAddr,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    checks::World,
    cluster::Family,
    cni::{self, Container},
    netns::Netns,
    patience::stretched,
    pod::{ECHO_PORT, Progress},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Client},
};
use serde_json::{Value, json};

fn main() -> ExitCode {
    runner::main(&[
        ("bandwidth_limits_what_a_pod_gets_on_every_way", gets),
        ("bandwidth_limits_what_a_pod_sends", sends),
        ("bandwidth_does_not_pass_policies_by", policies),
        ("bandwidth_outlives_agents", outlives_agents),
        ("bandwidth_check_and_bad_input", check_and_bad_input),
    ])
}

/// Bytes a second; a transfer of the tests' own would have ten times as many.
const RATE: u64 = 200_000;
const TIME: Duration = Duration::from_secs(4);

/// Of all that is under way when the clock starts: a bucket, a queue, and what a client has not told yet.
const SLACK: u64 = 300_000;

/// As containerd asks: the burst is the most that its field holds.
fn limited(direction: &str) -> Value {
    let bandwidth = json!({ format!("{direction}Rate"): RATE * 8, format!("{direction}Burst"): u32::MAX });
    json!({ "runtimeConfig": { "bandwidth": bandwidth } })
}

fn attach(world: &mut World, name: &str, more: Value) -> Result<()> {
    let World { cluster, runtimes, .. } = world;
    cluster.attach_with("a", name, &runtimes[0], more)?;
    world.cluster.manifests().write_cluster(&world.cluster)?;
    world.wait_synced()
}

fn echo(world: &World, name: &str, family: Family) -> SocketAddr {
    (world.cluster.pod(name).ip(family), ECHO_PORT).into()
}

/// The bytes that came back in [`TIME`], once transfers have run for a while.
fn measured(streams: &[(&str, Client<Progress>)]) -> Result<Vec<u64>> {
    let bytes = |stream: &Client<Progress>| stream.last().map_or(0, |progress| progress.verified);
    for (who, stream) in streams {
        let begun = |seen: &[Progress]| seen.last().is_some_and(|last| last.verified > SLACK);
        stream.wait(stretched(Duration::from_secs(20)), begun).with_context(|| (*who).to_owned())?;
    }
    let before: Vec<_> = streams.iter().map(|(_, stream)| bytes(stream)).collect();
    let start = Instant::now();
    thread::sleep(TIME);
    let after: Vec<_> = streams.iter().map(|(_, stream)| bytes(stream)).collect();
    let most = RATE * u64::try_from(start.elapsed().as_millis())? / 1000 + SLACK;
    let moved: Vec<_> = before.into_iter().zip(after).map(|(before, after)| after - before).collect();
    let names: Vec<_> = streams.iter().map(|(who, _)| *who).collect();
    let (free, bound) = moved.split_first().context("no transfer")?;
    ensure!(*free > most, "{free} bytes without a limit in {:?}: no more than with one", start.elapsed());
    // One limit for all of a pod's together.
    let sum: u64 = bound.iter().sum();
    ensure!(
        sum < most,
        "{sum} bytes in {:?} ({names:?}: {moved:?}), {most} would be in order",
        start.elapsed()
    );
    ensure!(bound.iter().all(|bytes| *bytes > 0), "{names:?}: {moved:?}");
    Ok(moved)
}

fn gets(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        attach(world, "a3", limited("ingress"))?;
        for family in Family::BOTH {
            let to = echo(world, "a3", family);
            for from in ["a1", "b1"] {
                let pod = world.cluster.pod(from);
                let free = pod.stream(echo(world, "a2", family))?;
                measured(&[("free", free), (from, pod.stream(to)?)])
                    .with_context(|| format!("{from} to {to}"))?;
            }
            // Both at once share what there is.
            let streams = [
                ("free", world.cluster.pod("b1").stream(echo(world, "a2", family))?),
                ("a1", world.cluster.pod("a1").stream(to)?),
                ("b1", world.cluster.pod("b1").stream(to)?),
            ];
            measured(&streams).with_context(|| format!("two to {to}"))?;
        }
        Ok(())
    })
}

fn sends(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        attach(world, "a3", limited("egress"))?;
        for family in Family::BOTH {
            for from in ["a1", "b1"] {
                // What comes back is what the limited pod sends.
                let pod = world.cluster.pod(from);
                let streams = [
                    ("free", pod.stream(echo(world, "a2", family))?),
                    (from, pod.stream(echo(world, "a3", family))?),
                ];
                measured(&streams).with_context(|| format!("a3 to {from}, {family:?}"))?;
            }
        }
        Ok(())
    })
}

const POLICY: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guard, namespace: default}
spec:
  podSelector: {matchLabels: {pod: a3}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {pod: b1}}}]
";

fn policies(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        attach(world, "a3", limited("ingress"))?;
        world.cluster.manifests().write("policy-guard", POLICY)?;
        for family in Family::BOTH {
            let ask = Ask::http((world.cluster.pod("a3").ip(family), bpf_tests::pod::HTTP_PORT).into());
            let ask = ask.timeout(Duration::from_millis(500));
            let deadline = Instant::now() + stretched(Duration::from_secs(10));
            while world.cluster.pod("a1").ask(&ask)?.iter().any(|it| it.answer().is_some()) {
                ensure!(Instant::now() < deadline, "a1 is let in");
            }
            let outcomes = world.cluster.pod("b2").ask(&ask)?;
            ensure!(outcomes.iter().all(|it| it.failure().is_some()), "b2 is let in: {outcomes:?}");
            let ask = ask.timeout(Duration::from_secs(5)).count(3).strict();
            for outcomes in [world.cluster.pod("b1").ask(&ask)?, world.cluster.node("a").ask(&ask)?] {
                ensure!(outcomes.iter().all(|it| it.answer().is_some()), "{outcomes:?}");
            }
        }
        Ok(())
    })
}

fn outlives_agents(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        attach(world, "a3", limited("ingress"))?;
        let to = echo(world, "a3", Family::V4);
        let check = |world: &World| {
            let pod = world.cluster.pod("b1");
            let free = pod.stream(echo(world, "a2", Family::V4))?;
            measured(&[("free", free), ("b1", pod.stream(to)?)])
        };
        world.agents[0].kill9()?;
        check(world).context("without an agent")?;
        world.agents[0].restart()?;
        let status = world.agents[0].wait_synced()?;
        ensure!(status["writes"] == 0, "a restart wrote: {status}");
        check(world).context("after the restart")?;
        Ok(())
    })
}

fn check_and_bad_input(sandbox: &Sandbox) -> Result<()> {
    World::test(sandbox, &[], |world| {
        let netns = Netns::new("limited")?;
        let path = netns.path()?;
        let container = Container { id: "limited", netns: cni::path(&path)? };
        let runtime = &world.runtimes[0];
        let bad = json!({ "runtimeConfig": { "bandwidth": { "egressRate": 7 } } });
        let answer = runtime.command("ADD", container, bad)?;
        ensure!(
            answer.code()? == 7 && answer.text.contains("runtimeConfig.bandwidth.egressRate"),
            "{answer:?}"
        );
        ensure!(netns.interfaces()? == ["lo"], "something is left");
        let result = runtime.command("ADD", container, json!({}))?.result()?;
        for (direction, way) in [("ingress", "gets"), ("egress", "sends")] {
            let mut more = limited(direction);
            more["prevResult"] = result.clone();
            let answer = runtime.command("CHECK", container, more)?;
            let said = format!("does not limit what the pod {way}");
            ensure!(answer.code()? == 102 && answer.text.contains(&said), "{answer:?}");
        }
        Ok(())
    })
}
