//! What plugin and agent say to each other: one request and one reply, each one line of JSON, on a connection of its
//! own. They may be of different versions during an upgrade, so fields are only ever added.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::types::CniError;
use crate::ipam::host_port::HostPort;
use crate::ipam::{Owner, Tenant};
use crate::net::queue::Limits;

/// Where the agent listens by default: root alone may connect.
pub const SOCKET: &str = "/run/ferroflow/cni.sock";

/// Where the agent keeps its state by default.
pub const STATE_DIR: &str = "/var/lib/ferroflow";

/// Longer than any request or reply of a sane node.
pub const LONGEST_LINE: u64 = 4 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "UPPERCASE")]
pub enum Request {
    Add(Attachment),
    Del(Removal),
    Check {
        #[serde(flatten)]
        attachment: Attachment,
        /// What ADD reported.
        addresses: Vec<IpAddr>,
    },
    Gc {
        network: Box<str>,
        /// All attachments of the network that there are to be.
        valid: Vec<Owner>,
    },
    Status {
        #[serde(default)]
        addresses: Addresses,
    },
}

/// Who gives pods their addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Addresses {
    /// The agent, out of `spec.podCIDRs`.
    #[default]
    Own,
    /// Another plugin (`ipam.type`).
    Given,
}

/// A pod's interface as it is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    #[serde(flatten)]
    pub owner: Owner,
    pub netns: PathBuf,
    pub network: Box<str>,
    /// Bytes; `None` for what the node's devices carry.
    pub mtu: Option<u32>,
    /// The addresses that another plugin gave it, one of each family; `None` where the agent is to.
    #[serde(default)]
    pub given: Option<Vec<IpAddr>>,
    /// The pod that it is for. `None` of a plugin of an older version, and where the runtime does not say it.
    #[serde(default)]
    pub tenant: Option<Tenant>,
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    #[serde(default, skip_serializing_if = "Limits::is_empty")]
    pub limits: Limits,
}

/// An attachment that is to go. Also the form of a file in the spool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    #[serde(flatten)]
    pub owner: Owner,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reply {
    Attached(Attached),
    Done,
    Failed(CniError),
}

/// What ADD made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The host's end.
    pub host_interface: Box<str>,
    pub host_mac: Box<str>,
    /// The pod's end.
    pub mac: Box<str>,
    pub mtu: u32,
    pub addresses: Vec<IpAddr>,
}
