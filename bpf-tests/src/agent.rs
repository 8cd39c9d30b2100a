//! The real agent on a node of the cluster.

use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{cluster::Node, netns::Netns, traffic::pod_command};

/// Killed when dropped.
#[derive(Debug)]
pub struct Agent {
    node: String,
    /// Starts the binary: the command line that follows it.
    launcher: Vec<String>,
    binary: PathBuf,
    args: Vec<String>,
    bpffs: PathBuf,
    cgroup: PathBuf,
    log: PathBuf,
    netns: Arc<Netns>,
    child: Option<Child>,
}

const SYNC_LIMIT: Duration = Duration::from_secs(10);
const VERB_LIMIT: Duration = Duration::from_secs(10);

impl Agent {
    /// Starts it on the node's manifests, with further arguments.
    pub fn start(node: &Node, more: &[&str]) -> Result<Self> {
        Self::start_under(node, &[], more)
    }

    /// Lets another command start it, which must become it (exec).
    pub fn start_under(node: &Node, launcher: &[&str], more: &[&str]) -> Result<Self> {
        let (manifests, bpffs, cgroup) = (path(&node.manifests)?, path(&node.bpffs)?, path(&node.cgroup)?);
        let args = [
            "agent",
            "--node-name",
            &node.name,
            "--manifests",
            manifests,
            "--bpffs",
            bpffs,
            "--cgroup",
            cgroup,
        ];
        let mut agent = Self {
            node: node.name.clone(),
            launcher: launcher.iter().map(|&word| word.to_owned()).collect(),
            binary: binary()?,
            args: args.iter().chain(more).map(|&arg| arg.to_owned()).collect(),
            bpffs: node.bpffs.clone(),
            cgroup: node.agent_cgroup.clone(),
            log: node.logs.join(format!("{}.log", node.name)),
            netns: node.netns.clone(),
            child: None,
        };
        agent.spawn()?;
        Ok(agent)
    }

    /// Until it has programmed everything its sources list.
    pub fn wait_synced(&mut self) -> Result<Value> {
        let deadline = Instant::now() + SYNC_LIMIT;
        loop {
            let status = self.status();
            if let Ok(status) = &status
                && status["synced"] == true
                && self.is_of_this_process(status)
            {
                return Ok(status.clone());
            }
            if let Some(ended) = self.ended()? {
                bail!("the agent of {} ended with {ended}\n{}", self.node, self.log_tail());
            }
            if Instant::now() > deadline {
                let status = status.map_or_else(|error| format!("{error:#}"), |status| status.to_string());
                bail!("the agent of {} is not synced; status: {status}\n{}", self.node, self.log_tail());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Until its status is as wanted.
    pub fn wait_status(&self, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.status()?;
            if wanted(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the status of {} stays {status}\n{}", self.node, self.log_tail());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn status(&self) -> Result<Value> {
        let text = self.verb(&["status", "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("the status is no JSON: {text}"))
    }

    /// A command of the same binary, which works whether the agent runs or not. Returns its standard output.
    pub fn verb(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.binary);
        command.args(args).arg("--bpffs").arg(&self.bpffs);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.netns.spawn(command)?;
        let pid = pid_of(&child);
        let (done, output) = std::sync::mpsc::channel();
        thread::Builder::new().name("verb".into()).spawn(move || {
            let _too_late = done.send(child.wait_with_output());
        })?;
        let shown = args.join(" ");
        let Ok(output) = output.recv_timeout(VERB_LIMIT) else {
            let _ended = kill(pid, Signal::SIGKILL);
            bail!("`{shown}` gave no answer within {VERB_LIMIT:?}");
        };
        let output = output?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("`{shown}` failed with {}: {}", output.status, error.trim());
        }
        String::from_utf8(output.stdout).with_context(|| format!("`{shown}` wrote no text"))
    }

    /// Without a chance to clean up.
    pub fn kill9(&mut self) -> Result<()> {
        let mut child = self.child.take().with_context(|| format!("{} has no agent", self.node))?;
        child.kill().context("kill the agent")?;
        child.wait().context("wait for the agent")?;
        Ok(())
    }

    /// As the kubelet ends a container.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let child = self.child.as_mut().with_context(|| format!("{} has no agent", self.node))?;
        kill(pid_of(child), Signal::SIGTERM).context("ask the agent to end")?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if let Some(ended) = self.ended()? {
                self.child = None;
                return Ok(ended);
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!("the agent of {} did not end on SIGTERM\n{}", self.node, self.log_tail())
    }

    /// After `kill9` or `stop`, with the same arguments; the log goes on.
    pub fn restart(&mut self) -> Result<()> {
        if self.child.is_some() {
            bail!("the agent of {} still runs", self.node);
        }
        self.spawn()
    }

    /// The last lines of its log, for messages of failures.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(25)..).unwrap_or_default();
        format!("--- log of the agent of {}\n{}\n---", self.node, tail.join("\n"))
    }

    /// Resident memory in KiB.
    pub fn memory_kib(&self) -> Result<u64> {
        let child = self.child.as_ref().with_context(|| format!("{} has no agent", self.node))?;
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    fn spawn(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = pod_command();
        command.arg("--cgroup").arg(&self.cgroup).args(["exec", "--"]).args(&self.launcher);
        command.arg(&self.binary).args(&self.args);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(self.netns.spawn(command)?);
        Ok(())
    }

    /// Not of the agent before a restart.
    fn is_of_this_process(&self, status: &Value) -> bool {
        let pid = status.get("pid").and_then(Value::as_u64);
        pid.is_none_or(|pid| self.child.as_ref().is_some_and(|child| u64::from(child.id()) == pid))
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.as_mut().map(Child::try_wait).transpose()?.flatten())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ended = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// The agent that the runner of these tests built.
pub fn binary() -> Result<PathBuf> {
    let path = env::var_os("FERROFLOW_BIN").ok_or_else(|| {
        anyhow!("FERROFLOW_BIN does not say where the agent is: run this through `cargo xtask test` or `cargo xtask demo`")
    })?;
    fs::canonicalize(&path).with_context(|| format!("FERROFLOW_BIN={}", path.display()))
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}
