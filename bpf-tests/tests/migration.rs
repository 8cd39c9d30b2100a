//! A node that had kube-proxy: what it opened finishes, what is new is ours, and `cleanup` takes its rules away.
#![forbid(unsafe_code)]

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    agent::{self, Agent},
    checks::{self, ECHO_SERVICE_PORT, target},
    cluster::{Cluster, Family, Node},
    manifests::Endpoint,
    pod::{ECHO_PORT, Progress},
    runner,
    sandbox::Sandbox,
    traffic::{Ask, Client, Protocol},
};

fn main() -> ExitCode {
    runner::main(&[
        ("connections_of_kube_proxy_finish_and_its_rules_go", connections_finish),
        ("cleanup_takes_iptables_rules_of_kube_proxy_and_nothing_else", cleanup_takes_iptables_rules),
    ])
}

const SOON: Duration = Duration::from_secs(20);
const MORE: u64 = 1 << 20;

fn connections_finish(sandbox: &Sandbox) -> Result<()> {
    for socket_lb in ["tcp", "off"] {
        migrate(sandbox, socket_lb)?;
    }
    Ok(())
}

fn migrate(sandbox: &Sandbox, socket_lb: &str) -> Result<()> {
    let cluster = Cluster::new(sandbox, &["a", "b"])?;
    // One of whose endpoints is on the client's node, one on the other.
    let services = [("near", 20, "a2"), ("far", 21, "b2")];
    let manifests = cluster.manifests();
    manifests.write_cluster(&cluster)?;
    let node = cluster.node("a");
    input(node, "nft", &["-f", "-"], "add table ip mine\n")?;
    let mut targets = Vec::new();
    for (name, number, backend) in services {
        let service = checks::service(name, number);
        manifests.write_service(&service)?;
        let endpoints = Endpoint::ready(["a2", "b2"].map(|name| cluster.pod(name)));
        manifests.write_endpoints(&service, &endpoints)?;
        for family in Family::BOTH {
            let frontend = SocketAddr::new(service.ip(family), ECHO_SERVICE_PORT);
            let backend = SocketAddr::new(cluster.pod(backend).ip(family), ECHO_PORT);
            input(node, "nft", &["-f", "-"], &rules(name, frontend, backend))?;
            targets.push(frontend);
        }
    }
    let streams: Vec<Client<Progress>> =
        targets.iter().map(|target| cluster.pod("a1").stream(*target)).collect::<Result<_>>()?;
    come_further(&streams, 0)?;

    let mut agents = Vec::new();
    for name in ["a", "b"] {
        let mut agent = Agent::start(cluster.node(name), &["--socket-lb", socket_lb])?;
        agent.wait_synced()?;
        agents.push(agent);
    }
    let logs = || agents.iter().map(Agent::log_tail).collect::<Vec<_>>().join("\n");
    agents[0].wait_status(SOON, |status| status["kube_proxy"] == "present")?;
    agents[1].wait_status(SOON, |status| status["kube_proxy"] == "absent")?;
    ensure!(agents[0].log_tail().contains("kube-proxy is here"), "{}", logs());
    come_further(&streams, MORE).with_context(logs)?;
    new_ones_are_ours(&cluster).with_context(logs)?;
    come_further(&streams, MORE).with_context(logs)?;
    let before = cleanup(node, &["--dry-run"])?;
    for stream in streams {
        let last = stream.stop()?.pop().context("no report")?;
        ensure!(last.ended == Some(Ok(())), "{socket_lb}: {last:?}\n{}", logs());
    }
    for family in ["ip", "ip6"] {
        ensure!(before.contains(&format!("would remove nftables: table {family} kube-proxy")), "{before}");
    }
    let removed = cleanup(node, &[])?;
    ensure!(removed == before.replace("would remove", "removed"), "{removed}, not {before}");
    let tables = input(node, "nft", &["list", "tables"], "")?;
    ensure!(tables.contains("table ip mine") && !tables.contains("kube-proxy"), "{tables}");
    let nothing = cleanup(node, &[])?;
    ensure!(nothing.starts_with("nothing of kube-proxy is here"), "{nothing}");
    agents[0].wait_status(SOON, |status| status["kube_proxy"] == "absent")?;
    new_ones_are_ours(&cluster).with_context(logs)
}

/// Every stream has verified so many bytes more than now.
fn come_further(streams: &[Client<Progress>], more: u64) -> Result<()> {
    for stream in streams {
        let verified = |seen: &[Progress]| seen.last().map_or(0, |it| it.verified);
        let now = std::cell::Cell::new(None);
        stream.wait_until(SOON, |seen| {
            let first = now.get().unwrap_or_else(|| verified(seen));
            now.set(Some(first));
            verified(seen) > first + more
        })?;
    }
    Ok(())
}

/// Both backends answer: the rules of kube-proxy have one each.
fn new_ones_are_ours(cluster: &Cluster) -> Result<()> {
    for number in [20, 21] {
        let service = checks::service("any", number);
        for family in Family::BOTH {
            for protocol in [Protocol::Http, Protocol::Dns] {
                let to = target(&service, protocol, family);
                let outcomes = cluster.pod("a1").ask(&Ask::new(protocol, to).count(40))?;
                let by = checks::tally(&outcomes, to, cluster.pod("a1").ip(family))?;
                ensure!(by.keys().eq(["a2", "b2"]), "{protocol} {to}: {by:?}");
            }
            let echo = SocketAddr::new(service.ip(family), ECHO_SERVICE_PORT);
            let stream = cluster.pod("a1").stream(echo)?;
            stream.wait_until(SOON, |seen| seen.last().is_some_and(|it| it.verified > 0))?;
            let last = stream.stop()?.pop().context("no report")?;
            ensure!(last.ended == Some(Ok(())), "{echo}: {last:?}");
        }
    }
    Ok(())
}

