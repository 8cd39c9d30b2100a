//! The cluster: objects are made, read and removed through its API, and commands run in its pods.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use http_body_util::BodyExt as _;
use hyper::Request;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config,
    api::AttachParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;
use tokio::{io::AsyncReadExt as _, time::timeout};

/// A client of one cluster.
#[derive(Clone)]
pub(super) struct Access {
    client: Client,
}

/// Whether the API runs commands in pods.
pub(super) enum Ran {
    Output(String),
    /// In its words: there is no kubelet behind it, or something on the way does not let WebSockets through.
    Cannot(String),
}

/// For one command: thirty requests that all run out of time, and some.
const COMMAND: Duration = Duration::from_secs(180);

impl Access {
    pub(super) async fn open(kubeconfig: &Path) -> Result<Self> {
        let read =
            Kubeconfig::read_from(kubeconfig).with_context(|| format!("read {}", kubeconfig.display()))?;
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
        Ok(Self { client: Client::try_from(config)? })
    }

    /// Of a path like `/api/v1/nodes/a`.
    pub(super) async fn get(&self, path: &str) -> Result<Value> {
        self.send("GET", path, None).await
    }

    pub(super) async fn items(&self, path: &str) -> Result<Vec<Value>> {
        let list = self.get(path).await?;
        Ok(list["items"].as_array().with_context(|| format!("{path} is no list"))?.clone())
    }

    pub(super) async fn create(&self, object: &Value) -> Result<()> {
        self.send("POST", &path(object)?, Some(object)).await.map(drop)
    }

    /// A merge patch.
    pub(super) async fn patch(&self, path: &str, patch: &Value) -> Result<()> {
        self.send("PATCH", path, Some(patch)).await.map(drop)
    }

    /// With everything in it, where it is a namespace.
    pub(super) async fn delete(&self, path: &str) -> Result<()> {
        self.send("DELETE", path, None).await.map(drop)
    }

    /// In the only container of a pod. The output of a command that ends with another code than 0 is an error.
    pub(super) async fn exec(&self, namespace: &str, pod: &str, script: &str) -> Result<Ran> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let attach = AttachParams::default().stdin(false).stdout(true).stderr(false);
        let mut process = match pods.exec(pod, ["sh", "-c", script], &attach).await {
            Ok(process) => process,
            Err(error @ kube::Error::UpgradeConnection(_)) => return Ok(Ran::Cannot(error.to_string())),
            Err(error) => return Err(error).with_context(|| format!("run a command in {pod}")),
        };
        let mut output = String::new();
        let mut stdout = process.stdout().context("no standard output")?;
        let read = timeout(COMMAND, stdout.read_to_string(&mut output)).await;
        read.with_context(|| format!("a command in {pod} does not end"))??;
        let status = process.take_status().context("no status")?.await;
        if let Some(status) = status.filter(|status| status.status.as_deref() == Some("Failure")) {
            bail!("a command in {pod}: {}\n{output}", status.message.unwrap_or_default());
        }
        Ok(Ran::Output(output))
    }

    /// Asks until it is so; `missing` says what is not.
    pub(super) async fn wait<T>(
        &self,
        limit: Duration,
        mut look: impl AsyncFnMut(&Self) -> Result<Result<T, String>>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            match look(self).await? {
                Ok(found) => return Ok(found),
                Err(missing) if Instant::now() > deadline => bail!("{missing}, after {limit:?}"),
                Err(_missing) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    }

    async fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let what = || format!("{method} {path}");
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let request = Request::builder().method(method).uri(path).header("content-type", kind);
        let bytes = body.map(Value::to_string).unwrap_or_default().into_bytes();
        let response = self.client.send(request.body(bytes.into())?).await.with_context(what)?;
        let status = response.status();
        let bytes = response.into_body().collect().await.with_context(what)?.to_bytes();
        let answer: Value = serde_json::from_slice(&bytes).with_context(what)?;
        ensure!(
            status.is_success(),
            "{}: {status}: {}",
            what(),
            answer["message"].as_str().unwrap_or_default()
        );
        Ok(answer)
    }
}

/// Where objects of this kind are made.
fn path(object: &Value) -> Result<String> {
    let text = |pointer: &str| {
        object.pointer(pointer).and_then(Value::as_str).with_context(|| format!("no {pointer}"))
    };
    let plurals = BTreeMap::from([
        ("Namespace", "namespaces"),
        ("Pod", "pods"),
        ("Service", "services"),
        ("NetworkPolicy", "networkpolicies"),
    ]);
    let (version, kind) = (text("/apiVersion")?, text("/kind")?);
    let plural = plurals.get(kind).with_context(|| format!("{kind} is not made by these tests"))?;
    let root = if version.contains('/') { "apis" } else { "api" };
    Ok(match text("/metadata/namespace") {
        Ok(namespace) => format!("/{root}/{version}/namespaces/{namespace}/{plural}"),
        Err(_cluster) => format!("/{root}/{version}/{plural}"),
    })
}
