//! Ports of the host that lead to a pod of this node (`hostPort` of a container's port).

use ferroflow_common::addr::{Addr, Port, Proto};

use super::{Family, Name};

/// What one attachment asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPorts {
    /// The pod's: one of each family.
    pub addresses: Box<[Addr]>,
    /// In the order of their names, which differ.
    ports: Box<[HostPort]>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// `tcp-8080`, and `tcp-8080-[127.0.0.1]` where it is not on all addresses.
    pub name: Box<str>,
    pub at: At,
    pub proto: Proto,
    pub port: Port,
    pub container_port: Port,
}

/// Where a port of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum At {
    /// At every address of the host; the host itself also has it at its loopback addresses.
    Every,
    /// The same, of one family.
    EveryOf(Family),
    /// At this address, while the host has it; at a loopback address only the host itself has it.
    One(Addr),
}

/// No namespace of Kubernetes can be called so.
const NAMESPACE: &str = "hostPort";

impl HostPorts {
    pub fn new(addresses: Box<[Addr]>, mut ports: Vec<HostPort>) -> Self {
        ports.sort();
        Self { addresses, ports: ports.into() }
    }

    /// What the ports of the pod behind this interface are called, where Services are called by their names.
    pub fn name(interface: &str) -> Name {
        Name::new(NAMESPACE, interface)
    }

    /// Whether it is a name of ports of the host, and of no Service.
    pub fn are(name: &Name) -> bool {
        *name.namespace == *NAMESPACE
    }

    pub fn ports(&self) -> &[HostPort] {
        &self.ports
    }

    /// Whether one is at this address alone.
    pub fn name_address(&self, addr: Addr) -> bool {
        self.ports.iter().any(|it| it.at == At::One(addr))
    }
}

impl HostPort {
    pub fn new(at: At, proto: Proto, port: Port, container_port: Port) -> Self {
        let family = |family: Family| match family {
            Family::V4 => "-[0.0.0.0]".to_owned(),
            Family::V6 => "-[::]".to_owned(),
        };
        let place = match at {
            At::Every => String::new(),
            At::EveryOf(one) => family(one),
            At::One(addr) => format!("-[{addr}]"),
        };
        let name = format!("{}-{port}{place}", proto.to_string().to_lowercase());
        Self { name: name.into(), at, proto, port, container_port }
    }
}