/// What kube-proxy's nftables mode has for a service of one endpoint; said again, it stays once.
fn rules(name: &str, frontend: SocketAddr, backend: SocketAddr) -> String {
    let (family, kind) = match frontend.ip() {
        IpAddr::V4(_) => ("ip", "ipv4_addr"),
        IpAddr::V6(_) => ("ip6", "ipv6_addr"),
    };
    let (ip, port) = (frontend.ip(), frontend.port());
    let table = format!("{family} kube-proxy");
    let service = format!("service-ABCDEFGH-default/{name}/tcp/echo");
    let endpoint = format!("endpoint-HGFEDCBA-default/{name}/tcp/echo__{}/{}", backend.ip(), backend.port());
    let endpoint = endpoint.replace(':', ".");
    format!(
        "add table {table}\n\
         add map {table} service-ips {{ type {kind} . inet_proto . inet_service : verdict ; }}\n\
         add chain {table} services\n\
         flush chain {table} services\n\
         add chain {table} nat-prerouting {{ type nat hook prerouting priority -100 ; }}\n\
         flush chain {table} nat-prerouting\n\
         add chain {table} {endpoint}\n\
         add rule {table} {endpoint} meta l4proto tcp dnat to {backend}\n\
         add chain {table} {service}\n\
         add rule {table} {service} numgen random mod 1 vmap {{ 0 : goto {endpoint} }}\n\
         add element {table} service-ips {{ {ip} . tcp . {port} : goto {service} }}\n\
         add rule {table} services {family} daddr . meta l4proto . th dport vmap @service-ips\n\
         add rule {table} nat-prerouting jump services\n"
    )
}

/// Both kinds and families, with chains of the kubelet and of the administrator beside.
fn cleanup_takes_iptables_rules(sandbox: &Sandbox) -> Result<()> {
    let cluster = Cluster::with_pods(sandbox, &["a"], 1)?;
    let node = cluster.node("a");
    let kinds = ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"];
    let mut before = Vec::new();
    for kind in kinds {
        let restore = format!("{kind}-restore");
        input(node, &restore, &[], KEPT)?;
        before.push(rules_of(node, kind)?);
        input(node, &restore, &["--noflush"], GONE)?;
        ensure!(rules_of(node, kind)?.contains("KUBE-SVC-"), "{kind}: the rules are not there");
    }
    let said = cleanup(node, &["--dry-run"])?;
    for kind in kinds {
        for what in [
            "table filter: 1 jumps, 2 chains",
            "table nat: 2 jumps, 5 chains",
            "table mangle: 0 jumps, 1 chains",
        ] {
            ensure!(said.contains(&format!("would remove {kind}: {what}")), "{kind} {what}:\n{said}");
        }
        ensure!(rules_of(node, kind)?.contains("KUBE-SVC-"), "{kind}: a dry run removed something");
    }
    cleanup(node, &[])?;
    for (kind, before) in kinds.into_iter().zip(before) {
        let after = rules_of(node, kind)?;
        // Tables that were not in use before may be there now, empty.
        let (lost, more): (Vec<_>, Vec<_>) = (
            before.lines().filter(|line| !after.contains(line)).collect(),
            after.lines().filter(|line| line.contains("KUBE") && !before.contains(line)).collect(),
        );
        ensure!(lost.is_empty() && more.is_empty(), "{kind}: lost {lost:?}, left {more:?}");
    }
    let again = cleanup(node, &[])?;
    ensure!(again.starts_with("nothing of kube-proxy is here"), "{again}");
    Ok(())
}

const KEPT: &str = "*filter\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\n-A FORWARD -p tcp --dport 25 -j DROP\nCOMMIT\n\
                    *mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n\
                    *nat\n:MINE - [0:0]\n-A PREROUTING -j MINE\nCOMMIT\n";

const GONE: &str = "*filter\n:KUBE-FORWARD - [0:0]\n:KUBE-PROXY-CANARY - [0:0]\n\
                    -A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD\n\
                    -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\nCOMMIT\n\
                    *mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n\
                    *nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-AB12 - [0:0]\n:KUBE-SEP-CD34 - [0:0]\n\
                    :KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n\
                    -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                    -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
                    -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
                    -A KUBE-SERVICES -p tcp -m comment --comment \"default/web:http cluster IP\" -m tcp --dport 80 -j KUBE-SVC-AB12\n\
                    -A KUBE-SVC-AB12 -m comment --comment \"default/web:http -> x\" -j KUBE-SEP-CD34\n\
                    -A KUBE-SEP-CD34 -j KUBE-MARK-MASQ\nCOMMIT\n";

/// Without comments, which have the time.
fn rules_of(node: &Node, kind: &str) -> Result<String> {
    let text = input(node, &format!("{kind}-save"), &[], "")?;
    // Counters of built-in chains run.
    let plain = |line: &str| line.split(" [").next().unwrap_or_default().to_owned();
    Ok(text.lines().filter(|line| !line.starts_with('#')).map(plain).collect::<Vec<_>>().join("\n"))
}

fn cleanup(node: &Node, args: &[&str]) -> Result<String> {
    let binary = agent::binary()?;
    let binary = binary.to_str().context("the binary's path is not UTF-8")?;
    input(node, binary, &[&["cleanup"], args].concat(), "")
}

/// What a command in the node's network writes.
fn input(node: &Node, program: &str, args: &[&str], text: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = node.netns.spawn(command)?;
    child.stdin.take().context("no input")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{program} {args:?}: {error}\n{text}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
