//! Pods.

use std::sync::Arc;

use ferroflow_common::addr::{Addr, Port, Proto};

use super::{Labels, Name};

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pod {
    /// Which pod it is, of those that had its name one after another.
    pub uid: Box<str>,
    /// Empty before it is scheduled.
    pub node: Arc<str>,
    pub network: Network,
    /// Its own addresses: none before it has any, and none with another [`Network`] than [`Network::Own`].
    pub addresses: Box<[Addr]>,
    pub labels: Labels,
    /// The ports of its containers that have names.
    pub ports: Arc<[NamedPort]>,
}

/// Whose network a pod is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Network {
    #[default]
    Own,
    /// The host's: no policy selects such a pod, and no selector means it (rule 50).
    Host,
    /// It is finished: its addresses may be another's (rule 51).
    Left,
}

/// A pod of this node that was given an address, which its object need not say yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tenant {
    pub pod: Name,
    /// Of the one that is meant; empty where that is not known.
    pub uid: Box<str>,
}

impl Tenant {
    /// Whether the object is of this pod, and not of one that had its name before or will have it.
    pub fn is(&self, pod: &Pod) -> bool {
        self.uid.is_empty() || pod.uid.is_empty() || self.uid == pod.uid
    }
}

/// What a named port of a policy may mean (rule 46).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamedPort {
    pub name: Box<str>,
    pub proto: Proto,
    pub port: Port,
}
