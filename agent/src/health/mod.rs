//! What load balancers ask: whether this node has endpoints of a service, and whether it serves at all.
//!
//! ```text
//!   World ──checks──▶ Keeper ──file──▶ `ferroflow health`: a task a port ──▶ hyper ──▶ status, headers, body
//!   reconcile's progress ──▶ Proxy ──▶ port 10256, in the agent
//! ```
//!
//! What is answered is decided by pure functions ([`service`], [`proxy`]); [`server`] only listens. Services are answered
//! by a process of its own, which outlives the agent ([`keeper`], [`answering`]); whether the agent lives is for the agent
//! to say.

pub mod answering;
pub(crate) mod http;
pub mod keeper;
pub mod proxy;
pub mod server;
pub mod service;
pub mod told;

pub use keeper::Keeper;
pub use proxy::Proxy;
pub use server::Health;
pub use service::Check;

/// An answer over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: String,
}

impl Answer {
    /// Yes is 200, no is 503.
    fn new(yes: Verdict, body: String) -> Self {
        let status = match yes {
            Verdict::Healthy => 200,
            Verdict::Unhealthy => 503,
        };
        let headers = [("content-type", "application/json"), ("x-content-type-options", "nosniff")];
        Self { status, headers: headers.map(|(name, value)| (name, value.to_owned())).into(), body }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Healthy,
    Unhealthy,
}

impl From<bool> for Verdict {
    fn from(healthy: bool) -> Self {
        if healthy { Self::Healthy } else { Self::Unhealthy }
    }
}
