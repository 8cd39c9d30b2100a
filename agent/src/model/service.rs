//! Services and what stands behind them.

use std::sync::Arc;

use ferroflow_common::addr::{Addr, Port, Proto};

use super::weight::{Label, Weights};
use super::{Family, Name, Prefix};

/// A Service that is ours to serve.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Service {
    /// At most one of each family; of the other family nothing of the Service is served.
    pub cluster_ips: Box<[Addr]>,
    /// In the order of their names, which differ.
    pub ports: Box<[ServicePort]>,
    /// Of its cluster IPs.
    pub internal_policy: TrafficPolicy,
    /// Seconds for which a client keeps its backend; 0 without session affinity.
    pub affinity: u32,
    /// As asked for by annotation.
    pub algorithm: Option<Algorithm>,
    pub weights: Weights,
    /// Seconds since 1970.
    pub created: Option<i64>,
    pub exposure: Exposure,
}

/// How a Service is reached from outside the cluster, but for the NodePorts, which its ports have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Exposure {
    /// Of everything here and of the NodePorts (rule 18).
    pub policy: TrafficPolicy,
    pub external_ips: Box<[Addr]>,
    /// Addresses of the load balancer that are to be served here (rule 20).
    pub load_balancer_ips: Box<[Addr]>,
    /// Who may use `load_balancer_ips`; a family of which there is none is open to all (rule 22).
    pub source_ranges: Box<[Prefix]>,
    /// Where a load balancer asks whether this node has endpoints (rule 40).
    pub health_check_port: Option<Port>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TrafficPolicy {
    /// To endpoints on any node.
    #[default]
    Cluster,
    /// To endpoints on this node only.
    Local,
}

/// How new flows are spread over endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    Random,
    /// Every node chooses the same endpoint for a flow, and mostly still does when endpoints come and go.
    Maglev,
    /// In proportion to [`Service::weights`]; from outside by Maglev.
    Weighted,
    /// Of two endpoints by chance, the one to which this node has fewer connections open.
    LeastConnection,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Empty where the only port of a Service has no name.
    pub name: Box<str>,
    pub proto: Proto,
    pub port: Port,
    pub node_port: Option<Port>,
}

/// Part of the endpoints of one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndpointSlice {
    /// The Service, by label, in the slice's namespace.
    pub service: Arc<str>,
    pub ports: Arc<[SlicePort]>,
    pub endpoints: Box<[Endpoint]>,
    /// The different lists of zones that its endpoints are for.
    pub zones: Box<[Zones]>,
}

/// Names of zones, sorted.
pub type Zones = Box<[Box<str>]>;

/// Where the endpoints of a slice listen for the service port of this name and protocol (rule 9).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlicePort {
    pub name: Box<str>,
    pub proto: Proto,
    pub port: Port,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub addr: Addr,
    pub condition: Condition,
    pub place: Place,
    pub node_hint: NodeHint,
    /// Which of the slice's [`EndpointSlice::zones`] it is for, counted from 1; 0 where it does not say.
    pub zone_hint: u16,
    /// The node it is on, and that one's zone.
    pub node: Label,
    pub zone: Label,
}

/// For which nodes an endpoint is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeHint {
    /// It does not say.
    #[default]
    Unsaid,
    Others,
    ThisNode,
}

/// What an endpoint is good for, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Condition {
    /// Takes nothing: not ready and not serving.
    Down,
    /// Keeps its flows and gets no new ones: serving, not ready, not terminating.
    Serving,
    /// Keeps its flows, and gets new ones where nobody is ready: serving and terminating (rule 2).
    Draining,
    /// Gets new flows, terminating or not (rule 11).
    Ready,
}

/// Whether an endpoint is on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    Remote,
    Local,
}

impl Service {
    /// Whether it has a half of this family (rule 10).
    pub fn serves(&self, family: Family) -> bool {
        self.cluster_ips.iter().any(|addr| Family::of(addr) == family)
    }

    /// Of Services that want the same address and port, the one with the lowest rank has it: the oldest, then the
    /// first by name.
    pub fn rank<'a>(&self, name: &'a Name) -> (i64, &'a Name) {
        (self.created.unwrap_or(i64::MAX), name)
    }
}

impl Endpoint {
    pub fn new(addr: Addr, condition: Condition, place: Place) -> Self {
        let (node, zone) = (Label::NONE, Label::NONE);
        Self { addr, condition, place, node_hint: NodeHint::Unsaid, zone_hint: 0, node, zone }
    }
}

impl EndpointSlice {
    /// The zones that an endpoint of this slice is for; empty where it does not say.
    pub fn zones(&self, endpoint: &Endpoint) -> &[Box<str>] {
        let index = usize::from(endpoint.zone_hint).checked_sub(1);
        index.and_then(|index| self.zones.get(index)).map_or(&[], |zones| zones)
    }
}
