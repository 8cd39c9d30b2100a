//! What `cargo xtask test --kubeconfig FILE` runs: tests of a real cluster that has Ferroflow from the chart.
//!
//! ```text
//!  objects (one namespace: servers, clients, host clients on two nodes, Services of each kind)
//!     ─▶ api (make them, wait, read what they were given) ─▶ plan (who asks whom, what must come of it)
//!     ─▶ exec in the clients ─▶ policies ─▶ exec ─▶ endpoints change ─▶ exec ─▶ an agent ends under traffic
//!     ─▶ the namespace is removed, whatever happened
//! ```
//!
//! Nothing outside of the namespace is changed, but for the one agent's pod that is deleted. Each probe is asked again
//! until it is as expected, for as long as a change may take to be everywhere.

mod api;
mod objects;
mod plan;

use std::{
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Parser;
use serde_json::{Value, json};

use api::{Access, Ran};
use objects::{PODS, PORT, SERVICES, Site};
use plan::{Probe, Seen};

/// Tests a cluster that Ferroflow is installed on.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo xtask test --kubeconfig FILE --")]
pub struct Cli {
    /// Credentials of an administrator of the cluster
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: PathBuf,
    /// Upstream's test image, or a copy of it that the nodes can pull
    #[arg(long, default_value = "registry.k8s.io/e2e-test-images/agnhost:2.53")]
    pub image: String,
    /// Namespace to make [default: a new name]
    #[arg(long)]
    pub namespace: Option<String>,
    /// Where the chart is installed
    #[arg(long, default_value = "kube-system")]
    pub agents: String,
    /// Labels of the chart's pods
    #[arg(long, default_value = "app.kubernetes.io/name=ferroflow")]
    pub selector: String,
    /// How long the pods may take to come up, in seconds
    #[arg(long, default_value_t = 300)]
    pub timeout: u64,
    /// Leave the namespace as it is at the end
    #[arg(long)]
    pub keep: bool,
}

/// What came of all probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
}

pub fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.context("start").and_then(|runtime| runtime.block_on(run(&Cli::parse())));
    match outcome {
        Ok(Count { passed, failed, skipped }) => {
            println!("cluster: {passed} passed, {failed} failed, {skipped} skipped");
            if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// # Errors
/// Where the tests could not be made; a probe that fails is counted.
pub async fn run(cli: &Cli) -> Result<Count> {
    let access = Access::open(&cli.kubeconfig).await?;
    let nodes = nodes(&access).await?;
    println!("nodes: {} and {}", nodes[0], nodes[1]);
    let namespace = cli.namespace.clone().unwrap_or_else(unique);
    let site = Site { namespace, image: cli.image.clone(), nodes };
    access.create(&site.namespace()).await?;
    let mut run = Run { cli, access: &access, site: &site, count: Count::default(), cannot: None };
    let outcome = tokio::select! {
        outcome = run.all() => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
    };
    let count = run.count;
    let path = format!("/api/v1/namespaces/{}", site.namespace);
    if cli.keep {
        println!("kept: kubectl delete namespace {}", site.namespace);
    } else {
        access
            .delete(&path)
            .await
            .with_context(|| format!("remove it with: kubectl delete namespace {}", site.namespace))?;
        println!("removed namespace {}", site.namespace);
    }
    outcome.map(|()| count)
}

fn unique() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("ferroflow-test-{now:x}")
}

/// Two that are ready, or one twice; one of them may be a control plane.
async fn nodes(access: &Access) -> Result<[String; 2]> {
    let is_ready = |node: &Value| {
        let conditions = node["status"]["conditions"].as_array();
        conditions.into_iter().flatten().any(|it| it["type"] == "Ready" && it["status"] == "True")
    };
    let items = access.items("/api/v1/nodes").await?;
    let mut ready: Vec<_> = items
        .iter()
        .filter(|node| is_ready(node))
        .filter_map(|node| node["metadata"]["name"].as_str())
        .collect();
    ready.sort_unstable();
    let first = ready.first().with_context(|| format!("none of {} nodes is Ready", items.len()))?;
    Ok([first, ready.get(1).unwrap_or(first)].map(|name| (*name).to_owned()))
}

struct Run<'a> {
    cli: &'a Cli,
    access: &'a Access,
    site: &'a Site,
    count: Count,
    /// Why no command runs in pods.
    cannot: Option<String>,
}

/// What a change may take to be on every node, with pods that start meanwhile.
const EVERYWHERE: Duration = Duration::from_secs(60);

