//! What the agent says of itself over HTTP: to load balancers on `healthCheckNodePort`, also while it is dead, and to
//! Prometheus.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    agent::Agent,
    checks::service,
    cluster::{Cluster, Node},
    manifests::Endpoint,
    metrics::scrape,
    runner,
    sandbox::Sandbox,
};

fn main() -> ExitCode {
    runner::main(&[
        ("rule_40_health_checks_are_answered_while_the_agent_is_dead", health_outlives_the_agent),
        ("rule_40_a_port_that_is_taken_is_said", a_taken_port_is_said),
        ("rule_42_a_scrape_shows_what_the_agent_does", a_scrape_shows_what_the_agent_does),
    ])
}

const SOON: Duration = Duration::from_secs(20);
const CHECK_PORT: u16 = 31_040;

/// Node a with an agent, and a load balancer's service with a backend there.
fn checked<'a>(cluster: &'a Cluster, agent: &mut Option<Agent>) -> Result<&'a Node> {
    let mut web = service("web", 10);
    web.more = format!("  externalTrafficPolicy: Local\n  healthCheckNodePort: {CHECK_PORT}\n");
    let manifests = cluster.manifests();
    manifests.write_cluster(cluster)?;
    manifests.write("service-web", &web.yaml().replace("type: ClusterIP", "type: LoadBalancer"))?;
    manifests.write_endpoints(&web, &Endpoint::ready([cluster.pod("a1")]))?;
    let node = cluster.node("a");
    agent.insert(Agent::start(node, &[])?).wait_synced()?;
    Ok(node)
}

fn state_file(node: &Node) -> PathBuf {
    node.logs.join(format!("{}-run", node.name)).join("health.json")
}

fn answering(node: &Node) -> Result<serde_json::Value> {
    Ok(serde_json::from_str(&fs::read_to_string(state_file(node))?)?)
}

/// The status line of an answer, as node b gets it.
fn probe(to: SocketAddr) -> std::io::Result<String> {
    probe_path(to, "/")
}

