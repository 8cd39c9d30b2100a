//! What comes and goes, by chance.

use std::{collections::BTreeSet, thread, time::Duration};

use anyhow::{Context as _, Result};
use ferroflow_ebpf::noise::Noise;

use crate::{
    apiserver::{Fault, Verb},
    checks::{World, service},
    cni::{Container, Runtime},
    manifests::{Endpoint, State},
};

/// A world, and what was added to it.
#[derive(Debug)]
pub(super) struct Churn {
    pub(super) world: World,
    pub(super) runtimes: Vec<Runtime>,
    noise: Noise,
    /// Numbers of services.
    services: BTreeSet<u8>,
    policies: BTreeSet<usize>,
    /// Nodes and names of pods.
    pods: Vec<(usize, String)>,
    changes: usize,
    deaths: usize,
}

/// Whether agents are killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deaths {
    Some,
    None,
}

const NODES: [&str; 2] = ["a", "b"];
const SERVICES: usize = 20;
const POLICIES: usize = 6;
const PODS: usize = 6;

impl Churn {
    pub(super) fn new(world: World, runtimes: Vec<Runtime>, seed: u64) -> Self {
        let (services, policies) = (BTreeSet::new(), BTreeSet::new());
        let noise = Noise(seed);
        Self { world, runtimes, noise, services, policies, pods: Vec::new(), changes: 0, deaths: 0 }
    }

    pub(super) fn changes(&self) -> usize {
        self.changes
    }

    pub(super) fn deaths(&self) -> usize {
        self.deaths
    }

    /// Changes one thing.
    pub(super) fn step(&mut self, deaths: Deaths) -> Result<()> {
        self.changes += 1;
        match self.noise.below(100) {
            0..60 => self.change_service(),
            60..75 => self.change_policy(),
            75..83 if self.pods.len() < PODS => self.add_pod(),
            75..90 => self.remove_pod(),
            90..97 => self.inject(),
            97 => self.lose_api(),
            _ if deaths == Deaths::Some => self.kill(),
            _ => self.change_service(),
        }
    }

    /// Takes everything away that was added.
    pub(super) fn restore(&mut self) -> Result<()> {
        for api in &self.world.apis {
            api.server.disarm();
        }
        for number in std::mem::take(&mut self.services) {
            self.remove_service(number)?;
        }
        for number in std::mem::take(&mut self.policies) {
            self.world.cluster.manifests().remove(&format!("policy-{number}"))?;
        }
        while !self.pods.is_empty() {
            self.remove_pod()?;
        }
        Ok(())
    }

    fn change_service(&mut self) -> Result<()> {
        let number = 20 + u8::try_from(self.noise.below(SERVICES))?;
        if self.services.contains(&number) && self.noise.percent(30) {
            self.services.remove(&number);
            return self.remove_service(number);
        }
        let it = service(&format!("churn-{number}"), number);
        let manifests = self.world.cluster.manifests();
        let noise = &mut self.noise;
        let mut endpoints = Vec::new();
        for pod in self.world.cluster.pods() {
            if noise.percent(60) {
                endpoints.push(Endpoint {
                    pod,
                    state: noise.pick(&[State::Ready, State::Unready, State::Terminating]),
                });
            }
        }
        if self.services.insert(number) {
            manifests.write_service(&it)?;
        }
        manifests.write_endpoints(&it, &endpoints)
    }

    fn remove_service(&self, number: u8) -> Result<()> {
        let manifests = self.world.cluster.manifests();
        manifests.remove(&format!("service-churn-{number}"))?;
        manifests.remove(&format!("endpoints-churn-{number}"))
    }

    /// Policies are about the pods that come and go, so that the traffic is let through.
    fn change_policy(&mut self) -> Result<()> {
        let number = self.noise.below(POLICIES);
        let manifests = self.world.cluster.manifests();
        let name = format!("policy-{number}");
        if self.policies.remove(&number) {
            return manifests.remove(&name);
        }
        let port = 8000 + self.noise.below(3);
        let peer = self.noise.pick(&["a1", "b1", "a2"]);
        self.policies.insert(number);
        let text = format!(
            r#"---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{ name: {name}, namespace: default }}
spec:
  podSelector: {{ matchExpressions: [{{ key: pod, operator: NotIn, values: [a1, a2, b1, b2] }}] }}
  ingress:
  - from: [{{ podSelector: {{ matchLabels: {{ pod: {peer} }} }} }}, {{ ipBlock: {{ cidr: 10.{number}.0.0/16 }} }}]
    ports: [{{ protocol: TCP, port: {port} }}]
"#
        );
        manifests.write(&name, &text)
    }

    fn add_pod(&mut self) -> Result<()> {
        let node = self.noise.below(NODES.len());
        let name = format!("churn-{}", self.changes);
        let runtime = self.runtimes.get(node).context("no such node")?;
        self.world.cluster.attach(NODES[node], &name, runtime)?;
        self.pods.push((node, name));
        self.world.cluster.manifests().write_cluster(&self.world.cluster)
    }

    /// Its namespace goes first half of the time, as when a machine is in a hurry.
    fn remove_pod(&mut self) -> Result<()> {
        if self.pods.is_empty() {
            return Ok(());
        }
        let (node, name) = self.pods.swap_remove(self.noise.below(self.pods.len()));
        let runtime = self.runtimes.get(node).context("no such node")?.clone();
        let early = self.noise.percent(50);
        if early {
            self.world.cluster.forget(&name);
        }
        runtime.del(Container { id: &name, netns: "" })?;
        self.world.cluster.forget(&name);
        self.world.cluster.manifests().write_cluster(&self.world.cluster)
    }

    fn inject(&mut self) -> Result<()> {
        let faults =
            [Fault::Status(500, None), Fault::Status(429, Some(1)), Fault::Cut(300), Fault::Garbage(200)];
        let fault = faults[self.noise.below(faults.len())].clone();
        let verb = self.noise.pick(&[Verb::List, Verb::Watch]);
        let api = self.world.apis.get(self.noise.below(NODES.len())).context("no such API")?;
        api.server.inject(verb, "", fault, 1);
        if self.noise.percent(20) {
            api.server.compact();
        }
        Ok(())
    }

    fn lose_api(&mut self) -> Result<()> {
        let at = self.noise.below(NODES.len());
        let api = self.world.apis.get_mut(at).context("no such API")?;
        api.server.go_away();
        thread::sleep(Duration::from_millis(500));
        let node = self.world.cluster.nodes().get(at).context("no such node")?;
        api.come_back(node)
    }

    /// And starts it again, after a while in which nobody is there to hear of changes.
    fn kill(&mut self) -> Result<()> {
        self.deaths += 1;
        let at = self.noise.below(NODES.len());
        self.world.agents.get_mut(at).context("no such agent")?.kill9()?;
        self.change_service()?;
        let agent = self.world.agents.get_mut(at).context("no such agent")?;
        agent.restart()?;
        agent.wait_synced().map(drop)
    }
}
