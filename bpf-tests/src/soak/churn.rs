//! What comes and goes, by chance.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use anyhow::{Context as _, Result};
use ferroflow_ebpf::noise::Noise;

use super::fault::Fault;
use crate::{
    checks::{World, service},
    cni::{Container, Runtime},
    manifests::{Endpoint, State},
};

/// A world, and what was added to it.
#[derive(Debug)]
pub(super) struct Churn {
    pub(super) world: World,
    pub(super) runtimes: Vec<Runtime>,
    pub(super) noise: Noise,
    /// Numbers of services.
    services: BTreeSet<u8>,
    policies: BTreeSet<usize>,
    /// Nodes and names of pods.
    pods: Vec<(usize, String)>,
    changes: usize,
    faults: BTreeMap<Fault, usize>,
    /// When each thing was done.
    done: Vec<(SystemTime, &'static str)>,
}

/// Whether faults end agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deaths {
    Some,
    None,
}

/// Seconds: as long as a request waits for its answer.
const AROUND: f64 = 2.0;

const NODES: [&str; 2] = ["a", "b"];
const SERVICES: usize = 20;
const POLICIES: usize = 6;
const PODS: usize = 6;

impl Churn {
    pub(super) fn new(world: World, runtimes: Vec<Runtime>, seed: u64) -> Self {
        let (services, policies) = (BTreeSet::new(), BTreeSet::new());
        let (noise, faults) = (Noise(seed), BTreeMap::new());
        Self {
            world,
            runtimes,
            noise,
            services,
            policies,
            pods: Vec::new(),
            changes: 0,
            faults,
            done: Vec::new(),
        }
    }

    pub(super) fn changes(&self) -> usize {
        self.changes
    }

    /// How often each happened.
    pub(super) fn faults(&self) -> &BTreeMap<Fault, usize> {
        &self.faults
    }

    /// Changes one thing, or breaks one.
    pub(super) fn step(&mut self, deaths: Deaths) -> Result<()> {
        self.changes += 1;
        match self.noise.below(100) {
            0..50 => {
                self.note("service changed");
                self.change_service()
            }
            50..60 => {
                self.note("backends of the traffic changed");
                self.change_backends()
            }
            60..75 => {
                self.note("policy changed");
                self.change_policy()
            }
            75..85 if self.pods.len() < PODS => {
                self.note("pod added");
                self.add_pod()
            }
            75..92 => {
                self.note("pod removed");
                self.remove_pod()
            }
            _ => {
                let possible: Vec<_> =
                    Fault::ALL.into_iter().filter(|it| deaths == Deaths::Some || !it.is_deadly()).collect();
                let fault = self.noise.pick(&possible);
                self.note(fault.name());
                self.suffer(fault).with_context(|| fault.to_string())?;
                *self.faults.entry(fault).or_default() += 1;
                Ok(())
            }
        }
    }

    fn note(&mut self, what: &'static str) {
        self.done.push((SystemTime::now(), what));
    }

    /// What was done around the time at which a request was made that has no answer: seconds, and what.
    pub(super) fn done_around(&self, made: SystemTime) -> String {
        let seconds = |at: &SystemTime| match at.duration_since(made) {
            Ok(after) => after.as_secs_f64(),
            Err(before) => -before.duration().as_secs_f64(),
        };
        let near = self.done.iter().map(|(at, what)| (seconds(at), what));
        let near = near.filter(|(at, _)| at.abs() < AROUND);
        near.map(|(at, what)| format!("{at:+.3} {what}")).collect::<Vec<_>>().join(", ")
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
        self.world.set_backends(&["a2", "b2"])
    }

    pub(super) fn change_service(&mut self) -> Result<()> {
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

    /// Which of its two backends serve, sometimes one that only finishes what it has: whoever was asked can answer.
    fn change_backends(&mut self) -> Result<()> {
        let states = [State::Ready, State::Unready, State::Terminating];
        let (first, second) = if self.noise.percent(50) { ("a2", "b2") } else { ("b2", "a2") };
        let pod = |name| self.world.cluster.pod(name);
        let mut endpoints = vec![Endpoint { pod: pod(first), state: State::Ready }];
        if self.noise.percent(80) {
            endpoints.push(Endpoint { pod: pod(second), state: self.noise.pick(&states) });
        }
        self.world.cluster.manifests().write_endpoints(&self.world.web, &endpoints)
    }

    /// The node and the name of a pod that came.
    pub(super) fn any_pod(&mut self) -> Option<(usize, String)> {
        let at = self.noise.below(self.pods.len());
        self.pods.get(at).cloned()
    }
}
