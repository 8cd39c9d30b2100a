//! Everything that can be configured, parsed into checked types.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::cni::protocol;
use crate::kube_proxy::Timeouts;
use crate::model::Prefix;
use crate::model::policy::Live;
use crate::plan::node::NodePortAddresses;
use crate::plan::relay::LoadBalancerMode;
use crate::plan::routes::Routing;
use crate::plan::{ExternalIps, MasqueradeScope};

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

    /// Which sockets of pods are translated when they name their peer; the others are served on the packet path. Those
    /// of the host's own processes always are, TCP and UDP, by the network namespace that the agent runs in
    #[arg(long, env = "FERROFLOW_SOCKET_LB", value_enum, default_value_t = SocketLb::Tcp)]
    pub socket_lb: SocketLb,

    /// How programs are attached to interfaces
    #[arg(long, env = "FERROFLOW_ATTACH", value_enum, default_value_t = Attach::Auto)]
    pub attach: Attach,

    /// Whether known flows through the node's devices are served in the devices' drivers, before the kernel makes
    /// socket buffers of their packets
    #[arg(long, env = "FERROFLOW_XDP", value_enum, default_value_t = Xdp::Off)]
    pub xdp: Xdp,

    /// Endpoints of services that the tables have room for, over all services (72 bytes each, of kernel memory)
    #[arg(long, env = "FERROFLOW_MAX_ENDPOINTS", value_name = "N", default_value_t = MAX_ENDPOINTS,
        value_parser = clap::value_parser!(u32).range(1_024..=4_194_304))]
    pub max_endpoints: u32,

    /// Where `/healthz` and `/livez` are answered
    #[arg(long, env = "FERROFLOW_HEALTH_PORT", value_name = "PORT", default_value_t = crate::health::server::PROXY_PORT)]
    pub health_port: u16,

    #[command(flatten)]
    pub metrics: Metrics,

    /// Directory for what must outlive the agent and not the machine: from here the process answers that load balancers
    /// ask for healthCheckNodePort, also while the agent restarts (give each agent one of its own)
    #[arg(long, env = "FERROFLOW_RUN_DIR", value_name = "DIR", default_value = "/run/ferroflow")]
    pub run_dir: PathBuf,

    /// The node's addresses that serve NodePorts: `primary` (the Node object's first of each family), `all`, or ranges
    /// separated by commas
    #[arg(long, env = "FERROFLOW_NODE_PORT_ADDRESSES", value_name = "WHICH", default_value = "primary",
        value_parser = node_port_addresses)]
    pub node_port_addresses: NodePortAddresses,

    /// Ranges that cluster IPs are taken from, separated by commas (as the API server's --service-cluster-ip-range), in
    /// addition to those of ServiceCIDR objects: packets to a port that a cluster IP does not have are refused, and to
    /// addresses there that no service has dropped
    #[arg(long, env = "FERROFLOW_SERVICE_CIDR", value_name = "RANGES", value_delimiter = ',', value_parser = service_range)]
    pub service_cidr: Vec<Prefix>,

    /// What becomes of `spec.externalIPs` of Services: whoever may write a Service can take any address with them
    /// (CVE-2020-8554)
    #[arg(long, env = "FERROFLOW_EXTERNAL_IPS", value_enum, default_value_t = ExternalIps::Ignore)]
    pub external_ips: ExternalIps,

    /// Masquerade every client of a cluster IP by this node's address, pods too: for networks in which a pod's reply
    /// to another pod does not come back here. TCP connections of pods are then translated packet by packet
    #[arg(long = "masquerade-all", env = "FERROFLOW_MASQUERADE_ALL", num_args = 0..=1, require_equals = true, default_value = "false",
        default_missing_value = "true", hide_default_value = true, value_parser = masquerade_all)]
    pub masquerade: MasqueradeScope,

    /// What becomes of established flows that policies do not allow any more, where no policy of the pod says it with the
    /// annotation `ferroflow.dev/live-flows`
    #[arg(long, env = "FERROFLOW_LIVE_FLOWS", value_enum, default_value_t = Live::Finish)]
    pub live_flows: Live,

    #[command(flatten)]
    pub timeouts: Timeouts,

    #[command(flatten)]
    pub cni: Cni,

    /// Who carries packets between the pods of this node and those of others, by spec.podCIDRs of Node objects.
    /// Set it with --cni; without it the network plugin that is there has made routes of its own
    #[arg(long, env = "FERROFLOW_ROUTING", value_enum, default_value_t = Routing::None)]
    pub routing: Routing,

    #[command(flatten)]
    pub world: World,

    /// How clients from outside reach a backend on another node, with externalTrafficPolicy: Cluster: the same on every
    /// node
    #[arg(long, env = "FERROFLOW_LOAD_BALANCER_MODE", value_enum, default_value_t = LoadBalancerMode::Snat)]
    pub load_balancer_mode: LoadBalancerMode,

    /// UDP port of the tunnels between nodes, with --routing vxlan or --load-balancer-mode dsr: the same on every node
    #[arg(long, env = "FERROFLOW_VXLAN_PORT", value_name = "PORT", default_value_t = 8472)]
    pub vxlan_port: u16,

    /// VXLAN network identifier that packets to other nodes carry, with --routing vxlan or --load-balancer-mode dsr
    #[arg(long, env = "FERROFLOW_VXLAN_VNI", value_name = "VNI", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(0..1 << 24))]
    pub vxlan_vni: u32,

    /// Log packets that the programs drop (slow; for debugging)
    #[arg(long, env = "FERROFLOW_LOG_DROPS")]
    pub log_drops: bool,
}

