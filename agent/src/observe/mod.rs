//! What the agent shows of itself to Prometheus, in the format of OpenMetrics 1.0.
//!
//! ```text
//!   daemon ──changes, syncs──▶ Metrics (histograms, counters) ──┐
//!     ▲                                                         ├──▶ /metrics
//!     └── at each scrape: what is so now? ──▶ View ─────────────┘
//! ```
//!
//! What happens is counted as it happens; what is so is asked for when somebody wants to know. Names that begin with
//! `kubeproxy_` mean what kube-proxy means by them, with its types and buckets, so that its dashboards and alerts work
//! on (<https://kubernetes.io/docs/reference/instrumentation/metrics/>); what the agent has no such thing of (chains,
//! full and partial syncs) it does not show. There is no label `ip_family`: both are written by the same syncs.

pub mod locality;
pub mod metrics;
pub mod pods;
mod programming;
mod server;
mod view;

pub use metrics::Metrics;
pub use server::{Asked, PODS, PORT, start};
pub use view::{Fill, View};
