//! What the API says of services on one node, read off its text: every question walks the objects. Independent of the
//! agent: it knows neither its types nor its tables.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Value, json};

use super::wire::bytes_of;

/// The node that is asked about.
pub const NODE: &str = "here";

pub type Socket = (IpAddr, u16);

/// How the node's agent is told to work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Configuration {
    /// As without options.
    #[default]
    Usual,
    /// `--masquerade on` with [`KEPT`] for `--non-masquerade-cidrs`; and pods send from their own addresses alone, as under
    /// `--cni`.
    Masquerading,
}

/// Where pods are known by their own addresses, beside the cluster.
pub const KEPT: [&str; 2] = ["198.51.100.0/24", "2001:db8:1::/64"];

/// The objects of a cluster, the last version of each.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    objects: BTreeMap<[String; 3], Value>,
}

/// Where a service port is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    ClusterIp,
    LoadBalancer,
    ExternalIp,
    NodePort,
}

/// Whose policy counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Cluster,
    Local,
}

/// A service port at one of its addresses.
#[derive(Clone, Copy, Debug)]
pub struct Frontend<'a> {
    pub kind: Kind,
    pub service: &'a Value,
    pub port: &'a Value,
}

/// An endpoint of a service port.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "as the API has them")]
struct Endpoint {
    ready: bool,
    serving: bool,
    terminating: bool,
    local: bool,
    nodes: BTreeSet<String>,
    zones: BTreeSet<String>,
}

impl Endpoint {
    fn is_draining(&self) -> bool {
        !self.ready && self.serving && self.terminating
    }

    /// Ready, draining, serving, none of these.
    fn rank(&self) -> u8 {
        match (self.ready, self.is_draining(), self.serving) {
            (true, ..) => 3,
            (_, true, _) => 2,
            (_, _, true) => 1,
            _ => 0,
        }
    }
}

