//! Tests that need a kernel: programs on packets, and clusters of network namespaces on the wire.
//!
//! ```text
//!  sandbox (private mounts, cgroup subtree, signals)
//!     └─ cluster: nodes and pods as network namespaces ── manifests (ordinary Kubernetes YAML)
//!           ├─ agent: the real binary on a node ── cni: the network plugin beside it, as a runtime runs it
//!           └─ traffic: requests between pods ── pod (the processes in them: this same executable)
//!           ├─ raw: packets as they are
//!           ├─ probe: many first packets at once, and which of them are answered ── tests/netpol
//!           (outside: a world around it)
//!           (installed: nodes with the chart's settings ── tests/e2e.rs)
//!     └─ run: programs on single packets, beside the library ── tests/programs.rs, verify (their cost)
//!     └─ packets: objects and packets through agent, tables and programs, judged by an oracle ── tests/packets.rs
//!  checks (what must hold) ── demo, tests/wire.rs, tests/restart.rs
//!  metrics: what an agent shows to Prometheus
//!  apiserver: a Kubernetes API on the same manifests, with faults ── tests/apiserver.rs
//!  fuzz: bytes that nobody should send, at the programs, the directory source and the agent's socket
//!  chart (the Helm chart, rendered and checked) ── kubelet: its containers as a node runs them ── tests/container.rs
//!  live (tests of a real cluster, through its API)
//!  soak (churn, deaths and faults under steady traffic, and what is left of it)
//!  bench (how fast it is, beside kernel routing and kube-proxy's rules)
//! ```
#![forbid(unsafe_code)]

pub mod agent;
pub mod apiserver;
pub mod bench;
pub mod cgroup;
pub mod chart;
pub mod checks;
pub mod cluster;
pub mod cni;
pub mod demo;
pub mod ethtool;
pub mod exposed;
pub mod forwarded;
pub mod fuzz;
pub mod guarded;
pub mod installed;
pub mod kubelet;
pub mod live;
pub mod manifests;
pub mod metrics;
pub mod netns;
pub mod oracle;
pub mod outside;
pub mod packets;
pub mod patience;
pub mod pod;
pub mod probe;
pub mod raw;
pub mod run;
pub mod runner;
pub mod sandbox;
pub mod soak;
pub mod steady;
pub mod traffic;
pub mod verify;
pub mod vm;
