//! Which object it is.

use std::collections::BTreeSet;
use std::fmt;

use super::{Change, Name};

/// The kinds of objects that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Service,
    EndpointSlice,
    Node,
    Pod,
    ServiceCidr,
    Namespace,
    NetworkPolicy,
    ClusterNetworkPolicy,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Service,
        Self::EndpointSlice,
        Self::Node,
        Self::Pod,
        Self::ServiceCidr,
        Self::Namespace,
        Self::NetworkPolicy,
        Self::ClusterNetworkPolicy,
    ];

    /// As Kubernetes spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Namespace => "Namespace",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
        }
    }
}

/// The identity of one object. What has no namespace is in `default`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    pub kind: Kind,
    pub name: Name,
}

impl ObjectId {
    /// What tells that the object is gone.
    pub fn gone(&self) -> Change {
        let name = self.name.clone();
        match self.kind {
            Kind::Service => Change::Service(name, None),
            Kind::EndpointSlice => Change::EndpointSlice(name, None),
            Kind::Node => Change::Node((*name.name).into(), None),
            Kind::Pod => Change::Pod(name, None),
            Kind::ServiceCidr => Change::ServiceCidr((*name.name).into(), None),
            Kind::Namespace => Change::Namespace((*name.name).into(), None),
            Kind::NetworkPolicy => Change::NetworkPolicy(name, None),
            Kind::ClusterNetworkPolicy => Change::ClusterNetworkPolicy((*name.name).into(), None),
        }
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Node | Kind::Namespace | Kind::ServiceCidr | Kind::ClusterNetworkPolicy => {
                write!(f, "{} {}", self.kind.name(), self.name.name)
            }
            Kind::Service | Kind::EndpointSlice | Kind::Pod | Kind::NetworkPolicy => {
                write!(f, "{} {}", self.kind.name(), self.name)
            }
        }
    }
}

/// What cannot be read at present, of that which was there before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Withheld {
    Some {
        /// Services of which the object itself or a slice is bad.
        services: BTreeSet<Name>,
        pods: BTreeSet<Name>,
        /// Whether a node is.
        nodes: bool,
    },
    /// It may be any object.
    Any,
}

impl Withheld {
    /// Whether a pod may be among it.
    pub fn pods(&self) -> bool {
        match self {
            Self::Some { services: _, pods, nodes: _ } => !pods.is_empty(),
            Self::Any => true,
        }
    }

    /// Whether a node may be among it.
    pub fn nodes(&self) -> bool {
        match self {
            Self::Some { services: _, pods: _, nodes } => *nodes,
            Self::Any => true,
        }
    }
}

impl Default for Withheld {
    fn default() -> Self {
        Self::Some { services: BTreeSet::new(), pods: BTreeSet::new(), nodes: false }
    }
}
