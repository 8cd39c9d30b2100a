//! The cluster as this node needs it: lean types with only the fields that are used, and the [`World`] that holds
//! them. Pure: no Kubernetes objects, no I/O, no clock.

pub mod host_port;
pub mod id;
pub mod label;
pub mod namespace;
pub mod node;
pub mod pod;
pub mod policy;
pub mod route;
pub mod service;
pub mod share;
pub mod tier;
pub mod weight;
pub mod world;

use std::fmt;
use std::sync::Arc;

use ferroflow_common::addr::Addr;

pub use host_port::{At, HostPort, HostPorts};
pub use id::{Kind, ObjectId, Withheld};
pub use label::Labels;
pub use namespace::Namespace;
pub use node::{Node, Prefix, Stay};
pub use pod::{NamedPort, Network, Pod, Tenant};
pub use policy::NetworkPolicy;
pub use route::{Routes, TunnelLink, Way};
pub use service::{
    Algorithm, Condition, Endpoint, EndpointSlice, Exposure, NodeHint, Service, ServicePort, SlicePort,
    TrafficPolicy,
};
pub use tier::ClusterNetworkPolicy;
pub use world::{Touched, World};

/// The name of a namespaced object. Copies share its text: every stage knows an object by its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Name {
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One object as it now is; `None` is one that is gone, or that is not for us (rule 12).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    Service(Name, Option<Service>),
    EndpointSlice(Name, Option<EndpointSlice>),
    Node(Box<str>, Option<Node>),
    Pod(Name, Option<Pod>),
    /// Ranges that cluster IPs are taken from (rule 19).
    ServiceCidr(Box<str>, Option<Box<[Prefix]>>),
    /// Whether rules of kube-proxy are in this host's kernel.
    KubeProxy(KubeProxy),
    Namespace(Box<str>, Option<Namespace>),
    NetworkPolicy(Name, Option<NetworkPolicy>),
    ClusterNetworkPolicy(Box<str>, Option<ClusterNetworkPolicy>),
    /// An address behind an interface of this host, and that interface.
    LocalRoute(Addr, Option<u32>),
    /// An address of this host itself, and the interface it is on.
    LocalAddress(Addr, Option<u32>),
    /// A range of addresses that this host reaches without a gateway, and the interface it is on.
    LocalSubnet(Prefix, Option<u32>),
    /// Whether a default route of this host leads out of the interface.
    Uplink {
        ifindex: u32,
        leads: bool,
    },
    /// Whether packets that leave by the interface wait in a queue of its own.
    Queue {
        ifindex: u32,
        there: bool,
    },
    /// The device that carries packets to other nodes.
    Tunnel(Option<TunnelLink>),
    /// An address that this agent gave to a pod, and the interface it made for it: known before any object says so.
    Attachment(Addr, Option<u32>),
    /// The pod that it was given to.
    Tenant(Addr, Option<Tenant>),
    /// The ports of the host that lead to the pod behind an interface that this agent made.
    HostPorts(Box<str>, Option<HostPorts>),
}

/// The service proxy that a node had before, as far as the kernel still has its rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KubeProxy {
    #[default]
    Absent,
    /// It may have opened connections that live: they are its to finish.
    Present,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub fn of(addr: &Addr) -> Self {
        if addr.ip().is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// As Kubernetes spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}
