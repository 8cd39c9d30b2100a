//! What the tests make in a cluster: one namespace, and in it everything else.
//!
//! Pods name their node themselves, so that no scheduler has to agree, and tolerate everything: one of two nodes may be
//! a control plane. The image is upstream's agnhost: `netexec` answers HTTP with the pod's name and the client's
//! address, and the image has curl and nc.

use serde_json::{Value, json};

/// Where pods are made, and of what.
#[derive(Clone, Debug)]
pub(super) struct Site {
    pub(super) namespace: String,
    pub(super) image: String,
    /// Names of two nodes; the same twice where there is one.
    pub(super) nodes: [String; 2],
}

pub(super) const HTTP: u16 = 8080;
pub(super) const UDP: u16 = 8081;
/// Of Services.
pub(super) const PORT: u16 = 80;
pub(super) const UDP_PORT: u16 = 81;
/// Outside of the range of NodePorts.
pub(super) const HOST_PORT: u16 = 28_080;
pub(super) const HOST_UDP_PORT: u16 = 28_081;
/// Of documentation (RFC 5737, RFC 3849): nobody else has it.
pub(super) const BALANCER: &str = "192.0.2.80";

/// Names of pods and the node of each.
pub(super) const PODS: [(&str, usize); 9] = [
    ("server-0", 0),
    ("server-1", 1),
    ("client-0", 0),
    ("client-1", 1),
    ("host-0", 0),
    ("host-1", 1),
    ("ported", 0),
    ("guarded", 1),
    ("confined", 0),
];

pub(super) const SERVICES: [&str; 6] = ["web", "sticky", "empty", "node-port", "node-port-local", "balanced"];

impl Site {
    pub(super) fn namespace(&self) -> Value {
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": self.namespace,
            "labels": { "pod-security.kubernetes.io/enforce": "privileged" } } })
    }

    /// Everything that is there from the beginning.
    pub(super) fn objects(&self) -> Vec<Value> {
        PODS.iter().map(|(name, node)| self.pod(name, *node)).chain(self.services()).collect()
    }

    /// What isolates pods, and comes when all of them have been reached.
    pub(super) fn policies(&self) -> Vec<Value> {
        let policy = |name: &str, spec: Value| {
            json!({ "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": self.metadata(name), "spec": spec })
        };
        let pod = |name: &str| json!({ "podSelector": { "matchLabels": { "pod": name } } });
        let http = json!([{ "protocol": "TCP", "port": HTTP }]);
        vec![
            policy(
                "guarded",
                json!({ "podSelector": { "matchLabels": { "pod": "guarded" } }, "policyTypes": ["Ingress"],
                    "ingress": [{ "from": [pod("client-0")], "ports": http }] }),
            ),
            policy(
                "confined",
                json!({ "podSelector": { "matchLabels": { "pod": "confined" } }, "policyTypes": ["Egress"],
                    "egress": [{ "to": [{ "podSelector": { "matchLabels": { "app": "server" } } }], "ports": http }] }),
            ),
        ]
    }

    fn metadata(&self, name: &str) -> Value {
        json!({ "name": name, "namespace": self.namespace })
    }

    fn pod(&self, name: &str, node: usize) -> Value {
        let serves = ["server-0", "server-1", "ported", "guarded"].contains(&name);
        let mut container = json!({ "name": "agnhost", "image": self.image, "args": ["pause"] });
        if serves {
            container["args"] =
                json!(["netexec", format!("--http-port={HTTP}"), format!("--udp-port={UDP}")]);
            container["readinessProbe"] =
                json!({ "httpGet": { "path": "/healthz", "port": HTTP }, "periodSeconds": 2 });
            container["ports"] = json!([{ "containerPort": HTTP, "protocol": "TCP" },
                { "containerPort": UDP, "protocol": "UDP" }]);
        }
        if name == "ported" {
            container["ports"][0]["hostPort"] = HOST_PORT.into();
            container["ports"][1]["hostPort"] = HOST_UDP_PORT.into();
        }
        let app = name.split_once('-').map_or(name, |(app, _number)| app);
        let mut metadata = self.metadata(name);
        metadata["labels"] = json!({ "app": app, "pod": name });
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {
            "nodeName": self.nodes[node], "hostNetwork": app == "host", "containers": [container],
            "tolerations": [{ "operator": "Exists" }], "terminationGracePeriodSeconds": 1 } })
    }

    fn services(&self) -> Vec<Value> {
        let service = |name: &str, selector: Value, more: Value| {
            let mut spec = json!({ "type": "ClusterIP", "ipFamilyPolicy": "PreferDualStack", "selector": selector,
                "ports": [{ "name": "http", "protocol": "TCP", "port": PORT, "targetPort": HTTP },
                    { "name": "udp", "protocol": "UDP", "port": UDP_PORT, "targetPort": UDP }] });
            for (field, value) in more.as_object().into_iter().flatten() {
                spec[field] = value.clone();
            }
            json!({ "apiVersion": "v1", "kind": "Service", "metadata": self.metadata(name), "spec": spec })
        };
        let servers = || json!({ "app": "server" });
        vec![
            service("web", servers(), json!({})),
            service("sticky", servers(), json!({ "sessionAffinity": "ClientIP" })),
            service("empty", json!({ "app": "nobody" }), json!({})),
            service("node-port", servers(), json!({ "type": "NodePort" })),
            service(
                "node-port-local",
                json!({ "pod": "server-0" }),
                json!({ "type": "NodePort", "externalTrafficPolicy": "Local" }),
            ),
            // A class of nobody's: the tests say themselves which address it has.
            service(
                "balanced",
                servers(),
                json!({ "type": "LoadBalancer", "loadBalancerClass": "ferroflow.dev/test", "ipFamilyPolicy": "SingleStack" }),
            ),
        ]
    }
}

/// The status of `balanced`, as a provider of load balancers would write it.
pub(super) fn balancer() -> Value {
    json!({ "status": { "loadBalancer": { "ingress": [{ "ip": BALANCER, "ipMode": "VIP" }] } } })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
    use k8s_openapi::api::networking::v1::NetworkPolicy;
    use serde::{Serialize, de::DeserializeOwned};

    use super::*;

    /// What a type does not know is lost when it is written again.
    fn strict<T: DeserializeOwned + Serialize>(object: &Value) {
        let read: T = serde_json::from_value(object.clone()).unwrap();
        assert_eq!(&serde_json::to_value(read).unwrap(), object);
    }

    #[test]
    fn every_object_is_one_that_kubernetes_reads_as_it_is_written() {
        let nodes = ["a".to_owned(), "b".to_owned()];
        let site = Site { namespace: "n".into(), image: "agnhost".into(), nodes };
        strict::<Namespace>(&site.namespace());
        site.policies().iter().for_each(strict::<NetworkPolicy>);
        let mut names = BTreeSet::new();
        for object in site.objects() {
            match object["kind"].as_str().unwrap() {
                "Pod" => strict::<Pod>(&object),
                "Service" => strict::<Service>(&object),
                kind => panic!("{kind}"),
            }
            names.insert(object["metadata"]["name"].as_str().unwrap().to_owned());
            assert_eq!(object["metadata"]["namespace"], "n");
        }
        let pods = PODS.iter().map(|(name, _)| *name);
        assert!(
            pods.chain(SERVICES).all(|name| names.contains(name))
                && names.len() == PODS.len() + SERVICES.len()
        );
    }
}
