//! Tells the cluster that this node has its network (rule 62).

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::access::Servers;
use super::backoff::Backoff;

/// What keeps pods off a node until somebody says that its network works; each only where the operator asks for it.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// Key of the taint that goes.
    pub startup_taint: Option<String>,
    pub network: Network,
}

/// Whose word the node's condition `NetworkUnavailable` is. Clouds that make routes set it to True on new nodes, and the
/// taint `node.kubernetes.io/network-unavailable` follows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    #[default]
    Others,
    /// This agent's, which sets it to False.
    Ours,
}

const PATIENCE: Duration = Duration::from_secs(30);

/// Says so once; tries until it is said.
pub(super) async fn announce(servers: Arc<Servers>, node: Box<str>, readiness: Readiness) {
    if readiness.startup_taint.is_none() && readiness.network == Network::Others {
        return;
    }
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    loop {
        let server = servers.current();
        let nodes = Api::all(server.client.clone());
        match timeout(PATIENCE, say(&nodes, &node, &readiness)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::warn!("Node {node} cannot be told that its network works: {error}"),
            Err(_) => servers.leave(&server),
        }
        sleep(backoff.next()).await;
    }
}

async fn say(nodes: &Api<Node>, name: &str, readiness: &Readiness) -> kube::Result<()> {
    let Readiness { startup_taint, network } = readiness;
    let node = nodes.get(name).await?;
    if *network == Network::Ours && !is_available(&node) {
        let patch = Patch::Strategic(json!({ "status": { "conditions": [available()] } }));
        nodes.patch_status(name, &PatchParams::default(), &patch).await?;
        tracing::info!("Node {name}: NetworkUnavailable is False now");
    }
    if let Some(patch) = startup_taint.as_ref().and_then(|key| without_taint(&node, key)) {
        nodes.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        tracing::info!("Node {name}: the startup taint is gone");
    }
    Ok(())
}

fn is_available(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|it| it.type_ == "NetworkUnavailable" && it.status == "False")
}

fn available() -> NodeCondition {
    let now = Some(Time(Timestamp::now()));
    NodeCondition {
        type_: "NetworkUnavailable".into(),
        status: "False".into(),
        reason: Some("FerroflowIsUp".into()),
        message: Some("ferroflow serves this node".into()),
        last_heartbeat_time: now.clone(),
        last_transition_time: now,
    }
}

/// The taints but for those of this key; `None` where there is none. Applies only to the node as it was read, since
/// others change its taints too.
fn without_taint(node: &Node, key: &str) -> Option<Value> {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let (gone, stay): (Vec<&Taint>, Vec<&Taint>) = taints.partition(|taint| taint.key == key);
    let version = &node.metadata.resource_version;
    (!gone.is_empty())
        .then(|| json!({ "metadata": { "resourceVersion": version }, "spec": { "taints": stay } }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_taint_of_the_key_goes() {
        let node = json!({
            "metadata": { "name": "a", "resourceVersion": "7" },
            "spec": { "taints": [
                { "key": "example.com/startup", "effect": "NoSchedule" },
                { "key": "example.com/startup", "effect": "NoExecute" },
                { "key": "dedicated", "value": "db", "effect": "NoSchedule" },
            ] },
        });
        let node: Node = serde_json::from_value(node).unwrap();
        let expected = json!({
            "metadata": { "resourceVersion": "7" },
            "spec": { "taints": [{ "key": "dedicated", "value": "db", "effect": "NoSchedule" }] },
        });
        assert_eq!(without_taint(&node, "example.com/startup"), Some(expected));
        assert_eq!(without_taint(&node, "other"), None);
    }
}
