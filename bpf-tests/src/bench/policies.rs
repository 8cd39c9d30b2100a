//! What policies cost: from objects to tables, from one relabelled pod to tables, a refused packet, and memory. A cluster of
//! 5,000 pods, 100 of them here, and more and more policies; the agent's own stages over the kernel's tables.

use std::{
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

use super::{add_changes, control::write_all, figure::Report};
use crate::{
    run::{DEFAULTS, Program, Programs},
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
const TABLES: [&str; 6] =
    ["ipcache", "ipcache_ranges", "policy", "port_ranges", "policy_sets", "peer_classes"];

pub(super) fn measure(sandbox: &Sandbox, report: &mut Report) -> Result<()> {
    for policies in POLICIES {
        let mut programs = Programs::load(&sandbox.place()?, DEFAULTS)?;
        let mut agent = agent(programs.maps()?)?;
        let size = policies as usize;
        let objects = (0..PODS).map(|it| pod(it, &(it / 10).to_string()));
        let routes = (0..PODS).step_by(LOCAL as usize).map(|it| Change::LocalRoute(addr(it), Some(1)));
        let objects: Vec<_> = objects.chain(routes).chain((0..policies).map(policy)).collect();
        let start = Instant::now();
        for object in objects {
            agent.handle(object, start);
        }
        agent.synced();
        write_all(&mut agent)?;
        let cold = start.elapsed().as_secs_f64() * 1e3;
        report.add_value("policy/tables/ferroflow", size, (cold, "ms"))?;
        add_changes(report, ("policy-relabel", size), &relabels(&mut agent)?)?;
        report.add_value("policy/refused-packet/ferroflow", size, (refused(&mut programs)?, "ns"))?;
        let bytes: u64 = TABLES.iter().map(|table| memory(&programs, table)).sum::<Result<_>>()?;
        report.add_value("memory/policy-tables/ferroflow", size, (bytes as f64 / 1e6, "MB"))?;
    }
    Ok(())
}

fn agent(maps: KernelMaps) -> Result<Reconciler<KernelMaps>> {
    let (limits, plan) = (Limits { services: 1, frontends: 1 }, ferroflow::plan::Config::default());
    let config = Config { node: NODE.into(), limits, plan, grace: Duration::from_secs(2), clock: || 0 };
    Ok(Reconciler::restore(maps, &config, Instant::now())?)
}

/// From the changed object of a pod, of this node or of another, to the tables.
fn relabels(agent: &mut Reconciler<KernelMaps>) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    for round in 0..RELABELS {
        let change = pod(round * 7 % PODS, &(round % 500).to_string());
        let start = Instant::now();
        agent.handle(change, start);
        write_all(agent)?;
        took.push(start.elapsed());
    }
    Ok(took)
}

/// The best of some runs; a packet between two pods of this node that policies let nothing through of.
fn refused(programs: &mut Programs) -> Result<f64> {
    let packet = Frame::tcp((addr(0), 40_000), (addr(LOCAL), 81), Flags::SYN).build();
    let mut best = Duration::MAX;
    for _ in 0..RUNS {
        best = best.min(programs.time(Program::PodEgress, &packet, REPEAT)?);
    }
    Ok(best.as_nanos() as f64)
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
    let node = if number.is_multiple_of(LOCAL) { NODE } else { "there" };
    let object = Pod { node: node.into(), addresses: Box::new([addr(number)]), labels, ..Pod::default() };
    Change::Pod(Name::new(namespace(number / 10), name), Some(object))
}

fn namespace(number: u32) -> String {
    format!("n{}", number % 20)
}

/// Lets one application in from another and from a range of the world.
fn policy(number: u32) -> Change {
    let app = |number: u32| Selector::new([Requirement::equals("app", (number % 500).to_string())]);
    let rule = |peer, port| {
        let number = PortNumber::Range(Port::new(port), Port::new(port));
        Rule { peers: Box::new([peer]), ports: Box::new([PolicyPort { proto: Proto::TCP, number }]) }
    };
    let near = Peer::Pods { namespaces: Namespaces::Own, pods: app(number + 20) };
    let range = Prefix::around(Addr::v4([172, 16, (number % 256) as u8, 0]), 24);
    let far = range.map(|range| rule(Peer::Block(Block { range, except: Box::default() }), 443));
    // Every hundredth is about pods of this node that packets are sent to.
    let pods = if number.is_multiple_of(100) { Selector::default() } else { app(number) };
    let ingress = Some([rule(near, 80)].into_iter().chain(far).collect());
    let policy = NetworkPolicy { pods, ingress, ..NetworkPolicy::default() };
    let namespace = if number.is_multiple_of(100) { namespace(LOCAL / 10) } else { namespace(number) };
    Change::NetworkPolicy(Name::new(namespace, format!("np{number}")), Some(policy))
}
