//! The cluster as ordinary Kubernetes YAML, in a directory that agents watch.

use std::{
    fmt::Write as _,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use crate::cluster::{Cluster, Family, Node, Pod};

/// Files appear, change and vanish at once: written elsewhere, then renamed.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    drafts: PathBuf,
}

#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    /// One of each family.
    pub cluster_ips: [IpAddr; 2],
    pub ports: Vec<Port>,
    /// Further lines of `spec`, each with its indentation of two.
    pub more: String,
}

#[derive(Clone, Debug)]
pub struct Port {
    pub name: String,
    pub protocol: &'static str,
    pub port: u16,
    pub target: u16,
}

#[derive(Clone, Copy, Debug)]
pub struct Endpoint<'a> {
    pub pod: &'a Pod,
    pub state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Ready,
    Unready,
    /// Still serving.
    Terminating,
}

impl Directory {
    pub fn create(parent: &Path) -> Result<Self> {
        let (path, drafts) = (parent.join("manifests"), parent.join("drafts"));
        for dir in [&path, &drafts] {
            fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(Self { path, drafts })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `name` without extension.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let (draft, file) = (self.drafts.join(name), self.file(name));
        fs::write(&draft, text).with_context(|| format!("write {}", draft.display()))?;
        fs::rename(&draft, &file).with_context(|| format!("write {}", file.display()))
    }

    pub fn remove(&self, name: &str) -> Result<()> {
        let file = self.file(name);
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))
    }

    /// Every node and pod of the cluster, in `cluster.yaml`.
    pub fn write_cluster(&self, cluster: &Cluster) -> Result<()> {
        let nodes = cluster.nodes().iter().map(node);
        let pods = cluster.pods().map(pod);
        self.write("cluster", &nodes.chain(pods).collect::<String>())
    }

    /// Its nodes alone, in place of [`Self::write_cluster`]: the pods are the test's own objects.
    pub fn write_nodes(&self, cluster: &Cluster) -> Result<()> {
        self.write("cluster", &cluster.nodes().iter().map(node).collect::<String>())
    }

    /// Gives Nodes of `cluster.yaml` other addresses, each in place of one that is there.
    pub fn readdress(&self, moved: &[(IpAddr, IpAddr)]) -> Result<()> {
        let path = self.file("cluster");
        let mut yaml = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        for (old, new) in moved {
            let (old, new) = (format!("address: \"{old}\""), format!("address: \"{new}\""));
            ensure!(yaml.contains(&old), "no {old} in\n{yaml}");
            yaml = yaml.replace(&old, &new);
        }
        self.write("cluster", &yaml)
    }

    /// The service in `service-<name>.yaml`.
    pub fn write_service(&self, service: &Service) -> Result<()> {
        self.write(&format!("service-{}", service.name), &service.yaml())
    }

    /// Its slices, one a family, in `endpoints-<name>.yaml`.
    pub fn write_endpoints(&self, service: &Service, endpoints: &[Endpoint<'_>]) -> Result<()> {
        self.write(&format!("endpoints-{}", service.name), &service.slices(endpoints))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.yaml"))
    }
}

impl Service {
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.cluster_ips[0],
            Family::V6 => self.cluster_ips[1],
        }
    }

    /// Without a selector: the endpoints are written here, not found by a controller.
    pub fn yaml(&self) -> String {
        let Self { name, cluster_ips: [first, second], ports, more } = self;
        let mut listed = String::new();
        for Port { name, protocol, port, target } in ports {
            let _infallible = write!(
                listed,
                "  - name: {name}\n    protocol: {protocol}\n    port: {port}\n    targetPort: {target}\n"
            );
        }
        format!(
            r#"---
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: default
spec:
  type: ClusterIP
  clusterIP: "{first}"
  clusterIPs: ["{first}", "{second}"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
{more}  ports:
{listed}"#
        )
    }

    /// As [`Self::yaml`], of another type and with these NodePorts, each after the port that it is of.
    ///
    /// # Panics
    /// If there is no such port: the test is wrong.
    pub fn exposed(&self, kind: &str, node_ports: &[(u16, u16)]) -> String {
        let mut yaml = self.yaml().replace("type: ClusterIP", &format!("type: {kind}"));
        for (port, node_port) in node_ports {
            let line = format!("    port: {port}\n");
            assert!(yaml.contains(&line), "no port {port} in\n{yaml}");
            yaml = yaml.replace(&line, &format!("{line}    nodePort: {node_port}\n"));
        }
        yaml
    }

    pub fn slices(&self, endpoints: &[Endpoint<'_>]) -> String {
        Family::BOTH.map(|family| self.slice(family, endpoints)).concat()
    }

    fn slice(&self, family: Family, endpoints: &[Endpoint<'_>]) -> String {
        let name = &self.name;
        let (address_type, suffix) = match family {
            Family::V4 => ("IPv4", "v4"),
            Family::V6 => ("IPv6", "v6"),
        };
        let mut ports = String::new();
        for Port { name, protocol, port: _, target } in &self.ports {
            let _infallible = write!(ports, "\n- name: {name}\n  protocol: {protocol}\n  port: {target}");
        }
        let listed: String = endpoints.iter().map(|endpoint| endpoint.yaml(family)).collect();
        let endpoints = if listed.is_empty() { " []\n" } else { &listed };
        format!(
            r#"---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {name}-{suffix}
  namespace: default
  labels:
    kubernetes.io/service-name: {name}
    endpointslice.kubernetes.io/managed-by: bpf-tests
addressType: {address_type}
ports:{ports}
endpoints:{endpoints}"#
        )
    }
}

impl<'a> Endpoint<'a> {
    pub fn ready(pods: impl IntoIterator<Item = &'a Pod>) -> Vec<Self> {
        pods.into_iter().map(|pod| Self { pod, state: State::Ready }).collect()
    }

    fn yaml(&self, family: Family) -> String {
        let Pod { name, node, .. } = self.pod;
        let ip = self.pod.ip(family);
        let (ready, serving, terminating) = match self.state {
            State::Ready => (true, true, false),
            State::Unready => (false, false, false),
            State::Terminating => (false, true, true),
        };
        format!(
            r#"
- addresses: ["{ip}"]
  conditions:
    ready: {ready}
    serving: {serving}
    terminating: {terminating}
  nodeName: {node}
  targetRef:
    kind: Pod
    namespace: default
    name: {name}
"#
        )
    }
}

fn node(node: &Node) -> String {
    let Node { name, v4, v6, .. } = node;
    let (cidr_v4, cidr_v6) = (node.pod_cidr_v4(), node.pod_cidr_v6());
    let cidrs = format!(r#""{}/{}", "{}/{}""#, cidr_v4.addr, cidr_v4.len, cidr_v6.addr, cidr_v6.len);
    format!(
        r#"---
apiVersion: v1
kind: Node
metadata:
  name: {name}
  labels:
    kubernetes.io/hostname: {name}
spec:
  podCIDR: "{}/{}"
  podCIDRs: [{cidrs}]
status:
  addresses:
  - type: InternalIP
    address: "{v4}"
  - type: InternalIP
    address: "{v6}"
  - type: Hostname
    address: {name}
"#,
        cidr_v4.addr, cidr_v4.len
    )
}

fn pod(pod: &Pod) -> String {
    let Pod { name, node, v4, v6, .. } = pod;
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: default
  labels:
    pod: {name}
spec:
  nodeName: {node}
  containers:
  - name: pod
    image: pod
status:
  phase: Running
  podIP: "{v4}"
  podIPs:
  - ip: "{v4}"
  - ip: "{v6}"
"#
    )
}
