//! The network plugin in the kernel: pods are attached and detached by real processes of it, and agents die meanwhile.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::ExitCode,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_tests::{
    agent::Agent,
    checks::{service, tally},
    cluster::{Cluster, Family},
    cni::{self, Answer, Container, Runtime},
    manifests::Endpoint,
    netns::Netns,
    pod::HTTP_PORT,
    runner,
    sandbox::Sandbox,
};
use serde_json::{Value, json};

fn main() -> ExitCode {
    runner::main(&[
        ("rules_54_to_57_the_life_of_a_pod", rules_54_to_57_the_life_of_a_pod),
        (
            "rule_54_an_agent_that_dies_at_any_step_leaks_nothing",
            an_agent_that_dies_at_any_step_leaks_nothing,
        ),
        ("rule_55_a_hundred_pods_at_once", a_hundred_pods_at_once),
        ("rule_55_each_family_alone", each_family_alone),
        ("rule_56_del_without_an_agent_is_done_by_the_next", del_without_an_agent_is_done_by_the_next),
        ("rules_58_and_59_status_and_gc", status_and_gc),
        ("rule_60_bad_input_has_its_code_and_changes_nothing", bad_input_has_its_code_and_changes_nothing),
        ("rule_61_the_configuration_comes_late_and_stays", the_configuration_comes_late_and_stays),
        ("a_restart_keeps_pods_and_a_reboot_frees_them", a_restart_keeps_pods_and_a_reboot_frees_them),
    ])
}

/// Nodes without pods, and what attaches them.
struct Fixture {
    agents: Vec<Agent>,
    runtimes: Vec<Runtime>,
    cluster: Cluster,
}

impl Fixture {
    fn new(sandbox: &Sandbox, nodes: &[&str]) -> Result<Self> {
        let cluster = Cluster::with_pods(sandbox, nodes, 0)?;
        cluster.manifests().write_cluster(&cluster)?;
        Self::start(cluster)
    }

    /// One node with these ranges.
    fn with_ranges(sandbox: &Sandbox, ranges: &[&str]) -> Result<Self> {
        let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
        write_ranges(&cluster, ranges)?;
        Self::start(cluster)
    }

    fn start(cluster: Cluster) -> Result<Self> {
        let (mut agents, mut runtimes) = (Vec::new(), Vec::new());
        for node in cluster.nodes() {
            let runtime = Runtime::new(node)?;
            let args = runtime.agent_args();
            agents.push(Agent::start(node, &args.iter().map(String::as_str).collect::<Vec<_>>())?);
            runtimes.push(runtime);
        }
        let fixture = Self { agents, runtimes, cluster };
        fixture.runtimes.iter().try_for_each(Runtime::wait_ready).map_err(|error| fixture.blame(&error))?;
        Ok(fixture)
    }

    fn test(mut self, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        test(&mut self).map_err(|error| self.blame(&error))
    }

    fn blame(&self, error: &anyhow::Error) -> anyhow::Error {
        let logs = self.agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n");
        anyhow!("{error:#}\n{logs}")
    }

    fn runtime(&self) -> &Runtime {
        &self.runtimes[0]
    }

    fn agent(&mut self) -> &mut Agent {
        &mut self.agents[0]
    }

    /// The host's ends of pods, as the kernel has them.
    fn links(&self) -> Result<usize> {
        let names = self.cluster.nodes()[0].netns.interfaces()?;
        Ok(names.iter().filter(|name| name.starts_with("ff")).count())
    }

    /// Rows of pods in the table.
    fn rows(&self) -> Result<usize> {
        Ok(self.agents[0]
            .verb(&["map", "dump", "endpoints"])?
            .lines()
            .filter(|line| line.contains("key"))
            .count())
    }

