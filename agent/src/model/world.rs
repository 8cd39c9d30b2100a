//! All tables of the model, with one writer.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use ferroflow_common::addr::Addr;

use super::label::{Labels, Pool};
use super::share::Shared;
use super::{
    Change, ClusterNetworkPolicy, EndpointSlice, HostPorts, Kind, KubeProxy, Name, NamedPort, Namespace,
    Network, NetworkPolicy, Node, Pod, Prefix, Service, SlicePort, Tenant, TunnelLink,
};

/// Everything that is known of the cluster. [`World::apply`] is the only way to change it.
#[derive(Debug, Default)]
pub struct World {
    /// This node's name.
    node: Box<str>,
    services: BTreeMap<Name, Backing>,
    /// Services with a health check port.
    health_checked: BTreeSet<Name>,
    /// To which Service a slice belonged when it was last seen.
    slice_owners: BTreeMap<Name, Arc<str>>,
    nodes: BTreeMap<Box<str>, Node>,
    /// Of all nodes.
    pods: BTreeMap<Name, Pod>,
    namespaces: BTreeMap<Box<str>, Namespace>,
    policies: BTreeMap<Name, NetworkPolicy>,
    cluster_policies: BTreeMap<Box<str>, ClusterNetworkPolicy>,
    labels: Pool,
    pod_ports: Shared<[NamedPort]>,
    slice_ports: Shared<[SlicePort]>,
    /// Of the pods of this node.
    pod_addresses: BTreeSet<(Addr, Name)>,
    service_ranges: BTreeMap<Box<str>, Box<[Prefix]>>,
    kube_proxy: KubeProxy,
    local_routes: BTreeMap<Addr, u32>,
    local_addresses: BTreeMap<Addr, u32>,
    local_subnets: BTreeMap<Prefix, u32>,
    uplinks: BTreeSet<u32>,
    queues: BTreeSet<u32>,
    tunnel: Option<TunnelLink>,
    topology: u64,
    attachments: BTreeMap<Addr, u32>,
    tenants: BTreeMap<Addr, Tenant>,
    host_ports: BTreeMap<Name, HostPorts>,
}

/// A Service and its slices, each of which may come first. Slices are kept apart, because an endpoint that moves
/// from one to another may for a while be in both or in neither (rule 8).
#[derive(Debug, Default)]
pub struct Backing {
    pub service: Option<Service>,
    pub slices: Slices,
}

/// The slices of one Service by name: most have one.
#[derive(Debug, Default)]
pub struct Slices(Vec<(Arc<str>, EndpointSlice)>);

impl Slices {
    /// In the order of their names.
    pub fn values(&self) -> impl Iterator<Item = &EndpointSlice> {
        self.0.iter().map(|(_, slice)| slice)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts a slice in; whether it is other than the one that was there.
    fn insert(&mut self, name: Arc<str>, slice: EndpointSlice) -> bool {
        match self.0.binary_search_by(|(other, _)| other.cmp(&name)) {
            Ok(at) if self.0[at].1 == slice => return false,
            Ok(at) => self.0[at].1 = slice,
            Err(at) => {
                self.0.reserve_exact(1);
                self.0.insert(at, (name, slice));
            }
        }
        true
    }

    fn remove(&mut self, name: &str) {
        self.0.retain(|(other, _)| **other != *name);
    }
}

/// What has to be planned again after a change.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Touched {
    /// What the programs know of this node itself. It is planned first: whatever else they know, they use it with this.
    Node,
    /// All tables of policies. It comes before the pods that policies apply to.
    Policies,
    /// A Service, or the ports of the host of one attachment ([`HostPorts::name`]).
    Service(Name),
    /// The local pod that has this address, or had it.
    Endpoint(Addr),
    /// A pod of any node, as a peer of policies or as one that they select.
    Pod(Name),
    /// The labels of a namespace.
    Namespace(Box<str>),
    NetworkPolicy(Name),
    ClusterNetworkPolicy(Box<str>),
}

