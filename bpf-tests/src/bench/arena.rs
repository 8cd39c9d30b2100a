//! The clusters that are measured beside each other: the same pods, with and without something in between.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    iptables, nftables,
    scale::{ENDPOINTS, FIRST_PORT, Scale},
};
use crate::{
    agent::Agent,
    cluster::{Cluster, Node},
    pod::{
        Ready,
        load::{Kind, Sample},
    },
    sandbox::Sandbox,
    traffic::Client,
};

/// What carries the pods' traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Means {
    /// Kernel routing between addresses, no rule and no program.
    Plain,
    /// The same in another cluster: how far two equal ones differ.
    PlainAgain,
    Ferroflow,
    /// Without translation at `connect`.
    FerroflowPackets,
    Nftables,
    Iptables,
    /// The kernel's own tunnel between the nodes, and nothing else.
    Vxlan,
    FerroflowVxlan,
}

/// A cluster of two nodes under one kind of means. Fields are dropped in this order.
#[derive(Debug)]
pub(super) struct Arena {
    _servers: Vec<Client<Ready>>,
    pub(super) agents: Vec<Agent>,
    pub(super) cluster: Cluster,
    cpu: usize,
}

/// The pods of every cluster.
/// Rules that are not in the kernel after so long are not measured.
pub(super) const LOADING_LIMIT: Duration = Duration::from_mins(5);
const LOADING_STEP: Duration = Duration::from_millis(2);
const PODS: &str = "10.244.0.0/16";
pub(super) const CLIENT: &str = "a1";
pub(super) const NEAR: &str = "a2";
pub(super) const FAR: &str = "b1";

impl Arena {
    /// Servers in the measured pods, and nothing else yet. Servers and clients run on `cpu`.
    pub(super) fn new(sandbox: &Sandbox, means: Means, cpu: usize) -> Result<Self> {
        let nodes = ["a", "b"];
        let cluster = match means {
            Means::Vxlan => Cluster::tunnelled(sandbox, nodes)?,
            Means::Ferroflow | Means::FerroflowPackets => Cluster::unconnected(sandbox, &nodes)?,
            Means::FerroflowVxlan => {
                let cluster = Cluster::unconnected(sandbox, &nodes)?;
                cluster.leave_room_for_tunnels()?;
                cluster
            }
            Means::Plain | Means::PlainAgain | Means::Nftables | Means::Iptables => {
                Cluster::new(sandbox, &nodes)?
            }
        };
        let servers = [NEAR, FAR].map(|pod| {
            let args =
                ["load", "serve", "--cpu", &cpu.to_string(), &FIRST_PORT.to_string(), &ENDPOINTS.to_string()];
            let server = cluster.pod(pod).client::<Ready>(&args.map(str::to_owned))?;
            server.wait_until(Duration::from_secs(5), |lines| !lines.is_empty())?;
            Ok(server)
        });
        let servers = servers.into_iter().collect::<Result<_>>()?;
        Ok(Self { _servers: servers, agents: Vec::new(), cluster, cpu })
    }

    pub(super) fn start_agents(&mut self, args: &[&str]) -> Result<()> {
        for node in self.cluster.nodes().get(self.agents.len()..).unwrap_or_default() {
            self.agents.push(Agent::start(node, args)?);
        }
        Ok(())
    }

    /// One run of a client; `targets` are taken in turns.
    pub(super) fn load(&self, kind: Kind, targets: &[SocketAddr], time: Duration) -> Result<Sample> {
        let kind = match kind {
            Kind::Short => "short",
            Kind::RoundTrip => "round-trip",
            Kind::Stream => "stream",
        };
        let (cpu, millis) = (self.cpu.to_string(), time.as_millis().to_string());
        let mut args: Vec<_> =
            ["load", "run", "--cpu", &cpu, "--millis", &millis, kind].map(str::to_owned).into();
        args.extend(targets.iter().map(SocketAddr::to_string));
        let client = self.cluster.pod(CLIENT).client::<Sample>(&args)?;
        client.finish(time + Duration::from_secs(10))?.pop().context("the client said nothing")
    }

    /// The endpoints of a measured pod by their own addresses.
    pub(super) fn pod_targets(&self, pod: &str) -> Vec<SocketAddr> {
        let ip = self.cluster.pod(pod).v4;
        (FIRST_PORT..FIRST_PORT + ENDPOINTS).map(|port| (ip, port).into()).collect()
    }

    /// kube-proxy's rules on the client's node; returns how long it took, `None` where that was too long. The other node
    /// needs them where traffic goes there.
    pub(super) fn apply(&self, rules: Rules, scale: &Scale, nodes: Nodes) -> Result<Option<Duration>> {
        let text = rules.text(scale);
        let (first, rest) = self.cluster.nodes().split_first().context("no node")?;
        let start = Instant::now();
        if !rules.restore(first, &text)? {
            return Ok(None);
        }
        let took = start.elapsed();
        for node in rest.iter().filter(|_| nodes == Nodes::All) {
            if !rules.restore(node, &text)? {
                return Ok(None);
            }
        }
        Ok(Some(took))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nodes {
    /// Of the client and the server beside it.
    First,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rules {
    Nftables,
    Iptables,
}

impl Rules {
    fn command(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Nftables => ("nft", &["-f", "-"]),
            Self::Iptables => ("iptables-restore", &[]),
        }
    }

    /// `Err` with what to install where the tool is missing.
    pub(super) fn version(self) -> Result<String, String> {
        let (program, _) = self.command();
        match Command::new(program).arg("--version").output() {
            Ok(output) => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(format!("no {program}; `apt-get install nftables iptables` brings it"))
            }
            Err(error) => Err(format!("{program}: {error}")),
        }
    }

    fn text(self, scale: &Scale) -> String {
        match self {
            Self::Nftables => nftables::rules(scale, PODS),
            Self::Iptables => iptables::rules(scale, PODS),
        }
    }

    /// Whether it was done within [`LOADING_LIMIT`].
    fn restore(self, node: &Node, text: &str) -> Result<bool> {
        let (program, args) = self.command();
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = node.netns.spawn(command)?;
        let errors = child.stderr.take().context("its errors go elsewhere")?;
        let errors = thread::spawn(|| io::read_to_string(errors));
        let written = child.stdin.take().map(|mut input| input.write_all(text.as_bytes()));
        let limit = Instant::now() + LOADING_LIMIT;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > limit {
                child.kill().and_then(|()| child.wait()).with_context(|| format!("end {program}"))?;
                return Ok(false);
            }
            thread::sleep(LOADING_STEP);
        };
        let errors = errors.join().ok().and_then(Result::ok).unwrap_or_default();
        if !status.success() {
            bail!("{program} on {}: {}", node.name, errors.lines().next().unwrap_or("failed without a word"));
        }
        written.unwrap_or(Ok(())).with_context(|| format!("write rules to {program}"))?;
        Ok(true)
    }
}
