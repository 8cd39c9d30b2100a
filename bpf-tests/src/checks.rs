//! What must hold on the wire, for the demo and the tests alike.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::{
    agent::{Agent, Api},
    cluster::{Cluster, Family, Pod},
    cni::Runtime,
    manifests::{Endpoint, Port, Service},
    patience::stretched,
    pod::{DNS_PORT, ECHO_PORT, FailureKind, HTTP_PORT, Outcome, SCTP_PORT},
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};

/// Two nodes with an agent each that attached their pods, a service with a backend on each node, and a service without any.
#[derive(Debug)]
pub struct World {
    pub agents: Vec<Agent>,
    /// What attached the pods, one a node; none over an API.
    pub runtimes: Vec<Runtime>,
    /// One a node, in worlds over an API.
    pub apis: Vec<Api>,
    /// Backends: `a2` and `b2`, so `a1` and `b1` have a local and a remote one.
    pub web: Service,
    pub empty: Service,
    pub cluster: Cluster,
}

/// One line of the demo.
#[derive(Debug)]
pub struct Check {
    pub step: String,
    pub from: String,
    pub to: String,
    pub expected: String,
    /// What was seen, or what was wrong about it.
    pub seen: Result<String>,
}

pub const WEB_PORT: u16 = 80;
pub const DNS_SERVICE_PORT: u16 = 53;
pub const ECHO_SERVICE_PORT: u16 = 7;
pub const SCTP_SERVICE_PORT: u16 = 132;

pub(crate) const DEMO_NODE_PORT: u16 = 30080;
const BACKENDS: [&str; 2] = ["a2", "b2"];
/// A backend of two is missed by chance once in a million million.
pub(crate) const REQUESTS: u32 = 40;
const PODS_PER_NODE: u32 = 2;
const PROGRAM_LIMIT: Duration = Duration::from_secs(20);

fn refusal_limit() -> Duration {
    stretched(Duration::from_millis(200))
}

fn removal_limit() -> Duration {
    stretched(Duration::from_secs(2))
}

impl World {
    /// Agents with these further arguments, synced.
    pub fn new(sandbox: &Sandbox, agent_args: &[&str]) -> Result<Self> {
        // Before anything is built: it may not be set.
        crate::agent::binary()?;
        let mut cluster = Cluster::with_pods(sandbox, &["a", "b"], 0)?;
        cluster.manifests().write_cluster(&cluster)?;
        let (agents, runtimes) = start_agents(&cluster, agent_args)?;
        attach_all(&mut cluster, &runtimes).map_err(|error| anyhow!("{error:#}\n{}", logs_of(&agents)))?;
        let mut world = Self::served(cluster, &BACKENDS)?;
        (world.agents, world.runtimes) = (agents, runtimes);
        world.wait_programmed()?;
        world.wait_synced()?;
        Ok(world)
    }

    /// The same over a Kubernetes API, one a node, with the same manifests; and what attached the pods.
    pub fn attached_over_api(sandbox: &Sandbox, agent_args: &[&str]) -> Result<(Self, Vec<Runtime>)> {
        crate::agent::binary()?;
        let mut world = Self::served(Cluster::with_pods(sandbox, &["a", "b"], 0)?, &[])?;
        let mut runtimes = Vec::new();
        for node in world.cluster.nodes() {
            let (api, runtime) = (Api::of_manifests(node)?, Runtime::new(node)?);
            let args = runtime.agent_args();
            let args: Vec<_> = args.iter().map(String::as_str).chain(agent_args.iter().copied()).collect();
            world.agents.push(Agent::start_over(&api, node, &args)?);
            world.apis.push(api);
            runtimes.push(runtime);
        }
        attach_all(&mut world.cluster, &runtimes).map_err(|error| anyhow!("{error:#}\n{}", world.logs()))?;
        world.cluster.manifests().write_cluster(&world.cluster)?;
        world.set_backends(&BACKENDS)?;
        world.wait_programmed()?;
        world.wait_synced()?;
        Ok((world, runtimes))
    }

    /// The same over a Kubernetes API, one a node, with the same manifests, and pods that another plugin has attached.
    pub fn over_api(sandbox: &Sandbox, agent_args: &[&str]) -> Result<Self> {
        crate::agent::binary()?;
        let mut world = Self::served(Cluster::new(sandbox, &["a", "b"])?, &BACKENDS)?;
        for node in world.cluster.nodes() {
            let api = Api::of_manifests(node)?;
            world.agents.push(Agent::start_over(&api, node, agent_args)?);
            world.apis.push(api);
        }
        world.wait_synced()?;
        Ok(world)
    }

