//! The clusters that are measured beside each other: the same pods, with and without something in between.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    process::{Command, Stdio},
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
const PODS: &str = "10.244.0.0/16";
pub(super) const CLIENT: &str = "a1";
pub(super) const NEAR: &str = "a2";
pub(super) const FAR: &str = "b1";

impl Arena {
    /// Servers in the measured pods, and nothing else yet. Servers and clients run on `cpu`.
    pub(super) fn new(sandbox: &Sandbox, cpu: usize) -> Result<Self> {
        let cluster = Cluster::new(sandbox, &["a", "b"])?;
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

    /// kube-proxy's rules on the client's node; returns how long it took. The other node needs them where traffic goes
    /// there.
    pub(super) fn apply(&self, rules: Rules, scale: &Scale, nodes: Nodes) -> Result<Duration> {
        let text = rules.text(scale);
        let (first, rest) = self.cluster.nodes().split_first().context("no node")?;
        let start = Instant::now();
        rules.restore(first, &text)?;
        let took = start.elapsed();
        if nodes == Nodes::All {
            rest.iter().try_for_each(|node| rules.restore(node, &text))?;
        }
        Ok(took)
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

    fn restore(self, node: &Node, text: &str) -> Result<()> {
        let (program, args) = self.command();
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = node.netns.spawn(command)?;
        let written = child.stdin.take().map(|mut input| input.write_all(text.as_bytes()));
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("{program} on {}: {}", node.name, error.lines().next().unwrap_or("failed without a word"));
        }
        written.unwrap_or(Ok(())).with_context(|| format!("write rules to {program}"))
    }
}
