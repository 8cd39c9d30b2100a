//! What the agent says of itself, where the CLI finds it also when the agent is dead.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The last word of the agent that owns these maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AgentState {
    pub pid: u32,
    /// 1 once every source has listed and the tables say what the objects say.
    pub synced: u32,
    /// Seconds of `CLOCK_MONOTONIC` at the agent's start.
    pub started: u64,
    /// Rows written to or deleted from the tables since the start.
    pub writes: u64,
    /// Writes that failed and were tried again.
    pub retries: u64,
    /// Documents or objects that are reported as bad and not served.
    pub rejected: u32,
    /// 1 while kube-proxy or its rules are on the node.
    pub kube_proxy: u32,
    /// Ports for health checks that are another process's.
    pub health_problems: u32,
    /// Seconds of `CLOCK_MONOTONIC` since when the source of objects gives no answers; 0 while it does.
    pub away_since: u32,
    /// The agent's version, ended by zeros.
    pub version: [u8; 32],
    /// The node's name, ended by zeros.
    pub node: [u8; 256],
}
