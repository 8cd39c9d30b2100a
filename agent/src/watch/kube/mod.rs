//! The Kubernetes API as a source: every kind is listed in pages, then watched.
//!
//! ```text
//!  access: credentials, API servers in turn
//!     └─ reflect (one a kind): list ─▶ watch ─▶ 410: list again; any other fault: wait, go on from the last version
//!           frames: bytes ─▶ objects, one at a time
//!           ledger: object ─▶ Change or Problem; what a new list does not name is gone
//!     └─ voice: problems of all kinds, whether every kind was listed, whether every kind gets answers
//! ```
//!
//! Objects are converted as their bytes arrive and dropped; what stays of one is its name and a hash of what it was
//! converted to. `kube` gives the client (credentials, tokens that are read again, TLS), and not its `watcher`: that
//! decodes a page as a whole and fails as a whole where one object of it is bad, and keeps back what a fault was.
//!
//! # Faults
//!
//! Nothing that goes wrong between the agent and the API takes anything away: objects go when a watch says that they
//! were deleted, or when a complete list does not name them. Retries wait exponentially longer, with a random part, and
//! at least as long as `Retry-After` says. A server that gives no answer, breaks off, sends what makes no sense or
//! says 5xx is left for the next address. After 401 the credentials are read again (the token file once a minute
//! anyhow). A watch that brings nothing for `Timing::idle` is taken to be dead: servers send a bookmark every minute.
//! A connection by an address that the host has no longer is as dead, and nobody says so, while the news that it carries may be
//! the node's own new address: when the host loses an address every connection is left for a new one, and what waits for its
//! next try tries at once.
//!
//! # Rights
//!
//! | group | resources | verbs | for |
//! | --- | --- | --- | --- |
//! | (core) | `services`, `nodes`, `pods`, `namespaces` | `get`, `list`, `watch` | the model; `get` for the uid that an event names |
//! | `discovery.k8s.io` | `endpointslices` | `get`, `list`, `watch` | the same |
//! | `networking.k8s.io` | `networkpolicies`, `servicecidrs` | `get`, `list`, `watch` | the same |
//! | `policy.networking.k8s.io` | `clusternetworkpolicies` | `get`, `list`, `watch` | the same, where it is defined |
//! | `events.k8s.io` | `events` | `create`, `patch` | events on objects |
//! | (core) | `nodes` | `patch` | only with `--startup-taint` |
//! | (core) | `nodes/status` | `patch` | only with `--set-network-available` |
//!
//! All in a ClusterRole. Nothing else is written, and no Secret or ConfigMap is read.
//!
//! # Load
//!
//! An agent holds one watch a kind, each on a connection of its own, and asks again every 2 to 5 minutes: with 8 kinds
//! and 5,000 nodes that is 40,000 connections and 40,000 / 215 s = 186 requests a second, answered from the API servers'
//! caches. A bookmark a minute and watch is 40,000 / 60 = 667 lines a second.
//!
//! What grows with nodes is the fan-out: every change of a slice goes to every node. 10 pods that become ready a second
//! over the cluster change 10 slices (a controller batches the changes of one service); a slice of 100 endpoints is about
//! 25 KB of JSON: 10 x 5,000 x 25 KB = 1.25 GB/s out of the API servers. That is the first bottleneck, and kube-proxy has
//! the same. Pods cost more events and less each: a pod's life is about 6 events of 5 KB, so 10 pods a second are
//! 10 x 6 x 5,000 x 5 KB = 1.5 GB/s, which is why pods that are finished are not asked for, and why the next step is
//! to ask only for the pods of this node where no policy selects others. A node's status is about 15 KB every 5 minutes
//! (its heartbeats are Leases): 5,000 x 5,000 / 300 s x 15 KB = 1.25 GB/s; informers of kube-proxy pay it too.
//!
//! A restart of all agents lists everything 5,000 times: 10,000 services (1 KB), 10,000 slices of 10 (4 KB) and 20,000
//! pods (5 KB) are 150 MB each, and 750 GB together, spread by the servers' priority and fairness (429 and
//! `Retry-After`). Lists name no version: since Kubernetes 1.31 these are consistent and come from the servers' caches,
//! so that an agent never goes back in time when it turns to another server.

mod access;
mod backoff;
mod events;
mod fault;
mod frames;
mod ledger;
mod ready;
mod reflect;
mod voice;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::sync::{Mutex, watch as latest};

use access::Servers;
pub use access::{Access, AccessError, server};
use ledger::Ledger;
pub use ready::{Network, Readiness};
use reflect::Reflector;
use voice::Voice;

use super::{Event, Source};
use crate::events::Note;
use crate::model::Kind;

/// A kind of objects and where the API has it.
#[derive(Debug)]
struct Resource {
    kind: Kind,
    path: &'static str,
    scope: Scope,
    /// Which objects are asked for, by their fields; all where it is empty.
    fields: &'static str,
    age: Age,
}

/// Whether API servers have the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Age {
    /// All that this agent supports.
    Old,
    /// Newer ones (`ServiceCIDR`: 1.33): to others there are no objects of it.
    New,
    /// Those in which somebody has defined it, which may happen any time.
    Defined,
}

#[derive(Clone, Copy, Debug)]
enum Scope {
    Cluster,
    Namespaced,
}