fn probe_path(to: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn becomes_answer(cluster: &Cluster, to: SocketAddr, wanted: Option<&str>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let answer = cluster.node("b").netns.run(move |_| probe(to))?.ok();
        if answer.as_deref().map(|it| it.split(' ').nth(1).unwrap_or_default()) == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{to} answers {answer:?}, not {wanted:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn health_outlives_the_agent(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a", "b"], 1)?;
    let mut agent = None;
    let node = checked(&cluster, &mut agent)?;
    let mut agent = agent.context("no agent")?;
    let to = SocketAddr::new(node.v4.into(), CHECK_PORT);
    becomes_answer(&cluster, to, Some("200"))?;
    let (stop, from) = (Arc::new(AtomicBool::new(false)), cluster.node("b").netns.clone());
    let told = stop.clone();
    let probing = thread::spawn(move || {
        from.run(move |_| {
            let (mut answered, mut failed) = (0, Vec::new());
            while !told.load(Ordering::Relaxed) {
                match probe(to) {
                    Ok(line) if line.contains(" 200 ") => answered += 1,
                    other => failed.push(format!("{other:?}")),
                }
            }
            (answered, failed)
        })
    });
    let first = answering(node)?["pid"].clone();
    for round in 0..3 {
        agent.kill9()?;
        thread::sleep(Duration::from_millis(500));
        if round == 2 {
            // As if another version had run: the next agent starts a process of its own.
            let old = fs::read_to_string(state_file(node))?;
            let build = answering(node)?["build"].as_str().context("no build")?.to_owned();
            fs::write(state_file(node), old.replace(&build, "another"))?;
        }
        agent.restart()?;
        agent.wait_synced()?;
        let deadline = Instant::now() + SOON;
        while (answering(node)?["pid"] != first) != (round == 2) {
            ensure!(Instant::now() < deadline, "round {round}: {} answers", answering(node)?);
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(500));
    }
    let before = Path::new("/proc").join(first.to_string());
    let ended = |path: &Path| fs::read(path.join("cmdline")).map_or(true, |line| line.is_empty());
    let deadline = Instant::now() + SOON;
    while !ended(&before) {
        ensure!(Instant::now() < deadline, "the process that was superseded goes on");
        thread::sleep(Duration::from_millis(20));
    }
    stop.store(true, Ordering::Relaxed);
    let (answered, failed) = probing.join().map_err(|_panic| anyhow::anyhow!("the probe panicked"))??;
    ensure!(failed.is_empty() && answered > 50, "{answered} answered; {failed:?}\n{}", agent.log_tail());
    let second = Path::new("/proc").join(answering(node)?["pid"].to_string());
    cluster.manifests().write_endpoints(&service("web", 10), &[])?;
    becomes_answer(&cluster, to, Some("503"))?;
    cluster.manifests().remove("service-web")?;
    becomes_answer(&cluster, to, None)?;
    while !ended(&second) {
        ensure!(Instant::now() < deadline + SOON, "a process is left");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn a_taken_port_is_said(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a", "b"], 1)?;
    let taken = cluster.node("a").netns.run(|_| TcpListener::bind(("::", CHECK_PORT)))??;
    let mut agent = None;
    let node = checked(&cluster, &mut agent)?;
    let agent = agent.context("no agent")?;
    agent.wait_status(SOON, |status| status["health_problems"] == 1)?;
    ensure!(agent.log_tail().contains("FailedToStartServiceHealthcheck"), "{}", agent.log_tail());
    drop(taken);
    becomes_answer(&cluster, SocketAddr::new(node.v6.into(), CHECK_PORT), Some("200"))?;
    agent.wait_status(SOON, |status| status["health_problems"] == 0)?;
    Ok(())
}

const NODE_PORT: u16 = 30_080;

fn becomes_metric(node: &Node, agent: &Agent, name: &str, wanted: impl Fn(f64) -> bool) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let page = scrape(node);
        if page.as_ref().is_ok_and(|page| page.get(name).copied().is_some_and(&wanted)) {
            return Ok(());
        }
        let shown = page.map(|page| page.get(name).copied());
        ensure!(Instant::now() < deadline, "{name} is {shown:?}\n{}", agent.log_tail());
        thread::sleep(Duration::from_millis(20));
    }
}

fn a_scrape_shows_what_the_agent_does(sandbox: &Sandbox) -> Result<()> {
    const PROGRAMMING: &str = "kubeproxy_network_programming_duration_seconds_count";
    const CHANGES: &str = "kubeproxy_sync_proxy_rules_endpoint_changes_total";
    let cluster = Cluster::with_pods(sandbox, &["a", "b"], 1)?;
    let (node, manifests) = (cluster.node("a"), cluster.manifests());
    let mut web = service("web", 10);
    web.more = "  externalTrafficPolicy: Local\n".into();
    manifests.write_cluster(&cluster)?;
    manifests.write("service-web", &web.exposed("NodePort", &[(80, NODE_PORT)]))?;
    let slices = |pod: &str, trigger: &str| {
        let annotation = format!("endpoints.kubernetes.io/last-change-trigger-time: \"{trigger}\"");
        let slices = web.slices(&Endpoint::ready([cluster.pod(pod)]));
        slices.replace("  labels:\n", &format!("  annotations:\n    {annotation}\n  labels:\n"))
    };
    manifests.write("endpoints-web", &slices("a1", "2020-01-01T00:00:00Z"))?;
    let mut agent = Agent::start(node, &[])?;
    agent.wait_synced()?;
    becomes_metric(node, &agent, "kubeproxy_sync_proxy_rules_endpoint_changes_pending", |it| it == 0.0)?;
    let page = scrape(node)?;
    let of = |name: &str| page.get(name).copied().with_context(|| format!("no {name} in {page:?}"));
    ensure!(of(PROGRAMMING)? == 0.0, "changes of before the start were measured");
    ensure!(
        of(CHANGES)? == 2.0 && of("kubeproxy_sync_proxy_rules_service_changes_total")? == 1.0,
        "{page:?}"
    );
    ensure!(of("kubeproxy_sync_proxy_rules_duration_seconds_count")? >= 1.0, "{page:?}");
    ensure!(of("ferroflow_objects{kind=\"EndpointSlice\"}")? == 2.0, "{page:?}");
    ensure!(of("ferroflow_reconcile_writes_total")? >= 10.0, "{page:?}");
    let fill = |map: &str| -> Result<_> {
        let [entries, capacity] =
            ["entries", "capacity"].map(|of| format!("ferroflow_map_{of}{{map=\"{map}\"}}"));
        Ok((of(&entries)?, of(&capacity)?))
    };
    for map in ["frontends", "services", "backends", "slots", "endpoints"] {
        let (entries, capacity) = fill(map)?;
        ensure!(entries >= 1.0 && capacity > entries, "{map}: {entries} of {capacity}");
    }
    let external = "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"}";
    ensure!(of(external)? == 0.0 && of("ferroflow_problems")? == 0.0, "{page:?}");
    let dropped = "ferroflow_drops_total{reason=\"no-local-endpoint\"}";
    ensure!(of(dropped)? == 0.0, "{page:?}");

    // A moment that no start precedes: both slices are measured, as of now, since theirs is yet to come.
    manifests.write("endpoints-web", &slices("b1", "2999-01-01T00:00:00Z"))?;
    becomes_metric(node, &agent, PROGRAMMING, |count| count == 2.0)?;
    becomes_metric(node, &agent, external, |count| count == 1.0)?;
    let to = SocketAddr::new(node.v4.into(), NODE_PORT);
    cluster
        .node("b")
        .netns
        .run(move |_| TcpStream::connect_timeout(&to, Duration::from_millis(500)).is_ok())?;
    becomes_metric(node, &agent, dropped, |count| count >= 1.0)?;
    manifests.remove("endpoints-web")?;
    becomes_metric(node, &agent, CHANGES, |count| count == 6.0)?;
    ensure!(scrape(node)?.get(PROGRAMMING) == Some(&2.0), "deletions were measured");
    manifests.write("broken", "kind: [")?;
    becomes_metric(node, &agent, "ferroflow_problems", |count| count == 1.0)?;
    let healthz = SocketAddr::new(node.v4.into(), ferroflow::health::server::PROXY_PORT);
    becomes_answer(&cluster, healthz, Some("404"))?;
    node.netns.run(move |_| probe_path(healthz, "/healthz"))??;
    becomes_metric(node, &agent, "kubeproxy_proxy_healthz_total{code=\"200\"}", |count| count == 1.0)?;
    // Sweeps count what the tables of flows hold.
    becomes_metric(node, &agent, "ferroflow_map_capacity{map=\"conntrack_v4\"}", |capacity| capacity > 0.0)
}
