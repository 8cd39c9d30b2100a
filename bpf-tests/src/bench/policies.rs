//! What policies cost. A cluster of 5,000 pods, 100 of them here, and more and more policies; the agent's own stages over the
//! kernel's tables, and packets through the program in the kernel.
//!
//! ```text
//!   objects ──▶ tables                  from cold; memory of the tables
//!   one relabelled pod ──▶ tables
//!   one relabelled pod, one new pod of another node ──▶ the program takes its packet otherwise
//!   packets between two pods of this node: the program alone, again and again
//! ```
//!
//! What an event waits for before it is read is not measured here. Of a packet, what an empty program costs by the same
//! measure is told beside it: a packet that is neither IPv4 nor IPv6 leaves the program at once.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use ferroflow::{
    maps::kernel::KernelMaps,
    model::{
        Change, Labels, Name, NetworkPolicy, Pod, Prefix,
        label::{Requirement, Selector},
        policy::{Block, Namespaces, Peer, PolicyPort, PortNumber, Rule},
    },
    reconcile::{Config, Limits, Reconciler},
};
use ferroflow_common::{
    addr::{Addr, Port, Proto},
    tcp::Flags,
};
use ferroflow_ebpf::frame::Frame;

use super::{add_changes, control::write_all, figure::Report, stats};
use crate::{
    run::{Action, DEFAULTS, Program, Programs},
    sandbox::Sandbox,
};

const POLICIES: [u32; 3] = [10, 100, 1_000];
const PODS: u32 = 5_000;
/// One pod of so many is of this node.
const LOCAL: u32 = 50;
const NODE: &str = "here";
const RELABELS: u32 = 300;
const RUNS: usize = 5;
const REPEAT: u32 = 200_000;
const FIRST_PACKETS: u16 = 2_000;
/// What addresses are, and what is said of them.
const PEERS: [&str; 2] = ["ipcache", "ipcache_ranges"];
const RULES: [&str; 4] = ["policy", "port_ranges", "policy_sets", "peer_classes"];

pub(super) fn measure(sandbox: &Sandbox, report: &mut Report) -> Result<()> {
    for policies in POLICIES {
        let mut programs = Programs::load(&sandbox.place()?, DEFAULTS)?;
        let mut agent = agent(programs.maps()?)?;
        let size = policies as usize;
        for object in cluster() {
            agent.handle(object, Instant::now());
        }
        agent.synced();
        write_all(&mut agent)?;
        let open = established(&mut programs)?;
        // From cold: as if the policies had been there when the agent started.
        let mut programs = Programs::load(&sandbox.place()?, DEFAULTS)?;
        let mut agent = self::agent(programs.maps()?)?;
        let objects: Vec<_> = cluster().chain((0..policies).map(policy)).chain([gate()]).collect();
        let start = Instant::now();
        for object in objects {
            agent.handle(object, start);
        }
        agent.synced();
        write_all(&mut agent)?;
        let cold = start.elapsed().as_secs_f64() * 1e3;
        report.add_value("policy/tables/ferroflow", size, (cold, "ms"))?;
        add_changes(report, ("policy-relabel", size), &relabels(&mut agent)?)?;
        add_changes(report, ("policy-enforced", size), &enforced(&mut agent, &mut programs)?)?;
        add_changes(report, ("policy-new-peer", size), &new_peers(&mut agent, &mut programs)?)?;
        for (figure, tables) in [("ipcache", &PEERS[..]), ("policy", &RULES)] {
            let bytes: u64 = tables.iter().map(|table| memory(&programs, table)).sum::<Result<_>>()?;
            report.add_value(
                &format!("memory/{figure}-tables/ferroflow"),
                size,
                (bytes as f64 / 1e6, "MB"),
            )?;
        }
        for (figure, nanoseconds) in [
            ("empty-program", empty(&mut programs)?),
            ("established-without", open),
            ("established-packet", established(&mut programs)?),
            ("first-packet", first(&mut programs)?),
            ("refused-packet", refused(&mut programs)?),
        ] {
            report.add_value(&format!("policy/{figure}/ferroflow"), size, (nanoseconds, "ns"))?;
        }
    }
    Ok(())
}