    /// Links, rows, leases and removals that wait are soon as many as these.
    fn wait_left(&self, expected: [usize; 4]) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let runtime = self.runtime();
            let left = [self.links()?, self.rows()?, runtime.leases()?.len(), runtime.spooled()];
            if left == expected {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "links, rows, leases, spool: {left:?}, not {expected:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The Node object of the first node with other ranges.
fn write_ranges(cluster: &Cluster, ranges: &[&str]) -> Result<()> {
    let node = &cluster.nodes()[0];
    let object = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node.name },
        "spec": { "podCIDRs": ranges },
        "status": { "addresses": [{ "type": "InternalIP", "address": node.v4 }] },
    });
    cluster.manifests().write("cluster", &object.to_string())
}

/// A namespace with a container's name, as a runtime makes it before it runs the plugin.
struct Sandboxed {
    id: String,
    netns: Netns,
    path: PathBuf,
}

impl Sandboxed {
    fn new(id: &str) -> Result<Self> {
        let netns = Netns::new(id)?;
        let path = netns.path()?;
        Ok(Self { id: id.to_owned(), netns, path })
    }

    fn container(&self) -> Result<Container<'_>> {
        Ok(Container { id: &self.id, netns: cni::path(&self.path)? })
    }
}

fn rules_54_to_57_the_life_of_a_pod(sandbox: &Sandbox) -> Result<()> {
    Fixture::new(sandbox, &["a", "b"])?.test(|it| {
        for (node, name) in [("a", "a1"), ("a", "a2"), ("b", "b1")] {
            let runtime = &it.runtimes[usize::from(node == "b")];
            it.cluster.attach(node, name, runtime)?;
        }
        let manifests = it.cluster.manifests();
        let web = service("web", 10);
        manifests.write_service(&web)?;
        manifests.write_endpoints(&web, &Endpoint::ready(["a2", "b1"].map(|name| it.cluster.pod(name))))?;
        it.agents.iter_mut().try_for_each(|agent| agent.wait_synced().map(drop))?;
        let gateway_answers = |from: &str, to: &str| -> Result<()> {
            for family in Family::BOTH {
                let (from, to) = (it.cluster.pod(from), it.cluster.pod(to));
                let target = (to.ip(family), HTTP_PORT).into();
                tally(&from.http(target, 3)?, target, from.ip(family))
                    .with_context(|| format!("{} to {}, {family:?}", from.name, to.name))?;
            }
            Ok(())
        };
        for (from, to) in [("a1", "a2"), ("a2", "a1"), ("a1", "b1"), ("b1", "a1")] {
            gateway_answers(from, to)?;
        }
        for family in Family::BOTH {
            let (from, target) = (it.cluster.pod("a1"), (web.ip(family), 80).into());
            let by = tally(&from.http(target, 40)?, target, from.ip(family))?;
            ensure!(by.keys().eq(["a2", "b1"]), "{by:?}");
        }
        let errors = it.cluster.pod("a2").checksum_errors()?;
        ensure!(errors == 0, "{errors} checksum errors");
        check_and_remove(it)
    })
}

/// CHECK as ADD left it and then without a route, DEL twice, and nothing is left.
fn check_and_remove(it: &Fixture) -> Result<()> {
    let runtime = it.runtime();
    let pod = Sandboxed::new("checked")?;
    let result = runtime.add(pod.container()?)?;
    ensure!(result["cniVersion"] == "1.1.0", "{result}");
    ensure!(result["interfaces"][1]["sandbox"] == cni::path(&pod.path)?, "{result}");
    ensure!(result["interfaces"][1]["mtu"] == 1500, "{result}");
    let checked = runtime.check(pod.container()?, &result)?;
    ensure!(checked.success && checked.text.is_empty(), "{checked:?}");
    ensure!(runtime.command("ADD", pod.container()?, json!({}))?.code()? == 4, "it is there already");
    ensure!(runtime.check(pod.container()?, &result)?.success, "a refused ADD changed something");
    let mut other = result.clone();
    other["ips"][0]["address"] = "10.9.9.9/32".into();
    ensure!(runtime.check(pod.container()?, &other)?.code()? == 102, "another address");
    let host = cni::host_interface(&result)?.to_owned();
    it.cluster.nodes()[0].netns.run(move |inside| inside.down(&host))??;
    ensure!(runtime.check(pod.container()?, &result)?.code()? == 102, "its routes went with the interface");
    for _ in 0..2 {
        runtime.del(pod.container()?)?;
        ensure!(pod.netns.interfaces()? == ["lo"], "the pod's end is left");
    }
    it.wait_left([2, 4, 2, 0])?;
    ensure!(runtime.check(pod.container()?, &result)?.code()? == 3, "an unknown container");
    for name in ["a1", "a2"] {
        runtime.del(Container { id: name, netns: "" })?;
    }
    it.wait_left([0, 0, 0, 0])
}