impl fmt::Display for Touched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) if HostPorts::are(name) => write!(f, "hostPorts of {}", name.name),
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Endpoint(addr) => write!(f, "local pod {addr}"),
            Self::Node => write!(f, "this node's addresses"),
            Self::Policies => write!(f, "the tables of policies"),
            Self::Pod(name) => write!(f, "Pod {name}"),
            Self::Namespace(name) => write!(f, "Namespace {name}"),
            Self::NetworkPolicy(name) => write!(f, "NetworkPolicy {name}"),
            Self::ClusterNetworkPolicy(name) => write!(f, "ClusterNetworkPolicy {name}"),
        }
    }
}

impl World {
    pub fn new(node: impl Into<Box<str>>) -> Self {
        Self { node: node.into(), ..Self::default() }
    }

    /// Takes one change in and says what depends on it; a change that changes nothing touches nothing.
    pub fn apply(&mut self, change: Change) -> Vec<Touched> {
        match change {
            Change::Service(name, service) => self.apply_service(name, service),
            Change::EndpointSlice(name, slice) => self.apply_slice(name, slice),
            Change::Node(name, node) => self.apply_node(name, node),
            Change::Pod(name, pod) => self.apply_pod(name, pod),
            Change::ServiceCidr(name, ranges) => {
                let old = match ranges.clone() {
                    Some(ranges) => self.service_ranges.insert(name, ranges),
                    None => self.service_ranges.remove(&name),
                };
                if old == ranges { Vec::new() } else { vec![Touched::Node] }
            }
            Change::KubeProxy(now) => {
                let old = std::mem::replace(&mut self.kube_proxy, now);
                if old == now { Vec::new() } else { vec![Touched::Node] }
            }
            Change::Namespace(name, namespace) => self.apply_namespace(name, namespace),
            Change::NetworkPolicy(name, policy) => self.apply_policy(name, policy),
            Change::ClusterNetworkPolicy(name, policy) => self.apply_cluster_policy(name, policy),
            Change::LocalRoute(addr, ifindex) => self.apply_local_route(addr, ifindex),
            Change::Attachment(addr, ifindex) => {
                let old = set(&mut self.attachments, addr, ifindex);
                if old == ifindex { Vec::new() } else { vec![Touched::Endpoint(addr)] }
            }
            Change::Tenant(addr, tenant) => self.apply_tenant(addr, tenant),
            Change::HostPorts(interface, ports) => self.apply_host_ports(&interface, ports),
            Change::LocalAddress(addr, ifindex) => self.apply_local_address(addr, ifindex),
            Change::Uplink { ifindex, leads } => {
                let changed =
                    if leads { self.uplinks.insert(ifindex) } else { self.uplinks.remove(&ifindex) };
                if changed { vec![Touched::Node] } else { Vec::new() }
            }
            Change::Queue { ifindex, there } => {
                let changed = if there { self.queues.insert(ifindex) } else { self.queues.remove(&ifindex) };
                if changed { self.behind(ifindex) } else { Vec::new() }
            }
            Change::Tunnel(link) => {
                let old = std::mem::replace(&mut self.tunnel, link);
                if old == link { Vec::new() } else { vec![Touched::Node] }
            }
            Change::LocalSubnet(subnet, ifindex) => {
                let old = set(&mut self.local_subnets, subnet, ifindex);
                self.topology += u64::from(old != ifindex);
                Vec::new()
            }
        }
    }

    fn apply_host_ports(&mut self, interface: &str, ports: Option<HostPorts>) -> Vec<Touched> {
        let name = HostPorts::name(interface);
        let old = match ports.clone() {
            Some(ports) => self.host_ports.insert(name.clone(), ports),
            None => self.host_ports.remove(&name),
        };
        if old == ports { Vec::new() } else { vec![Touched::Service(name)] }
    }

    fn apply_local_address(&mut self, addr: Addr, ifindex: Option<u32>) -> Vec<Touched> {
        let old = set(&mut self.local_addresses, addr, ifindex);
        if old == ifindex {
            return Vec::new();
        }
        self.topology += 1;
        let moved = old.is_some() != ifindex.is_some();
        let there = self.host_ports.iter().filter(|(_, ports)| moved && ports.name_address(addr));
        let there = there.map(|(name, _)| Touched::Service(name.clone()));
        there.chain([Touched::Node]).collect()
    }

