//! The chart's containers on a node, as a kubelet and containerd run them: what Helm renders is what is run here.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    agent::binary,
    apiserver::{ApiServer, Follower},
    cluster::{Cluster, Family, Node},
    cni::addresses,
    kubelet::{Container, Host, Pod},
    metrics::is_healthy,
    netns::Netns,
    patience::stretched,
    pod::HTTP_PORT,
    runner,
    sandbox::Sandbox,
    traffic::Ask,
};
use nix::{
    mount::{MsFlags, mount, umount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use serde_json::{Value, json};

fn main() -> ExitCode {
    runner::main(&[
        ("a_fresh_node_comes_up_from_the_rendered_chart", a_fresh_node_comes_up),
        ("a_full_disk_attaches_no_pod_and_keeps_those_that_are", a_full_disk_attaches_no_pod),
        ("an_agent_whose_api_servers_are_gone_asks_the_service", the_service_is_asked_last),
    ])
}

const LIMIT: Duration = Duration::from_secs(60);

/// A node with an API and the chart's pod, and no container yet.
struct Fresh<'a> {
    node: &'a Node,
    host: Host,
    pod: Pod,
    api: ApiServer,
    _follower: Follower,
}

impl<'a> Fresh<'a> {
    fn new(cluster: &'a Cluster) -> Result<Self> {
        cluster.manifests().write_cluster(cluster)?;
        let node = cluster.node("a");
        let host = Host::create(node)?;
        let listener = node.netns.run(|_| TcpListener::bind("127.0.0.1:0"))??;
        let (api, authority) = ApiServer::listen_with_tls(listener, "127.0.0.1")?;
        api.require_token("secret");
        let follower = api.follow(&node.manifests)?;
        let account = host.path("var/lib/kubelet/serviceaccount");
        fs::create_dir_all(&account)?;
        for (name, text) in [("token", "secret"), ("ca.crt", &authority), ("namespace", "kube-system")] {
            fs::write(account.join(name), text)?;
        }
        // As a kubelet tells every container of the Service `kubernetes`; which nobody serves on a fresh node.
        let pod = Pod::rendered()?.variable("NODE_NAME", &node.name).argument("--api-server", &api.url());
        let pod =
            pod.variable("KUBERNETES_SERVICE_HOST", "127.0.0.1").variable("KUBERNETES_SERVICE_PORT", "1");
        Ok(Self { node, host, pod, api, _follower: follower })
    }

    /// Runs the init container, then the agent's, until the runtime finds its configuration.
    fn start(&self) -> Result<Container> {
        let mut prepare = self.pod.start(&self.host, self.node, "prepare")?;
        let ended = prepare.wait()?;
        ensure!(ended.success(), "the init container ended with {ended}\n{}", prepare.log());
        let agent = self.pod.start(&self.host, self.node, "agent")?;
        let conflist = self.conflist();
        wait_for(&agent, "the network configuration", || conflist.exists())?;
        Ok(agent)
    }

    fn conflist(&self) -> PathBuf {
        self.host.path("etc/cni/net.d/05-ferroflow.conflist")
    }

    /// The plugin as the runtime runs it on the host; its result, or its error.
    fn plugin(&self, command: &str, id: &str) -> Result<Result<Value, Value>> {
        let list: Value = serde_json::from_slice(&fs::read(self.conflist())?)?;
        ensure!(list["plugins"][0]["socket"] == "/run/ferroflow/cni.sock", "{list}");
        let mut config = list["plugins"][0].clone();
        // The runtime finds these below its own root.
        for field in ["socket", "stateDir"] {
            let path = config[field].as_str().context("no path")?;
            config[field] = self.host.path(path).display().to_string().into();
        }
        config["name"] = list["name"].clone();
        config["cniVersion"] = "1.0.0".into();
        let mut plugin = Command::new(self.host.path("opt/cni/bin/ferroflow-cni"));
        plugin.env_clear().env("CNI_COMMAND", command).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
        plugin.env("CNI_NETNS", format!("/var/run/netns/{id}")).env("CNI_PATH", "/opt/cni/bin");
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.node.netns.spawn(plugin)?;
        child.stdin.take().context("no input")?.write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let answer = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        Ok(if output.status.success() { Ok(answer) } else { Err(answer) })
    }

    /// A namespace for a pod, named below /run/netns as containerd does it, after the agent's container was made.
    fn namespace(&self, id: &str) -> Result<(Netns, PathBuf)> {
        let (netns, named) = (Netns::new(id)?, self.host.path("run/netns").join(id));
        fs::write(&named, "")?;
        let none: Option<&str> = None;
        mount(Some(&netns.path()?), &named, none, MsFlags::MS_BIND, none).context("name the namespace")?;
        Ok((netns, named))
    }

    fn add(&self, id: &str) -> Result<(Netns, PathBuf, Value)> {
        let (netns, named) = self.namespace(id)?;
        let result = self.plugin("ADD", id)?;
        let result = result.map_err(|error| anyhow::anyhow!("ADD of {id}: {error}"))?;
        Ok((netns, named, result))
    }
}

fn wait_for(agent: &Container, what: &str, done: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + stretched(LIMIT);
    while !done() {
        ensure!(Instant::now() < deadline, "no {what}\n{}", agent.log());
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn a_fresh_node_comes_up(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    let fresh = Fresh::new(&cluster)?;
    let (node, host) = (fresh.node, &fresh.host);
    ensure!(kind_of(&host.path("sys/fs/bpf"))? != BPF_FS_MAGIC, "there is a BPF file system already");
    // One of the container's own would end with it, and every connection's entry.
    let mut early = fresh.pod.start(host, node, "agent")?;
    ensure!(!early.wait()?.success(), "an agent serves without a BPF file system of the host's");
    ensure!(early.log().contains("host.mountBpffs"), "{}", early.log());
    let mut agent = fresh.start()?;
    comes_up(&fresh, &agent)?;

    let (netns, named, result) = fresh.add("cni-1")?;
    serves(node, &netns, &result).with_context(|| agent.log())?;
    is_healthy(node).with_context(|| agent.log())?;
    doctor(&agent)?;

    // An upgrade: the pod is served meanwhile, and adopted.
    agent.kill()?;
    serves(node, &netns, &result)?;
    agent = fresh.start()?;
    // Until then the status is of the one before: both are process 1.
    wait_for(&agent, "second agent in sync", || agent.log().matches("in sync").count() == 2)?;
    ensure!(status(&agent)?["writes"] == 0, "the next agent found other tables: {}", status(&agent)?);
    serves(node, &netns, &result).with_context(|| agent.log())?;
    let (other, second, result) = fresh.add("cni-2")?;
    serves(node, &other, &result).with_context(|| agent.log())?;

    for (id, named) in [("cni-1", &named), ("cni-2", &second)] {
        let deleted = fresh.plugin("DEL", id)?;
        ensure!(deleted.is_ok(), "DEL of {id}: {deleted:?}");
        umount(named).with_context(|| format!("{} is still used", named.display()))?;
        fs::remove_file(named)?;
    }
    let left = fs::read_to_string(format!("/proc/{}/mountinfo", agent.first_process()?))?;
    ensure!(!left.contains("/run/netns/cni"), "the agent's container keeps a namespace:\n{left}");
    Ok(())
}

/// What the init container and the agent left on the host.
fn comes_up(fresh: &Fresh<'_>, agent: &Container) -> Result<()> {
    let host = &fresh.host;
    ensure!(kind_of(&host.path("sys/fs/bpf"))? == BPF_FS_MAGIC, "the BPF file system is not the host's");
    ensure!(host.path("sys/fs/bpf/ferroflow/maps").is_dir(), "no maps are pinned on the host");
    let plugin = host.path("opt/cni/bin/ferroflow-cni");
    ensure!(fs::read(&plugin)? == fs::read(binary()?)?, "another plugin was installed");
    ensure!(fs::metadata(&plugin)?.permissions().mode() & 0o777 == 0o755, "the plugin cannot be executed");
    let process = agent.first_process()?;
    // net_admin 12, sys_admin 21, sys_resource 24, perfmon 38, bpf 39: include/uapi/linux/capability.h
    let given = [12, 21, 24, 38, 39].into_iter().fold(0_u64, |set, bit| set | 1 << bit);
    for set in ["CapEff:", "CapBnd:"] {
        // A machine for tests may lack some itself.
        let (has, own) = (capabilities(&process.to_string(), set)?, capabilities("self", set)?);
        ensure!(has == given & own, "{set} {has:x}, not {given:x} of {own:x}");
    }
    let mounts = fs::read_to_string(format!("/proc/{process}/mountinfo"))?;
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).context("no root")?;
    ensure!(root.split(' ').nth(5).is_some_and(|it| it.starts_with("ro")), "the root can be written: {root}");
    Ok(())
}

/// A bit each.
fn capabilities(process: &str, set: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let found = text.lines().find_map(|line| line.strip_prefix(set)).context("no capabilities")?;
    Ok(u64::from_str_radix(found.trim(), 16)?)
}

fn kind_of(path: &Path) -> Result<nix::sys::statfs::FsType> {
    Ok(statfs(path).with_context(|| path.display().to_string())?.filesystem_type())
}

/// The node reaches the pod and the pod its node, over both families.
fn serves(node: &Node, netns: &Netns, result: &Value) -> Result<()> {
    let listener = netns.run(|_| TcpListener::bind(("::", HTTP_PORT)))??;
    let server = thread::spawn(move || -> std::io::Result<()> {
        for _ in Family::BOTH {
            let (mut stream, client) = listener.accept()?;
            let mut request = [0; 1024];
            let _length = stream.read(&mut request)?;
            let body =
                json!({ "by": "pod", "client": SocketAddr::new(client.ip().to_canonical(), client.port()) });
            let body = body.to_string();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            )?;
        }
        Ok(())
    });
    for address in addresses(result) {
        let target = SocketAddr::new(address.parse()?, HTTP_PORT);
        let outcomes = node.ask(&Ask::http(target))?;
        let answer = outcomes.first().and_then(|outcome| outcome.answer());
        ensure!(answer.is_some_and(|answer| answer.by == "pod"), "{target}: {outcomes:?}");
    }
    server.join().map_err(|_panic| anyhow::anyhow!("the server panicked"))??;
    Ok(())
}

/// `kubectl exec .. /ferroflow doctor`: nothing of what it needs is missing.
fn doctor(agent: &Container) -> Result<()> {
    let output = agent.exec(&["/ferroflow", "doctor", "-o", "json"])?;
    let answer: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    for check in ["kernel", "bpf", "bpffs", "cgroup2", "cni", "cni plugin", "agent", "port 10256"] {
        let found = answer["findings"].as_array().and_then(|all| all.iter().find(|it| it["check"] == check));
        ensure!(found.is_some_and(|it| it["grade"] == "OK"), "{check}: {found:?}");
    }
    Ok(())
}

fn status(agent: &Container) -> Result<Value> {
    let output = agent.exec(&["/ferroflow", "status", "-o", "json"])?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
}

/// The disk of leases has no room: ADD fails with the reason and leaves nothing, what was attached is served, DEL frees,
/// and with room again all is as before.
fn a_full_disk_attaches_no_pod(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    let fresh = Fresh::new(&cluster)?;
    let disk = fresh.host.path("var/lib/ferroflow");
    fs::create_dir_all(&disk)?;
    mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))
        .context("mount a small disk")?;
    let agent = fresh.start()?;
    let (netns, _named, result) = fresh.add("cni-1")?;
    let filler = disk.join("filler");
    let full = fs::write(&filler, vec![0; 1 << 20]);
    ensure!(full.is_err(), "the disk is not full");
    let (_other, _second) = fresh.namespace("cni-2")?;
    let refused = fresh.plugin("ADD", "cni-2")?;
    let error = refused.err().context("ADD succeeded on a full disk")?;
    ensure!(error["code"].is_u64() && error.to_string().contains("No space left"), "{error}");
    let interfaces = fresh.node.netns.interfaces()?;
    ensure!(interfaces.iter().filter(|name| name.starts_with("ff")).count() == 1, "{interfaces:?}");
    serves(fresh.node, &netns, &result).with_context(|| agent.log())?;
    is_healthy(fresh.node).with_context(|| agent.log())?;
    fs::remove_file(&filler)?;
    let added = fresh.plugin("ADD", "cni-2")?;
    ensure!(added.is_ok(), "with room again: {added:?}\n{}", agent.log());
    for id in ["cni-1", "cni-2"] {
        let deleted = fresh.plugin("DEL", id)?;
        ensure!(deleted.is_ok(), "DEL of {id}: {deleted:?}");
    }
    Ok(())
}

/// The addresses that the chart was installed with are nobody's any more.
fn the_service_is_asked_last(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    let mut fresh = Fresh::new(&cluster)?;
    let url = fresh.api.url();
    let port = url.rsplit(':').next().context("no port")?.trim_end_matches('/').to_owned();
    let gone = "https://127.0.0.1:1,https://127.0.0.1:2";
    fresh.pod = fresh.pod.argument("--api-server", gone).variable("KUBERNETES_SERVICE_PORT", &port);
    let mut agent = fresh.start()?;
    agent.kill()
}
