//! The verbs about the machine, on machines that are well, unwell, and used.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::Write as _,
    net::{TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    agent::{Agent, binary},
    checks::{World, failures, pod_target, service, target},
    cluster::{Cluster, Family, Node},
    manifests::Endpoint,
    metrics::is_healthy,
    netns::Netns,
    patience::stretched,
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Protocol},
};
use nix::mount::{MsFlags, mount, umount};
use serde_json::Value;

fn main() -> ExitCode {
    runner::main(&[
        ("cleanup_leaves_the_node_as_it_was", cleanup_leaves_the_node_as_it_was),
        ("cleanup_leaves_the_node_as_it_was_under_clsact", cleanup_leaves_the_node_as_it_was_under_clsact),
        ("doctor_names_what_is_wrong_and_the_way_out", doctor_names_what_is_wrong_and_the_way_out),
        ("an_agent_in_a_container_can_set_up_interfaces", an_agent_in_a_container_can_set_up_interfaces),
        ("a_run_that_cannot_be_written_is_said_and_costs_no_service", a_run_that_cannot_be_written_is_said),
        ("prepare_mounts_and_installs_once", prepare_mounts_and_installs_once),
    ])
}

const SOON: Duration = Duration::from_secs(20);

/// The directories that a node's verbs are told.
struct Places(PathBuf);

impl Places {
    fn create(node: &Node) -> Result<Self> {
        let places = Self(node.logs.join(format!("places-{}", node.name)));
        for name in ["net.d", "bin", "state", "run"] {
            fs::create_dir_all(places.0.join(name))?;
        }
        Ok(places)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.0.join(name), text).with_context(|| format!("write {name}"))
    }

    fn has(&self, name: &str) -> bool {
        self.0.join(name).exists()
    }

    fn args(&self) -> Vec<String> {
        let flags =
            [("cni-conf-dir", "net.d"), ("cni-bin-dir", "bin"), ("state-dir", "state"), ("run-dir", "run")];
        flags.map(|(flag, name)| format!("--{flag}={}", self.0.join(name).display())).into()
    }
}

/// Runs a verb in the node's network; it may fail.
fn verb(node: &Node, places: &Places, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(binary()?);
    command.args(args).arg("--bpffs").arg(&node.bpffs).args(places.args());
    run(node, command)
}

fn run(node: &Node, mut command: Command) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(node.netns.spawn(command)?.wait_with_output()?)
}

/// What a line of shell prints; it must succeed.
fn tool(node: &Node, line: &str) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    let output = run(node, command)?;
    ensure!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn removed(output: &Output) -> Result<Vec<String>> {
    let answer: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    ensure!(answer["failed"] == serde_json::json!([]), "{answer}");
    Ok(serde_json::from_value(answer["removed"].clone())?)
}

/// Over an API, because pods there are another plugin's, and stay.
fn cleanup_leaves_the_node_as_it_was(sandbox: &Sandbox) -> Result<()> {
    World::test_over_api(sandbox, &[], |world| cleanup(world, ""))
}

fn cleanup_leaves_the_node_as_it_was_under_clsact(sandbox: &Sandbox) -> Result<()> {
    World::test_over_api(sandbox, &["--attach", "clsact"], |world| {
        // Another's filter on the same qdisc, which matches nothing.
        let node = world.cluster.node("a");
        tool(node, "tc filter add dev pod-a1 ingress prio 7 bpf bytecode '1,6 0 0 0'")?;
        cleanup(world, "bytecode")
    })
}