    /// The addresses behind an interface.
    fn behind(&self, ifindex: u32) -> Vec<Touched> {
        let behind = self.attachments.iter().chain(&self.local_routes).filter(|(_, at)| **at == ifindex);
        let behind: BTreeSet<_> = behind.map(|(addr, _)| *addr).collect();
        behind.into_iter().map(Touched::Endpoint).collect()
    }

    fn apply_policy(&mut self, name: Name, policy: Option<NetworkPolicy>) -> Vec<Touched> {
        let old = match policy.clone() {
            Some(policy) => self.policies.insert(name.clone(), policy),
            None => self.policies.remove(&name),
        };
        if old == policy {
            return Vec::new();
        }
        let strangers = self.tenants.iter().filter(|(_, it)| it.pod.namespace == name.namespace);
        let touched = strangers.map(|(addr, _)| Touched::Endpoint(*addr));
        touched.chain([Touched::NetworkPolicy(name.clone())]).collect()
    }

    fn apply_cluster_policy(&mut self, name: Box<str>, policy: Option<ClusterNetworkPolicy>) -> Vec<Touched> {
        let old = match policy.clone() {
            Some(policy) => self.cluster_policies.insert(name.clone(), policy),
            None => self.cluster_policies.remove(&name),
        };
        if old == policy {
            return Vec::new();
        }
        let strangers = self.tenants.keys().map(|addr| Touched::Endpoint(*addr));
        strangers.chain([Touched::ClusterNetworkPolicy(name)]).collect()
    }

    fn apply_local_route(&mut self, addr: Addr, ifindex: Option<u32>) -> Vec<Touched> {
        let old = set(&mut self.local_routes, addr, ifindex);
        // The interface went with the pod's namespace, and nobody has said so yet.
        let mut touched = Vec::new();
        if ifindex.is_none() && old.is_some() && self.attachment(addr) == old {
            self.attachments.remove(&addr);
            touched = self.apply_tenant(addr, None);
        }
        if old != ifindex {
            touched.push(Touched::Endpoint(addr));
        }
        touched
    }

    pub fn service(&self, name: &Name) -> Option<&Backing> {
        self.services.get(name)
    }

    /// The ports of the host of one attachment.
    pub fn host_ports(&self, name: &Name) -> Option<&HostPorts> {
        self.host_ports.get(name)
    }

    /// The Services that exist, in the order of their names.
    pub fn services(&self) -> impl Iterator<Item = (&Name, &Service)> {
        self.services.iter().filter_map(|(name, backing)| Some((name, backing.service.as_ref()?)))
    }