impl Cluster {
    /// Takes a change in: an object, or one that has `gone: true`.
    pub fn apply(&mut self, object: &Value) {
        let text = |value: &Value| value.as_str().unwrap_or("default").to_owned();
        let metadata = &object["metadata"];
        let key = [text(&object["kind"]), text(&metadata["namespace"]), text(&metadata["name"])];
        if object["gone"] == true {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, object.clone());
        }
    }

    /// The changes that make it another.
    pub fn changes_to(&self, other: &Self) -> Vec<Value> {
        let gone = self.objects.keys().filter(|key| !other.objects.contains_key(*key));
        let gone = gone.map(|[kind, namespace, name]| {
            json!({"kind": kind, "metadata": {"namespace": namespace, "name": name}, "gone": true})
        });
        let changed = other.objects.iter().filter(|(key, object)| self.objects.get(*key) != Some(object));
        gone.chain(changed.map(|(_, object)| object.clone())).collect()
    }

    pub fn objects(&self) -> impl Iterator<Item = &Value> {
        self.objects.values()
    }

    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(move |([it, ..], _)| it == kind).map(|(_, object)| object)
    }

    /// Pods on this node that have a network of their own, by their addresses.
    fn local(&self) -> impl Iterator<Item = (IpAddr, &Value)> {
        let here = self.of_kind("Pod").filter(|pod| pod["spec"]["nodeName"] == NODE);
        let own = here.filter(|pod| pod["spec"]["hostNetwork"] != true);
        let live = own.filter(|pod| !["Succeeded", "Failed"].iter().any(|it| pod["status"]["phase"] == **it));
        live.flat_map(|pod| {
            list(&pod["status"]["podIPs"]).iter().filter_map(move |it| Some((addr(&it["ip"])?, pod)))
        })
    }

    /// The addresses of pods on this node.
    pub fn local_pods(&self) -> BTreeSet<IpAddr> {
        self.local().map(|(addr, _)| addr).collect()
    }

    /// The name of the pod on this node that has the address.
    pub fn pod_at(&self, wanted: IpAddr) -> Option<String> {
        let (_, pod) = self.local().find(|(addr, _)| *addr == wanted)?;
        Some(pod["metadata"]["name"].as_str()?.to_owned())
    }

    fn node(&self) -> Option<&Value> {
        self.of_kind("Node").find(|node| node["metadata"]["name"] == NODE)
    }

    /// The node's own addresses, the internal ones first.
    pub fn node_addresses(&self) -> Vec<IpAddr> {
        let of = |kind: &'static str| {
            let all = self.node().into_iter().flat_map(|node| list(&node["status"]["addresses"]));
            all.filter(move |it| it["type"] == kind).filter_map(|it| addr(&it["address"]))
        };
        of("InternalIP").chain(of("ExternalIP")).collect()
    }

    /// The node's address that serves NodePorts and stands in for clients (rules 24, 26).
    pub fn primary(&self, like: IpAddr) -> Option<IpAddr> {
        self.node_addresses().into_iter().find(|it| it.is_ipv4() == like.is_ipv4())
    }

    /// Whether pods keep their addresses on the way there: to every node, to the pods of each, and to [`KEPT`].
    pub fn is_near(&self, dst: IpAddr) -> bool {
        let nodes = || self.of_kind("Node");
        let addresses = nodes().flat_map(|node| list(&node["status"]["addresses"]));
        let ranges = nodes().flat_map(|node| list(&node["spec"]["podCIDRs"])).filter_map(Value::as_str);
        addresses.filter_map(|it| addr(&it["address"])).any(|it| it == dst)
            || ranges.chain(KEPT).any(|range| within(dst, range))
    }

    /// Whether the two addresses are one local pod's.
    pub fn are_one_pods(&self, a: IpAddr, b: IpAddr) -> bool {
        self.pod_at(a).is_some_and(|name| self.pod_at(b) == Some(name))
    }

    /// Services that a service proxy serves (rule 12).
    fn services(&self) -> impl Iterator<Item = &Value> {
        self.of_kind("Service").filter(|service| {
            let spec = &service["spec"];
            let label = &service["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"];
            spec["type"] != "ExternalName" && label.is_null() && !cluster_ips(service).is_empty()
        })
    }

    /// What a packet to this socket is for; an address of its own goes before a NodePort.
    pub fn frontend(&self, (dst, number): Socket, protocol: &str) -> Option<Frontend<'_>> {
        let at = |field: &'static str, addresses: fn(&Value) -> Vec<IpAddr>, kind| {
            self.services().find_map(move |service| {
                let serves = addresses(service).contains(&dst) && serves(service, dst);
                let ports = list(&service["spec"]["ports"]).iter();
                let mut ports = ports.filter(|_| serves);
                let port = ports.find(|it| it[field] == number && protocol_of(it) == protocol)?;
                Some(Frontend { kind, service, port })
            })
        };
        let address = at("port", cluster_ips, Kind::ClusterIp)
            .or_else(|| at("port", balancer_ips, Kind::LoadBalancer))
            .or_else(|| at("port", external_ips, Kind::ExternalIp));
        if address.is_some() || self.primary(dst) != Some(dst) {
            return address;
        }
        self.services().find_map(|service| {
            let kinds = ["NodePort", "LoadBalancer"];
            let exposed = kinds.iter().any(|it| service["spec"]["type"] == **it) && serves(service, dst);
            let mut ports = list(&service["spec"]["ports"]).iter().filter(|_| exposed);
            let port = ports.find(|it| it["nodePort"] == number && protocol_of(it) == protocol)?;
            Some(Frontend { kind: Kind::NodePort, service, port })
        })
    }

    /// Whether cluster IPs are taken from a range with this address (rule 19).
    pub fn in_service_range(&self, dst: IpAddr) -> bool {
        let ranges = self.of_kind("ServiceCIDR").flat_map(|it| list(&it["spec"]["cidrs"]));
        ranges.filter_map(Value::as_str).any(|range| within(dst, range))
    }

    pub fn is_cluster_ip(&self, dst: IpAddr) -> bool {
        self.services().any(|service| cluster_ips(service).contains(&dst))
    }

    /// Every port of every service that is served, as [`Frontend::port_name`] names it, with the endpoints that keep
    /// the flows they have (rules 30, 31).
    pub fn serving(&self) -> BTreeMap<String, BTreeSet<Socket>> {
        let mut serving = BTreeMap::new();
        for service in self.services() {
            for port in list(&service["spec"]["ports"]) {
                let frontend = Frontend { kind: Kind::ClusterIp, service, port };
                let both = ["IPv4", "IPv6"].iter().flat_map(|family| self.endpoints(&frontend, family));
                let keeps = both.filter(|(_, it)| it.ready || it.serving).map(|(socket, _)| socket);
                let keeps = keeps.filter(|(addr, _)| serves(service, *addr));
                serving.insert(frontend.port_name(), keeps.collect());
            }
        }
        serving
    }

    /// The endpoints among which a policy chooses (rules 2 to 5), and whether there are any in the whole cluster.
    pub fn choices(&self, frontend: &Frontend<'_>, dst: IpAddr, policy: Policy) -> (BTreeSet<Socket>, bool) {
        let family = if dst.is_ipv4() { "IPv4" } else { "IPv6" };
        let all = self.endpoints(frontend, family);
        let anywhere = all.values().any(|it| it.ready || it.is_draining());
        let here = |it: &Endpoint| policy == Policy::Cluster || it.local;
        let chosen: BTreeSet<Socket> = if all.values().any(|it| it.ready && here(it)) {
            let near = self.near(&all, policy);
            all.iter().filter(|(_, it)| it.ready && here(it) && near(it)).map(|(at, _)| *at).collect()
        } else {
            all.iter().filter(|(_, it)| it.is_draining() && here(it)).map(|(at, _)| *at).collect()
        };
        (chosen, anywhere)
    }

    /// Rule 4: hints count where every ready endpoint has one, and one names this node, or else its zone.
    fn near(&self, all: &BTreeMap<Socket, Endpoint>, policy: Policy) -> impl Fn(&Endpoint) -> bool {
        let ready = || all.values().filter(|it| it.ready);
        let zone = self.node().and_then(|node| {
            node["metadata"]["labels"]["topology.kubernetes.io/zone"].as_str().map(str::to_owned)
        });
        let hinted = policy == Policy::Cluster;
        let by_node =
            hinted && ready().all(|it| !it.nodes.is_empty()) && ready().any(|it| it.nodes.contains(NODE));
        let by_zone = zone.filter(|zone| {
            hinted && ready().all(|it| !it.zones.is_empty()) && ready().any(|it| it.zones.contains(zone))
        });
        move |it: &Endpoint| {
            if by_node {
                it.nodes.contains(NODE)
            } else {
                by_zone.as_ref().is_none_or(|zone| it.zones.contains(zone))
            }
        }
    }

    /// Of one family, over all slices (rules 8, 9).
    fn endpoints(&self, frontend: &Frontend<'_>, family: &str) -> BTreeMap<Socket, Endpoint> {
        let mut found: BTreeMap<Socket, Endpoint> = BTreeMap::new();
        let owner = &frontend.service["metadata"]["name"];
        let slices = self.of_kind("EndpointSlice").filter(|slice| {
            let labels = &slice["metadata"]["labels"];
            labels["kubernetes.io/service-name"] == *owner
                && labels["service.kubernetes.io/headless"].is_null()
                && slice["metadata"]["namespace"] == frontend.service["metadata"]["namespace"]
                && slice["addressType"] == family
        });
        for slice in slices {
            let name = |it: &Value| it["name"].as_str().unwrap_or_default().to_owned();
            let same = |it: &&Value| {
                name(it) == name(frontend.port) && protocol_of(it) == protocol_of(frontend.port)
            };
            for port in list(&slice["ports"]).iter().filter(same) {
                let Some(number) = port["port"].as_u64().filter(|number| *number != 0) else { continue };
                for it in list(&slice["endpoints"]) {
                    let Some(addr) = addr(&it["addresses"][0]) else { continue };
                    let endpoint = endpoint(it);
                    let entry = found.entry((addr, number as u16)).or_insert_with(|| endpoint.clone());
                    // While an endpoint moves between slices one copy is stale: the better one counts.
                    let local = entry.local || endpoint.local;
                    if endpoint.rank() > entry.rank() {
                        *entry = endpoint;
                    }
                    entry.local = local;
                }
            }
        }
        found
    }
}