/// How pods reach what is outside of the cluster.
#[derive(Args, Clone, Debug)]
pub struct World {
    /// Whether packets of pods leave the node by the address of the node's device, which the world knows the way back
    /// to [default: on with --cni, else off]
    #[arg(long = "masquerade", env = "FERROFLOW_MASQUERADE", value_enum)]
    pods: Option<Masquerade>,

    /// Ranges in which pods keep their own addresses, separated by commas, in addition to the pods' own (spec.podCIDRs
    /// of all nodes) and the nodes' addresses: what is there must know the way back to pods
    #[arg(long, env = "FERROFLOW_NON_MASQUERADE_CIDRS", value_name = "RANGES", value_delimiter = ',',
        value_parser = non_masquerade_range)]
    pub non_masquerade_cidrs: Vec<Prefix>,
}

/// Where `/metrics` is answered.
#[derive(Args, Clone, Copy, Debug)]
pub struct Metrics {
    /// Port for `/metrics`, in the format of OpenMetrics; 0 for none
    #[arg(long = "metrics-port", env = "FERROFLOW_METRICS_PORT", value_name = "PORT",
        default_value_t = crate::observe::PORT)]
    pub port: u16,

    /// Address for `/metrics`: 0.0.0.0 or :: for whoever reaches this host, without any credentials
    #[arg(
        long = "metrics-address",
        env = "FERROFLOW_METRICS_ADDRESS",
        value_name = "ADDRESS",
        default_value = "127.0.0.1"
    )]
    pub address: IpAddr,
}

impl Metrics {
    /// `None` where metrics are not shown.
    pub fn addr(&self) -> Option<SocketAddr> {
        (self.port != 0).then(|| (self.address, self.port).into())
    }
}

/// Whether and how the agent attaches pods to the network.
#[derive(Args, Clone, Debug)]
pub struct Cni {
    /// Attach the pods of this node to the network: serve the CNI plugin (`ferroflow cni`), give addresses out of
    /// spec.podCIDRs of the Node object
    #[arg(long = "cni", env = "FERROFLOW_CNI")]
    pub enabled: bool,

    /// Where the plugin finds the agent; root alone may connect
    #[arg(long = "cni-socket", env = "FERROFLOW_CNI_SOCKET", value_name = "PATH", default_value = protocol::SOCKET)]
    pub socket: PathBuf,