/// What is watched. `watch::document` says how each is read.
#[rustfmt::skip]
const RESOURCES: &[Resource] = &[
    Resource { kind: Kind::Node, path: "/api/v1/nodes", scope: Scope::Cluster, fields: "", age: Age::Old },
    Resource { kind: Kind::Namespace, path: "/api/v1/namespaces", scope: Scope::Cluster, fields: "", age: Age::Old },
    Resource { kind: Kind::Service, path: "/api/v1/services", scope: Scope::Namespaced, fields: "", age: Age::Old },
    Resource { kind: Kind::EndpointSlice, path: "/apis/discovery.k8s.io/v1/endpointslices", scope: Scope::Namespaced, fields: "", age: Age::Old },
    Resource { kind: Kind::Pod, path: "/api/v1/pods", scope: Scope::Namespaced, fields: RUNNING_PODS, age: Age::Old },
    Resource { kind: Kind::NetworkPolicy, path: "/apis/networking.k8s.io/v1/networkpolicies", scope: Scope::Namespaced, fields: "", age: Age::Old },
    Resource { kind: Kind::ClusterNetworkPolicy, path: "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies", scope: Scope::Cluster, fields: "", age: Age::Defined },
    Resource { kind: Kind::ServiceCidr, path: "/apis/networking.k8s.io/v1/servicecidrs", scope: Scope::Cluster, fields: "", age: Age::New },
];

/// Pods that may have an address of their own.
const RUNNING_PODS: &str = "status.phase!=Succeeded,status.phase!=Failed,spec.hostNetwork!=true";

/// Between two times that all connections are left.
const RECONNECT: Duration = Duration::from_secs(1);

/// How long the source waits.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// After the first fault, at most.
    pub first_retry: Duration,
    /// After many faults in a row, at most; but for what a server asks for.
    pub last_retry: Duration,
    /// For an answer to begin, and between two pieces of a list.
    pub patience: Duration,
    /// Between two pieces of a watch.
    pub idle: Duration,
    /// The longest watch that is asked for; the shortest is half of it.
    pub watch: Duration,
    /// Until a kind is asked for again that nobody has defined.
    pub undefined: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            first_retry: Duration::from_millis(800),
            last_retry: Duration::from_secs(30),
            patience: Duration::from_secs(30),
            idle: Duration::from_secs(150),
            watch: Duration::from_secs(290),
            undefined: Duration::from_secs(60),
        }
    }
}

/// All objects of a cluster that this agent uses, from its API servers.
pub struct KubeSource {
    servers: Arc<Servers>,
    node: Box<str>,
    timing: Timing,
}

impl KubeSource {
    /// `node` is the name of the node this agent runs on. Reads the credentials; connects to nothing yet.
    ///
    /// # Errors
    /// Credentials that are missing or make no sense.
    pub async fn open(
        access: Access,
        node: impl Into<Box<str>>,
        timing: Timing,
    ) -> Result<Self, AccessError> {
        Ok(Self { servers: Arc::new(Servers::open(access).await?), node: node.into(), timing })
    }

    /// Posts what is noted as events on the objects, until nobody notes any more.
    pub fn post(&self, notes: Receiver<Note>) -> impl Future<Output = ()> + Send + use<> {
        events::post(self.servers.clone(), self.node.clone(), notes)
    }

    /// Leaves all connections whenever it is told that the host's addresses have changed, until nobody will tell any more.
    pub fn reconnect(&self, mut told: latest::Receiver<u64>) -> impl Future<Output = ()> + Send + use<> {
        let servers = self.servers.clone();
        async move {
            while told.changed().await.is_ok() {
                servers.reconnect().await;
                // Addresses that come and go all the time must not keep anybody from listing.
                tokio::time::sleep(RECONNECT).await;
            }
        }
    }

    /// Tells the cluster that this node has its network, as far as the operator wants it; ends when it is said.
    pub fn announce(&self, readiness: Readiness) -> impl Future<Output = ()> + Send + use<> {
        ready::announce(self.servers.clone(), self.node.clone(), readiness)
    }
}

impl Source for KubeSource {
    async fn run(self, events: Sender<Event>) {
        let Self { servers, node, timing } = self;
        let kinds = RESOURCES.iter().map(|resource| resource.kind);
        let voice = Arc::new(Mutex::new(Voice::new(events.clone(), kinds)));
        let reflectors = RESOURCES.iter().map(|resource| {
            let ledger = Ledger::new(resource.kind, node.clone());
            Reflector::new(resource, ledger, (servers.clone(), voice.clone()), events.clone(), timing).run()
        });
        tokio::select! {
            () = events.closed() => {}
            _never = join_all(reflectors) => {}
        }
    }
}

impl Resource {
    fn selector(&self) -> Option<String> {
        (!self.fields.is_empty()).then(|| self.fields.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_kind_is_watched_once() {
        let kinds: BTreeSet<_> = RESOURCES.iter().map(|resource| resource.kind).collect();
        assert_eq!(kinds.len(), RESOURCES.len());
        for (path, kind) in RESOURCES.iter().map(|resource| (resource.path, resource.kind)) {
            let plural = format!("{kind:?}s").to_lowercase().replace("ys", "ies");
            assert!(path.ends_with(&format!("/{plural}")), "{kind:?} at {path}");
        }
    }
}
