//! Rendered text as the API server would take it, with strict field validation.

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The documents of a manifest that hold anything.
pub(super) fn parse(manifest: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifest).context("no YAML")?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// # Errors
/// A field that Kubernetes does not know, or reads otherwise than it is written; a right that nobody asked for.
pub(super) fn check(object: &Value) -> Result<()> {
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    ensure!(!name.is_empty(), "an object without metadata.name");
    match (text("apiVersion"), text("kind")) {
        ("apps/v1", "DaemonSet") => strict::<DaemonSet>(object)?,
        ("v1", "ServiceAccount") => strict::<ServiceAccount>(object)?,
        ("v1", "Service") => {
            strict::<Service>(object)?;
            let spec = &object["spec"];
            ensure!(spec["clusterIP"] == "None", "{name}: the agent would have to serve it: {spec}");
            ensure!(spec["ports"][0]["targetPort"] == "metrics", "{name}: {spec}");
        }
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => {
            strict::<ClusterRole>(object)?;
            rights(object)?;
        }
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => strict::<ClusterRoleBinding>(object)?,
        // Not Kubernetes' own: it names a port that the agent's container has (templates/daemonset.yaml).
        ("monitoring.coreos.com/v1", "PodMonitor") => {
            let spec = &object["spec"];
            ensure!(spec["podMetricsEndpoints"][0]["port"] == "metrics", "{name}: {spec}");
            ensure!(spec["selector"]["matchLabels"].is_object(), "{name} is for every pod");
        }
        // It names a port of the Service above.
        ("monitoring.coreos.com/v1", "ServiceMonitor") => {
            let spec = &object["spec"];
            ensure!(spec["endpoints"][0]["port"] == "metrics", "{name}: {spec}");
            ensure!(spec["selector"]["matchLabels"].is_object(), "{name} is for every Service");
        }
        (version, kind) => {
            bail!("{version} {kind} {name}: bpf-tests/src/chart/objects.rs does not know the kind")
        }
    }
    Ok(())
}

/// What a type does not know is lost when it is written again.
fn strict<T: DeserializeOwned + Serialize>(object: &Value) -> Result<()> {
    let read: T = serde_json::from_value(object.clone())?;
    let written = serde_json::to_value(read)?;
    match difference("", object, &written) {
        Some(path) => bail!("{path}: Kubernetes does not know it, or reads it otherwise"),
        None => Ok(()),
    }
}

/// The path of the first field that is not the same.
fn difference(path: &str, left: &Value, right: &Value) -> Option<String> {
    match (left, right) {
        (Value::Object(a), Value::Object(b)) => a.keys().chain(b.keys()).find_map(|key| {
            let (left, right) = (a.get(key), b.get(key));
            difference(&format!("{path}.{key}"), left.unwrap_or(&Value::Null), right.unwrap_or(&Value::Null))
        }),
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            let mut pairs = a.iter().zip(b).enumerate();
            pairs.find_map(|(at, (a, b))| difference(&format!("{path}[{at}]"), a, b))
        }
        (left, right) => (left != right).then(|| path.to_owned()),
    }
}

/// Reads what is served, writes events, and to nodes only what the values ask for.
fn rights(role: &Value) -> Result<()> {
    let role: ClusterRole = serde_json::from_value(role.clone())?;
    for rule in role.rules.unwrap_or_default() {
        for resource in rule.resources.unwrap_or_default() {
            let writable = matches!(resource.as_str(), "events" | "nodes" | "nodes/status");
            let allowed: &[&str] = if writable {
                &["create", "patch", "get", "list", "watch"]
            } else {
                &["get", "list", "watch"]
            };
            let too_much = rule.verbs.iter().find(|verb| !allowed.contains(&verb.as_str()));
            ensure!(
                too_much.is_none(),
                "`{}` of {resource}: the agent does not need it",
                rule.verbs.join(", ")
            );
            ensure!(
                !matches!(resource.as_str(), "*" | "secrets" | "configmaps"),
                "{resource}: the agent reads none"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_field_that_kubernetes_does_not_know_is_named() {
        let object = |spec: Value| {
            json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "a" }, "spec": {
                "selector": {}, "template": { "spec": spec } } })
        };
        let container = json!({ "name": "a", "image": "b" });
        check(&object(json!({ "containers": [container] }))).unwrap();
        let error = check(&object(json!({ "containers": [container], "hostNetwrok": true }))).unwrap_err();
        assert!(error.to_string().starts_with(".spec.template.spec.hostNetwrok: "), "{error}");
        let number = object(json!({ "containers": [{ "name": "a", "image": 5 }] }));
        assert!(check(&number).is_err());
    }

    #[test]
    fn rights_that_are_not_needed_are_refused() {
        let role = |resource: &str, verb: &str| {
            json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": "a" },
                "rules": [{ "apiGroups": [""], "resources": [resource], "verbs": [verb] }] })
        };
        check(&role("services", "watch")).unwrap();
        for (resource, verb) in [("services", "patch"), ("secrets", "get"), ("*", "get"), ("pods", "*")] {
            assert!(check(&role(resource, verb)).is_err(), "{verb} {resource}");
        }
    }
}
