//! What the tests of a real cluster do, as far as an API without kubelets carries: the objects that they make, that
//! they wait for pods, that they say what they cannot do, and that they leave nothing.
#![forbid(unsafe_code)]

use anyhow::{Context as _, Result, ensure};
use bpf_tests::apiserver::{ApiServer, Recorded, Verb};
use bpf_tests::live::{Cli, run};
use serde_json::{Value, json};

const NAMESPACE: &str = "t";

fn cli(api: &ApiServer, dir: &tempfile::TempDir) -> Result<Cli> {
    let kubeconfig = dir.path().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig, None)?;
    Ok(Cli {
        kubeconfig,
        image: "registry.example/agnhost".into(),
        namespace: Some(NAMESPACE.into()),
        agents: "kube-system".into(),
        selector: "app=x".into(),
        timeout: 0,
        keep: false,
    })
}

fn ready() -> Value {
    json!([{ "type": "Ready", "status": "True" }])
}

fn node(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name }, "status": { "conditions": ready() } })
}

fn pod(name: &str, at: usize) -> Value {
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": NAMESPACE },
        "status": { "phase": "Running", "conditions": ready(), "podIPs": [{ "ip": format!("10.0.0.{at}") }] } })
}

fn service(name: &str, at: usize) -> Value {
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": NAMESPACE },
        "spec": { "clusterIPs": [format!("10.96.0.{at}")], "ports": [{ "nodePort": 30000 + at }, { "nodePort": 31000 + at }] } })
}

const PODS: [&str; 9] =
    ["server-0", "server-1", "client-0", "client-1", "host-0", "host-1", "ported", "guarded", "confined"];
const SERVICES: [&str; 6] = ["web", "sticky", "empty", "node-port", "node-port-local", "balanced"];

/// Method and path of what was changed.
fn changes(api: &ApiServer) -> Vec<String> {
    let change = |request: &Recorded| format!("{} {}", request.method, request.path);
    api.requests().iter().filter(|request| request.verb == Verb::Write).map(change).collect()
}

#[tokio::test]
async fn without_kubelets_everything_is_made_every_probe_is_skipped_and_nothing_stays() -> Result<()> {
    let (api, dir) = (ApiServer::start()?, tempfile::tempdir()?);
    let nodes = ["b", "a"].map(node).into_iter();
    let pods = PODS.iter().enumerate().map(|(at, name)| pod(name, at + 1));
    let services = SERVICES.iter().enumerate().map(|(at, name)| service(name, at + 1));
    api.set_objects(nodes.chain(pods).chain(services).collect())?;
    let count = run(&cli(&api, &dir)?).await?;
    ensure!((count.passed, count.failed) == (0, 0) && count.skipped > 50, "{count:?}");
    let changes = changes(&api);
    ensure!(changes.first().map(String::as_str) == Some("POST /api/v1/namespaces"), "{changes:#?}");
    ensure!(changes.last().map(String::as_str) == Some("DELETE /api/v1/namespaces/t"), "{changes:#?}");
    let times = |change: &str| changes.iter().filter(|it| *it == change).count();
    ensure!(times("POST /api/v1/namespaces/t/pods") == PODS.len(), "{changes:#?}");
    ensure!(times("POST /api/v1/namespaces/t/services") == SERVICES.len(), "{changes:#?}");
    ensure!(times("POST /apis/networking.k8s.io/v1/namespaces/t/networkpolicies") == 2, "{changes:#?}");
    ensure!(times("PATCH /api/v1/namespaces/t/services/balanced/status") == 1, "{changes:#?}");
    let requests = api.requests();
    let server = requests.iter().find(|request| request.body["metadata"]["name"] == "server-1");
    let spec = &server.context("no server-1")?.body["spec"];
    ensure!(
        spec["nodeName"] == "b" && spec["containers"][0]["image"] == "registry.example/agnhost",
        "{spec}"
    );
    Ok(())
}

#[tokio::test]
async fn pods_that_do_not_come_up_are_named_and_the_namespace_is_removed() -> Result<()> {
    let (api, dir) = (ApiServer::start()?, tempfile::tempdir()?);
    let mut waiting = pod("server-0", 1);
    waiting["status"] = json!({ "phase": "Pending",
        "containerStatuses": [{ "state": { "waiting": { "reason": "ImagePullBackOff" } } }] });
    api.set_objects(vec![node("a"), waiting])?;
    let error = run(&cli(&api, &dir)?).await.err().context("it went on without pods")?;
    let error = format!("{error:#}");
    ensure!(error.contains("pod server-0") && error.contains("ImagePullBackOff"), "{error}");
    ensure!(
        changes(&api).last().map(String::as_str) == Some("DELETE /api/v1/namespaces/t"),
        "{:#?}",
        changes(&api)
    );
    Ok(())
}

#[tokio::test]
async fn a_cluster_without_a_node_that_is_ready_is_left_alone() -> Result<()> {
    let (api, dir) = (ApiServer::start()?, tempfile::tempdir()?);
    api.set_objects(vec![json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "a" } })])?;
    let error = run(&cli(&api, &dir)?).await.err().context("it went on without nodes")?;
    ensure!(error.to_string() == "none of 1 nodes is Ready" && changes(&api).is_empty(), "{error:#}");
    Ok(())
}
