//! The network plugin as a container runtime runs it: found through the configuration that the agent writes, one real
//! process for each command.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{agent, cluster::Node, netns::Netns, patience::stretched};

/// What a runtime has on one node.
#[derive(Clone, Debug)]
pub struct Runtime {
    dir: PathBuf,
    netns: Arc<Netns>,
}

/// One attachment to be.
#[derive(Clone, Copy, Debug)]
pub struct Container<'a> {
    pub id: &'a str,
    /// Path of its namespace; may be empty for DEL.
    pub netns: &'a str,
}

/// What the plugin did.
#[derive(Debug)]
pub struct Answer {
    pub success: bool,
    /// Standard output.
    pub text: String,
    /// Standard error.
    pub log: String,
    pub took: Duration,
}

impl<'a> Container<'a> {
    /// What a plugin is told of a command for it.
    pub fn env(self, command: &'a str, args: &'a str) -> [(&'static str, &'a str); 5] {
        [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", self.id),
            ("CNI_NETNS", self.netns),
            ("CNI_IFNAME", IFNAME),
            ("CNI_ARGS", args),
        ]
    }
}

const LIMIT: Duration = Duration::from_secs(90);
const READY_LIMIT: Duration = Duration::from_secs(20);
pub const IFNAME: &str = "eth0";

impl Runtime {
    /// Of a node whose agent is started with [`Runtime::agent_args`].
    pub fn new(node: &Node) -> Result<Self> {
        let dir = node.logs.join(format!("cni-{}", node.name));
        let bin = dir.join("bin");
        fs::create_dir_all(&bin).with_context(|| format!("create {}", bin.display()))?;
        symlink(agent::binary()?, bin.join("ferroflow-cni")).context("install the plugin")?;
        Ok(Self { dir, netns: node.netns.clone() })
    }

    /// Puts another plugin beside ours.
    pub fn install(&self, name: &str, script: &str) -> Result<()> {
        let path = self.dir.join("bin").join(name);
        fs::write(&path, script).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Where other plugins may keep what they like.
    pub fn scratch(&self) -> Result<PathBuf> {
        let dir = self.dir.join("scratch");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(dir)
    }

    pub fn agent_args(&self) -> Vec<String> {
        let path = |name: &str| self.dir.join(name).display().to_string();
        let args =
            ["--cni", "--cni-socket", &path("cni.sock"), "--state-dir", &path("state"), "--cni-conf-dir"];
        args.iter().map(|&arg| arg.to_owned()).chain([path("net.d")]).collect()
    }

    /// Where the agent listens for the plugin.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("cni.sock")
    }