fn an_agent_that_dies_at_any_step_leaks_nothing(sandbox: &Sandbox) -> Result<()> {
    Fixture::new(sandbox, &["a"])?.test(|it| {
        let kept = Sandboxed::new("kept")?;
        let result = it.runtime().add(kept.container()?)?;
        let mut given: BTreeSet<_> = cni::addresses(&result).into_iter().map(str::to_owned).collect();
        for step in ["requested", "leased", "wired", "served"] {
            for end in [End::Removed, End::Vanished] {
                dies_in_add(it, step, end).with_context(|| format!("died when {step}, {end:?}"))?;
                let next = Sandboxed::new(&format!("next-{step}-{end:?}"))?;
                let added = it.runtime().add(next.container()?)?;
                for addr in cni::addresses(&added) {
                    ensure!(given.insert(addr.to_owned()), "{addr} was given before, with hundreds unused");
                }
                it.runtime().del(next.container()?)?;
            }
        }
        for step in ["detached", "released"] {
            let pod = Sandboxed::new(&format!("pod-{step}"))?;
            it.runtime().add(pod.container()?)?;
            it.agent().kill9()?;
            it.agent().restart_with(&[("FERROFLOW_DIE_AT", step)])?;
            it.agent().wait_synced()?;
            it.runtime().del(pod.container()?)?;
            it.agent().wait_ended()?;
            it.agent().restart()?;
            it.wait_left([1, 2, 1, 0]).with_context(|| format!("died when {step}"))?;
            it.agent().wait_synced()?;
        }
        let checked = it.runtime().check(kept.container()?, &result)?;
        ensure!(checked.success, "{checked:?}");
        Ok(())
    })
}

/// What becomes of a pod that could not be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By the runtime, with DEL.
    Removed,
    /// Its namespace is gone, and nobody says so.
    Vanished,
}

/// One ADD in which the agent dies.
fn dies_in_add(it: &mut Fixture, step: &str, end: End) -> Result<()> {
    it.agent().kill9()?;
    it.agent().restart_with(&[("FERROFLOW_DIE_AT", step)])?;
    it.agent().wait_synced()?;
    let pod = Sandboxed::new(&format!("dies-{step}-{end:?}"))?;
    let answer = it.runtime().command("ADD", pod.container()?, json!({}))?;
    ensure!(answer.code()? == 11, "{answer:?}");
    it.agent().wait_ended()?;
    if end == End::Removed {
        it.runtime().del(pod.container()?)?;
        ensure!(it.runtime().spooled() == 1, "DEL is not in the spool");
    }
    drop(pod);
    it.agent().restart()?;
    it.agent().wait_synced()?;
    it.wait_left([1, 2, 1, 0])
}

