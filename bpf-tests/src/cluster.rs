//! Nodes and pods as network namespaces.
//!
//! ```text
//!  pod a1 eth0 ── pod-a1 ┐                            ┌ pod-b1 ── eth0 pod b1
//!                        node a eth0 ── switch ── eth0 node b
//!  pod a2 eth0 ── pod-a2 ┘                            └ pod-b2 ── eth0 pod b2
//! ```
//! Node N has 192.168.50.N and fd50::N on the switch and routes to the pods of the others; its pods have addresses of
//! 10.244.N.0/24 and fd00:10:244:N::/64. The node reaches a pod by a /32 and a /128 route on the pod's interface, as
//! a CNI plugin leaves it: that is how the agent finds local pods.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use ferroflow::{
    config::Xdp,
    datapath::{Datapath, Interface},
};
use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};

use crate::{
    cgroup,
    cni::{self, Container, Runtime},
    ethtool,
    manifests::Directory,
    netns::{End, Inside, Mac, Netns, Prefix, Route, Tunnel},
    pod::{Outcome, Progress, Ready},
    run,
    sandbox::{Place, Sandbox},
    traffic::{Ask, Client, pod_command},
};

/// Fields are dropped in this order: processes first, namespaces last.
#[derive(Debug)]
pub struct Cluster {
    processes: cgroup::Tree,
    manifests: Directory,
    nodes: Vec<Node>,
    switch: Netns,
}

#[derive(Debug)]
pub struct Node {
    /// As Kubernetes knows it: `node-a`.
    pub name: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub pods: Vec<Pod>,
    /// Holds the cgroups of its pods and of the host's own processes, and nothing else.
    pub cgroup: PathBuf,
    host_cgroup: PathBuf,
    /// Of its agent: not below `cgroup`.
    pub agent_cgroup: PathBuf,
    pub bpffs: PathBuf,
    /// What its agent reads.
    pub manifests: PathBuf,
    /// For files of its agent.
    pub logs: PathBuf,
    pub netns: Arc<Netns>,
    number: u8,
}

#[derive(Debug)]
pub struct Pod {
    pub name: String,
    /// As Kubernetes knows it: `node-a`.
    pub node: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    /// The node's end of its veth.
    pub interface: String,
    pub netns: Netns,
    cgroup: PathBuf,
    server: Mutex<Option<Client<Ready>>>,
}

/// The next hop of every pod; its link-layer address is that of the node's end of the veth.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const PODS_PER_NODE: u8 = 2;
/// What VXLAN over IPv6 leaves of 1500 bytes; over IPv4 it would be 20 more.
const TUNNEL_MTU: u32 = 1430;
const NODE_PREFIX: &str = "node-";

impl Cluster {
    /// Nodes of these names (`a` becomes `node-a` with pods `a1` and `a2`), their pods serving.
    pub fn new(sandbox: &Sandbox, nodes: &[&str]) -> Result<Self> {
        Self::with_pods(sandbox, nodes, PODS_PER_NODE)
    }

    pub fn with_pods(sandbox: &Sandbox, nodes: &[&str], pods: u8) -> Result<Self> {
        let mut cluster = Self::unrouted(sandbox, nodes)?;
        for node in &cluster.nodes {
            node.route_to(&cluster.nodes)?;
        }
        cluster.fill(pods)?;
        Ok(cluster)
    }

    /// As [`Cluster::new`], of two nodes, but each packet to the other one's IPv4 pods goes through the kernel's tunnel.
    pub fn tunnelled(sandbox: &Sandbox, nodes: [&str; 2]) -> Result<Self> {
        let mut cluster = Self::unrouted(sandbox, &nodes)?;
        let [first, second] = [&cluster.nodes[0], &cluster.nodes[1]];
        first.tunnel_to(second)?;
        second.tunnel_to(first)?;
        cluster.fill(PODS_PER_NODE)?;
        cluster.leave_room_for_tunnels()?;
        Ok(cluster)
    }

