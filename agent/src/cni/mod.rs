//! The CNI plugin (specification 1.1.0) and its other half in the agent.
//!
//! ```text
//!   kubelet ─▶ container runtime ─▶ ferroflow cni ──one Request──▶ server/ in the agent
//!               environment, stdin    plugin/            socket      ipam: a lease, on disk before it is used
//!               JSON on stdout        types/      ◀──one Reply────   net: the pod's interface and routes
//!                                                                    daemon: rows and programs of the pod
//! ```
//!
//! The plugin knows the versions of the specification and nothing of the kernel; the agent the other way around. What
//! must hold:
//!
//! - ADD answers when the pod is served (rule 54), and where it fails it leaves nothing.
//! - DEL succeeds whatever is missing (rule 56): without an agent it is left in the spool, which the agent empties.
//! - Every error is one JSON object on standard output, with the code that the specification has for it (rule 60).

pub mod plugin;
pub mod protocol;
pub mod server;
mod spool;
pub mod types;
