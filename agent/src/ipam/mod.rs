//! Addresses for the pods of this node, out of the ranges that its Node object has for them.
//!
//! ```text
//!   Node.spec.podCIDRs ──▶ range/: what of it pods may have ──▶ pool/: pure: who has which ──▶ ledger/: on disk
//! ```
//!
//! What must hold: two containers never have one address, across restarts, crashes and reboots; an address that was
//! released is given again as late as possible, since connections to whom had it before may still be on their way.

pub mod host_port;
pub mod ledger;
pub mod pool;
pub mod range;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ferroflow_common::addr::Addr;
use serde::{Deserialize, Serialize};

use crate::model::{Family, Prefix};
use host_port::HostPort;

/// An attachment as the CNI specification identifies one: no two exist at a time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Owner {
    #[serde(rename = "containerID")]
    pub container_id: Box<str>,
    pub ifname: Box<str>,
}

/// The Kubernetes pod that an attachment is for, as the runtime names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    pub namespace: Box<str>,
    pub name: Box<str>,
    /// Empty where the runtime does not say it.
    #[serde(default)]
    pub uid: Box<str>,
}

/// What an attachment has been given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The CNI network that it is attached to: others' garbage is not collected (rule 59).
    pub network: Box<str>,
    /// One of each family.
    pub addresses: Vec<IpAddr>,
    /// Whose it is; `None` where the runtime does not say it, or no runtime of Kubernetes asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<Tenant>,
    /// Ports of the host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<HostPort>,
}

/// Where addresses may be taken from at present.
#[derive(Clone, Copy, Debug)]
pub struct Space<'a> {
    pub ranges: &'a [Prefix],
    /// In use by somebody else: the host itself, or a pod that is not in the ledger.
    pub reserved: &'a BTreeSet<Addr>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    #[error("the Node object of this node has no spec.podCIDRs yet: the cluster's controllers give it one")]
    NoRange,
    #[error("{addr} was given, and container {holder} of this node has it")]
    Given { addr: IpAddr, holder: Box<str> },
    #[error("spec.podCIDRs of this node: {range} cannot be used for pods: {why}")]
    Unusable { range: Prefix, why: &'static str },
    #[error(
        "no {} address is left in {ranges} (spec.podCIDRs of this node): {used} are in use; give the node a larger range",
        family.name()
    )]
    Exhausted { family: Family, ranges: String, used: usize },
}
