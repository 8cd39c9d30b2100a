//! Two nodes as a cluster has them on which the chart is installed as it is: nobody but the agents has connected them,
//! pods are attached by the plugin, packets between nodes go in VXLAN, pods are masqueraded to the world, the kernel
//! filters reverse paths strictly and tracks connections, because kubelet has a rule that asks it to.
//!
//! ```text
//!   a1, a2 ── node a ──┐
//!   b1, b2 ── node b ──┼── switch
//!              host c ─┘       (a machine outside of the cluster)
//! ```

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::{
    agent::Agent,
    cluster::{Cluster, Family, Node, Pod},
    cni::{Container, Runtime},
    manifests::{Endpoint, Service, State},
    patience::stretched,
    pod::Outcome,
    sandbox::Sandbox,
    traffic::{Ask, Client, Protocol},
};

/// How long a change may take to be in force; upstream waits a minute and more.
pub const SOON: Duration = Duration::from_secs(60);

/// What the chart gives the agent beside `--cni`, and that Services have external addresses, which is off there.
const CHART: &[&str] = &["--routing", "vxlan", "--socket-lb", "tcp", "--external-ips", "serve"];

/// As on every cluster since Kubernetes 1.33.
const RANGES: &str = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n\
                      spec: {cidrs: [10.96.0.0/16, \"fd00:10:96::/112\"]}\n";

#[derive(Debug)]
pub struct Installed {
    pub agents: Vec<Agent>,
    pub runtimes: Vec<Runtime>,
    pub cluster: Cluster,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    Pod(&'static str),
    /// A process of this host, as a pod of the host's network is.
    Host(&'static str),
}

/// What must come of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect<'a> {
    /// All of these answer in the end, and nobody else ever does.
    Each(&'a [&'a str]),
    Refused,
    /// However it fails.
    Fails,
}

impl Installed {
    /// Runs a test; a failure comes with what the agents say of themselves.
    pub fn test(sandbox: &Sandbox, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut installed = Self::new(sandbox)?;
        test(&mut installed).map_err(|error| {
            let of = |agent: &Agent| match agent.status() {
                Ok(status) => format!("{}{status}\n", agent.log_tail()),
                Err(error) => format!("{}{error:#}\n", agent.log_tail()),
            };
            let said: String = installed.agents.iter().map(of).collect();
            anyhow!("{error:#}\n{said}")
        })
    }

    fn new(sandbox: &Sandbox) -> Result<Self> {
        let cluster = Cluster::unrouted(sandbox, &["a", "b", "c"])?;
        cluster.manifests().write("nodes", &of_cluster(&cluster)?)?;
        cluster.manifests().write("ranges", RANGES)?;
        let mut installed = Self { agents: Vec::new(), runtimes: Vec::new(), cluster };
        for name in ["a", "b"] {
            let node = installed.cluster.node(name);
            as_kubelet_has_it(node)?;
            let runtime = Runtime::new(node)?;
            let cni = runtime.agent_args();
            let args: Vec<_> = cni.iter().map(String::as_str).chain(CHART.iter().copied()).collect();
            installed.agents.push(Agent::start(node, &args)?);
            installed.runtimes.push(runtime);
        }
        for name in ["a1", "a2", "b1", "b2"] {
            installed.attach(name, json!({}))?;
        }
        installed.agents.iter_mut().try_for_each(|agent| agent.wait_synced().map(drop))?;
        Ok(installed)
    }

    /// A pod of the node that its name begins with.
    pub fn attach(&mut self, name: &str, more: Value) -> Result<()> {
        let (node, runtime) = if name.starts_with('a') { ("a", 0) } else { ("b", 1) };
        let Self { cluster, runtimes, agents } = self;
        let attached = runtimes[runtime]
            .wait_ready()
            .and_then(|()| cluster.attach_with(node, name, &runtimes[runtime], more));
        attached.map_err(|error| anyhow!("{error:#}\n{}", agents[runtime].log_tail()))
    }

    /// A pod of node a or b ends, as its kubelet ends it.
    pub fn detach(&mut self, name: &str) -> Result<()> {
        self.runtimes[usize::from(!name.starts_with('a'))].del(Container { id: name, netns: "" })?;
        self.cluster.forget(name);
        Ok(())
    }

    pub fn node(&self, name: &str, family: Family) -> IpAddr {
        self.cluster.node(name).ip(family)
    }

    /// The Service as it is in the text.
    pub fn serve(&self, service: &Service, yaml: &str, endpoints: &[(&str, State)]) -> Result<()> {
        self.cluster.manifests().write(&format!("service-{}", service.name), yaml)?;
        self.endpoints(service, endpoints)
    }

    pub fn endpoints(&self, service: &Service, endpoints: &[(&str, State)]) -> Result<()> {
        let of = |&(name, state): &(&str, State)| Endpoint { pod: self.cluster.pod(name), state };
        let endpoints: Vec<_> = endpoints.iter().map(of).collect();
        self.cluster.manifests().write_endpoints(service, &endpoints)
    }

    /// The hosts themselves, instead of pods of theirs.
    pub fn host_endpoints(&self, service: &Service, pods: &[&str]) -> Result<()> {
        let pods: Vec<&Pod> = pods.iter().map(|name| self.cluster.pod(name)).collect();
        let mut slices = service.slices(&Endpoint::ready(pods.iter().copied()));
        for (pod, family) in pods.iter().flat_map(|pod| Family::BOTH.map(|family| (pod, family))) {
            let node =
                self.cluster.nodes().iter().find(|node| node.name == pod.node).context("no such node")?;
            slices = slices.replace(&format!("\"{}\"", pod.ip(family)), &format!("\"{}\"", node.ip(family)));
        }
        self.cluster.manifests().write(&format!("endpoints-{}", service.name), &slices)
    }

    pub fn ask(&self, from: From, ask: &Ask) -> Result<Vec<Outcome>> {
        match from {
            From::Pod(name) => self.cluster.pod(name).ask(ask),
            From::Host(name) => self.cluster.node(name).ask(ask),
        }
    }

    /// Asks again and again, in questions of their own, until all is as expected, or for too long.
    pub fn becomes(
        &self,
        from: From,
        protocol: Protocol,
        target: SocketAddr,
        expect: Expect<'_>,
    ) -> Result<()> {
        let (count, timeout) = match expect {
            Expect::Each(_) => (40, Duration::from_secs(2)),
            Expect::Refused | Expect::Fails => (3, Duration::from_secs(1)),
        };
        let ask = Ask::new(protocol, target).count(count).timeout(timeout);
        let ask = if let Expect::Each(_) = expect { ask.strict() } else { ask };
        let deadline = Instant::now() + stretched(SOON);
        loop {
            let outcomes = self.ask(from, &ask)?;
            let Err(error) = expect.judge(&outcomes, target) else { return Ok(()) };
            if Instant::now() > deadline {
                return Err(error.context(format!("{from}, {protocol} to {target}: not {expect:?}")));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The same, and it stays so for all that is asked.
    pub fn keep_asking(&self, from: From, ask: &Ask) -> Result<Client<Outcome>> {
        match from {
            From::Pod(name) => self.cluster.pod(name).keep_asking(ask),
            From::Host(name) => self.cluster.node(name).keep_asking(ask),
        }
    }
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name) => write!(f, "pod {name}"),
            Self::Host(name) => write!(f, "host {name}"),
        }
    }
}

impl Expect<'_> {
    fn judge(self, outcomes: &[Outcome], target: SocketAddr) -> Result<()> {
        let failed = |outcome: &Outcome| outcome.failure().map(ToString::to_string);
        let answers: BTreeSet<_> = outcomes.iter().filter_map(Outcome::answer).map(|it| &*it.by).collect();
        match self {
            Self::Each(names) => {
                if let Some(failure) = outcomes.iter().find_map(failed) {
                    bail!("{failure}; answered: {answers:?}");
                }
                let other = outcomes.iter().filter_map(Outcome::answer).find(|it| it.server != target);
                ensure!(other.is_none(), "{target} answered as {other:?}");
                ensure!(answers == names.iter().copied().collect(), "{answers:?}");
            }
            Self::Refused => {
                let kinds: Vec<_> = outcomes.iter().map(failed).collect();
                let refused = |it: &Option<String>| it.as_deref().is_some_and(|it| it.starts_with("refused"));
                ensure!(kinds.iter().all(refused), "{kinds:?}");
            }
            Self::Fails => ensure!(answers.is_empty(), "{answers:?}"),
        }
        Ok(())
    }
}

/// Nodes a and b: c is none of the cluster's.
fn of_cluster(cluster: &Cluster) -> Result<String> {
    cluster.manifests().write_nodes(cluster)?;
    let path = cluster.manifests().path().join("cluster.yaml");
    let all = std::fs::read_to_string(&path)?;
    cluster.manifests().remove("cluster")?;
    let nodes = all.split("---\n").filter(|text| !text.is_empty() && !text.contains("name: node-c\n"));
    Ok(nodes.map(|text| format!("---\n{text}")).collect())
}

/// The rule that keeps other hosts from the loopback (pkg/kubelet/kubelet_network_linux.go), which makes the kernel track
/// every connection, and the reverse path filter as the kernel has it by default on some distributions.
fn as_kubelet_has_it(node: &Node) -> Result<()> {
    for name in ["all", "default", "eth0"] {
        node.netns.sysctl(&format!("ipv4/conf/{name}/rp_filter"), "1")?;
    }
    let rule = "-d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";
    for line in [
        "-N KUBE-FIREWALL".to_owned(),
        format!("-A KUBE-FIREWALL {rule}"),
        "-I INPUT -j KUBE-FIREWALL".to_owned(),
        "-I OUTPUT -j KUBE-FIREWALL".to_owned(),
    ] {
        let mut command = Command::new("iptables");
        command.args(["-w", "10"]).args(line.split_whitespace());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let output = node.netns.spawn(command)?.wait_with_output()?;
        ensure!(output.status.success(), "iptables {line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