    /// As [`Cluster::new`], but the agents have to connect the pods of different nodes.
    pub fn unconnected(sandbox: &Sandbox, nodes: &[&str]) -> Result<Self> {
        let mut cluster = Self::unrouted(sandbox, nodes)?;
        cluster.fill(PODS_PER_NODE)?;
        Ok(cluster)
    }

    /// Nodes without pods, and without routes to each other's.
    pub fn unrouted(sandbox: &Sandbox, nodes: &[&str]) -> Result<Self> {
        let place = sandbox.place()?;
        let processes = cgroup::Tree::create(place.cgroup.clone())?;
        let manifests = Directory::create(&place.dir)?;
        let switch = Netns::new("switch")?;
        switch.run(|inside| inside.bridge("br0"))??;
        let mut built = Vec::new();
        for (name, number) in nodes.iter().zip(1..) {
            let node = Node::new(
                name,
                number,
                Directories { place: &place, processes: &processes, manifests: &manifests },
            )
            .with_context(|| format!("make node {name}"))?;
            node.plug_into(&switch)?;
            built.push(node);
        }
        Ok(Self { processes, manifests, nodes: built, switch })
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// By its short name.
    ///
    /// # Panics
    /// If there is none: the test is wrong.
    pub fn node(&self, name: &str) -> &Node {
        let found = self.nodes.iter().find(|node| node.name == node_name(name));
        found.unwrap_or_else(|| panic!("no node {name}"))
    }

    /// # Panics
    /// If there is none: the test is wrong.
    pub fn pod(&self, name: &str) -> &Pod {
        self.pods().find(|pod| pod.name == name).unwrap_or_else(|| panic!("no pod {name}"))
    }

    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// Connects another machine with the nodes.
    pub fn plug(&self, port: &End, machine: &Netns, there: &End) -> Result<()> {
        self.switch.veth(port, machine, there)?;
        let port = port.name.clone();
        self.switch.run(move |inside| inside.enslave(&port, "br0"))?
    }

    /// Makes the wires to the nodes like those of network cards: their packets have complete checksums, and the other
    /// end takes what XDP sends back, as a veth does only where it has a program too. That is ours without a service,
    /// and passes everything; it stays for as long as what is returned.
    pub fn real_wires(&self, place: &Place) -> Result<Datapath> {
        let ports: Vec<_> = self.nodes.iter().map(|node| node.name.clone()).collect();
        let options = run::options(&place.bpffs, Xdp::Native);
        self.switch.run(move |_| {
            let mut passes = Datapath::load(&run::object()?, options)?;
            for port in ports {
                ethtool::turn_off(&port, "tx-checksum-ip-generic")?;
                passes.attach(Interface::Device, if_nametoindex(port.as_str())?)?;
            }
            Ok(passes)
        })?
    }

    /// From now on the network between the nodes drops what comes from pods, as clouds' do that know machines alone.
    pub fn check_sources(&self) -> Result<()> {
        let ports: Vec<_> = self.nodes.iter().map(|node| node.name.clone()).collect();
        let rules = format!(
            "table netdev sources {{ chain arriving {{ type filter hook ingress devices = {{ {} }} priority 0; \
             ip saddr 10.244.0.0/16 drop; ip6 saddr fd00:10:244::/48 drop; }}; }}\n",
            ports.join(", ")
        );
        let mut nft = Command::new("nft");
        nft.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut nft = self.switch.spawn(nft)?;
        nft.stdin.take().context("no input")?.write_all(rules.as_bytes())?;
        let output = nft.wait_with_output()?;
        ensure!(output.status.success(), "nft: {}\n{rules}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// What all agents read.
    pub fn manifests(&self) -> &Directory {
        &self.manifests
    }

    /// A pod of a node that its network plugin attaches, serving. The container's id is the pod's name.
    pub fn attach(&mut self, node: &str, name: &str, runtime: &Runtime) -> Result<()> {
        self.attach_with(node, name, runtime, json!({}))
    }

    /// The same with further fields of the plugin's configuration.
    pub fn attach_with(&mut self, node: &str, name: &str, runtime: &Runtime, more: Value) -> Result<()> {
        let processes = &self.processes;
        let node = self.nodes.iter_mut().find(|it| it.name == node_name(node));
        let node = node.with_context(|| format!("{name} is of no node"))?;
        let netns = Netns::new(name)?;
        let path = netns.path()?;
        let container = Container { id: name, netns: cni::path(&path)? };
        let result = runtime.command("ADD", container, more).and_then(|answer| answer.result());
        let result = result.with_context(|| format!("attach {name}"))?;
        let pod =
            Pod::attached(node, netns, &result, processes.child(format!("{}/{name}", node.name))?, name)?;
        pod.start_server()?;
        pod.wait_server()?;
        node.pods.push(pod);
        Ok(())
    }

    /// Its processes and its namespace end; what the plugin made for it is left to the plugin.
    pub fn forget(&mut self, name: &str) {
        for node in &mut self.nodes {
            node.pods.retain(|pod| pod.name != name);
        }
    }

    /// Gives every node so many pods, serving.
    fn fill(&mut self, pods: u8) -> Result<()> {
        for node in &mut self.nodes {
            for number in 1..=pods {
                let name = format!("{}{number}", node.name.trim_start_matches(NODE_PREFIX));
                let pod = Pod::new(node, name.clone(), number, &self.processes)
                    .with_context(|| format!("make pod {name}"))?;
                node.pods.push(pod);
            }
        }
        self.serve()
    }

    /// As a network plugin does for its pods.
    pub fn leave_room_for_tunnels(&self) -> Result<()> {
        for (node, pod) in self.nodes.iter().flat_map(|node| node.pods.iter().map(move |pod| (node, pod))) {
            pod.netns.run(|inside| inside.mtu("eth0", TUNNEL_MTU))??;
            let interface = pod.interface.clone();
            node.netns.run(move |inside| inside.mtu(&interface, TUNNEL_MTU))??;
        }
        Ok(())
    }

    /// Starts all servers, then waits for all.
    fn serve(&self) -> Result<()> {
        self.pods().try_for_each(Pod::start_server)?;
        self.pods().try_for_each(Pod::wait_server)
    }
}

#[derive(Clone, Copy)]
struct Directories<'a> {
    place: &'a Place,
    processes: &'a cgroup::Tree,
    manifests: &'a Directory,
}

impl Node {
    pub fn pod_cidr_v4(&self) -> Prefix {
        Prefix { addr: Ipv4Addr::new(10, 244, self.number, 0).into(), len: 24 }
    }

    pub fn pod_cidr_v6(&self) -> Prefix {
        Prefix { addr: pod_v6(self.number, 0).into(), len: 64 }
    }

    /// Of the address family.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// As [`Pod::ask`], from a process of the host itself.
    pub fn ask(&self, ask: &Ask) -> Result<Vec<Outcome>> {
        self.client(ask)?.finish(ask.limit())
    }

    /// As [`Pod::keep_asking`], from a process of the host itself.
    pub fn keep_asking(&self, ask: &Ask) -> Result<Client<Outcome>> {
        self.client(&ask.clone().count(0))
    }

    /// The servers of a pod, but of the host itself and under this name; ready.
    pub fn serve(&self, name: &str) -> Result<Client<Ready>> {
        let server = start(&self.netns, &self.host_cgroup, &["serve", "--name", name].map(str::to_owned))?;
        server.wait_until(Duration::from_secs(5), |lines: &[Ready]| !lines.is_empty())?;
        Ok(server)
    }

    fn client(&self, ask: &Ask) -> Result<Client<Outcome>> {
        start(&self.netns, &self.host_cgroup, &ask.args())
    }

    fn new(short: &str, number: u8, directories: Directories<'_>) -> Result<Self> {
        let Directories { place, processes, manifests } = directories;
        let name = node_name(short);
        let netns = Netns::new(&name)?;
        for (sysctl, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
            netns.sysctl(sysctl, value)?;
        }
        let bpffs = place.bpffs.join(&name);
        std::fs::create_dir(&bpffs).with_context(|| format!("create {}", bpffs.display()))?;
        Ok(Self {
            v4: Ipv4Addr::new(192, 168, 50, number),
            v6: Ipv6Addr::new(0xfd50, 0, 0, 0, 0, 0, 0, number.into()),
            pods: Vec::new(),
            cgroup: processes.child(&name)?,
            host_cgroup: processes.child(format!("{name}/host"))?,
            agent_cgroup: processes.child(format!("agents/{name}"))?,
            bpffs,
            manifests: manifests.path().to_owned(),
            logs: place.dir.clone(),
            netns: Arc::new(netns),
            name,
            number,
        })
    }

    fn plug_into(&self, switch: &Netns) -> Result<()> {
        let port = End { name: self.name.clone(), mac: mac(self.number, 0, 0) };
        let eth0 = End { name: "eth0".into(), mac: mac(self.number, 0, 1) };
        switch.veth(&port, &self.netns, &eth0)?;
        switch.run(move |inside| inside.enslave(&port.name, "br0"))??;
        let addresses = [Prefix { addr: self.v4.into(), len: 24 }, Prefix { addr: self.v6.into(), len: 64 }];
        self.netns.run(move |inside| addresses.into_iter().try_for_each(|a| inside.address("eth0", a)))?
    }

    /// A tunnel of the kernel's own to the pods of another node, as flannel makes it: the other end's address and
    /// link-layer address are known beforehand.
    fn tunnel_to(&self, other: &Self) -> Result<()> {
        let name = "vxlan0";
        let end = |node: &Self| Ipv4Addr::new(10, 244, node.number, 0);
        let (here, there, far) = (end(self), end(other), mac(other.number, 0, 3));
        let (local, remote, to) = (self.v4, other.v4, other.pod_cidr_v4());
        let tunnel = Tunnel {
            name: name.into(),
            mac: mac(self.number, 0, 3),
            vni: 77,
            port: 8472,
            local,
            remote,
            mtu: TUNNEL_MTU,
        };
        self.netns.run(move |inside| {
            inside.vxlan(&tunnel)?;
            inside.address(name, Prefix { addr: here.into(), len: 32 })?;
            inside.neighbour(name, there.into(), far)?;
            inside.route(Route { to, via: Some(there.into()), dev: name })
        })?
    }

    /// Routes to the pods of all other nodes.
    fn route_to(&self, nodes: &[Self]) -> Result<()> {
        let routes: Vec<_> = nodes
            .iter()
            .filter(|node| node.number != self.number)
            .flat_map(|node| {
                let (v4, v6) = (Some(node.v4.into()), Some(node.v6.into()));
                [(node.pod_cidr_v4(), v4), (node.pod_cidr_v6(), v6)]
            })
            .map(|(to, via)| Route { to, via, dev: "eth0" })
            .collect();
        self.netns.run(move |inside| routes.into_iter().try_for_each(|route| inside.route(route)))?
    }
}

impl Pod {
    /// Of the address family.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    pub fn http(&self, target: SocketAddr, count: u32) -> Result<Vec<Outcome>> {
        self.ask(&Ask::http(target).count(count))
    }

    pub fn dns(&self, target: SocketAddr, count: u32) -> Result<Vec<Outcome>> {
        self.ask(&Ask::dns(target).count(count))
    }

    /// Makes the requests one after the other, and waits for the last.
    pub fn ask(&self, ask: &Ask) -> Result<Vec<Outcome>> {
        self.client(&ask.args())?.finish(ask.limit())
    }

    /// Goes on until the client is stopped.
    pub fn keep_asking(&self, ask: &Ask) -> Result<Client<Outcome>> {
        self.client(&ask.clone().count(0).args())
    }

    /// A transfer that goes on until the client is stopped; the target is an echo server.
    pub fn stream(&self, target: SocketAddr) -> Result<Client<Progress>> {
        self.client(&["stream".to_owned(), target.to_string()])
    }

    /// As the node restarts a container: same address, all connections gone.
    pub fn restart_server(&self) -> Result<()> {
        self.stop_server();
        self.start_server()?;
        self.wait_server()
    }

    /// Kills the server; the addresses stay.
    pub fn stop_server(&self) {
        drop(self.server.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Makes the pod send packets with complete checksums. Otherwise they stay partial on veth devices, and no
    /// receiver verifies them.
    pub fn complete_checksums(&self) -> Result<()> {
        self.netns.run(|_| ethtool::turn_off("eth0", "tx-checksum-ip-generic"))?
    }

    /// Packets of TCP and UDP that came with a wrong checksum.
    pub fn checksum_errors(&self) -> Result<u64> {
        let v4 = self.netns.proc_net("snmp")?;
        let v6 = self.netns.proc_net("snmp6")?;
        Ok(snmp(&v4, "Tcp:", "InCsumErrors")?
            + snmp(&v4, "Udp:", "InCsumErrors")?
            + snmp6(&v6, "Udp6InCsumErrors"))
    }

    fn new(node: &Node, name: String, number: u8, processes: &cgroup::Tree) -> Result<Self> {
        let interface = format!("pod-{name}");
        ensure!(interface.len() < 16, "{interface} is too long for an interface");
        let pod = Self {
            netns: Netns::new(&name)?,
            node: node.name.clone(),
            v4: Ipv4Addr::new(10, 244, node.number, number + 1),
            v6: pod_v6(node.number, u16::from(number) + 1),
            interface: interface.clone(),
            cgroup: processes.child(format!("{}/{name}", node.name))?,
            server: Mutex::new(None),
            name,
        };
        let host = End { name: interface, mac: mac(node.number, number, 1) };
        let eth0 = End { name: "eth0".into(), mac: mac(node.number, number, 2) };
        node.netns.veth(&host, &pod.netns, &eth0)?;
        let addresses: [IpAddr; 2] = [pod.v4.into(), pod.v6.into()];
        pod.netns.run(move |inside| {
            addresses.into_iter().try_for_each(|a| configure_pod(inside, a, host.mac))
        })??;
        node.netns.run(move |inside| {
            addresses.into_iter().try_for_each(|a| configure_host(inside, &host.name, a, eth0.mac))
        })??;
        Ok(pod)
    }

    /// What the result of ADD says of it.
    fn attached(node: &Node, netns: Netns, result: &Value, cgroup: PathBuf, name: &str) -> Result<Self> {
        let mut addresses = cni::addresses(result).into_iter();
        let mut next = || addresses.next().context("one address of each family");
        Ok(Self {
            v4: next()?.parse().context("the IPv4 address")?,
            v6: next()?.parse().context("the IPv6 address")?,
            node: node.name.clone(),
            interface: cni::host_interface(result)?.to_owned(),
            netns,
            cgroup,
            server: Mutex::new(None),
            name: name.to_owned(),
        })
    }

    fn start_server(&self) -> Result<()> {
        let args = ["serve", "--name", &self.name].map(str::to_owned);
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.client(&args)?);
        Ok(())
    }

    fn wait_server(&self) -> Result<()> {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let server = server.as_ref().with_context(|| format!("{} has no server", self.name))?;
        server
            .wait_until(Duration::from_secs(5), |lines| !lines.is_empty())
            .with_context(|| format!("the server of {}", self.name))?;
        Ok(())
    }

    /// A process in the pod; see [`crate::pod`] for its arguments.
    pub(crate) fn client<T: serde::de::DeserializeOwned + Clone + Send + 'static>(
        &self,
        args: &[String],
    ) -> Result<Client<T>> {
        start(&self.netns, &self.cgroup, args)
    }
}

fn start<T: serde::de::DeserializeOwned + Clone + Send + 'static>(
    netns: &Netns,
    cgroup: &Path,
    args: &[String],
) -> Result<Client<T>> {
    let mut command = pod_command();
    command.arg("--cgroup").arg(cgroup).args(args);
    Client::start(command, |command| netns.spawn(command))
}

