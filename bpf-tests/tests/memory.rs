//! What the agent's memory grows with: a cluster of 10,000 services with 10 endpoints each and 20,000 pods, over the
//! Kubernetes API, as a whole and kind by kind.
#![forbid(unsafe_code)]

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use bpf_tests::{
    agent::{Agent, Api},
    cluster::{Cluster, Node},
    runner,
    sandbox::Sandbox,
};
use serde_json::{Value, json};

fn main() -> ExitCode {
    runner::main(&[(
        "ten_thousand_services_fit_in_sixty_megabytes",
        ten_thousand_services_fit_in_sixty_megabytes,
    )])
}

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;
const PODS: u32 = 20_000;
const NODES: u32 = 100;

/// Of design.md: resident, with the tables.
const BUDGET_KIB: u64 = 60 << 10;

/// Without optimisation, decoding takes its time.
const LIMIT: Duration = Duration::from_secs(300);

fn ten_thousand_services_fit_in_sixty_megabytes(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    let node = cluster.node("a");
    let nodes: Vec<Value> = (0..NODES).map(|number| a_node(number, node)).collect();
    let services: Vec<Value> = (0..SERVICES).map(service).collect();
    let slices: Vec<Value> = (0..SERVICES).map(slice).collect();
    let pods: Vec<Value> = (0..PODS).map(pod).collect();
    println!("{:<42} {:>9} {:>9}", "objects", "resident", "of it own");
    let mut total = 0;
    for (what, objects) in [
        ("none", vec![]),
        ("10,000 Services", services.clone()),
        ("10,000 EndpointSlices, 100,000 endpoints", slices.clone()),
        ("20,000 Pods", pods.clone()),
        ("all", [nodes, services, slices, pods].concat()),
    ] {
        let (resident, own) = measure(node, objects)?;
        println!("{what:<42} {:>6.1} MB {:>6.1} MB", megabytes(resident), megabytes(own));
        total = resident;
    }
    ensure!(total <= BUDGET_KIB, "{:.1} MB resident, of 60", megabytes(total));
    Ok(())
}

/// Resident memory in KiB, and what of it is not shared with the kernel's tables or a file.
fn measure(node: &Node, objects: Vec<Value>) -> Result<(u64, u64)> {
    let api = Api::start(node)?;
    api.server.set_objects(objects)?;
    api.server.compact();
    let mut agent = Agent::start_over(&api, node, &[])?;
    agent.wait_synced_within(LIMIT)?;
    let measured = (agent.memory_kib("VmRSS")?, agent.memory_kib("RssAnon")?);
    agent.stop()?;
    Ok(measured)
}

fn megabytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn metadata(namespace: u32, name: &str) -> Value {
    let managed = json!({ "f:metadata": { "f:labels": { ".": {}, "f:app": {}, "f:pod-template-hash": {} },
        "f:ownerReferences": { ".": {}, "k:{\"uid\":\"5f0e3c1b\"}": {} } },
        "f:spec": { "f:containers": { "k:{\"name\":\"main\"}": { ".": {}, "f:image": {}, "f:env": {},
        "f:imagePullPolicy": {}, "f:name": {}, "f:ports": {}, "f:resources": {}, "f:volumeMounts": {} } },
        "f:dnsPolicy": {}, "f:restartPolicy": {}, "f:schedulerName": {}, "f:securityContext": {} } });
    json!({
        "name": name, "namespace": format!("team-{}", namespace % 50),
        "uid": "5f0e3c1b-8a9f-4f6c-9d52-1f3a7e2b9c44", "creationTimestamp": "2026-01-02T03:04:05Z",
        "labels": { "app": name, "app.kubernetes.io/part-of": "shop", "pod-template-hash": "7d4b9c6f5d" },
        "annotations": { "kubectl.kubernetes.io/last-applied-configuration": "x".repeat(600) },
        "managedFields": [{ "manager": "kube-controller-manager", "operation": "Update", "fieldsV1": managed }],
    })
}

fn address(number: u32) -> String {
    format!("10.{}.{}.{}", 128 + (number >> 16), (number >> 8) & 255, number & 255)
}

fn a_node(number: u32, own: &Node) -> Value {
    // The first is the one that the agent runs on.
    let (name, address) = match number {
        0 => (own.name.clone(), own.v4.to_string()),
        _ => (format!("node-{number}"), format!("192.168.51.{number}")),
    };
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
        "spec": { "podCIDR": format!("10.{number}.0.0/16") },
        "status": { "addresses": [{ "type": "InternalIP", "address": address }] },
    })
}

fn service(number: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(number, &format!("service-{number}")),
        "spec": { "type": "ClusterIP", "clusterIP": format!("10.96.{}.{}", number >> 8, number & 255),
            "selector": { "app": "x" }, "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] },
    })
}

fn slice(number: u32) -> Value {
    let endpoint = |index: u32| {
        let pod = number * ENDPOINTS + index;
        json!({
            "addresses": [address(pod)], "nodeName": format!("node-{}", pod % NODES),
            "conditions": { "ready": true, "serving": true, "terminating": false },
            "targetRef": { "kind": "Pod", "namespace": "default", "name": format!("pod-{pod}"), "uid": "5f0e3c1b-8a9f" },
        })
    };
    let endpoints: Vec<Value> = (0..ENDPOINTS).map(endpoint).collect();
    let mut metadata = metadata(number, &format!("service-{number}-x7k2p"));
    metadata["labels"]["kubernetes.io/service-name"] = format!("service-{number}").into();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4",
        "ports": [{ "name": "http", "protocol": "TCP", "port": 8080 }], "endpoints": endpoints,
    })
}

fn pod(number: u32) -> Value {
    let env: Vec<Value> =
        (0..10).map(|index| json!({ "name": format!("SETTING_{index}"), "value": "a value" })).collect();
    let condition = |kind: &str| {
        json!({ "type": kind, "status": "True", "lastProbeTime": null,
            "lastTransitionTime": "2026-01-02T03:04:05Z" })
    };
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(condition);
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata(number, &format!("pod-{number}-7d4b9c6f5d-x7k2p")),
        "spec": {
            "nodeName": format!("node-{}", number % NODES), "serviceAccountName": "default",
            "containers": [{ "name": "main", "image": "registry.example.com/team/image:1.2.3", "env": env,
                "ports": [{ "name": "http", "containerPort": 8080 }],
                "resources": { "requests": { "cpu": "100m", "memory": "128Mi" } } }],
            "tolerations": [{ "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute" }],
        },
        "status": {
            "phase": "Running", "podIP": address(number), "podIPs": [{ "ip": address(number) }],
            "conditions": conditions,
        },
    })
}
