//! The objects of a cluster, for the agents and for the oracle alike, and probes that are held to the oracle.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    checks::World,
    cluster::{Cluster, Family},
    netns::Netns,
    oracle::{Answer, Flow, Oracle, Way},
    patience::stretched,
    probe::{Answering, Probe, Transport, answered},
};
use serde_json::{Value, json};

pub(crate) const PORTS: [u16; 3] = [8000, 8001, 8053];
pub(crate) const NAMESPACES: [&str; 2] = ["shop", "pay"];
/// Pods by name, with their namespace, the value of their label `app`, and what they call `web`.
pub(crate) const PODS: [(&str, &str, &str, u16); 4] = [
    ("a1", "shop", "client", 8000),
    ("a2", "shop", "db", 8000),
    ("b1", "pay", "client", 8001),
    ("b2", "pay", "db", 8001),
];
/// Until a change is in all tables.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// The objects of a world, and what answers in its pods.
pub(crate) struct Objects<'a> {
    world: &'a World,
    oracle: Oracle,
    answering: Vec<Answering>,
}

/// Who sends probes.
#[derive(Clone, Copy)]
pub(crate) enum From<'a> {
    Pod(&'a str),
    Host(&'a str),
}

impl<'a> Objects<'a> {
    pub(crate) fn new(world: &'a World) -> Result<Self> {
        world.cluster.manifests().write_nodes(&world.cluster)?;
        let mut objects = Self { world, oracle: Oracle::default(), answering: Vec::new() };
        for namespace in NAMESPACES {
            let labels = json!({"team": namespace});
            objects.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}))?;
        }
        for (name, _, app, _) in PODS {
            objects.apply(&objects.pod(name, app))?;
            objects.answering.push(Answering::start(&world.cluster.pod(name).netns, &PORTS)?);
        }
        Ok(objects)
    }

    pub(crate) fn pod(&self, name: &str, app: &str) -> Value {
        let pod = self.world.cluster.pod(name);
        let (_, namespace, _, web) = PODS.into_iter().find(|it| it.0 == name).unwrap_or_default();
        let ports: Vec<_> = Transport::BOTH
            .map(|it| json!({"name": "web", "containerPort": web, "protocol": it.name()}))
            .into();
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": app, "pod": name}},
            "spec": {"nodeName": pod.node, "containers": [{"name": "pod", "image": "pod", "ports": ports}]},
            "status": {"phase": "Running", "podIP": pod.v4, "podIPs": [{"ip": pod.v4}, {"ip": pod.v6}]},
        })
    }

    /// Writes an object for the agents, and tells the oracle of it.
    pub(crate) fn apply(&mut self, object: &Value) -> Result<()> {
        self.apply_as(object, object)
    }

    /// The same, where the oracle is told what is to be in force in place of the object.
    pub(crate) fn apply_as(&mut self, object: &Value, in_force: &Value) -> Result<()> {
        self.oracle.apply(in_force);
        self.world.cluster.manifests().write(&file(object), &object.to_string())
    }

    pub(crate) fn delete(&mut self, object: &Value) -> Result<()> {
        let mut gone = object.clone();
        gone["gone"] = true.into();
        self.oracle.apply(&gone);
        self.world.cluster.manifests().remove(&file(object))
    }

    /// Everybody's probes to every pod become what the oracle says; how many there are.
    pub(crate) fn agree(&self) -> Result<usize> {
        let deadline = Instant::now() + stretched(SOON);
        loop {
            let (asked, wrong) = self.compare()?;
            let Some(wrong) = wrong.first() else { return Ok(asked) };
            ensure!(Instant::now() < deadline, "{wrong}");
        }
    }

    /// How many probes there were, and those that went otherwise than the oracle says.
    fn compare(&self) -> Result<(usize, Vec<String>)> {
        let pods = PODS.map(|it| From::Pod(it.0));
        let senders: Vec<_> = pods.into_iter().chain(["a", "b"].map(From::Host)).collect();
        let probes: Vec<Vec<(Probe, bool)>> =
            senders.iter().map(|from| self.probes(*from)).collect::<Result<_>>()?;
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = senders
                .iter()
                .zip(&probes)
                .map(|(from, probes)| {
                    let sent: Vec<_> = probes.iter().map(|(probe, _)| *probe).collect();
                    scope.spawn(move || answered(from.netns(&self.world.cluster), &sent))
                })
                .collect();
            threads
                .into_iter()
                .map(|it| it.join().map_err(|_panic| anyhow::anyhow!("a prober panicked")))
                .collect()
        });
        let mut wrong = Vec::new();
        for ((from, probes), result) in senders.iter().zip(&probes).zip(results) {
            for ((probe, expected), passed) in probes.iter().zip(result??) {
                if passed != *expected {
                    let said =
                        if *expected { "should pass, and does not" } else { "should be dropped, and passes" };
                    wrong.push(format!(
                        "{} -> {} {}: {said}",
                        from.name(),
                        probe.target,
                        probe.transport.name()
                    ));
                }
            }
        }
        Ok((probes.iter().map(Vec::len).sum(), wrong))
    }

    /// With what the oracle says of each.
    fn probes(&self, from: From<'_>) -> Result<Vec<(Probe, bool)>> {
        let mut probes = Vec::new();
        for (name, ..) in PODS.into_iter().filter(|it| it.0 != from.name()) {
            for family in Family::BOTH {
                let own = from.ip(&self.world.cluster, family);
                let to = self.world.cluster.pod(name).ip(family);
                for (port, transport) in kinds() {
                    let out = Flow { peer: to, protocol: transport.name(), port };
                    let back = Flow { peer: own, ..out };
                    let leaves = match from {
                        From::Pod(pod) => self.passes(pod, Way::Out, out)?,
                        From::Host(_) => true,
                    };
                    let passes = leaves
                        && (from.has(&self.world.cluster, name) || self.passes(name, Way::In, back)?);
                    probes.push((Probe { transport, target: SocketAddr::new(to, port) }, passes));
                }
            }
        }
        Ok(probes)
    }

    fn passes(&self, pod: &str, way: Way, flow: Flow<'_>) -> Result<bool> {
        let pods = self.oracle.pods_on(&self.world.cluster.pod(pod).node);
        let (pod, _) = pods.iter().find(|(it, _)| it["metadata"]["name"] == pod).context("no such pod")?;
        Ok(self.oracle.ask(pod, way, flow) != Answer::Dropped)
    }
}