/// Of addresses: most tests run once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub fn of(addr: IpAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

fn configure_pod(inside: &Inside, addr: IpAddr, gateway_mac: Mac) -> Result<()> {
    let (gateway, any) = gateway(addr);
    inside.address("eth0", host_prefix(addr))?;
    inside.neighbour("eth0", gateway, gateway_mac)?;
    inside.route(Route { to: host_prefix(gateway), via: None, dev: "eth0" })?;
    inside.route(Route { to: any, via: Some(gateway), dev: "eth0" })
}

fn configure_host(inside: &Inside, dev: &str, addr: IpAddr, mac: Mac) -> Result<()> {
    inside.neighbour(dev, addr, mac)?;
    inside.route(Route { to: host_prefix(addr), via: None, dev })
}

fn gateway(addr: IpAddr) -> (IpAddr, Prefix) {
    match Family::of(addr) {
        Family::V4 => (GATEWAY_V4.into(), Prefix { addr: Ipv4Addr::UNSPECIFIED.into(), len: 0 }),
        Family::V6 => (GATEWAY_V6.into(), Prefix { addr: Ipv6Addr::UNSPECIFIED.into(), len: 0 }),
    }
}

fn host_prefix(addr: IpAddr) -> Prefix {
    Prefix { addr, len: if addr.is_ipv4() { 32 } else { 128 } }
}