fn a_hundred_pods_at_once(sandbox: &Sandbox) -> Result<()> {
    const PODS: usize = 100;
    Fixture::new(sandbox, &["a"])?.test(|it| {
        let runtime = it.runtime();
        let pods: Vec<_> = (0..PODS).map(|n| Sandboxed::new(&format!("pod-{n}"))).collect::<Result<_>>()?;
        let mut alone = Vec::new();
        for pod in &pods[..30] {
            alone.push(runtime.command("ADD", pod.container()?, json!({}))?);
            runtime.del(pod.container()?)?;
        }
        alone.iter().try_for_each(|answer| answer.result().map(drop))?;
        let together = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for pod in &pods {
                scope.spawn(|| {
                    let answer = pod.container().and_then(|it| runtime.command("ADD", it, json!({})));
                    together.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(answer);
                });
            }
        });
        let together = together.into_inner()?.into_iter().collect::<Result<Vec<_>>>()?;
        println!("ADD alone {}, {PODS} at once {}", times(&alone), times(&together));
        let mut given = BTreeSet::new();
        for answer in &together {
            given.extend(cni::addresses(&answer.result()?).into_iter().map(str::to_owned));
        }
        ensure!(given.len() == 2 * PODS, "{} addresses", given.len());
        it.wait_left([PODS, 2 * PODS, PODS, 0])?;
        thread::scope(|scope| {
            let removals: Vec<_> =
                pods.iter().map(|pod| scope.spawn(|| runtime.del(pod.container()?))).collect();
            removals.into_iter().try_for_each(|it| it.join().map_err(|_panic| anyhow!("DEL panicked"))?)
        })?;
        it.wait_left([0, 0, 0, 0])
    })
}

fn times(answers: &[Answer]) -> String {
    let mut times: Vec<_> = answers.iter().map(|answer| answer.took).collect();
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len() - 1) * percent / 100).copied().unwrap_or_default();
    format!("p50 {:.1?} p99 {:.1?}", at(50), at(99))
}

fn each_family_alone(sandbox: &Sandbox) -> Result<()> {
    for (range, first) in [("10.244.1.0/24", "10.244.1.2"), ("fd00:10:244:1::/64", "fd00:10:244:1::2")] {
        Fixture::with_ranges(sandbox, &[range])?.test(|it| {
            let pod = Sandboxed::new("pod")?;
            let result = it.runtime().add(pod.container()?)?;
            ensure!(cni::addresses(&result) == [first], "{result}");
            ensure!(it.runtime().check(pod.container()?, &result)?.success, "CHECK");
            it.wait_left([1, 1, 1, 0])?;
            it.runtime().del(pod.container()?)?;
            it.wait_left([0, 0, 0, 0])
        })?;
    }
    Ok(())
}

fn del_without_an_agent_is_done_by_the_next(sandbox: &Sandbox) -> Result<()> {
    Fixture::new(sandbox, &["a"])?.test(|it| {
        let pods: Vec<_> = ["p1", "p2", "p3"].into_iter().map(Sandboxed::new).collect::<Result<_>>()?;
        for pod in &pods {
            it.runtime().add(pod.container()?)?;
        }
        it.agent().kill9()?;
        for _ in 0..2 {
            it.runtime().del(pods[0].container()?)?;
        }
        it.runtime().del(Container { id: "p2", netns: "" })?;
        it.runtime().del(Container { id: "never-was", netns: "/run/netns/never-was" })?;
        ensure!(it.runtime().spooled() == 3, "{} in the spool", it.runtime().spooled());
        ensure!(it.runtime().leases()?.len() == 3, "the plugin is thin");
        it.agent().restart()?;
        it.wait_left([1, 2, 1, 0])?;
        let [_, _, last] = &pods[..] else { unreachable!("three pods") };
        let old = json!({ "cniVersion": "0.2.0", "prevResult": { "ip4": { "ip": "10.0.0.1/24" } } });
        let answer = it.runtime().command("DEL", last.container()?, old)?;
        ensure!(answer.success, "{answer:?}");
        it.wait_left([0, 0, 0, 0])
    })
}