/// `stays` is part of what `tc` shows on the interface of pod a1 before and after.
fn cleanup(world: &mut World, stays: &str) -> Result<()> {
    let node = world.cluster.node("a");
    let places = Places::create(node)?;
    places.write(
        "net.d/05-ferroflow.conflist",
        r#"{"name": "ferroflow", "plugins": [{"type": "ferroflow-cni"}]}"#,
    )?;
    places.write("net.d/99-other.conflist", r#"{"name": "other", "plugins": [{"type": "bridge"}]}"#)?;
    for name in ["bin/ferroflow-cni", "bin/bridge", "state/leases.json", "run/cni.sock"] {
        places.write(name, "")?;
    }
    std::os::unix::fs::symlink("ferroflow-cni", places.0.join("bin/loopback"))?;
    tool(node, "ip link add ff0123456789ab type veth peer name other0")?;
    tool(node, "ip link add ff01234 type veth peer name other1")?;

    let early = verb(node, &places, &["cleanup", "--all"])?;
    let said = String::from_utf8_lossy(&early.stderr);
    ensure!(!early.status.success() && said.contains("an agent is running"), "not refused: {said}");

    let agent = world.agents.first_mut().context("no agent")?;
    agent.kill9()?;
    let planned = removed(&verb(node, &places, &["cleanup", "--all", "--dry-run", "-o", "json"])?)?;
    ensure!(
        places.has("net.d/05-ferroflow.conflist") && node.bpffs.join("maps/frontends").exists(),
        "{planned:?}"
    );
    let done = removed(&verb(node, &places, &["cleanup", "--all", "-o", "json"])?)?;
    ensure!(done == planned, "planned {planned:#?}, done {done:#?}");
    is_clean(node, &places, stays)?;

    let again = verb(node, &places, &["cleanup", "--all"])?;
    let said = String::from_utf8_lossy(&again.stdout);
    ensure!(again.status.success() && said.trim() == "nothing of Ferroflow is here", "again: {said}");
    still_routes(world)?;
    starts_anew(world)
}

fn is_clean(node: &Node, places: &Places, stays: &str) -> Result<()> {
    ensure!(!node.bpffs.exists(), "{} is still there", node.bpffs.display());
    for gone in ["net.d/05-ferroflow.conflist", "bin/ferroflow-cni", "state", "run"] {
        ensure!(!places.has(gone), "{gone} is still there");
    }
    ensure!(!places.0.join("bin/loopback").is_symlink(), "our loopback plugin is still there");
    for other in ["net.d/99-other.conflist", "bin/bridge"] {
        ensure!(places.has(other), "{other} was another's");
    }
    let links = tool(node, "ip -brief link")?;
    ensure!(!links.contains("ff0123456789ab") && links.contains("ff01234@"), "{links}");
    let programs = tool(node, "bpftool net")?;
    for name in ["pod_egress", "pod_ingress", "device_ingress", "device_egress"] {
        ensure!(!programs.contains(name), "{programs}");
    }
    let filters = tool(node, "tc filter show dev pod-a1 ingress").unwrap_or_default();
    ensure!(filters.contains(stays), "another's filter is gone: {filters}");
    let qdiscs = tool(node, "tc qdisc show")?;
    let left = qdiscs.lines().filter(|line| line.contains("clsact")).collect::<Vec<_>>();
    ensure!(left.len() == usize::from(!stays.is_empty()), "{left:?}");
    let attached = tool(node, &format!("bpftool cgroup show {}", node.cgroup.display()))?;
    ensure!(!attached.contains("connect4"), "{attached}");
    Ok(())
}

/// Without us the kernel does what its own routes say.
fn still_routes(world: &World) -> Result<()> {
    let target = pod_target(world.cluster.pod("a2"), Protocol::Http, Family::V4);
    let outcomes = world.cluster.pod("a1").http(target, 5)?;
    let failed = failures(&outcomes);
    ensure!(outcomes.len() == 5 && failed.starts_with("0 of"), "{failed}");
    Ok(())
}

fn starts_anew(world: &mut World) -> Result<()> {
    let node = world.cluster.node("a");
    fs::create_dir_all(&node.bpffs)?;
    let agent = world.agents.first_mut().context("no agent")?;
    agent.restart()?;
    agent.wait_synced()?;
    world.spread("a1", Protocol::Http, Family::V4).into_result()
}

fn doctor_names_what_is_wrong_and_the_way_out(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 1)?;
    let node = cluster.node("a");
    let places = Places::create(node)?;
    let settings = ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/all/rp_filter"];
    for (name, value) in settings.into_iter().zip(["0", "0", "1"]) {
        node.netns.sysctl(name, value)?;
    }
    places.write("net.d/00-other.conflist", r#"{"name": "other", "plugins": [{"type": "bridge"}]}"#)?;
    let run = places.0.join("run");
    tmpfs(&run, MsFlags::MS_RDONLY)?;
    let taken = node.netns.run(|_| TcpListener::bind("127.0.0.1:10256"))??;
    expect(
        node,
        &places,
        &[
            (
                "forwarding",
                "WARN",
                "sysctl -w net.ipv4.ip_forward=1; sysctl -w net.ipv6.conf.all.forwarding=1",
            ),
            ("rp_filter", "WARN", "rp_filter=2"),
            ("cni", "FAIL", "00-other.conflist"),
            ("port 10256", "FAIL", "sport = :10256"),
            ("port 10249", "OK", ""),
            ("agent", "WARN", "start it"),
            ("run directory", "FAIL", "remount,rw"),
            ("state directory", "OK", ""),
            ("cni directory", "OK", ""),
            ("kernel", "OK", ""),
            ("bpf", "OK", ""),
            ("bpffs", "OK", ""),
            ("cgroup2", "OK", ""),
            ("mtu", "OK", ""),
        ],
    )?;

    drop(taken);
    umount(&run)?;
    for (name, value) in settings.into_iter().zip(["1", "1", "2"]) {
        node.netns.sysctl(name, value)?;
    }
    fs::remove_file(places.0.join("net.d/00-other.conflist"))?;
    tool(node, "ip link set dev eth0 mtu 1000")?;
    cluster.manifests().write_cluster(&cluster)?;
    let mut agent = Agent::start(node, &[])?;
    agent.wait_synced()?;
    expect(
        node,
        &places,
        &[
            ("forwarding", "OK", ""),
            ("rp_filter", "OK", ""),
            ("cni", "OK", ""),
            ("port 10256", "OK", ""),
            ("agent", "OK", ""),
            ("run directory", "OK", ""),
            ("mtu", "FAIL", "mtu 1280"),
        ],
    )
}

/// Holds checks to their grade and a part of their way out, and the exit code to all of them.
fn expect(node: &Node, places: &Places, wanted: &[(&str, &str, &str)]) -> Result<()> {
    let cgroup = format!("--cgroup={}", node.cgroup.display());
    let output = verb(node, places, &["doctor", "-o", "json", &cgroup])?;
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    let findings = answer["findings"].as_array().context("no findings")?;
    for (check, grade, fix) in wanted {
        let found = findings.iter().find(|finding| finding["check"] == *check);
        let found = found.with_context(|| format!("no check `{check}`"))?;
        ensure!(found["grade"] == *grade, "{found}, not {grade}");
        let said = found["fix"].as_str().unwrap_or_default();
        ensure!(said.contains(fix) && said.is_empty() == (*grade == "OK"), "{found}: no `{fix}`");
    }
    let fails = findings.iter().filter(|finding| finding["grade"] == "FAIL").count();
    ensure!(
        answer["failed"] == fails && output.status.success() == (fails == 0),
        "{fails} fail: {}",
        output.status
    );
    Ok(())
}

fn tmpfs(dir: &Path, flags: MsFlags) -> Result<()> {
    let none: Option<&str> = None;
    let mounted = mount(Some("tmpfs"), dir, Some("tmpfs"), flags, none);
    mounted.with_context(|| format!("mount a file system at {}", dir.display()))
}

const CHECK_PORT: u16 = 31_041;

/// There are neither a socket for the plugin nor answers to load balancers' checks of Services, which the log and the status
/// say once; and both are there as soon as they can be.
fn a_run_that_cannot_be_written_is_said(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 1)?;
    let (node, manifests) = (cluster.node("a"), cluster.manifests());
    let mut web = service("web", 10);
    web.more = format!("  externalTrafficPolicy: Local\n  healthCheckNodePort: {CHECK_PORT}\n");
    manifests.write_cluster(&cluster)?;
    manifests.write("service-web", &web.yaml().replace("type: ClusterIP", "type: LoadBalancer"))?;
    manifests.write_endpoints(&web, &Endpoint::ready([cluster.pod("a1")]))?;
    let (places, run) = (Places::create(node)?, node.logs.join(format!("{}-run", node.name)));
    fs::create_dir(&run)?;
    tmpfs(&run, MsFlags::MS_RDONLY)?;
    let [socket, state, conf] = [run.join("cni.sock"), places.0.join("state"), places.0.join("net.d")];
    let flags = [("cni-socket", &socket), ("state-dir", &state), ("cni-conf-dir", &conf)];
    let flags = flags.map(|(flag, path)| format!("--{flag}={}", path.display()));
    let mut agent = Agent::start(node, &["--cni", &flags[0], &flags[1], &flags[2]])?;
    agent.wait_synced()?;
    agent.wait_status(SOON, |status| status["health_problems"] == 1)?;
    for family in Family::BOTH {
        let outcomes = node.ask(&Ask::http(target(&web, Protocol::Http, family)).count(5).strict())?;
        ensure!(outcomes.iter().all(|it| it.answer().is_some()), "{outcomes:?}\n{}", agent.log_tail());
    }
    is_healthy(node)?;
    // It has tried again by then.
    thread::sleep(Duration::from_secs(6));
    let said = agent.log()?;
    for (path, flag) in [(&socket, "--cni-socket"), (&run.join("health.json"), "--run-dir")] {
        let of_it = |line: &&str| line.contains(&*path.to_string_lossy()) && line.contains(flag);
        let lines: Vec<_> = said.lines().filter(of_it).collect();
        ensure!(lines.len() == 1 && lines[0].contains("Read-only file system"), "{flag}: {lines:#?}\n{said}");
    }
    ensure!(
        !conf.join("05-ferroflow.conflist").exists(),
        "the runtime is told of a socket that is not there"
    );

    let none: Option<&str> = None;
    mount(none, &run, none, MsFlags::MS_REMOUNT, none).context("make it writable")?;
    agent.wait_status(SOON, |status| status["health_problems"] == 0)?;
    let there = |what: &dyn Fn() -> bool| -> Result<()> {
        let deadline = Instant::now() + stretched(SOON);
        while !what() {
            ensure!(Instant::now() < deadline, "not all is there\n{}", agent.log_tail());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    there(&|| socket.exists() && conf.join("05-ferroflow.conflist").exists())?;
    there(&|| node.netns.run(|_| TcpStream::connect(("127.0.0.1", CHECK_PORT)).is_ok()).unwrap_or(false))?;
    // Its process ends with the Service.
    manifests.remove("service-web")?;
    there(&|| !run.join("health.json").exists())?;
    there(&|| node.netns.run(|_| TcpStream::connect(("127.0.0.1", CHECK_PORT)).is_err()).unwrap_or(false))
}

/// With the capabilities that the chart gives and /proc/sys as container runtimes mount it.
fn an_agent_in_a_container_can_set_up_interfaces(sandbox: &Sandbox) -> Result<()> {
    const CONTAINER: &str = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && \
        ! echo 1 2>/dev/null > /proc/sys/net/ipv4/ip_forward && CAPS=+bpf,+perfmon,+net_admin,+sys_admin,+sys_resource && \
        exec setpriv --bounding-set=-all,$CAPS \"$0\" \"$@\"";
    let cluster = Cluster::with_pods(sandbox, &["a"], 1)?;
    cluster.manifests().write_cluster(&cluster)?;
    let node = cluster.node("a");
    let mut agent = Agent::start_under(node, &["unshare", "--mount", "sh", "-c", CONTAINER], &[])?;
    let status = agent.wait_synced()?;
    let root = format!("/proc/{}", status["pid"]);
    let mounts = fs::read_to_string(format!("{root}/mounts"))?;
    let settings = mounts.lines().rfind(|line| line.contains(" /proc/sys "));
    ensure!(settings.is_some_and(|line| line.contains(" rw,")), "/proc/sys: {settings:?}");
    // net_admin 12, sys_admin 21, sys_resource 24, perfmon 38, bpf 39: include/uapi/linux/capability.h
    let given = [12, 21, 24, 38, 39].into_iter().fold(0_u64, |set, bit| set | 1 << bit);
    let (has, own) = (capabilities(&root)?, capabilities("/proc/self")?);
    ensure!(has == given & own, "the agent has {has:x}, not {given:x} of {own:x}");
    Ok(())
}

/// Those that are in effect, a bit each.
fn capabilities(process: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("{process}/status"))?;
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff")?;
    Ok(u64::from_str_radix(set.trim(), 16)?)
}

fn prepare_mounts_and_installs_once(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 0)?;
    let node = cluster.node("a");
    let places = Places::create(node)?;
    let bin = places.0.join("bin");
    let prepare = || -> Result<String> {
        let mut command = Command::new(binary()?);
        command.arg("prepare").arg("--bpffs").arg(&node.bpffs).arg("--cni-bin-dir").arg(&bin);
        let output = run(node, command)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    ensure!(prepare()?.contains("installed "), "not installed");
    ensure!(prepare()?.contains("is this version"), "installed again");
    same(&bin.join("ferroflow-cni"), &binary()?)?;
    ensure!(node.bpffs.join("maps").is_dir(), "no directory for maps");
    let mut names: Vec<_> =
        fs::read_dir(&bin)?.map(|it| it.map(|it| it.file_name())).collect::<Result<_, _>>()?;
    names.sort();
    ensure!(names == ["ferroflow-cni", "loopback"], "{names:?}");
    loopback_comes_up(node, &bin)?;
    let refuses = |bpffs: &Path| -> Result<String> {
        let mut elsewhere = Command::new(binary()?);
        elsewhere.arg("prepare").arg("--bpffs").arg(bpffs);
        let refused = run(node, elsewhere)?;
        ensure!(!refused.status.success(), "{} was taken for a BPF file system", bpffs.display());
        Ok(String::from_utf8(refused.stderr)?)
    };
    ensure!(refuses(&bin)?.contains("mount -t bpf"), "no way out");
    let locked = places.0.join("locked");
    fs::create_dir(&locked)?;
    mount(Some("bpf"), &locked, Some("bpf"), MsFlags::MS_RDONLY, None::<&str>)?;
    let said = refuses(&locked)?;
    ensure!(said.contains(&*locked.to_string_lossy()) && said.contains("remount,rw"), "{said}");
    Ok(umount(&locked)?)
}

/// As containerd runs it for every pod, before the pod's network.
fn loopback_comes_up(node: &Node, bin: &Path) -> Result<()> {
    let pod = Netns::new("pod")?;
    pod.run(|inside| inside.down("lo"))??;
    let addresses =
        || pod.run(|_| [UdpSocket::bind("127.0.0.1:0").is_ok(), UdpSocket::bind("[::1]:0").is_ok()]);
    ensure!(pod.proc_net("if_inet6")?.is_empty(), "lo is not down");
    let plugin = |command: &str| -> Result<Output> {
        let mut plugin = Command::new(bin.join("loopback"));
        plugin.env_clear().env("CNI_COMMAND", command).env("CNI_CONTAINERID", "pod").env("CNI_IFNAME", "lo");
        plugin.env("CNI_NETNS", pod.path()?).env("CNI_PATH", bin);
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = node.netns.spawn(plugin)?;
        let config = r#"{"cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback"}"#;
        child.stdin.take().context("no standard input")?.write_all(config.as_bytes())?;
        Ok(child.wait_with_output()?)
    };
    for _again in 0..2 {
        let added = plugin("ADD")?;
        ensure!(added.status.success(), "{}", String::from_utf8_lossy(&added.stdout));
        let answer: Value = serde_json::from_slice(&added.stdout)?;
        ensure!(answer["ips"][0]["address"] == "127.0.0.1/8" && answer["cniVersion"] == "0.3.1", "{answer}");
        ensure!(addresses()? == [true, true], "{:?}", addresses()?);
    }
    let removed = plugin("DEL")?;
    ensure!(removed.status.success() && removed.stdout.is_empty(), "{removed:?}");
    Ok(())
}

fn same(left: &Path, right: &Path) -> Result<()> {
    ensure!(fs::read(left)? == fs::read(right)?, "{} is another binary", left.display());
    Ok(())
}