fn pod_v6(node: u8, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, host)
}

fn node_name(short: &str) -> String {
    format!("{NODE_PREFIX}{short}")
}

/// Locally administered, readable in a packet dump.
fn mac(node: u8, pod: u8, end: u8) -> Mac {
    [2, 0, 0, node, pod, end]
}

/// The counter `name` of the lines that begin with `table`: first the names, then the values.
fn snmp(text: &str, table: &str, name: &str) -> Result<u64> {
    let mut lines = text.lines().filter(|line| line.starts_with(table)).map(str::split_whitespace);
    let (names, values) = (lines.next(), lines.next());
    let mut columns = names.into_iter().flatten().zip(values.into_iter().flatten());
    let (_, value) =
        columns.find(|(column, _)| *column == name).with_context(|| format!("no {table} {name}"))?;
    value.parse().with_context(|| format!("{table} {name} is {value}"))
}

/// 0 if the kernel does not count it.
fn snmp6(text: &str, name: &str) -> u64 {
    let line = text
        .lines()
        .map(str::split_whitespace)
        .find_map(|mut line| (line.next() == Some(name)).then(|| line.next()));
    line.flatten().and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_their_names() {
        let text =
            "Tcp: RtoAlgorithm InErrs InCsumErrors\nTcp: 1 0 7\nUdp: InDatagrams InCsumErrors\nUdp: 9 3\n";
        assert_eq!(snmp(text, "Tcp:", "InCsumErrors").unwrap(), 7);
        assert_eq!(snmp(text, "Udp:", "InCsumErrors").unwrap(), 3);
        assert!(snmp(text, "Udp:", "Missing").is_err());
        assert_eq!(snmp6("Udp6InDatagrams 4\nUdp6InCsumErrors 2\n", "Udp6InCsumErrors"), 2);
    }
}