fn status_and_gc(sandbox: &Sandbox) -> Result<()> {
    Fixture::with_ranges(sandbox, &["10.244.1.0/29"])?.test(|it| {
        let status = |runtime: &Runtime| -> Result<Answer> {
            runtime.run(&[("CNI_COMMAND", "STATUS")], &runtime.config("1.1.0", json!({}))?.to_string())
        };
        ensure!(status(it.runtime())?.success, "STATUS");
        let ids = ["p1", "p2", "p3", "p4", "p5", "p6"];
        let pods: Vec<_> = ids.into_iter().map(Sandboxed::new).collect::<Result<_>>()?;
        for pod in &pods[..5] {
            it.runtime().add(pod.container()?)?;
        }
        let full = it.runtime().command("ADD", pods[5].container()?, json!({}))?;
        ensure!(full.code()? == 101 && full.text.contains("10.244.1.0/29"), "{full:?}");
        let exhausted = status(it.runtime())?;
        ensure!(exhausted.code()? == 50, "{exhausted:?}");
        let valid: Vec<_> = ["p2", "p4"].map(|id| json!({ "containerID": id, "ifname": cni::IFNAME })).into();
        let gc = |more: Value| -> Result<Answer> {
            it.runtime().run(&[("CNI_COMMAND", "GC")], &it.runtime().config("1.1.0", more)?.to_string())
        };
        ensure!(gc(json!({}))?.code()? == 7, "GC without a list");
        ensure!(it.links()? == 5, "GC without a list collected");
        let collected = gc(json!({ "cni.dev/valid-attachments": valid }))?;
        ensure!(collected.success, "{collected:?}");
        it.wait_left([2, 2, 2, 0])?;
        ensure!(status(it.runtime())?.success, "STATUS after GC");
        write_ranges(&it.cluster, &["10.250.0.0/24"])?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let pod = Sandboxed::new("later")?;
            let result = it.runtime().add(pod.container()?)?;
            it.runtime().del(pod.container()?)?;
            if cni::addresses(&result)[0].starts_with("10.250.0.") {
                break;
            }
            ensure!(Instant::now() < deadline, "still from the old range: {result}");
        }
        write_ranges(&it.cluster, &[])?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while status(it.runtime())?.success {
            ensure!(Instant::now() < deadline, "STATUS succeeds without a range");
        }
        it.agent().kill9()?;
        ensure!(status(it.runtime())?.code()? == 50, "STATUS without an agent");
        Ok(())
    })
}

fn bad_input_has_its_code_and_changes_nothing(sandbox: &Sandbox) -> Result<()> {
    Fixture::new(sandbox, &["a"])?.test(|it| {
        let pod = Sandboxed::new("pod")?;
        let netns = cni::path(&pod.path)?;
        let runtime = it.runtime();
        let good = runtime.config("1.1.0", json!({}))?.to_string();
        let with = |more: Value| runtime.config("1.1.0", more).map(|config| config.to_string());
        let host = it.cluster.nodes()[0].netns.path()?;
        let env = |changed: (&'static str, &'static str)| {
            let all = [
                ("CNI_COMMAND", "ADD"),
                ("CNI_CONTAINERID", "pod"),
                ("CNI_NETNS", netns),
                ("CNI_IFNAME", "eth0"),
            ];
            all.map(|(name, value)| if name == changed.0 { changed } else { (name, value) })
        };
        let fine = ("", "");
        for (changed, input, code) in [
            (("CNI_COMMAND", ""), good.clone(), 4),
            (("CNI_COMMAND", "PAUSE"), good.clone(), 4),
            (("CNI_CONTAINERID", ""), good.clone(), 4),
            (("CNI_CONTAINERID", "../x"), good.clone(), 4),
            (("CNI_NETNS", ""), good.clone(), 4),
            (("CNI_NETNS", "/run/netns/none"), good.clone(), 3),
            (("CNI_NETNS", "/dev/null"), good.clone(), 3),
            (("CNI_IFNAME", "lo"), good.clone(), 4),
            (("CNI_IFNAME", "an-interface-too-long"), good.clone(), 4),
            (fine, String::new(), 6),
            (fine, "{}{".to_owned(), 6),
            (fine, with(json!({ "cniVersion": "0.1.0" }))?, 1),
            (fine, with(json!({ "cniVersion": "9.9.9" }))?, 1),
            (fine, with(json!({ "name": "" }))?, 7),
            (fine, with(json!({ "mtu": 1 }))?, 7),
            (fine, with(json!({ "mtu": -1 }))?, 6),
            (fine, with(json!({ "ipam": { "type": "dhcp" } }))?, 4),
            (fine, with(json!({ "ipam": { "type": "../dhcp" } }))?, 7),
            (fine, with(json!({ "prevResult": 3 }))?, 6),
            (fine, with(json!({ "socket": "/run/none.sock" }))?, 11),
        ] {
            let answer = runtime.run(&env(changed), &input)?;
            let found = answer.code().with_context(|| format!("{changed:?} {input}"))?;
            ensure!(found == code, "{changed:?} {input}: {answer:?}");
        }
        let own = runtime.command("ADD", Container { id: "pod", netns: cni::path(&host)? }, json!({}))?;
        ensure!(own.code()? == 4 && own.text.contains("of the host"), "{own:?}");
        ensure!(pod.netns.interfaces()? == ["lo"], "the pod has something");
        it.wait_left([0, 0, 0, 0])?;
        let smallest = runtime.command("ADD", pod.container()?, json!({ "mtu": 1280 }))?.result()?;
        ensure!(smallest["interfaces"][1]["mtu"] == 1280, "{smallest}");
        Ok(())
    })
}