    /// What new pods get as their interface; those that run keep theirs
    #[arg(long, env = "FERROFLOW_POD_DEVICE", value_enum, default_value_t = PodDevice::Veth)]
    pub pod_device: PodDevice,

    /// Directory for what must outlive the agent and the machine: which pod has which address
    #[arg(long, env = "FERROFLOW_STATE_DIR", value_name = "DIR", default_value = protocol::STATE_DIR)]
    pub state_dir: PathBuf,

    /// Directory in which container runtimes look for network configurations; one is written as soon as pods can be
    /// attached, and stays when the agent ends
    #[arg(
        long = "cni-conf-dir",
        env = "FERROFLOW_CNI_CONF_DIR",
        value_name = "DIR",
        default_value = "/etc/cni/net.d"
    )]
    pub conf_dir: PathBuf,

    /// Name of that configuration: runtimes take the first of the directory
    #[arg(long = "cni-conf-name", env = "FERROFLOW_CNI_CONF_NAME", value_name = "NAME",
        default_value = "05-ferroflow.conflist", value_parser = conf_name)]
    pub conf_name: String,

    /// Its section `ipam`, such as {"type": "host-local", "ranges": [..]}: another plugin of the runtime gives pods their
    /// addresses then, instead of spec.podCIDRs of the Node object
    #[arg(long = "cni-ipam", env = "FERROFLOW_CNI_IPAM", value_name = "JSON", value_parser = ipam)]
    pub ipam: Option<serde_json::Value>,
}

/// How the Kubernetes API is reached; without any of these as the pod's service account says.
#[derive(Args, Clone, Debug)]
pub struct Api {
    /// Credentials for the Kubernetes API [default: the pod's service account]
    #[arg(long, env = "FERROFLOW_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Addresses of API servers, tried in turn, separated by commas: needed where the address that the credentials name
    /// is a Service, which nobody serves before this agent does. That of a pod's service account is tried last
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

/// Which sockets of pods are translated when they name their peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// TCP connections
    Tcp,
    /// TCP connections, and datagrams of UDP sockets that are not connected
    All,
    /// None
    Off,
}

/// Where XDP is used. What it does not do, TC does: no service depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Xdp {
    /// Nowhere
    Off,
    /// On every device of the node; one whose driver cannot is an error
    Native,
    /// On every device whose driver can
    BestEffort,
}

/// Whether pods are masqueraded to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Masquerade {
    /// They leave the node by its address
    On,
    /// They leave as they are: the network knows the way back, or another program masquerades them
    Off,
}

/// The devices of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PodDevice {
    /// What every kernel has
    Veth,
    /// The programs run in the pod's own transmission (Linux 6.7, with CONFIG_NETKIT); the agent does not start without it
    Netkit,
    /// netkit where the kernel has it, veth elsewhere
    Auto,
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

impl Agent {
    /// Whoever attaches pods gives them addresses that nobody else knows.
    pub fn masquerades(&self) -> Masquerade {
        let default = if self.cni.enabled { Masquerade::On } else { Masquerade::Off };
        self.world.pods.unwrap_or(default)
    }
}

fn ipam(text: &str) -> Result<serde_json::Value, String> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    match value["type"].as_str() {
        Some(kind) if !kind.is_empty() => Ok(value),
        Some(_) | None => Err("an object with a field `type`: the name of the plugin".into()),
    }
}

fn conf_name(text: &str) -> Result<String, String> {
    let whole = !text.contains('/') && !text.starts_with('.') && text.ends_with(".conflist");
    whole.then(|| text.to_owned()).ok_or_else(|| "write it like 05-ferroflow.conflist".into())
}

fn node_port_addresses(text: &str) -> Result<NodePortAddresses, String> {
    match text {
        "primary" => return Ok(NodePortAddresses::Primary),
        "all" => return Ok(NodePortAddresses::All),
        _ => {}
    }
    Ok(NodePortAddresses::Ranges(text.split(',').map(range).collect::<Result<_, _>>()?))
}

