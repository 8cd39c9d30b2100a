//! Pods.

use ferroflow_common::addr::Addr;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pod {
    /// Empty before it is scheduled.
    pub node: Box<str>,
    /// Its own addresses: none before it has any, once it is finished (its addresses may be another's, rule 51), or
    /// where it uses the host's network.
    pub addresses: Box<[Addr]>,
}