fn the_configuration_comes_late_and_stays(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    write_ranges(&cluster, &[])?;
    let runtime = Runtime::new(&cluster.nodes()[0])?;
    let args = runtime.agent_args();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let mut agent = Agent::start(&cluster.nodes()[0], &args)?;
    agent.wait_synced()?;
    thread::sleep(Duration::from_millis(300));
    ensure!(!runtime.conflist().exists(), "it is written before a pod can be attached");
    write_ranges(&cluster, &["10.244.1.0/24"])?;
    runtime.wait_ready()?;
    let text = fs::read(runtime.conflist())?;
    agent.stop()?;
    ensure!(fs::read(runtime.conflist())? == text, "it went with the agent");
    fs::write(runtime.conflist(), "half a fi")?;
    agent.restart()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::read(runtime.conflist())? != text {
        ensure!(Instant::now() < deadline, "it is not repaired\n{}", agent.log_tail());
        thread::sleep(Duration::from_millis(10));
    }
    let files = fs::read_dir(runtime.conflist().parent().context("no directory")?)?.count();
    ensure!(files == 1, "{files} files");
    Ok(())
}

fn a_restart_keeps_pods_and_a_reboot_frees_them(sandbox: &Sandbox) -> Result<()> {
    Fixture::new(sandbox, &["a"])?.test(|it| {
        for name in ["a1", "a2"] {
            it.cluster.attach("a", name, &it.runtimes[0])?;
        }
        let talk = |it: &Fixture| -> Result<()> {
            for family in Family::BOTH {
                let (from, to) = (it.cluster.pod("a1"), it.cluster.pod("a2"));
                let target = (to.ip(family), HTTP_PORT).into();
                tally(&from.http(target, 5)?, target, from.ip(family))?;
            }
            Ok(())
        };
        talk(it)?;
        let before = fs::read(it.runtime().state().join("leases.json"))?;
        it.agent().kill9()?;
        talk(it).context("without an agent")?;
        it.agent().restart()?;
        let status = it.agent().wait_synced()?;
        ensure!(status["writes"] == 0, "a restart wrote: {status}");
        talk(it).context("after the restart")?;
        ensure!(fs::read(it.runtime().state().join("leases.json"))? == before, "the leases changed");
        it.agent().kill9()?;
        for name in ["a1", "a2"] {
            it.cluster.forget(name);
        }
        it.agent().restart()?;
        it.wait_left([0, 0, 0, 0])?;
        let pod = Sandboxed::new("new")?;
        let result = it.runtime().add(pod.container()?)?;
        ensure!(cni::addresses(&result)[0] == "10.244.1.4", "addresses of before rest: {result}");
        Ok(())
    })
}