    /// How many objects of a kind are known.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Service => self.services().count(),
            Kind::EndpointSlice => self.slice_owners.len(),
            Kind::Node => self.nodes.len(),
            Kind::Pod => self.pods.len(),
            Kind::ServiceCidr => self.service_ranges.len(),
            Kind::Namespace => self.namespaces.len(),
            Kind::NetworkPolicy => self.policies.len(),
            Kind::ClusterNetworkPolicy => self.cluster_policies.len(),
        }
    }

    /// The Services that have a health check port.
    pub fn health_checked(&self) -> impl Iterator<Item = (&Name, &Backing)> {
        self.health_checked.iter().filter_map(|name| self.services.get_key_value(name))
    }

    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// The node this agent runs on, once its object was seen.
    pub fn own_node(&self) -> Option<&Node> {
        self.node(&self.node)
    }

    pub fn pod(&self, name: &Name) -> Option<&Pod> {
        self.pods.get(name)
    }

    /// The pods of all nodes.
    pub fn pods(&self) -> impl Iterator<Item = (&Name, &Pod)> {
        self.pods.iter()
    }

    /// The pods of one namespace.
    pub fn pods_in(&self, namespace: &str) -> impl Iterator<Item = (&Name, &Pod)> {
        self.pods.range(Name::new(namespace, "")..).take_while(move |(name, _)| *name.namespace == *namespace)
    }

    /// Whether the pod is on this node.
    pub fn is_local(&self, pod: &Pod) -> bool {
        *pod.node == *self.node
    }

    /// The labels of a namespace: where it was not seen (yet), the one that is its name.
    pub fn namespace_labels(&self, name: &str) -> Labels {
        match self.namespaces.get(name) {
            Some(namespace) => namespace.labels.clone(),
            None => Namespace::new(name, []).labels,
        }
    }

    pub fn policy(&self, name: &Name) -> Option<&NetworkPolicy> {
        self.policies.get(name)
    }

    pub fn cluster_policy(&self, name: &str) -> Option<&ClusterNetworkPolicy> {
        self.cluster_policies.get(name)
    }

    /// The policies of the cluster, in the order of their names.
    pub fn cluster_policies(&self) -> impl Iterator<Item = (&str, &ClusterNetworkPolicy)> {
        self.cluster_policies.iter().map(|(name, policy)| (&**name, policy))
    }

    /// The policies of one namespace.
    pub fn policies_in(&self, namespace: &str) -> impl Iterator<Item = (&Name, &NetworkPolicy)> {
        let from = Name::new(namespace, "");
        self.policies.range(from..).take_while(move |(name, _)| *name.namespace == *namespace)
    }

    /// The pods of this node that have this address: one, but for the moment in which it passes from one to another.
    pub fn pods_at(&self, addr: Addr) -> impl Iterator<Item = &Name> {
        let first = (addr, Name::new("", ""));
        self.pod_addresses.range(first..).take_while(move |(at, _)| *at == addr).map(|(_, name)| name)
    }

    /// The interface behind which a local address is.
    pub fn local_route(&self, addr: Addr) -> Option<u32> {
        self.local_routes.get(&addr).copied()
    }

    /// The ranges that cluster IPs are taken from.
    pub fn service_ranges(&self) -> impl Iterator<Item = Prefix> {
        self.service_ranges.values().flatten().copied()
    }

    pub fn kube_proxy(&self) -> KubeProxy {
        self.kube_proxy
    }

    /// The device that carries packets to other nodes, once it is there.
    pub fn tunnel(&self) -> Option<TunnelLink> {
        self.tunnel
    }

    /// The addresses that are behind interfaces of this host.
    pub fn local_routes(&self) -> impl Iterator<Item = &Addr> {
        self.local_routes.keys()
    }

    /// The interface that this agent made for whom it gave the address.
    pub fn attachment(&self, addr: Addr) -> Option<u32> {
        self.attachments.get(&addr).copied()
    }

    /// This host's own addresses, and the interface each is on.
    pub fn local_addresses(&self) -> &BTreeMap<Addr, u32> {
        &self.local_addresses
    }

    /// The ranges that this host reaches without a gateway, and the interface each is on.
    pub fn local_subnets(&self) -> &BTreeMap<Prefix, u32> {
        &self.local_subnets
    }

    /// Whether packets that leave by the interface wait in a queue of its own.
    pub fn has_queue(&self, ifindex: u32) -> bool {
        self.queues.contains(&ifindex)
    }

    /// The interfaces that default routes of this host lead out of.
    pub fn uplinks(&self) -> &BTreeSet<u32> {
        &self.uplinks
    }

    /// All nodes, this one too, in the order of their names.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(name, node)| (&**name, node))
    }

    /// The name of this node.
    pub fn own_name(&self) -> &str {
        &self.node
    }

    /// Another number whenever a node, or an address or a subnet of this host, has changed.
    pub fn topology(&self) -> u64 {
        self.topology
    }

    fn apply_node(&mut self, name: Box<str>, node: Option<Node>) -> Vec<Touched> {
        let own = name == self.node;
        let new = node.clone().unwrap_or_default();
        let old = match node {
            Some(node) => self.nodes.insert(name, node),
            None => self.nodes.remove(&name),
        };
        let old = old.unwrap_or_default();
        self.topology += u64::from(old != new);
        let (zone, addresses) = (own && old.zone != new.zone, own && old.addresses != new.addresses);
        let depends = |backing: &Backing| {
            // Rule 6.
            zone && backing.slices.values().any(|slice| !slice.zones.is_empty())
                || addresses
                    && backing.service.as_ref().is_some_and(|it| !it.exposure.source_ranges.is_empty())
        };
        let reached = old.pod_cidrs != new.pod_cidrs || old.addresses != new.addresses;
        if !zone && !reached {
            return Vec::new();
        }
        let services = self.services.iter().filter(|(_, backing)| depends(backing));
        let services = services.map(|(name, _)| Touched::Service(name.clone()));
        services.chain(reached.then_some(Touched::Node)).collect()
    }

    fn apply_service(&mut self, name: Name, service: Option<Service>) -> Vec<Touched> {
        let name = self.service_name(name);
        let backing = self.services.entry(name.clone()).or_default();
        let unchanged = backing.service == service;
        let checked = service.as_ref().is_some_and(|it| it.exposure.health_check_port.is_some());
        backing.service = service;
        if checked {
            self.health_checked.insert(name.clone());
        } else {
            self.health_checked.remove(&name);
        }
        self.drop_empty(&name);
        if unchanged { Vec::new() } else { vec![Touched::Service(name)] }
    }

    fn apply_slice(&mut self, name: Name, slice: Option<EndpointSlice>) -> Vec<Touched> {
        let mut touched = Vec::new();
        let name = self.shared_name(name);
        let slice = slice.map(|slice| EndpointSlice {
            service: self.service_name(Name::new(name.namespace.clone(), slice.service)).name,
            ports: self.slice_ports.share(slice.ports),
            ..slice
        });
        let old_owner = match &slice {
            Some(slice) => self.slice_owners.insert(name.clone(), slice.service.clone()),
            None => self.slice_owners.remove(&name),
        };
        if let Some(old_owner) = old_owner
            && slice.as_ref().is_none_or(|slice| slice.service != old_owner)
        {
            let service = Name::new(name.namespace.clone(), old_owner);
            if let Some(backing) = self.services.get_mut(&service) {
                backing.slices.remove(&name.name);
            }
            self.drop_empty(&service);
            touched.push(Touched::Service(service));
        }
        if let Some(slice) = slice {
            let service = self.service_name(Name::new(name.namespace, slice.service.clone()));
            if self.services.entry(service.clone()).or_default().slices.insert(name.name, slice) {
                touched.push(Touched::Service(service));
            }
        }
        touched
    }

    /// Whether policies that select pods of its namespace may mean who has the address: it was given to a pod whose object
    /// is not known.
    pub fn is_strangers(&self, addr: Addr) -> bool {
        let Some(tenant) = self.tenants.get(&addr) else { return false };
        let known = self.pod(&tenant.pod).is_some_and(|pod| self.is_local(pod) && tenant.is(pod));
        let may_be_meant =
            !self.cluster_policies.is_empty() || self.policies_in(&tenant.pod.namespace).next().is_some();
        !known && may_be_meant
    }

    /// The pod that was given the address.
    pub fn tenant(&self, addr: Addr) -> Option<&Tenant> {
        self.tenants.get(&addr)
    }

    fn apply_tenant(&mut self, addr: Addr, tenant: Option<Tenant>) -> Vec<Touched> {
        let old = match tenant.clone() {
            Some(tenant) => self.tenants.insert(addr, tenant),
            None => self.tenants.remove(&addr),
        };
        if old == tenant {
            return Vec::new();
        }
        let mut touched = vec![Touched::Endpoint(addr)];
        for Tenant { pod: name, .. } in old.into_iter().chain(tenant) {
            if let Some(mut pod) = self.pods.get(&name).cloned() {
                // Should the object say so, it will not for long.
                pod.addresses = pod.addresses.iter().copied().filter(|it| *it != addr).collect();
                touched.extend(self.apply_pod(name, Some(pod)));
            }
        }
        touched
    }

    /// The pod with the addresses that it was given: policies know them before its object does (rule 54).
    fn at_home(&self, name: &Name, pod: Pod) -> Pod {
        if !self.is_local(&pod) || pod.network != Network::Own {
            return pod;
        }
        let given = self.tenants.iter().filter(|(_, tenant)| tenant.pod == *name && tenant.is(&pod));
        let given: Vec<_> = given.map(|(addr, _)| *addr).filter(|it| !pod.addresses.contains(it)).collect();
        if given.is_empty() {
            return pod;
        }
        let addresses = pod.addresses.iter().copied().chain(given).collect();
        Pod { addresses, ..pod }
    }

    fn apply_pod(&mut self, name: Name, pod: Option<Pod>) -> Vec<Touched> {
        let pod = pod.map(|pod| self.at_home(&name, pod));
        let name = self.shared_name(name);
        let pod = pod.map(|pod| Pod {
            // Which of several pods it is matters only where it is attached.
            uid: if self.is_local(&pod) { pod.uid } else { Box::default() },
            node: self.labels.texts.share(pod.node),
            labels: self.labels.share(pod.labels),
            ports: self.pod_ports.share(pod.ports),
            ..pod
        });
        let old = match pod.clone() {
            Some(pod) => self.pods.insert(name.clone(), pod),
            None => self.pods.remove(&name),
        };
        if old == pod {
            return Vec::new();
        }
        let (old, new) = (self.local_addresses_of(old.as_ref()), self.local_addresses_of(pod.as_ref()));
        for addr in old.difference(&new) {
            self.pod_addresses.remove(&(*addr, name.clone()));
        }
        for addr in new.difference(&old) {
            self.pod_addresses.insert((*addr, name.clone()));
        }
        let endpoints = old.symmetric_difference(&new).map(|addr| Touched::Endpoint(*addr));
        endpoints.chain([Touched::Pod(name)]).collect()
    }

    /// The addresses of a pod of this node; of others, none.
    fn local_addresses_of(&self, pod: Option<&Pod>) -> BTreeSet<Addr> {
        pod.filter(|pod| self.is_local(pod)).iter().flat_map(|pod| &pod.addresses).copied().collect()
    }

    fn apply_namespace(&mut self, name: Box<str>, namespace: Option<Namespace>) -> Vec<Touched> {
        let old = self.namespace_labels(&name);
        match namespace {
            Some(Namespace { labels }) => {
                let labels = self.labels.share(labels);
                self.namespaces.insert(name.clone(), Namespace { labels })
            }
            None => self.namespaces.remove(&name),
        };
        if self.namespace_labels(&name) == old { Vec::new() } else { vec![Touched::Namespace(name)] }
    }

    /// The name with the text of its namespace that others have.
    fn shared_name(&mut self, name: Name) -> Name {
        Name { namespace: self.labels.texts.share(name.namespace), ..name }
    }

    /// The same of a Service: as what is known by it already is called, if anything is.
    fn service_name(&mut self, name: Name) -> Name {
        match self.services.get_key_value(&name) {
            Some((known, _)) => known.clone(),
            None => self.shared_name(name),
        }
    }

    fn drop_empty(&mut self, name: &Name) {
        if self
            .services
            .get(name)
            .is_some_and(|backing| backing.service.is_none() && backing.slices.is_empty())
        {
            self.services.remove(name);
        }
    }
}