    /// Where the agent keeps who has which address.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn conflist(&self) -> PathBuf {
        self.dir.join("net.d/05-ferroflow.conflist")
    }

    /// Until the agent says that pods can be attached.
    pub fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + stretched(READY_LIMIT);
        while !self.conflist().exists() {
            ensure!(Instant::now() < deadline, "no {} after {READY_LIMIT:?}", self.conflist().display());
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// The plugin's configuration as a runtime takes it out of the list, with further fields.
    pub fn config(&self, version: &str, more: Value) -> Result<Value> {
        let text = fs::read_to_string(self.conflist()).context("read the network configuration")?;
        let list: Value = serde_json::from_str(&text).context("the network configuration is no JSON")?;
        let mut config = list["plugins"][0].clone();
        config["name"] = list["name"].clone();
        config["cniVersion"] = version.into();
        let Value::Object(more) = more else { bail!("further fields are an object") };
        config.as_object_mut().context("a plugin is an object")?.extend(more);
        Ok(config)
    }

    /// Runs the plugin once.
    pub fn run(&self, env: &[(&str, &str)], input: &str) -> Result<Answer> {
        self.run_from(&self.dir.join("bin"), "ferroflow-cni", env, input)
    }

    /// The same with any plugin, which finds others where it is itself.
    pub fn run_from(&self, bin: &Path, plugin: &str, env: &[(&str, &str)], input: &str) -> Result<Answer> {
        let mut command = Command::new(bin.join(plugin));
        command.env_clear().env("CNI_PATH", bin).envs(env.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = Instant::now();
        let mut child = self.netns.spawn(command)?;
        // It may refuse before it reads.
        let _closed = child.stdin.take().context("no standard input")?.write_all(input.as_bytes());
        let pid = Pid::from_raw(child.id().cast_signed());
        let (done, output) = std::sync::mpsc::channel();
        thread::Builder::new().name("plugin".into()).spawn(move || {
            let _too_late = done.send((child.wait_with_output(), start.elapsed()));
        })?;
        let Ok((output, took)) = output.recv_timeout(LIMIT) else {
            let _ended = kill(pid, Signal::SIGKILL);
            bail!("the plugin did not end within {LIMIT:?}");
        };
        let Output { status, stdout, stderr } = output?;
        let text = String::from_utf8(stdout).context("the plugin wrote no text")?;
        let log = String::from_utf8_lossy(&stderr).into_owned();
        Ok(Answer { success: status.success(), text, log, took })
    }

    /// A command for a container, of the newest version.
    pub fn command(&self, command: &str, container: Container<'_>, more: Value) -> Result<Answer> {
        self.command_with(command, container, "IgnoreUnknown=1;K8S_POD_NAMESPACE=default", more)
    }

    /// The same with other CNI_ARGS.
    pub fn command_with(
        &self,
        command: &str,
        container: Container<'_>,
        args: &str,
        more: Value,
    ) -> Result<Answer> {
        self.run(&container.env(command, args), &self.config("1.1.0", more)?.to_string())
    }

    /// The result of a successful ADD.
    pub fn add(&self, container: Container<'_>) -> Result<Value> {
        self.command("ADD", container, json!({}))?.result()
    }

    pub fn del(&self, container: Container<'_>) -> Result<()> {
        let answer = self.command("DEL", container, json!({}))?;
        ensure!(answer.success && answer.text.is_empty(), "DEL of {}: {answer:?}", container.id);
        Ok(())
    }

    pub fn check(&self, container: Container<'_>, result: &Value) -> Result<Answer> {
        self.command("CHECK", container, json!({ "prevResult": result }))
    }

    /// Of the attachments that the agent has on disk.
    pub fn leases(&self) -> Result<Vec<Value>> {
        let path = self.state().join("leases.json");
        if !path.exists() {
            return Ok(Vec::new());
        }
        let record: Value = serde_json::from_slice(&fs::read(&path)?).context("the leases are no JSON")?;
        Ok(record["leases"].as_array().context("no leases")?.clone())
    }

    /// How many removals wait for the agent.
    pub fn spooled(&self) -> usize {
        fs::read_dir(self.state().join("spool")).map_or(0, Iterator::count)
    }
}

impl Answer {
    /// The output of a command that succeeded.
    pub fn result(&self) -> Result<Value> {
        ensure!(self.success, "the plugin failed: {}{}", self.text, self.log);
        serde_json::from_str(&self.text).with_context(|| format!("no JSON: {}", self.text))
    }

    /// The code of a command that failed as it should.
    pub fn code(&self) -> Result<u64> {
        ensure!(!self.success, "the plugin succeeded: {}", self.text);
        let error: Value =
            serde_json::from_str(&self.text).with_context(|| format!("no JSON: {}", self.text))?;
        ensure!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "no msg: {error}");
        ensure!(error["cniVersion"].is_string(), "no cniVersion: {error}");
        error["code"].as_u64().with_context(|| format!("no code: {error}"))
    }
}

/// The addresses in a result, without their lengths.
pub fn addresses(result: &Value) -> Vec<&str> {
    let ips = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    ips.iter().filter_map(|ip| ip["address"].as_str()?.split('/').next()).collect()
}

/// The name of the host's end in a result.
pub fn host_interface(result: &Value) -> Result<&str> {
    result["interfaces"][0]["name"].as_str().context("a result without an interface of the host")
}

/// As a container runtime names it to the plugin.
pub fn path(netns: &Path) -> Result<&str> {
    netns.to_str().context("a path that is no text")
}
