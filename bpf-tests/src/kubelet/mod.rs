//! A container of the chart, run as a kubelet and its runtime run it: out of the pod template that Helm renders, in
//! namespaces of its own, with the image's files and nothing else, the mounts with their propagation, the capabilities
//! that are left, read-only paths, environment and service account.
//!
//! ```text
//!  host: a directory that stands for the machine's root, a shared mount as systemd makes it
//!    └─ container: unshare (mount, pid, cgroup, ipc, uts) ─▶ setpriv (bounding set) ─▶ enter (mounts, pivot_root) ─▶ exec
//! ```
//!
//! What is left out: seccomp (kubelets run without a profile unless told otherwise; containerd's default profile allows
//! what is used here to who has SYS_ADMIN and BPF) and AppArmor, which the chart turns off by name.

mod enter;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use enter::enter;

use crate::{agent::binary, cluster::Node, traffic::pod_command};

/// What Helm renders of the DaemonSet; `CHART=write cargo xtask chart` writes it anew.
pub const RENDERED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/rendered/daemonset.yaml");

/// A machine: its files, as far as containers see them.
#[derive(Debug)]
pub struct Host {
    root: PathBuf,
    image: PathBuf,
}

/// Of a pod template.
#[derive(Debug)]
pub struct Pod {
    template: Value,
    /// In place of what only a cluster gives.
    arguments: Vec<(String, String)>,
    environment: BTreeMap<String, String>,
}

/// Killed when dropped, with everything that runs in it.
#[derive(Debug)]
pub struct Container {
    child: Child,
    environment: BTreeMap<String, String>,
    log: PathBuf,
}

/// What [`enter()`] makes of the namespaces.
#[derive(Debug, Serialize, Deserialize)]
struct Spec {
    /// The image's files.
    root: PathBuf,
    mounts: Vec<Mount>,
    args: Vec<String>,
    environment: BTreeMap<String, String>,
    privileged: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Mount {
    source: PathBuf,
    target: PathBuf,
    writable: bool,
    propagation: Propagation,
}

/// `mountPropagation` of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Propagation {
    None,
    HostToContainer,
    Bidirectional,
}

const NO_SOURCE: Option<&str> = None;

impl Host {
    /// With the cgroups of a node, and without a BPF file system.
    pub fn create(node: &Node) -> Result<Self> {
        let root = node.logs.join(format!("{}-root", node.name));
        fs::create_dir_all(&root)?;
        mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), NO_SOURCE)
            .context("mount the host's root")?;
        mount(NO_SOURCE, &root, NO_SOURCE, MsFlags::MS_SHARED, NO_SOURCE).context("share the host's root")?;
        for dir in ["sys/fs/bpf", "sys/fs/cgroup", "run/netns", "var/lib", "etc/cni/net.d", "opt/cni/bin"] {
            fs::create_dir_all(root.join(dir))?;
        }
        let cgroup = root.join("sys/fs/cgroup");
        mount(Some(&node.cgroup), &cgroup, NO_SOURCE, MsFlags::MS_BIND, NO_SOURCE)
            .context("mount the cgroups")?;
        let image = node.logs.join(format!("{}-image", node.name));
        unpack(&image)?;
        Ok(Self { root, image })
    }

    /// Where the machine has it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

/// The files of `xtask/src/image/layer.rs`.
fn unpack(image: &Path) -> Result<()> {
    for dir in ["etc", "run", "tmp", "var/lib"] {
        fs::create_dir_all(image.join(dir))?;
    }
    fs::write(image.join("etc/nsswitch.conf"), "hosts: files dns\n")?;
    fs::copy(binary()?, image.join("ferroflow")).context("copy the binary")?;
    symlink("ferroflow", image.join("ferroflow-cni"))?;
    symlink("../run", image.join("var/run"))?;
    Ok(())
}

impl Pod {
    /// What Helm renders.
    pub fn rendered() -> Result<Self> {
        let text = fs::read_to_string(RENDERED).with_context(|| format!("read {RENDERED}"))?;
        let object: Value = serde_saphyr::from_str(&text).context("the rendered DaemonSet")?;
        let template = object["spec"]["template"]["spec"].clone();
        ensure!(template["hostNetwork"] == true, "{RENDERED}: it is not of the host's network");
        Ok(Self { template, arguments: Vec::new(), environment: BTreeMap::new() })
    }

    /// Another value of a flag that the template has.
    #[must_use]
    pub fn argument(mut self, flag: &str, value: &str) -> Self {
        self.arguments.push((format!("{flag}="), value.to_owned()));
        self
    }

