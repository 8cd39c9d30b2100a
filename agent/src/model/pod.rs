//! Pods.

use std::sync::Arc;

use ferroflow_common::addr::{Addr, Port, Proto};

use super::Labels;

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

/// What a named port of a policy may mean (rule 46).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamedPort {
    pub name: Box<str>,
    pub proto: Proto,
    pub port: Port,
}