/// Puts what is now, or takes what is no longer; what was.
fn set<K: Ord>(table: &mut BTreeMap<K, u32>, key: K, now: Option<u32>) -> Option<u32> {
    match now {
        Some(ifindex) => table.insert(key, ifindex),
        None => table.remove(&key),
    }
}

#[cfg(test)]
mod tests {
    use super::super::service::Place;
    use super::super::{Condition, Endpoint};
    use super::*;

    fn slice(service: &str, last: u8) -> EndpointSlice {
        let endpoint = Endpoint::new(Addr::v4([10, 0, 0, last]), Condition::Ready, Place::Remote);
        EndpointSlice { service: service.into(), endpoints: Box::new([endpoint]), ..EndpointSlice::default() }
    }

    fn service(last: u8) -> Service {
        Service { cluster_ips: Box::new([Addr::v4([10, 96, 0, last])]), ..Service::default() }
    }

    fn web() -> Name {
        Name::new("default", "web")
    }

    #[test]
    fn the_same_object_again_touches_nothing() {
        let mut world = World::new("here");
        for (round, touched) in [(0, 1), (1, 0)] {
            assert_eq!(world.apply(Change::Service(web(), Some(service(1)))).len(), touched, "round {round}");
            let slice = Change::EndpointSlice(Name::new("default", "web-1"), Some(slice("web", 1)));
            assert_eq!(world.apply(slice).len(), touched, "round {round}");
            let addresses = Box::new([Addr::v4([10, 0, 0, 1])]);
            let pod = Pod { node: "here".into(), addresses, ..Pod::default() };
            assert_eq!(world.apply(Change::Pod(web(), Some(pod))).len(), 2 * touched, "round {round}");
            let labelled = Namespace::new("default", [("a", "b")]);
            let namespace = Change::Namespace("default".into(), Some(labelled));
            assert_eq!(world.apply(namespace).len(), touched, "round {round}");
            let policy = Change::NetworkPolicy(web(), Some(NetworkPolicy::default()));
            assert_eq!(world.apply(policy).len(), touched, "round {round}");
            let route = Change::LocalRoute(Addr::v4([10, 0, 0, 1]), Some(7));
            assert_eq!(world.apply(route).len(), touched, "round {round}");
        }
        assert_eq!(world.apply(Change::Service(Name::new("a", "unknown"), None)), []);
        assert_eq!(world.apply(Change::EndpointSlice(Name::new("a", "unknown"), None)), []);
    }