impl Run<'_> {
    async fn all(&mut self) -> Result<()> {
        for object in self.site.objects() {
            self.access.create(&object).await?;
        }
        let balanced = format!("{}/services/balanced/status", self.path());
        self.access.patch(&balanced, &objects::balancer()).await?;
        let seen = self.seen().await?;
        if seen.one_node {
            println!("one node is ready: what takes two is not asked");
        }
        for probe in seen.open() {
            self.probe(&probe).await?;
        }
        for policy in self.site.policies() {
            self.access.create(&policy).await?;
        }
        for probe in seen.guarded() {
            self.probe(&probe).await?;
        }
        self.change_endpoints(&seen).await?;
        self.end_agent(&seen).await
    }

    fn path(&self) -> String {
        format!("/api/v1/namespaces/{}", self.site.namespace)
    }

    /// Waits until all pods are ready.
    async fn seen(&self) -> Result<Seen> {
        let mut seen = Seen { one_node: self.site.nodes[0] == self.site.nodes[1], ..Seen::default() };
        let limit = Duration::from_secs(self.cli.timeout);
        for (name, _) in PODS {
            let path = format!("{}/pods/{name}", self.path());
            let ips = self.access.wait(limit, async |access| Ok(ready(&access.get(&path).await?))).await;
            seen.pods.push((name.to_owned(), ips.with_context(|| format!("pod {name}"))?));
        }
        for name in SERVICES {
            let service = self.access.get(&format!("{}/services/{name}", self.path())).await?;
            let ips = strings(&service["spec"]["clusterIPs"]).filter_map(|ip| ip.parse().ok()).collect();
            let port = |at: usize| {
                let port = service["spec"]["ports"][at]["nodePort"].as_u64().unwrap_or_default();
                u16::try_from(port).unwrap_or_default()
            };
            seen.services.push((name.to_owned(), ips, [port(0), port(1)]));
        }
        Ok(seen)
    }

    async fn probe(&mut self, probe: &Probe) -> Result<()> {
        let label = format!("{} -> {}: {}", probe.from, probe.to, probe.expect);
        let deadline = Instant::now() + EVERYWHERE;
        loop {
            let Some(output) = self.exec(probe.from, &probe.script()).await? else {
                return self.skip(&label);
            };
            match probe.judge(&output) {
                Ok(seen) => return self.pass(&format!("{label} ({seen})")),
                Err(seen) if Instant::now() > deadline => return self.fail(&format!("{label}: {seen}")),
                Err(_not_yet) => {}
            }
        }
    }

    /// Nothing where no command can be run.
    async fn exec(&mut self, pod: &str, script: &str) -> Result<Option<String>> {
        if self.cannot.is_some() {
            return Ok(None);
        }
        match self.access.exec(&self.site.namespace, pod, script).await? {
            Ran::Output(output) => Ok(Some(output)),
            Ran::Cannot(why) => {
                println!("no command runs in pods: {why}");
                self.cannot = Some(why);
                Ok(None)
            }
        }
    }

    fn pass(&mut self, line: &str) -> Result<()> {
        self.count.passed += 1;
        println!("ok     {line}");
        Ok(())
    }

    fn fail(&mut self, line: &str) -> Result<()> {
        self.count.failed += 1;
        println!("FAILED {line}");
        Ok(())
    }

    fn skip(&mut self, line: &str) -> Result<()> {
        self.count.skipped += 1;
        println!("SKIP   {line}: no command runs in pods");
        Ok(())
    }

    /// One of two servers leaves its Services and comes back.
    async fn change_endpoints(&mut self, seen: &Seen) -> Result<()> {
        let path = format!("{}/pods/server-1", self.path());
        for (label, by) in [("away", &["server-0"][..]), ("server", &["server-0", "server-1"])] {
            self.access.patch(&path, &json!({ "metadata": { "labels": { "app": label } } })).await?;
            for probe in seen.web(by) {
                self.probe(&probe).await?;
            }
        }
        Ok(())
    }

    /// The agent of a client's node is deleted and made anew: one long connection and many short ones lose nothing.
    async fn end_agent(&mut self, seen: &Seen) -> Result<()> {
        let Some(ip) =
            seen.services.iter().find(|(name, ..)| name == "web").and_then(|(_, ips, _)| ips.first())
        else {
            bail!("the Service web has no cluster IP");
        };
        if self.exec("client-0", "true").await?.is_none() {
            return self.skip("an agent ends under traffic");
        }
        let before = self.agent().await?;
        let (long, short) = traffic(*ip);
        let namespace = &self.site.namespace;
        let end = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            let (name, uid) = &before;
            let path = format!("/api/v1/namespaces/{}/pods/{name}?gracePeriodSeconds=0", self.cli.agents);
            self.access.delete(&path).await?;
            println!("deleted {name}");
            let limit = Duration::from_secs(self.cli.timeout);
            let again = self.access.wait(limit, async |_| {
                let now = self.agent().await;
                Ok(now.map_err(|error| error.to_string()).and_then(|(name, now)| {
                    if now == *uid { Err("the agent is still there".into()) } else { Ok(name) }
                }))
            });
            again.await
        };
        let (long, short, again) = tokio::try_join!(
            self.access.exec(namespace, "client-0", &long),
            self.access.exec(namespace, "client-0", &short),
            end
        )?;
        println!("{again} is ready in its place");
        for (what, ran) in [("one connection", long), ("short connections", short)] {
            let Ran::Output(output) = ran else { bail!("commands no longer run in pods") };
            match lost(&output) {
                Ok(count) => self.pass(&format!("{what} while an agent is made anew: {count} requests"))?,
                Err(why) => self.fail(&format!("{what} while an agent is made anew: {why}"))?,
            }
        }
        Ok(())
    }

    /// The ready one of the first node: name and uid.
    async fn agent(&self) -> Result<(String, String)> {
        let selector = self.cli.selector.replace('=', "%3D").replace(',', "%2C");
        let path = format!("/api/v1/namespaces/{}/pods?labelSelector={selector}", self.cli.agents);
        let pods = self.access.items(&path).await?;
        let of_node =
            |pod: &&Value| pod["spec"]["nodeName"] == self.site.nodes[0].as_str() && ready(pod).is_ok();
        let text = |pod: &Value, field: &str| pod["metadata"][field].as_str().map(str::to_owned);
        let found = pods.iter().find(of_node).and_then(|pod| Some((text(pod, "name")?, text(pod, "uid")?)));
        let (cli, node) = (self.cli, &self.site.nodes[0]);
        found.with_context(|| {
            format!(
                "no ready agent on {node}: none of {} pods of {} with {}",
                pods.len(),
                cli.agents,
                cli.selector
            )
        })
    }
}