impl Frontend<'_> {
    /// `namespace/name:port`: what has endpoints, and one client's affinity.
    pub fn port_name(&self) -> String {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let metadata = &self.service["metadata"];
        format!("{}/{}:{}", text(&metadata["namespace"]), text(&metadata["name"]), text(&self.port["name"]))
    }

    /// The policy that the service has for traffic from outside or, at cluster IPs, from anywhere (rule 18).
    pub fn policy(&self) -> Policy {
        let field = match self.kind {
            Kind::ClusterIp => "internalTrafficPolicy",
            Kind::LoadBalancer | Kind::ExternalIp | Kind::NodePort => "externalTrafficPolicy",
        };
        if self.service["spec"][field] == "Local" { Policy::Local } else { Policy::Cluster }
    }

    /// Seconds; `None` without affinity (rule 29).
    pub fn affinity(&self) -> Option<u64> {
        let spec = &self.service["spec"];
        let seconds = &spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
        (spec["sessionAffinity"] == "ClientIP").then(|| seconds.as_u64().unwrap_or(10_800))
    }

    /// Whether the client may come (rule 22).
    pub fn admits(&self, client: IpAddr) -> bool {
        let ranges = list(&self.service["spec"]["loadBalancerSourceRanges"]).iter();
        let ranges: Vec<_> = ranges.filter_map(Value::as_str).map(str::trim).collect();
        let family = |range: &&&str| range.contains(':') == client.is_ipv6();
        self.kind != Kind::LoadBalancer
            || !ranges.iter().any(|range| family(&range))
            || ranges.iter().any(|range| within(client, range))
    }
}

