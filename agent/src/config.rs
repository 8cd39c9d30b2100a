//! Everything that can be configured, parsed into checked types.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::model::Prefix;
use crate::plan::node::NodePortAddresses;

/// Where the pinned maps and links are; each agent on a machine has a directory of its own.
#[derive(Args, Clone, Debug)]
pub struct Bpffs {
    /// Directory on a BPF file system for pinned maps and links
    #[arg(
        long = "bpffs",
        env = "FERROFLOW_BPFFS",
        value_name = "DIR",
        default_value = "/sys/fs/bpf/ferroflow"
    )]
    pub dir: PathBuf,
}

impl Bpffs {
    pub fn maps(&self) -> PathBuf {
        self.dir.join("maps")
    }

    pub fn links(&self) -> PathBuf {
        self.dir.join("links")
    }
}

/// Room for a cluster of 10,000 services with 10 endpoints each.
pub const MAX_ENDPOINTS: u32 = 131_072;

/// The agent's options.
#[derive(Args, Clone, Debug)]
pub struct Agent {
    /// Name of this node, as in Node objects
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: String,

    /// Directory of Kubernetes YAML to serve instead of a cluster (multi-document; re-read on change)
    #[arg(long, env = "FERROFLOW_MANIFESTS", value_name = "DIR", conflicts_with_all = ["kubeconfig", "api_server"])]
    pub manifests: Option<PathBuf>,

    #[command(flatten)]
    pub api: Api,

    #[command(flatten)]
    pub bpffs: Bpffs,

    /// Directory of the cgroup2 hierarchy whose sockets are load-balanced [default: where cgroup2 is mounted]
    #[arg(long, env = "FERROFLOW_CGROUP", value_name = "DIR")]
    pub cgroup: Option<PathBuf>,

    /// Which sockets are translated when they connect; the others are served on the packet path
    #[arg(long, env = "FERROFLOW_SOCKET_LB", value_enum, default_value_t = SocketLb::Tcp)]
    pub socket_lb: SocketLb,

    /// How programs are attached to interfaces
    #[arg(long, env = "FERROFLOW_ATTACH", value_enum, default_value_t = Attach::Auto)]
    pub attach: Attach,

    /// Endpoints of services that the tables have room for, over all services (64 bytes each, all of it resident)
    #[arg(long, env = "FERROFLOW_MAX_ENDPOINTS", value_name = "N", default_value_t = MAX_ENDPOINTS,
        value_parser = clap::value_parser!(u32).range(1_024..=4_194_304))]
    pub max_endpoints: u32,

    /// Where `/healthz` and `/livez` are answered
    #[arg(long, env = "FERROFLOW_HEALTH_PORT", value_name = "PORT", default_value_t = crate::health::server::PROXY_PORT)]
    pub health_port: u16,

    /// The node's addresses that serve NodePorts: `primary` (the Node object's first of each family), `all`, or ranges
    /// separated by commas
    #[arg(long, env = "FERROFLOW_NODE_PORT_ADDRESSES", value_name = "WHICH", default_value = "primary",
        value_parser = node_port_addresses)]
    pub node_port_addresses: NodePortAddresses,

    /// Log packets that the programs drop (slow; for debugging)
    #[arg(long, env = "FERROFLOW_LOG_DROPS")]
    pub log_drops: bool,
}

/// How the Kubernetes API is reached; without any of these as the pod's service account says.
#[derive(Args, Clone, Debug)]
pub struct Api {
    /// Credentials for the Kubernetes API [default: the pod's service account]
    #[arg(long, env = "FERROFLOW_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Addresses of API servers, tried in turn, separated by commas: needed where the address that the credentials name
    /// is a Service, which nobody serves before this agent does
    #[arg(long, env = "FERROFLOW_API_SERVER", value_name = "URL", value_delimiter = ',',
        value_parser = crate::watch::kube::server)]
    pub api_server: Vec<hyper::Uri>,

    /// Take the taint of this key off the node once it is served
    #[arg(long, env = "FERROFLOW_STARTUP_TAINT", value_name = "KEY", conflicts_with = "manifests")]
    pub startup_taint: Option<String>,

    /// Set the node's condition NetworkUnavailable to False once it is served (for clouds that set it on new nodes)
    #[arg(long, env = "FERROFLOW_SET_NETWORK_AVAILABLE", conflicts_with = "manifests")]
    pub set_network_available: bool,
}

/// Which sockets are translated when they name their peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// TCP connections
    Tcp,
    /// TCP and UDP
    All,
    /// None
    Off,
}

/// The hook for programs on interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attach {
    /// tcx where the kernel has it (6.6), clsact elsewhere
    Auto,
    /// tcx links
    Tcx,
    /// Filters on a clsact qdisc
    Clsact,
}

fn node_port_addresses(text: &str) -> Result<NodePortAddresses, String> {
    match text {
        "primary" => return Ok(NodePortAddresses::Primary),
        "all" => return Ok(NodePortAddresses::All),
        _ => {}
    }
    let range = |text: &str| {
        let (addr, bits) = text.trim().split_once('/')?;
        Prefix::new(addr.parse::<IpAddr>().ok()?.into(), bits.parse().ok()?)
    };
    let ranges = text.split(',').map(|text| {
        range(text).ok_or_else(|| format!("`{text}` is not a range: write it like 10.0.0.0/8 or fd00::/8"))
    });
    Ok(NodePortAddresses::Ranges(ranges.collect::<Result<_, _>>()?))
}

/// How the command line answers.
#[derive(Args, Clone, Debug)]
pub struct Query {
    #[command(flatten)]
    pub bpffs: Bpffs,

    /// Format of the answer
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}
