//! How long a pod waits for its network: the plugin as a container runtime runs it, a process for each command, beside the
//! reference plugins `ptp` and `host-local` (containernetworking-plugins), which wire a pod the same way and have neither
//! services nor policies to write.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{
    figure::{Measured, Report},
    stats,
};
use crate::{
    agent::Agent,
    cluster::Cluster,
    cni::{self, Answer, Container, Runtime},
    netns::Netns,
    sandbox::Sandbox,
};

/// Where Debian's package puts them.
const REFERENCE: &str = "/usr/lib/cni";
/// Pods by each means, one after the other.
const PODS: usize = 41;
const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default";

/// Milliseconds that each pod took.
#[derive(Debug, Default)]
struct Times {
    add: Vec<f64>,
    del: Vec<f64>,
}

pub(super) fn measure(sandbox: &Sandbox, report: &mut Report) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    cluster.manifests().write_cluster(&cluster)?;
    let runtime = Runtime::new(&cluster.nodes()[0])?;
    let args = runtime.agent_args();
    let _agent = Agent::start(&cluster.nodes()[0], &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    runtime.wait_ready()?;
    let reference = Path::new(REFERENCE);
    let reference = reference.join("ptp").exists().then_some(reference);
    let other = json!({
        "cniVersion": "1.0.0",
        "name": "reference",
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "dataDir": runtime.scratch()?,
            "ranges": [[{ "subnet": "10.99.0.0/16" }], [{ "subnet": "fd00:99::/64" }]],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        },
    });
    let (mut ours, mut theirs) = (Times::default(), Times::default());
    for number in 0..PODS {
        ours.pod(&format!("pod-{number}"), |env| {
            runtime.run(env, &runtime.config("1.1.0", json!({}))?.to_string())
        })?;
        if let Some(dir) = reference {
            let input = other.to_string();
            theirs.pod(&format!("reference-{number}"), |env| runtime.run_from(dir, "ptp", env, &input))?;
        }
    }
    for (figure, ours, theirs) in [("add", ours.add, theirs.add), ("del", ours.del, theirs.del)] {
        let p99 = stats::percentile(&ours, 99).context("no pod was attached")?;
        let ratios = ours.iter().zip(&theirs).map(|(ours, theirs)| theirs / ours).collect();
        let measured = Measured { unit: "ms", values: ours, baseline: theirs, ratios };
        report.add(&format!("cni/{figure}-p50/ferroflow"), PODS, &measured)?;
        report.add_value(&format!("cni/{figure}-p99/ferroflow"), PODS, (p99, "ms"))?;
    }
    if reference.is_none() {
        let why = format!("no {REFERENCE}/ptp; `apt-get install containernetworking-plugins` brings it");
        report.skip("cni/add-p50/ptp", PODS, &why)?;
    }
    Ok(())
}

impl Times {
    /// Of a pod that comes and goes.
    fn pod(&mut self, id: &str, run: impl Fn(&[(&str, &str)]) -> Result<Answer>) -> Result<()> {
        let netns = Netns::new(id)?;
        let path = netns.path()?;
        let container = Container { id, netns: cni::path(&path)? };
        let added = run(&container.env("ADD", ARGS))?;
        let result: Value = added.result()?;
        ensure!(cni::addresses(&result).len() == 2, "{id} has not an address of each family: {result}");
        let removed = run(&container.env("DEL", ARGS))?;
        ensure!(removed.success, "DEL of {id}: {removed:?}");
        self.add.push(added.took.as_secs_f64() * 1e3);
        self.del.push(removed.took.as_secs_f64() * 1e3);
        Ok(())
    }
}