    /// With the manifests of the cluster and of its services, and no agents yet.
    fn served(cluster: Cluster, backends: &[&str]) -> Result<Self> {
        let (web, empty) = (service("web", 10), service("empty", 99));
        let manifests = cluster.manifests();
        manifests.write_cluster(&cluster)?;
        manifests.write_service(&web)?;
        manifests.write_endpoints(&web, &Endpoint::ready(backends.iter().map(|name| cluster.pod(name))))?;
        manifests.write_service(&empty)?;
        manifests.write_endpoints(&empty, &[])?;
        Ok(Self { agents: Vec::new(), runtimes: Vec::new(), apis: Vec::new(), web, empty, cluster })
    }

    /// [`World::test`] over a Kubernetes API.
    pub fn test_over_api(
        sandbox: &Sandbox,
        agent_args: &[&str],
        test: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut world = Self::over_api(sandbox, agent_args)?;
        test(&mut world).map_err(|error| anyhow!("{error:#}\n{}", world.logs()))
    }

    /// Until the agents, which were in sync before there were services, have them.
    fn wait_programmed(&self) -> Result<()> {
        let backends = BACKENDS.map(|name| self.cluster.pod(name));
        let services = [&self.web, &self.empty];
        let addresses: Vec<_> = Family::BOTH
            .into_iter()
            .flat_map(|family| {
                let of_pods = backends.map(|pod| pod.ip(family));
                of_pods.into_iter().chain(services.map(|service| service.ip(family)))
            })
            .map(|addr| addr.to_string())
            .collect();
        let deadline = Instant::now() + stretched(PROGRAM_LIMIT);
        for agent in &self.agents {
            loop {
                let listed = agent.verb(&["service", "list"])?;
                let missing = addresses.iter().find(|addr| !listed.contains(*addr));
                let Some(missing) = missing else { break };
                ensure!(Instant::now() < deadline, "{missing} is not in\n{listed}\n{}", self.logs());
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// Runs a test in a new world; a failure comes with the agents' logs.
    pub fn test(
        sandbox: &Sandbox,
        agent_args: &[&str],
        test: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut world = Self::new(sandbox, agent_args)?;
        test(&mut world).map_err(|error| anyhow!("{error:#}\n{}", world.logs()))
    }

    pub fn wait_synced(&mut self) -> Result<()> {
        self.agents.iter_mut().try_for_each(|agent| agent.wait_synced().map(drop))
    }

    pub fn logs(&self) -> String {
        logs_of(&self.agents)
    }

    /// Makes these pods the backends of `web`.
    pub fn set_backends(&self, pods: &[&str]) -> Result<()> {
        let endpoints = Endpoint::ready(pods.iter().map(|name| self.cluster.pod(name)));
        self.cluster.manifests().write_endpoints(&self.web, &endpoints)
    }

    /// Every backend of `web` answers the pod, as the service, and sees the pod's own address.
    pub fn spread(&self, from: &str, protocol: Protocol, family: Family) -> Check {
        let target = target(&self.web, protocol, family);
        let pod = self.cluster.pod(from);
        let seen = pod
            .ask(&Ask::new(protocol, target).count(REQUESTS).strict())
            .and_then(|outcomes| tally(&outcomes, target, pod.ip(family)))
            .and_then(|by| every_backend(&by));
        let step = format!("{protocol} over {}", family_name(family));
        Check { step, from: from.into(), to: target.to_string(), expected: "a2 and b2 answer".into(), seen }
    }

    /// A NodePort of `web` on the loopback answers the host of the first node; the service gets it now.
    pub fn loopback(&self, family: Family) -> Check {
        let target = SocketAddr::new(loopback(family), DEMO_NODE_PORT);
        let step = format!("NodePort over {}", family_name(family));
        let (from, expected) = ("host a".into(), "a2 and b2 answer".into());
        Check { step, from, to: target.to_string(), expected, seen: self.ask_loopback(target) }
    }

    fn ask_loopback(&self, target: SocketAddr) -> Result<String> {
        let yaml = self.web.exposed("NodePort", &[(WEB_PORT, DEMO_NODE_PORT)]);
        self.cluster.manifests().write("service-web", &yaml)?;
        let node = self.cluster.node("a");
        let waiting = node.keep_asking(&Ask::http(target).interval(Duration::from_millis(10)))?;
        let answers = |outcomes: &[Outcome]| outcomes.last().is_some_and(|it| it.answer().is_some());
        waiting.wait_until(Duration::from_secs(5), answers)?;
        let outcomes = node.ask(&Ask::http(target).count(REQUESTS).strict())?;
        every_backend(&tally(&outcomes, target, node.ip(Family::of(target.ip())))?)
    }

    /// A service without endpoints refuses, and does not let its client wait.
    pub fn refusal(&self, from: &str, protocol: Protocol, family: Family) -> Check {
        let target = target(&self.empty, protocol, family);
        let ask = Ask::new(protocol, target).count(5).timeout(Duration::from_millis(500));
        let seen = self.cluster.pod(from).ask(&ask).and_then(|outcomes| refused(&outcomes));
        let step = format!("no endpoints, {protocol}");
        let expected = format!("refused in {} ms", refusal_limit().as_millis());
        Check { step, from: from.into(), to: target.to_string(), expected, seen }
    }

    /// Backend `b2` goes while requests run: none fails, and it soon gets no more.
    pub fn scale_down(&self) -> Check {
        Check {
            step: "scaled down".into(),
            from: "a1, b1".into(),
            to: "web".into(),
            expected: format!("none fails, b2 idle in {} s", removal_limit().as_secs()),
            seen: self.run_scale_down(),
        }
    }

    fn run_scale_down(&self) -> Result<String> {
        let mut clients = Vec::new();
        for (pod, protocol, family) in [
            ("a1", Protocol::Http, Family::V4),
            ("b1", Protocol::Http, Family::V6),
            ("a1", Protocol::Dns, Family::V6),
            ("b1", Protocol::Dns, Family::V4),
        ] {
            let ask =
                Ask::new(protocol, target(&self.web, protocol, family)).interval(Duration::from_millis(10));
            clients.push(self.cluster.pod(pod).keep_asking(&ask)?);
        }
        for client in &clients {
            client.wait_until(Duration::from_secs(5), |outcomes| outcomes.len() >= 20)?;
        }
        let removed = SystemTime::now();
        self.set_backends(&["a2"])?;
        thread::sleep(removal_limit() + Duration::from_millis(300));
        let mut outcomes = Vec::new();
        for client in clients {
            outcomes.extend(client.stop()?);
        }
        drained(&outcomes, "b2", removed)
    }
}

fn logs_of(agents: &[Agent]) -> String {
    agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n")
}

/// Each node's pods.
fn attach_all(cluster: &mut Cluster, runtimes: &[Runtime]) -> Result<()> {
    for (node, runtime) in ["a", "b"].into_iter().zip(runtimes) {
        runtime.wait_ready()?;
        for number in 1..=PODS_PER_NODE {
            cluster.attach(node, &format!("{node}{number}"), runtime)?;
        }
    }
    Ok(())
}

/// An agent on each node that attaches pods, and the runtime that asks it to.
fn start_agents(cluster: &Cluster, more: &[&str]) -> Result<(Vec<Agent>, Vec<Runtime>)> {
    let start = |node| {
        let runtime = Runtime::new(node)?;
        let args = runtime.agent_args();
        let args: Vec<_> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Ok((Agent::start(node, &args)?, runtime))
    };
    cluster.nodes().iter().map(start).collect()
}

impl Check {
    /// For a test: the failure says what was expected of whom.
    pub fn into_result(self) -> Result<()> {
        let Self { step, from, to, expected, seen } = self;
        seen.map(drop).with_context(|| format!("{step}: {from} -> {to}: expected: {expected}"))
    }
}

/// A dual-stack service whose addresses end in `number`.
pub fn service(name: &str, number: u8) -> Service {
    let port = |name: &str, protocol, port, target| Port { name: name.into(), protocol, port, target };
    Service {
        name: name.into(),
        cluster_ips: [
            Ipv4Addr::new(10, 96, 0, number).into(),
            Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()).into(),
        ],
        ports: vec![
            port("http", "TCP", WEB_PORT, HTTP_PORT),
            port("dns", "UDP", DNS_SERVICE_PORT, DNS_PORT),
            port("echo", "TCP", ECHO_SERVICE_PORT, ECHO_PORT),
            port("sctp", "SCTP", SCTP_SERVICE_PORT, SCTP_PORT),
        ],
        more: String::new(),
    }
}

/// Where the service offers the protocol.
pub fn target(service: &Service, protocol: Protocol, family: Family) -> SocketAddr {
    let port = match protocol {
        Protocol::Http => WEB_PORT,
        Protocol::Dns | Protocol::DnsUnconnected | Protocol::DnsOneSocket | Protocol::DnsConnected => {
            DNS_SERVICE_PORT
        }
        Protocol::Sctp => SCTP_SERVICE_PORT,
    };
    SocketAddr::new(service.ip(family), port)
}

/// Where a pod itself offers the protocol.
pub fn pod_target(pod: &Pod, protocol: Protocol, family: Family) -> SocketAddr {
    let port = match protocol {
        Protocol::Http => HTTP_PORT,
        Protocol::Dns | Protocol::DnsUnconnected | Protocol::DnsOneSocket | Protocol::DnsConnected => {
            DNS_PORT
        }
        Protocol::Sctp => SCTP_PORT,
    };
    SocketAddr::new(pod.ip(family), port)
}

/// How often each pod answered. Fails if a request failed, if an answer did not come from `server` in the eyes of
/// the client, or if a server did not see the client's own address.
pub fn tally(outcomes: &[Outcome], server: SocketAddr, client: IpAddr) -> Result<BTreeMap<String, usize>> {
    let mut by = BTreeMap::new();
    for outcome in outcomes {
        let answer = match &outcome.result {
            Ok(answer) => answer,
            Err(failure) => bail!("{failure} after {:?}; {}", outcome.took(), failures(outcomes)),
        };
        ensure!(answer.server == server, "the client sees {} for {server}", answer.server);
        ensure!(answer.client.ip() == client, "{} sees {} for {client}", answer.by, answer.client);
        *by.entry(answer.by.clone()).or_insert(0) += 1;
    }
    Ok(by)
}

/// How many of the requests failed.
pub fn failures(outcomes: &[Outcome]) -> String {
    let failed = outcomes.iter().filter(|outcome| outcome.failure().is_some()).count();
    format!("{failed} of {} failed", outcomes.len())
}

/// As `a2 19, b2 21`.
pub(crate) fn counts(by: &BTreeMap<String, usize>) -> String {
    by.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

pub(crate) fn every_backend(by: &BTreeMap<String, usize>) -> Result<String> {
    let shown = counts(by);
    ensure!(by.keys().map(String::as_str).eq(BACKENDS), "{shown}");
    Ok(shown)
}

fn refused(outcomes: &[Outcome]) -> Result<String> {
    for outcome in outcomes {
        match &outcome.result {
            Ok(answer) => bail!("{} answered", answer.by),
            Err(failure) => ensure!(failure.kind == FailureKind::Refused, "{failure}"),
        }
    }
    let longest = outcomes.iter().map(Outcome::took).max().context("no request was made")?;
    ensure!(longest < refusal_limit(), "refused after {longest:?}");
    Ok(format!("refused in {:.1} ms", longest.as_secs_f64() * 1000.0))
}

fn drained(outcomes: &[Outcome], gone: &str, removed: SystemTime) -> Result<String> {
    if let Some(failure) = outcomes.iter().find_map(Outcome::failure) {
        bail!("{failure}; {}", failures(outcomes));
    }
    let after = |outcome: &Outcome| outcome.started().duration_since(removed).ok();
    let of_gone =
        || outcomes.iter().filter(|outcome| outcome.answer().is_some_and(|answer| answer.by == gone));
    ensure!(of_gone().any(|outcome| after(outcome).is_none()), "{gone} never answered");
    ensure!(
        outcomes.iter().filter_map(after).any(|at| at > removal_limit()),
        "no request after {:?}",
        removal_limit()
    );
    let last = of_gone().filter_map(after).max().unwrap_or_default();
    ensure!(last < removal_limit(), "{gone} still answered {last:?} after it was removed");
    Ok(format!("{}, b2 idle in {} ms", failures(outcomes), last.as_millis()))
}

pub(crate) fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

pub(crate) fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}