fn agent(maps: KernelMaps) -> Result<Reconciler<KernelMaps>> {
    let (limits, plan) = (Limits { services: 1, frontends: 1 }, ferroflow::plan::Config::default());
    let config = Config { node: NODE.into(), limits, plan, grace: Duration::from_secs(2), clock: || 0 };
    Ok(Reconciler::restore(maps, &config, Instant::now())?)
}

/// Pods, and where those of this node are.
fn cluster() -> impl Iterator<Item = Change> {
    let pods = (0..PODS).map(|it| pod(it, &(it / 10).to_string()));
    pods.chain((0..PODS).step_by(LOCAL as usize).map(|it| Change::LocalRoute(addr(it), Some(1))))
}

/// From the changed object of a pod, of this node or of another, to the tables.
fn relabels(agent: &mut Reconciler<KernelMaps>) -> Result<Vec<Duration>> {
    let change = |round: u32| pod(round * 7 % PODS, &(round % 500).to_string());
    (0..RELABELS).map(|round| written(agent, change(round))).collect()
}

/// From the object of a pod of this node that becomes a peer, or is one no more, to its packet that passes, or does not.
fn enforced(agent: &mut Reconciler<KernelMaps>, programs: &mut Programs) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    for round in 0..RELABELS {
        let (app, expected) = if round % 2 == 0 { (GATE, Action::Redirect) } else { ("0", Action::Drop) };
        let packet = opens(OTHER, 20_000 + round as u16, WEB);
        let change = pod(OTHER, app);
        let start = Instant::now();
        written(agent, change)?;
        let (action, _) = programs.run(Program::PodEgress, &packet)?;
        took.push(start.elapsed());
        ensure!(action == expected, "{action:?} at {app}");
    }
    Ok(took)
}

/// From the object of a new pod of another node to its packet that passes.
fn new_peers(agent: &mut Reconciler<KernelMaps>, programs: &mut Programs) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    for number in (PODS..).take(RELABELS as usize) {
        let packet = opens(number, 20_000, WEB);
        // By the loopback, which the packet of a test run has come by.
        let (before, _) = programs.run_on(Program::PodIngress, 1, &packet)?;
        let change = pod(number, GATE);
        let start = Instant::now();
        written(agent, change)?;
        let (after, _) = programs.run_on(Program::PodIngress, 1, &packet)?;
        took.push(start.elapsed());
        ensure!((before, after) == (Action::Drop, Action::Next), "{before:?}, then {after:?}");
    }
    Ok(took)
}

fn written(agent: &mut Reconciler<KernelMaps>, change: Change) -> Result<Duration> {
    let start = Instant::now();
    agent.handle(change, start);
    write_all(agent)?;
    Ok(start.elapsed())
}

/// The best of some runs: what a packet of no network protocol costs.
fn empty(programs: &mut Programs) -> Result<f64> {
    best(programs, &[&[0xff; 12][..], &[8, 6], &[0; 28]].concat())
}

/// A packet between two pods of this node in the middle of a connection, which policies allow where there are any.
fn established(programs: &mut Programs) -> Result<f64> {
    let (client, server) = ((addr(PEER), 40_000), (addr(SERVER), WEB));
    let flags = [(client, server, Flags::SYN), (server, client, Flags::SYN | Flags::ACK)];
    for (from, to, flags) in flags {
        let (action, _) = programs.run(Program::PodEgress, &Frame::tcp(from, to, flags).build())?;
        ensure!(action == Action::Redirect, "{action:?} of what may pass");
    }
    best(programs, &Frame::tcp(client, server, Flags::ACK).build())
}

/// The median of packets that open a connection each, less what a single run of an empty program takes by the clock.
fn first(programs: &mut Programs) -> Result<f64> {
    programs.set_tracked(&BTreeMap::new())?;
    let arp = [&[0xff; 12][..], &[8, 6], &[0; 28]].concat();
    let (mut took, mut idle) = (Vec::new(), Vec::new());
    for port in (10_000..).take(FIRST_PACKETS.into()) {
        took.push(programs.time(Program::PodEgress, &opens(PEER, port, WEB), 1)?.as_nanos() as f64);
        idle.push(programs.time(Program::PodEgress, &arp, 1)?.as_nanos() as f64);
    }
    let [took, idle] = [took, idle].map(|values| stats::median(&values));
    took.zip(idle).map(|(took, idle)| took - idle).context("no packet was measured")
}

