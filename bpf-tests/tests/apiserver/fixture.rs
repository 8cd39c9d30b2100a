//! A source that is listened to, and the clusters it is to know.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bpf_tests::apiserver::{ApiServer, Recorded, Verb};
use ferroflow::{
    model::{
        Change, ClusterNetworkPolicy, EndpointSlice, Name, Namespace, NetworkPolicy, Node, Pod, Prefix,
        Service,
    },
    watch::{
        Contact, Event, Source,
        file::{self, FileSource},
        kube::{Access, KubeSource, Timing, server},
    },
};
use tokio::sync::mpsc;

/// What a source has said so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Heard {
    pub(crate) model: Model,
    pub(crate) problems: Vec<String>,
    pub(crate) synced: u32,
    /// How often the contact was lost, and whether it is now.
    pub(crate) losses: u32,
    pub(crate) lost: bool,
    pub(crate) changes: usize,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Model {
    pub(crate) services: BTreeMap<Name, Service>,
    pub(crate) slices: BTreeMap<Name, EndpointSlice>,
    pub(crate) nodes: BTreeMap<Box<str>, Node>,
    pub(crate) pods: BTreeMap<Name, Pod>,
    pub(crate) namespaces: BTreeMap<Box<str>, Namespace>,
    pub(crate) policies: BTreeMap<Name, NetworkPolicy>,
    pub(crate) cluster_policies: BTreeMap<Box<str>, ClusterNetworkPolicy>,
    pub(crate) ranges: BTreeMap<Box<str>, Box<[Prefix]>>,
}

impl Heard {
    pub(crate) fn hear(&mut self, event: Event) {
        match event {
            Event::Change(change) => {
                self.changes += 1;
                self.model.apply(change);
            }
            Event::Problems(problems) => self.problems = problems.iter().map(ToString::to_string).collect(),
            Event::Triggered { .. } => {}
            Event::Synced => self.synced += 1,
            Event::Contact(Contact::Lost) => {
                assert!(!self.lost, "said twice");
                (self.lost, self.losses) = (true, self.losses + 1);
            }
            Event::Contact(Contact::Regained) => {
                assert!(self.lost, "what was not lost");
                self.lost = false;
            }
        }
    }
}

impl Model {
    pub(crate) fn apply(&mut self, change: Change) {
        match change {
            Change::Service(name, object) => set(&mut self.services, name, object),
            Change::EndpointSlice(name, object) => set(&mut self.slices, name, object),
            Change::Node(name, object) => set(&mut self.nodes, name, object),
            // A pod without addresses is nothing yet, or no more: the API is not asked for all of these.
            Change::Pod(name, object) => {
                set(&mut self.pods, name, object.filter(|pod| !pod.addresses.is_empty()));
            }
            Change::Namespace(name, object) => set(&mut self.namespaces, name, object),
            Change::NetworkPolicy(name, object) => set(&mut self.policies, name, object),
            Change::ClusterNetworkPolicy(name, object) => set(&mut self.cluster_policies, name, object),
            Change::ServiceCidr(name, object) => set(&mut self.ranges, name, object),
            Change::LocalRoute(..)
            | Change::LocalAddress(..)
            | Change::LocalSubnet(..)
            | Change::Uplink { .. }
            | Change::Queue { .. }
            | Change::Tunnel(_)
            | Change::Attachment(..)
            | Change::Tenant(..)
            | Change::HostPorts(..)
            | Change::KubeProxy(..) => panic!("not of a source"),
        }
    }
}

fn set<K: Ord, V>(table: &mut BTreeMap<K, V>, name: K, object: Option<V>) {
    match object {
        Some(object) => _ = table.insert(name, object),
        None => _ = table.remove(&name),
    }
}

/// A source that runs, and what it says.
pub(crate) struct Listener(Arc<Mutex<Heard>>);

impl Listener {
    pub(crate) fn start(source: impl Source + Send + 'static) -> Self {
        let (sender, mut events) = mpsc::channel(16);
        let heard = Arc::new(Mutex::new(Heard::default()));
        let hearing = heard.clone();
        tokio::spawn(source.run(sender));
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                hearing.lock().unwrap_or_else(PoisonError::into_inner).hear(event);
            }
        });
        Self(heard)
    }

    pub(crate) fn heard(&self) -> Heard {
        self.0.lock().unwrap().clone()
    }

    /// Until it is as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&Heard) -> bool) -> Heard {
        for _ in 0..30_000 {
            let reached = wanted(&self.0.lock().unwrap());
            if reached {
                return self.heard();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: not within five minutes; {:?}", self.heard());
    }
}