    #[test]
    fn rule_8_slices_are_kept_apart_and_may_come_before_their_service() {
        let mut world = World::new("here");
        world.apply(Change::EndpointSlice(Name::new("default", "web-1"), Some(slice("web", 1))));
        world.apply(Change::EndpointSlice(Name::new("default", "web-2"), Some(slice("web", 1))));
        world.apply(Change::Service(web(), Some(service(1))));
        assert_eq!(world.service(&web()).unwrap().slices.len(), 2);
        let gone = world.apply(Change::EndpointSlice(Name::new("default", "web-1"), None));
        assert_eq!(gone, [Touched::Service(web())]);
        assert_eq!(world.service(&web()).unwrap().slices.len(), 1);
        world.apply(Change::Service(web(), None));
        assert!(world.service(&web()).is_some(), "the slice stays for a Service that may come back");
        world.apply(Change::EndpointSlice(Name::new("default", "web-2"), None));
        assert!(world.service(&web()).is_none());
    }

    #[test]
    fn a_slice_that_changes_hands_touches_both_services() {
        let mut world = World::new("here");
        let name = Name::new("default", "s");
        world.apply(Change::EndpointSlice(name.clone(), Some(slice("web", 1))));
        let touched = world.apply(Change::EndpointSlice(name, Some(slice("other", 1))));
        assert_eq!(touched, [Touched::Service(web()), Touched::Service(Name::new("default", "other"))]);
        assert!(world.service(&web()).is_none());
    }

