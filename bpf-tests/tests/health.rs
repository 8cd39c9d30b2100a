//! What load balancers hear on `healthCheckNodePort`, with and without an agent.
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
    runner,
    sandbox::Sandbox,
};

fn main() -> ExitCode {
    runner::main(&[
        ("rule_40_health_checks_are_answered_while_the_agent_is_dead", health_outlives_the_agent),
        ("rule_40_a_port_that_is_taken_is_said", a_taken_port_is_said),
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
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")?;
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
