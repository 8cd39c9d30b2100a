//! Services and what stands behind them.

use ferroflow_common::addr::{Addr, Port, Proto};

/// A Service that is ours to serve.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Service {
    /// At most one of each family.
    pub cluster_ips: Box<[Addr]>,
    /// In the order of their names, which differ.
    pub ports: Box<[ServicePort]>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Empty where the only port of a Service has no name.
    pub name: Box<str>,
    pub proto: Proto,
    pub port: Port,
}

/// Part of the endpoints of one Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointSlice {
    /// The Service, by label, in the slice's namespace.
    pub service: Box<str>,
    pub ports: Box<[SlicePort]>,
    pub endpoints: Box<[Endpoint]>,
}

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
