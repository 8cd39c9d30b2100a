//! The real agent on a node of the cluster.

use std::{
    collections::BTreeMap,
    env, fs,
    fs::File,
    net::Ipv4Addr,
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

use crate::{
    apiserver::{ApiServer, Follower},
    cluster::Node,
    netns::Netns,
    patience::stretched,
    traffic::pod_command,
};

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

/// The Kubernetes API of one node: but for [`Api::beside`] it listens where only that node reaches it.
#[derive(Debug)]
pub struct Api {
    pub server: ApiServer,
    kubeconfig: PathBuf,
    /// Brings the manifests of the cluster, where they are what is served.
    follower: Option<Follower>,
}

const SYNC_LIMIT: Duration = Duration::from_secs(30);
const VERB_LIMIT: Duration = Duration::from_secs(10);

impl Agent {
    /// Starts it on the node's manifests, with further arguments.
    pub fn start(node: &Node, more: &[&str]) -> Result<Self> {
        Self::start_on(node, ["--manifests", path(&node.manifests)?], &[], more)
    }

    /// Starts it on a Kubernetes API, with further arguments.
    pub fn start_over(api: &Api, node: &Node, more: &[&str]) -> Result<Self> {
        Self::start_on(node, ["--kubeconfig", path(&api.kubeconfig)?], &[], more)
    }

    /// Lets another command start it, which must become it (exec).
    pub fn start_under(node: &Node, launcher: &[&str], more: &[&str]) -> Result<Self> {
        Self::start_on(node, ["--manifests", path(&node.manifests)?], launcher, more)
    }

    fn start_on(node: &Node, source: [&str; 2], launcher: &[&str], more: &[&str]) -> Result<Self> {
        let (bpffs, cgroup) = (path(&node.bpffs)?, path(&node.cgroup)?);
        let run_dir = node.logs.join(format!("{}-run", node.name));
        let args = [
            "agent",
            "--run-dir",
            path(&run_dir)?,
            "--node-name",
            &node.name,
            "--bpffs",
            bpffs,
            "--cgroup",
            cgroup,
        ];
        let mut agent = Self {
            node: node.name.clone(),
            launcher: launcher.iter().map(|&word| word.to_owned()).collect(),
            binary: first_binary(node)?,
            args: args.iter().chain(&source).chain(more).map(|&arg| arg.to_owned()).collect(),
            bpffs: node.bpffs.clone(),
            cgroup: node.agent_cgroup.clone(),
            log: node.logs.join(format!("{}.log", node.name)),
            netns: node.netns.clone(),
            child: None,
        };
        agent.spawn(&[])?;
        Ok(agent)
    }

    /// Until it has programmed everything its sources list.
    pub fn wait_synced(&mut self) -> Result<Value> {
        self.wait_synced_within(SYNC_LIMIT)
    }

    pub fn wait_synced_within(&mut self, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + stretched(limit);
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
        let deadline = Instant::now() + stretched(limit);
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
        let Ok(output) = output.recv_timeout(stretched(VERB_LIMIT)) else {
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
        let deadline = Instant::now() + stretched(Duration::from_secs(5));
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
        self.restart_with(&[])
    }

    /// The same, with environment variables of its own.
    pub fn restart_with(&mut self, env: &[(&str, &str)]) -> Result<()> {
        if self.child.is_some() {
            bail!("the agent of {} still runs", self.node);
        }
        self.binary = binary()?;
        self.spawn(env)
    }

    /// How many files it has open, by kind: `socket`, `bpf-map`, or what the file's path begins with.
    pub fn open_files(&self) -> Result<BTreeMap<String, usize>> {
        let child = self.child.as_ref().with_context(|| format!("{} has no agent", self.node))?;
        let mut kinds = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", child.id()))? {
            // One that was closed meanwhile is none.
            let Ok(target) = fs::read_link(entry?.path()) else { continue };
            let target = target.to_string_lossy().into_owned();
            let kind = target.trim_start_matches("anon_inode:").split(':').next().unwrap_or_default();
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        Ok(kinds)
    }

    /// From the next start on: another value of a flag that it was given, or a flag more.
    pub fn set_flag(&mut self, flag: &str, value: &str) {
        match self.args.iter().position(|arg| arg == flag) {
            Some(at) => value.clone_into(&mut self.args[at + 1]),
            None => self.args.extend([flag.to_owned(), value.to_owned()]),
        }
    }

    /// Until it has ended by itself.
    pub fn wait_ended(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + stretched(SYNC_LIMIT);
        loop {
            if let Some(ended) = self.ended()? {
                self.child = None;
                return Ok(ended);
            }
            if Instant::now() > deadline {
                bail!("the agent of {} has not ended\n{}", self.node, self.log_tail());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Everything that it has logged, also before a restart.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))
    }

    /// The last lines of its log, for messages of failures.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(25)..).unwrap_or_default();
        format!("--- log of the agent of {}\n{}\n---", self.node, tail.join("\n"))
    }

    /// Memory in KiB; `which` as in `/proc/PID/status`: `VmRSS` is what is resident.
    pub fn memory_kib(&self, which: &str) -> Result<u64> {
        let child = self.child.as_ref().with_context(|| format!("{} has no agent", self.node))?;
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(which))
            .with_context(|| format!("no {which}"))?;
        Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").parse()?)
    }

    fn spawn(&mut self, env: &[(&str, &str)]) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = pod_command();
        command.arg("--cgroup").arg(&self.cgroup).args(["exec", "--"]).args(&self.launcher);
        command.arg(&self.binary).args(&self.args);
        command.envs(env.iter().copied());
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

impl Api {
    /// A server without objects, for the agent of this node.
    pub fn start(node: &Node) -> Result<Self> {
        Self::start_at(node, (&node.netns, Ipv4Addr::LOCALHOST))
    }

    /// A server of the cluster's manifests, which listens at another node's address.
    pub fn beside(node: &Node, other: &Node) -> Result<Self> {
        Self::start_at(node, (&other.netns, other.v4))?.follow(node)
    }

    fn start_at(node: &Node, (netns, addr): (&Netns, Ipv4Addr)) -> Result<Self> {
        let listener = netns.run(move |_| std::net::TcpListener::bind((addr, 0)))??;
        let server = ApiServer::listen(listener)?;
        let kubeconfig = node.logs.join(format!("{}.kubeconfig", node.name));
        server.write_kubeconfig(&kubeconfig, None)?;
        Ok(Self { server, kubeconfig, follower: None })
    }

    /// A server of the cluster's manifests.
    pub fn of_manifests(node: &Node) -> Result<Self> {
        Self::start(node)?.follow(node)
    }

    fn follow(mut self, node: &Node) -> Result<Self> {
        self.follower = Some(self.server.follow(&node.manifests)?);
        Ok(self)
    }

    /// Listens again after [`ApiServer::go_away`].
    pub fn come_back(&mut self, node: &Node) -> Result<()> {
        let address = self.server.address();
        let listener = node.netns.run(move |_| std::net::TcpListener::bind(address))??;
        self.server.come_back_on(listener)
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

/// Of a node's first agent: on node b `FERROFLOW_OLDER`, an older build, where that is set; it ends with the first restart.
fn first_binary(node: &Node) -> Result<PathBuf> {
    match env::var_os("FERROFLOW_OLDER").filter(|_| node.name == "node-b") {
        Some(path) => fs::canonicalize(&path).with_context(|| format!("FERROFLOW_OLDER={}", path.display())),
        None => binary(),
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}