fn range(text: &str) -> Result<Prefix, String> {
    let parsed = text
        .trim()
        .split_once('/')
        .and_then(|(addr, bits)| Prefix::new(addr.parse::<IpAddr>().ok()?.into(), bits.parse().ok()?));
    parsed.ok_or_else(|| format!("`{text}` is not a range: write it like 10.0.0.0/8 or fd00::/8"))
}

fn non_masquerade_range(text: &str) -> Result<Prefix, String> {
    let parsed = range(text)?;
    if parsed.is_proper() {
        Ok(parsed)
    } else {
        Err(format!("`{text}` contains every address: to masquerade none, say --masquerade off"))
    }
}

fn masquerade_all(text: &str) -> Result<MasqueradeScope, String> {
    match text {
        "true" => Ok(MasqueradeScope::All),
        "false" => Ok(MasqueradeScope::Outside),
        _ => Err(format!("`{text}` is neither true nor false")),
    }
}

fn service_range(text: &str) -> Result<Prefix, String> {
    let parsed = range(text)?;
    if parsed.is_proper() {
        Ok(parsed)
    } else {
        Err(format!("`{text}` contains every address: name the range that cluster IPs are taken from"))
    }
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

#[cfg(test)]
mod tests {
    use clap::Parser;
    use ferroflow_common::abi::{relay, tunnel};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        agent: Agent,
    }

    fn agent(more: &[&str]) -> Result<Agent, String> {
        let line = ["ferroflow", "--node-name", "a", "--manifests", "/m"].iter().chain(more);
        Line::try_parse_from(line).map(|line| line.agent).map_err(|error| error.to_string())
    }

    #[test]
    fn who_attaches_pods_masquerades_them() {
        for (more, expected) in [
            (&[][..], Masquerade::Off),
            (&["--cni"], Masquerade::On),
            (&["--cni", "--masquerade", "off"], Masquerade::Off),
            (&["--masquerade", "on"], Masquerade::On),
        ] {
            assert_eq!(agent(more).unwrap().masquerades(), expected, "{more:?}");
        }
    }

    /// All that nodes share. An agent of another version may be at the other end: whoever changes one of these parts a cluster
    /// for as long as its update takes.
    #[test]
    fn what_nodes_say_to_each_other_is_the_same_in_all_versions() {
        let Agent { vxlan_port, vxlan_vni, .. } = agent(&[]).unwrap();
        assert_eq!((vxlan_port, vxlan_vni), (8472, 1));
        assert_eq!(tunnel::DEVICE_MAC, [0x02, 0x66, 0x65, 0x72, 0x72, 0x6f]);
        assert_eq!(tunnel::SENDER_MAC, [0x02, 0x66, 0x6c, 0x6f, 0x77, 0x00]);
        assert_eq!(relay::SENDER_MAC, [0x02, 0x72, 0x65, 0x6c, 0x61, 0x79]);
    }

    #[test]
    fn ranges_without_masquerade_are_told_by_their_own_text() {
        let ranges = agent(&["--non-masquerade-cidrs", "10.0.0.0/8,fd00::/8"]).unwrap();
        assert_eq!(ranges.world.non_masquerade_cidrs.len(), 2);
        for (text, says) in [
            ("10.0.0.0", "`10.0.0.0` is not a range: write it like 10.0.0.0/8 or fd00::/8"),
            ("10.0.0.1/8", "`10.0.0.1/8` is not a range"),
            ("10.0.0.0/33", "`10.0.0.0/33` is not a range"),
            ("10.0.0.0/8,nonsense", "`nonsense` is not a range"),
            ("0.0.0.0/0", "`0.0.0.0/0` contains every address: to masquerade none, say --masquerade off"),
            ("::/0", "`::/0` contains every address"),
        ] {
            let error = agent(&["--non-masquerade-cidrs", text]).unwrap_err();
            assert!(error.contains(says) && error.contains("--non-masquerade-cidrs"), "{error}");
        }
    }
}
