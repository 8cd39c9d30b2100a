//! Nine pods in three namespaces over two nodes, as upstream's Netpol specs have them, with real agents.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bpf_tests::{
    agent::Agent,
    cluster::{Cluster, Family},
    patience::stretched,
    probe::{Answering, Probe, Transport, answered},
    sandbox::Sandbox,
};
use serde_json::{Value, json};

use crate::objects::{SOON, file, policy};

/// Pods as the specs call them, and as the cluster does: those of a namespace are on both nodes.
const PODS: [(&str, &str); 9] = [
    ("x/a", "a1"),
    ("x/b", "a2"),
    ("x/c", "b1"),
    ("y/a", "b2"),
    ("y/b", "a3"),
    ("y/c", "b3"),
    ("z/a", "a4"),
    ("z/b", "b4"),
    ("z/c", "a5"),
];
const PODS_PER_NODE: u8 = 5;
const PORTS: [u16; 2] = [80, 81];

/// The cluster and the objects in it.
pub(crate) struct Net {
    policies: BTreeMap<String, Value>,
    agents: Vec<Agent>,
    answering: Vec<Answering>,
    cluster: Cluster,
}

impl Net {
    /// Without policies, everybody reaching everybody.
    pub(crate) fn new(sandbox: &Sandbox) -> Result<Self> {
        let cluster = Cluster::with_pods(sandbox, &["a", "b"], PODS_PER_NODE)?;
        cluster.manifests().write_nodes(&cluster)?;
        let mut net = Self { policies: BTreeMap::new(), agents: Vec::new(), answering: Vec::new(), cluster };
        for namespace in ["x", "y", "z"] {
            net.label_namespace(namespace, json!({}))?;
        }
        for (name, pod) in PODS {
            net.label(name, json!({}))?;
            net.answering.push(Answering::start(&net.cluster.pod(pod).netns, &PORTS)?);
        }
        for node in net.cluster.nodes() {
            let mut agent = Agent::start(node, &[])?;
            agent.wait_synced()?;
            net.agents.push(agent);
        }
        Ok(net)
    }

    /// A policy that comes, or replaces the one of this name.
    pub(crate) fn create(&mut self, namespace: &str, name: &str, spec: Value) -> Result<()> {
        let policy = policy(namespace, name, spec);
        self.write(&policy)?;
        self.policies.insert(file(&policy), policy);
        Ok(())
    }

    /// All policies go.
    pub(crate) fn clean(&mut self) -> Result<()> {
        let mut files = std::mem::take(&mut self.policies).into_keys();
        files.try_for_each(|file| self.cluster.manifests().remove(&file))
    }

    /// A pod of this name has these labels, beside its own.
    pub(crate) fn label(&self, name: &str, more: Value) -> Result<()> {
        let (namespace, short) = name.split_once('/').context("no namespace")?;
        let pod = self.pod(name)?;
        let ports = PORTS.into_iter().flat_map(|port| {
            Transport::WITH_PORTS.map(|transport| {
                let protocol = transport.name();
                let name = format!("serve-{port}-{}", protocol.to_lowercase());
                json!({"name": name, "containerPort": port, "protocol": protocol})
            })
        });
        let ports: Vec<_> = ports.collect();
        self.write(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": short, "namespace": namespace, "labels": labels(json!({"pod": short}), more)},
            "spec": {"nodeName": pod.node, "containers": [{"name": "pod", "image": "pod", "ports": ports}]},
            "status": {"phase": "Running", "podIP": pod.v4, "podIPs": [{"ip": pod.v4}, {"ip": pod.v6}]},
        }))
    }

    /// A namespace has these labels, beside the one that the API gives it.
    pub(crate) fn label_namespace(&self, name: &str, more: Value) -> Result<()> {
        let labels = labels(json!({"kubernetes.io/metadata.name": name}), more);
        self.write(
            &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
        )
    }

    /// A pod's addresses as ranges of so many bits.
    pub(crate) fn ranges(&self, name: &str, [v4, v6]: [u8; 2]) -> Result<[String; 2]> {
        let pod = self.pod(name)?;
        Ok([format!("{}/{v4}", pod.v4), format!("{}/{v6}", pod.v6)])
    }

    /// Soon every pod reaches those of the others that it may, over both families, and no more.
    pub(crate) fn reach(
        &self,
        port: u16,
        transport: Transport,
        may: impl Fn(&str, &str) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + stretched(SOON);
        loop {
            let wrong = self.wrong(port, transport, &may)?;
            let Some(first) = wrong.first() else { return Ok(()) };
            ensure!(
                Instant::now() < deadline,
                "{} {port}: {} probes went wrong: {first} ..",
                transport.name(),
                wrong.len()
            );
        }
    }

    fn wrong(
        &self,
        port: u16,
        transport: Transport,
        may: impl Fn(&str, &str) -> bool,
    ) -> Result<BTreeSet<String>> {
        let probes = |from: &str| -> Result<Vec<(&str, Probe)>> {
            let others = PODS.iter().filter(|(name, _)| *name != from);
            let targets = others.flat_map(|(name, pod)| Family::BOTH.map(|family| (*name, *pod, family)));
            let probe = |(name, pod, family)| {
                let target = SocketAddr::new(self.cluster.pod(pod).ip(family), port);
                Ok((name, Probe { transport, target }))
            };
            targets.map(probe).collect()
        };
        let asked =
            PODS.iter().map(|(from, pod)| Ok((*from, *pod, probes(from)?))).collect::<Result<Vec<_>>>()?;
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = asked
                .iter()
                .map(|(_, pod, probes)| {
                    let netns = &self.cluster.pod(pod).netns;
                    let probes: Vec<_> = probes.iter().map(|(_, probe)| *probe).collect();
                    scope.spawn(move || answered(netns, &probes))
                })
                .collect();
            let joined =
                threads.into_iter().map(|it| it.join().map_err(|_panic| anyhow!("a prober panicked"))?);
            joined.collect::<Result<Vec<_>>>()
        })?
        .into_iter()
        .collect();
        let mut wrong = BTreeSet::new();
        for ((from, _, probes), passed) in asked.iter().zip(results) {
            for ((to, probe), passed) in probes.iter().zip(passed) {
                let expected = may(from, to);
                if passed != expected {
                    wrong.insert(format!("{from} -> {to} ({}): {passed}, not {expected}", probe.target.ip()));
                }
            }
        }
        Ok(wrong)
    }

    pub(crate) fn logs(&self) -> String {
        self.agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n")
    }

    fn pod(&self, name: &str) -> Result<&bpf_tests::cluster::Pod> {
        let (_, pod) = PODS.into_iter().find(|it| it.0 == name).with_context(|| format!("no pod {name}"))?;
        Ok(self.cluster.pod(pod))
    }

    fn write(&self, object: &Value) -> Result<()> {
        self.cluster.manifests().write(&file(object), &object.to_string())
    }
}

fn labels(mut own: Value, more: Value) -> Value {
    for (key, value) in more.as_object().into_iter().flatten() {
        own[key] = value.clone();
    }
    own
}
