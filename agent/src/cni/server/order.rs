//! What the server asks of the daemon, which alone knows the cluster and writes the tables.

use std::collections::BTreeSet;

use ferroflow_common::addr::Addr;
use tokio::sync::oneshot;

use crate::ipam::Tenant;
use crate::ipam::host_port::HostPort;
use crate::model::Prefix;

#[derive(Debug)]
pub enum Order {
    /// What is known of this node.
    Look(oneshot::Sender<View>),
    /// Answered when these addresses have their rows, with the policies of the pod, and the interface its programs, or when
    /// a port of the host cannot lead to it; not at all before.
    Serve { place: Place, served: oneshot::Sender<Result<(), Refused>> },
    /// Whether it is so; otherwise what is missing.
    IsServed { place: Place, answer: oneshot::Sender<Result<(), Box<str>>> },
    /// Nobody has these addresses any longer, nor what led to the interface.
    Withdraw { interface: Box<str>, addresses: Vec<Addr> },
}

/// Addresses and the interface that leads to who has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub addresses: Vec<Addr>,
    pub ifindex: u32,
    /// Its name.
    pub interface: Box<str>,
    pub tenant: Option<Tenant>,
    pub host_ports: Vec<HostPort>,
}

/// Why ports of the host do not lead to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(pub Box<str>);

/// This node, as far as pods are attached by it.
#[derive(Clone, Debug, Default)]
pub struct View {
    pub readiness: Readiness,
    /// Of the Node object.
    pub ranges: Vec<Prefix>,
    /// The host's own addresses, and those that it has routes to.
    pub reserved: BTreeSet<Addr>,
    /// The interfaces that lead out of this node.
    pub devices: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Readiness {
    /// Not every source has sent all it has: rows are not written yet.
    #[default]
    Starting,
    Ready,
}