    #[test]
    fn rule_6_another_zone_touches_what_has_hints() {
        let mut world = World::new("here");
        let zones: Box<[_]> = Box::new([Box::new(["a".into()]) as Box<[_]>]);
        let hinted = EndpointSlice { zones, ..slice("web", 1) };
        world.apply(Change::EndpointSlice(Name::new("default", "web-1"), Some(hinted)));
        world.apply(Change::EndpointSlice(Name::new("default", "other-1"), Some(slice("other", 1))));
        let mut guarded = service(3);
        guarded.exposure.source_ranges = Box::new([Prefix::new(Addr::v4([10, 0, 0, 0]), 8).unwrap()]);
        world.apply(Change::Service(Name::new("default", "guarded"), Some(guarded)));
        let node = |zone: Option<&str>, addresses: &[Addr]| {
            Some(Node { zone: zone.map(Into::into), addresses: addresses.into(), ..Node::default() })
        };
        let mut touched = |name: &str, node| world.apply(Change::Node(name.into(), node));
        assert_eq!(touched("there", node(Some("a"), &[])), []);
        assert_eq!(touched("here", node(None, &[])), []);
        assert_eq!(touched("here", node(Some("a"), &[])), [Touched::Service(web())]);
        assert_eq!(touched("here", node(Some("a"), &[])), []);
        let guarded = Touched::Service(Name::new("default", "guarded"));
        let moved = node(Some("a"), &[Addr::v4([10, 0, 0, 9])]);
        assert_eq!(touched("here", moved), [guarded.clone(), Touched::Node]);
        assert_eq!(touched("here", None), [guarded, Touched::Service(web()), Touched::Node]);
    }