fn endpoint(it: &Value) -> Endpoint {
    let names = |field: &str| {
        let hints = list(&it["hints"][field]).iter();
        hints.filter_map(|hint| hint["name"].as_str().map(str::to_owned)).collect()
    };
    let conditions = &it["conditions"];
    Endpoint {
        ready: conditions["ready"].as_bool().unwrap_or(true),
        serving: conditions["serving"].as_bool().unwrap_or(true),
        terminating: conditions["terminating"].as_bool().unwrap_or(false),
        local: it["nodeName"] == NODE,
        nodes: names("forNodes"),
        zones: names("forZones"),
    }
}

/// Whether the Service has a cluster IP of the address's family: nothing of another is served (rule 10).
fn serves(service: &Value, like: IpAddr) -> bool {
    cluster_ips(service).iter().any(|it| it.is_ipv4() == like.is_ipv4())
}

fn cluster_ips(service: &Value) -> Vec<IpAddr> {
    list(&service["spec"]["clusterIPs"]).iter().filter_map(addr).collect()
}

fn external_ips(service: &Value) -> Vec<IpAddr> {
    list(&service["spec"]["externalIPs"]).iter().filter_map(addr).collect()
}

/// Rule 20: not those of a balancer that is a proxy.
fn balancer_ips(service: &Value) -> Vec<IpAddr> {
    if service["spec"]["type"] != "LoadBalancer" {
        return Vec::new();
    }
    let ingress = list(&service["status"]["loadBalancer"]["ingress"]).iter();
    ingress.filter(|it| it["ipMode"] != "Proxy").filter_map(|it| addr(&it["ip"])).collect()
}

fn protocol_of(port: &Value) -> &str {
    port["protocol"].as_str().unwrap_or("TCP")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn addr(value: &Value) -> Option<IpAddr> {
    value.as_str()?.parse().ok()
}

fn within(addr: IpAddr, range: &str) -> bool {
    let Some((base, length)) = range.split_once('/') else { return false };
    let (Ok(base), Ok(length)) = (base.parse::<IpAddr>(), length.parse::<usize>()) else { return false };
    let bit = |addr: IpAddr, at: usize| bytes_of(addr)[at / 8] >> (7 - at % 8) & 1;
    addr.is_ipv4() == base.is_ipv4() && (0..length).all(|at| bit(addr, at) == bit(base, at))
}
