//! A cluster of a given size: the same services for manifests and for the rules of kube-proxy.

use ferroflow::config::MAX_ENDPOINTS;
use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
};

use anyhow::Result;

use crate::{cluster::Cluster, manifests::Directory};

/// Services of one port and [`ENDPOINTS`] endpoints each. Those that are measured stand at places that matter to
/// rules that are tried one after the other: `near` first, `far` second, `late` last.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    services: Vec<Service>,
}

#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) ip: Ipv4Addr,
    pub(super) endpoints: Vec<SocketAddrV4>,
    node: &'static str,
}

/// The port of every service.
pub(super) const PORT: u16 = 80;
pub(super) const ENDPOINTS: u16 = 10;
/// The pod whose endpoints are measured listens on this and the next ports: one endpoint each, so that every choice
/// leads to a server that answers.
pub(super) const FIRST_PORT: u16 = 9100;
/// Its endpoints have a file of their own, to be changed.
const CHANGING: usize = 2;
const SERVICES_PER_FILE: usize = 500;

impl Scale {
    /// # Panics
    /// With fewer than 10 services: the measured ones would not be apart.
    pub(super) fn new(count: usize, near: Ipv4Addr, far: Ipv4Addr) -> Self {
        assert!(count >= 10, "a cluster of {count} services is too small to measure");
        let services = (0..count).map(|index| match index {
            0 => Service::measured(index, near, "node-a"),
            1 => Service::measured(index, far, "node-b"),
            _ if index == count - 1 => Service::measured(index, near, "node-a"),
            _ => Service::filler(index),
        });
        Self { services: services.collect() }
    }

    /// What the agent is told to have room for: the usual, or twice these where they are more.
    pub(super) fn max_endpoints(&self) -> u32 {
        let endpoints = self.services.len() as u32 * u32::from(ENDPOINTS);
        MAX_ENDPOINTS.max((2 * endpoints).next_power_of_two())
    }

    pub(super) fn services(&self) -> &[Service] {
        &self.services
    }

    pub(super) fn near(&self) -> SocketAddr {
        self.address(0)
    }

    pub(super) fn far(&self) -> SocketAddr {
        self.address(1)
    }

    pub(super) fn late(&self) -> SocketAddr {
        self.address(self.services.len() - 1)
    }

    /// The service whose endpoints [`Scale::change`] changes.
    pub(super) fn changing(&self) -> &Service {
        &self.services[CHANGING]
    }

    fn address(&self, index: usize) -> SocketAddr {
        (self.services[index].ip, PORT).into()
    }

    /// All objects, the cluster's own included.
    pub(super) fn write(&self, cluster: &Cluster) -> Result<()> {
        let manifests = cluster.manifests();
        manifests.write_cluster(cluster)?;
        for (number, services) in self.services.chunks(SERVICES_PER_FILE).enumerate() {
            let mut text = String::new();
            for service in services {
                service.write_yaml(&mut text);
                if service.name != self.changing().name {
                    service.write_slices(&mut text);
                }
            }
            manifests.write(&format!("services-{number:03}"), &text)?;
        }
        self.change(manifests, 0)
    }

    /// Gives the changing service another last endpoint for each `version`.
    pub(super) fn change(&self, manifests: &Directory, version: u8) -> Result<()> {
        let mut service = self.changing().clone();
        if let Some(last) = service.endpoints.last_mut() {
            last.set_ip(changed_address(version));
        }
        let mut text = String::new();
        service.write_slices(&mut text);
        manifests.write("changing", &text)
    }
}

/// Of no other endpoint.
pub(super) fn changed_address(version: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 250, 0, version)
}

impl Service {
    fn new(index: usize, endpoints: Vec<SocketAddrV4>, node: &'static str) -> Self {
        let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 1)) + index as u32);
        Self { name: format!("svc-{index:05}"), ip, endpoints, node }
    }

    fn measured(index: usize, pod: Ipv4Addr, node: &'static str) -> Self {
        let ports = FIRST_PORT..FIRST_PORT + ENDPOINTS;
        Self::new(index, ports.map(|port| SocketAddrV4::new(pod, port)).collect(), node)
    }

    /// Endpoints that nobody else has, on a node that is not there.
    fn filler(index: usize) -> Self {
        let first = u32::from(Ipv4Addr::new(10, 128, 0, 0)) + index as u32 * u32::from(ENDPOINTS);
        let addresses = (first..).take(ENDPOINTS.into()).map(Ipv4Addr::from);
        Self::new(index, addresses.map(|addr| SocketAddrV4::new(addr, 8080)).collect(), "node-z")
    }

    fn write_yaml(&self, text: &mut String) {
        let Self { name, ip, .. } = self;
        let _infallible = write!(
            text,
            r#"---
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: default
  labels: {{app: "{name}"}}
spec:
  type: ClusterIP
  clusterIP: {ip}
  clusterIPs: ["{ip}"]
  ipFamilies: [IPv4]
  ipFamilyPolicy: SingleStack
  internalTrafficPolicy: Cluster
  selector: {{app: "{name}"}}
  sessionAffinity: None
  ports:
  - name: http
    protocol: TCP
    port: {PORT}
    targetPort: http
"#
        );
    }

    /// A slice has one number for its port, so there is one for each port of the endpoints.
    fn write_slices(&self, text: &mut String) {
        let Self { name, endpoints, node, .. } = self;
        for same_port in endpoints.chunk_by(|a, b| a.port() == b.port()) {
            let port = same_port.first().map_or(0, SocketAddrV4::port);
            let _infallible = write!(
                text,
                r#"---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {name}-{port}
  namespace: default
  labels:
    kubernetes.io/service-name: {name}
addressType: IPv4
ports:
- name: http
  protocol: TCP
  port: {port}
endpoints:
"#
            );
            for (number, endpoint) in same_port.iter().enumerate() {
                let ip = endpoint.ip();
                let _infallible = write!(
                    text,
                    r#"- addresses: ["{ip}"]
  conditions: {{ready: true, serving: true, terminating: false}}
  nodeName: {node}
  targetRef: {{kind: Pod, namespace: default, name: "{name}-{number}"}}
"#
                );
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use super::*;

    pub(in crate::bench) fn scale(count: usize) -> Scale {
        Scale::new(count, Ipv4Addr::new(10, 244, 1, 3), Ipv4Addr::new(10, 244, 2, 2))
    }

    #[test]
    fn no_two_services_share_an_address() {
        let scale = scale(30_000);
        let ips: BTreeSet<_> = scale.services().iter().map(|service| service.ip).collect();
        assert_eq!(ips.len(), 30_000);
        let fillers = &scale.services()[2..29_999];
        let endpoints: BTreeSet<_> = fillers.iter().flat_map(|service| &service.endpoints).collect();
        assert_eq!(endpoints.len(), 29_997 * usize::from(ENDPOINTS));
        assert_eq!(scale.late(), "10.96.117.48:80".parse().unwrap());
    }

    #[test]
    fn endpoints_of_many_ports_are_as_many_slices() {
        let mut text = String::new();
        scale(10).services()[0].write_slices(&mut text);
        assert_eq!(text.matches("kind: EndpointSlice").count(), usize::from(ENDPOINTS));
        text.clear();
        scale(10).services()[5].write_slices(&mut text);
        assert_eq!(text.matches("kind: EndpointSlice").count(), 1);
        assert_eq!(text.matches("- addresses:").count(), usize::from(ENDPOINTS));
    }
}