/// A packet that policies do not let through: it asks what a first packet asks, and tracks nothing.
fn refused(programs: &mut Programs) -> Result<f64> {
    best(programs, &opens(PEER, 40_000, WEB + 1))
}

/// The best of some runs, in nanoseconds.
fn best(programs: &mut Programs, packet: &[u8]) -> Result<f64> {
    let runs = (0..RUNS).map(|_| programs.time(Program::PodEgress, packet, REPEAT));
    let best = runs.collect::<Result<Vec<_>>>()?.into_iter().min().context("no run")?;
    Ok(best.as_nanos() as f64)
}

/// The first packet of a connection to the server.
fn opens(from: u32, port: u16, to: u16) -> Vec<u8> {
    Frame::tcp((addr(from), port), (addr(SERVER), to), Flags::SYN).build()
}

/// What the kernel has for a table.
fn memory(programs: &Programs, table: &str) -> Result<u64> {
    let map = MapData::from_pin(programs.pin(table))?;
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok());
    let bytes: u64 = bytes.with_context(|| format!("{path} does not say memlock"))?;
    ensure!(bytes > 0, "{table} has no memory");
    Ok(bytes)
}

fn addr(number: u32) -> Addr {
    let [_, _, high, low] = number.to_be_bytes();
    Addr::v4([10, 1, high, low])
}

fn pod(number: u32, app: &str) -> Change {
    let name = format!("p{number}");
    let tier = if number.is_multiple_of(2) { "web" } else { "db" };
    let labels = Labels::new([("app", app), ("pod", &*name), ("tier", tier)]);
    let node = if number < PODS && number.is_multiple_of(LOCAL) { NODE } else { "there" };
    let object = Pod { node: node.into(), addresses: Box::new([addr(number)]), labels, ..Pod::default() };
    Change::Pod(Name::new(namespace(number / 10), name), Some(object))
}

fn namespace(number: u32) -> String {
    format!("n{}", number % 20)
}

/// Pods of this node: a server that policies isolate, one that they let in, and one that they let in for a while.
const SERVER: u32 = LOCAL;
const PEER: u32 = 2 * LOCAL;
const OTHER: u32 = 3 * LOCAL;
const GATE: &str = "gate";
const WEB: u16 = 80;

fn rule(peer: Peer, port: u16) -> Rule {
    let number = PortNumber::Range(Port::new(port), Port::new(port));
    Rule { peers: Box::new([peer]), ports: Box::new([PolicyPort { proto: Proto::TCP, number }]) }
}

/// Lets one application in from another and from a range of the world.
fn policy(number: u32) -> Change {
    let app = |number: u32| Selector::new([Requirement::equals("app", (number % 500).to_string())]);
    let near = Peer::Pods { namespaces: Namespaces::Own, pods: app(number + 20) };
    let range = Prefix::around(Addr::v4([172, 16, (number % 256) as u8, 0]), 24);
    let far = range.map(|range| rule(Peer::Block(Block { range, except: Box::default() }), 443));
    // Every hundredth is about pods of this node that packets are sent to.
    let pods = if number.is_multiple_of(100) { Selector::default() } else { app(number) };
    let ingress = Some([rule(near, WEB)].into_iter().chain(far).collect());
    let policy = NetworkPolicy { pods, ingress, ..NetworkPolicy::default() };
    let namespace = if number.is_multiple_of(100) { namespace(SERVER / 10) } else { namespace(number) };
    Change::NetworkPolicy(Name::new(namespace, format!("np{number}")), Some(policy))
}

/// Lets the server's port be reached by [`PEER`] and by whoever has the label.
fn gate() -> Change {
    let with = |key: &str, value: String| Selector::new([Requirement::equals(key, value)]);
    let peer = |pods| Peer::Pods { namespaces: Namespaces::Matching(Selector::default()), pods };
    let peers = [with("app", GATE.to_owned()), with("pod", format!("p{PEER}"))];
    let ingress = Some(peers.into_iter().map(|it| rule(peer(it), WEB)).collect());
    let pods = with("pod", format!("p{SERVER}"));
    let policy = NetworkPolicy { pods, ingress, ..NetworkPolicy::default() };
    Change::NetworkPolicy(Name::new(namespace(SERVER / 10), GATE), Some(policy))
}
