//! Lines at the socket by which the network plugin speaks to a real agent.
//!
//! Each connection is answered by one line of JSON or closed, within the time that the agent gives a plugin; the agent
//! lives, and attaches a pod at the end as it did at the beginning.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use ferroflow_ebpf::noise::Noise;
use serde_json::Value;

use super::{Effort, Report, corpus, mutate::mutate};
use crate::agent::Agent;
use crate::cluster::Cluster;
use crate::cni::Runtime;
use crate::patience::stretched;
use crate::sandbox::Sandbox;

/// Longer than the agent waits for a request.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn run(sandbox: &Sandbox, seed: u64, effort: Effort) -> Result<Report> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    cluster.manifests().write_cluster(&cluster)?;
    let node = &cluster.nodes()[0];
    let runtime = Runtime::new(node)?;
    let args = runtime.agent_args();
    let mut agent = Agent::start(node, &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    agent.wait_synced()?;
    runtime.wait_ready()?;
    let socket = runtime.socket();
    let path = corpus("requests.txt");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let seeds: Vec<&[u8]> = text.lines().map(str::as_bytes).collect();
    ensure!(!seeds.is_empty(), "{} is empty", path.display());
    let mut noise = Noise(seed);
    let mut counts = [0; 3];
    let mut executions = 0;
    while effort.goes_on(executions) {
        let (one, other) = (noise.below(seeds.len()), noise.below(seeds.len()));
        let mut line = mutate(&mut noise, seeds[one], seeds[other], 1);
        if noise.percent(80) {
            line.push(b'\n');
        }
        let answer = exchange(&socket, &line)
            .with_context(|| format!("request {}\n{}", String::from_utf8_lossy(&line), agent.log_tail()))?;
        counts[answer as usize] += 1;
        executions += 1;
    }
    ensure!(exchange(&socket, b"{\"command\":\"STATUS\"}\n")? == Answer::Done, "the agent serves no longer");
    agent.stop()?;
    let [done, failed, closed] = counts;
    let outcomes = vec![("done", done), ("refused", failed), ("closed", closed)];
    Ok(Report { target: "requests", executions, outcomes })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Done,
    Failed,
    Closed,
}

fn exchange(socket: &Path, line: &[u8]) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket).context("connect to the agent")?;
    stream.set_read_timeout(Some(stretched(LIMIT)))?;
    // It may refuse before it has read all.
    let _refused = stream.write_all(line);
    let _closed = stream.shutdown(Shutdown::Write);
    let mut answer = String::new();
    match stream.read_to_string(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(Answer::Closed),
        Err(error) => return Err(error).context("the agent hangs"),
    }
    if answer.is_empty() {
        return Ok(Answer::Closed);
    }
    let value: Value = serde_json::from_str(&answer).with_context(|| format!("answered {answer}"))?;
    match value.get("failed") {
        None => Ok(Answer::Done),
        Some(failed) if failed["msg"].as_str().is_some_and(|msg| !msg.is_empty()) => Ok(Answer::Failed),
        Some(_) => bail!("refused without a word: {answer}"),
    }
}
