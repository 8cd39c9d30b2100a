//! Tests that need a kernel: programs on packets, and clusters of network namespaces on the wire.
//!
//! ```text
//!  sandbox (private mounts, cgroup subtree, signals)
//!     └─ cluster: nodes and pods as network namespaces ── manifests (ordinary Kubernetes YAML)
//!           ├─ agent: the real binary on a node ── cni: the network plugin beside it, as a runtime runs it
//!           └─ traffic: requests between pods ── pod (the processes in them: this same executable)
//!     └─ run: programs on single packets, beside the library ── tests/programs.rs, verify (their cost)
//!  checks (what must hold) ── demo, tests/wire.rs, tests/restart.rs
//!  apiserver: a Kubernetes API on the same manifests, with faults ── tests/apiserver.rs
//!  chart (the Helm chart, rendered and checked)
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
pub mod manifests;
pub mod netns;
pub mod oracle;
pub mod outside;
pub mod patience;
pub mod pod;
pub mod run;
pub mod runner;
pub mod sandbox;
pub mod traffic;
pub mod verify;
pub mod vm;