    #[test]
    fn rule_54_a_pod_has_the_addresses_it_was_given_before_its_object_says_so() {
        let (addr, told) = (Addr::v4([10, 0, 0, 1]), Addr::v4([10, 0, 0, 2]));
        let mut world = World::new("here");
        let pod = |uid: &str, addresses: &[Addr]| Pod {
            uid: uid.into(),
            node: "here".into(),
            addresses: addresses.into(),
            ..Pod::default()
        };
        let tenant = Tenant { pod: web(), uid: "u1".into() };
        let given = Change::Tenant(addr, Some(tenant));
        assert_eq!(world.apply(given.clone()), [Touched::Endpoint(addr)]);
        assert_eq!(world.apply(given), []);
        assert!(!world.is_strangers(addr), "nothing may select it");
        let policy = Change::NetworkPolicy(Name::new("default", "deny"), Some(NetworkPolicy::default()));
        let touched = world.apply(policy);
        assert_eq!(touched[0], Touched::Endpoint(addr));
        assert!(world.is_strangers(addr));
        world.apply(Change::Pod(web(), Some(pod("u0", &[]))));
        assert!(world.is_strangers(addr), "another one had that name before");
        let touched = world.apply(Change::Pod(web(), Some(pod("u1", &[]))));
        assert_eq!(touched, [Touched::Endpoint(addr), Touched::Pod(web())]);
        assert!(!world.is_strangers(addr));
        assert_eq!(*world.pod(&web()).unwrap().addresses, [addr]);
        world.apply(Change::Pod(web(), Some(pod("u1", &[told]))));
        assert_eq!(*world.pod(&web()).unwrap().addresses, [told, addr], "of a sandbox before, too");
        world.apply(Change::Tenant(addr, None));
        assert_eq!(*world.pod(&web()).unwrap().addresses, [told]);
    }

    #[test]
    fn only_pods_of_this_node_have_local_addresses() {
        let mut world = World::new("here");
        let addr = Addr::v4([10, 0, 0, 1]);
        let pod = |node: &str| Pod { node: node.into(), addresses: Box::new([addr]), ..Pod::default() };
        assert_eq!(world.apply(Change::Pod(web(), Some(pod("there")))), [Touched::Pod(web())]);
        assert_eq!(world.pods_at(addr).count(), 0);
        world.apply(Change::Pod(web(), Some(pod("here"))));
        world.apply(Change::Pod(Name::new("default", "next"), Some(pod("here"))));
        assert_eq!(world.pods_at(addr).count(), 2);
        let gone = [Touched::Endpoint(addr), Touched::Pod(web())];
        assert_eq!(world.apply(Change::Pod(web(), None)), gone);
        assert_eq!(world.pods_at(addr).count(), 1);
        assert_eq!(world.pods_at(Addr::v4([10, 0, 0, 2])).count(), 0);
    }

    #[test]
    fn rule_53_another_label_touches_its_object() {
        let mut world = World::new("here");
        let name = |namespace: &str| Name::new(namespace, "p");
        let labelled = |value: &str| Pod { labels: Labels::new([("app", value)]), ..Pod::default() };
        for namespace in ["a", "b"] {
            world.apply(Change::Pod(name(namespace), Some(labelled("one"))));
        }
        let touched = world.apply(Change::Pod(name("a"), Some(labelled("two"))));
        assert_eq!(touched, [Touched::Pod(name("a"))]);
        assert_eq!(world.pods_in("a").map(|(name, _)| name).collect::<Vec<_>>(), [&name("a")]);
        let namespace = Namespace::new("a", [("team", "x"), (Namespace::NAME, "forged")]);
        let touched = world.apply(Change::Namespace("a".into(), Some(namespace)));
        assert_eq!(touched, [Touched::Namespace("a".into())]);
        assert_eq!(world.namespace_labels("a").value("team"), Some("x"));
        let names =
            ["a", "b"].map(|name| world.namespace_labels(name).value(Namespace::NAME).map(str::to_owned));
        assert_eq!(names, [Some("a".into()), Some("b".into())], "also where there is no such object");
        assert_eq!(world.apply(Change::Namespace("a".into(), None)), [Touched::Namespace("a".into())]);
        assert_eq!(world.apply(Change::Namespace("b".into(), None)), []);
    }
}