/// All that a pod is asked by.
fn kinds() -> impl Iterator<Item = (u16, Transport)> {
    let with_ports = PORTS.into_iter().flat_map(|port| Transport::WITH_PORTS.map(|it| (port, it)));
    with_ports.chain([(0, Transport::Echo)])
}

impl From<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Pod(name) | Self::Host(name) => name,
        }
    }

    fn netns<'c>(&self, cluster: &'c Cluster) -> &'c Netns {
        match self {
            Self::Pod(name) => &cluster.pod(name).netns,
            Self::Host(name) => &cluster.node(name).netns,
        }
    }

    fn ip(&self, cluster: &Cluster, family: Family) -> IpAddr {
        match self {
            Self::Pod(name) => cluster.pod(name).ip(family),
            Self::Host(name) => cluster.node(name).ip(family),
        }
    }

    /// Whether it is the host of the pod (rule 49).
    fn has(&self, cluster: &Cluster, pod: &str) -> bool {
        match self {
            Self::Pod(_) => false,
            Self::Host(name) => cluster.node(name).name == cluster.pod(pod).node,
        }
    }
}

pub(crate) fn file(object: &Value) -> String {
    let part = |value: &Value| value.as_str().unwrap_or_default().to_lowercase();
    let metadata = &object["metadata"];
    format!("{}-{}-{}", part(&object["kind"]), part(&metadata["namespace"]), part(&metadata["name"]))
}

pub(crate) fn policy(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    })
}

pub(crate) fn app(value: &str) -> Value {
    json!({"matchLabels": {"app": value}})
}