/// Scripts for a long connection and for short ones, half a minute each: a line per request, with its status and how
/// many connections it took.
fn traffic(ip: IpAddr) -> (String, String) {
    let host = if ip.is_ipv4() { ip.to_string() } else { format!("[{ip}]") };
    let url = format!("http://{host}:{PORT}/hostname");
    let curl = r"curl -s --connect-timeout 2 -o /dev/null -w '%{http_code} %{num_connects}\n'";
    let long = format!("{curl} --rate 10/s '{url}?[1-300]' || echo failed $?");
    let short =
        format!("for i in $(seq 300); do {curl} -g --max-time 5 '{url}' || echo failed $?; sleep 0.1; done");
    // Brackets of an address are none of a range.
    let long = if ip.is_ipv4() {
        long
    } else {
        long.replace('[', r"\[").replace(']', r"\]").replace(r"\[1-300\]", "[1-300]")
    };
    (long, short)
}

/// How many requests there were; an error where one was lost, or a connection was opened in the place of another.
fn lost(output: &str) -> Result<usize, String> {
    let lines: Vec<_> = output.lines().filter(|line| !line.is_empty()).collect();
    let bad = lines.iter().find(|line| !line.starts_with("200 "));
    if let Some(bad) = bad {
        return Err(format!("`{bad}` among {} requests", lines.len()));
    }
    let connections: usize =
        lines.iter().filter_map(|line| line.rsplit_once(' ')?.1.parse::<usize>().ok()).sum();
    if connections != 1 && connections != lines.len() {
        return Err(format!("{connections} connections for {} requests", lines.len()));
    }
    if lines.len() < 100 { Err(format!("only {} requests", lines.len())) } else { Ok(lines.len()) }
}

/// The addresses of a pod that is ready; otherwise why it is not.
fn ready(pod: &Value) -> Result<Vec<IpAddr>, String> {
    let conditions = pod["status"]["conditions"].as_array();
    let is = conditions.into_iter().flatten().any(|it| it["type"] == "Ready" && it["status"] == "True");
    let ips: Vec<_> = pod["status"]["podIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip["ip"].as_str()?.parse().ok())
        .collect();
    if is && !ips.is_empty() && pod["metadata"]["deletionTimestamp"].is_null() {
        return Ok(ips);
    }
    let container = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
    Err(format!("it is not ready (phase {}, {container})", pod["status"]["phase"]))
}

fn strings(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str)
}