/// The cluster at some time: `services` of them, each with a slice, and as many pods and nodes.
pub(crate) fn cluster(services: usize, generation: u16) -> Vec<String> {
    (0..services).map(|number| member(number, generation)).collect()
}

pub(crate) fn member(number: usize, generation: u16) -> String {
    let (high, low) = (number / 250, number % 250 + 1);
    let port = 1000 + generation;
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}, namespace: default, uid: uid-of-s{number}}}\n\
         spec: {{clusterIP: 10.96.{high}.{low}, ports: [{{port: {port}}}]}}\n"
    );
    let _infallible = write!(
        text,
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: e{number}, namespace: default, labels: {{kubernetes.io/service-name: s{number}}}}}\n\
         ports: [{{port: {port}, protocol: TCP}}]\nendpoints: [{{addresses: [10.1.{high}.{low}], nodeName: n1}}]\n"
    );
    let _infallible = write!(
        text,
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{number}, namespace: default}}\n\
         spec: {{nodeName: n1}}\nstatus: {{phase: Running, podIP: 10.1.{high}.{low}}}\n\
         ---\napiVersion: v1\nkind: Node\nmetadata: {{name: n{number}}}\n\
         status: {{addresses: [{{type: InternalIP, address: 192.168.{high}.{low}}}]}}\n"
    );
    text
}

/// What the directory source makes of the same manifests.
pub(crate) async fn of_directory(manifests: &[String]) -> Model {
    let dir = tempfile::tempdir().unwrap();
    for (number, text) in manifests.iter().enumerate() {
        std::fs::write(dir.path().join(format!("{number}.yaml")), text).unwrap();
    }
    let source = FileSource::new(dir.path(), "n1", file::Timing::default());
    Listener::start(source).until("the directory", |heard| heard.synced == 1).await.model
}

/// Fast retries; patience that a loaded machine does not exhaust.
pub(crate) const TIMING: Timing = Timing {
    first_retry: Duration::from_millis(20),
    last_retry: Duration::from_millis(200),
    patience: Duration::from_secs(20),
    idle: Duration::from_secs(20),
    watch: Duration::from_secs(60),
    undefined: Duration::from_millis(50),
};

/// A server, and a source that reads from it.
pub(crate) struct Fixture {
    pub(crate) api: ApiServer,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) source: Listener,
}

impl Fixture {
    /// The cluster is there before the source is; `prepare` may spoil its first requests.
    pub(crate) async fn start(
        manifests: &[String],
        timing: Timing,
        prepare: impl FnOnce(&ApiServer),
    ) -> Self {
        let api = ApiServer::start().unwrap();
        api.set(manifests).unwrap();
        prepare(&api);
        let dir = tempfile::tempdir().unwrap();
        let source = connect(&api, dir.path(), Vec::new(), timing).await;
        Self { api, dir, source }
    }

    pub(crate) async fn synced(manifests: &[String]) -> Self {
        let it = Self::start(manifests, TIMING, |_| {}).await;
        it.source.until("the first list", |heard| heard.synced == 1).await;
        it
    }

    /// The source knows exactly these, and has contact.
    pub(crate) async fn arrives_at(&self, manifests: &[String]) -> Heard {
        self.arrives(&of_directory(manifests).await).await
    }

    pub(crate) async fn arrives(&self, model: &Model) -> Heard {
        self.source
            .until("the model", |heard| heard.model == *model && heard.synced == 1 && !heard.lost)
            .await
    }

    pub(crate) fn requests(&self, verb: Verb, path: &str) -> usize {
        let of_it = |it: &&Recorded| it.verb == verb && it.path.ends_with(path);
        self.api.requests().iter().filter(of_it).count()
    }

    /// Every injected fault has happened.
    pub(crate) async fn spent(&self) {
        self.source.until("the faults", |_| self.api.armed() == 0).await;
    }
}

pub(crate) async fn connect(api: &ApiServer, dir: &Path, servers: Vec<String>, timing: Timing) -> Listener {
    let token = dir.join("token");
    if !token.exists() {
        std::fs::write(&token, "first").unwrap();
    }
    let path = dir.join("kubeconfig");
    api.write_kubeconfig(&path, Some(&token)).unwrap();
    let servers = servers.iter().map(|text| server(text).unwrap()).collect();
    let access = Access { kubeconfig: Some(path), servers };
    Listener::start(KubeSource::open(access, "n1", timing).await.unwrap())
}