    /// A variable that refers to the pod, or that the kubelet adds.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Starts a container of this name, init container or not, in the node's network.
    pub fn start(&self, host: &Host, node: &Node, name: &str) -> Result<Container> {
        let containers =
            ["initContainers", "containers"].iter().filter_map(|list| self.template[*list].as_array());
        let found = containers.flatten().find(|it| it["name"] == name);
        let container = found.with_context(|| format!("the template has no container {name}"))?;
        let spec = self.spec(host, container).with_context(|| format!("container {name}"))?;
        let path = node.logs.join(format!("{}-{name}.json", node.name));
        fs::write(&path, serde_json::to_vec(&spec)?)?;
        let mut command = pod_command();
        command.arg("--cgroup").arg(&node.agent_cgroup).args([
            "exec",
            "--",
            "unshare",
            "--mount",
            "--propagation",
        ]);
        command.args(["unchanged", "--pid", "--fork", "--kill-child", "--cgroup", "--ipc", "--uts"]);
        if !spec.privileged {
            command.arg("setpriv").arg(format!("--bounding-set={}", bounding_set(container)?));
        }
        command.arg(std::env::current_exe()?).args([crate::pod::VERB, "container"]).arg(&path);
        let log = node.logs.join(format!("{}-{name}.log", node.name));
        let file = fs::File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Ok(Container { child: node.netns.spawn(command)?, environment: spec.environment, log })
    }

    fn spec(&self, host: &Host, container: &Value) -> Result<Spec> {
        let mut args: Vec<String> = serde_json::from_value(container["args"].clone()).context("args")?;
        for (flag, value) in &self.arguments {
            for arg in args.iter_mut().filter(|arg| arg.starts_with(flag.as_str())) {
                *arg = format!("{flag}{value}");
            }
        }
        let mut environment = self.environment.clone();
        for variable in container["env"].as_array().into_iter().flatten() {
            let name = variable["name"].as_str().context("a variable without a name")?;
            match variable["value"].as_str() {
                Some(value) => drop(environment.insert(name.to_owned(), value.to_owned())),
                None => ensure!(environment.contains_key(name), "nobody says what {name} is"),
            }
        }
        let security = &container["securityContext"];
        ensure!(security["readOnlyRootFilesystem"] == true, "it may write to its image");
        let mut mounts = Vec::new();
        for asked in container["volumeMounts"].as_array().into_iter().flatten() {
            mounts.push(self.mount(host, asked)?);
        }
        let account = "var/run/secrets/kubernetes.io/serviceaccount";
        let (source, target) = (host.path("var/lib/kubelet/serviceaccount"), format!("/{account}").into());
        mounts.push(Mount { source, target, writable: false, propagation: Propagation::None });
        let privileged = security["privileged"] == true;
        Ok(Spec { root: host.image.clone(), mounts, args, environment, privileged })
    }

    fn mount(&self, host: &Host, asked: &Value) -> Result<Mount> {
        let volumes = self.template["volumes"].as_array().into_iter().flatten();
        let volume = volumes.into_iter().find(|volume| volume["name"] == asked["name"]);
        let volume = &volume.with_context(|| format!("no volume {}", asked["name"]))?["hostPath"];
        let source = host.path(volume["path"].as_str().context("a volume that is no hostPath")?);
        if volume["type"] == "DirectoryOrCreate" {
            fs::create_dir_all(&source)?;
        }
        ensure!(source.is_dir(), "{}: no directory", source.display());
        let propagation = match asked["mountPropagation"].as_str() {
            None => Propagation::None,
            Some("HostToContainer") => Propagation::HostToContainer,
            Some("Bidirectional") => Propagation::Bidirectional,
            Some(other) => anyhow::bail!("mountPropagation: {other}"),
        };
        let target = asked["mountPath"].as_str().context("a mount without a path")?.into();
        Ok(Mount { source, target, writable: asked["readOnly"] != true, propagation })
    }
}

/// For setpriv(1).
fn bounding_set(container: &Value) -> Result<String> {
    let capabilities = &container["securityContext"]["capabilities"];
    ensure!(
        capabilities["drop"] == serde_json::json!(["ALL"]),
        "it keeps capabilities that it does not name"
    );
    let names = capabilities["add"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Ok(names.fold("-all".to_owned(), |set, name| set + ",+" + &name.to_lowercase()))
}

impl Container {
    /// Until it has ended by itself.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Kills everything that runs in it, as a kubelet does at last.
    pub fn kill(&mut self) -> Result<()> {
        let first = PathBuf::from(format!("/proc/{}", self.first_process()?));
        self.child.kill().context("kill the container")?;
        self.child.wait().context("wait for the container")?;
        while first.exists() {
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What it has written, over restarts.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The process id of its first process, where the host sees it.
    pub fn first_process(&self) -> Result<u32> {
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        let first =
            children.split_whitespace().next().with_context(|| format!("it does not run\n{}", self.log()))?;
        Ok(first.parse()?)
    }

    /// As `kubectl exec` runs a command in it.
    pub fn exec(&self, args: &[&str]) -> Result<std::process::Output> {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.first_process()?.to_string());
        command.args(["--mount", "--pid", "--cgroup", "--ipc", "--uts", "--net", "--root", "--wd"]);
        command.env_clear().envs(&self.environment);
        Ok(command.arg("--").args(args).stdin(Stdio::null()).output()?)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}
